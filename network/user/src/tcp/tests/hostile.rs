//! A guest that wants harm, and a guest that wants much.

use proptest::prelude::*;

use super::*;

#[derive(Clone, Debug)]
enum Act {
    /// Flow, flags, distance of the sequence and acknowledgement number from what is right, window, payload.
    Segment(u8, u8, i32, i32, u16, usize),
    PeerWrites(usize),
    PeerEnds,
    PeerResets,
    Wait(u64),
    Room(usize),
}

fn near() -> impl Strategy<Value = i32> {
    prop_oneof![4 => Just(0), 2 => -3..3_i32, 1 => -70_000..70_000_i32, 1 => any::<i32>()]
}

fn act() -> impl Strategy<Value = Act> {
    let flags = prop_oneof![3 => Just(0x10_u8), 2 => Just(0x02_u8), 1 => Just(0x11_u8), 2 => any::<u8>()];
    prop_oneof![
        12 => (0_u8..3, flags, near(), near(), any::<u16>(), 0_usize..3000)
            .prop_map(|(flow, flags, seq, ack, window, length)| Act::Segment(flow, flags, seq, ack, window, length)),
        2 => (0_usize..20_000).prop_map(Act::PeerWrites),
        1 => Just(Act::PeerEnds),
        1 => Just(Act::PeerResets),
        2 => (0_u64..100_000).prop_map(Act::Wait),
        1 => (0_usize..4).prop_map(Act::Room),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, ..ProptestConfig::default() })]
    #[test]
    fn any_segments_leave_the_table_whole(acts in proptest::collection::vec(act(), 1..80)) {
        let (listener, address) = listener();
        listener.set_nonblocking(true).unwrap();
        let mut world = World::new(Limits { flows: 2, half_open: 2, ..Limits::default() }, Some(address));
        let mut peers = Vec::new();
        // What a right segment of each flow would be.
        let mut right = [(1000_u32, 0_u32); 3];
        for act in acts {
            match act {
                Act::Segment(index, flags, seq, ack, window, length) => {
                    let (next, expected) = right[usize::from(index)];
                    let header = TcpHeader {
                        seq: next.wrapping_add(seq.cast_unsigned()),
                        ack: expected.wrapping_add(ack.cast_unsigned()),
                        flags: TcpFlags(flags),
                        window,
                        options: TcpOptions { mss: Some(window), window_scale: Some(flags), ..TcpOptions::default() },
                    };
                    world.send(&flow(u16::from(index) + 1), &header, &vec![1; length]);
                }
                Act::PeerWrites(count) => {
                    for peer in &mut peers {
                        let peer: &mut TcpStream = peer;
                        let _ = peer.write(&vec![2; count]);
                    }
                }
                Act::PeerEnds => {
                    for peer in &peers {
                        let _ = peer.shutdown(std::net::Shutdown::Write);
                    }
                }
                Act::PeerResets => {
                    for peer in peers.drain(..) {
                        rustix::net::sockopt::set_socket_linger(&peer, Some(Duration::ZERO)).unwrap();
                    }
                }
                Act::Wait(milliseconds) => world.pass(Duration::from_millis(milliseconds)),
                Act::Room(room) => world.wire.room = room,
            }
            world.turn(Duration::ZERO);
            while let Ok((peer, _)) = listener.accept() {
                peer.set_nonblocking(true).unwrap();
                peers.push(peer);
            }
            for packet in world.wire.packets.drain(..) {
                let ours = packet.header.seq.wrapping_add(packet.payload.len() as u32);
                let syn = u32::from(packet.header.flags.has(TcpFlags::SYN));
                let index = usize::from(packet.flow.guest.port() - 1);
                right[index] = (packet.header.ack, ours.wrapping_add(syn));
            }
        }
    }
}

