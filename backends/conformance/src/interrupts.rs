//! Interrupts of one vCPU: acceptance, priority, holding back, ends, and the legacy controller.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use atoll_machine::backend::{Backend, Partition, Vcpu};
use atoll_machine::cpu::state::gpr;
use atoll_machine::interrupt::Msi;
use iced_x86::IcedError;
use iced_x86::code_asm::*;

use crate::fixture::Machine;
use crate::payload::{APIC, Built, DATA, Payload, count_of, return_of};

/// Makes the hook send the message with the written value as its vector. Port 0xe1 sends it level-triggered.
fn messages_from_hook<P: Partition>(machine: &Machine<P>) {
    let sink = machine.partition.msi_sink();
    machine.on_hook(move |_, port, value| {
        let data = value | if port == 0xe1 { 0xc000 } else { 0 };
        sink.signal_msi(Msi { address: APIC, data });
    });
}

/// Turns around for a while; changes ECX.
fn dawdle(a: &mut Payload) -> Result<(), IcedError> {
    let mut again = a.create_label();
    a.mov(ecx, 10_000u32)?;
    a.set_label(&mut again)?;
    a.dec(ecx)?;
    a.jne(again)
}

pub(crate) fn message_reaches_the_addressed_vector<B: Backend>(backend: &B) {
    let machine = Machine::new(backend, 1);
    messages_from_hook(&machine);
    let mut guest = machine.long(0, |a| {
        a.interrupts(&[0x20, 0x41, 0xef]);
        a.sti()?;
        for (n, vector) in [0x20, 0x41, 0xef, 0x41].into_iter().enumerate() {
            a.hook(0xe0, vector)?;
            a.await_interrupt(vector, if n == 3 { 2 } else { 1 })?;
        }
        a.exit()?;
        Ok(vec![])
    });
    machine.finish(&mut guest);
    assert_eq!(machine.order(0), [0x20, 0x41, 0xef, 0x41]);
    assert_eq!(machine.eoi.vectors(), [0u8; 0], "edge-triggered interrupts are not told of");
}

pub(crate) fn interrupt_flag_holds_interrupts_back<B: Backend>(backend: &B) {
    let machine = Machine::new(backend, 1);
    messages_from_hook(&machine);
    let mut guest = machine.long(0, |a| {
        a.interrupts(&[0x30]);
        a.hook(0xe0, 0x30)?;
        a.await_pending(0x30)?;
        dawdle(a)?;
        a.load(count_of(0, 0x30))?;
        a.mov(rbx, rax)?;
        a.sti()?;
        a.await_interrupt(0x30, 1)?;
        a.exit()?;
        Ok(vec![])
    });
    let state = machine.finish(&mut guest);
    assert_eq!(state.gpr[gpr::RBX], 0, "not delivered while IF is clear");
    assert_eq!(machine.handled(0, 0x30), 1);
}

pub(crate) fn sti_holds_one_instruction_longer<B: Backend>(backend: &B) {
    let machine = Machine::new(backend, 1);
    messages_from_hook(&machine);
    let mut guest = machine.long(0, |a| {
        let (mut held, mut at_once) = (a.create_label(), a.create_label());
        a.interrupts(&[0x30, 0x31]);
        a.hook(0xe0, 0x30)?;
        a.await_pending(0x30)?;
        a.sti()?;
        a.nop()?;
        a.set_label(&mut held)?;
        a.nop()?;
        a.await_interrupt(0x30, 1)?;
        a.cli()?;
        a.hook(0xe0, 0x31)?;
        a.await_pending(0x31)?;
        a.pushfq()?;
        a.or(qword_ptr(rsp), 0x200)?;
        a.popfq()?;
        a.set_label(&mut at_once)?;
        a.nop()?;
        a.nop()?;
        a.await_interrupt(0x31, 1)?;
        a.exit()?;
        Ok(vec![held, at_once])
    });
    machine.finish(&mut guest);
    assert_eq!(machine.u64_at(return_of(0, 0x30)), guest.labels[0], "one instruction after STI");
    assert_eq!(machine.u64_at(return_of(0, 0x31)), guest.labels[1], "right after POPF");
}

