//! Records as text: what happened, and only what differs from the state that every case starts with.

use std::fmt::{Display, Write};

use crate::case::{Suite, Width};
use crate::layout::{CASE_LEN, CASES, sel};
use crate::monitor_common::{PAGES, has_error_code};
use crate::{image, monitor_real, monitor32, monitor64};

const NAMES: [&str; 32] = [
    "DE", "DB", "NMI", "BP", "OF", "BR", "UD", "NM", "DF", "9", "TS", "NP", "SS", "GP", "PF", "15", "MF",
    "AC", "MC", "XM", "VE", "CP", "22", "23", "24", "25", "26", "27", "HV", "VC", "SX", "31",
];
const VM: u64 = 1 << 17;
const RF: u64 = 1 << 16;

/// The general registers of 32 bits by number, without the stack pointer: the frame says more about it.
const GENERAL: [(&str, usize); 7] =
    [("ax", 0), ("cx", 1), ("dx", 2), ("bx", 3), ("bp", 5), ("si", 6), ("di", 7)];
/// Those that 64-bit mode adds.
const GENERAL_ADDED: [(&str, usize); 8] =
    [("r8", 8), ("r9", 9), ("r10", 10), ("r11", 11), ("r12", 12), ("r13", 13), ("r14", 14), ("r15", 15)];
/// The data segments in the order in which the monitors record them.
const SEGMENTS: [(&str, usize); 4] = [("ds", 0), ("es", 1), ("fs", 2), ("gs", 3)];

/// The records in what a kernel wrote to the serial port: number of the case, and the numbers.
pub(crate) fn parse(width: Width, serial: &str) -> Vec<(usize, Vec<u32>)> {
    serial.lines().filter_map(|line| parse_line(width, line)).collect()
}

/// `case (position value)*` in hexadecimal, only what is unusual.
fn parse_line(width: Width, line: &str) -> Option<(usize, Vec<u32>)> {
    let words: Option<Vec<u32>> = line.split_whitespace().map(|w| u32::from_str_radix(w, 16).ok()).collect();
    let words = words?;
    let (index, pairs) = words.split_first()?;
    if pairs.len() % 2 != 0 {
        return None;
    }
    let mut numbers = image::usual(width);
    for pair in pairs.chunks_exact(2) {
        *numbers.get_mut(pair[0] as usize)? = pair[1];
    }
    Some((*index as usize, numbers))
}

/// One case's record as text.
pub(crate) fn line(suite: &Suite, index: usize, numbers: &[u32]) -> String {
    let name = suite.names().nth(index).unwrap_or_default();
    let mut line = format!("{name}: ");
    match suite.width {
        Width::Real => real(&mut line, numbers),
        Width::Protected => protected(&mut line, index, numbers),
        Width::Long => long(&mut line, index, numbers),
    }
    if suite.memory {
        let first = match suite.width {
            Width::Real | Width::Protected => monitor32::at::SUMS,
            Width::Long => 2 * monitor64::at::SUMS,
        };
        let pages = (0..PAGES).map(|page| (format!("m{page:x}"), first + page));
        each(&mut line, pages, |at| (numbers[at].into(), 0));
    }
    line
}

/// `line` without RF in the flags, which the reference never pushes.
pub fn without_rf(line: &str) -> String {
    let Some((before, after)) = line.split_once(" fl=") else { return line.to_owned() };
    let (flags, rest) = after.split_once(' ').unwrap_or((after, ""));
    match u64::from_str_radix(flags, 16) {
        Ok(value) => format!("{before} fl={:x} {rest}", value & !RF).trim_end().to_owned(),
        Err(_) => line.to_owned(),
    }
}

fn event(line: &mut String, vector: u64, code: Option<u64>, cr2: u64) {
    match NAMES.get(vector as usize) {
        Some(name) => _ = write!(line, "#{name}"),
        None => _ = write!(line, "int{vector:x}"),
    }
    if let Some(code) = code.filter(|_| has_error_code(vector)) {
        _ = write!(line, "({code:x})");
    }
    if vector == 14 {
        _ = write!(line, " cr2={cr2:x}");
    }
}

/// An instruction's address: counted from its case's start if it is in its entry code, so that the text stays the
/// same when cases are added before it.
fn place(address: u64, index: usize) -> String {
    match address.checked_sub(CASES + CASE_LEN * index as u64) {
        Some(offset) if offset < CASE_LEN => format!("case+{offset:x}"),
        _ => format!("{address:x}"),
    }
}

fn differing(line: &mut String, name: impl Display, value: u64, usual: u64) {
    if value != usual {
        _ = write!(line, " {name}={value:x}");
    }
}

/// Each of a family of names that stands for something else than usual. `numbers` gives, for what stands beside a
/// name, the value and the usual value.
fn each<N: Display>(
    line: &mut String,
    family: impl IntoIterator<Item = (N, usize)>,
    numbers: impl Fn(usize) -> (u64, u64),
) {
    for (name, at) in family {
        let (value, usual) = numbers(at);
        differing(line, name, value, usual);
    }
}

