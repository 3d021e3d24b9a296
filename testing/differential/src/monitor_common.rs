//! What the monitors share: routines whose 32-bit code means the same in 64-bit mode.
//!
//! All memory that they name lies below 4 GiB and is mapped to itself.

use iced_x86::code_asm::*;

use crate::layout::*;

type Emitted = Result<(), iced_x86::IcedError>;

/// Pages of the working area, each of which has a checksum in the record.
pub(crate) const PAGES: usize = (WORK_LEN >> 12) as usize;

/// Exceptions that push an error code (SDM vol. 3, table 6-1).
pub(crate) fn has_error_code(vector: u64) -> bool {
    matches!(vector, 8 | 10..=14 | 17 | 21)
}

/// No interrupts from outside.
pub(crate) fn mask_interrupts(a: &mut CodeAssembler) -> Emitted {
    a.cli()?;
    a.mov(al, 0xff)?;
    a.out(0x21, al)?;
    a.out(0xa1, al)
}

/// Copies `len` bytes.
pub(crate) fn copy(a: &mut CodeAssembler, from: u64, to: u64, len: u64) -> Emitted {
    a.cld()?;
    a.mov(esi, from as i32)?;
    a.mov(edi, to as i32)?;
    a.mov(ecx, (len / 4) as i32)?;
    a.rep().movsd()
}

pub(crate) fn restore_work(a: &mut CodeAssembler) -> Emitted {
    copy(a, PRISTINE, WORK, WORK_LEN)
}

/// After the last case: the debug-exit port. Before it, goes on with EAX the case's number.
pub(crate) fn stop_after(a: &mut CodeAssembler, cases: usize) -> Emitted {
    let mut run = a.create_label();
    let mut end = a.create_label();
    a.mov(eax, dword_ptr(INDEX))?;
    a.cmp(eax, cases as i32)?;
    a.jb(run)?;
    a.mov(al, 0)?;
    a.out(0xf4, al)?;
    a.set_label(&mut end)?;
    a.hlt()?;
    a.jmp(end)?;
    a.set_label(&mut run)?;
    a.nop()
}

/// Copies the inner code of case EAX to where it runs, and leaves the address of the case in EAX.
pub(crate) fn place_inner(a: &mut CodeAssembler) -> Emitted {
    a.shl(eax, CASE_LEN.trailing_zeros())?;
    a.add(eax, CASES as i32)?;
    a.lea(esi, dword_ptr(eax + INNER_LEN as i32))?;
    a.mov(edi, INNER as i32)?;
    a.mov(ecx, (INNER_LEN / 4) as i32)?;
    a.rep().movsd()
}

/// Records `count` model-specific registers from number `first` of the record on (two numbers each), and sets
/// them back.
pub(crate) fn exchange_msrs(a: &mut CodeAssembler, first: usize, count: usize) -> Emitted {
    let mut next = a.create_label();
    a.mov(esi, MSRS as i32)?;
    a.mov(edi, (RECORD + first as u64 * 4) as i32)?;
    a.set_label(&mut next)?;
    a.mov(ecx, dword_ptr(esi))?;
    a.rdmsr()?;
    a.mov(dword_ptr(edi), eax)?;
    a.mov(dword_ptr(edi + 4), edx)?;
    a.mov(eax, dword_ptr(esi + 4))?;
    a.mov(edx, dword_ptr(esi + 8))?;
    a.wrmsr()?;
    a.add(esi, 12)?;
    a.add(edi, 8)?;
    a.cmp(esi, MSRS as i32 + 12 * count as i32)?;
    a.jb(next)
}

/// Puts a checksum of what changed in each page of the working area into the record; 0 where nothing did.
pub(crate) fn checksums(a: &mut CodeAssembler, first: usize) -> Emitted {
    let mut page = a.create_label();
    let mut more = a.create_label();
    let mut same = a.create_label();
    a.cld()?;
    a.mov(esi, WORK as i32)?;
    a.mov(ebp, (RECORD + first as u64 * 4) as i32)?;
    a.set_label(&mut page)?;
    a.lea(edi, dword_ptr(esi + (PRISTINE - WORK) as i32))?;
    a.mov(ecx, 1024)?;
    a.xor(edx, edx)?;
    a.set_label(&mut more)?;
    a.repe().cmpsd()?;
    a.je(same)?;
    a.rol(edx, 5)?;
    a.add(edx, dword_ptr(esi - 4))?;
    a.rol(edx, 7)?;
    a.add(edx, ecx)?;
    a.set_label(&mut same)?;
    a.test(ecx, ecx)?;
    a.jnz(more)?;
    a.mov(dword_ptr(ebp), edx)?;
    a.add(ebp, 4)?;
    a.cmp(esi, (WORK + WORK_LEN) as i32)?;
    a.jb(page)
}

/// A routine that writes the case's number, then position and value of each of `numbers` that is unusual.
pub(crate) fn print(a: &mut CodeAssembler, numbers: usize) -> Emitted {
    let mut number = a.create_label();
    let mut usual = a.create_label();
    let mut hex = a.create_label();
    let mut send = a.create_label();
    a.mov(ebx, dword_ptr(INDEX))?;
    a.mov(ebp, 8)?;
    a.call(hex)?;
    a.xor(ecx, ecx)?;
    a.set_label(&mut number)?;
    a.mov(eax, dword_ptr(ecx * 4 + RECORD as i32))?;
    a.cmp(eax, dword_ptr(ecx * 4 + USUAL as i32))?;
    a.je(usual)?;
    a.mov(ebx, ecx)?;
    a.rol(ebx, 24)?;
    a.mov(ebp, 2)?;
    a.call(hex)?;
    a.mov(ebx, dword_ptr(ecx * 4 + RECORD as i32))?;
    a.mov(ebp, 8)?;
    a.call(hex)?;
    a.set_label(&mut usual)?;
    a.add(ecx, 1)?;
    a.cmp(ecx, numbers as i32)?;
    a.jb(number)?;
    a.mov(eax, 10)?;
    a.call(send)?;
    a.ret()?;
    hexadecimal(a, &mut hex, send)?;
    transmit(a, &mut send)
}

/// Writes EBP digits of EBX, the highest first, and a space.
fn hexadecimal(a: &mut CodeAssembler, hex: &mut CodeLabel, send: CodeLabel) -> Emitted {
    let mut decimal = a.create_label();
    a.set_label(hex)?;
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
    a.jnz(*hex)?;
    a.mov(eax, 0x20)?;
    a.call(send)?;
    a.ret()
}

/// Sends AL over the serial port.
fn transmit(a: &mut CodeAssembler, send: &mut CodeLabel) -> Emitted {
    let mut wait = a.create_label();
    a.set_label(send)?;
    a.mov(edi, eax)?;
    a.mov(edx, 0x3fd)?;
    a.set_label(&mut wait)?;
    a.in_(al, dx)?;
    a.test(al, 0x20)?;
    a.jz(wait)?;
    a.mov(edx, 0x3f8)?;
    a.mov(eax, edi)?;
    a.out(dx, al)?;
    a.ret()
}
