//! The debug-exit port: a write of 1, 2 or 4 bytes ends the run with the value, for kernels that are tests.
//!
//! It exists only where the user asked for it. It has no state.

use std::sync::Arc;

use atoll_machine::bus::PortDevice;
use atoll_machine::control::{MachineRequest, SharedControl};

#[cfg(test)]
mod tests;

/// First port, as test kernels know it from other machines.
pub const PORT: u16 = 0xf4;
/// Number of ports.
pub const PORTS: u16 = 4;

/// The device.
pub struct DebugExit {
    control: SharedControl,
}

impl DebugExit {
    /// A port that reports to `control`.
    pub fn new(control: SharedControl) -> Arc<Self> {
        Arc::new(Self { control })
    }
}

impl PortDevice for DebugExit {
    fn port_read(&self, _offset: u16, data: &mut [u8]) {
        data.fill(0);
    }

    fn port_write(&self, _offset: u16, data: &[u8]) {
        let mut value = [0; 4];
        for (to, from) in value.iter_mut().zip(data) {
            *to = *from;
        }
        self.control.request(MachineRequest::DebugExit { value: u32::from_le_bytes(value) });
    }
}
