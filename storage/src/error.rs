//! Errors of a running disk, and of opening an image.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};

/// What went wrong, as a device needs to know it. Small and stable: devices map it to their status codes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum DiskErrorKind {
    /// The range is not within the disk.
    OutOfRange,
    /// The host has no room for the data.
    NoSpace,
    /// The disk is read-only.
    ReadOnly,
    /// The disk cannot do this operation.
    Unsupported,
    /// The host failed to read, write or make durable.
    Io,
}

impl DiskErrorKind {
    /// The kind that a host error amounts to.
    pub fn of(error: &io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded | io::ErrorKind::FileTooLarge => {
                Self::NoSpace
            }
            io::ErrorKind::ReadOnlyFilesystem => Self::ReadOnly,
            io::ErrorKind::Unsupported => Self::Unsupported,
            _ => Self::Io,
        }
    }
}

/// What a disk was asked to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Operation {
    /// [`Disk::read_at`](crate::Disk::read_at)
    Read,
    /// [`Disk::write_at`](crate::Disk::write_at)
    Write,
    /// [`Disk::flush`](crate::Disk::flush)
    Flush,
    /// [`Disk::discard`](crate::Disk::discard)
    Discard,
    /// [`Disk::write_zeroes`](crate::Disk::write_zeroes)
    WriteZeroes,
    /// [`Disk::resize`](crate::Disk::resize)
    Resize,
}

impl fmt::Display for Operation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Read => "read",
            Self::Write => "write",
            Self::Flush => "flush",
            Self::Discard => "discard",
            Self::WriteZeroes => "writing zeroes",
            Self::Resize => "resizing",
        })
    }
}

/// The cause of an error after which writes may be lost, so that trying again cannot help.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct WritesLost(String);

/// Marks an error of a sync: what was written before may be lost.
pub(crate) fn writes_lost(error: io::Error) -> io::Error {
    io::Error::new(error.kind(), WritesLost(error.to_string()))
}

/// The error of every sync after one that failed.
pub(crate) fn earlier_flush_failed() -> io::Error {
    writes_lost(io::Error::other("an earlier flush failed, so writes may have been lost"))
}

/// A failed disk operation.
#[derive(Debug, thiserror::Error)]
#[error("{}", self.describe())]
pub struct DiskError {
    kind: DiskErrorKind,
    operation: Operation,
    offset: u64,
    len: u64,
    source: Option<io::Error>,
}

impl DiskError {
    /// An error without a host error behind it. `offset` and `len` are in bytes, zero for a flush.
    pub fn new(kind: DiskErrorKind, operation: Operation, offset: u64, len: u64) -> Self {
        Self { kind, operation, offset, len, source: None }
    }

    /// An error of the host; the kind follows from it.
    pub fn host(source: io::Error, operation: Operation, offset: u64, len: u64) -> Self {
        Self { kind: DiskErrorKind::of(&source), operation, offset, len, source: Some(source) }
    }

    /// What went wrong.
    pub fn kind(&self) -> DiskErrorKind {
        self.kind
    }

    /// What was asked for.
    pub fn operation(&self) -> Operation {
        self.operation
    }

    /// Whether doing it again cannot help, because writes that were acknowledged may be lost.
    pub fn is_final(&self) -> bool {
        self.source.as_ref().and_then(io::Error::get_ref).is_some_and(|source| source.is::<WritesLost>())
    }

    /// The same error once more, for another who waited for the same operation.
    pub fn again(&self) -> Self {
        let Self { kind, operation, offset, len, .. } = *self;
        let source = self.source.as_ref().map(|source| {
            let copy = io::Error::new(source.kind(), source.to_string());
            if self.is_final() { writes_lost(copy) } else { copy }
        });
        Self { kind, operation, offset, len, source }
    }

    fn describe(&self) -> String {
        let what = match self.kind {
            DiskErrorKind::OutOfRange => "is not within the disk",
            DiskErrorKind::NoSpace => "failed: the host has no space left for the image",
            DiskErrorKind::ReadOnly => "refused: the disk is read-only",
            DiskErrorKind::Unsupported => "is not supported by this disk",
            DiskErrorKind::Io => "failed on the host",
        };
        let place = match self.operation {
            Operation::Flush => String::new(),
            Operation::Resize => format!(" to {} bytes", self.len),
            _ => format!(" of {} bytes at byte {}", self.len, self.offset),
        };
        let cause = self.source.as_ref().map(|source| format!(": {source}")).unwrap_or_default();
        format!("{}{place} {what}{cause}", self.operation)
    }
}

