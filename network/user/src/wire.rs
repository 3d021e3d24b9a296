//! Packets: reading those of the guest and the headers of those for it.
//!
//! Everything is read from a private copy with checked accesses: `None` is a packet that is too short or cannot
//! be. Ethernet II; IPv4 by RFC 791 (options skipped); IPv6 by RFC 8200 (extension headers skipped, a bounded
//! number of them); UDP by RFC 768; the checksum by RFC 1071.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// Bytes of an Ethernet header.
pub const ETHERNET_BYTES: usize = 14;
/// Bytes of an IPv4 header without options.
pub const IPV4_BYTES: usize = 20;
/// Bytes of an IPv6 header.
pub const IPV6_BYTES: usize = 40;
/// Bytes of an IPv6 fragment header.
pub const FRAGMENT_BYTES: usize = 8;
/// Bytes of a UDP header.
pub const UDP_BYTES: usize = 8;
/// Largest IP packet that is made, bytes.
pub const MAX_PACKET: usize = 65_535;

/// EtherType of ARP.
pub const ETHERTYPE_ARP: u16 = 0x0806;
/// EtherType of IPv4.
pub const ETHERTYPE_IPV4: u16 = 0x0800;
/// EtherType of IPv6.
pub const ETHERTYPE_IPV6: u16 = 0x86dd;

/// IP protocol ICMP.
pub const ICMP: u8 = 1;
/// IP protocol TCP.
pub const TCP: u8 = 6;
/// IP protocol UDP.
pub const UDP: u8 = 17;
/// IP protocol ICMPv6.
pub const ICMPV6: u8 = 58;

const HOP_BY_HOP: u8 = 0;
const ROUTING: u8 = 43;
const FRAGMENT: u8 = 44;
const DESTINATION_OPTIONS: u8 = 60;
/// Most extension headers of a packet. Hosts send one or two; each costs a step of a loop.
const MAX_EXTENSION_HEADERS: usize = 8;

/// An Ethernet address.
pub type Mac = [u8; 6];
/// Everybody's Ethernet address.
pub const BROADCAST: Mac = [0xff; 6];

/// 16 bits, big-endian, from byte `at`.
pub fn be16(bytes: &[u8], at: usize) -> Option<u16> {
    bytes.get(at..at.checked_add(2)?)?.try_into().ok().map(u16::from_be_bytes)
}

/// 32 bits, big-endian, from byte `at`.
pub fn be32(bytes: &[u8], at: usize) -> Option<u32> {
    bytes.get(at..at.checked_add(4)?)?.try_into().ok().map(u32::from_be_bytes)
}

/// `N` bytes from byte `at`.
pub fn array<const N: usize>(bytes: &[u8], at: usize) -> Option<[u8; N]> {
    bytes.get(at..at.checked_add(N)?)?.try_into().ok()
}

/// A sum in ones' complement (RFC 1071) of 16-bit words, unfolded. Pieces of odd length may only come last.
#[derive(Clone, Copy, Debug, Default)]
pub struct Sum(u64);

impl Sum {
    /// Adds bytes.
    #[must_use]
    pub fn bytes(self, bytes: &[u8]) -> Self {
        // Big-endian 32-bit words: their carries fold into the same 16-bit sum.
        let mut sum = self.0;
        let mut words = bytes.chunks_exact(4);
        for word in &mut words {
            let [a, b, c, d] = *word else { continue };
            sum += u64::from(u32::from_be_bytes([a, b, c, d]));
        }
        let mut last = [0; 4];
        let rest = words.remainder();
        last[..rest.len()].copy_from_slice(rest);
        Self(fold32(sum + u64::from(u32::from_be_bytes(last))))
    }

    /// Adds bytes in pieces of any length, as if they were one.
    #[must_use]
    pub fn pieces(mut self, pieces: &[&[u8]]) -> Self {
        // The word that the last piece of odd length left unfinished.
        let mut half: Option<u8> = None;
        for piece in pieces {
            let mut piece = *piece;
            if let (Some(first), Some((second, rest))) = (half, piece.split_first()) {
                self = self.bytes(&[first, *second]);
                (half, piece) = (None, rest);
            }
            match piece.split_last() {
                Some((last, even)) if piece.len() % 2 == 1 => {
                    self = self.bytes(even);
                    half = Some(*last);
                }
                _ => self = self.bytes(piece),
            }
        }
        half.map_or(self, |last| self.bytes(&[last]))
    }

