//! The network: frames of the guest to the protocols, sockets' readiness to the protocols, and the clock.
//!
//! [`Nat`] owns everything; one thread calls it. Who watches the ring and the sockets is outside
//! ([`crate::engine`]), so that tests and fuzzing drive it without either.
//!
//! # Which packets are taken
//!
//! ```text
//!   Ethernet to us or to a group ── ARP ─────────────────────────────▶ neighbours
//!     │                          ── IPv4, IPv6: whole, or put together from fragments
//!     │                                │  source is an address of the guest's network (DHCP: none yet)
//!     │                                ├─ UDP 67, 547 ───────────────▶ dhcp, dhcp6
//!     │                                ├─ ICMPv6 of hop limit 255 ───▶ neighbours
//!     │                                ├─ UDP 53 of the DNS server ──▶ dns
//!     │                                │  hops left? else "time exceeded"
//!     │                                ├─ UDP ───────────────────────▶ udp
//!     │                                ├─ TCP ───────────────────────▶ tcp
//!     │                                └─ echo ──────────────────────▶ echo
//!     └─ everything else is counted and dropped
//! ```
//!
//! Frames come with partial checksums, which are not looked at, or with whole ones, which are verified.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::{Duration, Instant};

use atoll_network::header::SegmentKind;
use atoll_network::{FrameHeader, Offloads};
use rustix::net::SocketFlags;

use crate::config::{Addresses, Forward, GATEWAY_LINK_LOCAL, GATEWAY_MAC, Protocol, UserNetConfig};
use crate::dhcp::{self, Told};
use crate::dhcp6;
use crate::dns::{Dns, DnsContext, Resolvers};
use crate::echo::{Echo, EchoContext};
use crate::forward::{Bound, ForwardError, Forwards};
use crate::fragments::Reassembly;
use crate::host::Host;
use crate::icmp::{Trouble, tell_about};
use crate::leases::Leases;
use crate::neighbours::{
    ADVERTISEMENT_SECONDS, ALL_NODES, ROUTER_ADVERTISEMENT, advertisement, arp, neighbour,
};
use crate::output::{Flow4Tuple, TcpHeader};
use crate::policy::{DNS_PORT, NatPolicy, Policy};
use crate::poller::{Owner, Poller, Readiness};
use crate::sender::{FrameIo, HOPS_NDP, Sender};
use crate::stats::Stats;
use crate::tcp;
use crate::udp::{self, UdpContext, UdpTable, as_guest_sees, ip_address};
use crate::wire::{
    ETHERTYPE_ARP, ETHERTYPE_IPV4, ETHERTYPE_IPV6, Ethernet, Headers, ICMP, ICMPV6, Ip, Mac, TCP, UDP, Udp,
};

/// Bytes of the buffer for what one socket gives: the largest datagram.
const BUFFER_BYTES: usize = 65_536;
/// Frames taken from a pair of rings before sockets have their turn.
const FRAME_BATCH: usize = 256;
/// Connections accepted from a forward before others have their turn.
const ACCEPT_BATCH: usize = 64;
/// How long forwards wait when there are no descriptors for what they bring.
const ACCEPT_PAUSE: Duration = Duration::from_secs(1);

/// The offloads that the network takes from the machine.
pub const TAKEN: Offloads = Offloads { checksum: true, tcp4: true, tcp6: true, ecn: true, udp_l4: true };
/// The offloads that the network gives to a machine that takes them.
pub const GIVEN: Offloads = Offloads { checksum: true, tcp4: true, tcp6: true, ecn: false, udp_l4: false };

/// A user network; see the module's documentation.
pub struct Nat<F, P, H> {
    /// To and from the guest.
    pub sender: Sender<F>,
    /// Watches sockets.
    pub poller: P,
    /// Makes sockets.
    pub host: H,
    told: Told,
    host_loopback: bool,
    leases: Leases,
    reassembly: Reassembly,
    udp: UdpTable,
    /// Flows to DNS servers.
    queries: UdpTable,
    dns: Dns,
    echo: Echo,
    tcp: tcp::Table,
    forwards: Forwards,
    next_advertisement: Option<Instant>,
    /// Forwards are not watched until then.
    accept_again: Option<Instant>,
    frame: Vec<u8>,
    buffer: Vec<u8>,
}

