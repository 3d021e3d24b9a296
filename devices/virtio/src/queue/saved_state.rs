//! Saved form of one queue.

/// One virtqueue: its registers and its positions.
#[derive(Clone, PartialEq, prost::Message)]
pub struct VirtQueueStateV1 {
    /// Entries the driver chose. Default: the largest size.
    #[prost(uint32, optional, tag = "1")]
    pub size: Option<u32>,
    /// Whether the driver enabled it. Default false.
    #[prost(bool, optional, tag = "2")]
    pub enabled: Option<bool>,
    /// MSI-X vector. Default 0xffff (none).
    #[prost(uint32, optional, tag = "3")]
    pub vector: Option<u32>,
    /// Guest-physical address of the descriptor table. Default 0.
    #[prost(uint64, optional, tag = "4")]
    pub desc: Option<u64>,
    /// Guest-physical address of the available ring. Default 0.
    #[prost(uint64, optional, tag = "5")]
    pub avail: Option<u64>,
    /// Guest-physical address of the used ring. Default 0.
    #[prost(uint64, optional, tag = "6")]
    pub used: Option<u64>,
    /// Index of the next request to take. Default 0.
    #[prost(uint32, optional, tag = "7")]
    pub next_avail: Option<u32>,
    /// Index of the next request to hand back. Default 0.
    #[prost(uint32, optional, tag = "8")]
    pub next_used: Option<u32>,
}
