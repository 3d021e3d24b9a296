//! The host's side: the machine around the guest, what the guest asks of it, and what it does unasked.
//!
//! ```text
//! vCPU threads (3)   run ── kicked ──► check the accesses, sometimes read the state and set it again ──► run
//! kicker             stops a vCPU every few rounds
//! messenger          messages and NMIs to random vCPUs
//! dirt reader        logs dirty pages for a while, checks that what changed is in it
//! main               watches that every vCPU makes progress; says when it is over
//! ```

use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock, RwLockWriteGuard};
use std::time::{Duration, Instant};

use anyhow::{Result, bail, ensure};
use atoll_backend_conformance::fixture::{Access, Cells, Guest, Machine};
use atoll_backend_conformance::payload::fault_of;
use atoll_machine::backend::{Backend, HaltReason, Partition, Vcpu};
use atoll_machine::cpu::state::{Activity, CpuState};
use atoll_machine::interrupt::Msi;
use atoll_machine::memory::{PAGE_SIZE, RamBlock};

use crate::guest::{self, WAYS, hook, place};
use crate::random::Random;

/// vCPUs that run the program.
const HAMMERS: u32 = 2;
/// How long a calm run goes on by itself: the suite's machine takes one without end for a hang.
const CALM_RUN: Duration = Duration::from_secs(5);

/// What happened, for the summary.
#[derive(Debug, Default)]
pub(crate) struct Statistics {
    pub(crate) rounds: u64,
    pub(crate) exits: u64,
    pub(crate) stops: AtomicU64,
    pub(crate) states: AtomicU64,
    pub(crate) messages: AtomicU64,
    pub(crate) dirty_checks: AtomicU64,
    pub(crate) level_ends: u64,
    /// Of each way: its name, how often it was taken, and its average time in microseconds.
    pub(crate) ways: Vec<(&'static str, u64, u64)>,
}

/// What the threads share.
struct Shared<'a, P: Partition> {
    machine: &'a Machine<P>,
    over: AtomicBool,
    /// Shared by vCPUs that run and by who sends messages; held alone while a state is set. As when a machine is
    /// saved, nothing may reach a vCPU between the reading of its state and the setting.
    running: RwLock<()>,
    /// How many threads want to set a state: no vCPU begins to run then.
    setters: AtomicU32,
    /// The first thing that went wrong.
    wrong: Arc<Mutex<Option<String>>>,
    checker: Mutex<Checker>,
    statistics: Statistics,
    seed: u64,
}

/// Follows the bytes that reach the checked ports: each time the pattern's first 40, in order, none twice.
#[derive(Default)]
struct Checker {
    next: [u8; HAMMERS as usize],
    exits: u64,
}

impl Checker {
    fn take(&mut self, accesses: &[Access]) -> Result<()> {
        self.exits += accesses.len() as u64;
        for access in accesses {
            let Access::PortWrite(port, bytes) = access else { continue };
            let Some(index) = (0..HAMMERS).find(|i| guest::checked_port(*i) == *port) else { continue };
            for byte in bytes {
                let next = &mut self.next[index as usize];
                ensure!(byte == next, "string output of vCPU {index}: byte {byte} came, {next} was next");
                *next = (*next + 1) % 40;
            }
        }
        Ok(())
    }
}

/// What to do.
#[derive(Debug, Clone)]
pub(crate) struct Plan {
    /// Of the guests' choices, and as far as time lets it, of the host's.
    pub(crate) seed: u64,
    /// How long to go on.
    pub(crate) whole: Duration,
    /// How long a vCPU may take for one round before it counts as hung.
    pub(crate) round: Duration,
    /// The ways.
    pub(crate) choice: guest::Choice,
    /// No stops, messages and dirty logs that the guest did not ask for.
    pub(crate) calm: bool,
}

