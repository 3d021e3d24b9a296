//! The 16550A serial port (National PC16550D data sheet).
//!
//! ```text
//!  guest OUT --> transmit --> SerialBackend::write            (at once: the line has no speed)
//!  Uart::receive --> buffer of 1 KiB --> receive FIFO --> guest IN
//!        accepted count <---'    '--> SerialBackend::input_ready when there is room again
//! ```
//!
//! The receiver shows the front of its buffer as the FIFO, so a guest that reads keeps reading; bytes are refused
//! rather than lost (no overrun but in loopback). Fewer bytes than the trigger level raise the character timeout
//! interrupt at once instead of four characters later. As on a PC, OUT2 connects the interrupt to its wire.
//!
//! Lock order: this, then the backend and the interrupt controllers. The backend does not call back from `write`
//! or `input_ready`.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use atoll_machine::bus::PortDevice;
use atoll_machine::inputs::{InputGate, InputKind};
use atoll_machine::interrupt::IrqLine;

use crate::lock;
use saved_state::UartStateV1;

pub mod metrics;
pub mod saved_state;
#[cfg(test)]
mod tests;

pub use metrics::UartMetrics;

/// Bytes of input that the port holds before it refuses more.
pub const INPUT_CAPACITY: usize = 1024;
/// Depth of a FIFO in bytes.
const FIFO_DEPTH: usize = 16;

const IER_RECEIVED: u8 = 1;
const IER_TRANSMIT: u8 = 2;
const IER_LINE: u8 = 4;
const IER_MODEM: u8 = 8;
const LSR_DATA: u8 = 0x01;
const LSR_OVERRUN: u8 = 0x02;
const LSR_ERRORS: u8 = 0x1e;
const LSR_EMPTY: u8 = 0x60;
const LCR_DLAB: u8 = 0x80;
const MCR_OUT2: u8 = 0x08;
const MCR_LOOP: u8 = 0x10;
/// Clear to send, data set ready, carrier detect: a cable with somebody at the other end.
const MSR_CONNECTED: u8 = 0xb0;
const FCR_ENABLE: u8 = 1;

/// The other end of the serial line.
pub trait SerialBackend: Send + Sync {
    /// Takes what the guest sent. Called on a vCPU's thread for each byte: collect, do not block.
    fn write(&self, bytes: &[u8]);
    /// The port has room for input again after it refused some.
    fn input_ready(&self) {}
}

#[derive(Default)]
struct Inner {
    ier: u8,
    fcr: u8,
    lcr: u8,
    mcr: u8,
    /// Error bits only; the rest is computed.
    lsr: u8,
    msr: u8,
    scratch: u8,
    divisor: u16,
    input: VecDeque<u8>,
    /// Bytes accepted that have not passed the input gate yet.
    in_flight: usize,
    refused: bool,
    /// The transmitter became empty and nobody was told.
    transmit_pending: bool,
}

impl Inner {
    fn fifo(&self) -> bool {
        self.fcr & FCR_ENABLE != 0
    }
    fn trigger(&self) -> usize {
        if !self.fifo() {
            return 1;
        }
        [1, 4, 8, 14][usize::from(self.fcr >> 6)]
    }
    fn line_status(&self) -> u8 {
        self.lsr | LSR_EMPTY | if self.input.is_empty() { 0 } else { LSR_DATA }
    }

    /// Interrupt identification without the FIFO bits: the most urgent enabled source.
    fn source(&self) -> u8 {
        if self.ier & IER_LINE != 0 && self.lsr & LSR_ERRORS != 0 {
            0x06
        } else if self.ier & IER_RECEIVED != 0 && !self.input.is_empty() {
            if self.input.len() >= self.trigger() { 0x04 } else { 0x0c }
        } else if self.ier & IER_TRANSMIT != 0 && self.transmit_pending {
            0x02
        } else if self.ier & IER_MODEM != 0 && self.msr & 0x0f != 0 {
            0x00
        } else {
            0x01
        }
    }

    /// Modem inputs: the cable's, or in loopback the port's own outputs.
    fn update_modem(&mut self) {
        let m = self.mcr;
        let inputs = if m & MCR_LOOP != 0 {
            (m & 2) << 3 | (m & 1) << 5 | (m & 4) << 4 | (m & 8) << 4
        } else {
            MSR_CONNECTED
        };
        let changed = (inputs ^ self.msr) >> 4;
        // Ring counts only when it ends.
        let ring = changed & 4 != 0 && inputs & 0x40 == 0;
        let deltas = changed & 0x0b | u8::from(ring) << 2;
        self.msr = inputs | self.msr & 0x0f | deltas;
    }
}

/// One serial port. Eight ports: 3F8, 2F8, 3E8 or 2E8.
pub struct Uart {
    inner: Mutex<Inner>,
    backend: Arc<dyn SerialBackend>,
    gate: Arc<InputGate>,
    irq: IrqLine,
    sent: AtomicU64,
    received: AtomicU64,
}

impl Uart {
    /// A port that sends to `backend` and raises `irq`.
    pub fn new(backend: Arc<dyn SerialBackend>, gate: Arc<InputGate>, irq: IrqLine) -> Arc<Self> {
        let inner = Inner { msr: MSR_CONNECTED, divisor: 12, ..Inner::default() };
        Arc::new(Self { inner: Mutex::new(inner), backend, gate, irq, sent: 0.into(), received: 0.into() })
    }

