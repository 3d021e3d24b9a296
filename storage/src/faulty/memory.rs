//! An image file in memory.

use std::io;
use std::sync::{Mutex, PoisonError};

use vm_memory::VolatileSlice;

use crate::disk::total_len;
use crate::file::ImageFile;

/// A file that is a vector. Writing far behind the end fails as a full disk would.
#[derive(Debug, Default)]
pub struct MemoryFile {
    bytes: Mutex<Vec<u8>>,
    limit: u64,
}

impl MemoryFile {
    /// A file with this content that can grow to `limit` bytes.
    pub fn new(bytes: Vec<u8>, limit: u64) -> Self {
        Self { bytes: Mutex::new(bytes), limit }
    }

    /// The content now.
    pub fn content(&self) -> Vec<u8> {
        self.bytes.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn change(&self, offset: u64, len: u64, grow: bool, apply: impl FnOnce(&mut [u8])) -> io::Result<()> {
        let mut bytes = self.bytes.lock().unwrap_or_else(PoisonError::into_inner);
        let mut end = offset.checked_add(len).ok_or(io::ErrorKind::FileTooLarge)?;
        if grow && end > bytes.len() as u64 {
            if end > self.limit {
                return Err(io::ErrorKind::StorageFull.into());
            }
            bytes.resize(end as usize, 0);
        }
        end = end.min(bytes.len() as u64);
        apply(&mut bytes[offset.min(end) as usize..end as usize]);
        Ok(())
    }
}

impl ImageFile for MemoryFile {
    fn read_at(&self, offset: u64, buffers: &[VolatileSlice<'_>]) -> io::Result<usize> {
        let bytes = self.bytes.lock().unwrap_or_else(PoisonError::into_inner);
        let mut rest = bytes.get(offset.min(bytes.len() as u64) as usize..).unwrap_or(&[]);
        let mut count = 0;
        for buffer in buffers {
            let (now, later) = rest.split_at(buffer.len().min(rest.len()));
            buffer.copy_from(now);
            count += now.len();
            rest = later;
        }
        Ok(count)
    }

    fn write_at(&self, offset: u64, buffers: &[VolatileSlice<'_>]) -> io::Result<()> {
        self.change(offset, total_len(buffers), true, |mut target| {
            for buffer in buffers {
                let (now, later) = std::mem::take(&mut target).split_at_mut(buffer.len());
                buffer.copy_to(now);
                target = later;
            }
        })
    }

    fn sync_data(&self) -> io::Result<()> {
        Ok(())
    }

    fn punch_hole(&self, offset: u64, len: u64) -> io::Result<()> {
        self.change(offset, len, false, |target| target.fill(0))
    }

    fn zero_range(&self, offset: u64, len: u64) -> io::Result<()> {
        self.change(offset, len, false, |target| target.fill(0))
    }
}
