//! The monitor's part in real mode: the way from protected mode to a case, and from the interrupt table back.
//!
//! ```text
//! NEXT (32 bits) ─► ENTER (16 bits, protected) ─► real mode ─► case ─► interrupt ─► stub ─► LEAVE ─► FROM_REAL ─► FINISH
//! ```
//!
//! It lies at [`REAL`], which is offset 0 of its segment; what it saves has the positions of a record of
//! `monitor32.rs`.

use iced_x86::code_asm::*;

use crate::case::assemble;
use crate::layout::*;
use crate::monitor_common::copy;
use crate::monitor32::{at, initial};

type Emitted = Result<(), iced_x86::IcedError>;

/// Segment values that a case starts with: DS, ES, FS, GS, SS, CS.
pub(crate) const DS: u16 = 0x1e00;
pub(crate) const ES: u16 = 0x1222;
pub(crate) const FS: u16 = 0x1333;
pub(crate) const GS: u16 = 0x1444;
pub(crate) const SS: u16 = 0x1000;
pub(crate) const CS: u16 = (INNER >> 4) as u16;
/// SP that a case starts with.
pub(crate) const SP: u32 = (CASE_STACK - WORK) as u32;
/// CR0 in real mode.
const CR0: u32 = 0x30;

const SEGMENT: u16 = (REAL >> 4) as u16;
/// Offsets: what is saved, then code.
const SAVED: u64 = 0;
const ENTER: u64 = 0x100;
const ENTERED: u64 = 0x180;
const LEAVE: u64 = 0x300;
const STUBS: u64 = 0x600;

/// The record of a case that changes nothing.
pub(crate) fn usual() -> Vec<u32> {
    let mut numbers = crate::monitor32::usual();
    numbers[7 - 4] = SP;
    for (i, value) in [DS, ES, FS, GS].into_iter().enumerate() {
        numbers[at::DS + i] = value.into();
    }
    numbers[at::CR0] = CR0;
    numbers[at::IDTR] = 0x3ff << 16;
    numbers[at::IDTR + 1] = 0;
    numbers
}

/// The pieces and where they go.
pub(crate) fn pieces() -> anyhow::Result<Vec<(u64, Vec<u8>)>> {
    let mut pieces = vec![(FROM_REAL, assemble(32, FROM_REAL, &from_real)?)];
    for (at, code) in [
        (ENTER, assemble(16, ENTER, &to_real)?),
        (ENTERED, assemble(16, ENTERED, &start)?),
        (LEAVE, assemble(16, LEAVE, &leave)?),
    ] {
        pieces.push((PRISTINE_REAL + at, code));
    }
    for vector in 0..256_u64 {
        let at = STUBS + vector * 8;
        // A word of the vector, whatever the stack segment.
        let stub = assemble(16, at, &|a| {
            a.db(&[0x68, vector as u8, 0])?;
            a.jmp(LEAVE)
        })?;
        pieces.push((PRISTINE_REAL + at, stub));
        let entry = at as u32 | u32::from(SEGMENT) << 16;
        pieces.push((PRISTINE_VECTORS + vector * 4, entry.to_le_bytes().to_vec()));
    }
    // LIDT's operand for the interrupt table.
    pieces.push((PRISTINE_REAL + 0xf0, vec![0xff, 0x03, 0, 0, 0, 0]));
    let mut gdtr = GDT_LIMIT.to_le_bytes().to_vec();
    gdtr.extend((GDT as u32).to_le_bytes());
    pieces.push((PRISTINE_REAL + 0xf8, gdtr));
    Ok(pieces)
}

/// A far jump to a constant: opcode, offset, selector.
fn far_jump(a: &mut CodeAssembler, selector: u16, offset: u16) -> Emitted {
    let ([a0, a1], [s0, s1]) = (offset.to_le_bytes(), selector.to_le_bytes());
    a.db(&[0xea, a0, a1, s0, s1])
}

