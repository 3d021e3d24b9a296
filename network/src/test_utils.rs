//! Two ports in one process, connected back to back: what a device's tests put where the world would be.
//!
//! They are as strict as a port may be: a [`PortEvent::Readable`] comes only after a receive that found nothing and
//! only when the sender flushes, a [`PortEvent::Writable`] only after a send that found no room and only when half
//! of the room is free again. A device that polls its port by luck hangs in its tests.

use std::collections::VecDeque;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard};

use atoll_foundation::EventLoopHandle;
use atoll_foundation::sync::lock;
use vm_memory::VolatileSlice;

use crate::header::{FrameHeader, Offloads};
use crate::port::{MAX_FRAME, Port, PortError, PortEvent, PortListener, Received, Sent, Taken, Watcher};

/// One end of [`pair()`].
pub struct MemoryPort {
    name: &'static str,
    mtu: Option<u16>,
    send_offloads: Offloads,
    receive_offloads: Offloads,
    own: Arc<Side>,
    other: Arc<Side>,
}

/// What one end receives from and is told by.
struct Side {
    inbound: Vec<Mutex<Inbound>>,
    state: Mutex<State>,
    watcher: Watcher,
}

struct Inbound {
    frames: VecDeque<(FrameHeader, Vec<u8>)>,
    /// Frames that it holds.
    room: usize,
    /// The receiver found nothing and waits.
    reader_waits: bool,
    /// The sender found no room and waits.
    writer_waits: bool,
}

struct State {
    link: bool,
    gone: Option<String>,
    offloads: Offloads,
}

/// Two connected ports with `pairs` pairs; each direction of each pair holds `room` frames (both at least 1).
/// Both links are up, both take every offload of [`Offloads::TCP`].
pub fn pair(pairs: u16, room: usize) -> (MemoryPort, MemoryPort) {
    let side = || {
        let inbound = || Inbound {
            frames: VecDeque::new(),
            room: room.max(1),
            reader_waits: true,
            writer_waits: false,
        };
        let inbound = (0..pairs.max(1)).map(|_| Mutex::new(inbound())).collect();
        let state = Mutex::new(State { link: true, gone: None, offloads: Offloads::NONE });
        Arc::new(Side { inbound, state, watcher: Watcher::default() })
    };
    let (a, b) = (side(), side());
    let port = |name, own: &Arc<Side>, other: &Arc<Side>| MemoryPort {
        name,
        mtu: None,
        send_offloads: Offloads::TCP,
        receive_offloads: Offloads::TCP,
        own: own.clone(),
        other: other.clone(),
    };
    (port("test port a", &a, &b), port("test port b", &b, &a))
}

impl MemoryPort {
    /// Says what [`Port::mtu`] says.
    #[must_use]
    pub fn with_mtu(self, mtu: u16) -> Self {
        Self { mtu: Some(mtu), ..self }
    }

    /// Says what [`Port::send_offloads`] and [`Port::receive_offloads`] say.
    #[must_use]
    pub fn with_offloads(self, send: Offloads, receive: Offloads) -> Self {
        Self { send_offloads: send, receive_offloads: receive, ..self }
    }

    /// Sets the link state that the other port shows, and tells its listener.
    pub fn set_other_link(&self, up: bool) {
        lock(&self.other.state).link = up;
        self.other.watcher.post(PortEvent::Link(up));
    }

    /// Makes every further use of the other port fail with [`PortError::Gone`].
    pub fn fail_other(&self, reason: &str) {
        lock(&self.other.state).gone = Some(reason.to_owned());
        self.other.watcher.post(PortEvent::Link(false));
    }

    /// What the other port was last given by [`Port::set_receive_offloads`].
    pub fn other_receive_offloads(&self) -> Offloads {
        lock(&self.other.state).offloads
    }

    /// Sends one frame and flushes; panics when the port has failed.
    pub fn send_bytes(&self, pair: u16, header: &FrameHeader, frame: &[u8]) -> Sent {
        let mut frame = frame.to_vec();
        let sent = self.send(pair, header, &[VolatileSlice::from(&mut frame[..])]);
        self.flush(pair);
        sent.expect("the test port has failed")
    }

    /// Takes the next frame; panics when the port has failed.
    pub fn receive_bytes(&self, pair: u16) -> Option<(FrameHeader, Vec<u8>)> {
        let mut result = None;
        let mut take = |header: &FrameHeader, frame: &[u8]| {
            result = Some((*header, frame.to_vec()));
            Taken::Yes
        };
        self.receive(pair, &mut take).expect("the test port has failed");
        result
    }

    fn check(&self) -> Result<(), PortError> {
        match &lock(&self.own.state).gone {
            Some(reason) => Err(PortError::Gone { port: self.name(), reason: reason.clone() }),
            None => Ok(()),
        }
    }

    fn inbound<'a>(&self, side: &'a Side, pair: u16) -> Result<MutexGuard<'a, Inbound>, PortError> {
        self.check()?;
        side.inbound.get(usize::from(pair)).map(lock).ok_or_else(|| PortError::Host {
            port: self.name(),
            source: io::Error::new(io::ErrorKind::InvalidInput, format!("it has no pair {pair}")),
        })
    }
}

impl Port for MemoryPort {
    fn name(&self) -> String {
        self.name.to_owned()
    }

