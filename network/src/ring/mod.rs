//! The ring between a machine's process and the process that is its network.
//!
//! Two processes that do not trust each other exchange frames through one memory: the machine's, which may have
//! been taken over by its guest, and the network's, which may have been taken over by what it parses. Each side
//! checks whatever it reads, on a private copy, and ends the connection at the first thing that cannot be.
//!
//! * [`create`] makes the memory and gives the machine's side ([`RingPort`], a [`Port`](crate::Port)) and what the
//!   other process needs ([`RingSetup`], five descriptors);
//! * [`Peer`] is the other side.
//!
//! # Memory
//!
//! A memfd, sealed against shrinking, growing and further seals. Per pair there are two rings, each with one
//! producer and one consumer.
//!
//! ```text
//!        0 ┌──────────────────────────────┐
//!          │ magic, version, pairs, bytes │  written once, before the other side exists
//!          │ 64: receive offloads         │  machine writes
//!     4096 ├──────────────────────────────┤        one control block (512 bytes)
//!          │ pair 0, to peer: control     │─────▶ ┌─────┬─────────────────┬──────────────────────┐
//!          │ pair 0, to machine: control  │       │   0 │ head            │ producer writes      │
//!          │ pair 1, ...                  │       │ 128 │ tail            │ consumer writes      │
//!          ├──────────────────────────────┤       │ 256 │ consumer sleeps │ both: 1 asks, 0 rung │
//!          │ (padding to a page)          │       │ 384 │ producer waits  │ both                 │
//!          ├──────────────────────────────┤       └─────┴─────────────────┴──────────────────────┘
//!          │ pair 0, to peer: bytes       │        one record, aligned to 16, around the end if need be
//!          ├──────────────────────────────┤─────▶ ┌───────────┬────────────────┬─────────┬─────────┐
//!          │ pair 0, to machine: bytes    │       │ u32 bytes │ header (12)    │ frame   │ padding │
//!          ├──────────────────────────────┤       └───────────┴────────────────┴─────────┴─────────┘
//!          │ pair 1, ...                  │        header: struct virtio_net_hdr_v1 (VIRTIO 1.2, 5.1.6)
//!          └──────────────────────────────┘
//! ```
//!
//! `head` and `tail` count bytes from 0 on, modulo 2^32; `head - tail` bytes are in use. A side keeps its own
//! index privately and only publishes it: what the other side does to the published word changes nothing here.
//! The other side's index is copied once per look and has to lie between its former value and what is possible,
//! on a record boundary. A record's length is copied once, has to be a frame's ([`MAX_FRAME`](crate::port::MAX_FRAME))
//! and within what was written; the frame is copied before anybody parses it.
//!
//! # Bells, and why none is lost
//!
//! A side that is busy is not woken. The consumer that finds its ring empty sets `consumer sleeps`, and looks once
//! more before it sleeps; the producer that has published looks at the flag, and if it is set clears it and rings:
//!
//! ```text
//!   consumer, ring empty            producer, after a batch
//!   sleeps = 1                      head = new        (release)
//!   fence (SeqCst)                  fence (SeqCst)
//!   look at head: new? go on        sleeps == 1?  sleeps = 0, ring
//!   else sleep until the bell
//! ```
//!
//! This is Dekker's pattern: the two fences are in one total order. If the consumer's is first, the producer sees
//! `sleeps == 1` and rings; if the producer's is first, the consumer sees the new head and does not sleep. With
//! neither fence, both stores could still be in store buffers when both loads are done, and the frame would lie
//! there until the next one. The bell itself is a byte in a pipe: it stays there until the consumer takes it, so
//! it does not matter whether the consumer already waits. Only the consumer sets the flag; who clears it on the
//! producer's side rings afterwards, so that a consumer that set it again between the two is woken by that ring,
//! looks, and sets it once more: a bell is always answered by a look that ends in a frame or in the flag set, also
//! where it rang for nothing. A consumer that found something clears the flag itself, at worst too late, which
//! costs a ring too many.
//!
//! `producer waits` is the same with the roles exchanged: set when a frame does not fit, looked at when the
//! consumer pauses or has read a quarter of the ring, and rung when at most half of the ring is in use, so that the
//! producer is woken for a batch and not for one frame. Half of the smallest ring holds the largest frame; a
//! producer that does not find room in its last look is therefore never one that a ring would not come for: the
//! consumer will still read past the half, and looks at the flag after it did.
//!
//! A bell concerns all pairs. The hearer takes the byte first and then looks at every pair, never the other way
//! round.
//!
//! # What the other side can do
//!
//! Whatever is in the memory, a side does not panic, allocate by it, wait, or read outside. The other side can send
//! frames of any content (the reader parses private copies), no frames, or end the connection; it can ring without
//! end, which costs a read and a look a round of the event loop. Nobody can make the memory fault, because it can
//! not shrink; punching a hole makes zeros, which are refused as a record.
//!
//! # Figures
//!
//! `network/examples/ring_speed.rs`, one pair of 1 MiB rings, two threads on two cores of a shared server (AMD EPYC),
//! one copy in and one copy out, 64 frames a bell:
//!
//! | frame, bytes | to the peer | to the machine |
//! |---|---|---|
//! | 60 | 15.8 M frames/s, 0.95 GB/s | 18.1 M frames/s, 1.08 GB/s |
//! | 1,514 | 10.4 M frames/s, 15.8 GB/s | 10.9 M frames/s, 16.5 GB/s |
//! | 9,014 | 2.80 M frames/s, 25.2 GB/s | 2.71 M frames/s, 24.4 GB/s |
//! | 65,549 | 0.42 M frames/s, 27.5 GB/s | 0.40 M frames/s, 26.1 GB/s |
//!
//! A round trip between two sides that sleep each time takes 7.8 µs, nearly all of it the host's scheduler.
//!
//! # Lock order
//!
//! [`RingPort`]: a pair's sending half and receiving half each have a lock, taken one at a time; the receiving one
//! is held while the caller's closure looks at the frame. The list of registrations is a leaf.

