//! `/dev/kvm`: opening it, and what its kernel and processor can do.
//!
//! Required: the interface of Linux 5.16 (split irqchip, immediate exit, MSR filters and exits, vCPU
//! attributes). What is missing is refused by name ([`REQUIRED`]). Optional abilities are fields of
//! [`Capabilities`].

// UNSAFETY: one ioctl of the VM that kvm-ioctls offers for vCPUs only.
#![allow(unsafe_code)]

use std::io;
use std::os::fd::AsRawFd;
use std::sync::Mutex;

use atoll_foundation::host::processor::Processor;
use atoll_machine::backend::BackendError;
use atoll_machine::cpu::assurances::Assurances;
use atoll_machine::cpu::host::{BackendFeatures, CpuidResult, HostCpu};
use atoll_machine::cpu::model::{Feature, FeatureSet};
use kvm_bindings::*;
use kvm_ioctls::{Kvm, VmFd};

/// The version of the interface, since 2007.
const API_VERSION: i32 = 12;
const IA32_ARCH_CAPABILITIES: u32 = 0x10a;
const KVM_GET_TSC_KHZ: libc::c_ulong = 0xaea3;

/// What a host must have, with the words for a message.
const REQUIRED: &[(u32, &str)] = &[
    (KVM_CAP_USER_MEMORY, "user memory slots"),
    (KVM_CAP_EXT_CPUID, "KVM_SET_CPUID2"),
    (KVM_CAP_SET_TSS_ADDR, "KVM_SET_TSS_ADDR"),
    (KVM_CAP_SET_IDENTITY_MAP_ADDR, "KVM_SET_IDENTITY_MAP_ADDR"),
    (KVM_CAP_MP_STATE, "KVM_GET_MP_STATE"),
    (KVM_CAP_IRQ_ROUTING, "KVM_SET_GSI_ROUTING"),
    (KVM_CAP_IRQFD, "irqfd"),
    (KVM_CAP_IOEVENTFD, "ioeventfd"),
    (KVM_CAP_SIGNAL_MSI, "KVM_SIGNAL_MSI"),
    (KVM_CAP_SPLIT_IRQCHIP, "the split irqchip"),
    (KVM_CAP_X2APIC_API, "32-bit x2APIC ids"),
    (KVM_CAP_VCPU_EVENTS, "KVM_GET_VCPU_EVENTS"),
    (KVM_CAP_DEBUGREGS, "KVM_GET_DEBUGREGS"),
    (KVM_CAP_XSAVE, "KVM_GET_XSAVE"),
    (KVM_CAP_READONLY_MEM, "read-only memory slots"),
    (KVM_CAP_ADJUST_CLOCK, "KVM_SET_CLOCK"),
    (KVM_CAP_GET_TSC_KHZ, "KVM_GET_TSC_KHZ"),
    (KVM_CAP_VCPU_ATTRIBUTES, "vCPU attributes (the TSC offset)"),
    (KVM_CAP_IMMEDIATE_EXIT, "immediate exit"),
    (KVM_CAP_X86_USER_SPACE_MSR, "MSR exits to user space"),
    (KVM_CAP_X86_MSR_FILTER, "MSR filters"),
    (KVM_CAP_ENABLE_CAP_VM, "KVM_ENABLE_CAP"),
];

/// What one host has beyond what every host must have.
#[derive(Clone, Debug, Default)]
pub(crate) struct Capabilities {
    /// Guests can have another TSC frequency than the host.
    pub(crate) tsc_control: bool,
    /// XCR0 can be read and set.
    pub(crate) xcrs: bool,
    /// Most entries of a dirty ring, if there are dirty rings that hold: a KVM without the processor's virtualization
    /// does not look at them often enough (see `memory`).
    pub(crate) dirty_ring: Option<u32>,
    /// Size in bytes of the area that KVM_GET_XSAVE2 fills.
    pub(crate) xsave2_size: usize,
    /// The local APIC's timer has TSC-deadline mode.
    pub(crate) tsc_deadline: bool,
    /// `kvm_vcpu_events` tells payloads of exceptions apart. Enabled where present.
    pub(crate) exception_payload: bool,
    /// `kvm_vcpu_events` shows a pending triple fault. Enabled where present.
    pub(crate) triple_fault_event: bool,
    /// Quirks that can be disabled (`KVM_X86_QUIRK_*`).
    pub(crate) quirks: u32,
    /// Most vCPUs of a VM.
    pub(crate) max_vcpus: u32,
    /// Largest vCPU id, which is the APIC id, plus one.
    pub(crate) max_vcpu_id: u32,
}

