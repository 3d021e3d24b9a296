use super::*;
use atoll_network::port::MAX_FRAME;

#[test]
fn frames_fill_mergeable_buffers_exactly() {
    let mut b = Plan { setup: Setup { queue_size: 64, ..Setup::default() }, ..Plan::default() }.build();
    const BUFFER: usize = 1536;
    for _ in 0..64 {
        b.post(0, &[BUFFER as u32]);
    }
    b.driver.kick(0);
    let one = BUFFER - 12;
    let sizes =
        [14, 60, 1514, one - 1, one, one + 1, one + BUFFER, one + BUFFER + 1, 9014, 65_550, MAX_FRAME];
    for len in sizes {
        let header = if len > 1514 { large(SegmentKind::Tcp4, false) } else { PLAIN };
        // Too short for an open checksum in any case.
        let header = if len == 14 { PLAIN } else { header };
        let bytes = frame(len, len as u8);
        b.arrive(&header, &bytes);
        let arrival = b.received(0).expect("delivered on the event loop's thread");
        assert_eq!((arrival.header, &arrival.frame), (header, &bytes), "{len}");
        let buffers = (len + 12).div_ceil(BUFFER);
        assert_eq!(usize::from(arrival.num_buffers), buffers, "{len}");
        let last = (len + 12 - (buffers - 1) * BUFFER) as u32;
        let mut used = vec![BUFFER as u32; buffers - 1];
        used.push(last);
        assert_eq!(arrival.used, used, "{len}");
    }
    let m = b.metrics();
    assert_eq!(m.received_frames, sizes.len() as u64);
    assert_eq!(m.received_bytes, sizes.iter().map(|&n| n as u64).sum::<u64>());
}

#[test]
fn a_buffer_may_be_cut_anywhere_and_buffers_may_differ() {
    let mut b = Bench::new();
    b.post(0, &[1, 10, 1, 50]);
    b.post(0, &[12]);
    b.post(0, &[3, 4096]);
    b.driver.kick(0);
    let bytes = frame(1000, 7);
    b.arrive(&OPEN, &bytes);
    let arrival = b.received(0).unwrap();
    assert_eq!((arrival.header, arrival.frame, arrival.num_buffers), (OPEN, bytes, 3));
    assert_eq!(arrival.used, [62, 12, 938]);
}

#[test]
fn without_mergeable_buffers_a_frame_fits_into_one_or_is_dropped() {
    let mut b = Plan::without(features::MRG_RXBUF).build();
    b.post(0, &[12, 1514]);
    b.driver.kick(0);
    b.arrive(&PLAIN, &frame(1515, 1));
    assert_eq!(b.received(0), None);
    assert_eq!(b.metrics().receive_too_large, 1);
    let bytes = frame(1514, 2);
    b.arrive(&PLAIN, &bytes);
    let arrival = b.received(0).unwrap();
    assert_eq!((arrival.frame, arrival.num_buffers, arrival.used), (bytes, 1, vec![1526]));
}

fn waits_for_buffers(features: u64) {
    let mut b = Plan::without(features).build();
    let bytes: Vec<_> = (0..3).map(|n| frame(1514, n)).collect();
    for frame in &bytes {
        b.arrive(&PLAIN, frame);
    }
    assert_eq!(b.received(0), None);
    assert!(b.metrics().receive_no_buffers > 0);
    // The driver adds one buffer at a time, and each is used, on another thread than the one that notifies.
    for frame in &bytes {
        let before = b.driver.pci.handed_over();
        b.post(0, &[2048]);
        b.driver.kick(0);
        assert_eq!(b.driver.wait_used(0).unwrap().1, 1526);
        let gpa = b.posted.drain().next().unwrap().1[0].gpa;
        assert_eq!(&b.driver.load(gpa + 12, 1514), frame);
        assert!(b.driver.pci.handed_over() > before);
    }
}

#[test]
fn frames_wait_for_buffers_and_the_driver_is_asked_to_tell() {
    waits_for_buffers(0);
    waits_for_buffers(feature::EVENT_IDX);
}

