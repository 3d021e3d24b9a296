//! Saved form of the POST code registers.

/// Ports 80-8F.
#[derive(Clone, PartialEq, prost::Message)]
pub struct PostPortStateV1 {
    /// One byte a port; missing ones are zero.
    #[prost(bytes = "vec", optional, tag = "1")]
    pub bytes: Option<Vec<u8>>,
}
