//! Records as text: what happened, and only what differs from the state that every case starts with.

use std::fmt::Write;

use crate::case::{Suite, Width};
use crate::layout::{CASE_LEN, CASES, sel};
use crate::{monitor32, monitor64};

const NAMES: [&str; 32] = [
    "DE", "DB", "NMI", "BP", "OF", "BR", "UD", "NM", "DF", "9", "TS", "NP", "SS", "GP", "PF", "15", "MF",
    "AC", "MC", "XM", "VE", "CP", "22", "23", "24", "25", "26", "27", "HV", "VC", "SX", "31",
];
const VM: u64 = 1 << 17;
const RF: u64 = 1 << 16;

/// Turns what a kernel wrote to the serial port into one line per case; a case that never ended has none.
pub fn lines(suite: &Suite, serial: &str) -> Vec<String> {
    let numbers = match suite.width {
        Width::Protected => monitor32::NUMBERS,
        Width::Long => monitor64::NUMBERS,
    };
    let parsed = serial.lines().filter_map(|line| {
        let words: Option<Vec<u64>> =
            line.split_whitespace().map(|w| u64::from_str_radix(w, 16).ok()).collect();
        words.filter(|w| w.len() == numbers)
    });
    suite
        .names()
        .zip(parsed)
        .enumerate()
        .map(|(index, (name, words))| match suite.width {
            Width::Protected => protected(name, index, &words),
            Width::Long => long(name, index, &words),
        })
        .collect()
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

fn event(line: &mut String, vector: u64, code: u64, cr2: u64) {
    match NAMES.get(vector as usize) {
        Some(name) => _ = write!(line, "#{name}"),
        None => _ = write!(line, "int{vector:x}"),
    }
    if monitor32::has_error_code(vector) {
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

fn protected(name: &str, index: usize, w: &[u64]) -> String {
    let mut line = format!("{name}: ");
    event(&mut line, w[8], w[9], w[24]);
    let (eip, cs, flags) = (w[10], w[11] & 0xffff, w[12]);
    _ = write!(line, " {cs:x}:{} fl={flags:x}", place(eip, index));
    let virtual_8086 = flags & VM != 0;
    if w[8] == 8 {
        // The task switch replaced the registers.
        return line;
    }
    if cs & 3 != 0 || virtual_8086 {
        _ = write!(line, " ss:sp={:x}:{:x}", w[14] & 0xffff, w[13]);
    } else {
        differing(&mut line, "sp", w[19] + 13 * 4, monitor32::initial(4).into());
    }
    if virtual_8086 {
        for (i, register) in ["es", "ds", "fs", "gs"].into_iter().enumerate() {
            differing(&mut line, register, w[15 + i] & 0xffff, 0);
        }
    }
    for (i, register) in ["ax", "cx", "dx", "bx", "sp", "bp", "si", "di"].into_iter().enumerate() {
        if i != 4 {
            differing(&mut line, register, w[7 - i], monitor32::initial(i).into());
        }
    }
    for (i, register) in ["ds", "es", "fs", "gs"].into_iter().enumerate() {
        differing(&mut line, register, w[20 + i], if virtual_8086 { 0 } else { sel::DATA.into() });
    }
    differing(&mut line, "dr6", w[25], 0xffff_0ff0);
    differing(&mut line, "tr", w[26], sel::TSS.into());
    differing(&mut line, "cr0", w[27], 0x31);
    line
}

fn long(name: &str, index: usize, halves: &[u64]) -> String {
    let w: Vec<u64> = halves.chunks(2).map(|pair| pair[0] | pair[1] << 32).collect();
    let mut line = format!("{name}: ");
    event(&mut line, w[16], w[17], w[23]);
    _ = write!(line, " {:x}:{} fl={:x} ss:sp={:x}:{:x}", w[19], place(w[18], index), w[20], w[22], w[21]);
    let registers = [
        "ax", "cx", "dx", "bx", "sp", "bp", "si", "di", "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15",
    ];
    for (i, register) in registers.into_iter().enumerate() {
        if i != 4 {
            differing(&mut line, register, w[i], monitor64::initial(i));
        }
    }
    for (i, register) in ["ds", "es", "fs", "gs"].into_iter().enumerate() {
        differing(&mut line, register, w[27 + i], sel::DATA.into());
    }
    for (i, register) in ["fsbase", "gsbase", "kgsbase"].into_iter().enumerate() {
        differing(&mut line, register, w[31 + i], 0);
    }
    differing(&mut line, "dr6", w[24], 0xffff_0ff0);
    differing(&mut line, "cr0", w[25], 0x8001_0031);
    differing(&mut line, "cr4", w[26], 0x220);
    line
}