#[test]
fn a_driver_is_asked_to_notify_only_while_a_frame_lacks_buffers() {
    let mut b = Plan::without(feature::EVENT_IDX).build();
    let wants = |b: &Bench| b.driver.load16(b.driver.queues[0].used) & 1 == 0;
    b.post(0, &[2048]);
    b.driver.kick(0);
    assert!(!wants(&b), "there is nothing to receive");
    b.arrive(&PLAIN, &frame(60, 0));
    assert!(!wants(&b));
    b.driver.take_used(0).unwrap();
    b.arrive(&PLAIN, &frame(60, 1));
    assert!(wants(&b));
    // With event indexes it is the next buffer that it waits for, also when others lie there.
    let mut b = Bench::new();
    for _ in 0..3 {
        b.post(0, &[100]);
    }
    b.driver.kick(0);
    b.arrive(&PLAIN, &frame(1000, 0));
    assert_eq!(b.driver.avail_event(0), 3);
    b.post(0, &[2048]);
    b.driver.kick(0);
    assert_eq!(b.wait_received(0).num_buffers, 4);
}

#[test]
fn a_frame_larger_than_the_whole_ring_is_dropped() {
    let mut b = Bench::new();
    for _ in 0..16 {
        b.post(0, &[1024]);
    }
    b.driver.kick(0);
    b.arrive(&large(SegmentKind::Tcp4, false), &frame(16 * 1024 - 11, 0));
    assert_eq!(b.metrics().receive_too_large, 1);
    b.arrive(&large(SegmentKind::Tcp4, false), &frame(16 * 1024 - 12, 1));
    assert_eq!(b.received(0).unwrap().num_buffers, 16);
}

#[test]
fn a_driver_that_leaves_too_few_buffers_loses_the_frame_but_not_the_next() {
    let mut b = Bench::new();
    b.post(0, &[1024]);
    b.driver.kick(0);
    b.arrive(&PLAIN, &frame(1514, 0));
    let fitting = frame(60, 1);
    b.arrive(&PLAIN, &fitting);
    assert_eq!(b.received(0), None);
    assert_eq!(b.metrics().receive_too_large, 0, "it has time to add more");
    assert_eq!(b.wait_received(0).frame, fitting);
    assert_eq!(b.metrics().receive_too_large, 1);
}

#[test]
fn a_receive_buffer_that_no_driver_gives_stops_the_device() {
    for pieces in [vec![into(0, 11)], vec![out(0, 12), into(0x1000, 2048)], vec![out(0, 2048)]] {
        let mut b = Bench::new();
        b.driver.add(0, &pieces);
        b.driver.kick(0);
        assert!(!b.driver.needs_reset(), "nobody looked yet");
        b.arrive(&PLAIN, &frame(60, 0));
        assert!(b.driver.needs_reset(), "{pieces:?}");
        b.driver.start(Setup::default());
        b.posted.clear();
        b.post(0, &[2048]);
        b.driver.kick(0);
        let bytes = frame(61, 1);
        b.arrive(&PLAIN, &bytes);
        assert_eq!(b.wait_received(0).frame, bytes);
    }
}

#[test]
fn a_driver_without_offloads_gets_finished_frames_only() {
    let mut b = Plan::without(features::GUEST_OFFLOADS).build();
    assert_eq!(b.peer.other_receive_offloads(), Offloads::NONE);
    b.post(0, &[4096]);
    b.driver.kick(0);
    let bytes = frame(100, 5);
    b.arrive(&OPEN, &bytes);
    let arrival = b.received(0).unwrap();
    assert_eq!(arrival.header, PLAIN);
    assert_eq!(Some(arrival.frame), super::super::frame::finish_checksum(&OPEN, &bytes));
    b.arrive(&large(SegmentKind::Tcp4, false), &frame(3000, 0));
    b.arrive(&FrameHeader { data_valid: true, ..PLAIN }, &bytes);
    assert_eq!(b.received(0).unwrap().header, PLAIN, "and no word about what was verified");
    let m = b.metrics();
    assert_eq!((m.checksums_finished, m.receive_unfinished, m.received_frames), (1, 1, 2));
}

