use super::*;

#[test]
fn a_frame_leaves_as_the_guest_wrote_it() {
    let mut b = Bench::new();
    let small = frame(60, 1);
    b.send(&PLAIN, &small);
    assert_eq!(b.peer.receive_bytes(0), Some((PLAIN, small)));
    for header in [
        OPEN,
        large(SegmentKind::Tcp4, false),
        large(SegmentKind::Tcp6, true),
        large(SegmentKind::UdpL4, false),
    ] {
        let big = frame(65_000, 2);
        b.send(&header, &big);
        assert_eq!(b.peer.receive_bytes(0), Some((header, big)));
    }
    let m = b.metrics();
    assert_eq!((m.sent_frames, m.sent_bytes), (5, 60 + 4 * 65_000));
}

#[test]
fn header_and_frame_may_be_cut_anywhere() {
    let mut b = Bench::new();
    let bytes = frame(100, 3);
    let mut all = OPEN.encode(0).to_vec();
    all.extend_from_slice(&bytes);
    let gpa = b.driver.alloc_bytes(&all);
    for cuts in [vec![112], vec![5, 3, 10, 94], vec![12, 0, 1, 99], vec![1; 112]] {
        let mut at = gpa;
        let pieces: Vec<Piece> = cuts
            .iter()
            .map(|&len| {
                at += len;
                out(at - len, len as u32)
            })
            .collect();
        b.driver.add_indirect(1, &pieces);
        b.driver.kick(1);
        assert_eq!(b.peer.receive_bytes(0), Some((OPEN, bytes.clone())));
    }
}

#[test]
fn what_the_driver_may_not_mean_is_dropped_and_the_device_goes_on() {
    let mut b = Plan::without(features::HOST_TSO6 | features::HOST_ECN | features::HOST_USO).build();
    let bad: [(FrameHeader, usize); 7] = [
        (PLAIN, 13),
        (PLAIN, atoll_network::port::MAX_FRAME + 1),
        (OPEN, 51),
        (large(SegmentKind::Tcp6, false), 3000),
        (large(SegmentKind::Tcp4, true), 3000),
        (large(SegmentKind::UdpL4, false), 3000),
        (FrameHeader { checksum: None, ..large(SegmentKind::Tcp4, false) }, 3000),
    ];
    for (header, len) in bad {
        let gpa = b.driver.alloc_bytes(&header.encode(0));
        b.driver.add(1, &[out(gpa, 12), out(0, len as u32)]);
        b.driver.kick(1);
        assert!(b.driver.take_used(1).is_some());
    }
    let unknown = b.driver.alloc_bytes(&[0, 0x42]);
    b.driver.add(1, &[out(unknown, 112)]);
    b.driver.kick(1);
    assert!(b.driver.take_used(1).is_some());
    assert_eq!(b.peer.receive_bytes(0), None);
    assert_eq!(b.metrics().send_malformed, 8);
    assert!(!b.driver.needs_reset());
    b.send(&FrameHeader { data_valid: true, ..PLAIN }, &frame(60, 0));
    assert_eq!(b.peer.receive_bytes(0).unwrap().0, PLAIN, "a flag that means nothing here is cleared");
    b.send(&large(SegmentKind::Tcp4, false), &frame(3000, 0));
    assert!(b.peer.receive_bytes(0).is_some());
}

#[test]
fn a_chain_that_no_driver_builds_stops_the_device() {
    for pieces in [vec![out(0, 11)], vec![out(0, 0)], vec![out(0, 72), into(0x1000, 1)], vec![into(0, 72)]] {
        let mut b = Bench::new();
        b.driver.add(1, &pieces);
        b.driver.kick(1);
        assert!(b.driver.needs_reset(), "{pieces:?}");
        assert_eq!(b.driver.interrupts.take(), [0]);
        b.driver.start(Setup::default());
        b.send(&PLAIN, &frame(60, 0));
        assert!(b.peer.receive_bytes(0).is_some());
    }
}

#[test]
fn a_full_port_keeps_frames_in_the_queue_and_in_order() {
    let mut b = Plan { room: 4, ..Plan::default() }.build();
    for n in 0..8 {
        b.queue_frame(1, &PLAIN, &frame(60, n));
    }
    b.driver.kick(1);
    let taken = |b: &mut Bench| std::iter::from_fn(|| b.driver.take_used(1)).count();
    assert_eq!(taken(&mut b), 4);
    assert_eq!(b.metrics().send_full, 1);
    b.turn();
    assert_eq!(taken(&mut b), 0, "nothing changed");
    let mut seen = Vec::new();
    while let Some((_, frame)) = b.peer.receive_bytes(0) {
        seen.push(frame);
        b.turn();
    }
    assert_eq!(taken(&mut b), 4);
    assert_eq!(seen, (0..8).map(|n| frame(60, n)).collect::<Vec<_>>());
    assert_eq!(b.metrics().sent_frames, 8);
}

