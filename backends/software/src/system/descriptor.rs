//! Segment and system descriptors as they stand in the GDT and LDT (Intel SDM vol. 3, chapters 3 and 8).

use atoll_machine::backend::CpuIo;
use atoll_machine::cpu::state::Segment;

use super::memory::{load, table_address};
use crate::access::Access;
use crate::cpu::Cpu;
use crate::exception::{Exception, Outcome, vector};

/// Types of system descriptors.
#[allow(missing_docs)]
pub(crate) mod kind {
    pub(crate) const TSS16: u32 = 1;
    pub(crate) const LDT: u32 = 2;
    pub(crate) const TSS16_BUSY: u32 = 3;
    pub(crate) const CALL_GATE16: u32 = 4;
    pub(crate) const TASK_GATE: u32 = 5;
    pub(crate) const INTERRUPT_GATE16: u32 = 6;
    pub(crate) const TRAP_GATE16: u32 = 7;
    pub(crate) const TSS: u32 = 9;
    pub(crate) const TSS_BUSY: u32 = 11;
    pub(crate) const CALL_GATE: u32 = 12;
    pub(crate) const INTERRUPT_GATE: u32 = 14;
    pub(crate) const TRAP_GATE: u32 = 15;
    /// Mask of the busy bit of a TSS type.
    pub(crate) const BUSY: u32 = 2;
}

/// A selector without its RPL: what error codes carry.
pub(crate) const fn code_of(selector: u16) -> u32 {
    selector as u32 & 0xfffc
}

/// #GP(selector).
pub(crate) const fn gp(selector: u16) -> Exception {
    Exception::with_code(vector::GP, code_of(selector))
}
/// #NP(selector).
pub(crate) const fn np(selector: u16) -> Exception {
    Exception::with_code(vector::NP, code_of(selector))
}
/// #SS(selector).
pub(crate) const fn ss(selector: u16) -> Exception {
    Exception::with_code(vector::SS, code_of(selector))
}
/// #TS(selector).
pub(crate) const fn ts(selector: u16) -> Exception {
    Exception::with_code(vector::TS, code_of(selector))
}

/// Whether `selector` is a null selector.
pub(crate) const fn is_null(selector: u16) -> bool {
    selector & 0xfffc == 0
}

/// Eight bytes of a descriptor table, with where they were read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Descriptor {
    /// The bytes.
    pub(crate) raw: u64,
    /// Linear address of the descriptor.
    pub(crate) address: u64,
}

impl Descriptor {
    /// The type field.
    pub(crate) const fn kind(&self) -> u32 {
        (self.raw >> 40 & 0xf) as u32
    }
    /// Code or data.
    pub(crate) const fn non_system(&self) -> bool {
        self.raw >> 44 & 1 != 0
    }
    /// Code segment.
    pub(crate) const fn is_code(&self) -> bool {
        self.non_system() && self.kind() & 8 != 0
    }
    /// Conforming code segment.
    pub(crate) const fn is_conforming(&self) -> bool {
        self.is_code() && self.kind() & 4 != 0
    }
    /// Readable code or any data.
    pub(crate) const fn is_readable(&self) -> bool {
        self.non_system() && (self.kind() & 8 == 0 || self.kind() & 2 != 0)
    }
    /// Writable data.
    pub(crate) const fn is_writable(&self) -> bool {
        self.non_system() && self.kind() & 0xa == 2
    }
    /// Privilege level.
    pub(crate) const fn dpl(&self) -> u8 {
        (self.raw >> 45 & 3) as u8
    }
    /// Present.
    pub(crate) const fn present(&self) -> bool {
        self.raw >> 47 & 1 != 0
    }
    /// 64-bit code.
    pub(crate) const fn long(&self) -> bool {
        self.raw >> 53 & 1 != 0
    }
    /// Default size or big.
    pub(crate) const fn big(&self) -> bool {
        self.raw >> 54 & 1 != 0
    }
    /// Base, lower 32 bits.
    pub(crate) const fn base(&self) -> u64 {
        self.raw >> 16 & 0xff_ffff | self.raw >> 32 & 0xff00_0000
    }
    /// Limit in bytes, granularity applied.
    pub(crate) const fn limit(&self) -> u32 {
        let limit = (self.raw & 0xffff | self.raw >> 32 & 0xf_0000) as u32;
        if self.raw >> 55 & 1 != 0 { limit << 12 | 0xfff } else { limit }
    }
    /// Access rights in VMX layout.
    pub(crate) const fn attributes(&self) -> u32 {
        (self.raw >> 40) as u32 & 0xf0ff
    }
    /// The hidden part that a load of `selector` makes.
    pub(crate) const fn segment(&self, selector: u16) -> Segment {
        Segment { selector, base: self.base(), limit: self.limit(), attributes: self.attributes() }
    }
    /// Target selector of a gate.
    pub(crate) const fn gate_selector(&self) -> u16 {
        (self.raw >> 16) as u16
    }
    /// Target offset of a gate, lower 32 bits.
    pub(crate) const fn gate_offset(&self) -> u64 {
        self.raw & 0xffff | self.raw >> 32 & 0xffff_0000
    }

