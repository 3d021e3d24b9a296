//! Counters of an entropy device.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

/// Counters since the device was made.
#[derive(Debug, Default)]
pub struct RngMetrics {
    pub(super) requests: AtomicU64,
    pub(super) bytes: AtomicU64,
}

/// The counters at one moment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RngMetricsSnapshot {
    /// Requests answered.
    pub requests: u64,
    /// Random bytes given.
    pub bytes: u64,
}

impl RngMetrics {
    pub(super) fn count(&self, bytes: u64) {
        self.requests.fetch_add(1, Relaxed);
        self.bytes.fetch_add(bytes, Relaxed);
    }

    /// Reads all counters.
    pub fn snapshot(&self) -> RngMetricsSnapshot {
        RngMetricsSnapshot { requests: self.requests.load(Relaxed), bytes: self.bytes.load(Relaxed) }
    }
}
