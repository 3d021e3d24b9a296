//! What the host's processor is and can execute, and what a backend adds to that.

use super::assurances::Assurances;
use super::feature::{Feature, FeatureSet, Register};

/// Whose rules a processor follows where vendors differ (SYSCALL, SYSENTER, some reset values).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Vendor {
    /// GenuineIntel.
    Intel,
    /// AuthenticAMD.
    Amd,
}

impl Vendor {
    /// The 12 characters of CPUID leaf 0.
    pub const fn id(self) -> &'static [u8; 12] {
        match self {
            Self::Intel => b"GenuineIntel",
            Self::Amd => b"AuthenticAMD",
        }
    }
}

/// The host's processor: vendor, features, nominal TSC frequency. Built by hand in tests.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HostCpu {
    /// Vendor; processors of other vendors count as the one whose rules they follow.
    pub vendor: Vendor,
    /// Features that programs on the host can use. Vector features are in it only if the host's operating
    /// system saves their registers.
    pub features: FeatureSet,
    /// TSC frequency in kHz where the host says it exactly (CPUID leaf 0x15 or 0x4000_0010).
    pub tsc_khz: Option<u32>,
}

impl HostCpu {
    /// Asks the processor this runs on. Costs a dozen CPUID instructions: some 100 us where they trap.
    #[cfg(target_arch = "x86_64")]
    pub fn detect() -> Self {
        Self::from_cpuid(|leaf, subleaf| {
            let r = std::arch::x86_64::__cpuid_count(leaf, subleaf);
            CpuidResult { eax: r.eax, ebx: r.ebx, ecx: r.ecx, edx: r.edx }
        })
    }

    /// A host of another architecture has none of the features.
    #[cfg(not(target_arch = "x86_64"))]
    pub fn detect() -> Self {
        Self { vendor: Vendor::Intel, features: FeatureSet::EMPTY, tsc_khz: None }
    }

    /// Reads a CPUID table.
    pub fn from_cpuid(cpuid: impl Fn(u32, u32) -> CpuidResult) -> Self {
        let leaf0 = cpuid(0, 0);
        let mut id = [0; 12];
        for (chunk, word) in id.chunks_exact_mut(4).zip([leaf0.ebx, leaf0.edx, leaf0.ecx]) {
            chunk.copy_from_slice(&word.to_le_bytes());
        }
        let vendor = match &id {
            b"AuthenticAMD" | b"HygonGenuine" => Vendor::Amd,
            _ => Vendor::Intel,
        };
        let max_basic = leaf0.eax;
        let max_extended = cpuid(0x8000_0000, 0).eax;
        let mut features = FeatureSet::EMPTY;
        let mut last = None;
        for &feature in Feature::ALL {
            let (leaf, subleaf, register, bit) = feature.location();
            if leaf > if leaf >= 0x8000_0000 { max_extended } else { max_basic } {
                continue;
            }
            // Features are listed leaf by leaf: each leaf is asked once.
            let output = match last {
                Some((l, s, output)) if (l, s) == (leaf, subleaf) => output,
                _ => cpuid(leaf, subleaf),
            };
            last = Some((leaf, subleaf, output));
            if output.register(register) >> bit & 1 != 0 {
                features.insert(feature);
            }
        }
        // Without OSXSAVE the operating system does not save the vector registers.
        if cpuid(1, 0).ecx >> 27 & 1 == 0 {
            features = features.difference(FeatureSet::of(&[
                Feature::Xsave,
                Feature::Avx,
                Feature::Avx2,
                Feature::Fma,
                Feature::F16c,
            ]));
        }
        Self { vendor, features, tsc_khz: tsc_khz(&cpuid, max_basic) }
    }
}

fn tsc_khz(cpuid: &impl Fn(u32, u32) -> CpuidResult, max_basic: u32) -> Option<u32> {
    if cpuid(1, 0).ecx >> 31 & 1 != 0 && cpuid(0x4000_0000, 0).eax >= 0x4000_0010 {
        let khz = cpuid(0x4000_0010, 0).eax;
        if khz != 0 {
            return Some(khz);
        }
    }
    if max_basic < 0x15 {
        return None;
    }
    let r = cpuid(0x15, 0);
    let hz = u64::from(r.ecx).checked_mul(u64::from(r.ebx))?.checked_div(u64::from(r.eax))?;
    u32::try_from(hz / 1000).ok().filter(|khz| *khz != 0)
}

/// The four output registers of CPUID.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[allow(missing_docs)]
pub struct CpuidResult {
    pub eax: u32,
    pub ebx: u32,
    pub ecx: u32,
    pub edx: u32,
}

impl CpuidResult {
    /// One of them.
    pub const fn register(&self, register: Register) -> u32 {
        match register {
            Register::Eax => self.eax,
            Register::Ebx => self.ebx,
            Register::Ecx => self.ecx,
            Register::Edx => self.edx,
        }
    }
}

/// What a backend can give a guest on a given host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BackendFeatures {
    /// Given on every host, because the backend carries them out itself.
    pub emulated: FeatureSet,
    /// Given where the host's processor has them, because the backend runs the host's own instruction.
    pub native: FeatureSet,
    /// What its guests may rely on about speculative execution.
    pub assurances: Assurances,
}

/// Instructions whose arithmetic the software CPU leaves to the host.
const HOST_ARITHMETIC: FeatureSet = FeatureSet::of(&[
    Feature::Fpu,
    Feature::Cmov,
    Feature::Mmx,
    Feature::Sse,
    Feature::Sse2,
    Feature::Sse3,
    Feature::Pclmulqdq,
    Feature::Ssse3,
    Feature::Fma,
    Feature::Cx16,
    Feature::Sse41,
    Feature::Sse42,
    Feature::Popcnt,
    Feature::Aes,
    Feature::Avx,
    Feature::F16c,
    Feature::Bmi1,
    Feature::Avx2,
    Feature::Bmi2,
    Feature::ShaNi,
    Feature::Lzcnt,
]);

impl BackendFeatures {
    /// The software CPU: everything [`Feature`] lists; arithmetic where the host has it.
    pub fn software() -> Self {
        Self {
            emulated: FeatureSet::of(Feature::ALL).difference(HOST_ARITHMETIC),
            native: HOST_ARITHMETIC,
            assurances: Assurances::ALL,
        }
    }

    /// What a guest can have on `host`.
    pub fn on(&self, host: &HostCpu) -> FeatureSet {
        self.emulated.union(self.native.intersection(host.features))
    }
}
