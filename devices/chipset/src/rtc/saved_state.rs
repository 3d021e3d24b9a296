//! Saved form of the real-time clock.

use super::{Inner, REG_D};

/// The clock and its memory.
#[derive(Clone, PartialEq, prost::Message)]
pub struct RtcStateV1 {
    /// 256 bytes of memory, registers A to C included. Default: what a new machine has.
    #[prost(bytes = "vec", optional, tag = "1")]
    pub cmos: Option<Vec<u8>>,
    /// Index of the first bank. Default 0.
    #[prost(uint32, optional, tag = "2")]
    pub index: Option<u32>,
    /// Index of the second bank. Default 0.
    #[prost(uint32, optional, tag = "3")]
    pub extended_index: Option<u32>,
    /// Bit 7 of port 70. Default false.
    #[prost(bool, optional, tag = "4")]
    pub nmi_masked: Option<bool>,
    /// RTC time minus wall-clock time in ns. Default 0.
    #[prost(sint64, optional, tag = "5")]
    pub offset: Option<i64>,
}

impl Inner {
    pub(super) fn save(&self) -> RtcStateV1 {
        RtcStateV1 {
            cmos: Some(self.cmos.to_vec()),
            index: Some(u32::from(self.index[0])),
            extended_index: Some(u32::from(self.index[1])),
            nmi_masked: Some(self.nmi_masked),
            offset: Some(self.offset),
        }
    }

    pub(super) fn take_over(&mut self, s: &RtcStateV1) {
        for (to, from) in self.cmos.iter_mut().zip(s.cmos.iter().flatten()) {
            *to = *from;
        }
        self.cmos[REG_D] = 0x80;
        self.index = [s.index.unwrap_or(0) as u8 & 0x7f, s.extended_index.unwrap_or(0) as u8 & 0x7f];
        self.nmi_masked = s.nmi_masked.unwrap_or(false);
        self.offset = s.offset.unwrap_or(0);
    }
}
