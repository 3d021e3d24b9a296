//! What a processor promises about speculative execution, and which remedies it has.
//!
//! A guest leaves out work-arounds where its processor says that it is not vulnerable. The software CPU may say so
//! of everything (see [`super::msr`]); a backend that runs the guest on the host's processor may only repeat what
//! that processor says. The set belongs to the identity of a machine, as its features do: a guest chooses its
//! work-arounds once, when it starts.
//!
//! | kind | example | a machine that has it may move to |
//! |---|---|---|
//! | promise: not vulnerable | RDCL_NO, SRSO_NO | hosts that promise it too |
//! | control: a bit that the guest sets or a command | IBRS, IBPB, SSBD | hosts that have it too |
//! | remedy: an instruction clears buffers | MD_CLEAR, FB_CLEAR | hosts that have it, or that need none |
//!
//! Specifications: Intel SDM vol. 4, IA32_ARCH_CAPABILITIES and vol. 2A, CPUID leaf 7; AMD APM vol. 3, CPUID
//! 0x8000_0008 and 0x8000_0021.

use super::feature::Register;
use super::host::{CpuidResult, Vendor};

/// A set of promises, controls and remedies, in the bits that show them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Assurances {
    /// IA32_ARCH_CAPABILITIES (Intel).
    pub arch_capabilities: u64,
    /// CPUID leaf 7 EDX (Intel): IBRS and IBPB 26, STIBP 27, IA32_ARCH_CAPABILITIES 29, SSBD 31; MD_CLEAR 10.
    pub leaf_7_edx: u32,
    /// CPUID leaf 0x8000_0008 EBX (AMD): x87 error pointers always saved 2, IBPB 12, IBRS 14, STIBP 15, IBRS
    /// protects from same mode 19, SSBD 24, no speculative store bypass 26, no branch type confusion 29.
    pub extended_8_ebx: u32,
    /// CPUID leaf 0x8000_0021 EAX (AMD): no nested data breakpoints 0, LFENCE serialises 2, a null selector clears
    /// the base 6, automatic IBRS 8, no SMM control register 9, no speculative return overflow 29; VERW clears 5, SBPB
    /// 27, IBPB clears branch types 28, no return overflow between user and kernel 30.
    pub extended_21_eax: u32,
    /// CPUID leaf 0x8000_0021 ECX (AMD): no transient scheduler attack 1 and 2.
    pub extended_21_ecx: u32,
}

/// RDCL_NO 0, IBRS_ALL 1, SKIP_L1DFL_VMENTRY 3, SSB_NO 4, MDS_NO 5, PSCHANGE_MC_NO 6, TAA_NO 8, SBDR_SSDP_NO 13,
/// FBSDP_NO 14, PSDP_NO 15, BHI_NO 20, PBRSB_NO 24, GDS_NO 26, RFDS_NO 27, ITS_NO 62.
const NOT_VULNERABLE: u64 = 1
    | 1 << 1
    | 1 << 3
    | 1 << 4
    | 1 << 5
    | 1 << 6
    | 1 << 8
    | 1 << 13
    | 1 << 14
    | 1 << 15
    | 1 << 20
    | 1 << 24
    | 1 << 26
    | 1 << 27
    | 1 << 62;

/// Bits of IA32_SPEC_CTRL.
const SPEC_CTRL_IBRS: u64 = 1;
const SPEC_CTRL_STIBP: u64 = 1 << 1;
const SPEC_CTRL_SSBD: u64 = 1 << 2;

impl Assurances {
    /// No promise.
    pub const NONE: Self = Self {
        arch_capabilities: 0,
        leaf_7_edx: 0,
        extended_8_ebx: 0,
        extended_21_eax: 0,
        extended_21_ecx: 0,
    };

