//! The CPU model's CPUID table in KVM's form.
//!
//! KVM answers CPUID in the kernel from a list of entries. The list holds every leaf and subleaf of
//! [`CpuModel::cpuid`] that is not zero, and KVM's own rules for what is not listed are the model's: zeros below the
//! last leaf, beyond it the highest basic leaf on Intel and zeros on AMD.
//!
//! KVM keeps what follows the processor's state itself, as the model does with its context:
//!
//! | what | where | follows |
//! |---|---|---|
//! | OSXSAVE | leaf 1 ECX 27 | CR4.OSXSAVE |
//! | APIC | leaf 1 EDX 9 | IA32_APIC_BASE bit 11 |
//! | size of the XSAVE area | leaf 0xD.0 EBX, 0xD.1 EBX | XCR0 |
//!
//! Virtualization in the guest is hidden by construction: the models have neither VMX nor SVM.

use atoll_machine::cpu::host::CpuidResult;
use atoll_machine::cpu::model::{CpuModel, CpuidContext};
use atoll_machine::cpu::topology::Topology;
use kvm_bindings::{KVM_CPUID_FLAG_SIGNIFCANT_INDEX, kvm_cpuid_entry2};

/// Leaves whose answer depends on the subleaf in ECX, with the number of subleaves that are looked at.
const INDEXED: [(u32, u32); 5] = [(4, 8), (7, 1), (0xb, 2), (0xd, 64), (0x8000_001d, 8)];
/// First leaf of each range, whose EAX is its last.
const RANGES: [u32; 3] = [0, 0x4000_0000, 0x8000_0000];

/// The entries of the vCPU with this APIC id.
pub(crate) fn entries(model: &CpuModel, topology: &Topology, apic_id: u32) -> Vec<kvm_cpuid_entry2> {
    let ctx = CpuidContext { apic_id, topology, os_xsave: false, xcr0: 1, apic_enabled: true };
    let mut list = Vec::new();
    for first in RANGES {
        let last = model.cpuid(first, 0, &ctx).eax;
        for leaf in first..=last {
            let subleaves = INDEXED.iter().find(|(l, _)| *l == leaf).map(|(_, n)| *n);
            for subleaf in 0..subleaves.unwrap_or(1) {
                let answer = model.cpuid(leaf, subleaf, &ctx);
                // The first subleaf of an indexed leaf must be there: KVM updates it or derives others from it.
                if answer == CpuidResult::default() && (subleaf != 0 || subleaves.is_none()) {
                    continue;
                }
                list.push(entry(leaf, subleaf, subleaves.is_some(), answer));
            }
        }
    }
    list
}

