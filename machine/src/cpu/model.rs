//! Named CPU models: exact tables of CPUID and model-specific registers.
//!
//! A named model is exact or refused: [`CpuModel::resolve`] gives precisely its features or names the missing
//! ones. Only `host` adapts. The vendor string is the creating host's, and together with the TSC frequency it
//! belongs to the machine: see [`CpuModel::with_identity`] for a machine that moves.
//!
//! | model | features |
//! |---|---|
//! | `atoll-base` | x86-64-v3 with AES, PCLMULQDQ, RDRAND, FSGSBASE, ERMS, SMEP, SMAP, UMIP, x2APIC, 1 GiB pages, TSC-deadline, TSC_ADJUST, invariant TSC, XSAVEOPT |
//! | `atoll-2026` | `atoll-base` with SHA, RDSEED, PCID, INVPCID, XSAVEC, XGETBV1 |
//! | `host` | `atoll-2026` as far as the host can |
//!
//! What CPUID answers is in `cpuid/`, the registers in [`super::msr`]. The tables are made so that Linux uses
//! no retpolines, no page-table isolation and no other work-around: see [`super::msr`] for why that is right.

pub use super::assurances::Assurances;
use super::cpuid;
pub use super::cpuid::CpuidContext;
pub use super::feature::{Feature, FeatureSet, Register};
pub use super::host::{BackendFeatures, CpuidResult, HostCpu, Vendor};
pub use super::msr::{MsrEntry, MsrFault, MsrKind};

/// Name of the model that machines get unless told otherwise.
pub const DEFAULT_MODEL: &str = "atoll-base";

/// Names of the models, for messages.
pub const MODEL_NAMES: &[&str] = &["atoll-base", "atoll-2026", "host"];

/// x87, SSE and AVX state (XCR0).
const XCR0_MASK: u64 = 0b111;

/// Why a model cannot be had.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum ModelError {
    /// There is no model of that name.
    #[error("unknown CPU model {0}; known: atoll-base, atoll-2026, host")]
    Unknown(String),
    /// The host cannot give features of the model.
    #[error("CPU model {model} needs {missing}, which this host does not have; choose another with --cpu")]
    Missing {
        /// Name of the model.
        model: String,
        /// The features that are missing.
        missing: FeatureSet,
    },
    /// The TSC frequency is not one that a processor has.
    #[error("TSC frequency {0} kHz is outside 1 MHz to 4.2 THz")]
    TscFrequency(u32),
}

/// A CPU model, resolved for a machine. Its tables never change.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CpuModel {
    /// Name it was asked for by.
    pub name: String,
    /// Vendor, the creating host's.
    pub vendor: Vendor,
    /// TSC frequency in kHz, told to the guest in CPUID.
    pub tsc_khz: u32,
    features: FeatureSet,
    assurances: Assurances,
    signature: u32,
    brand: [u8; 48],
    msrs: Vec<MsrEntry>,
}

impl CpuModel {
    /// The model `name` for the software CPU on `host`, with a TSC of `tsc_khz`.
    pub fn resolve(name: &str, host: &HostCpu, tsc_khz: u32) -> Result<Self, ModelError> {
        Self::resolve_for(name, host, &BackendFeatures::software(), tsc_khz)
    }

    /// The model `name` for a backend that can do `backend`.
    pub fn resolve_for(
        name: &str,
        host: &HostCpu,
        backend: &BackendFeatures,
        tsc_khz: u32,
    ) -> Result<Self, ModelError> {
        let possible = backend.on(host);
        let features = match name {
            "atoll-base" => BASE,
            "atoll-2026" => BASE.union(ADDED_2026),
            "host" => adapted(possible),
            _ => return Err(ModelError::Unknown(name.to_owned())),
        };
        let missing = features.difference(possible);
        if !missing.is_empty() {
            return Err(ModelError::Missing { model: name.to_owned(), missing });
        }
        let model = Self::with_identity(name, host.vendor, features, tsc_khz)?;
        Ok(model.with_assurances(backend.assurances))
    }

