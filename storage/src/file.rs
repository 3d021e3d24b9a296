//! The seam below the image formats: what a format needs of the file it is kept in.
//!
//! Formats are generic over [`ImageFile`], so that tests can put a layer under a format that records, loses or
//! fails what the format does. [`HostFile`] is the real one.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};

use atoll_foundation::{file_lock, volatile_io};
use rustix::fs::FallocateFlags;
use vm_memory::VolatileSlice;

/// A file or device of the host that holds an image. Methods may be called from several threads at once; every
/// error is the host's, with `Unsupported` for what the file system cannot do.
pub trait ImageFile: Send + Sync {
    /// Fills the buffers from byte `offset`; returns how many bytes there were, short only at end of file.
    fn read_at(&self, offset: u64, buffers: &[VolatileSlice<'_>]) -> io::Result<usize>;

    /// Writes all buffers from byte `offset`; a regular file grows as needed.
    fn write_at(&self, offset: u64, buffers: &[VolatileSlice<'_>]) -> io::Result<()>;

    /// Makes durable what was written, and as much metadata as reading it back needs.
    fn sync_data(&self) -> io::Result<()>;

    /// Releases a range, which then reads as zero; the size stays.
    fn punch_hole(&self, offset: u64, len: u64) -> io::Result<()>;

    /// Makes a range read as zero and keeps it allocated; the size stays.
    fn zero_range(&self, offset: u64, len: u64) -> io::Result<()>;

    /// Makes the file `len` bytes long, which is longer than it is; the new bytes read as zero.
    fn grow(&self, _len: u64) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }

    /// [`ImageFile::read_at`] of all bytes if that needs no waiting for a device. `None`: it would wait or reach the
    /// end of the file, or this cannot tell; parts of the buffers may have been filled.
    fn try_read_at(&self, _offset: u64, _buffers: &[VolatileSlice<'_>]) -> Option<()> {
        None
    }

    /// The host's descriptor, when reading and writing that is the same as reading and writing this; writes to it
    /// only fill the page cache.
    fn descriptor(&self) -> Option<BorrowedFd<'_>> {
        None
    }
}

/// A regular file or block device, through the host's page cache.
#[derive(Debug)]
pub struct HostFile {
    file: File,
}

impl HostFile {
    /// Takes over an open file. Access rights are as it was opened.
    pub fn new(file: File) -> Self {
        Self { file }
    }

    fn fallocate(&self, flags: FallocateFlags, offset: u64, len: u64) -> io::Result<()> {
        loop {
            match rustix::fs::fallocate(self.file.as_fd(), flags | FallocateFlags::KEEP_SIZE, offset, len) {
                Ok(()) => return Ok(()),
                Err(rustix::io::Errno::INTR) => {}
                // Old file systems and network file systems answer with this for an unknown mode.
                Err(rustix::io::Errno::NOSYS) => return Err(io::ErrorKind::Unsupported.into()),
                Err(error) => return Err(error.into()),
            }
        }
    }
}

impl Drop for HostFile {
    /// Gives up the lock that the opening may have. Closing alone would leave it with a process that is just
    /// being started and has not closed its copy of the descriptor yet.
    fn drop(&mut self) {
        let _ = file_lock::unlock(&self.file);
    }
}

impl ImageFile for HostFile {
    fn read_at(&self, offset: u64, buffers: &[VolatileSlice<'_>]) -> io::Result<usize> {
        volatile_io::read_at(&self.file, offset, buffers)
    }

    fn write_at(&self, offset: u64, buffers: &[VolatileSlice<'_>]) -> io::Result<()> {
        volatile_io::write_all_at(&self.file, offset, buffers)
    }

    fn sync_data(&self) -> io::Result<()> {
        self.file.sync_data()
    }

    fn punch_hole(&self, offset: u64, len: u64) -> io::Result<()> {
        self.fallocate(FallocateFlags::PUNCH_HOLE, offset, len)
    }

    fn zero_range(&self, offset: u64, len: u64) -> io::Result<()> {
        self.fallocate(FallocateFlags::ZERO_RANGE, offset, len)
    }

    fn grow(&self, len: u64) -> io::Result<()> {
        if self.file.metadata()?.file_type().is_file() {
            return self.file.set_len(len);
        }
        // A device is as long as it is; somebody may have made it longer meanwhile.
        let size = rustix::fs::seek(&self.file, rustix::fs::SeekFrom::End(0))?;
        let text = format!("the device has {size} bytes; make it longer first");
        if size >= len { Ok(()) } else { Err(io::Error::new(io::ErrorKind::Unsupported, text)) }
    }

    fn try_read_at(&self, offset: u64, buffers: &[VolatileSlice<'_>]) -> Option<()> {
        volatile_io::read_cached_at(&self.file, offset, buffers).map(drop)
    }

    fn descriptor(&self) -> Option<BorrowedFd<'_>> {
        Some(self.file.as_fd())
    }
}

impl<T: ImageFile + ?Sized> ImageFile for std::sync::Arc<T> {
    fn read_at(&self, offset: u64, buffers: &[VolatileSlice<'_>]) -> io::Result<usize> {
        (**self).read_at(offset, buffers)
    }

    fn write_at(&self, offset: u64, buffers: &[VolatileSlice<'_>]) -> io::Result<()> {
        (**self).write_at(offset, buffers)
    }

    fn sync_data(&self) -> io::Result<()> {
        (**self).sync_data()
    }

    fn punch_hole(&self, offset: u64, len: u64) -> io::Result<()> {
        (**self).punch_hole(offset, len)
    }

    fn zero_range(&self, offset: u64, len: u64) -> io::Result<()> {
        (**self).zero_range(offset, len)
    }

    fn grow(&self, len: u64) -> io::Result<()> {
        (**self).grow(len)
    }

    fn try_read_at(&self, offset: u64, buffers: &[VolatileSlice<'_>]) -> Option<()> {
        (**self).try_read_at(offset, buffers)
    }

    fn descriptor(&self) -> Option<BorrowedFd<'_>> {
        (**self).descriptor()
    }
}
