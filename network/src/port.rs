//! The trait between a network device and what carries its frames.
//!
//! # What a device may assume
//!
//! * A port has `queue_pairs` independent pairs of directions, counted from 0. Methods take `&self`; different
//!   pairs may be used from several threads at once, one pair's `send` by one thread at a time and its `receive`
//!   by one thread at a time.
//! * Frames are Ethernet frames without checksum sequence (FCS). They are carried whole or not at all, in order
//!   within a pair.
//! * `send` and `receive` never wait. After [`Sent::Full`] a [`PortEvent::Writable`] follows for that pair when
//!   there is room again, after [`Received::Empty`] a [`PortEvent::Readable`] when there is a frame; events may
//!   also come without need.
//! * Nothing of a frame is trusted by either side: lengths and headers are checked by who reads them.

use std::fmt;
use std::io;
use std::str::FromStr;
use std::sync::{Arc, OnceLock};

use atoll_foundation::EventLoopHandle;
use vm_memory::VolatileSlice;

use crate::header::{FrameHeader, Offloads};

/// Largest frame that any port carries, in bytes: an IP packet of 65,535 bytes and its Ethernet header with a
/// VLAN tag.
pub const MAX_FRAME: usize = 65_535 + 18;

/// An Ethernet address.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct MacAddress(pub [u8; 6]);

impl fmt::Display for MacAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

impl fmt::Debug for MacAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// A text that is not an Ethernet address.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("'{}' is not an Ethernet address; expected six bytes such as 52:54:00:12:34:56, not a multicast address", .0.escape_debug())]
pub struct ParseMacError(pub String);

impl FromStr for MacAddress {
    type Err = ParseMacError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let error = || ParseMacError(text.to_owned());
        let mut bytes = [0; 6];
        let mut parts = text.split(':');
        for byte in &mut bytes {
            let part = parts.next().filter(|part| part.len() == 2).ok_or_else(error)?;
            *byte = u8::from_str_radix(part, 16).map_err(|_| error())?;
        }
        if parts.next().is_some() || bytes[0] & 1 != 0 || bytes == [0; 6] {
            return Err(error());
        }
        Ok(Self(bytes))
    }
}

/// What became of a frame given to [`Port::send`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sent {
    /// It is on its way, or was dropped as networks do.
    Done,
    /// No room; nothing was taken. Try again after [`PortEvent::Writable`].
    Full,
}

/// What became of a call of [`Port::receive`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Received {
    /// A frame was given to the caller, who took it.
    Frame,
    /// There was none.
    Empty,
    /// There was one, the caller did not take it, and it will be there at the next call.
    Kept,
}

/// What the caller of [`Port::receive`] did with a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Taken {
    /// Taken (or dropped): it is gone.
    Yes,
    /// No buffers: keep it for the next call.
    NotNow,
}

/// What a port tells its device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PortEvent {
    /// The pair may have frames.
    Readable(u16),
    /// The pair may have room.
    Writable(u16),
    /// The other side came or went: the device shows it as its link state.
    Link(bool),
}

/// Receives a port's events, on the event loop's thread.
pub type PortListener = Arc<dyn Fn(PortEvent) + Send + Sync>;

/// Who watches a port, once [`Port::watch`] has said so; for the ports' own use.
#[derive(Default)]
pub(crate) struct Watcher(OnceLock<(EventLoopHandle, PortListener)>);

impl Watcher {
    /// Keeps whom to tell. A second time is an error (`AlreadyExists`).
    pub(crate) fn set(&self, events: &EventLoopHandle, listener: PortListener) -> io::Result<()> {
        self.0
            .set((events.clone(), listener))
            .map_err(|_| io::Error::new(io::ErrorKind::AlreadyExists, "the port is already watched"))
    }

    /// The loop and the listener, if there is one.
    pub(crate) fn get(&self) -> Option<&(EventLoopHandle, PortListener)> {
        self.0.get()
    }

    /// Tells the listener, if there is one, from the event loop's thread.
    pub(crate) fn post(&self, event: PortEvent) {
        if let Some((events, listener)) = self.get() {
            let listener = listener.clone();
            events.post(move || listener(event));
        }
    }
}

/// A port that has failed for good.
#[derive(Debug, thiserror::Error)]
pub enum PortError {
    /// The other side ended or broke the rules of the connection.
    #[error("{port} is gone: {reason}")]
    Gone {
        /// Names the port.
        port: String,
        /// Why.
        reason: String,
    },
    /// The host failed.
    #[error("{port} failed: {source}")]
    Host {
        /// Names the port.
        port: String,
        /// The host's error.
        source: io::Error,
    },
}

/// Something that carries frames between a machine and the world. The module's documentation has the rules.
pub trait Port: Send + Sync {
    /// What it is, for messages: "tap device tap0".
    fn name(&self) -> String;

    /// How many pairs of directions it has, at least 1.
    fn queue_pairs(&self) -> u16;

    /// Largest IP packet that it carries (the MTU), in bytes, when it says so.
    fn mtu(&self) -> Option<u16>;

    /// Which unfinished frames [`Port::send`] takes.
    fn send_offloads(&self) -> Offloads;

    /// Which unfinished frames [`Port::receive`] could give. None come until [`Port::set_receive_offloads`].
    fn receive_offloads(&self) -> Offloads;

    /// Which unfinished frames [`Port::receive`] may give from now on, a part of [`Port::receive_offloads`].
    /// Frames already on their way may still be of the old kind.
    fn set_receive_offloads(&self, offloads: Offloads) -> Result<(), PortError>;

    /// Starts telling `listener` what happens, from `events`' thread. Called once, before any frame moves. The
    /// registration ends when the port is dropped.
    fn watch(&self, events: &EventLoopHandle, listener: PortListener) -> io::Result<()>;

    /// Sends the frame in `frame`'s buffers, in order, together at most [`MAX_FRAME`] bytes.
    fn send(&self, pair: u16, header: &FrameHeader, frame: &[VolatileSlice<'_>]) -> Result<Sent, PortError>;

    /// Tells the other side about what was sent: called at the end of a batch.
    fn flush(&self, pair: u16);

    /// Shows the next frame to `take`, at most [`MAX_FRAME`] bytes.
    fn receive(
        &self,
        pair: u16,
        take: &mut dyn FnMut(&FrameHeader, &[u8]) -> Taken,
    ) -> Result<Received, PortError>;

    /// Whether the other side is there.
    fn link_up(&self) -> bool {
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_read_and_shown() {
        let mac: MacAddress = "52:54:00:12:34:Ff".parse().unwrap();
        assert_eq!(mac.to_string(), "52:54:00:12:34:ff");
        let bad = [
            "",
            "52:54:00:12:34",
            "52:54:00:12:34:56:78",
            "1:2:3:4:5:6",
            "01:00:5e:00:00:01",
            "00:00:00:00:00:00",
        ];
        for text in bad {
            assert!(text.parse::<MacAddress>().is_err(), "{text}");
        }
    }
}
