//! The run loop of one vCPU.
//!
//! ```text
//!            ┌────────────────── interrupt, NMI ──────────────────┐
//!            ▼                                                     │
//!  ┌──────► Active ───────────────────── HLT ────────────────► Halted
//!  │          │ triple fault                                      │
//!  │          ▼                                                   │
//!  │       Shutdown ──► HaltReason::TripleFault                   │
//!  │          │                                                   │
//!  │          └──────────────┬──── INIT (any state) ◄─────────────┘
//!  │ SIPI                    ▼
//!  └──────────────────── WaitForSipi        (the boot processor restarts at the reset vector instead)
//! ```
//!
//! Each turn of the loop: stop flag, requests of other threads, then the function of the current state.
//! [`SoftwareVcpu::active`] looks at events in the order of Intel SDM vol. 3, table 7-2: debug traps of the
//! last instruction, NMI, maskable interrupts, then code breakpoints of the next instruction; then it runs the
//! interpreter until that returns.
//!
//! The inner loop returns at the latest after its polling interval, so timers need no other thread: the
//! deadline is compared with the clock on every turn, and a halted vCPU sleeps no longer than that.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use atoll_machine::backend::{CpuIo, HaltReason, RunError, StateError, StopFlag, Vcpu};
use atoll_machine::cpu::state::{Activity, CpuState};

use crate::apic;
use crate::apic::mailbox::{Mailbox, control, request};
use crate::cpu::{Cpu, flag};
use crate::exception::Exception;
use crate::execute::{self, Leave};
use crate::saved_state;
use crate::system::delivery::{self, Event};
use crate::system::{debug, end_stale_shadow, event_waits, paravirt};

/// Longest busy wait before a halted vCPU sleeps: a wake from sleep costs more than this.
const MAX_POLL: Duration = Duration::from_micros(50);
/// Smallest busy wait that is worth it.
const MIN_POLL: Duration = Duration::from_micros(10);

/// One vCPU of the software CPU.
pub struct SoftwareVcpu {
    cpu: Cpu,
    mailbox: Arc<Mailbox>,
    /// Current busy wait of HLT; grows while waits are short, shrinks while they are long.
    poll: Duration,
    /// Turns of state Active so far.
    turns: u32,
}

/// Turns of the loop between two looks at steal time.
const STEAL_TURNS: u32 = 32;

impl SoftwareVcpu {
    pub(crate) fn new(cpu: Cpu) -> Self {
        let mailbox = cpu.shared.mailboxes[cpu.system.index as usize].clone();
        apic::publish(&cpu);
        Self { cpu, mailbox, poll: MIN_POLL, turns: 0 }
    }

    /// Takes what other threads asked for.
    fn take_requests(&mut self) {
        if !self.mailbox.has_request() {
            return;
        }
        let requests = self.mailbox.requests.swap(0, Ordering::SeqCst);
        if requests & request::INTERRUPT != 0 {
            apic::drain_posted(&mut self.cpu);
        }
        if requests & request::EXTINT != 0 && self.cpu.shared.extint_high.load(Ordering::SeqCst) {
            apic::lint0_edge(&mut self.cpu);
        }
        if requests & request::CONTROL != 0 {
            self.take_control();
        }
    }

    fn take_control(&mut self) {
        let word = self.mailbox.take_control();
        let nmis = u8::from(word & control::NMI != 0) + u8::from(word & control::SECOND_NMI != 0);
        self.cpu.system.latch_nmis(nmis, self.cpu.nmi_blocked);
        if word & control::INIT != 0 {
            saved_state::init(&mut self.cpu);
        }
        if word & control::SIPI != 0 && self.cpu.activity == Activity::WaitForSipi {
            self.cpu.system.sipi_vector = Some(word as u8);
        }
    }

    fn publish_count(&self) {
        self.mailbox.retired.store(self.cpu.retired, Ordering::Release);
    }

