//! Packets on their way to the guest.
//!
//! [`FrameIo`] is what carries frames: the ring between two processes, or lists in tests and fuzzing. [`Sender`]
//! builds packets on top of it: it knows the guest's Ethernet addresses, leaves checksums to a guest that takes
//! partial ones, sends large TCP segments as one frame to a guest that takes these, and cuts or fragments what
//! must be.
//!
//! # Checksums
//!
//! A guest that takes partial checksums gets the sum of the pseudo header and the note that the rest is missing
//! (not "data valid" with a wrong sum): such a packet stays right when the guest passes it on to somebody else.

use std::collections::HashMap;
use std::net::{IpAddr, Ipv6Addr, SocketAddr};

use atoll_network::header::{PartialChecksum, SegmentKind, Segmentation};
use atoll_network::port::MAX_FRAME;
use atoll_network::ring::{Peer, RingError};
use atoll_network::{FrameHeader, Offloads};

use crate::config::{Addresses, GATEWAY_MAC};
use crate::icmp::{Trouble, tell_tcp};
use crate::output::{Flow4Tuple, Output, TCP_HEADER_MAX, TCP_HEADER_MIN, TcpFlags, TcpHeader, Unreachable};
use crate::stats::Stats;
use crate::wire::{
    BROADCAST, ETHERNET_BYTES, ETHERTYPE_IPV4, ETHERTYPE_IPV6, FRAGMENT_BYTES, Fragment, Headers, ICMPV6,
    IPV4_BYTES, IPV6_BYTES, MAX_PACKET, Mac, Sum, TCP, UDP, UDP_BYTES,
};

/// Time to live of packets that are made here.
pub const HOPS: u8 = 64;
/// Hop limit of neighbour discovery (RFC 4861: proof that a packet is from this link).
pub const HOPS_NDP: u8 = 255;

/// Most addresses of the guest whose Ethernet address is remembered. Guests with machines of their own behind a
/// bridge have a few; an entry more than this replaces all, and they are learned again.
const MAX_NEIGHBOURS: usize = 256;

/// What carries frames between the machine and this process.
pub trait FrameIo {
    /// Pairs of directions.
    fn pairs(&self) -> u16;
    /// Copies the guest's next frame to `into`.
    fn next(&mut self, pair: u16, into: &mut Vec<u8>) -> Result<Option<FrameHeader>, RingError>;
    /// Gives a frame in pieces. `false`: no room, and there will be an event.
    fn push(&mut self, pair: u16, header: &FrameHeader, frame: &[&[u8]]) -> Result<bool, RingError>;
    /// Bytes of frame that surely fit now.
    fn room(&self, pair: u16) -> usize;
    /// Asks for an event when there is room. `true`: there is, and none will come.
    fn request_room(&mut self, pair: u16) -> Result<bool, RingError>;
    /// What the guest takes.
    fn offloads(&self) -> Offloads;
}

impl FrameIo for Peer {
    fn pairs(&self) -> u16 {
        Self::pairs(self)
    }
    fn next(&mut self, pair: u16, into: &mut Vec<u8>) -> Result<Option<FrameHeader>, RingError> {
        Self::next(self, pair, into)
    }
    fn push(&mut self, pair: u16, header: &FrameHeader, frame: &[&[u8]]) -> Result<bool, RingError> {
        Self::push(self, pair, header, frame)
    }
    fn room(&self, pair: u16) -> usize {
        Self::room(self, pair)
    }
    fn request_room(&mut self, pair: u16) -> Result<bool, RingError> {
        Self::request_room_event(self, pair)
    }
    fn offloads(&self) -> Offloads {
        self.receive_offloads()
    }
}

/// What became of a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub enum Sending {
    /// Sent, or dropped as networks do.
    Done,
    /// No room: nothing was sent.
    Full,
}

