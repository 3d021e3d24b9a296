//! How flows begin, and fail to.

use super::*;

#[test]
fn a_guest_is_answered_once_the_host_is_connected() {
    let (script, peer) = Script::connected();
    assert_eq!(script.world.metrics().half_open, 0);
    assert_eq!(script.world.metrics().flows, 1);
    drop(peer);
}

#[test]
fn the_answer_has_our_segment_size_and_a_scale_only_if_asked() {
    let (_listener, address) = listener();
    for (scale, expected) in [(Some(7), Some(8)), (None, None)] {
        let mut world = World::new(Limits::default(), Some(address));
        let options = TcpOptions { mss: Some(1000), window_scale: scale, ..TcpOptions::default() };
        let syn = TcpHeader { seq: 1, flags: TcpFlags::SYN, window: 1000, options, ..TcpHeader::default() };
        world.send(&flow(1), &syn, &[]);
        let answer = world.packet().header;
        assert_eq!(answer.flags, TcpFlags::SYN.with(TcpFlags::ACK));
        assert_eq!((answer.options.mss, answer.options.window_scale), (Some(1460), expected));
        assert!(answer.window > 1000);
    }
}

#[test]
fn a_peer_that_refuses_is_a_reset() {
    let (listener, address) = listener();
    drop(listener);
    let mut script = Script::new(Some(address));
    script.syn();
    let answer = script.next().header;
    assert_eq!(answer.flags, TcpFlags::RST.with(TcpFlags::ACK));
    assert_eq!((answer.seq, answer.ack), (0, script.seq.wrapping_add(1)));
    assert_eq!((script.world.metrics().flows, script.world.metrics().failed), (0, 1));
}

#[test]
fn a_refused_destination_is_a_reset_and_never_a_socket() {
    let mut script = Script::new(None);
    script.syn();
    assert!(script.next().header.flags.has(TcpFlags::RST));
    assert_eq!((script.world.metrics().flows, script.world.metrics().refused), (0, 1));
}

#[test]
fn a_network_without_route_is_icmp_that_quotes_the_syn() {
    // Class E is nobody's: the kernel says ENETUNREACH or, with a default route to such, nothing at all.
    let mut script = Script::new(Some("240.0.0.1:80".parse().unwrap()));
    script.syn();
    if script.world.metrics().flows == 0 {
        assert!(script.world.wire.packets.is_empty());
        assert_eq!(script.world.wire.unreachable.len(), 1);
        assert_eq!(script.world.wire.unreachable[0].1, GUEST_ISN);
    }
}

#[test]
fn a_syn_sent_again_gets_the_same_answer_and_no_second_socket() {
    let (listener, address) = listener();
    let mut script = Script::new(Some(address));
    script.syn();
    script.syn();
    let first = script.next().header;
    script.syn();
    let second = script.next().header;
    assert_eq!(first.seq, second.seq);
    assert_eq!(script.world.metrics().opened_by_guest, 1);
    // The other is lost, too: the clock has it sent again.
    script.world.pass(Duration::from_secs(2));
    assert_eq!(script.next().header.seq, first.seq);
    drop(listener);
}

#[test]
fn an_answer_that_is_never_acknowledged_ends_the_flow() {
    let (listener, address) = listener();
    let mut script = Script::new(Some(address));
    script.syn();
    script.next();
    let mut peer = listener.accept().unwrap().0;
    let mut seconds = 0;
    while script.world.metrics().flows > 0 {
        script.world.pass(Duration::from_secs(1));
        seconds += 1;
        assert!(seconds < 300);
    }
    assert!(seconds > 60, "{seconds}");
    assert_eq!(outcome(&mut script.world, &mut peer).unwrap_err().kind(), ErrorKind::ConnectionReset);
}

#[test]
fn a_host_that_never_connects_is_given_up_after_the_limit() {
    // A listener whose queue is full: connecting neither succeeds nor fails.
    let socket = TcpListener::bind("127.0.0.1:0").unwrap();
    rustix::net::listen(&socket, 0).unwrap();
    let address = socket.local_addr().unwrap();
    let fillers: Vec<_> = (0..4).map(|_| crate::socket::TcpSocket::connect(address)).collect();
    let limits = Limits { connect: Duration::from_secs(30), ..Limits::default() };
    let mut world = World::new(limits, Some(address));
    let syn = TcpHeader { seq: 5, flags: TcpFlags::SYN, ..TcpHeader::default() };
    world.send(&flow(1), &syn, &[]);
    world.turn(Duration::from_millis(20));
    assert_eq!(world.metrics().half_open, 1);
    world.pass(Duration::from_secs(29));
    assert_eq!(world.metrics().flows, 1);
    world.pass(Duration::from_secs(2));
    assert_eq!((world.metrics().flows, world.metrics().expired), (0, 1));
    drop(fillers);
}

