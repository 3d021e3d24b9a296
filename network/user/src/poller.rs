//! Waiting for sockets: the trait through which protocols ask the engine to watch a descriptor, and its epoll.
//!
//! A token names what a descriptor belongs to. Its upper byte is the owner ([`Owner`]), the rest is the owner's.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::event::epoll;

/// Bits of a token that its owner may choose.
pub const TOKEN_BITS: u32 = 56;

/// Whom a readiness is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Owner {
    /// The ring and the control socket.
    Engine = 0,
    /// The table of TCP flows.
    Tcp = 1,
    /// The table of UDP flows.
    Udp = 2,
    /// Queries on their way to a resolver.
    Dns = 3,
    /// Sockets for ICMP echo.
    Echo = 4,
    /// Sockets of port forwards.
    Forward = 5,
    /// The table of UDP flows to DNS servers.
    UdpQueries = 6,
}

impl Owner {
    /// The token of this owner's `value`, of which the lower [`TOKEN_BITS`] bits count.
    pub const fn token(self, value: u64) -> u64 {
        (self as u64) << TOKEN_BITS | value & ((1 << TOKEN_BITS) - 1)
    }

    /// Takes a token apart. `None`: it is nobody's.
    pub const fn of(token: u64) -> Option<(Self, u64)> {
        let value = token & ((1 << TOKEN_BITS) - 1);
        let owner = match token >> TOKEN_BITS {
            0 => Self::Engine,
            1 => Self::Tcp,
            2 => Self::Udp,
            3 => Self::Dns,
            4 => Self::Echo,
            5 => Self::Forward,
            6 => Self::UdpQueries,
            _ => return None,
        };
        Some((owner, value))
    }
}

/// What became of a watched descriptor.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Readiness {
    /// It can be read, or has an error or an end to tell.
    pub readable: bool,
    /// It can be written, or has an error to tell.
    pub writable: bool,
    /// It has an error (`SO_ERROR`).
    pub error: bool,
    /// Both directions are closed.
    pub hung_up: bool,
}

/// What watches descriptors. Tokens given to it are whole: made with [`Owner::token`].
pub trait Poller {
    /// Starts watching `fd`, or changes how it is watched. With `edge`, a readiness is told once per change.
    fn watch(
        &mut self,
        fd: BorrowedFd<'_>,
        token: u64,
        readable: bool,
        writable: bool,
        edge: bool,
    ) -> io::Result<()>;

    /// Stops watching. A readiness that was taken from the kernel before may still be told. Closing a descriptor
    /// that has no duplicate does the same.
    fn unwatch(&mut self, fd: BorrowedFd<'_>);
}

/// Most readinesses told at once.
const BATCH: usize = 256;

/// The kernel's epoll.
pub struct Epoll {
    fd: OwnedFd,
    events: Vec<epoll::Event>,
}

impl Epoll {
    /// An empty one.
    pub fn new() -> io::Result<Self> {
        let fd = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        Ok(Self { fd, events: Vec::with_capacity(BATCH) })
    }

    /// Waits up to `timeout` (for ever without) and tells what is ready into `ready`, which is cleared before.
    pub fn wait(
        &mut self,
        timeout: Option<std::time::Duration>,
        ready: &mut Vec<(u64, Readiness)>,
    ) -> io::Result<()> {
        ready.clear();
        self.events.clear();
        let timeout = timeout.map(|timeout| {
            // The kernel takes nanoseconds; more than a day is as good as for ever.
            let timeout = timeout.min(std::time::Duration::from_secs(86_400));
            rustix::event::Timespec {
                tv_sec: timeout.as_secs() as i64,
                tv_nsec: i64::from(timeout.subsec_nanos()),
            }
        });
        let spare = rustix::buffer::spare_capacity(&mut self.events);
        match epoll::wait(&self.fd, spare, timeout.as_ref()) {
            Ok(_) => {}
            Err(rustix::io::Errno::INTR) => return Ok(()),
            Err(error) => return Err(error.into()),
        }
        ready.extend(self.events.iter().map(|event| {
            let flags = event.flags;
            let error = flags.contains(epoll::EventFlags::ERR);
            let hung_up = flags.contains(epoll::EventFlags::HUP);
            let end = hung_up || flags.contains(epoll::EventFlags::RDHUP);
            let readiness = Readiness {
                readable: flags.contains(epoll::EventFlags::IN) || error || end,
                writable: flags.contains(epoll::EventFlags::OUT) || error || hung_up,
                error,
                hung_up,
            };
            (event.data.u64(), readiness)
        }));
        Ok(())
    }
}

impl AsFd for Epoll {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl Poller for Epoll {
    fn watch(
        &mut self,
        fd: BorrowedFd<'_>,
        token: u64,
        readable: bool,
        writable: bool,
        edge: bool,
    ) -> io::Result<()> {
        let mut flags = epoll::EventFlags::empty();
        flags.set(epoll::EventFlags::IN | epoll::EventFlags::RDHUP, readable);
        flags.set(epoll::EventFlags::OUT, writable);
        flags.set(epoll::EventFlags::ET, edge);
        let data = epoll::EventData::new_u64(token);
        match epoll::add(&self.fd, fd, data, flags) {
            Err(rustix::io::Errno::EXIST) => Ok(epoll::modify(&self.fd, fd, data, flags)?),
            result => Ok(result?),
        }
    }

    fn unwatch(&mut self, fd: BorrowedFd<'_>) {
        // Fails only when it was not watched.
        let _ = epoll::delete(&self.fd, fd);
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;
    use std::os::unix::net::UnixStream;
    use std::time::Duration;

    use super::*;

    #[test]
    fn tokens_name_their_owner() {
        assert_eq!(Owner::of(Owner::Udp.token(7)), Some((Owner::Udp, 7)));
        assert_eq!(Owner::of(Owner::Forward.token(u64::MAX)), Some((Owner::Forward, (1 << TOKEN_BITS) - 1)));
        assert_eq!(Owner::of(u64::MAX), None);
    }

    #[test]
    fn a_descriptor_is_told_until_it_is_not_watched() {
        let mut epoll = Epoll::new().unwrap();
        let (near, mut far) = UnixStream::pair().unwrap();
        let mut ready = Vec::new();
        epoll.watch(near.as_fd(), 9, true, false, false).unwrap();
        epoll.wait(Some(Duration::ZERO), &mut ready).unwrap();
        assert!(ready.is_empty());
        far.write_all(b"x").unwrap();
        epoll.wait(None, &mut ready).unwrap();
        assert_eq!(ready, [(9, Readiness { readable: true, ..Readiness::default() })]);
        epoll.watch(near.as_fd(), 9, true, true, true).unwrap();
        epoll.wait(None, &mut ready).unwrap();
        assert!(ready[0].1.writable && ready[0].1.readable);
        epoll.wait(Some(Duration::ZERO), &mut ready).unwrap();
        assert!(ready.is_empty(), "an edge is told once");
        drop(far);
        epoll.wait(None, &mut ready).unwrap();
        assert!(ready[0].1.hung_up);
        epoll.unwatch(near.as_fd());
        epoll.wait(Some(Duration::ZERO), &mut ready).unwrap();
        assert!(ready.is_empty());
    }
}