fn entry(leaf: u32, subleaf: u32, indexed: bool, answer: CpuidResult) -> kvm_cpuid_entry2 {
    kvm_cpuid_entry2 {
        function: leaf,
        index: subleaf,
        flags: if indexed { KVM_CPUID_FLAG_SIGNIFCANT_INDEX } else { 0 },
        eax: answer.eax,
        ebx: answer.ebx,
        ecx: answer.ecx,
        edx: answer.edx,
        padding: [0; 3],
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use atoll_machine::cpu::assurances::Assurances;
    use atoll_machine::cpu::feature::{Feature, FeatureSet};
    use atoll_machine::cpu::host::{HostCpu, Vendor};

    fn model(vendor: Vendor) -> CpuModel {
        let host = HostCpu { vendor, features: FeatureSet::of(Feature::ALL), tsc_khz: None };
        CpuModel::resolve("atoll-2026", &host, 2_600_000).unwrap()
    }

    /// How the kernel answers CPUID from a list of entries (arch/x86/kvm/cpuid.c), without what it updates.
    fn kernel(list: &[kvm_cpuid_entry2], vendor: Vendor, leaf: u32, subleaf: u32) -> CpuidResult {
        let find = |leaf: u32, subleaf: u32| {
            list.iter().find(|e| {
                e.function == leaf && (e.flags & KVM_CPUID_FLAG_SIGNIFCANT_INDEX == 0 || e.index == subleaf)
            })
        };
        let class = match leaf {
            0x4000_0000..=0x4fff_ffff => leaf & 0xffff_ff00,
            l => l & 0x8000_0000,
        };
        let in_range = find(class, 0).is_some_and(|e| leaf <= e.eax);
        let found = match find(leaf, subleaf) {
            Some(entry) => Some(entry),
            None if vendor == Vendor::Amd || in_range => None,
            None => find(0, 0).and_then(|e| find(e.eax, subleaf)),
        };
        match found {
            Some(e) => CpuidResult { eax: e.eax, ebx: e.ebx, ecx: e.ecx, edx: e.edx },
            None if leaf == 0xb => {
                let edx = find(0xb, 1).map_or(0, |e| e.edx);
                CpuidResult { ecx: subleaf & 0xff, edx, ..CpuidResult::default() }
            }
            None => CpuidResult::default(),
        }
    }

    #[test]
    fn what_the_kernel_answers_is_what_the_model_says() {
        let topology = Topology { sockets: 2, cores: 3, threads: 2 };
        for vendor in [Vendor::Intel, Vendor::Amd] {
            let model = model(vendor);
            for index in 0..topology.cpus() {
                let apic_id = topology.apic_id(index);
                let list = entries(&model, &topology, apic_id);
                let ctx = CpuidContext {
                    apic_id,
                    topology: &topology,
                    os_xsave: false,
                    xcr0: 1,
                    apic_enabled: true,
                };
                let leaves = (0..0x40).chain(0x4000_0000..0x4000_0020).chain(0x8000_0000..0x8000_0040);
                for leaf in leaves.chain([0x3fff_ffff, 0x4000_0100, 0x7fff_ffff, 0xc000_0000, u32::MAX]) {
                    for subleaf in (0..70).chain([0x100, u32::MAX]) {
                        let (said, wanted) =
                            (kernel(&list, vendor, leaf, subleaf), model.cpuid(leaf, subleaf, &ctx));
                        assert_eq!(said, wanted, "{vendor:?} leaf {leaf:#x} subleaf {subleaf:#x}");
                    }
                }
            }
        }
    }

    #[test]
    fn entries_are_few_unique_and_without_virtualization() {
        for vendor in [Vendor::Intel, Vendor::Amd] {
            let list = entries(&model(vendor), &Topology::flat(4), 1);
            assert!(list.len() < kvm_bindings::KVM_MAX_CPUID_ENTRIES / 2, "{}", list.len());
            let mut keys: Vec<_> = list.iter().map(|e| (e.function, e.index)).collect();
            keys.dedup();
            assert_eq!(keys.len(), list.len());
            let get = |leaf| list.iter().find(|e| e.function == leaf).unwrap();
            assert_eq!(get(1).ecx >> 5 & 1, 0, "VMX");
            assert_eq!(get(0x8000_0001).ecx >> 2 & 1, 0, "SVM");
        }
    }

    #[test]
    fn the_kernel_takes_the_entries_and_gives_them_back() {
        let host = match crate::host::KvmHost::open() {
            Ok(host) => host,
            Err(error) => return println!("skipped: {error}"),
        };
        if !crate::state::tests::virtualizes() {
            return;
        }
        let features = host.features();
        let cpu = HostCpu::detect();
        let model = CpuModel::resolve_for("host", &cpu, &features, host.tsc_khz()).unwrap();
        let topology = Topology { sockets: 1, cores: 2, threads: 1 };
        let vm = host.create_vm().unwrap();
        let fd = vm.create_vcpu(0).unwrap();
        let list = entries(&model, &topology, 0);
        fd.set_cpuid2(&kvm_bindings::CpuId::from_entries(&list).unwrap()).unwrap();
        let back = fd.get_cpuid2(kvm_bindings::KVM_MAX_CPUID_ENTRIES).unwrap();
        // Some kernels do not say how many they gave.
        let used: Vec<_> = back.as_slice().iter().filter(|e| **e != kvm_cpuid_entry2::default()).collect();
        assert_eq!(used.len(), list.len());
        for (mine, kernels) in list.iter().zip(used) {
            let mut mine = *mine;
            match (mine.function, mine.index) {
                // A VM without a local APIC has no APIC bit.
                (1, _) => mine.edx = mine.edx & !(1 << 9) | kernels.edx & 1 << 9,
                // The size follows XCR0, which is the kernel's.
                (0xd, 0 | 1) => mine.ebx = kernels.ebx,
                _ => {}
            }
            assert_eq!(mine, *kernels, "leaf {:#x} subleaf {:#x}", mine.function, mine.index);
        }
        for vendor in [Vendor::Intel, Vendor::Amd] {
            let promised = features.assurances;
            assert!(promised.hold_on(vendor, Assurances::ALL), "it can move to the software CPU");
        }
    }
}
