//! The run loop of one vCPU.
//!
//! ```text
//!                     ┌──────────────────────────────────────────────────────────────┐
//!                     ▼                                                              │
//!  run ─► turn: immediate_exit = 0; stop flag; NMIs; INTR pin ─► KVM_RUN ─► exit ────┤ answered: incomplete
//!            │ stop                                                 ▲                │ Continue
//!            ▼                                                      └─ immediate_exit = 1, until complete
//!         settle: finish the incomplete access, get an acknowledged vector into delivery ─► Stopped
//! ```
//!
//! The kernel does most: HLT and the wait for SIPI end inside `KVM_RUN`, local APICs and their timers are the
//! kernel's. What comes out is in [`crate::exits`].
//!
//! A stop leaves the loop only at a boundary. An access that was answered is completed by the next `KVM_RUN`, which
//! with `immediate_exit` set does that and no more; it may need several rounds, since one instruction can make
//! several accesses. The kernel leaves a repeated string instruction after 1024 elements at most.
//!
//! Nor must anything be left in KVM that no ioctl reads: a legacy vector on its way (see `interrupts/extint.rs`), or
//! the end of a level-triggered interrupt, which KVM reports at the next entry. For those a stop enters KVM once more
//! with a signal waiting, so that the guest does not run.

// UNSAFETY: makes the accessor of the page that is shared with the kernel, whose lifetime this type guarantees.
#![allow(unsafe_code)]

use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use atoll_foundation::log_limited;
use atoll_machine::backend::{BackendError, CpuIo, HaltReason, RunError, StateError, StopFlag, Vcpu};
use atoll_machine::cpu::state::{Activity, CpuState};
use kvm_ioctls::VcpuFd;

use crate::exits::{self, After, Exit};
use crate::host::host;
use crate::interrupts::extint::ExtInt;
use crate::kick::{self, Kick};
use crate::partition::Shared;
use crate::run_page::RunPage;
use crate::state::VcpuState;

/// Rounds in which an instruction must be complete: twice what the kernel's emulator makes of one.
const MAX_ROUNDS: u32 = 4096;
/// Entries without guest that get a vector into delivery: a halted vCPU needs two.
const SETTLE_TRIES: u32 = 4;

/// One vCPU on KVM.
pub struct KvmVcpu {
    index: u32,
    shared: Arc<Shared>,
    state: VcpuState,
    /// Only the boot processor has the INTR pin.
    extint: Option<ExtInt>,
    kick: Arc<Kick>,
    /// The thread that runs it.
    thread: i32,
    /// An access was answered and not completed.
    incomplete: bool,
    /// It met a triple fault, which KVM does not remember.
    shutdown: bool,
    /// Why it must not run: KVM refused something where no error could be told.
    broken: Option<String>,
    page: RunPage,
    fd: VcpuFd,
}

impl Drop for KvmVcpu {
    fn drop(&mut self) {
        // Before `fd` unmaps the page.
        self.kick.detach();
    }
}

/// What one entry into KVM came to.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Turn {
    /// A signal or a kick, and no reason of the guest's.
    Interrupted,
    /// A reason of the guest's, which is dealt with.
    Exited,
    Shutdown,
}

impl KvmVcpu {
    pub(crate) fn new(shared: Arc<Shared>, index: u32) -> Result<Self, BackendError> {
        let kick = shared.kicks[index as usize].clone();
        let id = shared.topology.apic_id(index);
        let mut fd = shared.vm.create_vcpu(id.into()).map_err(|error| {
            if error.errno() == libc::EEXIST {
                BackendError::Config(format!("vCPU {index} exists already; a machine makes each once"))
            } else {
                host("creating a vCPU")(error)
            }
        })?;
        // SAFETY: `fd` lives in the same value and is dropped last; what other threads have of the page is taken
        // back in `drop`; nothing else uses its `kvm_run`.
        let page = unsafe { RunPage::new(&mut fd, shared.vm.run_size()) };
        shared
            .memory
            .attach_vcpu(index, &fd)
            .map_err(|source| BackendError::Host { what: "mapping a dirty ring", source })?;
        let state = VcpuState::new(&fd, &shared, index)?;
        let extint = match &shared.extint {
            Some(source) if index == 0 => Some(ExtInt::new(shared.pin.clone(), source.clone())),
            _ => None,
        };
        kick.attach(page.immediate_exit());
        Ok(Self {
            index,
            shared,
            state,
            extint,
            kick,
            thread: 0,
            incomplete: false,
            shutdown: false,
            broken: None,
            page,
            fd,
        })
    }

