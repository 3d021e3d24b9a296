//! The software CPU: the input describes a guest (mode, privilege, changes to its state, tables and memory) and
//! the code that it runs.
//!
//! Asserted: no panic and no run without end; exactly the budget of instructions is spent; device accesses have
//! a legal size and cross no page; neither memory around RAM and ROM nor the ROM is written to; the state
//! afterwards passes the check of saved states, can be loaded, and runs on.
#![no_main]

use atoll_fuzz::layout::{self, CODE, Mode};
use atoll_fuzz::machine::Machine;
use atoll_fuzz::script::Script;
use atoll_machine::backend::{HaltReason, Vcpu};
use atoll_machine::cpu::state::{Activity, CpuState, EventKind, PendingEvent};
use libfuzzer_sys::fuzz_target;

/// Instructions of the first run; the second has a tenth.
const BUDGET: u64 = 500;

fuzz_target!(init: atoll_fuzz::seeds::plant(seeds()), |data: &[u8]| run(data));

fn run(data: &[u8]) {
    let mut script = Script::new(data);
    let (mode, options) = (Mode::ALL[usize::from(script.u8()) % 8], script.u8());
    let mut machine = Machine::new(options & 2 != 0);
    let mut state = layout::start(&machine, mode, options & 1 != 0);
    for _ in 0..options >> 2 & 15 {
        change(&machine, &mut state, &mut script);
    }
    // At the start of a page, or so that the first instruction or two straddle pages.
    let offset = if options & 0x40 != 0 { 0xff0 + u64::from(script.u8() & 15) } else { 0 };
    state.rip = state.rip.wrapping_add(offset);
    machine.write(CODE + offset, script.rest());
    let (pending, later) = (state.interrupt_shadow, options & 0x80 != 0);
    if let Err(error) = machine.vcpu().set_state(&state) {
        assert!(options >> 2 & 15 != 0, "the start in {mode:?} is refused: {error}");
        return;
    }
    if later {
        machine.msi(0xfee0_0000, 0x31);
        machine.extint(pending, 0x32);
    }
    let reason = machine.run(BUDGET);
    machine.checked_state();
    if reason != HaltReason::TripleFault {
        machine.run(BUDGET / 10);
        machine.checked_state();
    }
}

/// One change to the guest.
fn change(machine: &Machine, state: &mut CpuState, script: &mut Script<'_>) {
    let (kind, which) = (script.u8(), usize::from(script.u8()));
    match kind & 15 {
        0..=2 => {
            // An entry of a table: 16 entries each of GDT, IDT, tasks, page tables and so on.
            let table = u64::from(script.u8() & 15) << 12;
            machine.write_u64(table + (which as u64 & 0xff) * 8, script.value() | script.value() << 32);
        }
        3 => state.gpr[which & 15] = script.value(),
        4 | 5 => change_segment(state, which, script),
        6 => change_control(state, which, script),
        7 => state.rflags ^= script.value() & 0x3d_7fd5,
        8 => {
            state.dr[which & 3] = script.value();
            state.dr7 ^= u64::from(script.u32());
            state.dr6 ^= u64::from(script.u16());
        }
        9 => {
            let at = (script.u16() as usize) % state.xsave.len();
            let bytes = script.bytes(16);
            let end = (at + bytes.len()).min(state.xsave.len());
            state.xsave[at..end].copy_from_slice(&bytes[..end - at]);
        }
        10 => {
            let msrs = machine.model.msrs();
            let index = msrs[which % msrs.len()].index;
            state.msrs.retain(|(i, _)| *i != index);
            state.msrs.push((index, script.value()));
            state.msrs.sort_unstable();
        }
        11 => change_activity(state, which, script),
        12 => {
            let at = (which & 0x3f) * 16;
            state.lapic.registers[at..at + 4].copy_from_slice(&script.array::<4>());
        }
        13 => {
            state.lapic.apic_base = script.value() & 0xfffff_fd00 | 0x800;
            state.lapic.timer_expires_at = (which & 1 != 0).then(|| script.value());
            state.lapic.tsc_deadline = script.value();
        }
        14 => {
            let at = script.value();
            machine.write(at, script.bytes(which & 31));
        }
        _ => state.rip = script.value(),
    }
}