    /// State Active: one turn.
    fn active(&mut self, io: &dyn CpuIo) -> Option<HaltReason> {
        let cpu = &mut self.cpu;
        cpu.budget_end = self.mailbox.budget_end.load(Ordering::Acquire);
        if cpu.retired >= cpu.budget_end {
            return Some(HaltReason::BudgetSpent);
        }
        apic::check_timer(cpu);
        self.turns = self.turns.wrapping_add(1);
        if self.turns.is_multiple_of(STEAL_TURNS) && cpu.system.paravirt.steal_time & 1 != 0 {
            let now = cpu.shared.clock.now();
            paravirt::update_steal(cpu, now);
        }
        cpu.recheck = false;
        end_stale_shadow(cpu);
        if inject(cpu, io) {
            return None;
        }
        let leave = if debug::needs_step(cpu) { step(cpu, io) } else { Some(run(cpu, io)) };
        if let Some(Leave::Exception(exception)) = leave {
            raise(cpu, io, exception);
        }
        self.publish_count();
        None
    }

    /// State Halted: wakes on an event that can be delivered, or sleeps.
    fn halted(&mut self) {
        apic::check_timer(&mut self.cpu);
        if event_waits(&self.cpu) {
            self.cpu.activity = Activity::Active;
            return;
        }
        let deadline = apic::next_timer(&self.cpu);
        self.wait(deadline);
    }

    /// Waits for a request or guest time `deadline`: busy for a short while, then asleep.
    fn wait(&mut self, deadline: Option<u64>) {
        let clock = self.cpu.shared.clock.clone();
        let timeout = deadline.map(|at| clock.host_delay(at));
        let advances = clock.host_delay(u64::MAX).is_some();
        match timeout {
            Some(Some(Duration::ZERO)) => return,
            Some(Some(left)) if left <= self.poll => {
                self.spin(left);
                return;
            }
            _ => {}
        }
        if advances && self.spin(self.poll) {
            self.poll = (self.poll * 2).min(MAX_POLL);
            return;
        }
        let start = Instant::now();
        self.mailbox.sleep(timeout.flatten());
        let short = start.elapsed() < MAX_POLL;
        self.poll = if short { (self.poll * 2).min(MAX_POLL) } else { (self.poll / 2).max(MIN_POLL) };
    }

    /// Waits busily; true when a request came.
    fn spin(&self, limit: Duration) -> bool {
        let start = Instant::now();
        loop {
            for _ in 0..16 {
                if self.mailbox.has_request() {
                    return true;
                }
                std::hint::spin_loop();
            }
            if start.elapsed() >= limit {
                return false;
            }
        }
    }

    /// State WaitForSipi: starts at the vector of a start-up IPI.
    fn wait_for_sipi(&mut self) {
        match self.cpu.system.sipi_vector.take() {
            Some(vector) => saved_state::start_up(&mut self.cpu, vector),
            None => self.mailbox.sleep(None),
        }
    }
}

/// Delivers the most important pending event. Returns whether there was one.
fn inject(cpu: &mut Cpu, io: &dyn CpuIo) -> bool {
    if let Some(fault) = cpu.system.pending_fault.take() {
        delivery::raise(cpu, io, fault);
        return true;
    }
    if let Some(saved) = cpu.system.pending_event.take() {
        let event = Event::pending(cpu, saved);
        delivery::deliver(cpu, io, event);
        return true;
    }
    if cpu.system.pending_debug != 0 && !cpu.system.debug_shadow {
        let dr6 = std::mem::take(&mut cpu.system.pending_debug);
        delivery::raise(cpu, io, Exception::DebugTrap { dr6 });
        return true;
    }
    if cpu.interrupt_shadow {
        return false;
    }
    if cpu.system.nmis != 0 && !cpu.nmi_blocked {
        cpu.system.nmis -= 1;
        let event = Event::nmi(cpu);
        delivery::deliver(cpu, io, event);
        return true;
    }
    if cpu.rflags & flag::IF == 0 {
        return false;
    }
    let Some(vector) = take_interrupt(cpu) else { return false };
    let event = Event::interrupt(cpu, vector);
    delivery::deliver(cpu, io, event);
    true
}

/// The vector of the maskable interrupt to deliver now: the legacy controller's first, then the local APIC's.
fn take_interrupt(cpu: &mut Cpu) -> Option<u8> {
    if apic::extint_pending(cpu)
        && let Some(source) = &cpu.shared.extint
    {
        return Some(source.acknowledge());
    }
    let vector = cpu.system.lapic.deliverable()?;
    cpu.system.lapic.acknowledge(vector);
    Some(vector)
}

