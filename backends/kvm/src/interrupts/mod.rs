//! Interrupts into the kernel's local APICs: messages, GSI routes, and the PIC's handshake.
//!
//! ```text
//!  device ── MSI, IOAPIC ──► msi.rs: KVM_SIGNAL_MSI ────────────────────────────► local APICs
//!  eventfd ──────────────────── irqfd ──► GSI 24.. ── routing.rs: message ──────► local APICs
//!  IOAPIC ── its level-triggered entries ──► GSI 0..23, so that KVM reports their ends:
//!                                            KVM_EXIT_IOAPIC_EOI ──► EoiSink ──► IOAPIC
//!  PIC ── INTR pin ──► extint.rs ── window open: acknowledge ──► KVM_INTERRUPT ──► vCPU 0
//! ```

pub(crate) mod extint;
pub(crate) mod msi;
mod routing;

pub(crate) use routing::{PINS, Routing};
