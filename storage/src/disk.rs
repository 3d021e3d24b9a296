//! The trait that every disk is, and the rules of order and durability behind it.
//!
//! # What a caller may assume
//!
//! * Methods take `&self` and may be called from several threads at once. Operations that overlap in time and
//!   range have no order among each other.
//! * After a write has returned, every read sees it. That does not make it durable.
//! * **Flush means flush**: everything whose write, discard or zeroing returned before [`Disk::flush`] was
//!   called survives a power cut once that flush has returned success. Nothing else is promised to survive, and
//!   of a write not yet flushed any sectors may.
//! * After a flush has failed, earlier writes may be lost although reads still see them. The disk then fails
//!   every later flush, because success would be a lie.
//! * After a failed write or zeroing, its range holds old or new bytes, sector by sector.
//! * A range outside the disk is refused as a whole and nothing is changed.
//!
//! # What a caller must know about buffers
//!
//! They are volatile slices, so the kernel may copy straight from and to memory that other threads change. They
//! carry no dirty bitmap; [`read_tracked`] and [`write_tracked`] take slices that do and mark what was read.
//!
//! # Asynchronous operation
//!
//! Calls block. [`AsyncDisk`](crate::engine::AsyncDisk) is a second trait beside this one, with the same requests
//! and the same rules, that submits and completes; an [`Engine`](crate::engine::Engine) drives any `Disk` that
//! way. Nothing here depends on which thread calls.
//!
//! A format helps the engine with two things that have defaults: [`Disk::try_read_at`] and
//! [`Disk::try_write_at`] do now what needs no waiting, and [`Disk::begin_direct`] says where in a host file a
//! transfer goes, so that the host can carry it out while no thread waits.

use std::os::fd::BorrowedFd;
use std::sync::Arc;

use atoll_foundation::volatile_io;
use vm_memory::VolatileSlice;
use vm_memory::bitmap::BitmapSlice;

use crate::error::{DiskError, DiskErrorKind, Operation};
use crate::metrics::DiskMetrics;

/// The smallest unit of every disk: capacities and logical block sizes are multiples of it. Bytes.
pub const SECTOR_SIZE: u64 = 512;

/// How [`Disk::discard`] can be used. All in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DiscardLimits {
    /// Smaller pieces than this, or not aligned to it, may release nothing.
    pub granularity: u32,
    /// The most for one call.
    pub max_bytes: u64,
}

/// How [`Disk::write_zeroes`] can be used.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct WriteZeroesLimits {
    /// The most for one call, in bytes.
    pub max_bytes: u64,
    /// Whether `unmap` can release host space.
    pub unmap: bool,
}

/// What a disk can do; constant while it is open.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Capabilities {
    /// Writes, discards and zeroing are refused.
    pub read_only: bool,
    /// `None`: discard is refused as unsupported.
    pub discard: Option<DiscardLimits>,
    /// `None`: zeroing is refused as unsupported.
    pub write_zeroes: Option<WriteZeroesLimits>,
    /// Whether [`Disk::resize`] can make it larger.
    pub resize: bool,
    /// Whether the format has snapshots inside the image, which writing preserves.
    pub snapshots: bool,
}

/// A transfer that is one piece of a host file. From [`Disk::begin_direct`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Direct {
    /// [`Operation::Read`] or [`Operation::Write`].
    pub operation: Operation,
    /// Where on the disk, in bytes.
    pub offset: u64,
    /// How many bytes.
    pub len: u64,
    /// Where in the file, in bytes.
    pub host_offset: u64,
}

/// How a [`Direct`] transfer ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DirectEnd {
    /// All bytes were transferred.
    Done,
    /// Not all, or an error. What that means is found out by doing it again with [`Disk::read_at`] or
    /// [`Disk::write_at`], which counts it too.
    Abandoned,
}

/// A disk. The module's documentation has the rules.
pub trait Disk: Send + Sync {
    /// Size in bytes, a multiple of [`Disk::logical_block_size`]. Changes with [`Disk::resize`] only.
    fn capacity_bytes(&self) -> u64;

