//! ARP (RFC 826), IPv6 neighbour discovery (RFC 4861) and router advertisements (RFC 4861, RFC 8106).
//!
//! The network answers for its own addresses, gateway and DNS server, and for no other: a guest that looks whether
//! an address is taken finds it free. The guest's addresses are learned from what it sends.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use crate::config::{Addresses, GATEWAY_LINK_LOCAL, GATEWAY_MAC};
use crate::dhcp::{Told, encode_domains};
use crate::wire::{Mac, array, be16};

/// ICMPv6 type of a router solicitation.
pub const ROUTER_SOLICITATION: u8 = 133;
/// ICMPv6 type of a router advertisement.
pub const ROUTER_ADVERTISEMENT: u8 = 134;
/// ICMPv6 type of a neighbour solicitation.
pub const NEIGHBOUR_SOLICITATION: u8 = 135;
/// ICMPv6 type of a neighbour advertisement.
pub const NEIGHBOUR_ADVERTISEMENT: u8 = 136;

/// All nodes of the link.
pub const ALL_NODES: Ipv6Addr = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1);

/// Seconds between router advertisements that nobody asked for.
pub const ADVERTISEMENT_SECONDS: u64 = 300;
/// Seconds for which the gateway stays a router: several advertisements.
const ROUTER_LIFETIME: u16 = 1800;
/// Seconds for which the prefix is valid and preferred.
const PREFIX_LIFETIME: [u32; 2] = [86_400, 14_400];
/// Seconds for which the DNS server is used.
const DNS_LIFETIME: u32 = 1800;

const SOURCE_ADDRESS: u8 = 1;
const TARGET_ADDRESS: u8 = 2;

const ARP_REQUEST: u16 = 1;
const ARP_REPLY: u16 = 2;

/// What an ARP packet says: whose Ethernet address it tells, and the answer to it.
#[derive(Debug, PartialEq, Eq)]
pub struct Arp {
    /// Who sent it.
    pub sender: (Ipv4Addr, Mac),
    /// The answer's bytes, for the sender.
    pub answer: Option<[u8; 28]>,
}

/// Reads an ARP packet.
pub fn arp(bytes: &[u8], addresses: &Addresses) -> Option<Arp> {
    // Ethernet and IPv4.
    if array::<6>(bytes, 0)? != [0, 1, 8, 0, 6, 4] {
        return None;
    }
    let operation = be16(bytes, 6)?;
    let (mac, address): (Mac, [u8; 4]) = (array(bytes, 8)?, array(bytes, 14)?);
    let target: [u8; 4] = array(bytes, 24)?;
    let ours = addresses.is_own(IpAddr::from(target)) && address != target;
    let answer = (operation == ARP_REQUEST && ours).then(|| {
        let mut answer = [0; 28];
        answer[..6].copy_from_slice(&[0, 1, 8, 0, 6, 4]);
        answer[6..8].copy_from_slice(&ARP_REPLY.to_be_bytes());
        answer[8..14].copy_from_slice(&GATEWAY_MAC);
        answer[14..18].copy_from_slice(&target);
        answer[18..24].copy_from_slice(&mac);
        answer[24..28].copy_from_slice(&address);
        answer
    });
    matches!(operation, ARP_REQUEST | ARP_REPLY).then_some(Arp { sender: (address.into(), mac), answer })
}

/// What a message of neighbour discovery says.
#[derive(Debug, PartialEq, Eq)]
pub struct Neighbour {
    /// An Ethernet address that it tells.
    pub learned: Option<(Ipv6Addr, Mac)>,
    /// The answer: from, to, and the ICMPv6 message without checksum.
    pub answer: Option<(Ipv6Addr, Ipv6Addr, Vec<u8>)>,
}

/// The Ethernet address in an option of neighbour discovery; `None` also when the options are malformed.
fn link_address(mut options: &[u8], wanted: u8) -> Option<Mac> {
    loop {
        let [kind, units, ..] = *options else { return None };
        let length = usize::from(units) * 8;
        if length == 0 {
            return None;
        }
        let option = options.get(..length)?;
        if kind == wanted {
            return array(option, 2);
        }
        options = options.get(length..)?;
    }
}