    fn error(&self, why: impl Into<String>) -> RunError {
        RunError::Internal { vcpu: self.index, why: why.into() }
    }

    fn turns<I: CpuIo>(&mut self, stop: &StopFlag, io: &I) -> Result<HaltReason, RunError> {
        loop {
            self.page.immediate_exit().set(false);
            fence(Ordering::SeqCst);
            if stop.is_set() {
                return Ok(HaltReason::Stopped);
            }
            if self.shutdown {
                return Ok(HaltReason::TripleFault);
            }
            self.take_nmis()?;
            if let Some(extint) = &mut self.extint {
                extint.offer(&mut self.page, !self.incomplete);
            }
            self.shutdown = self.enter(io, false)? == Turn::Shutdown;
        }
    }

    fn take_nmis(&mut self) -> Result<(), RunError> {
        for _ in 0..self.kick.take_nmis() {
            self.fd.nmi().map_err(|error| self.error(format!("KVM_NMI: {error}")))?;
        }
        Ok(())
    }

    /// One `KVM_RUN` and what it returned for. `without_guest`: see [`RunPage::run_without_guest`].
    fn enter<I: CpuIo>(&mut self, io: &I, without_guest: bool) -> Result<Turn, RunError> {
        let inside = match self.shared.memory.enter(self.index) {
            Ok(inside) => inside,
            Err(why) => return Err(self.error(why)),
        };
        self.kick.enter(self.thread);
        let result = if without_guest { self.page.run_without_guest(self.thread) } else { self.page.run() };
        self.kick.leave();
        drop(inside);
        // Whatever the result, KVM completed the access first.
        self.incomplete = false;
        let exit = match result {
            Ok(()) => self.page.exit(None),
            Err(libc::EINTR | libc::EAGAIN) => Exit::Interrupted,
            Err(errno) => self.page.exit(Some(errno)),
        };
        if let Some(extint) = &mut self.extint {
            extint.ran(&self.page, &exit);
        }
        let interrupted = exit == Exit::Interrupted;
        match exits::handle(exit, &mut self.page, &mut self.state, &self.shared, io) {
            After::Continue if interrupted => Ok(Turn::Interrupted),
            After::Continue => Ok(Turn::Exited),
            After::Complete => {
                self.incomplete = true;
                Ok(Turn::Exited)
            }
            After::Shutdown => Ok(Turn::Shutdown),
            After::BeyondKvm(why) => {
                Err(RunError::BeyondEngine { vcpu: self.index, why: self.with_place(why) })
            }
            After::Fatal(why) => Err(self.fatal(why)),
        }
    }

    /// The error of a vCPU that KVM cannot go on with.
    fn fatal(&mut self, why: String) -> RunError {
        let why = self.with_place(why);
        log_limited!(error, "vCPU {}: {why}", self.index);
        self.error(why)
    }

    /// `why`, and where the guest was.
    fn with_place(&self, why: String) -> String {
        match self.fd.get_regs() {
            Ok(regs) => format!("{why}, at rip {:#x}", regs.rip),
            Err(_) => why,
        }
    }

