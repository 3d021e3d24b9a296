//! A guest made of frames against a network with the host's real sockets.

use std::net::UdpSocket;
use std::thread::sleep;

use atoll_network::header::{PartialChecksum, Segmentation};

use super::*;
use crate::host::Linux;
use crate::poller::Epoll;
use crate::testing::{self, Lists};
use crate::wire::{BROADCAST, IPV4_BYTES, IPV6_BYTES, Sum, UDP_BYTES};

const MAC: Mac = [0x52, 0x54, 0, 0x12, 0x34, 0x56];
const GUEST: &str = "10.0.2.15:5000";
const GUEST6: &str = "[fd61:746f:6c6c::15]:5000";

struct Net {
    nat: Nat<Lists, Epoll, Linux>,
}

/// A packet that the guest got.
#[derive(Debug)]
struct Got {
    from: IpAddr,
    to: IpAddr,
    protocol: u8,
    payload: Vec<u8>,
}

impl Got {
    /// Ports and payload of a datagram.
    fn udp(&self) -> Option<(u16, u16, &[u8])> {
        let udp = Udp::parse(&self.payload, false).filter(|_| self.protocol == UDP)?;
        Some((udp.source, udp.destination, udp.payload))
    }

    /// Type and code of an ICMP message of either family.
    fn icmp(&self) -> Option<(u8, u8)> {
        matches!(self.protocol, ICMP | ICMPV6).then(|| (self.payload[0], self.payload[1]))
    }
}

fn address(text: &str) -> SocketAddr {
    text.parse().unwrap()
}

/// A datagram of the guest with its checksum.
fn datagram(from: &str, to: &str, payload: &[u8]) -> Vec<u8> {
    testing::datagram(MAC, address(from), address(to), payload)
}

/// A packet of the guest.
fn packet(from: IpAddr, to: IpAddr, protocol: u8, hops: u8, payload: &[u8]) -> Vec<u8> {
    testing::packet(MAC, (from, to), protocol, hops, payload)
}

impl Net {
    fn new(config: UserNetConfig, servers: Vec<SocketAddr>) -> Self {
        let addresses = config.check().unwrap();
        let resolvers = Resolvers { servers, search: Vec::new() };
        let parts = (Lists::new(Offloads::NONE), Epoll::new().unwrap(), Linux);
        let mut nat = Nat::new(&config, addresses, resolvers, parts);
        for forward in &config.forwards {
            nat.add_forward(Bound::new(*forward).unwrap()).unwrap();
        }
        nat.expire(Instant::now());
        nat.sender.frames.take_sent();
        Self { nat }
    }

    fn with_loopback() -> Self {
        Self::new(UserNetConfig { host_loopback: true, ..UserNetConfig::default() }, Vec::new())
    }

    fn closed() -> Self {
        Self::new(UserNetConfig::default(), Vec::new())
    }

    fn send(&mut self, frame: &[u8]) {
        self.send_with(&FrameHeader::default(), frame);
    }

    fn send_with(&mut self, header: &FrameHeader, frame: &[u8]) {
        self.nat.take_frame(header, frame, Instant::now());
        self.nat.flush(Instant::now());
    }

    fn turn(&mut self, now: Instant) {
        let mut ready = Vec::new();
        self.nat.poller.wait(Some(Duration::ZERO), &mut ready).unwrap();
        for (token, readiness) in ready {
            let (owner, value) = Owner::of(token).unwrap();
            self.nat.ready(owner, value, readiness, now);
        }
        self.nat.flush(now);
    }

    fn take(&mut self) -> Vec<Got> {
        let sent = self.nat.sender.frames.take_sent();
        let parsed = sent.iter().filter_map(|(_, frame)| {
            let ethernet = Ethernet::parse(frame).unwrap();
            let ip = match ethernet.kind {
                ETHERTYPE_IPV4 => Ip::parse_v4(ethernet.payload).unwrap(),
                ETHERTYPE_IPV6 => Ip::parse_v6(ethernet.payload).unwrap(),
                _ => return None,
            };
            assert!(ip.fragment.is_some() || ip.transport_checksum_is_right(), "{ip:?}");
            Some(Got {
                from: ip.source,
                to: ip.destination,
                protocol: ip.protocol,
                payload: ip.payload.to_vec(),
            })
        });
        parsed.collect()
    }

    /// Waits for one packet for the guest.
    fn expect(&mut self) -> Got {
        for _ in 0..2000 {
            self.turn(Instant::now());
            let mut got = self.take();
            if !got.is_empty() {
                assert_eq!(got.len(), 1, "{got:?}");
                return got.remove(0);
            }
            sleep(Duration::from_millis(1));
        }
        panic!("nothing came; {:?}", self.nat.stats());
    }

    /// What comes to the guest within a moment.
    fn within_a_moment(&mut self) -> Vec<Got> {
        let mut got = Vec::new();
        for _ in 0..20 {
            self.turn(Instant::now());
            got.extend(self.take());
            sleep(Duration::from_millis(1));
        }
        got
    }
}

/// A server that answers each datagram with itself.
fn echo_server(bind: &str) -> SocketAddr {
    let socket = UdpSocket::bind(bind).unwrap();
    let address = socket.local_addr().unwrap();
    std::thread::spawn(move || {
        let mut buffer = vec![0; 65_536];
        while let Ok((length, from)) = socket.recv_from(&mut buffer) {
            let _ = socket.send_to(&buffer[..length], from);
        }
    });
    address
}