impl Capabilities {
    fn read(kvm: &Kvm) -> Self {
        let value = |cap: u32| kvm.check_extension_raw(cap.into()).max(0) as u32;
        let has = |cap: u32| value(cap) != 0;
        let acq_rel = value(KVM_CAP_DIRTY_LOG_RING_ACQ_REL);
        // The ring is counted in bytes of 16-byte entries.
        let ring = acq_rel.max(value(KVM_CAP_DIRTY_LOG_RING)) / size_of::<kvm_dirty_gfn>() as u32;
        Self {
            tsc_control: has(KVM_CAP_TSC_CONTROL),
            xcrs: has(KVM_CAP_XCRS),
            dirty_ring: (ring > 0 && virtualizes()).then_some(ring),
            xsave2_size: (value(KVM_CAP_XSAVE2) as usize).max(size_of::<kvm_xsave>()),
            tsc_deadline: has(KVM_CAP_TSC_DEADLINE_TIMER),
            exception_payload: has(KVM_CAP_EXCEPTION_PAYLOAD),
            triple_fault_event: has(KVM_CAP_X86_TRIPLE_FAULT_EVENT),
            quirks: value(KVM_CAP_DISABLE_QUIRKS2),
            max_vcpus: value(KVM_CAP_MAX_VCPUS).max(1),
            max_vcpu_id: value(KVM_CAP_MAX_VCPU_ID).max(1),
        }
    }
}

/// Whether guests are executed by the processor's own virtualization.
pub(crate) fn virtualizes() -> bool {
    Processor::read().unwrap_or_default().virtualization().is_some()
}

/// An open `/dev/kvm`.
pub struct KvmHost {
    kvm: Kvm,
    capabilities: Capabilities,
    supported: CpuId,
    /// IA32_ARCH_CAPABILITIES as KVM can give it; 0 where it cannot.
    arch_capabilities: u64,
    tsc_khz: u32,
    /// The VM that told the TSC frequency, for the first partition.
    spare: Mutex<Option<VmFd>>,
}

impl KvmHost {
    /// Opens `/dev/kvm` and looks at what it can do. Costs about as much as one VM, which the first partition
    /// reuses.
    ///
    /// # Errors
    ///
    /// [`BackendError::Host`] when the device cannot be opened, [`BackendError::Config`] when the kernel lacks
    /// something that Atoll needs; both in words for a person.
    pub fn open() -> Result<Self, BackendError> {
        let kvm = Kvm::new().map_err(|error| BackendError::Host {
            what: "opening /dev/kvm (`atoll doctor` explains)",
            source: error.into(),
        })?;
        let version = kvm.get_api_version();
        if version != API_VERSION {
            return Err(BackendError::Config(format!(
                "/dev/kvm speaks version {version} of its interface, not {API_VERSION}"
            )));
        }
        check(&|cap| kvm.check_extension_raw(cap.into()) > 0)?;
        let capabilities = Capabilities::read(&kvm);
        let supported =
            kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).map_err(host("asking KVM for CPUID"))?;
        let spare = kvm.create_vm().map_err(host("creating a VM"))?;
        let tsc_khz = tsc_khz(&kvm, &spare).map_err(host("asking KVM for the TSC frequency"))?;
        let arch_capabilities = feature_msr(&kvm, IA32_ARCH_CAPABILITIES).unwrap_or(0);
        Ok(Self { kvm, capabilities, supported, arch_capabilities, tsc_khz, spare: Mutex::new(Some(spare)) })
    }

    pub(crate) fn capabilities(&self) -> &Capabilities {
        &self.capabilities
    }

    /// A new VM.
    pub(crate) fn create_vm(&self) -> Result<VmFd, BackendError> {
        let spare = self.spare.lock().unwrap_or_else(|e| e.into_inner()).take();
        match spare {
            Some(vm) => Ok(vm),
            None => self.kvm.create_vm().map_err(host("creating a VM")),
        }
    }

    /// What guests can have here: what KVM supports on this processor, and what KVM gives without saying so in
    /// CPUID (the invariant TSC that its offsets make, the deadline timer).
    pub fn features(&self) -> BackendFeatures {
        let emulated = features(&self.supported, self.capabilities.tsc_deadline, self.capabilities.xcrs);
        let cpuid = |leaf, subleaf| supported_leaf(&self.supported, leaf, subleaf);
        let assurances = Assurances::from_cpuid(cpuid, self.arch_capabilities);
        BackendFeatures { emulated, native: FeatureSet::EMPTY, assurances }
    }

    /// Frequency of the host's TSC in kHz, as KVM takes it.
    pub fn tsc_khz(&self) -> u32 {
        self.tsc_khz
    }
}

