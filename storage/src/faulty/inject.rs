//! Errors on demand.

use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use rustix::io::Errno;
use vm_memory::VolatileSlice;

use crate::disk::{Capabilities, Disk, total_len};
use crate::error::{DiskError, Operation};
use crate::file::ImageFile;
use crate::metrics::DiskMetrics;

/// An error of the host.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// `EIO`
    Io,
    /// `ENOSPC`
    NoSpace,
    /// `EOPNOTSUPP`
    Unsupported,
}

impl Fault {
    fn error(self) -> io::Error {
        match self {
            Self::Io => Errno::IO,
            Self::NoSpace => Errno::NOSPC,
            Self::Unsupported => Errno::OPNOTSUPP,
        }
        .into()
    }
}

#[derive(Debug)]
struct Entry {
    operation: Operation,
    /// Operations of this kind to let pass first.
    skip: AtomicU64,
    /// Operations to fail after that; `u64::MAX` for all.
    left: AtomicU64,
    fault: Fault,
}

/// Which operations fail. Shared between the layer and the test; entries can be added while it works.
#[derive(Debug, Default)]
pub struct FaultPlan {
    entries: Mutex<Vec<Entry>>,
    injected: AtomicU64,
}

impl FaultPlan {
    /// Nothing fails.
    pub fn new() -> Arc<Self> {
        Arc::default()
    }

    /// Fails the `n`-th operation of this kind from now, counting from zero, once.
    pub fn fail_nth(&self, operation: Operation, n: u64, fault: Fault) {
        self.add(operation, n, 1, fault);
    }

    /// Fails every operation of this kind from now.
    pub fn fail_all(&self, operation: Operation, fault: Fault) {
        self.add(operation, 0, u64::MAX, fault);
    }

    /// Nothing fails any more.
    pub fn clear(&self) {
        self.entries.lock().unwrap_or_else(PoisonError::into_inner).clear();
    }

    /// How many operations were failed.
    pub fn injected(&self) -> u64 {
        self.injected.load(Ordering::Relaxed)
    }

    fn add(&self, operation: Operation, skip: u64, left: u64, fault: Fault) {
        let entry = Entry { operation, skip: skip.into(), left: left.into(), fault };
        self.entries.lock().unwrap_or_else(PoisonError::into_inner).push(entry);
    }

    /// Counts one operation; an error if it is to fail.
    fn pass(&self, operation: Operation) -> io::Result<()> {
        let entries = self.entries.lock().unwrap_or_else(PoisonError::into_inner);
        let mut fault = None;
        for entry in entries.iter().filter(|entry| entry.operation == operation) {
            let (skip, left) = (entry.skip.load(Ordering::Relaxed), entry.left.load(Ordering::Relaxed));
            if skip > 0 {
                entry.skip.store(skip - 1, Ordering::Relaxed);
            } else if left > 0 && fault.is_none() {
                entry.left.store(if left == u64::MAX { left } else { left - 1 }, Ordering::Relaxed);
                fault = Some(entry.fault);
            }
        }
        match fault {
            None => Ok(()),
            Some(fault) => {
                self.injected.fetch_add(1, Ordering::Relaxed);
                Err(fault.error())
            }
        }
    }
}

/// A disk whose operations fail by plan; a failed one changes nothing. Its errors are not in the metrics of
/// the disk inside.
pub struct FaultyDisk<D> {
    inner: D,
    plan: Arc<FaultPlan>,
}

impl<D: Disk> FaultyDisk<D> {
    /// Puts the plan before `inner`.
    pub fn new(inner: D, plan: Arc<FaultPlan>) -> Self {
        Self { inner, plan }
    }

    fn pass(&self, operation: Operation, offset: u64, len: u64) -> Result<(), DiskError> {
        self.plan.pass(operation).map_err(|error| DiskError::host(error, operation, offset, len))
    }
}

impl<D: Disk> Disk for FaultyDisk<D> {
    fn capacity_bytes(&self) -> u64 {
        self.inner.capacity_bytes()
    }

    fn logical_block_size(&self) -> u32 {
        self.inner.logical_block_size()
    }

    fn capabilities(&self) -> Capabilities {
        self.inner.capabilities()
    }

    fn read_at(&self, offset: u64, buffers: &[VolatileSlice<'_>]) -> Result<(), DiskError> {
        self.pass(Operation::Read, offset, total_len(buffers))?;
        self.inner.read_at(offset, buffers)
    }

    fn write_at(&self, offset: u64, buffers: &[VolatileSlice<'_>]) -> Result<(), DiskError> {
        self.pass(Operation::Write, offset, total_len(buffers))?;
        self.inner.write_at(offset, buffers)
    }

    fn flush(&self) -> Result<(), DiskError> {
        self.pass(Operation::Flush, 0, 0)?;
        self.inner.flush()
    }

    fn discard(&self, offset: u64, len: u64) -> Result<(), DiskError> {
        self.pass(Operation::Discard, offset, len)?;
        self.inner.discard(offset, len)
    }

    fn write_zeroes(&self, offset: u64, len: u64, unmap: bool) -> Result<(), DiskError> {
        self.pass(Operation::WriteZeroes, offset, len)?;
        self.inner.write_zeroes(offset, len, unmap)
    }

    fn resize(&self, capacity: u64) -> Result<(), DiskError> {
        self.pass(Operation::Resize, 0, capacity)?;
        self.inner.resize(capacity)
    }

    fn metrics(&self) -> &DiskMetrics {
        self.inner.metrics()
    }
}

/// A file whose operations fail by plan. Punching a hole counts as a discard, zeroing a range as zeroing.
pub struct FaultyFile<F> {
    inner: F,
    plan: Arc<FaultPlan>,
}

impl<F: ImageFile> FaultyFile<F> {
    /// Puts the plan before `inner`.
    pub fn new(inner: F, plan: Arc<FaultPlan>) -> Self {
        Self { inner, plan }
    }
}

impl<F: ImageFile> ImageFile for FaultyFile<F> {
    fn read_at(&self, offset: u64, buffers: &[VolatileSlice<'_>]) -> io::Result<usize> {
        self.plan.pass(Operation::Read)?;
        self.inner.read_at(offset, buffers)
    }

    fn write_at(&self, offset: u64, buffers: &[VolatileSlice<'_>]) -> io::Result<()> {
        self.plan.pass(Operation::Write)?;
        self.inner.write_at(offset, buffers)
    }

    fn sync_data(&self) -> io::Result<()> {
        self.plan.pass(Operation::Flush)?;
        self.inner.sync_data()
    }

    fn punch_hole(&self, offset: u64, len: u64) -> io::Result<()> {
        self.plan.pass(Operation::Discard)?;
        self.inner.punch_hole(offset, len)
    }

    fn zero_range(&self, offset: u64, len: u64) -> io::Result<()> {
        self.plan.pass(Operation::WriteZeroes)?;
        self.inner.zero_range(offset, len)
    }
}
