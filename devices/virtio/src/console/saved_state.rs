//! Saved form of a console.

/// A console.
#[derive(Clone, PartialEq, prost::Message)]
pub struct ConsoleStateV1 {
    /// Window width in characters. Default 0 (unknown).
    #[prost(uint32, optional, tag = "1")]
    pub columns: Option<u32>,
    /// Window height in characters. Default 0 (unknown).
    #[prost(uint32, optional, tag = "2")]
    pub rows: Option<u32>,
    /// Input that the guest has not received, oldest first; what exceeds the backlog is dropped. Default empty.
    #[prost(bytes = "vec", optional, tag = "3")]
    pub backlog: Option<Vec<u8>>,
}
