//! The chipset of machine `atoll-1`: what sits around processor, memory and PCI in a Q35-compatible PC.
//!
//! | module | what it is | where |
//! |---|---|---|
//! | [`pic`] | 8259A pair | ports 20, 21, A0, A1, 4D0, 4D1 |
//! | [`ioapic`] | IOAPIC, 24 pins | 0xFEC00000 |
//! | [`gsi`] | wires of devices, OR of shared ones, fan-out to PIC and IOAPIC | |
//! | [`pit`] | 8254 timer and system control | ports 40-43, 61 |
//! | [`rtc`] | MC146818 clock and CMOS memory | ports 70-77 |
//! | [`uart`] | 16550A serial ports | ports 3F8, 2F8, 3E8, 2E8 |
//! | [`i8042`] | keyboard controller, keyboard, mouse | ports 60, 64 |
//! | [`acpi_pm`] | ACPI power management | PMBASE, ports B2, B3 |
//! | [`reset`] | reset control | ports CF9, 92 |
//! | [`pvpanic`] | crash report | port 505 |
//! | [`debug_exit`] | end of a test kernel's run | port F4 |
//! | [`debug_port`] | debug console, POST codes | ports E9, 402, 80-8F |
//! | [`host_bridge`] | Q35 host bridge, ECAM, PAM | 00:00.0 |
//! | [`lpc`] | ICH9 LPC bridge: PMBASE, PIRQ routes | 00:1f.0 |
//! | [`root_port`] | PCI Express root port with hot-plug slot | |
//! | [`watchdog`] | i6300ESB | |
//!
//! Ports are handed to devices as ranges of a `PortBus`; each device says which in its documentation and takes
//! offsets from the start of its range. Interrupt lines come from [`gsi::Gsi`].
//!
//! Every device with state is a [`atoll_machine::state::SaveState`]. To restore a machine: guest time, then
//! [`gsi`], [`pic`] and [`ioapic`], then the devices (a wire that already has its level makes no edge), then the
//! processors.
//!
//! Lock order: device, [`gsi::Gsi`], [`pic::Pic`] or [`ioapic::IoApic`], then the backend's local APICs. A lower
//! one never calls a higher one.

#![forbid(unsafe_code)]
// Shifts bind tighter than masks, as data sheets write them.
#![allow(clippy::precedence)]

use atoll_foundation::sync::lock;

pub mod acpi_pm;
#[cfg(any(test, feature = "test-utils"))]
pub mod board;
pub mod debug_exit;
pub mod debug_port;
pub mod gsi;
pub mod host_bridge;
pub mod i8042;
pub mod ioapic;
pub mod lpc;
pub mod pic;
pub mod pit;
pub mod pvpanic;
pub mod reset;
pub mod root_port;
pub mod rtc;
mod sections;
#[cfg(test)]
mod testing;
pub mod uart;
pub mod watchdog;
