//! Model-specific registers: which the kernel answers, which this module does.
//!
//! The model's table says which registers exist and what a write may change. The kernel's own idea of both differs
//! between versions and vendors, so it gets only the registers that change how the guest executes ([`IN_KERNEL`]); a
//! filter sends everything else out to [`Bank`], which follows the table, as the software CPU does. What is not in
//! the table is #GP(0).
//!
//! | register | who | why |
//! |---|---|---|
//! | TSC, TSC_ADJUST, TSC_DEADLINE | kernel | they move the counter and arm the timer |
//! | APIC_BASE, x2APIC 0x800 to 0x83f | kernel | the local APIC is its (x2APIC registers cannot be filtered) |
//! | EFER, STAR, LSTAR, CSTAR, SFMASK, SYSENTER_*, FS_BASE, GS_BASE, KERNEL_GS_BASE, TSC_AUX | kernel | instructions use them |
//! | PAT | kernel | page tables refer to it; an AMD processor honours it |
//! | SPEC_CTRL, PRED_CMD | kernel | real where the host has them; the model has no bits in them where not |
//! | KVM wall clock, system time, steal time, old numbers too | kernel | it writes the records |
//! | ARCH_CAPABILITIES | here | the model's promise; given to the kernel too, which picks work-arounds by it |
//! | MTRRs | here | without effect: there is no device that looks past the caches |
//! | DEBUGCTL, last branches | here | without effect; what the kernel keeps of them differs between vendors |
//! | MISC_ENABLE, MCG_*, PLATFORM_*, BIOS_SIGN_ID | here | plain values of the model |
//! | AMD SYSCFG, HWCR, DE_CFG, TOP_MEM … | here | plain values of the model |
//! | FEATURE_CONTROL, VMX, SVM, PMU, everything else | nobody | not in the model: #GP(0) |
//!
//! A register of the first group that the kernel refuses (its processor lacks it) is kept here too.

use std::io;
use std::sync::Arc;

use atoll_machine::backend::BackendError;
use atoll_machine::cpu::model::{CpuModel, MsrEntry, MsrKind};
use atoll_machine::cpu::msr::index as msr;
use kvm_bindings::{Msrs, kvm_msr_entry};
use kvm_ioctls::{MsrFilterDefaultAction, MsrFilterRange, MsrFilterRangeFlags, VcpuFd, VmFd};

use crate::host::host;

/// Registers that the kernel answers, sorted.
const IN_KERNEL: &[u32] = &[
    msr::TSC,
    msr::KVM_WALL_CLOCK_OLD,
    msr::KVM_SYSTEM_TIME_OLD,
    msr::APIC_BASE,
    msr::TSC_ADJUST,
    msr::SPEC_CTRL,
    msr::PRED_CMD,
    msr::SYSENTER_CS,
    msr::SYSENTER_ESP,
    msr::SYSENTER_EIP,
    msr::PAT,
    msr::TSC_DEADLINE,
    msr::KVM_WALL_CLOCK,
    msr::KVM_SYSTEM_TIME,
    msr::KVM_STEAL_TIME,
    msr::EFER,
    msr::STAR,
    msr::LSTAR,
    msr::CSTAR,
    msr::SFMASK,
    msr::FS_BASE,
    msr::GS_BASE,
    msr::KERNEL_GS_BASE,
    msr::TSC_AUX,
];

/// Ranges of the filter: first register and number. Outside them everything comes out.
const RANGES: [(u32, u32); 3] = [(0, 0x700), (0x4b56_4d00, 8), (0xc000_0080, 0x84)];

fn in_kernel(model: &CpuModel, index: u32) -> bool {
    let Some(entry) = model.msr(index) else { return false };
    match index {
        // Without bits the register still exists in the model, but not in the host's processor.
        msr::SPEC_CTRL => entry.kind != MsrKind::Plain { writable: 0 },
        msr::PRED_CMD => entry.kind != MsrKind::Command { allowed: 0 },
        _ => IN_KERNEL.binary_search(&index).is_ok(),
    }
}

/// The bits of one range: 1 where the kernel answers.
fn bitmap(model: &CpuModel, first: u32, count: u32) -> Vec<u8> {
    let mut bits = vec![0; count.div_ceil(8) as usize];
    for n in (0..count).filter(|n| in_kernel(model, first + n)) {
        bits[(n / 8) as usize] |= 1 << (n % 8);
    }
    bits
}

