//! Limits on operations and bytes per second, with bursts.
//!
//! A [`Throttle`] is two token buckets under one lock: one counts operations, one bytes. Each fills at its rate up
//! to its burst. An operation passes when both hold enough, and then takes from both; otherwise it takes from
//! neither and learns how long to wait.
//!
//! ```text
//! level:  burst ──────┐ full: anything passes, even more than a burst (what is missing becomes a debt)
//!         cost  ──────┤ an operation of that cost passes at or above this
//!         0     ──────┤
//!         debt  ──────┘ below zero: nothing passes until time has paid it
//! ```
//!
//! An operation larger than the burst could never find enough tokens; it passes when the bucket is full and leaves
//! a debt, so the rate holds over time for every size. Levels are kept in units of a billionth of a token, which
//! is what one nanosecond at one token a second is worth: there is no rounding to drift.
//!
//! Nothing here sleeps or has a thread. A caller who is told to wait asks again when its timer fires; who was
//! refused first is not remembered, so callers that must stay in order keep their own queue.
//!
//! Lock order: the one lock is a leaf.

use std::sync::Mutex;
use std::time::{Duration, Instant};

use crate::sync::lock;

/// Parts of one token.
const UNIT: i128 = 1_000_000_000;

/// A rate with a burst, in operations or in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rate {
    /// What passes a second over a long time. Zero is taken as one.
    pub per_second: u64,
    /// What may pass at once after a quiet time. Zero is taken as one.
    pub burst: u64,
}

impl Rate {
    /// A rate whose burst is a tenth of a second's worth, and at least `least`.
    pub fn with_default_burst(per_second: u64, least: u64) -> Self {
        Self { per_second, burst: (per_second / 10).max(least).max(1) }
    }
}

/// What a [`Throttle`] lets pass. `None` is no limit.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct RateLimits {
    /// Operations.
    pub operations: Option<Rate>,
    /// Bytes.
    pub bytes: Option<Rate>,
}

impl RateLimits {
    /// Whether nothing is limited.
    pub fn is_unlimited(&self) -> bool {
        self.operations.is_none() && self.bytes.is_none()
    }
}

/// One token bucket.
#[derive(Debug, Clone, Copy)]
struct Bucket {
    rate: i128,
    burst: i128,
    /// In [`UNIT`]s; negative is a debt.
    level: i128,
}

impl Bucket {
    fn new(rate: Rate) -> Self {
        let burst = i128::from(rate.burst.max(1)) * UNIT;
        Self { rate: i128::from(rate.per_second.max(1)), burst, level: burst }
    }

    /// Takes over another rate. A debt stays, and what is missing from the burst stays missing, so that setting
    /// the same limits again and again lets nothing extra pass.
    fn change(&mut self, rate: Rate) {
        let missing = self.burst - self.level;
        let new = Self::new(rate);
        let level = if self.level < 0 { self.level } else { (new.burst - missing).max(0) };
        *self = Self { level, ..new };
    }

    fn fill(&mut self, elapsed: Duration) {
        // At most 2^94 (a nanosecond count) times 2^64 would overflow; a century of nanoseconds is 2^62.
        let nanos = elapsed.as_nanos().min(1 << 62) as i128;
        self.level = (self.level + nanos * self.rate).min(self.burst);
    }

    /// How long until `cost` passes; zero: now.
    fn wait(&self, cost: u64) -> Duration {
        let needed = (i128::from(cost) * UNIT).min(self.burst);
        let missing = needed - self.level;
        if missing <= 0 {
            return Duration::ZERO;
        }
        let nanos = (missing + self.rate - 1) / self.rate;
        Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX))
    }

    fn take(&mut self, cost: u64) {
        self.level -= i128::from(cost) * UNIT;
    }
}

#[derive(Debug)]
struct State {
    limits: RateLimits,
    operations: Option<Bucket>,
    bytes: Option<Bucket>,
    /// Up to when the buckets have been filled. `None` before the first operation.
    filled: Option<Instant>,
}

/// Two token buckets. The module's documentation has the rules.
#[derive(Debug)]
pub struct Throttle {
    state: Mutex<State>,
}

