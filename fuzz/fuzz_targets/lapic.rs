//! The local APIC, through what a guest can do with it: the input is a script of register accesses in xAPIC and
//! x2APIC mode, changes of the mode, messages from devices, NMIs, INTR, passing time, and HLT.
//!
//! The script becomes a program in 64-bit mode; what happens outside happens at an OUT of that program. Asserted:
//! what the target `executor` asserts, and that the processor still runs at the end of the program.
#![no_main]

use std::cell::RefCell;

use atoll_fuzz::layout::{self, CODE, HANDLERS, Mode};
use atoll_fuzz::machine::Machine;
use atoll_fuzz::script::Script;
use atoll_machine::backend::{HaltReason, Vcpu};
use libfuzzer_sys::fuzz_target;

/// Most steps of a program: its code fits below the stacks.
const MAX_STEPS: usize = 200;
/// Port of what happens outside.
const OUTSIDE: u16 = 0x80;

fuzz_target!(init: atoll_fuzz::seeds::plant(seeds()), |data: &[u8]| run(data));

/// What happens outside at an OUT.
enum Event {
    Message(u64, u32),
    Nmi,
    ExtInt(bool, u8),
    Time(u64),
}

fn run(data: &[u8]) {
    let mut script = Script::new(data);
    let mut machine = Machine::new(false);
    let mut state = layout::start(&machine, Mode::Long, false);
    state.rflags |= 0x200;
    // Exceptions with an error code are #GP of a two-byte RDMSR or WRMSR: go on behind it. Interrupts end
    // themselves every other time, by MMIO.
    machine.write(HANDLERS + 16, &[0x48, 0x83, 0xc4, 8, 0x48, 0x83, 0x04, 0x24, 2, 0x48, 0xcf]);
    machine.write(HANDLERS, &[0xf7, 0xd5, 0x85, 0xed, 0x78, 6, 0x44, 0x89, 0xa6, 0xb0, 0, 0, 0, 0x48, 0xcf]);
    state.gpr[6] = 0xfee0_0000;
    let mut events = Vec::new();
    let mut code = Vec::new();
    while !script.is_empty() && events.len() < MAX_STEPS && code.len() < 0x7000 {
        step(&mut code, &mut events, &mut script);
    }
    code.extend([0xe6, 0xff, 0xeb, 0xfc]);
    machine.write(CODE, &code);
    machine.vcpu().set_state(&state).expect("the start of a program");
    let events = RefCell::new(events.into_iter());
    machine.run_with(5000, |machine, port, _| {
        if port == OUTSIDE
            && let Some(event) = events.borrow_mut().next()
        {
            happen(machine, event);
        }
    });
    machine.checked_state();
    let reason = machine.run(100);
    assert!(matches!(reason, HaltReason::BudgetSpent | HaltReason::Stopped | HaltReason::TripleFault));
    machine.checked_state();
}

fn happen(machine: &Machine, event: Event) {
    match event {
        Event::Message(address, data) => machine.msi(address, data),
        Event::Nmi => machine.nmi(),
        Event::ExtInt(high, vector) => machine.extint(high, vector),
        Event::Time(by) => machine.advance(by),
    }
}

