//! Executable memory for thunks: one memfd mapped twice, once writable and once executable, so that no page is
//! ever both. Code is appended; the arena is emptied as a whole. Each vCPU owns one, so no code is changed while
//! another thread runs it.
//!
//! Every arena starts with its fault exit: the place to which [`super::signal`] sends a thunk whose instruction
//! raised a host exception.

// UNSAFETY: maps memory and writes machine code into it.
#![allow(unsafe_code)]

use std::io;
use std::ptr::NonNull;
use std::sync::OnceLock;

use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};

use super::signal::{self, Registration};

/// Bytes of code per arena: room for about four thousand thunks. Pages are only backed once written.
pub(super) const ARENA_SIZE: usize = 1 << 20;

/// A writable and an executable view of the same memory.
pub(super) struct Arena {
    writable: NonNull<u8>,
    executable: NonNull<u8>,
    used: usize,
    reserved: usize,
    _registration: Registration,
}

// SAFETY: the mappings belong to this value alone and are not tied to a thread.
unsafe impl Send for Arena {}

impl Arena {
    /// Maps an empty arena that begins with `fault_exit`, and has the signal handler watch it.
    pub(super) fn new(fault_exit: &[u8]) -> io::Result<Self> {
        signal::install()?;
        let exec = MemfdFlags::CLOEXEC | MemfdFlags::EXEC;
        let file = memfd_create(c"atoll-thunks", exec)
            .or_else(|_| memfd_create(c"atoll-thunks", MemfdFlags::CLOEXEC))?;
        ftruncate(&file, ARENA_SIZE as u64)?;
        let map = |protection| {
            // SAFETY: a new mapping at an address of the kernel's choice.
            unsafe { mmap(std::ptr::null_mut(), ARENA_SIZE, protection, MapFlags::SHARED, &file, 0) }
        };
        let writable = map(ProtFlags::READ | ProtFlags::WRITE)?;
        let executable = match map(ProtFlags::READ | ProtFlags::EXEC) {
            Ok(executable) => executable,
            Err(error) => {
                // SAFETY: mapped above, not shared with anyone yet.
                let _ = unsafe { munmap(writable, ARENA_SIZE) };
                return Err(error.into());
            }
        };
        let non_null =
            |p: *mut core::ffi::c_void| NonNull::new(p.cast::<u8>()).unwrap_or(NonNull::dangling());
        let start = executable as usize;
        let mut arena = Self {
            writable: non_null(writable),
            executable: non_null(executable),
            used: 0,
            reserved: 0,
            _registration: signal::register(start, start + ARENA_SIZE),
        };
        arena.append(fault_exit);
        arena.reserved = arena.used;
        Ok(arena)
    }

    /// Appends code and returns its offset, or `None` when the arena is full.
    pub(super) fn append(&mut self, code: &[u8]) -> Option<u32> {
        let offset = self.used;
        let end = offset.checked_add(code.len())?;
        if end > ARENA_SIZE {
            return None;
        }
        // SAFETY: `offset..end` lies inside the writable mapping, and nobody holds a reference into it.
        unsafe {
            std::ptr::copy_nonoverlapping(code.as_ptr(), self.writable.as_ptr().add(offset), code.len())
        };
        self.used = end.next_multiple_of(32).min(ARENA_SIZE);
        serialize();
        u32::try_from(offset).ok()
    }

    /// Address at which code appended at `offset` runs.
    pub(super) fn address(&self, offset: u32) -> *const u8 {
        self.executable.as_ptr().cast_const().wrapping_add(offset as usize)
    }

    /// Forgets all code but the fault exit.
    pub(super) fn clear(&mut self) {
        self.used = self.reserved;
    }
}

impl Drop for Arena {
    fn drop(&mut self) {
        for mapping in [self.writable, self.executable] {
            // SAFETY: both were mapped by `new` with this size and nothing refers to them any more.
            let _ = unsafe { munmap(mapping.as_ptr().cast(), ARENA_SIZE) };
        }
    }
}

/// Serialises instruction execution, so that code written through the other mapping is fetched anew (Intel SDM
/// vol. 3, 9.1.3). IRET is the cheapest serialising instruction that user mode has; CPUID would leave a host
/// that is itself a guest. But QEMU's emulator before 9.1 faults on an IRET in user mode where the kernel uses SMAP:
/// there it is CPUID.
fn serialize() {
    static IRET_FAULTS: OnceLock<bool> = OnceLock::new();
    if *IRET_FAULTS.get_or_init(is_qemu_emulator) {
        std::hint::black_box(std::arch::x86_64::__cpuid(0));
        return;
    }
    // SAFETY: returns to the next instruction with the same stack, flags and segments.
    unsafe {
        core::arch::asm!(
            "mov {scratch}, rsp",
            "mov {wide:e}, ss",
            "push {wide}",
            "push {scratch}",
            "pushfq",
            "mov {wide:e}, cs",
            "push {wide}",
            "lea {scratch}, [rip + 2f]",
            "push {scratch}",
            "iretq",
            "2:",
            scratch = out(reg) _,
            wide = out(reg) _,
        );
    }
}

/// Whether the host is emulated by QEMU: the hypervisor bit, and the vendor in CPUID leaf 0x4000_0000.
fn is_qemu_emulator() -> bool {
    let is_guest = std::arch::x86_64::__cpuid(1).ecx >> 31 == 1;
    let vendor = std::arch::x86_64::__cpuid(0x4000_0000);
    is_guest && [vendor.ebx, vendor.ecx, vendor.edx].map(u32::to_le_bytes).concat() == b"TCGTCGTCGTCG"
}