pub(crate) fn task_priority_masks_lower_classes<B: Backend>(backend: &B) {
    let machine = Machine::new(backend, 1);
    messages_from_hook(&machine);
    let mut guest = machine.long(0, |a| {
        a.interrupts(&[0x45, 0x61]);
        a.mov(eax, 5u32)?;
        a.mov(cr8, rax)?;
        a.sti()?;
        a.hook(0xe0, 0x45)?;
        a.hook(0xe0, 0x61)?;
        a.await_interrupt(0x61, 1)?;
        a.await_pending(0x45)?;
        a.apic_read(0x80)?;
        a.mov(ebx, eax)?;
        a.apic_read(0xa0)?;
        a.mov(esi, eax)?;
        a.xor(eax, eax)?;
        a.mov(cr8, rax)?;
        a.await_interrupt(0x45, 1)?;
        a.exit()?;
        Ok(vec![])
    });
    let state = machine.finish(&mut guest);
    assert_eq!(machine.order(0), [0x61, 0x45]);
    assert_eq!((state.gpr[gpr::RBX], state.gpr[gpr::RSI]), (0x50, 0x50), "TPR and PPR");
}

pub(crate) fn higher_vectors_go_first<B: Backend>(backend: &B) {
    let machine = Machine::new(backend, 1);
    messages_from_hook(&machine);
    let vectors = [0x31, 0x90, 0x52, 0xfe, 0x20];
    let mut guest = machine.long(0, |a| {
        a.interrupts(&vectors);
        for vector in vectors {
            a.hook(0xe0, vector)?;
        }
        for vector in vectors {
            a.await_pending(vector)?;
        }
        a.sti()?;
        a.await_interrupt(0x20, 1)?;
        a.exit()?;
        Ok(vec![])
    });
    machine.finish(&mut guest);
    assert_eq!(machine.order(0), [0xfe, 0x90, 0x52, 0x31, 0x20]);
}

pub(crate) fn level_triggered_end_is_told<B: Backend>(backend: &B) {
    let machine = Machine::new(backend, 1);
    messages_from_hook(&machine);
    machine.level_route(20, APIC, 0xc033);
    let mut guest = machine.long(0, |a| {
        a.interrupts(&[0x33, 0x34]);
        a.sti()?;
        a.hook(0xe1, 0x33)?;
        a.await_interrupt(0x33, 1)?;
        a.hook(0xe0, 0x34)?;
        a.await_interrupt(0x34, 1)?;
        a.hook(0xe1, 0x33)?;
        a.await_interrupt(0x33, 2)?;
        a.exit()?;
        Ok(vec![])
    });
    machine.finish(&mut guest);
    assert_eq!(machine.eoi.vectors(), [0x33, 0x33]);
}

/// A program that takes each vector of `vectors` once, sent by the hook with its number in the list.
fn take_each<P: Partition>(machine: &Machine<P>, vectors: &[u8]) {
    let mut guest = machine.long(0, |a| {
        a.interrupts(vectors);
        a.sti()?;
        for (number, vector) in vectors.iter().enumerate() {
            a.hook(0xe0, number as u8)?;
            a.await_interrupt(*vector, 1)?;
        }
        a.exit()?;
        Ok(vec![])
    });
    machine.finish(&mut guest);
}

pub(crate) fn every_pin_is_told_of_its_end<B: Backend>(backend: &B) {
    let machine = Machine::new(backend, 1);
    let vectors: Vec<u8> = (0..24).map(|pin| 0x30 + pin * 7).collect();
    for (pin, vector) in vectors.iter().enumerate() {
        machine.level_route(pin as u32, APIC, 0xc000 | u32::from(*vector));
    }
    let (sink, sent) = (machine.partition.msi_sink(), vectors.clone());
    machine.on_hook(move |_, _, pin| {
        let vector = sent.get(pin as usize).copied().unwrap_or(0xff);
        sink.signal_msi(Msi { address: APIC, data: 0xc000 | u32::from(vector) });
    });
    take_each(&machine, &vectors);
    assert_eq!(machine.eoi.vectors(), vectors);
}

