//! The network device: the input is a script of register, ring and buffer accesses by a guest's driver, and says
//! which frames wait for it. The device must survive it and work after a reset; what it sends must be frames that
//! the port said it takes.
#![no_main]

use std::collections::VecDeque;
use std::io;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};

use atoll_foundation::EventLoopHandle;
use atoll_network::header::{PartialChecksum, SegmentKind};
use atoll_network::port::{MAX_FRAME, PortListener};
use atoll_network::{
    FrameHeader, MacAddress, Offloads, Port, PortError, Received, Segmentation, Sent, Taken,
};
use atoll_virtio::net::{Net, NetOptions};
use atoll_virtio::testing::{TestMachine, play};
use libfuzzer_sys::fuzz_target;
use vm_memory::VolatileSlice;

/// A port that holds every sender to the rules and is full now and then.
struct Strict {
    frames: [Mutex<VecDeque<(FrameHeader, Vec<u8>)>>; 2],
    sends: AtomicU32,
}

impl Strict {
    /// Frames as `data` says, four bytes each.
    fn new(data: &[u8]) -> Self {
        let frames: [Mutex<VecDeque<_>>; 2] = Default::default();
        for (index, bytes) in data.as_chunks::<4>().0.iter().take(64).enumerate() {
            let [kind, start, low, high] = *bytes;
            let least = if kind & 0x80 == 0 { 14 } else { 0 };
            let length = least + (usize::from(u16::from_le_bytes([low, high])) >> (kind >> 4 & 7));
            let segments = match kind & 7 {
                1 => Some(SegmentKind::Tcp4),
                2 => Some(SegmentKind::Tcp6),
                3 => Some(SegmentKind::UdpL4),
                4 => Some(SegmentKind::UdpFragment),
                _ => None,
            };
            let header = FrameHeader {
                checksum: (kind & 8 != 0).then_some(PartialChecksum { start: start.into(), offset: 16 }),
                data_valid: kind & 7 == 7,
                segmentation: segments.map(|kind| Segmentation {
                    kind,
                    size: 1 + u16::from(start),
                    header_len: 0,
                    ecn: start & 1 != 0,
                }),
            };
            frames[index % 2].lock().unwrap().push_back((header, vec![kind; length]));
        }
        Self { frames, sends: AtomicU32::new(0) }
    }
}

impl Port for Strict {
    fn name(&self) -> String {
        "fuzz port".to_owned()
    }
    fn queue_pairs(&self) -> u16 {
        2
    }
    fn mtu(&self) -> Option<u16> {
        Some(9000)
    }
    fn send_offloads(&self) -> Offloads {
        Offloads::TCP
    }
    fn receive_offloads(&self) -> Offloads {
        Offloads { udp_l4: true, ..Offloads::TCP }
    }
    fn set_receive_offloads(&self, offloads: Offloads) -> Result<(), PortError> {
        assert_eq!(offloads, offloads.and(self.receive_offloads()));
        Ok(())
    }
    fn watch(&self, _events: &EventLoopHandle, _listener: PortListener) -> io::Result<()> {
        Ok(())
    }
    fn send(&self, pair: u16, header: &FrameHeader, frame: &[VolatileSlice<'_>]) -> Result<Sent, PortError> {
        assert!(pair < 2);
        let length: usize = frame.iter().map(|piece| piece.len()).sum();
        assert!((14..=MAX_FRAME).contains(&length));
        if let Some(checksum) = header.checksum {
            assert!(usize::from(checksum.start) + usize::from(checksum.offset) + 2 <= length);
        }
        if let Some(segmentation) = header.segmentation {
            assert!(matches!(segmentation.kind, SegmentKind::Tcp4 | SegmentKind::Tcp6));
            assert!(!segmentation.ecn && header.checksum.is_some() && segmentation.size != 0);
        }
        assert!(!header.data_valid);
        let mut bytes = vec![0u8; length];
        let mut at = 0;
        for piece in frame {
            at += piece.copy_to(&mut bytes[at..]);
        }
        assert_eq!(at, length);
        let count = self.sends.fetch_add(1, Ordering::Relaxed);
        Ok(if count % 8 == 7 { Sent::Full } else { Sent::Done })
    }
    fn flush(&self, _pair: u16) {}
    fn receive(
        &self,
        pair: u16,
        take: &mut dyn FnMut(&FrameHeader, &[u8]) -> Taken,
    ) -> Result<Received, PortError> {
        let mut frames = self.frames[usize::from(pair)].lock().unwrap();
        let Some((header, frame)) = frames.front() else { return Ok(Received::Empty) };
        if take(header, frame) == Taken::NotNow {
            return Ok(Received::Kept);
        }
        frames.pop_front();
        Ok(Received::Frame)
    }
}

/// One driver that does everything right, and some without a plan.
fn seeds() -> Vec<Vec<u8>> {
    let mut script = vec![0, 0, 0, 0, 0];
    for turn in 0..8u8 {
        let address = [2, 0, 0, turn, 0];
        for queue in [0, 2] {
            // A buffer of 2 KiB to be filled.
            script.extend_from_slice(&[9, queue, 3, 1, 4, 0, 8]);
            script.extend_from_slice(&address);
        }
        // A frame of 100 bytes.
        script.extend_from_slice(&[9, 1, 2]);
        script.extend_from_slice(&[0; 16]);
        script.extend_from_slice(&[12, 1, 0, 100, 0]);
        script.extend_from_slice(&address);
        // Receive modes, then both pairs.
        for command in [[0, turn % 6, 0, 0], [4, 0, 2, 0]] {
            script.extend_from_slice(&[9, 4, 0]);
            script.extend_from_slice(&command);
            script.extend_from_slice(&[0; 12]);
            script.extend_from_slice(&[if command[0] == 0 { 3 } else { 4 }, 0, 1]);
        }
    }
    let frames = [0, 0, 60, 0, 0x0a, 34, 0, 5].repeat(script.len().div_ceil(24));
    script.resize(frames.len() * 3, 0xf);
    let good = [frames, script].concat();
    [vec![good], atoll_fuzz::seeds::arbitrary(8, 1500)].concat()
}

fuzz_target!(init: atoll_fuzz::seeds::plant(seeds()), |data: &[u8]| {
    let machine = TestMachine::new();
    let (frames, script) = data.split_at(data.len() / 4);
    let options = NetOptions { queue_pairs: 2, ..NetOptions::new(MacAddress([2, 0, 0, 0, 0, 1])) };
    play(&machine, Net::new(Arc::new(Strict::new(frames)), &options), script);
});
