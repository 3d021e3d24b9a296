//! Stopping, shutting down, counting.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use atoll_machine::backend::{Backend, HaltReason, Partition, Vcpu};
use atoll_machine::cpu::state::{Activity, DescriptorTable, gpr};
use iced_x86::code_asm::*;

use crate::fixture::{Guest, Machine};
use crate::payload::{DATA, Payload};

/// Longest time from a kick to the return of `run` that passes, in the best of several tries: far more than a
/// backend needs, far less than a person notices.
const STOP_LIMIT: Duration = Duration::from_millis(5);

/// Stops a running guest several times. Returns the shortest time it took.
fn stop_latency<P: Partition>(machine: &Machine<P>, guest: &mut Guest<P>) -> Duration {
    let mut best = Duration::MAX;
    for _ in 0..10 {
        let asked = std::thread::scope(|scope| {
            let index = guest.index;
            let asker = scope.spawn(move || {
                std::thread::sleep(Duration::from_millis(3));
                let now = Instant::now();
                machine.stop(index);
                now
            });
            assert_eq!(machine.run(guest), HaltReason::Stopped);
            let returned = Instant::now();
            returned.duration_since(asker.join().expect("no panic"))
        });
        best = best.min(asked);
    }
    best
}

fn endless(a: &mut Payload) -> crate::payload::Built {
    let mut again = a.create_label();
    a.set_label(&mut again)?;
    a.jmp(again)?;
    Ok(vec![again])
}

pub(crate) fn kick_stops_a_tight_loop<B: Backend>(backend: &B) {
    let machine = Machine::new(backend, 1);
    let mut guest = machine.long(0, endless);
    let best = stop_latency(&machine, &mut guest);
    assert!(best < STOP_LIMIT, "stopping took {best:?}");
    assert_eq!(guest.state().rip, guest.labels[0]);
}

pub(crate) fn kick_stops_a_halt_without_interrupts<B: Backend>(backend: &B) {
    let machine = Machine::new(backend, 1);
    let mut guest = machine.long(0, |a| {
        a.cli()?;
        a.hlt()?;
        a.ud2()?;
        Ok(vec![])
    });
    let best = stop_latency(&machine, &mut guest);
    assert!(best < STOP_LIMIT, "stopping took {best:?}");
    assert_eq!(guest.state().activity, Activity::Halted, "a stop does not end the halt");
}

pub(crate) fn kick_stops_a_wait_for_sipi<B: Backend>(backend: &B) {
    let machine = Machine::new(backend, 2);
    let mut guest = machine.vcpu(1);
    let best = stop_latency(&machine, &mut guest);
    assert!(best < STOP_LIMIT, "stopping took {best:?}");
    assert_eq!(guest.state().activity, Activity::WaitForSipi);
}

pub(crate) fn a_stop_asked_for_before_the_run_is_seen<B: Backend>(backend: &B) {
    let machine = Machine::new(backend, 1);
    let mut guest = machine.long(0, endless);
    machine.stop(0);
    assert_eq!(machine.run(&mut guest), HaltReason::Stopped);
    assert_eq!(guest.state().rip, guest.labels[0]);
}

pub(crate) fn stopped_vcpu_continues_where_it_was<B: Backend>(backend: &B) {
    const TURNS: u64 = 2_000_000;
    let machine = Machine::new(backend, 1);
    let mut guest = machine.long(0, |a| {
        let mut again = a.create_label();
        a.mov(rcx, TURNS)?;
        a.xor(eax, eax)?;
        a.set_label(&mut again)?;
        a.add(rax, rcx)?;
        a.dec(rcx)?;
        a.jne(again)?;
        a.mov(byte_ptr(DATA), 1u32)?;
        a.exit()?;
        Ok(vec![])
    });
    let mut stops = 0;
    while machine.u64_at(DATA) == 0 {
        std::thread::scope(|scope| {
            scope.spawn(|| {
                std::thread::sleep(Duration::from_micros(500));
                machine.stop(0);
            });
            assert_eq!(machine.run(&mut guest), HaltReason::Stopped);
        });
        stops += 1;
    }
    assert_eq!(guest.state().gpr[gpr::RAX], TURNS * (TURNS + 1) / 2, "after {stops} stops");
}

