//! A disk in memory.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use atoll_storage::error::Operation;
use atoll_storage::{
    Capabilities, DiscardLimits, Disk, DiskError, DiskErrorKind, DiskMetrics, WriteZeroesLimits, disk,
};
use vm_memory::VolatileSlice;

/// A disk in memory, for fuzz targets and tests.
pub struct MemoryDisk {
    bytes: Mutex<Vec<u8>>,
    read_only: bool,
    /// Flushes so far.
    pub flushes: AtomicU64,
    metrics: DiskMetrics,
}

impl MemoryDisk {
    /// `sectors` sectors of 512 zeros.
    pub fn new(sectors: usize, read_only: bool) -> Arc<Self> {
        Arc::new(Self {
            bytes: Mutex::new(vec![0; sectors * 512]),
            read_only,
            flushes: Default::default(),
            metrics: Default::default(),
        })
    }

    /// A copy of the content.
    pub fn content(&self) -> Vec<u8> {
        crate::lock(&self.bytes).clone()
    }

    fn fill_zero(&self, operation: Operation, offset: u64, len: u64) -> Result<(), DiskError> {
        let mut bytes = crate::lock(&self.bytes);
        disk::check_range(bytes.len() as u64, operation, offset, len)?;
        bytes[offset as usize..(offset + len) as usize].fill(0);
        Ok(())
    }
}

impl Disk for MemoryDisk {
    fn capacity_bytes(&self) -> u64 {
        crate::lock(&self.bytes).len() as u64
    }
    fn logical_block_size(&self) -> u32 {
        512
    }
    fn capabilities(&self) -> Capabilities {
        let max_bytes = 1 << 20;
        Capabilities {
            read_only: self.read_only,
            discard: Some(DiscardLimits { granularity: 4096, max_bytes }),
            write_zeroes: Some(WriteZeroesLimits { max_bytes, unmap: true }),
            ..Capabilities::default()
        }
    }
    fn read_at(&self, mut offset: u64, buffers: &[VolatileSlice<'_>]) -> Result<(), DiskError> {
        let bytes = crate::lock(&self.bytes);
        let total = disk::total_len(buffers);
        let operation = Operation::Read;
        disk::check_range(bytes.len() as u64, operation, offset, total)?;
        for buffer in buffers {
            buffer.copy_from(&bytes[offset as usize..offset as usize + buffer.len()]);
            offset += buffer.len() as u64;
        }
        Ok(())
    }
    fn write_at(&self, mut offset: u64, buffers: &[VolatileSlice<'_>]) -> Result<(), DiskError> {
        let mut bytes = crate::lock(&self.bytes);
        let total = disk::total_len(buffers);
        let operation = Operation::Write;
        disk::check_range(bytes.len() as u64, operation, offset, total)?;
        if self.read_only {
            return Err(DiskError::new(DiskErrorKind::ReadOnly, operation, offset, total));
        }
        for buffer in buffers {
            buffer.copy_to(&mut bytes[offset as usize..offset as usize + buffer.len()]);
            offset += buffer.len() as u64;
        }
        Ok(())
    }
    fn flush(&self) -> Result<(), DiskError> {
        self.flushes.fetch_add(1, Ordering::SeqCst);
        Ok(())
    }
    fn discard(&self, offset: u64, len: u64) -> Result<(), DiskError> {
        self.fill_zero(Operation::Discard, offset, len)
    }
    fn write_zeroes(&self, offset: u64, len: u64, _unmap: bool) -> Result<(), DiskError> {
        self.fill_zero(Operation::WriteZeroes, offset, len)
    }
    fn try_read_at(&self, offset: u64, buffers: &[VolatileSlice<'_>]) -> Option<Result<(), DiskError>> {
        Some(self.read_at(offset, buffers))
    }
    fn try_write_at(&self, offset: u64, buffers: &[VolatileSlice<'_>]) -> Option<Result<(), DiskError>> {
        Some(self.write_at(offset, buffers))
    }
    fn metrics(&self) -> &DiskMetrics {
        &self.metrics
    }
}
