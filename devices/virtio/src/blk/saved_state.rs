//! Saved form of a block device. Requests that nobody took are in the guest's ring, and the disk's content is the
//! disk's; what is left is what the guest believes about the disk, and which requests were taken and not done.

/// A block device.
#[derive(Clone, PartialEq, prost::Message)]
pub struct BlkStateV1 {
    /// Capacity in sectors of 512 bytes. Default: not checked.
    #[prost(uint64, optional, tag = "1")]
    pub capacity_sectors: Option<u64>,
    /// Whether the guest was told that the disk is read-only. Default: not checked.
    #[prost(bool, optional, tag = "2")]
    pub read_only: Option<bool>,
    /// Logical block size in bytes. Default: not checked.
    #[prost(uint32, optional, tag = "3")]
    pub block_size: Option<u32>,
    /// Requests that were taken and not handed back, which are carried out again. Default: none.
    #[prost(message, repeated, tag = "4")]
    pub taken: Vec<TakenRequestV1>,
}

/// A request that was taken out of its queue.
#[derive(Clone, Copy, PartialEq, prost::Message)]
pub struct TakenRequestV1 {
    /// Number of the queue. Default 0.
    #[prost(uint32, optional, tag = "1")]
    pub queue: Option<u32>,
    /// Number of its first descriptor. Default 0.
    #[prost(uint32, optional, tag = "2")]
    pub head: Option<u32>,
}