/// Reads a message of neighbour discovery of hop limit 255.
pub fn neighbour(source: Ipv6Addr, message: &[u8], addresses: &Addresses, told: &Told) -> Option<Neighbour> {
    let v6 = addresses.v6?;
    match *message.first()? {
        ROUTER_SOLICITATION => {
            let mac = link_address(message.get(8..)?, SOURCE_ADDRESS);
            let to = if source.is_unspecified() { ALL_NODES } else { source };
            let answer = (GATEWAY_LINK_LOCAL, to, advertisement(addresses, told)?);
            Some(Neighbour { learned: mac.map(|mac| (source, mac)), answer: Some(answer) })
        }
        NEIGHBOUR_SOLICITATION => {
            let target = Ipv6Addr::from(array::<16>(message, 8)?);
            let mac = link_address(message.get(24..)?, SOURCE_ADDRESS);
            let learned = mac.filter(|_| !source.is_unspecified()).map(|mac| (source, mac));
            let answer = v6.is_own(target).then(|| {
                let asked = !source.is_unspecified();
                // Flags: router, solicited, override.
                let flags = if asked { 0xe0 } else { 0xa0 };
                let mut answer = vec![NEIGHBOUR_ADVERTISEMENT, 0, 0, 0, flags, 0, 0, 0];
                answer.extend_from_slice(&target.octets());
                answer.extend_from_slice(&[TARGET_ADDRESS, 1]);
                answer.extend_from_slice(&GATEWAY_MAC);
                (target, if asked { source } else { ALL_NODES }, answer)
            });
            Some(Neighbour { learned, answer })
        }
        NEIGHBOUR_ADVERTISEMENT => {
            let target = Ipv6Addr::from(array::<16>(message, 8)?);
            let mac = link_address(message.get(24..)?, TARGET_ADDRESS);
            Some(Neighbour { learned: mac.map(|mac| (target, mac)), answer: None })
        }
        _ => None,
    }
}

/// A router advertisement without checksum, from [`GATEWAY_LINK_LOCAL`]. `None` without IPv6.
pub fn advertisement(addresses: &Addresses, told: &Told) -> Option<Vec<u8>> {
    let v6 = addresses.v6?;
    // Hop limit 64; flags: addresses (M) and more (O) by DHCPv6.
    let mut bytes = vec![ROUTER_ADVERTISEMENT, 0, 0, 0, 64, 0xc0];
    bytes.extend_from_slice(&ROUTER_LIFETIME.to_be_bytes());
    bytes.extend_from_slice(&[0; 8]);
    bytes.extend_from_slice(&[SOURCE_ADDRESS, 1]);
    bytes.extend_from_slice(&GATEWAY_MAC);
    bytes.extend_from_slice(&[5, 1, 0, 0]);
    bytes.extend_from_slice(&u32::from(addresses.mtu).to_be_bytes());
    // Prefix: on this link (L), for addresses of one's own making (A).
    bytes.extend_from_slice(&[3, 4, 64, 0xc0]);
    for lifetime in PREFIX_LIFETIME {
        bytes.extend_from_slice(&lifetime.to_be_bytes());
    }
    bytes.extend_from_slice(&[0; 4]);
    bytes.extend_from_slice(&v6.prefix.octets());
    if addresses.dns {
        bytes.extend_from_slice(&[25, 3, 0, 0]);
        bytes.extend_from_slice(&DNS_LIFETIME.to_be_bytes());
        bytes.extend_from_slice(&v6.dns.octets());
        let mut domains = encode_domains(&told.search, 512);
        if !domains.is_empty() {
            domains.resize(domains.len().next_multiple_of(8), 0);
            bytes.extend_from_slice(&[31, (domains.len() / 8 + 1) as u8, 0, 0]);
            bytes.extend_from_slice(&DNS_LIFETIME.to_be_bytes());
            bytes.extend_from_slice(&domains);
        }
    }
    Some(bytes)
}

#[cfg(test)]
mod tests {
    use smoltcp::wire::{
        ArpOperation, ArpPacket, ArpRepr, EthernetAddress, Icmpv6Packet, NdiscNeighborFlags, NdiscRepr,
    };

    use super::*;
    use crate::config::UserNetConfig;
    use crate::wire::{ICMPV6, Sum};

    const MAC: Mac = [2, 0, 0, 0, 0, 1];

    fn addresses() -> Addresses {
        UserNetConfig::default().check().unwrap()
    }

    fn ask_arp(source: [u8; 4], target: [u8; 4]) -> Arp {
        let repr = ArpRepr::EthernetIpv4 {
            operation: ArpOperation::Request,
            source_hardware_addr: EthernetAddress(MAC),
            source_protocol_addr: source.into(),
            target_hardware_addr: EthernetAddress([0; 6]),
            target_protocol_addr: target.into(),
        };
        let mut bytes = [0; 28];
        repr.emit(&mut ArpPacket::new_unchecked(&mut bytes));
        arp(&bytes, &addresses()).unwrap()
    }

