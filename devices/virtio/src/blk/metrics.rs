//! Counters of a block device, as the guest asked for things. The disk counts what reached it.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

/// Counters since the device was made.
#[derive(Debug, Default)]
pub struct BlkMetrics {
    pub(super) reads: AtomicU64,
    pub(super) read_bytes: AtomicU64,
    pub(super) writes: AtomicU64,
    pub(super) written_bytes: AtomicU64,
    pub(super) flushes: AtomicU64,
    pub(super) discards: AtomicU64,
    pub(super) zeroes: AtomicU64,
    pub(super) identifications: AtomicU64,
    pub(super) refused: AtomicU64,
    pub(super) errors: AtomicU64,
    pub(super) kept: AtomicU64,
}

/// The counters at one moment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct BlkMetricsSnapshot {
    /// Reads that succeeded.
    pub reads: u64,
    /// Their bytes.
    pub read_bytes: u64,
    /// Writes that succeeded.
    pub writes: u64,
    /// Their bytes.
    pub written_bytes: u64,
    /// Flushes that succeeded.
    pub flushes: u64,
    /// Discard requests that succeeded.
    pub discards: u64,
    /// Write-zeroes requests that succeeded.
    pub zeroes: u64,
    /// Requests for the serial number.
    pub identifications: u64,
    /// Requests that the device does not have, or whose form or range is wrong.
    pub refused: u64,
    /// Requests that the disk failed.
    pub errors: u64,
    /// Times that a request was kept because of an error of the host.
    pub kept: u64,
}

impl BlkMetrics {
    pub(super) fn add(counter: &AtomicU64, n: u64) {
        counter.fetch_add(n, Relaxed);
    }

    /// Reads all counters.
    pub fn snapshot(&self) -> BlkMetricsSnapshot {
        let get = |c: &AtomicU64| c.load(Relaxed);
        BlkMetricsSnapshot {
            reads: get(&self.reads),
            read_bytes: get(&self.read_bytes),
            writes: get(&self.writes),
            written_bytes: get(&self.written_bytes),
            flushes: get(&self.flushes),
            discards: get(&self.discards),
            zeroes: get(&self.zeroes),
            identifications: get(&self.identifications),
            refused: get(&self.refused),
            errors: get(&self.errors),
            kept: get(&self.kept),
        }
    }
}
