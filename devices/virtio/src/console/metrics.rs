//! Counters of a console.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

/// Counters since the device was made.
#[derive(Debug, Default)]
pub struct ConsoleMetrics {
    pub(super) output_bytes: AtomicU64,
    pub(super) dropped_output_bytes: AtomicU64,
    pub(super) input_bytes: AtomicU64,
    pub(super) resizes: AtomicU64,
}

/// The counters at one moment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ConsoleMetricsSnapshot {
    /// Bytes the guest wrote.
    pub output_bytes: u64,
    /// Bytes beyond what one buffer may hold, not written.
    pub dropped_output_bytes: u64,
    /// Bytes the guest received.
    pub input_bytes: u64,
    /// Changes of the window size.
    pub resizes: u64,
}

impl ConsoleMetrics {
    pub(super) fn add(counter: &AtomicU64, n: u64) {
        counter.fetch_add(n, Relaxed);
    }

    /// Reads all counters.
    pub fn snapshot(&self) -> ConsoleMetricsSnapshot {
        ConsoleMetricsSnapshot {
            output_bytes: self.output_bytes.load(Relaxed),
            dropped_output_bytes: self.dropped_output_bytes.load(Relaxed),
            input_bytes: self.input_bytes.load(Relaxed),
            resizes: self.resizes.load(Relaxed),
        }
    }
}
