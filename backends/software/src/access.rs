//! Guest memory access by instruction handlers: segmentation, then paging, then RAM or a device.

use atoll_machine::backend::CpuIo;

use crate::cpu::Cpu;
use crate::exception::Outcome;

/// Who accesses memory, and how.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Data read at the current privilege.
    Read,
    /// Data write at the current privilege.
    Write,
    /// Implicit supervisor read (descriptor tables, TSS, IDT): U/S of the processor counts as supervisor.
    SystemRead,
    /// Implicit supervisor write.
    SystemWrite,
    /// Instruction fetch.
    Fetch,
}

impl Cpu {
    /// Linear address of `segment:offset` for an access of `size` bytes: limit, type and canonical checks.
    /// #SS for the stack segment, else #GP. In 64-bit mode only FS and GS have a base.
    #[allow(unused_variables)]
    pub fn linear(&self, segment: usize, offset: u64, size: u64, access: Access) -> Outcome<u64> {
        todo!()
    }
    /// Reads `buf.len()` (1 to 4096) bytes at a linear address; may cross pages; faults before side effects.
    #[allow(unused_variables)]
    pub fn read_bytes(&mut self, io: &dyn CpuIo, linear: u64, buf: &mut [u8], access: Access) -> Outcome {
        todo!()
    }
    /// Writes bytes at a linear address; both pages are checked before the first byte is written.
    #[allow(unused_variables)]
    pub fn write_bytes(&mut self, io: &dyn CpuIo, linear: u64, data: &[u8], access: Access) -> Outcome {
        todo!()
    }
    /// Raises the fault that an access of `size` bytes at `linear` would raise, without accessing it.
    #[allow(unused_variables)]
    pub fn probe(&mut self, io: &dyn CpuIo, linear: u64, size: u64, access: Access) -> Outcome {
        todo!()
    }
    // Sized forms read_u8/u16/u32/u64(io, linear, access), write_u8/…, atomic_rmw…: same file.
}
