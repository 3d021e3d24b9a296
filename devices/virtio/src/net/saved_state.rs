//! Saved form of a network device.

/// A network device.
#[derive(Clone, PartialEq, prost::Message)]
pub struct NetStateV1 {
    /// The guest's present address, 6 bytes. Default: the device's own.
    #[prost(bytes = "vec", optional, tag = "1")]
    pub mac: Option<Vec<u8>>,
    /// Most pairs of queues. Default: not checked.
    #[prost(uint32, optional, tag = "2")]
    pub max_pairs: Option<u32>,
    /// Pairs in use. Default 1.
    #[prost(uint32, optional, tag = "3")]
    pub active_pairs: Option<u32>,
    /// MTU told to the guest, 0 for none. Default: not checked.
    #[prost(uint32, optional, tag = "4")]
    pub mtu: Option<u32>,
    /// Guest offloads that the driver chose, as feature bits. Default: all that it negotiated.
    #[prost(uint64, optional, tag = "5")]
    pub offloads: Option<u64>,
    /// Whether the link was not taken down by hand. Default true.
    #[prost(bool, optional, tag = "6")]
    pub link_up: Option<bool>,
    /// Whether the guest has been asked to announce itself and has not answered. Default false.
    #[prost(bool, optional, tag = "7")]
    pub announce: Option<bool>,
    /// Receive modes: bit 0 promiscuous, 1 all multicast, 2 all unicast, 3 no multicast, 4 no unicast,
    /// 5 no broadcast. Default 1.
    #[prost(uint32, optional, tag = "8")]
    pub receive_modes: Option<u32>,
    /// Further unicast addresses, 6 bytes each. Default none.
    #[prost(bytes = "vec", optional, tag = "9")]
    pub unicast: Option<Vec<u8>>,
    /// More unicast addresses were given than the device keeps: all pass. Default false.
    #[prost(bool, optional, tag = "10")]
    pub unicast_overflow: Option<bool>,
    /// Multicast addresses, 6 bytes each. Default none.
    #[prost(bytes = "vec", optional, tag = "11")]
    pub multicast: Option<Vec<u8>>,
    /// More multicast addresses were given than the device keeps: all pass. Default false.
    #[prost(bool, optional, tag = "12")]
    pub multicast_overflow: Option<bool>,
    /// VLANs that pass: 4096 bits, VLAN 0 in bit 0 of byte 0. Default none.
    #[prost(bytes = "vec", optional, tag = "13")]
    pub vlans: Option<Vec<u8>>,
}