/// Builds packets for the guest; see the module's documentation.
pub struct Sender<F> {
    /// What carries the frames.
    pub frames: F,
    /// Addresses as the guest sees them.
    pub addresses: Addresses,
    /// Counters.
    pub stats: Stats,
    /// The Ethernet address for addresses not in `neighbours`: the configured one, or whoever spoke last.
    guest_mac: Option<Mac>,
    guest_mac_is_fixed: bool,
    neighbours: HashMap<IpAddr, Mac>,
    fragment_id: u32,
    /// The first failure of the frames; everything is dropped after it.
    broken: Option<RingError>,
    /// A packet found no room since the last [`Sender::take_full`].
    full: bool,
}

impl<F: FrameIo> Sender<F> {
    /// Sends to a guest whose Ethernet address may be known already.
    pub fn new(frames: F, addresses: Addresses, guest_mac: Option<Mac>) -> Self {
        Self {
            frames,
            addresses,
            stats: Stats::default(),
            guest_mac,
            guest_mac_is_fixed: guest_mac.is_some(),
            neighbours: HashMap::new(),
            fragment_id: 0,
            broken: None,
            full: false,
        }
    }

    /// Notes who has an address of the guest.
    pub fn learn(&mut self, address: IpAddr, mac: Mac) {
        if mac[0] & 1 != 0 || mac == GATEWAY_MAC {
            return;
        }
        if !self.guest_mac_is_fixed {
            self.guest_mac = Some(mac);
        }
        if self.neighbours.get(&address) == Some(&mac) || !self.addresses.may_be_source(address) {
            return;
        }
        if self.neighbours.len() >= MAX_NEIGHBOURS {
            self.neighbours.clear();
        }
        self.neighbours.insert(address, mac);
    }

    /// Why frames no longer pass, once.
    pub fn take_failure(&mut self) -> Option<RingError> {
        self.broken.take()
    }

    /// Notes a failure of the frames.
    pub fn fail(&mut self, error: RingError) {
        self.broken.get_or_insert(error);
    }

    /// Whether a packet found no room since the last call.
    pub fn take_full(&mut self) -> bool {
        std::mem::take(&mut self.full)
    }

    /// Whether any packet of a flow to `to` fits now. If not, an event was asked for.
    pub fn has_room(&mut self, to: SocketAddr) -> bool {
        let pair = self.pair_of(to.ip(), to.port());
        if self.frames.room(pair) >= MAX_FRAME {
            return true;
        }
        match self.frames.request_room(pair) {
            Ok(true) => true,
            Ok(false) => {
                self.full = true;
                false
            }
            Err(error) => {
                self.fail(error);
                true
            }
        }
    }

    fn mac_of(&self, address: IpAddr) -> Option<Mac> {
        match address {
            IpAddr::V4(v4) if v4.is_broadcast() => Some(BROADCAST),
            IpAddr::V4(v4) if self.addresses.v4.is_some_and(|own| own.broadcast() == v4) => Some(BROADCAST),
            IpAddr::V6(v6) if v6.is_multicast() => {
                let [.., a, b, c, d] = v6.octets();
                Some([0x33, 0x33, a, b, c, d])
            }
            _ => self.neighbours.get(&address).copied().or(self.guest_mac),
        }
    }

    /// The pair of rings that a flow's packets take, so that they stay in order.
    fn pair_of(&self, address: IpAddr, port: u16) -> u16 {
        let pairs = self.frames.pairs().max(1);
        if pairs == 1 {
            return 0;
        }
        let folded = match address {
            IpAddr::V4(address) => u64::from(address.to_bits()),
            IpAddr::V6(address) => (address.to_bits() >> 64) as u64 ^ address.to_bits() as u64,
        };
        let mixed = (folded ^ u64::from(port) << 32).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        ((mixed >> 48) % u64::from(pairs)) as u16
    }

