//! What executes instructions: partitions and vCPUs, shaped by what happens, not by any one engine.
//!
//! ```text
//!              create_vcpu                    run(stop, io)
//! Backend ──► Partition ──► Vcpu (one thread each) ──────────► HaltReason
//!                 │                 ▲
//!                 └ kick(index) ────┘  makes `run` look at its stop flag, also while halted
//! ```
//!
//! [`Vcpu::run`] stays inside the backend until there is a reason to leave: HLT waits inside, interrupts are
//! taken inside, local APIC accesses are answered inside. Port and memory-mapped accesses go to the
//! [`CpuIo`] that the caller passes. A backend ability that not every backend has is a value
//! (`Option<&dyn …>`), never a method that panics.

use std::io;
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::cpu::model::{BackendFeatures, CpuModel};
use crate::cpu::state::CpuState;
use crate::cpu::topology::Topology;
use crate::inputs::InputGate;
use crate::interrupt::{EoiSink, ExtIntSink, ExtIntSource, IoApicRoutes, Msi, MsiSink};
use crate::memory::AddressSpace;
use crate::time::Clock;

/// Port and memory-mapped access of a vCPU, answered by the machine. Called on the vCPU's thread.
pub trait CpuIo {
    /// IN: fills 1, 2 or 4 bytes.
    fn port_read(&self, port: u16, data: &mut [u8]);
    /// OUT: 1, 2 or 4 bytes.
    fn port_write(&self, port: u16, data: &[u8]);
    /// A read of 1 to 64 bytes that no RAM answers; never crosses a 4 KiB page. Unclaimed addresses read as
    /// all ones.
    fn mmio_read(&self, address: u64, data: &mut [u8]);
    /// A write of 1 to 64 bytes that no RAM takes; never crosses a 4 KiB page.
    fn mmio_write(&self, address: u64, data: &[u8]);
}

/// Why [`Vcpu::run`] returned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HaltReason {
    /// The stop flag was set. The state is consistent: it can be read, saved and continued.
    Stopped,
    /// Shutdown: a fault while delivering a double fault (Intel SDM vol. 3, 7.15).
    TripleFault,
    /// The instruction budget that was asked for (see [`Counting`]) is used up.
    BudgetSpent,
}

/// A vCPU that cannot go on.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// The guest did what the engine below cannot carry out: KVM knows few instructions that touch devices, and no
    /// event that is delivered through device memory. A guest may cause it, so it is the guest's crash.
    #[error("vCPU {vcpu} did what this host's engine cannot carry out: {why}")]
    BeyondEngine {
        /// Index of the vCPU.
        vcpu: u32,
        /// What happened.
        why: String,
    },
    /// A bug of the backend or a broken host, never something a guest may cause; in the engine's own words.
    #[error("vCPU {vcpu} cannot continue: {why}")]
    Internal {
        /// Index of the vCPU.
        vcpu: u32,
        /// What happened.
        why: String,
    },
}

/// Why a backend could not make a partition or a vCPU.
#[derive(Debug, thiserror::Error)]
pub enum BackendError {
    /// The CPU model asks for features that this host or backend lacks.
    #[error("CPU model {model} needs {missing}, which this host does not have; choose another with --cpu")]
    MissingFeatures {
        /// Name of the model.
        model: String,
        /// Feature names, comma separated.
        missing: String,
    },
    /// The host refused something.
    #[error("{what}: {source}")]
    Host {
        /// What was attempted.
        what: &'static str,
        /// The host's error.
        source: std::io::Error,
    },
    /// A vCPU index or count out of range.
    #[error("{0}")]
    Config(String),
}

/// Why state could not be set.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    /// A field holds what no processor of this model could hold.
    #[error("CPU state field {field}: {why}")]
    Invalid {
        /// The field.
        field: &'static str,
        /// What is wrong with it.
        why: String,
    },
}

/// Asks a running vCPU to return from [`Vcpu::run`]. Set it, then [`Partition::kick`].
#[derive(Clone, Debug, Default)]
pub struct StopFlag(Arc<AtomicBool>);

impl StopFlag {
    /// A flag that is not set.
    pub fn new() -> Self {
        Self::default()
    }
    /// Asks to stop.
    pub fn set(&self) {
        self.0.store(true, Ordering::SeqCst);
    }
    /// Lets the vCPU run again.
    pub fn clear(&self) {
        self.0.store(false, Ordering::SeqCst);
    }
    /// Whether a stop is asked for.
    pub fn is_set(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }
}

/// Everything a partition is made from.
#[derive(Clone)]
pub struct PartitionConfig {
    /// The guest-physical address space.
    pub memory: Arc<AddressSpace>,
    /// CPUID and MSR tables.
    pub model: Arc<CpuModel>,
    /// How vCPU indices map to APIC ids, sockets, cores and threads.
    pub topology: Topology,
    /// The machine's time.
    pub clock: Arc<dyn Clock>,
    /// The machine's other inputs.
    pub inputs: Arc<InputGate>,
    /// The legacy interrupt controller that answers ExtINT, if the machine has one.
    pub extint: Option<Arc<dyn ExtIntSource>>,
    /// Told about the end of level-triggered interrupts.
    pub eoi: Option<Arc<dyn EoiSink>>,
}