/// What a packet's frame said about it.
#[derive(Clone, Copy)]
struct Marks {
    /// Checksums need not be looked at.
    trusted: bool,
    /// A large frame: bytes of payload of each segment.
    udp_segment: Option<u16>,
    source_mac: Mac,
}

/// Whether a packet was for one of the network's services.
#[derive(PartialEq, Eq)]
enum Served {
    Yes,
    No,
}

/// The policy, and what the host makes of it.
struct TcpPolicy<'a, H> {
    policy: NatPolicy,
    host: &'a H,
}

impl<H: Host> Policy for TcpPolicy<'_, H> {
    fn connect_to(&self, guest_dst: SocketAddr) -> Option<SocketAddr> {
        self.host.redirect_tcp(self.policy.connect_to(guest_dst)?)
    }
}

impl<F: FrameIo, P: Poller, H: Host> Nat<F, P, H> {
    /// A network without forwards. `config` was checked and has `addresses`.
    pub fn new(
        config: &UserNetConfig,
        addresses: Addresses,
        resolvers: Resolvers,
        (frames, poller, host): (F, P, H),
    ) -> Self {
        let limits = tcp::Limits { flows: config.max_flows, ..tcp::Limits::default() };
        Self {
            sender: Sender::new(frames, addresses, config.guest_mac),
            poller,
            host,
            told: Told { search: resolvers.search, hostname: config.hostname.clone() },
            host_loopback: config.host_loopback,
            leases: Leases::new(config.guest_mac),
            reassembly: Reassembly::default(),
            udp: UdpTable::new(config.max_flows, udp::IDLE, Owner::Udp),
            queries: UdpTable::new(config.max_flows.div_ceil(4), udp::IDLE_QUERIES, Owner::UdpQueries),
            dns: Dns::new(resolvers.servers),
            echo: Echo::default(),
            tcp: tcp::Table::new(limits),
            forwards: Forwards::default(),
            next_advertisement: None,
            accept_again: None,
            frame: Vec::with_capacity(BUFFER_BYTES + 64),
            buffer: Vec::with_capacity(BUFFER_BYTES),
        }
    }

    fn policy(&self) -> NatPolicy {
        NatPolicy {
            addresses: self.sender.addresses,
            host_loopback: self.host_loopback,
            resolver: self.dns.resolver(),
        }
    }

    /// Counters.
    pub fn stats(&self) -> Stats {
        Stats {
            dropped_fragments: self.reassembly.dropped,
            udp_flows: (self.udp.len() + self.queries.len()) as u64,
            tcp_flows: self.tcp.metrics().flows as u64,
            ..self.sender.stats.clone()
        }
    }

    /// Starts listening for a forward that is bound already.
    pub fn add_forward(&mut self, bound: Bound) -> Result<(), ForwardError> {
        self.sender.addresses.check_forward(&bound.forward)?;
        self.forwards.add(bound, &mut self.poller)
    }

    /// Ends a forward. Its connections stay, its UDP flows end.
    pub fn remove_forward(&mut self, forward: &Forward) -> Result<(), ForwardError> {
        let number = self.forwards.remove(forward, &mut self.poller)?;
        self.udp.forward_removed(number, &mut self.poller);
        Ok(())
    }

    /// Takes frames of the guest. `true`: there may be more, come back soon.
    pub fn take_frames(&mut self, now: Instant) -> bool {
        let mut more = false;
        let mut frame = std::mem::take(&mut self.frame);
        for pair in 0..self.sender.frames.pairs() {
            let mut left = FRAME_BATCH;
            loop {
                if left == 0 {
                    more = true;
                    break;
                }
                left -= 1;
                match self.sender.frames.next(pair, &mut frame) {
                    Ok(Some(header)) => self.take_frame(&header, &frame, now),
                    Ok(None) => break,
                    Err(error) => {
                        self.sender.fail(error);
                        break;
                    }
                }
            }
        }
        self.frame = frame;
        more
    }