impl Throttle {
    /// A throttle with full buckets.
    pub fn new(limits: RateLimits) -> Self {
        let state = State {
            limits,
            operations: limits.operations.map(Bucket::new),
            bytes: limits.bytes.map(Bucket::new),
            filled: None,
        };
        Self { state: Mutex::new(state) }
    }

    /// Changes the limits at once. A bucket that existed keeps what it owes; a new one starts full. Whoever waits
    /// for an earlier answer of [`Throttle::take`] should ask again.
    pub fn set(&self, limits: RateLimits) {
        let mut state = lock(&self.state);
        let change = |bucket: &mut Option<Bucket>, rate: Option<Rate>| match (bucket.as_mut(), rate) {
            (Some(bucket), Some(rate)) => bucket.change(rate),
            (_, rate) => *bucket = rate.map(Bucket::new),
        };
        change(&mut state.operations, limits.operations);
        change(&mut state.bytes, limits.bytes);
        state.limits = limits;
    }

    /// The present limits.
    pub fn limits(&self) -> RateLimits {
        lock(&self.state).limits
    }

    /// Takes one operation of `bytes` bytes. `Err`: nothing was taken, ask again after that long. An operation
    /// larger than the burst passes when the bucket is full and leaves a debt. A `now` earlier than one seen
    /// before counts as that one.
    pub fn take(&self, bytes: u64, now: Instant) -> Result<(), Duration> {
        let state = &mut *lock(&self.state);
        let filled = *state.filled.get_or_insert(now);
        if let Some(elapsed) = now.checked_duration_since(filled) {
            for bucket in [&mut state.operations, &mut state.bytes].into_iter().flatten() {
                bucket.fill(elapsed);
            }
            state.filled = Some(now);
        }
        let wait = |bucket: &Option<Bucket>, cost| bucket.map_or(Duration::ZERO, |b| b.wait(cost));
        let longest = wait(&state.operations, 1).max(wait(&state.bytes, bytes));
        if !longest.is_zero() {
            return Err(longest);
        }
        for (bucket, cost) in [(&mut state.operations, 1), (&mut state.bytes, bytes)] {
            if let Some(bucket) = bucket {
                bucket.take(cost);
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn limits(operations: Option<(u64, u64)>, bytes: Option<(u64, u64)>) -> RateLimits {
        let rate = |r: Option<(u64, u64)>| r.map(|(per_second, burst)| Rate { per_second, burst });
        RateLimits { operations: rate(operations), bytes: rate(bytes) }
    }

    /// Takes operations of the given sizes in turn, waiting exactly as told, for `time`. Operations and bytes.
    fn drive(throttle: &Throttle, start: Instant, sizes: &[u64], time: Duration) -> (u64, u64) {
        let (mut now, mut operations, mut bytes) = (start, 0, 0);
        for size in sizes.iter().cycle() {
            while let Err(wait) = throttle.take(*size, now) {
                now += wait;
            }
            if now.duration_since(start) > time {
                break;
            }
            operations += 1;
            bytes += size;
        }
        (operations, bytes)
    }

    #[test]
    fn without_limits_everything_passes() {
        let throttle = Throttle::new(RateLimits::default());
        let now = Instant::now();
        for _ in 0..1000 {
            assert_eq!(throttle.take(u64::MAX, now), Ok(()));
        }
    }

    #[test]
    fn a_burst_passes_at_once_and_the_next_operation_is_told_when() {
        let throttle = Throttle::new(limits(Some((100, 5)), None));
        let now = Instant::now();
        for _ in 0..5 {
            assert_eq!(throttle.take(1, now), Ok(()));
        }
        let wait = throttle.take(1, now).unwrap_err();
        assert_eq!(wait, Duration::from_millis(10));
        assert!(throttle.take(1, now + wait - Duration::from_nanos(1)).is_err());
        assert_eq!(throttle.take(1, now + wait), Ok(()));
    }

    #[test]
    fn an_oversized_operation_waits_for_a_full_bucket_and_leaves_a_debt() {
        let throttle = Throttle::new(limits(None, Some((1000, 100))));
        let now = Instant::now();
        assert_eq!(throttle.take(1, now), Ok(()));
        assert_eq!(throttle.take(1100, now), Err(Duration::from_millis(1)));
        let full = now + Duration::from_millis(1);
        assert_eq!(throttle.take(1100, full), Ok(()));
        assert_eq!(throttle.take(1, full), Err(Duration::from_millis(1001)));
    }

    #[test]
    fn what_one_bucket_refuses_the_other_does_not_lose() {
        let throttle = Throttle::new(limits(Some((10, 2)), Some((1000, 1000))));
        let now = Instant::now();
        assert_eq!(throttle.take(1000, now), Ok(()));
        for _ in 0..10 {
            assert_eq!(throttle.take(500, now), Err(Duration::from_millis(500)));
        }
        assert_eq!(throttle.take(500, now + Duration::from_millis(500)), Ok(()));
    }

    #[test]
    fn a_change_holds_at_once_and_forgives_nothing() {
        let throttle = Throttle::new(limits(Some((10, 10)), None));
        let now = Instant::now();
        for _ in 0..10 {
            throttle.take(1, now).unwrap();
        }
        let same = throttle.limits();
        for _ in 0..5 {
            throttle.set(same);
            assert!(throttle.take(1, now).is_err(), "a repeated setting refilled the bucket");
        }
        throttle.set(limits(Some((1000, 10)), None));
        assert_eq!(throttle.take(1, now), Err(Duration::from_millis(1)));
        throttle.set(limits(Some((1000, 1)), None));
        assert_eq!(throttle.take(1, now), Err(Duration::from_millis(1)), "a smaller burst made a debt");
        throttle.set(RateLimits::default());
        assert_eq!(throttle.take(1, now), Ok(()));
    }

    #[test]
    fn a_debt_survives_a_change() {
        let throttle = Throttle::new(limits(None, Some((100, 100))));
        let now = Instant::now();
        throttle.take(1100, now).unwrap();
        throttle.set(limits(None, Some((1000, 10))));
        assert_eq!(throttle.take(10, now), Err(Duration::from_millis(1010)));
    }

    #[test]
    fn time_that_goes_back_and_extreme_numbers_do_no_harm() {
        let throttle = Throttle::new(limits(Some((u64::MAX, u64::MAX)), Some((0, 0))));
        let now = Instant::now();
        let later = now + Duration::from_secs(1 << 32);
        assert_eq!(throttle.take(1, later), Ok(()));
        assert_eq!(throttle.take(1, now), Err(Duration::from_secs(1)));
        assert_eq!(throttle.take(u64::MAX, later + Duration::from_secs(1)), Ok(()));
        assert!(
            throttle.take(1, later + Duration::from_secs(10)).unwrap_err() > Duration::from_secs(1 << 34)
        );
    }

    proptest! {
        #[test]
        fn over_a_long_time_the_rates_hold_within_one_percent(
            operations in proptest::option::of((50u64..5_000, 1u64..50)),
            bytes in (100_000u64..1 << 30, 1u64..1 << 18),
            sizes in prop_oneof![
                proptest::collection::vec(1u64..1 << 20, 1..2),
                proptest::collection::vec(1u64..1 << 20, 2..20),
            ],
        ) {
            let throttle = Throttle::new(limits(operations, Some(bytes)));
            let largest = *sizes.iter().max().unwrap();
            // Long enough that bursts, and one operation at the end, are below one percent.
            let least = |rate: u64, slack: u64| 250.0 * slack as f64 / rate as f64;
            let mut seconds = least(bytes.0, bytes.1 + largest).max(1.0);
            if let Some((rate, burst)) = operations {
                seconds = seconds.max(least(rate, burst + 1));
            }
            prop_assume!(seconds < 3_000.0);
            let (done, moved) = drive(&throttle, Instant::now(), &sizes, Duration::from_secs_f64(seconds));
            let of_bytes = moved as f64 / (bytes.0 as f64 * seconds);
            let of_operations = operations.map_or(0.0, |(rate, _)| done as f64 / (rate as f64 * seconds));
            prop_assert!(of_bytes <= 1.01, "{of_bytes} of the byte rate");
            prop_assert!(of_operations <= 1.01, "{of_operations} of the operation rate");
            // Operations of changing size may be held up by one limit after the other and reach neither.
            if sizes.len() == 1 || operations.is_none() {
                let best = of_bytes.max(of_operations);
                prop_assert!(best >= 0.99, "neither limit was reached: {of_bytes} {of_operations}");
            }
        }
    }
}
