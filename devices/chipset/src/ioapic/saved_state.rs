//! Saved form of the IOAPIC.

/// The IOAPIC.
#[derive(Clone, PartialEq, prost::Message)]
pub struct IoApicStateV1 {
    /// Identification register. Default 0.
    #[prost(uint32, optional, tag = "1")]
    pub id: Option<u32>,
    /// Index register. Default 0.
    #[prost(uint32, optional, tag = "2")]
    pub index: Option<u32>,
    /// Redirection entries in pin order, remote IRR included; missing ones are masked.
    #[prost(uint64, repeated, tag = "3")]
    pub entries: Vec<u64>,
    /// Levels of the pins, one bit each. Default 0.
    #[prost(uint32, optional, tag = "4")]
    pub lines: Option<u32>,
}
