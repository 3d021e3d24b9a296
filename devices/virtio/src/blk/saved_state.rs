//! Saved form of a block device. Requests in flight are in the guest's ring, and the disk's content is the
//! disk's; what is left is what the guest believes about the disk.

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
}