    /// Every promise and control that the models have: the software CPU's.
    pub const ALL: Self = Self {
        arch_capabilities: NOT_VULNERABLE,
        leaf_7_edx: 1 << 26 | 1 << 27 | 1 << 29 | 1 << 31,
        extended_8_ebx: 1 << 2 | 1 << 12 | 1 << 14 | 1 << 15 | 1 << 19 | 1 << 24 | 1 << 26 | 1 << 29,
        extended_21_eax: 1 | 1 << 2 | 1 << 6 | 1 << 8 | 1 << 9 | 1 << 29,
        extended_21_ecx: 1 << 1 | 1 << 2,
    };

    /// What processors that break some promise of [`Assurances::ALL`] have instead. FB_CLEAR 17, RFDS_CLEAR 28.
    const REMEDIES: Self = Self {
        arch_capabilities: 1 << 17 | 1 << 28,
        leaf_7_edx: 1 << 10,
        extended_8_ebx: 0,
        extended_21_eax: 1 << 5 | 1 << 27 | 1 << 28 | 1 << 30,
        extended_21_ecx: 0,
    };

    /// What a processor says of itself: its CPUID table and IA32_ARCH_CAPABILITIES (0 where it has none).
    pub fn from_cpuid(cpuid: impl Fn(u32, u32) -> CpuidResult, arch_capabilities: u64) -> Self {
        let (basic, extended) = (cpuid(0, 0).eax, cpuid(0x8000_0000, 0).eax);
        let get = |leaf: u32, register| {
            let last = if leaf >= 0x8000_0000 { extended } else { basic };
            if leaf > last { 0 } else { cpuid(leaf, 0).register(register) }
        };
        let says = Self {
            arch_capabilities,
            leaf_7_edx: get(7, Register::Edx),
            extended_8_ebx: get(0x8000_0008, Register::Ebx),
            extended_21_eax: get(0x8000_0021, Register::Eax),
            extended_21_ecx: get(0x8000_0021, Register::Ecx),
        };
        says.intersection(Self::ALL.union(Self::REMEDIES))
    }

    /// In both sets.
    pub const fn intersection(self, other: Self) -> Self {
        Self {
            arch_capabilities: self.arch_capabilities & other.arch_capabilities,
            leaf_7_edx: self.leaf_7_edx & other.leaf_7_edx,
            extended_8_ebx: self.extended_8_ebx & other.extended_8_ebx,
            extended_21_eax: self.extended_21_eax & other.extended_21_eax,
            extended_21_ecx: self.extended_21_ecx & other.extended_21_ecx,
        }
    }

    /// In either set.
    pub const fn union(self, other: Self) -> Self {
        Self {
            arch_capabilities: self.arch_capabilities | other.arch_capabilities,
            leaf_7_edx: self.leaf_7_edx | other.leaf_7_edx,
            extended_8_ebx: self.extended_8_ebx | other.extended_8_ebx,
            extended_21_eax: self.extended_21_eax | other.extended_21_eax,
            extended_21_ecx: self.extended_21_ecx | other.extended_21_ecx,
        }
    }

    /// What `vendor`'s processors show of the set.
    pub const fn of_vendor(self, vendor: Vendor) -> Self {
        match vendor {
            Vendor::Intel => Self { extended_8_ebx: 0, extended_21_eax: 0, extended_21_ecx: 0, ..self },
            Vendor::Amd => Self { arch_capabilities: 0, leaf_7_edx: 0, ..self },
        }
    }

    /// Whether a machine of `vendor` that was started with this set keeps what it was promised on a backend that
    /// gives `backend`. A backend that is vulnerable to nothing needs no remedy.
    pub fn hold_on(self, vendor: Vendor, backend: Self) -> bool {
        let mut given = backend;
        if backend.intersection(Self::ALL) == Self::ALL {
            given = given.union(Self::REMEDIES);
        }
        let needed = self.of_vendor(vendor);
        needed.intersection(given) == needed
    }