    /// Takes one frame of the guest.
    pub fn take_frame(&mut self, header: &FrameHeader, frame: &[u8], now: Instant) {
        self.sender.stats.frames_from_guest += 1;
        self.sender.stats.bytes_from_guest += frame.len() as u64;
        if self.frame_parsed(header, frame, now).is_none() {
            self.sender.stats.dropped_malformed += 1;
        }
    }

    /// `None`: it is no frame that anybody here understands.
    fn frame_parsed(&mut self, header: &FrameHeader, frame: &[u8], now: Instant) -> Option<()> {
        let ethernet = Ethernet::parse(frame)?;
        let group = ethernet.destination[0] & 1 != 0;
        if ethernet.source[0] & 1 != 0 || (!group && ethernet.destination != GATEWAY_MAC) {
            // For somebody else on the link, where nobody else is.
            return None;
        }
        let marks = Marks {
            trusted: header.checksum.is_some() || header.data_valid || header.segmentation.is_some(),
            udp_segment: header
                .segmentation
                .filter(|segmentation| segmentation.kind == SegmentKind::UdpL4)
                .map(|segmentation| segmentation.size),
            source_mac: ethernet.source,
        };
        match ethernet.kind {
            ETHERTYPE_ARP => self.arp(ethernet.payload),
            ETHERTYPE_IPV4 if self.sender.addresses.v4.is_some() => {
                self.fragment_or_packet(Ip::parse_v4(ethernet.payload)?, marks, now)
            }
            ETHERTYPE_IPV6 if self.sender.addresses.v6.is_some() => {
                self.fragment_or_packet(Ip::parse_v6(ethernet.payload)?, marks, now)
            }
            _ => None,
        }
    }

    fn arp(&mut self, payload: &[u8]) -> Option<()> {
        let arp = arp(payload, &self.sender.addresses)?;
        let (address, mac) = arp.sender;
        if mac[0] & 1 != 0 {
            return None;
        }
        self.sender.learn(address.into(), mac);
        if let Some(answer) = arp.answer {
            let headers = Headers::ethernet(mac, GATEWAY_MAC, ETHERTYPE_ARP);
            self.sender.frame_or_drop(&FrameHeader::default(), &[headers.bytes(), &answer]);
        }
        Some(())
    }

    fn fragment_or_packet(&mut self, ip: Ip<'_>, marks: Marks, now: Instant) -> Option<()> {
        let Some(fragment) = ip.fragment else { return self.packet(&ip, marks, now) };
        if !self.sender.addresses.may_be_source(ip.source) {
            self.sender.stats.dropped_source += 1;
            return Some(());
        }
        if let Some(payload) = self.reassembly.add(&ip, fragment, now) {
            self.sender.stats.reassembled += 1;
            let mut whole = Ip { payload: &payload, fragment: None, dont_fragment: false, ..ip };
            whole.finish().then_some(())?;
            // What was fragmented had its checksum computed.
            let marks = Marks { trusted: false, udp_segment: None, ..marks };
            return self.packet(&whole, marks, now);
        }
        Some(())
    }

    fn packet(&mut self, ip: &Ip<'_>, marks: Marks, now: Instant) -> Option<()> {
        if !marks.trusted && !self.checksum_is_right(ip) {
            self.sender.stats.dropped_checksum += 1;
            return Some(());
        }
        if self.services(ip, marks)? == Served::Yes {
            return Some(());
        }
        let own = self.sender.addresses.is_own(ip.destination);
        if !self.sender.addresses.may_be_source(ip.source) {
            self.sender.stats.dropped_source += 1;
            return Some(());
        }
        self.sender.learn(ip.source, marks.source_mac);
        match ip.hops {
            0 => return None,
            1 if !own => {
                tell_about(&mut self.sender, ip, Trouble::Hops);
                return Some(());
            }
            _ => {}
        }
        match ip.protocol {
            UDP => self.udp_packet(ip, marks, now),
            TCP => self.tcp_packet(ip, now),
            ICMP | ICMPV6 if ip.source.is_ipv4() == (ip.protocol == ICMP) => {
                self.with_echo(now, |echo, cx| echo.packet(ip, cx));
                Some(())
            }
            _ => None,
        }
    }