    /// Gives a whole frame in pieces.
    pub fn frame(&mut self, pair: u16, header: &FrameHeader, pieces: &[&[u8]]) -> Sending {
        match self.frames.push(pair, header, pieces) {
            Ok(true) => {
                self.stats.frames_to_guest += 1;
                self.stats.bytes_to_guest += pieces.iter().map(|piece| piece.len() as u64).sum::<u64>();
                Sending::Done
            }
            Ok(false) => {
                self.full = true;
                Sending::Full
            }
            Err(error) => {
                self.fail(error);
                Sending::Done
            }
        }
    }

    /// As [`Sender::frame`], for what may be dropped.
    pub fn frame_or_drop(&mut self, header: &FrameHeader, pieces: &[&[u8]]) {
        if self.frame(0, header, pieces) == Sending::Full {
            self.stats.dropped_full += 1;
        }
    }

    fn ethernet(&mut self, to: IpAddr) -> Option<Headers> {
        let Some(mac) = self.mac_of(to) else {
            self.stats.dropped_unknown_guest += 1;
            return None;
        };
        let kind = if to.is_ipv4() { ETHERTYPE_IPV4 } else { ETHERTYPE_IPV6 };
        Some(Headers::ethernet(mac, GATEWAY_MAC, kind))
    }

    /// A UDP datagram. What is larger than the MTU is fragmented.
    pub fn udp(&mut self, from: SocketAddr, to: SocketAddr, payload: &[u8]) -> Sending {
        let Some(ethernet) = self.ethernet(to.ip()) else { return Sending::Done };
        self.udp_frame(ethernet, from, to, payload)
    }

    /// As [`Sender::udp`], to an Ethernet address.
    pub fn udp_to_mac(&mut self, mac: Mac, from: SocketAddr, to: SocketAddr, payload: &[u8]) {
        let kind = if to.is_ipv4() { ETHERTYPE_IPV4 } else { ETHERTYPE_IPV6 };
        let ethernet = Headers::ethernet(mac, GATEWAY_MAC, kind);
        if self.udp_frame(ethernet, from, to, payload) == Sending::Full {
            self.stats.dropped_full += 1;
        }
    }

    fn udp_frame(&mut self, ethernet: Headers, from: SocketAddr, to: SocketAddr, payload: &[u8]) -> Sending {
        let length = UDP_BYTES + payload.len();
        let ip_bytes = if to.is_ipv4() { IPV4_BYTES } else { IPV6_BYTES };
        if ip_bytes + length > MAX_PACKET {
            self.stats.dropped_full += 1;
            return Sending::Done;
        }
        let mut udp = [0; UDP_BYTES];
        udp[0..2].copy_from_slice(&from.port().to_be_bytes());
        udp[2..4].copy_from_slice(&to.port().to_be_bytes());
        udp[4..6].copy_from_slice(&(length as u16).to_be_bytes());
        let sum = Sum::default().pseudo_header(from.ip(), to.ip(), UDP, length);
        let pair = self.pair_of(to.ip(), to.port());
        let whole = ip_bytes + length <= usize::from(self.addresses.mtu);
        let mut header = FrameHeader::default();
        let checksum = if whole && self.frames.offloads().checksum {
            let start = (ETHERNET_BYTES + ip_bytes) as u16;
            header.checksum = Some(PartialChecksum { start, offset: 6 });
            sum.folded()
        } else {
            // Zero would say that there is none.
            match sum.bytes(&udp).bytes(payload).checksum() {
                0 => 0xffff,
                checksum => checksum,
            }
        };
        udp[6..8].copy_from_slice(&checksum.to_be_bytes());
        if !whole {
            return self.fragments(pair, ethernet, (from.ip(), to.ip()), UDP, &[&udp, payload]);
        }
        let mut headers = ethernet;
        headers.ip(from.ip(), to.ip(), UDP, HOPS, length, None);
        headers.push(&udp);
        self.frame(pair, &header, &[headers.bytes(), payload])
    }

