//! The whole device under a driver, with a port whose other end is the test's.

use std::collections::HashMap;
use std::time::Duration;

use atoll_foundation::EventLoop;
use atoll_network::header::{PartialChecksum, SegmentKind};
use atoll_network::test_utils::{MemoryPort, pair};
use atoll_network::{FrameHeader, Segmentation};

use super::*;
use crate::device::feature;
use crate::testing::{Piece, Setup, TestDriver, TestMachine, into, out};

mod control;
mod life;
mod receive;
mod transmit;

const OWN: MacAddress = MacAddress([0x52, 0x54, 0, 0x12, 0x34, 0x56]);
const EVERYTHING: Offloads = Offloads { ecn: true, udp_l4: true, ..Offloads::TCP };

/// How a [`Bench`] is built.
struct Plan {
    pairs: u16,
    /// Frames that each direction of each pair of the port holds.
    room: usize,
    send: Offloads,
    receive: Offloads,
    options: NetOptions,
    setup: Setup,
}

impl Default for Plan {
    fn default() -> Self {
        Self {
            pairs: 1,
            room: 64,
            send: EVERYTHING,
            receive: EVERYTHING,
            options: NetOptions::new(OWN),
            setup: Setup::default(),
        }
    }
}

impl Plan {
    fn without(features: u64) -> Self {
        Self { setup: Setup { features: !features, ..Setup::default() }, ..Self::default() }
    }

    fn pairs(pairs: u16) -> Self {
        let options = NetOptions { queue_pairs: pairs, ..NetOptions::new(OWN) };
        Self { pairs, options, ..Self::default() }
    }

    fn build(self) -> Bench {
        let machine = TestMachine::new();
        let (port, peer) = pair(self.pairs, self.room);
        let port: Arc<dyn Port> = Arc::new(port.with_offloads(self.send, self.receive));
        let events = EventLoop::new().unwrap();
        let net = Net::new(port.clone(), &self.options);
        port.watch(&events.handle(), net.listener()).unwrap();
        let mut driver = TestDriver::probe(&machine, net.clone(), 0);
        let features = driver.start(self.setup);
        let control = usize::from(if features & features::MQ != 0 { 2 * self.pairs } else { 2 });
        let mut bench = Bench { net, driver, peer, events, control, posted: HashMap::new() };
        bench.turn();
        bench.settle();
        bench.driver.interrupts.take();
        bench
    }
}

/// A started device, its driver, and the other end of its port.
struct Bench {
    net: Arc<Net>,
    driver: TestDriver,
    peer: MemoryPort,
    events: EventLoop,
    /// Number of the control queue.
    control: usize,
    /// Receive buffers in the rings by queue and head: address and length.
    posted: HashMap<(usize, u16), Vec<Piece>>,
}

/// What the guest received.
#[derive(Debug, PartialEq, Eq)]
struct Arrival {
    header: FrameHeader,
    frame: Vec<u8>,
    /// Bytes used of each buffer.
    used: Vec<u32>,
    num_buffers: u16,
}

impl Bench {
    fn new() -> Self {
        Plan::default().build()
    }

    /// Runs the port's event loop as far as there is something.
    fn turn(&mut self) {
        for _ in 0..8 {
            self.events.run_once(Some(Duration::ZERO)).unwrap();
        }
    }

    /// Waits until the device's thread has looked at the receive queues, as it does when the driver is ready.
    fn settle(&self) {
        let end = Instant::now() + Duration::from_secs(10);
        let active = usize::from(self.net.rules().active_pairs());
        while self.net.receivers.iter().take(active).any(|r| r.waiting.load(SeqCst)) {
            assert!(Instant::now() < end, "the device's thread does not come");
            std::thread::yield_now();
        }
        // It has begun; this waits for its end.
        self.driver.pci.pause();
        self.driver.pci.resume();
    }

    /// Gives receive queue `queue` a buffer in pieces of these lengths, without notifying.
    fn post(&mut self, queue: usize, pieces: &[u32]) {
        let pieces: Vec<Piece> =
            pieces.iter().map(|&len| into(self.driver.alloc(u64::from(len), 16), len)).collect();
        self.post_again(queue, pieces);
    }

    fn post_again(&mut self, queue: usize, pieces: Vec<Piece>) {
        let head = self.driver.add(queue, &pieces);
        self.posted.insert((queue, head), pieces);
    }

    /// The next frame in receive queue `queue`, if it is there now. Its buffers go back to the ring.
    fn received(&mut self, queue: usize) -> Option<Arrival> {
        let first = self.driver.take_used(queue)?;
        Some(self.arrival(queue, first))
    }

