//! What a serial port counts.

/// Counters of one serial port.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct UartMetrics {
    /// Bytes that the guest sent.
    pub sent: u64,
    /// Bytes that arrived for the guest.
    pub received: u64,
}