    fn checksum_is_right(&self, ip: &Ip<'_>) -> bool {
        match ip.protocol {
            // IPv4 may leave it out (RFC 768).
            UDP if ip.source.is_ipv4() => {
                ip.payload.get(6..8) == Some(&[0, 0]) || udp_part(ip).transport_checksum_is_right()
            }
            UDP => udp_part(ip).transport_checksum_is_right(),
            TCP | ICMP | ICMPV6 => ip.transport_checksum_is_right(),
            _ => true,
        }
    }

    /// What is answered before the guest has an address.
    fn services(&mut self, ip: &Ip<'_>, marks: Marks) -> Option<Served> {
        match (ip.protocol, ip.source) {
            (ICMPV6, IpAddr::V6(source)) if (133..=137).contains(ip.payload.first()?) => {
                if ip.hops == HOPS_NDP {
                    self.neighbour(source, ip.payload, marks.source_mac)?;
                }
                Some(Served::Yes)
            }
            (UDP, source) => {
                let udp = Udp::parse(ip.payload, marks.udp_segment.is_some())?;
                match udp.destination {
                    dhcp::SERVER_PORT if source.is_ipv4() => self.dhcp(ip.destination, &udp),
                    dhcp6::SERVER_PORT if source.is_ipv6() => self.dhcp6(ip, &udp, marks),
                    _ => return Some(Served::No),
                }
                Some(Served::Yes)
            }
            _ => Some(Served::No),
        }
    }

    fn neighbour(&mut self, source: Ipv6Addr, message: &[u8], mac: Mac) -> Option<()> {
        let said = neighbour(source, message, &self.sender.addresses, &self.told)?;
        if let Some((address, mac)) = said.learned {
            self.sender.learn(address.into(), mac);
        } else {
            self.sender.learn(source.into(), mac);
        }
        if let Some((from, to, answer)) = said.answer {
            if answer.first() == Some(&ROUTER_ADVERTISEMENT) {
                self.sender.stats.router_advertisements += 1;
            }
            self.sender.ndp(from, to, &answer);
        }
        Some(())
    }

    fn dhcp(&mut self, destination: IpAddr, udp: &Udp<'_>) {
        let addresses = self.sender.addresses;
        let Some(v4) = addresses.v4 else { return };
        let ours = [v4.gateway, Ipv4Addr::BROADCAST, v4.broadcast()].map(IpAddr::V4);
        if !ours.contains(&destination) || udp.source != dhcp::CLIENT_PORT {
            return;
        }
        let Some(answer) = dhcp::answer(udp.payload, &addresses, &self.told, &mut self.leases) else {
            return;
        };
        self.sender.stats.dhcp_answers += 1;
        let from = SocketAddr::new(v4.gateway.into(), dhcp::SERVER_PORT);
        let to = SocketAddr::new(answer.to.into(), dhcp::CLIENT_PORT);
        self.sender.udp_to_mac(answer.mac, from, to, &answer.message);
    }

    fn dhcp6(&mut self, ip: &Ip<'_>, udp: &Udp<'_>, marks: Marks) {
        let addresses = self.sender.addresses;
        let to_us = ip.destination == IpAddr::V6(dhcp6::SERVERS) || addresses.is_gateway(ip.destination);
        if !to_us || !addresses.may_be_source(ip.source) {
            return;
        }
        let mac = marks.source_mac;
        let Some(answer) = dhcp6::answer(udp.payload, mac, &addresses, &self.told, &mut self.leases) else {
            return;
        };
        self.sender.stats.dhcp_answers += 1;
        let from = SocketAddr::new(GATEWAY_LINK_LOCAL.into(), dhcp6::SERVER_PORT);
        let to = SocketAddr::new(ip.source, dhcp6::CLIENT_PORT);
        self.sender.udp_to_mac(mac, from, to, &answer);
    }

