//! The kernel's side of memory slots and dirty logs (Linux Documentation/virt/kvm/api.rst, 4.8, 4.35, 4.117, 8.29).
#![allow(unsafe_code)]
// UNSAFETY: a memory slot gives the guest access to host memory by address, and the dirty log and ring ioctls and
// the ring's mapping have no safe form.

use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;

use kvm_bindings::{
    KVM_CAP_DIRTY_LOG_RING, KVM_CAP_DIRTY_LOG_RING_ACQ_REL, KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2,
    KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE, KVM_MEM_LOG_DIRTY_PAGES, KVM_MEM_READONLY, KVMIO,
    kvm_clear_dirty_log, kvm_enable_cap, kvm_userspace_memory_region,
};
use kvm_ioctls::{Cap, VmFd};
use vmm_sys_util::ioctl::{ioctl, ioctl_with_ref};
use vmm_sys_util::{ioctl_io_nr, ioctl_iowr_nr};

use super::plan::{Kind, Piece};

ioctl_iowr_nr!(KVM_CLEAR_DIRTY_LOG, KVMIO, 0xc0, kvm_clear_dirty_log);
ioctl_io_nr!(KVM_RESET_DIRTY_RINGS, KVMIO, 0xc7);

/// Slots that every kernel has, should it not say how many.
const FEWEST_SLOTS: i32 = 32;

/// What slots need of the kernel; a fake one in tests.
pub(super) trait Host: Send + Sync {
    /// How many slots there may be.
    fn max_slots(&self) -> usize;
    /// Makes slot `number` show `piece`, or changes only whether its stores are logged.
    fn set(&self, number: u32, piece: &Piece, logged: bool) -> io::Result<()>;
    /// Removes slot `number`, which shows `piece`. When it returns, nobody is using the slot any more.
    fn remove(&self, number: u32, piece: &Piece) -> io::Result<()>;
    /// The pages of a slot stored to since the last call, one bit each, from then on watched again.
    fn take_log(&self, number: u32, piece: &Piece) -> io::Result<Vec<u64>>;
    /// Watches again the pages of all ring entries that were handed back.
    fn reset_rings(&self) -> io::Result<()>;
}

/// A virtual machine of the kernel's.
pub(super) struct Kernel {
    vm: Arc<VmFd>,
    /// The log is fetched and reset in two steps.
    manual: bool,
}

impl Kernel {
    /// Prepares `vm`, which has no vCPU yet, and asks for a dirty ring of so many entries (a power of two) for each.
    /// Returns the size they have; the log is used otherwise.
    pub(super) fn new(vm: Arc<VmFd>, ring_entries: Option<u32>) -> (Self, Option<u32>) {
        let enable = |cap: u32, argument: u64| {
            let mut request = kvm_enable_cap { cap, ..Default::default() };
            request.args[0] = argument;
            vm.check_extension_raw(u64::from(cap)) > 0 && vm.enable_cap(&request).is_ok()
        };
        let ring = ring_entries.filter(|entries| {
            let bytes = u64::from(*entries) * size_of::<super::ring::Entry>() as u64;
            enable(KVM_CAP_DIRTY_LOG_RING_ACQ_REL, bytes) || enable(KVM_CAP_DIRTY_LOG_RING, bytes)
        });
        let manual = ring.is_none()
            && enable(KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, u64::from(KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE));
        (Self { vm, manual }, ring)
    }

    fn region(&self, number: u32, piece: &Piece, len: u64, flags: u32) -> io::Result<()> {
        let address = piece.block.as_ptr() as u64 + piece.offset;
        let region = kvm_userspace_memory_region {
            slot: number,
            flags,
            guest_phys_addr: piece.gpa,
            memory_size: len,
            userspace_addr: address,
        };
        // SAFETY: the range lies inside the block, by construction of the view that the piece comes from. The
        // table keeps the block alive as long as the slot exists, and guest memory is made to be stored to at any
        // time. Zero bytes remove the slot.
        unsafe { self.vm.set_user_memory_region(region) }.map_err(io::Error::from)
    }