    /// Sets the accessed bit in the table, if it is not set, and here.
    pub(crate) fn mark_accessed(&mut self, cpu: &mut Cpu, io: &dyn CpuIo) -> Outcome {
        if self.raw >> 40 & 1 == 0 {
            self.raw |= 1 << 40;
            set_type_bits(cpu, io, self.address, 1, 0)?;
        }
        Ok(())
    }
}

/// Sets and clears bits of the type byte of the descriptor at `address`, atomically.
pub(crate) fn set_type_bits(cpu: &mut Cpu, io: &dyn CpuIo, address: u64, set: u8, clear: u8) -> Outcome {
    let linear = table_address(cpu, address, 5);
    cpu.atomic::<u8>(io, linear, Access::SystemWrite, |old| old & !clear | set).map(drop)
}

/// Base and limit of the table that `selector` points into; `None` for an LDT that is not there.
fn table_of(cpu: &Cpu, selector: u16) -> Option<(u64, u64)> {
    if selector & 4 == 0 {
        Some((cpu.gdtr.base, u64::from(cpu.gdtr.limit)))
    } else if cpu.ldtr.unusable() {
        None
    } else {
        Some((cpu.ldtr.base, u64::from(cpu.ldtr.limit)))
    }
}

/// Reads the descriptor of `selector`; `None` when it lies outside its table.
pub(crate) fn fetch(cpu: &mut Cpu, io: &dyn CpuIo, selector: u16) -> Outcome<Option<Descriptor>> {
    let offset = u64::from(selector & 0xfff8);
    let Some((base, limit)) = table_of(cpu, selector) else { return Ok(None) };
    if offset + 7 > limit {
        return Ok(None);
    }
    let address = table_address(cpu, base, offset);
    let raw = load(cpu, io, address, 8, Access::SystemRead)?;
    Ok(Some(Descriptor { raw, address }))
}

/// Reads the upper half of a 16-byte descriptor of long mode; `None` when it lies outside the table.
pub(crate) fn fetch_upper(cpu: &mut Cpu, io: &dyn CpuIo, selector: u16) -> Outcome<Option<u64>> {
    let offset = u64::from(selector & 0xfff8);
    let Some((base, limit)) = table_of(cpu, selector) else { return Ok(None) };
    if offset + 15 > limit {
        return Ok(None);
    }
    let address = table_address(cpu, base, offset + 8);
    load(cpu, io, address, 8, Access::SystemRead).map(Some)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_of_a_flat_code_descriptor() {
        let d = Descriptor { raw: 0x00af_9b00_0000_ffff, address: 0 };
        assert!(d.is_code() && d.present() && d.long() && !d.big() && !d.is_conforming() && d.is_readable());
        assert_eq!((d.base(), d.limit(), d.attributes()), (0, 0xffff_ffff, 0xa09b));
        let d = Descriptor { raw: 0x12c0_f234_5678_9abc, address: 0 };
        assert!(d.is_writable() && !d.is_code() && d.big());
        assert_eq!((d.base(), d.limit(), d.dpl()), (0x1234_5678, 0x9abc << 12 | 0xfff, 3));
    }
}
