//! A ring with its two sides on two threads and in two processes, which sleep and wake each other: a wake-up that
//! is lost makes these tests stand still, which they notice.

use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use atoll_foundation::EventLoop;
use atoll_network::port::{Port, PortError, PortEvent, Received, Sent, Taken};
use atoll_network::ring::{self, Peer, RingError, RingPort, RingSetup};
use atoll_network::{FrameHeader, Offloads};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags, recvmsg, sendmsg,
};
use vm_memory::VolatileSlice;

/// Nothing in these tests takes longer between two events.
const PATIENCE: Duration = Duration::from_secs(20);
/// Tells the other process what it is for.
const ROLE: &str = "ATOLL_TEST_RING_ROLE";

/// A small random number generator, so that both sides pause and burst differently in each round.
struct Random(u64);

impl Random {
    fn below(&mut self, n: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % n
    }
}

/// Sends every frame back; ends when the machine's side does. Sleeps in poll(2) whenever nothing is to be done.
fn echo(mut peer: Peer) -> Result<u64, RingError> {
    let (mut frames, mut random) = (0, Random(3));
    let mut held: Vec<Option<(FrameHeader, Vec<u8>)>> = (0..peer.pairs()).map(|_| None).collect();
    let mut buffer = Vec::new();
    loop {
        for pair in 0..peer.pairs() {
            let held = &mut held[usize::from(pair)];
            loop {
                if let Some((header, frame)) = held {
                    if !peer.push(pair, header, &[frame])? {
                        break;
                    }
                    *held = None;
                }
                let Some(header) = peer.next(pair, &mut buffer)? else { break };
                frames += 1;
                *held = Some((header, buffer.clone()));
            }
        }
        peer.ring_bells();
        if random.below(50) == 0 {
            std::thread::yield_now();
        }
        let ready = |fd| PollFd::from_borrowed_fd(fd, PollFlags::IN);
        let mut fds = [ready(peer.data_event()), ready(peer.room_event())];
        let timeout = Timespec { tv_sec: PATIENCE.as_secs() as i64 * 2, tv_nsec: 0 };
        if poll(&mut fds, Some(&timeout)).unwrap() == 0 {
            return Ok(frames);
        }
        if fds.iter().any(|fd| fd.revents().contains(PollFlags::HUP)) {
            return Ok(frames);
        }
        peer.clear_events();
    }
}

/// The machine's side: an event loop that sleeps whenever nothing is to be done.
struct Machine {
    port: RingPort,
    events: EventLoop,
    readable: Arc<Mutex<Vec<bool>>>,
    writable: Arc<Mutex<Vec<bool>>>,
    down: Arc<AtomicBool>,
}

impl Machine {
    fn new(port: RingPort) -> Self {
        let events = EventLoop::new().unwrap();
        let flags = || Arc::new(Mutex::new(vec![true; port.queue_pairs().into()]));
        let (readable, writable, down) = (flags(), flags(), Arc::new(AtomicBool::new(false)));
        let (r, w, d) = (readable.clone(), writable.clone(), down.clone());
        let listener = move |event| match event {
            PortEvent::Readable(pair) => r.lock().unwrap()[usize::from(pair)] = true,
            PortEvent::Writable(pair) => w.lock().unwrap()[usize::from(pair)] = true,
            PortEvent::Link(up) => d.store(!up, Ordering::Relaxed),
        };
        port.watch(&events.handle(), Arc::new(listener)).unwrap();
        Self { port, events, readable, writable, down }
    }

    /// Sends `count` frames on each pair, in bursts, and takes them back, in order.
    fn converse(&mut self, count: u32, burst: u64, largest: u64) {
        let pairs = self.port.queue_pairs();
        let mut sent = vec![0u32; pairs.into()];
        let mut back = vec![0u32; pairs.into()];
        let mut random = Random(0x9e37_79b9_7f4a_7c15);
        while back.iter().any(|n| *n < count) {
            let mut idle = true;
            for pair in 0..pairs {
                let index = usize::from(pair);
                if self.writable.lock().unwrap()[index] && sent[index] - back[index] < burst as u32 {
                    let n = (random.below(burst) as u32 + 1).min(count - sent[index]);
                    idle &= !self.send(pair, &mut sent[index], n, largest, &mut random);
                }
                if std::mem::take(&mut self.readable.lock().unwrap()[index]) {
                    idle = false;
                    self.receive(pair, &mut back[index]);
                }
            }
            if idle && back.iter().any(|n| *n < count) {
                let before = Instant::now();
                self.events.run_once(Some(PATIENCE)).unwrap();
                assert!(before.elapsed() < PATIENCE, "a wake-up was lost: sent {sent:?}, back {back:?}");
            }
        }
    }

    /// Whether anything was sent.
    fn send(&self, pair: u16, sent: &mut u32, count: u32, largest: u64, random: &mut Random) -> bool {
        let before = *sent;
        for _ in 0..count {
            let mut frame = vec![*sent as u8; 18 + random.below(largest) as usize];
            frame[14..18].copy_from_slice(&sent.to_le_bytes());
            // Before the try, because the event may come between the try and what follows.
            self.writable.lock().unwrap()[usize::from(pair)] = false;
            let slice = VolatileSlice::from(&mut frame[..]);
            if self.port.send(pair, &FrameHeader::default(), &[slice]).unwrap() == Sent::Full {
                break;
            }
            self.writable.lock().unwrap()[usize::from(pair)] = true;
            *sent += 1;
        }
        self.port.flush(pair);
        *sent != before
    }

