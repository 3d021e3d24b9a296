//! Model-specific registers: which exist, what they hold after RESET, and what a write may change.
//!
//! The table is part of the CPU model. A register that is not in it does not exist: RDMSR and WRMSR fault with
//! #GP(0). The x2APIC registers 0x800..=0x83f belong to the local APIC and are not listed.
//!
//! Under the software CPU the registers about speculation say: not vulnerable to anything that a guest would
//! otherwise work around, and enhanced IBRS instead of retpolines. Guest user and guest kernel share one host
//! process there, so isolation inside a guest against speculation is the host's affair; work-arounds inside the
//! guest would cost much and add nothing. On other backends they say what the host says: see
//! [`super::assurances`].
//!
//! Specifications: Intel SDM vol. 4; AMD APM vol. 2 appendix A; the KVM registers follow the Linux kernel's
//! description of its paravirtual interface.

use super::assurances::Assurances;
use super::feature::{Feature, FeatureSet};
use super::host::Vendor;

/// Numbers of the registers that engines name.
#[allow(missing_docs)]
pub mod index {
    pub const KVM_WALL_CLOCK_OLD: u32 = 0x11;
    pub const KVM_SYSTEM_TIME_OLD: u32 = 0x12;
    pub const TSC: u32 = 0x10;
    pub const PLATFORM_ID: u32 = 0x17;
    pub const APIC_BASE: u32 = 0x1b;
    pub const TSC_ADJUST: u32 = 0x3b;
    pub const SPEC_CTRL: u32 = 0x48;
    pub const PRED_CMD: u32 = 0x49;
    pub const BIOS_SIGN_ID: u32 = 0x8b;
    pub const PLATFORM_INFO: u32 = 0xce;
    pub const MTRR_CAP: u32 = 0xfe;
    pub const ARCH_CAPABILITIES: u32 = 0x10a;
    pub const SYSENTER_CS: u32 = 0x174;
    pub const SYSENTER_ESP: u32 = 0x175;
    pub const SYSENTER_EIP: u32 = 0x176;
    pub const MCG_CAP: u32 = 0x179;
    pub const MCG_STATUS: u32 = 0x17a;
    pub const MISC_ENABLE: u32 = 0x1a0;
    pub const DEBUGCTL: u32 = 0x1d9;
    pub const MTRR_PHYS_BASE_0: u32 = 0x200;
    pub const MTRR_FIX_64K_00000: u32 = 0x250;
    pub const MTRR_FIX_16K_80000: u32 = 0x258;
    pub const MTRR_FIX_4K_C0000: u32 = 0x268;
    pub const PAT: u32 = 0x277;
    pub const MTRR_DEF_TYPE: u32 = 0x2ff;
    pub const TSC_DEADLINE: u32 = 0x6e0;
    pub const X2APIC_FIRST: u32 = 0x800;
    pub const X2APIC_LAST: u32 = 0x83f;
    pub const KVM_WALL_CLOCK: u32 = 0x4b56_4d00;
    pub const KVM_SYSTEM_TIME: u32 = 0x4b56_4d01;
    pub const KVM_STEAL_TIME: u32 = 0x4b56_4d03;
    pub const EFER: u32 = 0xc000_0080;
    pub const STAR: u32 = 0xc000_0081;
    pub const LSTAR: u32 = 0xc000_0082;
    pub const CSTAR: u32 = 0xc000_0083;
    pub const SFMASK: u32 = 0xc000_0084;
    pub const FS_BASE: u32 = 0xc000_0100;
    pub const GS_BASE: u32 = 0xc000_0101;
    pub const KERNEL_GS_BASE: u32 = 0xc000_0102;
    pub const TSC_AUX: u32 = 0xc000_0103;
    pub const AMD_SYSCFG: u32 = 0xc001_0010;
    pub const AMD_HWCR: u32 = 0xc001_0015;
    pub const AMD_DE_CFG: u32 = 0xc001_1029;
}

/// Number of variable-range MTRRs.
pub const MTRR_VARIABLE_COUNT: u32 = 8;

/// What accesses to a register do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MsrKind {
    /// Holds what is written; a write that changes a bit outside `writable` faults.
    Plain {
        /// Bits that a write may change.
        writable: u64,
    },
    /// Holds what is written in `writable`; other bits keep their value.
    Masked {
        /// Bits that a write may change.
        writable: u64,
    },
    /// Holds a canonical address; others fault.
    Canonical,
    /// Eight memory types, one per byte: 0, 1, 4, 5, 6, and 7 (UC-) if `uncached_minus`.
    MemoryTypes {
        /// Whether type 7 is allowed: in the PAT, not in MTRRs.
        uncached_minus: bool,
    },
    /// A memory type in bits 7..0 besides the bits of `writable` (IA32_MTRR_DEF_TYPE, IA32_MTRR_PHYSBASEn).
    MemoryType {
        /// Bits that a write may change, besides the type.
        writable: u64,
    },
    /// Reads only; writes fault.
    ReadOnly,
    /// Reads; writes do nothing.
    WriteIgnored,
    /// Reads fault; a write with a bit outside `allowed` faults, others do nothing.
    Command {
        /// Bits that may be written.
        allowed: u64,
    },
    /// The engine keeps the value elsewhere and knows the rules: see the register's own section of the SDM.
    Engine,
}