    /// Resets what `log` has of slot `number`, run by run of words that are not zero.
    fn clear(&self, number: u32, piece: &Piece, log: &[u64]) -> io::Result<()> {
        let pages = piece.pages().end - piece.pages().start;
        let mut at = 0;
        while at < log.len() {
            let run = log[at..].iter().take_while(|word| **word != 0).count();
            if run == 0 {
                at += 1;
                continue;
            }
            let (first, end) = (at as u64 * 64, (((at + run) * 64) as u64).min(pages));
            let mut request = kvm_clear_dirty_log {
                slot: number,
                num_pages: (end - first) as u32,
                first_page: first,
                ..Default::default()
            };
            request.__bindgen_anon_1.dirty_bitmap = log[at..].as_ptr().cast_mut().cast();
            // SAFETY: the request is a valid structure, and the bitmap behind its pointer has a bit for each of
            // `num_pages`; the kernel only reads it.
            let result = unsafe { ioctl_with_ref(&*self.vm, KVM_CLEAR_DIRTY_LOG(), &request) };
            if result < 0 {
                return Err(io::Error::last_os_error());
            }
            at += run;
        }
        Ok(())
    }
}

impl Host for Kernel {
    fn max_slots(&self) -> usize {
        self.vm.check_extension_int(Cap::NrMemslots).max(FEWEST_SLOTS) as usize
    }

    fn set(&self, number: u32, piece: &Piece, logged: bool) -> io::Result<()> {
        let flags = match piece.kind {
            Kind::Rom => KVM_MEM_READONLY,
            Kind::Ram if logged => KVM_MEM_LOG_DIRTY_PAGES,
            Kind::Ram => 0,
        };
        self.region(number, piece, piece.len, flags)
    }

    fn remove(&self, number: u32, piece: &Piece) -> io::Result<()> {
        self.region(number, piece, 0, 0)
    }

    fn take_log(&self, number: u32, piece: &Piece) -> io::Result<Vec<u64>> {
        let log = self.vm.get_dirty_log(number, piece.len as usize).map_err(io::Error::from)?;
        if self.manual {
            self.clear(number, piece, &log)?;
        }
        Ok(log)
    }

    fn reset_rings(&self) -> io::Result<()> {
        // SAFETY: the request takes no argument and touches no memory of this process but the rings' flags, which
        // are only reached atomically.
        let result = unsafe { ioctl(&*self.vm, KVM_RESET_DIRTY_RINGS()) };
        if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
    }
}

/// A dirty ring's memory, shared with the kernel.
pub(super) struct RingMemory {
    start: std::ptr::NonNull<super::ring::Entry>,
    entries: usize,
}

// SAFETY: the mapping belongs to the process, and its entries are only reached through atomics.
unsafe impl Send for RingMemory {}
// SAFETY: as above.
unsafe impl Sync for RingMemory {}

impl RingMemory {
    /// Maps the ring of a vCPU, `entries` long.
    pub(super) fn map(vcpu: &impl AsRawFd, entries: usize) -> io::Result<Self> {
        let offset = u64::from(kvm_bindings::KVM_DIRTY_LOG_PAGE_OFFSET) * atoll_machine::memory::PAGE_SIZE;
        let protection = rustix::mm::ProtFlags::READ | rustix::mm::ProtFlags::WRITE;
        let len = entries * size_of::<super::ring::Entry>();
        // SAFETY: the descriptor is open as long as `vcpu` is borrowed.
        let fd = unsafe { std::os::fd::BorrowedFd::borrow_raw(vcpu.as_raw_fd()) };
        let flags = rustix::mm::MapFlags::SHARED;
        // SAFETY: a new mapping at an address of the kernel's choice replaces nothing.
        let start = unsafe { rustix::mm::mmap(std::ptr::null_mut(), len, protection, flags, fd, offset)? };
        let start =
            std::ptr::NonNull::new(start.cast()).ok_or_else(|| io::Error::other("mmap returned 0"))?;
        Ok(Self { start, entries })
    }
}

impl AsRef<[super::ring::Entry]> for RingMemory {
    fn as_ref(&self) -> &[super::ring::Entry] {
        // SAFETY: the mapping is page aligned, as long as `entries`, initialised by the kernel, and lives as long
        // as `self`; an entry is made of atomics, for which every bit pattern is valid.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.entries) }
    }
}

impl Drop for RingMemory {
    fn drop(&mut self) {
        let len = self.entries * size_of::<super::ring::Entry>();
        // SAFETY: the range is our own mapping, and no reference into it outlives `self`.
        let _ = unsafe { rustix::mm::munmap(self.start.as_ptr().cast(), len) };
    }
}
