//! Seeded instruction sequences of 16-bit code: real mode, virtual-8086 mode, 16-bit segments of protected mode.

use std::ops::Range;

use iced_x86::Register;
use iced_x86::code_asm::*;

use crate::case::{Suite, Width};
use crate::family::Family;
use crate::generator::{Place, Sequence};
use crate::layout::*;
use crate::monitor_real as real;
use crate::protected;
use crate::rng::Rng;

/// Linear memory that operands may lie in: the page tables, which are not in use.
const SCRATCH: Range<u64> = PML4..GDT;
const ES: usize = 0;
const CS: usize = 1;
const SS: usize = 2;
const DS: usize = 3;

/// What the steps of a sequence may rely on.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Mode {
    Real,
    Virtual8086,
    /// CPL 0 or 3.
    Protected,
}

impl Mode {
    /// Whether a segment's base is 16 times its selector.
    fn paragraphs(self) -> bool {
        self != Self::Protected
    }
}

/// The cases with these numbers.
pub(crate) fn suite(family: Family, seed: u64, cases: Range<usize>) -> anyhow::Result<Suite> {
    let width = if family == Family::Real { Width::Real } else { Width::Protected };
    let mut s = Suite::new(width);
    s.memory = true;
    for index in cases {
        let mut rng = Rng::of_case(seed, index);
        let title = format!("seed {seed} case {index}: {}", family.name());
        match family {
            Family::Real => {
                let (code, tags) = paragraphs(&mut rng, Mode::Real);
                s.add_bytes(format!("{title} [{tags}]"), &|_| Ok(()), (16, 0), &code)?;
            }
            Family::Virtual8086 => {
                let iopl = if rng.one_in(4) { rng.below(3) } else { 3 } as i32;
                let (code, tags) = paragraphs(&mut rng, Mode::Virtual8086);
                let entry = |a: &mut CodeAssembler| protected::to_v86(a, iopl << 12);
                s.add_bytes(format!("{title} iopl{iopl} [{tags}]"), &entry, (16, 0), &code)?;
            }
            _ => protected16(&mut s, &title, &mut rng)?,
        }
    }
    Ok(s)
}

fn place() -> Place {
    Place { bits: 16, start: INNER, len: INNER_LEN as usize, scratch: SCRATCH, limit: 0xffff }
}

/// A sequence whose segments have bases of 16 times their selectors.
fn paragraphs(rng: &mut Rng, mode: Mode) -> (Vec<u8>, String) {
    let linear = |selector: u16| Some(u64::from(selector) << 4);
    let bases = [real::ES, real::CS, real::SS, real::DS, real::FS, real::GS].map(linear);
    let mut s = Sequence::new(rng, place(), bases, u64::from(real::CS) << 4);
    // No scratch is below DS's base.
    set_segment(&mut s, DS);
    fill(&mut s, mode);
    s.finish()
}

fn fill(s: &mut Sequence<'_>, mode: Mode) {
    let steps = 3 + s.rng.below(25);
    for _ in 0..steps {
        if s.rng.one_in(3) { step(s, mode) } else { s.ordinary() }
    }
}

/// 16-bit segments at CPL 0 or 3.
fn protected16(suite: &mut Suite, title: &str, rng: &mut Rng) -> anyhow::Result<()> {
    let user = rng.one_in(2);
    let iopl = if user { rng.below(4) } else { 0 } as i32;
    let (code, data) = if user { (sel::USER_CODE16, sel::USER_DATA16) } else { (sel::CODE16, sel::DATA16) };
    let bases = [Some(WORK), None, Some(WORK), Some(WORK), None, None];
    let mut s = Sequence::new(rng, place(), bases, INNER);
    for pop in [0x1f, 0x07] {
        let [low, high] = data.to_le_bytes();
        s.emit(&[0x68, low, high, pop]);
    }
    fill(&mut s, Mode::Protected);
    let (bytes, tags) = s.finish();
    let name = format!("{title} cpl{} iopl{iopl} [{tags}]", u8::from(user) * 3);
    let entry = |a: &mut CodeAssembler| {
        if user {
            return protected::to_user(a, code, 0, iopl << 12);
        }
        a.mov(eax, i32::from(data))?;
        a.mov(ss, ax)?;
        a.mov(esp, (CASE_STACK - WORK) as i32)?;
        a.db(&[0xea, 0, 0, 0, 0])?;
        a.db(&code.to_le_bytes())
    };
    suite.add_bytes(name, &entry, (16, 0), &bytes)
}

/// `MOV AX, value`.
fn set_ax(s: &mut Sequence<'_>, value: u16) -> bool {
    let [low, high] = value.to_le_bytes();
    s.emit(&[0xb8, low, high])
}