mod bell;
mod layout;
mod peer;
mod port;
mod queue;

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use atoll_foundation::memfd::Seals;
use atoll_foundation::{Memfd, SharedMemory};

use crate::header::Offloads;
use bell::{Bell, Ear};
use layout::{Direction, Layout, MAGIC, VERSION, control, header};
use queue::Broken;

pub use layout::{MAX_PAIRS, MAX_RING_BYTES, MIN_RING_BYTES};
pub use peer::Peer;
pub use port::{RingLink, RingPort};

/// A size for [`create`] that fits every purpose: several of the largest frames, 1 MiB.
pub const DEFAULT_RING_BYTES: usize = 1 << 20;

/// What can be wrong with a ring.
#[derive(Debug, thiserror::Error)]
pub enum RingError {
    /// The other side broke the rules; the ring is of no use any more.
    #[error("the other side of the network ring broke its rules ({0}); the connection has ended")]
    Broken(&'static str),
    /// What was handed over is no ring of this version.
    #[error("the network ring that was handed over cannot be used: {0}")]
    Setup(String),
    /// A number given to [`create`] is outside its limits.
    #[error(
        "a network ring has 1 to {MAX_PAIRS} pairs of at most {MAX_RING_BYTES} bytes each way, not {pairs} of {bytes}"
    )]
    Size {
        /// Pairs asked for.
        pairs: u16,
        /// Bytes asked for.
        bytes: usize,
    },
    /// There is no such pair.
    #[error("the network ring has no pair {0}")]
    NoPair(u16),
    /// The host refused memory or descriptors.
    #[error("cannot make a network ring: {0}")]
    Host(#[from] io::Error),
}

impl From<Broken> for RingError {
    fn from(Broken(rule): Broken) -> Self {
        Self::Broken(rule)
    }
}

/// What the other process needs to take part: the memory and its ends of four bells. Descriptors, to be sent over
/// a unix socket or inherited; who created the ring drops its copy after that, because the end of the other
/// process is noticed by its descriptors being gone.
#[derive(Debug)]
pub struct RingSetup {
    memory: OwnedFd,
    hear_data: OwnedFd,
    hear_room: OwnedFd,
    ring_data: OwnedFd,
    ring_room: OwnedFd,
}

impl RingSetup {
    /// How many descriptors there are.
    pub const FDS: usize = 5;

    /// The descriptors, in the order that [`RingSetup::from_fds`] expects.
    pub fn to_fds(self) -> [OwnedFd; Self::FDS] {
        [self.memory, self.hear_data, self.hear_room, self.ring_data, self.ring_room]
    }

