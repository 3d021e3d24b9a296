//! Addresses as people write them.

use std::fmt;
use std::net::{Ipv4Addr, Ipv6Addr};
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// Text that is no address of the kind that is needed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ParseAddressError {
    /// Not an Ethernet address.
    #[error("'{}' is not an Ethernet address of one interface; write six bytes such as 52:54:00:12:34:56", .0.escape_debug())]
    Mac(String),
    /// Not an IPv4 address.
    #[error("'{}' is not an IPv4 address; write one such as 10.0.2.15", .0.escape_debug())]
    Ipv4(String),
    /// Not an IP address.
    #[error("'{}' is not an IP address; write one such as 10.0.2.15 or fd00::15", .0.escape_debug())]
    Ip(String),
    /// Not an IPv4 network.
    #[error("'{}' is not an IPv4 network; write its first address and its length, /8 to /27, such as 10.0.2.0/24", .0.escape_debug())]
    Network(String),
    /// Not an IPv6 prefix.
    #[error("'{}' is not an IPv6 prefix; write its first address and /64, such as fd00:1:2:3::/64", .0.escape_debug())]
    Prefix(String),
}

/// An Ethernet address of one interface: neither zero nor a multicast address.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub struct MacAddress([u8; 6]);

impl MacAddress {
    /// Its bytes.
    pub fn bytes(self) -> [u8; 6] {
        self.0
    }
}

impl FromStr for MacAddress {
    type Err = ParseAddressError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let error = || ParseAddressError::Mac(text.to_owned());
        let mut bytes = [0; 6];
        let mut parts = text.split(':');
        for byte in &mut bytes {
            let part = parts.next().ok_or_else(error)?;
            if part.len() != 2 || !part.bytes().all(|b| b.is_ascii_hexdigit()) {
                return Err(error());
            }
            *byte = u8::from_str_radix(part, 16).map_err(|_| error())?;
        }
        if parts.next().is_some() || bytes[0] & 1 != 0 || bytes == [0; 6] {
            return Err(error());
        }
        Ok(Self(bytes))
    }
}

impl fmt::Display for MacAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

/// An IPv4 network with room for a gateway, a DNS server and guests.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub struct Ipv4Network {
    address: Ipv4Addr,
    length: u8,
}

impl Default for Ipv4Network {
    fn default() -> Self {
        Self { address: Ipv4Addr::new(10, 0, 2, 0), length: 24 }
    }
}

impl Ipv4Network {
    /// The first address.
    pub fn address(self) -> Ipv4Addr {
        self.address
    }

    /// Bits that all addresses share, 8 to 27.
    pub fn length(self) -> u8 {
        self.length
    }

    /// Address number `host` of the network.
    pub fn host(self, host: u32) -> Ipv4Addr {
        Ipv4Addr::from_bits(self.address.to_bits() | (host & !self.mask()))
    }

    /// The last address.
    pub fn broadcast(self) -> Ipv4Addr {
        self.host(u32::MAX)
    }

    /// Whether `address` belongs to it.
    pub fn contains(self, address: Ipv4Addr) -> bool {
        address.to_bits() & self.mask() == self.address.to_bits()
    }

    fn mask(self) -> u32 {
        u32::MAX << (32 - u32::from(self.length.clamp(8, 27)))
    }
}

impl FromStr for Ipv4Network {
    type Err = ParseAddressError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let error = || ParseAddressError::Network(text.to_owned());
        let (address, length) = text.split_once('/').ok_or_else(error)?;
        let network = Self {
            address: address.parse().map_err(|_| error())?,
            length: length.parse().map_err(|_| error())?,
        };
        let special = network.address.is_loopback()
            || network.address.is_multicast()
            || network.address.is_unspecified()
            || network.address.octets()[0] >= 240;
        if !(8..=27).contains(&network.length) || !network.contains(network.address) || special {
            return Err(error());
        }
        Ok(network)
    }
}

impl fmt::Display for Ipv4Network {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.address, self.length)
    }
}

/// An IPv6 prefix of 64 bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub struct Ipv6Prefix(Ipv6Addr);

impl Ipv6Prefix {
    /// The first address.
    pub fn address(self) -> Ipv6Addr {
        self.0
    }

    /// Whether `address` belongs to it.
    pub fn contains(self, address: Ipv6Addr) -> bool {
        address.to_bits() >> 64 == self.0.to_bits() >> 64
    }
}

impl FromStr for Ipv6Prefix {
    type Err = ParseAddressError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let error = || ParseAddressError::Prefix(text.to_owned());
        let address: Ipv6Addr = text.strip_suffix("/64").ok_or_else(error)?.parse().map_err(|_| error())?;
        let special = address.is_multicast()
            || address.is_unicast_link_local()
            || address.to_bits() >> 64 == 0
            || address.to_ipv4_mapped().is_some();
        if special || address.to_bits() << 64 != 0 {
            return Err(error());
        }
        Ok(Self(address))
    }
}

impl fmt::Display for Ipv6Prefix {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/64", self.0)
    }
}

macro_rules! as_text {
    ($($type:ty),*) => {$(
        impl From<$type> for String {
            fn from(value: $type) -> Self {
                value.to_string()
            }
        }
        impl TryFrom<String> for $type {
            type Error = ParseAddressError;
            fn try_from(text: String) -> Result<Self, Self::Error> {
                text.parse()
            }
        }
    )*};
}
as_text!(MacAddress, Ipv4Network, Ipv6Prefix);

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn ethernet_addresses_are_six_bytes_of_one_interface() {
        let mac: MacAddress = "52:54:00:aB:00:01".parse().unwrap();
        assert_eq!(mac.to_string(), "52:54:00:ab:00:01");
        for text in ["", "52:54:00:ab:00", "52:54:00:ab:00:01:02", "+2:54:00:ab:00:01", "ff:ff:ff:ff:ff:ff"] {
            assert!(text.parse::<MacAddress>().is_err(), "{text}");
        }
    }

    #[test]
    fn networks_know_their_hosts() {
        let network: Ipv4Network = "192.168.7.0/24".parse().unwrap();
        assert_eq!(network.host(2), Ipv4Addr::new(192, 168, 7, 2));
        assert_eq!(network.broadcast(), Ipv4Addr::new(192, 168, 7, 255));
        assert!(network.contains(network.host(9)) && !network.contains(Ipv4Addr::new(192, 168, 8, 9)));
        for text in
            ["10.0.2.0", "10.0.2.1/24", "10.0.0.0/7", "10.0.0.0/28", "127.0.0.0/8", "224.0.0.0/8", "x/24"]
        {
            assert!(text.parse::<Ipv4Network>().is_err(), "{text}");
        }
    }

    #[test]
    fn prefixes_have_64_bits() {
        let prefix: Ipv6Prefix = "fd00:1:2:3::/64".parse().unwrap();
        assert!(prefix.contains("fd00:1:2:3::9".parse().unwrap()));
        assert!(!prefix.contains("fd00:1:2:4::9".parse().unwrap()));
        for text in ["fd00::", "fd00::/48", "fd00::1/64", "fe80::/64", "ff02::/64", "::/64"] {
            assert!(text.parse::<Ipv6Prefix>().is_err(), "{text}");
        }
    }

    proptest! {
        #[test]
        fn any_text_is_answered_without_a_panic(text in ".*") {
            let _ = text.parse::<MacAddress>();
            let _ = text.parse::<Ipv4Network>();
            let _ = text.parse::<Ipv6Prefix>();
        }
    }
}
