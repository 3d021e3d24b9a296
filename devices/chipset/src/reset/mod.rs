//! Reset control: port CF9 (ICH9 data sheet 13.7.5) and port 92 (fast A20 and INIT, 13.7.3).
//!
//! CF9 resets when bit 2 goes from 0 to 1, whatever the kind in bits 1 and 3: there is one kind of reset here.
//! Port 92 resets when bit 0 goes from 0 to 1; bit 1, A20, is stored and A20 is always on.
//!
//! CF9 lies under the PCI address port: connect [`ResetControl::cf8_ports`] to
//! [`atoll_pci::ConfigPorts::set_narrow`].

use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};

use atoll_machine::bus::PortDevice;
use atoll_machine::control::{MachineRequest, SharedControl};

use saved_state::ResetControlStateV1;

pub mod saved_state;
#[cfg(test)]
mod tests;

/// Value at CF9 that the ACPI tables name: full reset.
pub const FULL_RESET: u8 = 0x0e;

/// Both registers.
pub struct ResetControl {
    cf9: AtomicU8,
    port92: AtomicU8,
    control: SharedControl,
}

/// A20 on.
const PORT92_POWER_ON: u8 = 0x02;

impl ResetControl {
    /// Registers that reset through `control`.
    pub fn new(control: SharedControl) -> Arc<Self> {
        Arc::new(Self { cf9: AtomicU8::new(0), port92: AtomicU8::new(PORT92_POWER_ON), control })
    }

    /// Device for narrow accesses at CF8-CFB.
    pub fn cf8_ports(self: &Arc<Self>) -> Arc<dyn PortDevice> {
        Arc::new(Cf8Ports(self.clone()))
    }
    /// Device for port 92.
    pub fn port92(self: &Arc<Self>) -> Arc<dyn PortDevice> {
        Arc::new(Port92(self.clone()))
    }

    fn store(&self, register: &AtomicU8, value: u8, trigger: u8) {
        let old = register.swap(value, Ordering::Relaxed);
        if value & !old & trigger != 0 {
            self.control.request(MachineRequest::Reset);
        }
    }

    /// Power-on state.
    pub fn reset(&self) {
        self.cf9.store(0, Ordering::Relaxed);
        self.port92.store(PORT92_POWER_ON, Ordering::Relaxed);
    }
    /// The saved form.
    pub fn save(&self) -> ResetControlStateV1 {
        ResetControlStateV1 {
            cf9: Some(u32::from(self.cf9.load(Ordering::Relaxed))),
            port92: Some(u32::from(self.port92.load(Ordering::Relaxed))),
        }
    }
    /// Takes over a saved state.
    pub fn restore(&self, saved: &ResetControlStateV1) {
        self.cf9.store(saved.cf9.unwrap_or(0) as u8, Ordering::Relaxed);
        self.port92.store(saved.port92.map_or(PORT92_POWER_ON, |v| v as u8), Ordering::Relaxed);
    }
}

struct Cf8Ports(Arc<ResetControl>);
impl PortDevice for Cf8Ports {
    fn port_read(&self, offset: u16, data: &mut [u8]) {
        for (i, byte) in data.iter_mut().enumerate() {
            *byte = if offset + i as u16 == 1 { self.0.cf9.load(Ordering::Relaxed) } else { 0xff };
        }
    }
    fn port_write(&self, offset: u16, data: &[u8]) {
        for (i, &byte) in data.iter().enumerate() {
            if offset + i as u16 == 1 {
                self.0.store(&self.0.cf9, byte & FULL_RESET, 0x04);
            }
        }
    }
}

struct Port92(Arc<ResetControl>);
impl PortDevice for Port92 {
    fn port_read(&self, _offset: u16, data: &mut [u8]) {
        data.fill(0xff);
        if let Some(byte) = data.first_mut() {
            *byte = self.0.port92.load(Ordering::Relaxed);
        }
    }
    fn port_write(&self, _offset: u16, data: &[u8]) {
        if let Some(&byte) = data.first() {
            self.0.store(&self.0.port92, byte & 0x03, 0x01);
        }
    }
}
