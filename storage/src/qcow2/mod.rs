//! The qcow2 format, versions 2 and 3: images that grow as they are written, over other images.
//!
//! ```text
//!   mod          Qcow2Disk: the trait, one lock, counters
//!   open         host files, locks, the chain of backing images      create   empty images
//!   transfer     data, outside the lock                              check    counting anew, mending
//!   write        how a write changes the mapping                     resize   making the disk larger
//!   image        where a byte is; the order of writes is told here   snapshot their directory
//!   refcounts    counting clusters, finding free ones     commit     tables to the disk, in order
//!   inspect      images by themselves, without what is behind them
//!   cache        tables in memory        header, layout, compression, bitmaps: the format as such
//! ```
//!
//! Supported: clusters of 512 bytes to 2 MiB, reference counts of 1 to 64 bits, extended L2 entries, zero
//! clusters, backing images (raw, qcow2), compressed clusters (deflate, zstd; read, and replaced by plain ones
//! when written), internal snapshots (listed, and preserved when writing), persistent bitmaps (preserved until the
//! first change of the disk, inconsistent from then on). An image with the dirty bit is
//! repaired when it is opened for writing; one with the corrupt bit can only be read. Autoclear features are
//! cleared before the first change. Refused by name: encryption, external data files, unknown incompatible
//! features.
//!
//! Every number in an image is checked before it is used, and none sizes an allocation beyond the fixed limits in
//! `header` and `snapshot`. Damage found when opening refuses the image; found later, it fails the operation
//! with [`DiskErrorKind::Io`](crate::DiskErrorKind::Io).
//!
//! Locks: flushes take turns under one mutex; then one mutex around the mapping and the counts, which is not held
//! while data is transferred (`transfer` says what keeps that right); then the backing image's, which has no cycle
//! because chains have none. Specification: QEMU's qcow2 specification.

mod bitmaps;
mod cache;
mod check;
mod commit;
mod compression;
mod create;
mod header;
mod image;
mod inspect;
mod layout;
mod open;
mod refcounts;
mod resize;
mod snapshot;
mod transfer;
mod write;

use std::io;
use std::os::fd::BorrowedFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use vm_memory::VolatileSlice;

use crate::disk::{
    Capabilities, Direct, DirectEnd, DiscardLimits, Disk, SECTOR_SIZE, WriteZeroesLimits, check_range,
    total_len,
};
use crate::error::{DiskError, DiskErrorKind, Operation};
use crate::file::{HostFile, ImageFile};
use crate::metrics::DiskMetrics;

pub use check::CheckReport;
pub use create::{CreateOptions, create, format_image};
pub use header::Compression;
pub(crate) use header::MAGIC;
pub(crate) use inspect::inspect_file;
pub use inspect::{Qcow2Info, check_file, repair_file};
pub use snapshot::Snapshot;

use header::{DIRTY, Header};
use image::Image;

/// The most one discard covers.
const MAX_DISCARD_BYTES: u64 = 1 << 30;

/// The most one zeroing covers: data may have to be written.
const MAX_ZEROES_BYTES: u64 = 32 << 20;

/// A qcow2 image. [`Qcow2Disk::open`] opens one of the host's.
pub struct Qcow2Disk<F: ImageFile = HostFile> {
    /// What the image has too, for transfers.
    file: Arc<F>,
    backing: Option<Arc<dyn Disk>>,
    /// Held by the one flush that runs.
    flushes: Mutex<()>,
    image: Mutex<Image<Arc<F>>>,
    /// Held by the one change of size that runs; taken before all others.
    growing: Mutex<()>,
    /// A cluster is no longer busy, or no longer pinned.
    settled: Condvar,
    capacity: AtomicU64,
    cluster_size: u64,
    read_only: bool,
    snapshots: Vec<Snapshot>,
    metrics: DiskMetrics,
}

impl<F: ImageFile> Qcow2Disk<F> {
    /// A disk over a file of `file_size` bytes that is open and locked as it should be. The image's own name of
    /// a backing file is not followed: `backing` stands for it.
    pub fn over(
        file: F,
        file_size: u64,
        read_only: bool,
        backing: Option<Arc<dyn Disk>>,
    ) -> io::Result<Self> {
        let header = Header::read(&file, file_size)?;
        Self::load(file, header, file_size, read_only, backing, true)
    }

