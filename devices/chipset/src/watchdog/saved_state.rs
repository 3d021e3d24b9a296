//! Saved form of the watchdog.

use atoll_pci::saved_state::PciFunctionStateV1;

/// The watchdog.
#[derive(Clone, PartialEq, prost::Message)]
pub struct WatchdogStateV1 {
    /// Its PCI function, which holds the configuration and lock registers. Default: power-on state.
    #[prost(message, optional, tag = "1")]
    pub function: Option<PciFunctionStateV1>,
    /// Preload values of both stages. Default 0xfffff.
    #[prost(uint32, repeated, tag = "2")]
    pub preload: Vec<u32>,
    /// Steps of the unlock sequence done. Default 0.
    #[prost(uint32, optional, tag = "3")]
    pub unlocked: Option<u32>,
    /// The last reset came from here. Default false.
    #[prost(bool, optional, tag = "4")]
    pub timed_out: Option<bool>,
    /// Stage that is running, 0 for none. Default 0.
    #[prost(uint32, optional, tag = "5")]
    pub stage: Option<u32>,
    /// Guest time in ns at which it is over. Default 0.
    #[prost(uint64, optional, tag = "6")]
    pub deadline: Option<u64>,
}
