//! One machine's VM: how it is set up, what its vCPUs share, and what the machine asks of it.
//!
//! Order of creation, which KVM prescribes in part: VM, places for KVM's own pages, abilities, split irqchip, MSR
//! filter, memory slots, then vCPUs. Nothing is switched on that the software CPU does not do too.
//!
//! # Quirks
//!
//! KVM keeps some mistakes of its youth as "quirks" that can be switched off (`KVM_CAP_DISABLE_QUIRKS2`):
//!
//! | quirk | here | why |
//! |---|---|---|
//! | `LINT0_REENABLED` | off | RESET leaves LINT0 masked; whoever boots the machine sets it |
//! | `CD_NW_CLEARED` | kept | CR0 reads as the guest set it either way; without the quirk an AMD guest that has not cleared CD yet runs uncached |
//! | `LAPIC_MMIO_HOLE` | off | accesses to the page of a local APIC that is off, or in x2APIC mode, go to the bus |
//! | `OUT_7E_INC_RIP` | off | OUT to port 0x7e is an OUT like any other |
//! | `MISC_ENABLE_NO_MWAIT` | kept | without it KVM edits CPUID by an MSR; CPUID is the model's |
//! | `FIX_HYPERCALL_INSN` | off | KVM would write the other vendor's instruction into guest memory; the wrong one is #UD |
//! | `MWAIT_NEVER_UD_FAULTS` | off | the models have no MONITOR: it is #UD |
//! | `SLOT_ZAP_ALL` | off | removing a slot need not drop the mappings of all others |
//! | `STUFF_FEATURE_MSRS` | kept | the reset values of the model are written over them |

use std::sync::Arc;

use atoll_machine::backend::{BackendError, Counting, EventRoutes, Partition, PartitionConfig};
use atoll_machine::cpu::model::CpuModel;
use atoll_machine::cpu::topology::{MAX_CPUS, Topology};
use atoll_machine::interrupt::{EoiSink, ExtIntSink, ExtIntSource, IoApicRoutes, MsiSink};
use atoll_machine::time::Clock;
use kvm_bindings::*;
use kvm_ioctls::VmFd;

use crate::events::Events;
use crate::host::{Capabilities, KvmHost, host};
use crate::interrupts::Routing;
use crate::interrupts::extint::Pin;
use crate::interrupts::msi::Messages;
use crate::kick::Kick;
use crate::memory::Slots;
use crate::tsc::TimeBase;
use crate::vcpu::KvmVcpu;

/// Where Intel processors without unrestricted guest keep an identity-mapping page table for real mode: one
/// page, followed by three for the task segment. KVM maps them into the guest, so there must be nothing else.
/// Between the local APIC (0xfee0_0000) and the last 16 MiB below 4 GiB, where firmware goes, the machine has
/// nothing.
const IDENTITY_MAP: u64 = 0xfeff_c000;
const TASK_SEGMENT: usize = 0xfeff_d000;

const DISABLED_QUIRKS: u32 = KVM_X86_QUIRK_LINT0_REENABLED
    | KVM_X86_QUIRK_LAPIC_MMIO_HOLE
    | KVM_X86_QUIRK_OUT_7E_INC_RIP
    | KVM_X86_QUIRK_FIX_HYPERCALL_INSN
    | KVM_X86_QUIRK_MWAIT_NEVER_UD_FAULTS
    | KVM_X86_QUIRK_SLOT_ZAP_ALL;

/// `KVM_MSR_EXIT_REASON_INVAL`, `_UNKNOWN` and `_FILTER`: every access that KVM does not answer comes out.
const MSR_EXITS: u64 = 1 | 2 | 4;

/// What the vCPUs of one machine share.
pub(crate) struct Shared {
    /// The VM.
    pub(crate) vm: Arc<VmFd>,
    /// The host it is on.
    pub(crate) host: Arc<KvmHost>,
    /// CPUID and MSR tables.
    pub(crate) model: Arc<CpuModel>,
    /// vCPU numbering.
    pub(crate) topology: Topology,
    /// The machine's time.
    pub(crate) clock: Arc<dyn Clock>,
    /// How guest TSC and kvmclock follow it.
    pub(crate) time: TimeBase,
    /// Memory slots.
    pub(crate) memory: Arc<Slots>,
    /// The legacy interrupt controller.
    pub(crate) extint: Option<Arc<dyn ExtIntSource>>,
    /// Told about the end of level-triggered interrupts.
    pub(crate) eoi: Option<Arc<dyn EoiSink>>,
    /// GSI routes.
    pub(crate) routing: Arc<Routing>,
    /// INTR pin of the boot processor.
    pub(crate) pin: Arc<Pin>,
    /// One entry per vCPU index.
    pub(crate) kicks: Vec<Arc<Kick>>,
}

impl Shared {
    /// What the host can do.
    pub(crate) fn capabilities(&self) -> &Capabilities {
        self.host.capabilities()
    }
}

/// One machine's vCPUs on KVM.
pub struct KvmPartition {
    shared: Arc<Shared>,
    messages: Arc<Messages>,
    events: Arc<Events>,
}

