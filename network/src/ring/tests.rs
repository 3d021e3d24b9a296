//! Both sides of a ring in one process: what honest sides see, and what a side does whose memory the other one
//! fills with garbage.

use std::collections::VecDeque;

use super::layout::record_bytes;
use super::*;
use crate::header::{FrameHeader, PartialChecksum, SegmentKind, Segmentation};
use crate::port::{MAX_FRAME, Port, PortError, PortEvent, Received, Sent, Taken};
use atoll_foundation::EventLoop;
use atoll_foundation::eventfd::wait_readable;
use atoll_foundation::sync::lock;
use proptest::prelude::*;
use std::sync::Mutex;
use std::time::Duration;
use vm_memory::VolatileSlice;

fn ring(pairs: u16) -> (RingPort, Peer) {
    let (port, setup) = create(pairs, MIN_RING_BYTES).unwrap();
    (port, Peer::attach(setup).unwrap())
}

/// A ring and a third look at its memory.
fn open_ring() -> (RingPort, Peer, SharedMemory, Layout) {
    let layout = Layout::new(1, MIN_RING_BYTES as u32).unwrap();
    let (port, setup) = create(1, MIN_RING_BYTES).unwrap();
    let memory = SharedMemory::map(&setup.memory, layout.total()).unwrap();
    (port, Peer::attach(setup).unwrap(), memory, layout)
}

fn send(port: &RingPort, pair: u16, header: &FrameHeader, frame: &[u8]) -> Result<Sent, PortError> {
    let mut copy = frame.to_vec();
    // In pieces, as a guest's buffers are.
    let (a, b) = copy.split_at_mut(frame.len() / 3);
    port.send(pair, header, &[VolatileSlice::from(a), VolatileSlice::from(b)])
}

fn receive(port: &RingPort, pair: u16) -> Result<Option<(FrameHeader, Vec<u8>)>, PortError> {
    let mut frame = None;
    let mut take = |header: &FrameHeader, bytes: &[u8]| {
        frame = Some((*header, bytes.to_vec()));
        Taken::Yes
    };
    let received = port.receive(pair, &mut take)?;
    assert_eq!(received == Received::Frame, frame.is_some());
    Ok(frame)
}

fn large(size: u16) -> FrameHeader {
    FrameHeader {
        checksum: Some(PartialChecksum { start: 34, offset: 16 }),
        data_valid: false,
        segmentation: Some(Segmentation { kind: SegmentKind::Tcp4, size, header_len: 54, ecn: false }),
    }
}

fn readable(fd: std::os::fd::BorrowedFd<'_>) -> bool {
    wait_readable(fd, Some(Duration::ZERO)).unwrap()
}

#[test]
fn a_frame_arrives_on_its_pair_in_each_direction() {
    let (port, mut peer) = ring(2);
    let mut buffer = Vec::new();
    assert_eq!(send(&port, 1, &large(1448), &[7; 60]).unwrap(), Sent::Done);
    assert!(peer.next(0, &mut buffer).unwrap().is_none());
    assert_eq!(peer.next(1, &mut buffer).unwrap(), Some(large(1448)));
    assert_eq!(buffer, [7; 60]);
    assert!(peer.push(0, &large(9), &[&[1; 14], &[2; 50]]).unwrap());
    assert!(receive(&port, 1).unwrap().is_none());
    let (header, frame) = receive(&port, 0).unwrap().unwrap();
    assert_eq!((header, frame.len(), frame[13], frame[14]), (large(9), 64, 1, 2));
}

#[test]
fn a_frame_that_is_not_taken_is_shown_again() {
    let (port, mut peer) = ring(1);
    for n in [1, 2] {
        assert!(peer.push(0, &FrameHeader::default(), &[&[n; 40]]).unwrap());
    }
    for _ in 0..2 {
        let mut shown = 0;
        let received = port.receive(0, &mut |_, frame| {
            shown = frame[0];
            Taken::NotNow
        });
        assert_eq!((received.unwrap(), shown), (Received::Kept, 1));
    }
    assert_eq!(receive(&port, 0).unwrap().unwrap().1, [1; 40]);
    assert_eq!(receive(&port, 0).unwrap().unwrap().1, [2; 40]);
    assert!(receive(&port, 0).unwrap().is_none());
}

