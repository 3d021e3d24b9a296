//! How long the guest takes to acknowledge, and from it when to send again (RFC 6298), in milliseconds.
//!
//! The way to the guest has no delay worth the name; what is measured is how late the guest gets to it, which with
//! a slow processor or a busy one is anything up to seconds.

/// Before the first measurement.
const INITIAL_MS: u32 = 1000;
/// Below this a guest that is only busy would look like one that lost something.
const MIN_MS: u32 = 300;
const MAX_MS: u32 = 60_000;

/// The estimator and the one measurement in progress.
#[derive(Clone, Copy)]
pub(super) struct Rtt {
    /// Smoothed time, times 8; 0 before the first measurement.
    smooth8: u32,
    /// Smoothed deviation, times 4.
    deviation4: u32,
    /// What is being measured: when everything before a sequence number was sent.
    timed: Option<(u32, u32)>,
}

impl Rtt {
    pub(super) const NEW: Self = Self { smooth8: 0, deviation4: 0, timed: None };

    /// Everything before `end` was sent for the first time, at `now`.
    pub(super) fn sent(&mut self, end: u32, now: u64) {
        if self.timed.is_none() {
            self.timed = Some((end, now as u32));
        }
    }

    /// Something was sent again: what is acknowledged now says nothing about time (Karn).
    pub(super) fn sent_again(&mut self) {
        self.timed = None;
    }

    /// Everything before `una` was acknowledged at `now`.
    pub(super) fn acknowledged(&mut self, una: u32, now: u64) {
        let Some((end, since)) = self.timed else { return };
        if (una.wrapping_sub(end) as i32) < 0 {
            return;
        }
        self.timed = None;
        let sample = (now as u32).wrapping_sub(since).clamp(1, MAX_MS);
        if self.smooth8 == 0 {
            self.smooth8 = sample * 8;
            self.deviation4 = sample * 2;
            return;
        }
        let error = sample.abs_diff(self.smooth8 / 8);
        self.deviation4 = self.deviation4 - self.deviation4 / 4 + error;
        self.smooth8 = (self.smooth8 - self.smooth8 / 8 + sample).max(1);
    }

    /// Milliseconds to wait for an acknowledgement, after `backoff` waits in vain.
    pub(super) fn timeout(&self, backoff: u8) -> u64 {
        let base = match self.smooth8 {
            0 => INITIAL_MS,
            smooth8 => (smooth8 / 8 + self.deviation4).max(MIN_MS),
        };
        (u64::from(base) << backoff.min(16)).min(u64::from(MAX_MS))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_slow_guest_gets_more_time_and_a_quick_one_no_less_than_the_least() {
        let mut rtt = Rtt::NEW;
        assert_eq!(rtt.timeout(0), 1000);
        for step in 0..20_u32 {
            rtt.sent(step + 1, u64::from(step) * 2000);
            rtt.acknowledged(step + 1, u64::from(step) * 2000 + 900);
        }
        assert!((900..1100).contains(&rtt.timeout(0)), "{}", rtt.timeout(0));
        for step in 20..80_u32 {
            rtt.sent(step + 1, u64::from(step) * 2000);
            rtt.acknowledged(step + 1, u64::from(step) * 2000);
        }
        assert_eq!(rtt.timeout(0), 300);
        assert_eq!(rtt.timeout(2), 1200);
        assert_eq!(rtt.timeout(255), 60_000);
    }

    #[test]
    fn what_was_sent_twice_is_not_measured() {
        let mut rtt = Rtt::NEW;
        rtt.sent(10, 0);
        rtt.sent_again();
        rtt.acknowledged(10, 50_000);
        assert_eq!(rtt.timeout(0), 1000);
        rtt.sent(20, 60_000);
        rtt.acknowledged(19, 60_500);
        assert_eq!(rtt.timeout(0), 1000, "not all of it yet");
    }
}
