//! Whole transfers with the independent stack, over good and bad wires, checked by content.

use std::net::Shutdown;

use proptest::prelude::*;
use smoltcp::socket::tcp::State;

use super::stack::{Dice, Faults, Guest};
use super::*;

/// The bytes of a stream, computed from their place in it.
struct Content {
    dice: Dice,
    left: usize,
}

impl Content {
    fn new(seed: u64, length: usize) -> Self {
        Self { dice: Dice(seed | 1), left: length }
    }

    fn take(&mut self, count: usize) -> Vec<u8> {
        let count = count.min(self.left);
        self.left -= count;
        (0..count).map(|_| self.dice.next() as u8).collect()
    }
}

/// One direction of a transfer.
struct Stream {
    source: Content,
    check: Content,
    /// Taken from the source and not yet by the sender.
    waiting: Vec<u8>,
    ended: bool,
}

impl Stream {
    fn new(seed: u64, length: usize) -> Self {
        Self {
            source: Content::new(seed, length),
            check: Content::new(seed, length),
            waiting: Vec::new(),
            ended: false,
        }
    }

    /// What is to be sent next; empty at the end.
    fn pending(&mut self) -> &[u8] {
        if self.waiting.is_empty() {
            self.waiting = self.source.take(30_000);
        }
        &self.waiting
    }

    fn sent(&mut self, count: usize) {
        self.waiting.drain(..count);
    }

    fn received(&mut self, bytes: &[u8]) {
        assert!(bytes.len() <= self.check.left, "more bytes than were sent");
        let expected = self.check.take(bytes.len());
        assert!(expected == bytes, "other bytes than were sent");
    }
}

#[derive(Clone, Copy, Debug)]
struct Case {
    up: usize,
    down: usize,
    faults: Faults,
    seed: u64,
    v6: bool,
    large: bool,
    old_kernel: bool,
    buffers: usize,
    /// Packets that the output keeps.
    room: usize,
}

impl Default for Case {
    fn default() -> Self {
        Self {
            up: 0,
            down: 0,
            faults: Faults::default(),
            seed: 1,
            v6: false,
            large: false,
            old_kernel: false,
            buffers: 256 << 10,
            room: usize::MAX,
        }
    }
}

/// Sends both ways at once, ends both, and sees that everything arrived and nothing is left.
fn transfer(case: Case) -> Metrics {
    let (listener, address) = listener();
    let mut world = World::new(Limits::default(), Some(address));
    world.wire.large = case.large;
    world.wire.room = case.room;
    if case.large {
        world.wire.mtu = 65_520;
    }
    world.old_kernel = case.old_kernel;
    let mut guest = Guest::new(world, case.faults, case.seed);
    let socket = guest.socket(case.buffers);
    guest.connect(socket, case.v6, 50_000);
    listener.set_nonblocking(true).unwrap();
    let mut peer = None;
    let mut up = Stream::new(case.seed, case.up);
    let mut down = Stream::new(case.seed ^ 0x55, case.down);
    let mut buffer = vec![0; 65_536];
    let mut quiet = 0;
    for step in 0.. {
        assert!(step < 3_000_000, "no end: {:?} {:?}", guest.world.metrics(), guest.tcp(socket).state());
        guest.step();
        let tcp = guest.tcp(socket);
        if tcp.can_send() {
            let count = tcp.send_slice(up.pending()).unwrap();
            up.sent(count);
            if up.pending().is_empty() {
                tcp.close();
            }
        }
        while tcp.can_recv() {
            let count = tcp.recv_slice(&mut buffer).unwrap();
            down.received(&buffer[..count]);
        }
        if peer.is_none() {
            peer = listener.accept().ok().map(|accepted| accepted.0);
            if let Some(peer) = &peer {
                peer.set_nonblocking(true).unwrap();
            }
        }
        if let Some(peer) = &mut peer {
            host_side(peer, &mut up, &mut down, &mut buffer);
        }
        let state = guest.tcp(socket).state();
        let over = matches!(state, State::Closed | State::TimeWait) && guest.world.metrics().flows == 0;
        quiet = if over { quiet + 1 } else { 0 };
        if quiet > 3 {
            break;
        }
    }
    assert_eq!((up.check.left, down.check.left), (0, 0), "not everything arrived");
    assert!(up.ended, "the peer never saw the end");
    guest.world.metrics()
}

fn host_side(peer: &mut TcpStream, up: &mut Stream, down: &mut Stream, buffer: &mut [u8]) {
    while !up.ended {
        match peer.read(buffer) {
            Ok(0) => up.ended = true,
            Ok(count) => up.received(&buffer[..count]),
            Err(error) if error.kind() == ErrorKind::WouldBlock => break,
            Err(error) => panic!("reading: {error}"),
        }
    }
    while !down.ended {
        if down.pending().is_empty() {
            peer.shutdown(Shutdown::Write).unwrap();
            down.ended = true;
            return;
        }
        match peer.write(&down.waiting) {
            Ok(count) => down.sent(count),
            Err(error) if error.kind() == ErrorKind::WouldBlock => break,
            Err(error) => panic!("writing: {error}"),
        }
    }
}

#[test]
fn a_good_wire_carries_everything_once() {
    for (v6, large) in [(false, false), (true, false), (false, true), (true, true)] {
        let case = Case { up: 3_000_000, down: 5_000_000, v6, large, ..Case::default() };
        let metrics = transfer(case);
        assert_eq!((metrics.retransmissions, metrics.pinched, metrics.aborted), (0, 0, 0), "{metrics:?}");
        assert_eq!((metrics.bytes_to_host, metrics.bytes_to_guest), (3_000_000, 5_000_000));
    }
}

#[test]
fn an_old_kernel_carries_everything_too() {
    let faults = Faults { lost: 20, doubled: 10, late: 10 };
    transfer(Case { up: 500_000, down: 1_000_000, old_kernel: true, faults, ..Case::default() });
    transfer(Case { up: 500_000, down: 3_000_000, old_kernel: true, large: true, ..Case::default() });
}

#[test]
fn a_small_window_and_a_small_output_carry_everything() {
    let case = Case { up: 200_000, down: 200_000, buffers: 3000, room: 1, ..Case::default() };
    assert_eq!(transfer(case).aborted, 0);
}

#[test]
fn nothing_at_all_is_a_transfer_too() {
    assert_eq!(transfer(Case::default()).aborted, 0);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 12, max_shrink_iters: 20, ..ProptestConfig::default() })]
    #[test]
    fn a_bad_wire_carries_everything(
        seed in any::<u64>(),
        up in 0_usize..400_000,
        down in 0_usize..400_000,
        lost in 0_u32..150,
        doubled in 0_u32..100,
        late in 0_u32..100,
        large in any::<bool>(),
        v6 in any::<bool>(),
        room in prop_oneof![Just(usize::MAX), 1_usize..20],
    ) {
        let faults = Faults { lost, doubled, late };
        transfer(Case { up, down, faults, seed, large, v6, room, ..Case::default() });
    }
}
