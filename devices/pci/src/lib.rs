//! PCI and PCI Express as a guest sees them.
//!
//! A device is a [`PciDevice`] that owns a [`PciFunction`]: configuration space with per-bit write rules, base
//! address registers that map themselves, capabilities, MSI, MSI-X and INTx. Functions sit on a [`PciBus`];
//! a bridge is a device with a secondary bus; [`PciRoot`] routes configuration cycles by bus number and is
//! reached through [`ConfigPorts`] (CF8/CFC) and [`Ecam`].
//!
//! ```text
//! vCPU --CF8/CFC--> ConfigPorts --+                         +--> PciFunction (config space)
//! vCPU --MMIO-----> Ecam ---------+--> PciRoot --> PciBus --+--> bridge --> PciBus --> PciFunction
//!                                                           |
//!                       BAR written, decoding enabled ------+--> BarMapper --> AddressSpace / PortBus
//! ```
//!
//! Specifications: PCI Local Bus 3.0 (header, MSI, MSI-X), PCI-to-PCI Bridge 1.2, PCI Express Base 4.0
//! (capability, slots, ECAM), PCI Firmware 3.2 (ECAM addresses).
//!
//! Lock order: a device's own lock, [`PciFunction`]'s lock, [`Msix`]'s lock, then the mapper or interrupt
//! sink. Nothing below calls back up.

#![forbid(unsafe_code)]

use std::fmt;

use atoll_foundation::sync::lock;

mod assign;
mod bar;
mod bus;
mod config;
pub mod express;
mod function;
mod mapper;
mod mechanism;
mod msi;
mod msix;
pub mod regs;
pub mod saved_state;
#[cfg(test)]
mod testing;

pub use assign::{AssignError, AssignWindows, assign_bars};
pub use bar::{BarInfo, BarKind, BarMapper, BarMapping, BarSpec, BarTarget};
pub use bus::{BusError, PciBus, PciRoot};
pub use config::ConfigSpace;
pub use express::{ExpressSpec, PortType};
pub use function::{ConfigEffect, FunctionBuilder, Identity, PciFunction};
pub use mapper::PciBarMapper;
pub use mechanism::{ConfigPorts, ECAM_BYTES_PER_BUS, Ecam};
pub use msi::MsiSpec;
pub use msix::Msix;
pub use saved_state::RestoreError;

/// The GSI of INTx pin `pin` (0 = INTA .. 3 = INTD, as in ACPI `_PRT`) of device `device` on the root bus.
///
/// As Q35 wires it: devices 0-24 rotate over PIRQE-PIRQH (GSI 20-23), device 30 uses them in pin order, and
/// the chipset's own devices 25-29 and 31 use PIRQA-PIRQD (GSI 16-19) in pin order. The `_PRT` of the ACPI tables
/// says the same, and a test where both meet compares them. Behind a bridge apply [`swizzle`] once per bridge
/// first.
pub const fn intx_gsi(device: u8, pin: u8) -> u32 {
    let (device, pin) = (device as u32, pin as u32 & 3);
    match device {
        0..=24 => 20 + (device + pin) % 4,
        30 => 20 + pin,
        _ => 16 + pin,
    }
}

/// The pin at a bridge's primary side for pin `pin` (0 = INTA) of device `device` on its secondary bus
/// (PCI-to-PCI Bridge 1.2, table 9-1).
pub const fn swizzle(device: u8, pin: u8) -> u8 {
    (device + pin) % 4
}

/// Bus, device and function number of a configuration cycle.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Bdf {
    /// Bus number.
    pub bus: u8,
    /// Device number in bits 7..3, function number in bits 2..0.
    pub devfn: u8,
}

impl Bdf {
    /// The address of `function` (0-7) of `device` (0-31) on `bus`; excess bits are ignored.
    pub const fn new(bus: u8, device: u8, function: u8) -> Self {
        Self { bus, devfn: devfn(device, function) }
    }
    /// Device number, 0-31.
    pub const fn device(self) -> u8 {
        self.devfn >> 3
    }
    /// Function number, 0-7.
    pub const fn function(self) -> u8 {
        self.devfn & 7
    }
}

/// Packs a device (0-31) and a function number (0-7); excess bits are ignored.
pub const fn devfn(device: u8, function: u8) -> u8 {
    (device & 31) << 3 | (function & 7)
}

impl fmt::Display for Bdf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:02x}:{:02x}.{}", self.bus, self.device(), self.function())
    }
}
impl fmt::Debug for Bdf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// One PCI function and what makes it a particular device.
///
/// Configuration accesses arrive as 1, 2 or 4 bytes that do not cross a 4-byte boundary, `offset` below 4096.
pub trait PciDevice: Send + Sync {
    /// The function's configuration space, BARs and interrupts.
    fn function(&self) -> &PciFunction;

    /// Puts the device into its power-on state, [`PciFunction::reset`] included. Called for a machine reset,
    /// a function-level reset and a secondary bus reset.
    fn reset(&self);

    /// A configuration read. Override to compute registers on the fly.
    fn config_read(&self, offset: u16, data: &mut [u8]) {
        self.function().config_read(offset, data);
    }

    /// A configuration write. Override to react to writes, and call [`PciDevice::default_config_write`].
    fn config_write(&self, offset: u16, data: &[u8]) {
        self.default_config_write(offset, data);
    }

    /// Applies a write to the function, and resets the device when the write asked for that.
    fn default_config_write(&self, offset: u16, data: &[u8]) {
        if self.function().config_write(offset, data).function_reset {
            self.reset();
        }
    }

    /// The bus behind this device when it is a bridge (a type 1 header).
    fn secondary_bus(&self) -> Option<&PciBus> {
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn intx_wires_follow_q35() {
        assert_eq!([0, 1, 2, 3].map(|pin| intx_gsi(3, pin)), [23, 20, 21, 22]);
        assert_eq!([0, 1, 2, 3].map(|pin| intx_gsi(30, pin)), [20, 21, 22, 23]);
        assert_eq!([0, 1, 2, 3].map(|pin| intx_gsi(31, pin)), [16, 17, 18, 19]);
        assert_eq!(swizzle(3, 2), 1);
    }

    #[test]
    fn addresses_print_as_lspci_prints_them() {
        assert_eq!(Bdf::new(0, 31, 2).to_string(), "00:1f.2");
        assert_eq!(Bdf::new(16, 3, 0).devfn, 0x18);
    }
}
