//! One counter of the 8254, computed from the time at which it was loaded.
//!
//! `elapsed` below is the number of input clocks since the current cycle started. What the modes do with it:
//!
//! | mode | counting element | OUT |
//! |---|---|---|
//! | 0 interrupt on terminal count | count - elapsed, wraps | low until elapsed = count |
//! | 1 one-shot, started by the gate | count - elapsed, wraps | low while 0 < remaining |
//! | 2 rate generator | count - elapsed mod count | low in the last clock of a period |
//! | 3 square wave | falls by two each clock, twice a period | high in the first half |
//! | 4 strobe | count - elapsed, wraps | low for the clock at elapsed = count |
//! | 5 strobe, started by the gate | as 4 | as 4 |

use atoll_machine::time::Nanos;

use super::{nanos, ticks};

/// Which bytes of the count software transfers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Access {
    Low = 1,
    High = 2,
    Both = 3,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Channel {
    pub(super) mode: u8,
    pub(super) bcd: bool,
    pub(super) access: Access,
    /// Count of the current cycle, 1-65536; 0 while no count was written since the mode was set.
    pub(super) count: u32,
    /// Count that takes effect at the end of the period (modes 2, 3) or at the next trigger (1, 5).
    pub(super) next_count: u32,
    /// Input clocks from guest time zero to the start of the cycle: the crystal runs whatever the counters do.
    pub(super) start: u64,
    /// Periods that ended before `start` since the mode was set or the first count written.
    pub(super) folded: u64,
    /// Clocks counted when the gate closed; `None` while counting.
    pub(super) frozen: Option<u64>,
    pub(super) triggered: bool,
    pub(super) gate: bool,
    pub(super) half_written: Option<u8>,
    pub(super) read_high: bool,
    pub(super) latched_count: Vec<u8>,
    pub(super) latched_status: Option<u8>,
}

impl Channel {
    /// Channels 0 and 1 have their gates tied high; channel 2's is bit 0 of port 61. Modes and counts are
    /// undefined in hardware: no count is loaded.
    pub(super) fn power_on() -> [Self; 3] {
        let channel = |gate| Self {
            mode: 0,
            bcd: false,
            access: Access::Both,
            count: 0,
            next_count: 0,
            start: 0,
            folded: 0,
            frozen: None,
            triggered: false,
            gate,
            half_written: None,
            read_high: false,
            latched_count: Vec::new(),
            latched_status: None,
        };
        [channel(true), channel(true), channel(false)]
    }

    fn periodic(&self) -> bool {
        matches!(self.mode, 2 | 3)
    }
    fn gate_triggered(&self) -> bool {
        matches!(self.mode, 1 | 5)
    }

    /// Input clocks since the cycle started.
    fn elapsed(&self, now: Nanos) -> u64 {
        self.frozen.unwrap_or_else(|| ticks(now).saturating_sub(self.start))
    }

    /// Whether the counter has something to count.
    fn running(&self) -> bool {
        self.count != 0 && (!self.gate_triggered() || self.triggered)
    }

    /// Switches to the count written during the last period once that period is over.
    pub(super) fn advance(&mut self, now: Nanos) {
        if self.next_count == 0 || !self.periodic() || self.count == 0 || self.frozen.is_some() {
            return;
        }
        if self.elapsed(now) >= u64::from(self.count) {
            self.fold(1);
            self.count = std::mem::take(&mut self.next_count);
        }
    }

    /// Moves the start of the cycle `periods` periods on.
    fn fold(&mut self, periods: u64) {
        self.start = self.start.wrapping_add(periods.wrapping_mul(u64::from(self.count)));
        self.folded = self.folded.wrapping_add(periods);
    }

    /// The 16 bits that a read of the counting element gives.
    fn value(&self, now: Nanos) -> u16 {
        if !self.running() {
            return self.encode(u64::from(self.count.max(self.next_count)));
        }
        let (elapsed, count) = (self.elapsed(now), u64::from(self.count));
        let wrap = if self.bcd { 10_000 } else { 0x1_0000 };
        let value = match self.mode {
            2 => count - elapsed % count,
            3 => {
                // Odd counts: the high half is one clock longer than the low half; only even values show.
                let (at, high) = (elapsed % count, count.div_ceil(2));
                let into_half = if at < high { at } else { at - high };
                (count & !1).saturating_sub(2 * into_half).max(2)
            }
            _ => (count % wrap + wrap - elapsed % wrap) % wrap,
        };
        self.encode(value)
    }

    fn encode(&self, value: u64) -> u16 {
        if !self.bcd {
            return value as u16;
        }
        let v = value % 10_000;
        (((v / 1000) << 12) | ((v / 100 % 10) << 8) | ((v / 10 % 10) << 4) | (v % 10)) as u16
    }

    /// Counts are 1 to 65536 (10000 in decimal); zero means the largest.
    fn decode(&self, raw: u16) -> u32 {
        if !self.bcd {
            return if raw == 0 { 0x1_0000 } else { u32::from(raw) };
        }
        let digit = |shift: u16| u32::from(raw >> shift & 15);
        let value = digit(12) * 1000 + digit(8) * 100 + digit(4) * 10 + digit(0);
        if value == 0 { 10_000 } else { value }
    }

    /// Level of OUT.
    pub(super) fn output(&self, now: Nanos) -> bool {
        if !self.running() {
            return self.mode != 0;
        }
        let (elapsed, count) = (self.elapsed(now), u64::from(self.count));
        match self.mode {
            0 | 1 => elapsed >= count,
            // A closed gate forces OUT high in the periodic modes.
            2 => self.frozen.is_some() || elapsed % count != count - 1,
            3 => self.frozen.is_some() || elapsed % count < count.div_ceil(2),
            _ => elapsed != count,
        }
    }

