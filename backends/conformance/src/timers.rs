//! The local APIC's timer and the time-stamp counter. The timer counts 1 GHz (see the models' CPUID leaf 0x15).

use std::time::Duration;

use atoll_machine::backend::{Backend, Partition};
use atoll_machine::cpu::state::gpr;
use atoll_machine::time::{Clock, VirtualClock};
use iced_x86::IcedError;
use iced_x86::code_asm::*;

use crate::fixture::Machine;
use crate::payload::{DATA, Payload};

/// Sets the timer's vector and mode, counting every tick.
fn timer(a: &mut Payload, lvt: u32) -> Result<(), IcedError> {
    a.apic_write(0x3e0, 0xb)?;
    a.apic_write(0x320, lvt)
}

/// Turns around until `ticks` of the time-stamp counter have passed; changes RAX, RDX, R10.
fn spin(a: &mut Payload, ticks: u32) -> Result<(), IcedError> {
    let mut again = a.create_label();
    a.time()?;
    a.lea(r10, ptr(rax + u64::from(ticks)))?;
    a.set_label(&mut again)?;
    a.pause()?;
    a.time()?;
    a.cmp(rax, r10)?;
    a.jb(again)
}

pub(crate) fn one_shot_fires_once_and_not_early<B: Backend>(backend: &B) {
    let machine = Machine::new(backend, 1);
    let mut guest = machine.long(0, |a| {
        a.interrupts(&[0x50]);
        timer(a, 0x50)?;
        a.sti()?;
        a.time()?;
        a.mov(rbx, rax)?;
        // 20 ms: long enough for a host that emulates its processor to look in time.
        a.apic_write(0x380, 20_000_000)?;
        a.apic_read(0x390)?;
        a.mov(esi, eax)?;
        a.await_interrupt(0x50, 1)?;
        a.time()?;
        a.sub(rax, rbx)?;
        a.mov(rbx, rax)?;
        a.apic_read(0x390)?;
        a.mov(edi, eax)?;
        spin(a, 20_000_000)?;
        a.exit()?;
        Ok(vec![])
    });
    let state = machine.finish(&mut guest);
    let nanos = machine.clock.tsc_to_nanos(state.gpr[gpr::RBX]);
    assert!((19_999_000..1_000_000_000).contains(&nanos), "20 ms took {nanos} ns");
    let count = state.gpr[gpr::RSI];
    assert!(count > 0 && count <= 20_000_000, "the count runs down: {count}");
    assert_eq!((state.gpr[gpr::RDI], machine.handled(0, 0x50)), (0, 1), "stopped at zero");
}

pub(crate) fn periodic_fires_again<B: Backend>(backend: &B) {
    let machine = Machine::new(backend, 1);
    let mut guest = machine.long(0, |a| {
        let mut again = a.create_label();
        a.interrupts(&[0x51]);
        timer(a, 0x2_0051)?;
        a.time()?;
        a.mov(rbx, rax)?;
        a.apic_write(0x380, 1_000_000)?;
        a.set_label(&mut again)?;
        a.sti()?;
        a.hlt()?;
        a.cli()?;
        a.load(crate::payload::count_of(0, 0x51))?;
        a.cmp(rax, 8)?;
        a.jb(again)?;
        a.time()?;
        a.sub(rax, rbx)?;
        a.mov(rbx, rax)?;
        a.apic_write(0x380, 0)?;
        a.exit()?;
        Ok(vec![])
    });
    let state = machine.finish(&mut guest);
    let nanos = machine.clock.tsc_to_nanos(state.gpr[gpr::RBX]);
    assert!((7_900_000..4_000_000_000).contains(&nanos), "8 periods of 1 ms took {nanos} ns");
    assert_eq!(state.lapic.timer_expires_at, None, "a count of zero stops the timer");
}