#[test]
fn a_batch_is_announced_once_to_both_sides() {
    let mut b = Bench::new();
    let told = Arc::new(Mutex::new(Vec::new()));
    let sink = told.clone();
    b.peer.watch(&b.events.handle(), Arc::new(move |event| lock(&sink).push(event))).unwrap();
    b.turn();
    lock(&told).clear();
    assert_eq!(b.peer.receive_bytes(0), None);
    for n in 0..8 {
        b.queue_frame(1, &PLAIN, &frame(60, n));
    }
    b.driver.kick(1);
    b.turn();
    assert_eq!(*lock(&told), [PortEvent::Readable(0)]);
    assert_eq!(b.driver.interrupts.take(), [2]);
}

#[test]
fn the_ring_wraps_many_times() {
    let mut b = Bench::new();
    for n in 0..500u32 {
        let bytes = frame(60 + n as usize % 100, n as u8);
        b.send(&PLAIN, &bytes);
        assert_eq!(b.peer.receive_bytes(0), Some((PLAIN, bytes)), "frame {n}");
    }
}

#[test]
fn features_follow_the_port() {
    let guest = features::GUEST_OFFLOADS | features::CTRL_GUEST_OFFLOADS;
    let host =
        features::CSUM | features::HOST_TSO4 | features::HOST_TSO6 | features::HOST_ECN | features::HOST_USO;
    let offered = |send, receive| Plan { send, receive, ..Plan::default() }.build().driver.offered();
    let all = offered(EVERYTHING, EVERYTHING);
    assert_eq!(all & (guest | host), guest | host);
    assert_eq!(all & (features::MQ | features::MTU), 0, "one pair, and nobody named an MTU");
    assert_eq!(offered(EVERYTHING, Offloads::NONE) & (guest | host), host);
    assert_eq!(offered(Offloads::NONE, EVERYTHING) & (guest | host), guest);
    let no_checksum = Offloads { checksum: false, ..EVERYTHING };
    assert_eq!(offered(no_checksum, no_checksum) & (guest | host), 0);
}

fn slow() -> RateLimits {
    let rate = atoll_foundation::throttle::Rate { per_second: 1, burst: 1 };
    RateLimits { operations: None, bytes: Some(rate) }
}

#[test]
fn a_throttled_queue_waits_and_new_limits_count_at_once() {
    let limits = NetLimits { send: slow(), ..NetLimits::default() };
    let options = NetOptions { limits, ..NetOptions::new(OWN) };
    let mut b = Plan { options, ..Plan::default() }.build();
    b.send(&PLAIN, &frame(60, 0));
    b.queue_frame(1, &PLAIN, &frame(60, 1));
    b.driver.kick(1);
    assert_eq!(b.driver.take_used(1), None, "it owes a minute");
    assert_eq!(b.metrics().send_throttled, 1);
    b.net.set_limits(NetLimits::default());
    assert!(b.driver.wait_used(1).is_some());
    let rate = atoll_foundation::throttle::Rate { per_second: 500, burst: 1 };
    let send = RateLimits { operations: Some(rate), bytes: None };
    b.net.set_limits(NetLimits { send, ..NetLimits::default() });
    let start = Instant::now();
    for n in 0..6 {
        b.queue_frame(1, &PLAIN, &frame(60, n));
    }
    b.driver.kick(1);
    for _ in 0..6 {
        assert!(b.driver.wait_used(1).is_some());
    }
    assert!(start.elapsed() >= Duration::from_millis(10), "five of them wait 2 ms each");
}

#[test]
fn a_full_port_does_not_cost_a_frame_its_place_in_the_throttle() {
    let rate = atoll_foundation::throttle::Rate { per_second: 1, burst: 60 + 60 };
    let send = RateLimits { operations: None, bytes: Some(rate) };
    let options = NetOptions { limits: NetLimits { send, ..NetLimits::default() }, ..NetOptions::new(OWN) };
    let mut b = Plan { room: 1, options, ..Plan::default() }.build();
    b.send(&PLAIN, &frame(60, 0));
    b.queue_frame(1, &PLAIN, &frame(60, 1));
    b.driver.kick(1);
    b.driver.kick(1);
    assert_eq!(b.driver.take_used(1), None);
    b.peer.receive_bytes(0).unwrap();
    b.turn();
    assert!(b.driver.take_used(1).is_some(), "it was let pass already");
    assert_eq!(b.metrics().send_throttled, 0);
}
