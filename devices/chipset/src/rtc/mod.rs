//! The MC146818 real-time clock and its CMOS memory (Motorola MC146818A data sheet; ICH9 data sheet 13.6).
//!
//! Date and time follow from the machine's wall clock plus an offset that the guest sets; nothing ticks. While the
//! guest holds the clock (SET, or the divider in reset) the time bytes are plain memory, and the offset is
//! computed when it lets go.
//!
//! ```text
//!             244 us before the second            second
//!  UIP  _____________/~~~~~~~~~~~~~~~~~~~~~~~~~~~~~|_________
//!                                                  UF, AF (when the alarm matches) --> IRQ 8 until C is read
//!  PF: every period of register A's rate
//! ```
//!
//! IRQ 8 stays high until register C is read, as on the chip, so a guest that is late sees one interrupt.
//! Ports 70-73, aliased at 74-77: index (bit 7: NMI off) and data of the first 128 bytes, then of the second.

use std::sync::{Arc, Mutex, Weak};

use atoll_machine::bus::PortDevice;
use atoll_machine::inputs::{InputGate, InputKind};
use atoll_machine::interrupt::IrqLine;
use atoll_machine::time::{Nanos, Timer, Timers};

use crate::lock;
use calendar::DateTime;
use saved_state::RtcStateV1;

mod calendar;
pub mod saved_state;
#[cfg(test)]
mod tests;

const SECOND: u64 = 1_000_000_000;
/// How long before the update "update in progress" is set.
const UIP_LEAD: u64 = 244_141;

const REG_A: usize = 0x0a;
const REG_B: usize = 0x0b;
const REG_C: usize = 0x0c;
const REG_D: usize = 0x0d;
/// Century byte: the index that the ACPI FADT names.
pub const CENTURY: u8 = 0x32;

const B_SET: u8 = 0x80;
const B_PIE: u8 = 0x40;
const B_AIE: u8 = 0x20;
const B_UIE: u8 = 0x10;
const B_SQWE: u8 = 0x08;
const C_PF: u8 = 0x40;
const C_AF: u8 = 0x20;
const C_UF: u8 = 0x10;
const C_IRQF: u8 = 0x80;

/// What firmware finds in CMOS memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RtcConfig {
    /// Bytes of RAM below 4 GiB.
    pub low_memory: u64,
    /// Bytes of RAM from 4 GiB up.
    pub high_memory: u64,
    /// Processors at start.
    pub cpus: u32,
}

struct Inner {
    /// Both banks.
    cmos: [u8; 256],
    index: [u8; 2],
    nmi_masked: bool,
    /// RTC time minus wall-clock time, in nanoseconds.
    offset: i64,
    /// RTC time and guest time up to which the flags of register C are computed.
    seen: u64,
    seen_guest: Nanos,
}

/// The clock. See the module's documentation.
pub struct Rtc {
    inner: Mutex<Inner>,
    timers: Arc<Timers>,
    timer: Timer,
    irq: IrqLine,
}

impl Inner {
    fn held(&self) -> bool {
        self.cmos[REG_B] & B_SET != 0 || self.divider_reset()
    }
    fn divider_reset(&self) -> bool {
        self.cmos[REG_A] & 0x60 == 0x60
    }
    fn binary(&self) -> bool {
        self.cmos[REG_B] & 4 != 0
    }
    fn hours24(&self) -> bool {
        self.cmos[REG_B] & 2 != 0
    }

    fn encode(&self, value: u8) -> u8 {
        if self.binary() { value } else { value / 10 % 10 << 4 | value % 10 }
    }
    fn decode(&self, byte: u8) -> u8 {
        if self.binary() { byte } else { (byte >> 4).wrapping_mul(10).wrapping_add(byte & 15) }
    }

    fn encode_hour(&self, hour: u8) -> u8 {
        if self.hours24() {
            return self.encode(hour);
        }
        let twelve = if hour.is_multiple_of(12) { 12 } else { hour % 12 };
        self.encode(twelve) | if hour >= 12 { 0x80 } else { 0 }
    }
    fn decode_hour(&self, byte: u8) -> u8 {
        if self.hours24() {
            return self.decode(byte);
        }
        let twelve = self.decode(byte & 0x7f) % 12;
        if byte & 0x80 != 0 { twelve + 12 } else { twelve }
    }

