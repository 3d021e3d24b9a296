//! Work on images that are not in use as disks: making, inspecting, checking, mending, converting them.
//!
//! * [`create`]: an empty image, perhaps over a backing image; its options;
//! * [`convert()`]: a copy in another format;
//! * [`info`](mod@info): what an image is;
//! * [`check()`] and [`repair()`]: qcow2 images; what is behind them need not be there.
//!
//! An image is made in a file without a name and gets its name when it is whole and durable, see `new_file`. So
//! whatever goes wrong, nothing half-written is left, and nothing that exists is ever replaced.

mod convert;
pub mod create;
pub mod info;
mod new_file;

use std::io;
use std::path::{Path, PathBuf};

use crate::error::OpenError;
use crate::format::DiskFormat;

pub use crate::qcow2::{check_file as check, repair_file as repair};
pub use convert::{Converted, convert};
pub use create::{Backing, NewImage, create};
pub use info::{ImageInfo, info};

/// Why an image was not made. The text is one line.
#[derive(Debug, thiserror::Error)]
pub enum CreateError {
    /// Something has that name.
    #[error("disk image {} exists already; remove it or choose another name", show(.0))]
    Exists(PathBuf),
    /// The folder for it is not there, or is no folder.
    #[error("disk image {} cannot be created: its folder does not exist; create that first", show(.0))]
    NoFolder(PathBuf),
    /// This user may not write there.
    #[error("disk image {} cannot be created: no permission to write in its folder; choose another", show(.0))]
    PermissionDenied(PathBuf),
    /// What was asked for cannot be.
    #[error("disk image {} cannot be created: {reason}", show(.path))]
    Refused {
        /// The image.
        path: PathBuf,
        /// Why.
        reason: String,
    },
    /// The image to be behind it or to be copied cannot be used.
    #[error(transparent)]
    Other(#[from] OpenError),
    /// The host failed.
    #[error("disk image {} cannot be created: {source}", show(.path))]
    Io {
        /// The image.
        path: PathBuf,
        /// The host's or the source's error.
        source: io::Error,
    },
}

impl CreateError {
    /// Whether the request is at fault, rather than the host.
    pub fn is_input(&self) -> bool {
        !matches!(self, Self::Io { .. } | Self::Other(OpenError::Io { .. }))
    }

    fn host(path: &Path, source: io::Error) -> Self {
        let path = path.to_owned();
        match source.kind() {
            io::ErrorKind::AlreadyExists => Self::Exists(path),
            io::ErrorKind::NotFound | io::ErrorKind::NotADirectory => Self::NoFolder(path),
            io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem => {
                Self::PermissionDenied(path)
            }
            io::ErrorKind::Unsupported | io::ErrorKind::InvalidInput => {
                Self::Refused { path, reason: source.to_string() }
            }
            _ => Self::Io { path, source },
        }
    }
}

/// The format that an image's name stands for.
pub fn format_of_name(path: &Path) -> DiskFormat {
    let named = path.extension().is_some_and(|extension| extension.eq_ignore_ascii_case("qcow2"));
    if named { DiskFormat::Qcow2 } else { DiskFormat::Raw }
}

/// A path in quotes with control characters escaped, so that it stays on one line.
fn show(path: &Path) -> String {
    format!("'{}'", path.to_string_lossy().escape_debug())
}

#[cfg(test)]
mod tests;