#[test]
fn datagrams_reach_the_hosts_loopback_by_the_gateway_when_asked_for() {
    let mut net = Net::with_loopback();
    for (bind, guest, gateway) in
        [("127.0.0.1:0", GUEST, "10.0.2.2"), ("[::1]:0", GUEST6, "fd61:746f:6c6c::2")]
    {
        let server = echo_server(bind);
        let remote = SocketAddr::new(gateway.parse().unwrap(), server.port()).to_string();
        for payload in [&b"hello"[..], b"", b"again"] {
            net.send(&datagram(guest, &remote, payload));
            let got = net.expect();
            assert_eq!((got.from.to_string(), got.to), (gateway.to_owned(), address(guest).ip()));
            assert_eq!(got.udp(), Some((server.port(), 5000, payload)));
        }
    }
    assert_eq!(net.nat.stats().udp_flows, 2);
}

#[test]
fn large_datagrams_pass_in_fragments_both_ways() {
    let mut net = Net::with_loopback();
    let server = echo_server("127.0.0.1:0");
    let payload: Vec<u8> = (0..30_000_u32).map(|n| (n % 251) as u8).collect();
    let remote = format!("10.0.2.2:{}", server.port());
    let whole = datagram(GUEST, &remote, &payload);
    let udp = &whole[14 + IPV4_BYTES..];
    for (n, part) in udp.chunks(1480).enumerate() {
        let mut headers = Headers::ethernet(GATEWAY_MAC, MAC, ETHERTYPE_IPV4);
        let more = (n + 1) * 1480 < udp.len();
        let fragment = crate::wire::Fragment { id: 9, offset: n * 1480, more };
        headers.ip(address(GUEST).ip(), address(&remote).ip(), UDP, 64, part.len(), Some(fragment));
        net.send(&[headers.bytes(), part].concat());
    }
    let mut bytes = Vec::new();
    while bytes.len() < UDP_BYTES + payload.len() {
        net.turn(Instant::now());
        for got in net.take() {
            bytes.extend_from_slice(&got.payload);
        }
    }
    assert_eq!(bytes[UDP_BYTES..], payload);
    assert_eq!(net.nat.stats().reassembled, 1);
}

#[test]
fn large_frames_and_partial_checksums_are_understood() {
    let mut net = Net::with_loopback();
    let server = echo_server("127.0.0.1:0");
    let frame = datagram(GUEST, &format!("10.0.2.2:{}", server.port()), b"aaaabbbbcc");
    let mut unfinished = frame.clone();
    unfinished[14 + IPV4_BYTES + 6] ^= 0x55;
    net.send(&unfinished);
    assert!(net.within_a_moment().is_empty(), "a wrong checksum is dropped");
    assert_eq!(net.nat.stats().dropped_checksum, 1);
    let partial = FrameHeader {
        checksum: Some(PartialChecksum { start: 34, offset: 6 }),
        segmentation: Some(Segmentation { kind: SegmentKind::UdpL4, size: 4, header_len: 42, ecn: false }),
        ..FrameHeader::default()
    };
    net.send_with(&partial, &unfinished);
    let mut got = Vec::new();
    while got.len() < 3 {
        net.turn(Instant::now());
        got.extend(net.take());
    }
    let payloads: Vec<&[u8]> = got.iter().map(|got| got.udp().unwrap().2).collect();
    assert_eq!(payloads, [&b"aaaa"[..], b"bbbb", b"cc"]);
}

#[test]
fn a_large_frame_stands_for_a_bounded_number_of_datagrams() {
    let mut net = Net::with_loopback();
    let server = UdpSocket::bind("127.0.0.1:0").unwrap();
    server.set_nonblocking(true).unwrap();
    let remote = format!("10.0.2.2:{}", server.local_addr().unwrap().port());
    let header = FrameHeader {
        checksum: Some(PartialChecksum { start: 34, offset: 6 }),
        segmentation: Some(Segmentation { kind: SegmentKind::UdpL4, size: 1, header_len: 42, ecn: false }),
        ..FrameHeader::default()
    };
    for (bytes, come) in [(128, 128), (129, 0), (60_000, 0)] {
        net.send_with(&header, &datagram(GUEST, &remote, &vec![7; bytes]));
        let mut buffer = [0; 8];
        let count = std::iter::from_fn(|| server.recv(&mut buffer).ok()).count();
        assert_eq!(count, come, "{bytes} datagrams of one byte");
    }
    assert_eq!(net.nat.stats().dropped_malformed, 2);
}

