//! Opening images of the host: a qcow2 image with its chain of backing images, each locked.
//!
//! The image that is written is locked exclusively, the images behind it are opened for reading only and locked
//! shared. A backing image's name is taken relative to the image that names it, and its format comes from that
//! image alone: content never decides how a backing image is read, because a guest may have written it.

use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::fs::SeekFrom;

use super::Qcow2Disk;
use super::header::Header;
use crate::disk::Disk;
use crate::error::OpenError;
use crate::file::{HostFile, ImageFile};
use crate::format::DiskFormat;
use crate::raw::{OpenOptions, RawDisk, open_and_lock};

/// Images in a chain, the first included.
const MAX_CHAIN: usize = 64;

impl Qcow2Disk<HostFile> {
    /// Opens an image and everything behind it. An image that was not closed properly is repaired if it is
    /// opened for writing.
    pub fn open(path: impl AsRef<Path>, options: OpenOptions) -> Result<Self, OpenError> {
        open_in_chain(path.as_ref(), options, &mut Vec::new())
    }
}

/// Device and inode of the images that are open already.
type Chain = Vec<(u64, u64)>;

fn open_in_chain(path: &Path, options: OpenOptions, chain: &mut Chain) -> Result<Qcow2Disk, OpenError> {
    enter(path, chain)?;
    let (file, _) = open_and_lock(path, options)?;
    let io_error = |error| describe(path, error);
    let file_size = rustix::fs::seek(&file, SeekFrom::End(0)).map_err(|e| io_error(e.into()))?;
    if file_size == 0 {
        return Err(OpenError::Empty(path.to_owned()));
    }
    let file = HostFile::new(file);
    let header = Header::read(&file, file_size).map_err(io_error)?;
    let backing = match &header.backing_file {
        None => None,
        Some(name) => Some(open_backing(path, name, header.backing_format.as_deref(), chain)?),
    };
    let can_punch =
        !options.read_only && file.punch_hole(file_size.next_multiple_of(1 << 21), 1 << 21).is_ok();
    Qcow2Disk::load(file, header, file_size, options.read_only, backing, can_punch).map_err(io_error)
}

/// Notes an image; refuses one that is in the chain already. An image that is missing is found to be so later.
fn enter(path: &Path, chain: &mut Chain) -> Result<(), OpenError> {
    let Ok(metadata) = std::fs::metadata(path) else { return Ok(()) };
    let identity = (metadata.dev(), metadata.ino());
    let refuse = |reason: &str| OpenError::Refused { path: path.to_owned(), reason: reason.to_owned() };
    if chain.contains(&identity) {
        return Err(refuse("is its own backing image, directly or through others; correct its backing file"));
    }
    if chain.len() >= MAX_CHAIN {
        return Err(refuse("has more than 64 images behind each other; commit or convert some of them"));
    }
    chain.push(identity);
    Ok(())
}

fn open_backing(
    image: &Path,
    name: &str,
    format: Option<&str>,
    chain: &mut Chain,
) -> Result<Arc<dyn Disk>, OpenError> {
    let refuse = |reason: String| OpenError::Refused { path: image.to_owned(), reason };
    let shown = name.escape_debug();
    let Some(format) = format else {
        return Err(refuse(format!(
            "names the backing file '{shown}' without its format; state it with 'qemu-img rebase -u -F FORMAT -b FILE'"
        )));
    };
    let Ok(format) = format.parse::<DiskFormat>() else {
        let format = format.escape_debug();
        return Err(refuse(format!("has a backing file of format '{format}'; raw and qcow2 are supported")));
    };
    let before_slash = name.split('/').next().unwrap_or_default();
    if before_slash.contains(':') {
        return Err(refuse(format!("has the backing file '{shown}'; only paths of files are supported")));
    }
    let path = resolve(image, name);
    let options = OpenOptions { read_only: true };
    Ok(match format {
        DiskFormat::Raw => {
            enter(&path, chain)?;
            Arc::new(RawDisk::open(&path, options)?)
        }
        DiskFormat::Qcow2 => Arc::new(open_in_chain(&path, options, chain)?),
    })
}

/// A path as the image means it: relative to the folder in which the image is, links followed.
pub(super) fn resolve(image: &Path, name: &str) -> PathBuf {
    let real = std::fs::canonicalize(image).unwrap_or_else(|_| image.to_owned());
    real.parent().map_or_else(|| PathBuf::from(name), |folder| folder.join(name))
}

pub(super) fn describe(path: &Path, error: io::Error) -> OpenError {
    let path = path.to_owned();
    match error.kind() {
        io::ErrorKind::InvalidData => OpenError::Corrupt { path, reason: error.to_string() },
        io::ErrorKind::Unsupported => OpenError::Refused { path, reason: format!("cannot be used: {error}") },
        _ => OpenError::Io { path, source: error },
    }
}