/// Makes the VM send every register out that the kernel is not to answer.
pub(crate) fn install_filter(vm: &VmFd, model: &CpuModel) -> Result<(), BackendError> {
    let bitmaps = RANGES.map(|(first, count)| bitmap(model, first, count));
    let mut ranges = Vec::new();
    for (&(base, msr_count), bitmap) in RANGES.iter().zip(&bitmaps) {
        let flags = MsrFilterRangeFlags::READ | MsrFilterRangeFlags::WRITE;
        ranges.push(MsrFilterRange { flags, base, msr_count, bitmap });
    }
    vm.set_msr_filter(MsrFilterDefaultAction::DENY, &ranges).map_err(host("setting the MSR filter"))
}

/// Registers with fields of their own in `CpuState`, and aliases.
pub(crate) fn has_own_field(index: u32) -> bool {
    matches!(index, msr::EFER | msr::TSC | msr::APIC_BASE | msr::TSC_DEADLINE | msr::FS_BASE | msr::GS_BASE)
        || matches!(index, msr::KVM_WALL_CLOCK_OLD | msr::KVM_SYSTEM_TIME_OLD)
}

/// Registers that keep the model's value whatever was saved.
fn keeps_reset(kind: MsrKind) -> bool {
    matches!(kind, MsrKind::ReadOnly | MsrKind::WriteIgnored)
}

/// One register of the model on one vCPU.
#[derive(Clone, Copy, Debug)]
struct Slot {
    entry: MsrEntry,
    /// The kernel answers it and has its value.
    kernel: bool,
    /// Its value where it is kept here; what a state said of it where the kernel cannot keep it.
    value: u64,
}

/// The registers of one vCPU.
#[derive(Clone, Debug)]
pub(crate) struct Bank {
    model: Arc<CpuModel>,
    slots: Vec<Slot>,
}

impl Bank {
    /// All registers at their reset values. `has` tells whether the kernel gives a register to user space.
    pub(crate) fn new(model: &Arc<CpuModel>, has: impl Fn(u32) -> bool) -> Self {
        let slot = |entry: &MsrEntry| Slot {
            entry: *entry,
            kernel: in_kernel(model, entry.index) && (!entry.readable() || has(entry.index)),
            value: entry.reset,
        };
        Self { model: model.clone(), slots: model.msrs().iter().map(slot).collect() }
    }

    /// As [`Bank::new`] for `fd`.
    pub(crate) fn probe(model: &Arc<CpuModel>, fd: &VcpuFd) -> Self {
        let wanted: Vec<u32> = IN_KERNEL.iter().copied().filter(|i| in_kernel(model, *i)).collect();
        let readable: Vec<u32> =
            wanted.into_iter().filter(|i| model.msr(*i).is_some_and(MsrEntry::readable)).collect();
        // One request tells it all where the host lacks nothing.
        let all = read_list(fd, &readable).is_ok();
        Self::new(model, |index| all || read(fd, [index]).is_ok())
    }

    fn slot(&self, index: u32) -> Option<&Slot> {
        self.slots.get(self.slots.binary_search_by_key(&index, |s| s.entry.index).ok()?)
    }

    fn slot_mut(&mut self, index: u32) -> Option<&mut Slot> {
        let at = self.slots.binary_search_by_key(&index, |s| s.entry.index).ok()?;
        self.slots.get_mut(at)
    }