/// Why an image could not be opened. The text is one line that names the image and what to do.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// Nothing is at the path.
    #[error("disk image {} does not exist; create it or correct the path", show(.0))]
    Missing(PathBuf),
    /// A directory is at the path.
    #[error("disk image {} is a directory; give the path of an image file or block device", show(.0))]
    IsDirectory(PathBuf),
    /// Something that cannot be a disk (pipe, socket, character device) is at the path.
    #[error("disk image {} is neither a regular file nor a block device; give one of these", show(.0))]
    NotAnImage(PathBuf),
    /// This user may not open it in the way asked for.
    #[error("no permission to {} disk image {}; {}", wish(*.read_only), show(.path), advice(*.read_only))]
    PermissionDenied {
        /// The image.
        path: PathBuf,
        /// Whether only reading was asked for.
        read_only: bool,
    },
    /// It is on a read-only file system or device, and writing was asked for.
    #[error("disk image {} cannot be written where it is; open it read-only or copy it elsewhere", show(.0))]
    ReadOnlyPlace(PathBuf),
    /// Another process uses it in a way that excludes this one.
    #[error("disk image {} is {reason}; end that use, or open the image read-only in both", show(.path))]
    InUse {
        /// The image.
        path: PathBuf,
        /// "in use by another process", with the process if it could be told.
        reason: String,
    },
    /// It has no content.
    #[error("disk image {} is empty; give an image with at least one sector of 512 bytes", show(.0))]
    Empty(PathBuf),
    /// It cannot be locked, so using it would not be safe.
    #[error("disk image {} {reason}; move it to a file system that supports locks", show(.path))]
    CannotLock {
        /// The image.
        path: PathBuf,
        /// "cannot be locked", with the host's reason.
        reason: String,
    },
    /// Its structures contradict each other or its format.
    #[error("disk image {} is corrupt: {reason}; restore it from a copy, or try 'atoll disk check'", show(.path))]
    Corrupt {
        /// The image.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// It is intact as far as known and cannot be used.
    #[error("disk image {} {reason}", show(.path))]
    Refused {
        /// The image.
        path: PathBuf,
        /// Why, and what to do.
        reason: String,
    },
    /// Its name stands for a raw image and its content for another format.
    #[error(
        "disk image {} begins with a qcow2 header but is not named so; say format=qcow2, or format=raw if the guest wrote that",
        show(.0)
    )]
    Ambiguous(PathBuf),
    /// Anything else the host reports.
    #[error("disk image {} cannot be opened: {source}", show(.path))]
    Io {
        /// The image.
        path: PathBuf,
        /// The host's error.
        source: io::Error,
    },
}

/// A path in quotes with control characters escaped, so that it stays on one line.
fn show(path: &Path) -> String {
    format!("'{}'", path.to_string_lossy().escape_debug())
}

fn wish(read_only: bool) -> &'static str {
    if read_only { "read" } else { "read and write" }
}

fn advice(read_only: bool) -> &'static str {
    if read_only {
        "change its permissions or run as its owner"
    } else {
        "change its permissions, run as its owner, or open it read-only"
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn host_errors_keep_their_meaning() {
        for (number, kind) in [
            (rustix::io::Errno::NOSPC, DiskErrorKind::NoSpace),
            (rustix::io::Errno::DQUOT, DiskErrorKind::NoSpace),
            (rustix::io::Errno::FBIG, DiskErrorKind::NoSpace),
            (rustix::io::Errno::ROFS, DiskErrorKind::ReadOnly),
            (rustix::io::Errno::OPNOTSUPP, DiskErrorKind::Unsupported),
            (rustix::io::Errno::IO, DiskErrorKind::Io),
        ] {
            assert_eq!(DiskErrorKind::of(&io::Error::from(number)), kind);
        }
    }

    #[test]
    fn a_failed_flush_stays_final_for_everybody_who_waited_for_it() {
        let source = || io::Error::from(rustix::io::Errno::NOSPC);
        let lost = DiskError::host(writes_lost(source()), Operation::Flush, 0, 0);
        assert!(lost.is_final() && lost.again().is_final() && lost.again().again().is_final());
        assert_eq!(lost.kind(), DiskErrorKind::NoSpace);
        assert_eq!(lost.again().to_string(), lost.to_string());
        let full = DiskError::host(source(), Operation::Write, 512, 512);
        assert!(!full.is_final() && !full.again().is_final());
        assert_eq!((full.again().kind(), full.again().to_string()), (full.kind(), full.to_string()));
    }

    #[test]
    fn the_text_names_operation_place_and_cause() {
        let source = io::Error::from_raw_os_error(5);
        let error = DiskError::host(source, Operation::Write, 4096, 512);
        let cause = io::Error::from_raw_os_error(5);
        let text = format!("write of 512 bytes at byte 4096 failed on the host: {cause}");
        assert_eq!(error.to_string(), text);
        let error = DiskError::new(DiskErrorKind::ReadOnly, Operation::Flush, 0, 0);
        assert_eq!(error.to_string(), "flush refused: the disk is read-only");
    }

    #[test]
    fn a_path_cannot_break_the_line() {
        let error = OpenError::Missing(PathBuf::from("a\nb"));
        assert_eq!(error.to_string(), "disk image 'a\\nb' does not exist; create it or correct the path");
    }
}