    fn udp_packet(&mut self, ip: &Ip<'_>, marks: Marks, now: Instant) -> Option<()> {
        let udp = Udp::parse(ip.payload, marks.udp_segment.is_some())?;
        if udp.source == 0 || udp.destination == 0 {
            return None;
        }
        let datagrams =
            marks.udp_segment.map_or(1, |size| udp.payload.len().div_ceil(usize::from(size).max(1)));
        if datagrams > udp::MAX_SEGMENTS {
            return None;
        }
        let guest = SocketAddr::new(ip.source, udp.source);
        let remote = SocketAddr::new(ip.destination, udp.destination);
        if remote.port() == DNS_PORT && self.sender.addresses.is_dns(ip.destination) {
            self.with_dns(now, |dns, cx| dns.query(guest, remote, udp.payload, cx));
            return Some(());
        }
        let tuple = Flow4Tuple { guest, remote };
        // A client of a forward may have that port too.
        let asks = remote.port() == DNS_PORT && !self.udp.has(&tuple);
        let owner = if asks { Owner::UdpQueries } else { Owner::Udp };
        self.with_udp(owner, now, |table, cx| {
            table.packet(tuple, udp.payload, marks.udp_segment, ip, cx);
        });
        Some(())
    }

    fn tcp_packet(&mut self, ip: &Ip<'_>, now: Instant) -> Option<()> {
        let (source, destination, header, payload) = TcpHeader::parse(ip.payload)?;
        let unicast = match ip.destination {
            IpAddr::V4(address) => !address.is_broadcast() && !address.is_multicast(),
            IpAddr::V6(address) => !address.is_multicast(),
        };
        if source == 0 || destination == 0 || !unicast {
            return None;
        }
        let flow = Flow4Tuple {
            guest: SocketAddr::new(ip.source, source),
            remote: SocketAddr::new(ip.destination, destination),
        };
        self.with_tcp(now, |tcp, cx| tcp.packet(&flow, &header, payload, cx));
        Some(())
    }