#[test]
fn a_hostile_guest_does_not_reach_the_hosts_loopback() {
    let v4 = UdpSocket::bind("127.0.0.1:0").unwrap();
    let port = v4.local_addr().unwrap().port();
    let v6 = UdpSocket::bind(("::1", port));
    let listener = std::net::TcpListener::bind(("127.0.0.1", port)).unwrap();
    listener.set_nonblocking(true).unwrap();
    v4.set_nonblocking(true).unwrap();
    let mut net = Net::new(UserNetConfig::default(), vec!["127.0.0.1:9".parse().unwrap()]);
    let spellings4 = [
        "127.0.0.1",
        "127.0.0.2",
        "127.1.1.1",
        "127.255.255.255",
        "0.0.0.0",
        "0.0.0.1",
        "255.255.255.255",
        "10.0.2.2",
        "10.0.2.3",
        "10.0.2.4",
        "10.0.2.0",
        "10.0.2.255",
        "10.0.2.15",
        "169.254.1.1",
        "169.254.169.254",
        "224.0.0.1",
        "239.1.1.1",
        "240.0.0.1",
    ];
    let spellings6 = [
        "::",
        "::1",
        "::127.0.0.1",
        "::ffff:127.0.0.1",
        "::ffff:0.0.0.0",
        "::ffff:0:127.0.0.1",
        "64:ff9b::127.0.0.1",
        "2002:7f00:1::",
        "fe80::1",
        "fe80::2",
        "fd61:746f:6c6c::2",
        "fd61:746f:6c6c::3",
        "fd61:746f:6c6c::1",
        "ff02::1",
        "ff01::1",
    ];
    for (guest, spellings) in [(GUEST, &spellings4[..]), (GUEST6, &spellings6[..])] {
        for spelling in spellings {
            let remote = SocketAddr::new(spelling.parse().unwrap(), port);
            net.send(&datagram(guest, &remote.to_string(), b"hello, loopback"));
            let mut tcp = [0; 60];
            let syn = TcpHeader { flags: crate::TcpFlags::SYN, ..TcpHeader::default() };
            let length = syn.write(6000, port, &mut tcp);
            let guest = address(guest).ip();
            let sum = Sum::default().pseudo_header(guest, remote.ip(), TCP, length).bytes(&tcp[..length]);
            tcp[16..18].copy_from_slice(&sum.checksum().to_be_bytes());
            net.send(&packet(guest, remote.ip(), TCP, 64, &tcp[..length]));
            let echo = [if guest.is_ipv4() { 8 } else { 128 }, 0, 0, 0, 0, 1, 0, 1];
            net.send_with(
                &FrameHeader { data_valid: true, ..FrameHeader::default() },
                &packet(guest, remote.ip(), if guest.is_ipv4() { ICMP } else { ICMPV6 }, 64, &echo),
            );
        }
    }
    // The same with the guest's own spelling of where it is.
    for source in ["127.0.0.1:5000", "10.0.2.2:5000", "0.0.0.0:5000", "192.168.1.1:5000"] {
        net.send(&datagram(source, &format!("127.0.0.1:{port}"), b"hello, loopback"));
        net.send(&datagram(source, &format!("10.0.2.2:{port}"), b"hello, loopback"));
    }
    net.within_a_moment();
    assert_eq!(net.nat.stats().udp_flows, 0);
    assert_eq!(net.nat.tcp.metrics().flows, 0);
    assert!(v4.recv(&mut [0; 64]).is_err(), "nothing came");
    if let Ok(v6) = v6 {
        v6.set_nonblocking(true).unwrap();
        assert!(v6.recv(&mut [0; 64]).is_err());
    }
    assert!(listener.accept().is_err(), "nobody came");
    assert!(net.nat.stats().refused > 30);
}

#[test]
fn a_refused_port_is_told() {
    let mut net = Net::with_loopback();
    let free = UdpSocket::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    net.send(&datagram(GUEST, &format!("10.0.2.2:{free}"), b"anybody?"));
    let got = net.expect();
    assert_eq!(got.icmp(), Some((3, 3)));
    assert_eq!(got.from.to_string(), "10.0.2.2");
    let quoted = Ip::parse_v4(&got.payload[8..]).unwrap();
    assert_eq!(quoted.source, address(GUEST).ip());
    assert_eq!(quoted.payload[..4], [5000_u16.to_be_bytes(), free.to_be_bytes()].concat());
}

#[test]
fn a_prohibited_destination_and_the_last_hop_are_told() {
    let mut net = Net::closed();
    net.send(&datagram(GUEST, "127.0.0.1:9", b"x"));
    assert_eq!(net.expect().icmp(), Some((3, 13)));
    net.send(&datagram(GUEST6, "[::1]:9", b"x"));
    assert_eq!(net.expect().icmp(), Some((1, 1)));
    let mut last_hop = datagram(GUEST, "192.0.2.99:33434", b"x");
    let mut headers = Headers::ethernet(GATEWAY_MAC, MAC, ETHERTYPE_IPV4);
    headers.ip(address(GUEST).ip(), address("192.0.2.99:1").ip(), UDP, 1, 9, None);
    last_hop[..34].copy_from_slice(headers.bytes());
    net.send(&last_hop);
    let got = net.expect();
    assert_eq!((got.icmp(), got.from.to_string()), (Some((11, 0)), "10.0.2.2".to_owned()));
    assert_eq!(net.nat.stats().udp_flows, 0);
}

#[test]
fn the_gateway_answers_echo_requests() {
    let mut net = Net::closed();
    for (from, to, protocol, request, reply) in [
        ("10.0.2.15", "10.0.2.2", ICMP, 8, 0),
        ("fd61:746f:6c6c::15", "fd61:746f:6c6c::2", ICMPV6, 128, 129),
        ("fe80::99", "fe80::2", ICMPV6, 128, 129),
    ] {
        let (from, to): (IpAddr, IpAddr) = (from.parse().unwrap(), to.parse().unwrap());
        let mut message = [request, 0, 0, 0, 1, 2, 3, 4, 0xaa, 0xbb];
        let sum = Sum::default();
        let sum = if from.is_ipv6() { sum.pseudo_header(from, to, ICMPV6, 10) } else { sum };
        let checksum = sum.bytes(&message).checksum();
        message[2..4].copy_from_slice(&checksum.to_be_bytes());
        net.send(&packet(from, to, protocol, 64, &message));
        let got = net.expect();
        assert_eq!((got.from, got.to), (to, from));
        assert_eq!((got.payload[0], &got.payload[4..]), (reply, &message[4..]));
    }
}

fn dns_query(id: u16, name: &str) -> Vec<u8> {
    let mut message = id.to_be_bytes().to_vec();
    message.extend_from_slice(&[1, 0, 0, 1, 0, 0, 0, 0, 0, 0]);
    for label in name.split('.') {
        message.push(label.len() as u8);
        message.extend_from_slice(label.as_bytes());
    }
    message.extend_from_slice(&[0, 0, 1, 0, 1]);
    message
}

/// A resolver that answers `rcode`, after a lie.
fn resolver(rcode: u8) -> SocketAddr {
    let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
    let address = socket.local_addr().unwrap();
    std::thread::spawn(move || {
        let mut buffer = vec![0; 2048];
        while let Ok((length, from)) = socket.recv_from(&mut buffer) {
            let mut answer = buffer[..length].to_vec();
            answer[2] |= 0x80;
            answer[1] ^= 1;
            let _ = socket.send_to(&answer, from);
            answer[1] ^= 1;
            answer[3] = 0x80 | rcode;
            answer.extend_from_slice(b"answer");
            let _ = socket.send_to(&answer, from);
        }
    });
    address
}