#[test]
fn what_is_no_frame_is_dropped_and_the_largest_frame_is_carried() {
    let (port, mut peer) = ring(1);
    let (header, largest) = (FrameHeader::default(), vec![9; MAX_FRAME]);
    for len in [0, 13, MAX_FRAME + 1] {
        assert_eq!(send(&port, 0, &header, &vec![0; len]).unwrap(), Sent::Done);
        assert!(peer.push(0, &header, &[&vec![0; len]]).unwrap());
    }
    let mut buffer = Vec::new();
    assert!(peer.next(0, &mut buffer).unwrap().is_none() && receive(&port, 0).unwrap().is_none());
    assert_eq!(send(&port, 0, &header, &largest).unwrap(), Sent::Done);
    assert!(peer.next(0, &mut buffer).unwrap().is_some());
    assert!(buffer == largest);
    assert!(matches!(peer.next(1, &mut buffer), Err(RingError::NoPair(1))));
    assert!(matches!(send(&port, 1, &header, &largest), Err(PortError::Host { .. })));
}

#[test]
fn the_offloads_that_the_machine_takes_are_seen_by_the_peer() {
    let (port, peer) = ring(1);
    assert_eq!(peer.receive_offloads(), Offloads::NONE);
    let all = Offloads { checksum: true, tcp4: true, tcp6: true, ecn: true, udp_l4: true };
    port.set_receive_offloads(all).unwrap();
    assert_eq!(peer.receive_offloads(), Offloads::TCP, "no more than the port can give");
    assert_eq!(offloads_of(offload_bits(all)), all);
}

#[test]
fn only_a_side_that_sleeps_is_rung() {
    let (port, mut peer) = ring(1);
    let (header, mut buffer) = (FrameHeader::default(), Vec::new());
    send(&port, 0, &header, &[1; 60]).unwrap();
    assert!(!readable(peer.data_event()), "not before the flush");
    port.flush(0);
    assert!(readable(peer.data_event()));
    peer.clear_events();
    send(&port, 0, &header, &[2; 60]).unwrap();
    port.flush(0);
    assert!(!readable(peer.data_event()), "it has not looked yet");
    assert!(peer.next(0, &mut buffer).unwrap().is_some());
    assert!(peer.next(0, &mut buffer).unwrap().is_some());
    assert!(peer.next(0, &mut buffer).unwrap().is_none());
    port.flush(0);
    assert!(!readable(peer.data_event()), "nothing new");
    send(&port, 0, &header, &[3; 60]).unwrap();
    port.flush(0);
    assert!(readable(peer.data_event()));
}

#[test]
fn a_full_ring_tells_its_producer_when_half_is_free() {
    let (port, mut peer) = ring(1);
    let (header, frame, mut buffer) = (FrameHeader::default(), vec![1; 4000], Vec::new());
    let mut sent = 0;
    while send(&port, 0, &header, &frame).unwrap() == Sent::Done {
        sent += 1;
    }
    assert_eq!(sent, MIN_RING_BYTES / record_bytes(4000));
    assert!(readable(peer.data_event()), "a full ring rings without a flush");
    let mut events = EventLoop::new().unwrap();
    let seen = watch(&port, &events);
    let mut read = 0;
    while events.run_once(Some(Duration::ZERO)).unwrap() == 0 {
        assert!(peer.next(0, &mut buffer).unwrap().is_some());
        read += 1;
    }
    assert!(lock(&seen).contains(&PortEvent::Writable(0)));
    assert!(read * 2 >= sent && read < sent, "{read} of {sent}");
    assert_eq!(send(&port, 0, &header, &frame).unwrap(), Sent::Done);
}

#[test]
fn a_peer_that_finds_no_room_hears_of_it() {
    let (port, mut peer) = ring(1);
    let frame = vec![1; 30_000];
    assert_eq!(peer.room(0), MAX_FRAME);
    while peer.push(0, &FrameHeader::default(), &[&frame]).unwrap() {}
    assert!(peer.room(0) < 30_000);
    assert!(!peer.request_room_event(0).unwrap());
    assert!(!readable(peer.room_event()));
    while receive(&port, 0).unwrap().is_some() {}
    assert!(readable(peer.room_event()));
    assert!(peer.request_room_event(0).unwrap(), "there is room already");
}

fn watch(port: &RingPort, events: &EventLoop) -> Arc<Mutex<Vec<PortEvent>>> {
    let seen = Arc::new(Mutex::new(Vec::new()));
    let sink = seen.clone();
    port.watch(&events.handle(), Arc::new(move |event| lock(&sink).push(event))).unwrap();
    seen
}

