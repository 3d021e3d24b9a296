//! What a user network is told, and the addresses that follow from it.
//!
//! # Addresses as the guest sees them
//!
//! ```text
//!              IPv4 (10.0.2.0/24)      IPv6 (fd61:746f:6c6c::/64)
//!   gateway    10.0.2.2                fe80::2 and fd61:746f:6c6c::2
//!   DNS        10.0.2.3                fd61:746f:6c6c::3
//!   guest      10.0.2.15               fd61:746f:6c6c::15 (DHCPv6), and what it makes up itself (SLAAC)
//! ```
//!
//! The IPv6 prefix is a unique local one (RFC 4193) whose global identifier spells "atoll"; it replaces the
//! deprecated fec0::/64 of older tools. Hosts prefer IPv4 over such an address for destinations on the internet
//! (RFC 6724), which is right behind a translator.
//!
//! # MTU
//!
//! 1,500 unless said otherwise. TCP does not need more: guests take and give segments of 64 KiB as one frame
//! (segmentation offload), whatever the MTU. A guest with an MTU of 65,520 believes that so much reaches
//! everybody: its tunnels and QUIC would send datagrams that the host must fragment on the way out, and fragments
//! get lost on the internet. Measured with Linux as guest, on two shared processors of 2026: 64 MiB from the host take
//! 0.32 s at 1,500 and 0.29 s at 65,520. A guest without segmentation offload gains from the large MTU (`mtu`).

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use serde::{Deserialize, Serialize};

use crate::wire::Mac;

/// The IPv6 prefix unless another is given, 64 bits.
pub const DEFAULT_PREFIX: Ipv6Addr = Ipv6Addr::new(0xfd61, 0x746f, 0x6c6c, 0, 0, 0, 0, 0);
/// The gateway's link-local address.
pub const GATEWAY_LINK_LOCAL: Ipv6Addr = Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 2);
/// The network's side's Ethernet address: locally administered.
pub const GATEWAY_MAC: Mac = [0x52, 0x55, 0x0a, 0x00, 0x02, 0x02];

/// MTU unless another is given, bytes.
pub const DEFAULT_MTU: u16 = 1500;
/// Least MTU: what every IPv4 host takes.
pub const MIN_MTU: u16 = 576;
/// Least MTU with IPv6 (RFC 8200, section 5).
pub const MIN_MTU_IPV6: u16 = 1280;
/// Most.
pub const MAX_MTU: u16 = 65_520;
/// Most flows unless said otherwise, of UDP and of TCP each.
pub const DEFAULT_MAX_FLOWS: usize = 4096;
/// Most forwards; each holds a descriptor for the life of the machine.
pub const MAX_FORWARDS: usize = 1024;
/// Most resolvers and search domains; what a C library looks at, and what fits into one DHCP message.
pub const MAX_RESOLVERS: usize = 3;
/// Most search domains.
pub const MAX_SEARCH: usize = 6;

/// Number of the gateway in the network.
const GATEWAY_HOST: u32 = 2;
/// Number of the DNS server in the network.
const DNS_HOST: u32 = 3;
/// Number of the guest in the network unless an address is given.
const GUEST_HOST: u32 = 15;
/// The guest's interface identifier in IPv6: looks like the IPv4 number.
const GUEST_HOST_V6: u64 = 0x15;

/// A transport protocol.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Protocol {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
}

impl fmt::Display for Protocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Tcp => "tcp",
            Self::Udp => "udp",
        })
    }
}

/// A port of the host that leads to the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Forward {
    /// Of which protocol.
    pub protocol: Protocol,
    /// Where the host listens. Loopback is the safe default of whoever fills this in.
    pub host: SocketAddr,
    /// The guest's address; its IPv4 address (IPv6 where IPv4 is off) when absent.
    pub guest: Option<IpAddr>,
    /// The guest's port.
    pub guest_port: u16,
}