/// One register of a model.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MsrEntry {
    /// Number in ECX.
    pub index: u32,
    /// Value after RESET. INIT keeps the values of `Engine`-less registers.
    pub reset: u64,
    /// What accesses do.
    pub kind: MsrKind,
}

/// WRMSR or RDMSR that faults with #GP(0).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MsrFault;

impl MsrEntry {
    /// What the register holds after `value` is written over `old`, for every kind but [`MsrKind::Engine`]
    /// (which returns `value`). `linear_bits` is the model's.
    pub fn write(&self, old: u64, value: u64, linear_bits: u8) -> Result<u64, MsrFault> {
        let accept = |ok: bool| if ok { Ok(value) } else { Err(MsrFault) };
        match self.kind {
            MsrKind::Plain { writable } => accept((old ^ value) & !writable == 0),
            MsrKind::Masked { writable } => Ok(old & !writable | value & writable),
            MsrKind::Canonical => accept(is_canonical(value, linear_bits)),
            MsrKind::MemoryTypes { uncached_minus } => {
                accept(value.to_le_bytes().iter().all(|t| is_memory_type(*t, uncached_minus)))
            }
            MsrKind::MemoryType { writable } => {
                accept((old ^ value) & !(writable | 0xff) == 0 && is_memory_type(value as u8, false))
            }
            MsrKind::ReadOnly => Err(MsrFault),
            MsrKind::WriteIgnored => Ok(old),
            MsrKind::Command { allowed } => {
                if value & !allowed == 0 {
                    Ok(old)
                } else {
                    Err(MsrFault)
                }
            }
            MsrKind::Engine => Ok(value),
        }
    }

    /// Whether RDMSR works.
    pub fn readable(&self) -> bool {
        !matches!(self.kind, MsrKind::Command { .. })
    }
}

/// Whether `address` is the sign extension of its low `bits` bits.
pub fn is_canonical(address: u64, bits: u8) -> bool {
    let shift = 64 - u32::from(bits.clamp(1, 64));
    (address as i64) << shift >> shift == address as i64
}

fn is_memory_type(kind: u8, uncached_minus: bool) -> bool {
    matches!(kind, 0 | 1 | 4 | 5 | 6) || (kind == 7 && uncached_minus)
}

/// The table of a model, sorted by index.
pub(super) fn table(
    vendor: Vendor,
    features: &FeatureSet,
    assurances: Assurances,
    physical_bits: u8,
) -> Vec<MsrEntry> {
    let mut list = common(features, physical_bits);
    // IBRS, STIBP, SSBD; IBPB.
    list.push(entry(index::SPEC_CTRL, 0, MsrKind::Plain { writable: assurances.spec_ctrl_bits(vendor) }));
    list.push(entry(index::PRED_CMD, 0, MsrKind::Command { allowed: assurances.pred_cmd_bits(vendor) }));
    match vendor {
        Vendor::Intel => list.extend(intel(assurances)),
        Vendor::Amd => list.extend(amd(assurances)),
    }
    list.sort_by_key(|e| e.index);
    list
}

fn entry(index: u32, reset: u64, kind: MsrKind) -> MsrEntry {
    MsrEntry { index, reset, kind }
}

/// PAT after RESET: WB, WT, UC-, UC, twice (SDM vol. 3, 12.12.4).
const PAT_RESET: u64 = 0x0007_0406_0007_0406;