#[test]
fn events_name_the_pairs_that_have_something() {
    let (port, mut peer) = ring(3);
    let mut events = EventLoop::new().unwrap();
    let seen = watch(&port, &events);
    peer.push(2, &FrameHeader::default(), &[&[0; 60]]).unwrap();
    peer.ring_bells();
    events.run_once(Some(Duration::from_secs(10))).unwrap();
    assert_eq!(*lock(&seen), [PortEvent::Readable(2)]);
    assert!(port.watch(&events.handle(), Arc::new(|_| ())).is_err(), "one listener only");
}

#[test]
fn a_bell_for_nothing_leaves_the_machine_ready_for_the_next_one() {
    let (port, mut peer, memory, layout) = open_ring();
    let mut events = EventLoop::new().unwrap();
    let seen = watch(&port, &events);
    peer.push(0, &FrameHeader::default(), &[&[0; 60]]).unwrap();
    peer.ring_bells();
    assert!(receive(&port, 0).unwrap().is_some() && receive(&port, 0).unwrap().is_none());
    // The other side had seen the flag before, clears it only now, and its bell comes after that.
    let sleeps = layout.place(0, Direction::ToMachine).control + super::layout::control::CONSUMER_SLEEPS;
    memory.word(sleeps).unwrap().store(0, Ordering::Relaxed);
    events.run_once(Some(Duration::from_secs(10))).unwrap();
    assert!(lock(&seen).is_empty());
    peer.push(0, &FrameHeader::default(), &[&[0; 60]]).unwrap();
    peer.ring_bells();
    events.run_once(Some(Duration::from_secs(10))).unwrap();
    assert_eq!(*lock(&seen), [PortEvent::Readable(0)]);
}

#[test]
fn the_end_of_the_peer_is_the_end_of_the_link() {
    let (port, mut peer) = ring(1);
    let mut events = EventLoop::new().unwrap();
    let seen = watch(&port, &events);
    peer.push(0, &FrameHeader::default(), &[&[0; 60]]).unwrap();
    assert!(port.link_up());
    drop(peer);
    for _ in 0..3 {
        events.run_once(Some(Duration::from_millis(100))).unwrap();
    }
    assert_eq!(*lock(&seen).last().unwrap(), PortEvent::Link(false));
    assert!(!port.link_up());
    let error = send(&port, 0, &FrameHeader::default(), &[0; 60]).unwrap_err();
    assert_eq!(error.to_string(), "network ring is gone: the process at its other end has ended");
    assert_eq!(events.run_once(Some(Duration::ZERO)).unwrap(), 0, "and the loop does not spin");
}

#[test]
fn a_port_that_ended_before_it_was_watched_does_not_keep_the_loop_busy() {
    let (port, peer) = ring(1);
    drop(peer);
    port.link().end("its process has ended");
    let mut events = EventLoop::new().unwrap();
    let _seen = watch(&port, &events);
    for _ in 0..3 {
        events.run_once(Some(Duration::from_millis(100))).unwrap();
    }
    assert_eq!(events.run_once(Some(Duration::ZERO)).unwrap(), 0);
}

#[test]
fn the_end_of_the_machine_is_heard_by_the_peer() {
    let (port, peer) = ring(1);
    drop(port);
    peer.clear_events();
    assert!(readable(peer.data_event()) && readable(peer.room_event()));
}

#[test]
fn the_link_can_be_set_from_outside() {
    let (port, mut peer) = ring(1);
    let mut events = EventLoop::new().unwrap();
    let seen = watch(&port, &events);
    let link = port.link();
    link.set(false);
    events.run_once(Some(Duration::from_secs(10))).unwrap();
    assert!(!port.link_up());
    assert_eq!(std::mem::take(&mut *lock(&seen)), [PortEvent::Link(false)]);
    assert_eq!(send(&port, 0, &FrameHeader::default(), &[0; 60]).unwrap(), Sent::Done);
    assert!(peer.next(0, &mut Vec::new()).unwrap().is_none(), "dropped, as by a cable pulled out");
    link.set(true);
    events.run_once(Some(Duration::from_secs(10))).unwrap();
    assert!(lock(&seen).starts_with(&[PortEvent::Link(true)]));
    link.end("network process ended with exit code 3");
    let error = receive(&port, 0).unwrap_err();
    assert_eq!(error.to_string(), "network ring is gone: network process ended with exit code 3");
    drop(port);
    link.set(true);
}