    /// As [`Bench::received`], waiting for the device's thread.
    fn wait_received(&mut self, queue: usize) -> Arrival {
        let first = self.driver.wait_used(queue).expect("a frame arrives");
        self.arrival(queue, first)
    }

    fn arrival(&mut self, queue: usize, first: (u16, u32)) -> Arrival {
        let (mut bytes, mut used) = (Vec::new(), Vec::new());
        let mut next = Some(first);
        let mut num_buffers = 1;
        let mut buffers = Vec::new();
        while let Some((head, written)) = next {
            let pieces = self.posted.remove(&(queue, head)).expect("the driver gave this buffer");
            let mut buffer = Vec::new();
            for piece in &pieces {
                buffer.extend(self.driver.load(piece.gpa, piece.len as usize));
            }
            bytes.extend_from_slice(&buffer[..written as usize]);
            buffers.push(pieces);
            if used.is_empty() {
                num_buffers = u16::from_le_bytes([bytes[10], bytes[11]]);
            }
            used.push(written);
            // All of them are there as soon as the first is.
            next = (used.len() < usize::from(num_buffers)).then(|| {
                self.driver.take_used(queue).expect("every buffer of a frame is handed over at once")
            });
        }
        for pieces in buffers {
            self.post_again(queue, pieces);
        }
        let wire = bytes.first_chunk::<12>().expect("a header");
        let header = FrameHeader::decode(wire).expect("a header that can be meant");
        Arrival { header, frame: bytes.split_off(12), used, num_buffers }
    }

    /// Puts a frame into transmit queue `queue`, without notifying.
    fn queue_frame(&mut self, queue: usize, header: &FrameHeader, frame: &[u8]) -> u16 {
        let mut bytes = header.encode(0).to_vec();
        bytes.extend_from_slice(frame);
        let gpa = self.driver.alloc_bytes(&bytes);
        self.driver.add(queue, &[out(gpa, 12), out(gpa + 12, frame.len() as u32)])
    }

    /// Sends a frame and takes its buffer back.
    fn send(&mut self, header: &FrameHeader, frame: &[u8]) {
        let head = self.queue_frame(1, header, frame);
        self.driver.kick(1);
        assert_eq!(self.driver.take_used(1), Some((head, 0)));
    }

    /// Gives the device a frame from outside.
    fn arrive(&mut self, header: &FrameHeader, frame: &[u8]) {
        self.peer.send_bytes(0, header, frame);
        self.turn();
    }

    /// Carries out a control command. Returns the answer.
    fn command(&mut self, class: u8, command: u8, data: &[u8]) -> u8 {
        let mut bytes = vec![class, command];
        bytes.extend_from_slice(data);
        let (gpa, ack) = (self.driver.alloc_bytes(&bytes), self.driver.alloc_bytes(&[0xaa]));
        let mut pieces = vec![out(gpa, 2)];
        if !data.is_empty() {
            pieces.push(out(gpa + 2, data.len() as u32));
        }
        pieces.push(into(ack, 1));
        let head = self.driver.add(self.control, &pieces);
        self.driver.kick(self.control as u16);
        assert_eq!(self.driver.wait_used(self.control), Some((head, 1)));
        self.driver.load(ack, 1)[0]
    }

    fn metrics(&self) -> metrics::NetMetricsSnapshot {
        self.net.metrics().snapshot()
    }
}

/// A frame of `len` bytes to `to`, whose content depends on `seed`.
fn frame_to(to: [u8; 6], len: usize, seed: u8) -> Vec<u8> {
    let mut frame: Vec<u8> = (0..len).map(|i| (i as u8).wrapping_mul(31).wrapping_add(seed)).collect();
    frame[..6].copy_from_slice(&to);
    frame[12..14].copy_from_slice(&[8, 0]);
    frame
}

/// A frame to the guest.
fn frame(len: usize, seed: u8) -> Vec<u8> {
    frame_to(OWN.0, len, seed)
}

const PLAIN: FrameHeader = FrameHeader { checksum: None, data_valid: false, segmentation: None };
const OPEN: FrameHeader = FrameHeader { checksum: Some(PartialChecksum { start: 34, offset: 16 }), ..PLAIN };

fn large(kind: SegmentKind, ecn: bool) -> FrameHeader {
    FrameHeader { segmentation: Some(Segmentation { kind, size: 1448, header_len: 66, ecn }), ..OPEN }
}