fn common(features: &FeatureSet, physical_bits: u8) -> Vec<MsrEntry> {
    use MsrKind::*;
    use index::*;
    let address = ((1u64 << physical_bits) - 1) & !0xfff;
    let mut list = vec![
        entry(0, 0, ReadOnly), // P5_MC_ADDR: no machine-check banks
        entry(1, 0, ReadOnly), // P5_MC_TYPE
        entry(TSC, 0, Engine),
        entry(KVM_WALL_CLOCK_OLD, 0, Engine),
        entry(KVM_SYSTEM_TIME_OLD, 0, Engine),
        entry(APIC_BASE, 0xfee0_0800, Engine),
        // WC, fixed ranges, 8 variable ranges.
        entry(MTRR_CAP, 1 << 10 | 1 << 8 | u64::from(MTRR_VARIABLE_COUNT), ReadOnly),
        entry(MCG_CAP, 0, ReadOnly), // no banks
        entry(MCG_STATUS, 0, Plain { writable: 0b111 }),
        entry(DEBUGCTL, 0, Plain { writable: 0b11 }), // LBR, BTF
        entry(0x1db, 0, ReadOnly),                    // last branch from
        entry(0x1dc, 0, ReadOnly),                    // last branch to
        entry(0x1dd, 0, ReadOnly),                    // last interrupt from
        entry(0x1de, 0, ReadOnly),                    // last interrupt to
        entry(PAT, PAT_RESET, MemoryTypes { uncached_minus: true }),
        entry(MTRR_DEF_TYPE, 0, MemoryType { writable: 1 << 11 | 1 << 10 }),
        entry(KVM_WALL_CLOCK, 0, Engine),
        entry(KVM_SYSTEM_TIME, 0, Engine),
        entry(KVM_STEAL_TIME, 0, Engine),
        entry(EFER, 0, Engine),
        entry(STAR, 0, Plain { writable: !0 }),
        entry(LSTAR, 0, Canonical),
        entry(CSTAR, 0, Canonical),
        entry(SFMASK, 0, Masked { writable: 0xffff_ffff }),
        entry(FS_BASE, 0, Engine),
        entry(GS_BASE, 0, Engine),
        entry(KERNEL_GS_BASE, 0, Canonical),
    ];
    for n in 0..MTRR_VARIABLE_COUNT {
        list.push(entry(MTRR_PHYS_BASE_0 + 2 * n, 0, MemoryType { writable: address }));
        list.push(entry(MTRR_PHYS_BASE_0 + 2 * n + 1, 0, Plain { writable: address | 1 << 11 }));
    }
    let fixed = [MTRR_FIX_64K_00000, MTRR_FIX_16K_80000, MTRR_FIX_16K_80000 + 1];
    for index in fixed.into_iter().chain((0..8).map(|n| MTRR_FIX_4K_C0000 + n)) {
        list.push(entry(index, 0, MemoryTypes { uncached_minus: false }));
    }
    if features.has(Feature::TscAdjust) {
        list.push(entry(TSC_ADJUST, 0, Engine));
    }
    if features.has(Feature::TscDeadline) {
        list.push(entry(TSC_DEADLINE, 0, Engine));
    }
    if features.has(Feature::Rdtscp) {
        list.push(entry(TSC_AUX, 0, Plain { writable: 0xffff_ffff }));
    }
    list
}

fn intel(assurances: Assurances) -> Vec<MsrEntry> {
    use MsrKind::*;
    use index::*;
    // Fast strings on; branch trace store and precise event sampling unavailable.
    let misc_enable = 1 | 1 << 11 | 1 << 12;
    // Fast strings, thermal monitor, SpeedStep, CPUID limit, xTPR, execute-disable off.
    let misc_writable = 1 | 1 << 3 | 1 << 16 | 1 << 22 | 1 << 23 | 1 << 34;
    vec![
        entry(PLATFORM_ID, 0, ReadOnly),
        entry(BIOS_SIGN_ID, 1 << 32, WriteIgnored), // microcode revision 1
        entry(PLATFORM_INFO, 0, ReadOnly),
        entry(ARCH_CAPABILITIES, assurances.arch_capabilities, ReadOnly),
        entry(SYSENTER_CS, 0, Masked { writable: 0xffff_ffff }),
        entry(SYSENTER_ESP, 0, Canonical),
        entry(SYSENTER_EIP, 0, Canonical),
        entry(MISC_ENABLE, misc_enable, Masked { writable: misc_writable }),
    ]
}

fn amd(assurances: Assurances) -> Vec<MsrEntry> {
    use MsrKind::*;
    use index::*;
    vec![
        entry(BIOS_SIGN_ID, 0x0a10_113e, WriteIgnored), // patch level
        entry(SYSENTER_CS, 0, Masked { writable: 0xffff_ffff }),
        entry(SYSENTER_ESP, 0, Masked { writable: 0xffff_ffff }),
        entry(SYSENTER_EIP, 0, Masked { writable: 0xffff_ffff }),
        entry(AMD_SYSCFG, 0, Masked { writable: 0x7c_0000 }),
        // TscFreqSel: the TSC counts at the P0 frequency. McStatusWrEn may be set.
        entry(AMD_HWCR, 1 << 24, Masked { writable: 1 << 18 }),
        entry(0xc001_001a, 0, WriteIgnored), // TOP_MEM
        entry(0xc001_001d, 0, WriteIgnored), // TOP_MEM2
        entry(0xc001_001f, 0, WriteIgnored), // NB_CFG
        entry(0xc001_0055, 0, WriteIgnored), // interrupt pending message
        entry(0xc001_0058, 0, WriteIgnored), // MMIO configuration base: ECAM is described by ACPI
        entry(0xc001_1022, 0, WriteIgnored), // DC_CFG
        entry(AMD_DE_CFG, u64::from(assurances.lfence_serialises()) << 1, WriteIgnored),
        entry(0xc001_102a, 0, WriteIgnored), // BU_CFG2
    ]
}