#[test]
fn queries_go_to_the_next_resolver_when_one_fails() {
    let refusing = UdpSocket::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let mut net = Net::new(UserNetConfig::default(), vec![refusing, resolver(2), resolver(0)]);
    for (guest, server) in [(GUEST, "10.0.2.3:53"), (GUEST6, "[fd61:746f:6c6c::3]:53")] {
        let query = dns_query(0x1234, "example.org");
        net.send(&datagram(guest, server, &query));
        let got = net.expect();
        let (from, to, answer) = got.udp().unwrap();
        assert_eq!((got.from, from, to), (address(server).ip(), 53, 5000));
        assert_eq!(answer[..2], [0x12, 0x34], "the guest's own identifier");
        assert!(answer.ends_with(b"answer"));
        assert_eq!(answer[12..query.len()], query[12..]);
    }
    let stats = net.nat.stats();
    assert_eq!((stats.dns_queries, stats.dns_answers, stats.udp_flows), (2, 2, 0));
}

#[test]
fn a_silent_resolver_is_given_up() {
    let silent = UdpSocket::bind("127.0.0.1:0").unwrap();
    let mut net = Net::new(UserNetConfig::default(), vec![silent.local_addr().unwrap(); 3]);
    net.send(&datagram(GUEST, "10.0.2.3:53", &dns_query(7, "example.org")));
    let start = Instant::now();
    let mut seconds = 0;
    let got = loop {
        seconds += 2;
        assert!(seconds <= 12, "it is given up after ten seconds");
        net.nat.expire(start + Duration::from_secs(seconds) + Duration::from_millis(50));
        let got = net.take();
        if let Some(got) = got.into_iter().next() {
            break got;
        }
    };
    let (_, _, answer) = got.udp().unwrap();
    assert_eq!((&answer[..2], answer[3] & 0xf), (&[0, 7][..], 2), "server failure");
    let mut identifiers = Vec::new();
    silent.set_nonblocking(true).unwrap();
    let mut buffer = [0; 512];
    while let Ok((_, from)) = silent.recv_from(&mut buffer) {
        identifiers.push((buffer[0], buffer[1], from.port()));
    }
    identifiers.sort_unstable();
    identifiers.dedup();
    assert!(identifiers.len() >= 4, "each try has an identifier and a port of its own: {identifiers:?}");
}

#[test]
fn what_is_no_query_is_not_passed_on() {
    let server = UdpSocket::bind("127.0.0.1:0").unwrap();
    server.set_nonblocking(true).unwrap();
    let mut net = Net::new(UserNetConfig::default(), vec![server.local_addr().unwrap()]);
    for message in [&b""[..], b"short", &[0xff; 600], &[0; 12]] {
        net.send(&datagram(GUEST, "10.0.2.3:53", message));
    }
    assert!(server.recv(&mut [0; 600]).is_err());
    assert_eq!(net.nat.stats().dns_answers, 0);
}

fn forward(protocol: Protocol) -> Forward {
    let host = match protocol {
        Protocol::Tcp => std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap(),
        Protocol::Udp => UdpSocket::bind("127.0.0.1:0").unwrap().local_addr().unwrap(),
    };
    Forward { protocol, host, guest: None, guest_port: 7777 }
}

#[test]
fn a_forwarded_udp_port_reaches_the_guest_and_back() {
    let forward = forward(Protocol::Udp);
    let config = UserNetConfig { forwards: vec![forward], guest_mac: Some(MAC), ..UserNetConfig::default() };
    let mut net = Net::new(config, Vec::new());
    let clients = [0; 2].map(|_| UdpSocket::bind("127.0.0.1:0").unwrap());
    for client in &clients {
        client.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
        client.send_to(b"knock", forward.host).unwrap();
        let got = net.expect();
        let port = client.local_addr().unwrap().port();
        assert_eq!((got.from.to_string(), got.to.to_string()), ("10.0.2.2".into(), "10.0.2.15".into()));
        assert_eq!(got.udp(), Some((port, 7777, &b"knock"[..])));
        net.send(&datagram("10.0.2.15:7777", &format!("10.0.2.2:{port}"), b"who is there?"));
        let mut buffer = [0; 64];
        let (length, from) = client.recv_from(&mut buffer).unwrap();
        assert_eq!((&buffer[..length], from), (&b"who is there?"[..], forward.host));
    }
    assert_eq!(net.nat.stats().udp_flows, 2);
    net.nat.remove_forward(&forward).unwrap();
    assert_eq!(net.nat.stats().udp_flows, 0);
    assert!(net.nat.remove_forward(&forward).is_err());
    UdpSocket::bind(forward.host).expect("the port is free again");
}

#[test]
fn a_client_of_a_forward_may_come_from_the_port_of_dns() {
    let forward = forward(Protocol::Udp);
    let config = UserNetConfig { forwards: vec![forward], guest_mac: Some(MAC), ..UserNetConfig::default() };
    let mut net = Net::new(config, Vec::new());
    // An address of loopback on which nobody's resolver listens.
    let client = match UdpSocket::bind("127.93.11.7:53") {
        Ok(client) => client,
        Err(error) => return println!("skipped: this user may not have port 53: {error}"),
    };
    client.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
    client.send_to(b"knock", forward.host).unwrap();
    assert_eq!(net.expect().udp(), Some((53, 7777, &b"knock"[..])));
    net.send(&datagram("10.0.2.15:7777", "10.0.2.2:53", b"who is there?"));
    let mut buffer = [0; 64];
    let (length, from) = client.recv_from(&mut buffer).unwrap();
    assert_eq!((&buffer[..length], from), (&b"who is there?"[..], forward.host));
}