    /// Adds what a transport protocol's checksum covers of the IP header.
    #[must_use]
    pub fn pseudo_header(self, source: IpAddr, destination: IpAddr, protocol: u8, length: usize) -> Self {
        let sum = match (source, destination) {
            (IpAddr::V4(source), IpAddr::V4(destination)) => {
                self.bytes(&source.octets()).bytes(&destination.octets())
            }
            (source, destination) => self.bytes(&v6_of(source).octets()).bytes(&v6_of(destination).octets()),
        };
        Self(fold32(sum.0 + u64::from(protocol) + length as u64))
    }

    /// The sum itself, folded: what a partial checksum's field starts with.
    pub fn folded(self) -> u16 {
        let mut sum = self.0;
        while sum > 0xffff {
            sum = (sum & 0xffff) + (sum >> 16);
        }
        sum as u16
    }

    /// The checksum.
    pub fn checksum(self) -> u16 {
        !self.folded()
    }
}

fn fold32(sum: u64) -> u64 {
    (sum & 0xffff_ffff) + (sum >> 32)
}

fn v6_of(address: IpAddr) -> Ipv6Addr {
    match address {
        IpAddr::V4(address) => address.to_ipv6_mapped(),
        IpAddr::V6(address) => address,
    }
}

/// An Ethernet frame without VLAN tag.
#[derive(Clone, Copy, Debug)]
pub struct Ethernet<'a> {
    /// Who shall have it.
    pub destination: Mac,
    /// Who sent it.
    pub source: Mac,
    /// What it carries.
    pub kind: u16,
    /// What it carries.
    pub payload: &'a [u8],
}

impl<'a> Ethernet<'a> {
    /// Reads a frame.
    pub fn parse(frame: &'a [u8]) -> Option<Self> {
        Some(Self {
            destination: array(frame, 0)?,
            source: array(frame, 6)?,
            kind: be16(frame, 12)?,
            payload: frame.get(ETHERNET_BYTES..)?,
        })
    }
}

/// The part of a datagram that a fragment carries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fragment {
    /// Identifies the datagram, with its addresses and protocol.
    pub id: u32,
    /// Where it belongs, bytes.
    pub offset: usize,
    /// Whether others follow.
    pub more: bool,
}

/// An IP packet of either family.
#[derive(Clone, Copy, Debug)]
pub struct Ip<'a> {
    /// From whom.
    pub source: IpAddr,
    /// For whom.
    pub destination: IpAddr,
    /// Protocol of the payload, after all extension headers.
    pub protocol: u8,
    /// Time to live or hop limit.
    pub hops: u8,
    /// It must not be fragmented. Always so in IPv6, but for what its sender has fragmented itself.
    pub dont_fragment: bool,
    /// Set for a fragment of a larger datagram.
    pub fragment: Option<Fragment>,
    /// What it carries, without Ethernet's padding.
    pub payload: &'a [u8],
    /// The whole packet, for errors about it.
    pub packet: &'a [u8],
}

impl<'a> Ip<'a> {
    /// Reads an IPv4 packet and verifies its header's checksum.
    pub fn parse_v4(bytes: &'a [u8]) -> Option<Self> {
        let first = *bytes.first()?;
        let header_bytes = usize::from(first & 0xf) * 4;
        let total = usize::from(be16(bytes, 2)?);
        if first >> 4 != 4 || header_bytes < IPV4_BYTES || total < header_bytes {
            return None;
        }
        let packet = bytes.get(..total)?;
        let header = packet.get(..header_bytes)?;
        if Sum::default().bytes(header).folded() != 0xffff {
            return None;
        }
        let bits = be16(header, 6)?;
        let (more, offset) = (bits & 0x2000 != 0, usize::from(bits & 0x1fff) * 8);
        let id = u32::from(be16(header, 4)?);
        Some(Self {
            source: Ipv4Addr::from(array::<4>(header, 12)?).into(),
            destination: Ipv4Addr::from(array::<4>(header, 16)?).into(),
            protocol: *header.get(9)?,
            hops: *header.get(8)?,
            dont_fragment: bits & 0x4000 != 0,
            fragment: (more || offset != 0).then_some(Fragment { id, offset, more }),
            payload: packet.get(header_bytes..)?,
            packet,
        })
    }

