//! The monitor in 32-bit protected mode.
//!
//! ```text
//! ENTRY ─► NEXT ─► case ─► exception ─► stub ─► COMMON ─► PRINT ─┐
//!            ▲       └── double fault: task switch ─► COMMON ─┘   │
//!            └────────────────────────────────────────────────────┘
//! ```

use iced_x86::code_asm::*;

use crate::case::assemble;
use crate::layout::*;

/// Numbers in a record.
pub(crate) const NUMBERS: usize = 28;

/// Exceptions that push an error code (SDM vol. 3, table 6-1).
pub(crate) fn has_error_code(vector: u64) -> bool {
    matches!(vector, 8 | 10..=14 | 17 | 21)
}

pub(crate) fn pieces(cases: usize) -> anyhow::Result<Vec<(u64, Vec<u8>)>> {
    let mut pieces = vec![
        (ENTRY, assemble(32, ENTRY, &enter)?),
        (NEXT, assemble(32, NEXT, &|a| next(a, cases))?),
        (COMMON, assemble(32, COMMON, &common)?),
        (PRINT, assemble(32, PRINT, &print)?),
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
    a.mov(eax, 0x31)?;
    a.mov(cr0, eax)?;
    restore_work(a)?;
    a.lgdt(fword_ptr(GDTR))?;
    a.push(i32::from(sel::CODE32))?;
    a.push(NEXT as i32)?;
    a.retf()
}

fn restore_work(a: &mut CodeAssembler) -> Emitted {
    a.cld()?;
    a.mov(esi, PRISTINE as i32)?;
    a.mov(edi, WORK as i32)?;
    a.mov(ecx, (WORK_LEN / 4) as i32)?;
    a.rep().movsd()
}

/// Restores the state that a case starts with and jumps to the case.
fn next(a: &mut CodeAssembler, cases: usize) -> Emitted {
    let mut run = a.create_label();
    let mut end = a.create_label();
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
    a.mov(dword_ptr(TARGET), eax)?;
    a.lea(esi, dword_ptr(eax + INNER_LEN as i32))?;
    a.mov(edi, INNER as i32)?;
    a.mov(ecx, (INNER_LEN / 4) as i32)?;
    a.rep().movsd()?;
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

/// From the stub's frame (vector, error code, EIP, CS, EFLAGS and perhaps more) to the record.
fn common(a: &mut CodeAssembler) -> Emitted {
    a.pushad()?;
    a.mov(ebx, ds)?;
    a.mov(ecx, i32::from(sel::DATA))?;
    a.mov(ds, cx)?;
    let at = |i: u64| dword_ptr(RECORD + i * 4);
    a.movzx(ebx, bx)?;
    a.mov(at(20), ebx)?;
    for (i, register) in [es, fs, gs].into_iter().enumerate() {
        a.mov(ebx, register)?;
        a.movzx(ebx, bx)?;
        a.mov(at(21 + i as u64), ebx)?;
    }
    a.mov(es, cx)?;
    a.cld()?;
    // Eight registers (EDI first), vector, error code, EIP, CS, EFLAGS, and six words of what is above.
    a.mov(edx, esp)?;
    a.mov(esi, edx)?;
    a.mov(edi, RECORD as i32)?;
    a.mov(ecx, 20 - 1)?;
    a.rep().movsd()?;
    a.mov(at(19), edx)?;
    a.mov(eax, cr2)?;
    a.mov(at(24), eax)?;
    a.mov(eax, dr6)?;
    a.mov(at(25), eax)?;
    a.xor(eax, eax)?;
    a.str(ax)?;
    a.mov(at(26), eax)?;
    a.mov(eax, cr0)?;
    a.mov(at(27), eax)?;
    // Back to the monitor's world.
    a.mov(ecx, i32::from(sel::DATA))?;
    a.mov(ss, cx)?;
    a.mov(esp, MONITOR_STACK as i32)?;
    a.mov(eax, 0x31)?;
    a.mov(cr0, eax)?;
    a.xor(eax, eax)?;
    a.mov(cr2, eax)?;
    a.mov(cr3, eax)?;
    a.mov(cr4, eax)?;
    a.mov(dr7, eax)?;
    a.mov(eax, 0xffff_0ff0_u32 as i32)?;
    a.mov(dr6, eax)?;
    a.mov(esi, RECORD as i32)?;
    a.mov(ecx, NUMBERS as i32)?;
    a.call(PRINT)?;
    a.inc(dword_ptr(INDEX))?;
    a.push(i32::from(sel::CODE32))?;
    a.push(NEXT as i32)?;
    a.retf()
}

/// Writes ECX numbers at ESI and a line feed.
pub(crate) fn print(a: &mut CodeAssembler) -> Emitted {
    let mut number = a.create_label();
    let mut digit = a.create_label();
    let mut decimal = a.create_label();
    let mut send = a.create_label();
    let mut wait = a.create_label();
    let mut done = a.create_label();
    a.set_label(&mut number)?;
    a.lodsd()?;
    a.mov(ebx, eax)?;
    a.mov(ebp, 8)?;
    a.set_label(&mut digit)?;
    a.rol(ebx, 4)?;
    a.mov(eax, ebx)?;
    a.and(eax, 15)?;
    a.cmp(eax, 10)?;
    a.jb(decimal)?;
    a.add(eax, i32::from(b'a' - b'0' - 10))?;
    a.set_label(&mut decimal)?;
    a.add(eax, i32::from(b'0'))?;
    a.call(send)?;
    a.sub(ebp, 1)?;
    a.jnz(digit)?;
    a.mov(eax, 0x20)?;
    a.call(send)?;
    a.sub(ecx, 1)?;
    a.jnz(number)?;
    a.mov(eax, 10)?;
    a.call(send)?;
    a.jmp(done)?;
    a.set_label(&mut send)?;
    a.mov(edi, eax)?;
    a.mov(edx, 0x3fd)?;
    a.set_label(&mut wait)?;
    a.in_(al, dx)?;
    a.test(al, 0x20)?;
    a.jz(wait)?;
    a.mov(edx, 0x3f8)?;
    a.mov(eax, edi)?;
    a.out(dx, al)?;
    a.ret()?;
    a.set_label(&mut done)?;
    a.ret()
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