    /// An ICMP or ICMPv6 message, whose checksum field is zero. What is larger than the MTU is fragmented.
    pub fn icmp(&mut self, from: IpAddr, to: IpAddr, hops: u8, message: &[u8]) {
        let Some(ethernet) = self.ethernet(to) else { return };
        let protocol = if to.is_ipv4() { crate::wire::ICMP } else { ICMPV6 };
        let mut sum = Sum::default();
        if to.is_ipv6() {
            sum = sum.pseudo_header(from, to, ICMPV6, message.len());
        }
        let Some((head, rest)) = message.split_at_checked(4) else { return };
        let mut head = [head[0], head[1], 0, 0];
        let checksum = sum.bytes(&head).bytes(rest).checksum();
        head[2..4].copy_from_slice(&checksum.to_be_bytes());
        let ip_bytes = if to.is_ipv4() { IPV4_BYTES } else { IPV6_BYTES };
        if ip_bytes + message.len() > MAX_PACKET {
            return;
        }
        let sending = if ip_bytes + message.len() > usize::from(self.addresses.mtu) {
            self.fragments(0, ethernet, (from, to), protocol, &[&head, rest])
        } else {
            let mut headers = ethernet;
            headers.ip(from, to, protocol, hops, message.len(), None);
            self.frame(0, &FrameHeader::default(), &[headers.bytes(), &head, rest])
        };
        if sending == Sending::Full {
            self.stats.dropped_full += 1;
        }
    }

    /// A datagram in fragments. When room runs out, the rest is dropped as networks do.
    fn fragments(
        &mut self,
        pair: u16,
        ethernet: Headers,
        (from, to): (IpAddr, IpAddr),
        protocol: u8,
        pieces: &[&[u8]],
    ) -> Sending {
        let total: usize = pieces.iter().map(|piece| piece.len()).sum();
        let overhead = if to.is_ipv4() { IPV4_BYTES } else { IPV6_BYTES + FRAGMENT_BYTES };
        let step = (usize::from(self.addresses.mtu).saturating_sub(overhead) & !7).max(8);
        self.fragment_id = self.fragment_id.wrapping_add(1);
        let mut offset = 0;
        while offset < total {
            let end = (offset + step).min(total);
            let fragment = Fragment { id: self.fragment_id, offset, more: end < total };
            let mut headers = ethernet.clone();
            headers.ip(from, to, protocol, HOPS, end - offset, Some(fragment));
            let mut part = Part::default();
            part.push(headers.bytes());
            part.push_range(pieces, offset, end);
            match (self.frame(pair, &FrameHeader::default(), part.pieces()), offset) {
                (Sending::Full, 0) => return Sending::Full,
                (Sending::Full, _) => {
                    self.stats.dropped_full += 1;
                    break;
                }
                (Sending::Done, _) => offset = end,
            }
        }
        Sending::Done
    }

    fn takes_large(&self, v6: bool) -> bool {
        let offloads = self.frames.offloads();
        offloads.checksum && if v6 { offloads.tcp6 } else { offloads.tcp4 }
    }

    /// One TCP packet, large when `segment` says so.
    fn tcp_packet(
        &mut self,
        ethernet: &Headers,
        flow: &Flow4Tuple,
        header: &TcpHeader,
        payload: &[&[u8]],
        segment: Option<u16>,
    ) -> Sending {
        let (from, to) = (flow.remote, flow.guest);
        let mut tcp = [0; TCP_HEADER_MAX];
        let tcp_bytes = header.write(from.port(), to.port(), &mut tcp);
        let length = tcp_bytes + payload.iter().map(|piece| piece.len()).sum::<usize>();
        let mut headers = ethernet.clone();
        headers.ip(from.ip(), to.ip(), TCP, HOPS, length, None);
        let ip_end = headers.bytes().len();
        let sum = Sum::default().pseudo_header(from.ip(), to.ip(), TCP, length);
        let mut frame_header = FrameHeader::default();
        let tcp = tcp.get_mut(..tcp_bytes).unwrap_or_default();
        let checksum = if self.frames.offloads().checksum {
            frame_header.checksum = Some(PartialChecksum { start: ip_end as u16, offset: 16 });
            sum.folded()
        } else {
            sum.bytes(tcp).pieces(payload).checksum()
        };
        if let Some(place) = tcp.get_mut(16..18) {
            place.copy_from_slice(&checksum.to_be_bytes());
        }
        headers.push(tcp);
        if let Some(size) = segment {
            let kind = if flow.is_v6() { SegmentKind::Tcp6 } else { SegmentKind::Tcp4 };
            let header_len = (ip_end + tcp_bytes) as u16;
            frame_header.segmentation = Some(Segmentation { kind, size, header_len, ecn: false });
        }
        let mut part = Part::default();
        part.push(headers.bytes());
        for piece in payload {
            part.push(piece);
        }
        let pair = self.pair_of(to.ip(), to.port());
        self.frame(pair, &frame_header, part.pieces())
    }