    /// Writes the time `seconds` since 1970 into the time bytes.
    fn show(&mut self, seconds: u64) {
        let t = DateTime::from_unix(seconds);
        self.cmos[0] = self.encode(t.second);
        self.cmos[2] = self.encode(t.minute);
        self.cmos[4] = self.encode_hour(t.hour);
        self.cmos[6] = self.encode(t.weekday);
        self.cmos[7] = self.encode(t.day);
        self.cmos[8] = self.encode(t.month);
        self.cmos[9] = self.encode((t.year % 100) as u8);
        self.cmos[usize::from(CENTURY)] = self.encode((t.year / 100 % 100) as u8);
    }

    /// What the time bytes say, in seconds since 1970.
    fn shown(&self) -> u64 {
        let century = u32::from(self.decode(self.cmos[usize::from(CENTURY)]));
        DateTime {
            second: self.decode(self.cmos[0]),
            minute: self.decode(self.cmos[2]),
            hour: self.decode_hour(self.cmos[4]),
            weekday: 1,
            day: self.decode(self.cmos[7]),
            month: self.decode(self.cmos[8]),
            year: century * 100 + u32::from(self.decode(self.cmos[9])),
        }
        .to_unix()
    }

    /// Length of a periodic interrupt in 1/32768 s.
    fn period(&self) -> Option<u64> {
        if self.divider_reset() {
            return None;
        }
        match self.cmos[REG_A] & 15 {
            0 => None,
            // The two fastest rates alias to slower ones with a 32 kHz crystal.
            rate @ 1..=2 => Some(1 << (rate + 6)),
            rate => Some(1 << (rate - 1)),
        }
    }

    /// The first second after `after` at which the alarm matches; within a day, or never.
    fn next_alarm(&self, after: u64) -> Option<u64> {
        let matches = |alarm: u8, now: u8| alarm & 0xc0 == 0xc0 || alarm == now;
        let mut t = after.saturating_add(1);
        let end = t.saturating_add(24 * 3600);
        while t < end {
            let of_day = t % (24 * 3600);
            let (hour, minute, second) = (of_day / 3600, of_day / 60 % 60, of_day % 60);
            if !matches(self.cmos[5], self.encode_hour(hour as u8)) {
                t = (t / 3600 + 1) * 3600;
            } else if !matches(self.cmos[3], self.encode(minute as u8)) {
                t = (t / 60 + 1) * 60;
            } else if !matches(self.cmos[1], self.encode(second as u8)) {
                t += 1;
            } else {
                return Some(t);
            }
        }
        None
    }
}

/// The machine's clocks at one moment.
#[derive(Clone, Copy)]
struct Moment {
    guest: Nanos,
    wall: u64,
}

impl Rtc {
    /// A clock that shows the wall-clock time and raises `irq` (IRQ 8).
    pub fn new(timers: &Arc<Timers>, gate: &Arc<InputGate>, irq: IrqLine, config: RtcConfig) -> Arc<Self> {
        Arc::new_cyclic(|weak: &Weak<Self>| {
            let (weak, gate) = (weak.clone(), gate.clone());
            let timer = timers.timer(move |_| {
                if let Some(rtc) = weak.upgrade() {
                    gate.deliver(InputKind::Timer, move || rtc.expired());
                }
            });
            let clock = timers.clock();
            let inner = Inner {
                cmos: initial_memory(config),
                index: [0; 2],
                nmi_masked: false,
                offset: 0,
                seen: clock.wall(),
                seen_guest: clock.now(),
            };
            Self { inner: Mutex::new(inner), timers: timers.clone(), timer, irq }
        })
    }

    /// Whether the guest masked non-maskable interrupts (bit 7 of port 70).
    pub fn nmi_masked(&self) -> bool {
        lock(&self.inner).nmi_masked
    }

    /// A byte of CMOS memory, as firmware would leave it there. Time and status bytes are out of reach.
    pub fn set_memory(&self, index: u8, value: u8) {
        if index > REG_D as u8 && index != CENTURY {
            lock(&self.inner).cmos[usize::from(index)] = value;
        }
    }

    fn moment(&self) -> Moment {
        let clock = self.timers.clock();
        Moment { guest: clock.now(), wall: clock.wall() }
    }

    fn expired(&self) {
        let mut inner = lock(&self.inner);
        let at = self.moment();
        self.advance(&mut inner, at);
        self.arm(&inner, at);
    }

