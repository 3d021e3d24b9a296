//! A machine's worth of software CPUs: what its vCPUs share, and the backend's entry points.
//!
//! The traits are those of [`atoll_machine::backend`]. A partition owns one
//! [`Mailbox`](crate::apic::mailbox::Mailbox) per possible vCPU from the start, so that messages can be routed
//! without a lock while vCPUs come and go.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI64, Ordering};

use atoll_machine::backend::{Backend, BackendError, Counting, EventRoutes, Partition, PartitionConfig};
use atoll_machine::cpu::model::{BackendFeatures, CpuModel};
use atoll_machine::cpu::topology::{MAX_CPUS, Topology};
use atoll_machine::inputs::InputGate;
use atoll_machine::interrupt::{EoiSink, ExtIntSink, ExtIntSource, Msi, MsiSink};
use atoll_machine::memory::AddressSpace;
use atoll_machine::time::Clock;

use crate::apic::mailbox::{Mailbox, NO_BUDGET, request};
use crate::apic::routing::{self, Message};
use crate::cpu::Cpu;
use crate::vcpu::SoftwareVcpu;

/// What the vCPUs of one machine share.
pub struct Shared {
    /// Guest-physical memory.
    pub memory: Arc<AddressSpace>,
    /// CPUID and MSR tables.
    pub model: Arc<CpuModel>,
    /// vCPU numbering.
    pub topology: Topology,
    /// The machine's time.
    pub clock: Arc<dyn Clock>,
    /// Random numbers.
    pub inputs: Arc<InputGate>,
    /// The legacy interrupt controller.
    pub extint: Option<Arc<dyn ExtIntSource>>,
    /// Told about the end of level-triggered interrupts.
    pub eoi: Option<Arc<dyn EoiSink>>,
    /// Level of the legacy INTR pin.
    pub extint_high: AtomicBool,
    /// One mailbox per vCPU index.
    pub mailboxes: Vec<Arc<Mailbox>>,
    /// What the guest's TSC counts beyond the clock's, TSC_ADJUST apart: zero until a state with another
    /// origin is loaded. One value for all vCPUs keeps their counters equal.
    pub tsc_base: AtomicI64,
}

impl Shared {
    /// Makes the shared part of a partition.
    pub fn new(config: PartitionConfig) -> Arc<Self> {
        let cpus = config.topology.cpus();
        let mailboxes = (0..cpus).map(|i| Mailbox::new(config.topology.apic_id(i))).collect();
        Arc::new(Self {
            memory: config.memory,
            model: config.model,
            topology: config.topology,
            clock: config.clock,
            inputs: config.inputs,
            extint: config.extint,
            eoi: config.eoi,
            extint_high: AtomicBool::new(false),
            mailboxes,
            tsc_base: AtomicI64::new(0),
        })
    }
}

impl MsiSink for Shared {
    fn signal_msi(&self, msi: Msi) {
        routing::send(self, &Message::from_msi(msi));
    }
}

impl ExtIntSink for Shared {
    fn set_extint(&self, high: bool) {
        if self.extint_high.swap(high, Ordering::SeqCst) == high || !high {
            return;
        }
        for mailbox in &self.mailboxes {
            if mailbox.reach().takes_extint {
                mailbox.request(request::EXTINT);
            }
        }
    }
}

/// The software CPU as a kind of engine.
#[derive(Clone, Copy, Debug, Default)]
pub struct SoftwareBackend;

impl Backend for SoftwareBackend {
    type Partition = SoftwarePartition;

    fn name(&self) -> &'static str {
        "software"
    }

    fn features(&self) -> BackendFeatures {
        BackendFeatures::software()
    }

    fn fixed_tsc_khz(&self) -> Option<u32> {
        None
    }

    fn create_partition(&self, config: PartitionConfig) -> Result<Arc<SoftwarePartition>, BackendError> {
        let cpus = config.topology.cpus();
        if cpus == 0 || cpus > MAX_CPUS {
            return Err(BackendError::Config(format!(
                "a machine has 1 to {MAX_CPUS} vCPUs, not {cpus}; choose fewer with --cpus"
            )));
        }
        Ok(Arc::new(SoftwarePartition { shared: Shared::new(config) }))
    }
}

/// One machine's vCPUs.
pub struct SoftwarePartition {
    shared: Arc<Shared>,
}

impl SoftwarePartition {
    /// What the vCPUs share.
    pub fn shared(&self) -> &Arc<Shared> {
        &self.shared
    }

    fn mailbox(&self, index: u32) -> Option<&Arc<Mailbox>> {
        self.shared.mailboxes.get(index as usize)
    }
}

impl Partition for SoftwarePartition {
    type Vcpu = SoftwareVcpu;

    fn create_vcpu(self: &Arc<Self>, index: u32) -> Result<SoftwareVcpu, BackendError> {
        if self.mailbox(index).is_none() {
            return Err(BackendError::Config(format!(
                "vCPU {index} does not exist: the topology has {} vCPUs",
                self.shared.mailboxes.len()
            )));
        }
        let cpu = Cpu::new(self.shared.clone(), index).map_err(|error| BackendError::Host {
            what: "making a vCPU",
            source: std::io::Error::other(error),
        })?;
        Ok(SoftwareVcpu::new(cpu))
    }

    fn msi_sink(&self) -> Arc<dyn MsiSink> {
        self.shared.clone()
    }

    fn extint_sink(&self) -> Arc<dyn ExtIntSink> {
        self.shared.clone()
    }

    fn inject_nmi(&self, index: u32) {
        if let Some(mailbox) = self.mailbox(index) {
            mailbox.post_nmi();
        }
    }

    fn kick(&self, index: u32) {
        if let Some(mailbox) = self.mailbox(index) {
            mailbox.request(request::KICK);
        }
    }

    fn counting(&self) -> Option<&dyn Counting> {
        Some(self)
    }

    fn event_routes(&self) -> Option<Arc<dyn EventRoutes>> {
        None
    }
}

impl Counting for SoftwarePartition {
    fn retired(&self, index: u32) -> u64 {
        self.mailbox(index).map_or(0, |m| m.retired.load(Ordering::SeqCst))
    }

    fn set_budget(&self, index: u32, instructions: Option<u64>) {
        let Some(mailbox) = self.mailbox(index) else { return };
        let end =
            instructions.map_or(NO_BUDGET, |n| mailbox.retired.load(Ordering::SeqCst).saturating_add(n));
        mailbox.budget_end.store(end, Ordering::SeqCst);
        mailbox.request(request::KICK);
    }
}