pub(crate) fn level_triggered_end_is_told_wherever_it_is_sent<B: Backend>(backend: &B) {
    const VECTOR: u8 = 0x44;
    let machine = Machine::new(backend, 2);
    let program = |a: &mut Payload| {
        let (index, rounds) = (a.index, if a.index == 0 { 2 } else { 1 });
        a.interrupts(&[VECTOR]);
        a.sti()?;
        a.await_value(count_of(index, VECTOR), rounds)?;
        a.exit()?;
        Ok(vec![])
    };
    let mut guests: Vec<_> = (0..2).map(|index| machine.long(index, program)).collect();
    std::thread::scope(|scope| {
        for guest in &mut guests {
            scope.spawn(|| machine.finish(guest));
        }
        for (ends, to) in [(1, 0), (2, 1), (3, 0)] {
            let (address, data) = (APIC | to << 12, 0xc000 | u32::from(VECTOR));
            machine.level_route(9, address, data);
            machine.msi(address, data);
            machine.wait_for("the end", || machine.eoi.vectors().len() == ends);
        }
    });
    assert_eq!(machine.eoi.vectors(), [VECTOR; 3]);
}

/// Makes the hook raise NMI.
fn nmi_from_hook<P: Partition>(machine: &Machine<P>) {
    // The hook lives as long as the machine; a strong reference to the partition is no cycle.
    let partition = machine.partition.clone();
    machine.on_hook(move |index, _, _| partition.inject_nmi(index));
}

pub(crate) fn nmi_ignores_the_interrupt_flag<B: Backend>(backend: &B) {
    let machine = Machine::new(backend, 1);
    nmi_from_hook(&machine);
    let mut guest = machine.long(0, |a| {
        a.interrupts(&[2]);
        a.cli()?;
        a.hook(0xe0, 0)?;
        a.await_interrupt(2, 1)?;
        a.hook(0xe0, 0)?;
        a.await_interrupt(2, 2)?;
        a.exit()?;
        Ok(vec![])
    });
    let state = machine.finish(&mut guest);
    assert_eq!(machine.handled(0, 2), 2);
    assert!(!state.nmi_blocked && !state.nmi_pending);
}

pub(crate) fn nmi_waits_for_the_end_of_the_handler<B: Backend>(backend: &B) {
    let machine = Machine::new(backend, 1);
    nmi_from_hook(&machine);
    let mut guest = machine.long(0, |a| {
        let (mut handler, mut skip, mut wait) = (a.create_label(), a.create_label(), a.create_label());
        a.xor(ebx, ebx)?;
        a.xor(ebp, ebp)?;
        a.xor(esi, esi)?;
        a.hook(0xe0, 0)?;
        a.set_label(&mut wait)?;
        a.pause()?;
        a.cmp(ebx, 2)?;
        a.jb(wait)?;
        a.exit()?;
        // EBX counts handlers, EBP is the depth, ESI the greatest depth.
        a.set_label(&mut handler)?;
        a.own_handler(2, handler);
        a.inc(ebx)?;
        a.inc(ebp)?;
        a.cmp(ebp, esi)?;
        a.cmova(esi, ebp)?;
        a.cmp(ebx, 1)?;
        a.jne(skip)?;
        a.hook(0xe0, 0)?;
        dawdle(a)?;
        a.set_label(&mut skip)?;
        a.dec(ebp)?;
        a.iretq()?;
        Ok(vec![])
    });
    let state = machine.finish(&mut guest);
    assert_eq!((state.gpr[gpr::RBX], state.gpr[gpr::RSI]), (2, 1), "handlers do not nest");
}

pub(crate) fn nmi_ends_a_halt<B: Backend>(backend: &B) {
    const HALTS: u32 = 5;
    let machine = Machine::new(backend, 1);
    let mut guest = machine.long(0, |a| {
        a.interrupts(&[2]);
        a.cli()?;
        for halt in 1..=HALTS {
            a.hlt()?;
            a.mov(qword_ptr(DATA), halt as i32)?;
        }
        a.exit()?;
        Ok(vec![])
    });
    std::thread::scope(|scope| {
        // An NMI may come before the halt that it is meant for; then another one ends it.
        let nmis = scope.spawn(|| {
            let mut nmis = 0u64;
            while machine.u64_at(DATA) < u64::from(HALTS) && nmis < 2000 {
                std::thread::sleep(Duration::from_millis(3));
                machine.partition.inject_nmi(0);
                nmis += 1;
            }
            nmis
        });
        machine.finish(&mut guest);
        let (handled, sent) = (machine.handled(0, 2), nmis.join().expect("no panic"));
        assert!((u64::from(HALTS)..=sent).contains(&handled), "{handled} of {sent} NMIs");
    });
}

