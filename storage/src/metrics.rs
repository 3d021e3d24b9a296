//! Counters of a disk, readable while it works.

use std::sync::atomic::{AtomicU64, Ordering};

/// Counters since the disk was opened. Each is exact; several read together are not one moment's.
#[derive(Debug, Default)]
pub struct DiskMetrics {
    reads: AtomicU64,
    read_bytes: AtomicU64,
    writes: AtomicU64,
    written_bytes: AtomicU64,
    flushes: AtomicU64,
    discards: AtomicU64,
    discarded_bytes: AtomicU64,
    zeroes: AtomicU64,
    zeroed_bytes: AtomicU64,
    errors: AtomicU64,
}

/// [`DiskMetrics`] as plain numbers. Operations and bytes count successes only; `errors` counts failed
/// operations of every kind, refused ones included.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[allow(missing_docs)]
pub struct DiskMetricsSnapshot {
    pub reads: u64,
    pub read_bytes: u64,
    pub writes: u64,
    pub written_bytes: u64,
    pub flushes: u64,
    pub discards: u64,
    pub discarded_bytes: u64,
    pub zeroes: u64,
    pub zeroed_bytes: u64,
    pub errors: u64,
}

impl DiskMetrics {
    /// Counts one operation of `bytes` bytes by its result, which is handed through.
    pub fn count<T, E>(
        &self,
        operation: crate::error::Operation,
        bytes: u64,
        result: Result<T, E>,
    ) -> Result<T, E> {
        use crate::error::Operation;
        let (operations, volume) = match operation {
            _ if result.is_err() => (&self.errors, None),
            Operation::Read => (&self.reads, Some(&self.read_bytes)),
            Operation::Write => (&self.writes, Some(&self.written_bytes)),
            Operation::Resize => return result,
            Operation::Flush => (&self.flushes, None),
            Operation::Discard => (&self.discards, Some(&self.discarded_bytes)),
            Operation::WriteZeroes => (&self.zeroes, Some(&self.zeroed_bytes)),
        };
        operations.fetch_add(1, Ordering::Relaxed);
        if let Some(volume) = volume {
            volume.fetch_add(bytes, Ordering::Relaxed);
        }
        result
    }

    /// The counters now.
    pub fn snapshot(&self) -> DiskMetricsSnapshot {
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        DiskMetricsSnapshot {
            reads: get(&self.reads),
            read_bytes: get(&self.read_bytes),
            writes: get(&self.writes),
            written_bytes: get(&self.written_bytes),
            flushes: get(&self.flushes),
            discards: get(&self.discards),
            discarded_bytes: get(&self.discarded_bytes),
            zeroes: get(&self.zeroes),
            zeroed_bytes: get(&self.zeroed_bytes),
            errors: get(&self.errors),
        }
    }
}