    /// Bits that IA32_SPEC_CTRL has on a processor of `vendor` with this set.
    pub const fn spec_ctrl_bits(self, vendor: Vendor) -> u64 {
        let (word, ibrs, stibp, ssbd) = match vendor {
            Vendor::Intel => (self.leaf_7_edx, 26, 27, 31),
            Vendor::Amd => (self.extended_8_ebx, 14, 15, 24),
        };
        let mut bits = 0;
        if word >> ibrs & 1 != 0 {
            bits |= SPEC_CTRL_IBRS;
        }
        if word >> stibp & 1 != 0 {
            bits |= SPEC_CTRL_STIBP;
        }
        if word >> ssbd & 1 != 0 {
            bits |= SPEC_CTRL_SSBD;
        }
        bits
    }

    /// Bits that may be written to IA32_PRED_CMD: IBPB 0, on AMD also SBPB 7.
    pub const fn pred_cmd_bits(self, vendor: Vendor) -> u64 {
        match vendor {
            Vendor::Intel => (self.leaf_7_edx >> 26 & 1) as u64,
            Vendor::Amd => (self.extended_8_ebx >> 12 & 1 | (self.extended_21_eax >> 27 & 1) << 7) as u64,
        }
    }

    /// Whether LFENCE waits for all earlier instructions (AMD; always so on Intel).
    pub const fn lfence_serialises(self) -> bool {
        self.extended_21_eax >> 2 & 1 != 0
    }

    /// Whether IA32_EFER has AutomaticIBRS (AMD).
    pub const fn automatic_ibrs(self) -> bool {
        self.extended_21_eax >> 8 & 1 != 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// An Intel processor with the Meltdown bug, MD_CLEAR and FB_CLEAR.
    fn leaky() -> Assurances {
        Assurances::from_cpuid(
            |leaf, _| match leaf {
                0 => CpuidResult { eax: 7, ..CpuidResult::default() },
                7 => CpuidResult { edx: 1 << 26 | 1 << 10 | 1 << 3, ..CpuidResult::default() },
                _ => CpuidResult::default(),
            },
            1 << 17 | 1 << 6 | 1 << 50,
        )
    }

    #[test]
    fn only_what_is_known_is_repeated() {
        let host = leaky();
        assert_eq!(host.arch_capabilities, 1 << 17 | 1 << 6);
        assert_eq!(host.leaf_7_edx, 1 << 26 | 1 << 10);
        assert_eq!((host.extended_8_ebx, host.extended_21_eax), (0, 0), "beyond the last leaf");
    }

    #[test]
    fn promises_hold_where_they_are_made_and_remedies_where_none_is_needed() {
        let host = leaky();
        for vendor in [Vendor::Intel, Vendor::Amd] {
            assert!(host.hold_on(vendor, host));
            assert!(host.hold_on(vendor, Assurances::ALL), "the software CPU needs no remedy");
            assert!(Assurances::NONE.hold_on(vendor, host));
            assert!(!Assurances::ALL.hold_on(vendor, host));
        }
        let intel_only = Assurances::ALL.of_vendor(Vendor::Intel);
        assert!(intel_only.hold_on(Vendor::Amd, Assurances::NONE), "shown by no processor of the vendor");
    }

    #[test]
    fn controls_follow_the_vendors_bits() {
        assert_eq!(Assurances::ALL.spec_ctrl_bits(Vendor::Intel), 7);
        assert_eq!(Assurances::ALL.spec_ctrl_bits(Vendor::Amd), 7);
        assert_eq!(leaky().spec_ctrl_bits(Vendor::Intel), 1);
        assert_eq!((leaky().pred_cmd_bits(Vendor::Intel), leaky().pred_cmd_bits(Vendor::Amd)), (1, 0));
        let zen = Assurances { extended_8_ebx: 1 << 12, extended_21_eax: 1 << 27, ..Assurances::NONE };
        assert_eq!(zen.pred_cmd_bits(Vendor::Amd), 0x81);
        assert!(Assurances::ALL.lfence_serialises() && Assurances::ALL.automatic_ibrs());
        assert!(!Assurances::NONE.lfence_serialises() && !Assurances::NONE.automatic_ibrs());
    }
}