    #[test]
    fn arp_answers_for_the_networks_own_addresses_alone() {
        for target in [[10, 0, 2, 2], [10, 0, 2, 3]] {
            let result = ask_arp([10, 0, 2, 15], target);
            assert_eq!(result.sender, (Ipv4Addr::new(10, 0, 2, 15), MAC));
            let answer = result.answer.unwrap();
            let repr = ArpRepr::parse(&ArpPacket::new_checked(&answer).unwrap()).unwrap();
            let expected = ArpRepr::EthernetIpv4 {
                operation: ArpOperation::Reply,
                source_hardware_addr: EthernetAddress(GATEWAY_MAC),
                source_protocol_addr: target.into(),
                target_hardware_addr: EthernetAddress(MAC),
                target_protocol_addr: [10, 0, 2, 15].into(),
            };
            assert_eq!(repr, expected);
        }
        for target in [[10, 0, 2, 15], [10, 0, 2, 4], [8, 8, 8, 8]] {
            assert_eq!(ask_arp([10, 0, 2, 15], target).answer, None, "{target:?}");
        }
        assert!(ask_arp([0; 4], [10, 0, 2, 2]).answer.is_some(), "a probe learns that it is taken");
    }

    fn checked(from: Ipv6Addr, to: Ipv6Addr, mut message: Vec<u8>) -> Vec<u8> {
        let length = message.len();
        let sum = Sum::default().pseudo_header(from.into(), to.into(), ICMPV6, length).bytes(&message);
        message[2..4].copy_from_slice(&sum.checksum().to_be_bytes());
        message
    }

    #[test]
    fn neighbour_solicitations_are_answered_as_a_router() {
        let source: Ipv6Addr = "fe80::ff:fe00:1".parse().unwrap();
        for target in ["fe80::2", "fd61:746f:6c6c::2", "fd61:746f:6c6c::3"] {
            let target: Ipv6Addr = target.parse().unwrap();
            let mut message = vec![NEIGHBOUR_SOLICITATION, 0, 0, 0, 0, 0, 0, 0];
            message.extend_from_slice(&target.octets());
            let bare = neighbour(source, &message, &addresses(), &Told::default()).unwrap();
            assert_eq!(bare.learned, None);
            message.extend_from_slice(&[1, 1]);
            message.extend_from_slice(&MAC);
            let result = neighbour(source, &message, &addresses(), &Told::default()).unwrap();
            assert_eq!(result.learned, Some((source, MAC)));
            let (from, to, answer) = result.answer.unwrap();
            assert_eq!((from, to), (target, source));
            let answer = checked(from, to, answer);
            let repr = NdiscRepr::parse(&Icmpv6Packet::new_checked(&answer[..]).unwrap()).unwrap();
            let expected = NdiscRepr::NeighborAdvert {
                flags: NdiscNeighborFlags::ROUTER
                    | NdiscNeighborFlags::SOLICITED
                    | NdiscNeighborFlags::OVERRIDE,
                target_addr: target,
                lladdr: Some(EthernetAddress(GATEWAY_MAC).into()),
            };
            assert_eq!(repr, expected);
        }
        let mut other = vec![NEIGHBOUR_SOLICITATION, 0, 0, 0, 0, 0, 0, 0];
        other.extend_from_slice(&source.octets());
        let result = neighbour(Ipv6Addr::UNSPECIFIED, &other, &addresses(), &Told::default()).unwrap();
        assert_eq!(result, Neighbour { learned: None, answer: None }, "its own address is free");
    }

    #[test]
    fn router_advertisements_tell_prefix_mtu_and_dns() {
        let told = Told { search: vec!["example.org".into()], hostname: None };
        let message = [ROUTER_SOLICITATION, 0, 0, 0, 0, 0, 0, 0];
        let result = neighbour(Ipv6Addr::UNSPECIFIED, &message, &addresses(), &told).unwrap();
        let (from, to, answer) = result.answer.unwrap();
        assert_eq!((from, to), (GATEWAY_LINK_LOCAL, ALL_NODES));
        assert_eq!(answer.len() % 8, 0);
        let checked = checked(from, to, answer.clone());
        let repr = NdiscRepr::parse(&Icmpv6Packet::new_checked(&checked[..]).unwrap()).unwrap();
        let NdiscRepr::RouterAdvert { router_lifetime, mtu, prefix_info, lladdr, .. } = repr else {
            panic!("{repr:?}")
        };
        assert_eq!((router_lifetime.secs(), mtu), (1800, Some(1500)));
        assert_eq!(lladdr, Some(EthernetAddress(GATEWAY_MAC).into()));
        let prefix = prefix_info.unwrap();
        assert_eq!((prefix.prefix, prefix.prefix_len), (crate::config::DEFAULT_PREFIX, 64));
        let dns: Ipv6Addr = "fd61:746f:6c6c::3".parse().unwrap();
        assert!(answer.windows(16).any(|bytes| bytes == dns.octets()));
    }

    #[test]
    fn malformed_options_are_survived() {
        assert_eq!(link_address(&[1, 0, 1, 2, 3, 4, 5, 6], 1), None);
        assert_eq!(link_address(&[1, 2, 1, 2, 3, 4, 5, 6], 1), None);
        assert_eq!(
            link_address(&[9, 1, 0, 0, 0, 0, 0, 0, 1, 1, 1, 2, 3, 4, 5, 6], 1),
            Some([1, 2, 3, 4, 5, 6])
        );
    }
}