#[test]
fn a_forwarded_tcp_port_asks_the_guest() {
    let forward = forward(Protocol::Tcp);
    let config = UserNetConfig { forwards: vec![forward], guest_mac: Some(MAC), ..UserNetConfig::default() };
    let mut net = Net::new(config, Vec::new());
    let client = std::net::TcpStream::connect(forward.host).unwrap();
    let got = net.expect();
    let (source, destination, header, _) = TcpHeader::parse(&got.payload).unwrap();
    assert_eq!((got.protocol, header.flags), (TCP, crate::TcpFlags::SYN));
    assert_eq!((source, destination), (client.local_addr().unwrap().port(), 7777));
}

#[test]
fn idle_flows_end_and_the_oldest_makes_room() {
    let config = UserNetConfig { host_loopback: true, max_flows: 8, ..UserNetConfig::default() };
    let mut net = Net::new(config, Vec::new());
    let server = UdpSocket::bind("127.0.0.1:0").unwrap();
    let remote = format!("10.0.2.2:{}", server.local_addr().unwrap().port());
    let mut ports = Vec::new();
    for n in 0..20 {
        net.send(&datagram(&format!("10.0.2.15:{}", 6000 + n), &remote, b"x"));
        let (_, from) = server.recv_from(&mut [0; 8]).unwrap();
        ports.push(from.port());
    }
    let stats = net.nat.stats();
    assert_eq!((stats.udp_flows, stats.udp_flows_evicted), (8, 12));
    let next = net.nat.expire(Instant::now() + Duration::from_secs(179)).unwrap();
    assert_eq!(net.nat.stats().udp_flows, 8);
    net.nat.expire(next.max(Instant::now() + Duration::from_secs(181)));
    assert_eq!(net.nat.stats().udp_flows, 0);
}

#[test]
fn flows_to_dns_servers_end_early_and_displace_nothing_else() {
    let config = UserNetConfig { max_flows: 8, ..UserNetConfig::default() };
    let addresses = config.check().unwrap();
    let parts = (Lists::new(Offloads::NONE), testing::NoPoller, testing::NoHost::default());
    let mut nat = Nat::new(&config, addresses, Resolvers::default(), parts);
    let now = Instant::now();
    let mut send = |from: u16, to: &str| {
        let frame = datagram(&format!("10.0.2.15:{from}"), to, b"x");
        nat.take_frame(&FrameHeader::default(), &frame, now);
    };
    send(1000, "192.0.2.1:443");
    for n in 0..50 {
        send(2000 + n, "192.0.2.1:53");
    }
    assert_eq!(nat.stats().udp_flows, 1 + 2);
    nat.expire(now + Duration::from_secs(11));
    assert_eq!(nat.stats().udp_flows, 1);
}

#[test]
fn a_guests_endpoint_has_one_port_for_all_remotes() {
    let mut net = Net::with_loopback();
    let servers = [0; 3].map(|_| UdpSocket::bind("127.0.0.1:0").unwrap());
    let mut ports: Vec<u16> = servers
        .iter()
        .map(|server| {
            let port = server.local_addr().unwrap().port();
            net.send(&datagram(GUEST, &format!("10.0.2.2:{port}"), b"x"));
            server.recv_from(&mut [0; 8]).unwrap().1.port()
        })
        .collect();
    ports.dedup();
    assert_eq!(ports.len(), 1, "{ports:?}");
    // Somebody whom the guest never spoke to is not heard.
    let stranger = UdpSocket::bind("127.0.0.1:0").unwrap();
    stranger.send_to(b"let me in", ("127.0.0.1", ports[0])).unwrap();
    assert!(net.within_a_moment().is_empty());
}

#[test]
fn datagrams_wait_in_the_kernel_while_the_guest_takes_none() {
    let mut net = Net::with_loopback();
    let server = echo_server("127.0.0.1:0");
    let remote = format!("10.0.2.2:{}", server.port());
    net.nat.sender.frames.block();
    for n in 0..10_u8 {
        net.send(&datagram(GUEST, &remote, &[n]));
    }
    sleep(Duration::from_millis(50));
    for _ in 0..3 {
        net.turn(Instant::now());
    }
    let mut ready = Vec::new();
    net.nat.poller.wait(Some(Duration::ZERO), &mut ready).unwrap();
    assert!(ready.is_empty(), "no busy loop");
    assert!(net.nat.sender.take_full());
    net.nat.sender.frames.unblock();
    net.nat.room(Instant::now());
    let got = net.within_a_moment();
    let payloads: Vec<u8> = got.iter().map(|got| got.udp().unwrap().2[0]).collect();
    assert_eq!(payloads, (0..10).collect::<Vec<u8>>());
}

#[test]
fn dhcp_and_arp_work_over_frames() {
    let mut net = Net::closed();
    let mut discover = vec![0; 240];
    discover[..3].copy_from_slice(&[1, 1, 6]);
    discover[28..34].copy_from_slice(&MAC);
    discover[236..240].copy_from_slice(&[99, 130, 83, 99]);
    discover.extend_from_slice(&[53, 1, 1, 255]);
    let mut frame = datagram("0.0.0.0:68", "255.255.255.255:67", &discover);
    frame[..6].copy_from_slice(&BROADCAST);
    net.send(&frame);
    let got = net.expect();
    assert_eq!((got.from.to_string(), got.to.to_string()), ("10.0.2.2".into(), "255.255.255.255".into()));
    let (67, 68, offer) = got.udp().unwrap() else { panic!("{got:?}") };
    assert_eq!((offer[0], &offer[16..20]), (2, &[10, 0, 2, 15][..]));

    let mut arp = vec![0, 1, 8, 0, 6, 4, 0, 1];
    arp.extend_from_slice(&MAC);
    arp.extend_from_slice(&[10, 0, 2, 15, 0, 0, 0, 0, 0, 0, 10, 0, 2, 2]);
    let mut frame = Headers::ethernet(BROADCAST, MAC, ETHERTYPE_ARP).bytes().to_vec();
    frame.extend_from_slice(&arp);
    net.send(&frame);
    let sent = net.nat.sender.frames.take_sent();
    assert_eq!(sent.len(), 1);
    assert_eq!(sent[0].1[..14], *Headers::ethernet(MAC, GATEWAY_MAC, ETHERTYPE_ARP).bytes());
}

