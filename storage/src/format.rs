//! Which format an image has, and opening it.
//!
//! The content of an image that a guest could write never decides by itself how the image is read: otherwise
//! a guest with a raw disk could write an image header into it, name any file of the host as its backing image,
//! and read that file at the next start. So the format is what the user says, or else:
//!
//! ```text
//!   name ends in .qcow2      qcow2, and refused unless it begins with that header
//!   any other name           raw, and refused if it begins with a qcow2 header: the user has to say which
//! ```
//!
//! A guest that writes such a header into a raw disk gains nothing: its machine is refused until the user says
//! `raw`. The format of a backing image is what the image over it says, see [`qcow2`](crate::qcow2).

use std::path::Path;
use std::str::FromStr;
use std::sync::Arc;

use crate::disk::{Disk, read_bytes};
use crate::error::OpenError;
use crate::nbd;
use crate::qcow2::{MAGIC, Qcow2Disk};
use crate::raw::{OpenOptions, RawDisk};

/// A format of disk images.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DiskFormat {
    /// Byte N of the disk is byte N of the image.
    Raw,
    /// QEMU's copy-on-write format, versions 2 and 3.
    Qcow2,
}

impl DiskFormat {
    /// Its name as people and images write it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Raw => "raw",
            Self::Qcow2 => "qcow2",
        }
    }
}

/// A format that is not supported.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("unknown disk format '{}'; the formats are: raw, qcow2", .0.escape_debug())]
pub struct UnknownFormat(String);

impl FromStr for DiskFormat {
    type Err = UnknownFormat;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "raw" => Ok(Self::Raw),
            "qcow2" => Ok(Self::Qcow2),
            other => Err(UnknownFormat(other.to_owned())),
        }
    }
}

/// Opens an image of the host in the format that the user states, or in the one its name stands for; or an export
/// of a server, where an address (`nbd://...`, `nbd+unix://...`) is in place of a path.
pub fn open_disk(
    path: impl AsRef<Path>,
    options: OpenOptions,
    format: Option<DiskFormat>,
) -> Result<Arc<dyn Disk>, OpenError> {
    let path = path.as_ref();
    if let Some(address) = nbd::text_of(path) {
        return Ok(Arc::new(nbd::open_export(&address, options, format)?));
    }
    let named = path.extension().is_some_and(|extension| extension.eq_ignore_ascii_case("qcow2"));
    match format {
        Some(DiskFormat::Qcow2) => Ok(Arc::new(Qcow2Disk::open(path, options)?)),
        None if named => Ok(Arc::new(Qcow2Disk::open(path, options)?)),
        Some(DiskFormat::Raw) => Ok(Arc::new(RawDisk::open(path, options)?)),
        None => {
            let disk = RawDisk::open(path, options)?;
            if begins_with_header(&disk) {
                return Err(OpenError::Ambiguous(path.to_owned()));
            }
            Ok(Arc::new(disk))
        }
    }
}

/// Whether a disk's first bytes are a qcow2 image's. One that cannot be read fails later, by itself.
fn begins_with_header(disk: &impl Disk) -> bool {
    let mut first = [0u8; MAGIC.len()];
    read_bytes(disk, 0, &mut first).is_ok() && first == MAGIC
}
