//! Little loads and stores for the handlers of this module, and the stack as far transfers see it.
//!
//! Far transfers and event delivery work on stacks that are not the current one (an inner ring's, an IST's, a
//! new task's), with faults that name the new selector. [`Stack`] is such a stack: values are pushed and
//! popped on a copy of the stack pointer, and the caller commits it when nothing can fault any more.

use atoll_machine::backend::CpuIo;
use atoll_machine::cpu::state::{Segment, gpr, seg};

use crate::access::Access;
pub(crate) use crate::access::is_canonical;
use crate::cpu::Cpu;
use crate::exception::{Exception, Outcome};

/// Reads `size` (1, 2, 4 or 8) bytes at a linear address, zero extended.
pub(crate) fn load(cpu: &mut Cpu, io: &dyn CpuIo, linear: u64, size: u32, access: Access) -> Outcome<u64> {
    match size {
        1 => cpu.read_u8(io, linear, access).map(u64::from),
        2 => cpu.read_u16(io, linear, access).map(u64::from),
        4 => cpu.read_u32(io, linear, access).map(u64::from),
        _ => cpu.read_u64(io, linear, access),
    }
}

/// Writes the low `size` (1, 2, 4 or 8) bytes of `value` at a linear address.
pub(crate) fn store(
    cpu: &mut Cpu,
    io: &dyn CpuIo,
    linear: u64,
    size: u32,
    value: u64,
    access: Access,
) -> Outcome {
    match size {
        1 => cpu.write_u8(io, linear, value as u8, access),
        2 => cpu.write_u16(io, linear, value as u16, access),
        4 => cpu.write_u32(io, linear, value as u32, access),
        _ => cpu.write_u64(io, linear, value, access),
    }
}

/// The linear address `offset` bytes into a system table (GDT, LDT, IDT, TSS): 32 bits wide outside long mode.
pub(crate) fn table_address(cpu: &Cpu, base: u64, offset: u64) -> u64 {
    let linear = base.wrapping_add(offset);
    if cpu.mode.long { linear } else { linear & 0xffff_ffff }
}

/// `value` cut to `bits` (16, 32 or 64).
pub(crate) const fn truncate(value: u64, bits: u32) -> u64 {
    match bits {
        16 => value & 0xffff,
        32 => value & 0xffff_ffff,
        _ => value,
    }
}

/// Whether `size` bytes at `offset` lie inside `segment` (expand-down segments included).
pub(crate) fn within_limit(segment: &Segment, offset: u64, size: u64) -> bool {
    let last = offset + (size - 1);
    let expand_down = segment.attributes & Segment::NON_SYSTEM != 0 && segment.kind() & 0xc == 4;
    if expand_down {
        let top = if segment.attributes & Segment::DEFAULT_BIG != 0 { 0xffff_ffff } else { 0xffff };
        offset > u64::from(segment.limit) && last <= top
    } else {
        last <= u64::from(segment.limit)
    }
}

/// A stack under construction.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Stack {
    segment: Segment,
    /// The working stack pointer.
    pub(crate) sp: u64,
    bits: u32,
    fault: Exception,
    read: Access,
    write: Access,
}

impl Stack {
    /// The current stack.
    pub(crate) fn current(cpu: &Cpu) -> Self {
        Self {
            segment: cpu.segments[seg::SS],
            sp: cpu.gpr[gpr::RSP],
            bits: cpu.mode.stack_bits,
            fault: Exception::SS0,
            read: Access::Read,
            write: Access::Write,
        }
    }

    /// The stack `segment:sp` of privilege level `cpl`, about to be switched to; `bits` is 64 for 64-bit
    /// code, else it follows the segment. Limit violations raise `fault`.
    pub(crate) fn switched(segment: Segment, sp: u64, bits64: bool, cpl: u8, fault: Exception) -> Self {
        let bits = match (bits64, segment.attributes & Segment::DEFAULT_BIG != 0) {
            (true, _) => 64,
            (false, true) => 32,
            (false, false) => 16,
        };
        let (read, write) =
            if cpl == 3 { (Access::Read, Access::Write) } else { (Access::SystemRead, Access::SystemWrite) };
        Self { segment, sp, bits, fault, read, write }
    }