    /// Registers of `CpuState::msrs` in order: number, and the value where it is kept here.
    pub(crate) fn saved(&self) -> impl Iterator<Item = (u32, Option<u64>)> + '_ {
        let saved = self.slots.iter().filter(|s| s.entry.readable() && !has_own_field(s.entry.index));
        saved.map(|s| (s.entry.index, (!s.kernel).then_some(s.value)))
    }

    /// What a state said last of a register that the kernel has (see [`Bank::restore`]).
    pub(crate) fn wanted(&self, index: u32) -> Option<u64> {
        self.slot(index).map(|s| s.value)
    }

    /// Takes the registers of a state, which was checked; what it does not name is reset. Returns what the kernel
    /// is to have.
    pub(crate) fn restore(&mut self, msrs: &[(u32, u64)]) -> Vec<(u32, u64)> {
        for slot in &mut self.slots {
            slot.value = slot.entry.reset;
        }
        for &(index, value) in msrs {
            if let Some(slot) = self.slot_mut(index)
                && !keeps_reset(slot.entry.kind)
            {
                slot.value = value;
            }
        }
        let kernels = self.slots.iter().filter(|s| s.kernel && s.entry.readable());
        kernels.filter(|s| !has_own_field(s.entry.index)).map(|s| (s.entry.index, s.value)).collect()
    }

    /// RDMSR that the kernel did not answer; `None` is #GP(0).
    pub(crate) fn read(&self, index: u32) -> Option<u64> {
        let slot = self.slot(index)?;
        (!slot.kernel && slot.entry.readable()).then_some(slot.value)
    }

    /// WRMSR that the kernel did not carry out; false is #GP(0).
    pub(crate) fn write(&mut self, index: u32, value: u64) -> bool {
        let bits = self.model.linear_bits();
        let Some(slot) = self.slot_mut(index) else { return false };
        if index == msr::KVM_STEAL_TIME && value & 0x3e == 0 {
            // A kernel that does not account for its threads cannot tell. The guest sees no time stolen.
            slot.value = value;
            return true;
        }
        if slot.kernel {
            // The kernel has it and refused this value.
            return false;
        }
        match slot.entry.write(slot.value, value, bits) {
            Ok(new) => {
                slot.value = new;
                true
            }
            Err(_) => false,
        }
    }
}

/// Reads registers; an error if the kernel does not give them all.
pub(crate) fn read_list(fd: &VcpuFd, indices: &[u32]) -> io::Result<Vec<u64>> {
    let entries: Vec<_> =
        indices.iter().map(|&index| kvm_msr_entry { index, ..Default::default() }).collect();
    let mut list = Msrs::from_entries(&entries).map_err(|e| io::Error::other(format!("{e:?}")))?;
    let count = fd.get_msrs(&mut list)?;
    match indices.get(count) {
        Some(index) => Err(io::Error::other(format!("the kernel does not have register {index:#x}"))),
        None => Ok(list.as_slice().iter().map(|entry| entry.data).collect()),
    }
}

/// As [`read_list`].
pub(crate) fn read<const N: usize>(fd: &VcpuFd, indices: [u32; N]) -> io::Result<[u64; N]> {
    read_list(fd, &indices)?
        .try_into()
        .map_err(|_| io::Error::other("the kernel gave another number of registers"))
}

