//! Records as text: what happened, and only what differs from the state that every case starts with.

use std::fmt::Write;

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
        for page in 0..PAGES {
            differing(&mut line, &format!("m{page:x}"), numbers[first + page].into(), 0);
        }
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

fn differing(line: &mut String, name: &str, value: u64, usual: u64) {
    if value != usual {
        _ = write!(line, " {name}={value:x}");
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
        for (i, register) in ["es", "ds", "fs", "gs"].into_iter().enumerate() {
            differing(line, register, w[15 + i] & 0xffff, 0);
        }
    }
    general32(line, &w);
    for (i, register) in ["ds", "es", "fs", "gs"].into_iter().enumerate() {
        differing(line, register, w[at::DS + i], if virtual_8086 { 0 } else { sel::DATA.into() });
    }
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
    for (i, register) in ["ds", "es", "fs", "gs"].into_iter().enumerate() {
        differing(line, register, w[at::DS + i], usual[at::DS + i].into());
    }
    system32(line, Width::Real, &w);
}

fn general32(line: &mut String, w: &[u64]) {
    for (i, register) in ["ax", "cx", "dx", "bx", "sp", "bp", "si", "di"].into_iter().enumerate() {
        if i != 4 {
            differing(line, register, w[7 - i], monitor32::initial(i).into());
        }
    }
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
    for (name, at) in names {
        let shift = if name.ends_with("limit") { 16 } else { 0 };
        differing(line, name, w[at] >> shift, u64::from(usual[at]) >> shift);
    }
    for (i, (msr, _)) in monitor32::MSRS.iter().enumerate() {
        let at = at::MSRS + 2 * i;
        let (value, usual) = (w[at] | w[at + 1] << 32, u64::from(usual[at]) | u64::from(usual[at + 1]) << 32);
        differing(line, &format!("msr{msr:x}"), value, usual);
    }
}

fn long(line: &mut String, index: usize, halves: &[u32]) {
    use monitor64::at;
    let join = |halves: &[u32]| -> Vec<u64> {
        halves.chunks(2).map(|pair| u64::from(pair[0]) | u64::from(pair[1]) << 32).collect()
    };
    let (w, usual) = (join(halves), join(&image::usual(Width::Long)));
    event(line, w[16], Some(w[17]), w[at::CR2]);
    _ = write!(line, " {:x}:{} fl={:x} ss:sp={:x}:{:x}", w[19], place(w[18], index), w[20], w[22], w[21]);
    let registers = [
        "ax", "cx", "dx", "bx", "sp", "bp", "si", "di", "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15",
    ];
    for (i, register) in registers.into_iter().enumerate() {
        if i != 4 {
            differing(line, register, w[i], usual[i]);
        }
    }
    let names = [
        ("ds", at::DS),
        ("es", at::DS + 1),
        ("fs", at::DS + 2),
        ("gs", at::DS + 3),
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
    for (name, at) in names {
        let shift = if name.ends_with("limit") { 48 } else { 0 };
        differing(line, name, w[at] >> shift, usual[at] >> shift);
    }
    for (i, (msr, _)) in monitor64::MSRS.iter().enumerate() {
        differing(line, &format!("msr{msr:x}"), w[at::MSRS + i], usual[at::MSRS + i]);
    }
}
