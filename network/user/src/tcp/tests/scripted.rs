//! What becomes of single segments of an open flow.

use std::net::Shutdown;

use super::*;

#[test]
fn payload_goes_to_the_host_and_is_acknowledged_with_the_window() {
    let (mut script, mut peer) = Script::connected();
    script.send(TcpFlags::PSH, b"hello, ");
    script.send(TcpFlags::PSH, b"world");
    let header = script.acknowledged();
    assert!(header.window > 16, "{}", header.window);
    assert_eq!(read(&mut script.world, &mut peer, 12), b"hello, world");
    script.world.nothing();
}

#[test]
fn payload_that_was_sent_again_or_overlaps_arrives_once() {
    let (mut script, mut peer) = Script::connected();
    let start = script.seq;
    script.send(TcpFlags::PSH, b"abcdef");
    script.send_from(start, TcpFlags::PSH, b"abc");
    script.send_from(start.wrapping_add(3), TcpFlags::PSH, b"defghi");
    script.seq = start.wrapping_add(9);
    assert_eq!(read(&mut script.world, &mut peer, 9), b"abcdefghi");
}

#[test]
fn payload_that_comes_too_early_is_asked_for() {
    let (mut script, mut peer) = Script::connected();
    let start = script.seq;
    for gap in 3..7 {
        script.send_from(start.wrapping_add(gap), TcpFlags::PSH, b"later");
    }
    for _ in 0..4 {
        script.acknowledged();
    }
    assert_eq!(script.world.metrics().out_of_order, 4);
    script.send(TcpFlags::PSH, b"now");
    assert_eq!(read(&mut script.world, &mut peer, 3), b"now");
}

#[test]
fn bytes_of_the_host_stay_in_its_queue_until_they_are_acknowledged() {
    let (mut script, mut peer) = Script::connected();
    write(&mut peer, b"first");
    script.receive(b"first", false);
    write(&mut peer, b"second");
    let packet = script.next();
    assert_eq!((packet.header.seq, &packet.payload[..]), (script.ack.wrapping_add(5), &b"second"[..]));
    // Nothing was acknowledged: everything is sent again after a while.
    script.world.pass(Duration::from_secs(2));
    script.receive(b"firstsecond", true);
    script.world.pass(Duration::from_secs(60));
    script.world.nothing();
    assert!(script.world.metrics().retransmissions >= 1);
}

#[test]
fn the_guests_window_is_kept() {
    let (mut script, mut peer) = Script::connected();
    script.window = 100 >> GUEST_SCALE;
    script.send(TcpFlags::ACK, &[]);
    write(&mut peer, &[7; 1000]);
    let packet = script.next();
    assert_eq!(packet.payload.len(), 96);
    script.world.nothing();
    script.ack = script.ack.wrapping_add(96);
    script.send(TcpFlags::ACK, &[]);
    assert_eq!(script.next().payload.len(), 96);
    script.ack = script.ack.wrapping_add(96);
    script.window = 4096;
    script.send(TcpFlags::ACK, &[]);
    script.receive(&[7; 808], true);
}

#[test]
fn a_closed_window_is_probed_and_survives_a_lost_update() {
    let (mut script, mut peer) = Script::connected();
    script.window = 0;
    script.send(TcpFlags::ACK, &[]);
    write(&mut peer, b"waiting");
    script.world.nothing();
    for _ in 0..30 {
        script.world.pass(Duration::from_secs(70));
        let probe = script.next();
        assert_eq!((probe.header.seq, probe.payload.len()), (script.ack.wrapping_sub(1), 0));
        script.send(TcpFlags::ACK, &[]);
    }
    script.world.pass(Duration::from_secs(70));
    script.next();
    script.window = 4096;
    script.send(TcpFlags::ACK, &[]);
    script.receive(b"waiting", true);
}