pub(crate) fn tsc_deadline_fires_and_disarms<B: Backend>(backend: &B) {
    let machine = Machine::new(backend, 1);
    let mut guest = machine.long(0, |a| {
        a.interrupts(&[0x52]);
        timer(a, 0x4_0052)?;
        a.mfence()?;
        a.time()?;
        a.lea(rbx, ptr(rax + 5_000_000))?;
        a.mov(rax, rbx)?;
        a.mov(rdx, rbx)?;
        a.shr(rdx, 32)?;
        a.mov(ecx, 0x6e0u32)?;
        a.wrmsr()?;
        a.msr_read(0x6e0)?;
        a.mov(rsi, rax)?;
        a.sti()?;
        a.hlt()?;
        a.await_interrupt(0x52, 1)?;
        a.time()?;
        a.sub(rax, rbx)?;
        a.mov(rdi, rax)?;
        a.msr_read(0x6e0)?;
        a.mov(rbp, rax)?;
        // A deadline in the past fires at once; zero disarms.
        a.msr_write(0x6e0, 1)?;
        a.await_interrupt(0x52, 2)?;
        a.cli()?;
        a.mov(eax, u32::MAX)?;
        a.mov(edx, u32::MAX / 2)?;
        a.wrmsr()?;
        a.msr_write(0x6e0, 0)?;
        a.exit()?;
        Ok(vec![])
    });
    let s = machine.finish(&mut guest);
    assert_eq!(s.gpr[gpr::RSI], s.gpr[gpr::RBX], "the deadline can be read while armed");
    assert!((s.gpr[gpr::RDI] as i64) >= 0, "not before the deadline: {}", s.gpr[gpr::RDI] as i64);
    assert_eq!(s.gpr[gpr::RBP], 0, "a deadline that passed reads as zero");
    assert_eq!((machine.handled(0, 0x52), s.lapic.tsc_deadline), (2, 0));
}

pub(crate) fn timer_follows_the_machines_clock<B: Backend>(backend: &B) {
    let clock = VirtualClock::new(0, 2_000_000);
    let machine = Machine::with_clock(backend, 1, clock.clone());
    let mut guest = machine.long(0, |a| {
        a.interrupts(&[0x53]);
        timer(a, 0x53)?;
        a.apic_write(0x380, 1_000_000)?;
        a.mov(qword_ptr(DATA), 1)?;
        a.sti()?;
        a.hlt()?;
        a.time()?;
        a.mov(rbx, rax)?;
        a.exit()?;
        Ok(vec![])
    });
    let state = std::thread::scope(|scope| {
        scope.spawn(|| {
            machine.wait_for("the start of the timer", || machine.u64_at(DATA) == 1);
            for step in [999_999, 1] {
                std::thread::sleep(Duration::from_millis(10));
                assert_eq!(machine.handled(0, 0x53), 0, "time stands still");
                clock.advance(step);
                machine.partition.kick(0);
            }
        });
        machine.finish(&mut guest)
    });
    assert_eq!(machine.handled(0, 0x53), 1);
    assert_eq!(state.gpr[gpr::RBX], 2_000_000, "the time-stamp counter shows the clock");
    assert_eq!(clock.now(), 1_000_000);
}

pub(crate) fn time_counter_follows_the_clock<B: Backend>(backend: &B) {
    let machine = Machine::new(backend, 1);
    let mut guest = machine.long(0, |a| {
        let (mut again, mut back) = (a.create_label(), a.create_label());
        a.time()?;
        a.mov(qword_ptr(DATA), rax)?;
        a.mov(ecx, 10_000u32)?;
        a.set_label(&mut again)?;
        a.mov(rbx, rax)?;
        a.time()?;
        a.cmp(rax, rbx)?;
        a.jb(back)?;
        a.dec(ecx)?;
        a.jne(again)?;
        a.set_label(&mut back)?;
        a.mov(edi, ecx)?;
        a.mov(qword_ptr(DATA + 8), rax)?;
        // The counter can be moved; TSC_ADJUST tells by how much.
        a.msr_write(0x3b, 1 << 50)?;
        a.time()?;
        a.mov(rsi, rax)?;
        a.exit()?;
        Ok(vec![])
    });
    let before = machine.clock.tsc();
    let state = machine.finish(&mut guest);
    let after = machine.clock.tsc();
    let (first, last) = (machine.u64_at(DATA), machine.u64_at(DATA + 8));
    let slack = u64::from(machine.clock.tsc_khz()) / 20;
    assert!(first + slack >= before && last <= after + slack, "{before} {first} {last} {after}");
    assert_eq!(state.gpr[gpr::RDI], 0, "the counter went back");
    assert_eq!(state.gpr[gpr::RSI] >> 50, 1, "TSC_ADJUST moves the counter");
}
