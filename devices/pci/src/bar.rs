//! Base address registers: what lies behind them and how they appear in the address spaces.

use std::sync::Arc;

use atoll_machine::bus::{MmioDevice, PortDevice};

/// Address space and width of a BAR.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BarKind {
    /// I/O ports; at least 4, at most 256 of them.
    Io,
    /// Memory below 4 GiB; at least 16 bytes.
    Memory32,
    /// Memory anywhere; takes two register slots.
    Memory64 {
        /// Reads have no side effects, so that the BAR may lie in a bridge's prefetchable window.
        prefetchable: bool,
    },
}

/// What a BAR maps.
#[derive(Clone)]
#[non_exhaustive]
pub enum BarTarget {
    /// Memory-mapped registers.
    Mmio(Arc<dyn MmioDevice>),
    /// I/O ports.
    Ports(Arc<dyn PortDevice>),
}

/// A BAR as a device declares it.
#[derive(Clone)]
pub struct BarSpec {
    /// Register slot, 0-5 (0-1 in a bridge).
    pub index: u8,
    /// Address space and width.
    pub kind: BarKind,
    /// Bytes; rounded up to a power of two.
    pub size: u64,
    /// What answers. `None` until [`crate::PciFunction::set_bar_target`].
    pub target: Option<BarTarget>,
}

/// A BAR as it is now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BarInfo {
    /// Register slot.
    pub index: u8,
    /// Address space and width.
    pub kind: BarKind,
    /// Bytes, a power of two.
    pub size: u64,
    /// Address in the register, whether or not it is decoded.
    pub address: u64,
    /// Whether the function answers there now.
    pub mapped: bool,
}

/// A BAR's presence in an address space. Dropping it takes the BAR out.
pub type BarMapping = Box<dyn Send + Sync>;

/// Puts BARs into the guest's address spaces.
pub trait BarMapper: Send + Sync {
    /// Maps `size` bytes at `address`. `None` when the place cannot be had (ports in use, address out of
    /// range): the function then simply does not answer, like hardware that lost an address conflict.
    fn map(&self, address: u64, size: u64, target: &BarTarget) -> Option<BarMapping>;
}

/// The runtime form of one BAR.
pub(crate) struct Bar {
    pub(crate) index: u8,
    pub(crate) kind: BarKind,
    pub(crate) size: u64,
    pub(crate) target: Option<BarTarget>,
    pub(crate) mapping: Option<(u64, BarMapping)>,
}

impl Bar {
    pub(crate) fn new(spec: BarSpec) -> Self {
        let (min, max) = match spec.kind {
            BarKind::Io => (4, 256),
            BarKind::Memory32 => (16, 1 << 31),
            BarKind::Memory64 { .. } => (16, 1 << 46),
        };
        let size = spec.size.clamp(min, max).next_power_of_two();
        Self { index: spec.index, kind: spec.kind, size, target: spec.target, mapping: None }
    }

    /// Offset of the register.
    pub(crate) fn register(&self) -> u16 {
        crate::regs::BAR0 + u16::from(self.index) * 4
    }

    /// The read-only bits at the bottom of the register.
    pub(crate) fn type_bits(&self) -> u32 {
        match self.kind {
            BarKind::Io => 1,
            BarKind::Memory32 => 0,
            BarKind::Memory64 { prefetchable } => 4 | u32::from(prefetchable) << 3,
        }
    }

    /// Whether a decoder would answer at `address`: not while software sizes the register (all ones, so that
    /// the range touches the end of the space) and not at zero, which means "not assigned".
    pub(crate) fn decodable(&self, address: u64) -> bool {
        let last = address.wrapping_add(self.size - 1);
        let end = match self.kind {
            BarKind::Io => 0xffff,
            BarKind::Memory32 => 0xffff_fffe,
            BarKind::Memory64 { .. } => (1 << 52) - 1,
        };
        address != 0 && last >= address && last <= end
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bar(kind: BarKind, size: u64) -> Bar {
        Bar::new(BarSpec { index: 0, kind, size, target: None })
    }

    #[test]
    fn sizes_round_up_and_stay_in_bounds() {
        assert_eq!(bar(BarKind::Memory32, 0x1001).size, 0x2000);
        assert_eq!(bar(BarKind::Io, 1).size, 4);
        assert_eq!(bar(BarKind::Memory32, u64::MAX).size, 1 << 31);
    }

    #[test]
    fn unassigned_and_sizing_addresses_are_not_decoded() {
        let b = bar(BarKind::Memory32, 0x1000);
        assert!(!b.decodable(0));
        assert!(!b.decodable(0xffff_f000));
        assert!(b.decodable(0xfebf_0000));
        let b = bar(BarKind::Memory64 { prefetchable: true }, 0x1000);
        assert!(!b.decodable(0xffff_ffff_ffff_f000));
        assert!(b.decodable(0x80_0000_0000));
        assert!(bar(BarKind::Io, 64).decodable(0xffc0));
    }
}
