//! Host mappings that live as long as their owner, and the process-wide memory barrier.
//!
//! Private to [`crate::memory`]: nothing else in this crate maps host memory.
#![allow(unsafe_code)]
// UNSAFETY: guest memory is host memory that the guest writes behind Rust's back; it has to be mapped and reached
// through raw pointers.

use std::io;
use std::os::fd::BorrowedFd;
use std::ptr::NonNull;
use std::sync::OnceLock;
use std::sync::atomic::{Ordering, fence};

use rustix::mm::{Advice, MapFlags, ProtFlags};
use rustix::thread::{MembarrierCommand, membarrier};

/// A readable and writable mapping, unmapped on drop.
pub(super) struct Mapping {
    start: NonNull<u8>,
    len: usize,
}

// SAFETY: a mapping is plain memory that belongs to the process, not to a thread; every access through the
// pointer is atomic or volatile and is justified where it happens.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Maps `len` bytes of `file` from its start, shared, without reserving swap.
    pub(super) fn of_file(file: BorrowedFd<'_>, len: usize) -> io::Result<Self> {
        Self::shared(file, len, MapFlags::NORESERVE)
    }

    /// As [`Mapping::of_file`], for a file in the host's pool of huge pages: they are reserved now, so that no
    /// later access fails for want of one.
    pub(super) fn of_file_reserved(file: BorrowedFd<'_>, len: usize) -> io::Result<Self> {
        Self::shared(file, len, MapFlags::empty())
    }

    fn shared(file: BorrowedFd<'_>, len: usize, flags: MapFlags) -> io::Result<Self> {
        let flags = MapFlags::SHARED | flags;
        // SAFETY: a new mapping at an address of the kernel's choice replaces nothing.
        let start = unsafe {
            rustix::mm::mmap(std::ptr::null_mut(), len, ProtFlags::READ | ProtFlags::WRITE, flags, file, 0)?
        };
        Self::from_raw(start.cast(), len)
    }

    /// Maps `len` zero bytes that cost host memory only once they are written.
    pub(super) fn anonymous(len: usize) -> io::Result<Self> {
        let flags = MapFlags::PRIVATE | MapFlags::NORESERVE;
        // SAFETY: a new mapping at an address of the kernel's choice replaces nothing.
        let start = unsafe {
            rustix::mm::mmap_anonymous(std::ptr::null_mut(), len, ProtFlags::READ | ProtFlags::WRITE, flags)?
        };
        Self::from_raw(start.cast(), len)
    }

    fn from_raw(start: *mut u8, len: usize) -> io::Result<Self> {
        let start = NonNull::new(start).ok_or_else(|| io::Error::other("mmap returned address 0"))?;
        Ok(Self { start, len })
    }

    /// Tells the host how the whole mapping will be used. Advice that this kernel does not know is ignored:
    /// it never changes what the memory holds.
    pub(super) fn advise(&self, advice: Advice) {
        debug_assert!(!matches!(advice, Advice::LinuxDontNeed));
        // SAFETY: the range is our own mapping, and the callers pass advice that does not discard contents.
        let _ = unsafe { rustix::mm::madvise(self.start.as_ptr().cast(), self.len, advice) };
    }

    /// Lets the memory come from NUMA node `node` only (`mbind(2)` with `MPOL_BIND`). Call it before the first touch.
    pub(super) fn bind(&self, node: u32) -> io::Result<()> {
        /// Most nodes of a Linux kernel (`NODES_SHIFT` is at most 10).
        const MAX_NODES: u32 = 1024;
        if node >= MAX_NODES {
            return Err(io::Error::from(io::ErrorKind::InvalidInput));
        }
        let mut mask = [0u64; MAX_NODES as usize / 64];
        mask[node as usize / 64] = 1 << (node % 64);
        // SAFETY: the range is our own mapping; the mask outlives the call and has the bits that are announced. The
        // kernel counts one bit less than it is told.
        let result = unsafe {
            libc::syscall(
                libc::SYS_mbind,
                self.start.as_ptr(),
                self.len,
                libc::MPOL_BIND,
                mask.as_ptr(),
                u64::from(MAX_NODES) + 1,
                0,
            )
        };
        if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
    }

    /// Locks every page once it is touched (`mlock2(2)` with `MLOCK_ONFAULT`).
    pub(super) fn lock_on_touch(&self) -> io::Result<()> {
        // SAFETY: the range is our own mapping. Locking changes nothing of what it holds.
        unsafe {
            Ok(rustix::mm::mlock_with(self.start.as_ptr().cast(), self.len, rustix::mm::MlockFlags::ONFAULT)?)
        }
    }

    /// Obtains the pages of a range as if each were written (`MADV_POPULATE_WRITE`, Linux 5.14), without changing
    /// them. A host that has not enough is an error, not a signal.
    pub(super) fn populate(&self, offset: usize, len: usize) -> io::Result<()> {
        if offset.checked_add(len).is_none_or(|end| end > self.len) {
            return Err(io::Error::from(io::ErrorKind::InvalidInput));
        }
        let start = self.start.as_ptr().wrapping_add(offset).cast();
        // SAFETY: the range was checked to lie inside our own mapping; populating discards nothing.
        unsafe { rustix::mm::madvise(start, len, Advice::LinuxPopulateWrite)? };
        Ok(())
    }

    /// Bytes.
    pub(super) fn len(&self) -> usize {
        self.len
    }

    /// First byte.
    pub(super) fn as_ptr(&self) -> *mut u8 {
        self.start.as_ptr()
    }

    /// The mapping as atomics of type `T`.
    ///
    /// Only instantiated with `AtomicU8` and `AtomicU32`, for which every bit pattern is valid.
    pub(super) fn as_atomics<T: AtomicCell>(&self) -> &[T] {
        let count = self.len / size_of::<T>();
        // SAFETY: the mapping is page aligned, `count * size_of::<T>()` bytes long, initialised (zero pages),
        // alive as long as `self`, and only ever reached through atomics.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr().cast(), count) }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the range is our own mapping, and no reference into it outlives `self`.
        let _ = unsafe { rustix::mm::munmap(self.start.as_ptr().cast(), self.len) };
    }
}

/// Atomic integers: valid for every bit pattern, zero included.
pub(super) trait AtomicCell {}
impl AtomicCell for std::sync::atomic::AtomicU8 {}
impl AtomicCell for std::sync::atomic::AtomicU32 {}

/// Makes every thread of the process execute a full memory barrier before this returns.
///
/// It lets the threads that store to guest memory do without a fence of their own: see [`super::RamBlock`].
/// Where the kernel has no `membarrier` (before Linux 4.14, or a sandbox that denies it) this is only a local
/// fence, and a store that races with [`super::RamBlock::protect_code`] or [`super::DirtyReader::take`] on
/// another processor may be missed; [`has_process_barrier`] tells.
pub(super) fn process_barrier() {
    if has_process_barrier() {
        // The only error after a successful registration would be a seccomp filter that was added since.
        let _ = membarrier(MembarrierCommand::PrivateExpedited);
    }
    fence(Ordering::SeqCst);
}

/// Whether the kernel gives [`process_barrier`] its full meaning.
pub(super) fn has_process_barrier() -> bool {
    static REGISTERED: OnceLock<bool> = OnceLock::new();
    *REGISTERED.get_or_init(|| {
        membarrier(MembarrierCommand::RegisterPrivateExpedited).is_ok()
            && membarrier(MembarrierCommand::PrivateExpedited).is_ok()
    })
}