    fn load(
        file: F,
        header: Header,
        file_size: u64,
        read_only: bool,
        backing: Option<Arc<dyn Disk>>,
        can_punch: bool,
    ) -> io::Result<Self> {
        if header.size == 0 {
            return Err(layout::refused("its disk has no bytes"));
        }
        let (snapshots, _) = snapshot::read(&file, &header, file_size)?;
        let capacity = header.size.next_multiple_of(SECTOR_SIZE);
        let file = Arc::new(file);
        let mut image = Image::load(file.clone(), header, file_size, backing.clone())?;
        image.no_punch_hole = !can_punch;
        if !read_only {
            if image.is_marked_corrupt() {
                return Err(layout::refused(
                    "it is marked as corrupt; open it read-only, or mend it with 'atoll disk check --repair'",
                ));
            }
            if image.header.incompatible & DIRTY != 0 {
                image.repair()?;
            }
        }
        // Without trust in the counts of an image that is only read, they do not matter.
        image.scan(!read_only)?;
        let cluster_size = image.layout.cluster_size();
        Ok(Self {
            file,
            backing,
            flushes: Mutex::new(()),
            image: Mutex::new(image),
            growing: Mutex::new(()),
            settled: Condvar::new(),
            capacity: capacity.into(),
            cluster_size,
            read_only,
            snapshots,
            metrics: DiskMetrics::default(),
        })
    }

    /// Its internal snapshots.
    pub fn snapshots(&self) -> &[Snapshot] {
        &self.snapshots
    }

    /// Checks the whole image. What was written so far becomes durable first. Takes as long as reading all
    /// tables does, and other operations wait.
    pub fn check(&self) -> io::Result<CheckReport> {
        let mut image = self.lock_quiet();
        if !self.read_only {
            image.commit()?;
        }
        image.check()
    }

    /// Like [`Qcow2Disk::check`], and mends reference counts; refuses an image with other damage.
    pub fn repair(&self) -> io::Result<CheckReport> {
        if self.read_only {
            return Err(io::ErrorKind::ReadOnlyFilesystem.into());
        }
        let mut image = self.lock_quiet();
        image.commit()?;
        image.repair()
    }

    /// A poisoned lock is taken: every operation leaves the state such that all data is where it says.
    fn lock(&self) -> MutexGuard<'_, Image<Arc<F>>> {
        self.image.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// One change of a range, checked, counted, and with its error described.
    fn change(
        &self,
        operation: Operation,
        offset: u64,
        len: u64,
        action: impl FnOnce() -> io::Result<()>,
    ) -> Result<(), DiskError> {
        let result = if self.read_only {
            Err(DiskError::new(DiskErrorKind::ReadOnly, operation, offset, len))
        } else {
            check_range(self.capacity_bytes(), operation, offset, len)
                .and_then(|()| action().map_err(|error| DiskError::host(error, operation, offset, len)))
        };
        self.metrics.count(operation, len, result)
    }
}

impl<F: ImageFile> Disk for Qcow2Disk<F> {
    fn capacity_bytes(&self) -> u64 {
        self.capacity.load(Ordering::SeqCst)
    }

    fn logical_block_size(&self) -> u32 {
        SECTOR_SIZE as u32
    }

    fn capabilities(&self) -> Capabilities {
        let discard = DiscardLimits { granularity: self.cluster_size as u32, max_bytes: MAX_DISCARD_BYTES };
        let write_zeroes = WriteZeroesLimits { max_bytes: MAX_ZEROES_BYTES, unmap: true };
        Capabilities {
            read_only: self.read_only,
            discard: (!self.read_only).then_some(discard),
            write_zeroes: (!self.read_only).then_some(write_zeroes),
            resize: !self.read_only && self.snapshots.is_empty(),
            snapshots: true,
        }
    }