impl KvmPartition {
    pub(crate) fn new(host: &Arc<KvmHost>, config: PartitionConfig) -> Result<Arc<Self>, BackendError> {
        check(&config, host)?;
        let vm = Arc::new(host.create_vm()?);
        set_up(&vm, host.capabilities())?;
        crate::msrs::install_filter(&vm, &config.model)?;
        let memory = Slots::new(vm.clone(), config.memory, host.capabilities())?;
        let routing = Routing::new(vm.clone());
        let kicks: Vec<Arc<Kick>> = (0..config.topology.cpus()).map(|_| Arc::default()).collect();
        let entries = kicks.clone();
        memory.set_kick(Box::new(move |index| {
            if let Some(kick) = entries.get(index as usize) {
                kick.kick();
            }
        }));
        let boot = kicks.first().cloned().unwrap_or_default();
        let time = TimeBase::new(config.clock.clone(), host)?;
        let shared = Arc::new(Shared {
            vm: vm.clone(),
            host: host.clone(),
            model: config.model,
            topology: config.topology,
            clock: config.clock,
            time,
            memory,
            extint: config.extint,
            eoi: config.eoi,
            routing: routing.clone(),
            pin: Arc::new(Pin::new(boot)),
            kicks,
        });
        let events = Events::new(vm.clone(), routing);
        Ok(Arc::new(Self { shared, messages: Arc::new(Messages(vm)), events }))
    }

    fn kick_entry(&self, index: u32) -> Option<&Arc<Kick>> {
        self.shared.kicks.get(index as usize)
    }
}

/// Refuses what this host cannot give.
fn check(config: &PartitionConfig, host: &KvmHost) -> Result<(), BackendError> {
    let (cpus, capabilities) = (config.topology.cpus(), host.capabilities());
    let most = MAX_CPUS.min(capabilities.max_vcpus);
    if cpus == 0 || cpus > most {
        return Err(BackendError::Config(format!(
            "a machine on this host's KVM has 1 to {most} vCPUs, not {cpus}; choose fewer with --cpus"
        )));
    }
    let last = config.topology.apic_id(cpus - 1);
    if last >= capabilities.max_vcpu_id {
        return Err(BackendError::Config(format!(
            "APIC id {last} is beyond this host's KVM, which has {}; choose another topology",
            capabilities.max_vcpu_id
        )));
    }
    // Features only: the host's processor itself is in what KVM supports.
    let missing = config.model.features().difference(host.features().emulated);
    if !missing.is_empty() {
        return Err(BackendError::MissingFeatures {
            model: config.model.name.clone(),
            missing: missing.to_string(),
        });
    }
    Ok(())
}

/// Makes an empty VM one with a split irqchip and Atoll's choices.
fn set_up(vm: &VmFd, capabilities: &Capabilities) -> Result<(), BackendError> {
    vm.set_identity_map_address(IDENTITY_MAP).map_err(host("placing the identity map"))?;
    vm.set_tss_address(TASK_SEGMENT).map_err(host("placing the task segment"))?;
    let enable = |cap: u32, argument: u64, what: &'static str| {
        let cap = kvm_enable_cap { cap, args: [argument, 0, 0, 0], ..Default::default() };
        vm.enable_cap(&cap).map_err(host(what))
    };
    let quirks = u64::from(DISABLED_QUIRKS & capabilities.quirks);
    if quirks != 0 {
        enable(KVM_CAP_DISABLE_QUIRKS2, quirks, "disabling KVM's quirks")?;
    }
    let x2apic = KVM_X2APIC_API_USE_32BIT_IDS | KVM_X2APIC_API_DISABLE_BROADCAST_QUIRK;
    enable(KVM_CAP_X2APIC_API, x2apic.into(), "enabling 32-bit x2APIC ids")?;
    enable(KVM_CAP_SPLIT_IRQCHIP, crate::interrupts::PINS.into(), "making a split irqchip")?;
    enable(KVM_CAP_X86_USER_SPACE_MSR, MSR_EXITS, "enabling MSR exits")?;
    if capabilities.exception_payload {
        enable(KVM_CAP_EXCEPTION_PAYLOAD, 1, "enabling exception payloads")?;
    }
    if capabilities.triple_fault_event {
        enable(KVM_CAP_X86_TRIPLE_FAULT_EVENT, 1, "enabling triple fault events")?;
    }
    Ok(())
}

impl Partition for KvmPartition {
    type Vcpu = KvmVcpu;

    fn create_vcpu(self: &Arc<Self>, index: u32) -> Result<KvmVcpu, BackendError> {
        if self.kick_entry(index).is_none() {
            return Err(BackendError::Config(format!(
                "vCPU {index} does not exist: the topology has {} vCPUs",
                self.shared.kicks.len()
            )));
        }
        KvmVcpu::new(self.shared.clone(), index)
    }

    fn msi_sink(&self) -> Arc<dyn MsiSink> {
        self.messages.clone()
    }

    fn extint_sink(&self) -> Arc<dyn ExtIntSink> {
        self.shared.pin.clone()
    }

    fn inject_nmi(&self, index: u32) {
        if let Some(kick) = self.kick_entry(index) {
            kick.request_nmi();
        }
    }

    fn kick(&self, index: u32) {
        if let Some(kick) = self.kick_entry(index) {
            kick.kick();
        }
    }

    fn counting(&self) -> Option<&dyn Counting> {
        // KVM retires instructions uncounted.
        None
    }

    fn event_routes(&self) -> Option<Arc<dyn EventRoutes>> {
        Some(self.events.clone())
    }

    fn ioapic_routes(&self) -> Option<Arc<dyn IoApicRoutes>> {
        Some(self.shared.routing.clone())
    }
}
