//! A PCI Express root port with a hot-plug slot, 1b36:000c (PCI Express Base 4.0, 6.7 and 7.5.3).
//!
//! ```text
//!            plug: presence and link change --> guest switches power on --> device on the bus
//!  empty ----------------------------------------------------------------------> occupied
//!    ^                                                                              |
//!    +--- guest switches power off <-- guest stops using it <-- attention button ---+  request_unplug
//! ```
//!
//! Power that the guest switches off without an unplug request only takes the device off the bus; switching it on
//! brings the device back, reset. A device that is there at start is powered and its link is up.
//! Events interrupt by MSI, or by INTx where MSI is off.
//!
//! Lock order: this port, then its function, then the interrupt controllers; the device in the slot comes after.

use std::sync::{Arc, Mutex};

use atoll_machine::inputs::{InputGate, InputKind};
use atoll_machine::interrupt::MsiSink;
use atoll_pci::express::{LINK_STATUS_ACTIVE, offset};
use atoll_pci::{
    BarMapper, ExpressSpec, FunctionBuilder, Identity, MsiSpec, PciBus, PciDevice, PciFunction, PortType,
    RestoreError, regs,
};

use crate::lock;
use saved_state::RootPortStateV1;

pub mod saved_state;
#[cfg(test)]
mod tests;

/// Slot capabilities: attention button, power controller, attention and power indicators, hot-plug.
const SLOT_CAPABILITIES: u32 = 1 << 0 | 1 << 1 | 1 << 3 | 1 << 4 | 1 << 6;
const STATUS_BUTTON: u16 = 1 << 0;
const STATUS_PRESENCE_CHANGED: u16 = 1 << 3;
const STATUS_COMMAND_COMPLETED: u16 = 1 << 4;
const STATUS_PRESENT: u16 = 1 << 6;
const STATUS_LINK_CHANGED: u16 = 1 << 8;
const CONTROL_INTERRUPT: u16 = 1 << 5;
const CONTROL_LINK_CHANGED: u16 = 1 << 12;
/// Power controller control: one is off.
const CONTROL_POWER_OFF: u16 = 1 << 10;
/// Power indicator on, off.
const INDICATOR_ON: u16 = 1 << 8;
const INDICATOR_OFF: u16 = 3 << 8;
const INDICATOR: u16 = 3 << 8;

/// Told when the guest has let go of a device.
pub trait SlotListener: Send + Sync {
    /// `device` is out of slot `slot`.
    fn removed(&self, slot: u16, device: Arc<dyn PciDevice>);
}

/// Why a device could not be plugged in.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum PlugError {
    /// The slot is in use.
    #[error("PCI slot {0} is occupied; unplug its device or use another slot")]
    Occupied(u16),
    /// The slot is empty.
    #[error("PCI slot {0} is empty; there is nothing to unplug")]
    Empty(u16),
}

#[derive(Default)]
struct Slot {
    card: Option<Arc<dyn PciDevice>>,
    unplug_requested: bool,
    /// The interrupt condition as last computed: messages are sent when it becomes true.
    interrupting: bool,
}

/// The root port.
pub struct RootPort {
    function: PciFunction,
    bus: PciBus,
    express: u16,
    number: u16,
    slot: Mutex<Slot>,
    listener: Arc<dyn SlotListener>,
    gate: Arc<InputGate>,
}

impl RootPort {
    /// A port with an empty slot whose physical number, as guests show it, is `number` (below 8192).
    pub fn new(
        number: u16,
        listener: Arc<dyn SlotListener>,
        gate: Arc<InputGate>,
        mapper: Arc<dyn BarMapper>,
        msi: Arc<dyn MsiSink>,
    ) -> Arc<Self> {
        let identity = Identity { vendor: 0x1b36, device: 0x000c, class: 0x06_04_00, ..Identity::default() };
        let mut builder = FunctionBuilder::bridge(identity);
        // Ports share a device number; the bit is without effect where there is only one.
        builder.multifunction().interrupt_pin(0).msi(MsiSpec { vectors: 1 });
        let express = builder.express(ExpressSpec {
            port_type: PortType::RootPort,
            function_level_reset: false,
            slot_capabilities: Some(SLOT_CAPABILITIES | u32::from(number & 0x1fff) << 19),
            port_number: number as u8,
        });
        builder.capability(regs::CAP_SUBSYSTEM, &[0, 0, 0x36, 0x1b, 0, 0], &[]);
        builder.power_management();
        let port = Arc::new(Self {
            function: builder.build(mapper, msi),
            bus: PciBus::new(),
            express,
            number,
            slot: Mutex::default(),
            listener,
            gate,
        });
        port.show_power_on(&lock(&port.slot));
        port
    }

