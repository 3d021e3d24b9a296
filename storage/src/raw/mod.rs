//! The raw format: byte N of the disk is byte N of the image.
//!
//! Sizes: an image whose size is not a multiple of 512 bytes is **rounded up**. The missing tail of the last
//! sector reads as zero; writing it makes the file longer, up to the rounded size. No byte of the image is out
//! of reach that way. An empty image is refused when opening. A block device's size is always whole blocks.
//!
//! Space: discard punches a hole, which reads as zero afterwards. Zeroing punches a hole if unmapping is
//! allowed, else zeroes the range in place, else (file systems that can do neither) writes zeros. What the file
//! system turned out not to support is not tried again. Discard is advice, so where it is not supported after
//! all it succeeds and changes nothing. Block devices release and zero whole blocks only: of a range that does not
//! begin or end at one, discard leaves the rest as it was, and zeroing writes it.
//!
//! Durability: a flush is one `fdatasync`. If one fails the host may have dropped the pages it could not write
//! and would report success the next time, so every later flush of the same opening fails as well. Flushes take
//! turns: of two at the same time the host would report a loss to one only.
//!
//! Growing makes the file longer; a block device must be longer already.
//!
//! An image that somebody truncates while it is open gives read errors for what is gone, never zeros.

mod open;

use std::io;
use std::os::fd::BorrowedFd;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use vm_memory::VolatileSlice;

use crate::buffers::{part_of, zero};
use crate::disk::{
    Capabilities, Direct, DirectEnd, DiscardLimits, Disk, SECTOR_SIZE, WriteZeroesLimits, check_range,
    total_len,
};
use crate::error::{DiskError, DiskErrorKind, Operation, earlier_flush_failed, writes_lost};
use crate::file::{HostFile, ImageFile};
use crate::metrics::DiskMetrics;

pub use open::OpenOptions;
pub(crate) use open::{open_and_lock, open_to_look};

/// The most one discard releases: it is quick on any file system, but should not take for ever.
const MAX_DISCARD_BYTES: u64 = 1 << 30;

/// The most one zeroing covers: the host may have to write all of it.
const MAX_ZEROES_BYTES: u64 = 32 << 20;

/// Size of the block of zeros that the fallback writes again and again.
const ZERO_BLOCK: usize = 64 << 10;

/// Zero blocks in one write of the fallback.
const ZERO_BLOCKS_PER_WRITE: usize = 16;

/// What is known about the file behind a raw disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RawGeometry {
    /// Bytes in the file now; the disk's capacity is this rounded up to whole logical blocks.
    pub file_size: u64,
    /// Unit of addressing in bytes: 512 for files, the device's own for block devices.
    pub logical_block_size: u32,
    /// Unit in which the host can release space, in bytes; `None` when it cannot.
    pub discard_granularity: Option<u32>,
    /// What offset and length of a range to release or to zero must be a multiple of: 1 for files, the logical
    /// block size for devices.
    pub range_alignment: u32,
    /// Refuse to change anything.
    pub read_only: bool,
}

/// A raw image. [`RawDisk::open`] opens one of the host's.
#[derive(Debug)]
pub struct RawDisk<F = HostFile> {
    file: F,
    /// As it was opened; sizes may have grown since.
    geometry: RawGeometry,
    file_size: AtomicU64,
    capacity: AtomicU64,
    metrics: DiskMetrics,
    /// Whether a flush has failed; held while one runs. See the module's documentation.
    flush_failed: Mutex<bool>,
    /// The file system refused to punch holes or to zero ranges.
    no_punch_hole: AtomicBool,
    no_zero_range: AtomicBool,
}

impl<F: ImageFile> RawDisk<F> {
    /// A raw disk over a file that is open and locked as it should be. A size that leaves no capacity is the
    /// caller's to refuse.
    pub fn over(file: F, geometry: RawGeometry) -> Self {
        let block = u64::from(geometry.logical_block_size).max(SECTOR_SIZE);
        Self {
            file,
            geometry,
            file_size: geometry.file_size.into(),
            capacity: geometry
                .file_size
                .checked_next_multiple_of(block)
                .unwrap_or(u64::MAX - u64::MAX % block)
                .into(),
            metrics: DiskMetrics::default(),
            flush_failed: Mutex::new(false),
            no_punch_hole: AtomicBool::new(false),
            no_zero_range: AtomicBool::new(false),
        }
    }

    fn capacity(&self) -> u64 {
        self.capacity.load(Ordering::SeqCst)
    }