#[test]
fn sizes_are_limited_and_rounded_up() {
    for (pairs, bytes) in [(0, 1 << 20), (65, 1 << 20), (1, MAX_RING_BYTES + 1), (1, usize::MAX)] {
        assert!(matches!(create(pairs, bytes), Err(RingError::Size { .. })), "{pairs} {bytes}");
    }
    let (_, setup) = create(1, 300_000).unwrap();
    let size = rustix::fs::fstat(&setup.memory).unwrap().st_size;
    assert_eq!(size as usize, Layout::new(1, 1 << 19).unwrap().total());
}

#[test]
fn a_setup_that_is_not_a_ring_is_refused() {
    let attach = |setup: RingSetup| match Peer::attach(setup) {
        Err(RingError::Setup(text)) => text,
        other => panic!("{other:?}"),
    };
    let fresh = || create(1, MIN_RING_BYTES).unwrap().1;
    let mut few = Vec::from(fresh().to_fds());
    few.pop();
    assert!(matches!(RingSetup::from_fds(few), Err(RingError::Setup(_))));
    for (offset, value) in [
        (header::MAGIC, 0),
        (header::VERSION, 2),
        (header::PAIRS, 0),
        (header::PAIRS, 2),
        (header::PAIRS, u32::MAX),
        (header::RING_BYTES, 1 << 19),
        (header::RING_BYTES, 0),
        (header::RING_BYTES, u32::MAX),
    ] {
        let setup = fresh();
        let memory = SharedMemory::map(&setup.memory, 4096).unwrap();
        memory.word(offset).unwrap().store(value, Ordering::Relaxed);
        attach(setup);
    }
    let memory = tempfile::tempfile().unwrap();
    memory.set_len(1 << 20).unwrap();
    assert!(attach(RingSetup { memory: memory.into(), ..fresh() }).contains("seal"));
    let grown = create(2, MIN_RING_BYTES).unwrap().1.memory;
    let bytes = SharedMemory::map(&grown, 4096).unwrap();
    bytes.word(header::PAIRS).unwrap().store(1, Ordering::Relaxed);
    assert!(attach(RingSetup { memory: grown, ..fresh() }).contains("size"));
}

/// Sets one word of the ring in `direction` and says what each side makes of it.
fn after_poking(direction: Direction, offset: usize, value: u32) -> (Option<String>, Option<String>) {
    let (port, mut peer, memory, layout) = open_ring();
    for _ in 0..2 {
        send(&port, 0, &FrameHeader::default(), &[1; 60]).unwrap();
        peer.push(0, &FrameHeader::default(), &[&[1; 60]]).unwrap();
        peer.next(0, &mut Vec::new()).unwrap();
        receive(&port, 0).unwrap();
    }
    memory.word(layout.place(0, direction).control + offset).unwrap().store(value, Ordering::Relaxed);
    // Enough to make the producer look again.
    let header = FrameHeader::default();
    let mut machine = (0..5).find_map(|_| send(&port, 0, &header, &vec![1; MAX_FRAME]).err());
    let mut other = (0..5).find_map(|_| peer.push(0, &header, &[&vec![1; MAX_FRAME]]).err());
    machine = machine.or_else(|| receive(&port, 0).err());
    other = other.or_else(|| peer.next(0, &mut Vec::new()).err());
    if machine.is_some() {
        assert!(!port.link_up() && receive(&port, 0).is_err() && send(&port, 0, &header, &[0; 60]).is_err());
    }
    if other.is_some() {
        assert!(peer.next(0, &mut Vec::new()).is_err() && peer.push(0, &header, &[&[0; 60]]).is_err());
        assert_eq!(peer.room(0), 0);
    }
    (machine.map(|e| e.to_string()), other.map(|e| e.to_string()))
}

