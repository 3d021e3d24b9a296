//! Opening a raw image of the host: what may be opened, locking, and one clear error for each obstacle.
//!
//! Nothing is created, and a refused image is left as it was.

use std::fs::{File, Metadata};
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::Path;
use std::time::{Duration, Instant};

use atoll_foundation::file_lock::{self, LockError, LockKind};
use rustix::fs::{OFlags, SeekFrom};

use super::{RawDisk, RawGeometry};
use crate::disk::SECTOR_SIZE;
use crate::error::OpenError;
use crate::file::{HostFile, ImageFile};

/// How to open an image.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct OpenOptions {
    /// Only read. Takes a shared lock, so that several readers get along; a writer takes an exclusive one.
    pub read_only: bool,
}

impl RawDisk<HostFile> {
    /// Opens a regular file or block device as a raw disk and locks it until the disk is dropped.
    pub fn open(path: impl AsRef<Path>, options: OpenOptions) -> Result<Self, OpenError> {
        let path = path.as_ref();
        let (file, metadata) = open_and_lock(path, options)?;
        let io_error = |source| OpenError::Io { path: path.to_owned(), source };
        let is_device = metadata.file_type().is_block_device();
        // Seeking gives the size of devices too.
        let file_size = rustix::fs::seek(&file, SeekFrom::End(0)).map_err(|e| io_error(e.into()))?;
        if file_size == 0 {
            return Err(OpenError::Empty(path.to_owned()));
        }
        let logical_block_size = if is_device {
            rustix::fs::ioctl_blksszget(&file).map_err(|e| io_error(e.into()))?
        } else {
            SECTOR_SIZE as u32
        };
        let file = HostFile::new(file);
        let granularity =
            if is_device { logical_block_size } else { metadata.blksize().clamp(512, 1 << 20) as u32 };
        let can_discard = !options.read_only && (is_device || punches_holes(&file, file_size));
        let geometry = RawGeometry {
            file_size,
            logical_block_size,
            discard_granularity: can_discard.then_some(granularity),
            range_alignment: if is_device { logical_block_size } else { 1 },
            read_only: options.read_only,
        };
        Ok(Self::over(file, geometry))
    }
}

/// Asks the file system whether it punches holes by punching one behind the end, where nothing is.
fn punches_holes(file: &HostFile, file_size: u64) -> bool {
    let page = atoll_foundation::host::page_size() as u64;
    file_size.checked_next_multiple_of(page).is_some_and(|end| file.punch_hole(end, page).is_ok())
}

/// Opens and locks an image of any format.
pub(crate) fn open_and_lock(path: &Path, options: OpenOptions) -> Result<(File, Metadata), OpenError> {
    // Looking before opening: opening a pipe would wait for its other end.
    check_type(path, &std::fs::metadata(path).map_err(|e| open_error(path, options, e))?)?;
    let is_device = |metadata: &Metadata| metadata.file_type().is_block_device();
    let mut flags = OFlags::NONBLOCK;
    if !options.read_only && std::fs::metadata(path).is_ok_and(|m| is_device(&m)) {
        // For a block device this means: not mounted and not opened exclusively by another.
        flags |= OFlags::EXCL;
    }
    let file = File::options()
        .read(true)
        .write(!options.read_only)
        .custom_flags(flags.bits() as i32)
        .open(path)
        .map_err(|e| open_error(path, options, e))?;
    let metadata = file.metadata().map_err(|e| open_error(path, options, e))?;
    check_type(path, &metadata)?;
    let kind = if options.read_only { LockKind::Shared } else { LockKind::Exclusive };
    lock(&file, kind).map_err(|error| match error {
        LockError::WouldBlock { .. } => OpenError::InUse { path: path.to_owned(), reason: error.to_string() },
        LockError::Failed(_) => OpenError::CannotLock { path: path.to_owned(), reason: error.to_string() },
    })?;
    Ok((file, metadata))
}

/// How long a process that was killed may go on holding a lock: the kernel takes an io_uring apart after the end of
/// the process, and with it the files that were registered there.
const AFTERLIFE: Duration = Duration::from_secs(1);

/// Locks `file`. A lock that no process shows may be a dead one's and is waited for; one whose holder can be seen is
/// refused at once.
fn lock(file: &File, kind: LockKind) -> Result<(), LockError> {
    let deadline = Instant::now() + AFTERLIFE;
    loop {
        match file_lock::try_lock(file, kind) {
            Err(LockError::WouldBlock { holders }) if holders.is_empty() && Instant::now() < deadline => {
                std::thread::sleep(Duration::from_millis(10));
            }
            result => return result,
        }
    }
}

/// Opens an image of any format to look at it, without a lock.
pub(crate) fn open_to_look(path: &Path) -> Result<(File, Metadata), OpenError> {
    let options = OpenOptions { read_only: true };
    let error = |error| open_error(path, options, error);
    check_type(path, &std::fs::metadata(path).map_err(error)?)?;
    let flags = OFlags::NONBLOCK.bits() as i32;
    let file = File::options().read(true).custom_flags(flags).open(path).map_err(error)?;
    let metadata = file.metadata().map_err(error)?;
    check_type(path, &metadata)?;
    Ok((file, metadata))
}

fn check_type(path: &Path, metadata: &Metadata) -> Result<(), OpenError> {
    let kind = metadata.file_type();
    if kind.is_dir() {
        Err(OpenError::IsDirectory(path.to_owned()))
    } else if kind.is_file() || kind.is_block_device() {
        Ok(())
    } else {
        Err(OpenError::NotAnImage(path.to_owned()))
    }
}

fn open_error(path: &Path, options: OpenOptions, error: io::Error) -> OpenError {
    let path = path.to_owned();
    match error.kind() {
        io::ErrorKind::NotFound | io::ErrorKind::NotADirectory => OpenError::Missing(path),
        io::ErrorKind::IsADirectory => OpenError::IsDirectory(path),
        io::ErrorKind::PermissionDenied => OpenError::PermissionDenied { path, read_only: options.read_only },
        io::ErrorKind::ReadOnlyFilesystem => OpenError::ReadOnlyPlace(path),
        io::ErrorKind::ResourceBusy => {
            OpenError::InUse { path, reason: "mounted or in use by another process".to_owned() }
        }
        io::ErrorKind::ExecutableFileBusy => {
            OpenError::InUse { path, reason: "being executed as a program".to_owned() }
        }
        _ => OpenError::Io { path, source: error },
    }
}