#[test]
fn what_the_port_may_not_mean_is_dropped() {
    let mut b = Plan::without(features::GUEST_ECN).build();
    b.post(0, &[4096]);
    b.driver.kick(0);
    b.arrive(&PLAIN, &[0; 13]);
    b.arrive(&OPEN, &frame(51, 0));
    b.arrive(&large(SegmentKind::UdpFragment, false), &frame(100, 0));
    b.arrive(&large(SegmentKind::Tcp4, true), &frame(100, 0));
    assert_eq!(b.received(0), None);
    let m = b.metrics();
    assert_eq!((m.receive_malformed, m.receive_unfinished), (2, 2));
    b.arrive(&FrameHeader { data_valid: true, ..PLAIN }, &frame(60, 0));
    assert!(b.received(0).unwrap().header.data_valid);
}

#[test]
fn frames_beyond_the_mtu_are_kept_from_a_guest_that_knows_it() {
    let options = NetOptions { mtu: Some(1400), ..NetOptions::new(OWN) };
    let mut b = Plan { options: options.clone(), ..Plan::default() }.build();
    b.post(0, &[9000]);
    b.driver.kick(0);
    b.arrive(&PLAIN, &frame(1415, 0));
    assert_eq!(b.metrics().receive_too_large, 1);
    b.arrive(&PLAIN, &frame(1414, 0));
    assert!(b.received(0).is_some());
    b.arrive(&large(SegmentKind::Tcp4, false), &frame(5000, 0));
    assert!(b.received(0).is_some(), "its segments are small enough");
    let setup = Setup { features: !features::MTU, ..Setup::default() };
    let mut b = Plan { options, setup, ..Plan::default() }.build();
    b.post(0, &[9000]);
    b.driver.kick(0);
    b.arrive(&PLAIN, &frame(1415, 0));
    assert!(b.received(0).is_some());
}

#[test]
fn a_batch_of_frames_is_one_interrupt() {
    let mut b = Bench::new();
    for _ in 0..16 {
        b.post(0, &[2048]);
    }
    b.driver.kick(0);
    b.driver.interrupts.take();
    for n in 0..10 {
        b.peer.send_bytes(0, &PLAIN, &frame(60, n));
    }
    b.turn();
    assert_eq!(b.driver.interrupts.take(), [1]);
    for n in 0..10 {
        assert_eq!(b.received(0).unwrap().frame, frame(60, n));
    }
    // The driver polls: it wants to hear of the hundredth.
    b.driver.set_used_event(0, 100);
    b.arrive(&PLAIN, &frame(60, 0));
    assert!(b.driver.interrupts.take().is_empty());
    // A frame of several buffers crosses the index that the driver waits for.
    b.driver.set_used_event(0, 12);
    b.arrive(&large(SegmentKind::Tcp4, false), &frame(5000, 0));
    assert_eq!(b.driver.interrupts.take(), [1]);
}

#[test]
fn the_ring_wraps_many_times() {
    let mut b = Plan { setup: Setup { queue_size: 8, ..Setup::default() }, ..Plan::default() }.build();
    for _ in 0..8 {
        b.post(0, &[512]);
    }
    b.driver.kick(0);
    for n in 0..1000usize {
        let bytes = frame(60 + n * 7 % 3000, n as u8);
        b.arrive(&PLAIN, &bytes);
        assert_eq!(b.received(0).unwrap().frame, bytes, "frame {n}");
    }
}

#[test]
fn a_throttled_guest_receives_slowly_and_loses_nothing() {
    let rate = atoll_foundation::throttle::Rate { per_second: 500, burst: 1 };
    let receive = RateLimits { operations: Some(rate), bytes: None };
    let options =
        NetOptions { limits: NetLimits { receive, ..NetLimits::default() }, ..NetOptions::new(OWN) };
    let mut b = Plan { options, ..Plan::default() }.build();
    for _ in 0..16 {
        b.post(0, &[2048]);
    }
    b.driver.kick(0);
    let start = Instant::now();
    for n in 0..6 {
        b.peer.send_bytes(0, &PLAIN, &frame(60, n));
    }
    b.turn();
    for n in 0..6 {
        assert_eq!(b.wait_received(0).frame, frame(60, n));
    }
    assert!(start.elapsed() >= Duration::from_millis(10), "five of them wait 2 ms each");
    assert!(b.metrics().receive_throttled > 0);
}
