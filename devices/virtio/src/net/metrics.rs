//! Counters of a network device.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

/// Counters since the device was made. "Sent" is from the guest's side.
#[derive(Debug, Default)]
pub struct NetMetrics {
    pub(super) sent_frames: AtomicU64,
    pub(super) sent_bytes: AtomicU64,
    pub(super) send_malformed: AtomicU64,
    pub(super) send_link_down: AtomicU64,
    pub(super) send_failed: AtomicU64,
    pub(super) send_full: AtomicU64,
    pub(super) send_throttled: AtomicU64,
    pub(super) received_frames: AtomicU64,
    pub(super) received_bytes: AtomicU64,
    pub(super) received_buffers: AtomicU64,
    pub(super) receive_malformed: AtomicU64,
    pub(super) receive_unfinished: AtomicU64,
    pub(super) receive_filtered: AtomicU64,
    pub(super) receive_too_large: AtomicU64,
    pub(super) receive_link_down: AtomicU64,
    pub(super) receive_no_buffers: AtomicU64,
    pub(super) receive_throttled: AtomicU64,
    pub(super) checksums_finished: AtomicU64,
    pub(super) controls: AtomicU64,
    pub(super) controls_refused: AtomicU64,
}

/// The counters at one moment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct NetMetricsSnapshot {
    /// Frames that the port took.
    pub sent_frames: u64,
    /// Their bytes.
    pub sent_bytes: u64,
    /// Frames of the guest dropped because their length or header cannot be meant.
    pub send_malformed: u64,
    /// Frames of the guest dropped because the link is down.
    pub send_link_down: u64,
    /// Frames of the guest dropped because the port has failed.
    pub send_failed: u64,
    /// Times that the port had no room and a frame waited.
    pub send_full: u64,
    /// Times that a frame of the guest waited for the throttle.
    pub send_throttled: u64,
    /// Frames that the guest got.
    pub received_frames: u64,
    /// Their bytes.
    pub received_bytes: u64,
    /// The guest's buffers that they took.
    pub received_buffers: u64,
    /// Frames for the guest dropped because their length or header cannot be meant.
    pub receive_malformed: u64,
    /// Frames for the guest dropped because they are segmented in a way that it does not take.
    pub receive_unfinished: u64,
    /// Frames for the guest dropped by address or VLAN.
    pub receive_filtered: u64,
    /// Frames for the guest dropped because they exceed its MTU or its buffers.
    pub receive_too_large: u64,
    /// Frames for the guest dropped because the link is down.
    pub receive_link_down: u64,
    /// Times that a frame waited because the guest had no buffers for it.
    pub receive_no_buffers: u64,
    /// Times that a frame for the guest waited for the throttle.
    pub receive_throttled: u64,
    /// Checksums computed for a guest that takes only finished frames.
    pub checksums_finished: u64,
    /// Control commands carried out.
    pub controls: u64,
    /// Control commands answered with an error.
    pub controls_refused: u64,
}

impl NetMetrics {
    pub(super) fn add(counter: &AtomicU64, n: u64) {
        counter.fetch_add(n, Relaxed);
    }

    /// Reads all counters.
    pub fn snapshot(&self) -> NetMetricsSnapshot {
        let get = |c: &AtomicU64| c.load(Relaxed);
        NetMetricsSnapshot {
            sent_frames: get(&self.sent_frames),
            sent_bytes: get(&self.sent_bytes),
            send_malformed: get(&self.send_malformed),
            send_link_down: get(&self.send_link_down),
            send_failed: get(&self.send_failed),
            send_full: get(&self.send_full),
            send_throttled: get(&self.send_throttled),
            received_frames: get(&self.received_frames),
            received_bytes: get(&self.received_bytes),
            received_buffers: get(&self.received_buffers),
            receive_malformed: get(&self.receive_malformed),
            receive_unfinished: get(&self.receive_unfinished),
            receive_filtered: get(&self.receive_filtered),
            receive_too_large: get(&self.receive_too_large),
            receive_link_down: get(&self.receive_link_down),
            receive_no_buffers: get(&self.receive_no_buffers),
            receive_throttled: get(&self.receive_throttled),
            checksums_finished: get(&self.checksums_finished),
            controls: get(&self.controls),
            controls_refused: get(&self.controls_refused),
        }
    }
}
