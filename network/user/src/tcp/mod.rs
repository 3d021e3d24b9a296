//! TCP between the guest and sockets of the host, without buffers of its own.
//!
//! [`Table`] holds the flows. It is given the guest's packets, the readiness of sockets and the time, and gives
//! packets to an [`Output`] and descriptors to a [`Poller`]. It is driven by one thread; there are no locks.
//!
//! # Where the bytes are
//!
//! ```text
//!            to the host: send(), acknowledged as far as the kernel took it
//!   guest ─────────────────────────────────────────────────────────────────▶ send queue ──▶ peer
//!            the guest's window is what the send queue still takes
//!
//!            to the guest: recv(MSG_PEEK) at position nxt - consumed
//!   guest ◀──────────────────────────────────────────────────────────────── receive queue ◀── peer
//!            discarded from the queue when the guest acknowledges
//! ```
//!
//! A byte is in the sender's memory until the receiver's kernel has it: the host's send queue is the only buffer
//! towards the host, its receive queue the only one towards the guest, and the one to send again from. What is
//! kept of a flow are numbers, less than 2 KiB with its share of the tables ([`BYTES_PER_FLOW`]); one buffer of
//! 256 KiB is shared by all.
//!
//! # States
//!
//! ```text
//!   guest: SYN                                        host: accept() on a forwarded port
//!      │ connect()                                       │ SYN to the guest
//!      ▼                                                 ▼
//!  Connecting ──failed──▶ RST, ICMP or silence        SynSent ──RST, no answer──▶ RST to the peer
//!      │ connected: SYN/ACK to the guest                 │
//!      ▼                                                 │
//!  SynReceived ──RST, no answer──▶ RST to the peer       │ SYN/ACK from the guest
//!      │ ACK from the guest                              │
//!      └───────────────────────▶ Open ◀──────────────────┘
//!                                 │
//!        the directions end one by one, in any order:
//!          guest's FIN  ──▶ shutdown(SHUT_WR), `guest_ended`
//!          peer's FIN   ──▶ a peek of 0 bytes, `eof`; FIN to the guest, sent again until acknowledged
//!        both ended and acknowledged ──▶ close(): no TIME-WAIT, the guest has its own where it closed first
//!        RST from the guest ──▶ SO_LINGER 0, close(): RST to the peer
//!        error of the socket, idle for too long, guest gone ──▶ RST to both
//! ```
//!
//! # To the guest
//!
//! There is no congestion control: the way is a ring in memory that says when it is full. Segments go as far as
//! the guest's window; large ones (`segment`) of up to 64 KiB where the guest takes them. Losses happen only if
//! the guest drops what it took. After three duplicate acknowledgements one packet is sent again (RFC 5681), and
//! one more for each partial acknowledgement (RFC 6582); after a timeout (RFC 6298, from 300 ms) everything that
//! is not acknowledged. A closed window is probed with segments that a guest has to answer.
//!
//! # From the guest
//!
//! Segments that come too early are dropped and acknowledged with what was expected: the ring keeps the order, so
//! this happens only after the kernel took less than the guest was promised. That is rare, as the window is
//! computed from the send queue's memory with room for what each segment costs, and mended at once: when there
//! is room the guest gets its window and three duplicate acknowledgements, and sends again without waiting.
//! The peer's window (`tcpi_snd_wnd`) is not looked at: it is told by no event when it opens, and when it is
//! closed the send queue fills, which is.
//!
//! A segment without PSH has others behind it: the kernel is told (MSG_MORE), and to go on with what it has when
//! the flow is served at the end of the batch.
//!
//! A guest's keep-alive probes are answered here; the first has the host's kernel probe the peer after as long a
//! silence.
//! Urgent pointers are ignored, urgent bytes of the peer stay in the stream.
//!
//! # Waiting for sockets
//!
//! Sockets are watched edge-triggered, for both directions, once. Peeked bytes stay in the queue, so a level would
//! fire until the guest acknowledges: reading would have to be switched off with the first byte in flight and on
//! with the last acknowledgement, and nothing would tell about bytes that come meanwhile. Two changes of interest
//! for each batch take 1.2 µs where a peek of 60,000 bytes takes 1.7; with edges there is none, but for one when
//! the send queue gets short (see `Flow::arm`).
//!
//! # A hostile guest
//!
//! It can have [`Limits::flows`] flows, of which [`Limits::half_open`] may be unanswered: a flood of SYNs displaces
//! its own oldest. Flows are found by a hash with random keys, initial sequence numbers are from another (RFC
//! 6528). Lists are linked through the table, deadlines are on a wheel: nothing grows with the number of packets.
//! Ports on the host's side are the host's choice.
//!
//! # Measured
//!
//! With `network/user/examples/tcp_throughput.rs`, one connection over the loopback of a busy host with two EPYC
//! processors, of which the peer has one; best and typical of several runs. The time is of the table's thread,
//! with the copy of each packet into a ring's worth of memory.
//!
//! ```text
//! host to guest, packets of 64 KiB      2.1 - 2.9 GB/s    0.2 - 0.3 s of processor for a gigabyte
//! host to guest, 1,460 bytes each       1.8 - 2.5 GB/s    0.25 - 0.3 s
//! guest to host, packets of 64 KiB      2.2 - 3.6 GB/s    0.06 - 0.1 s
//! guest to host, 1,460 bytes each       0.9 GB/s          0.57 s   (a system call each, 0.8 µs)
//! opened, connected and reset           30 µs of processor each
//! a flow                                459 bytes, with its share of all tables
//! ```

