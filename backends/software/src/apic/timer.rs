//! The local APIC's timer (Intel SDM vol. 3, 11.5.4).
//!
//! | mode | started by | expires | then |
//! |---|---|---|---|
//! | one-shot | INITIAL_COUNT ≠ 0 | after count × divisor ticks | stops |
//! | periodic | INITIAL_COUNT ≠ 0 | every count × divisor ticks | goes on; periods missed are one interrupt |
//! | TSC-deadline | IA32_TSC_DEADLINE ≠ 0 | when the guest's TSC reaches it | the register reads zero |
//!
//! Ticks are nanoseconds of guest time: the models report a 1 GHz bus (CPUID 0x15 and 0x4000_0010).
//! A mode change between deadline and count modes disarms the timer.

/// Mode in the LVT entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// Counts down once.
    OneShot,
    /// Counts down again and again.
    Periodic,
    /// Compares with the TSC.
    Deadline,
}

impl Mode {
    /// From the LVT timer register; the reserved encoding behaves as one-shot.
    pub fn of(lvt: u32) -> Self {
        match lvt >> 17 & 3 {
            1 => Self::Periodic,
            2 => Self::Deadline,
            _ => Self::OneShot,
        }
    }
}

/// The timer's state.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Timer {
    /// Initial count register.
    pub initial: u32,
    /// Divide configuration register.
    pub divide: u32,
    /// Guest time at which the running count ends.
    pub expires: Option<u64>,
    /// IA32_TSC_DEADLINE; 0 while disarmed.
    pub deadline: u64,
}

/// A periodic timer cannot interrupt more often than this (nanoseconds), whatever the guest asks for: the
/// vCPU's thread would do nothing else.
const SHORTEST_PERIOD: u64 = 20_000;

impl Timer {
    fn divisor(&self) -> u64 {
        match self.divide & 3 | self.divide >> 1 & 4 {
            7 => 1,
            n => 2 << n,
        }
    }

    fn length(&self) -> u64 {
        u64::from(self.initial) * self.divisor()
    }

    /// Writes INITIAL_COUNT at guest time `now`.
    pub fn set_count(&mut self, mode: Mode, count: u32, now: u64) {
        if mode == Mode::Deadline {
            return;
        }
        self.initial = count;
        self.expires = (count != 0).then(|| now.saturating_add(self.length()));
    }

    /// Writes DIVIDE at guest time `now`: what is left of the count takes the new divisor.
    pub fn set_divide(&mut self, divide: u32, now: u64) {
        let left = self.current(now);
        self.divide = divide;
        if self.expires.is_some() {
            self.expires = Some(now.saturating_add(u64::from(left) * self.divisor()));
        }
    }

    /// The LVT entry's mode changed.
    pub fn set_mode(&mut self, mode: Mode) {
        match mode {
            Mode::Deadline => {
                self.initial = 0;
                self.expires = None;
            }
            _ => self.deadline = 0,
        }
    }

    /// CURRENT_COUNT at guest time `now`.
    pub fn current(&self, now: u64) -> u32 {
        let left = self.expires.map_or(0, |at| at.saturating_sub(now));
        u32::try_from(left.div_ceil(self.divisor())).unwrap_or(u32::MAX)
    }

    /// Whether the count ended by guest time `now`; a periodic timer starts its next period.
    pub fn expire_count(&mut self, mode: Mode, now: u64) -> bool {
        let Some(at) = self.expires else { return false };
        if at > now {
            return false;
        }
        self.expires = None;
        if mode == Mode::Periodic && self.initial != 0 {
            let period = self.length().max(SHORTEST_PERIOD);
            let missed = (now - at) / period;
            self.expires = Some(at.saturating_add((missed + 1).saturating_mul(period)));
        }
        true
    }

    /// Ticks from guest TSC `tsc` to the deadline, 0 once it is due; `None` while disarmed.
    pub fn deadline_in(&self, tsc: u64) -> Option<u64> {
        (self.deadline != 0).then(|| self.deadline.saturating_sub(tsc))
    }

    /// Whether the guest's TSC, now `tsc`, reached the deadline; the register becomes zero then.
    pub fn expire_deadline(&mut self, tsc: u64) -> bool {
        let due = self.deadline != 0 && tsc >= self.deadline;
        if due {
            self.deadline = 0;
        }
        due
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_shot_counts_down_and_stops() {
        let mut t = Timer { divide: 0xb, ..Timer::default() };
        t.set_count(Mode::OneShot, 1000, 500);
        assert_eq!(t.current(700), 800);
        assert!(!t.expire_count(Mode::OneShot, 1499));
        assert!(t.expire_count(Mode::OneShot, 1500));
        assert!(!t.expire_count(Mode::OneShot, 9999));
        assert_eq!(t.current(9999), 0);
    }

    #[test]
    fn divisors_follow_the_register() {
        for (divide, divisor) in [(0, 2), (1, 4), (2, 8), (3, 16), (8, 32), (9, 64), (0xa, 128), (0xb, 1)] {
            let t = Timer { divide, ..Timer::default() };
            assert_eq!(t.divisor(), divisor);
        }
    }

    #[test]
    fn periodic_keeps_its_phase_and_merges_missed_periods() {
        let mut t = Timer { divide: 0xb, ..Timer::default() };
        t.set_count(Mode::Periodic, 100_000, 0);
        assert!(t.expire_count(Mode::Periodic, 100_010));
        assert_eq!(t.expires, Some(200_000));
        assert!(t.expire_count(Mode::Periodic, 555_000));
        assert_eq!(t.expires, Some(600_000));
        assert!(!t.expire_count(Mode::Periodic, 599_999));
    }

    #[test]
    fn a_changed_divisor_stretches_what_is_left() {
        let mut t = Timer { divide: 0xb, ..Timer::default() };
        t.set_count(Mode::OneShot, 1000, 0);
        t.set_divide(0, 600);
        assert_eq!((t.current(600), t.expires), (400, Some(1400)));
    }

    #[test]
    fn deadline_fires_once_and_reads_zero() {
        let mut t = Timer { deadline: 5000, ..Timer::default() };
        assert!(!t.expire_deadline(4999));
        assert!(t.expire_deadline(5000));
        assert!(!t.expire_deadline(5001) && t.deadline == 0);
        assert_eq!(t.deadline_in(5001), None);
    }

    #[test]
    fn a_deadline_in_the_upper_half_of_the_tsc_is_far_ahead_not_due() {
        let mut t = Timer { deadline: u64::MAX, ..Timer::default() };
        assert_eq!(t.deadline_in(1000), Some(u64::MAX - 1000));
        assert!(!t.expire_deadline(1000));
        assert_eq!(t.deadline_in(u64::MAX), Some(0));
        assert!(t.expire_deadline(u64::MAX));
    }
}