    /// Cuts a payload that the guest does not take as one.
    fn tcp_segments(
        &mut self,
        ethernet: &Headers,
        flow: &Flow4Tuple,
        header: &TcpHeader,
        payload: &[&[u8]],
        mss: usize,
    ) -> bool {
        let total: usize = payload.iter().map(|piece| piece.len()).sum();
        let per_frame = ETHERNET_BYTES + IPV6_BYTES + TCP_HEADER_MAX + RECORD_OVERHEAD;
        let needed = total + total.div_ceil(mss) * per_frame;
        let pair = self.pair_of(flow.guest.ip(), flow.guest.port());
        // Nothing or everything: room for all is looked for first. The ring says at most how much one frame may
        // have; a first frame that does not fit has it send an event.
        if self.frames.room(pair) < needed.min(MAX_FRAME) {
            match self.frames.request_room(pair) {
                Ok(true) => {}
                Ok(false) => {
                    self.full = true;
                    return false;
                }
                Err(error) => self.fail(error),
            }
        }
        let last_only = TcpFlags::FIN.with(TcpFlags::PSH);
        let mut offset = 0;
        while offset < total {
            let end = (offset + mss).min(total);
            let mut part_header = *header;
            part_header.seq = header.seq.wrapping_add(offset as u32);
            if end < total {
                part_header.flags = header.flags.without(last_only);
            }
            if offset > 0 {
                part_header.flags = part_header.flags.without(TcpFlags::CWR);
            }
            let mut part = Part::default();
            part.push_range(payload, offset, end);
            match self.tcp_packet(ethernet, flow, &part_header, part.pieces(), None) {
                Sending::Done => offset = end,
                Sending::Full if offset == 0 => return false,
                Sending::Full => {
                    // Lost on the way, as far as TCP is concerned.
                    self.stats.dropped_full += 1;
                    return true;
                }
            }
        }
        true
    }

    /// Sends a router advertisement or another multicast of neighbour discovery.
    pub fn ndp(&mut self, from: Ipv6Addr, to: Ipv6Addr, message: &[u8]) {
        self.icmp(from.into(), to.into(), HOPS_NDP, message);
    }
}

/// What a ring needs for a record besides the frame, at most.
const RECORD_OVERHEAD: usize = 32;

impl<F: FrameIo> Output for Sender<F> {
    fn tcp(
        &mut self,
        flow: &Flow4Tuple,
        header: &TcpHeader,
        payload: &[&[u8]],
        segment: Option<u16>,
    ) -> bool {
        let total: usize = payload.iter().map(|piece| piece.len()).sum();
        let ip_bytes = if flow.is_v6() { IPV6_BYTES } else { IPV4_BYTES };
        if ip_bytes + TCP_HEADER_MAX + total > MAX_PACKET {
            debug_assert!(total <= MAX_PACKET, "a payload beyond max_payload");
            self.stats.dropped_full += 1;
            return true;
        }
        let Some(ethernet) = self.ethernet(flow.guest.ip()) else { return true };
        match segment.filter(|mss| *mss > 0 && total > usize::from(*mss)) {
            Some(mss) if !self.takes_large(flow.is_v6()) => {
                self.tcp_segments(&ethernet, flow, header, payload, mss.into())
            }
            large => self.tcp_packet(&ethernet, flow, header, payload, large) == Sending::Done,
        }
    }

