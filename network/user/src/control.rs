//! Messages between a machine's process and its network's: JSON, one message per packet of a `SOCK_SEQPACKET`
//! socket. The first brings the descriptors of the ring.
//!
//! ```text
//!   client                          process
//!     Start{config} + 5 descriptors ─▶   bind forwards, read resolvers, attach the ring, enter the jail
//!                                   ◀─ Ready   (or Failed, and the process ends)
//!     AddForward, RemoveForward, Stats ─▶ ◀─ Done, Stats or Failed, one reply per request, in order
//!     (hang-up)                     ─▶   the process ends
//! ```

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags,
};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::config::{Forward, UserNetConfig};
use crate::stats::Stats;

/// Largest message, bytes: a start with the most forwards.
pub const MAX_MESSAGE: usize = 192 << 10;
/// Most descriptors of a message.
const MAX_FDS: usize = 8;

/// What the machine's process asks.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Request {
    /// Begin. The descriptors of the ring come with it.
    Start(Box<UserNetConfig>),
    /// Forward another port.
    AddForward(Forward),
    /// Forward a port no longer.
    RemoveForward(Forward),
    /// Tell the counters.
    Stats,
}

/// What the network's process answers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Reply {
    /// It has begun.
    Ready,
    /// It is done.
    Done,
    /// The counters.
    Stats(Box<Stats>),
    /// It cannot be, in one line.
    Failed(String),
}

/// Sends a message. Waits until there is room for it, unless `flags` forbid that (`WouldBlock`).
pub fn send(
    socket: impl AsFd,
    message: &impl Serialize,
    fds: &[OwnedFd],
    flags: SendFlags,
) -> io::Result<()> {
    let bytes = serde_json::to_vec(message)?;
    if bytes.len() > MAX_MESSAGE {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "the message is too long"));
    }
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    let borrowed: Vec<_> = fds.iter().map(AsFd::as_fd).collect();
    if !fds.is_empty() && !ancillary.push(SendAncillaryMessage::ScmRights(&borrowed)) {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "too many descriptors"));
    }
    rustix::net::sendmsg(socket, &[IoSlice::new(&bytes)], &mut ancillary, flags | SendFlags::NOSIGNAL)?;
    Ok(())
}

/// Receives a message. `None`: the other side is gone.
pub fn receive<T: DeserializeOwned>(
    socket: impl AsFd,
    flags: RecvFlags,
) -> io::Result<Option<(T, Vec<OwnedFd>)>> {
    let mut bytes = vec![0; MAX_MESSAGE];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let flags = flags | RecvFlags::CMSG_CLOEXEC;
    let received = loop {
        let result = rustix::net::recvmsg(&socket, &mut [IoSliceMut::new(&mut bytes)], &mut ancillary, flags);
        match result {
            Err(rustix::io::Errno::INTR) => {}
            Err(rustix::io::Errno::CONNRESET) => return Ok(None),
            result => break result?,
        }
    };
    let fds = ancillary
        .drain()
        .filter_map(|message| match message {
            RecvAncillaryMessage::ScmRights(fds) => Some(fds),
            _ => None,
        })
        .flatten()
        .collect();
    if received.bytes == 0 {
        return Ok(None);
    }
    let message = serde_json::from_slice(bytes.get(..received.bytes).unwrap_or_default())?;
    Ok(Some((message, fds)))
}
