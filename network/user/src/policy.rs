//! Where a guest may go.
//!
//! A guest reaches what an ordinary program of the same user reaches over the network, and nothing of the host's
//! loopback: not by any spelling of it, and not through an address that a kernel takes for it. The one way is the
//! gateway's address, when the machine was started with `host-loopback`.
//!
//! The host's own addresses on its networks are allowed, as they are to every other machine of these networks: a
//! service that listens on loopback alone is not reached through them.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use crate::config::Addresses;

/// The port of DNS.
pub const DNS_PORT: u16 = 53;

/// Where flows that a guest opens lead to.
pub trait Policy {
    /// Where a socket is connected for a guest that addresses `guest_dst`. `None`: refused.
    fn connect_to(&self, guest_dst: SocketAddr) -> Option<SocketAddr>;
}

/// The policy of a user network.
#[derive(Clone, Copy, Debug)]
pub struct NatPolicy {
    /// Addresses as the guest sees them.
    pub addresses: Addresses,
    /// Whether the gateway's address leads to the host's loopback.
    pub host_loopback: bool,
    /// Who answers DNS over TCP. May be on the host's loopback: the one thing there that every guest may reach, by
    /// the DNS server's address and port alone.
    pub resolver: Option<SocketAddr>,
}

impl NatPolicy {
    /// Whether a guest that addresses `guest_dst` is led to the host's loopback on purpose.
    pub fn means_loopback(&self, guest_dst: IpAddr) -> bool {
        self.host_loopback && self.addresses.is_gateway(guest_dst)
    }
}

impl Policy for NatPolicy {
    fn connect_to(&self, guest_dst: SocketAddr) -> Option<SocketAddr> {
        let address = guest_dst.ip();
        if guest_dst.port() == 0 {
            return None;
        }
        if self.means_loopback(address) {
            let loopback = match address {
                IpAddr::V4(_) => IpAddr::V4(Ipv4Addr::LOCALHOST),
                IpAddr::V6(_) => IpAddr::V6(Ipv6Addr::LOCALHOST),
            };
            return Some(SocketAddr::new(loopback, guest_dst.port()));
        }
        if self.addresses.is_dns(address) && guest_dst.port() == DNS_PORT {
            return self.resolver;
        }
        (!self.addresses.contains(address) && is_outside(address)).then_some(guest_dst)
    }
}

/// Whether an address may be connected to for a guest: an ordinary unicast address that no kernel takes for the
/// host's loopback, its link or a group.
pub fn is_outside(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(address) => is_outside_v4(address),
        IpAddr::V6(address) => is_outside_v6(address),
    }
}

fn is_outside_v4(address: Ipv4Addr) -> bool {
    let [first, ..] = address.octets();
    // "This network" (0/8: Linux takes 0.0.0.0 for loopback), loopback, link-local, and from 224 on multicast,
    // reserved and broadcast.
    first != 0 && first < 224 && !address.is_loopback() && !address.is_link_local()
}

fn is_outside_v6(address: Ipv6Addr) -> bool {
    let segments = address.segments();
    let embedded = |high: u16, low: u16| Ipv4Addr::from(u32::from(high) << 16 | u32::from(low));
    match segments {
        // Unspecified, loopback, IPv4-compatible, IPv4-mapped (a v6 socket would speak IPv4) and
        // IPv4-translated (RFC 2765): nothing of ::/64 is anybody's address.
        [0, 0, 0, 0, ..] => false,
        // NAT64 (RFC 6052) and 6to4 (RFC 3056): as far as the embedded IPv4 address.
        [0x64, 0xff9b, 0, 0, 0, 0, high, low] => is_outside_v4(embedded(high, low)),
        [0x2002, high, low, ..] => is_outside_v4(embedded(high, low)),
        // Link-local and multicast.
        [first, ..] => first & 0xffc0 != 0xfe80 && first & 0xff00 != 0xff00,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_networks_own_addresses_lead_where_they_were_told_to() {
        let addresses = crate::config::UserNetConfig::default().check().unwrap();
        let resolver = Some("127.0.0.53:53".parse().unwrap());
        let closed = NatPolicy { addresses, host_loopback: false, resolver };
        let open = NatPolicy { host_loopback: true, ..closed };
        let to = |policy: &NatPolicy, text: &str| {
            policy.connect_to(text.parse().unwrap()).map(|address| address.to_string())
        };
        for (address, loopback) in [
            ("10.0.2.2:80", "127.0.0.1:80"),
            ("[fe80::2]:80", "[::1]:80"),
            ("[fd61:746f:6c6c::2]:80", "[::1]:80"),
        ] {
            assert_eq!(to(&closed, address), None);
            assert_eq!(to(&open, address).as_deref(), Some(loopback));
        }
        for policy in [closed, open] {
            assert_eq!(to(&policy, "10.0.2.3:53").as_deref(), Some("127.0.0.53:53"));
            assert_eq!(to(&policy, "[fd61:746f:6c6c::3]:53").as_deref(), Some("127.0.0.53:53"));
            for refused in ["10.0.2.3:54", "10.0.2.9:80", "10.0.2.255:80", "127.0.0.1:80", "1.1.1.1:0"] {
                assert_eq!(to(&policy, refused), None, "{refused}");
            }
            assert_eq!(to(&policy, "1.1.1.1:443").as_deref(), Some("1.1.1.1:443"));
        }
    }

    #[test]
    fn loopback_has_no_spelling_that_is_outside() {
        let inside = [
            "0.0.0.0",
            "0.1.2.3",
            "127.0.0.1",
            "127.255.255.254",
            "169.254.169.254",
            "224.0.0.1",
            "255.255.255.255",
            "240.0.0.1",
            "::",
            "::1",
            "::127.0.0.1",
            "::ffff:127.0.0.1",
            "::ffff:192.0.2.1",
            "::ffff:0:127.0.0.1",
            "64:ff9b::127.0.0.1",
            "64:ff9b::",
            "2002:7f00:1::1",
            "fe80::1",
            "febf::1",
            "ff02::1",
        ];
        for text in inside {
            assert!(!is_outside(text.parse().unwrap()), "{text}");
        }
        let outside = [
            "1.1.1.1",
            "10.0.0.1",
            "192.168.1.1",
            "100.64.0.1",
            "223.255.255.255",
            "2001:db8::1",
            "fd00::2",
            "fec0::1",
            "64:ff9b::1.1.1.1",
            "2002:101:101::1",
        ];
        for text in outside {
            assert!(is_outside(text.parse().unwrap()), "{text}");
        }
    }
}
