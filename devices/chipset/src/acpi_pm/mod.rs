//! ACPI power management: PM1 and GPE0 blocks, PM timer, SMI command port (ACPI 6.5 chapter 4; ICH9 data sheet
//! 13.8).
//!
//! | offset from PMBASE | register |
//! |---|---|
//! | 00, 02 | PM1 status (write ones to clear), PM1 enable |
//! | 04 | PM1 control: SCI_EN, SLP_TYP, SLP_EN |
//! | 08 | PM timer, 32 bits at 3.579545 MHz of guest time |
//! | 20-27, 28-2f | GPE0 status (write ones to clear), GPE0 enable |
//! | 30, 34 | SMI enable and status; nothing raises an SMI |
//!
//! The SCI is level-triggered: `SCI_EN and (PM1 status & enable, or GPE0 status & enable)`. Writing SLP_EN with
//! SLP_TYP [`S5_SLEEP_TYPE`] powers the machine off; the ACPI tables' `_S5_` says the same value. The LPC bridge
//! ([`crate::lpc`]) places the block at PMBASE.

use std::sync::{Arc, Mutex, Weak};

use atoll_machine::bus::PortDevice;
use atoll_machine::control::{MachineRequest, SharedControl};
use atoll_machine::inputs::{InputGate, InputKind};
use atoll_machine::interrupt::IrqLine;
use atoll_machine::time::{Nanos, Timer, Timers};

use crate::lock;
use saved_state::AcpiPmStateV1;

pub mod saved_state;
#[cfg(test)]
mod tests;

/// Ports of the block at PMBASE.
pub const SIZE: u16 = 0x80;
/// PM timer frequency in Hz.
pub const TIMER_FREQUENCY: u64 = 3_579_545;
/// SLP_TYP of soft-off, as in every Q35 machine that stock firmware knows.
pub const S5_SLEEP_TYPE: u16 = 0;
/// SLP_TYP of soft-off in the ICH9 data sheet, accepted as well.
const S5_SLEEP_TYPE_ICH9: u16 = 7;
/// Value at the SMI command port that switches to ACPI mode (SCI_EN on); FADT `ACPI_ENABLE`.
pub const ACPI_ENABLE: u8 = 0x02;
/// Value at the SMI command port that switches to legacy mode (SCI_EN off); FADT `ACPI_DISABLE`.
pub const ACPI_DISABLE: u8 = 0x03;
/// General-purpose events that exist.
pub const GPES: u32 = 64;

const TIMER_STATUS: u16 = 1 << 0;
const POWER_BUTTON: u16 = 1 << 8;
/// PM1 status bits that exist: timer, bus master, global, power button, sleep button, RTC, wake.
const STATUS_BITS: u16 = 0x8f31 & !0x0800;
/// PM1 events that can raise the SCI: timer, global, power button, sleep button, RTC.
const EVENT_BITS: u16 = 0x0721;
const CONTROL_SCI: u16 = 1 << 0;
/// Control bits that are kept: SCI_EN, BM_RLD, SLP_TYP.
const CONTROL_KEPT: u16 = 0x1c03;
const CONTROL_SLEEP: u16 = 1 << 13;

struct Inner {
    status: u16,
    enable: u16,
    control: u16,
    gpe_status: u64,
    gpe_enable: u64,
    smi_enable: u32,
    smi_command: [u8; 2],
    /// Half-periods of the timer that have been noted in the status register.
    seen_halves: u64,
}

/// The power-management block. See the module's documentation.
pub struct AcpiPm {
    inner: Mutex<Inner>,
    timers: Arc<Timers>,
    timer: Timer,
    sci: IrqLine,
    control: SharedControl,
    gate: Arc<InputGate>,
    /// SCI_EN at power-on: set where no firmware would switch ACPI on.
    starts_enabled: bool,
}