#[test]
fn a_flood_of_syns_displaces_itself_and_no_connection() {
    let limits = Limits { flows: 64, half_open: 16, ..Limits::default() };
    let (mut script, mut peer) = {
        let (listener, address) = listener();
        let mut script = Script::new(Some(address));
        script.world.table = Table::new(limits);
        script.handshake();
        (script, listener.accept().unwrap().0)
    };
    let (_silent, address) = listener();
    script.world.policy = To(Some(address));
    for port in 0..5000 {
        let syn = TcpHeader { seq: port, flags: TcpFlags::SYN, ..TcpHeader::default() };
        script.world.send(&flow(port as u16), &syn, &[]);
        if port % 50 == 0 {
            script.world.turn(Duration::ZERO);
        }
        assert!(script.world.metrics().half_open <= 16);
    }
    script.world.turn(Duration::from_millis(10));
    let metrics = script.world.metrics();
    assert_eq!((metrics.flows, metrics.half_open, metrics.evicted), (17, 16, 5000 - 16));
    script.world.wire.packets.clear();
    script.send(TcpFlags::PSH, b"still here");
    assert_eq!(read(&mut script.world, &mut peer, 10), b"still here");
}

#[test]
fn a_full_table_turns_new_flows_away_and_keeps_the_old() {
    let (listener, address) = listener();
    let mut script = Script::new(Some(address));
    script.world.table = Table::new(Limits { flows: 1, ..Limits::default() });
    script.handshake();
    let syn = TcpHeader { flags: TcpFlags::SYN, ..TcpHeader::default() };
    script.world.send(&flow(9), &syn, &[]);
    script.world.nothing();
    assert_eq!((script.world.metrics().flows, script.world.metrics().turned_away), (1, 1));
    drop(listener);
}

#[test]
fn an_event_of_an_earlier_flow_does_not_reach_the_one_in_its_place() {
    let (mut script, _peer) = Script::connected();
    let old = script.world.table.slots[0].flow.as_ref().unwrap().token;
    script.send_from(script.seq, TcpFlags::RST, &[]);
    let (_listener, address) = listener();
    script.world.policy = To(Some(address));
    script.flow = flow(40_001);
    script.handshake();
    let broken = Readiness { error: true, readable: true, writable: true, hung_up: true };
    script.world.with(|table, cx| table.socket_ready(old, broken, cx));
    script.world.with(|table, cx| table.socket_ready(u64::MAX, broken, cx));
    assert_eq!(script.world.metrics().flows, 1);
}

#[test]
fn four_thousand_flows_carry_data_at_once() {
    const FLOWS: u16 = 4000;
    rustix::process::setrlimit(
        rustix::process::Resource::Nofile,
        rustix::process::Rlimit {
            current: rustix::process::getrlimit(rustix::process::Resource::Nofile).maximum,
            maximum: rustix::process::getrlimit(rustix::process::Resource::Nofile).maximum,
        },
    )
    .unwrap();
    let (listener, address) = listener();
    rustix::net::listen(&listener, 4096).unwrap();
    let mut world = World::new(Limits { half_open: 4096, ..Limits::default() }, Some(address));
    let mut next = std::collections::HashMap::new();
    for port in 1..=FLOWS {
        let syn = TcpHeader { seq: 99, flags: TcpFlags::SYN, window: 60_000, ..TcpHeader::default() };
        world.send(&flow(port), &syn, &[]);
    }
    while next.len() < usize::from(FLOWS) {
        let answer = world.packet();
        assert!(answer.header.flags.has(TcpFlags::SYN), "{answer:?}");
        next.insert(answer.flow, answer.header.seq.wrapping_add(1));
    }
    for (flow, ack) in &next {
        let header =
            TcpHeader { seq: 100, ack: *ack, flags: TcpFlags::ACK, window: 60_000, ..TcpHeader::default() };
        world.send(flow, &header, &flow.guest.port().to_be_bytes());
    }
    assert_eq!((world.metrics().flows, world.metrics().half_open), (usize::from(FLOWS), 0));
    // Each peer sends back what it got.
    let mut peers = Vec::new();
    for _ in 0..FLOWS {
        let mut peer = listener.accept().unwrap().0;
        let bytes = read(&mut world, &mut peer, 2);
        write(&mut peer, &bytes);
        peers.push(peer);
    }
    let mut got = std::collections::HashSet::new();
    while got.len() < usize::from(FLOWS) {
        let packet = world.packet();
        if !packet.payload.is_empty() {
            assert_eq!(packet.payload, packet.flow.guest.port().to_be_bytes());
            got.insert(packet.flow.guest.port());
        }
    }
    assert_eq!(world.metrics().retransmissions, 0);
}
