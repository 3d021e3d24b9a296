//! The recorded write stream and the power cut.
//!
//! # Model
//!
//! The log is a sequence of events: a change (write, zeroing, discard) begins and ends, a flush begins and ends,
//! and the test sets marks. The power is cut between two events. At the cut
//!
//! * a change is **durable** if it ended before a flush began that ended before the cut;
//! * any other change that began before the cut is **volatile**: of its 512-byte sectors any subset has reached
//!   the disk. The choice is among nothing, everything, a prefix, a suffix, and every sector by chance;
//! * a change that begins after the cut has not happened. A sector itself is never torn, as disks promise.
//!
//! Changes are applied in the order in which they began. That is right for durable ones that overlap only if
//! they did not overlap in time, of which a disk promises nothing either.

use std::collections::BTreeSet;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Bytes that reach the disk together or not at all.
const SECTOR: u64 = 512;

/// A change of the disk's content.
#[derive(Debug, Clone)]
enum Change {
    Write { offset: u64, bytes: Vec<u8> },
    Zero { offset: u64, len: u64 },
}

impl Change {
    fn range(&self) -> (u64, u64) {
        match self {
            Self::Write { offset, bytes } => (*offset, bytes.len() as u64),
            Self::Zero { offset, len } => (*offset, *len),
        }
    }

    /// Applies the bytes from `start` to `end` of the disk, which lie within the change's range.
    fn apply(&self, image: &mut Vec<u8>, start: u64, end: u64) {
        if image.len() < end as usize {
            image.resize(end as usize, 0);
        }
        let target = &mut image[start as usize..end as usize];
        match self {
            Self::Write { offset, bytes } => {
                target.copy_from_slice(&bytes[(start - offset) as usize..(end - offset) as usize]);
            }
            Self::Zero { .. } => target.fill(0),
        }
    }
}

#[derive(Debug)]
enum Event {
    Begin(Change),
    /// A change that turned out not to be possible and did nothing.
    Cancelled,
    /// The change that began at this index has ended.
    End(usize),
    FlushBegin,
    /// The flush that began at this index has ended with success.
    FlushEnd(usize),
    Mark(u64),
}

/// A recorded write stream. Shared by a recording layer and the test that cuts it.
#[derive(Debug)]
pub struct WriteLog {
    base: Vec<u8>,
    events: Mutex<Vec<Event>>,
}

/// A disk after a power cut.
#[derive(Debug, Clone)]
pub struct CutImage {
    /// The content.
    pub bytes: Vec<u8>,
    /// The marks that were set before the cut, in order.
    pub marks: Vec<u64>,
    /// Changes that were volatile at the cut.
    pub volatile_changes: usize,
    /// Sectors of volatile changes that did not reach the disk.
    pub lost_sectors: u64,
}

impl WriteLog {
    /// A log of changes to a disk whose content is now `base`.
    pub fn new(base: Vec<u8>) -> Self {
        Self { base, events: Mutex::default() }
    }

    fn events(&self) -> MutexGuard<'_, Vec<Event>> {
        self.events.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn push(&self, event: Event) -> usize {
        let mut events = self.events();
        events.push(event);
        events.len() - 1
    }

    /// A write begins; give the result to [`WriteLog::end_change`] when it has returned.
    pub fn begin_write(&self, offset: u64, bytes: Vec<u8>) -> usize {
        self.push(Event::Begin(Change::Write { offset, bytes }))
    }

    /// As [`WriteLog::begin_write`] for a range that will read as zero.
    pub fn begin_zero(&self, offset: u64, len: u64) -> usize {
        self.push(Event::Begin(Change::Zero { offset, len }))
    }

    /// The change has returned success. One that failed never ends and stays volatile.
    pub fn end_change(&self, begin: usize) {
        self.push(Event::End(begin));
    }

    /// The change was refused as unsupported: it never was.
    pub fn cancel_change(&self, begin: usize) {
        if let Some(event) = self.events().get_mut(begin) {
            *event = Event::Cancelled;
        }
    }

    /// A flush begins.
    pub fn begin_flush(&self) -> usize {
        self.push(Event::FlushBegin)
    }

    /// The flush has returned success.
    pub fn end_flush(&self, begin: usize) {
        self.push(Event::FlushEnd(begin));
    }

    /// Notes a moment of the test's own, for instance that record `value` is known to be durable.
    pub fn mark(&self, value: u64) {
        self.push(Event::Mark(value));
    }

    /// Number of events: a cut is possible at every point from zero to this.
    pub fn len(&self) -> usize {
        self.events().len()
    }

    /// Whether nothing was recorded.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The disk's content if the power is cut after `point` events (all, if there are fewer). What volatile
    /// changes leave behind follows from `seed`: same seed, same result.
    pub fn cut(&self, point: usize, seed: u64) -> CutImage {
        let events = self.events();
        let before = &events[..point.min(events.len())];
        let durable = durable_changes(before);
        let mut random = Random::new(seed);
        let mut cut =
            CutImage { bytes: self.base.clone(), marks: Vec::new(), volatile_changes: 0, lost_sectors: 0 };
        for (index, event) in before.iter().enumerate() {
            match event {
                Event::Begin(change) if durable.contains(&index) => {
                    let (offset, len) = change.range();
                    change.apply(&mut cut.bytes, offset, offset + len);
                }
                Event::Begin(change) => {
                    cut.volatile_changes += 1;
                    cut.lost_sectors += apply_some(change, &mut cut.bytes, &mut random);
                }
                Event::Mark(value) => cut.marks.push(*value),
                Event::Cancelled | Event::End(_) | Event::FlushBegin | Event::FlushEnd(_) => {}
            }
        }
        cut
    }
}

/// Indices of the changes that ended before a flush began that ended.
fn durable_changes(events: &[Event]) -> BTreeSet<usize> {
    let last_flush = events
        .iter()
        .filter_map(|event| if let Event::FlushEnd(begin) = event { Some(*begin) } else { None })
        .max()
        .unwrap_or(0);
    events[..last_flush]
        .iter()
        .filter_map(|event| if let Event::End(begin) = event { Some(*begin) } else { None })
        .collect()
}

/// Applies some sectors of a volatile change; returns how many were lost.
fn apply_some(change: &Change, image: &mut Vec<u8>, random: &mut Random) -> u64 {
    let (offset, len) = change.range();
    let end = offset + len;
    let (first, last) = (offset / SECTOR, end.div_ceil(SECTOR));
    let way = random.below(5);
    let border = first + random.below(last - first + 1);
    let mut lost = 0;
    for sector in first..last {
        let kept = match way {
            0 => false,
            1 => true,
            2 => sector < border,
            3 => sector >= border,
            _ => random.below(2) == 0,
        };
        if kept {
            change.apply(image, offset.max(sector * SECTOR), end.min((sector + 1) * SECTOR));
        } else {
            lost += 1;
        }
    }
    lost
}

/// A small reproducible random generator (SplitMix64) for tests.
#[derive(Debug, Clone)]
pub struct Random(u64);

impl Random {
    /// Same seed, same numbers.
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// The next 64 bits.
    pub fn next_u64(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    /// A number below `bound`; zero if `bound` is zero.
    pub fn below(&mut self, bound: u64) -> u64 {
        self.next_u64().checked_rem(bound).unwrap_or(0)
    }
}