/// PM timer ticks since guest time zero.
fn ticks(now: Nanos) -> u64 {
    (u128::from(now) * u128::from(TIMER_FREQUENCY) / 1_000_000_000) as u64
}
/// How often bit 31 of the timer has changed.
fn halves(now: Nanos) -> u64 {
    ticks(now) >> 31
}

impl AcpiPm {
    /// A block that raises `sci` and powers off through `control`. `starts_enabled`: SCI_EN is set from the
    /// beginning, for machines that start without firmware.
    pub fn new(
        timers: &Arc<Timers>,
        gate: &Arc<InputGate>,
        sci: IrqLine,
        control: SharedControl,
        starts_enabled: bool,
    ) -> Arc<Self> {
        Arc::new_cyclic(|weak: &Weak<Self>| {
            let (weak, timer_gate) = (weak.clone(), gate.clone());
            let timer = timers.timer(move |_| {
                if let Some(pm) = weak.upgrade() {
                    timer_gate.deliver(InputKind::Timer, move || pm.change(|_| ()));
                }
            });
            Self {
                inner: Mutex::new(Inner::power_on(starts_enabled, halves(timers.clock().now()))),
                timers: timers.clone(),
                timer,
                sci,
                control,
                gate: gate.clone(),
                starts_enabled,
            }
        })
    }

    /// Device for ports B2-B3: SMI command and status.
    pub fn smi_ports(self: &Arc<Self>) -> Arc<dyn PortDevice> {
        Arc::new(SmiPorts(self.clone()))
    }

    /// Presses the power button: a guest that listens shuts down. From any thread.
    pub fn press_power_button(self: &Arc<Self>) {
        let this = self.clone();
        self.gate.deliver(InputKind::Control, move || this.change(|inner| inner.status |= POWER_BUTTON));
    }

    /// Raises general-purpose event `gpe` (0-63), from any thread.
    pub fn raise_gpe(self: &Arc<Self>, gpe: u32) {
        let (this, bit) = (self.clone(), 1u64.checked_shl(gpe).unwrap_or(0));
        self.gate.deliver(InputKind::Control, move || this.change(|inner| inner.gpe_status |= bit));
    }

    /// Notes timer overflows, applies `change`, then drives the SCI and arms the timer.
    fn change<R>(&self, change: impl FnOnce(&mut Inner) -> R) -> R {
        let mut inner = lock(&self.inner);
        let now = self.timers.clock().now();
        inner.note_timer(now);
        let result = change(&mut inner);
        self.sci.set(inner.sci());
        if inner.enable & TIMER_STATUS != 0 && inner.status & TIMER_STATUS == 0 {
            let tick = (halves(now) + 1) << 31;
            let at = (u128::from(tick) * 1_000_000_000).div_ceil(u128::from(TIMER_FREQUENCY));
            self.timer.arm(at as u64);
        } else {
            self.timer.disarm();
        }
        result
    }

    fn write_byte(&self, inner: &mut Inner, offset: u16, value: u8) {
        let word = |high: bool| u16::from(value) << if high { 8 } else { 0 };
        let byte_of = |first: u16| 8 * u32::from(offset - first);
        match offset {
            0x00 | 0x01 => inner.status &= !word(offset & 1 != 0),
            0x02 | 0x03 => {
                let keep = if offset & 1 != 0 { 0x00ff } else { 0xff00 };
                inner.enable = (inner.enable & keep | word(offset & 1 != 0)) & EVENT_BITS;
            }
            0x04 => inner.control = (inner.control & 0xff00 | word(false)) & CONTROL_KEPT,
            0x05 => {
                inner.control = (inner.control & 0x00ff | word(true)) & CONTROL_KEPT;
                let kind = word(true) >> 10 & 7;
                if word(true) & CONTROL_SLEEP != 0 && matches!(kind, S5_SLEEP_TYPE | S5_SLEEP_TYPE_ICH9) {
                    self.control.request(MachineRequest::PowerOff);
                }
            }
            0x20..0x28 => inner.gpe_status &= !(u64::from(value) << byte_of(0x20)),
            0x28..0x30 => {
                let shift = byte_of(0x28);
                inner.gpe_enable = inner.gpe_enable & !(0xff << shift) | u64::from(value) << shift;
            }
            0x30..0x34 => {
                let shift = byte_of(0x30);
                inner.smi_enable = inner.smi_enable & !(0xff << shift) | u32::from(value) << shift;
            }
            _ => {}
        }
    }

