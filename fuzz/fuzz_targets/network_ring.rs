//! The ring between a machine's process and its network's: the input is a script of both sides' calls and of words
//! that a third hand writes into the memory. Whatever is there, a side gives frames or ends the connection for good;
//! as long as nobody has meddled, both directions are queues.
#![no_main]

use std::collections::VecDeque;

use atoll_foundation::SharedMemory;
use atoll_network::port::{MAX_FRAME, Port, Received, Sent, Taken};
use atoll_network::ring::{self, MIN_RING_BYTES, Peer, RingPort, RingSetup};
use atoll_network::{FrameHeader, Offloads};
use libfuzzer_sys::fuzz_target;
use vm_memory::VolatileSlice;

/// Bytes before the rings' own: the first page, and the control blocks in the second.
const DATA_START: usize = 8192;

fuzz_target!(|data: &[u8]| {
    let Ok((port, setup)) = ring::create(1, MIN_RING_BYTES) else { return };
    let fds = setup.to_fds();
    let Ok(memory) = SharedMemory::map(&fds[0], DATA_START + 2 * MIN_RING_BYTES) else { return };
    let setup = RingSetup::from_fds(fds).expect("the same descriptors");
    let mut script = data.iter().copied();
    // Now and then the header page is wrong before the other side looks at it.
    if script.next().is_some_and(|byte| byte >= 0xf0) {
        poke(&memory, 0, 5, &mut script);
        let _ = Peer::attach(setup);
        return;
    }
    let peer = Peer::attach(setup).expect("a new ring");
    let mut bench = Bench {
        port,
        peer,
        memory,
        out: VecDeque::new(),
        inward: VecDeque::new(),
        honest: true,
        serial: 0,
        failed: [false; 2],
    };
    while bench.step(&mut script).is_some() {}
});

/// Writes one of `words` words from byte `from` on.
fn poke(
    memory: &SharedMemory,
    from: usize,
    words: usize,
    script: &mut impl Iterator<Item = u8>,
) -> Option<()> {
    let [place, small, a, b, c, d] =
        [script.next()?, script.next()?, script.next()?, script.next()?, script.next()?, script.next()?];
    let value = u32::from_le_bytes([a, b, c, d]);
    let value = if small & 1 == 0 { value % 0x2000 * 16 } else { value };
    let offset = from + usize::from(place) % words * if from == 4096 { 128 } else { 4 };
    memory.word(offset)?.store(value, std::sync::atomic::Ordering::Relaxed);
    Some(())
}

struct Bench {
    port: RingPort,
    peer: Peer,
    memory: SharedMemory,
    /// What each direction has to give, while nobody has meddled.
    out: VecDeque<Vec<u8>>,
    inward: VecDeque<Vec<u8>>,
    honest: bool,
    serial: u8,
    /// Whether the machine's side, and the other one, have ended the connection.
    failed: [bool; 2],
}

impl Bench {
    fn step(&mut self, script: &mut impl Iterator<Item = u8>) -> Option<()> {
        match script.next()? % 16 {
            0..3 => self.send(script)?,
            3..6 => self.push(script)?,
            6..8 => self.receive(Taken::Yes),
            8 => self.receive(Taken::NotNow),
            9..11 => self.next(),
            11 => self.port.flush(0),
            12 => self.peer.ring_bells(),
            13 => {
                assert!(self.peer.room(0) <= MAX_FRAME);
                let _ = self.peer.request_room_event(0);
                let _ = self.port.set_receive_offloads(Offloads::TCP);
                let _ = self.peer.receive_offloads();
            }
            14 => {
                self.honest = false;
                poke(&self.memory, 4096, 8, script)?;
            }
            _ => {
                self.honest = false;
                let ring = usize::from(script.next()? & 1) * MIN_RING_BYTES;
                poke(&self.memory, DATA_START + ring, 256, script)?;
            }
        }
        Some(())
    }

    fn frame(&mut self, script: &mut impl Iterator<Item = u8>) -> Option<Vec<u8>> {
        let len = usize::from(u16::from_le_bytes([script.next()?, script.next()?]));
        self.serial = self.serial.wrapping_add(1);
        // All sizes, up to some beyond the largest.
        Some(vec![self.serial; if len >= 0xff00 { len + 100 } else { len % 4000 }])
    }

    fn check(&mut self, side: usize, failed: bool) {
        assert!(!(failed && self.honest), "an honest side is accused");
        assert!(failed || !self.failed[side], "a connection that has ended goes on");
        self.failed[side] = failed;
    }

    fn send(&mut self, script: &mut impl Iterator<Item = u8>) -> Option<()> {
        let mut frame = self.frame(script)?;
        let sent = self.port.send(0, &FrameHeader::default(), &[VolatileSlice::from(&mut frame[..])]);
        self.check(0, sent.is_err());
        if matches!(sent, Ok(Sent::Done)) && (14..=MAX_FRAME).contains(&frame.len()) {
            self.out.push_back(frame);
        }
        Some(())
    }

    fn push(&mut self, script: &mut impl Iterator<Item = u8>) -> Option<()> {
        let frame = self.frame(script)?;
        let (a, b) = frame.split_at(frame.len() / 2);
        let pushed = self.peer.push(0, &FrameHeader::default(), &[a, b]);
        self.check(1, pushed.is_err());
        if matches!(pushed, Ok(true)) && (14..=MAX_FRAME).contains(&frame.len()) {
            self.inward.push_back(frame);
        }
        Some(())
    }

    fn receive(&mut self, taken: Taken) {
        let mut shown = None;
        let received = self.port.receive(0, &mut |_, frame| {
            assert!((14..=MAX_FRAME).contains(&frame.len()));
            shown = Some(frame.to_vec());
            taken
        });
        self.check(0, received.is_err());
        if self.honest {
            assert!(shown.as_ref() == self.inward.front());
        }
        if matches!(received, Ok(Received::Frame)) {
            self.inward.pop_front();
        }
    }

    fn next(&mut self) {
        let mut frame = Vec::new();
        let next = self.peer.next(0, &mut frame);
        self.check(1, next.is_err());
        if let Ok(header) = next {
            assert!(header.is_none() || (14..=MAX_FRAME).contains(&frame.len()));
            let expected = self.out.pop_front();
            assert!(!self.honest || header.map(|_| frame) == expected);
        }
    }
}