#[test]
fn an_index_that_cannot_be_ends_the_connection_of_who_reads_it() {
    use super::layout::control::{CONSUMER_SLEEPS, HEAD, PRODUCER_WAITS, TAIL};
    // 160 bytes were written and read each way.
    for value in [161, 168, 1 << 30, u32::MAX, u32::MAX - 15] {
        let (machine, peer) = after_poking(Direction::ToPeer, TAIL, value);
        assert!(machine.is_some_and(|e| e.contains("broke the rules")) && peer.is_none(), "{value}");
        let (machine, peer) = after_poking(Direction::ToMachine, TAIL, value);
        assert!(machine.is_none() && peer.is_some_and(|e| e.contains("broke its rules")), "{value}");
    }
    for direction in [Direction::ToPeer, Direction::ToMachine] {
        for offset in [CONSUMER_SLEEPS, PRODUCER_WAITS] {
            assert_eq!(after_poking(direction, offset, u32::MAX), (None, None), "flags cannot be wrong");
        }
    }
    for value in [0, 80, 161, 168, 160 + MIN_RING_BYTES as u32 + 16, 1 << 31, u32::MAX] {
        // The honest producer's own copy is not changed by this, but until it writes again the consumer sees it.
        let (port, mut peer, memory, layout) = open_ring();
        for _ in 0..2 {
            send(&port, 0, &FrameHeader::default(), &[1; 60]).unwrap();
            peer.push(0, &FrameHeader::default(), &[&[1; 60]]).unwrap();
            peer.next(0, &mut Vec::new()).unwrap();
            receive(&port, 0).unwrap();
        }
        for direction in [Direction::ToPeer, Direction::ToMachine] {
            memory.word(layout.place(0, direction).control + HEAD).unwrap().store(value, Ordering::Relaxed);
        }
        assert!(matches!(peer.next(0, &mut Vec::new()), Err(RingError::Broken(_))), "{value}");
        assert!(matches!(receive(&port, 0), Err(PortError::Gone { .. })), "{value}");
    }
}

#[test]
fn a_consumer_that_goes_back_is_noticed() {
    let (port, mut peer, memory, layout) = open_ring();
    let (header, frame) = (FrameHeader::default(), vec![1; 60_000]);
    for _ in 0..2 * MIN_RING_BYTES / 60_000 {
        send(&port, 0, &header, &frame).unwrap();
        peer.next(0, &mut Vec::new()).unwrap();
    }
    let tail =
        memory.word(layout.place(0, Direction::ToPeer).control + super::layout::control::TAIL).unwrap();
    let before = tail.load(Ordering::Relaxed);
    while send(&port, 0, &header, &frame).unwrap() == Sent::Done {}
    tail.store(before - 16, Ordering::Relaxed);
    let error = send(&port, 0, &header, &frame).unwrap_err();
    assert!(error.to_string().contains("never written"), "{error}");
}

#[test]
fn a_record_that_cannot_be_ends_the_connection() {
    let good = |len: u32| {
        let mut record = [0; 16];
        record[..4].copy_from_slice(&len.to_le_bytes());
        record
    };
    let mut unknown_kind = good(60);
    unknown_kind[5] = 2;
    let cases = [
        good(0),
        good(13),
        good(65),
        good(MAX_FRAME as u32),
        good(MAX_FRAME as u32 + 1),
        good(u32::MAX),
        unknown_kind,
    ];
    for record in cases {
        let (port, mut peer, memory, layout) = open_ring();
        send(&port, 0, &FrameHeader::default(), &[1; 60]).unwrap();
        peer.push(0, &FrameHeader::default(), &[&[1; 60]]).unwrap();
        for direction in [Direction::ToPeer, Direction::ToMachine] {
            memory.slice(layout.place(0, direction).data, 16).unwrap().copy_from(&record);
        }
        assert!(matches!(peer.next(0, &mut Vec::new()), Err(RingError::Broken(_))), "{record:?}");
        assert!(matches!(receive(&port, 0), Err(PortError::Gone { .. })), "{record:?}");
    }
}

#[test]
fn what_the_header_page_says_after_the_beginning_changes_nothing() {
    let (port, mut peer, memory, _) = open_ring();
    for offset in
        [header::MAGIC, header::VERSION, header::PAIRS, header::RING_BYTES, header::RECEIVE_OFFLOADS]
    {
        memory.word(offset).unwrap().store(u32::MAX, Ordering::Relaxed);
    }
    send(&port, 0, &FrameHeader::default(), &[1; 60]).unwrap();
    assert!(peer.next(0, &mut Vec::new()).unwrap().is_some());
    assert_eq!((peer.pairs(), port.queue_pairs()), (1, 1));
}