    /// Computes what happened since the last look: time bytes and the flags of register C.
    fn advance(&self, inner: &mut Inner, at: Moment) {
        let now = at.wall.wrapping_add_signed(inner.offset);
        let mut flags = 0;
        if !inner.held() {
            let (before, second) = (inner.seen / SECOND, now / SECOND);
            if second > before {
                flags |= C_UF;
                if inner.next_alarm(before).is_some_and(|alarm| alarm <= second) {
                    flags |= C_AF;
                }
            }
            inner.show(second);
        }
        if let Some(period) = inner.period()
            && cycles(at.guest) / period > cycles(inner.seen_guest) / period
        {
            flags |= C_PF;
        }
        inner.seen = now;
        inner.seen_guest = at.guest;
        inner.cmos[REG_C] |= flags;
        self.drive(inner);
    }

    fn drive(&self, inner: &mut Inner) {
        if inner.cmos[REG_C] & inner.cmos[REG_B] & (C_PF | C_AF | C_UF) != 0 {
            inner.cmos[REG_C] |= C_IRQF;
            self.irq.set(true);
        }
    }

    /// Arms the timer for the next event whose interrupt is enabled.
    fn arm(&self, inner: &Inner, at: Moment) {
        let enabled = inner.cmos[REG_B];
        let mut next: Option<Nanos> = None;
        let mut consider = |when: Nanos| next = Some(next.map_or(when, |n| n.min(when)));
        if inner.cmos[REG_C] & C_IRQF == 0 {
            if enabled & B_PIE != 0
                && let Some(period) = inner.period()
            {
                let cycle = (cycles(at.guest) / period + 1) * period;
                consider(cycle_time(cycle));
            }
            let now = at.wall.wrapping_add_signed(inner.offset);
            let in_nanos =
                |second: u64| at.guest.saturating_add(second.saturating_mul(SECOND).saturating_sub(now));
            if enabled & B_UIE != 0 && !inner.held() {
                consider(in_nanos(now / SECOND + 1));
            }
            if enabled & B_AIE != 0
                && !inner.held()
                && let Some(alarm) = inner.next_alarm(now / SECOND)
            {
                consider(in_nanos(alarm));
            }
        }
        match next {
            Some(when) => self.timer.arm(when),
            None => self.timer.disarm(),
        }
    }

    fn read(&self, inner: &mut Inner, index: u8) -> u8 {
        let at = self.moment();
        self.advance(inner, at);
        match usize::from(index) {
            REG_A => {
                let into = at.wall.wrapping_add_signed(inner.offset) % SECOND;
                let uip = !inner.held() && into >= SECOND - UIP_LEAD;
                inner.cmos[REG_A] & 0x7f | u8::from(uip) << 7
            }
            REG_C => {
                let flags = std::mem::take(&mut inner.cmos[REG_C]);
                self.irq.set(false);
                self.arm(inner, at);
                flags
            }
            i => inner.cmos[i],
        }
    }

    fn write(&self, inner: &mut Inner, index: u8, value: u8) {
        let at = self.moment();
        self.advance(inner, at);
        match index {
            0x0a | 0x0b => self.write_control(inner, usize::from(index), value, at),
            0x0c | 0x0d => {}
            0 | 2 | 4 | 6..=9 | CENTURY => {
                inner.cmos[usize::from(index)] = value;
                if !inner.held() {
                    let into = at.wall.wrapping_add_signed(inner.offset) % SECOND;
                    set_time(inner, at, into);
                }
            }
            _ => inner.cmos[usize::from(index)] = value,
        }
        self.drive(inner);
        self.arm(inner, at);
    }

    fn write_control(&self, inner: &mut Inner, register: usize, value: u8, at: Moment) {
        let (was_held, was_reset) = (inner.held(), inner.divider_reset());
        let into = at.wall.wrapping_add_signed(inner.offset) % SECOND;
        inner.cmos[register] = match register {
            REG_A => value & 0x7f,
            // SET takes the update interrupt's enable bit away.
            _ if value & B_SET != 0 => value & !B_UIE,
            _ => value,
        };
        if was_held && !inner.held() {
            // Out of divider reset the first update comes half a second later.
            set_time(inner, at, if was_reset { SECOND / 2 } else { into });
        } else if !inner.held() {
            // The time may have to be shown in another format.
            let seconds = at.wall.wrapping_add_signed(inner.offset) / SECOND;
            inner.show(seconds);
        }
    }

