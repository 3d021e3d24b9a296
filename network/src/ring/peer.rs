//! The other process' side of a ring.

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use atoll_foundation::SharedMemory;

use super::bell::{Bell, Ear};
use super::layout::{Direction, Layout, MAGIC, MIN_FRAME, VERSION, header};
use super::queue::{Broken, Consumer, Producer};
use super::{Bells, RingError, RingSetup, offloads_of};
use crate::header::{FrameHeader, Offloads};
use crate::port::MAX_FRAME;

/// The side of a ring that is not the machine's: for a network process with one thread and its own poller.
///
/// # A round
///
/// 1. Poll [`Peer::data_event`] and [`Peer::room_event`] for reading, level-triggered. A hang-up on either
///    (`POLLHUP`) means that the machine's process has ended: it stays, so end the connection.
/// 2. When one is readable: [`Peer::clear_events`] first, then everything else.
/// 3. [`Peer::next`] on every pair until it gives `None`, also if nothing seems to be there; only then does the
///    machine ring again for that pair. Who stops earlier comes back by itself.
/// 4. [`Peer::push`] what there is. After a `false` a room event follows; every pair may then have room.
/// 5. [`Peer::ring_bells`] before going back to 1.
///
/// After [`RingError::Broken`] every further call gives the same error: end the connection.
pub struct Peer {
    memory: Arc<SharedMemory>,
    bells: Bells,
    pairs: Vec<Pair>,
    broken: Option<Broken>,
}

struct Pair {
    from_machine: Consumer,
    to_machine: Producer,
}

impl std::fmt::Debug for Peer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Peer")
            .field("pairs", &self.pairs.len())
            .field("broken", &self.broken)
            .finish_non_exhaustive()
    }
}

impl Peer {
    /// Maps the ring. Nothing of it is believed: [`RingError::Setup`] when the memory can still change its size, is
    /// not exactly as large as its header says, or is of another version.
    pub fn attach(setup: RingSetup) -> Result<Self, RingError> {
        let setup_error = |text: &str| RingError::Setup(text.to_owned());
        // The first page says how large the rest must be. Read once: it can change at any time.
        let page =
            SharedMemory::map(&setup.memory, 4096).map_err(|error| RingError::Setup(error.to_string()))?;
        let word = |offset| page.word(offset).map_or(0, |word| word.load(Ordering::Relaxed));
        let (magic, version) = (word(header::MAGIC), word(header::VERSION));
        if magic != MAGIC {
            return Err(setup_error("the memory is not a network ring's"));
        }
        if version != VERSION {
            return Err(RingError::Setup(format!("its version is {version}, expected {VERSION}")));
        }
        let layout = Layout::new(word(header::PAIRS), word(header::RING_BYTES))
            .ok_or_else(|| setup_error("its sizes are outside the limits"))?;
        let size = rustix::fs::fstat(&setup.memory).map_err(std::io::Error::from)?.st_size;
        if usize::try_from(size).ok() != Some(layout.total()) {
            return Err(setup_error("the memory's size does not follow from its header"));
        }
        let memory = Arc::new(
            SharedMemory::map(&setup.memory, layout.total())
                .map_err(|error| RingError::Setup(error.to_string()))?,
        );
        let bells = Bells {
            ring_data: Bell::adopt(setup.ring_data)?,
            ring_room: Bell::adopt(setup.ring_room)?,
            hear_data: Arc::new(Ear::adopt(setup.hear_data)?),
            hear_room: Arc::new(Ear::adopt(setup.hear_room)?),
        };
        let pair = |pair| Pair {
            from_machine: Consumer::new(memory.clone(), layout.place(pair, Direction::ToPeer)),
            to_machine: Producer::new(memory.clone(), layout.place(pair, Direction::ToMachine)),
        };
        let pairs = (0..layout.pairs()).map(pair).collect();
        Ok(Self { memory, bells, pairs, broken: None })
    }

    /// How many pairs there are, at least one.
    pub fn pairs(&self) -> u16 {
        self.pairs.len() as u16
    }

