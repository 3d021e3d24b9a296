//! One ring: a producer and a consumer of records, each with private copies of what it knows.
//!
//! The two ends of one ring live in different processes; neither believes the other. The parent module's
//! documentation has the protocol and why no wake-up is lost.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering, fence};

use atoll_foundation::SharedMemory;
use vm_memory::VolatileSlice;

use super::layout::{MIN_FRAME, Place, RECORD_ALIGN, RECORD_HEADER, control, record_bytes};
use crate::header::{FrameHeader, HEADER_BYTES};
use crate::port::MAX_FRAME;

/// The other side broke a rule: which one. The connection ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Broken(pub(super) &'static str);

/// Cannot happen, because the layout was checked against the memory's size when it was mapped; said so instead of
/// panicking.
const OUTSIDE: Broken = Broken("a ring lies outside its memory");

/// What both ends have.
struct End {
    memory: Arc<SharedMemory>,
    place: Place,
}

impl End {
    fn word(&self, offset: usize) -> Result<&AtomicU32, Broken> {
        self.memory.word(self.place.control + offset).ok_or(OUTSIDE)
    }

    fn data(&self) -> Result<VolatileSlice<'_>, Broken> {
        self.memory.slice(self.place.data, self.place.size as usize).ok_or(OUTSIDE)
    }

    /// Where in the ring the byte with running number `index` is.
    fn position(&self, index: u32) -> usize {
        (index & (self.place.size - 1)) as usize
    }
}

/// Writes into a ring from some byte on, around its end.
pub(super) struct Writer<'a> {
    data: VolatileSlice<'a>,
    at: usize,
    /// Bytes that may still be written.
    left: usize,
}

impl Writer<'_> {
    /// The next `len` bytes, in one or two parts.
    fn parts(&mut self, len: usize) -> Result<(VolatileSlice<'_>, VolatileSlice<'_>), Broken> {
        self.left = self.left.checked_sub(len).ok_or(OUTSIDE)?;
        let first = len.min(self.data.len() - self.at);
        let parts = (self.data.subslice(self.at, first), self.data.subslice(0, len - first));
        let (Ok(a), Ok(b)) = parts else { return Err(OUTSIDE) };
        self.at = if first < len { len - first } else { self.at + len };
        if self.at == self.data.len() {
            self.at = 0;
        }
        Ok((a, b))
    }

    /// Appends private bytes.
    pub(super) fn bytes(&mut self, bytes: &[u8]) -> Result<(), Broken> {
        let (a, b) = self.parts(bytes.len())?;
        let (head, tail) = bytes.split_at(a.len());
        a.copy_from(head);
        b.copy_from(tail);
        Ok(())
    }

    /// Appends bytes that may change meanwhile.
    pub(super) fn volatile(&mut self, bytes: &VolatileSlice<'_>) -> Result<(), Broken> {
        let (a, b) = self.parts(bytes.len())?;
        let Ok((head, tail)) = bytes.split_at(a.len()) else { return Err(OUTSIDE) };
        head.copy_to_volatile_slice(a);
        tail.copy_to_volatile_slice(b);
        Ok(())
    }
}

/// The end that writes records.
pub(super) struct Producer {
    end: End,
    /// How far it has written; the word in memory is only a copy of this for the consumer.
    head: u32,
    /// How far the consumer has read, as last seen and checked.
    tail: u32,
    /// There are records that the consumer was not told of.
    unrung: bool,
}

impl Producer {
    pub(super) fn new(memory: Arc<SharedMemory>, place: Place) -> Self {
        Self { end: End { memory, place }, head: 0, tail: 0, unrung: false }
    }

    /// Bytes free, as last seen.
    fn free(&self) -> u32 {
        self.end.place.size - self.head.wrapping_sub(self.tail)
    }

    /// Looks at how far the consumer has read.
    fn look(&self) -> Result<u32, Broken> {
        // Acquire: the consumer has done with these bytes before it says so.
        let tail = self.end.word(control::TAIL)?.load(Ordering::Acquire);
        // What it had not read before, up to what was written: neither back nor beyond.
        if tail.wrapping_sub(self.tail) > self.head.wrapping_sub(self.tail) {
            return Err(Broken("it says it has read what was never written"));
        }
        if !tail.is_multiple_of(RECORD_ALIGN as u32) {
            return Err(Broken("it has read a part of a record"));
        }
        Ok(tail)
    }