impl fmt::Display for Forward {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}:", self.protocol, self.host)?;
        match self.guest {
            Some(guest) => write!(f, "{}", SocketAddr::new(guest, self.guest_port)),
            None => write!(f, "{}", self.guest_port),
        }
    }
}

/// What a user network is told. [`UserNetConfig::check`] says whether it can be.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct UserNetConfig {
    /// Names the network in messages: "net0".
    pub name: String,
    /// Whether there is IPv4.
    pub ipv4: bool,
    /// First address of the IPv4 network.
    pub network: Ipv4Addr,
    /// Bits that its addresses share, 8 to 27.
    pub network_bits: u8,
    /// The guest's IPv4 address; number 15 of the network when absent.
    pub address: Option<Ipv4Addr>,
    /// Whether there is IPv6.
    pub ipv6: bool,
    /// First address of the IPv6 prefix of 64 bits; [`DEFAULT_PREFIX`] when absent.
    pub prefix: Option<Ipv6Addr>,
    /// The guest's Ethernet address, when known: it has the guest's address whoever asks first.
    pub guest_mac: Option<Mac>,
    /// Bytes of the largest IP packet; [`DEFAULT_MTU`] when absent.
    pub mtu: Option<u16>,
    /// Whether the network has a DNS server.
    pub dns: bool,
    /// Servers that it asks; those of the host's resolv.conf when empty.
    pub dns_servers: Vec<IpAddr>,
    /// Whether the gateway's address reaches the host's loopback.
    pub host_loopback: bool,
    /// Ports of the host that lead to the guest.
    pub forwards: Vec<Forward>,
    /// Host name that DHCP tells the guest.
    pub hostname: Option<String>,
    /// Most flows of UDP and of TCP each.
    pub max_flows: usize,
    /// Pairs of rings.
    pub queue_pairs: u16,
}

impl Default for UserNetConfig {
    fn default() -> Self {
        Self {
            name: "net0".to_owned(),
            ipv4: true,
            network: Ipv4Addr::new(10, 0, 2, 0),
            network_bits: 24,
            address: None,
            ipv6: true,
            prefix: None,
            guest_mac: None,
            mtu: None,
            dns: true,
            dns_servers: Vec::new(),
            host_loopback: false,
            forwards: Vec::new(),
            hostname: None,
            max_flows: DEFAULT_MAX_FLOWS,
            queue_pairs: 1,
        }
    }
}

/// A configuration that cannot be; each message is one line for the user.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ConfigError {
    /// Neither family.
    #[error("a user network needs IPv4 or IPv6")]
    NoFamily,
    /// Not a network.
    #[error("{0}/{1} cannot be a guest's network; expected one such as 10.0.2.0/24, of 8 to 27 bits")]
    Network(Ipv4Addr, u8),
    /// Not a prefix.
    #[error("{0}/64 cannot be a guest's IPv6 prefix; expected one such as fd00:1:2:3::/64")]
    Prefix(Ipv6Addr),
    /// An address that is not the guest's to have.
    #[error(
        "address {0} cannot be a guest's in {1}/{2}: it must be inside, and not the network, gateway, DNS or broadcast address"
    )]
    Outside(IpAddr, IpAddr, u8),
    /// A family that is off.
    #[error("forward {0} leads to {1}, which is off")]
    FamilyOff(Forward, &'static str),
    /// A port that is none.
    #[error("forward {0}: port 0 is no port")]
    PortZero(Forward),
    /// Twice the same.
    #[error("forward {0} is given twice")]
    Twice(Forward),
    /// Too many.
    #[error("{0} forwards are more than {MAX_FORWARDS}")]
    TooMany(usize),
    /// Not an MTU.
    #[error("mtu {0} is outside {1} to {MAX_MTU} bytes")]
    Mtu(u16, u16),
    /// Nothing would pass.
    #[error("a user network needs at least one flow")]
    NoFlows,
}

