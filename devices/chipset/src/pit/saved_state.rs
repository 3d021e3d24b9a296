//! Saved form of the interval timer.

use super::channel::{Access, Channel};

/// The timer and port 61.
#[derive(Clone, PartialEq, prost::Message)]
pub struct PitStateV1 {
    /// The three counters; missing ones are in power-on state.
    #[prost(message, repeated, tag = "1")]
    pub channels: Vec<PitChannelStateV1>,
    /// Ticks of channel 0 raised since it was loaded. Default 0.
    #[prost(uint64, optional, tag = "2")]
    pub delivered: Option<u64>,
    /// Port 61, bits 3..0. Default 0.
    #[prost(uint32, optional, tag = "3")]
    pub control: Option<u32>,
}

/// One counter. Every default is 0 or false unless it says otherwise.
#[derive(Clone, PartialEq, prost::Message)]
pub struct PitChannelStateV1 {
    /// Mode 0-5.
    #[prost(uint32, optional, tag = "1")]
    pub mode: Option<u32>,
    /// Counts in decimal digits.
    #[prost(bool, optional, tag = "2")]
    pub bcd: Option<bool>,
    /// Access: 1 low byte, 2 high byte, 3 both. Default 3.
    #[prost(uint32, optional, tag = "3")]
    pub access: Option<u32>,
    /// Count of the current cycle, 1-65536; 0 while none was written since the mode.
    #[prost(uint32, optional, tag = "4")]
    pub count: Option<u32>,
    /// Count for the next cycle, 1-65536; 0 when there is none.
    #[prost(uint32, optional, tag = "5")]
    pub next_count: Option<u32>,
    /// Input clocks from guest time zero to the start of the current cycle.
    #[prost(uint64, optional, tag = "6")]
    pub start: Option<u64>,
    /// Input clocks counted when the gate closed; missing while counting.
    #[prost(uint64, optional, tag = "7")]
    pub frozen: Option<u64>,
    /// Modes 1 and 5: the gate has triggered the counter.
    #[prost(bool, optional, tag = "8")]
    pub triggered: Option<bool>,
    /// Gate. Default true.
    #[prost(bool, optional, tag = "9")]
    pub gate: Option<bool>,
    /// Low byte of a count that is half written, plus 256.
    #[prost(uint32, optional, tag = "10")]
    pub half_written: Option<u32>,
    /// The next unlatched read of a 16-bit count gives the high byte.
    #[prost(bool, optional, tag = "11")]
    pub read_high: Option<bool>,
    /// Latched count bytes still to be read, in order.
    #[prost(bytes = "vec", optional, tag = "12")]
    pub latched_count: Option<Vec<u8>>,
    /// Latched status, plus 256.
    #[prost(uint32, optional, tag = "13")]
    pub latched_status: Option<u32>,
    /// Periods that ended before `start`.
    #[prost(uint64, optional, tag = "14")]
    pub folded: Option<u64>,
}

impl Channel {
    pub(super) fn save(&self) -> PitChannelStateV1 {
        PitChannelStateV1 {
            mode: Some(u32::from(self.mode)),
            bcd: Some(self.bcd),
            access: Some(self.access as u32),
            count: Some(self.count),
            next_count: Some(self.next_count),
            start: Some(self.start),
            frozen: self.frozen,
            triggered: Some(self.triggered),
            gate: Some(self.gate),
            half_written: self.half_written.map(|b| u32::from(b) + 256),
            read_high: Some(self.read_high),
            latched_count: Some(self.latched_count.clone()),
            latched_status: self.latched_status.map(|b| u32::from(b) + 256),
            folded: Some(self.folded),
        }
    }

    pub(super) fn restored(s: &PitChannelStateV1) -> Self {
        let count = |v: Option<u32>| v.unwrap_or(0).min(0x1_0000);
        let byte = |v: Option<u32>| v.filter(|&v| v >= 256).map(|v| v as u8);
        let mut latched_count = s.latched_count.clone().unwrap_or_default();
        latched_count.truncate(2);
        Self {
            mode: s.mode.unwrap_or(0).min(5) as u8,
            bcd: s.bcd.unwrap_or(false),
            access: match s.access {
                Some(1) => Access::Low,
                Some(2) => Access::High,
                _ => Access::Both,
            },
            count: count(s.count),
            next_count: count(s.next_count),
            start: s.start.unwrap_or(0),
            folded: s.folded.unwrap_or(0),
            frozen: s.frozen,
            triggered: s.triggered.unwrap_or(false),
            gate: s.gate.unwrap_or(true),
            half_written: byte(s.half_written),
            read_high: s.read_high.unwrap_or(false),
            latched_count,
            latched_status: byte(s.latched_status),
        }
    }
}