#[test]
fn a_guest_that_answers_nothing_any_more_is_given_up_late() {
    let (mut script, mut peer) = Script::connected();
    write(&mut peer, b"anybody?");
    script.next();
    let mut seconds = 0;
    while script.world.metrics().flows > 0 {
        script.world.pass(Duration::from_secs(1));
        script.world.wire.packets.clear();
        seconds += 1;
        assert!(seconds < 3600);
    }
    assert!((600..1800).contains(&seconds), "{seconds}");
    assert_eq!(outcome(&mut script.world, &mut peer).unwrap_err().kind(), ErrorKind::ConnectionReset);
}

#[test]
fn three_duplicates_have_the_lost_segment_sent_again() {
    let (mut script, mut peer) = Script::connected();
    let sent: Vec<u8> = (0..14_600_u32).map(|n| (n % 249) as u8).collect();
    write(&mut peer, &sent);
    let mut got = 0;
    while got < sent.len() {
        got += script.next().payload.len();
    }
    // The first segment was lost.
    for _ in 0..2 {
        script.send(TcpFlags::ACK, &[]);
    }
    script.world.nothing();
    script.send(TcpFlags::ACK, &[]);
    let again = script.next();
    assert_eq!((again.header.seq, &again.payload[..]), (script.ack, &sent[..1460]));
    script.world.nothing();
    // So were the third and fourth: the acknowledgement is a partial one.
    script.ack = script.ack.wrapping_add(2 * 1460);
    script.send(TcpFlags::ACK, &[]);
    let again = script.next();
    assert_eq!((again.header.seq, &again.payload[..]), (script.ack, &sent[2920..4380]));
    script.ack = script.ack.wrapping_add(sent.len() as u32 - 2 * 1460);
    script.send(TcpFlags::ACK, &[]);
    script.world.pass(Duration::from_secs(60));
    script.world.nothing();
}

#[test]
fn the_guest_ends_first() {
    let (mut script, mut peer) = Script::connected();
    script.send(TcpFlags::FIN, b"bye");
    script.acknowledged();
    assert_eq!(read(&mut script.world, &mut peer, 3), b"bye");
    assert_eq!(outcome(&mut script.world, &mut peer).unwrap(), 0);
    // The other direction goes on.
    write(&mut peer, b"still here");
    script.receive(b"still here", true);
    drop(peer);
    let fin = script.next();
    assert_eq!((fin.header.flags, fin.header.seq), (TcpFlags::FIN.with(TcpFlags::ACK), script.ack));
    assert_eq!(script.world.metrics().flows, 1);
    script.ack = script.ack.wrapping_add(1);
    script.send(TcpFlags::ACK, &[]);
    script.world.nothing();
    assert_eq!((script.world.metrics().flows, script.world.metrics().aborted), (0, 0));
}

#[test]
fn the_peer_ends_first() {
    let (mut script, mut peer) = Script::connected();
    write(&mut peer, b"bye");
    peer.shutdown(Shutdown::Write).unwrap();
    script.receive(b"bye", true);
    let fin = script.next();
    assert_eq!(fin.header.flags, TcpFlags::FIN.with(TcpFlags::ACK));
    // It is lost and sent again, on its own.
    script.world.pass(Duration::from_secs(2));
    let again = script.next();
    assert_eq!((again.header.flags, again.header.seq), (fin.header.flags, fin.header.seq));
    assert!(again.payload.is_empty());
    script.ack = script.ack.wrapping_add(1);
    script.send(TcpFlags::ACK, &[]);
    script.send(TcpFlags::PSH, b"answer");
    script.acknowledged();
    assert_eq!(read(&mut script.world, &mut peer, 6), b"answer");
    script.send(TcpFlags::FIN, &[]);
    script.acknowledged();
    assert_eq!(outcome(&mut script.world, &mut peer).unwrap(), 0);
    assert_eq!((script.world.metrics().flows, script.world.metrics().aborted), (0, 0));
}

