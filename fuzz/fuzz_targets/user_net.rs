//! The user-mode network: the input is a script of frames from a guest (whole ones without a plan, or datagrams, messages
//! and segments around bytes of the input), of datagrams from the host's side, and of time that passes. The network
//! must survive it, send only frames that can be parsed and fit, ask for no socket to where a guest may not go, and
//! work afterwards.
#![no_main]

use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use atoll_fuzz::script::Script;
use atoll_fuzz::seeds;
use atoll_network::header::{PartialChecksum, SegmentKind, Segmentation};
use atoll_network::{FrameHeader, Offloads};
use atoll_network_user::config::GATEWAY_MAC;
use atoll_network_user::dns::Resolvers;
use atoll_network_user::nat::Nat;
use atoll_network_user::policy::is_outside;
use atoll_network_user::poller::Epoll;
use atoll_network_user::testing::{Lists, NoHost, datagram, packet};
use atoll_network_user::wire::{Ethernet, Ip, Mac, Udp};
use atoll_network_user::{Owner, UserNetConfig};
use libfuzzer_sys::fuzz_target;

const MAC: Mac = [0x52, 0x54, 0, 1, 2, 3];
const FLOWS: usize = 16;
const RESOLVERS: [&str; 2] = ["127.0.0.53:53", "192.0.2.53:53"];

/// Whom the guest says to be, and whom it addresses.
const ADDRESSES: [&str; 16] = [
    "10.0.2.15",
    "10.0.2.2",
    "10.0.2.3",
    "0.0.0.0",
    "255.255.255.255",
    "127.0.0.1",
    "1.1.1.1",
    "10.0.2.16",
    "fd61:746f:6c6c::15",
    "fd61:746f:6c6c::2",
    "fd61:746f:6c6c::3",
    "fe80::2",
    "ff02::1:2",
    "::1",
    "2001:db8::1",
    "fe80::15",
];
const PORTS: [u16; 8] = [53, 67, 68, 546, 547, 80, 5000, 5001];

type Net = Nat<Lists, Epoll, NoHost>;

fn network() -> Net {
    let config = UserNetConfig { guest_mac: Some(MAC), max_flows: FLOWS, ..UserNetConfig::default() };
    let addresses = config.check().expect("the default network");
    let servers = RESOLVERS.map(|server| server.parse().expect("an address")).to_vec();
    let resolvers = Resolvers { servers, search: vec!["example.org".into()] };
    let epoll = Epoll::new().expect("an epoll");
    Nat::new(&config, addresses, resolvers, (Lists::new(Offloads::NONE), epoll, NoHost::default()))
}

fn address(script: &mut Script<'_>, v6: bool) -> IpAddr {
    let n = usize::from(script.u8() & 7) + if v6 { 8 } else { 0 };
    ADDRESSES[n].parse().expect("an address")
}

