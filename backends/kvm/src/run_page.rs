//! The page that a vCPU shares with the kernel (`struct kvm_run`), and the system calls that kvm-ioctls has no
//! wrapper for or whose wrapper hides what is needed here (the width of string I/O elements).
//!
//! The kernel writes the page during `KVM_RUN` only, so between two runs it belongs to the vCPU's thread; all
//! but `immediate_exit`, which other threads set (see [`crate::kick`]). Everything is accessed through one raw
//! pointer, field by field, so that no reference to the whole page ever exists beside those accesses.

// UNSAFETY: a page shared with the kernel, unions inside it, and ioctls.
#![allow(unsafe_code)]

use std::io;
use std::os::fd::{AsRawFd, RawFd};

use kvm_bindings::*;
use kvm_ioctls::VcpuFd;

use crate::exits::{Exit, Failure};
use crate::kick::{self, ImmediateExit};

const KVM_RUN: libc::c_ulong = 0xae80;
/// `_IOW(0xae, 0x86, u32)`.
const KVM_INTERRUPT: libc::c_ulong = 0x4004_ae86;
/// `_IOW(0xae, 0x8b, u32)`.
const KVM_SET_SIGNAL_MASK: libc::c_ulong = 0x4004_ae8b;
/// Size of the kernel's signal set, in bytes.
const SIGSET_SIZE: usize = 8;

/// Access to a vCPU's shared page. Exists as long as its [`VcpuFd`], which its owner drops later.
pub(crate) struct RunPage {
    fd: RawFd,
    run: *mut kvm_run,
    /// Bytes that are mapped.
    size: usize,
}

// SAFETY: the page belongs to whoever has the vCPU, which is one thread at a time.
unsafe impl Send for RunPage {}

impl RunPage {
    /// # Safety
    ///
    /// `fd` outlives the value and everything made by [`RunPage::immediate_exit`], and nobody else uses its
    /// `kvm_run`, whose mapping has `size` bytes.
    pub(crate) unsafe fn new(fd: &mut VcpuFd, size: usize) -> Self {
        Self { fd: fd.as_raw_fd(), run: fd.get_kvm_run(), size }
    }

    /// The byte that makes `KVM_RUN` return at once, for other threads.
    pub(crate) fn immediate_exit(&self) -> ImmediateExit {
        // SAFETY: inside the page, which stays mapped (see `new`).
        unsafe { ImmediateExit::new(&raw mut (*self.run).immediate_exit) }
    }

    /// Runs the guest. An error is an errno.
    pub(crate) fn run(&mut self) -> Result<(), i32> {
        // SAFETY: KVM_RUN takes no argument; what it does to guest memory, page and vCPU is its purpose.
        let result = unsafe { libc::ioctl(self.fd, KVM_RUN, 0) };
        if result >= 0 { Ok(()) } else { Err(io::Error::last_os_error().raw_os_error().unwrap_or(0)) }
    }

    /// Gives KVM the vector of an acknowledged legacy interrupt.
    pub(crate) fn interrupt(&mut self, vector: u8) -> io::Result<()> {
        let interrupt = kvm_interrupt { irq: u32::from(vector) };
        // SAFETY: the argument outlives the call, which reads it.
        let result = unsafe { libc::ioctl(self.fd, KVM_INTERRUPT, &raw const interrupt) };
        if result >= 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
    }

    /// As [`RunPage::run`], with a signal that waits already: KVM does all that precedes the entry into the guest,
    /// delivery of events included, and no instruction is executed.
    pub(crate) fn run_without_guest(&mut self, thread: i32) -> Result<(), i32> {
        let failed = |e: io::Error| e.raw_os_error().unwrap_or(0);
        kick::set_blocked(true).map_err(failed)?;
        let prepared = self.unblock_inside(true);
        kick::send_signal(thread);
        let result = match prepared {
            Ok(()) => self.run(),
            Err(error) => Err(failed(error)),
        };
        let restored = self.unblock_inside(false);
        kick::set_blocked(false).map_err(failed)?;
        restored.map_err(failed).and(result)
    }

    /// Makes KVM let the kick signal through during `KVM_RUN` although it is blocked outside, or no longer.
    fn unblock_inside(&mut self, on: bool) -> io::Result<()> {
        #[repr(C)]
        struct Mask {
            len: u32,
            set: [u8; SIGSET_SIZE],
        }
        let mut mask = Mask { len: SIGSET_SIZE as u32, set: [0; SIGSET_SIZE] };
        let argument = if on {
            // SAFETY: `current` is large enough for the C library's set; the kernel's is its first 8 bytes.
            unsafe {
                let mut current: libc::sigset_t = std::mem::zeroed();
                libc::pthread_sigmask(libc::SIG_BLOCK, std::ptr::null(), &mut current);
                libc::sigdelset(&mut current, kick::SIGNAL);
                let bytes = (&raw const current).cast::<[u8; SIGSET_SIZE]>();
                mask.set = bytes.read();
            }
            &raw const mask
        } else {
            std::ptr::null()
        };
        // SAFETY: a null pointer or a mask that outlives the call, with its length.
        let result = unsafe { libc::ioctl(self.fd, KVM_SET_SIGNAL_MASK, argument) };
        if result >= 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
    }

    /// Sets whether KVM shall return as soon as it could deliver a legacy interrupt.
    pub(crate) fn request_interrupt_window(&mut self, on: bool) {
        // SAFETY: inside the page, which is this thread's between runs.
        unsafe { (*self.run).request_interrupt_window = u8::from(on) };
    }