impl UserNetConfig {
    /// Checks what does not depend on the host.
    pub fn check(&self) -> Result<Addresses, ConfigError> {
        if !self.ipv4 && !self.ipv6 {
            return Err(ConfigError::NoFamily);
        }
        if self.max_flows == 0 {
            return Err(ConfigError::NoFlows);
        }
        let min = if self.ipv6 { MIN_MTU_IPV6 } else { MIN_MTU };
        let mtu = self.mtu.unwrap_or(DEFAULT_MTU);
        if !(min..=MAX_MTU).contains(&mtu) {
            return Err(ConfigError::Mtu(mtu, min));
        }
        let v4 = self.ipv4.then(|| self.check_v4()).transpose()?;
        let v6 = self.ipv6.then(|| self.check_v6()).transpose()?;
        let addresses = Addresses { v4, v6, mtu, dns: self.dns };
        if self.forwards.len() > MAX_FORWARDS {
            return Err(ConfigError::TooMany(self.forwards.len()));
        }
        for (n, forward) in self.forwards.iter().enumerate() {
            addresses.check_forward(forward)?;
            let same = |other: &Forward| other.protocol == forward.protocol && other.host == forward.host;
            if self.forwards.iter().take(n).any(same) {
                return Err(ConfigError::Twice(*forward));
            }
        }
        Ok(addresses)
    }

    fn check_v4(&self) -> Result<Addresses4, ConfigError> {
        let error = ConfigError::Network(self.network, self.network_bits);
        let bits = self.network_bits;
        if !(8..=27).contains(&bits) || !crate::policy::is_outside(self.network.into()) {
            return Err(error);
        }
        let mask = u32::MAX << (32 - u32::from(bits));
        let first = self.network.to_bits();
        if first & !mask != 0 {
            return Err(error);
        }
        let host = |n: u32| Ipv4Addr::from_bits(first | n);
        let addresses = Addresses4 {
            network: self.network,
            bits,
            gateway: host(GATEWAY_HOST),
            dns: host(DNS_HOST),
            guest: self.address.unwrap_or(host(GUEST_HOST)),
        };
        if !addresses.is_for_guest(addresses.guest) {
            return Err(ConfigError::Outside(addresses.guest.into(), self.network.into(), bits));
        }
        Ok(addresses)
    }

    fn check_v6(&self) -> Result<Addresses6, ConfigError> {
        let prefix = self.prefix.unwrap_or(DEFAULT_PREFIX);
        let bits = prefix.to_bits();
        if bits as u64 != 0 || !crate::policy::is_outside(prefix.into()) {
            return Err(ConfigError::Prefix(prefix));
        }
        let host = |n: u64| Ipv6Addr::from_bits(bits | u128::from(n));
        Ok(Addresses6 { prefix, gateway: host(2), dns: host(3), guest: host(GUEST_HOST_V6) })
    }
}

/// IPv4 addresses as the guest sees them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Addresses4 {
    /// The network's first address.
    pub network: Ipv4Addr,
    /// Bits that its addresses share.
    pub bits: u8,
    /// Gateway and DHCP server.
    pub gateway: Ipv4Addr,
    /// DNS server.
    pub dns: Ipv4Addr,
    /// The guest's.
    pub guest: Ipv4Addr,
}

impl Addresses4 {
    /// The network's mask.
    pub fn mask(&self) -> Ipv4Addr {
        Ipv4Addr::from_bits(u32::MAX << (32 - u32::from(self.bits.clamp(1, 32))))
    }

    /// The network's last address.
    pub fn broadcast(&self) -> Ipv4Addr {
        Ipv4Addr::from_bits(self.network.to_bits() | !self.mask().to_bits())
    }

    /// Whether an address is in the network.
    pub fn contains(&self, address: Ipv4Addr) -> bool {
        address.to_bits() & self.mask().to_bits() == self.network.to_bits()
    }

    /// Whether an address may be a guest's.
    pub fn is_for_guest(&self, address: Ipv4Addr) -> bool {
        self.contains(address) && ![self.network, self.gateway, self.dns, self.broadcast()].contains(&address)
    }
}

