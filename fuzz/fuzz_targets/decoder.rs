//! The software CPU's decoder: the first byte chooses the mode, the rest is code.
//!
//! Asserted, in 16, 32 and 64 bits, at privilege 0 and 3, with the default model and all features of the host:
//! no panic; instructions have 1 to 15 bytes and follow each other without gaps; what was decoded needs all of
//! its bytes and none behind them.
#![no_main]

use std::cell::RefCell;

use atoll_cpu_software::cpu::Cpu;
use atoll_cpu_software::decode::probe::Probe;
use atoll_cpu_software::test_support::Machine;
use libfuzzer_sys::fuzz_target;

thread_local! {
    static MACHINES: RefCell<(Vec<Machine>, Probe)> = RefCell::new((machines(), Probe::default()));
}

fuzz_target!(init: atoll_fuzz::seeds::plant(seeds()), |data: &[u8]| {
    let Some((choice, code)) = data.split_first() else { return };
    MACHINES.with_borrow_mut(|(machines, probe)| {
        let which = usize::from(*choice) % machines.len();
        check(probe, &machines[which].cpu, code);
    });
});

fn check(probe: &mut Probe, cpu: &Cpu, code: &[u8]) {
    let lengths = probe.lengths(cpu, code);
    let mut at = 0;
    for length in lengths {
        assert!((1..=15).contains(&length), "an instruction of {length} bytes at {at}");
        assert!(at + length <= code.len(), "an instruction passes the end of its bytes");
        let alone = &code[at..at + length];
        let first = probe.lengths(cpu, alone).first().copied();
        // Bytes that are no instruction may need fewer bytes to be none.
        assert!(first.is_none_or(|n| n <= length), "{alone:02x?} depends on what follows it");
        assert!(probe.lengths(cpu, &alone[..length - 1]).first().is_none_or(|n| *n < length));
        at += length;
    }
    assert!((1..=15).contains(&probe.single(cpu, code)), "a single instruction's length");
}

fn machines() -> Vec<Machine> {
    let mut machines = Vec::new();
    for model in ["atoll-base", "host"] {
        for mode in 0..4 {
            let mut machine = Machine::with_model(1, model);
            match mode {
                0 => {}
                1 => machine.cpu.cr0 |= 1,
                2 => {
                    machine.cpu.cr0 |= 1;
                    machine.cpu.segments[1].attributes = 0xc09b;
                }
                _ => machine.enter_long(),
            }
            machine.cpu.refresh_mode();
            if mode > 1 {
                let mut user = Machine::with_model(1, model);
                user.cpu.cr0 = machine.cpu.cr0;
                (user.cpu.efer, user.cpu.cr4) = (machine.cpu.efer, machine.cpu.cr4);
                user.cpu.segments = machine.cpu.segments;
                user.enter_user();
                machines.push(user);
            }
            machines.push(machine);
        }
    }
    machines
}

/// One opcode of every map with every prefix.
fn seeds() -> Vec<Vec<u8>> {
    let mut seeds = atoll_fuzz::seeds::arbitrary(128, 400);
    for mode in 0..12u8 {
        for map in [&[][..], &[0x0f], &[0x0f, 0x38], &[0x0f, 0x3a], &[0xc5, 0xf8], &[0xc4, 0xe2, 0x7d]] {
            let mut code = vec![mode];
            for prefix in [&[][..], &[0x66], &[0xf2], &[0xf3], &[0x67], &[0xf0], &[0x48]] {
                code.extend([prefix, map, &[0x10 + mode, 0x44, 0x8b, 0x10, 1, 2, 3, 4]].concat());
            }
            seeds.push(code);
        }
        seeds.push([&[mode][..], &[0x66; 14], &[0x90, 0x2e, 0x2e, 0x90]].concat());
    }
    seeds
}