/// Writes registers. An error names the first that the kernel does not take.
pub(crate) fn write_list(fd: &VcpuFd, registers: &[(u32, u64)]) -> io::Result<()> {
    let entry = |&(index, data): &(u32, u64)| kvm_msr_entry { index, data, ..Default::default() };
    let entries: Vec<_> = registers.iter().map(entry).collect();
    let list = Msrs::from_entries(&entries).map_err(|e| io::Error::other(format!("{e:?}")))?;
    let count = fd.set_msrs(&list)?;
    match registers.get(count) {
        Some((index, value)) => {
            Err(io::Error::other(format!("register {index:#x} does not take {value:#x} on this host")))
        }
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use atoll_machine::cpu::assurances::Assurances;
    use atoll_machine::cpu::feature::{Feature, FeatureSet};
    use atoll_machine::cpu::host::{HostCpu, Vendor};

    fn model(vendor: Vendor) -> Arc<CpuModel> {
        let host = HostCpu { vendor, features: FeatureSet::of(Feature::ALL), tsc_khz: None };
        Arc::new(CpuModel::resolve("atoll-2026", &host, 2_600_000).unwrap())
    }

    fn allowed(model: &CpuModel, index: u32) -> bool {
        RANGES.iter().any(|&(first, count)| {
            let n = index.wrapping_sub(first);
            n < count && bitmap(model, first, count)[(n / 8) as usize] >> (n % 8) & 1 != 0
        })
    }

    #[test]
    fn the_filter_lets_exactly_the_kernels_registers_pass() {
        assert!(IN_KERNEL.is_sorted());
        for vendor in [Vendor::Intel, Vendor::Amd] {
            let model = model(vendor);
            for entry in model.msrs() {
                assert_eq!(
                    allowed(&model, entry.index),
                    IN_KERNEL.contains(&entry.index),
                    "{:#x}",
                    entry.index
                );
            }
            // FEATURE_CONTROL, a VMX capability, VM_CR, VM_HSAVE_PA, PMU, a range's neighbour.
            for hidden in [0x3a, 0x480, 0xc001_0114, 0xc001_0117, 0xc1, 0x186, 0x4b56_4d04, 0xc000_0104] {
                assert!(!allowed(&model, hidden), "{hidden:#x}");
            }
            let largest = kvm_bindings::KVM_MSR_FILTER_MAX_BITMAP_SIZE;
            assert!(RANGES.iter().all(|(_, count)| count.div_ceil(8) <= largest));
        }
    }

    #[test]
    fn controls_that_the_host_lacks_stay_outside_the_kernel() {
        let bare = CpuModel::clone(&model(Vendor::Intel)).with_assurances(Assurances::NONE);
        assert!(!allowed(&bare, msr::SPEC_CTRL) && !allowed(&bare, msr::PRED_CMD));
        let mut bank = Bank::new(&Arc::new(bare), |_| true);
        assert_eq!(bank.read(msr::SPEC_CTRL), Some(0));
        assert!(!bank.write(msr::SPEC_CTRL, 1) && bank.write(msr::SPEC_CTRL, 0));
        assert!(!bank.write(msr::PRED_CMD, 1));
    }

    #[test]
    fn the_bank_follows_the_models_rules() {
        let mut bank = Bank::new(&model(Vendor::Intel), |_| true);
        assert_eq!(bank.read(msr::MTRR_CAP), Some(0x508));
        assert!(!bank.write(msr::MTRR_CAP, 0x508), "read only");
        assert!(bank.write(msr::MTRR_PHYS_BASE_0, 6) && !bank.write(msr::MTRR_PHYS_BASE_0, 7));
        assert_eq!(bank.read(msr::MTRR_PHYS_BASE_0), Some(6));
        assert!(bank.write(msr::BIOS_SIGN_ID, 99));
        assert_eq!(bank.read(msr::BIOS_SIGN_ID), Some(1 << 32), "writes do nothing");
        for absent in [0x3a, 0x1a2, 0x480, 0xdead_beef] {
            assert!(bank.read(absent).is_none() && !bank.write(absent, 0), "{absent:#x}");
        }
        // What the kernel answers never comes here but when it refuses.
        assert!(bank.read(msr::LSTAR).is_none() && !bank.write(msr::LSTAR, 1 << 63));
        assert!(bank.read(msr::PRED_CMD).is_none(), "a command cannot be read");
    }

    #[test]
    fn registers_that_the_kernel_lacks_are_kept_here() {
        let mut bank = Bank::new(&model(Vendor::Amd), |index| index != msr::TSC_AUX);
        assert!(bank.write(msr::TSC_AUX, 5) && !bank.write(msr::TSC_AUX, 1 << 32));
        assert_eq!(bank.read(msr::TSC_AUX), Some(5));
        let kernels = bank.restore(&[(msr::TSC_AUX, 7), (msr::STAR, 8), (msr::AMD_SYSCFG, 1 << 18)]);
        assert_eq!(bank.read(msr::TSC_AUX), Some(7));
        assert_eq!(bank.read(msr::AMD_SYSCFG), Some(1 << 18));
        assert!(kernels.contains(&(msr::STAR, 8)) && kernels.contains(&(msr::LSTAR, 0)));
        assert!(kernels.iter().all(|(i, _)| *i != msr::TSC_AUX && *i != msr::EFER && *i != msr::PRED_CMD));
        bank.restore(&[]);
        assert_eq!((bank.read(msr::TSC_AUX), bank.read(msr::AMD_SYSCFG)), (Some(0), Some(0)), "reset");
    }

    #[test]
    fn saved_registers_are_sorted_and_without_those_that_have_fields() {
        let bank = Bank::new(&model(Vendor::Intel), |_| true);
        let list: Vec<_> = bank.saved().collect();
        assert!(list.is_sorted_by_key(|(index, _)| *index) && list.len() > 40);
        assert!(list.iter().all(|(index, _)| !has_own_field(*index) && *index != msr::PRED_CMD));
        assert!(list.iter().any(|&(index, value)| index == msr::LSTAR && value.is_none()));
    }
}