/// One thing that a test does.
#[derive(Clone, Debug)]
enum Step {
    Send(usize),
    Push(usize),
    Receive,
    Keep,
    Next,
    Bells,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let len = prop_oneof![3 => 14usize..2000, 1 => 60_000..=MAX_FRAME];
    let step = prop_oneof![
        3 => len.clone().prop_map(Step::Send),
        3 => len.prop_map(Step::Push),
        3 => Just(Step::Receive),
        1 => Just(Step::Keep),
        3 => Just(Step::Next),
        1 => Just(Step::Bells),
    ];
    proptest::collection::vec(step, 1..200)
}

/// A frame that no other one is equal to.
fn frame(len: usize, serial: u32) -> Vec<u8> {
    (0..len as u32).map(|n| n.wrapping_mul(serial | 1).wrapping_add(serial) as u8).collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn both_directions_are_queues_of_frames(steps in steps()) {
        let (port, mut peer) = ring(1);
        let (mut out, mut inward) = (VecDeque::new(), VecDeque::new());
        let fits = |queue: &VecDeque<Vec<u8>>, len: usize| {
            let used: usize = queue.iter().map(|f| record_bytes(f.len())).sum();
            used + record_bytes(len) <= MIN_RING_BYTES
        };
        // A frame that was kept is in private memory and takes no room in the ring.
        let mut kept: Option<Vec<u8>> = None;
        for (serial, step) in steps.into_iter().enumerate() {
            let header = large(serial as u16 + 1);
            match step {
                Step::Send(len) => {
                    let bytes = frame(len, serial as u32);
                    let expected = if fits(&out, len) { Sent::Done } else { Sent::Full };
                    prop_assert_eq!(send(&port, 0, &header, &bytes).unwrap(), expected);
                    if expected == Sent::Done {
                        out.push_back(bytes);
                    }
                }
                Step::Push(len) => {
                    let bytes = frame(len, serial as u32);
                    let expected = fits(&inward, len);
                    prop_assert_eq!(peer.room(0) >= len, expected);
                    prop_assert_eq!(peer.push(0, &header, &[&bytes[..9], &bytes[9..]]).unwrap(), expected);
                    if expected {
                        inward.push_back(bytes);
                    }
                }
                Step::Receive => {
                    let expected = kept.take().or_else(|| inward.pop_front());
                    prop_assert!(receive(&port, 0).unwrap().map(|f| f.1) == expected);
                }
                Step::Keep => {
                    kept = kept.or_else(|| inward.pop_front());
                    let expected = if kept.is_some() { Received::Kept } else { Received::Empty };
                    prop_assert_eq!(port.receive(0, &mut |_, _| Taken::NotNow).unwrap(), expected);
                }
                Step::Next => {
                    let mut bytes = Vec::new();
                    let got = peer.next(0, &mut bytes).unwrap();
                    prop_assert!(got.map(|_| bytes) == out.pop_front());
                }
                Step::Bells => {
                    port.flush(0);
                    peer.ring_bells();
                }
            }
        }
    }

    #[test]
    fn garbage_in_the_memory_is_an_error_and_nothing_worse(
        steps in steps(),
        pokes in proptest::collection::vec((0usize..200, 0usize..40, any::<u32>(), any::<bool>()), 1..20),
    ) {
        let (port, mut peer, memory, layout) = open_ring();
        let mut bytes = Vec::new();
        let header = large(100);
        for (index, step) in steps.into_iter().enumerate() {
            for (_, place, value, small) in pokes.iter().filter(|poke| poke.0 == index) {
                let value = if *small { value % 4096 * 16 } else { *value };
                // A word of a control block, or of the first records of a ring.
                let offset = match place {
                    0..8 => layout.place(0, Direction::ToPeer).control + place * 128,
                    8..24 => layout.place(0, Direction::ToPeer).data + (place - 8) * 4,
                    _ => layout.place(0, Direction::ToMachine).data + (place - 24) * 4,
                };
                memory.word(offset).unwrap().store(value, Ordering::Relaxed);
            }
            match step {
                Step::Send(len) => drop(send(&port, 0, &header, &vec![1; len])),
                Step::Push(len) => drop(peer.push(0, &header, &[&vec![1; len]])),
                Step::Receive | Step::Keep => {
                    let _ = port.receive(0, &mut |_, frame| {
                        assert!(frame.len() <= MAX_FRAME);
                        Taken::Yes
                    });
                }
                Step::Next => {
                    let _ = peer.next(0, &mut bytes);
                    prop_assert!(bytes.len() <= MAX_FRAME);
                }
                Step::Bells => {
                    port.flush(0);
                    peer.ring_bells();
                }
            }
        }
    }
}