    fn linear(&self, offset: u64, size: u64) -> Outcome<u64> {
        if self.bits == 64 {
            let ok = is_canonical(offset) && is_canonical(offset.wrapping_add(size - 1));
            return if ok { Ok(offset) } else { Err(self.fault) };
        }
        if self.segment.unusable() || !within_limit(&self.segment, offset, size) {
            return Err(self.fault);
        }
        Ok(self.segment.base.wrapping_add(offset) & 0xffff_ffff)
    }

    /// Checks that `size` more bytes can be pushed as far as the segment's limit goes.
    pub(crate) fn check_room(&self, size: u64) -> Outcome {
        let offset = truncate(self.sp.wrapping_sub(size), self.bits);
        let top = truncate(self.sp, self.bits);
        if self.bits != 64 && top != 0 && top < size {
            // The frame wraps around the top of the segment: each push checks its own part.
            return Ok(());
        }
        self.linear(offset, size).map(drop)
    }

    /// Pushes the low `size` bytes of `value`.
    pub(crate) fn push(&mut self, cpu: &mut Cpu, io: &dyn CpuIo, size: u32, value: u64) -> Outcome {
        let offset = truncate(self.sp.wrapping_sub(u64::from(size)), self.bits);
        let linear = self.linear(offset, u64::from(size))?;
        store(cpu, io, linear, size, value, self.write)?;
        self.sp = offset;
        Ok(())
    }

    /// Pops `size` bytes.
    pub(crate) fn pop(&mut self, cpu: &mut Cpu, io: &dyn CpuIo, size: u32) -> Outcome<u64> {
        let value = self.peek(cpu, io, size)?;
        self.skip(u64::from(size));
        Ok(value)
    }

    /// Reads `size` bytes at the top.
    pub(crate) fn peek(&mut self, cpu: &mut Cpu, io: &dyn CpuIo, size: u32) -> Outcome<u64> {
        let linear = self.linear(truncate(self.sp, self.bits), u64::from(size))?;
        load(cpu, io, linear, size, self.read)
    }

    /// Drops `count` bytes (RET n).
    pub(crate) fn skip(&mut self, count: u64) {
        self.sp = truncate(self.sp.wrapping_add(count), self.bits);
    }

    /// The stack-pointer register after the switch: a 16-bit stack keeps the upper bits of `old`.
    pub(crate) fn pointer(&self, old: u64) -> u64 {
        match self.bits {
            16 => old & !0xffff | self.sp & 0xffff,
            32 => self.sp & 0xffff_ffff,
            _ => self.sp,
        }
    }

    /// Commits the stack pointer to RSP.
    pub(crate) fn commit(&self, cpu: &mut Cpu) {
        cpu.gpr[gpr::RSP] = self.pointer(cpu.gpr[gpr::RSP]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn expand_down_segments_are_valid_above_their_limit() {
        let mut s = Segment { selector: 8, base: 0, limit: 0xfff, attributes: 0x97 };
        assert!(within_limit(&s, 0x1000, 4));
        assert!(!within_limit(&s, 0xfff, 1));
        assert!(!within_limit(&s, 0xfffe, 4));
        s.attributes |= Segment::DEFAULT_BIG;
        assert!(within_limit(&s, 0xfffe, 4));
        s.attributes = 0x93;
        assert!(within_limit(&s, 0xffc, 4) && !within_limit(&s, 0xffd, 4));
    }

    #[test]
    fn canonical_addresses_have_47_significant_bits() {
        assert!(is_canonical(0x7fff_ffff_ffff) && !is_canonical(0x8000_0000_0000));
        assert!(is_canonical(0xffff_8000_0000_0000) && !is_canonical(0xffff_7fff_ffff_ffff));
    }
}