#[test]
fn router_and_address_come_over_ipv6() {
    let mut net = Net::closed();
    let link_local: IpAddr = "fe80::5054:ff:fe12:3456".parse().unwrap();
    let routers: IpAddr = "ff02::2".parse().unwrap();
    let mut solicitation = vec![133, 0, 0, 0, 0, 0, 0, 0];
    let sum = Sum::default().pseudo_header(link_local, routers, ICMPV6, 8).bytes(&solicitation);
    solicitation[2..4].copy_from_slice(&sum.checksum().to_be_bytes());
    for hops in [64, 255] {
        let mut frame = packet(link_local, routers, ICMPV6, hops, &solicitation);
        frame[..6].copy_from_slice(&[0x33, 0x33, 0, 0, 0, 2]);
        net.send(&frame);
        let got = net.take();
        assert_eq!(got.len(), usize::from(hops == 255), "only from this link");
        if let Some(got) = got.first() {
            assert_eq!((got.icmp(), got.to), (Some((134, 0)), link_local));
        }
    }
    let mut solicit = vec![1, 9, 9, 9, 0, 1, 0, 3, 1, 2, 3, 0, 3, 0, 12];
    solicit.extend_from_slice(&[0; 12]);
    let mut frame = datagram(&format!("[{link_local}]:546"), "[ff02::1:2]:547", &solicit);
    frame[..6].copy_from_slice(&[0x33, 0x33, 0, 1, 0, 2]);
    net.send(&frame);
    let got = net.expect();
    let (547, 546, advertise) = got.udp().unwrap() else { panic!("{got:?}") };
    assert_eq!((advertise[0], got.to), (2, link_local));
    let address: Ipv6Addr = "fd61:746f:6c6c::15".parse().unwrap();
    assert!(advertise.windows(16).any(|bytes| bytes == address.octets()));
    assert_eq!(net.nat.expire(Instant::now() + Duration::from_secs(301)).map(|_| ()), Some(()));
    let periodic = net.take();
    assert_eq!(periodic.len(), 1);
    assert_eq!((periodic[0].icmp(), periodic[0].to.to_string()), (Some((134, 0)), "ff02::1".into()));
}

#[test]
fn frames_for_others_and_from_groups_are_dropped() {
    let mut net = Net::with_loopback();
    let server = echo_server("127.0.0.1:0");
    let frame = datagram(GUEST, &format!("10.0.2.2:{}", server.port()), b"x");
    let change = |at: usize, value: u8| {
        let mut frame = frame.clone();
        frame[at] = value;
        frame
    };
    net.send(&change(5, 0x77));
    net.send(&change(6, 0x53));
    net.send(&change(12, 0x86));
    for length in 0..14 + IPV4_BYTES + UDP_BYTES {
        net.send(&frame[..length]);
    }
    assert!(net.within_a_moment().is_empty());
    assert_eq!(net.nat.stats().udp_flows, 0);
    net.send(&frame);
    net.expect();
    let six = datagram(GUEST6, &format!("[fe80::2]:{}", server.port()), b"x");
    for length in 0..14 + IPV6_BYTES + UDP_BYTES {
        net.send(&six[..length]);
    }
    assert_eq!(net.nat.stats().udp_flows, 1);
}

#[test]
fn a_guest_may_only_speak_for_itself() {
    let mut net = Net::with_loopback();
    let server = echo_server("127.0.0.1:0");
    let remote = format!("10.0.2.2:{}", server.port());
    for source in ["10.0.2.2:9", "10.0.2.3:9", "10.0.2.255:9", "8.8.8.8:9", "0.0.0.0:9", "127.0.0.1:9"] {
        net.send(&datagram(source, &remote, b"x"));
    }
    assert!(net.within_a_moment().is_empty());
    assert_eq!(net.nat.stats().dropped_source, 6);
    net.send(&datagram("10.0.2.77:9", &remote, b"x"));
    assert_eq!(net.expect().to.to_string(), "10.0.2.77");
}

/// Numbers without a plan, the same every time.
struct Numbers(u64);

impl Numbers {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }
}