pub(crate) fn legacy_interrupt_waits_for_the_window<B: Backend>(backend: &B) {
    let machine = Machine::new(backend, 1);
    let pic = machine.pic.clone();
    let early = Arc::new(AtomicU32::new(u32::MAX));
    let seen = early.clone();
    machine.on_hook(move |_, port, value| match port {
        0xe0 => pic.raise(value as u8),
        _ => seen.store(pic.acknowledged(), Ordering::SeqCst),
    });
    let mut guest = machine.long(0, |a| {
        a.interrupts(&[0x28]);
        a.cli()?;
        a.hook(0xe0, 0x28)?;
        dawdle(a)?;
        a.hook(0xe1, 0)?;
        a.sti()?;
        a.await_interrupt(0x28, 1)?;
        a.exit()?;
        Ok(vec![])
    });
    machine.finish(&mut guest);
    assert_eq!(early.load(Ordering::SeqCst), 0, "not acknowledged while it cannot be delivered");
    assert_eq!(machine.pic.acknowledged(), 1);
}

/// The legacy interrupt that [`tick`] counts.
const TICK: u8 = 0x28;
/// The legacy interrupt that ends the program's last halt.
const LAST: u8 = 0x29;

/// A program that takes the interrupts of [`tick`] and works with interrupts off and on and halts, until the byte at
/// [`DATA`] is set.
fn busy_and_idle(a: &mut Payload) -> Built {
    let (mut again, mut end) = (a.create_label(), a.create_label());
    a.interrupts(&[TICK, LAST]);
    a.set_label(&mut again)?;
    a.cli()?;
    for _ in 0..20 {
        a.nop()?;
    }
    a.cmp(byte_ptr(DATA), 0)?;
    a.jne(end)?;
    a.sti()?;
    a.hlt()?;
    for _ in 0..20 {
        a.nop()?;
    }
    a.jmp(again)?;
    a.set_label(&mut end)?;
    a.mov(byte_ptr(DATA + 8), 1)?;
    a.exit()?;
    Ok(vec![])
}

/// Raises the legacy interrupt `ticks` times, every 200 us, as a timer does that remembers what was not taken yet.
/// Then lets the program end.
fn tick<P: Partition>(machine: &Machine<P>, ticks: u32, meanwhile: impl Fn()) {
    for _ in 0..ticks {
        machine.pic.raise(TICK);
        meanwhile();
        std::thread::sleep(Duration::from_micros(200));
    }
    let all = || machine.handled(0, TICK) == u64::from(ticks);
    let start = std::time::Instant::now();
    while !all() {
        let (handled, acknowledged) = (machine.handled(0, TICK), machine.pic.acknowledged());
        let late = start.elapsed() > Duration::from_secs(10);
        assert!(!late, "{handled} of {ticks} ticks were handled, {acknowledged} acknowledged");
        std::thread::sleep(Duration::from_millis(1));
    }
    machine.write(DATA, &[1]);
    // It may be about to halt.
    while machine.u64_at(DATA + 8) & 0xff == 0 && start.elapsed() < crate::fixture::TIME_LIMIT {
        machine.pic.raise(LAST);
        std::thread::sleep(Duration::from_millis(2));
    }
}

pub(crate) fn periodic_legacy_interrupts_lose_no_tick<B: Backend>(backend: &B) {
    const TICKS: u32 = 500;
    let machine = Machine::new(backend, 1);
    let mut guest = machine.long(0, busy_and_idle);
    std::thread::scope(|scope| {
        scope.spawn(|| tick(&machine, TICKS, || {}));
        machine.finish(&mut guest);
    });
    assert_eq!(machine.handled(0, TICK), u64::from(TICKS));
    assert!(machine.pic.acknowledged() >= TICKS);
}

pub(crate) fn stops_lose_no_legacy_interrupt<B: Backend>(backend: &B) {
    const TICKS: u32 = 400;
    let machine = Machine::new(backend, 1);
    let mut guest = machine.long(0, busy_and_idle);
    std::thread::scope(|scope| {
        // The stop comes right after the request: before, in and after its delivery.
        scope.spawn(|| tick(&machine, TICKS, || machine.stop(0)));
        while machine.u64_at(DATA + 8) & 0xff == 0 {
            machine.run(&mut guest);
            let state = guest.state();
            guest.set_state(&state).expect("its own state");
        }
    });
    let (handled, acknowledged) = (machine.handled(0, TICK), machine.pic.acknowledged());
    assert_eq!(handled, u64::from(TICKS), "of {acknowledged} that were acknowledged");
}

