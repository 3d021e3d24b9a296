//! A non-blocking TCP socket of the host with exactly what the NAT does with one: connect, send, peek, discard,
//! end, reset.
//!
//! No call here waits; where a call would, it says so with [`io::ErrorKind::WouldBlock`]. Signals that interrupt a
//! call are dealt with inside. The system calls: `socket`, `connect`, `getsockopt`, `setsockopt`, `sendto`,
//! `recvmsg`, `recvfrom`, `shutdown`, `close`, `fcntl` (F_GETFL), and `poll` on kernels before 6.9.

use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use atoll_foundation::tcp_socket::{self, SendQueue};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SendFlags, Shutdown, SocketFlags, SocketType, ipproto, sockopt};

/// A peek position that the kernel surely does not have, so that the next peek sets it.
const UNKNOWN: u32 = u32::MAX;

/// A TCP socket. Dropping it closes the connection in order: what was sent still goes out.
#[derive(Debug)]
pub struct TcpSocket {
    fd: OwnedFd,
    /// Where the kernel's next peek starts (SO_PEEK_OFF), counted from the head of the receive queue; `None` where
    /// the kernel has no such thing.
    peeks_at: Option<u32>,
}

/// How far [`TcpSocket::connect`] got.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Connecting {
    /// Connected already, as happens on the host itself.
    Done,
    /// The socket becomes writable when it is connected or has failed: see [`TcpSocket::take_error`].
    InProgress,
}

impl TcpSocket {
    /// Starts connecting to `to`. The errors are those of the host: its text names nothing, the caller does.
    pub fn connect(to: SocketAddr) -> io::Result<(Self, Connecting)> {
        let family = if to.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let fd = rustix::net::socket_with(family, SocketType::STREAM, flags, Some(ipproto::TCP))?;
        let socket = Self::prepare(fd)?;
        match rustix::net::connect(&socket.fd, &to) {
            Ok(()) => Ok((socket, Connecting::Done)),
            Err(Errno::INPROGRESS | Errno::INTR) => Ok((socket, Connecting::InProgress)),
            Err(error) => Err(error.into()),
        }
    }

    /// Takes a connection that was accepted on the host. It becomes non-blocking if it is not.
    pub fn accepted(fd: OwnedFd) -> io::Result<Self> {
        // The jail leaves no way to change this; who accepts asks for it right away.
        let flags = rustix::fs::fcntl_getfl(&fd)?;
        if !flags.contains(rustix::fs::OFlags::NONBLOCK) {
            rustix::fs::fcntl_setfl(&fd, flags | rustix::fs::OFlags::NONBLOCK)?;
        }
        Self::prepare(fd)
    }

    fn prepare(fd: OwnedFd) -> io::Result<Self> {
        // The guest's own TCP has decided when a segment goes; a second such decision would only delay it.
        sockopt::set_tcp_nodelay(&fd, true)?;
        // An urgent byte stays in the stream: otherwise peeks and discards would count differently.
        sockopt::set_socket_oobinline(&fd, true)?;
        let peeks_at = tcp_socket::set_peek_offset(&fd, 0).is_ok().then_some(0);
        Ok(Self { fd, peeks_at })
    }

    /// The error that the connection has met, if any; the host reports it once.
    pub fn take_error(&self) -> Option<io::Error> {
        match sockopt::socket_error(&self.fd) {
            Ok(Ok(())) => None,
            Ok(Err(error)) | Err(error) => Some(error.into()),
        }
    }

    /// Hands `data` to the host's kernel and returns how many bytes it took. With `more`, others follow soon: a
    /// segment that is not full waits for them, or for [`TcpSocket::push`].
    pub fn send(&self, data: &[u8], more: bool) -> io::Result<usize> {
        let mut flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
        flags.set(SendFlags::MORE, more);
        Ok(rustix::io::retry_on_intr(|| rustix::net::send(&self.fd, data, flags))?)
    }

    /// Nothing follows for now: what waits is sent.
    pub fn push(&self) {
        // Setting the option again, which is set, has the kernel send what it has (tcp(7)). An error would be the
        // connection's, of which the next call tells.
        let _ = sockopt::set_tcp_nodelay(&self.fd, true);
    }

    /// How full the send queue is.
    pub fn send_queue(&self) -> io::Result<SendQueue> {
        tcp_socket::send_queue(&self.fd)
    }

    /// Copies received bytes to `into`, from `position` bytes behind the first one that was not discarded, and
    /// leaves them there. `Ok(0)` is the end of the stream, `WouldBlock` that there are no more yet.
    pub fn peek(&mut self, position: u32, into: &mut [u8]) -> io::Result<usize> {
        let Some(at) = self.peeks_at else {
            return retry(|| tcp_socket::peek_after(&self.fd, position as usize, into));
        };
        if at != position {
            self.peeks_at = Some(UNKNOWN);
            tcp_socket::set_peek_offset(&self.fd, position)?;
            self.peeks_at = Some(position);
        }
        let got = retry(|| tcp_socket::peek_after(&self.fd, 0, into))?;
        self.peeks_at = Some(position.wrapping_add(u32::try_from(got).unwrap_or(UNKNOWN)));
        Ok(got)
    }

    /// Largest `position` of [`TcpSocket::peek`], in bytes.
    pub fn peek_limit(&self) -> u32 {
        match self.peeks_at {
            Some(_) => i32::MAX as u32,
            None => tcp_socket::MAX_SKIP as u32,
        }
    }

    /// Removes `count` bytes, all of which were peeked at, from the receive queue.
    pub fn discard(&mut self, count: u32) -> io::Result<()> {
        let mut left = count;
        while left > 0 {
            match retry(|| tcp_socket::discard(&self.fd, left as usize))? {
                0 => return Err(io::ErrorKind::UnexpectedEof.into()),
                gone => left = left.saturating_sub(u32::try_from(gone).unwrap_or(u32::MAX)),
            }
        }
        // The kernel moves its position back by what goes, but not before the head.
        self.peeks_at = self.peeks_at.map(|at| if at == UNKNOWN { at } else { at.saturating_sub(count) });
        Ok(())
    }

    /// Tells the peer that nothing more will be sent.
    pub fn end(&self) -> io::Result<()> {
        Ok(rustix::net::shutdown(&self.fd, Shutdown::Write)?)
    }

    /// Has the host's kernel ask the peer for a sign of life after `idle` without any.
    pub fn keep_alive(&self, idle: Duration) {
        // The host's limits are 1 to 32,767 seconds. A refusal costs the probes, nothing else.
        let idle = Duration::from_secs(idle.as_secs().clamp(1, 32_767));
        let _ = sockopt::set_tcp_keepidle(&self.fd, idle);
        let _ = sockopt::set_socket_keepalive(&self.fd, true);
    }

    /// Closes at once: the peer gets a RST, what was not sent is lost.
    pub fn reset(self) {
        // A refusal makes it an orderly close.
        let _ = sockopt::set_socket_linger(&self.fd, Some(Duration::ZERO));
    }

    /// Does without the kernel's peek position, as kernels before 6.9 make it.
    #[cfg(test)]
    pub(crate) fn without_peek_offset(&mut self) {
        // -1 switches the position off; peeks then start at the head.
        self.peeks_at = None;
        tcp_socket::clear_peek_offset(&self.fd).unwrap();
    }
}

impl AsFd for TcpSocket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

fn retry<T>(mut call: impl FnMut() -> io::Result<T>) -> io::Result<T> {
    loop {
        match call() {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            result => return result,
        }
    }
}
