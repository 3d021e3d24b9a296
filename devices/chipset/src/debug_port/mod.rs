//! Ports for bring-up: a debug console that firmware and small kernels print to, and the POST code register.

use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};

use atoll_machine::bus::PortDevice;

use saved_state::PostPortStateV1;

pub mod saved_state;
#[cfg(test)]
mod tests;

/// Where OVMF and SeaBIOS print.
pub const FIRMWARE_PORT: u16 = 0x402;
/// Where small kernels print.
pub const KERNEL_PORT: u16 = 0xe9;
/// First port of the POST code registers (the page registers of the DMA controller follow).
pub const POST_PORT: u16 = 0x80;
/// Number of those ports.
pub const POST_PORTS: u16 = 0x10;

/// Takes what is printed. Called on a vCPU's thread: collect, do not block.
pub trait DebugSink: Send + Sync {
    /// Takes some bytes.
    fn write(&self, bytes: &[u8]);
}

/// A debug console. Reads give e9, by which guests recognise it.
pub struct DebugPort {
    sink: Arc<dyn DebugSink>,
}

impl DebugPort {
    /// A console that prints to `sink`.
    pub fn new(sink: Arc<dyn DebugSink>) -> Arc<Self> {
        Arc::new(Self { sink })
    }
}

impl PortDevice for DebugPort {
    fn port_read(&self, _offset: u16, data: &mut [u8]) {
        data.fill(0xe9);
    }
    fn port_write(&self, _offset: u16, data: &[u8]) {
        self.sink.write(data);
    }
}

/// Ports 80-8F: plain storage. Port 80 is what operating systems write to wait a moment.
#[derive(Default)]
pub struct PostPort {
    bytes: [AtomicU8; POST_PORTS as usize],
}

impl PostPort {
    /// Registers that hold zero.
    pub fn new() -> Arc<Self> {
        Arc::default()
    }

    /// The last POST code.
    pub fn code(&self) -> u8 {
        self.bytes[0].load(Ordering::Relaxed)
    }

    /// Power-on state.
    pub fn reset(&self) {
        for byte in &self.bytes {
            byte.store(0, Ordering::Relaxed);
        }
    }
    /// The saved form.
    pub fn save(&self) -> PostPortStateV1 {
        PostPortStateV1 { bytes: Some(self.bytes.iter().map(|b| b.load(Ordering::Relaxed)).collect()) }
    }
    /// Takes over a saved state.
    pub fn restore(&self, saved: &PostPortStateV1) {
        self.reset();
        for (to, from) in self.bytes.iter().zip(saved.bytes.iter().flatten()) {
            to.store(*from, Ordering::Relaxed);
        }
    }
}

impl PortDevice for PostPort {
    fn port_read(&self, offset: u16, data: &mut [u8]) {
        for (i, byte) in data.iter_mut().enumerate() {
            *byte = self.bytes.get(usize::from(offset) + i).map_or(0xff, |b| b.load(Ordering::Relaxed));
        }
    }
    fn port_write(&self, offset: u16, data: &[u8]) {
        for (i, &byte) in data.iter().enumerate() {
            if let Some(to) = self.bytes.get(usize::from(offset) + i) {
                to.store(byte, Ordering::Relaxed);
            }
        }
    }
}