/// Hammers `backend`.
///
/// # Errors
/// What went wrong, in one line.
pub(crate) fn run<B: Backend>(backend: &B, plan: &Plan) -> Result<Statistics> {
    let machine = Machine::new(backend, HAMMERS + 1);
    let wrong = Arc::new(Mutex::new(None));
    prepare(&machine, &wrong)?;
    let model = machine.model.clone();
    let mut guests: Vec<_> = (0..HAMMERS)
        .map(|i| {
            machine.long(i, |a| {
                guest::program(a, &model, plan.seed.wrapping_add(u64::from(i) << 32), &plan.choice)
            })
        })
        .collect();
    let mut third = machine.real(HAMMERS, guest::third);
    let mut waiting = third.state();
    waiting.activity = Activity::WaitForSipi;
    third.set_state(&waiting)?;
    guests.push(third);
    let mut shared = Shared {
        machine: &machine,
        over: AtomicBool::new(false),
        running: RwLock::new(()),
        setters: AtomicU32::new(0),
        wrong,
        checker: Mutex::default(),
        statistics: Statistics::default(),
        seed: plan.seed,
    };
    std::thread::scope(|scope| {
        let shared = &shared;
        for guest in &mut guests {
            scope.spawn(move || drive(shared, guest));
        }
        if !plan.calm {
            scope.spawn(|| kick(shared));
            scope.spawn(|| send_messages(shared));
            scope.spawn(|| read_dirt(shared));
        }
        watch(shared, plan);
        shared.over.store(true, Ordering::SeqCst);
        for index in 0..=HAMMERS {
            machine.stop(index);
        }
    });
    let wrong = shared.wrong.lock().unwrap_or_else(PoisonError::into_inner).take();
    if let Some(wrong) = wrong {
        for guest in &mut guests {
            describe(guest.index, &guest.vcpu.state());
        }
        bail!("{wrong}");
    }
    shared.statistics.rounds = (0..HAMMERS).map(|i| machine.u64_at(place::rounds(i))).sum();
    shared.statistics.exits = shared.checker.get_mut().unwrap_or_else(PoisonError::into_inner).exits;
    for index in 0..HAMMERS {
        let (rounds, way) = (machine.u64_at(place::rounds(index)), machine.u64_at(place::current(index)));
        println!("hammer: vCPU {index}: {rounds} rounds, the last one: {}", way_name(way));
    }
    shared.statistics.ways = ways_taken(&machine);
    shared.statistics.level_ends = machine.eoi.vectors().len() as u64;
    Ok(shared.statistics)
}

/// What matters of a vCPU that is stuck.
fn describe(index: u32, s: &CpuState) {
    let vectors = |at: usize| -> Vec<String> {
        let set = |v: &usize| s.lapic.registers[at + v / 32 * 0x10 + v / 8 % 4] >> (v % 8) & 1 == 1;
        (0..256).filter(set).map(|v| format!("{v:#x}")).collect()
    };
    println!(
        "hammer: vCPU {index}: rip {:#x}, rflags {:#x}, r8 {}, {:?}, shadow {}, NMI blocked {} pending {}, event {:?}, \
         in service {:?}, requested {:?}, task priority {:#x}",
        s.rip,
        s.rflags,
        s.gpr[8],
        s.activity,
        s.interrupt_shadow,
        s.nmi_blocked,
        s.nmi_pending,
        s.pending_event,
        vectors(0x100),
        vectors(0x200),
        s.lapic.registers[0x80]
    );
}

fn way_name(number: u64) -> &'static str {
    WAYS.get(number as usize).map_or("between the ways", |w| w.name)
}

/// What the guest counted of each way.
fn ways_taken<P: Partition>(machine: &Machine<P>) -> Vec<(&'static str, u64, u64)> {
    let sum = |number: u64, offset: u64| {
        (0..HAMMERS).map(|i| machine.u64_at(place::taken(i, number) + offset)).sum::<u64>()
    };
    let ticks_per_micro = (u64::from(machine.model.tsc_khz) / 1000).max(1);
    let way = |(number, way): (u64, &guest::Way)| {
        let (count, ticks) = (sum(number, 0), sum(number, 8));
        (way.name, count, ticks / count.max(1) / ticks_per_micro)
    };
    (0..).zip(WAYS).map(way).collect()
}

