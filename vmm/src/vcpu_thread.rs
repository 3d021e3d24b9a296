//! One thread per vCPU, and the handle by which the machine drives it.
//!
//! ```text
//!             resume                    stop flag, TripleFault
//!  ┌────────┐ ───────► ┌─────────┐ ─────────────────────────► ┌────────┐
//!  │ Paused │          │ Running │                            │ Paused │
//!  └────────┘ ◄─────── └─────────┘                            └────────┘
//!      │      pause (flag + kick, waits for the thread)
//!      └── finish ──► thread ends
//! ```
//!
//! A paused vCPU is consistent: its state can be read, replaced and saved. Requests are carried out by the
//! vCPU's own thread, in the order in which they were made.

use std::sync::Arc;
use std::sync::mpsc::{self, Receiver, Sender};
use std::thread::JoinHandle;

use atoll_machine::backend::{HaltReason, Partition, RunError, StateError, StopFlag, Vcpu};
use atoll_machine::control::{MachineRequest, SharedControl};
use atoll_machine::cpu::state::CpuState;

use crate::io::MachineIo;

enum Command {
    Resume,
    State(Sender<CpuState>),
    SetState(Box<CpuState>, Sender<Result<(), StateError>>),
    Pin(Vec<usize>, Sender<std::io::Result<()>>),
    /// Answered when the thread is paused: every earlier command has been carried out.
    Sync(Sender<()>),
    Finish,
}

/// The machine's end of one vCPU thread.
pub(crate) struct VcpuThread<P: Partition> {
    index: u32,
    partition: Arc<P>,
    stop: StopFlag,
    commands: Sender<Command>,
    thread: Option<JoinHandle<()>>,
}

impl<P: Partition> VcpuThread<P> {
    /// Starts the thread of `vcpu`, paused.
    pub(crate) fn start(
        index: u32,
        partition: Arc<P>,
        vcpu: P::Vcpu,
        io: MachineIo,
        control: SharedControl,
    ) -> std::io::Result<Self>
    where
        P::Vcpu: 'static,
    {
        let (commands, receiver) = mpsc::channel();
        let stop = StopFlag::new();
        let runner = Runner { index, vcpu, io, control, stop: stop.clone() };
        let thread =
            atoll_foundation::threads::spawn(&format!("vcpu{index}"), move || runner.serve(&receiver))?;
        Ok(Self { index, partition, stop, commands, thread: Some(thread) })
    }

    /// Lets the vCPU execute.
    pub(crate) fn resume(&self) {
        self.stop.clear();
        self.send(Command::Resume);
    }

    /// Lets the thread run on these host processors only.
    pub(crate) fn pin(&self, host_cpus: &[usize]) -> std::io::Result<()> {
        let (reply, answer) = mpsc::channel();
        self.send(Command::Pin(host_cpus.to_vec(), reply));
        answer.recv().unwrap_or(Ok(()))
    }

    /// Asks the vCPU to pause, without waiting for it.
    pub(crate) fn request_pause(&self) {
        self.stop.set();
        self.partition.kick(self.index);
    }

    /// Waits until the vCPU has paused. Call [`Self::request_pause`] first.
    pub(crate) fn wait_paused(&self) {
        let (reply, done) = mpsc::channel();
        self.send(Command::Sync(reply));
        let _ = done.recv();
    }

    /// A copy of the state. The vCPU must be paused.
    pub(crate) fn state(&self) -> Option<CpuState> {
        let (reply, answer) = mpsc::channel();
        self.send(Command::State(reply));
        answer.recv().ok()
    }

    /// Replaces the state. The vCPU must be paused.
    pub(crate) fn set_state(&self, state: CpuState) -> Result<(), StateError> {
        let (reply, answer) = mpsc::channel();
        self.send(Command::SetState(Box::new(state), reply));
        answer.recv().unwrap_or(Ok(()))
    }

    fn send(&self, command: Command) {
        // The thread ends only by Finish, sent from Drop: the channel is open.
        let _ = self.commands.send(command);
    }
}

impl<P: Partition> Drop for VcpuThread<P> {
    fn drop(&mut self) {
        self.request_pause();
        self.send(Command::Finish);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

struct Runner<V> {
    index: u32,
    vcpu: V,
    io: MachineIo,
    control: SharedControl,
    stop: StopFlag,
}

impl<V: Vcpu> Runner<V> {
    fn serve(mut self, commands: &Receiver<Command>) {
        while let Ok(command) = commands.recv() {
            match command {
                Command::Resume => self.run(),
                Command::State(reply) => {
                    let _ = reply.send(self.vcpu.state());
                }
                Command::SetState(state, reply) => {
                    let _ = reply.send(self.vcpu.set_state(&state));
                }
                Command::Pin(host_cpus, reply) => {
                    let _ = reply.send(atoll_foundation::threads::set_current_affinity(&host_cpus));
                }
                Command::Sync(reply) => {
                    let _ = reply.send(());
                }
                Command::Finish => return,
            }
        }
    }

    fn run(&mut self) {
        let request = match self.vcpu.run(&self.stop, &self.io) {
            Ok(HaltReason::Stopped | HaltReason::BudgetSpent) => return,
            Ok(HaltReason::TripleFault) => {
                tracing::debug!("vCPU {} after its triple fault: {:x?}", self.index, self.vcpu.state());
                MachineRequest::TripleFault { vcpu: self.index }
            }
            Err(RunError::BeyondEngine { vcpu, why }) => {
                // With resets after crashes a guest can do this as often as it likes.
                atoll_foundation::log_limited!(
                    error,
                    "vCPU {vcpu} did what the host's KVM cannot carry out: {why}"
                );
                MachineRequest::BeyondEngine { vcpu }
            }
            Err(RunError::Internal { vcpu, why }) => {
                tracing::error!("vCPU {vcpu} cannot continue: {why}");
                MachineRequest::InternalError { vcpu }
            }
        };
        self.control.request(request);
    }
}
