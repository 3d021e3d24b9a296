//! The IOAPIC: 24 pins, version 0x20 (Intel 82093AA data sheet, ICH9 data sheet 13.5).
//!
//! ```text
//!  edge pin:   rising edge, unmasked ------------------------------------> message
//!  level pin:  high, unmasked, remote IRR clear --> message, remote IRR set
//!                       ^                                  |
//!                       +-- still high -- EOI of the vector: remote IRR clear
//! ```
//!
//! An edge on a masked pin is lost, as the data sheet says. Polarity is stored but has no meaning here: a wire
//! is high when its device asserts it. Level-triggered entries are announced (see [`IoApicRoutes`]) before they send
//! anything, masked or not. Registers are 32 bits wide at 0x00 (index), 0x10 (data) and 0x40 (EOI).

use std::sync::{Arc, Mutex, OnceLock};

use atoll_machine::bus::MmioDevice;
use atoll_machine::interrupt::{EoiSink, IoApicRoutes, LineSink, Msi, MsiSink};

use crate::lock;
use saved_state::IoApicStateV1;

pub mod saved_state;
#[cfg(test)]
mod tests;

/// Number of input pins.
pub const PINS: usize = 24;
/// Guest-physical address of the registers.
pub const BASE: u64 = 0xfec0_0000;
/// Bytes of registers to map.
pub const SIZE: u64 = 0x1000;
/// Contents of the version register: version 0x20, highest entry 23.
const VERSION: u32 = 0x20 | (PINS as u32 - 1) << 16;

const DELIVERY_STATUS: u64 = 1 << 12;
const REMOTE_IRR: u64 = 1 << 14;
const LEVEL: u64 = 1 << 15;
const MASKED: u64 = 1 << 16;
/// Bits of an entry that software can change.
const WRITABLE: u64 = 0xff00_0000_0001_afff;

struct Inner {
    id: u32,
    index: u8,
    entries: [u64; PINS],
    lines: u32,
    /// What was announced last for each pin.
    routes: [Option<Msi>; PINS],
}

/// The IOAPIC. See the module's documentation.
pub struct IoApic {
    inner: Mutex<Inner>,
    sink: OnceLock<Arc<dyn MsiSink>>,
    routes: OnceLock<Arc<dyn IoApicRoutes>>,
}

impl IoApic {
    /// All pins masked, id 0.
    pub fn new() -> Arc<Self> {
        let inner = Inner { id: 0, index: 0, entries: [MASKED; PINS], lines: 0, routes: [None; PINS] };
        Arc::new(Self { inner: Mutex::new(inner), sink: OnceLock::new(), routes: OnceLock::new() })
    }

    /// Connects the local APICs. The first call counts; until then messages are dropped.
    pub fn connect_cpu(&self, sink: Arc<dyn MsiSink>) {
        let _ = self.sink.set(sink);
    }

    /// Connects a backend that wants to know the level-triggered entries. The first call counts.
    pub fn connect_routes(&self, routes: Arc<dyn IoApicRoutes>) {
        let mut inner = lock(&self.inner);
        let _ = self.routes.set(routes);
        self.announce(&mut inner);
    }

    /// Power-on state. Wires keep their levels.
    pub fn reset(&self) {
        let mut inner = lock(&self.inner);
        inner.id = 0;
        inner.index = 0;
        inner.entries = [MASKED; PINS];
        self.announce(&mut inner);
    }

    /// The message that the entry of `pin` sends, for backends that route pins themselves.
    pub fn message(&self, pin: usize) -> Option<Msi> {
        let inner = lock(&self.inner);
        inner.entries.get(pin).filter(|&e| e & MASKED == 0).map(|&e| message(e))
    }

    /// The saved form.
    pub fn save(&self) -> IoApicStateV1 {
        let inner = lock(&self.inner);
        IoApicStateV1 {
            id: Some(inner.id),
            index: Some(u32::from(inner.index)),
            entries: inner.entries.to_vec(),
            lines: Some(inner.lines),
        }
    }

    /// Takes over a saved state. Nothing is sent: what was delivered is in the local APICs' state.
    pub fn restore(&self, saved: &IoApicStateV1) {
        let mut inner = lock(&self.inner);
        inner.id = saved.id.unwrap_or(0) & 0x0f00_0000;
        inner.index = saved.index.unwrap_or(0) as u8;
        inner.lines = saved.lines.unwrap_or(0) & ((1 << PINS) - 1);
        inner.entries = [MASKED; PINS];
        for (to, from) in inner.entries.iter_mut().zip(&saved.entries) {
            *to = from & (WRITABLE | REMOTE_IRR);
        }
        self.announce(&mut inner);
    }

    /// Tells the backend which level-triggered entries changed.
    fn announce(&self, inner: &mut Inner) {
        let Some(routes) = self.routes.get() else { return };
        for pin in 0..PINS {
            let entry = inner.entries[pin];
            let route = (entry & LEVEL != 0).then(|| message(entry));
            if inner.routes[pin] != route {
                inner.routes[pin] = route;
                routes.set_route(pin as u32, route);
            }
        }
    }