/// A kind of engine.
pub trait Backend {
    /// Its partitions.
    type Partition: Partition;
    /// Short name: `software` or `kvm`.
    fn name(&self) -> &'static str;
    /// What it can give a guest here.
    fn features(&self) -> BackendFeatures;
    /// The TSC frequency of its guests in kHz, where it can give no other; `None` where it can give any.
    fn fixed_tsc_khz(&self) -> Option<u32>;
    /// Makes an empty partition.
    fn create_partition(&self, config: PartitionConfig) -> Result<Arc<Self::Partition>, BackendError>;
}

/// What one machine's vCPUs share.
pub trait Partition: Send + Sync + 'static {
    /// Its vCPUs.
    type Vcpu: Vcpu;

    /// Makes vCPU `index` in its power-on state: vCPU 0 ready at the reset vector, others waiting for SIPI.
    fn create_vcpu(self: &Arc<Self>, index: u32) -> Result<Self::Vcpu, BackendError>;
    /// Where devices send message-signalled interrupts.
    fn msi_sink(&self) -> Arc<dyn MsiSink>;
    /// Where the PIC drives its INTR pin.
    fn extint_sink(&self) -> Arc<dyn ExtIntSink>;
    /// Raises NMI on vCPU `index`, as LINT1 or a debugger would.
    fn inject_nmi(&self, index: u32);
    /// Makes vCPU `index` look at its stop flag soon, even while it is halted. Callable from any thread.
    fn kick(&self, index: u32);
    /// Counting of instructions, where the backend can.
    fn counting(&self) -> Option<&dyn Counting>;
    /// Events that pass between guest and device threads without a return from [`Vcpu::run`], where the backend
    /// can.
    fn event_routes(&self) -> Option<Arc<dyn EventRoutes>>;
    /// Where the IOAPIC announces its level-triggered entries, if [`PartitionConfig::eoi`] is told of no others.
    fn ioapic_routes(&self) -> Option<Arc<dyn IoApicRoutes>> {
        None
    }
}

/// A guest write that means no more than "look at your queue".
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Doorbell {
    /// Guest-physical address.
    pub address: u64,
    /// Width of the write in bytes: 1, 2, 4 or 8; 0 for any width (then `value` must be `None`).
    pub width: u8,
    /// Only writes of this value; `None` for any.
    pub value: Option<u64>,
}

/// Eventfds that the host's kernel connects with a guest: both ends work without a thread of the machine, so other
/// processes can hold them. Binding fails with the host's error, and everything then goes through [`CpuIo`] and
/// [`MsiSink`] as before.
pub trait EventRoutes: Send + Sync {
    /// From now on a guest write to `doorbell` signals `event` instead of calling [`CpuIo::mmio_write`].
    fn bind_doorbell(&self, doorbell: Doorbell, event: BorrowedFd<'_>) -> io::Result<()>;
    /// Undoes [`EventRoutes::bind_doorbell`] with the same arguments.
    fn unbind_doorbell(&self, doorbell: Doorbell, event: BorrowedFd<'_>) -> io::Result<()>;
    /// From now on signalling `event` sends `msi`, until the binding is dropped.
    fn bind_interrupt(&self, event: BorrowedFd<'_>, msi: Msi) -> io::Result<Box<dyn InterruptBinding>>;
}

/// A bound interrupt (see [`EventRoutes::bind_interrupt`]). Dropping it unbinds.
pub trait InterruptBinding: Send + Sync {
    /// Changes the message; `None` masks: signals are then lost.
    fn set_message(&self, msi: Option<Msi>) -> io::Result<()>;
}

/// Exact instruction counts: what record and replay, and lock-step tests, rest on.
pub trait Counting: Send + Sync {
    /// Instructions that vCPU `index` has retired since it was created.
    fn retired(&self, index: u32) -> u64;
    /// Makes vCPU `index` return [`HaltReason::BudgetSpent`] after `instructions` more (`None`: no budget).
    fn set_budget(&self, index: u32, instructions: Option<u64>);
}

/// One virtual processor, driven by one thread at a time.
pub trait Vcpu: Send {
    /// Executes guest code until there is a reason to return.
    fn run<I: CpuIo>(&mut self, stop: &StopFlag, io: &I) -> Result<HaltReason, RunError>;
    /// A copy of the whole architectural state, local APIC included.
    fn state(&mut self) -> CpuState;
    /// Replaces the whole architectural state.
    fn set_state(&mut self, state: &CpuState) -> Result<(), StateError>;
    /// Back to the power-on state (see [`Partition::create_vcpu`]).
    fn reset(&mut self);
}
