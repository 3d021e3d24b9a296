//! Where everything is in the ring's memory; the drawing is in the parent module's documentation.

use crate::port::MAX_FRAME;

/// First word: says that this is such a memory.
pub(super) const MAGIC: u32 = u32::from_le_bytes(*b"ATNR");
/// Second word: which layout.
pub(super) const VERSION: u32 = 1;

/// Offsets of the words of the first page, in bytes.
pub(super) mod header {
    pub(in super::super) const MAGIC: usize = 0;
    pub(in super::super) const VERSION: usize = 4;
    pub(in super::super) const PAIRS: usize = 8;
    pub(in super::super) const RING_BYTES: usize = 12;
    /// Bits of [`super::super::offload_bits`], written by the machine's side.
    pub(in super::super) const RECEIVE_OFFLOADS: usize = 64;
}

/// Offsets within one ring's control block, in bytes. Each word has two cache lines of its own, because the
/// processor fetches neighbouring lines in pairs.
pub(super) mod control {
    /// How far the producer has written, in bytes, modulo 2^32.
    pub(in super::super) const HEAD: usize = 0;
    /// How far the consumer has read.
    pub(in super::super) const TAIL: usize = 128;
    /// Not zero: the consumer wants to hear of a frame.
    pub(in super::super) const CONSUMER_SLEEPS: usize = 256;
    /// Not zero: the producer wants to hear of room.
    pub(in super::super) const PRODUCER_WAITS: usize = 384;
    /// All of it.
    pub(in super::super) const BYTES: usize = 512;
}

/// Before each frame: its length (32 bits) and its header (12 bytes).
pub(super) const RECORD_HEADER: usize = 16;
/// Every record begins at a multiple of this, so that its header never wraps around.
pub(super) const RECORD_ALIGN: usize = 16;

/// The shortest frame there is: an Ethernet header.
pub(super) const MIN_FRAME: usize = 14;

/// Most pairs of one ring memory; devices have no more queues than a machine has vCPUs.
pub const MAX_PAIRS: u16 = 64;
/// Smallest ring, in bytes: half of it holds the largest frame, so that there is always room after
/// a "room" event.
pub const MIN_RING_BYTES: usize = 256 << 10;
/// Largest ring, in bytes.
pub const MAX_RING_BYTES: usize = 16 << 20;

const _: () = assert!(record_bytes(MAX_FRAME) * 2 <= MIN_RING_BYTES);

/// Bytes that a frame of `len` bytes takes in a ring.
pub(super) const fn record_bytes(len: usize) -> usize {
    RECORD_HEADER + len.div_ceil(RECORD_ALIGN) * RECORD_ALIGN
}

/// Which way a ring carries frames.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Direction {
    ToPeer,
    ToMachine,
}

/// One ring within the memory.
#[derive(Clone, Copy, Debug)]
pub(super) struct Place {
    /// Offset of its control block.
    pub(super) control: usize,
    /// Offset of its bytes.
    pub(super) data: usize,
    /// How many these are: a power of two.
    pub(super) size: u32,
}

/// The sizes of a ring memory, checked: everything else follows from them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Layout {
    pairs: u16,
    ring_bytes: u32,
}

impl Layout {
    /// `None` when a number is outside its limits or `ring_bytes` is no power of two.
    pub(super) fn new(pairs: u32, ring_bytes: u32) -> Option<Self> {
        let pairs = u16::try_from(pairs).ok().filter(|pairs| (1..=MAX_PAIRS).contains(pairs))?;
        let sane = ring_bytes.is_power_of_two()
            && (MIN_RING_BYTES..=MAX_RING_BYTES).contains(&(ring_bytes as usize));
        sane.then_some(Self { pairs, ring_bytes })
    }

    pub(super) fn pairs(&self) -> u16 {
        self.pairs
    }

    pub(super) fn ring_bytes(&self) -> u32 {
        self.ring_bytes
    }

    fn data_start(&self) -> usize {
        (4096 + usize::from(self.pairs) * 2 * control::BYTES).next_multiple_of(4096)
    }

    /// Bytes of the whole memory.
    pub(super) fn total(&self) -> usize {
        self.data_start() + usize::from(self.pairs) * 2 * self.ring_bytes as usize
    }

    /// Where a ring of pair `pair` (below the number of pairs) is.
    pub(super) fn place(&self, pair: u16, direction: Direction) -> Place {
        let index = usize::from(pair) * 2 + usize::from(direction == Direction::ToMachine);
        Place {
            control: 4096 + index * control::BYTES,
            data: self.data_start() + index * self.ring_bytes as usize,
            size: self.ring_bytes,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_two_parts_overlap_and_all_lie_within() {
        let layout = Layout::new(5, 256 << 10).unwrap();
        let mut parts = vec![(0, 4096)];
        for pair in 0..5 {
            for direction in [Direction::ToPeer, Direction::ToMachine] {
                let place = layout.place(pair, direction);
                parts.push((place.control, control::BYTES));
                parts.push((place.data, place.size as usize));
            }
        }
        parts.sort_unstable();
        assert!(parts.windows(2).all(|pair| pair[0].0 + pair[0].1 <= pair[1].0), "{parts:?}");
        let (start, len) = *parts.last().unwrap();
        assert_eq!(start + len, layout.total());
    }

    #[test]
    fn sizes_outside_the_limits_are_refused() {
        for (pairs, bytes) in
            [(0, 1 << 20), (65, 1 << 20), (1, 0), (1, 128 << 10), (1, 3 << 18), (1, 32 << 20)]
        {
            assert!(Layout::new(pairs, bytes).is_none(), "{pairs} {bytes}");
        }
        assert!(Layout::new(u32::MAX, u32::MAX).is_none());
        assert_eq!(record_bytes(MAX_FRAME) % RECORD_ALIGN, 0);
    }
}
