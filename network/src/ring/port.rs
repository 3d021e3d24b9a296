//! The machine's side of a ring: a [`Port`].

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, OnceLock, TryLockError, Weak};

use atoll_foundation::sync::lock;
use atoll_foundation::{EventLoopHandle, Interest, Readiness, SharedMemory, SourceToken};
use vm_memory::VolatileSlice;

use super::bell::Ear;
use super::layout::{Direction, Layout, MIN_FRAME, header};
use super::queue::{Broken, Consumer, Producer};
use super::{Bells, offload_bits};
use crate::header::{FrameHeader, Offloads};
use crate::port::{MAX_FRAME, Port, PortError, PortEvent, PortListener, Received, Sent, Taken, Watcher};

/// The machine's side of a ring. Dropping it ends the connection.
pub struct RingPort {
    inner: Arc<Inner>,
    name: String,
    mtu: Option<u16>,
    send_offloads: Offloads,
    receive_offloads: Offloads,
}

/// Sets the link state of a [`RingPort`] from elsewhere, for who looks after the other process. Does nothing once
/// the port is gone.
#[derive(Clone)]
pub struct RingLink(Weak<Inner>);

struct Inner {
    memory: Arc<SharedMemory>,
    bells: Bells,
    pairs: Vec<Pair>,
    /// What [`RingPort::set_link`] said last.
    link: AtomicBool,
    /// Why the connection has ended.
    ended: OnceLock<String>,
    watcher: Watcher,
    registrations: Mutex<Vec<SourceToken>>,
}

struct Pair {
    send: Mutex<Sender>,
    receive: Mutex<Receiver>,
}

struct Sender {
    producer: Producer,
    /// A frame did not fit; the device waits for an event.
    waiting: bool,
}

struct Receiver {
    consumer: Consumer,
    /// The private copy of the frame that the caller is shown.
    frame: Vec<u8>,
    /// The header of a frame that the caller has not taken.
    kept: Option<FrameHeader>,
}

impl std::fmt::Debug for RingPort {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("RingPort")
            .field("name", &self.name)
            .field("pairs", &self.inner.pairs.len())
            .finish_non_exhaustive()
    }
}

impl RingPort {
    pub(super) fn new(memory: Arc<SharedMemory>, layout: Layout, bells: Bells) -> Self {
        let pair = |pair| Pair {
            send: Mutex::new(Sender {
                producer: Producer::new(memory.clone(), layout.place(pair, Direction::ToPeer)),
                waiting: false,
            }),
            receive: Mutex::new(Receiver {
                consumer: Consumer::new(memory.clone(), layout.place(pair, Direction::ToMachine)),
                frame: Vec::new(),
                kept: None,
            }),
        };
        let pairs = (0..layout.pairs()).map(pair).collect();
        let inner = Inner {
            memory,
            bells,
            pairs,
            link: AtomicBool::new(true),
            ended: OnceLock::new(),
            watcher: Watcher::default(),
            registrations: Mutex::default(),
        };
        Self {
            inner: Arc::new(inner),
            name: "network ring".to_owned(),
            mtu: None,
            send_offloads: Offloads::TCP,
            receive_offloads: Offloads::TCP,
        }
    }

    /// Names the port in messages; "network ring" if not called.
    #[must_use]
    pub fn with_name(self, name: impl Into<String>) -> Self {
        Self { name: name.into(), ..self }
    }

    /// Says the largest IP packet that the other side carries, in bytes.
    #[must_use]
    pub fn with_mtu(self, mtu: u16) -> Self {
        Self { mtu: Some(mtu), ..self }
    }

    /// Says which unfinished frames the other side takes (`send`) and can give (`receive`). Both are
    /// [`Offloads::TCP`] if not called.
    #[must_use]
    pub fn with_offloads(self, send: Offloads, receive: Offloads) -> Self {
        Self { send_offloads: send, receive_offloads: receive, ..self }
    }

    /// Says whether the other side is there; told to the device as its link state. While it is not, what the
    /// device sends is dropped and nothing is received.
    pub fn set_link(&self, up: bool) {
        self.inner.set_link(up);
    }

    /// For setting the link state after the port was given away.
    pub fn link(&self) -> RingLink {
        RingLink(Arc::downgrade(&self.inner))
    }

