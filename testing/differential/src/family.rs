//! The families of seeded cases.

use std::ops::Range;

use crate::case::{Suite, Width};
use crate::{descriptors, ring0, sequences};

/// What seeded cases are made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Family {
    /// Random descriptors under the operations that look at them, in 32-bit protected mode.
    Descriptors32,
    /// The same in 64-bit mode.
    Descriptors64,
    /// Instruction sequences in real mode.
    Real,
    /// Instruction sequences in virtual-8086 mode.
    Virtual8086,
    /// Instruction sequences in 16-bit segments of protected mode.
    Protected16,
    /// Instruction sequences in 32-bit protected mode at CPL 0, system instructions among them.
    Ring0Protected,
    /// The same in 64-bit mode.
    Ring0Long,
}

impl Family {
    /// All of them.
    pub const ALL: [Self; 7] = [
        Self::Descriptors32,
        Self::Descriptors64,
        Self::Real,
        Self::Virtual8086,
        Self::Protected16,
        Self::Ring0Protected,
        Self::Ring0Long,
    ];

    /// The name used in output and on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::Descriptors32 => "descriptors-protected",
            Self::Descriptors64 => "descriptors-long",
            Self::Real => "real",
            Self::Virtual8086 => "v86",
            Self::Protected16 => "protected16",
            Self::Ring0Protected => "ring0-protected",
            Self::Ring0Long => "ring0-long",
        }
    }

    /// The family of this name.
    ///
    /// # Errors
    /// If there is none.
    pub fn parse(name: &str) -> Result<Self, String> {
        let names = || Self::ALL.map(Self::name).join(", ");
        Self::ALL.into_iter().find(|f| f.name() == name).ok_or_else(|| format!("expected one of {}", names()))
    }

    /// The cases of `seed` with these numbers; a case does not depend on which others there are.
    ///
    /// # Errors
    /// If a case does not fit its place.
    pub fn suite(self, seed: u64, cases: Range<usize>) -> anyhow::Result<Suite> {
        match self {
            Self::Descriptors32 => descriptors::suite(Width::Protected, seed, cases),
            Self::Descriptors64 => descriptors::suite(Width::Long, seed, cases),
            Self::Real | Self::Virtual8086 | Self::Protected16 => sequences::suite(self, seed, cases),
            Self::Ring0Protected => ring0::suite(Width::Protected, seed, cases),
            Self::Ring0Long => ring0::suite(Width::Long, seed, cases),
        }
    }
}
