//! The monitor in 32-bit protected mode. It also runs the cases of real mode, with `monitor_real.rs` between it
//! and them.
//!
//! ```text
//! ENTRY ─► NEXT ─► case ─► exception ─► stub ─► COMMON ─────► FINISH ─► PRINT ─┐
//!            ▲       └── double fault: task switch ─► COMMON ─┘                 │
//!            └──────────────────────────────────────────────────────────────────┘
//! ```

use iced_x86::code_asm::*;

use crate::case::{Width, assemble};
use crate::layout::*;
use crate::monitor_common::*;
use crate::monitor_real;

/// Positions in a record. The first eight are the general registers, EDI first.
pub(crate) mod at {
    use crate::monitor_common::PAGES;

    /// Vector, error code, EIP, CS, EFLAGS and six words of what lies above them.
    pub(crate) const VECTOR: usize = 8;
    pub(crate) const FRAME_ESP: usize = 19;
    /// DS, ES, FS, GS.
    pub(crate) const DS: usize = 20;
    pub(crate) const CR2: usize = 24;
    pub(crate) const DR6: usize = 25;
    pub(crate) const TR: usize = 26;
    pub(crate) const CR0: usize = 27;
    pub(crate) const CR3: usize = 28;
    pub(crate) const CR4: usize = 29;
    pub(crate) const DR0: usize = 30;
    pub(crate) const DR7: usize = 34;
    /// The limit in the number's upper half, then the base.
    pub(crate) const GDTR: usize = 35;
    pub(crate) const IDTR: usize = 37;
    pub(crate) const LDTR: usize = 39;
    pub(crate) const XCR0: usize = 40;
    /// Two numbers each.
    pub(crate) const MSRS: usize = 41;
    pub(crate) const SUMS: usize = MSRS + 2 * super::MSRS.len();
    pub(crate) const END: usize = SUMS + PAGES;
}

/// Model-specific registers of a record: SYSENTER_CS, _ESP, _EIP, EFER.
pub(crate) const MSRS: &[(u32, u64)] = &[(0x174, 0), (0x175, 0), (0x176, 0), (0xc000_0080, 0)];
/// CR4.OSXSAVE.
const OSXSAVE: i32 = 1 << 18;
const RF: i32 = 1 << 16;

/// The record of a case that changes nothing.
pub(crate) fn usual() -> Vec<u32> {
    let mut numbers = vec![0; at::END];
    for i in 0..8 {
        numbers[7 - i] = initial(i);
    }
    for number in &mut numbers[at::DS..at::DS + 4] {
        *number = sel::DATA.into();
    }
    numbers[at::DR6] = 0xffff_0ff0;
    numbers[at::TR] = sel::TSS.into();
    numbers[at::CR0] = 0x31;
    numbers[at::DR7] = 0x400;
    numbers[at::GDTR] = u32::from(GDT_LIMIT) << 16;
    numbers[at::GDTR + 1] = GDT as u32;
    numbers[at::IDTR] = 0xfff << 16;
    numbers[at::IDTR + 1] = IDT as u32;
    numbers[at::XCR0] = 1;
    numbers
}

/// The pieces of the monitor and where they go.
pub(crate) fn pieces(width: Width, cases: usize) -> anyhow::Result<Vec<(u64, Vec<u8>)>> {
    let mut pieces = vec![
        (ENTRY, assemble(32, ENTRY, &enter)?),
        (NEXT, assemble(32, NEXT, &|a| next(a, width, cases))?),
        (COMMON, assemble(32, COMMON, &common)?),
        (FINISH, assemble(32, FINISH, &finish)?),
        (PRINT, assemble(32, PRINT, &|a| print(a, at::END))?),
        (DOUBLE_FAULT, assemble(32, DOUBLE_FAULT, &double_fault)?),
    ];
    for vector in 0..VECTORS {
        let at = STUBS + vector * 16;
        let stub = assemble(32, at, &|a| {
            if !has_error_code(vector) {
                a.push(0_i32)?;
            }
            a.push(vector as i32)?;
            a.jmp(COMMON)
        })?;
        pieces.push((at, stub));
    }
    if width == Width::Real {
        pieces.extend(monitor_real::pieces()?);
    }
    Ok(pieces)
}

type Emitted = Result<(), iced_x86::IcedError>;

fn enter(a: &mut CodeAssembler) -> Emitted {
    mask_interrupts(a)?;
    a.mov(esp, MONITOR_STACK as i32)?;
    a.mov(eax, 0x31)?;
    a.mov(cr0, eax)?;
    restore_work(a)?;
    a.lgdt(fword_ptr(GDTR))?;
    a.push(i32::from(sel::CODE32))?;
    a.push(NEXT as i32)?;
    a.retf()
}

/// Restores the state that a case starts with and jumps to the case.
fn next(a: &mut CodeAssembler, width: Width, cases: usize) -> Emitted {
    restore_work(a)?;
    a.lgdt(fword_ptr(GDTR))?;
    a.lidt(fword_ptr(IDTR))?;
    a.mov(eax, i32::from(sel::DATA))?;
    for register in [ds, es, fs, gs, ss] {
        a.mov(register, ax)?;
    }
    a.mov(esp, MONITOR_STACK as i32)?;
    a.xor(eax, eax)?;
    a.lldt(ax)?;
    a.mov(eax, i32::from(sel::TSS))?;
    a.ltr(ax)?;
    stop_after(a, cases)?;
    place_inner(a)?;
    if width == Width::Real {
        return monitor_real::enter(a);
    }
    a.mov(dword_ptr(TARGET), eax)?;
    for (i, register) in [eax, ecx, edx, ebx, ebp, esi, edi].into_iter().enumerate() {
        a.mov(register, initial(if i >= 4 { i + 1 } else { i }) as i32)?;
    }
    a.mov(esp, CASE_STACK as i32)?;
    a.push(2)?;
    a.popfd()?;
    a.jmp(dword_ptr(TARGET))
}

