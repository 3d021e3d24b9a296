//! The monitor in 64-bit mode. It differs from the 32-bit one in that every gate switches to a stack of its own.

use iced_x86::code_asm::*;

use crate::case::assemble;
use crate::layout::*;
use crate::monitor_common::*;

/// Positions in a record, in numbers of 64 bits. The first 16 are the general registers.
pub(crate) mod at {
    use crate::monitor_common::PAGES;

    /// After the general registers come vector, error code, RIP, CS, RFLAGS, RSP, SS.
    pub(crate) const CR2: usize = 23;
    pub(crate) const DR6: usize = 24;
    pub(crate) const CR0: usize = 25;
    pub(crate) const CR4: usize = 26;
    /// DS, ES, FS, GS.
    pub(crate) const DS: usize = 27;
    /// FS, GS, kernel GS.
    pub(crate) const BASES: usize = 31;
    pub(crate) const CR3: usize = 34;
    pub(crate) const CR8: usize = 35;
    pub(crate) const DR0: usize = 36;
    pub(crate) const DR7: usize = 40;
    /// The limit in the number's highest word, then the base.
    pub(crate) const GDTR: usize = 41;
    pub(crate) const IDTR: usize = 43;
    pub(crate) const LDTR: usize = 45;
    pub(crate) const TR: usize = 46;
    pub(crate) const XCR0: usize = 47;
    pub(crate) const MSRS: usize = 48;
    /// Two to a number.
    pub(crate) const SUMS: usize = MSRS + super::MSRS.len();
    pub(crate) const END: usize = SUMS + PAGES / 2;
}

/// Model-specific registers of a record: EFER, STAR, LSTAR, CSTAR, FMASK, SYSENTER_CS, _ESP, _EIP, TSC_AUX, PAT.
pub(crate) const MSRS: &[(u32, u64)] = &[
    (0xc000_0080, EFER_VALUE as u64 | 0x400),
    (0xc000_0081, 0),
    (0xc000_0082, 0),
    (0xc000_0083, 0),
    (0xc000_0084, 0),
    (0x174, 0),
    (0x175, 0),
    (0x176, 0),
    (0xc000_0103, 0),
    (0x277, 0x0007_0406_0007_0406),
];
const EFER: i32 = 0xc000_0080_u32 as i32;
const FS_BASE: i32 = 0xc000_0100_u32 as i32;
/// CR4 of the monitor: PAE, OSFXSR; and with OSXSAVE.
const CR4: i32 = 0x220;
const CR4_XSAVE: i32 = 0x4_0220;
/// EFER of the monitor: SCE, LME, NXE.
const EFER_VALUE: i32 = 0x901;
const CR0: u32 = 0x8001_0031;

/// The record of a case that changes nothing, low halves first.
pub(crate) fn usual() -> Vec<u32> {
    let mut numbers = vec![0_u64; at::END];
    for (i, number) in numbers.iter_mut().enumerate().take(16) {
        *number = initial(i);
    }
    numbers[at::DR6] = 0xffff_0ff0;
    numbers[at::CR0] = CR0.into();
    numbers[at::CR4] = CR4 as u64;
    for number in &mut numbers[at::DS..at::DS + 4] {
        *number = sel::DATA.into();
    }
    numbers[at::CR3] = PML4;
    numbers[at::DR7] = 0x400;
    numbers[at::GDTR] = u64::from(GDT_LIMIT) << 48;
    numbers[at::GDTR + 1] = GDT;
    numbers[at::IDTR] = 0xfff << 48;
    numbers[at::IDTR + 1] = IDT;
    numbers[at::TR] = sel::TSS.into();
    numbers[at::XCR0] = 1;
    for (i, (_, value)) in MSRS.iter().enumerate() {
        numbers[at::MSRS + i] = *value;
    }
    numbers.into_iter().flat_map(|n| [n as u32, (n >> 32) as u32]).collect()
}

pub(crate) fn pieces(cases: usize) -> anyhow::Result<Vec<(u64, Vec<u8>)>> {
    let mut pieces = vec![
        (ENTRY, assemble(32, ENTRY, &enter)?),
        (NEXT, assemble(64, NEXT, &|a| next(a, cases))?),
        (COMMON, assemble(64, COMMON, &common)?),
        (PRINT, assemble(64, PRINT, &|a| print(a, 2 * at::END))?),
    ];
    for vector in 0..VECTORS {
        let at = STUBS + vector * 16;
        let stub = assemble(64, at, &|a| {
            if !has_error_code(vector) {
                a.push(0_i32)?;
            }
            a.push(vector as i32)?;
            a.jmp(COMMON)
        })?;
        pieces.push((at, stub));
    }
    Ok(pieces)
}

type Emitted = Result<(), iced_x86::IcedError>;

fn enter(a: &mut CodeAssembler) -> Emitted {
    mask_interrupts(a)?;
    a.mov(esp, MONITOR_STACK as i32)?;
    restore_work(a)?;
    a.lgdt(fword_ptr(GDTR))?;
    a.mov(eax, CR4)?;
    a.mov(cr4, eax)?;
    a.mov(eax, PML4 as i32)?;
    a.mov(cr3, eax)?;
    a.mov(ecx, EFER)?;
    a.xor(edx, edx)?;
    a.mov(eax, EFER_VALUE)?;
    a.wrmsr()?;
    a.mov(eax, CR0 as i32)?;
    a.mov(cr0, eax)?;
    a.push(i32::from(sel::CODE64))?;
    a.push(NEXT as i32)?;
    a.retf()
}