/// 32 bits, the end of NEXT.
pub(crate) fn enter(a: &mut CodeAssembler) -> Emitted {
    copy(a, PRISTINE_VECTORS, 0, 0x400)?;
    copy(a, PRISTINE_REAL, REAL, REAL_LEN)?;
    a.push(2)?;
    a.popfd()?;
    a.lidt(fword_ptr(REAL + 0xf0))?;
    a.push(i32::from(sel::REAL_CODE))?;
    a.push(ENTER as i32)?;
    a.retf()
}

/// 16 bits, still protected: segments of real mode's shape, then real mode (SDM vol. 3, 10.9.2).
fn to_real(a: &mut CodeAssembler) -> Emitted {
    a.mov(ax, i32::from(sel::REAL_DATA))?;
    for register in [ds, es, fs, gs, ss] {
        a.mov(register, ax)?;
    }
    a.mov(eax, CR0 as i32)?;
    a.mov(cr0, eax)?;
    far_jump(a, SEGMENT, ENTERED as u16)
}

fn start(a: &mut CodeAssembler) -> Emitted {
    for (register, value) in [(ds, DS), (es, ES), (fs, FS), (gs, GS), (ss, SS)] {
        a.mov(ax, i32::from(value))?;
        a.mov(register, ax)?;
    }
    a.mov(esp, SP as i32)?;
    for (i, register) in [eax, ecx, edx, ebx, ebp, esi, edi].into_iter().enumerate() {
        a.mov(register, initial(if i >= 4 { i + 1 } else { i }) as i32)?;
    }
    far_jump(a, CS, 0)
}

fn saved(at: usize) -> AsmMemoryOperand {
    dword_ptr(SAVED + at as u64 * 4).cs()
}

/// From the stub's frame (vector, IP, CS, FLAGS) to protected mode.
fn leave(a: &mut CodeAssembler) -> Emitted {
    for (i, register) in [eax, ecx, edx, ebx, esp, ebp, esi, edi].into_iter().enumerate() {
        a.mov(saved(7 - i), register)?;
    }
    a.mov(saved(at::FRAME_ESP), esp)?;
    for (i, register) in [ds, es, fs, gs].into_iter().enumerate() {
        a.mov(ax, register)?;
        a.movzx(eax, ax)?;
        a.mov(saved(at::DS + i), eax)?;
    }
    a.mov(ax, ss)?;
    a.movzx(eax, ax)?;
    a.mov(saved(at::VECTOR + 7), eax)?;
    a.xor(eax, eax)?;
    // Vector; IP, CS, FLAGS.
    for at in [at::VECTOR, at::VECTOR + 2, at::VECTOR + 3, at::VECTOR + 4] {
        a.pop(ax)?;
        a.mov(saved(at), eax)?;
    }
    a.mov(eax, cr0)?;
    a.mov(saved(at::CR0), eax)?;
    // 66h: with all 32 bits of the bases.
    a.db(&[0x66])?;
    a.sgdt(fword_ptr(SAVED + at::GDTR as u64 * 4 + 2).cs())?;
    a.db(&[0x66])?;
    a.sidt(fword_ptr(SAVED + at::IDTR as u64 * 4 + 2).cs())?;
    a.lgdt(fword_ptr(0xf8_u64).cs())?;
    a.mov(eax, 0x31)?;
    a.mov(cr0, eax)?;
    a.db(&[0x66, 0xea])?;
    a.db(&(FROM_REAL as u32).to_le_bytes())?;
    a.db(&sel::CODE32.to_le_bytes())
}

/// 32 bits: what was saved becomes the record.
fn from_real(a: &mut CodeAssembler) -> Emitted {
    a.mov(eax, i32::from(sel::DATA))?;
    for register in [ds, es, fs, gs, ss] {
        a.mov(register, ax)?;
    }
    a.mov(esp, MONITOR_STACK as i32)?;
    copy(a, REAL + SAVED, RECORD, 40 * 4)?;
    a.jmp(FINISH)
}