    /// Bytes of a frame that surely fit now.
    pub(super) fn room(&self) -> Result<usize, Broken> {
        let used = self.head.wrapping_sub(self.look()?);
        let free = (self.end.place.size - used) as usize;
        Ok(free.saturating_sub(RECORD_HEADER).min(MAX_FRAME))
    }

    /// Whether a record of `need` bytes fits. If not, the consumer will ring when half of the ring is free.
    fn reserve(&mut self, need: u32) -> Result<bool, Broken> {
        if self.free() >= need {
            return Ok(true);
        }
        self.tail = self.look()?;
        if self.free() >= need {
            return Ok(true);
        }
        self.wait_for(need)
    }

    /// Asks to be rung when half of the ring is free, unless `need` bytes are free by now.
    fn wait_for(&mut self, need: u32) -> Result<bool, Broken> {
        let waits = self.end.word(control::PRODUCER_WAITS)?;
        waits.store(1, Ordering::Relaxed);
        // With the fence in `Consumer::room_bell_due`: either it sees the wish, or this look sees the room.
        fence(Ordering::SeqCst);
        let tail = self.look()?;
        let free = self.end.place.size - self.head.wrapping_sub(tail);
        if free >= need {
            waits.store(0, Ordering::Relaxed);
        }
        self.tail = tail;
        Ok(free >= need)
    }

    /// As [`Producer::reserve`] for the largest frame.
    pub(super) fn request_room(&mut self) -> Result<bool, Broken> {
        self.wait_for(self.end.place.size / 2)
    }

    /// Writes a record with a frame of `len` bytes, at most [`MAX_FRAME`], which `fill` appends. False: no room,
    /// and a ring of the bell will follow.
    pub(super) fn push(
        &mut self,
        header: &FrameHeader,
        len: usize,
        fill: impl FnOnce(&mut Writer<'_>) -> Result<(), Broken>,
    ) -> Result<bool, Broken> {
        debug_assert!((MIN_FRAME..=MAX_FRAME).contains(&len));
        let need = record_bytes(len) as u32;
        if !self.reserve(need)? {
            return Ok(false);
        }
        let at = self.end.position(self.head);
        let mut writer = Writer { data: self.end.data()?, at, left: RECORD_HEADER + len };
        let mut record = [0; RECORD_HEADER];
        record[..4].copy_from_slice(&(len as u32).to_le_bytes());
        record[4..].copy_from_slice(&header.encode(1));
        writer.bytes(&record)?;
        fill(&mut writer)?;
        self.head = self.head.wrapping_add(need);
        // Release: the record is there before the consumer is told.
        self.end.word(control::HEAD)?.store(self.head, Ordering::Release);
        self.unrung = true;
        Ok(true)
    }

    /// Whether the consumer must be woken for what was pushed since the last call.
    pub(super) fn data_bell_due(&mut self) -> Result<bool, Broken> {
        if !std::mem::take(&mut self.unrung) {
            return Ok(false);
        }
        // With the fence in `Consumer::next`: either this sees that it sleeps, or it sees the new head.
        fence(Ordering::SeqCst);
        take_flag(self.end.word(control::CONSUMER_SLEEPS)?)
    }
}

/// Whether a flag is set; clears it, because the caller rings after that.
fn take_flag(flag: &AtomicU32) -> Result<bool, Broken> {
    let set = flag.load(Ordering::Relaxed) != 0;
    if set {
        flag.store(0, Ordering::Relaxed);
    }
    Ok(set)
}

/// The end that reads records.
pub(super) struct Consumer {
    end: End,
    /// How far the producer has written, as last seen and checked.
    head: u32,
    /// How far it has read; the word in memory is only a copy of this for the producer.
    tail: u32,
    /// Bytes read since the last look at whether the producer waits for room.
    unrung: u32,
    /// It has asked for a bell.
    armed: bool,
}

impl Consumer {
    pub(super) fn new(memory: Arc<SharedMemory>, place: Place) -> Self {
        Self { end: End { memory, place }, head: 0, tail: 0, unrung: 0, armed: true }
    }

