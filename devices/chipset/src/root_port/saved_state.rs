//! Saved form of a root port.

use atoll_pci::saved_state::PciFunctionStateV1;

/// A root port and its slot.
#[derive(Clone, PartialEq, prost::Message)]
pub struct RootPortStateV1 {
    /// Its PCI function, slot registers included. Default: power-on state.
    #[prost(message, optional, tag = "1")]
    pub function: Option<PciFunctionStateV1>,
    /// The attention button was pressed and the guest has not let go of the device. Default false.
    #[prost(bool, optional, tag = "2")]
    pub unplug_requested: Option<bool>,
}