    fn max_payload(&self, v6: bool) -> usize {
        let ip_bytes = if v6 { IPV6_BYTES } else { IPV4_BYTES };
        if self.takes_large(v6) {
            MAX_PACKET - ip_bytes - TCP_HEADER_MAX
        } else {
            usize::from(self.addresses.mtu).saturating_sub(ip_bytes + TCP_HEADER_MIN)
        }
    }

    fn mtu(&self) -> u16 {
        self.addresses.mtu
    }

    fn unreachable(&mut self, flow: &Flow4Tuple, header: &TcpHeader, why: Unreachable) {
        let trouble = match why {
            Unreachable::Network => Trouble::Network,
            Unreachable::Host => Trouble::Host,
            Unreachable::Prohibited => Trouble::Prohibited,
        };
        tell_tcp(self, flow, header, trouble);
    }
}

/// Pieces of one frame, without an allocation. More pieces than there is place for are a bug of the caller.
#[derive(Default)]
struct Part<'a> {
    pieces: [&'a [u8]; Part::MAX],
    count: usize,
}

impl<'a> Part<'a> {
    const MAX: usize = 24;

    fn push(&mut self, piece: &'a [u8]) {
        if piece.is_empty() {
            return;
        }
        debug_assert!(self.count < Self::MAX);
        if let Some(place) = self.pieces.get_mut(self.count) {
            *place = piece;
            self.count += 1;
        }
    }

