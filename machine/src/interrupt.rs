//! Interrupt lines, message-signalled interrupts and the legacy ExtINT handshake.
//!
//! ```text
//! device --IrqLine--> LineSink (PIC + IOAPIC of the chipset) --MsiSink--> LAPICs of the backend
//! device --MSI-X----------------------------------------------^
//! PIC --ExtIntSink::set_extint--> LINT0 of the boot processor; CPU --ExtIntSource::acknowledge--> PIC
//! LAPIC --EoiSink::end_of_interrupt--> IOAPIC (level-triggered re-delivery)
//! IOAPIC --IoApicRoutes::set_route--> backends that must know beforehand whose end will be told
//! ```
//!
//! Lock order: a device's own lock, then the interrupt controller's lock, then nothing. Sinks never call
//! back into the device that raised the line.

use std::fmt;
use std::sync::Arc;

/// Receives the level of numbered wires. Calling with the level the wire already has is harmless.
pub trait LineSink: Send + Sync {
    /// Sets wire `line` to `high`.
    fn set_line(&self, line: u32, high: bool);
}

/// One wire into an interrupt controller, held by the device that drives it.
///
/// Wires are not shared implicitly: devices that share a GSI each get an input of an OR in the chipset.
#[derive(Clone)]
pub struct IrqLine {
    sink: Arc<dyn LineSink>,
    line: u32,
}

impl IrqLine {
    /// Wire number `line` of `sink`.
    pub fn new(sink: Arc<dyn LineSink>, line: u32) -> Self {
        Self { sink, line }
    }

    /// A wire that leads nowhere.
    pub fn unconnected() -> Self {
        struct Nowhere;
        impl LineSink for Nowhere {
            fn set_line(&self, _line: u32, _high: bool) {}
        }
        Self::new(Arc::new(Nowhere), 0)
    }

    /// Drives the wire.
    pub fn set(&self, high: bool) {
        self.sink.set_line(self.line, high);
    }

    /// Raises and lowers the wire: one edge.
    pub fn pulse(&self) {
        self.set(true);
        self.set(false);
    }

    /// The wire's number at its sink.
    pub fn number(&self) -> u32 {
        self.line
    }
}

impl fmt::Debug for IrqLine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "IrqLine({})", self.line)
    }
}

/// A message-signalled interrupt: what a device writes to 0xFEEx_xxxx (Intel SDM vol. 3, 11.11).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Msi {
    /// Address: bits 19..12 destination id, bit 3 redirection hint, bit 2 destination mode. Bits 63..40
    /// carry the upper destination id bits where extended ids are in use.
    pub address: u64,
    /// Data: bits 7..0 vector, 10..8 delivery mode, 14 level, 15 trigger mode.
    pub data: u32,
}

/// Accepts message-signalled interrupts: implemented by a backend's partition.
pub trait MsiSink: Send + Sync {
    /// Delivers `msi` to the local APICs that it addresses. Messages that address none are dropped.
    fn signal_msi(&self, msi: Msi);
}

/// The INTR pin of the legacy PIC, wired to LINT0 of every local APIC.
pub trait ExtIntSink: Send + Sync {
    /// Drives the pin.
    fn set_extint(&self, high: bool);
}

/// The CPU's side of the legacy handshake: implemented by the chipset's PIC.
pub trait ExtIntSource: Send + Sync {
    /// The interrupt-acknowledge cycle: returns the vector and moves the request in service.
    fn acknowledge(&self) -> u8;
}

/// Told by local APICs about the end of level-triggered interrupts: implemented by the IOAPIC.
pub trait EoiSink: Send + Sync {
    /// Vector `vector` ended on some local APIC.
    fn end_of_interrupt(&self, vector: u8);
}

/// Where an IOAPIC announces its level-triggered entries, for a backend whose local APICs tell the end only of the
/// messages they were told about beforehand. See [`crate::backend::Partition::ioapic_routes`].
pub trait IoApicRoutes: Send + Sync {
    /// From now on a level-triggered `pin` sends `msi`; `None`: the pin is edge-triggered, its ends matter to nobody.
    /// Called before the first such message is sent. A masked entry keeps its route, because an interrupt may
    /// be in service. Pins beyond the IOAPIC's 24 are ignored.
    fn set_route(&self, pin: u32, msi: Option<Msi>);
}