#[test]
fn data_and_fin_are_sent_again_together() {
    let (mut script, mut peer) = Script::connected();
    write(&mut peer, b"bye");
    peer.shutdown(Shutdown::Write).unwrap();
    script.receive(b"bye", false);
    assert!(script.next().header.flags.has(TcpFlags::FIN));
    script.world.pass(Duration::from_secs(2));
    script.receive(b"bye", false);
    let fin = script.next().header;
    assert!(fin.flags.has(TcpFlags::FIN));
    script.ack = fin.seq.wrapping_add(1);
    script.send(TcpFlags::FIN, &[]);
    script.acknowledged();
    assert_eq!(script.world.metrics().flows, 0);
}

#[test]
fn a_reset_of_the_guest_reaches_the_peer() {
    let (mut script, mut peer) = Script::connected();
    script.send_from(script.seq, TcpFlags::RST, &[]);
    assert_eq!(outcome(&mut script.world, &mut peer).unwrap_err().kind(), ErrorKind::ConnectionReset);
    script.world.nothing();
    assert_eq!(script.world.metrics().flows, 0);
}

#[test]
fn a_reset_that_is_not_exact_has_to_prove_itself() {
    let (mut script, peer) = Script::connected();
    script.send_from(script.seq.wrapping_add(1), TcpFlags::RST, &[]);
    script.acknowledged();
    script.send_from(script.seq.wrapping_sub(1), TcpFlags::RST, &[]);
    script.send_from(script.seq.wrapping_add(1 << 30), TcpFlags::RST, &[]);
    script.world.nothing();
    assert_eq!(script.world.metrics().flows, 1);
    drop(peer);
}

#[test]
fn a_reset_of_the_peer_reaches_the_guest_after_its_data() {
    let (mut script, mut peer) = Script::connected();
    write(&mut peer, b"last words");
    rustix::net::sockopt::set_socket_linger(&peer, Some(Duration::ZERO)).unwrap();
    drop(peer);
    script.receive(b"last words", false);
    let reset = script.next().header;
    assert!(reset.flags.has(TcpFlags::RST));
    assert_eq!(reset.seq, script.ack.wrapping_add(10));
    assert_eq!(script.world.metrics().flows, 0);
    // Whatever the guest sends now belongs to nothing.
    script.send(TcpFlags::PSH, b"?");
    let reset = script.next().header;
    assert_eq!((reset.flags, reset.seq), (TcpFlags::RST, script.ack));
}

#[test]
fn a_reset_of_the_peer_after_its_end_reaches_the_guest() {
    let (mut script, peer) = Script::connected();
    peer.shutdown(Shutdown::Write).unwrap();
    assert!(script.next().header.flags.has(TcpFlags::FIN));
    script.ack = script.ack.wrapping_add(1);
    script.send(TcpFlags::ACK, &[]);
    drop(peer);
    script.send(TcpFlags::PSH, b"to nobody");
    // The peer's RST may be quicker than the acknowledgement.
    let mut answer = script.next().header;
    if answer.flags == TcpFlags::ACK {
        answer = script.next().header;
    }
    assert!(answer.flags.has(TcpFlags::RST));
    assert_eq!(script.world.metrics().flows, 0);
}

#[test]
fn a_peer_that_does_not_read_closes_the_guests_window_and_opens_it_again() {
    let (mut script, mut peer) = Script::connected();
    let mut sent = 0_usize;
    let mut window = 65_536;
    while window > 0 {
        for _ in 0..(window / 32_768).max(1) {
            script.send(TcpFlags::PSH, &vec![5; window.min(32_768)]);
            sent += window.min(32_768);
        }
        window = usize::from(script.acknowledged().window) << 8;
        assert!(sent < 64 << 20);
    }
    assert!(sent > 65_536, "{sent}");
    assert_eq!(script.world.metrics().pinched, 0);
    script.world.nothing();
    // The peer reads: the guest is told by itself.
    read(&mut script.world, &mut peer, sent);
    assert!(script.acknowledged().window > 0);
}

