//! The ICH9 LPC bridge, 8086:2918 at 00:1f.0 (ICH9 data sheet chapter 13).
//!
//! What it does here: places the power-management block at PMBASE while ACPI I/O is enabled, and routes PIRQ A-H
//! to ISA interrupts for guests that use the PIC. The other registers are stored, so that firmware reads back
//! what it wrote. The devices behind the bridge (clock, timers, serial...) decode their fixed ports always.

use std::sync::{Arc, Mutex, Weak};

use atoll_machine::bus::PortBus;
use atoll_machine::interrupt::MsiSink;
use atoll_pci::{BarMapper, FunctionBuilder, Identity, PciDevice, PciFunction, RestoreError, devfn};

use crate::acpi_pm::{self, AcpiPm};
use crate::gsi::Gsi;
use crate::lock;
use saved_state::LpcBridgeStateV1;

pub mod saved_state;
#[cfg(test)]
mod tests;

/// Where the bridge sits on bus 0.
pub const DEVFN: u8 = devfn(31, 0);

const PMBASE: u16 = 0x40;
const ACPI_CONTROL: u16 = 0x44;
const ACPI_ENABLE: u8 = 1 << 7;
const GPIOBASE: u16 = 0x48;
const PIRQ_A_D: u16 = 0x60;
const PIRQ_E_H: u16 = 0x68;
/// A route that leads nowhere.
const PIRQ_DISABLED: u8 = 0x80;
const RCBA: u16 = 0xf0;

/// The bridge.
pub struct LpcBridge {
    function: PciFunction,
    ports: Weak<PortBus>,
    pm: Arc<AcpiPm>,
    gsi: Arc<Gsi>,
    /// First port of the power-management block while it is decoded.
    pm_at: Mutex<Option<u16>>,
}

impl LpcBridge {
    /// A bridge that places `pm` on `ports` and routes wires of `gsi`.
    pub fn new(
        ports: &Arc<PortBus>,
        pm: Arc<AcpiPm>,
        gsi: Arc<Gsi>,
        mapper: Arc<dyn BarMapper>,
        msi: Arc<dyn MsiSink>,
    ) -> Arc<Self> {
        let identity = Identity {
            vendor: 0x8086,
            device: 0x2918,
            class: 0x06_01_00,
            revision: 2,
            ..Identity::default()
        };
        let mut builder = FunctionBuilder::new(identity);
        builder.multifunction();
        let config = builder.config_mut();
        // Bit 0 of the I/O bases says "I/O" and is fixed.
        config.set(PMBASE, &[1]);
        config.set_writable(PMBASE, &[0x80, 0xff]);
        config.set_writable(ACPI_CONTROL, &[0x87]);
        config.set(GPIOBASE, &[1]);
        config.set_writable(GPIOBASE, &[0x80, 0xff]);
        config.set_writable(0x4c, &[0x10]);
        for routes in [PIRQ_A_D, PIRQ_E_H] {
            config.set(routes, &[PIRQ_DISABLED; 4]);
            config.set_writable(routes, &[0x8f; 4]);
        }
        config.set(0x64, &[0x10]);
        config.set_writable(0x64, &[0xff]);
        // I/O decode ranges and enables; generic decode ranges.
        config.set_writable(0x80, &[0xff; 20]);
        // General power-management configuration 1-3.
        config.set_writable(0xa0, &[0xff; 8]);
        config.set(0xd0, &[0x33, 0x22, 0x11, 0x00, 0x67, 0x45]);
        config.set_writable(0xd0, &[0xff; 6]);
        config.set(0xd8, &[0xcf, 0xff]);
        config.set_writable(0xd8, &[0xff, 0xff]);
        config.set_writable(0xdc, &[0x0f]);
        config.set_writable(RCBA, &[0x01, 0xc0, 0xff, 0xff]);
        let function = builder.build(mapper, msi);
        Arc::new(Self { function, ports: Arc::downgrade(ports), pm, gsi, pm_at: Mutex::new(None) })
    }

    /// Sets PMBASE and enables ACPI I/O, as firmware would.
    pub fn program_without_firmware(&self, pm_base: u16) {
        self.config_write(PMBASE, &pm_base.to_le_bytes());
        self.config_write(ACPI_CONTROL, &[ACPI_ENABLE]);
    }

    /// First port of the power-management block while it is decoded.
    pub fn pm_base(&self) -> Option<u16> {
        *lock(&self.pm_at)
    }

    /// Brings decoding and routes in line with the registers.
    fn apply(&self) {
        let (base, control, routes) = self.function.with_config(|c| {
            let mut routes = [0; 8];
            c.read(PIRQ_A_D, &mut routes[..4]);
            c.read(PIRQ_E_H, &mut routes[4..]);
            (c.u16(PMBASE) & 0xff80, c.u8(ACPI_CONTROL), routes)
        });
        let wanted = (control & ACPI_ENABLE != 0 && base != 0).then_some(base);
        let mut at = lock(&self.pm_at);
        if *at != wanted {
            let Some(ports) = self.ports.upgrade() else { return };
            if let Some(old) = at.take() {
                ports.unregister(old);
            }
            if let Some(base) = wanted
                && ports.register(base, acpi_pm::SIZE, self.pm.clone()).is_ok()
            {
                *at = Some(base);
            }
        }
        for (pirq, route) in routes.into_iter().enumerate() {
            self.gsi.route_pirq(pirq, (route & PIRQ_DISABLED == 0).then_some(route & 15));
        }
    }

    /// The saved form.
    pub fn save(&self) -> LpcBridgeStateV1 {
        LpcBridgeStateV1 { function: Some(self.function.save()) }
    }

    /// Takes over a saved state.
    pub fn restore(&self, saved: &LpcBridgeStateV1) -> Result<(), RestoreError> {
        match &saved.function {
            Some(function) => self.function.restore(function)?,
            None => self.function.reset(),
        }
        self.apply();
        Ok(())
    }
}

impl PciDevice for LpcBridge {
    fn function(&self) -> &PciFunction {
        &self.function
    }

    fn reset(&self) {
        self.function.reset();
        self.apply();
    }

    fn config_write(&self, offset: u16, data: &[u8]) {
        self.default_config_write(offset, data);
        if matches!(offset & !3, PMBASE | ACPI_CONTROL | PIRQ_A_D | PIRQ_E_H) {
            self.apply();
        }
    }
}
