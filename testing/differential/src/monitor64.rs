//! The monitor in 64-bit mode. It differs from the 32-bit one in that every gate switches to a stack of its own.

use iced_x86::code_asm::*;

use crate::case::assemble;
use crate::layout::*;
use crate::monitor32::{has_error_code, print};

/// 32-bit numbers in a record: 34 of 64 bits, low half first.
pub(crate) const NUMBERS: usize = 68;
const EFER: i32 = 0xc000_0080_u32 as i32;
const FS_BASE: i32 = 0xc000_0100_u32 as i32;
/// CR4 of the monitor: PAE, OSFXSR.
const CR4: i32 = 0x220;
/// EFER of the monitor: SCE, LME, NXE.
const EFER_VALUE: i32 = 0x901;

pub(crate) fn pieces(cases: usize) -> anyhow::Result<Vec<(u64, Vec<u8>)>> {
    let mut pieces = vec![
        (ENTRY, assemble(32, ENTRY, &enter)?),
        (NEXT, assemble(64, NEXT, &|a| next(a, cases))?),
        (COMMON, assemble(64, COMMON, &common)?),
        (PRINT, assemble(64, PRINT, &print64)?),
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
    a.cli()?;
    // No interrupts from outside.
    a.mov(al, 0xff)?;
    a.out(0x21, al)?;
    a.out(0xa1, al)?;
    a.mov(esp, MONITOR_STACK as i32)?;
    a.cld()?;
    a.mov(esi, PRISTINE as i32)?;
    a.mov(edi, WORK as i32)?;
    a.mov(ecx, (WORK_LEN / 4) as i32)?;
    a.rep().movsd()?;
    a.lgdt(fword_ptr(GDTR))?;
    a.mov(eax, CR4)?;
    a.mov(cr4, eax)?;
    a.mov(eax, PML4 as i32)?;
    a.mov(cr3, eax)?;
    a.mov(ecx, EFER)?;
    a.xor(edx, edx)?;
    a.mov(eax, EFER_VALUE)?;
    a.wrmsr()?;
    a.mov(eax, 0x8001_0031_u32 as i32)?;
    a.mov(cr0, eax)?;
    a.push(i32::from(sel::CODE64))?;
    a.push(NEXT as i32)?;
    a.retf()
}

/// Restores the state that a case starts with and jumps to the case.
fn next(a: &mut CodeAssembler, cases: usize) -> Emitted {
    let mut run = a.create_label();
    let mut end = a.create_label();
    // The tables before anything that relies on them; memory reached here is mapped whatever a case did to
    // the window's entry.
    a.cld()?;
    a.mov(rsi, PRISTINE)?;
    a.mov(rdi, WORK)?;
    a.mov(ecx, (WORK_LEN / 4) as i32)?;
    a.rep().movsd()?;
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
    a.mov(eax, dword_ptr(INDEX))?;
    a.cmp(eax, cases as i32)?;
    a.jb(run)?;
    a.mov(al, 0)?;
    a.out(0xf4, al)?;
    a.set_label(&mut end)?;
    a.hlt()?;
    a.jmp(end)?;
    a.set_label(&mut run)?;
    a.shl(eax, CASE_LEN.trailing_zeros())?;
    a.add(eax, CASES as i32)?;
    a.mov(qword_ptr(TARGET), rax)?;
    a.lea(rsi, qword_ptr(rax + INNER_LEN as i32))?;
    a.mov(rdi, INNER)?;
    a.mov(ecx, (INNER_LEN / 4) as i32)?;
    a.rep().movsd()?;
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
    let at = |i: u64| qword_ptr(RECORD + i * 8);
    a.cld()?;
    a.mov(rsi, rsp)?;
    a.mov(rdi, RECORD)?;
    a.mov(ecx, 23)?;
    a.rep().movsq()?;
    a.mov(rax, cr2)?;
    a.mov(at(23), rax)?;
    a.mov(rax, dr6)?;
    a.mov(at(24), rax)?;
    a.mov(rax, cr0)?;
    a.mov(at(25), rax)?;
    a.mov(rax, cr4)?;
    a.mov(at(26), rax)?;
    for (i, register) in [ds, es, fs, gs].into_iter().enumerate() {
        a.mov(ebx, register)?;
        a.movzx(ebx, bx)?;
        a.mov(at(27 + i as u64), rbx)?;
    }
    for i in 0..3_u64 {
        a.mov(ecx, FS_BASE + i as i32)?;
        a.rdmsr()?;
        a.mov(dword_ptr(RECORD + (31 + i) * 8), eax)?;
        a.mov(dword_ptr(RECORD + (31 + i) * 8 + 4), edx)?;
    }
    a.mov(rsp, MONITOR_STACK)?;
    a.mov(eax, 0x8001_0031_u32)?;
    a.mov(cr0, rax)?;
    a.mov(eax, CR4)?;
    a.mov(cr4, rax)?;
    a.xor(eax, eax)?;
    a.mov(cr2, rax)?;
    a.mov(cr8, rax)?;
    a.mov(dr7, rax)?;
    a.mov(eax, 0xffff_0ff0_u32)?;
    a.mov(dr6, rax)?;
    a.mov(ecx, EFER)?;
    a.xor(edx, edx)?;
    a.mov(eax, EFER_VALUE | 0x400)?;
    a.wrmsr()?;
    a.mov(rsi, RECORD)?;
    a.mov(ecx, NUMBERS as i32)?;
    a.call(PRINT)?;
    a.inc(dword_ptr(INDEX))?;
    a.jmp(NEXT)
}

/// The 32-bit routine's code means the same in 64-bit mode, numbers being counted in halves.
fn print64(a: &mut CodeAssembler) -> Emitted {
    print(a)
}