#[test]
fn a_guest_that_ignores_its_window_is_asked_to_send_again_at_once() {
    let (mut script, mut peer) = Script::connected();
    let start = script.seq;
    let mut sent = 0_usize;
    while script.world.metrics().pinched == 0 {
        script.send(TcpFlags::PSH, &vec![9; 60_000]);
        sent += 60_000;
        assert!(sent < 64 << 20);
    }
    script.world.turn(Duration::ZERO);
    let packet = script.next();
    let taken = packet.header.ack.wrapping_sub(start) as usize;
    assert!(taken < sent && sent - taken <= 60_000, "{taken} of {sent}");
    read(&mut script.world, &mut peer, taken);
    let mut last = Vec::new();
    while let Some(packet) = script.world.packet_within(Duration::from_millis(50)) {
        last.push(packet.header);
    }
    let tail = &last[last.len() - 4..];
    assert!(tail[0].window > 0);
    assert!(tail.iter().all(|header| header == &tail[0]), "{tail:?}");
    assert_eq!(tail[0].ack.wrapping_sub(start) as usize, taken);
}

#[test]
fn a_full_output_loses_nothing() {
    let (mut script, mut peer) = Script::connected();
    script.world.wire.room = 2;
    let sent: Vec<u8> = (0..60_000_u32).map(|n| (n % 241) as u8).collect();
    write(&mut peer, &sent);
    while script.world.wire.packets.len() < 2 {
        script.world.turn(Duration::from_millis(1));
    }
    assert!(script.world.table.wants_room());
    script.receive(&sent, true);
    script.send(TcpFlags::PSH, b"up");
    script.acknowledged();
    assert_eq!(script.world.metrics().retransmissions, 0);
}

#[test]
fn keep_alive_probes_are_answered_and_passed_on() {
    let (mut script, _peer) = Script::connected();
    script.world.pass(Duration::from_secs(100));
    script.send_from(script.seq.wrapping_sub(1), TcpFlags::ACK, &[]);
    script.acknowledged();
    let flow = script.world.table.slots[0].flow.as_ref().unwrap();
    assert!(rustix::net::sockopt::socket_keepalive(&flow.socket).unwrap());
    let idle = rustix::net::sockopt::tcp_keepidle(&flow.socket).unwrap();
    assert_eq!(idle, Duration::from_secs(100));
}

#[test]
fn a_silent_flow_ends_after_the_limit_and_a_probe_keeps_it() {
    let (mut script, mut peer) = Script::connected();
    script.world.pass(Duration::from_secs(7400));
    script.send_from(script.seq.wrapping_sub(1), TcpFlags::ACK, &[]);
    script.acknowledged();
    script.world.pass(Duration::from_secs(7400));
    assert_eq!(script.world.metrics().flows, 1);
    script.world.pass(Duration::from_secs(100));
    assert_eq!((script.world.metrics().flows, script.world.metrics().expired), (0, 1));
    assert!(script.next().header.flags.has(TcpFlags::RST));
    assert_eq!(outcome(&mut script.world, &mut peer).unwrap_err().kind(), ErrorKind::ConnectionReset);
}

#[test]
fn urgent_bytes_of_the_peer_stay_in_the_stream() {
    let (mut script, mut peer) = Script::connected();
    write(&mut peer, b"ab");
    rustix::net::send(&peer, b"!", rustix::net::SendFlags::OOB).unwrap();
    write(&mut peer, b"cd");
    script.receive(b"ab!cd", true);
    write(&mut peer, b"ef");
    script.receive(b"ef", true);
}

#[test]
fn acknowledgements_of_the_future_and_the_past_change_nothing() {
    let (mut script, mut peer) = Script::connected();
    write(&mut peer, b"data");
    script.receive(b"data", false);
    let right = script.ack;
    for wrong in [right.wrapping_add(5), right.wrapping_add(1 << 31), right.wrapping_sub(1)] {
        script.ack = wrong;
        script.send(TcpFlags::ACK, &[]);
        script.world.turn(Duration::ZERO);
    }
    script.world.wire.packets.clear();
    script.ack = right;
    script.world.pass(Duration::from_secs(2));
    script.receive(b"data", true);
}
