//! Several vCPUs: destinations, IPIs, start-up, and atomic memory.

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};

use atoll_machine::backend::{Backend, Partition, Vcpu};
use atoll_machine::cpu::state::{Activity, gpr, seg};
use iced_x86::IcedError;
use iced_x86::code_asm::*;

use crate::fixture::{Guest, Machine};
use crate::payload::{APIC, DATA, Payload, assemble};

const VECTOR: u8 = 0x60;

/// Waits for interrupts until the byte at [`DATA`] is set.
fn serve(a: &mut Payload) -> Result<(), IcedError> {
    let mut again = a.create_label();
    a.sti()?;
    a.set_label(&mut again)?;
    a.pause()?;
    a.cmp(byte_ptr(DATA), 0)?;
    a.je(again)?;
    a.cli()?;
    a.exit()
}

/// `cpus` vCPUs that serve [`VECTOR`].
fn servants<P: Partition>(machine: &Machine<P>, cpus: u32) -> Vec<Guest<P>> {
    let program = |a: &mut Payload| {
        a.interrupts(&[VECTOR]);
        serve(a)?;
        Ok(vec![])
    };
    (0..cpus).map(|index| machine.long(index, program)).collect()
}

/// Runs `guests` on a thread each while `meanwhile` runs; then lets them end.
fn all_running<P: Partition>(machine: &Machine<P>, guests: &mut [Guest<P>], meanwhile: impl FnOnce()) {
    std::thread::scope(|scope| {
        let threads: Vec<_> = guests.iter_mut().map(|g| scope.spawn(move || machine.finish(g))).collect();
        meanwhile();
        machine.write(DATA, &[1]);
        for thread in threads {
            // With its words.
            thread.join().unwrap_or_else(|words| resume_unwind(words));
        }
    });
}

fn totals<P: Partition>(machine: &Machine<P>, cpus: u32) -> Vec<u64> {
    (0..cpus).map(|index| machine.handled(index, VECTOR)).collect()
}

pub(crate) fn messages_reach_every_destination_mode<B: Backend>(backend: &B) {
    let machine = Machine::new(backend, 3);
    let mut guests = servants(&machine, 3);
    let logical = 1 << 2;
    let cases: [(u64, u32, [u64; 3]); 6] = [
        (1 << 12, 0, [0, 1, 0]),
        (2 << 12, 0x8000 | 0x4000, [0, 0, 1]),
        (0b101 << 12 | logical, 0, [1, 0, 1]),
        (0xff << 12, 0, [1, 1, 1]),
        (0xff << 12 | logical, 0, [1, 1, 1]),
        (7 << 12, 0, [0, 0, 0]),
    ];
    all_running(&machine, &mut guests, || {
        let mut expected = [0; 3];
        for (address, data, reaches) in cases {
            machine.msi(APIC | address, data | u32::from(VECTOR));
            for (sum, more) in expected.iter_mut().zip(reaches) {
                *sum += more;
            }
            machine.wait_for("the interrupt", || totals(&machine, 3) == expected);
        }
    });
    assert_eq!(totals(&machine, 3), [3, 3, 4]);
}

pub(crate) fn lowest_priority_takes_one<B: Backend>(backend: &B) {
    let machine = Machine::new(backend, 2);
    let mut guests = servants(&machine, 2);
    all_running(&machine, &mut guests, || {
        for round in 1..=20 {
            machine.msi(APIC | 0b11 << 12 | 1 << 2 | 1 << 3, 0x100 | u32::from(VECTOR));
            machine.wait_for("the interrupt", || totals(&machine, 2).iter().sum::<u64>() >= round);
        }
    });
    assert_eq!(totals(&machine, 2).iter().sum::<u64>(), 20, "each message went to one vCPU");
}

/// Sends an IPI to physical destination `to`; changes RAX.
fn send(a: &mut Payload, to: u32, command: u32) -> Result<(), IcedError> {
    a.apic_write(0x310, to << 24)?;
    a.apic_write(0x300, command)
}