/// Restores the state that a case starts with and jumps to the case.
fn next(a: &mut CodeAssembler, cases: usize) -> Emitted {
    // The tables before anything that relies on them; memory reached here is mapped whatever a case did to
    // the window's entry.
    restore_work(a)?;
    a.mov(eax, PML4 as i32)?;
    a.mov(cr3, rax)?;
    a.lgdt(ptr(GDTR))?;
    a.lidt(ptr(IDTR))?;
    a.mov(eax, i32::from(sel::DATA))?;
    for register in [ds, es, fs, gs, ss] {
        a.mov(register, ax)?;
    }
    a.mov(rsp, MONITOR_STACK)?;
    a.xor(eax, eax)?;
    a.xor(edx, edx)?;
    for i in 0..3 {
        a.mov(ecx, FS_BASE + i)?;
        a.wrmsr()?;
    }
    a.lldt(ax)?;
    a.mov(eax, i32::from(sel::TSS))?;
    a.ltr(ax)?;
    stop_after(a, cases)?;
    place_inner(a)?;
    a.mov(qword_ptr(TARGET), rax)?;
    for (i, register) in REGISTERS.into_iter().enumerate() {
        if i != 4 {
            a.mov(register, initial(i))?;
        }
    }
    a.mov(rsp, CASE_STACK)?;
    a.push(2)?;
    a.popfq()?;
    a.jmp(qword_ptr(TARGET))
}

const REGISTERS: [AsmRegister64; 16] =
    [rax, rcx, rdx, rbx, rsp, rbp, rsi, rdi, r8, r9, r10, r11, r12, r13, r14, r15];

/// What general register `i` holds when a case starts.
pub(crate) fn initial(i: usize) -> u64 {
    if i == 4 {
        CASE_STACK
    } else {
        0x0123_4567_1234_5678_u64.wrapping_add(0x0101_0101_0101_0101_u64.wrapping_mul(i as u64))
    }
}

/// From the stub's frame (vector, error code, RIP, CS, RFLAGS, RSP, SS) to the record.
fn common(a: &mut CodeAssembler) -> Emitted {
    for register in REGISTERS.into_iter().rev() {
        a.push(register)?;
    }
    a.cld()?;
    a.mov(rsi, rsp)?;
    a.mov(rdi, RECORD)?;
    a.mov(ecx, at::CR2 as i32)?;
    a.rep().movsq()?;
    let cr = [(at::CR0, cr0), (at::CR2, cr2), (at::CR3, cr3), (at::CR4, cr4), (at::CR8, cr8)];
    for (at, register) in cr {
        a.mov(rax, register)?;
        a.mov(number(at), rax)?;
    }
    let debug = [(at::DR0, dr0), (at::DR0 + 1, dr1), (at::DR0 + 2, dr2), (at::DR0 + 3, dr3)];
    for (at, register) in debug.into_iter().chain([(at::DR6, dr6), (at::DR7, dr7)]) {
        a.mov(rax, register)?;
        a.mov(number(at), rax)?;
    }
    for (i, register) in [ds, es, fs, gs].into_iter().enumerate() {
        a.mov(ebx, register)?;
        a.movzx(ebx, bx)?;
        a.mov(number(at::DS + i), rbx)?;
    }
    for i in 0..3 {
        a.mov(ecx, FS_BASE + i as i32)?;
        a.rdmsr()?;
        a.mov(number(at::BASES + i), eax)?;
        a.mov(number(at::BASES + i) + 4, edx)?;
    }
    a.sgdt(ptr(RECORD + at::GDTR as u64 * 8 + 6))?;
    a.sidt(ptr(RECORD + at::IDTR as u64 * 8 + 6))?;
    a.xor(eax, eax)?;
    a.str(ax)?;
    a.mov(number(at::TR), rax)?;
    a.sldt(ax)?;
    a.mov(number(at::LDTR), rax)?;
    reset(a)?;
    exchange_msrs(a, 2 * at::MSRS, MSRS.len())?;
    checksums(a, 2 * at::SUMS)?;
    a.call(PRINT)?;
    a.inc(dword_ptr(INDEX))?;
    a.jmp(NEXT)
}

fn number(at: usize) -> AsmMemoryOperand {
    ptr(RECORD + at as u64 * 8)
}

/// Brings back the monitor's world, but for the model-specific registers.
fn reset(a: &mut CodeAssembler) -> Emitted {
    a.mov(rsp, MONITOR_STACK)?;
    a.mov(eax, CR0)?;
    a.mov(cr0, rax)?;
    a.mov(eax, CR4_XSAVE)?;
    a.mov(cr4, rax)?;
    a.xor(ecx, ecx)?;
    a.xgetbv()?;
    a.mov(number(at::XCR0), eax)?;
    a.mov(eax, 1)?;
    a.xor(edx, edx)?;
    a.xsetbv()?;
    a.fninit()?;
    a.mov(eax, CR4)?;
    a.mov(cr4, rax)?;
    a.xor(eax, eax)?;
    a.mov(cr2, rax)?;
    a.mov(cr8, rax)?;
    for register in [dr7, dr0, dr1, dr2, dr3] {
        a.mov(register, rax)?;
    }
    a.mov(eax, 0xffff_0ff0_u32)?;
    a.mov(dr6, rax)
}
