//! Saved form of the reset registers.

/// Both registers.
#[derive(Clone, PartialEq, prost::Message)]
pub struct ResetControlStateV1 {
    /// Port CF9. Default 0.
    #[prost(uint32, optional, tag = "1")]
    pub cf9: Option<u32>,
    /// Port 92. Default 2: A20 on.
    #[prost(uint32, optional, tag = "2")]
    pub port92: Option<u32>,
}