    /// Reads an IPv6 packet. Extension headers are skipped: hop-by-hop and destination options whatever they say,
    /// routing when no segment is left. A fragment ends the walk.
    pub fn parse_v6(bytes: &'a [u8]) -> Option<Self> {
        if bytes.first()? >> 4 != 6 {
            return None;
        }
        let length = usize::from(be16(bytes, 4)?);
        let packet = bytes.get(..IPV6_BYTES + length)?;
        let mut ip = Self {
            source: Ipv6Addr::from(array::<16>(packet, 8)?).into(),
            destination: Ipv6Addr::from(array::<16>(packet, 24)?).into(),
            protocol: *packet.get(6)?,
            hops: *packet.get(7)?,
            dont_fragment: true,
            fragment: None,
            payload: packet.get(IPV6_BYTES..)?,
            packet,
        };
        ip.skip_extension_headers().then_some(ip)
    }

    /// Moves `protocol` and `payload` past extension headers. False: they cannot be passed.
    fn skip_extension_headers(&mut self) -> bool {
        for _ in 0..=MAX_EXTENSION_HEADERS {
            let next = match (self.protocol, self.payload) {
                (HOP_BY_HOP | DESTINATION_OPTIONS, [next, units, ..]) => Some((*next, *units)),
                (ROUTING, [next, units, _, 0, ..]) => Some((*next, *units)),
                (FRAGMENT, payload) => {
                    if !self.take_fragment_header(payload) {
                        return false;
                    }
                    if self.fragment.is_some() {
                        return true;
                    }
                    // An atomic fragment (RFC 6946) is the whole: what follows may be further headers.
                    continue;
                }
                (HOP_BY_HOP | DESTINATION_OPTIONS | ROUTING, _) => return false,
                _ => return true,
            };
            let Some((next, units)) = next else { return false };
            let Some(rest) = self.payload.get((usize::from(units) + 1) * 8..) else { return false };
            (self.protocol, self.payload) = (next, rest);
        }
        false
    }

    fn take_fragment_header(&mut self, payload: &'a [u8]) -> bool {
        let (Some(next), Some(bits), Some(id)) = (payload.first(), be16(payload, 2), be32(payload, 4)) else {
            return false;
        };
        let Some(rest) = payload.get(FRAGMENT_BYTES..) else { return false };
        (self.protocol, self.payload) = (*next, rest);
        let fragment = Fragment { id, offset: usize::from(bits & 0xfff8), more: bits & 1 != 0 };
        if fragment.more || fragment.offset != 0 {
            self.fragment = Some(fragment);
            return true;
        }
        self.protocol != FRAGMENT
    }

    /// After reassembly: skips extension headers that lay in the fragmentable part. False: they cannot be passed,
    /// or lead to a fragment again.
    pub fn finish(&mut self) -> bool {
        self.source.is_ipv4()
            || (self.protocol != FRAGMENT && self.skip_extension_headers() && self.fragment.is_none())
    }

    /// Whether the checksum of a transport protocol at the payload's beginning is right.
    pub fn transport_checksum_is_right(&self) -> bool {
        let sum = Sum::default();
        let sum = if self.protocol == ICMP {
            sum
        } else {
            sum.pseudo_header(self.source, self.destination, self.protocol, self.payload.len())
        };
        sum.bytes(self.payload).folded() == 0xffff
    }
}

/// A UDP datagram.
#[derive(Clone, Copy, Debug)]
pub struct Udp<'a> {
    /// Port of the sender.
    pub source: u16,
    /// Port of the receiver.
    pub destination: u16,
    /// The checksum's field; zero is none in IPv4.
    pub checksum: u16,
    /// What it carries.
    pub payload: &'a [u8],
}

impl<'a> Udp<'a> {
    /// Reads a datagram. With `whole`, all bytes are the datagram whatever its length says, as in a large frame
    /// that is still to be cut.
    pub fn parse(bytes: &'a [u8], whole: bool) -> Option<Self> {
        let length = usize::from(be16(bytes, 4)?);
        let end = if whole || length == 0 { bytes.len() } else { length };
        Some(Self {
            source: be16(bytes, 0)?,
            destination: be16(bytes, 2)?,
            checksum: be16(bytes, 6)?,
            payload: bytes.get(UDP_BYTES..end)?,
        })
    }
}

/// Headers of a packet for the guest, in one place.
#[derive(Clone, Debug)]
pub struct Headers {
    bytes: [u8; Self::MAX],
    length: usize,
}

impl Headers {
    /// Ethernet, IPv6 with a fragment header, TCP with all options.
    const MAX: usize = ETHERNET_BYTES + IPV6_BYTES + FRAGMENT_BYTES + 60;

    /// An Ethernet header.
    pub fn ethernet(destination: Mac, source: Mac, kind: u16) -> Self {
        let mut headers = Self { bytes: [0; Self::MAX], length: 0 };
        headers.push(&destination);
        headers.push(&source);
        headers.push(&kind.to_be_bytes());
        headers
    }