    /// Calls with the flows to DNS servers if `owner` is [`Owner::UdpQueries`], else with all others.
    fn with_udp<R>(
        &mut self,
        owner: Owner,
        now: Instant,
        call: impl FnOnce(&mut UdpTable, &mut UdpContext<'_, F>) -> R,
    ) -> R {
        let policy = self.policy();
        let table = if owner == Owner::UdpQueries { &mut self.queries } else { &mut self.udp };
        let mut cx = UdpContext {
            sender: &mut self.sender,
            poller: &mut self.poller,
            host: &mut self.host,
            policy,
            forwards: &self.forwards,
            now,
            buffer: &mut self.buffer,
        };
        call(table, &mut cx)
    }

    fn with_dns<R>(&mut self, now: Instant, call: impl FnOnce(&mut Dns, &mut DnsContext<'_, F>) -> R) -> R {
        let mut cx = DnsContext {
            sender: &mut self.sender,
            poller: &mut self.poller,
            host: &mut self.host,
            now,
            buffer: &mut self.buffer,
        };
        call(&mut self.dns, &mut cx)
    }

    fn with_echo<R>(
        &mut self,
        now: Instant,
        call: impl FnOnce(&mut Echo, &mut EchoContext<'_, F>) -> R,
    ) -> R {
        let policy = self.policy();
        let mut cx = EchoContext {
            sender: &mut self.sender,
            poller: &mut self.poller,
            host: &mut self.host,
            policy,
            now,
            buffer: &mut self.buffer,
        };
        call(&mut self.echo, &mut cx)
    }

    fn with_tcp<R>(
        &mut self,
        now: Instant,
        call: impl FnOnce(&mut tcp::Table, &mut tcp::Context<'_>) -> R,
    ) -> R {
        let policy = TcpPolicy { policy: self.policy(), host: &self.host };
        let mut cx =
            tcp::Context { now, output: &mut self.sender, poller: &mut self.poller, policy: &policy };
        call(&mut self.tcp, &mut cx)
    }

    /// A socket is ready.
    pub fn ready(&mut self, owner: Owner, value: u64, readiness: Readiness, now: Instant) {
        match owner {
            Owner::Engine => {}
            Owner::Tcp => self.with_tcp(now, |tcp, cx| tcp.socket_ready(value, readiness, cx)),
            Owner::Udp | Owner::UdpQueries => self.with_udp(owner, now, |table, cx| table.ready(value, cx)),
            Owner::Dns => self.with_dns(now, |dns, cx| dns.ready(value, cx)),
            Owner::Echo => self.with_echo(now, |echo, cx| echo.ready(value, cx)),
            Owner::Forward => self.forward_ready(value, now),
        }
    }

    fn forward_ready(&mut self, number: u64, now: Instant) {
        let Some(Bound { forward, socket }) = self.forwards.get(number) else { return };
        let forward = *forward;
        let Some(guest) = self.sender.addresses.guest_of(&forward) else { return };
        if forward.protocol == Protocol::Udp {
            return self.with_udp(Owner::Udp, now, |table, cx| {
                if let Some(bound) = cx.forwards.get(number) {
                    table.forward_ready(number, guest, &bound.socket, cx);
                }
            });
        }
        let mut accepted = Vec::new();
        for _ in 0..ACCEPT_BATCH {
            match rustix::net::acceptfrom_with(socket, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK) {
                Ok((stream, Some(client))) => accepted.extend(ip_address(client).map(|c| (stream, c))),
                Ok((_, None)) => {}
                Err(rustix::io::Errno::AGAIN) => break,
                Err(rustix::io::Errno::INTR | rustix::io::Errno::CONNABORTED) => {}
                Err(error) => {
                    atoll_foundation::log_limited!(warn, "forward {forward} cannot accept: {error}");
                    self.forwards.watch_all(false, &mut self.poller);
                    self.accept_again = now.checked_add(ACCEPT_PAUSE);
                    break;
                }
            }
        }
        for (stream, client) in accepted {
            let Some(remote) = as_guest_sees(client, guest.is_ipv6(), &self.sender) else { continue };
            self.with_tcp(now, |tcp, cx| tcp.accepted(stream, &Flow4Tuple { guest, remote }, cx));
        }
    }

    /// There is room for frames to the guest again.
    pub fn room(&mut self, now: Instant) {
        self.udp.room(&mut self.poller);
        self.queries.room(&mut self.poller);
        self.with_tcp(now, |tcp, cx| tcp.room(cx));
    }

    /// Does what packets and events have left to do: to be called after each batch of them.
    pub fn flush(&mut self, now: Instant) {
        self.with_tcp(now, |tcp, cx| tcp.flush(cx));
    }

    /// Does what is due by the clock and says when to call again at the latest.
    pub fn expire(&mut self, now: Instant) -> Option<Instant> {
        self.reassembly.expire(now);
        if self.next_advertisement.is_none_or(|due| due <= now) {
            self.advertise();
            self.next_advertisement = now.checked_add(Duration::from_secs(ADVERTISEMENT_SECONDS));
        }
        if self.accept_again.is_some_and(|due| due <= now) {
            self.accept_again = None;
            self.forwards.watch_all(true, &mut self.poller);
        }
        let udp = self.udp.expire(now, &mut self.poller);
        let queries = self.queries.expire(now, &mut self.poller);
        let echo = self.echo.expire(now, &mut self.poller);
        let dns = self.with_dns(now, |dns, cx| dns.expire(cx));
        let tcp = self.with_tcp(now, |tcp, cx| tcp.expire(cx));
        [udp, queries, echo, dns, tcp, self.next_advertisement, self.accept_again].into_iter().flatten().min()
    }

    /// A router advertisement that nobody asked for.
    fn advertise(&mut self) {
        if let Some(message) = advertisement(&self.sender.addresses, &self.told) {
            self.sender.stats.router_advertisements += 1;
            self.sender.ndp(GATEWAY_LINK_LOCAL, ALL_NODES, &message);
        }
    }
}

/// A packet without what follows its UDP datagram.
fn udp_part<'a>(ip: &Ip<'a>) -> Ip<'a> {
    let length = crate::wire::be16(ip.payload, 4).map_or(0, usize::from);
    Ip { payload: ip.payload.get(..length).unwrap_or(ip.payload), ..*ip }
}

#[cfg(test)]
#[path = "nat_tests.rs"]
mod tests;