    /// A model with the identity of a saved machine, to be checked against a host by the caller (see
    /// [`CpuModel::missing_on`]).
    pub fn with_identity(
        name: &str,
        vendor: Vendor,
        features: FeatureSet,
        tsc_khz: u32,
    ) -> Result<Self, ModelError> {
        if tsc_khz < 1000 {
            return Err(ModelError::TscFrequency(tsc_khz));
        }
        let marketing = match name {
            "atoll-base" => "Atoll Base CPU",
            "atoll-2026" => "Atoll 2026 CPU",
            "host" => "Atoll Host CPU",
            _ => return Err(ModelError::Unknown(name.to_owned())),
        };
        let mut brand = [0; 48];
        brand[..marketing.len()].copy_from_slice(marketing.as_bytes());
        Ok(Self {
            name: name.to_owned(),
            vendor,
            tsc_khz,
            features,
            assurances: Assurances::ALL.of_vendor(vendor),
            signature: signature(vendor),
            brand,
            msrs: super::msr::table(vendor, &features, Assurances::ALL, PHYSICAL_BITS),
        })
    }

    /// The same model, promising no more than `assurances` about speculative execution. Without this a model
    /// promises everything, which is true on the software CPU only.
    pub fn with_assurances(self, assurances: Assurances) -> Self {
        let assurances = assurances.of_vendor(self.vendor);
        let msrs = super::msr::table(self.vendor, &self.features, assurances, PHYSICAL_BITS);
        Self { assurances, msrs, ..self }
    }

    /// What it promises about speculative execution: part of a machine's identity.
    pub fn assurances(&self) -> Assurances {
        self.assurances
    }

    /// Whether `backend` keeps what this model promises about speculative execution.
    pub fn assurances_hold_on(&self, backend: &BackendFeatures) -> bool {
        self.assurances.hold_on(self.vendor, backend.assurances)
    }

    /// The features of this model that `backend` cannot give on `host`.
    pub fn missing_on(&self, host: &HostCpu, backend: &BackendFeatures) -> FeatureSet {
        self.features.difference(backend.on(host))
    }

    /// What CPUID answers. Never executes CPUID.
    pub fn cpuid(&self, leaf: u32, subleaf: u32, ctx: &CpuidContext<'_>) -> CpuidResult {
        cpuid::answer(self, leaf, subleaf, ctx)
    }

    /// Whether the model has `feature`.
    #[inline]
    pub fn has(&self, feature: Feature) -> bool {
        self.features.has(feature)
    }

    /// All its features.
    pub fn features(&self) -> &FeatureSet {
        &self.features
    }

    /// Family, model and stepping as in CPUID leaf 1 EAX, and in EDX after RESET.
    pub fn signature(&self) -> u32 {
        self.signature
    }

    /// The 48 bytes of the brand string, zero padded.
    pub fn brand(&self) -> &[u8; 48] {
        &self.brand
    }

    /// Bits that XCR0 may have.
    pub fn xcr0_mask(&self) -> u64 {
        if !self.has(Feature::Xsave) {
            1
        } else if self.has(Feature::Avx) {
            XCR0_MASK
        } else {
            XCR0_MASK & 0b011
        }
    }

    /// Bits that CR4 may have (Intel SDM vol. 3, 2.5).
    pub fn cr4_mask(&self) -> u64 {
        const ALWAYS: u64 = 1 << 2 | 1 << 8 | 1 << 9 | 1 << 10; // TSD, PCE, OSFXSR, OSXMMEXCPT
        const BY_FEATURE: [(Feature, u32); 11] = [
            (Feature::De, 3),
            (Feature::Pse, 4),
            (Feature::Pae, 5),
            (Feature::Mce, 6),
            (Feature::Pge, 7),
            (Feature::Umip, 11),
            (Feature::Fsgsbase, 16),
            (Feature::Pcid, 17),
            (Feature::Xsave, 18),
            (Feature::Smep, 20),
            (Feature::Smap, 21),
        ];
        let bits = BY_FEATURE.iter().filter(|(f, _)| self.has(*f));
        bits.fold(ALWAYS, |mask, (_, bit)| mask | 1 << bit)
    }

    /// Bits that IA32_EFER may have, LMA included: SCE, LME, LMA, NXE, and AutoIBRS on AMD.
    pub fn efer_mask(&self) -> u64 {
        let mut mask = 1 | 1 << 8 | 1 << 10 | 1 << 11;
        if self.vendor == Vendor::Amd && self.assurances.automatic_ibrs() {
            mask |= 1 << 21;
        }
        mask
    }