    /// Appends bytes; what would not fit is left out, which cannot happen for the headers that exist.
    pub fn push(&mut self, bytes: &[u8]) {
        if let Some(place) = self.bytes.get_mut(self.length..self.length + bytes.len()) {
            place.copy_from_slice(bytes);
            self.length += bytes.len();
        }
    }

    /// An IP header for `length` bytes of `protocol`. `fragment` is `Some` for a part of a datagram; without,
    /// IPv4 has "don't fragment" set.
    pub fn ip(
        &mut self,
        source: IpAddr,
        destination: IpAddr,
        protocol: u8,
        hops: u8,
        length: usize,
        fragment: Option<Fragment>,
    ) {
        match (source, destination) {
            (IpAddr::V4(source), IpAddr::V4(destination)) => {
                let (id, bits) = match fragment {
                    Some(fragment) => {
                        (fragment.id as u16, (fragment.offset / 8) as u16 | u16::from(fragment.more) << 13)
                    }
                    None => (0, 0x4000),
                };
                let mut header = [0; IPV4_BYTES];
                header[0] = 0x45;
                header[2..4].copy_from_slice(&((IPV4_BYTES + length) as u16).to_be_bytes());
                header[4..6].copy_from_slice(&id.to_be_bytes());
                header[6..8].copy_from_slice(&bits.to_be_bytes());
                header[8] = hops;
                header[9] = protocol;
                header[12..16].copy_from_slice(&source.octets());
                header[16..20].copy_from_slice(&destination.octets());
                let checksum = Sum::default().bytes(&header).checksum();
                header[10..12].copy_from_slice(&checksum.to_be_bytes());
                self.push(&header);
            }
            (source, destination) => {
                let extra = if fragment.is_some() { FRAGMENT_BYTES } else { 0 };
                let mut header = [0; IPV6_BYTES];
                header[0] = 0x60;
                header[4..6].copy_from_slice(&((extra + length) as u16).to_be_bytes());
                header[6] = if fragment.is_some() { FRAGMENT } else { protocol };
                header[7] = hops;
                header[8..24].copy_from_slice(&v6_of(source).octets());
                header[24..40].copy_from_slice(&v6_of(destination).octets());
                self.push(&header);
                if let Some(fragment) = fragment {
                    let bits = (fragment.offset as u16 & 0xfff8) | u16::from(fragment.more);
                    self.push(&[protocol, 0]);
                    self.push(&bits.to_be_bytes());
                    self.push(&fragment.id.to_be_bytes());
                }
            }
        }
    }