    fn read(&self, offset: u64, len: u64, buffers: &[VolatileSlice<'_>]) -> Result<(), DiskError> {
        check_range(self.capacity(), Operation::Read, offset, len)?;
        let host = |error| DiskError::host(error, Operation::Read, offset, len);
        let count = self.file.read_at(offset, buffers).map_err(host)? as u64;
        if count < len {
            if offset + count < self.file_size.load(Ordering::SeqCst) {
                return Err(host(io::Error::new(
                    io::ErrorKind::UnexpectedEof,
                    "the image is shorter than when it was opened",
                )));
            }
            zero(&part_of(buffers, count, len - count).map_err(host)?);
        }
        Ok(())
    }

    fn check_change(&self, operation: Operation, offset: u64, len: u64) -> Result<(), DiskError> {
        if self.geometry.read_only {
            return Err(DiskError::new(DiskErrorKind::ReadOnly, operation, offset, len));
        }
        check_range(self.capacity(), operation, offset, len)
    }

    fn flush_file(&self) -> Result<(), DiskError> {
        if self.geometry.read_only {
            return Ok(());
        }
        let failed = |error| DiskError::host(error, Operation::Flush, 0, 0);
        let mut flush_failed = self.flush_failed.lock().unwrap_or_else(|e| e.into_inner());
        if *flush_failed {
            return Err(failed(earlier_flush_failed()));
        }
        self.file.sync_data().map_err(|error| {
            *flush_failed = true;
            failed(writes_lost(error))
        })
    }

    fn grow(&self, capacity: u64) -> Result<(), DiskError> {
        let failed = |kind| DiskError::new(kind, Operation::Resize, 0, capacity);
        if self.geometry.read_only {
            return Err(failed(DiskErrorKind::ReadOnly));
        }
        if !capacity.is_multiple_of(u64::from(self.geometry.logical_block_size)) || capacity < self.capacity()
        {
            return Err(failed(DiskErrorKind::Unsupported));
        }
        if capacity > self.capacity() {
            self.file.grow(capacity).map_err(|e| DiskError::host(e, Operation::Resize, 0, capacity))?;
            self.file_size.store(capacity, Ordering::SeqCst);
            self.capacity.store(capacity, Ordering::SeqCst);
        }
        Ok(())
    }

    fn within(&self, offset: u64, len: u64) -> bool {
        offset.checked_add(len).is_some_and(|end| end <= self.capacity())
    }

    /// Punches a hole; `Ok(false)` when the file system cannot.
    fn punch_hole(&self, offset: u64, len: u64) -> io::Result<bool> {
        if self.no_punch_hole.load(Ordering::Relaxed) {
            return Ok(false);
        }
        supported(self.file.punch_hole(offset, len), &self.no_punch_hole)
    }

    /// The whole blocks within a range that the host can release or zero at once; empty if there are none.
    fn whole_blocks(&self, offset: u64, len: u64) -> std::ops::Range<u64> {
        let unit = u64::from(self.geometry.range_alignment).max(1);
        let end = offset + len;
        let start = offset.checked_next_multiple_of(unit).unwrap_or(end).min(end);
        start..(end - end % unit).max(start)
    }

    fn discard_blocks(&self, offset: u64, len: u64) -> io::Result<()> {
        let blocks = self.whole_blocks(offset, len);
        if !blocks.is_empty() {
            self.punch_hole(blocks.start, blocks.end - blocks.start)?;
        }
        Ok(())
    }

    fn zero(&self, offset: u64, len: u64, unmap: bool) -> io::Result<()> {
        let blocks = self.whole_blocks(offset, len);
        if blocks.is_empty() {
            return self.write_zero_blocks(offset, len);
        }
        self.write_zero_blocks(offset, blocks.start - offset)?;
        self.zero_blocks(blocks.start, blocks.end - blocks.start, unmap)?;
        self.write_zero_blocks(blocks.end, offset + len - blocks.end)
    }

    fn zero_blocks(&self, offset: u64, len: u64, unmap: bool) -> io::Result<()> {
        if unmap && self.punch_hole(offset, len)? {
            return Ok(());
        }
        if !self.no_zero_range.load(Ordering::Relaxed)
            && supported(self.file.zero_range(offset, len), &self.no_zero_range)?
        {
            return Ok(());
        }
        self.write_zero_blocks(offset, len)
    }

    fn write_zero_blocks(&self, mut offset: u64, mut len: u64) -> io::Result<()> {
        let mut zeros = vec![0u8; ZERO_BLOCK];
        let block = VolatileSlice::from(&mut zeros[..]);
        while len > 0 {
            let mut list = Vec::with_capacity(ZERO_BLOCKS_PER_WRITE);
            let mut bytes = 0;
            while bytes < len && list.len() < ZERO_BLOCKS_PER_WRITE {
                let piece = (len - bytes).min(ZERO_BLOCK as u64);
                list.push(block.subslice(0, piece as usize).map_err(io::Error::other)?);
                bytes += piece;
            }
            self.file.write_at(offset, &list)?;
            offset += bytes;
            len -= bytes;
        }
        Ok(())
    }
}

/// Turns "unsupported" into `Ok(false)` and remembers it.
fn supported(result: io::Result<()>, unsupported: &AtomicBool) -> io::Result<bool> {
    match result {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::Unsupported => {
            unsupported.store(true, Ordering::Relaxed);
            Ok(false)
        }
        Err(error) => Err(error),
    }
}

impl<F: ImageFile> Disk for RawDisk<F> {
    fn capacity_bytes(&self) -> u64 {
        self.capacity()
    }

