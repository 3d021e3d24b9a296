//! A running guest moves to a new partition, again and again, and ends as if it had never moved.
//!
//! The program mixes memory with general, vector and x87 registers, takes timer interrupts and messages, and
//! watches the time-stamp counter. What it computes does not depend on when interrupts come.

use std::sync::Arc;
use std::time::Duration;

use atoll_machine::backend::{Backend, HaltReason, Partition, Vcpu};
use atoll_machine::cpu::saved_state::CpuStateV1;
use atoll_machine::cpu::state::CpuState;
use atoll_machine::time::{Clock, HostClock};
use iced_x86::IcedError;
use iced_x86::code_asm::*;
use prost::Message;

use crate::fixture::{Guest, Machine, RAM_SIZE};
use crate::payload::{APIC, Built, DATA, Payload, apic, count_of};
use crate::registers::Random;

const TIMER: u8 = 0x50;
const MESSAGE: u8 = 0x60;
const TURNS: u32 = 240_000;
/// Results: general registers' sum, vector sum, x87 sum, count of times that the time-stamp counter went back.
const RESULTS: u64 = DATA + 0x8_0000;
/// Set at the end of the computation; then a flag and a number of messages from outside.
const DONE: u64 = RESULTS + 0x80;
/// Turns still to do, kept up to date.
const LEFT: u64 = RESULTS + 0xc0;

fn start_timer(a: &mut Payload) -> Result<(), IcedError> {
    a.apic_write(0x3e0, 0xb)?;
    a.apic_write(0x320, 0x2_0000 | u32::from(TIMER))?;
    a.apic_write(0x380, 50_000)?;
    a.sti()
}

/// One turn: a random line of memory through general and vector registers, and one more in the x87 sum.
fn turn(a: &mut Payload) -> Result<(), IcedError> {
    let mut forward = a.create_label();
    a.imul_3(ebx, ebx, 0x0019_660d)?;
    a.add(ebx, 0x3c6e_f35f)?;
    a.mov(esi, ebx)?;
    a.shr(esi, 8)?;
    a.and(esi, 0x7_ffe0)?;
    a.add(qword_ptr(rsi + DATA), rbx)?;
    a.adc(r8, qword_ptr(rsi + DATA))?;
    a.rol(r8, 7)?;
    a.vmovdqu(ymm1, ymmword_ptr(rsi + DATA))?;
    a.vpaddq(ymm5, ymm5, ymm1)?;
    a.vpxor(ymm5, ymm5, ymm1)?;
    a.vmovdqu(ymmword_ptr(rsi + DATA), ymm5)?;
    // st1 += st0; st0 stays one: exact in 64 bits.
    a.fadd_2(st1, st0)?;
    a.time()?;
    a.cmp(rax, r12)?;
    a.jae(forward)?;
    a.inc(r11)?;
    a.set_label(&mut forward)?;
    a.mov(r12, rax)
}

fn program(a: &mut Payload) -> Built {
    let (mut again, mut wait) = (a.create_label(), a.create_label());
    a.interrupts(&[TIMER, MESSAGE]);
    start_timer(a)?;
    a.mov(ebx, 1u32)?;
    a.xor(r8d, r8d)?;
    a.xor(r11d, r11d)?;
    a.xor(r12d, r12d)?;
    // All ones: memory is zero at first, and zeros would stay zeros.
    a.vpcmpeqd(ymm5, ymm5, ymm5)?;
    a.fldz()?;
    a.fld1()?;
    a.mov(r9d, TURNS)?;
    a.set_label(&mut again)?;
    turn(a)?;
    a.dec(r9d)?;
    a.mov(qword_ptr(LEFT), r9)?;
    a.jne(again)?;
    a.cli()?;
    a.mov(qword_ptr(RESULTS), r8)?;
    a.vmovdqu(ymmword_ptr(RESULTS + 0x20), ymm5)?;
    a.fstp(st0)?;
    a.fstp(qword_ptr(RESULTS + 0x40))?;
    a.mov(qword_ptr(RESULTS + 0x48), r11)?;
    a.mov(qword_ptr(DONE), 1)?;
    a.sti()?;
    // Messages that are on their way.
    a.await_value(DONE + 8, 1)?;
    a.load(DONE + 16)?;
    a.mov(rbx, rax)?;
    a.set_label(&mut wait)?;
    a.load(count_of(0, MESSAGE))?;
    a.cmp(rax, rbx)?;
    a.jb(wait)?;
    a.cli()?;
    a.exit()?;
    Ok(vec![])
}

/// What the program computed, and the memory it computed it with.
#[derive(Debug, PartialEq)]
struct Outcome {
    general: u64,
    vector: [u64; 4],
    x87: f64,
    memory: u64,
}

fn outcome<P: Partition>(machine: &Machine<P>, messages: u64) -> Outcome {
    assert_eq!(machine.u64_at(RESULTS + 0x48), 0, "the time-stamp counter went back");
    assert_eq!(machine.handled(0, MESSAGE), messages, "no message is lost, none comes twice");
    let mut bytes = vec![0; 0x8_0000];
    machine.ram.read(DATA, &mut bytes).expect("RAM");
    let mix = |sum: u64, byte: &u8| (sum ^ u64::from(*byte)).wrapping_mul(0x100_0000_01b3);
    Outcome {
        general: machine.u64_at(RESULTS),
        vector: std::array::from_fn(|i| machine.u64_at(RESULTS + 0x20 + i as u64 * 8)),
        x87: f64::from_bits(machine.u64_at(RESULTS + 0x40)),
        memory: bytes.iter().fold(0xcbf2_9ce4_8422_2325, mix),
    }
}