fn protected(line: &mut String, index: usize, numbers: &[u32]) {
    use monitor32::at;
    let w: Vec<u64> = numbers.iter().copied().map(u64::from).collect();
    event(line, w[8], Some(w[9]), w[at::CR2]);
    let (eip, cs, flags) = (w[10], w[11] & 0xffff, w[12]);
    _ = write!(line, " {cs:x}:{} fl={flags:x}", place(eip, index));
    let virtual_8086 = flags & VM != 0;
    if w[8] == 8 {
        // The task switch replaced the registers.
        return;
    }
    if cs & 3 != 0 || virtual_8086 {
        _ = write!(line, " ss:sp={:x}:{:x}", w[14] & 0xffff, w[13]);
    } else {
        differing(line, "sp", w[at::FRAME_ESP] + 13 * 4, monitor32::initial(4).into());
    }
    if virtual_8086 {
        each(line, [("es", 15), ("ds", 16), ("fs", 17), ("gs", 18)], |at| (w[at] & 0xffff, 0));
    }
    general32(line, &w);
    let usual = if virtual_8086 { 0 } else { sel::DATA.into() };
    each(line, SEGMENTS, |i| (w[at::DS + i], usual));
    system32(line, Width::Protected, &w);
}

/// In real mode.
fn real(line: &mut String, numbers: &[u32]) {
    use monitor32::at;
    let w: Vec<u64> = numbers.iter().copied().map(u64::from).collect();
    // No exception pushes an error code.
    event(line, w[8], None, w[at::CR2]);
    _ = write!(line, " {:x}:{:x} fl={:x}", w[11], w[10], w[12]);
    // The frame and the vector were popped.
    differing(line, "sp", w[at::FRAME_ESP] + 8, monitor_real::SP.into());
    differing(line, "ss", w[at::VECTOR + 7], monitor_real::SS.into());
    general32(line, &w);
    let usual = image::usual(Width::Real);
    each(line, SEGMENTS, |i| (w[at::DS + i], usual[at::DS + i].into()));
    system32(line, Width::Real, &w);
}

fn general32(line: &mut String, w: &[u64]) {
    // PUSHA leaves the first one highest.
    each(line, GENERAL, |i| (w[7 - i], monitor32::initial(i).into()));
}

/// The part of a record that `monitor32.rs` takes of system registers.
fn system32(line: &mut String, width: Width, w: &[u64]) {
    use monitor32::at;
    let usual = image::usual(width);
    let names = [
        ("dr6", at::DR6),
        ("tr", at::TR),
        ("cr0", at::CR0),
        ("cr3", at::CR3),
        ("cr4", at::CR4),
        ("dr0", at::DR0),
        ("dr1", at::DR0 + 1),
        ("dr2", at::DR0 + 2),
        ("dr3", at::DR0 + 3),
        ("dr7", at::DR7),
        ("gdtlimit", at::GDTR),
        ("gdt", at::GDTR + 1),
        ("idtlimit", at::IDTR),
        ("idt", at::IDTR + 1),
        ("ldtr", at::LDTR),
        ("xcr0", at::XCR0),
    ];
    each(line, names, |at| {
        // A limit lies in the upper half.
        let shift = if matches!(at, at::GDTR | at::IDTR) { 16 } else { 0 };
        (w[at] >> shift, u64::from(usual[at]) >> shift)
    });
    let msrs = monitor32::MSRS.iter().enumerate();
    each(line, msrs.map(|(i, (msr, _))| (format!("msr{msr:x}"), at::MSRS + 2 * i)), |at| {
        (w[at] | w[at + 1] << 32, u64::from(usual[at]) | u64::from(usual[at + 1]) << 32)
    });
}

fn long(line: &mut String, index: usize, halves: &[u32]) {
    use monitor64::at;
    let join = |halves: &[u32]| -> Vec<u64> {
        halves.chunks(2).map(|pair| u64::from(pair[0]) | u64::from(pair[1]) << 32).collect()
    };
    let (w, usual) = (join(halves), join(&image::usual(Width::Long)));
    event(line, w[16], Some(w[17]), w[at::CR2]);
    _ = write!(line, " {:x}:{} fl={:x} ss:sp={:x}:{:x}", w[19], place(w[18], index), w[20], w[22], w[21]);
    each(line, GENERAL.into_iter().chain(GENERAL_ADDED), |i| (w[i], usual[i]));
    each(line, SEGMENTS, |i| (w[at::DS + i], usual[at::DS + i]));
    let names = [
        ("fsbase", at::BASES),
        ("gsbase", at::BASES + 1),
        ("kgsbase", at::BASES + 2),
        ("dr6", at::DR6),
        ("cr0", at::CR0),
        ("cr4", at::CR4),
        ("cr3", at::CR3),
        ("cr8", at::CR8),
        ("dr0", at::DR0),
        ("dr1", at::DR0 + 1),
        ("dr2", at::DR0 + 2),
        ("dr3", at::DR0 + 3),
        ("dr7", at::DR7),
        ("gdtlimit", at::GDTR),
        ("gdt", at::GDTR + 1),
        ("idtlimit", at::IDTR),
        ("idt", at::IDTR + 1),
        ("ldtr", at::LDTR),
        ("tr", at::TR),
        ("xcr0", at::XCR0),
    ];
    each(line, names, |at| {
        // A limit lies in the upper 16 bits.
        let shift = if matches!(at, at::GDTR | at::IDTR) { 48 } else { 0 };
        (w[at] >> shift, usual[at] >> shift)
    });
    let msrs = monitor64::MSRS.iter().enumerate();
    each(line, msrs.map(|(i, (msr, _))| (format!("msr{msr:x}"), at::MSRS + i)), |at| (w[at], usual[at]));
}