mod flow;
mod from_guest;
mod links;
mod open;
mod rtt;
#[cfg(test)]
mod tests;
mod to_guest;
mod wheel;

use std::collections::HashMap;
use std::hash::{BuildHasher, RandomState};
use std::mem::size_of;
use std::time::{Duration, Instant};

use self::flow::{Fate, Flow, MANY_ACKS, State};
use self::links::{Links, List};
use self::to_guest::Served;
use self::wheel::{NEVER, Wheel};
use crate::output::{Flow4Tuple, Output, TcpFlags, TcpHeader};
use crate::policy::Policy;
use crate::poller::{Poller, Readiness};

/// Bytes of the buffer through which all flows' bytes go to the guest: several of the largest packets, so that one
/// peek serves them all, and no more than stays in a processor's cache.
const BUFFER_BYTES: usize = 256 << 10;

/// Bits of a token that are the flow's index; the rest tells it from earlier flows of that index.
const INDEX_BITS: u32 = 24;
/// Largest table: what the index bits can name.
const MAX_FLOWS: usize = 1 << 16;

/// Memory of one flow, with its share of the table, the hash, the lists and the wheel, in bytes.
pub const BYTES_PER_FLOW: usize =
    size_of::<Slot>() + 3 * (size_of::<(Flow4Tuple, u32)>() + 1) + 3 * 8 + 16 + size_of::<u32>();
const _: () = assert!(BYTES_PER_FLOW <= 2048, "a flow must not take more than 2 KiB");

/// What a guest may have.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Flows at once; at most 65,536.
    pub flows: usize,
    /// Flows at once that are not open yet.
    pub half_open: usize,
    /// How long a flow may be silent. RFC 5382 (REQ-5) has 2 hours 4 minutes at least.
    pub idle: Duration,
    /// How long the host may take to connect.
    pub connect: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            flows: 4096,
            half_open: 1024,
            idle: Duration::from_secs(2 * 3600 + 4 * 60),
            connect: Duration::from_secs(4 * 60),
        }
    }
}

/// What has happened since the table was made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Metrics {
    /// Flows there are.
    pub flows: usize,
    /// Flows there are that are not open yet.
    pub half_open: usize,
    /// Flows that the guest began.
    pub opened_by_guest: u64,
    /// Flows that came from forwarded ports.
    pub opened_by_host: u64,
    /// SYNs that the policy refused.
    pub refused: u64,
    /// Connections that the host could not make.
    pub failed: u64,
    /// Flows for which there was no room.
    pub turned_away: u64,
    /// Half-open flows that gave way to newer ones.
    pub evicted: u64,
    /// Flows that ended because one side was silent for too long.
    pub expired: u64,
    /// Flows that ended with a RST.
    pub aborted: u64,
    /// Payload bytes given to the host's kernel.
    pub bytes_to_host: u64,
    /// Payload bytes given to the guest, those sent again included.
    pub bytes_to_guest: u64,
    /// Packets sent to the guest again.
    pub retransmissions: u64,
    /// Segments of the guest that came too early.
    pub out_of_order: u64,
    /// Segments of the guest that the host's kernel took only in part.
    pub pinched: u64,
}

/// What a call of the table works with.
pub struct Context<'a> {
    /// The time.
    pub now: Instant,
    /// Takes packets to the guest.
    pub output: &'a mut dyn Output,
    /// Watches sockets.
    pub poller: &'a mut dyn Poller,
    /// Says where the guest may connect to.
    pub policy: &'a dyn Policy,
}

/// A place in the table.
struct Slot {
    /// Counts the flows that were here.
    generation: u32,
    flow: Option<Flow>,
}

/// All TCP flows of a guest.
///
/// After a batch of packets and events, [`Table::flush`] has to be called: acknowledgements are collected until
/// then, and sockets are read there.
pub struct Table {
    limits: Limits,
    metrics: Metrics,
    started: Instant,
    slots: Vec<Slot>,
    free: Vec<u32>,
    flows: HashMap<Flow4Tuple, u32, RandomState>,
    numbers: RandomState,
    wheel: Wheel,
    /// Flows that have something to do at the next flush.
    queue: List,
    queue_links: Links,
    half_open: List,
    half_open_links: Links,
    buffer: Box<[u8]>,
}

