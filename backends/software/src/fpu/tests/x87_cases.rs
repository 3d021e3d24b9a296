//! x87 instructions against the host, with random stacks, control words and pending flags.

use std::arch::asm;

use super::Fixture;
use super::fixture::{DATA, Random};
use crate::cpu::flag;

#[repr(C, align(64))]
#[derive(Clone, Debug, PartialEq)]
struct Native {
    fx: [u8; 512],
    memory: [u8; 128],
    flags: u64,
    rax: u64,
    code: [usize; 2],
}

struct Case {
    text: &'static str,
    native: fn(&mut Native),
}

macro_rules! cases {
    ($($text:literal,)*) => {
        vec![$(Case { text: $text, native: |state| {
            // SAFETY: the instruction uses the x87 unit, RAX, flags and 128 bytes at RDI, `state.memory`;
            // FNINIT restores what Rust expects.
            unsafe {
                asm!(
                    "lea rax, [rip + 2f]",
                    "mov [rsi + 656], rax",
                    "lea rax, [rip + 3f]",
                    "mov [rsi + 664], rax",
                    "lea rdi, [rsi + 512]",
                    "fxrstor64 [rsi]",
                    "push qword ptr [rsi + 640]",
                    "popfq",
                    "mov rax, [rsi + 648]",
                    "2:",
                    $text,
                    "3:",
                    "mov [rsi + 648], rax",
                    "pushfq",
                    "pop qword ptr [rsi + 640]",
                    "fxsave64 [rsi]",
                    "fninit",
                    in("rsi") state,
                    clobber_abi("sysv64"),
                );
            }
        }}),*]
    };
}

#[rustfmt::skip]
fn arithmetic_cases() -> Vec<Case> {
    cases![
        "fld st(3)", "fld dword ptr [rdi]", "fld qword ptr [rdi]", "fld tbyte ptr [rdi]",
        "fild word ptr [rdi]", "fild dword ptr [rdi]", "fild qword ptr [rdi]", "fbld tbyte ptr [rdi]",
        "fst dword ptr [rdi]", "fst qword ptr [rdi]", "fst st(2)", "fstp dword ptr [rdi]", "fstp qword ptr [rdi]",
        "fstp tbyte ptr [rdi]", "fstp st(4)", "fist word ptr [rdi]", "fist dword ptr [rdi]",
        "fistp word ptr [rdi]", "fistp dword ptr [rdi]", "fistp qword ptr [rdi]", "fisttp word ptr [rdi]",
        "fisttp dword ptr [rdi]", "fisttp qword ptr [rdi]", "fbstp tbyte ptr [rdi]",
        "fadd st, st(1)", "fadd st(2), st", "faddp st(1), st", "fadd dword ptr [rdi]", "fadd qword ptr [rdi]",
        "fiadd word ptr [rdi]", "fiadd dword ptr [rdi]", "fsub st, st(1)", "fsub qword ptr [rdi]", "fsubr st(3), st",
        "fsubrp st(1), st", "fisubr dword ptr [rdi]", "fmul st, st(5)", "fmulp st(2), st", "fmul dword ptr [rdi]",
        "fdiv st, st(1)", "fdivr st(1), st", "fdivp st(1), st", "fdiv qword ptr [rdi]", "fidivr word ptr [rdi]",
        "fcom st(1)", "fcomp dword ptr [rdi]", "fcompp", "fucom st(2)", "fucompp", "ficom word ptr [rdi]",
        "fcomi st, st(1)", "fcomip st, st(1)", "fucomi st, st(2)", "fucomip st, st(3)", "ftst", "fxam",
        "fchs", "fabs", "fxch st(3)", "fsqrt", "frndint", "fscale", "fprem", "fprem1", "fxtract", "f2xm1", "fyl2x",
        "fyl2xp1", "fpatan", "fptan", "fsin", "fcos", "fsincos", "fld1", "fldz", "fldpi", "fldl2e", "fldl2t",
        "fldlg2", "fldln2", "fincstp", "fdecstp", "ffree st(2)", "fnop",
        "fcmovb st, st(1)", "fcmove st, st(2)", "fcmovbe st, st(1)", "fcmovu st, st(1)", "fcmovnb st, st(3)",
        "fcmovne st, st(1)", "fcmovnbe st, st(1)", "fcmovnu st, st(1)",
    ]
}

