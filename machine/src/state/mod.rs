//! The saved-state container: what a suspended, snapshotted or moving machine is written as.
//!
//! ```text
//! offset  size
//!      0     8  magic "ATOLLSAV"
//!      8     4  container version, little endian
//!     12     4  length of the header, little endian
//!     16     4  CRC-32 of bytes 0..16 and of the header, little endian
//!     20     n  header (protobuf, `saved_state.rs`): product version, guest architecture, machine, section table
//!   20+n     …  the sections' payloads, back to back in the order of the table
//! ```
//!
//! [`StateReader::new`] reads the header alone, so a file can be judged without decoding a payload. Each section
//! has a name (`cpu/0`, `chipset/pic`), a version, a length, a CRC-32, whether it must be understood, and
//! `required_features`: features whose state is in use and without which the rest would be misread.
//!
//! How newer and older read each other:
//!
//! | in the file | reader | result |
//! |---|---|---|
//! | a field it does not know | any | ignored (protobuf) |
//! | no field it knows | any | the field's documented default |
//! | a required feature it does not know | any | refused, by name |
//! | a section it does not know, marked required | any | refused, by name |
//! | a section it does not know, not required | any | ignored and reported |
//! | no section it knows | any | reported; the caller decides |
//! | a higher section version | any | refused, by name |
//!
//! A part of the machine implements [`SaveState`]: its saved types live in a `saved_state.rs` beside it, suffixed
//! `V1`, with explicit field numbers, every scalar optional with a documented default. There is no default
//! `save`. A restore touches nothing before the whole file has been read and checked.
//!
//! Sizes come from a file that anybody may have written: each is compared with its `MAX_…` before anything is
//! allocated, and buffers grow with the bytes that really arrive.

mod reader;
mod saved_state;
mod section;
mod writer;

pub use reader::{RestoreReport, Section, StateReader};
pub use section::{RestoreError, SaveState, StateSection};
pub use writer::StateWriter;

/// First bytes of every container.
pub const MAGIC: [u8; 8] = *b"ATOLLSAV";
/// Version of the framing that this code writes, and the highest that it reads.
pub const CONTAINER_VERSION: u32 = 1;
/// Longest header: 4096 sections with names and features fit many times.
pub const MAX_HEADER: u32 = 1 << 20;
/// Most sections: every device of a large machine has one.
pub const MAX_SECTIONS: usize = 4096;
/// Longest name of a section, machine, architecture, version or feature, in bytes.
pub const MAX_NAME: usize = 128;
/// Most required features of one section.
pub const MAX_FEATURES: usize = 64;
/// Longest payload of one section. Guest RAM is not a section.
pub const MAX_SECTION: u64 = 64 << 20;
/// Longest sum of all payloads.
pub const MAX_TOTAL: u64 = 256 << 20;

/// The guest architecture of this product's machines.
pub const ARCH_X86_64: &str = "x86_64";

/// What a container says about itself.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Header {
    /// Version of the product that wrote it; for messages only.
    pub product_version: String,
    /// Guest architecture: [`ARCH_X86_64`].
    pub guest_arch: String,
    /// Machine type, for example `atoll-1`.
    pub machine: String,
    /// The sections, in the order of their payloads.
    pub sections: Vec<SectionInfo>,
}

/// An entry of the section table.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SectionInfo {
    /// Which part of the machine: unique in a container.
    pub name: String,
    /// Version of the section's meaning; raised only by a change that numbered fields cannot express.
    pub version: u32,
    /// Bytes of payload.
    pub length: u64,
    /// CRC-32 (IEEE) of the payload.
    pub crc32: u32,
    /// A reader that does not know the section must refuse the file.
    pub required: bool,
    /// Features that a reader must know to understand the payload.
    pub required_features: Vec<String>,
}

/// Why a container could not be written or read.
#[derive(Debug, thiserror::Error)]
pub enum ContainerError {
    /// Reading or writing failed.
    #[error("{what}: {source}")]
    Io {
        /// Which part of the container.
        what: String,
        /// The host's error.
        source: std::io::Error,
    },
    /// The file does not start with [`MAGIC`].
    #[error("not a saved machine: it does not start with {:?}", String::from_utf8_lossy(&MAGIC))]
    Magic,
    /// Written by a newer product with another framing.
    #[error(
        "saved machine has container version {found}; this version of atoll reads up to {CONTAINER_VERSION}"
    )]
    Version {
        /// Version in the file.
        found: u32,
    },
    /// The file ends early.
    #[error("saved machine is cut off in {0}")]
    Truncated(String),
    /// A CRC does not match.
    #[error("saved machine is damaged: checksum of {0} does not match")]
    Damaged(String),
    /// Bytes follow the last section.
    #[error("saved machine is damaged: data after the last section")]
    Trailing,
    /// A size or count is beyond its limit.
    #[error("saved machine: {what} is {size}, more than the limit of {limit}")]
    TooLarge {
        /// What is too large.
        what: String,
        /// Its size.
        size: u64,
        /// The limit.
        limit: u64,
    },
    /// The header cannot be decoded or contradicts itself.
    #[error("saved machine has a malformed header: {0}")]
    Header(String),
    /// A section's name occurs twice.
    #[error("section {0} occurs twice")]
    Duplicate(String),
    /// A required section that this version does not know.
    #[error("section {0} is required and unknown to this version of atoll; use a newer one")]
    UnknownSection(String),
    /// A section version that this version does not know.
    #[error("section {name} has version {found}; this version of atoll reads up to {known}")]
    SectionVersion {
        /// Name of the section.
        name: String,
        /// Version in the file.
        found: u32,
        /// Highest known version.
        known: u32,
    },
    /// A required feature that this version does not know.
    #[error("section {name} uses {feature}, which this version of atoll does not know; use a newer one")]
    UnknownFeature {
        /// Name of the section.
        name: String,
        /// Name of the feature.
        feature: String,
    },
    /// A payload was refused by the part of the machine that it belongs to.
    #[error("section {name}: {source}")]
    Restore {
        /// Name of the section.
        name: String,
        /// Why.
        source: RestoreError,
    },
}

#[cfg(test)]
#[path = "tests.rs"]
mod tests;
