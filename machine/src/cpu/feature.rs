//! The processor features that Atoll knows, where CPUID shows them, and sets of them.

use std::fmt;

/// An output register of CPUID.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum Register {
    Eax,
    Ebx,
    Ecx,
    Edx,
}

macro_rules! features {
    ($($(#[$doc:meta])* $variant:ident = $name:literal, $leaf:literal, $subleaf:literal, $register:ident, $bit:literal;)*) => {
        /// A feature with a CPUID bit of its own.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
        #[repr(u8)]
        pub enum Feature {
            $($(#[$doc])* $variant,)*
        }

        impl Feature {
            /// Every feature.
            pub const ALL: &'static [Feature] = &[$(Feature::$variant,)*];

            /// Its name, as Linux spells it in /proc/cpuinfo where Linux has one.
            pub const fn name(self) -> &'static str {
                match self { $(Feature::$variant => $name,)* }
            }

            /// Where CPUID shows it: leaf, subleaf, register, bit.
            pub const fn location(self) -> (u32, u32, Register, u32) {
                match self { $(Feature::$variant => ($leaf, $subleaf, Register::$register, $bit),)* }
            }
        }
    };
}

features! {
    /// x87.
    Fpu = "fpu", 1, 0, Edx, 0;
    /// Debug extensions (CR4.DE).
    De = "de", 1, 0, Edx, 2;
    /// 4 MiB pages.
    Pse = "pse", 1, 0, Edx, 3;
    /// RDTSC.
    Tsc = "tsc", 1, 0, Edx, 4;
    /// RDMSR and WRMSR.
    Msr = "msr", 1, 0, Edx, 5;
    /// Physical address extension.
    Pae = "pae", 1, 0, Edx, 6;
    /// Machine-check exception.
    Mce = "mce", 1, 0, Edx, 7;
    /// CMPXCHG8B.
    Cx8 = "cx8", 1, 0, Edx, 8;
    /// Local APIC; the bit also follows IA32_APIC_BASE.
    Apic = "apic", 1, 0, Edx, 9;
    /// SYSENTER.
    Sep = "sep", 1, 0, Edx, 11;
    /// Memory type range registers.
    Mtrr = "mtrr", 1, 0, Edx, 12;
    /// Global pages.
    Pge = "pge", 1, 0, Edx, 13;
    /// Machine-check architecture.
    Mca = "mca", 1, 0, Edx, 14;
    /// CMOVcc.
    Cmov = "cmov", 1, 0, Edx, 15;
    /// Page attribute table.
    Pat = "pat", 1, 0, Edx, 16;
    /// 36-bit 4 MiB pages.
    Pse36 = "pse36", 1, 0, Edx, 17;
    /// CLFLUSH.
    Clflush = "clflush", 1, 0, Edx, 19;
    /// MMX.
    Mmx = "mmx", 1, 0, Edx, 23;
    /// FXSAVE and FXRSTOR.
    Fxsr = "fxsr", 1, 0, Edx, 24;
    /// SSE.
    Sse = "sse", 1, 0, Edx, 25;
    /// SSE2.
    Sse2 = "sse2", 1, 0, Edx, 26;
    /// SSE3.
    Sse3 = "sse3", 1, 0, Ecx, 0;
    /// Carry-less multiplication.
    Pclmulqdq = "pclmulqdq", 1, 0, Ecx, 1;
    /// SSSE3.
    Ssse3 = "ssse3", 1, 0, Ecx, 9;
    /// Fused multiply-add.
    Fma = "fma", 1, 0, Ecx, 12;
    /// CMPXCHG16B.
    Cx16 = "cx16", 1, 0, Ecx, 13;
    /// Process-context identifiers.
    Pcid = "pcid", 1, 0, Ecx, 17;
    /// SSE4.1.
    Sse41 = "sse4_1", 1, 0, Ecx, 19;
    /// SSE4.2.
    Sse42 = "sse4_2", 1, 0, Ecx, 20;
    /// x2APIC mode.
    X2apic = "x2apic", 1, 0, Ecx, 21;
    /// MOVBE.
    Movbe = "movbe", 1, 0, Ecx, 22;
    /// POPCNT.
    Popcnt = "popcnt", 1, 0, Ecx, 23;
    /// TSC-deadline mode of the APIC timer.
    TscDeadline = "tsc_deadline_timer", 1, 0, Ecx, 24;
    /// AES-NI.
    Aes = "aes", 1, 0, Ecx, 25;
    /// XSAVE and XCR0.
    Xsave = "xsave", 1, 0, Ecx, 26;
    /// AVX.
    Avx = "avx", 1, 0, Ecx, 28;
    /// Half-precision conversion.
    F16c = "f16c", 1, 0, Ecx, 29;
    /// RDRAND.
    Rdrand = "rdrand", 1, 0, Ecx, 30;
    /// The APIC timer runs in every power state.
    Arat = "arat", 6, 0, Eax, 2;
    /// RDFSBASE and its kin.
    Fsgsbase = "fsgsbase", 7, 0, Ebx, 0;
    /// IA32_TSC_ADJUST.
    TscAdjust = "tsc_adjust", 7, 0, Ebx, 1;
    /// BMI1.
    Bmi1 = "bmi1", 7, 0, Ebx, 3;
    /// AVX2.
    Avx2 = "avx2", 7, 0, Ebx, 5;
    /// Supervisor-mode execution prevention.
    Smep = "smep", 7, 0, Ebx, 7;
    /// BMI2.
    Bmi2 = "bmi2", 7, 0, Ebx, 8;
    /// Fast REP MOVSB and STOSB.
    Erms = "erms", 7, 0, Ebx, 9;
    /// INVPCID.
    Invpcid = "invpcid", 7, 0, Ebx, 10;
    /// RDSEED.
    Rdseed = "rdseed", 7, 0, Ebx, 18;
    /// Supervisor-mode access prevention.
    Smap = "smap", 7, 0, Ebx, 20;
    /// SHA-1 and SHA-256.
    ShaNi = "sha_ni", 7, 0, Ebx, 29;
    /// User-mode instruction prevention.
    Umip = "umip", 7, 0, Ecx, 2;
    /// XSAVEOPT.
    Xsaveopt = "xsaveopt", 0xd, 1, Eax, 0;
    /// XSAVEC.
    Xsavec = "xsavec", 0xd, 1, Eax, 1;
    /// XGETBV with ECX = 1.
    Xgetbv1 = "xgetbv1", 0xd, 1, Eax, 2;
    /// LAHF and SAHF in 64-bit mode.
    LahfLm = "lahf_lm", 0x8000_0001, 0, Ecx, 0;
    /// LZCNT.
    Lzcnt = "abm", 0x8000_0001, 0, Ecx, 5;
    /// SYSCALL.
    Syscall = "syscall", 0x8000_0001, 0, Edx, 11;
    /// Execute-disable pages.
    Nx = "nx", 0x8000_0001, 0, Edx, 20;
    /// 1 GiB pages.
    Pdpe1gb = "pdpe1gb", 0x8000_0001, 0, Edx, 26;
    /// RDTSCP.
    Rdtscp = "rdtscp", 0x8000_0001, 0, Edx, 27;
    /// Long mode.
    Lm = "lm", 0x8000_0001, 0, Edx, 29;
    /// The TSC runs at one rate in every power state.
    InvariantTsc = "nonstop_tsc", 0x8000_0007, 0, Edx, 8;
}

const WORDS: usize = 2;

/// A set of features.
#[derive(Clone, Copy, Default, PartialEq, Eq, Hash)]
pub struct FeatureSet([u64; WORDS]);

impl FeatureSet {
    /// No feature.
    pub const EMPTY: Self = Self([0; WORDS]);

    /// The features listed.
    pub const fn of(features: &[Feature]) -> Self {
        let mut set = [0; WORDS];
        let mut i = 0;
        while i < features.len() {
            let n = features[i] as usize;
            set[n / 64] |= 1 << (n % 64);
            i += 1;
        }
        Self(set)
    }

    /// Whether `feature` is in the set.
    #[inline]
    pub const fn has(&self, feature: Feature) -> bool {
        let n = feature as usize;
        self.0[n / 64] >> (n % 64) & 1 != 0
    }

    /// Adds `feature`.
    pub fn insert(&mut self, feature: Feature) {
        let n = feature as usize;
        self.0[n / 64] |= 1 << (n % 64);
    }

    /// Takes `feature` away.
    pub fn remove(&mut self, feature: Feature) {
        let n = feature as usize;
        self.0[n / 64] &= !(1 << (n % 64));
    }

    /// In either set.
    pub const fn union(self, other: Self) -> Self {
        Self([self.0[0] | other.0[0], self.0[1] | other.0[1]])
    }

    /// In both sets.
    pub const fn intersection(self, other: Self) -> Self {
        Self([self.0[0] & other.0[0], self.0[1] & other.0[1]])
    }

    /// In this set and not in `other`.
    pub const fn difference(self, other: Self) -> Self {
        Self([self.0[0] & !other.0[0], self.0[1] & !other.0[1]])
    }

    /// Whether there is none.
    pub const fn is_empty(&self) -> bool {
        self.0[0] | self.0[1] == 0
    }

    /// The features, in the order of [`Feature::ALL`].
    pub fn iter(&self) -> impl Iterator<Item = Feature> + '_ {
        Feature::ALL.iter().copied().filter(|f| self.has(*f))
    }

    /// The bits of one CPUID output register that the set turns on.
    pub fn bits(&self, leaf: u32, subleaf: u32, register: Register) -> u32 {
        self.iter()
            .map(Feature::location)
            .filter(|(l, s, r, _)| (*l, *s, *r) == (leaf, subleaf, register))
            .fold(0, |bits, (.., bit)| bits | 1 << bit)
    }
}

impl fmt::Display for FeatureSet {
    /// The names, comma separated.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, feature) in self.iter().enumerate() {
            if i > 0 {
                f.write_str(", ")?;
            }
            f.write_str(feature.name())?;
        }
        Ok(())
    }
}

impl fmt::Debug for FeatureSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{{{self}}}")
    }
}