#[rustfmt::skip]
fn control_cases() -> Vec<Case> {
    cases![
        "fninit", "fnclex", "fnstcw word ptr [rdi]", "fldcw word ptr [rdi]", "fnstsw ax", "fnstsw word ptr [rdi]",
        "fnstenv [rdi]", "fldenv [rdi]", "fnsave [rdi]", "frstor [rdi]", ".byte 0x66; fnstenv [rdi]",
        ".byte 0x66; fldenv [rdi]", ".byte 0x66; fnsave [rdi]", ".byte 0x66; frstor [rdi]",
    ]
}

/// A state without a pending unmasked exception.
fn random_native(random: &mut Random) -> Native {
    let mut state = Native { fx: [0; 512], memory: [0; 128], flags: 0, rax: 0, code: [0; 2] };
    let pick = random.next();
    let masks = if pick & 3 == 0 { (pick >> 8) as u16 & 0x3f } else { 0x3f };
    let control = 0x40 | masks | (pick >> 16) as u16 & 0xf00;
    let pending = (pick >> 24) as u16 & masks;
    let status = (pick >> 32) as u16 & 0x7f00 & !0x80 | pending;
    state.fx[0..2].copy_from_slice(&control.to_le_bytes());
    state.fx[2..4].copy_from_slice(&status.to_le_bytes());
    state.fx[4] = if pick >> 56 & 1 == 0 { 0xff } else { (pick >> 48) as u8 };
    state.fx[24..28].copy_from_slice(&0x1f80u32.to_le_bytes());
    for slot in 0..8 {
        state.fx[32 + 16 * slot..][..10].copy_from_slice(&random.extended());
    }
    random.fill(&mut state.memory);
    if pick >> 57 & 1 == 0 {
        let value = random.extended();
        state.memory[..10].copy_from_slice(&value);
    }
    state.flags = 2 | random.next() & flag::ARITHMETIC;
    state.rax = random.next();
    state
}

/// Error pointers differ (FIP, FDP and FOP are the guest's, and hosts differ in when they store them).
fn forget_pointers(state: &mut Native, text: &str) {
    state.fx[5..32].fill(0);
    state.fx[160..].fill(0);
    state.flags &= flag::ARITHMETIC;
    let pointers = match text {
        "fnstenv [rdi]" | "fnsave [rdi]" => 12..28,
        ".byte 0x66; fnstenv [rdi]" | ".byte 0x66; fnsave [rdi]" => 6..14,
        _ => return,
    };
    state.memory[pointers].fill(0);
}

fn compare(cases: &[Case], rounds: u64, seed: u64) {
    let mut fixture = Fixture::new();
    let mut random = Random(seed);
    for round in 0..rounds {
        for case in cases {
            let before = random_native(&mut random);
            let mut native = before.clone();
            (case.native)(&mut native);
            let length = native.code[1] - native.code[0];
            // SAFETY: addresses of labels around one instruction of this program's code.
            let code = unsafe { std::slice::from_raw_parts(native.code[0] as *const u8, length) };
            let cpu = &mut fixture.cpu;
            cpu.xsave.0[..160].copy_from_slice(&before.fx[..160]);
            (cpu.gpr[0], cpu.gpr[7], cpu.rflags) = (before.rax, DATA, before.flags);
            fixture.store(DATA, &before.memory);
            assert_eq!(fixture.run(code), Ok(()), "{}", case.text);
            let mut ours = native.clone();
            ours.memory = fixture.load(DATA);
            ours.fx[..160].copy_from_slice(&fixture.cpu.xsave.0[..160]);
            (ours.flags, ours.rax) = (fixture.cpu.rflags, fixture.cpu.gpr[0]);
            forget_pointers(&mut ours, case.text);
            forget_pointers(&mut native, case.text);
            assert!(
                ours == native,
                "{} round {round} seed {seed:#x}\nbefore {before:x?}\nours   {ours:x?}\nnative {native:x?}",
                case.text
            );
        }
    }
}

#[test]
fn x87_arithmetic_agrees_with_the_host() {
    compare(&arithmetic_cases(), 300, 0x5eed_0010);
}

#[test]
fn x87_control_and_environments_agree_with_the_host() {
    compare(&control_cases(), 300, 0x5eed_0011);
}