    fn queue_pairs(&self) -> u16 {
        self.own.inbound.len() as u16
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
        self.check()?;
        lock(&self.own.state).offloads = offloads;
        Ok(())
    }

    fn watch(&self, events: &EventLoopHandle, listener: PortListener) -> io::Result<()> {
        self.own.watcher.set(events, listener)?;
        for pair in 0..self.queue_pairs() {
            self.own.watcher.post(PortEvent::Readable(pair));
        }
        Ok(())
    }

    fn send(&self, pair: u16, header: &FrameHeader, frame: &[VolatileSlice<'_>]) -> Result<Sent, PortError> {
        let mut inbound = self.inbound(&self.other, pair)?;
        if inbound.frames.len() >= inbound.room {
            inbound.writer_waits = true;
            return Ok(Sent::Full);
        }
        let len: usize = frame.iter().map(|piece| piece.len()).sum();
        assert!(len <= MAX_FRAME, "a frame of {len} bytes");
        let mut bytes = vec![0; len];
        let mut rest = &mut bytes[..];
        for piece in frame {
            let (now, later) = rest.split_at_mut(piece.len());
            piece.copy_to(now);
            rest = later;
        }
        inbound.frames.push_back((*header, bytes));
        Ok(Sent::Done)
    }

    fn flush(&self, pair: u16) {
        let Ok(mut inbound) = self.inbound(&self.other, pair) else { return };
        if !inbound.frames.is_empty() && std::mem::take(&mut inbound.reader_waits) {
            drop(inbound);
            self.other.watcher.post(PortEvent::Readable(pair));
        }
    }

    fn receive(
        &self,
        pair: u16,
        take: &mut dyn FnMut(&FrameHeader, &[u8]) -> Taken,
    ) -> Result<Received, PortError> {
        let mut inbound = self.inbound(&self.own, pair)?;
        let Some((header, frame)) = inbound.frames.pop_front() else {
            inbound.reader_waits = true;
            return Ok(Received::Empty);
        };
        // Not under the lock: the caller may send on the same pair meanwhile.
        drop(inbound);
        if take(&header, &frame) == Taken::NotNow {
            self.inbound(&self.own, pair)?.frames.push_front((header, frame));
            return Ok(Received::Kept);
        }
        let mut inbound = self.inbound(&self.own, pair)?;
        let half_free = inbound.frames.len() <= inbound.room / 2;
        if half_free && std::mem::take(&mut inbound.writer_waits) {
            drop(inbound);
            self.other.watcher.post(PortEvent::Writable(pair));
        }
        Ok(Received::Frame)
    }

    fn link_up(&self) -> bool {
        let state = lock(&self.own.state);
        state.link && state.gone.is_none()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use atoll_foundation::EventLoop;
    use std::time::Duration;

    fn watched(port: &MemoryPort, events: &EventLoop) -> Arc<Mutex<Vec<PortEvent>>> {
        let seen = Arc::new(Mutex::new(Vec::new()));
        let sink = seen.clone();
        port.watch(&events.handle(), Arc::new(move |event| lock(&sink).push(event))).unwrap();
        seen
    }

    fn round(events: &mut EventLoop) {
        while events.run_once(Some(Duration::ZERO)).unwrap() > 0 {}
    }

    #[test]
    fn what_one_end_sends_the_other_receives_and_is_told_of_once() {
        let mut events = EventLoop::new().unwrap();
        let (a, b) = pair(2, 4);
        let seen = watched(&b, &events);
        round(&mut events);
        lock(&seen).clear();
        assert_eq!(b.receive_bytes(1), None);
        a.send_bytes(1, &FrameHeader::default(), &[1; 60]);
        a.send_bytes(1, &FrameHeader::default(), &[2; 60]);
        round(&mut events);
        assert_eq!(*lock(&seen), [PortEvent::Readable(1)]);
        assert_eq!(b.receive_bytes(1).unwrap().1, [1; 60]);
        assert_eq!(b.receive(1, &mut |_, _| Taken::NotNow).unwrap(), Received::Kept);
        assert_eq!(b.receive_bytes(1).unwrap().1, [2; 60]);
        assert_eq!(b.receive_bytes(0), None);
    }

    #[test]
    fn a_full_direction_says_so_and_tells_when_half_is_free() {
        let mut events = EventLoop::new().unwrap();
        let (a, b) = pair(1, 4);
        let seen = watched(&a, &events);
        round(&mut events);
        lock(&seen).clear();
        let header = FrameHeader::default();
        let sent: Vec<Sent> = (0..5).map(|n| a.send_bytes(0, &header, &[n; 20])).collect();
        assert_eq!(sent, [Sent::Done, Sent::Done, Sent::Done, Sent::Done, Sent::Full]);
        b.receive_bytes(0).unwrap();
        round(&mut events);
        assert!(lock(&seen).is_empty());
        b.receive_bytes(0).unwrap();
        round(&mut events);
        assert_eq!(*lock(&seen), [PortEvent::Writable(0)]);
    }

    #[test]
    fn link_and_failure_are_shown() {
        let (a, b) = pair(1, 4);
        a.set_other_link(false);
        assert!(!b.link_up() && a.link_up());
        a.fail_other("unplugged");
        let error = b.receive(0, &mut |_, _| Taken::Yes).unwrap_err();
        assert_eq!(error.to_string(), "test port b is gone: unplugged");
    }
}