    /// The bus behind the port.
    pub fn bus(&self) -> &PciBus {
        &self.bus
    }

    /// The device in the slot.
    pub fn card(&self) -> Option<Arc<dyn PciDevice>> {
        lock(&self.slot).card.clone()
    }

    /// Puts a device in before the machine starts: no event, power on, link up.
    pub fn insert(&self, device: Arc<dyn PciDevice>) -> Result<(), PlugError> {
        let mut slot = lock(&self.slot);
        if slot.card.is_some() {
            return Err(PlugError::Occupied(self.number));
        }
        slot.card = Some(device);
        self.show_power_on(&slot);
        Ok(())
    }

    /// Plugs a device into the running machine. The guest notices and switches the slot on.
    pub fn plug(self: &Arc<Self>, device: Arc<dyn PciDevice>) -> Result<(), PlugError> {
        {
            let mut slot = lock(&self.slot);
            if slot.card.is_some() {
                return Err(PlugError::Occupied(self.number));
            }
            slot.card = Some(device);
            slot.unplug_requested = false;
        }
        let port = self.clone();
        self.gate.deliver(InputKind::Control, move || {
            let mut slot = lock(&port.slot);
            port.connect(&slot);
            port.raise(&mut slot, STATUS_PRESENCE_CHANGED);
        });
        Ok(())
    }

    /// Presses the attention button: the guest lets go of the device within seconds, and
    /// [`SlotListener::removed`] follows. A guest that has no driver for the slot never does.
    pub fn request_unplug(self: &Arc<Self>) -> Result<(), PlugError> {
        {
            let mut slot = lock(&self.slot);
            if slot.card.is_none() {
                return Err(PlugError::Empty(self.number));
            }
            slot.unplug_requested = true;
        }
        let port = self.clone();
        self.gate.deliver(InputKind::Control, move || {
            let mut slot = lock(&port.slot);
            port.raise(&mut slot, STATUS_BUTTON);
        });
        Ok(())
    }

    fn register(&self, offset: u16) -> u16 {
        self.function.with_config(|c| c.u16(self.express + offset))
    }

    fn powered(&self) -> bool {
        self.register(offset::SLOT_CONTROL) & CONTROL_POWER_OFF == 0
    }

    /// Presence, power and link as a machine that starts shows them.
    fn show_power_on(&self, slot: &Slot) {
        let present = slot.card.is_some();
        self.function.with_config(|c| {
            let control = if present { INDICATOR_ON } else { INDICATOR_OFF | CONTROL_POWER_OFF };
            c.set_u16(self.express + offset::SLOT_CONTROL, control);
        });
        self.connect(slot);
    }

    /// Puts the card on the bus or takes it off, by presence and power; shows presence and link. Returns whether
    /// the link changed.
    fn connect(&self, slot: &Slot) -> bool {
        let wanted = slot.card.as_ref().filter(|_| self.powered());
        let was_up = self.bus.get(0).is_some();
        match wanted {
            Some(card) if !was_up => {
                card.reset();
                // The slot was empty a moment ago and nobody else puts devices on this bus.
                let _ = self.bus.attach(0, card.clone());
            }
            None if was_up => drop(self.bus.detach(0)),
            _ => {}
        }
        let up = wanted.is_some();
        self.function.with_config(|c| {
            let status = c.u16(self.express + offset::SLOT_STATUS) & !STATUS_PRESENT;
            let present = if slot.card.is_some() { STATUS_PRESENT } else { 0 };
            c.set_u16(self.express + offset::SLOT_STATUS, status | present);
            let link = c.u16(self.express + offset::LINK_STATUS) & !LINK_STATUS_ACTIVE;
            c.set_u16(self.express + offset::LINK_STATUS, link | if up { LINK_STATUS_ACTIVE } else { 0 });
        });
        up != was_up
    }

    /// Sets event bits in the slot status and interrupts.
    fn raise(&self, slot: &mut Slot, events: u16) {
        self.function.with_config(|c| {
            let status = c.u16(self.express + offset::SLOT_STATUS);
            c.set_u16(self.express + offset::SLOT_STATUS, status | events);
        });
        self.interrupt(slot);
    }

