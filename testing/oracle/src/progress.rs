//! What child processes tell their parent: a shared page of counters.

// UNSAFETY: maps memory that several processes share.
#![allow(unsafe_code)]

use std::io;
use std::os::fd::RawFd;
use std::ptr;
use std::sync::atomic::{AtomicU8, AtomicU64};

use crate::eligible::CATEGORIES;
use crate::explain::REASONS;

/// Most child processes.
pub const MAX_JOBS: usize = 64;

/// Why a case was not compared.
pub const SKIPPED: [&str; 6] =
    ["endless", "single-stepped", "not comparable", "stopped", "did not recur", "in the oracle's own memory"];

/// Counters. All zero to begin with.
#[repr(C)]
pub struct Progress {
    /// Per child: index of the case it runs, plus one.
    pub current: [AtomicU64; MAX_JOBS],
    /// Cases done.
    pub done: AtomicU64,
    /// Cases that differed.
    pub differences: AtomicU64,
    /// Cases by kind of their first instruction, see [`CATEGORIES`].
    pub categories: [AtomicU64; CATEGORIES.len()],
    /// Cases by the vector that ended them on the host.
    pub vectors: [AtomicU64; 32],
    /// Cases not compared, see [`SKIPPED`].
    pub skipped: [AtomicU64; SKIPPED.len()],
    /// Cases whose difference is explained, see [`REASONS`].
    pub explained: [AtomicU64; REASONS.len()],
    /// Encodings that were a case's first instruction and completed, by number, for each mode.
    pub covered: [[AtomicU8; 8192]; 3],
}

/// A mapping of a [`Progress`] and the descriptor behind it.
pub struct SharedProgress {
    pointer: *const Progress,
    fd: RawFd,
}

impl SharedProgress {
    /// New counters, in memory that children inherit.
    pub fn create() -> io::Result<Self> {
        // SAFETY: a system call; the descriptor is inherited on purpose.
        let fd = unsafe { libc::memfd_create(c"atoll-oracle-progress".as_ptr(), 0) };
        // SAFETY: a system call on the new descriptor.
        if fd < 0 || unsafe { libc::ftruncate(fd, size_of::<Progress>() as i64) } != 0 {
            return Err(io::Error::last_os_error());
        }
        Self::map(fd)
    }

    /// The counters behind an inherited descriptor.
    pub fn map(fd: RawFd) -> io::Result<Self> {
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        let len = size_of::<Progress>();
        // SAFETY: a new shared mapping at an address of the kernel's choice.
        let p = unsafe { libc::mmap(ptr::null_mut(), len, protection, libc::MAP_SHARED, fd, 0) };
        if p == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        Ok(Self { pointer: p.cast(), fd })
    }

    /// The descriptor, for a child.
    pub fn fd(&self) -> RawFd {
        self.fd
    }
}

impl std::ops::Deref for SharedProgress {
    type Target = Progress;
    fn deref(&self) -> &Progress {
        // SAFETY: the mapping has the size of a Progress, is never unmapped, and consists of atomics only.
        unsafe { &*self.pointer }
    }
}