    /// Sends a level-triggered pin's message if it is due.
    fn service_level(&self, inner: &mut Inner, pin: usize) {
        let entry = inner.entries[pin];
        let due = inner.lines & 1 << pin != 0 && entry & (LEVEL | MASKED | REMOTE_IRR) == LEVEL;
        if due {
            inner.entries[pin] |= REMOTE_IRR;
            self.send(entry);
        }
    }

    fn send(&self, entry: u64) {
        if let Some(sink) = self.sink.get() {
            sink.signal_msi(message(entry));
        }
    }

    fn write_entry(&self, inner: &mut Inner, pin: usize, high_half: bool, value: u32) {
        let old = inner.entries[pin];
        let shift = if high_half { 32 } else { 0 };
        let half = 0xffff_ffffu64 << shift;
        let mut entry = (old & !half | u64::from(value) << shift) & WRITABLE | old & REMOTE_IRR;
        if entry & LEVEL == 0 {
            // Edge mode has no remote IRR: software switches to it and back to clear a stuck one.
            entry &= !REMOTE_IRR;
        }
        inner.entries[pin] = entry;
        self.announce(inner);
        self.service_level(inner, pin);
    }

    fn read_data(inner: &Inner) -> u32 {
        match inner.index {
            0 | 2 => inner.id,
            1 => VERSION,
            index => match inner.entries.get(usize::from(index.wrapping_sub(0x10) >> 1)) {
                Some(entry) if index >= 0x10 => (entry >> (32 * u32::from(index & 1))) as u32,
                _ => 0,
            },
        }
    }

    fn write_data(&self, inner: &mut Inner, value: u32) {
        match inner.index {
            0 => inner.id = value & 0x0f00_0000,
            index @ 0x10.. => {
                let pin = usize::from((index - 0x10) >> 1);
                if pin < PINS {
                    self.write_entry(inner, pin, index & 1 != 0, value);
                }
            }
            _ => {}
        }
    }

    fn end(&self, inner: &mut Inner, vector: u8) {
        for pin in 0..PINS {
            let entry = inner.entries[pin];
            if entry & (LEVEL | REMOTE_IRR) == LEVEL | REMOTE_IRR && entry as u8 == vector {
                inner.entries[pin] &= !REMOTE_IRR;
                self.service_level(inner, pin);
            }
        }
    }
}

/// The message of an entry: destination and mode from its upper byte and bit 11, vector, delivery mode and
/// trigger mode as they are; a level-triggered message says "asserted".
fn message(entry: u64) -> Msi {
    let level = entry & LEVEL != 0;
    let lowest_priority = entry >> 8 & 7 == 1;
    let address =
        0xfee0_0000 | (entry >> 56) << 12 | u64::from(lowest_priority) << 3 | (entry >> 11 & 1) << 2;
    let data = entry as u32 & 0x7ff | u32::from(level) << 15 | u32::from(level) << 14;
    Msi { address, data }
}

impl LineSink for IoApic {
    fn set_line(&self, line: u32, high: bool) {
        let mut inner = lock(&self.inner);
        let pin = line as usize;
        if pin >= PINS {
            return;
        }
        let was = inner.lines & 1 << pin != 0;
        inner.lines = inner.lines & !(1 << pin) | u32::from(high) << pin;
        let entry = inner.entries[pin];
        if entry & LEVEL != 0 {
            self.service_level(&mut inner, pin);
        } else if high && !was && entry & MASKED == 0 {
            self.send(entry);
        }
    }
}

impl EoiSink for IoApic {
    fn end_of_interrupt(&self, vector: u8) {
        self.end(&mut lock(&self.inner), vector);
    }
}

impl MmioDevice for IoApic {
    fn mmio_read(&self, offset: u64, data: &mut [u8]) {
        let inner = lock(&self.inner);
        let value = match offset & !3 {
            0x00 => u32::from(inner.index),
            0x10 => Self::read_data(&inner),
            _ => 0,
        };
        let bytes = value.to_le_bytes();
        for (i, byte) in data.iter_mut().enumerate() {
            *byte = bytes.get((offset & 3) as usize + i).copied().unwrap_or(0);
        }
    }

    fn mmio_write(&self, offset: u64, data: &[u8]) {
        let mut value = [0; 4];
        for (to, from) in value.iter_mut().zip(data) {
            *to = *from;
        }
        let value = u32::from_le_bytes(value);
        let mut inner = lock(&self.inner);
        match offset {
            0x00 => inner.index = value as u8,
            0x10 => self.write_data(&mut inner, value),
            0x40 => self.end(&mut inner, value as u8),
            _ => {}
        }
    }
}

const _: () = assert!(WRITABLE & (DELIVERY_STATUS | REMOTE_IRR) == 0);