fn push(s: &mut Sequence<'_>, value: u16, wide: bool) {
    let [low, high] = value.to_le_bytes();
    if wide {
        s.emit(&[0x66, 0x68, low, high, 0, 0])
    } else {
        s.emit(&[0x68, low, high])
    };
}

/// Loads a data segment register so that the scratch range is within reach.
fn set_segment(s: &mut Sequence<'_>, register: usize) {
    let selector = 0x0a00 + s.rng.below(0x700) as u16;
    let [low, high] = selector.to_le_bytes();
    let loads: &[u8] = match register {
        ES => &[0x07],
        DS => &[0x1f],
        4 => &[0x0f, 0xa1],
        _ => &[0x0f, 0xa9],
    };
    let done = if s.rng.one_in(2) {
        s.emit(&[&[0x68, low, high], loads].concat())
    } else {
        s.emit(&[0xb8, low, high, 0x8e, 0xc0 | (register as u8) << 3])
    };
    if done {
        s.bases[register] = Some(u64::from(selector) << 4);
    }
}

/// Something other than an ordinary instruction.
fn step(s: &mut Sequence<'_>, mode: Mode) {
    if s.room() < 120 {
        return;
    }
    match s.rng.below(20) {
        0..=2 => branch(s),
        3 => near_transfer(s),
        4 | 5 => string(s),
        6 => flags(s),
        7 | 8 if mode.paragraphs() => {
            let register = s.rng.pick(&[ES, DS, 4, 5]);
            set_segment(s, register);
        }
        9 if mode.paragraphs() => far_pointer(s),
        10 if mode.paragraphs() => stack_segment(s),
        11..=13 if mode.paragraphs() => far_transfer(s, mode),
        14 => frame(s),
        15 | 16 => unprivileged_system(s),
        17 | 18 if mode == Mode::Real => real_system(s),
        19 if s.rng.one_in(3) => interrupt(s, mode),
        _ => s.ordinary(),
    }
}

/// Jcc, LOOPcc, JCXZ, with either address size.
pub(crate) fn branch(s: &mut Sequence<'_>) {
    let count = 1 + s.rng.below(3);
    if s.rng.one_in(2) {
        let opcode = 0x70 | s.rng.below(16) as u8;
        return s.branch_over(&[opcode], count);
    }
    let opcode = 0xe0 | s.rng.below(4) as u8;
    let small = s.rng.below(3) as u8;
    // MOV CL, small; MOV CH, 0 or 1.
    let high = s.rng.below(2) as u8;
    s.emit(&[0xb1, small, 0xb5, high]);
    if s.rng.one_in(4) { s.branch_over(&[0x67, opcode], count) } else { s.branch_over(&[opcode], count) }
}

fn near_transfer(s: &mut Sequence<'_>) {
    match s.rng.below(4) {
        // CALL to the next instruction.
        0 => _ = s.emit(&[0xe8, 0, 0]),
        1 => _ = s.emit(&[0x66, 0xe8, 0, 0, 0, 0]),
        2 => {
            // PUSH next; RET or RET 2.
            let extra = s.rng.one_in(2);
            let next = s.ip() as u16 + if extra { 6 } else { 4 };
            push(s, next, false);
            if extra {
                s.emit(&[0xc2, 2, 0])
            } else {
                s.emit(&[0xc3])
            };
        }
        _ => {
            // MOV AX, next; JMP or CALL AX.
            let next = s.ip() as u16 + 5;
            set_ax(s, next);
            let modrm = s.rng.pick(&[0xd0, 0xe0]);
            s.emit(&[0xff, modrm]);
        }
    }
}

/// A repeated string instruction.
pub(crate) fn string(s: &mut Sequence<'_>) {
    if s.rng.one_in(3) {
        let opcode = s.rng.pick(&[0xfc, 0xfd]);
        s.emit(&[opcode]);
    }
    for _ in 0..3 {
        s.ordinary();
    }
    let opcode = s.rng.pick(&[0xa4, 0xa5, 0xa6, 0xa7, 0xaa, 0xab, 0xac, 0xad, 0xae, 0xaf]);
    let (wide_operand, wide_address) = (s.rng.one_in(2), s.place.bits == 16 && s.rng.one_in(3));
    let repeat = s.rng.pick(&[0xf2, 0xf3]);
    let (Some(source), Some(destination)) = (s.target(Register::DS, 64), s.target(Register::ES, 64)) else {
        return;
    };
    let count = s.rng.below(24);
    let registers = match (s.place.bits, wide_address) {
        (16, false) => [Register::SI, Register::DI, Register::CX],
        (64, _) => [Register::RSI, Register::RDI, Register::RCX],
        _ => [Register::ESI, Register::EDI, Register::ECX],
    };
    let mut code = Vec::new();
    for (register, value) in registers.into_iter().zip([source, destination, count]) {
        code.extend(crate::generator::load(s.place.bits, register, value).unwrap_or_default());
    }
    if wide_operand {
        code.push(0x66);
    }
    if wide_address {
        code.push(0x67);
    }
    code.extend([repeat, opcode]);
    s.emit(&code);
}