/// What general register `i` holds when a case starts.
pub(crate) fn initial(i: usize) -> u32 {
    if i == 4 {
        CASE_STACK as u32
    } else {
        0x1234_5678_u32.wrapping_add(0x1101_0101_u32.wrapping_mul(i as u32))
    }
}

fn number(at: usize) -> AsmMemoryOperand {
    dword_ptr(RECORD + at as u64 * 4)
}

/// From the stub's frame (vector, error code, EIP, CS, EFLAGS and perhaps more) to the record. The frame is read
/// by popping it, which is right for a stack segment of any base and size.
fn common(a: &mut CodeAssembler) -> Emitted {
    a.pushad()?;
    a.mov(ebx, ds)?;
    a.mov(ecx, i32::from(sel::DATA))?;
    a.mov(ds, cx)?;
    a.movzx(ebx, bx)?;
    a.mov(number(at::DS), ebx)?;
    for (i, register) in [es, fs, gs].into_iter().enumerate() {
        a.mov(ebx, register)?;
        a.movzx(ebx, bx)?;
        a.mov(number(at::DS + 1 + i), ebx)?;
    }
    a.mov(es, cx)?;
    a.mov(number(at::FRAME_ESP), esp)?;
    for i in 0..at::VECTOR + 5 {
        a.pop(number(i))?;
    }
    // RF in memory is not compared: the reference never pushes it.
    a.mov(eax, number(at::VECTOR + 4))?;
    a.and(eax, !RF)?;
    a.push(eax)?;
    a.pop(eax)?;
    for i in at::VECTOR + 5..at::FRAME_ESP {
        a.pop(number(i))?;
    }
    a.mov(eax, cr0)?;
    a.mov(number(at::CR0), eax)?;
    a.sgdt(fword_ptr(RECORD + at::GDTR as u64 * 4 + 2))?;
    a.sidt(fword_ptr(RECORD + at::IDTR as u64 * 4 + 2))?;
    a.jmp(FINISH)
}

/// Records the rest, brings back the monitor's world and goes on.
fn finish(a: &mut CodeAssembler) -> Emitted {
    let cr: [(usize, AsmRegisterCr); 3] = [(at::CR2, cr2), (at::CR3, cr3), (at::CR4, cr4)];
    for (at, register) in cr {
        a.mov(eax, register)?;
        a.mov(number(at), eax)?;
    }
    let debug = [(at::DR0, dr0), (at::DR0 + 1, dr1), (at::DR0 + 2, dr2), (at::DR0 + 3, dr3)];
    for (at, register) in debug.into_iter().chain([(at::DR6, dr6), (at::DR7, dr7)]) {
        a.mov(eax, register)?;
        a.mov(number(at), eax)?;
    }
    a.xor(eax, eax)?;
    a.str(ax)?;
    a.mov(number(at::TR), eax)?;
    a.sldt(ax)?;
    a.mov(number(at::LDTR), eax)?;
    a.mov(ecx, i32::from(sel::DATA))?;
    a.mov(ss, cx)?;
    a.mov(esp, MONITOR_STACK as i32)?;
    a.mov(eax, 0x31)?;
    a.mov(cr0, eax)?;
    a.xor(eax, eax)?;
    for register in [cr2, cr3] {
        a.mov(register, eax)?;
    }
    for register in [dr7, dr0, dr1, dr2, dr3] {
        a.mov(register, eax)?;
    }
    a.mov(eax, 0xffff_0ff0_u32 as i32)?;
    a.mov(dr6, eax)?;
    a.mov(eax, OSXSAVE)?;
    a.mov(cr4, eax)?;
    a.xor(ecx, ecx)?;
    a.xgetbv()?;
    a.mov(number(at::XCR0), eax)?;
    a.mov(eax, 1)?;
    a.xsetbv()?;
    a.xor(eax, eax)?;
    a.mov(cr4, eax)?;
    a.fninit()?;
    exchange_msrs(a, at::MSRS, MSRS.len())?;
    // RF of tasks that were left.
    for task in [TSS, TSS2] {
        a.and(dword_ptr(task + 0x24), !RF)?;
    }
    // The reference sets accessed bits in page-directory-pointer entries, which have none (SDM vol. 3, 4.4.1).
    for i in 0..3 {
        a.and(dword_ptr(PDPT_PAE + i * 8), !0x20)?;
    }
    checksums(a, at::SUMS)?;
    a.call(PRINT)?;
    a.inc(dword_ptr(INDEX))?;
    a.push(i32::from(sel::CODE32))?;
    a.push(NEXT as i32)?;
    a.retf()
}

/// The double-fault task: shows the interrupted task's CS:EIP and EFLAGS as if a gate had pushed them.
fn double_fault(a: &mut CodeAssembler) -> Emitted {
    a.pop(eax)?;
    a.push(dword_ptr(TSS + 0x24))?;
    a.push(dword_ptr(TSS + 0x4c))?;
    a.push(dword_ptr(TSS + 0x20))?;
    a.push(eax)?;
    a.push(8)?;
    a.jmp(COMMON)
}