impl Table {
    /// An empty table.
    pub fn new(limits: Limits) -> Self {
        let flows = limits.flows.clamp(1, MAX_FLOWS);
        let limits = Limits { flows, half_open: limits.half_open.clamp(1, flows), ..limits };
        Self {
            limits,
            metrics: Metrics::default(),
            started: Instant::now(),
            slots: Vec::with_capacity(flows),
            free: Vec::with_capacity(flows),
            flows: HashMap::with_capacity_and_hasher(flows, RandomState::new()),
            numbers: RandomState::new(),
            wheel: Wheel::with_capacity(flows),
            queue: List::EMPTY,
            queue_links: Links::with_capacity(flows),
            half_open: List::EMPTY,
            half_open_links: Links::with_capacity(flows),
            buffer: vec![0; BUFFER_BYTES].into_boxed_slice(),
        }
    }

    /// What has happened so far.
    pub fn metrics(&self) -> Metrics {
        self.metrics
    }

    /// Takes a packet of the guest. `payload` is what follows the TCP header.
    pub fn packet(&mut self, flow: &Flow4Tuple, header: &TcpHeader, payload: &[u8], cx: &mut Context<'_>) {
        let now = self.milliseconds(cx.now);
        if let Some(index) = self.find(flow) {
            let Some(Slot { flow: Some(flow), .. }) = self.slots.get_mut(index as usize) else { return };
            let fate = flow.segment(header, payload, now, cx, &mut self.metrics);
            self.settle(index, fate, cx);
            return;
        }
        let flags = header.flags;
        if flags.has(TcpFlags::RST) {
            return;
        }
        if flags.has(TcpFlags::SYN) && !flags.has(TcpFlags::ACK) {
            self.open_for_guest(flow, header, cx);
            return;
        }
        let numbers =
            payload.len() as u32 + u32::from(flags.has(TcpFlags::SYN)) + u32::from(flags.has(TcpFlags::FIN));
        cx.output.tcp(flow, &open::reset_for(header, numbers), &[], None);
    }

    /// The socket that was watched with `token` (without its owner) is ready.
    pub fn socket_ready(&mut self, token: u64, readiness: Readiness, cx: &mut Context<'_>) {
        let index = (token & ((1 << INDEX_BITS) - 1)) as u32;
        let Some(flow) = self.flow(index) else { return };
        if flow.token != token {
            // The flow is gone, its event was on the way.
            return;
        }
        if flow.state == State::Connecting {
            if readiness.writable || readiness.error || readiness.hung_up {
                self.connect_ended(index, cx);
            }
            self.settle(index, Fate::Keep, cx);
            return;
        }
        let mut fate = Fate::Keep;
        flow.readable |= readiness.readable || readiness.hung_up;
        if readiness.error && (flow.eof.is_some() || flow.state != State::Open) {
            // What the peer had sent was read, so the error is all that is left to tell. Otherwise it is told
            // when that has been read.
            fate = Fate::Abort;
        }
        if readiness.writable && (flow.armed || flow.pinched) {
            flow.acks_due = if flow.pinched { MANY_ACKS } else { flow.acks_due.max(1) };
            flow.stale_window = true;
            flow.armed = false;
            flow.pinched = false;
        }
        self.settle(index, fate, cx);
    }

    /// Does what packets and events have left to do: reads sockets, sends to the guest, acknowledges. Stops when
    /// the output is full and goes on at the next call, which [`Table::room`] is.
    pub fn flush(&mut self, cx: &mut Context<'_>) {
        let now = self.milliseconds(cx.now);
        while let Some(index) = self.queue_links.pop(&mut self.queue) {
            let Some(Slot { flow: Some(flow), .. }) = self.slots.get_mut(index as usize) else { continue };
            flow.queued = false;
            let served = flow.service(&mut self.buffer, now, cx, &mut self.metrics);
            match served {
                Served::All => self.wheel.set(index, flow.deadline(&self.limits)),
                Served::More | Served::Full => {
                    flow.queued = true;
                    self.wheel.set(index, flow.deadline(&self.limits));
                    self.queue_links.push(&mut self.queue, index);
                }
                Served::Ended(fate) => self.settle(index, fate, cx),
            }
            if served == Served::Full {
                break;
            }
        }
    }

    /// The output has room again.
    pub fn room(&mut self, cx: &mut Context<'_>) {
        self.flush(cx);
    }

    /// Whether something waits for room in the output.
    pub fn wants_room(&self) -> bool {
        self.queue.first().is_some()
    }

