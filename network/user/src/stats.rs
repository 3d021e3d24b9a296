//! Counters of a user network.

use serde::{Deserialize, Serialize};

macro_rules! counters {
    ($($(#[$doc:meta])* $name:ident,)*) => {
        /// What a user network has done since it began. Wraps around never in practice.
        #[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
        #[serde(default)]
        pub struct Stats {
            $($(#[$doc])* pub $name: u64,)*
        }

        impl Stats {
            /// Each counter with its name.
            pub fn iter(&self) -> impl Iterator<Item = (&'static str, u64)> {
                [$((stringify!($name), self.$name),)*].into_iter()
            }
        }
    };
}

counters! {
    /// Frames from the guest.
    frames_from_guest,
    /// Bytes of these.
    bytes_from_guest,
    /// Frames for the guest.
    frames_to_guest,
    /// Bytes of these.
    bytes_to_guest,
    /// Frames of the guest that are malformed or of no protocol that is spoken here.
    dropped_malformed,
    /// Packets of the guest with a wrong checksum.
    dropped_checksum,
    /// Packets of the guest with an address that is not its own.
    dropped_source,
    /// Packets of the guest for where it may not go.
    refused,
    /// Packets for the guest that found no room.
    dropped_full,
    /// Packets for the guest while its Ethernet address was not known.
    dropped_unknown_guest,
    /// Datagrams put together from fragments.
    reassembled,
    /// Fragments dropped: no room, too late, or overlapping.
    dropped_fragments,
    /// DHCP and DHCPv6 messages answered.
    dhcp_answers,
    /// Router advertisements sent.
    router_advertisements,
    /// DNS queries taken.
    dns_queries,
    /// DNS answers given.
    dns_answers,
    /// DNS queries that no resolver answered.
    dns_failures,
    /// UDP flows opened.
    udp_flows_opened,
    /// UDP flows at present.
    udp_flows,
    /// UDP flows that made room for others.
    udp_flows_evicted,
    /// TCP flows at present.
    tcp_flows,
    /// ICMP echo requests answered or passed on.
    echo_requests,
    /// ICMP errors told to the guest.
    icmp_errors,
}