    /// Width of a physical address.
    pub fn physical_bits(&self) -> u8 {
        PHYSICAL_BITS
    }

    /// Width of a linear address.
    pub fn linear_bits(&self) -> u8 {
        LINEAR_BITS
    }

    /// The model-specific registers, sorted by index. Others do not exist, apart from the x2APIC's.
    pub fn msrs(&self) -> &[MsrEntry] {
        &self.msrs
    }

    /// The register `index`.
    pub fn msr(&self, index: u32) -> Option<&MsrEntry> {
        let at = self.msrs.binary_search_by_key(&index, |e| e.index).ok()?;
        self.msrs.get(at)
    }
}

/// Physical address bits of every model: few enough for any host, and never the host's.
const PHYSICAL_BITS: u8 = 40;
const LINEAR_BITS: u8 = 48;

/// Family, model and stepping: of a server generation that has the models' mitigations in hardware, so that
/// guests look for no erratum. Fixed, because guests key their behaviour on it.
fn signature(vendor: Vendor) -> u32 {
    match vendor {
        Vendor::Intel => 0x0008_06f8, // family 6, model 0x8f, stepping 8
        Vendor::Amd => 0x00a1_0f11,   // family 0x19, model 0x11, stepping 1
    }
}

const BASE: FeatureSet = FeatureSet::of(&[
    Feature::Fpu,
    Feature::De,
    Feature::Pse,
    Feature::Tsc,
    Feature::Msr,
    Feature::Pae,
    Feature::Mce,
    Feature::Cx8,
    Feature::Apic,
    Feature::Sep,
    Feature::Mtrr,
    Feature::Pge,
    Feature::Mca,
    Feature::Cmov,
    Feature::Pat,
    Feature::Pse36,
    Feature::Clflush,
    Feature::Mmx,
    Feature::Fxsr,
    Feature::Sse,
    Feature::Sse2,
    Feature::Sse3,
    Feature::Pclmulqdq,
    Feature::Ssse3,
    Feature::Fma,
    Feature::Cx16,
    Feature::Sse41,
    Feature::Sse42,
    Feature::X2apic,
    Feature::Movbe,
    Feature::Popcnt,
    Feature::TscDeadline,
    Feature::Aes,
    Feature::Xsave,
    Feature::Avx,
    Feature::F16c,
    Feature::Rdrand,
    Feature::Arat,
    Feature::Fsgsbase,
    Feature::TscAdjust,
    Feature::Bmi1,
    Feature::Avx2,
    Feature::Smep,
    Feature::Bmi2,
    Feature::Erms,
    Feature::Smap,
    Feature::Umip,
    Feature::Xsaveopt,
    Feature::LahfLm,
    Feature::Lzcnt,
    Feature::Syscall,
    Feature::Nx,
    Feature::Pdpe1gb,
    Feature::Rdtscp,
    Feature::Lm,
    Feature::InvariantTsc,
]);

const ADDED_2026: FeatureSet = FeatureSet::of(&[
    Feature::ShaNi,
    Feature::Rdseed,
    Feature::Pcid,
    Feature::Invpcid,
    Feature::Xsavec,
    Feature::Xgetbv1,
]);

/// Features that mean nothing without another one.
const NEEDS: &[(Feature, Feature)] = &[
    (Feature::Avx, Feature::Xsave),
    (Feature::Xsaveopt, Feature::Xsave),
    (Feature::Xsavec, Feature::Xsave),
    (Feature::Xgetbv1, Feature::Xsave),
    (Feature::Avx2, Feature::Avx),
    (Feature::Fma, Feature::Avx),
    (Feature::F16c, Feature::Avx),
];

/// `host`: what Atoll implements as far as the host can, without features whose foundation is missing.
fn adapted(possible: FeatureSet) -> FeatureSet {
    let mut features = BASE.union(ADDED_2026).intersection(possible);
    for &(feature, needs) in NEEDS {
        if !features.has(needs) {
            features.remove(feature);
        }
    }
    features
}

#[cfg(test)]
#[path = "model_tests.rs"]
mod tests;
