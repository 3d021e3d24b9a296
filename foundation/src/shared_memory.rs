//! Memory that two processes write to: a mapped memfd, with accessors that expect the other side to change any
//! byte at any moment.
//!
//! [`SharedMemory`] gives out no plain reference to the bytes, only [`VolatileSlice`]s and atomic words. It says
//! nothing about what the bytes mean; who reads one that matters makes a private copy first and judges the copy.
//!
//! The other side cannot make an access fault: [`SharedMemory::map`] refuses a descriptor that could still be
//! truncated or is shorter than what is mapped.

#![allow(unsafe_code)]
// UNSAFETY: making a volatile slice of mapped memory is a promise about the mapping, kept here.

use std::io;
use std::os::fd::AsFd;
use std::sync::atomic::AtomicU32;

use rustix::fs::SealFlags;
use vm_memory::VolatileSlice;

use crate::mapping::{Advice, Mapping, Protection, Sharing};

/// A shared, readable and writable mapping of sealed memory.
#[derive(Debug)]
pub struct SharedMemory {
    mapping: Mapping,
}

impl SharedMemory {
    /// Maps the first `len` bytes of a memfd. Fails with `InvalidInput` when `len` is zero or larger than the
    /// memory, or when the memory is not sealed against shrinking (as every [`Memfd`](crate::Memfd) is), and
    /// with the kernel's error when it cannot be mapped.
    pub fn map(fd: impl AsFd, len: usize) -> io::Result<Self> {
        let invalid = |text| io::Error::new(io::ErrorKind::InvalidInput, text);
        let fd = fd.as_fd();
        let seals = rustix::fs::fcntl_get_seals(fd)
            .map_err(|_| invalid("the descriptor is not memory that can be sealed"))?;
        if !seals.contains(SealFlags::SHRINK) {
            return Err(invalid("the shared memory is not sealed against shrinking"));
        }
        let size = rustix::fs::fstat(fd)?.st_size;
        if usize::try_from(size).map_or(true, |size| size < len) {
            return Err(invalid("the shared memory is shorter than what it shall hold"));
        }
        let mapping = Mapping::of_fd(fd, 0, len, Sharing::Shared, Protection::ReadWrite)?;
        // Frames and keys of a guest have no place in a core dump. Only a wish: an old kernel may not know it.
        let _ = mapping.advise(0, len, Advice::DontDump);
        Ok(Self { mapping })
    }

    /// Length in bytes, never zero.
    pub fn len(&self) -> usize {
        self.mapping.len()
    }

    /// Always false: an empty mapping cannot be made.
    pub fn is_empty(&self) -> bool {
        false
    }

    /// All of it.
    pub fn all(&self) -> VolatileSlice<'_> {
        // SAFETY: the range is mapped readable and writable for as long as `self`, which the slice borrows,
        // lives; it cannot shrink under the mapping (checked seal and size); and no reference to its bytes
        // exists, because this type gives out volatile slices and atomics only.
        unsafe { VolatileSlice::new(self.mapping.as_ptr(), self.mapping.len()) }
    }

    /// `len` bytes from byte `offset`. `None` when they are not all within the memory.
    pub fn slice(&self, offset: usize, len: usize) -> Option<VolatileSlice<'_>> {
        self.all().subslice(offset, len).ok()
    }

    /// The 32-bit word in native byte order at byte `offset`, a multiple of four. `None` when it is not within
    /// the memory or not aligned.
    pub fn word(&self, offset: usize) -> Option<&AtomicU32> {
        // The mapping begins on a page boundary, so that alignment of the offset is alignment of the address.
        let address = self.mapping.as_ptr().wrapping_add(offset).cast::<u32>();
        let fits = offset.checked_add(4).is_some_and(|end| end <= self.mapping.len());
        if !fits || !address.is_aligned() {
            return None;
        }
        // SAFETY: in range and aligned, mapped readable and writable for as long as `self`, which the result
        // borrows. Everybody in this process accesses these bytes atomically or through volatile slices; what
        // another process does is, to this one, memory that changes, which an atomic allows.
        Some(unsafe { AtomicU32::from_ptr(address) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memfd::Memfd;
    use std::sync::atomic::Ordering;

    #[test]
    fn two_mappings_share_words_and_bytes() {
        let memory = Memfd::create("test", 8192).unwrap();
        let (a, b) = (SharedMemory::map(&memory, 8192).unwrap(), SharedMemory::map(&memory, 8192).unwrap());
        a.word(4096).unwrap().store(7, Ordering::Release);
        assert_eq!(b.word(4096).unwrap().load(Ordering::Acquire), 7);
        a.slice(8000, 192).unwrap().copy_from(&[5u8; 192]);
        let mut copy = [0u8; 192];
        b.slice(8000, 192).unwrap().copy_to(&mut copy);
        assert_eq!(copy, [5; 192]);
    }

    #[test]
    fn what_lies_outside_is_not_given_out() {
        let memory = SharedMemory::map(Memfd::create("test", 4096).unwrap(), 4096).unwrap();
        assert!(memory.slice(0, 4097).is_none() && memory.slice(usize::MAX, 2).is_none());
        assert!(memory.slice(4096, 0).is_some_and(|s| s.is_empty()));
        assert!(memory.word(4096).is_none() && memory.word(4093).is_none() && memory.word(2).is_none());
        assert!(memory.word(usize::MAX - 3).is_none());
        assert!(memory.word(4092).is_some());
    }

    #[test]
    fn memory_that_could_go_away_is_refused() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(8192).unwrap();
        assert!(SharedMemory::map(&file, 4096).is_err(), "a file can be truncated");
        let unsealed = rustix::fs::memfd_create("test", rustix::fs::MemfdFlags::ALLOW_SEALING).unwrap();
        rustix::fs::ftruncate(&unsealed, 8192).unwrap();
        assert!(SharedMemory::map(&unsealed, 4096).is_err(), "so can an unsealed memfd");
        assert!(SharedMemory::map(Memfd::create("test", 4096).unwrap(), 8192).is_err(), "too short");
        assert!(SharedMemory::map(Memfd::create("test", 4096).unwrap(), 0).is_err(), "empty");
    }
}