    /// Power-on state.
    pub fn reset(&self) {
        let now = self.timers.clock().now();
        self.change(|inner| *inner = Inner::power_on(self.starts_enabled, halves(now)));
    }

    /// The saved form.
    pub fn save(&self) -> AcpiPmStateV1 {
        self.change(|inner| inner.save())
    }

    /// Takes over a saved state and drives the SCI accordingly. Guest time must be restored before.
    pub fn restore(&self, saved: &AcpiPmStateV1) {
        self.change(|inner| inner.take_over(saved));
    }
}

impl Inner {
    fn power_on(sci_enabled: bool, seen_halves: u64) -> Self {
        Self {
            status: 0,
            enable: 0,
            control: if sci_enabled { CONTROL_SCI } else { 0 },
            gpe_status: 0,
            gpe_enable: 0,
            smi_enable: 0,
            smi_command: [0; 2],
            seen_halves,
        }
    }

    fn note_timer(&mut self, now: Nanos) {
        let halves = halves(now);
        if halves > self.seen_halves {
            self.status |= TIMER_STATUS;
        }
        self.seen_halves = halves;
    }

    fn sci(&self) -> bool {
        let event = self.status & self.enable & EVENT_BITS != 0 || self.gpe_status & self.gpe_enable != 0;
        self.control & CONTROL_SCI != 0 && event
    }

    /// The 32 bits at `offset`, a multiple of 4.
    fn register(&self, offset: u16, ticks: u64) -> u32 {
        match offset {
            0x00 => u32::from(self.status & STATUS_BITS) | u32::from(self.enable) << 16,
            0x04 => u32::from(self.control),
            0x08 => ticks as u32,
            0x20 => self.gpe_status as u32,
            0x24 => (self.gpe_status >> 32) as u32,
            0x28 => self.gpe_enable as u32,
            0x2c => (self.gpe_enable >> 32) as u32,
            0x30 => self.smi_enable,
            _ => 0,
        }
    }
}

impl PortDevice for AcpiPm {
    fn port_read(&self, offset: u16, data: &mut [u8]) {
        self.change(|inner| {
            // One moment for the whole access: the timer must not move between its bytes.
            let ticks = ticks(self.timers.clock().now());
            for (i, byte) in data.iter_mut().enumerate() {
                let at = offset.wrapping_add(i as u16);
                *byte = (inner.register(at & !3, ticks) >> (8 * (at & 3))) as u8;
            }
        });
    }

    fn port_write(&self, offset: u16, data: &[u8]) {
        self.change(|inner| {
            for (i, &byte) in data.iter().enumerate() {
                self.write_byte(inner, offset.wrapping_add(i as u16), byte);
            }
        });
    }
}

/// Ports B2-B3.
struct SmiPorts(Arc<AcpiPm>);

impl PortDevice for SmiPorts {
    fn port_read(&self, offset: u16, data: &mut [u8]) {
        let inner = lock(&self.0.inner);
        for (i, byte) in data.iter_mut().enumerate() {
            *byte = inner.smi_command[(usize::from(offset) + i) & 1];
        }
    }
    fn port_write(&self, offset: u16, data: &[u8]) {
        self.0.change(|inner| {
            for (i, &byte) in data.iter().enumerate() {
                let at = (usize::from(offset) + i) & 1;
                inner.smi_command[at] = byte;
                match (at, byte) {
                    (0, ACPI_ENABLE) => inner.control |= CONTROL_SCI,
                    (0, ACPI_DISABLE) => inner.control &= !CONTROL_SCI,
                    _ => {}
                }
            }
        });
    }
}