/// Devices, RAM that moves, the pattern, and the answers to what the guest asks.
fn prepare<P: Partition>(machine: &Machine<P>, wrong: &Arc<Mutex<Option<String>>>) -> Result<()> {
    let pattern: Vec<u8> = (0..=255).collect();
    machine.write(place::PATTERN, &pattern);
    let memory = machine.memory.clone();
    let (mut devices, mut blocks) = (Vec::new(), Vec::new());
    for index in 0..HAMMERS {
        let cells = Cells::new(place::DEVICE_SIZE as usize, 0);
        memory.map_mmio(place::device(index), place::DEVICE_SIZE, cells, 0)?;
        let cells = Cells::new(place::MOVING_SIZE as usize, guest::moving_first(index));
        devices.push(memory.map_mmio(place::moving_device(index, 0), place::MOVING_SIZE, cells, 0)?);
        let block = RamBlock::new_shared("moving", place::MOVING_SIZE)?;
        blocks.push(memory.map_ram(place::moving_ram(index, 0), &block, 0, place::MOVING_SIZE, 0)?);
    }
    let (partition, pic) = (machine.partition.clone(), machine.pic.clone());
    let (messages, wrong) = (partition.msi_sink(), wrong.clone());
    machine.on_hook(move |index, port, value| {
        let to_me = |data| messages.signal_msi(Msi { address: 0xfee0_0000 | u64::from(index) << 12, data });
        let (i, slot) = (index as usize, u64::from(value & 7));
        match port as u8 {
            hook::MESSAGE => to_me(value),
            hook::LEVEL => to_me(value | 0xc000),
            hook::LEGACY => pic.raise(value as u8),
            hook::NMI => partition.inject_nmi(index),
            hook::MOVE_DEVICE => drop(memory.relocate(devices[i], place::moving_device(index, slot))),
            hook::MOVE_RAM => drop(memory.relocate(blocks[i], place::moving_ram(index, slot))),
            hook::ENABLE => drop(memory.set_enabled(devices[i], value != 0)),
            _ => {
                let way = way_name(u64::from(value >> 8));
                note(&wrong, format!("vCPU {index}, {way}: check {:#x} failed", value & 0xff));
            }
        }
    });
    Ok(())
}

fn note(wrong: &Mutex<Option<String>>, text: String) {
    wrong.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(text);
}

impl<P: Partition> Shared<'_, P> {
    fn is_over(&self) -> bool {
        self.over.load(Ordering::SeqCst)
    }

    fn has_failed(&self) -> bool {
        self.wrong.lock().unwrap_or_else(PoisonError::into_inner).is_some()
    }

    /// Waits until no vCPU runs and nobody sends messages, and keeps it so.
    fn stand_still(&self) -> RwLockWriteGuard<'_, ()> {
        self.setters.fetch_add(1, Ordering::SeqCst);
        loop {
            if let Ok(alone) = self.running.try_write() {
                self.setters.fetch_sub(1, Ordering::SeqCst);
                return alone;
            }
            (0..=HAMMERS).for_each(|index| self.machine.stop(index));
            std::thread::sleep(Duration::from_micros(100));
        }
    }

    /// A generator of a thread's own.
    fn random(&self, thread: u64) -> Random {
        Random::new(self.seed ^ thread.wrapping_mul(0x9e37_79b9_7f4a_7c15))
    }

    fn rounds(&self) -> [u64; HAMMERS as usize] {
        [0, 1].map(|i| self.machine.u64_at(place::rounds(i)))
    }

    /// Waits until the guest has done up to `rounds` rounds, or half a second: a host that is slow at everything must
    /// not be so busy with stops and interrupts that its guest never gets anywhere.
    fn pause(&self, random: &mut Random, rounds: u64) {
        let goal = self.rounds().iter().sum::<u64>() + random.below(rounds) + 1;
        let until = Instant::now() + Duration::from_millis(500);
        while self.rounds().iter().sum::<u64>() < goal && Instant::now() < until && !self.is_over() {
            std::thread::sleep(Duration::from_micros(random.below(1000) + 1));
        }
    }
}

/// One vCPU: runs until it is stopped, checks, runs again.
fn drive<P: Partition>(shared: &Shared<'_, P>, guest: &mut Guest<P>) {
    let mut random = shared.random(100 + u64::from(guest.index));
    while !shared.is_over() {
        // Panics when the vCPU does not leave its run although it is kicked all the time.
        while shared.setters.load(Ordering::SeqCst) > 0 {
            std::thread::sleep(Duration::from_micros(50));
        }
        let running = shared.running.read().unwrap_or_else(PoisonError::into_inner);
        let reason = shared.machine.run(guest);
        drop(running);
        if reason != HaltReason::Stopped {
            let (index, machine) = (guest.index, shared.machine);
            // The third vCPU counts nothing: its words are zero.
            let [way, fault] = [place::current(index), fault_of(index)].map(|at| machine.u64_at(at));
            let [code, rip, address] = [8, 16, 24].map(|by| machine.u64_at(fault_of(index) + by));
            let text = format!(
                "vCPU {index}, {}: {reason:?}; the last fault was {fault} ({code:#x}) at {rip:#x}, CR2 {address:#x}",
                way_name(way)
            );
            // A triple fault can be the processor's view of page tables that are right in memory, or theirs.
            let tables = [0x1000u64, 0x2000, 0x3000].map(|at| format!("{:#x}", machine.u64_at(at)));
            note(&shared.wrong, format!("{text}; page tables begin with {}", tables.join(", ")));
            return;
        }
        shared.statistics.stops.fetch_add(1, Ordering::Relaxed);
        {
            let mut checker = shared.checker.lock().unwrap_or_else(PoisonError::into_inner);
            if let Err(error) = checker.take(&shared.machine.take_log()) {
                note(&shared.wrong, error.to_string());
            }
        }
        if random.below(4) == 0 {
            let _alone = shared.stand_still();
            let state = guest.vcpu.state();
            if let Err(error) = guest.vcpu.set_state(&state) {
                note(&shared.wrong, format!("vCPU {} refuses its own state: {error}", guest.index));
                return;
            }
            shared.statistics.states.fetch_add(1, Ordering::Relaxed);
        }
    }
}

