//! What the interval timer counts.

/// Counters of the interval timer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PitMetrics {
    /// Interrupts of channel 0.
    pub ticks: u64,
    /// Those raised while more than one was due, because the host was late.
    pub made_up: u64,
    /// Due ones that were never raised, because the backlog was too long.
    pub dropped: u64,
}