    fn pair(&self, pair: u16) -> Result<&Pair, PortError> {
        if let Some(reason) = self.inner.ended.get() {
            return Err(PortError::Gone { port: self.name.clone(), reason: reason.clone() });
        }
        self.inner.pairs.get(usize::from(pair)).ok_or_else(|| PortError::Host {
            port: self.name.clone(),
            source: io::Error::new(io::ErrorKind::InvalidInput, format!("it has no pair {pair}")),
        })
    }

    fn broken(&self, Broken(rule): Broken) -> PortError {
        let reason = format!("its other side broke the rules: {rule}");
        self.inner.end(reason.clone());
        PortError::Gone { port: self.name.clone(), reason }
    }

    fn try_send(
        &self,
        sender: &mut Sender,
        header: &FrameHeader,
        len: usize,
        frame: &[VolatileSlice<'_>],
    ) -> Result<Sent, Broken> {
        let pushed = sender
            .producer
            .push(header, len, |writer| frame.iter().try_for_each(|piece| writer.volatile(piece)))?;
        if pushed {
            return Ok(Sent::Done);
        }
        sender.waiting = true;
        // The other side may sleep with frames that it was not told of, and would never make room.
        if sender.producer.data_bell_due()? {
            self.inner.bells.ring_data.ring();
        }
        Ok(Sent::Full)
    }

    fn try_receive(
        &self,
        receiver: &mut Receiver,
        take: &mut dyn FnMut(&FrameHeader, &[u8]) -> Taken,
    ) -> Result<Received, Broken> {
        let Receiver { consumer, frame, kept } = receiver;
        if kept.is_none() {
            *kept = consumer.next(frame)?;
        }
        let received = match kept {
            None => Received::Empty,
            Some(header) => match take(header, frame) {
                Taken::NotNow => Received::Kept,
                Taken::Yes => {
                    *kept = None;
                    Received::Frame
                }
            },
        };
        if consumer.room_bell_due(received != Received::Frame)? {
            self.inner.bells.ring_room.ring();
        }
        Ok(received)
    }
}

impl Port for RingPort {
    fn name(&self) -> String {
        self.name.clone()
    }

    fn queue_pairs(&self) -> u16 {
        self.inner.pairs.len() as u16
    }

    fn mtu(&self) -> Option<u16> {
        self.mtu
    }

    fn send_offloads(&self) -> Offloads {
        self.send_offloads
    }

    fn receive_offloads(&self) -> Offloads {
        self.receive_offloads
    }

    fn set_receive_offloads(&self, offloads: Offloads) -> Result<(), PortError> {
        let bits = offload_bits(offloads.and(self.receive_offloads));
        if let Some(word) = self.inner.memory.word(header::RECEIVE_OFFLOADS) {
            word.store(bits, Ordering::Relaxed);
        }
        Ok(())
    }

    fn watch(&self, events: &EventLoopHandle, listener: PortListener) -> io::Result<()> {
        let inner = &self.inner;
        inner.watcher.set(events, listener)?;
        let mut registrations = lock(&inner.registrations);
        for (ear, event) in [
            (&inner.bells.hear_data, Inner::data_event as fn(&Inner)),
            (&inner.bells.hear_room, Inner::room_event),
        ] {
            let weak = Arc::downgrade(inner);
            let callback = move |readiness: Readiness| {
                if let Some(inner) = weak.upgrade() {
                    inner.heard(readiness, event);
                }
            };
            registrations.push(events.register(EarFd(ear.clone()), Interest::READ, callback)?);
        }
        Ok(())
    }

