//! What CPUID answers: leaf by leaf, from the model alone.
//!
//! Specifications: Intel SDM vol. 2A, CPUID; AMD APM vol. 3 appendix E; for 0x4000_00xx the Linux kernel's
//! description of KVM's CPUID leaves.

mod basic;
mod extended;
mod kvm;

use super::host::{CpuidResult, Vendor};
use super::model::CpuModel;
use super::topology::Topology;

/// What of the processor's state CPUID shows.
#[derive(Clone, Copy, Debug)]
pub struct CpuidContext<'a> {
    /// The processor's APIC id.
    pub apic_id: u32,
    /// The machine's topology.
    pub topology: &'a Topology,
    /// CR4.OSXSAVE.
    pub os_xsave: bool,
    /// XCR0.
    pub xcr0: u64,
    /// IA32_APIC_BASE bit 11.
    pub apic_enabled: bool,
}

/// Caches that the models report, per vendor: level, type (1 data, 2 instruction, 3 unified), KiB, ways.
const INTEL_CACHES: [(u32, u32, u32, u32); 4] =
    [(1, 1, 48, 12), (1, 2, 32, 8), (2, 3, 2048, 16), (3, 3, 32768, 16)];
const AMD_CACHES: [(u32, u32, u32, u32); 4] =
    [(1, 1, 32, 8), (1, 2, 32, 8), (2, 3, 1024, 8), (3, 3, 32768, 16)];

pub(super) fn answer(model: &CpuModel, leaf: u32, subleaf: u32, ctx: &CpuidContext<'_>) -> CpuidResult {
    match leaf {
        0..=0x3fff_ffff if leaf <= basic::max_leaf(model) => basic::answer(model, leaf, subleaf, ctx),
        0x4000_0000..=kvm::MAX_LEAF => kvm::answer(model, leaf),
        0x8000_0000..=0xffff_ffff if leaf <= extended::max_leaf(model) => {
            extended::answer(model, leaf, subleaf, ctx)
        }
        // Beyond the last leaf Intel repeats the highest basic one, AMD answers zero.
        _ => match model.vendor {
            Vendor::Intel => basic::answer(model, basic::max_leaf(model), subleaf, ctx),
            Vendor::Amd => CpuidResult::default(),
        },
    }
}

/// A cache in the layout that Intel's leaf 4 and AMD's leaf 0x8000_001d share, without the fields that count
/// processors. Lines have 64 bytes.
fn cache(list: &[(u32, u32, u32, u32)], subleaf: u32, sharing: impl Fn(u32) -> u32) -> CpuidResult {
    let Some(&(level, kind, kib, ways)) = list.get(subleaf as usize) else { return CpuidResult::default() };
    let sets = kib * 1024 / 64 / ways;
    const SELF_INITIALISING: u32 = 1 << 8;
    CpuidResult {
        eax: kind | level << 5 | SELF_INITIALISING | (sharing(level).saturating_sub(1) & 0xfff) << 14,
        ebx: 63 | (ways - 1) << 22,
        ecx: sets - 1,
        edx: 0,
    }
}

/// Logical processors per package.
fn per_package(topology: &Topology) -> u32 {
    topology.cores.max(1).saturating_mul(topology.threads.max(1))
}