    /// Does what is due by the clock and returns when to call again at the latest.
    pub fn expire(&mut self, cx: &mut Context<'_>) -> Option<Instant> {
        let now = self.milliseconds(cx.now);
        let mut any = false;
        while let Some(index) = self.wheel.pop(now) {
            let Some(Slot { flow: Some(flow), .. }) = self.slots.get_mut(index as usize) else { continue };
            let fate = flow.timer(now, &self.limits, cx, &mut self.metrics);
            self.settle(index, fate, cx);
            any = true;
        }
        if any {
            self.flush(cx);
        }
        let next = self.wheel.next()?;
        self.started.checked_add(Duration::from_millis(next))
    }

    /// Sees a flow to what has become of it.
    fn settle(&mut self, index: u32, fate: Fate, cx: &mut Context<'_>) {
        match fate {
            Fate::Keep => {}
            Fate::Done => return self.remove(index),
            Fate::Abort => return self.abort(index, true, cx),
            Fate::ResetByGuest => return self.abort(index, false, cx),
        }
        let Some(Slot { flow: Some(flow), .. }) = self.slots.get_mut(index as usize) else { return };
        if flow.wants_service() && !flow.queued {
            flow.queued = true;
            self.queue_links.push(&mut self.queue, index);
        }
        if flow.half_open && flow.state == State::Open {
            flow.half_open = false;
            self.half_open_links.remove(&mut self.half_open, index);
            self.metrics.half_open -= 1;
        }
        self.wheel.set(index, flow.deadline(&self.limits));
    }

    /// Ends a flow with a RST to the host's peer, and one to the guest if it is told.
    fn abort(&mut self, index: u32, tell_guest: bool, cx: &mut Context<'_>) {
        let Some(flow) = self.take(index) else { return };
        self.metrics.aborted = self.metrics.aborted.wrapping_add(1);
        if tell_guest {
            flow.emit_reset(cx);
        }
        flow.socket.reset();
    }

    /// Ends a flow in order.
    fn remove(&mut self, index: u32) {
        drop(self.take(index));
    }

    fn take(&mut self, index: u32) -> Option<Flow> {
        let flow = self.slots.get_mut(index as usize)?.flow.take()?;
        self.flows.remove(&flow.tuple);
        if flow.queued {
            self.queue_links.remove(&mut self.queue, index);
        }
        if flow.half_open {
            self.half_open_links.remove(&mut self.half_open, index);
            self.metrics.half_open -= 1;
        }
        self.metrics.flows -= 1;
        self.release(index);
        Some(flow)
    }

    /// Takes a free place, for which there is room: its index and the token of the flow that comes there.
    fn reserve(&mut self) -> Option<(u32, u64)> {
        let index = match self.free.pop() {
            Some(index) => index,
            None if self.slots.len() < self.limits.flows => {
                let index = self.slots.len() as u32;
                self.slots.push(Slot { generation: 0, flow: None });
                self.wheel.grow(self.slots.len());
                self.queue_links.grow(self.slots.len());
                self.half_open_links.grow(self.slots.len());
                index
            }
            None => return None,
        };
        let slot = self.slots.get_mut(index as usize)?;
        slot.generation = slot.generation.wrapping_add(1);
        Some((index, u64::from(slot.generation) << INDEX_BITS | u64::from(index)))
    }

    fn release(&mut self, index: u32) {
        self.wheel.set(index, NEVER);
        self.free.push(index);
    }

    /// Puts a flow that is not open to its place.
    fn place(&mut self, index: u32, mut flow: Flow) {
        let Some(slot) = self.slots.get_mut(index as usize) else { return };
        flow.half_open = true;
        self.flows.insert(flow.tuple, index);
        slot.flow = Some(flow);
        self.half_open_links.push(&mut self.half_open, index);
        self.metrics.half_open += 1;
        self.metrics.flows += 1;
    }

    fn find(&self, tuple: &Flow4Tuple) -> Option<u32> {
        self.flows.get(tuple).copied()
    }

    fn flow(&mut self, index: u32) -> Option<&mut Flow> {
        self.slots.get_mut(index as usize)?.flow.as_mut()
    }

    fn oldest_half_open(&self) -> Option<u32> {
        self.half_open.first()
    }

    /// Milliseconds since the table was made.
    fn milliseconds(&self, now: Instant) -> u64 {
        now.saturating_duration_since(self.started).as_millis() as u64
    }

    /// The first sequence number to the guest (RFC 6528): a keyed hash of the addresses and a clock of 4 µs.
    fn first_number(&self, tuple: &Flow4Tuple, now: Instant) -> u32 {
        let clock = now.saturating_duration_since(self.started).as_micros() / 4;
        (self.numbers.hash_one(tuple) as u32).wrapping_add(clock as u32)
    }
}