    /// Whether a legacy interrupt could be delivered when `KVM_RUN` last returned.
    pub(crate) fn ready_for_interrupt(&self) -> bool {
        // SAFETY: inside the page, which is this thread's between runs.
        unsafe { (*self.run).ready_for_interrupt_injection != 0 && (*self.run).if_flag != 0 }
    }

    /// Why `KVM_RUN` returned. `errno` is its error, if it was one.
    pub(crate) fn exit(&self, errno: Option<i32>) -> Exit {
        // SAFETY: the page is this thread's; which member of the union is valid is what `reason` says.
        unsafe {
            let run = self.run;
            let reason = (*run).exit_reason;
            let detail = &raw const (*run).__bindgen_anon_1;
            match (reason, errno) {
                (KVM_EXIT_MEMORY_FAULT, Some(_)) => {
                    let fault = (*detail).memory_fault;
                    Exit::MemoryFault { address: fault.gpa, size: fault.size }
                }
                (_, Some(errno)) => Exit::HostError(errno),
                (KVM_EXIT_IO, _) => {
                    let io = (*detail).io;
                    let input = u32::from(io.direction) == KVM_EXIT_IO_IN;
                    Exit::Io { input, port: io.port, size: io.size, count: io.count }
                }
                (KVM_EXIT_MMIO, _) => {
                    let mmio = (*detail).mmio;
                    Exit::Mmio { address: mmio.phys_addr, len: mmio.len, write: mmio.is_write != 0 }
                }
                (KVM_EXIT_X86_RDMSR, _) => Exit::ReadMsr((*detail).msr.index),
                (KVM_EXIT_X86_WRMSR, _) => Exit::WriteMsr((*detail).msr.index, (*detail).msr.data),
                (KVM_EXIT_IRQ_WINDOW_OPEN, _) => Exit::InterruptWindow,
                (KVM_EXIT_IOAPIC_EOI, _) => Exit::EndOfInterrupt((*detail).eoi.vector),
                (KVM_EXIT_SHUTDOWN, _) => Exit::Shutdown,
                (KVM_EXIT_INTR, _) => Exit::Interrupted,
                (KVM_EXIT_DIRTY_RING_FULL, _) => Exit::DirtyRingFull,
                (KVM_EXIT_FAIL_ENTRY, _) => {
                    let entry = (*detail).fail_entry;
                    Exit::FailedEntry { reason: entry.hardware_entry_failure_reason, cpu: entry.cpu }
                }
                (KVM_EXIT_UNKNOWN, _) => Exit::Hardware((*detail).hw.hardware_exit_reason),
                (KVM_EXIT_INTERNAL_ERROR, _) => Exit::Internal(self.failure()),
                (reason, _) => Exit::Other(reason),
            }
        }
    }

    /// What `KVM_EXIT_INTERNAL_ERROR` says.
    fn failure(&self) -> Failure {
        // SAFETY: the caller saw the exit reason that makes `internal` the valid member; `emulation_failure` has
        // the same beginning and is valid for its suberror. The array bounds are checked.
        unsafe {
            let detail = &raw const (*self.run).__bindgen_anon_1;
            let internal = (*detail).internal;
            let count = (internal.ndata as usize).min(internal.data.len());
            let mut failure = Failure {
                suberror: internal.suberror,
                data: internal.data[..count].to_vec(),
                instruction: Vec::new(),
            };
            if internal.suberror == KVM_INTERNAL_ERROR_EMULATION && count > 0 {
                let emulation = (*detail).emulation_failure;
                let known = u64::from(KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES);
                if emulation.flags & known != 0 {
                    let bytes = emulation.__bindgen_anon_1.__bindgen_anon_1;
                    let len = usize::from(bytes.insn_size).min(bytes.insn_bytes.len());
                    failure.instruction = bytes.insn_bytes[..len].to_vec();
                }
            }
            failure
        }
    }

    /// The elements of a port access. Empty if the kernel names bytes outside the page.
    pub(crate) fn io_data(&mut self) -> &mut [u8] {
        // SAFETY: the exit reason was KVM_EXIT_IO; the range is checked against the mapping, and nothing else
        // refers to these bytes while `self` is borrowed (they are not part of `struct kvm_run`).
        unsafe {
            let io = (*self.run).__bindgen_anon_1.io;
            let len = usize::from(io.size).saturating_mul(io.count as usize);
            let at = usize::try_from(io.data_offset).unwrap_or(usize::MAX);
            let inside =
                at >= size_of::<kvm_run>() && at.checked_add(len).is_some_and(|end| end <= self.size);
            let len = if inside { len } else { 0 };
            let at = if inside { at } else { 0 };
            std::slice::from_raw_parts_mut(self.run.cast::<u8>().add(at), len)
        }
    }

    /// The bytes of a memory-mapped access.
    pub(crate) fn mmio_data(&mut self) -> &mut [u8] {
        // SAFETY: the exit reason was KVM_EXIT_MMIO; the length is checked, and nothing else refers to these
        // bytes while `self` is borrowed.
        unsafe {
            let mmio = &raw mut (*self.run).__bindgen_anon_1.mmio;
            let len = ((*mmio).len as usize).min((*mmio).data.len());
            std::slice::from_raw_parts_mut((&raw mut (*mmio).data).cast::<u8>(), len)
        }
    }

    /// Answers an MSR access: the value read (ignored for writes), or `None` for #GP.
    pub(crate) fn answer_msr(&mut self, value: Option<u64>) {
        // SAFETY: the exit reason was an MSR access; the page is this thread's.
        unsafe {
            let msr = &raw mut (*self.run).__bindgen_anon_1.msr;
            (*msr).error = u8::from(value.is_none());
            (*msr).data = value.unwrap_or(0);
        }
    }
}
