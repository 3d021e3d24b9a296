//! Which guest has which address.
//!
//! A network has one guest, which may hold others behind a bridge. The first Ethernet address to ask (or the one
//! that the machine was configured with) has the guest's address; each further one the next free address of the
//! network, the same of both families, until [`MAX_LEASES`]. Nothing is ever taken back while the network lives,
//! so that an address never changes under a guest that sleeps.

use std::net::{Ipv4Addr, Ipv6Addr};

use crate::config::Addresses;
use crate::wire::Mac;

/// Most Ethernet addresses that get an address.
pub const MAX_LEASES: usize = 64;
/// How long a lease is said to last, in seconds. It is renewed for ever.
pub const LEASE_SECONDS: u32 = 86_400;

/// The table of leases.
#[derive(Debug)]
pub struct Leases {
    /// Entry n has the guest's address plus n.
    macs: Vec<Mac>,
}

impl Leases {
    /// A table in which the guest's own Ethernet address has its place, if it is known.
    pub fn new(guest: Option<Mac>) -> Self {
        Self { macs: guest.into_iter().collect() }
    }

    /// The number of an Ethernet address, a new one if it has none yet.
    fn number(&mut self, mac: Mac) -> Option<usize> {
        if let Some(number) = self.macs.iter().position(|known| *known == mac) {
            return Some(number);
        }
        if mac[0] & 1 != 0 || self.macs.len() >= MAX_LEASES {
            return None;
        }
        self.macs.push(mac);
        Some(self.macs.len() - 1)
    }

    /// The IPv4 address for an Ethernet address.
    pub fn v4(&mut self, addresses: &Addresses, mac: Mac) -> Option<Ipv4Addr> {
        let v4 = addresses.v4?;
        let number = u32::try_from(self.number(mac)?).ok()?;
        // Addresses after the guest's, then those before it, without those that are not for guests.
        let first = v4.guest.to_bits();
        let size = (v4.broadcast().to_bits() - v4.network.to_bits()).checked_add(1)?;
        let mut free = (0..size).map(|n| {
            let offset = (first - v4.network.to_bits()).wrapping_add(n) % size;
            Ipv4Addr::from_bits(v4.network.to_bits() | offset)
        });
        free.by_ref().filter(|address| v4.is_for_guest(*address)).nth(number as usize)
    }

    /// The IPv6 address for an Ethernet address.
    pub fn v6(&mut self, addresses: &Addresses, mac: Mac) -> Option<Ipv6Addr> {
        let v6 = addresses.v6?;
        let number = self.number(mac)?;
        Some(Ipv6Addr::from_bits(v6.guest.to_bits() + number as u128))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::UserNetConfig;

    #[test]
    fn an_address_never_changes_and_is_nobody_elses() {
        let addresses = UserNetConfig { network_bits: 27, ..UserNetConfig::default() }.check().unwrap();
        let mut leases = Leases::new(Some([2; 6]));
        assert_eq!(leases.v4(&addresses, [4; 6]), Some(Ipv4Addr::new(10, 0, 2, 16)));
        assert_eq!(leases.v4(&addresses, [2; 6]), Some(Ipv4Addr::new(10, 0, 2, 15)));
        assert_eq!(leases.v6(&addresses, [4; 6]), Some("fd61:746f:6c6c::16".parse().unwrap()));
        assert_eq!(leases.v4(&addresses, [5; 6]), None, "a group has no address");
        let mut seen = Vec::new();
        for n in 0..100 {
            if let Some(address) = leases.v4(&addresses, [6, 0, 0, 0, 0, n]) {
                assert!(addresses.v4.unwrap().is_for_guest(address) && !seen.contains(&address));
                seen.push(address);
            }
        }
        assert_eq!(seen.len(), 32 - 4 - 2, "all but the network's own and the two above");
        assert_eq!(leases.macs.len(), MAX_LEASES);
    }
}
