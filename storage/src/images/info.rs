//! What an image is, from its first bytes. Nothing is locked, so an image in use can be looked at; what is behind
//! it is named and not opened.

use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use super::format_of_name;
use crate::error::OpenError;
use crate::format::DiskFormat;
use crate::qcow2::{MAGIC, Qcow2Info, inspect_file};
use crate::raw::open_to_look;

/// What an image is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ImageInfo {
    /// The format.
    pub format: DiskFormat,
    /// Size of the disk in bytes.
    pub capacity_bytes: u64,
    /// Size of the file or device in bytes.
    pub file_bytes: u64,
    /// Bytes that the file takes on the host; `None` for a device.
    pub allocated_bytes: Option<u64>,
    /// Where the image behind it is, as this process would open it.
    pub backing_path: Option<PathBuf>,
    /// What a qcow2 image says of itself.
    pub qcow2: Option<Qcow2Info>,
}

/// Looks at an image in the format that the user states, or in the one its name stands for.
pub fn info(path: &Path, format: Option<DiskFormat>) -> Result<ImageInfo, OpenError> {
    let (file, metadata) = open_to_look(path)?;
    let io_error = |source: std::io::Error| OpenError::Io { path: path.to_owned(), source };
    let file_bytes = rustix::fs::seek(&file, rustix::fs::SeekFrom::End(0)).map_err(|e| io_error(e.into()))?;
    if file_bytes == 0 {
        return Err(OpenError::Empty(path.to_owned()));
    }
    let chosen = format.unwrap_or_else(|| format_of_name(path));
    let mut first = [0; MAGIC.len()];
    let begins =
        atoll_foundation::volatile_io::read_at(&file, 0, &[(&mut first[..]).into()]).map_err(io_error)?;
    if format.is_none() && chosen == DiskFormat::Raw && begins == first.len() && first == MAGIC {
        return Err(OpenError::Ambiguous(path.to_owned()));
    }
    let allocated_bytes =
        (!metadata.file_type().is_block_device()).then(|| metadata.blocks().saturating_mul(512));
    let raw = ImageInfo {
        format: DiskFormat::Raw,
        capacity_bytes: file_bytes.next_multiple_of(512),
        file_bytes,
        allocated_bytes,
        backing_path: None,
        qcow2: None,
    };
    if chosen == DiskFormat::Raw {
        return Ok(raw);
    }
    let (qcow2, backing_path) = inspect_file(path, file, file_bytes)?;
    Ok(ImageInfo {
        format: DiskFormat::Qcow2,
        capacity_bytes: qcow2.capacity_bytes,
        backing_path,
        qcow2: Some(qcow2),
        ..raw
    })
}