    /// How often OUT rose since the channel was loaded.
    pub(super) fn edges(&self, now: Nanos) -> u64 {
        if !self.running() {
            return 0;
        }
        let (elapsed, count) = (self.elapsed(now), u64::from(self.count));
        match self.mode {
            2 | 3 => self.folded.wrapping_add(elapsed / count),
            0 | 1 => u64::from(elapsed >= count),
            _ => u64::from(elapsed > count),
        }
    }

    /// When OUT rises for the time `after` + 1 since the channel was loaded.
    pub(super) fn edge_time(&self, after: u64) -> Option<Nanos> {
        if !self.running() || self.frozen.is_some() {
            return None;
        }
        let count = u64::from(self.count);
        let at = match self.mode {
            2 | 3 => after.wrapping_sub(self.folded).saturating_add(1).saturating_mul(count),
            0 | 1 if after == 0 => count,
            4 | 5 if after == 0 => count + 1,
            _ => return None,
        };
        Some(nanos(self.start.saturating_add(at)))
    }

    /// Nanoseconds of one cycle.
    pub(super) fn period(&self) -> Nanos {
        nanos(u64::from(self.count))
    }

    /// A control word for this channel.
    pub(super) fn set_mode(&mut self, word: u8, now: Nanos) {
        let mode = word >> 1 & 7;
        *self = Self {
            // Bit 2 is not looked at when bit 1 is set: modes 6 and 7 are 2 and 3.
            mode: if mode > 5 { mode & 3 } else { mode },
            bcd: word & 1 != 0,
            access: match word >> 4 & 3 {
                1 => Access::Low,
                2 => Access::High,
                _ => Access::Both,
            },
            count: 0,
            next_count: 0,
            start: ticks(now),
            folded: 0,
            frozen: None,
            triggered: false,
            gate: self.gate,
            half_written: None,
            read_high: false,
            latched_count: Vec::new(),
            latched_status: None,
        };
    }

    /// A byte for the count register. Returns whether a new cycle started.
    pub(super) fn write_count(&mut self, value: u8, now: Nanos) -> bool {
        let raw = match self.access {
            Access::Low => u16::from(value),
            Access::High => u16::from(value) << 8,
            Access::Both => match self.half_written.take() {
                None => {
                    self.half_written = Some(value);
                    if self.mode == 0 {
                        // The first byte stops the count; OUT goes low at once.
                        self.count = 0;
                        return true;
                    }
                    return false;
                }
                Some(low) => u16::from(value) << 8 | u16::from(low),
            },
        };
        let count = self.decode(raw);
        if self.gate_triggered() || (self.periodic() && self.count != 0) {
            if self.periodic() && self.frozen.is_none() {
                // What is written counts from the end of the period that runs now.
                self.fold(self.elapsed(now) / u64::from(self.count));
            }
            self.next_count = count;
            return false;
        }
        self.load(count, now);
        true
    }

    fn load(&mut self, count: u32, now: Nanos) {
        self.count = count;
        self.next_count = 0;
        self.start = ticks(now);
        self.folded = 0;
        self.frozen = if self.gate { None } else { Some(0) };
    }

    /// The gate input: level in modes 0, 2, 3, 4, rising edge in 1, 2, 3, 5.
    pub(super) fn set_gate(&mut self, gate: bool, now: Nanos) {
        if gate == self.gate {
            return;
        }
        self.gate = gate;
        match (self.mode, gate) {
            (1 | 5, true) => {
                let count = if self.next_count != 0 { self.next_count } else { self.count };
                if count != 0 {
                    self.load(count, now);
                    self.triggered = true;
                }
            }
            (1 | 5, false) => {}
            (_, false) => self.frozen = Some(ticks(now).saturating_sub(self.start)),
            (2 | 3, true) => {
                if self.next_count != 0 {
                    self.count = std::mem::take(&mut self.next_count);
                }
                self.start = ticks(now);
                self.frozen = None;
            }
            (_, true) => {
                self.start = ticks(now).saturating_sub(self.frozen.take().unwrap_or(0));
            }
        }
    }

    /// The latch and read-back commands. A count that is still latched stays; so does a status.
    pub(super) fn read_back(&mut self, count: bool, status: bool, now: Nanos) {
        self.advance(now);
        if status && self.latched_status.is_none() {
            let null_count = self.count == 0 || self.next_count != 0;
            self.latched_status = Some(
                u8::from(self.output(now)) << 7
                    | u8::from(null_count) << 6
                    | (self.access as u8) << 4
                    | self.mode << 1
                    | u8::from(self.bcd),
            );
        }
        if count && self.latched_count.is_empty() {
            let [low, high] = self.value(now).to_le_bytes();
            self.latched_count = match self.access {
                Access::Low => vec![low],
                Access::High => vec![high],
                Access::Both => vec![low, high],
            };
        }
    }

    /// A read of the channel's port: latched status first, then latched count, then the counter as it runs.
    pub(super) fn read(&mut self, now: Nanos) -> u8 {
        if let Some(status) = self.latched_status.take() {
            return status;
        }
        if !self.latched_count.is_empty() {
            return self.latched_count.remove(0);
        }
        let [low, high] = self.value(now).to_le_bytes();
        match self.access {
            Access::Low => low,
            Access::High => high,
            Access::Both => {
                self.read_high = !self.read_high;
                if self.read_high { low } else { high }
            }
        }
    }
}
