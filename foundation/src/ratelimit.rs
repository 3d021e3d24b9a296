//! Logging that an outsider cannot use to fill a disk: a limit for each call site.
//!
//! [`log_limited!`] is `tracing::event!` with a static [`RateLimiter`] at the place where it is written. Use it
//! for everything that input from outside can provoke.
//!
//! # Algorithm
//!
//! A token bucket in its virtual-scheduling form (the generic cell rate algorithm), so that one atomic word is
//! the whole state. The word is the moment `full_at` at which the bucket will be full again, in nanoseconds of
//! the monotonic clock. One message costs `interval = period / burst`:
//!
//! ```text
//! next = max(full_at, now) + interval
//! next - now <= period  ->  admitted, full_at = next      (the bucket holds at least one token)
//! otherwise             ->  suppressed, full_at unchanged
//! ```
//!
//! Lock free: the update is a compare-and-swap that is retried only when another thread's succeeded. A second
//! word counts suppressed messages; the next admitted message takes the count and reports it. The count is
//! advisory: under concurrent use a suppression may be reported with a later message, never lost or twice.

use std::sync::atomic::{AtomicU64, Ordering};

use crate::timerfd::monotonic_nanos;

/// Messages a call site may log at once.
pub const DEFAULT_BURST: u32 = 10;
/// Milliseconds in which an empty bucket fills up.
pub const DEFAULT_PERIOD_MS: u32 = 5_000;

/// A lock-free token bucket; see the module's documentation. Meant to be a `static`.
#[derive(Debug)]
pub struct RateLimiter {
    /// Nanoseconds that one message costs.
    interval: u64,
    /// Nanoseconds in which an empty bucket fills.
    period: u64,
    full_at: AtomicU64,
    suppressed: AtomicU64,
}

impl RateLimiter {
    /// A full bucket of `burst` messages (at least one is allowed) that fills up within `period_ms`.
    pub const fn new(burst: u32, period_ms: u32) -> Self {
        let burst = if burst == 0 { 1 } else { burst as u64 };
        let interval = period_ms as u64 * 1_000_000 / burst;
        // A multiple of the interval, so that rounding never costs the last message of a burst.
        Self { interval, period: interval * burst, full_at: AtomicU64::new(0), suppressed: AtomicU64::new(0) }
    }

    /// Asks to log one message now. `Some(n)`: log it, and `n` earlier messages were suppressed since the last
    /// one. `None`: do not log.
    pub fn admit(&self) -> Option<u64> {
        self.admit_at(monotonic_nanos())
    }

    /// As [`RateLimiter::admit`] at a given moment, in nanoseconds of one monotonic clock.
    pub fn admit_at(&self, now: u64) -> Option<u64> {
        let update = self.full_at.try_update(Ordering::Relaxed, Ordering::Relaxed, |full_at| {
            let next = full_at.max(now).saturating_add(self.interval);
            (next.saturating_sub(now) <= self.period).then_some(next)
        });
        if update.is_ok() {
            Some(self.suppressed.swap(0, Ordering::Relaxed))
        } else {
            self.suppressed.fetch_add(1, Ordering::Relaxed);
            None
        }
    }
}