    /// Makes the page say of this state whether a legacy interrupt could be delivered: KVM does not do that when a
    /// state is set, and opens no window for a vCPU that is halted already.
    fn look_at_window<I: CpuIo>(&mut self, io: &I) -> Result<(), RunError> {
        if self.extint.is_some() && !self.shutdown {
            self.page.immediate_exit().set(true);
            self.shutdown |= self.enter(io, false)? == Turn::Shutdown;
        }
        Ok(())
    }

    /// Brings the vCPU to a boundary at which its state is all there is.
    fn settle<I: CpuIo>(&mut self, io: &I) -> Result<(), RunError> {
        let mut rounds = 0;
        while self.incomplete {
            rounds += 1;
            if rounds > MAX_ROUNDS {
                return Err(self.error(format!("an instruction is not complete after {MAX_ROUNDS} accesses")));
            }
            self.page.immediate_exit().set(true);
            self.shutdown |= self.enter(io, false)? == Turn::Shutdown;
        }
        // Until the signal is all there is: a full dirty ring, for one, is reported before the end of an interrupt.
        let mut more = self.shared.routing.has_level_routes();
        for _ in 0..SETTLE_TRIES {
            if self.shutdown || !(more || self.in_transit()) {
                break;
            }
            self.page.immediate_exit().set(false);
            self.page.request_interrupt_window(false);
            let turn = self.enter(io, true)?;
            more = turn == Turn::Exited;
            self.shutdown |= turn == Turn::Shutdown;
        }
        if let Some(extint) = &mut self.extint {
            extint.forget();
        }
        Ok(())
    }

    /// Whether KVM has the vector of a legacy interrupt that is not in delivery yet.
    fn in_transit(&self) -> bool {
        self.extint.as_ref().is_some_and(ExtInt::in_transit)
            && !self.fd.get_vcpu_events().is_ok_and(|events| events.interrupt.injected != 0)
    }

    /// What other threads asked for does not concern a state that replaces this one.
    fn forget_requests(&mut self) {
        self.kick.take_nmis();
        self.incomplete = false;
        if let Some(extint) = &mut self.extint {
            extint.forget();
        }
    }
}

impl Vcpu for KvmVcpu {
    fn run<I: CpuIo>(&mut self, stop: &StopFlag, io: &I) -> Result<HaltReason, RunError> {
        if let Some(why) = &self.broken {
            return Err(self.error(why.clone()));
        }
        self.thread = kick::prepare_thread().map_err(|e| self.error(format!("preparing its thread: {e}")))?;
        let failed = |index, e: std::io::Error| RunError::Internal { vcpu: index, why: format!("KVM: {e}") };
        self.state.before_run(&self.fd, &self.shared).map_err(|e| failed(self.index, e))?;
        self.look_at_window(io)?;
        let reason = self.turns(stop, io)?;
        self.settle(io)?;
        self.state.after_run(&self.fd, &self.shared).map_err(|e| failed(self.index, e))?;
        Ok(reason)
    }

    fn state(&mut self) -> CpuState {
        // What cannot be told to KVM now is told before the next run.
        let _ = self.take_nmis();
        match self.state.get(&self.fd, &self.shared) {
            Ok(mut state) => {
                if self.shutdown {
                    state.activity = Activity::Shutdown;
                }
                state
            }
            // No guest causes this, and a state that is made up would be worse than none.
            Err(error) => panic!("KVM does not give the state of vCPU {}: {error}", self.index),
        }
    }

    fn set_state(&mut self, state: &CpuState) -> Result<(), StateError> {
        self.state.set(&self.fd, &self.shared, state)?;
        self.forget_requests();
        self.shutdown = state.activity == Activity::Shutdown;
        self.broken = None;
        Ok(())
    }

    fn reset(&mut self) {
        self.forget_requests();
        self.shutdown = false;
        self.broken = match self.state.reset(&self.fd, &self.shared) {
            Ok(()) => None,
            Err(error) => Some(format!("KVM refused to reset it: {error}")),
        };
    }
}
