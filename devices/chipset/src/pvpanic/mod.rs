//! pvpanic: a port through which a guest says that it crashed (QEMU documentation `specs/pvpanic`).
//!
//! Reading port 505 gives the events that are understood; writing reports them. It has no state but counters.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use atoll_machine::bus::PortDevice;
use atoll_machine::control::{MachineRequest, SharedControl};

#[cfg(test)]
mod tests;

/// The port.
pub const PORT: u16 = 0x505;
/// The guest panicked and stops.
pub const PANICKED: u8 = 1 << 0;
/// The guest panicked and goes on in its crash kernel.
pub const CRASH_LOADED: u8 = 1 << 1;
/// The guest shuts down.
pub const SHUTDOWN: u8 = 1 << 2;

/// The device.
pub struct PvPanic {
    control: SharedControl,
    crash_loaded: AtomicU64,
}

impl PvPanic {
    /// A port that reports to `control`.
    pub fn new(control: SharedControl) -> Arc<Self> {
        Arc::new(Self { control, crash_loaded: AtomicU64::new(0) })
    }

    /// How often the guest said that its crash kernel takes over. The machine runs on then.
    pub fn crash_kernels(&self) -> u64 {
        self.crash_loaded.load(Ordering::Relaxed)
    }
}

impl PortDevice for PvPanic {
    fn port_read(&self, _offset: u16, data: &mut [u8]) {
        data.fill(0xff);
        if let Some(byte) = data.first_mut() {
            *byte = PANICKED | CRASH_LOADED | SHUTDOWN;
        }
    }

    fn port_write(&self, _offset: u16, data: &[u8]) {
        let Some(&events) = data.first() else { return };
        if events & PANICKED != 0 {
            self.control.request(MachineRequest::GuestPanic);
        } else if events & SHUTDOWN != 0 {
            self.control.request(MachineRequest::PowerOff);
        } else if events & CRASH_LOADED != 0 {
            self.crash_loaded.fetch_add(1, Ordering::Relaxed);
        }
    }
}
