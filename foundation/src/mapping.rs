//! The owner of a range of mapped memory (`mmap(2)`).
//!
//! [`Mapping`] gives out an address and a length but never a reference, because the memory may be shared with
//! other threads, other processes and, for a file, with whoever writes the file. Access is the business of a
//! layer that knows the rules (volatile or atomic access). Dropping the owner unmaps the range.
//!
//! A mapping of a file that is truncated behind its back faults with `SIGBUS`; map sealed memory
//! ([`Memfd`](crate::Memfd)) where the descriptor may be in other hands.

#![allow(unsafe_code)]
// UNSAFETY: mmap, munmap, mprotect and madvise have no safe form, because they make and change memory.

use std::ffi::c_void;
use std::io;
use std::os::fd::AsFd;
use std::ptr::NonNull;

use rustix::mm::{MapFlags, MprotectFlags, ProtFlags};

/// What may be done with mapped memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Protection {
    /// Nothing: any access faults. For guard pages and for address space reserved for later.
    None,
    /// Reading.
    Read,
    /// Reading and writing.
    ReadWrite,
    /// Reading and executing.
    ReadExecute,
}

impl Protection {
    fn map_flags(self) -> ProtFlags {
        match self {
            Self::None => ProtFlags::empty(),
            Self::Read => ProtFlags::READ,
            Self::ReadWrite => ProtFlags::READ | ProtFlags::WRITE,
            Self::ReadExecute => ProtFlags::READ | ProtFlags::EXEC,
        }
    }

    fn change_flags(self) -> MprotectFlags {
        match self {
            Self::None => MprotectFlags::empty(),
            Self::Read => MprotectFlags::READ,
            Self::ReadWrite => MprotectFlags::READ | MprotectFlags::WRITE,
            Self::ReadExecute => MprotectFlags::READ | MprotectFlags::EXEC,
        }
    }
}

/// Who sees the writes to a mapping of a descriptor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sharing {
    /// Everybody who has the file or memory.
    Shared,
    /// Only this mapping: a page written is first copied. A page not yet written still shows what others write
    /// to the file, and `DontNeed` brings the file's content back.
    Private,
}

/// Hints and requests to the kernel about a range (`madvise(2)`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Advice {
    /// Use huge pages if the host offers them.
    HugePage,
    /// Use no huge pages.
    NoHugePage,
    /// Leave the range out of core dumps.
    DontDump,
    /// Do not give the range to a child process.
    DontFork,
    /// The range will be used soon.
    WillNeed,
    /// Release the pages now. Anonymous memory reads as zero afterwards, a private mapping of a file shows the
    /// file again, a shared mapping keeps its content.
    DontNeed,
    /// Merge equal pages (anonymous and private memory only).
    Mergeable,
}

impl Advice {
    fn number(self) -> libc::c_int {
        match self {
            Self::HugePage => libc::MADV_HUGEPAGE,
            Self::NoHugePage => libc::MADV_NOHUGEPAGE,
            Self::DontDump => libc::MADV_DONTDUMP,
            Self::DontFork => libc::MADV_DONTFORK,
            Self::WillNeed => libc::MADV_WILLNEED,
            Self::DontNeed => libc::MADV_DONTNEED,
            Self::Mergeable => libc::MADV_MERGEABLE,
        }
    }
}

/// A range of mapped memory, unmapped on drop. The length is rounded up to whole pages by the kernel;
/// [`Mapping::len`] is what was asked for.
#[derive(Debug)]
pub struct Mapping {
    address: NonNull<u8>,
    len: usize,
}