/// Stops a vCPU now and then.
fn kick<P: Partition>(shared: &Shared<'_, P>) {
    let mut random = shared.random(1);
    while !shared.is_over() {
        shared.pause(&mut random, 100);
        shared.machine.stop(random.below(u64::from(HAMMERS) + 1) as u32);
    }
}

/// Messages and NMIs that nobody asked for.
fn send_messages<P: Partition>(shared: &Shared<'_, P>) {
    let mut random = shared.random(2);
    while !shared.is_over() {
        shared.pause(&mut random, 40);
        let to = random.below(u64::from(HAMMERS));
        let _running = shared.running.read().unwrap_or_else(PoisonError::into_inner);
        match random.below(4) {
            0 => shared.machine.partition.inject_nmi(to as u32),
            // Lowest priority, logical, to either.
            1 => shared.machine.msi(0xfee0_300c, 0x100 | u32::from(guest::UNASKED)),
            _ => shared.machine.msi(0xfee0_0000 | to << 12, u32::from(guest::UNASKED)),
        }
        shared.statistics.messages.fetch_add(1, Ordering::Relaxed);
    }
}

/// Logs dirty pages for a while, then not for a while. A page that changed while it was logged must be in the log.
fn read_dirt<P: Partition>(shared: &Shared<'_, P>) {
    let mut random = shared.random(3);
    while !shared.is_over() {
        let mut reader = shared.machine.ram.dirty_log();
        for _ in 0..random.below(5) + 1 {
            drop(reader.take());
            let before = shared.rounds();
            shared.pause(&mut random, 100);
            let after = shared.rounds();
            let pages = reader.take();
            for i in 0..HAMMERS {
                let changed = before[i as usize] != after[i as usize];
                if changed && !pages.contains(place::rounds(i) / PAGE_SIZE) {
                    note(&shared.wrong, format!("a page that vCPU {i} wrote is not in the dirty log"));
                }
            }
            shared.statistics.dirty_checks.fetch_add(1, Ordering::Relaxed);
        }
        drop(reader);
        shared.pause(&mut random, 400);
    }
}

/// Waits for the end, or for something to go wrong, or for a vCPU that makes no progress.
fn watch<P: Partition>(shared: &Shared<'_, P>, plan: &Plan) {
    let start = Instant::now();
    let mut last = [(0, start); HAMMERS as usize];
    let mut stopped = start;
    while start.elapsed() < plan.whole && !shared.has_failed() {
        std::thread::sleep(Duration::from_millis(50).min(plan.whole));
        if plan.calm && stopped.elapsed() > CALM_RUN {
            (0..=HAMMERS).for_each(|index| shared.machine.stop(index));
            stopped = Instant::now();
        }
        for (i, (rounds, since)) in (0..).zip(&mut last) {
            let now = shared.machine.u64_at(place::rounds(i));
            if now != *rounds {
                (*rounds, *since) = (now, Instant::now());
            } else if since.elapsed() > plan.round {
                let way = way_name(shared.machine.u64_at(place::current(i)));
                note(&shared.wrong, format!("vCPU {i} hangs in its round {now}, {way}"));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lost_repeated_and_reordered_bytes_of_string_output_are_noticed() {
        let write = |bytes: &[u8]| Access::PortWrite(guest::checked_port(1), bytes.to_vec());
        let whole: Vec<u8> = (0..40).collect();
        let fine = [write(&whole[..10]), Access::PortRead(0x100, 1), write(&whole[10..]), write(&[0])];
        assert!(Checker::default().take(&fine).is_ok());
        assert!(Checker::default().take(&[write(&[0, 2])]).is_err());
        assert!(Checker::default().take(&[write(&[0, 0])]).is_err());
        assert!(Checker::default().take(&[write(&[1])]).is_err());
    }
}