/// IPv6 addresses as the guest sees them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Addresses6 {
    /// The prefix' first address.
    pub prefix: Ipv6Addr,
    /// The gateway's, besides [`GATEWAY_LINK_LOCAL`].
    pub gateway: Ipv6Addr,
    /// DNS server.
    pub dns: Ipv6Addr,
    /// What DHCPv6 gives the guest.
    pub guest: Ipv6Addr,
}

impl Addresses6 {
    /// Whether an address has the prefix.
    pub fn contains(&self, address: Ipv6Addr) -> bool {
        address.to_bits() >> 64 == self.prefix.to_bits() >> 64
    }

    /// Whether an address may be a guest's.
    pub fn is_for_guest(&self, address: Ipv6Addr) -> bool {
        self.contains(address) && ![self.prefix, self.gateway, self.dns].contains(&address)
    }

    /// Whether an address is one of the network's own.
    pub fn is_own(&self, address: Ipv6Addr) -> bool {
        [self.gateway, self.dns, GATEWAY_LINK_LOCAL].contains(&address)
    }
}

/// The addresses of a network as its guest sees them, and its MTU.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Addresses {
    /// IPv4, unless off.
    pub v4: Option<Addresses4>,
    /// IPv6, unless off.
    pub v6: Option<Addresses6>,
    /// Bytes of the largest IP packet.
    pub mtu: u16,
    /// Whether there is a DNS server.
    pub dns: bool,
}

impl Addresses {
    /// Whether an address is one of the network's own: gateway or DNS server.
    pub fn is_own(&self, address: IpAddr) -> bool {
        match address {
            IpAddr::V4(address) => self.v4.is_some_and(|v4| address == v4.gateway || address == v4.dns),
            IpAddr::V6(address) => self.v6.is_some_and(|v6| v6.is_own(address)),
        }
    }

    /// Whether an address is the gateway's.
    pub fn is_gateway(&self, address: IpAddr) -> bool {
        match address {
            IpAddr::V4(address) => self.v4.is_some_and(|v4| address == v4.gateway),
            IpAddr::V6(address) => {
                self.v6.is_some_and(|v6| address == v6.gateway || address == GATEWAY_LINK_LOCAL)
            }
        }
    }

    /// Whether an address is the DNS server's.
    pub fn is_dns(&self, address: IpAddr) -> bool {
        self.dns
            && match address {
                IpAddr::V4(address) => self.v4.is_some_and(|v4| address == v4.dns),
                IpAddr::V6(address) => self.v6.is_some_and(|v6| address == v6.dns),
            }
    }

    /// Whether an address is in the guest's network (or on its link), whoever's it is.
    pub fn contains(&self, address: IpAddr) -> bool {
        match address {
            IpAddr::V4(address) => self.v4.is_some_and(|v4| v4.contains(address)),
            IpAddr::V6(address) => {
                address.is_unicast_link_local() || self.v6.is_some_and(|v6| v6.contains(address))
            }
        }
    }

    /// Whether an address may be a guest's as the source of its packets.
    pub fn may_be_source(&self, address: IpAddr) -> bool {
        match address {
            IpAddr::V4(address) => self.v4.is_some_and(|v4| v4.is_for_guest(address)),
            IpAddr::V6(address) => self.v6.is_some_and(|v6| {
                v6.is_for_guest(address) || (address.is_unicast_link_local() && address != GATEWAY_LINK_LOCAL)
            }),
        }
    }

    /// The gateway's address of a family, if there is the family.
    pub fn gateway(&self, v6: bool) -> Option<IpAddr> {
        if v6 { self.v6.map(|v6| v6.gateway.into()) } else { self.v4.map(|v4| v4.gateway.into()) }
    }

    /// Where a forward leads.
    pub fn guest_of(&self, forward: &Forward) -> Option<SocketAddr> {
        let default = || match (self.v4, self.v6) {
            (Some(v4), _) => Some(IpAddr::V4(v4.guest)),
            (None, v6) => v6.map(|v6| IpAddr::V6(v6.guest)),
        };
        Some(SocketAddr::new(forward.guest.or_else(default)?, forward.guest_port))
    }