    fn receive(&self, pair: u16, back: &mut u32) {
        let mut take = |_: &FrameHeader, frame: &[u8]| {
            assert_eq!(frame[14..18], back.to_le_bytes(), "lost, doubled or out of order");
            assert!(frame[18..].iter().all(|byte| *byte == *back as u8), "damaged");
            *back += 1;
            Taken::Yes
        };
        while self.port.receive(pair, &mut take).unwrap() == Received::Frame {}
    }
}

impl Machine {
    /// Sends one frame, and a second one about when the other side falls asleep after the first.
    fn disturb(&mut self, rounds: u32) {
        let mut random = Random(77);
        let (mut sent, mut back) = (0, 0);
        for _ in 0..rounds {
            for _ in 0..2 {
                self.send(0, &mut sent, 1, 40, &mut random);
                // Spread over the microseconds in which the other side wakes, answers and falls asleep.
                let pause = Duration::from_nanos(random.below(16_000));
                let start = Instant::now();
                while start.elapsed() < pause {
                    std::hint::spin_loop();
                }
            }
            while back < sent {
                if std::mem::take(&mut self.readable.lock().unwrap()[0]) {
                    self.receive(0, &mut back);
                    continue;
                }
                let before = Instant::now();
                self.events.run_once(Some(PATIENCE)).unwrap();
                assert!(before.elapsed() < PATIENCE, "a wake-up was lost: sent {sent}, back {back}");
            }
        }
    }
}

#[test]
fn a_frame_that_comes_while_a_side_falls_asleep_wakes_it() {
    let (port, setup) = ring::create(1, ring::MIN_RING_BYTES).unwrap();
    let peer = Peer::attach(setup).unwrap();
    let other = std::thread::spawn(move || echo(peer));
    let mut machine = Machine::new(port);
    machine.disturb(100_000);
    drop(machine);
    assert_eq!(other.join().unwrap().unwrap(), 200_000);
}

fn on_two_threads(pairs: u16, count: u32, burst: u64, largest: u64) {
    let (port, setup) = ring::create(pairs, ring::MIN_RING_BYTES).unwrap();
    let peer = Peer::attach(setup).unwrap();
    let other = std::thread::spawn(move || echo(peer));
    let mut machine = Machine::new(port);
    machine.converse(count, burst, largest);
    drop(machine);
    assert_eq!(other.join().unwrap().unwrap(), u64::from(count) * u64::from(pairs));
}

#[test]
fn one_frame_at_a_time_wakes_both_threads_each_time() {
    on_two_threads(1, 50_000, 1, 40);
}

#[test]
fn bursts_that_fill_the_rings_lose_no_wake_up() {
    on_two_threads(1, 100_000, 2000, 3000);
}

#[test]
fn largest_frames_through_the_smallest_ring_lose_no_wake_up() {
    on_two_threads(1, 20_000, 30, 65_000);
}

#[test]
fn several_pairs_with_one_bell_lose_no_wake_up() {
    on_two_threads(4, 20_000, 40, 500);
}

/// Hands `setup` to the process at the other end of `socket`.
fn send_setup(socket: &UnixStream, setup: RingSetup) {
    let fds = setup.to_fds();
    let borrowed: Vec<BorrowedFd<'_>> = fds.iter().map(|fd| fd.as_fd()).collect();
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(5))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    assert!(control.push(SendAncillaryMessage::ScmRights(&borrowed)));
    sendmsg(socket, &[IoSlice::new(b"x")], &mut control, SendFlags::empty()).unwrap();
}

fn receive_setup(socket: BorrowedFd<'_>) -> RingSetup {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(5))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut byte = [0];
    recvmsg(socket, &mut [IoSliceMut::new(&mut byte)], &mut control, RecvFlags::CMSG_CLOEXEC).unwrap();
    let fds: Vec<OwnedFd> = control
        .drain()
        .filter_map(|message| match message {
            RecvAncillaryMessage::ScmRights(fds) => Some(fds),
            _ => None,
        })
        .flatten()
        .collect();
    RingSetup::from_fds(fds).unwrap()
}

#[test]
fn two_processes_converse_and_the_death_of_one_is_seen() {
    if std::env::var_os(ROLE).is_some() {
        // This is the other process.
        let peer = Peer::attach(receive_setup(std::io::stdin().as_fd())).unwrap();
        assert_eq!(peer.receive_offloads(), Offloads::TCP);
        echo(peer).unwrap();
        return;
    }
    let (socket, theirs) = UnixStream::pair().unwrap();
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "two_processes_converse_and_the_death_of_one_is_seen"])
        .env(ROLE, "peer")
        .stdin(Stdio::from(OwnedFd::from(theirs)))
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    let (port, setup) = ring::create(2, ring::MIN_RING_BYTES).unwrap();
    port.set_receive_offloads(Offloads::TCP).unwrap();
    send_setup(&socket, setup);
    let mut machine = Machine::new(port);
    machine.converse(20_000, 100, 2000);
    machine.converse(5_000, 1, 100);
    assert!(machine.port.link_up());
    child.kill().unwrap();
    child.wait().unwrap();
    let deadline = Instant::now() + PATIENCE;
    while !machine.down.load(Ordering::Relaxed) && Instant::now() < deadline {
        machine.events.run_once(Some(Duration::from_millis(100))).unwrap();
    }
    assert!(machine.down.load(Ordering::Relaxed) && !machine.port.link_up());
    let error = machine.port.receive(0, &mut |_, _| Taken::Yes).unwrap_err();
    assert!(matches!(error, PortError::Gone { .. }), "{error}");
}