    /// Bytes `start..end` of what `pieces` make together.
    fn push_range(&mut self, pieces: &[&'a [u8]], start: usize, end: usize) {
        let mut at = 0;
        for piece in pieces {
            let from = start.saturating_sub(at).min(piece.len());
            let to = end.saturating_sub(at).min(piece.len());
            self.push(piece.get(from..to).unwrap_or_default());
            at += piece.len();
        }
    }

    fn pieces(&self) -> &[&'a [u8]] {
        &self.pieces[..self.count]
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::UserNetConfig;
    use crate::testing::Lists;
    use crate::wire::{Ethernet, Ip, Udp};

    const GUEST: Mac = [2, 0, 0, 0, 0, 1];

    fn sender(offloads: Offloads) -> Sender<Lists> {
        let addresses = UserNetConfig::default().check().unwrap();
        Sender::new(Lists::new(offloads), addresses, Some(GUEST))
    }

    fn flow(v6: bool) -> Flow4Tuple {
        let (guest, remote) =
            if v6 { ("[fd61:746f:6c6c::15]:9", "[2001:db8::1]:80") } else { ("10.0.2.15:9", "1.1.1.1:80") };
        Flow4Tuple { guest: guest.parse().unwrap(), remote: remote.parse().unwrap() }
    }

    fn parse(frame: &[u8]) -> Ip<'_> {
        let ethernet = Ethernet::parse(frame).unwrap();
        assert_eq!((ethernet.destination, ethernet.source), (GUEST, GATEWAY_MAC));
        match ethernet.kind {
            ETHERTYPE_IPV4 => Ip::parse_v4(ethernet.payload).unwrap(),
            _ => Ip::parse_v6(ethernet.payload).unwrap(),
        }
    }

    #[test]
    fn a_large_payload_is_cut_for_a_guest_without_offloads() {
        for v6 in [false, true] {
            let mut sender = sender(Offloads::NONE);
            let payload: Vec<u8> = (0..4000_u32).map(|n| n as u8).collect();
            let flags = TcpFlags::ACK.with(TcpFlags::PSH);
            let header = TcpHeader { seq: u32::MAX - 10, flags, ..TcpHeader::default() };
            let (a, b) = payload.split_at(1001);
            assert!(sender.tcp(&flow(v6), &header, &[a, b], Some(1400)));
            let frames = sender.frames.take_sent();
            assert_eq!(frames.len(), 3);
            let mut got = Vec::new();
            for (n, (frame_header, frame)) in frames.iter().enumerate() {
                assert_eq!(*frame_header, FrameHeader::default());
                let ip = parse(frame);
                assert!(ip.transport_checksum_is_right());
                let (source, destination, tcp, data) = TcpHeader::parse(ip.payload).unwrap();
                assert_eq!((source, destination), (80, 9));
                assert_eq!(tcp.seq, header.seq.wrapping_add(got.len() as u32));
                assert_eq!(tcp.flags.has(TcpFlags::PSH), n == 2);
                got.extend_from_slice(data);
            }
            assert_eq!(got, payload);
        }
    }

    #[test]
    fn a_large_payload_is_one_frame_for_a_guest_with_offloads() {
        for v6 in [false, true] {
            let mut sender = sender(Offloads::TCP);
            let payload = vec![7; sender.max_payload(v6)];
            assert!(sender.tcp(&flow(v6), &TcpHeader::default(), &[&payload], Some(1400)));
            let frames = sender.frames.take_sent();
            let [(header, frame)] = &frames[..] else { panic!("{} frames", frames.len()) };
            assert_eq!(header.segmentation.unwrap().size, 1400);
            let start = usize::from(header.checksum.unwrap().start);
            let ip = parse(frame);
            assert_eq!(&frame[start..], ip.payload);
            // Completing the checksum as a driver does makes it right.
            let mut done = frame.clone();
            let checksum = Sum::default().bytes(&frame[start..]).checksum();
            done[start + 16..start + 18].copy_from_slice(&checksum.to_be_bytes());
            assert!(parse(&done).transport_checksum_is_right());
            assert!(!sender.tcp_full_when_blocked());
        }
    }

    impl Sender<Lists> {
        fn tcp_full_when_blocked(&mut self) -> bool {
            self.frames.block();
            self.tcp(&flow(false), &TcpHeader::default(), &[], None)
        }
    }

    #[test]
    fn large_datagrams_are_fragmented() {
        for v6 in [false, true] {
            let mut sender = sender(Offloads::TCP);
            let payload: Vec<u8> = (0..5001_u32).map(|n| (n % 251) as u8).collect();
            let flow = flow(v6);
            assert_eq!(sender.udp(flow.remote, flow.guest, &payload), Sending::Done);
            let frames = sender.frames.take_sent();
            let mut got = Vec::new();
            for (header, frame) in &frames {
                assert_eq!(*header, FrameHeader::default());
                assert!(frame.len() <= 1514);
                let ip = parse(frame);
                let fragment = ip.fragment.unwrap();
                assert_eq!(fragment.offset, got.len());
                assert_eq!(fragment.more, got.len() + ip.payload.len() < 5009);
                got.extend_from_slice(ip.payload);
            }
            let ip = Ip { payload: &got, fragment: None, ..parse(&frames[0].1) };
            assert!(ip.transport_checksum_is_right());
            assert_eq!(Udp::parse(&got, false).unwrap().payload, payload);
        }
    }

    #[test]
    fn an_unknown_guest_gets_nothing_until_it_speaks() {
        let addresses = UserNetConfig::default().check().unwrap();
        let mut sender = Sender::new(Lists::new(Offloads::NONE), addresses, None);
        let flow = flow(false);
        assert_eq!(sender.udp(flow.remote, flow.guest, b"x"), Sending::Done);
        assert!(sender.frames.take_sent().is_empty());
        sender.learn(flow.guest.ip(), BROADCAST);
        sender.learn(flow.guest.ip(), GUEST);
        assert_eq!(sender.udp(flow.remote, flow.guest, b"x"), Sending::Done);
        assert_eq!(sender.frames.take_sent().len(), 1);
    }
}