/// Refuses a kernel without one of [`REQUIRED`].
fn check(has: &dyn Fn(u32) -> bool) -> Result<(), BackendError> {
    let missing: Vec<&str> = REQUIRED.iter().filter(|(cap, _)| !has(*cap)).map(|(_, words)| *words).collect();
    if missing.is_empty() {
        return Ok(());
    }
    Err(BackendError::Config(format!(
        "this host's KVM lacks {}; Linux 5.16 or newer is needed, or --accel software",
        missing.join(", ")
    )))
}

/// One leaf of what KVM supports; zeroes where it has none.
fn supported_leaf(supported: &CpuId, leaf: u32, subleaf: u32) -> CpuidResult {
    let fits = |e: &&kvm_cpuid_entry2| {
        let indexed = e.flags & KVM_CPUID_FLAG_SIGNIFCANT_INDEX != 0;
        e.function == leaf && (!indexed || e.index == subleaf)
    };
    let entry = supported.as_slice().iter().find(fits).copied().unwrap_or_default();
    CpuidResult { eax: entry.eax, ebx: entry.ebx, ecx: entry.ecx, edx: entry.edx }
}

/// A register that says what the processor is, as KVM can give it to guests.
fn feature_msr(kvm: &Kvm, index: u32) -> Option<u64> {
    let mut msrs = Msrs::from_entries(&[kvm_msr_entry { index, ..Default::default() }]).ok()?;
    let count = kvm.get_msrs(&mut msrs).ok()?;
    msrs.as_slice().first().filter(|_| count == 1).map(|entry| entry.data)
}

fn features(supported: &CpuId, tsc_deadline: bool, xcrs: bool) -> FeatureSet {
    let find = |leaf: u32, subleaf: u32| {
        let mut result = supported_leaf(supported, leaf, subleaf);
        if leaf == 1 && result.ecx >> 26 & 1 != 0 && xcrs {
            // OSXSAVE is the guest's to set; here it stands for "the host saves the registers", as XSAVE does.
            result.ecx |= 1 << 27;
        }
        result
    };
    let mut features = HostCpu::from_cpuid(find).features;
    features.insert(Feature::InvariantTsc);
    if tsc_deadline {
        features.insert(Feature::TscDeadline);
    } else {
        features.remove(Feature::TscDeadline);
    }
    features
}

/// The host's TSC frequency in kHz. Leaves `vm` as it was.
fn tsc_khz(kvm: &Kvm, vm: &VmFd) -> Result<u32, kvm_ioctls::Error> {
    // SAFETY: KVM_GET_TSC_KHZ takes no argument.
    let khz = unsafe { libc::ioctl(vm.as_raw_fd(), KVM_GET_TSC_KHZ, 0) };
    if khz > 0 {
        return Ok(khz as u32);
    }
    // Before Linux 5.19 only vCPUs know it.
    kvm.create_vm()?.create_vcpu(0)?.get_tsc_khz()
}

/// Turns an error of KVM into one that says what was attempted.
pub(crate) fn host(what: &'static str) -> impl Fn(kvm_ioctls::Error) -> BackendError {
    move |error| BackendError::Host { what, source: io::Error::from(error) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn missing_abilities_are_named() {
        assert!(check(&|_| true).is_ok());
        let without = [KVM_CAP_SPLIT_IRQCHIP, KVM_CAP_X86_MSR_FILTER];
        let error = check(&|cap| !without.contains(&cap)).unwrap_err().to_string();
        assert!(error.contains("lacks the split irqchip, MSR filters;"), "{error}");
    }

    #[test]
    fn features_come_from_the_supported_leaves() {
        let entry = |function, eax, ebx, ecx, edx| kvm_cpuid_entry2 {
            function,
            eax,
            ebx,
            ecx,
            edx,
            ..Default::default()
        };
        let leaves = [
            entry(0, 1, 0x756e_6547, 0x6c65_746e, 0x4965_6e69),
            entry(1, 0, 0, 1 << 28 | 1 << 26 | 1 << 24, 1 << 25),
        ];
        let supported = CpuId::from_entries(&leaves).unwrap();
        let all = features(&supported, false, true);
        for feature in [Feature::Sse, Feature::Xsave, Feature::Avx, Feature::InvariantTsc] {
            assert!(all.has(feature), "{feature:?}");
        }
        assert!(!all.has(Feature::TscDeadline), "KVM's capability decides, not CPUID");
        assert!(features(&supported, true, true).has(Feature::TscDeadline));
        assert!(!features(&supported, true, false).has(Feature::Avx), "XCR0 could not be set");
    }
}
