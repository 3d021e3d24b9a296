//! From a device's wire to the interrupt controllers.
//!
//! Every device gets its own input ([`Gsi::input`]); inputs of one global system interrupt are ORed. A GSI goes
//! to the IOAPIC pin of the same number, and:
//!
//! ```text
//!  GSI 0, 2   --> IOAPIC pin 2 and PIC IRQ 0    (the PIT; what the MADT's override 0 -> 2 says)
//!  GSI 1-15   --> IOAPIC pin n and PIC IRQ n
//!  GSI 16-23  --> IOAPIC pin n and, when the LPC bridge's PIRQ register routes it, a PIC IRQ (level)
//! ```
//!
//! Lock order: device, then this, then PIC or IOAPIC.

use std::sync::{Arc, Mutex};

use atoll_machine::interrupt::{IrqLine, LineSink};

use crate::ioapic::{IoApic, PINS};
use crate::lock;
use crate::pic::Pic;
use saved_state::GsiStateV1;

pub mod saved_state;
#[cfg(test)]
mod tests;

/// First GSI of a PIRQ wire.
const FIRST_PIRQ: usize = 16;
/// Number of PIRQ wires.
pub const PIRQS: usize = 8;

struct Input {
    gsi: usize,
    high: bool,
}

struct Inner {
    inputs: Vec<Input>,
    /// How many inputs of each GSI are high.
    high: [u32; PINS],
    /// ISA interrupt of each PIRQ wire.
    pirq_routes: [Option<u8>; PIRQS],
}

impl Inner {
    fn level(&self, gsi: usize) -> bool {
        self.high[gsi] != 0
    }

    /// Level of a PIC input: its own GSI or any PIRQ that is routed to it.
    fn pic_level(&self, irq: u8) -> bool {
        let own = self.level(if irq == 0 { 2 } else { usize::from(irq) });
        let routed = |(i, r): (usize, &Option<u8>)| *r == Some(irq) && self.level(FIRST_PIRQ + i);
        own || self.pirq_routes.iter().enumerate().any(routed)
    }
}

/// The wires of the machine. See the module's documentation.
pub struct Gsi {
    inner: Mutex<Inner>,
    pic: Arc<Pic>,
    ioapic: Arc<IoApic>,
}

impl Gsi {
    /// Wires in front of `pic` and `ioapic`.
    pub fn new(pic: Arc<Pic>, ioapic: Arc<IoApic>) -> Arc<Self> {
        let inner = Inner { inputs: Vec::new(), high: [0; PINS], pirq_routes: [None; PIRQS] };
        Arc::new(Self { inner: Mutex::new(inner), pic, ioapic })
    }

    /// A new input of `gsi` (0-23), low. An input of a GSI that does not exist leads nowhere.
    pub fn input(self: &Arc<Self>, gsi: u32) -> IrqLine {
        let gsi = match gsi as usize {
            0 => 2,
            gsi if gsi < PINS => gsi,
            _ => return IrqLine::unconnected(),
        };
        let mut inner = lock(&self.inner);
        inner.inputs.push(Input { gsi, high: false });
        IrqLine::new(self.clone(), inner.inputs.len() as u32 - 1)
    }

    /// Routes PIRQ wire `pirq` (0 = A .. 7 = H, GSI 16-23) to an ISA interrupt, or to none.
    pub fn route_pirq(&self, pirq: usize, irq: Option<u8>) {
        let mut inner = lock(&self.inner);
        let Some(route) = inner.pirq_routes.get_mut(pirq) else { return };
        // Edge-only inputs cannot be shared with PCI.
        let irq = irq.filter(|irq| matches!(irq, 3..=7 | 9..=12 | 14 | 15));
        let old = std::mem::replace(route, irq);
        for irq in [old, irq].into_iter().flatten() {
            self.pic.set_irq(u32::from(irq), inner.pic_level(irq));
        }
    }

    /// Whether another edge on `gsi` would be lost because the PIC still holds the last one.
    pub fn request_pending(&self, gsi: u32) -> bool {
        self.pic.request_pending(if gsi == 2 { 0 } else { gsi })
    }

    fn drive(&self, inner: &Inner, gsi: usize) {
        let level = inner.level(gsi);
        self.ioapic.set_line(gsi as u32, level);
        let irq = match gsi {
            2 => Some(0),
            ..FIRST_PIRQ => Some(gsi as u8),
            _ => inner.pirq_routes[gsi - FIRST_PIRQ],
        };
        if let Some(irq) = irq {
            self.pic.set_irq(u32::from(irq), inner.pic_level(irq));
        }
    }

    /// The saved form. Levels belong to the devices, which drive their lines again when they are restored; the
    /// routes belong to the LPC bridge and are here so that the order of restoring does not matter.
    pub fn save(&self) -> GsiStateV1 {
        let inner = lock(&self.inner);
        let routes = inner.pirq_routes.iter().map(|r| r.map_or(0, u32::from)).collect();
        GsiStateV1 { pirq_routes: routes, high_inputs: inner.inputs.iter().map(|i| i.high).collect() }
    }

    /// Takes over a saved state, quietly: the controllers have their own.
    pub fn restore(&self, saved: &GsiStateV1) {
        let mut inner = lock(&self.inner);
        inner.pirq_routes = [None; PIRQS];
        for (to, &from) in inner.pirq_routes.iter_mut().zip(&saved.pirq_routes) {
            *to = (1..16).contains(&from).then_some(from as u8);
        }
        inner.high = [0; PINS];
        let Inner { inputs, high, .. } = &mut *inner;
        for (i, input) in inputs.iter_mut().enumerate() {
            input.high = saved.high_inputs.get(i).copied().unwrap_or(false);
            high[input.gsi] += u32::from(input.high);
        }
    }
}

impl LineSink for Gsi {
    /// `line` is the number of an input, not of a GSI.
    fn set_line(&self, line: u32, high: bool) {
        let mut inner = lock(&self.inner);
        let Some(input) = inner.inputs.get_mut(line as usize) else { return };
        if input.high == high {
            return;
        }
        input.high = high;
        let gsi = input.gsi;
        if high {
            inner.high[gsi] += 1;
        } else {
            inner.high[gsi] -= 1;
        }
        // Another input that holds the wire high hides this one's change.
        if inner.high[gsi] == u32::from(high) {
            self.drive(&inner, gsi);
        }
    }
}