    /// Interrupts when an enabled event is pending.
    fn interrupt(&self, slot: &mut Slot) {
        let (control, status) = (self.register(offset::SLOT_CONTROL), self.register(offset::SLOT_STATUS));
        let mut enabled = control & 0x1f;
        if control & CONTROL_LINK_CHANGED != 0 {
            enabled |= STATUS_LINK_CHANGED;
        }
        let pending = control & CONTROL_INTERRUPT != 0 && status & enabled != 0;
        let rises = pending && !slot.interrupting;
        slot.interrupting = pending;
        let by_message = rises && self.function.signal_msi(0);
        self.function.set_intx(pending && !by_message && !self.msi_enabled());
    }

    fn msi_enabled(&self) -> bool {
        // MSI is the first capability.
        self.function.with_config(|c| c.u16(0x42) & 1 != 0)
    }

    /// Software wrote slot control. Returns a card that left the slot.
    fn control_written(&self, slot: &mut Slot, old: u16) -> Option<Arc<dyn PciDevice>> {
        let control = self.register(offset::SLOT_CONTROL);
        let mut events = STATUS_COMMAND_COMPLETED;
        let mut removed = None;
        let off = |c: u16| c & CONTROL_POWER_OFF != 0 && c & INDICATOR == INDICATOR_OFF;
        if slot.unplug_requested && off(control) && !off(old) {
            slot.unplug_requested = false;
            removed = slot.card.take();
            events |= STATUS_PRESENCE_CHANGED;
        }
        if self.connect(slot) {
            events |= STATUS_LINK_CHANGED;
        }
        self.raise(slot, events);
        removed
    }

    /// The saved form. The device in the slot is saved by its owner.
    pub fn save(&self) -> RootPortStateV1 {
        let slot = lock(&self.slot);
        RootPortStateV1 {
            function: Some(self.function.save()),
            unplug_requested: Some(slot.unplug_requested),
        }
    }

    /// Takes over a saved state; the device must be in the slot already, and is restored after this.
    pub fn restore(&self, saved: &RootPortStateV1) -> Result<(), RestoreError> {
        let mut slot = lock(&self.slot);
        if let Some(function) = &saved.function {
            self.function.restore(function)?;
        }
        slot.unplug_requested = saved.unplug_requested.unwrap_or(false);
        self.connect(&slot);
        // What was pending has interrupted already; its message is in the local APICs' state.
        let (control, status) = (self.register(offset::SLOT_CONTROL), self.register(offset::SLOT_STATUS));
        slot.interrupting = control & CONTROL_INTERRUPT != 0 && status & control & 0x1f != 0;
        Ok(())
    }
}

impl PciDevice for RootPort {
    fn function(&self) -> &PciFunction {
        &self.function
    }

    fn secondary_bus(&self) -> Option<&PciBus> {
        Some(&self.bus)
    }

    fn reset(&self) {
        let removed = {
            let mut slot = lock(&self.slot);
            self.function.reset();
            // A restart finishes what the guest was asked for.
            let removed = if slot.unplug_requested { slot.card.take() } else { None };
            slot.unplug_requested = false;
            slot.interrupting = false;
            self.show_power_on(&slot);
            removed
        };
        if let Some(card) = removed {
            self.listener.removed(self.number, card);
        }
    }

    fn config_write(&self, offset: u16, data: &[u8]) {
        let end = usize::from(offset) + data.len();
        let touches = |at: u16| offset < at + 2 && end > usize::from(at);
        let removed = {
            let mut slot = lock(&self.slot);
            let old_control = self.register(offset::SLOT_CONTROL);
            let old_bridge = self.function.with_config(|c| c.u16(regs::BRIDGE_CONTROL));
            self.function.config_write(offset, data);
            if touches(regs::BRIDGE_CONTROL) {
                let bridge = self.function.with_config(|c| c.u16(regs::BRIDGE_CONTROL));
                if bridge & !old_bridge & regs::BRIDGE_CONTROL_RESET != 0 {
                    self.bus.reset();
                }
            }
            if touches(self.express + offset::SLOT_CONTROL) {
                self.control_written(&mut slot, old_control)
            } else {
                self.interrupt(&mut slot);
                None
            }
        };
        if let Some(card) = removed {
            self.listener.removed(self.number, card);
        }
    }
}
