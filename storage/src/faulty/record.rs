//! Layers that pass everything on and record what changes the disk.

use std::io;
use std::sync::Arc;

use vm_memory::VolatileSlice;

use super::log::WriteLog;
use crate::disk::{Capabilities, Disk, check_range, read_bytes, total_len};
use crate::error::{DiskError, Operation};
use crate::file::ImageFile;
use crate::metrics::DiskMetrics;

/// The buffers' content now. What the layer below writes is this copy, so that the log is what was written
/// even if the memory changes meanwhile.
fn copy_of(buffers: &[VolatileSlice<'_>]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for buffer in buffers {
        let start = bytes.len();
        bytes.resize(start + buffer.len(), 0);
        buffer.copy_to(&mut bytes[start..]);
    }
    bytes
}

/// Records what is done to a disk. A discard is recorded as zeroing: one possible outcome.
pub struct RecordingDisk<D> {
    inner: D,
    log: Arc<WriteLog>,
}

impl<D: Disk> RecordingDisk<D> {
    /// Starts recording; reads the whole disk once for the content that cuts start from.
    pub fn new(inner: D) -> Result<Self, DiskError> {
        let mut base = vec![0; inner.capacity_bytes() as usize];
        read_bytes(&inner, 0, &mut base)?;
        Ok(Self { inner, log: Arc::new(WriteLog::new(base)) })
    }

    /// The log, which goes on growing.
    pub fn log(&self) -> Arc<WriteLog> {
        self.log.clone()
    }
}

impl<D: Disk> Disk for RecordingDisk<D> {
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
        self.inner.read_at(offset, buffers)
    }

    fn write_at(&self, offset: u64, buffers: &[VolatileSlice<'_>]) -> Result<(), DiskError> {
        check_range(self.capacity_bytes(), Operation::Write, offset, total_len(buffers))?;
        let mut bytes = copy_of(buffers);
        let begin = self.log.begin_write(offset, bytes.clone());
        self.inner.write_at(offset, &[VolatileSlice::from(&mut bytes[..])])?;
        self.log.end_change(begin);
        Ok(())
    }

    fn flush(&self) -> Result<(), DiskError> {
        let begin = self.log.begin_flush();
        self.inner.flush()?;
        self.log.end_flush(begin);
        Ok(())
    }

    fn discard(&self, offset: u64, len: u64) -> Result<(), DiskError> {
        check_range(self.capacity_bytes(), Operation::Discard, offset, len)?;
        let begin = self.log.begin_zero(offset, len);
        self.inner.discard(offset, len)?;
        self.log.end_change(begin);
        Ok(())
    }

    fn write_zeroes(&self, offset: u64, len: u64, unmap: bool) -> Result<(), DiskError> {
        check_range(self.capacity_bytes(), Operation::WriteZeroes, offset, len)?;
        let begin = self.log.begin_zero(offset, len);
        self.inner.write_zeroes(offset, len, unmap)?;
        self.log.end_change(begin);
        Ok(())
    }

    fn resize(&self, capacity: u64) -> Result<(), DiskError> {
        self.inner.resize(capacity)
    }

    fn metrics(&self) -> &DiskMetrics {
        self.inner.metrics()
    }
}

/// Records what a format does to its file.
pub struct RecordingFile<F> {
    inner: F,
    log: Arc<WriteLog>,
}

impl<F: ImageFile> RecordingFile<F> {
    /// Starts recording a file of `size` bytes; reads it once for the content that cuts start from.
    pub fn new(inner: F, size: u64) -> io::Result<Self> {
        let mut base = vec![0; size as usize];
        inner.read_at(0, &[VolatileSlice::from(&mut base[..])])?;
        Ok(Self { inner, log: Arc::new(WriteLog::new(base)) })
    }

    /// The log, which goes on growing.
    pub fn log(&self) -> Arc<WriteLog> {
        self.log.clone()
    }

    fn zeroing(&self, offset: u64, len: u64, operation: impl Fn(&F) -> io::Result<()>) -> io::Result<()> {
        let begin = self.log.begin_zero(offset, len);
        let result = operation(&self.inner);
        match &result {
            Ok(()) => self.log.end_change(begin),
            Err(error) if error.kind() == io::ErrorKind::Unsupported => self.log.cancel_change(begin),
            Err(_) => {}
        }
        result
    }
}

impl<F: ImageFile> ImageFile for RecordingFile<F> {
    fn read_at(&self, offset: u64, buffers: &[VolatileSlice<'_>]) -> io::Result<usize> {
        self.inner.read_at(offset, buffers)
    }

    fn write_at(&self, offset: u64, buffers: &[VolatileSlice<'_>]) -> io::Result<()> {
        let mut bytes = copy_of(buffers);
        let begin = self.log.begin_write(offset, bytes.clone());
        self.inner.write_at(offset, &[VolatileSlice::from(&mut bytes[..])])?;
        self.log.end_change(begin);
        Ok(())
    }

    fn sync_data(&self) -> io::Result<()> {
        let begin = self.log.begin_flush();
        self.inner.sync_data()?;
        self.log.end_flush(begin);
        Ok(())
    }

    fn punch_hole(&self, offset: u64, len: u64) -> io::Result<()> {
        self.zeroing(offset, len, |inner| inner.punch_hole(offset, len))
    }

    fn zero_range(&self, offset: u64, len: u64) -> io::Result<()> {
        self.zeroing(offset, len, |inner| inner.zero_range(offset, len))
    }
}