fn change_segment(state: &mut CpuState, which: usize, script: &mut Script<'_>) {
    let (part, value) = (which >> 3 & 3, script.value());
    match which & 7 {
        6 if which & 0x20 == 0 => {
            (state.gdtr.limit, state.gdtr.base) =
                (value as u16, if part == 0 { value } else { state.gdtr.base });
        }
        7 if which & 0x20 == 0 => {
            (state.idtr.limit, state.idtr.base) =
                (value as u16, if part == 0 { value } else { state.idtr.base });
        }
        register => {
            let segment = match register {
                6 => &mut state.ldtr,
                7 => &mut state.tr,
                register => &mut state.segments[register],
            };
            match part {
                0 => segment.selector = value as u16,
                1 => segment.base = value,
                2 => segment.limit = value as u32,
                _ => segment.attributes ^= value as u32 & 0x1_f0ff,
            }
        }
    }
}

fn change_control(state: &mut CpuState, which: usize, script: &mut Script<'_>) {
    let value = script.value();
    match which & 7 {
        0 | 1 => state.cr0 ^= value & 0xe005_003f,
        2 | 3 => state.cr4 ^= value & 0x77_0fff,
        4 => state.efer ^= value & 0xd01,
        5 => state.cr3 = value & 0xff_ffff_ffff,
        6 => (state.cr2, state.cr8) = (value, value & 15),
        _ => state.xcr0 ^= value & 7,
    }
}

fn change_activity(state: &mut CpuState, which: usize, script: &mut Script<'_>) {
    state.interrupt_shadow = which & 1 != 0;
    state.nmi_blocked = which & 2 != 0;
    state.nmi_pending = which & 4 != 0;
    if which & 8 != 0 {
        state.activity = Activity::Halted;
    }
    if which & 0x10 != 0 {
        let kinds = [
            EventKind::ExternalInterrupt,
            EventKind::Nmi,
            EventKind::Exception,
            EventKind::SoftwareInterrupt,
        ];
        let kind = kinds[which >> 5 & 3];
        let error_code = (which & 0x80 != 0).then(|| u32::from(script.u16()));
        state.pending_event = Some(PendingEvent { vector: script.u8(), kind, error_code });
    }
}