pub(crate) fn kicks_without_a_stop_change_nothing<B: Backend>(backend: &B) {
    const TURNS: u32 = 300_000;
    let machine = Machine::new(backend, 1);
    let mut guest = machine.long(0, |a| {
        let mut again = a.create_label();
        a.mov(ecx, TURNS)?;
        a.xor(eax, eax)?;
        a.set_label(&mut again)?;
        a.inc(rax)?;
        a.dec(ecx)?;
        a.jne(again)?;
        a.exit()?;
        Ok(vec![])
    });
    let done = Arc::new(AtomicBool::new(false));
    let (partition, end) = (machine.partition.clone(), done.clone());
    let kicker = std::thread::spawn(move || {
        let mut kicks = 0u32;
        while !end.load(Ordering::SeqCst) {
            partition.kick(0);
            kicks += 1;
            std::thread::sleep(Duration::from_micros(50));
        }
        kicks
    });
    let result = catch_unwind(AssertUnwindSafe(|| machine.finish(&mut guest)));
    done.store(true, Ordering::SeqCst);
    let kicks = kicker.join().expect("no panic");
    let state = result.unwrap_or_else(|_| panic!("the program did not end under {kicks} kicks"));
    assert_eq!(state.gpr[gpr::RAX], u64::from(TURNS));
}

pub(crate) fn triple_fault_is_reported<B: Backend>(backend: &B) {
    let machine = Machine::new(backend, 1);
    let mut guest = machine.long(0, |a| {
        a.ud2()?;
        Ok(vec![])
    });
    let mut state = guest.state();
    state.idtr = DescriptorTable { base: DATA, limit: 0 };
    guest.set_state(&state).expect("a valid state");
    assert_eq!(machine.run(&mut guest), HaltReason::TripleFault);
    assert_eq!(guest.state().activity, Activity::Shutdown);
    assert_eq!(machine.run(&mut guest), HaltReason::TripleFault, "it stays shut down");
    guest.reset();
    assert_eq!(guest.state().activity, Activity::Active);
}

pub(crate) fn budget_is_exact<B: Backend>(backend: &B) {
    let machine = Machine::new(backend, 1);
    let mut guest = machine.long(0, |a| {
        let mut again = a.create_label();
        a.mov(rsi, DATA)?;
        a.mov(rdi, DATA + 0x1000)?;
        a.set_label(&mut again)?;
        a.inc(rax)?;
        a.inc(rax)?;
        a.inc(rax)?;
        a.jmp(again)?;
        Ok(vec![again])
    });
    let Some(counting) = machine.partition.counting() else { return };
    let start = counting.retired(0);
    counting.set_budget(0, Some(2));
    assert_eq!(machine.run(&mut guest), HaltReason::BudgetSpent);
    assert_eq!((counting.retired(0) - start, guest.state().rip), (2, guest.labels[0]));
    let mut done = 0;
    for budget in (1..60).chain([1000, 4095, 4096, 4097, 100_003]) {
        counting.set_budget(0, Some(budget));
        assert_eq!(machine.run(&mut guest), HaltReason::BudgetSpent);
        done += budget;
        assert_eq!(counting.retired(0) - start, 2 + done, "after a budget of {budget}");
        let state = guest.state();
        assert_eq!(state.gpr[gpr::RAX], done / 4 * 3 + done % 4, "after {done} instructions");
        assert_eq!(state.rip, guest.labels[0] + done % 4 * 3);
    }
    assert_eq!(machine.run(&mut guest), HaltReason::BudgetSpent, "a spent budget stays spent");
    counting.set_budget(0, None);
    machine.stop(0);
    assert_eq!(machine.run(&mut guest), HaltReason::Stopped);
}

pub(crate) fn indices_out_of_range_are_refused<B: Backend>(backend: &B) {
    let machine = Machine::new(backend, 2);
    assert!(machine.partition.create_vcpu(2).is_err());
    machine.partition.kick(7);
    machine.partition.inject_nmi(u32::MAX);
    machine.msi(u64::MAX, u32::MAX);
    machine.msi(0, 0);
    assert_eq!(machine.vcpu(1).state().activity, Activity::WaitForSipi);
}