    /// Reset: interrupts off; time and memory stay, as a battery keeps them.
    pub fn reset(&self) {
        let mut inner = lock(&self.inner);
        inner.cmos[REG_B] &= !(B_PIE | B_AIE | B_UIE | B_SQWE);
        inner.cmos[REG_C] = 0;
        inner.nmi_masked = false;
        self.irq.set(false);
        self.timer.disarm();
    }

    /// The saved form.
    pub fn save(&self) -> RtcStateV1 {
        let mut inner = lock(&self.inner);
        self.advance(&mut inner, self.moment());
        inner.save()
    }

    /// Takes over a saved state. The machine's clock must be restored before; wall-clock time that passed since
    /// passes for the guest too.
    pub fn restore(&self, saved: &RtcStateV1) {
        let mut inner = lock(&self.inner);
        let at = self.moment();
        inner.take_over(saved);
        inner.seen = at.wall.wrapping_add_signed(inner.offset);
        inner.seen_guest = at.guest;
        self.irq.set(inner.cmos[REG_C] & C_IRQF != 0);
        self.arm(&inner, at);
    }
}

/// The time bytes become the time, `into` nanoseconds into their second.
fn set_time(inner: &mut Inner, at: Moment, into: u64) {
    let time = inner.shown().wrapping_mul(SECOND).wrapping_add(into);
    inner.offset = time.wrapping_sub(at.wall) as i64;
    inner.seen = time;
    // The weekday follows the date.
    inner.show(time / SECOND);
}

/// 32768 Hz cycles in `nanos`.
fn cycles(nanos: Nanos) -> u64 {
    (u128::from(nanos) * 32_768 / u128::from(SECOND)) as u64
}
/// The first nanosecond of cycle `cycle`.
fn cycle_time(cycle: u64) -> Nanos {
    (u128::from(cycle) * u128::from(SECOND)).div_ceil(32_768) as u64
}

/// CMOS memory as the battery left it: 24-hour BCD, memory sizes for firmware.
fn initial_memory(config: RtcConfig) -> [u8; 256] {
    let mut cmos = [0; 256];
    cmos[REG_A] = 0x26;
    cmos[REG_B] = 0x02;
    cmos[REG_D] = 0x80;
    // Equipment: math coprocessor, PS/2 mouse; no floppy drives.
    cmos[0x14] = 0x06;
    let mut put = |at: usize, bytes: usize, value: u64| {
        let limit = (1u64 << (8 * bytes)) - 1;
        cmos[at..at + bytes].copy_from_slice(&value.min(limit).to_le_bytes()[..bytes]);
    };
    put(0x15, 2, 640);
    let extended = config.low_memory.saturating_sub(1 << 20) >> 10;
    put(0x17, 2, extended);
    put(0x30, 2, extended);
    put(0x34, 2, config.low_memory.saturating_sub(16 << 20) >> 16);
    put(0x5b, 3, config.high_memory >> 16);
    put(0x5f, 1, u64::from(config.cpus.saturating_sub(1)));
    let sum: u16 = cmos[0x10..0x2e].iter().map(|&b| u16::from(b)).sum();
    cmos[0x2e] = (sum >> 8) as u8;
    cmos[0x2f] = sum as u8;
    cmos
}

impl PortDevice for Rtc {
    fn port_read(&self, offset: u16, data: &mut [u8]) {
        let mut inner = lock(&self.inner);
        for (i, byte) in data.iter_mut().enumerate() {
            *byte = match (offset + i as u16) & 3 {
                1 => {
                    let index = inner.index[0];
                    self.read(&mut inner, index)
                }
                3 => inner.cmos[usize::from(inner.index[1]) + 128],
                // The index registers cannot be read.
                _ => 0xff,
            };
        }
    }

    fn port_write(&self, offset: u16, data: &[u8]) {
        let mut inner = lock(&self.inner);
        for (i, &byte) in data.iter().enumerate() {
            match (offset + i as u16) & 3 {
                0 => {
                    inner.index[0] = byte & 0x7f;
                    inner.nmi_masked = byte & 0x80 != 0;
                }
                1 => {
                    let index = inner.index[0];
                    self.write(&mut inner, index, byte);
                }
                2 => inner.index[1] = byte & 0x7f,
                _ => {
                    let index = usize::from(inner.index[1]) + 128;
                    inner.cmos[index] = byte;
                }
            }
        }
    }
}