    /// Readable when the machine has sent something.
    pub fn data_event(&self) -> BorrowedFd<'_> {
        self.bells.hear_data.as_fd()
    }

    /// Readable when a ring that was full has room.
    pub fn room_event(&self) -> BorrowedFd<'_> {
        self.bells.hear_room.as_fd()
    }

    /// Forgets both events: to be called when one was readable, before looking at the rings.
    pub fn clear_events(&self) {
        self.bells.hear_data.clear();
        self.bells.hear_room.clear();
    }

    /// Copies the next frame that the machine sent into `into`, whose content becomes exactly the frame (at most
    /// [`MAX_FRAME`] bytes). `None` when there is none: then, and only then, the data event tells of the next.
    pub fn next(&mut self, pair: u16, into: &mut Vec<u8>) -> Result<Option<FrameHeader>, RingError> {
        let Self { pairs, bells, broken, .. } = self;
        guarded(broken, || {
            let Some(pair) = pairs.get_mut(usize::from(pair)) else {
                return Ok(Err(RingError::NoPair(pair)));
            };
            let consumer = &mut pair.from_machine;
            let header = consumer.next(into)?;
            if consumer.room_bell_due(header.is_none())? {
                bells.ring_room.ring();
            }
            Ok(Ok(header))
        })
    }

    /// Bytes of frame that surely fit now, at most [`MAX_FRAME`]; 0 when the ring is broken.
    pub fn room(&self, pair: u16) -> usize {
        match self.pairs.get(usize::from(pair)) {
            Some(pair) if self.broken.is_none() => pair.to_machine.room().unwrap_or(0),
            _ => 0,
        }
    }

    /// Sends the frame that `frame`'s pieces make together. False: no room, nothing was sent, and the room event
    /// will follow. A frame that is none (shorter than an Ethernet header, or longer than [`MAX_FRAME`]) is
    /// dropped. The machine learns of it in [`Peer::ring_bells`] at the latest.
    pub fn push(&mut self, pair: u16, header: &FrameHeader, frame: &[&[u8]]) -> Result<bool, RingError> {
        let Self { pairs, broken, .. } = self;
        guarded(broken, || {
            let Some(pair) = pairs.get_mut(usize::from(pair)) else {
                return Ok(Err(RingError::NoPair(pair)));
            };
            let len = frame.iter().fold(0usize, |sum, piece| sum.saturating_add(piece.len()));
            if !(MIN_FRAME..=MAX_FRAME).contains(&len) {
                return Ok(Ok(true));
            }
            let pushed = pair
                .to_machine
                .push(header, len, |writer| frame.iter().try_for_each(|piece| writer.bytes(piece)))?;
            Ok(Ok(pushed))
        })
    }

    /// Tells the machine what was pushed and taken, where it sleeps: to be called once after each batch.
    pub fn ring_bells(&mut self) {
        let Self { pairs, bells, broken, .. } = self;
        let (mut data, mut room) = (false, false);
        let _ = guarded(broken, || {
            for pair in pairs {
                data |= pair.to_machine.data_bell_due()?;
                room |= pair.from_machine.room_bell_due(true)?;
            }
            Ok(Ok(()))
        });
        if data {
            bells.ring_data.ring();
        }
        if room {
            bells.ring_room.ring();
        }
    }

    /// Which unfinished frames the machine takes at present.
    pub fn receive_offloads(&self) -> Offloads {
        let word = self.memory.word(header::RECEIVE_OFFLOADS);
        offloads_of(word.map_or(0, |word| word.load(Ordering::Relaxed)))
    }

    /// Asks for one room event without having tried a frame, for who found [`Peer::room`] too small. True: half of
    /// the ring is free already, and no event will come. Who still finds too little after the event asks again.
    #[must_use = "true means that no event will come"]
    pub fn request_room_event(&mut self, pair: u16) -> Result<bool, RingError> {
        let Self { pairs, broken, .. } = self;
        guarded(broken, || match pairs.get_mut(usize::from(pair)) {
            Some(pair) => Ok(Ok(pair.to_machine.request_room()?)),
            None => Ok(Err(RingError::NoPair(pair))),
        })
    }
}

/// Runs `call` unless the ring is broken, and remembers when it breaks.
fn guarded<T>(
    broken: &mut Option<Broken>,
    call: impl FnOnce() -> Result<Result<T, RingError>, Broken>,
) -> Result<T, RingError> {
    if let Some(broken) = *broken {
        return Err(broken.into());
    }
    call().unwrap_or_else(|rule| {
        *broken = Some(rule);
        Err(rule.into())
    })
}