    fn send(&self, pair: u16, header: &FrameHeader, frame: &[VolatileSlice<'_>]) -> Result<Sent, PortError> {
        let pair = self.pair(pair)?;
        let len = frame.iter().fold(0usize, |sum, piece| sum.saturating_add(piece.len()));
        if !(MIN_FRAME..=MAX_FRAME).contains(&len) || !self.inner.link.load(Ordering::Relaxed) {
            return Ok(Sent::Done);
        }
        self.try_send(&mut lock(&pair.send), header, len, frame).map_err(|rule| self.broken(rule))
    }

    fn flush(&self, pair: u16) {
        let Ok(pair) = self.pair(pair) else { return };
        let due = lock(&pair.send).producer.data_bell_due();
        match due {
            Ok(true) => self.inner.bells.ring_data.ring(),
            Ok(false) => {}
            Err(rule) => {
                self.broken(rule);
            }
        }
    }

    fn receive(
        &self,
        pair: u16,
        take: &mut dyn FnMut(&FrameHeader, &[u8]) -> Taken,
    ) -> Result<Received, PortError> {
        let pair = self.pair(pair)?;
        if !self.inner.link.load(Ordering::Relaxed) {
            return Ok(Received::Empty);
        }
        self.try_receive(&mut lock(&pair.receive), take).map_err(|rule| self.broken(rule))
    }

    fn link_up(&self) -> bool {
        self.inner.link_up()
    }
}

/// An ear that the event loop owns a share of.
struct EarFd(Arc<Ear>);

impl std::os::fd::AsFd for EarFd {
    fn as_fd(&self) -> std::os::fd::BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl Inner {
    fn link_up(&self) -> bool {
        self.ended.get().is_none() && self.link.load(Ordering::Relaxed)
    }

    fn set_link(&self, up: bool) {
        if self.link.swap(up, Ordering::Relaxed) != up && self.ended.get().is_none() {
            self.post(PortEvent::Link(up));
            if up {
                // Frames may have been left lying, and room not told of.
                for pair in 0..self.pairs.len() as u16 {
                    self.post(PortEvent::Readable(pair));
                    self.post(PortEvent::Writable(pair));
                }
            }
        }
    }

    /// Ends the connection for good; the first reason stays.
    fn end(&self, reason: String) {
        if self.ended.set(reason).is_err() {
            return;
        }
        self.post(PortEvent::Link(false));
        self.stop_listening();
    }

    /// Forgets the bells.
    fn stop_listening(&self) {
        let Some((events, _)) = self.watcher.get() else { return };
        let tokens = std::mem::take(&mut *lock(&self.registrations));
        for token in tokens {
            events.remove(token);
        }
    }

    /// Tells the listener, from the event loop's thread.
    fn post(&self, event: PortEvent) {
        self.watcher.post(event);
    }

    /// A bell was heard, on the event loop's thread.
    fn heard(&self, readiness: Readiness, event: fn(&Self)) {
        if readiness.readable {
            // The order matters: forget the bell, then look.
            self.bells.hear_data.clear();
            self.bells.hear_room.clear();
            self.data_event();
            self.room_event();
        } else {
            event(self);
        }
        if readiness.hangup || readiness.error {
            self.end("the process at its other end has ended".to_owned());
            // It may have ended before it was watched; a hang-up stays and would be told for ever.
            self.stop_listening();
        }
    }

    fn data_event(&self) {
        let Some((_, listener)) = self.watcher.get() else { return };
        for (index, pair) in self.pairs.iter().enumerate() {
            let readable = match pair.receive.try_lock() {
                // Who rang took the wish to be rung back, so it is uttered again where there is nothing. What is wrong
                // is for `receive` to say.
                Ok(mut receiver) => receiver.kept.is_some() || receiver.consumer.available() != Ok(false),
                Err(TryLockError::Poisoned(_)) => false,
                // Somebody receives, and may just have seen it empty.
                Err(TryLockError::WouldBlock) => true,
            };
            if readable {
                listener(PortEvent::Readable(index as u16));
            }
        }
    }

    fn room_event(&self) {
        let Some((_, listener)) = self.watcher.get() else { return };
        for (index, pair) in self.pairs.iter().enumerate() {
            let writable = match pair.send.try_lock() {
                Ok(mut sender) => std::mem::take(&mut sender.waiting),
                Err(TryLockError::Poisoned(_)) => false,
                Err(TryLockError::WouldBlock) => true,
            };
            if writable {
                listener(PortEvent::Writable(index as u16));
            }
        }
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        self.stop_listening();
    }
}

impl RingLink {
    /// As [`RingPort::set_link`].
    pub fn set(&self, up: bool) {
        if let Some(inner) = self.0.upgrade() {
            inner.set_link(up);
        }
    }

    /// Ends the connection for good: the device sees its link down, and every further use of the port fails with
    /// `reason`.
    pub fn end(&self, reason: impl Into<String>) {
        if let Some(inner) = self.0.upgrade() {
            inner.end(reason.into());
        }
    }
}