/// Logs like `tracing`'s macros, but each call site at most [`DEFAULT_BURST`] times at once and on average once
/// per `DEFAULT_PERIOD_MS / DEFAULT_BURST`. Messages that no subscriber wants cost nothing and are not counted.
///
/// The first argument is the level as a word: `error`, `warn`, `info`, `debug` or `trace`. What follows is what
/// `tracing::event!` takes after its level. A message that follows suppressed ones has the field `suppressed`.
///
/// ```
/// atoll_foundation::log_limited!(warn, "write of {:#x} to a read-only register ignored", 0x12);
/// atoll_foundation::log_limited!(debug, port = 0x80, "unknown port");
/// ```
#[macro_export]
macro_rules! log_limited {
    (error, $($rest:tt)+) => { $crate::log_limited!(@ $crate::private::tracing::Level::ERROR, $($rest)+) };
    (warn, $($rest:tt)+) => { $crate::log_limited!(@ $crate::private::tracing::Level::WARN, $($rest)+) };
    (info, $($rest:tt)+) => { $crate::log_limited!(@ $crate::private::tracing::Level::INFO, $($rest)+) };
    (debug, $($rest:tt)+) => { $crate::log_limited!(@ $crate::private::tracing::Level::DEBUG, $($rest)+) };
    (trace, $($rest:tt)+) => { $crate::log_limited!(@ $crate::private::tracing::Level::TRACE, $($rest)+) };
    (@ $level:expr, $($rest:tt)+) => {{
        static LIMITER: $crate::ratelimit::RateLimiter = $crate::ratelimit::RateLimiter::new(
            $crate::ratelimit::DEFAULT_BURST,
            $crate::ratelimit::DEFAULT_PERIOD_MS,
        );
        if $crate::private::tracing::enabled!($level) {
            match LIMITER.admit() {
                None => {}
                Some(0) => $crate::private::tracing::event!($level, $($rest)+),
                Some(suppressed) => $crate::private::tracing::event!($level, suppressed, $($rest)+),
            }
        }
    }};
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;
    use std::sync::{Arc, Mutex};

    const SECOND: u64 = 1_000_000_000;

    #[test]
    fn a_burst_passes_then_one_message_per_interval() {
        let limiter = RateLimiter::new(10, 5_000);
        let start = 77 * SECOND;
        assert_eq!((0..100).filter(|_| limiter.admit_at(start).is_some()).count(), 10);
        assert_eq!(limiter.admit_at(start + SECOND / 2 - 1), None);
        assert_eq!(limiter.admit_at(start + SECOND / 2), Some(91));
        assert_eq!(limiter.admit_at(start + SECOND / 2), None);
        assert_eq!(limiter.admit_at(start + SECOND), Some(1));
    }

    #[test]
    fn an_idle_bucket_never_holds_more_than_a_burst() {
        let limiter = RateLimiter::new(3, 1_000);
        for hour in 1..5 {
            let now = hour * 3_600 * SECOND;
            assert_eq!((0..50).filter(|_| limiter.admit_at(now).is_some()).count(), 3);
        }
    }

    #[test]
    fn every_burst_passes_in_full_whatever_the_rounding() {
        for burst in 1..50 {
            let limiter = RateLimiter::new(burst, 7);
            assert_eq!((0..100).filter(|_| limiter.admit_at(SECOND).is_some()).count(), burst as usize);
        }
    }

    #[test]
    fn threads_together_get_one_burst_and_no_count_is_lost() {
        let limiter = RateLimiter::new(10, 5_000);
        let (admitted, mut reported) = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..4)
                .map(|_| {
                    scope.spawn(|| (0..1000).filter_map(|_| limiter.admit_at(SECOND)).collect::<Vec<_>>())
                })
                .collect();
            let all: Vec<u64> = threads.into_iter().flat_map(|t| t.join().unwrap()).collect();
            (all.len(), all.iter().sum::<u64>())
        });
        reported += limiter.admit_at(100 * SECOND).unwrap();
        assert_eq!((admitted, reported), (10, 3990));
    }

    #[derive(Clone, Default)]
    struct Sink(Arc<Mutex<Vec<u8>>>);

    impl Write for Sink {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            self.0.lock().unwrap().extend_from_slice(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn the_macro_limits_each_call_site_for_itself() {
        let sink = Sink::default();
        let writer = sink.clone();
        let subscriber =
            tracing_subscriber::fmt().with_writer(move || writer.clone()).with_ansi(false).finish();
        tracing::subscriber::with_default(subscriber, || {
            for number in 0..50 {
                crate::log_limited!(warn, "first {number}");
                crate::log_limited!(info, number, "second");
                crate::log_limited!(trace, "not wanted");
            }
        });
        let text = String::from_utf8(sink.0.lock().unwrap().clone()).unwrap();
        for site in ["first", "second"] {
            assert_eq!(text.lines().filter(|l| l.contains(site)).count(), DEFAULT_BURST as usize, "{text}");
        }
        assert!(!text.contains("not wanted"));
    }
}