    fn read_at(&self, offset: u64, buffers: &[VolatileSlice<'_>]) -> Result<(), DiskError> {
        let len = total_len(buffers);
        let result = check_range(self.capacity_bytes(), Operation::Read, offset, len).and_then(|()| {
            self.read(offset, buffers).map_err(|error| DiskError::host(error, Operation::Read, offset, len))
        });
        self.metrics.count(Operation::Read, len, result)
    }

    fn write_at(&self, offset: u64, buffers: &[VolatileSlice<'_>]) -> Result<(), DiskError> {
        self.change(Operation::Write, offset, total_len(buffers), || self.write(offset, buffers))
    }

    fn flush(&self) -> Result<(), DiskError> {
        if self.read_only {
            return self.metrics.count(Operation::Flush, 0, Ok(()));
        }
        let result = self.commit().map_err(|error| DiskError::host(error, Operation::Flush, 0, 0));
        self.metrics.count(Operation::Flush, 0, result)
    }

    fn discard(&self, offset: u64, len: u64) -> Result<(), DiskError> {
        self.change(Operation::Discard, offset, len, || self.discard_range(offset, len))
    }

    fn write_zeroes(&self, offset: u64, len: u64, unmap: bool) -> Result<(), DiskError> {
        self.change(Operation::WriteZeroes, offset, len, || self.zero_range(offset, len, unmap))
    }

    fn resize(&self, capacity: u64) -> Result<(), DiskError> {
        let refused = |kind| Err(DiskError::new(kind, Operation::Resize, 0, capacity));
        let result = if self.read_only {
            refused(DiskErrorKind::ReadOnly)
        } else if capacity < self.capacity_bytes() || !capacity.is_multiple_of(SECTOR_SIZE) {
            refused(DiskErrorKind::Unsupported)
        } else {
            self.grow(capacity).map_err(|error| DiskError::host(error, Operation::Resize, 0, capacity))
        };
        self.metrics.count(Operation::Resize, 0, result)
    }

    fn try_read_at(&self, offset: u64, buffers: &[VolatileSlice<'_>]) -> Option<Result<(), DiskError>> {
        let len = total_len(buffers);
        check_range(self.capacity_bytes(), Operation::Read, offset, len).ok()?;
        self.read_without_waiting(offset, len, buffers)?;
        Some(self.metrics.count(Operation::Read, len, Ok(())))
    }

    fn try_write_at(&self, offset: u64, buffers: &[VolatileSlice<'_>]) -> Option<Result<(), DiskError>> {
        // Writing in place to the page cache is all that takes no waiting.
        self.file.descriptor()?;
        let direct = self.begin_direct(Operation::Write, offset, total_len(buffers))?;
        let result = self.file.write_at(direct.host_offset, buffers);
        self.unpin(direct.host_offset, direct.len);
        let result = result.map_err(|error| DiskError::host(error, Operation::Write, offset, direct.len));
        Some(self.metrics.count(Operation::Write, direct.len, result))
    }

    fn direct_file(&self) -> Option<BorrowedFd<'_>> {
        self.file.descriptor()
    }

    fn begin_direct(&self, operation: Operation, offset: u64, len: u64) -> Option<Direct> {
        check_range(self.capacity_bytes(), operation, offset, len).ok()?;
        let host_offset = match operation {
            Operation::Read => self.pin_for_reading(offset, len),
            Operation::Write if !self.read_only => self.pin_for_writing(offset, len),
            _ => None,
        }?;
        Some(Direct { operation, offset, len, host_offset })
    }

    fn end_direct(&self, direct: Direct, end: DirectEnd) {
        self.unpin(direct.host_offset, direct.len);
        if end == DirectEnd::Done {
            let _ = self.metrics.count(direct.operation, direct.len, Ok::<(), DiskError>(()));
        }
    }

    fn metrics(&self) -> &DiskMetrics {
        &self.metrics
    }
}

impl<F: ImageFile> Drop for Qcow2Disk<F> {
    /// Brings what is in memory to the file. Who needs to know whether that worked flushes before.
    fn drop(&mut self) {
        let image = self.image.get_mut().unwrap_or_else(PoisonError::into_inner);
        if !self.read_only && image.prepared {
            // Counts that go down after the commit may reach the file in any order.
            let _ = image.commit().and_then(|()| image.write_blocks());
        }
    }
}

#[cfg(test)]
mod tests;