/// Code for one step of the script.
fn step(code: &mut Vec<u8>, events: &mut Vec<Event>, script: &mut Script<'_>) {
    let (kind, which) = (script.u8(), script.u8());
    let register = u32::from(which & 0x3f) << 4;
    match kind & 15 {
        // mov dword [rsi + register], value
        0..=3 => code.extend([&[0xc7, 0x86][..], &register.to_le_bytes(), &value(register, script)].concat()),
        // mov eax, [rsi + register]
        4 => code.extend([&[0x8b, 0x86][..], &register.to_le_bytes()].concat()),
        // An access that is not one of 32 bits, or not aligned: mov [rsi + disp], rax
        5 => {
            code.extend([&[0x48, 0x89, 0x86][..], &(register + u32::from(kind >> 4)).to_le_bytes()].concat())
        }
        6 | 7 => wrmsr(code, 0x800 + u32::from(which & 0x3f), value(register, script), script.u8()),
        8 => {
            code.extend(
                [&[0xb9][..], &(0x800 + u32::from(which & 0x3f)).to_le_bytes(), &[0x0f, 0x32]].concat(),
            );
        }
        // IA32_APIC_BASE: on, off, x2APIC, elsewhere.
        9 => wrmsr(code, 0x1b, (0xfee0_0100 | u32::from(which) << 8).to_le_bytes(), 0),
        // IA32_TSC_DEADLINE
        10 => {
            let high = if which & 2 != 0 { 0x80 } else { 0 };
            wrmsr(code, 0x6e0, script.array(), which & 1 | high);
        }
        // mov cr8, rax; or HLT; or STI; CLI
        11 => match which & 3 {
            0 => code.extend([0xf4]),
            1 => code.extend([0xfb]),
            2 => code.extend([0xfa]),
            _ => code.extend([0xb8, which >> 4, 0, 0, 0, 0x44, 0x0f, 0x22, 0xc0]),
        },
        rest => {
            code.extend([0xe6, OUTSIDE as u8]);
            events.push(match rest {
                12 | 13 => Event::Message(
                    0xfee0_0000 | u64::from(which) << 12 | u64::from(kind >> 4),
                    script.u16().into(),
                ),
                14 if kind & 0x10 != 0 => Event::Nmi,
                14 => Event::ExtInt(which & 1 != 0, script.u8()),
                _ => Event::Time(1 << (which % 48)),
            });
        }
    }
}

/// A value for a register; vectors are mostly plausible.
fn value(register: u32, script: &mut Script<'_>) -> [u8; 4] {
    let mut bytes = script.array::<4>();
    if matches!(register, 0x300 | 0x320..=0x370 | 0xf0) && bytes[0] & 3 != 0 {
        bytes[0] |= 0x20;
    }
    // INIT would leave the program.
    if register == 0x300 && bytes[1] & 7 > 4 {
        bytes[1] &= !7;
    }
    bytes
}

fn wrmsr(code: &mut Vec<u8>, index: u32, low: [u8; 4], high: u8) {
    code.extend(
        [
            &[0xb9][..],
            &index.to_le_bytes(),
            &[0xb8],
            &low,
            &[0xba],
            &(u32::from(high) << 24 | u32::from(high & 1)).to_le_bytes(),
        ]
        .concat(),
    );
    code.extend([0x0f, 0x30]);
}

/// Timers in all modes, self IPIs, both modes of the APIC.
fn seeds() -> Vec<Vec<u8>> {
    let spurious = [0, 0x0f, 0xff, 1, 0, 0];
    let mut seeds = atoll_fuzz::seeds::arbitrary(64, 400);
    // A TSC deadline at the end of time, and HLT.
    let lvt = [0, 0x32, 0x40, 0, 4, 0];
    seeds.push([&spurious[..], &lvt, &[10, 3, 0xff, 0xff, 0xff, 0xff, 11, 0]].concat());
    for mode in 0..4u8 {
        let lvt = [0, 0x32, 0x40, 0, mode << 1, 0];
        let count = [0, 0x38, 0xe8, 3, 0, 0];
        let time = [15, 12, 4, 0x39, 11, 0, 15, 20];
        seeds.push([&spurious[..], &lvt, &count, &time].concat());
        let x2apic = [9, 0x0d, 6, 0x32, 0x40, 0, mode << 1, 0, 0, 6, 0x38, 0xe8, 3, 0, 0, 0, 8, 0x39];
        seeds.push([&spurious[..], &x2apic, &time].concat());
        let ipi = [0, 0x31, 0, 0, 0, 0, 0, 0x30, 0x50, 0, 4 + mode * 4, 0, 11, 0, 10, 0, 1, 2, 3, 4];
        seeds.push([&spurious[..], &ipi, &[12, mode, 0x45, 0, 14, 1, 0x33, 0x1e, 0]].concat());
    }
    seeds
}