/// Some packet: datagrams to many places, fragments, queries, segments, requests, nonsense.
fn some_packet(numbers: &mut Numbers) -> Vec<u8> {
    let [a, b, c, d, ..] = numbers.next().to_le_bytes();
    let v4 = a & 1 == 0;
    let guest = |port: u64| {
        let host = b % 40 + 4;
        let text = if v4 { format!("10.0.2.{host}") } else { format!("fd61:746f:6c6c::{host:x}") };
        SocketAddr::new(text.parse().unwrap(), port as u16)
    };
    let remote = |n: u64| -> IpAddr {
        if v4 {
            Ipv4Addr::from_bits(n as u32).into()
        } else {
            format!("2001:db8::{:x}", n as u16).parse().unwrap()
        }
    };
    let (from, to) = (guest(numbers.next()), SocketAddr::new(remote(numbers.next()), numbers.next() as u16));
    let mut payload = vec![c; usize::from(d)];
    let dns: IpAddr = if v4 { "10.0.2.3" } else { "fd61:746f:6c6c::3" }.parse().unwrap();
    match a >> 1 & 7 {
        0 => testing::datagram([2, 0, 0, 0, b, c], from, to, &payload),
        1 => testing::datagram(MAC, from, SocketAddr::new(dns, 53), &dns_query(numbers.next() as u16, "a.b")),
        2 => {
            let mut syn = [0; 60];
            let header = TcpHeader { flags: crate::TcpFlags(b), ..TcpHeader::default() };
            let length = header.write(from.port(), to.port(), &mut syn);
            testing::packet(MAC, (from.ip(), to.ip()), TCP, 64, &syn[..length])
        }
        3 => {
            payload.resize(8, 0);
            payload[0] = if v4 { 8 } else { 128 };
            testing::packet(MAC, (from.ip(), to.ip()), if v4 { ICMP } else { ICMPV6 }, 64, &payload)
        }
        4 => {
            let offset = usize::from(numbers.next() as u16 & 0x1fff) * 8;
            let fragment = crate::wire::Fragment { id: numbers.next() as u32, offset, more: true };
            let kind = if v4 { ETHERTYPE_IPV4 } else { ETHERTYPE_IPV6 };
            let mut headers = Headers::ethernet(GATEWAY_MAC, MAC, kind);
            headers.ip(from.ip(), to.ip(), UDP, 64, 8, Some(fragment));
            [headers.bytes(), &[1; 8]].concat()
        }
        5 => {
            let mut arp = Headers::ethernet(BROADCAST, [2, 0, 0, b, c, d], ETHERTYPE_ARP).bytes().to_vec();
            arp.extend_from_slice(&[0, 1, 8, 0, 6, 4, 0, 1, 2, 0, 0, b, c, d, 10, 0, 2, b, 0, 0, 0, 0, 0, 0]);
            arp.extend_from_slice(&[10, 0, 2, 2]);
            arp
        }
        6 => {
            let mut message = vec![0; 240];
            message[..3].copy_from_slice(&[1, 1, 6]);
            message[28..34].copy_from_slice(&[2, 0, 0, b, c, d]);
            message[236..240].copy_from_slice(&[99, 130, 83, 99]);
            message.extend_from_slice(&[53, 1, b % 9, 255]);
            testing::datagram(MAC, address("0.0.0.0:68"), address("255.255.255.255:67"), &message)
        }
        _ => (0..usize::from(d)).map(|_| numbers.next() as u8).collect(),
    }
}

/// Resident memory of this process, bytes.
fn resident() -> u64 {
    let status = std::fs::read_to_string("/proc/self/statm").unwrap();
    let pages: u64 = status.split_whitespace().nth(1).unwrap().parse().unwrap();
    pages * 4096
}

#[test]
fn a_flood_of_packets_has_bounded_memory() {
    // In a process of its own: the memory of tests that run beside it would be counted.
    const ALONE: &str = "ATOLL_TEST_ALONE";
    if std::env::var_os(ALONE).is_none() {
        let mut command = std::process::Command::new(std::env::current_exe().unwrap());
        command.args(["--exact", "nat::tests::a_flood_of_packets_has_bounded_memory", "--nocapture"]);
        assert!(command.env(ALONE, "1").status().unwrap().success(), "it failed in its process");
        return;
    }
    const FLOWS: usize = 512;
    let config = UserNetConfig { max_flows: FLOWS, ..UserNetConfig::default() };
    let addresses = config.check().unwrap();
    let resolvers = Resolvers { servers: vec![address("192.0.2.1:53")], search: Vec::new() };
    let parts = (Lists::new(Offloads::NONE), testing::NoPoller, testing::NoHost::default());
    let mut nat = Nat::new(&config, addresses, resolvers, parts);
    let mut numbers = Numbers(0x1234_5678_9abc_def1);
    let start = Instant::now();
    let mut before = 0;
    for n in 0..1_000_000_u64 {
        if n == 100_000 {
            // Everything that fills up is full by now.
            before = resident();
        }
        let frame = some_packet(&mut numbers);
        let header = FrameHeader { data_valid: true, ..FrameHeader::default() };
        let now = start + Duration::from_micros(n * 10);
        nat.take_frame(&header, &frame, now);
        if n % 64 == 0 {
            nat.flush(now);
            nat.expire(now);
            nat.sender.frames.take_sent();
        }
    }
    let stats = nat.stats();
    assert_eq!(stats.frames_from_guest, 1_000_000);
    assert!((FLOWS..=FLOWS + FLOWS / 4).contains(&(stats.udp_flows as usize)), "{stats:?}");
    assert!(stats.udp_flows_evicted > 50_000 && stats.dns_queries > 50_000, "{stats:?}");
    let growth = resident().saturating_sub(before);
    assert!(growth < 8 << 20, "{growth} bytes more than after a tenth of the packets");
}

/// Runs the test of this name again in a network namespace of its own, where the host has the addresses 192.0.2.1
/// and 2001:db8::1 and may make sockets for echo. True: this is that run. False: it was run, or the
/// host lets nobody make namespaces, which is said.
fn in_a_namespace(test: &str) -> bool {
    const VARIABLE: &str = "ATOLL_TEST_IN_NAMESPACE";
    const SETUP: &str = "set -e; ip link set lo up
        ip address add 192.0.2.1/32 dev lo; ip address add 2001:db8::1/128 dev lo nodad
        # The kernel sees to the route of an address a little later.
        for n in 1 2 3 4 5 6 7 8 9; do
            if ip -6 route get 2001:db8::1 2>&1 | grep -q '^local'; then break; fi; sleep 0.1
        done
        echo '0 0' > /proc/sys/net/ipv4/ping_group_range";
    if std::env::var_os(VARIABLE).is_some() {
        return true;
    }
    let unshare = |script: &str| {
        let mut command = std::process::Command::new("unshare");
        command.args(["--map-root-user", "--net", "sh", "-c", script]).env(VARIABLE, "1");
        command
    };
    if !unshare(SETUP).status().is_ok_and(|status| status.success()) {
        eprintln!("{test}: this host makes no network namespaces; not run");
        return false;
    }
    let mut command = unshare(&format!("{SETUP}; exec \"$0\" --exact \"$1\" --nocapture"));
    command.arg(std::env::current_exe().unwrap()).arg(format!("nat::tests::{test}"));
    assert!(command.status().unwrap().success(), "it failed in its namespace");
    false
}