/// Makes the hook raise the legacy interrupt with the written value as its vector.
fn legacy_from_hook<P: Partition>(machine: &Machine<P>) {
    let pic = machine.pic.clone();
    machine.on_hook(move |_, _, value| pic.raise(value as u8));
}

pub(crate) fn legacy_interrupt_is_acknowledged_once<B: Backend>(backend: &B) {
    let machine = Machine::new(backend, 1);
    legacy_from_hook(&machine);
    let mut guest = machine.long(0, |a| {
        a.interrupts(&[0x28, 0x29]);
        a.sti()?;
        a.hook(0xe0, 0x28)?;
        a.await_interrupt(0x28, 1)?;
        a.cli()?;
        a.hook(0xe0, 0x29)?;
        a.sti()?;
        a.hlt()?;
        a.await_interrupt(0x29, 1)?;
        a.exit()?;
        Ok(vec![])
    });
    machine.finish(&mut guest);
    assert_eq!((machine.order(0), machine.pic.acknowledged()), (vec![0x28, 0x29], 2));
}

pub(crate) fn masked_legacy_interrupt_waits<B: Backend>(backend: &B) {
    let machine = Machine::new(backend, 1);
    legacy_from_hook(&machine);
    let mut guest = machine.long(0, |a| {
        a.interrupts(&[0x28]);
        a.apic_write(0x350, 0x1_0700)?;
        a.sti()?;
        a.hook(0xe0, 0x28)?;
        dawdle(a)?;
        a.load(count_of(0, 0x28))?;
        a.mov(rbx, rax)?;
        a.apic_write(0x350, 0x700)?;
        a.await_interrupt(0x28, 1)?;
        a.exit()?;
        Ok(vec![])
    });
    let state = machine.finish(&mut guest);
    assert_eq!(state.gpr[gpr::RBX], 0, "masked in the local APIC");
    assert_eq!(machine.pic.acknowledged(), 1);
}

pub(crate) fn halt_ends_with_an_interrupt<B: Backend>(backend: &B) {
    let machine = Machine::new(backend, 1);
    let sink = machine.partition.msi_sink();
    machine.on_hook(move |_, _, _| {
        let sink = sink.clone();
        std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(3));
            sink.signal_msi(Msi { address: APIC, data: 0x40 });
        });
    });
    let mut guest = machine.long(0, |a| {
        let mut after = a.create_label();
        a.interrupts(&[0x40]);
        for _ in 0..10 {
            a.cli()?;
            a.hook(0xe0, 0)?;
            a.sti()?;
            a.hlt()?;
        }
        a.set_label(&mut after)?;
        a.cli()?;
        a.exit()?;
        Ok(vec![after])
    });
    machine.finish(&mut guest);
    assert_eq!(machine.handled(0, 0x40), 10, "each halt ended with one interrupt");
    assert_eq!(machine.u64_at(return_of(0, 0x40)), guest.labels[0], "the handler returns after HLT");
}

pub(crate) fn x2apic_registers_and_self_ipi<B: Backend>(backend: &B) {
    let machine = Machine::new(backend, 1);
    let mut guest = machine.long(0, |a| {
        a.use_x2apic();
        a.interrupts(&[0x77, 0x78]);
        a.msr_read(0x1b)?;
        a.or(eax, 0x400)?;
        a.mov(edx, 0)?;
        a.wrmsr()?;
        a.msr_read(0x802)?;
        a.mov(rbx, rax)?;
        a.msr_read(0x80d)?;
        a.mov(rsi, rax)?;
        a.msr_read(0x803)?;
        a.mov(rdi, rax)?;
        a.msr_write(0x808, 0x20)?;
        a.mov(rbp, cr8)?;
        a.sti()?;
        a.msr_write(0x83f, 0x77)?;
        a.await_interrupt(0x77, 1)?;
        a.msr_write(0x830, 0x4_0078)?;
        a.await_interrupt(0x78, 1)?;
        a.exit()?;
        Ok(vec![])
    });
    let s = machine.finish(&mut guest);
    assert_eq!((s.gpr[gpr::RBX], s.gpr[gpr::RSI]), (0, 1), "id and logical id");
    assert_eq!(s.gpr[gpr::RDI] & 0xff, 0x14, "version");
    assert_eq!(s.gpr[gpr::RBP], 2, "CR8 mirrors TPR");
    assert_eq!(machine.order(0), [0x77, 0x78]);
    assert_eq!(s.lapic.apic_base & 0xc00, 0xc00);
}