// SAFETY: a `Mapping` is an address range of the process, not of a thread, and gives no references into it.
unsafe impl Send for Mapping {}
// SAFETY: as above; every method that takes `&self` is a system call that the kernel serialises.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Maps `len` bytes of private zeros. No swap or overcommit is reserved: memory is used as it is touched.
    pub fn anonymous(len: usize, protection: Protection) -> io::Result<Self> {
        check_len(len)?;
        let flags = MapFlags::PRIVATE | MapFlags::NORESERVE;
        // SAFETY: without MAP_FIXED the kernel chooses an unused range, so no existing memory is affected.
        let address =
            unsafe { rustix::mm::mmap_anonymous(std::ptr::null_mut(), len, protection.map_flags(), flags)? };
        Self::adopt(address, len)
    }

    /// Maps `len` bytes of a file, memfd or device from byte `offset`, which must be a multiple of the page
    /// size (`InvalidInput` otherwise). Bytes beyond the end of the file fault when touched.
    pub fn of_fd(
        fd: impl AsFd,
        offset: u64,
        len: usize,
        sharing: Sharing,
        protection: Protection,
    ) -> io::Result<Self> {
        check_len(len)?;
        let flags = match sharing {
            Sharing::Shared => MapFlags::SHARED,
            Sharing::Private => MapFlags::PRIVATE,
        } | MapFlags::NORESERVE;
        // SAFETY: without MAP_FIXED the kernel chooses an unused range, so no existing memory is affected.
        let address = unsafe {
            rustix::mm::mmap(std::ptr::null_mut(), len, protection.map_flags(), flags, fd.as_fd(), offset)?
        };
        Self::adopt(address, len)
    }

    fn adopt(address: *mut c_void, len: usize) -> io::Result<Self> {
        match NonNull::new(address.cast::<u8>()) {
            Some(address) => Ok(Self { address, len }),
            None => Err(io::Error::other("the kernel mapped memory at address zero")),
        }
    }

    /// The first byte. Valid for [`Mapping::len`] bytes while `self` lives; who dereferences it vouches for
    /// protection and concurrent access.
    pub fn as_ptr(&self) -> *mut u8 {
        self.address.as_ptr()
    }

    /// Length in bytes, never zero.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Always false: an empty mapping cannot be made.
    pub fn is_empty(&self) -> bool {
        false
    }

    /// Changes what may be done with `len` bytes from byte `offset`, which must be on a page boundary. Code
    /// that accesses the range against its protection faults.
    pub fn protect(&self, offset: usize, len: usize, protection: Protection) -> io::Result<()> {
        let address = self.sub_range(offset, len)?;
        // SAFETY: the range lies within this mapping; no references into it exist.
        unsafe { rustix::mm::mprotect(address.cast(), len, protection.change_flags())? };
        Ok(())
    }

    /// Gives advice about `len` bytes from byte `offset`, which must be on a page boundary.
    pub fn advise(&self, offset: usize, len: usize, advice: Advice) -> io::Result<()> {
        let address = self.sub_range(offset, len)?;
        // SAFETY: the range lies within this mapping. Of the advices offered only DONTNEED changes content, and
        // no references into the memory exist that would notice.
        let result = unsafe { libc::madvise(address.cast(), len, advice.number()) };
        if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
    }

    fn sub_range(&self, offset: usize, len: usize) -> io::Result<*mut u8> {
        match offset.checked_add(len) {
            Some(end) if end <= self.len => Ok(self.address.as_ptr().wrapping_add(offset)),
            _ => Err(io::Error::new(io::ErrorKind::InvalidInput, "range outside the mapping")),
        }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the range was mapped by this value, is unmapped only here, and nothing borrowed from it lives
        // longer than it. A failure is impossible for a valid range; leaking would be the only consequence.
        let result = unsafe { rustix::mm::munmap(self.address.as_ptr().cast(), self.len) };
        debug_assert!(result.is_ok(), "unmapping failed");
    }
}

fn check_len(len: usize) -> io::Result<()> {
    if len == 0 {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "an empty mapping"));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memfd::Memfd;

    fn peek(mapping: &Mapping, offset: usize) -> u8 {
        assert!(offset < mapping.len());
        // SAFETY: in range, mapped readable by every test that calls this.
        unsafe { mapping.as_ptr().add(offset).read_volatile() }
    }

    fn poke(mapping: &Mapping, offset: usize, value: u8) {
        assert!(offset < mapping.len());
        // SAFETY: in range, mapped writable by every test that calls this.
        unsafe { mapping.as_ptr().add(offset).write_volatile(value) }
    }

    #[test]
    fn anonymous_memory_is_zero_and_writable() {
        let mapping = Mapping::anonymous(10_000, Protection::ReadWrite).unwrap();
        assert_eq!(peek(&mapping, 9_999), 0);
        poke(&mapping, 9_999, 5);
        assert_eq!(peek(&mapping, 9_999), 5);
    }

    #[test]
    fn two_shared_mappings_see_each_other_and_a_private_one_keeps_its_own() {
        let memory = Memfd::create("test", 8192).unwrap();
        let map = |sharing| Mapping::of_fd(&memory, 4096, 4096, sharing, Protection::ReadWrite).unwrap();
        let (a, b, private) = (map(Sharing::Shared), map(Sharing::Shared), map(Sharing::Private));
        poke(&private, 0, 9);
        poke(&a, 0, 3);
        poke(&a, 1, 4);
        assert_eq!((peek(&b, 0), peek(&b, 1)), (3, 4));
        assert_eq!(peek(&private, 0), 9, "its own copy");
        private.advise(0, 4096, Advice::DontNeed).unwrap();
        assert_eq!(peek(&private, 0), 3, "the base is back after DontNeed");
    }

    #[test]
    fn unmapped_on_drop() {
        let mapping = Mapping::anonymous(1 << 20, Protection::ReadWrite).unwrap();
        let line = format!("{:x}", mapping.as_ptr() as usize);
        let (first, len) = (mapping.as_ptr() as usize, mapping.len());
        drop(mapping);
        let maps = std::fs::read_to_string("/proc/self/smaps").unwrap();
        // Another test's thread may have mapped something there meanwhile, but not of this size and place.
        let again = maps.lines().any(|l| l.starts_with(&format!("{line}-{:x} ", first + len)));
        assert!(!again, "still mapped");
    }

    #[test]
    fn bad_ranges_are_refused() {
        assert!(Mapping::anonymous(0, Protection::Read).is_err());
        let memory = Memfd::create("test", 8192).unwrap();
        assert!(Mapping::of_fd(&memory, 5, 4096, Sharing::Shared, Protection::Read).is_err());
        let mapping = Mapping::anonymous(4096, Protection::ReadWrite).unwrap();
        assert!(mapping.advise(4096, 1, Advice::DontNeed).is_err());
        assert!(mapping.protect(usize::MAX, 2, Protection::Read).is_err());
    }

    #[test]
    fn protection_can_be_changed() {
        let mapping = Mapping::anonymous(8192, Protection::None).unwrap();
        mapping.protect(4096, 4096, Protection::ReadWrite).unwrap();
        poke(&mapping, 4096, 1);
        assert_eq!(peek(&mapping, 4096), 1);
    }
}