#[test]
fn echo_requests_leave_by_sockets_of_the_host() {
    if !in_a_namespace("echo_requests_leave_by_sockets_of_the_host") {
        return;
    }
    let mut net = Net::closed();
    for (from, to, protocol, request, reply) in
        [("10.0.2.15", "192.0.2.1", ICMP, 8, 0), ("fd61:746f:6c6c::15", "2001:db8::1", ICMPV6, 128, 129)]
    {
        let (from, to): (IpAddr, IpAddr) = (from.parse().unwrap(), to.parse().unwrap());
        for n in 1..4 {
            let mut message = vec![request, 0, 0, 0, 0xab, 0xcd, 0, n];
            message.extend((0..1000_u32).map(|n| n as u8));
            let trusted = FrameHeader { data_valid: true, ..FrameHeader::default() };
            net.send_with(&trusted, &packet(from, to, protocol, 64, &message));
            let got = net.expect();
            assert_eq!((got.from, got.to), (to, from));
            assert_eq!((got.payload[0], &got.payload[4..]), (reply, &message[4..]));
        }
    }
    assert_eq!(net.nat.stats().echo_requests, 6);
}

#[test]
fn the_hosts_own_addresses_do_not_lead_to_its_loopback() {
    if !in_a_namespace("the_hosts_own_addresses_do_not_lead_to_its_loopback") {
        return;
    }
    let mut net = Net::closed();
    for (guest, own, loopback, port_error) in
        [(GUEST, "192.0.2.1", "127.0.0.1", (3, 3)), (GUEST6, "2001:db8::1", "::1", (1, 4))]
    {
        let inside = UdpSocket::bind((loopback, 0)).unwrap();
        let port = inside.local_addr().unwrap().port();
        let remote = SocketAddr::new(own.parse().unwrap(), port).to_string();
        net.send(&datagram(guest, &remote, b"trick"));
        assert_eq!(net.expect().icmp(), Some(port_error));
        inside.set_nonblocking(true).unwrap();
        assert!(inside.recv(&mut [0; 16]).is_err());
        let server = UdpSocket::bind((own, 0)).unwrap();
        let port = server.local_addr().unwrap().port();
        net.send(&datagram(guest, &SocketAddr::new(own.parse().unwrap(), port).to_string(), b"service"));
        let (_, from) = server.recv_from(&mut [0; 16]).unwrap();
        assert_eq!(from.ip().to_string(), own, "not from loopback, which services trust");
    }
}

#[test]
fn a_missing_route_is_told() {
    if !in_a_namespace("a_missing_route_is_told") {
        return;
    }
    let mut net = Net::closed();
    for (guest, remote, error) in [(GUEST, "198.51.100.1:9", (3, 0)), (GUEST6, "[2001:db8:1::1]:9", (1, 0))] {
        net.send(&datagram(guest, remote, b"x"));
        let got = net.expect();
        assert_eq!(got.icmp(), Some(error));
        assert!(net.nat.sender.addresses.is_gateway(got.from));
    }
    assert_eq!(net.nat.stats().udp_flows, 0);
}

#[test]
fn a_way_that_carries_less_is_told() {
    if !in_a_namespace("a_way_that_carries_less_is_told") {
        return;
    }
    let lo = std::process::Command::new("ip").args(["link", "set", "lo", "mtu", "1400"]).status();
    assert!(lo.unwrap().success());
    let mut net = Net::closed();
    for (guest, own, error, at) in [(GUEST, "192.0.2.1", (3, 4), 6), (GUEST6, "2001:db8::1", (2, 0), 6)] {
        let server = UdpSocket::bind((own, 0)).unwrap();
        let remote = server.local_addr().unwrap().to_string();
        net.send(&datagram(guest, &remote, &[1; 1400]));
        let got = net.expect();
        assert_eq!((got.icmp(), &got.payload[at..8]), (Some(error), &[5, 120][..]), "1400 bytes");
        net.send(&datagram(guest, &remote, &[2; 1300]));
        let mut buffer = [0; 2048];
        assert_eq!(server.recv(&mut buffer).unwrap(), 1300);
        // What the guest fragments, the host may fragment.
        let whole = datagram(guest, &remote, &[3; 1400]);
        let ip_bytes = if guest == GUEST { IPV4_BYTES } else { IPV6_BYTES };
        let udp = &whole[14 + ip_bytes..];
        for (offset, part) in [(0, &udp[..800]), (800, &udp[800..])] {
            let fragment = crate::wire::Fragment { id: 1, offset, more: offset == 0 };
            let kind = if guest == GUEST { ETHERTYPE_IPV4 } else { ETHERTYPE_IPV6 };
            let mut headers = Headers::ethernet(GATEWAY_MAC, MAC, kind);
            let (from, to) = (address(guest).ip(), address(&remote).ip());
            headers.ip(from, to, UDP, 64, part.len(), Some(fragment));
            net.send(&[headers.bytes(), part].concat());
        }
        assert_eq!(server.recv(&mut buffer).unwrap(), 1400);
    }
}

#[test]
fn without_the_right_to_echo_the_guest_is_told() {
    let denied = std::io::Error::from(rustix::io::Errno::ACCESS);
    assert_eq!(Trouble::of(&denied, 1500), Some(Trouble::Prohibited));
}