    /// Looks at how far the producer has written.
    fn look(&self) -> Result<u32, Broken> {
        // Acquire: the records were there before it said so.
        let head = self.end.word(control::HEAD)?.load(Ordering::Acquire);
        let used = head.wrapping_sub(self.tail);
        if used > self.end.place.size {
            return Err(Broken("it says there is more than the ring can hold"));
        }
        if used < self.head.wrapping_sub(self.tail) {
            return Err(Broken("it took back what was written"));
        }
        if !used.is_multiple_of(RECORD_ALIGN as u32) {
            return Err(Broken("it wrote a part of a record"));
        }
        Ok(head)
    }

    /// Whether there is a record; if not, the producer will ring when there is one.
    pub(super) fn available(&mut self) -> Result<bool, Broken> {
        if self.head != self.tail {
            return Ok(true);
        }
        self.head = self.look()?;
        if self.head == self.tail {
            let sleeps = self.end.word(control::CONSUMER_SLEEPS)?;
            sleeps.store(1, Ordering::Relaxed);
            self.armed = true;
            // With the fence in `Producer::data_bell_due`: either it sees this, or this look sees the record.
            fence(Ordering::SeqCst);
            self.head = self.look()?;
            if self.head == self.tail {
                return Ok(false);
            }
        }
        if std::mem::take(&mut self.armed) {
            // Awake: no bell is needed.
            self.end.word(control::CONSUMER_SLEEPS)?.store(0, Ordering::Relaxed);
        }
        Ok(true)
    }

    /// Moves the next frame into `into`, whose content becomes exactly the frame. `None`: there is none, and a
    /// ring of the bell will follow.
    pub(super) fn next(&mut self, into: &mut Vec<u8>) -> Result<Option<FrameHeader>, Broken> {
        if !self.available()? {
            return Ok(None);
        }
        let data = self.end.data()?;
        let at = self.end.position(self.tail);
        let mut record = [0u8; RECORD_HEADER];
        data.subslice(at, RECORD_HEADER).map_err(|_| OUTSIDE)?.copy_to(&mut record);
        // From here on only the private copy counts.
        let [l0, l1, l2, l3, header @ ..] = record;
        let len = u32::from_le_bytes([l0, l1, l2, l3]) as usize;
        if !(MIN_FRAME..=MAX_FRAME).contains(&len) {
            return Err(Broken("a frame's length is none that a frame can have"));
        }
        let need = record_bytes(len) as u32;
        if need > self.head.wrapping_sub(self.tail) {
            return Err(Broken("a frame is longer than what was written"));
        }
        let header: [u8; HEADER_BYTES] = header;
        let header =
            FrameHeader::decode(&header).map_err(|_| Broken("a frame's offload header is malformed"))?;
        into.resize(len, 0);
        let start = at + RECORD_HEADER;
        let (first, second) = into.split_at_mut(len.min(data.len() - start));
        data.subslice(start, first.len()).map_err(|_| OUTSIDE)?.copy_to(first);
        data.subslice(0, second.len()).map_err(|_| OUTSIDE)?.copy_to(second);
        self.tail = self.tail.wrapping_add(need);
        self.unrung = self.unrung.saturating_add(need);
        // Release: done with these bytes.
        self.end.word(control::TAIL)?.store(self.tail, Ordering::Release);
        Ok(Some(header))
    }

    /// Whether the producer must be woken because there is room. Looks only when a quarter of the ring was read
    /// since the last look, or, with `pausing` (the ring is empty, or the caller stops for now), when anything
    /// was.
    pub(super) fn room_bell_due(&mut self, pausing: bool) -> Result<bool, Broken> {
        let enough = if pausing { 1 } else { self.end.place.size / 4 };
        if self.unrung < enough {
            return Ok(false);
        }
        self.unrung = 0;
        // With the fence in `Producer::wait_for`: either this sees the wish, or it sees the new tail.
        fence(Ordering::SeqCst);
        if self.head.wrapping_sub(self.tail) > self.end.place.size / 2 {
            return Ok(false);
        }
        take_flag(self.end.word(control::PRODUCER_WAITS)?)
    }
}