/// POPF of random flags, TF among them now and then, then PUSHF.
fn flags(s: &mut Sequence<'_>) {
    let mut value = s.rng.next() as u16;
    if !s.rng.one_in(8) {
        value &= !0x100;
    }
    s.tag(format!("popf {value:x}"));
    let wide = s.rng.one_in(3);
    push(s, value, wide);
    if wide {
        s.emit(&[0x66, 0x9d])
    } else {
        s.emit(&[0x9d])
    };
    // Their flags are what POPF left.
    s.emit(&[0x90, 0x9c, 0x66, 0x9c]);
}

/// LDS, LES, LFS, LGS.
fn far_pointer(s: &mut Sequence<'_>) {
    let Some(at) = s.target(Register::DS, 8).map(|at| at as u16) else { return };
    let selector = 0x0a00 + s.rng.below(0x700) as u16;
    let ([a0, a1], [b0, b1], [s0, s1]) =
        (at.to_le_bytes(), at.wrapping_add(2).to_le_bytes(), selector.to_le_bytes());
    let (opcode, register): (&[u8], usize) = match s.rng.below(4) {
        0 => (&[0xc5], DS),
        1 => (&[0xc4], ES),
        2 => (&[0x0f, 0xb4], 4),
        _ => (&[0x0f, 0xb5], 5),
    };
    let modrm = s.rng.pick(&[0x06, 0x0e, 0x1e, 0x2e]);
    // MOV word [at + 2], selector first.
    let store = [0xc7, 0x06, b0, b1, s0, s1];
    if s.emit(&[&store, opcode, &[modrm, a0, a1]].concat()) {
        s.bases[register] = Some(u64::from(selector) << 4);
    }
}

/// The same stack through another segment value.
fn stack_segment(s: &mut Sequence<'_>) {
    let selector = real::SS - s.rng.below(0x80) as u16;
    let pointer = (CASE_STACK - 0x100 - (u64::from(selector) << 4)) as u32;
    let [s0, s1] = selector.to_le_bytes();
    let [p0, p1, p2, p3] = pointer.to_le_bytes();
    s.tag("mov ss");
    if s.emit(&[0xb8, s0, s1, 0x8e, 0xd0, 0x66, 0xbc, p0, p1, p2, p3]) {
        s.bases[SS] = Some(u64::from(selector) << 4);
    }
}

/// JMP, CALL, RETF or IRET to the next instruction through another value of CS.
fn far_transfer(s: &mut Sequence<'_>, mode: Mode) {
    let selector = 0x1000 + s.rng.below(0xf00) as u16;
    let base = u64::from(selector) << 4;
    let wide = s.rng.one_in(3);
    let prefix: &[u8] = if wide { &[0x66] } else { &[] };
    let flags = s.rng.next() as u16 & 0x7ed7;
    let kind = s.rng.below(4);
    // Immediate pointers take 5 or 8 bytes, pushes 3 or 6 each.
    let length = match (kind, wide) {
        (0 | 1, false) => 5,
        (0 | 1, true) => 8,
        (2, false) => 7,
        (2, true) => 14,
        (_, false) => 10,
        (_, true) => 20,
    };
    let offset = (s.here() + length).wrapping_sub(base) as u16;
    let pointer = |opcode: u8| {
        let mut code = [prefix, &[opcode]].concat();
        code.extend(offset.to_le_bytes());
        if wide {
            code.extend([0, 0]);
        }
        code.extend(selector.to_le_bytes());
        code
    };
    match kind {
        0 | 1 => {
            let opcode = if kind == 0 { 0xea } else { 0x9a };
            s.tag(if kind == 0 { "jmp far" } else { "call far" });
            s.emit(&pointer(opcode));
        }
        2 => {
            s.tag("retf");
            push(s, selector, wide);
            push(s, offset, wide);
            s.emit(&[prefix, &[0xcb]].concat());
        }
        _ => {
            s.tag(format!("iret {flags:x}"));
            push(s, flags, wide);
            push(s, selector, wide);
            push(s, offset, wide);
            s.emit(&[prefix, &[0xcf]].concat());
        }
    }
    s.code_base = base;
    // Through CS only reads would do outside real and virtual-8086 mode.
    s.bases[CS] = mode.paragraphs().then_some(base);
}