/// Code that reaches every corner of the engine, in every mode and at both privileges.
fn seeds() -> Vec<Vec<u8>> {
    const CODE: [&[u8]; 22] = [
        // Arithmetic, memory operands, shifts, multiplication and division.
        &[0x01, 0xc8, 0x29, 0x03, 0x0f, 0xaf, 0xc3, 0xf7, 0xe1, 0xf7, 0xf1, 0xd3, 0xe0, 0x0f, 0xa4, 0xc2, 3],
        // Strings with every repetition, backwards too.
        &[0xf3, 0xa4, 0xfd, 0xf3, 0xab, 0xfc, 0xf2, 0xae, 0xf3, 0xa6, 0xac, 0xf3, 0x6c, 0xf3, 0x6e],
        // Stack frames, PUSHA, POPA, flags.
        &[0x50, 0xc8, 0x10, 0, 2, 0xc9, 0x60, 0x61, 0x9c, 0x9d, 0x68, 1, 2, 3, 4, 0x58, 0x58],
        // Loops and branches.
        &[0x49, 0x75, 0xfd, 0xe2, 0xfe, 0xe3, 2, 0xeb, 0xfe, 0xe8, 0, 0, 0, 0, 0x90],
        // Software interrupts.
        &[0xcd, 0x80, 0xcc, 0xf1, 0xcd, 0x88, 0xce, 0x0f, 0x0b],
        // Far calls through code, call gate, task gate, TSS; far return.
        &[0x9a, 0, 0xf0, 1, 0, 0x78, 0, 0x9a, 0, 0, 0, 0, 0x88, 0, 0x9a, 0, 0, 0, 0, 0x90, 0, 0xcb],
        // IRET, LSS, MOV to segments, LAR, LSL, VERR, ARPL.
        &[
            0x8e, 0xd8, 0x0f, 0xb2, 0x23, 0x0f, 0x02, 0xc1, 0x0f, 0x03, 0xc1, 0x0f, 0x00, 0xe0, 0x63, 0xc8,
            0xcf,
        ],
        // SYSCALL, SYSRET, SYSENTER, SYSEXIT, SWAPGS.
        &[0x0f, 0x05, 0x0f, 0x07, 0x0f, 0x34, 0x0f, 0x35, 0x0f, 0x01, 0xf8, 0x48, 0x0f, 0x07],
        // LGDT, LIDT, SGDT, SMSW, LMSW, INVLPG, LTR, LLDT.
        &[
            0x0f, 0x01, 0x03, 0x0f, 0x01, 0x13, 0x0f, 0x01, 0x1b, 0x0f, 0x01, 0xe0, 0x0f, 0x01, 0xf0, 0x0f,
            0, 0xd8,
        ],
        // Control and debug registers.
        &[
            0x0f, 0x20, 0xc0, 0x0f, 0x22, 0xc0, 0x0f, 0x20, 0xe0, 0x0f, 0x22, 0xe0, 0x0f, 0x22, 0xd8, 0x0f,
            0x23, 0xf8,
        ],
        // RDMSR, WRMSR, RDTSC, RDTSCP, CPUID, XGETBV, XSETBV.
        &[
            0x0f, 0x32, 0x0f, 0x30, 0x0f, 0x31, 0x0f, 0x01, 0xf9, 0x0f, 0xa2, 0x0f, 0x01, 0xd0, 0x0f, 0x01,
            0xd1,
        ],
        // IN, OUT.
        &[0xe4, 0x60, 0xe6, 0x61, 0xec, 0xed, 0xee, 0xef],
        // HLT with interrupts on.
        &[0xfb, 0xf4, 0xfa, 0xf4],
        // x87.
        &[
            0xd9, 0xe8, 0xd9, 0xeb, 0xde, 0xc1, 0xdd, 0x33, 0xdd, 0x23, 0xd9, 0x33, 0x9b, 0xdb, 0x2b, 0xdf,
            0x33,
        ],
        // FXSAVE, FXRSTOR, XSAVE, XRSTOR, LDMXCSR.
        &[
            0x0f, 0xae, 3, 0x0f, 0xae, 0xb, 0x0f, 0xae, 0x23, 0x0f, 0xae, 0x2b, 0x0f, 0xae, 0x13, 0x0f, 0xae,
            0x33,
        ],
        // SSE.
        &[
            0x0f, 0x28, 0x03, 0x66, 0x0f, 0xfe, 0xc1, 0xf3, 0x0f, 0x58, 0xc1, 0x66, 0x0f, 0x38, 0x00, 0xc1,
            0x0f, 0x29, 0x03,
        ],
        // AVX, AVX2, FMA, BMI.
        &[
            0xc5, 0xfc, 0x58, 0xc1, 0xc4, 0xe2, 0x7d, 0x18, 0x03, 0xc4, 0xe2, 0x75, 0xb8, 0xc2, 0xc4, 0xe2,
            0x78, 0xf2, 0xc1, 0xc5, 0xf8, 0x77,
        ],
        // Gathers and masked moves.
        &[0xc4, 0xe2, 0x6d, 0x90, 0x04, 0x8b, 0xc4, 0xe2, 0x75, 0x2c, 0x13, 0x0f, 0xf7, 0xc1],
        // Locked and bit operations, CMPXCHG16B, MOVBE, POPCNT.
        &[
            0xf0, 0x01, 0x03, 0xf0, 0x0f, 0xb1, 0x0b, 0x48, 0x0f, 0xc7, 0x0b, 0x0f, 0xab, 0x03, 0xf3, 0x0f,
            0xb8, 0xc1, 0x0f, 0x38, 0xf0, 0x03,
        ],
        // Decimal adjustments, BOUND, LES, XLAT, SALC.
        &[0x27, 0x2f, 0x37, 0x3f, 0xd4, 10, 0xd5, 10, 0x62, 0x03, 0xc4, 0x03, 0xd7, 0xd6],
        // Its own code.
        &[0xe8, 0, 0, 0, 0, 0x58, 0xc6, 0x40, 5, 0x40, 0x90, 0x90, 0x88, 0x00, 0xeb, 0xf0],
        // MONITOR, MWAIT, PAUSE, CLFLUSH, RDRAND, WBINVD, INVPCID.
        &[
            0x0f, 0x01, 0xc8, 0x0f, 0x01, 0xc9, 0xf3, 0x90, 0x0f, 0xae, 0x3b, 0x0f, 0xc7, 0xf0, 0x0f, 0x09,
            0x66, 0x0f, 0x38, 0x82, 0x03,
        ],
    ];
    let mut seeds = atoll_fuzz::seeds::arbitrary(128, 300);
    for start in 0..16u8 {
        // Everything in a row, from different beginnings.
        for first in 0..4 {
            seeds.push([&[start & 7, start >> 3][..], &CODE[first * 5..].concat()].concat());
        }
    }
    for code in CODE {
        for start in 0..16u8 {
            seeds.push([&[start & 7, start >> 3], code].concat());
        }
    }
    seeds
}