    /// The unit in which a device should address this disk, in bytes: a power of two, at least 512. Transfers
    /// in other units work, slower.
    fn logical_block_size(&self) -> u32;

    /// What it can do.
    fn capabilities(&self) -> Capabilities;

    /// Fills all buffers, in order, with the bytes from byte `offset`.
    fn read_at(&self, offset: u64, buffers: &[VolatileSlice<'_>]) -> Result<(), DiskError>;

    /// Writes all buffers, in order, from byte `offset`.
    fn write_at(&self, offset: u64, buffers: &[VolatileSlice<'_>]) -> Result<(), DiskError>;

    /// Makes everything written so far durable.
    fn flush(&self) -> Result<(), DiskError>;

    /// Declares `len` bytes from byte `offset` unused. What they read as afterwards is up to the format.
    fn discard(&self, offset: u64, len: u64) -> Result<(), DiskError>;

    /// Makes `len` bytes from byte `offset` read as zero. `unmap` permits releasing their space on the host;
    /// without it they stay allocated as far as the host can do that.
    fn write_zeroes(&self, offset: u64, len: u64, unmap: bool) -> Result<(), DiskError>;

    /// Makes the disk `capacity` bytes large; the new bytes read as zero. Durable with the next flush. Smaller than
    /// it is, or not a multiple of the logical block size: refused.
    fn resize(&self, capacity: u64) -> Result<(), DiskError> {
        Err(DiskError::new(DiskErrorKind::Unsupported, Operation::Resize, 0, capacity))
    }

    /// [`Disk::read_at`] if that needs no waiting, neither for a device nor for another thread. `None`: it would
    /// wait, or this cannot tell; parts of the buffers may have been filled.
    fn try_read_at(&self, _offset: u64, _buffers: &[VolatileSlice<'_>]) -> Option<Result<(), DiskError>> {
        None
    }

    /// [`Disk::write_at`] if that needs no waiting but what copying to the host's page cache may cost. `None`: it
    /// would wait, or this cannot tell; nothing was written.
    fn try_write_at(&self, _offset: u64, _buffers: &[VolatileSlice<'_>]) -> Option<Result<(), DiskError>> {
        None
    }

    /// The file that [`Disk::begin_direct`] refers to, the same as long as the disk is open.
    fn direct_file(&self) -> Option<BorrowedFd<'_>> {
        None
    }

    /// Where in the file a transfer goes, if all of it is one piece there and nothing but the transfer has to
    /// happen; never waits. Until [`Disk::end_direct`], which must follow once, that place stays this transfer's.
    fn begin_direct(&self, _operation: Operation, _offset: u64, _len: u64) -> Option<Direct> {
        None
    }

    /// Ends what [`Disk::begin_direct`] began.
    fn end_direct(&self, _direct: Direct, _end: DirectEnd) {}

    /// Counters since it was opened.
    fn metrics(&self) -> &DiskMetrics;
}

impl<T: Disk + ?Sized> Disk for Arc<T> {
    fn capacity_bytes(&self) -> u64 {
        (**self).capacity_bytes()
    }

    fn logical_block_size(&self) -> u32 {
        (**self).logical_block_size()
    }

    fn capabilities(&self) -> Capabilities {
        (**self).capabilities()
    }

    fn read_at(&self, offset: u64, buffers: &[VolatileSlice<'_>]) -> Result<(), DiskError> {
        (**self).read_at(offset, buffers)
    }

    fn write_at(&self, offset: u64, buffers: &[VolatileSlice<'_>]) -> Result<(), DiskError> {
        (**self).write_at(offset, buffers)
    }

    fn flush(&self) -> Result<(), DiskError> {
        (**self).flush()
    }

    fn discard(&self, offset: u64, len: u64) -> Result<(), DiskError> {
        (**self).discard(offset, len)
    }

    fn write_zeroes(&self, offset: u64, len: u64, unmap: bool) -> Result<(), DiskError> {
        (**self).write_zeroes(offset, len, unmap)
    }

    fn resize(&self, capacity: u64) -> Result<(), DiskError> {
        (**self).resize(capacity)
    }

    fn try_read_at(&self, offset: u64, buffers: &[VolatileSlice<'_>]) -> Option<Result<(), DiskError>> {
        (**self).try_read_at(offset, buffers)
    }

    fn try_write_at(&self, offset: u64, buffers: &[VolatileSlice<'_>]) -> Option<Result<(), DiskError>> {
        (**self).try_write_at(offset, buffers)
    }

    fn direct_file(&self) -> Option<BorrowedFd<'_>> {
        (**self).direct_file()
    }

    fn begin_direct(&self, operation: Operation, offset: u64, len: u64) -> Option<Direct> {
        (**self).begin_direct(operation, offset, len)
    }

    fn end_direct(&self, direct: Direct, end: DirectEnd) {
        (**self).end_direct(direct, end);
    }

    fn metrics(&self) -> &DiskMetrics {
        (**self).metrics()
    }
}

/// The number of bytes in a list of buffers.
pub fn total_len<B: BitmapSlice>(buffers: &[VolatileSlice<'_, B>]) -> u64 {
    buffers.iter().fold(0u64, |sum, buffer| sum.saturating_add(buffer.len() as u64))
}

/// Refuses a range that is not within a disk of `capacity` bytes. Never overflows.
pub fn check_range(capacity: u64, operation: Operation, offset: u64, len: u64) -> Result<(), DiskError> {
    match offset.checked_add(len) {
        Some(end) if end <= capacity => Ok(()),
        _ => Err(DiskError::new(DiskErrorKind::OutOfRange, operation, offset, len)),
    }
}

/// [`Disk::read_at`] into memory with a dirty bitmap. All buffers are marked dirty, also after an error, when
/// any part of them may have changed.
pub fn read_tracked<B: BitmapSlice>(
    disk: &(impl Disk + ?Sized),
    offset: u64,
    buffers: &[VolatileSlice<'_, B>],
) -> Result<(), DiskError> {
    // The list is as long as one the caller already has, so no guest sizes this allocation.
    let plain: Vec<_> = buffers.iter().map(volatile_io::without_bitmap).collect();
    let result = disk.read_at(offset, &plain);
    for buffer in buffers {
        buffer.bitmap().mark_dirty(0, buffer.len());
    }
    result
}

/// [`Disk::write_at`] from memory with a dirty bitmap, which is not touched.
pub fn write_tracked<B: BitmapSlice>(
    disk: &(impl Disk + ?Sized),
    offset: u64,
    buffers: &[VolatileSlice<'_, B>],
) -> Result<(), DiskError> {
    let plain: Vec<_> = buffers.iter().map(volatile_io::without_bitmap).collect();
    disk.write_at(offset, &plain)
}

/// [`Disk::read_at`] into ordinary memory.
pub fn read_bytes(disk: &(impl Disk + ?Sized), offset: u64, bytes: &mut [u8]) -> Result<(), DiskError> {
    disk.read_at(offset, &[VolatileSlice::from(bytes)])
}

/// [`Disk::write_at`] from ordinary memory, which is copied once: for small things and tests.
pub fn write_bytes(disk: &(impl Disk + ?Sized), offset: u64, bytes: &[u8]) -> Result<(), DiskError> {
    let mut copy = bytes.to_vec();
    disk.write_at(offset, &[VolatileSlice::from(&mut copy[..])])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_are_checked_without_overflow() {
        assert!(check_range(1024, Operation::Read, 512, 512).is_ok());
        assert!(check_range(1024, Operation::Read, 1024, 0).is_ok());
        for (offset, len) in [(512, 513), (1025, 0), (u64::MAX, 1), (1, u64::MAX), (u64::MAX, u64::MAX)] {
            let error = check_range(1024, Operation::Read, offset, len).unwrap_err();
            assert_eq!(error.kind(), DiskErrorKind::OutOfRange);
        }
    }
}