    fn logical_block_size(&self) -> u32 {
        self.geometry.logical_block_size
    }

    fn capabilities(&self) -> Capabilities {
        let RawGeometry { read_only, discard_granularity, .. } = self.geometry;
        let discard = discard_granularity
            .map(|granularity| DiscardLimits { granularity, max_bytes: MAX_DISCARD_BYTES })
            .filter(|_| !read_only);
        let write_zeroes = (!read_only)
            .then_some(WriteZeroesLimits { max_bytes: MAX_ZEROES_BYTES, unmap: discard.is_some() });
        Capabilities { read_only, discard, write_zeroes, resize: !read_only, snapshots: false }
    }

    fn read_at(&self, offset: u64, buffers: &[VolatileSlice<'_>]) -> Result<(), DiskError> {
        let len = total_len(buffers);
        self.metrics.count(Operation::Read, len, self.read(offset, len, buffers))
    }

    fn write_at(&self, offset: u64, buffers: &[VolatileSlice<'_>]) -> Result<(), DiskError> {
        let len = total_len(buffers);
        let result = self.check_change(Operation::Write, offset, len).and_then(|()| {
            self.file
                .write_at(offset, buffers)
                .map_err(|error| DiskError::host(error, Operation::Write, offset, len))
        });
        self.metrics.count(Operation::Write, len, result)
    }

    fn flush(&self) -> Result<(), DiskError> {
        self.metrics.count(Operation::Flush, 0, self.flush_file())
    }

    fn discard(&self, offset: u64, len: u64) -> Result<(), DiskError> {
        let result = self.check_change(Operation::Discard, offset, len).and_then(|()| {
            match self.geometry.discard_granularity {
                None => Err(DiskError::new(DiskErrorKind::Unsupported, Operation::Discard, offset, len)),
                Some(_) => self
                    .discard_blocks(offset, len)
                    .map_err(|error| DiskError::host(error, Operation::Discard, offset, len)),
            }
        });
        self.metrics.count(Operation::Discard, len, result)
    }

    fn write_zeroes(&self, offset: u64, len: u64, unmap: bool) -> Result<(), DiskError> {
        let result = self.check_change(Operation::WriteZeroes, offset, len).and_then(|()| {
            self.zero(offset, len, unmap)
                .map_err(|error| DiskError::host(error, Operation::WriteZeroes, offset, len))
        });
        self.metrics.count(Operation::WriteZeroes, len, result)
    }

    fn resize(&self, capacity: u64) -> Result<(), DiskError> {
        self.metrics.count(Operation::Resize, 0, self.grow(capacity))
    }

    fn try_read_at(&self, offset: u64, buffers: &[VolatileSlice<'_>]) -> Option<Result<(), DiskError>> {
        let len = total_len(buffers);
        if !self.within(offset, len) {
            return None;
        }
        self.file.try_read_at(offset, buffers)?;
        Some(self.metrics.count(Operation::Read, len, Ok(())))
    }

    fn try_write_at(&self, offset: u64, buffers: &[VolatileSlice<'_>]) -> Option<Result<(), DiskError>> {
        // Copying to the page cache is all that a write to a file is.
        self.file.descriptor()?;
        Some(self.write_at(offset, buffers))
    }

    fn direct_file(&self) -> Option<BorrowedFd<'_>> {
        self.file.descriptor()
    }

    fn begin_direct(&self, operation: Operation, offset: u64, len: u64) -> Option<Direct> {
        let allowed = self.within(offset, len) && (operation == Operation::Read || !self.geometry.read_only);
        allowed.then_some(Direct { operation, offset, len, host_offset: offset })
    }

    fn end_direct(&self, direct: Direct, end: DirectEnd) {
        if end == DirectEnd::Done {
            let _ = self.metrics.count(direct.operation, direct.len, Ok::<(), DiskError>(()));
        }
    }

    fn metrics(&self) -> &DiskMetrics {
        &self.metrics
    }
}

#[cfg(test)]
#[path = "tests.rs"]
mod tests;
