//! Saved form of the host bridge.

use atoll_pci::saved_state::PciFunctionStateV1;

/// The host bridge: everything is in its configuration space.
#[derive(Clone, PartialEq, prost::Message)]
pub struct HostBridgeStateV1 {
    /// Its PCI function. Default: power-on state.
    #[prost(message, optional, tag = "1")]
    pub function: Option<PciFunctionStateV1>,
}
