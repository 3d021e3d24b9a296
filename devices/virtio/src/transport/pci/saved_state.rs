//! Saved form of a virtio device behind PCI.

use atoll_pci::saved_state::PciFunctionStateV1;

use crate::queue::saved_state::VirtQueueStateV1;

/// A virtio PCI function with its transport registers, queues and device.
#[derive(Clone, PartialEq, prost::Message)]
pub struct VirtioPciStateV1 {
    /// PCI configuration space and MSI-X. Default: power-on values.
    #[prost(message, optional, tag = "1")]
    pub pci: Option<PciFunctionStateV1>,
    /// `device_status`. Default 0 (reset).
    #[prost(uint32, optional, tag = "2")]
    pub status: Option<u32>,
    /// `device_feature_select`. Default 0.
    #[prost(uint32, optional, tag = "3")]
    pub device_feature_select: Option<u32>,
    /// `driver_feature_select`. Default 0.
    #[prost(uint32, optional, tag = "4")]
    pub driver_feature_select: Option<u32>,
    /// Features accepted by the driver. Default 0.
    #[prost(uint64, optional, tag = "5")]
    pub driver_features: Option<u64>,
    /// `queue_select`. Default 0.
    #[prost(uint32, optional, tag = "6")]
    pub queue_select: Option<u32>,
    /// `config_msix_vector`. Default 0xffff (none).
    #[prost(uint32, optional, tag = "7")]
    pub config_vector: Option<u32>,
    /// `config_generation`. Default 0.
    #[prost(uint32, optional, tag = "8")]
    pub generation: Option<u32>,
    /// ISR status. Default 0.
    #[prost(uint32, optional, tag = "9")]
    pub isr: Option<u32>,
    /// Queues in order; missing ones are not enabled.
    #[prost(message, repeated, tag = "10")]
    pub queues: Vec<VirtQueueStateV1>,
    /// The device's own state, encoded by the device. Default empty.
    #[prost(bytes = "vec", optional, tag = "11")]
    pub device: Option<Vec<u8>>,
}