/// Delivers an exception that the interpreter reported.
fn raise(cpu: &mut Cpu, io: &dyn CpuIo, exception: Exception) {
    if matches!(exception, Exception::DebugTrap { .. }) {
        cpu.rip = cpu.next_rip;
    }
    delivery::raise(cpu, io, exception);
}

/// Executes instructions that nothing watches. Only a SYSRET that sets TF leaves a trap behind.
fn run(cpu: &mut Cpu, io: &dyn CpuIo) -> Leave {
    cpu.system.step_flag = None;
    let leave = execute::run(cpu, io);
    if cpu.system.step_flag.take() == Some(true) && !matches!(leave, Leave::Exception(_)) {
        cpu.system.pending_debug |= debug::DR6_BS;
    }
    leave
}

/// Executes one instruction with everything that only single instructions can show: code breakpoints before
/// it; single step, data and I/O breakpoints after it; the interrupt shadow's end. `None`: a breakpoint was
/// hit and delivered.
fn step(cpu: &mut Cpu, io: &dyn CpuIo) -> Option<Leave> {
    if cpu.rflags & flag::RF == 0 && debug::armed(cpu) {
        let hits = debug::code_breakpoints(cpu);
        if hits != 0 {
            let fault = debug::fault(cpu, hits);
            delivery::raise(cpu, io, fault);
            return None;
        }
    }
    // RF lasts for one instruction; a fault of this one pushes it set again.
    cpu.rflags &= !flag::RF;
    let single_step = cpu.rflags & flag::TF != 0;
    cpu.interrupt_shadow = false;
    let debug_shadow = std::mem::take(&mut cpu.system.debug_shadow);
    cpu.system.step_flag = None;
    cpu.system.debug_hits = 0;
    cpu.mmu.watch_hits = 0;
    let leave = execute::step(cpu, io);
    if debug_shadow && cpu.system.debug_shadow {
        // Only the first of several loads of SS holds events off.
        (cpu.system.debug_shadow, cpu.interrupt_shadow) = (false, false);
    }
    if let Leave::Exception(exception) = leave {
        // The fault takes precedence; a trap on an earlier instruction stays pending.
        if !matches!(exception, Exception::DebugTrap { .. }) {
            return Some(leave);
        }
    }
    let mut dr6 = std::mem::take(&mut cpu.system.debug_hits) | std::mem::take(&mut cpu.mmu.watch_hits);
    // A load of SS lets the step pass unseen; data breakpoints it met wait for the next boundary.
    if cpu.system.step_flag.take().unwrap_or(single_step && !cpu.system.debug_shadow) {
        dr6 |= debug::DR6_BS;
    }
    cpu.system.pending_debug |= dr6;
    Some(leave)
}

impl Vcpu for SoftwareVcpu {
    fn run<I: CpuIo>(&mut self, stop: &StopFlag, io: &I) -> Result<HaltReason, RunError> {
        paravirt::thread_changed(&mut self.cpu.system.paravirt);
        if std::mem::take(&mut self.cpu.system.paravirt.stale) {
            paravirt::refresh(&mut self.cpu);
        }
        let reason = loop {
            if stop.is_set() {
                break HaltReason::Stopped;
            }
            self.take_requests();
            let ended = match self.cpu.activity {
                Activity::Active => self.active(io),
                Activity::Halted => {
                    self.halted();
                    None
                }
                Activity::WaitForSipi => {
                    self.wait_for_sipi();
                    None
                }
                Activity::Shutdown => Some(HaltReason::TripleFault),
            };
            if let Some(reason) = ended {
                break reason;
            }
        };
        self.publish_count();
        Ok(reason)
    }

    fn state(&mut self) -> CpuState {
        self.take_requests();
        saved_state::save(&mut self.cpu)
    }

    fn set_state(&mut self, state: &CpuState) -> Result<(), StateError> {
        saved_state::check(&self.cpu, state)?;
        self.mailbox.clear();
        saved_state::load(&mut self.cpu, state);
        apic::publish(&self.cpu);
        Ok(())
    }

    fn reset(&mut self) {
        self.mailbox.clear();
        saved_state::reset(&mut self.cpu);
        apic::publish(&self.cpu);
    }
}