/// Tells the program how many messages there were, and lets it end.
fn end<P: Partition>(machine: &Machine<P>, guest: &mut Guest<P>, messages: u64) -> Outcome {
    if let Some(counting) = machine.partition.counting() {
        counting.set_budget(0, None);
    }
    machine.write(DONE + 16, &messages.to_le_bytes());
    machine.write(DONE + 8, &1u64.to_le_bytes());
    let state = machine.finish(guest);
    assert!(state.lapic.timer_expires_at.is_some(), "the periodic timer goes on");
    assert!(machine.handled(0, TIMER) > 5, "the timer ran");
    outcome(machine, messages)
}

fn unmoved<B: Backend>(backend: &B) -> Outcome {
    let machine = Machine::new(backend, 1);
    let mut guest = machine.long(0, program);
    let outcome = end(&machine, &mut guest, 0);
    assert_eq!(outcome.x87, f64::from(TURNS));
    outcome
}

/// A machine whose clock can be stopped.
struct Home<P: Partition> {
    machine: Machine<P>,
    guest: Guest<P>,
    clock: Arc<HostClock>,
}

impl<P: Partition> Home<P> {
    fn first<B: Backend<Partition = P>>(backend: &B) -> Self {
        let nominal = || HostClock::nominal_tsc_khz(&atoll_machine::cpu::host::HostCpu::detect());
        let khz = backend.fixed_tsc_khz().unwrap_or_else(nominal);
        let clock = HostClock::started(khz);
        let machine = Machine::with_clock(backend, 1, clock.clone());
        let guest = machine.long(0, program);
        Self { machine, guest, clock }
    }

    /// The same guest in a new partition with memory of its own, its state by way of the saved form.
    fn moved<B: Backend<Partition = P>>(mut self, backend: &B) -> Self {
        self.clock.pause();
        let saved = CpuStateV1::from(&self.guest.state()).encode_to_vec();
        let mut ram = vec![0; RAM_SIZE as usize];
        self.machine.ram.read(0, &mut ram).expect("RAM");
        let clock = HostClock::paused_at(self.clock.now(), self.clock.tsc_khz());
        let machine = Machine::with_clock(backend, 1, clock.clone());
        machine.write(0, &ram);
        let mut guest = machine.vcpu(0);
        let read = CpuStateV1::decode(&saved[..]).expect("what was encoded");
        guest.set_state(&CpuState::try_from(&read).expect("what was saved")).expect("a vCPU's own state");
        clock.resume();
        Self { machine, guest, clock }
    }

    fn is_done(&self) -> bool {
        self.machine.u64_at(DONE) != 0
    }
}

pub(crate) fn moved_at_every_budget_gives_the_same_result<B: Backend>(backend: &B) {
    let expected = unmoved(backend);
    let mut random = Random(0x5eed);
    let mut home = Home::first(backend);
    let (mut messages, mut moves) = (0, 0);
    while !home.is_done() {
        let Some(counting) = home.machine.partition.counting() else { return };
        counting.set_budget(0, Some(1 + random.below(80_000)));
        assert_eq!(home.machine.run(&mut home.guest), HaltReason::BudgetSpent);
        let requests = apic(&home.guest.state(), 0x230);
        if random.below(3) == 0 && requests & 1 == 0 {
            // Pending while it moves. It would merge with one that is pending already.
            home.machine.msi(APIC, u32::from(MESSAGE));
            messages += 1;
        }
        home = home.moved(backend);
        moves += 1;
    }
    assert_eq!(end(&home.machine, &mut home.guest, messages), expected, "after {moves} moves");
    assert!(moves > 20 && messages > 5, "{moves} moves, {messages} messages");
}

pub(crate) fn moved_at_random_times_gives_the_same_result<B: Backend>(backend: &B) {
    let expected = unmoved(backend);
    let mut random = Random(0xace);
    let mut home = Home::first(backend);
    home.machine.write(LEFT, &u64::from(TURNS).to_le_bytes());
    let mut moves = 0;
    while !home.is_done() {
        // The guest's own progress says when: time alone would give hundreds of moves on a host where a guest
        // begins slowly, and none where the thread that stops it does.
        let stop_at = home.machine.u64_at(LEFT).saturating_sub(random.below(u64::from(TURNS) / 8));
        std::thread::scope(|scope| {
            let machine = &home.machine;
            scope.spawn(move || {
                while machine.u64_at(LEFT) > stop_at {
                    std::thread::sleep(Duration::from_micros(20));
                }
                machine.stop(0);
            });
            assert_eq!(machine.run(&mut home.guest), HaltReason::Stopped);
        });
        home = home.moved(backend);
        moves += 1;
    }
    assert_eq!(end(&home.machine, &mut home.guest, 0), expected, "after {moves} moves");
    assert!(moves > 3, "{moves} moves");
}