    /// Whether a forward can be.
    pub fn check_forward(&self, forward: &Forward) -> Result<(), ConfigError> {
        if forward.guest_port == 0 || forward.host.port() == 0 {
            return Err(ConfigError::PortZero(*forward));
        }
        match (forward.guest, self.v4, self.v6) {
            (None, ..) => Ok(()),
            (Some(IpAddr::V4(_)), None, _) => Err(ConfigError::FamilyOff(*forward, "IPv4")),
            (Some(IpAddr::V6(_)), _, None) => Err(ConfigError::FamilyOff(*forward, "IPv6")),
            (Some(IpAddr::V4(address)), Some(v4), _) if !v4.is_for_guest(address) => {
                Err(ConfigError::Outside(address.into(), v4.network.into(), v4.bits))
            }
            (Some(IpAddr::V6(address)), _, Some(v6)) if !v6.is_for_guest(address) => {
                Err(ConfigError::Outside(address.into(), v6.prefix.into(), 64))
            }
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn forward(host: &str, guest: Option<&str>) -> Forward {
        Forward {
            protocol: Protocol::Tcp,
            host: host.parse().unwrap(),
            guest: guest.map(|guest| guest.parse().unwrap()),
            guest_port: 22,
        }
    }

    #[test]
    fn the_default_is_the_network_that_people_know() {
        let addresses = UserNetConfig::default().check().unwrap();
        let v4 = addresses.v4.unwrap();
        assert_eq!(v4.gateway, Ipv4Addr::new(10, 0, 2, 2));
        assert_eq!(v4.dns, Ipv4Addr::new(10, 0, 2, 3));
        assert_eq!(v4.guest, Ipv4Addr::new(10, 0, 2, 15));
        assert_eq!(v4.broadcast(), Ipv4Addr::new(10, 0, 2, 255));
        assert_eq!(addresses.v6.unwrap().guest, "fd61:746f:6c6c::15".parse::<Ipv6Addr>().unwrap());
        assert_eq!(addresses.mtu, 1500);
    }

    #[test]
    fn what_cannot_be_is_refused_in_one_line() {
        let base = UserNetConfig::default;
        let bad = [
            UserNetConfig { ipv4: false, ipv6: false, ..base() },
            UserNetConfig { network: Ipv4Addr::new(10, 0, 2, 1), ..base() },
            UserNetConfig { network: Ipv4Addr::new(127, 0, 0, 0), ..base() },
            UserNetConfig { network_bits: 31, ..base() },
            UserNetConfig { address: Some(Ipv4Addr::new(10, 0, 3, 15)), ..base() },
            UserNetConfig { address: Some(Ipv4Addr::new(10, 0, 2, 2)), ..base() },
            UserNetConfig { prefix: Some("fe80::".parse().unwrap()), ..base() },
            UserNetConfig { prefix: Some("fd00::1".parse().unwrap()), ..base() },
            UserNetConfig { mtu: Some(1279), ..base() },
            UserNetConfig { mtu: Some(65_521), ..base() },
            UserNetConfig { max_flows: 0, ..base() },
            UserNetConfig { forwards: vec![forward("127.0.0.1:0", None)], ..base() },
            UserNetConfig { forwards: vec![forward("127.0.0.1:1", Some("10.0.3.1"))], ..base() },
            UserNetConfig { forwards: vec![forward("127.0.0.1:1", Some("fd00::1"))], ..base() },
            UserNetConfig { ipv6: false, forwards: vec![forward("[::1]:1", Some("fd00::1"))], ..base() },
            UserNetConfig { forwards: vec![forward("127.0.0.1:1", None); 2], ..base() },
        ];
        for config in bad {
            let error = config.check().unwrap_err().to_string();
            assert!(!error.contains('\n'), "{error}");
        }
        let small = UserNetConfig { ipv6: false, mtu: Some(576), ..base() };
        assert_eq!(small.check().unwrap().mtu, 576);
    }
}