#[test]
fn a_forwarded_connection_is_completed_by_the_guest() {
    let (listener, address) = listener();
    let mut peer = TcpStream::connect(address).unwrap();
    let mut script = Script::new(None);
    let accepted = listener.accept().unwrap().0;
    let tuple = script.flow;
    assert!(script.world.with(|table, cx| table.accepted(accepted.into(), &tuple, cx)));
    let syn = script.next().header;
    assert_eq!(syn.flags, TcpFlags::SYN);
    assert_eq!((syn.options.mss, syn.options.window_scale), (Some(1460), Some(8)));
    // Lost; the clock has it sent again.
    script.world.pass(Duration::from_secs(2));
    assert_eq!(script.next().header.seq, syn.seq);
    write(&mut peer, b"early");
    script.ack = syn.seq.wrapping_add(1);
    let options = TcpOptions { mss: Some(1200), window_scale: Some(GUEST_SCALE), ..TcpOptions::default() };
    let answer = TcpHeader { options, ..script.header(TcpFlags::SYN.with(TcpFlags::ACK)) };
    let (tuple, none) = (script.flow, []);
    script.world.send(&tuple, &answer, &none);
    script.seq = script.seq.wrapping_add(1);
    script.receive(b"early", true);
    script.send(TcpFlags::PSH, b"hello");
    assert_eq!(read(&mut script.world, &mut peer, 5), b"hello");
    assert_eq!(script.world.metrics().opened_by_host, 1);
}

#[test]
fn a_guest_that_refuses_a_forwarded_connection_resets_the_peer() {
    let (listener, address) = listener();
    let mut peer = TcpStream::connect(address).unwrap();
    let mut script = Script::new(None);
    let accepted = listener.accept().unwrap().0;
    let tuple = script.flow;
    script.world.with(|table, cx| table.accepted(accepted.into(), &tuple, cx));
    script.ack = script.next().header.seq.wrapping_add(1);
    script.send_from(0, TcpFlags::RST, &[]);
    assert_eq!(outcome(&mut script.world, &mut peer).unwrap_err().kind(), ErrorKind::ConnectionReset);
    assert_eq!(script.world.metrics().flows, 0);
}

#[test]
fn a_forwarded_connection_under_a_used_tuple_is_reset() {
    let (mut script, _peer) = Script::connected();
    let (listener, address) = listener();
    let mut second = TcpStream::connect(address).unwrap();
    let accepted = listener.accept().unwrap().0;
    let tuple = script.flow;
    assert!(!script.world.with(|table, cx| table.accepted(accepted.into(), &tuple, cx)));
    assert_eq!(outcome(&mut script.world, &mut second).unwrap_err().kind(), ErrorKind::ConnectionReset);
    assert_eq!(script.world.metrics().flows, 1);
}

#[test]
fn numbers_begin_elsewhere_for_every_flow_and_table() {
    let (_listener, address) = listener();
    let mut seen = std::collections::HashSet::new();
    for _ in 0..4 {
        let mut world = World::new(Limits::default(), Some(address));
        for port in 1..5 {
            let syn = TcpHeader { flags: TcpFlags::SYN, ..TcpHeader::default() };
            world.send(&flow(port), &syn, &[]);
            seen.insert(world.packet().header.seq >> 16);
        }
    }
    assert!(seen.len() > 10, "{seen:?}");
}

#[test]
fn a_guest_that_began_anew_gets_a_new_connection() {
    let (mut script, peer) = Script::connected();
    let old = script.seq;
    script.seq = 77;
    script.syn();
    // RFC 5961: what was expected is told; the guest's new self resets it, and asks again.
    let challenge = script.next().header;
    assert_eq!((challenge.flags, challenge.ack), (TcpFlags::ACK, old));
    let reset = TcpHeader { seq: challenge.ack, flags: TcpFlags::RST, ..TcpHeader::default() };
    let tuple = script.flow;
    script.world.send(&tuple, &reset, &[]);
    assert_eq!(script.world.metrics().flows, 0);
    let (_listener, address) = listener();
    script.world.policy = To(Some(address));
    script.seq = 77;
    script.handshake();
    assert_eq!(script.world.metrics().flows, 1);
    drop(peer);
}