    /// Input from the line, from any thread. Returns how many bytes were accepted; for the rest wait until
    /// [`SerialBackend::input_ready`].
    pub fn receive(self: &Arc<Self>, bytes: &[u8]) -> usize {
        let accepted = {
            let mut inner = lock(&self.inner);
            let room = INPUT_CAPACITY.saturating_sub(inner.input.len() + inner.in_flight);
            let accepted = room.min(bytes.len());
            inner.in_flight += accepted;
            inner.refused |= accepted < bytes.len();
            accepted
        };
        if accepted > 0 {
            let (uart, bytes) = (self.clone(), bytes[..accepted].to_vec());
            self.gate.deliver(InputKind::Console, move || uart.deliver(&bytes));
        }
        accepted
    }

    fn deliver(&self, bytes: &[u8]) {
        let mut inner = lock(&self.inner);
        inner.in_flight = inner.in_flight.saturating_sub(bytes.len());
        inner.input.extend(bytes);
        self.received.fetch_add(bytes.len() as u64, Ordering::Relaxed);
        self.update(&inner);
    }

    /// Counters since the machine started.
    pub fn metrics(&self) -> UartMetrics {
        UartMetrics {
            sent: self.sent.load(Ordering::Relaxed),
            received: self.received.load(Ordering::Relaxed),
        }
    }

    fn update(&self, inner: &Inner) {
        self.irq.set(inner.source() != 0x01 && inner.mcr & MCR_OUT2 != 0);
    }

    fn transmit(&self, inner: &mut Inner, byte: u8) {
        if inner.mcr & MCR_LOOP != 0 {
            if inner.input.len() >= if inner.fifo() { FIFO_DEPTH } else { 1 } {
                inner.lsr |= LSR_OVERRUN;
            } else {
                inner.input.push_back(byte);
            }
        } else {
            self.sent.fetch_add(1, Ordering::Relaxed);
            self.backend.write(&[byte]);
        }
        inner.transmit_pending = true;
    }

    /// The next received byte; asks for more input when enough room is free again.
    fn take_input(&self, inner: &mut Inner) -> u8 {
        let byte = inner.input.pop_front().unwrap_or(0);
        if inner.refused && inner.input.len() <= INPUT_CAPACITY / 2 {
            inner.refused = false;
            self.backend.input_ready();
        }
        byte
    }

    fn write_fifo_control(inner: &mut Inner, value: u8) {
        let toggled = (inner.fcr ^ value) & FCR_ENABLE != 0;
        // Only what would be in the FIFO is thrown away: the rest is still on the line.
        if (toggled || value & 2 != 0) && value & FCR_ENABLE | inner.fcr & FCR_ENABLE != 0 {
            let shown = inner.input.len().min(if inner.fifo() { FIFO_DEPTH } else { 1 });
            inner.input.drain(..shown);
        }
        inner.fcr = if value & FCR_ENABLE != 0 { value & 0xc9 } else { 0 };
    }

    fn read_register(&self, inner: &mut Inner, register: u16) -> u8 {
        let dlab = inner.lcr & LCR_DLAB != 0;
        match register {
            0 if dlab => inner.divisor as u8,
            1 if dlab => (inner.divisor >> 8) as u8,
            0 => self.take_input(inner),
            1 => inner.ier,
            2 => {
                let source = inner.source();
                if source == 0x02 {
                    inner.transmit_pending = false;
                }
                source | if inner.fifo() { 0xc0 } else { 0 }
            }
            3 => inner.lcr,
            4 => inner.mcr,
            5 => {
                let status = inner.line_status();
                inner.lsr = 0;
                status
            }
            6 => {
                let status = inner.msr;
                inner.msr &= 0xf0;
                status
            }
            _ => inner.scratch,
        }
    }

    fn write_register(&self, inner: &mut Inner, register: u16, value: u8) {
        let dlab = inner.lcr & LCR_DLAB != 0;
        match register {
            0 if dlab => inner.divisor = inner.divisor & 0xff00 | u16::from(value),
            1 if dlab => inner.divisor = inner.divisor & 0x00ff | u16::from(value) << 8,
            0 => self.transmit(inner, value),
            1 => {
                // Enabling the transmit interrupt while the transmitter is empty raises it.
                if value & !inner.ier & IER_TRANSMIT != 0 {
                    inner.transmit_pending = true;
                }
                inner.ier = value & 0x0f;
            }
            2 => Self::write_fifo_control(inner, value),
            3 => inner.lcr = value,
            4 => {
                inner.mcr = value & 0x1f;
                inner.update_modem();
            }
            5 | 6 => {}
            _ => inner.scratch = value,
        }
    }

    /// Power-on state. Input that the guest has not read is dropped.
    pub fn reset(&self) {
        let mut inner = lock(&self.inner);
        let in_flight = inner.in_flight;
        let refused = inner.refused;
        *inner = Inner { msr: MSR_CONNECTED, divisor: 12, in_flight, ..Inner::default() };
        self.update(&inner);
        if refused {
            self.backend.input_ready();
        }
    }

    /// The saved form.
    pub fn save(&self) -> UartStateV1 {
        lock(&self.inner).save()
    }

    /// Takes over a saved state and drives the wire accordingly.
    pub fn restore(&self, saved: &UartStateV1) {
        let mut inner = lock(&self.inner);
        let in_flight = inner.in_flight;
        *inner = Inner { in_flight, ..Inner::restored(saved) };
        self.update(&inner);
    }
}

impl PortDevice for Uart {
    fn port_read(&self, offset: u16, data: &mut [u8]) {
        let mut inner = lock(&self.inner);
        for (i, byte) in data.iter_mut().enumerate() {
            *byte = self.read_register(&mut inner, (offset + i as u16) & 7);
        }
        self.update(&inner);
    }

    fn port_write(&self, offset: u16, data: &[u8]) {
        let mut inner = lock(&self.inner);
        for (i, &byte) in data.iter().enumerate() {
            self.write_register(&mut inner, (offset + i as u16) & 7, byte);
        }
        self.update(&inner);
    }
}