fn step(net: &mut Net, script: &mut Script<'_>, now: &mut Instant) {
    let kind = script.u8();
    let v6 = kind & 0x80 != 0;
    let length = usize::from(script.u16() & 0x7ff);
    let header = FrameHeader {
        checksum: (kind & 0x40 != 0).then_some(PartialChecksum { start: 34, offset: 6 }),
        data_valid: kind & 0x20 != 0,
        segmentation: (kind & 0x18 == 0x18).then_some(Segmentation {
            kind: SegmentKind::UdpL4,
            size: 100,
            header_len: 42,
            ecn: false,
        }),
    };
    match kind & 7 {
        0 => {
            let mut frame = script.bytes(length).to_vec();
            if kind & 0x10 == 0 && frame.len() >= 6 {
                frame[..6].copy_from_slice(&GATEWAY_MAC);
            }
            net.take_frame(&header, &frame, *now);
        }
        1 | 2 => {
            let ports = [script.u8(), script.u8()].map(|n| PORTS[usize::from(n & 7)]);
            let from = SocketAddr::new(address(script, v6), ports[0]);
            let to = SocketAddr::new(address(script, v6), ports[1]);
            net.take_frame(&header, &datagram(MAC, from, to, script.bytes(length)), *now);
        }
        3 | 4 => {
            let ends = (address(script, v6), address(script, v6));
            let (protocol, hops) = (script.u8(), if kind & 7 == 3 { 255 } else { 64 });
            let frame = packet(MAC, ends, protocol, hops, script.bytes(length));
            net.take_frame(&header, &frame, *now);
        }
        5 => *now += Duration::from_millis(script.u16().into()),
        6 => {
            let n = usize::from(script.u8());
            let bytes = script.bytes(length);
            let count = net.host.sockets.len().max(1);
            if let Some((_, far)) = net.host.sockets.get(n % count) {
                let _ = rustix::net::send(far, bytes, rustix::net::SendFlags::DONTWAIT);
            }
        }
        _ => {
            // The last query's answer, with bytes of the input behind its question.
            let Some((_, far)) = net.host.sockets.back() else { return };
            let mut answer = vec![0; 2048];
            let Ok((got, _)) = rustix::net::recv(far, &mut answer[..], rustix::net::RecvFlags::DONTWAIT)
            else {
                return;
            };
            answer.truncate(got);
            if let Some(flags) = answer.get_mut(2) {
                *flags |= 0x80;
            }
            answer.extend_from_slice(script.bytes(length));
            let _ = rustix::net::send(far, &answer, rustix::net::SendFlags::DONTWAIT);
        }
    }
}

/// Sockets' turn, the clock's turn, and a look at what came out.
fn turn(net: &mut Net, now: Instant) {
    let mut ready = Vec::new();
    net.poller.wait(Some(Duration::ZERO), &mut ready).expect("an epoll");
    for (token, readiness) in ready {
        if let Some((owner, value)) = Owner::of(token) {
            net.ready(owner, value, readiness, now);
        }
    }
    net.flush(now);
    net.expire(now);
    for (header, frame) in net.sender.frames.take_sent() {
        assert_eq!(header, FrameHeader::default(), "nothing that the guest does not take");
        let ethernet = Ethernet::parse(&frame).expect("a frame");
        assert!(ethernet.payload.len() <= 1500);
        match ethernet.kind {
            0x0800 => assert!(Ip::parse_v4(ethernet.payload).is_some()),
            0x86dd => assert!(Ip::parse_v6(ethernet.payload).is_some()),
            kind => assert_eq!(kind, 0x0806),
        }
    }
    for (remote, _) in &net.host.sockets {
        let resolver = RESOLVERS.iter().any(|server| server.parse() == Ok(*remote));
        assert!(resolver || is_outside(remote.ip()), "a socket to {remote}");
    }
    assert!(net.stats().udp_flows <= FLOWS as u64 * 5 / 4);
}

/// The guest still gets its address.
fn works(net: &mut Net, now: Instant) {
    let mut discover = vec![0; 240];
    discover[..3].copy_from_slice(&[1, 1, 6]);
    discover[28..34].copy_from_slice(&MAC);
    discover[236..240].copy_from_slice(&[99, 130, 83, 99]);
    discover.extend_from_slice(&[53, 1, 1, 255]);
    let ends = ["0.0.0.0:68", "255.255.255.255:67"].map(|text| text.parse().expect("an address"));
    net.take_frame(&FrameHeader::default(), &datagram(MAC, ends[0], ends[1], &discover), now);
    let sent = net.sender.frames.take_sent();
    let (_, offer) = sent.last().expect("an offer");
    let ip = Ip::parse_v4(&offer[14..]).expect("a packet");
    let message = Udp::parse(ip.payload, false).expect("a datagram").payload;
    assert_eq!(message[16..20], [10, 0, 2, 15]);
}

fuzz_target!(
    init: seeds::plant(seeds::arbitrary(16, 600)),
    |data: &[u8]| {
        let mut net = network();
        let mut script = Script::new(data);
        let mut now = Instant::now();
        while !script.is_empty() {
            step(&mut net, &mut script, &mut now);
            turn(&mut net, now);
        }
        works(&mut net, now);
    }
);
