//! Comparing the two states after a case.
//!
//! What legitimately differs, each with its reason:
//!
//! | what | why it is left out |
//! |---|---|
//! | RF | the processor sets it in what it saves for a fault; the interpreter does so on delivery |
//! | P in the error code of page faults at or above 0x7fff_ffff_f000 | Linux hides which kernel addresses are mapped |
//! | x87 opcode and pointers (FOP, FIP, FDP) | models say that FXSAVE shows them with pending exceptions only; the kernel's XSAVE shows them always on processors with XSAVEERPTR |
//! | RPL of null selectors | IRET from the kernel clears them: a program cannot keep one |
//! | MXCSR_MASK | a property of the processor, not state |
//! | bytes 416 to 511 and the header of the XSAVE area | the kernel's own |
//! | upper halves of general registers in 32-bit and 16-bit code | undefined until 64-bit code runs again |

use std::fmt::Write;

use crate::case::{After, Case, Mode, Vectors, YMM_HIGH};

/// EFLAGS.RF.
const RF: u64 = 1 << 16;
/// First address that Linux keeps from programs.
const KERNEL_HALF: u64 = 0x7fff_ffff_f000;
/// x87 and XMM registers in the legacy area.
const REGISTERS: std::ops::Range<usize> = 32..416;
/// MXCSR; its mask follows, which is the host's own.
const MXCSR: std::ops::Range<usize> = 24..28;

/// Whether the registers after a case agree.
pub fn agree(case: &Case, host: &After, guest: &After) -> bool {
    traps_agree(host, guest)
        && host.rip == guest.rip
        && (host.rflags ^ guest.rflags) & !RF == 0
        && gprs_agree(case, host, guest)
        && selectors_agree(host, guest)
        && (host.selectors[1] != crate::layout::USER_CODE64
            || (host.fs_base, host.gs_base) == (guest.fs_base, guest.gs_base))
        && vectors_agree(&host.vectors, &guest.vectors)
}

fn traps_agree(host: &After, guest: &After) -> bool {
    let hidden = if host.trap.vector == 14 && host.trap.address >= KERNEL_HALF { 1 } else { 0 };
    host.trap.vector == guest.trap.vector
        && host.trap.address == guest.trap.address
        && host.trap.error_code | hidden == guest.trap.error_code | hidden
}

fn gprs_agree(case: &Case, host: &After, guest: &After) -> bool {
    // A far transfer may have left 64-bit code.
    let long = case.mode == Mode::Long && host.selectors[1] == crate::layout::USER_CODE64;
    let mask = if long { u64::MAX } else { 0xffff_ffff };
    let count = case.mode.registers();
    host.gpr.iter().zip(&guest.gpr).take(count).all(|(h, g)| (h ^ g) & mask == 0)
}

/// A null selector is one selector, whatever its RPL.
fn visible(selector: u16) -> u16 {
    if selector < 4 { 0 } else { selector }
}

fn selectors_agree(host: &After, guest: &After) -> bool {
    host.selectors.map(visible) == guest.selectors.map(visible)
}

/// Control, status, tags.
const CONTROL: std::ops::Range<usize> = 0..5;

fn vectors_agree(host: &Vectors, guest: &Vectors) -> bool {
    let (h, g) = (&host.0, &guest.0);
    h[CONTROL] == g[CONTROL]
        && h[MXCSR] == g[MXCSR]
        && h[REGISTERS] == g[REGISTERS]
        && h[YMM_HIGH..] == g[YMM_HIGH..]
}

/// The flags by letter.
pub fn flags(value: u64) -> String {
    const NAMES: [(u64, &str); 11] = [
        (0, "CF"),
        (2, "PF"),
        (4, "AF"),
        (6, "ZF"),
        (7, "SF"),
        (8, "TF"),
        (10, "DF"),
        (11, "OF"),
        (14, "NT"),
        (18, "AC"),
        (21, "ID"),
    ];
    let set: Vec<&str> = NAMES.iter().filter(|(bit, _)| value >> bit & 1 != 0).map(|(_, n)| *n).collect();
    format!("{value:#x} [{}]", set.join(" "))
}

const GPR: [&str; 16] = [
    "rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", "r8", "r9", "r10", "r11", "r12", "r13", "r14",
    "r15",
];
const SEGMENTS: [&str; 6] = ["es", "cs", "ss", "ds", "fs", "gs"];

/// What differs between the registers, one line each: name, before, host, guest.
pub fn describe(case: &Case, host: &After, guest: &After) -> String {
    let mut text = String::new();
    let mut line = |what: &str, before: String, host: String, guest: String| {
        if host != guest {
            let _ = writeln!(text, "  {what:<6} host {host}  guest {guest}  (before {before})");
        }
    };
    if !traps_agree(host, guest) {
        line("trap", "-".into(), format!("{:x?}", host.trap), format!("{:x?}", guest.trap));
    }
    let hex = |value: u64| format!("{value:#x}");
    line("rip", hex(case.start()), hex(host.rip), hex(guest.rip));
    let names = GPR.iter().take(case.mode.registers()).enumerate();
    for (i, name) in names {
        let mask = case.mode.register_mask();
        line(name, hex(case.gpr[i]), hex(host.gpr[i] & mask), hex(guest.gpr[i] & mask));
    }
    line("rflags", flags(case.rflags), flags(host.rflags & !RF), flags(guest.rflags & !RF));
    for (i, name) in SEGMENTS.iter().enumerate() {
        let show = |s: u16| format!("{:#x}", visible(s));
        line(name, show(case.selectors[i]), show(host.selectors[i]), show(guest.selectors[i]));
    }
    if host.selectors[1] == crate::layout::USER_CODE64 {
        line("fsbase", hex(case.fs_base), hex(host.fs_base), hex(guest.fs_base));
        line("gsbase", hex(case.gs_base), hex(host.gs_base), hex(guest.gs_base));
    }
    let bytes = |v: &Vectors, at: usize, len: usize| {
        v.0[at..at + len].iter().rev().map(|b| format!("{b:02x}")).collect::<String>()
    };
    let mut vector = |what: String, at: usize, len: usize| {
        line(
            &what,
            bytes(&case.vectors, at, len),
            bytes(&host.vectors, at, len),
            bytes(&guest.vectors, at, len),
        );
    };
    vector("fcw".into(), 0, 2);
    vector("fsw".into(), 2, 2);
    vector("ftw".into(), 4, 1);
    vector("mxcsr".into(), 24, 4);
    for i in 0..8 {
        vector(format!("st{i}"), 32 + 16 * i, 16);
    }
    for i in 0..16 {
        vector(format!("xmm{i}"), 160 + 16 * i, 16);
        vector(format!("ymmh{i}"), YMM_HIGH + 16 * i, 16);
    }
    text
}