    /// The bytes so far.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes[..self.length]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_sum_does_not_depend_on_the_pieces() {
        let bytes: Vec<u8> = (0..999_u32).map(|n| (n * 7 % 251) as u8).collect();
        let simple = bytes.chunks(2).fold(0_u32, |sum, pair| {
            let sum = sum + (u32::from(pair[0]) << 8 | u32::from(*pair.get(1).unwrap_or(&0)));
            (sum & 0xffff) + (sum >> 16)
        });
        assert_eq!(u32::from(Sum::default().bytes(&bytes).folded()), simple);
        for cut in [0, 1, 2, 3, 500, 501, 998, 999] {
            let (a, b) = bytes.split_at(cut);
            let (b, c) = b.split_at(b.len() / 3);
            assert_eq!(u32::from(Sum::default().pieces(&[a, b, &[], c]).folded()), simple, "{cut}");
        }
    }

    #[test]
    fn headers_that_are_made_can_be_read() {
        let v4 = ["10.0.2.2", "10.0.2.15"].map(|text| text.parse::<IpAddr>().unwrap());
        let v6 = ["fe80::2", "ff02::1"].map(|text| text.parse::<IpAddr>().unwrap());
        let part = Fragment { id: 7, offset: 1480, more: true };
        for [source, destination] in [v4, v6] {
            for fragment in [None, Some(part)] {
                let mut headers = Headers::ethernet(BROADCAST, [2; 6], 1);
                headers.ip(source, destination, UDP, 64, 4, fragment);
                let frame = [headers.bytes(), b"dataPADDING"].concat();
                let ethernet = Ethernet::parse(&frame).unwrap();
                let ip = if source.is_ipv4() {
                    Ip::parse_v4(ethernet.payload).unwrap()
                } else {
                    Ip::parse_v6(ethernet.payload).unwrap()
                };
                assert_eq!((ip.source, ip.destination, ip.protocol), (source, destination, UDP));
                assert_eq!((ip.payload, ip.fragment, ip.hops), (&b"data"[..], fragment, 64));
            }
        }
    }

    #[test]
    fn extension_headers_are_skipped_within_bounds() {
        let packet = |next: u8, payload: &[u8]| {
            let mut headers = Headers::ethernet([0; 6], [0; 6], 0);
            let address = IpAddr::V6(Ipv6Addr::LOCALHOST);
            headers.ip(address, address, next, 64, payload.len(), None);
            [&headers.bytes()[ETHERNET_BYTES..], payload].concat()
        };
        let options = [UDP, 0, 0, 0, 0, 0, 0, 0];
        let parsed = packet(HOP_BY_HOP, &[&options[..], b"x"].concat());
        let parsed = Ip::parse_v6(&parsed).unwrap();
        assert_eq!((parsed.protocol, parsed.payload), (UDP, &b"x"[..]));
        let too_long = packet(HOP_BY_HOP, &[UDP, 200, 0, 0, 0, 0, 0, 0]);
        assert!(Ip::parse_v6(&too_long).is_none());
        let routed = packet(ROUTING, &[UDP, 0, 0, 1, 0, 0, 0, 0]);
        assert!(Ip::parse_v6(&routed).is_none(), "segments are left");
        let endless = packet(HOP_BY_HOP, &[0; 8 * 200]);
        assert!(Ip::parse_v6(&endless).is_none());
        let atomic = packet(FRAGMENT, &[UDP, 0, 0, 0, 0, 0, 0, 1, 5]);
        let atomic = Ip::parse_v6(&atomic).unwrap();
        assert_eq!((atomic.fragment, atomic.payload), (None, &[5][..]));
    }

    #[test]
    fn fragment_headers_count_as_extension_headers() {
        let packet = |pairs: usize| {
            let mut chain = Vec::new();
            for n in 1..=pairs {
                chain.extend_from_slice(&[DESTINATION_OPTIONS, 0, 0, 0, 0, 0, 0, 1]);
                chain.extend_from_slice(&[if n == pairs { UDP } else { FRAGMENT }, 0, 0, 0, 0, 0, 0, 0]);
            }
            let mut headers = Headers::ethernet([0; 6], [0; 6], 0);
            let address = IpAddr::V6(Ipv6Addr::LOCALHOST);
            headers.ip(address, address, FRAGMENT, 64, chain.len(), None);
            [&headers.bytes()[ETHERNET_BYTES..], &chain].concat()
        };
        assert_eq!(Ip::parse_v6(&packet(2)).unwrap().protocol, UDP);
        for pairs in [5, 4095] {
            assert!(Ip::parse_v6(&packet(pairs)).is_none(), "{pairs} times two headers");
        }
    }

    #[test]
    fn what_was_put_together_is_no_fragment_again() {
        let chain = [&[FRAGMENT, 0, 0, 0, 0, 0, 0, 0][..], &[UDP, 0, 0, 1, 0, 0, 0, 1], b"datagram"].concat();
        let address = IpAddr::V6(Ipv6Addr::LOCALHOST);
        let mut ip = Ip {
            source: address,
            destination: address,
            protocol: DESTINATION_OPTIONS,
            hops: 64,
            dont_fragment: false,
            fragment: None,
            payload: &chain,
            packet: &[],
        };
        assert!(!ip.finish(), "{ip:?}");
    }

    #[test]
    fn lengths_are_believed_only_within_the_packet() {
        let mut headers = Headers::ethernet([0; 6], [0; 6], 0);
        headers.ip("10.0.2.15".parse().unwrap(), "1.1.1.1".parse().unwrap(), UDP, 64, 8, None);
        let mut bytes = headers.bytes()[ETHERNET_BYTES..].to_vec();
        assert!(Ip::parse_v4(&bytes).is_none(), "payload is missing");
        bytes.extend_from_slice(&[0, 1, 0, 2, 0, 9, 0, 0]);
        let ip = Ip::parse_v4(&bytes).unwrap();
        assert!(Udp::parse(ip.payload, false).is_none(), "longer than the packet");
        assert_eq!(Udp::parse(ip.payload, true).unwrap().payload, b"");
        assert!(Udp::parse(&[0, 1, 0, 2, 0, 7, 0, 0], false).is_none(), "shorter than its header");
        bytes[8] ^= 1;
        assert!(Ip::parse_v4(&bytes).is_none(), "checksum");
    }
}