/// ENTER and LEAVE, PUSHA and POPA.
pub(crate) fn frame(s: &mut Sequence<'_>) {
    let (size, level) = (s.rng.below(0x20) as u8, s.rng.pick(&[0, 0, 1, 3]));
    match s.rng.below(3) {
        0 => {
            // ENTER copies from the frame pointer's frames; LEAVE goes back.
            s.emit(&[0x89, 0xe5, 0xc8, size, 0, level, 0xc9]);
        }
        1 => _ = s.emit(&[0x60, 0x61]),
        _ => _ = s.emit(&[0x66, 0x60, 0x66, 0x61]),
    }
}

/// Instructions on system registers that any privilege may try, and the coprocessor's.
fn unprivileged_system(s: &mut Sequence<'_>) {
    let modrm = 0xe0 | s.rng.below(8) as u8 & !4;
    let codes: [(&str, &[u8]); 12] = [
        ("smsw", &[0x0f, 0x01, modrm]),
        ("smsw", &[0x66, 0x0f, 0x01, modrm]),
        ("sldt", &[0x0f, 0x00, 0xc0]),
        ("str", &[0x0f, 0x00, 0xc8]),
        ("lar", &[0x0f, 0x02, 0xc3]),
        ("verr", &[0x0f, 0x00, 0xe0]),
        ("arpl", &[0x63, 0xd8]),
        ("fninit", &[0xdb, 0xe3]),
        ("wait", &[0x9b]),
        ("cli", &[0xfa]),
        ("sti", &[0xfb]),
        ("salc", &[0xd6]),
    ];
    let (name, code) = s.rng.pick(&codes);
    s.tag(name);
    s.emit(code);
}

/// Privileged instructions, in real mode.
fn real_system(s: &mut Sequence<'_>) {
    let value = s.rng.next() as u32;
    let [v0, v1, v2, v3] = value.to_le_bytes();
    let machine_status = v0 & 0x0e;
    let codes: [(&str, &[u8]); 12] = [
        ("lmsw", &[0xb8, machine_status, 0, 0x0f, 0x01, 0xf0]),
        ("clts", &[0x0f, 0x06]),
        // CR0: MP, EM, TS, then WP and AM.
        ("mov cr0", &[0x66, 0xb8, v0 & 0x0e | 0x30, 0, v1 & 5, 0, 0x0f, 0x22, 0xc0]),
        ("mov from cr0", &[0x0f, 0x20, 0xc3]),
        ("mov cr2", &[0x66, 0xb8, v0, v1, v2, v3, 0x0f, 0x22, 0xd0, 0x0f, 0x20, 0xd1]),
        ("mov cr3", &[0x66, 0xb8, v0 & 0x18, v1 & 0xf0, v2, 0, 0x0f, 0x22, 0xd8]),
        ("mov dr0", &[0x66, 0xb8, v0, v1, v2, v3, 0x0f, 0x23, 0xc0, 0x0f, 0x21, 0xc2]),
        ("mov dr3", &[0x66, 0xb8, v0, v1, v2, v3, 0x0f, 0x23, 0xd8]),
        ("wbinvd", &[0x0f, 0x09]),
        ("sgdt", &[0x0f, 0x01, 0x06, 0, 0x20]),
        ("sidt", &[0x0f, 0x01, 0x0e, 8, 0x20]),
        // LIDT of what SIDT gives, LGDT of something.
        ("lidt", &[0x66, 0x0f, 0x01, 0x0e, 8, 0x20, 0x66, 0x0f, 0x01, 0x1e, 8, 0x20]),
    ];
    let (name, code) = s.rng.pick(&codes);
    s.tag(name);
    s.emit(code);
}

/// An interrupt, which ends the sequence.
fn interrupt(s: &mut Sequence<'_>, mode: Mode) {
    let highest = if mode == Mode::Real { 256 } else { VECTORS };
    let vector = s.rng.below(highest) as u8;
    if mode != Mode::Real && (vector == 8 || (0x4c..=0x4f).contains(&vector)) {
        return;
    }
    match s.rng.below(4) {
        0 => {
            s.tag("int3");
            s.emit(&[0xcc]);
        }
        1 => {
            s.tag("into");
            s.emit(&[0xce]);
        }
        _ => {
            s.tag(format!("int {vector:x}"));
            s.emit(&[0xcd, vector]);
        }
    }
}