    /// Takes the descriptors back; [`RingError::Setup`] when there are not [`RingSetup::FDS`]. What they are is
    /// looked at by [`Peer::attach`].
    pub fn from_fds(fds: impl IntoIterator<Item = OwnedFd>) -> Result<Self, RingError> {
        let fds: Vec<OwnedFd> = fds.into_iter().take(Self::FDS + 1).collect();
        let count = fds.len();
        let [memory, hear_data, hear_room, ring_data, ring_room] = <[OwnedFd; Self::FDS]>::try_from(fds)
            .map_err(|_| RingError::Setup(format!("expected {} descriptors, not {count}", Self::FDS)))?;
        Ok(Self { memory, hear_data, hear_room, ring_data, ring_room })
    }
}

/// Makes a ring of `pairs` pairs (1 to [`MAX_PAIRS`]). Each direction of each pair has `bytes_per_ring` bytes,
/// rounded up to a power of two and at least [`MIN_RING_BYTES`]; more than [`MAX_RING_BYTES`] is an error. Host
/// memory is used as it is touched. The link is up from the beginning.
pub fn create(pairs: u16, bytes_per_ring: usize) -> Result<(RingPort, RingSetup), RingError> {
    let bytes = bytes_per_ring.clamp(MIN_RING_BYTES, MAX_RING_BYTES + 1).next_power_of_two();
    let layout = Layout::new(pairs.into(), u32::try_from(bytes).unwrap_or(u32::MAX))
        .ok_or(RingError::Size { pairs, bytes: bytes_per_ring })?;
    let memfd = Memfd::create("atoll-network-ring", layout.total() as u64)?;
    memfd.seal(Seals { grow: true, seal: true, ..Seals::default() })?;
    let memory = SharedMemory::map(&memfd, layout.total())?;
    let words = [
        (header::MAGIC, MAGIC),
        (header::VERSION, VERSION),
        (header::PAIRS, pairs.into()),
        (header::RING_BYTES, layout.ring_bytes()),
    ];
    for (offset, value) in words {
        if let Some(word) = memory.word(offset) {
            word.store(value, Ordering::Relaxed);
        }
    }
    for pair in 0..pairs {
        for direction in [Direction::ToPeer, Direction::ToMachine] {
            let sleeps = layout.place(pair, direction).control + control::CONSUMER_SLEEPS;
            if let Some(word) = memory.word(sleeps) {
                // Who has not looked yet is told of the first frame.
                word.store(1, Ordering::Relaxed);
            }
        }
    }
    let (ring_peer_data, hear_data) = bell::bell()?;
    let (ring_peer_room, hear_room) = bell::bell()?;
    let (ring_data, hear_own_data) = bell::bell()?;
    let (ring_room, hear_own_room) = bell::bell()?;
    let setup = RingSetup {
        memory: memfd.as_fd().try_clone_to_owned()?,
        hear_data: hear_data.into_fd(),
        hear_room: hear_room.into_fd(),
        ring_data: ring_data.into_fd(),
        ring_room: ring_room.into_fd(),
    };
    let bells = Bells {
        ring_data: ring_peer_data,
        ring_room: ring_peer_room,
        hear_data: Arc::new(hear_own_data),
        hear_room: Arc::new(hear_own_room),
    };
    Ok((RingPort::new(Arc::new(memory), layout, bells), setup))
}

/// One side's ends of the four bells.
struct Bells {
    /// Tells the other side that there are frames for it.
    ring_data: Bell,
    /// Tells the other side that there is room for its frames.
    ring_room: Bell,
    hear_data: Arc<Ear>,
    hear_room: Arc<Ear>,
}

/// Offloads as a word of the memory.
fn offload_bits(offloads: Offloads) -> u32 {
    u32::from(offloads.checksum)
        | u32::from(offloads.tcp4) << 1
        | u32::from(offloads.tcp6) << 2
        | u32::from(offloads.ecn) << 3
        | u32::from(offloads.udp_l4) << 4
}

/// The offloads of a word of the memory; unknown bits mean nothing.
fn offloads_of(bits: u32) -> Offloads {
    let bit = |n: u32| bits >> n & 1 != 0;
    Offloads { checksum: bit(0), tcp4: bit(1), tcp6: bit(2), ecn: bit(3), udp_l4: bit(4) }
}

#[cfg(test)]
mod tests;