pub(crate) fn ipi_ping_pong<B: Backend>(backend: &B) {
    const ROUNDS: u32 = 2000;
    let machine = Machine::new(backend, 2);
    let program = |a: &mut Payload| {
        let (index, mut again) = (a.index, a.create_label());
        a.interrupts(&[VECTOR]);
        a.xor(ebx, ebx)?;
        a.sti()?;
        a.set_label(&mut again)?;
        if index == 0 {
            send(a, 1, u32::from(VECTOR))?;
        }
        a.inc(ebx)?;
        let mut wait = a.create_label();
        a.set_label(&mut wait)?;
        a.cli()?;
        a.load(crate::payload::count_of(index, VECTOR))?;
        a.cmp(eax, ebx)?;
        let mut arrived = a.create_label();
        a.jae(arrived)?;
        a.sti()?;
        a.hlt()?;
        a.jmp(wait)?;
        a.set_label(&mut arrived)?;
        a.sti()?;
        if index == 1 {
            send(a, 0, u32::from(VECTOR))?;
        }
        a.cmp(ebx, ROUNDS as i32)?;
        a.jb(again)?;
        a.exit()?;
        Ok(vec![])
    };
    let mut guests: Vec<_> = (0..2).map(|index| machine.long(index, program)).collect();
    let result = catch_unwind(AssertUnwindSafe(|| all_running(&machine, &mut guests, || {})));
    if let Err(words) = result {
        let awaited: Vec<u64> = guests.iter_mut().map(|g| g.state().gpr[gpr::RBX]).collect();
        println!("handled {:?}, waiting for {awaited:?}", totals(&machine, 2));
        resume_unwind(words);
    }
    assert_eq!(totals(&machine, 2), [u64::from(ROUNDS); 2]);
}

pub(crate) fn second_processor_starts_by_init_and_sipi<B: Backend>(backend: &B) {
    const STARTED: u64 = 0x7f00;
    let machine = Machine::new(backend, 2);
    // A page that is free for it: page 9.
    let start = assemble(16, 0, |a| {
        a.mov(ax, cs)?;
        a.mov(ds, ax)?;
        a.mov(word_ptr(0x800), ax)?;
        a.xor(ax, ax)?;
        a.mov(ds, ax)?;
        a.inc(byte_ptr(STARTED))?;
        a.cli()?;
        a.hlt()
    });
    machine.write(0x9000, &start);
    let mut second = machine.vcpu(1);
    assert_eq!(second.state().activity, Activity::WaitForSipi);
    let mut first = machine.long(0, |a| {
        for round in 1..=3 {
            send(a, 1, 0x4500)?;
            send(a, 1, 0x8500)?;
            send(a, 1, 0x4609)?;
            send(a, 1, 0x4609)?;
            a.await_value(STARTED, round)?;
        }
        a.exit()?;
        Ok(vec![])
    });
    std::thread::scope(|scope| {
        scope.spawn(|| machine.run(&mut second));
        machine.finish(&mut first);
        machine.stop(1);
    });
    let state = second.state();
    let code = state.segments[seg::CS];
    assert_eq!((code.selector, code.base, code.limit), (0x900, 0x9000, 0xffff));
    assert_eq!(machine.u64_at(0x9800) & 0xffff, 0x900);
    assert_eq!(machine.u64_at(STARTED), 3, "the second start-up message of a pair does nothing");
    assert_eq!((state.cr0 & 1, state.gpr[gpr::RDX] as u32), (0, machine.model.signature()));
}

pub(crate) fn locked_increments_are_atomic<B: Backend>(backend: &B) {
    const EACH: u32 = 100_000;
    let machine = Machine::new(backend, 2);
    let program = |a: &mut Payload| {
        let (mut again, mut retry) = (a.create_label(), a.create_label());
        a.mov(ecx, EACH)?;
        a.set_label(&mut again)?;
        a.lock().inc(qword_ptr(DATA + 0x100))?;
        // Across a cache line.
        a.lock().inc(dword_ptr(DATA + 0x13e))?;
        a.mov(eax, dword_ptr(DATA + 0x200))?;
        a.set_label(&mut retry)?;
        a.lea(edx, ptr(rax + 3))?;
        a.lock().cmpxchg(dword_ptr(DATA + 0x200), edx)?;
        a.jne(retry)?;
        a.dec(ecx)?;
        a.jne(again)?;
        a.exit()?;
        Ok(vec![])
    };
    let mut guests: Vec<_> = (0..2).map(|index| machine.long(index, program)).collect();
    all_running(&machine, &mut guests, || {});
    let both = u64::from(EACH) * 2;
    assert_eq!(machine.u64_at(DATA + 0x100), both);
    assert_eq!(machine.u64_at(DATA + 0x13e) & 0xffff_ffff, both);
    assert_eq!(machine.u64_at(DATA + 0x200), both * 3);
}

pub(crate) fn nmi_by_ipi<B: Backend>(backend: &B) {
    let machine = Machine::new(backend, 2);
    let mut second = machine.long(1, |a| {
        a.interrupts(&[2]);
        a.await_interrupt(2, 3)?;
        a.exit()?;
        Ok(vec![])
    });
    let mut first = machine.long(0, |a| {
        for round in 1..=3 {
            // All but the sender.
            a.apic_write(0x300, 0xc_4400)?;
            a.await_value(crate::payload::count_of(1, 2), round)?;
        }
        a.exit()?;
        Ok(vec![])
    });
    std::thread::scope(|scope| {
        scope.spawn(|| machine.finish(&mut second));
        machine.finish(&mut first);
    });
    assert_eq!((machine.handled(0, 2), machine.handled(1, 2)), (0, 3));
}
