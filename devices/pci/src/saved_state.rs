//! Saved forms of this crate's state.

/// Why a PCI function did not accept a saved state.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum RestoreError {
    /// The saved function had more MSI-X vectors.
    #[error(
        "saved MSI-X table has {saved} vectors, this function has {have}; use the device options it was saved with"
    )]
    MsixVectors {
        /// Vectors in the saved state.
        saved: usize,
        /// Vectors of the function.
        have: usize,
    },
    /// The saved function is of another kind.
    #[error(
        "saved PCI function is {saved:08x}, this one is {have:08x} (device id, vendor id); use the devices it was saved with"
    )]
    Identity {
        /// Device and vendor id in the saved state.
        saved: u32,
        /// Device and vendor id of the function.
        have: u32,
    },
}

impl From<RestoreError> for atoll_machine::state::RestoreError {
    fn from(error: RestoreError) -> Self {
        Self::invalid("function", error.to_string())
    }
}

/// One MSI-X table entry.
#[derive(Clone, PartialEq, prost::Message)]
pub struct MsixEntryV1 {
    /// Message address. Default 0.
    #[prost(uint64, optional, tag = "1")]
    pub address: Option<u64>,
    /// Message data. Default 0.
    #[prost(uint32, optional, tag = "2")]
    pub data: Option<u32>,
    /// Vector control. Default 1 (masked).
    #[prost(uint32, optional, tag = "3")]
    pub control: Option<u32>,
}

/// An MSI-X table.
#[derive(Clone, PartialEq, prost::Message)]
pub struct MsixStateV1 {
    /// Entries in order; missing ones are masked.
    #[prost(message, repeated, tag = "1")]
    pub entries: Vec<MsixEntryV1>,
    /// Pending bits, 64 vectors a word; missing words are zero.
    #[prost(uint64, repeated, tag = "2")]
    pub pending: Vec<u64>,
}

/// Configuration space and interrupts of one function.
#[derive(Clone, PartialEq, prost::Message)]
pub struct PciFunctionStateV1 {
    /// Configuration space from byte 0; trailing zeros may be missing. Bits that software cannot change are
    /// used only to check the identity. Default: power-on values.
    #[prost(bytes = "vec", optional, tag = "1")]
    pub config: Option<Vec<u8>>,
    /// MSI-X table. Default: all masked, nothing pending.
    #[prost(message, optional, tag = "2")]
    pub msix: Option<MsixStateV1>,
    /// MSI pending bits. Default 0.
    #[prost(uint32, optional, tag = "3")]
    pub msi_pending: Option<u32>,
    /// Level of the INTx wire before the disable bit. Default false.
    #[prost(bool, optional, tag = "4")]
    pub intx: Option<bool>,
}

/// Configuration mechanism #1.
#[derive(Clone, PartialEq, prost::Message)]
pub struct ConfigPortsStateV1 {
    /// The address latched at port CF8. Default 0.
    #[prost(uint32, optional, tag = "1")]
    pub address: Option<u32>,
}
