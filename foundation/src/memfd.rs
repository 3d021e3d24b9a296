//! Anonymous memory with a descriptor (`memfd_create(2)`): it can be mapped several times and handed to
//! another process.
//!
//! Sealing matters for safety: a [`Mapping`](crate::Mapping) of a file that somebody truncates faults with
//! `SIGBUS`. A [`Memfd`] is therefore sealed against shrinking from its creation; the other seals are the
//! caller's choice.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::{MemfdFlags, SealFlags};

/// What shall never again be done to the memory.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Seals {
    /// It does not grow.
    pub grow: bool,
    /// Nobody writes to it: not through a mapping made later, not by `write(2)`. The kernel refuses this seal
    /// while a writable shared mapping exists.
    pub write: bool,
    /// As `write`, but writable shared mappings that exist now stay writable.
    pub future_write: bool,
    /// No further seal can be set.
    pub seal: bool,
}

/// Memory behind a descriptor, zero when created, sealed against shrinking.
#[derive(Debug)]
pub struct Memfd {
    fd: OwnedFd,
    size: u64,
}

impl Memfd {
    /// Creates `size` bytes of zeros; host memory is used only as pages are touched. `name` is shown in
    /// `/proc/PID/maps` and need not be unique; it must hold no NUL byte and at most 249 bytes.
    pub fn create(name: &str, size: u64) -> io::Result<Self> {
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING | MemfdFlags::NOEXEC_SEAL;
        let fd = match rustix::fs::memfd_create(name, flags) {
            // Kernels before 6.3 do not know NOEXEC_SEAL.
            Err(rustix::io::Errno::INVAL) => {
                rustix::fs::memfd_create(name, MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?
            }
            other => other?,
        };
        rustix::fs::ftruncate(&fd, size)?;
        rustix::fs::fcntl_add_seals(&fd, SealFlags::SHRINK)?;
        Ok(Self { fd, size })
    }

    /// Size in bytes.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Enlarges the memory to `size` bytes; the new bytes are zero. Refused with `InvalidInput` when `size` is
    /// smaller than the present size, with `PermissionDenied` when growing is sealed.
    pub fn grow(&mut self, size: u64) -> io::Result<()> {
        if size < self.size {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "a memfd never shrinks"));
        }
        rustix::fs::ftruncate(&self.fd, size)?;
        self.size = size;
        Ok(())
    }

    /// Adds seals; seals are never taken back.
    pub fn seal(&self, seals: Seals) -> io::Result<()> {
        let mut flags = SealFlags::SHRINK;
        flags.set(SealFlags::GROW, seals.grow);
        flags.set(SealFlags::WRITE, seals.write);
        flags.set(SealFlags::FUTURE_WRITE, seals.future_write);
        flags.set(SealFlags::SEAL, seals.seal);
        Ok(rustix::fs::fcntl_add_seals(&self.fd, flags)?)
    }

    /// Gives the pages of a range back to the host; the range then reads as zero, in every mapping. Offset and
    /// length are in bytes; partial pages at the ends are zeroed.
    pub fn punch_hole(&self, offset: u64, len: u64) -> io::Result<()> {
        let flags = rustix::fs::FallocateFlags::PUNCH_HOLE | rustix::fs::FallocateFlags::KEEP_SIZE;
        Ok(rustix::fs::fallocate(&self.fd, flags, offset, len)?)
    }

    /// A second owner of the same memory.
    pub fn try_clone(&self) -> io::Result<Self> {
        Ok(Self { fd: self.fd.try_clone()?, size: self.size })
    }
}

impl AsFd for Memfd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::ErrorKind;

    #[test]
    fn new_memory_reads_as_zero_and_has_its_size() {
        let memory = Memfd::create("test", 8192).unwrap();
        let mut buffer = [1u8; 8192];
        assert_eq!(rustix::io::pread(&memory, &mut buffer, 0).unwrap(), 8192);
        assert!(buffer.iter().all(|b| *b == 0));
        assert_eq!(memory.size(), 8192);
    }

    #[test]
    fn it_grows_but_never_shrinks() {
        let mut memory = Memfd::create("test", 4096).unwrap();
        memory.grow(8192).unwrap();
        assert_eq!(memory.size(), 8192);
        assert_eq!(memory.grow(4096).unwrap_err().kind(), ErrorKind::InvalidInput);
        assert!(rustix::fs::ftruncate(&memory, 4096).is_err(), "the seal holds against everybody");
    }

    #[test]
    fn seals_are_enforced() {
        let mut memory = Memfd::create("test", 4096).unwrap();
        memory.seal(Seals { grow: true, write: true, ..Seals::default() }).unwrap();
        assert_eq!(memory.grow(8192).unwrap_err().kind(), ErrorKind::PermissionDenied);
        assert!(rustix::io::pwrite(&memory, b"x", 0).is_err());
    }

    #[test]
    fn a_punched_hole_reads_as_zero() {
        let memory = Memfd::create("test", 8192).unwrap();
        rustix::io::pwrite(&memory, &[7u8; 8192], 0).unwrap();
        memory.punch_hole(0, 4096).unwrap();
        let mut buffer = [1u8; 8192];
        rustix::io::pread(&memory, &mut buffer, 0).unwrap();
        assert!(buffer[..4096].iter().all(|b| *b == 0) && buffer[4096..].iter().all(|b| *b == 7));
    }
}
