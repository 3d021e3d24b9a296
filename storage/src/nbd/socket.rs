//! Connections to servers: TCP or Unix, with a limit on every wait.

use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpStream, ToSocketAddrs};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec};
use vm_memory::{ReadVolatile, VolatileMemoryError, VolatileSlice, WriteVolatile};

use super::uri::NbdServer;

/// A connected socket.
#[derive(Debug)]
pub(super) enum Socket {
    Tcp(TcpStream),
    Unix(UnixStream),
}

impl Socket {
    /// Connects. All addresses of a host's name are tried, each for `limit` at most.
    pub(super) fn connect(server: &NbdServer, limit: Duration) -> io::Result<Self> {
        match server {
            NbdServer::Unix(path) => UnixStream::connect(path).map(Self::Unix),
            NbdServer::Tcp(host, port) => {
                let mut last = io::Error::new(io::ErrorKind::NotFound, "the host's name has no address");
                for address in (host.as_str(), *port).to_socket_addrs()? {
                    match TcpStream::connect_timeout(&address, limit) {
                        Ok(stream) => {
                            // A request goes out at once; it is one write or followed by its own data.
                            stream.set_nodelay(true)?;
                            return Ok(Self::Tcp(stream));
                        }
                        Err(error) => last = error,
                    }
                }
                Err(last)
            }
        }
    }

    fn set_timeouts(&self, read: Duration, write: Duration) -> io::Result<()> {
        match self {
            Self::Tcp(stream) => {
                stream.set_read_timeout(Some(read)).and_then(|()| stream.set_write_timeout(Some(write)))
            }
            Self::Unix(stream) => {
                stream.set_read_timeout(Some(read)).and_then(|()| stream.set_write_timeout(Some(write)))
            }
        }
    }

    /// Limits how long one read or write waits for the server to do anything.
    pub(super) fn set_patience(&self, limit: Duration) -> io::Result<()> {
        self.set_timeouts(limit, limit)
    }

    /// Ends both directions: whoever waits on it fails.
    pub(super) fn shut_down(&self) {
        let _ = match self {
            Self::Tcp(stream) => stream.shutdown(Shutdown::Both),
            Self::Unix(stream) => stream.shutdown(Shutdown::Both),
        };
    }

    /// Whether something is to be read now, the end of the connection included.
    pub(super) fn has_input(&self) -> bool {
        let mut list = [PollFd::new(self, PollFlags::IN)];
        let at_once = Timespec { tv_sec: 0, tv_nsec: 0 };
        rustix::event::poll(&mut list, Some(&at_once)).is_ok_and(|count| count != 0)
    }

    pub(super) fn read_exact(&self, bytes: &mut [u8]) -> io::Result<()> {
        match self {
            Self::Tcp(stream) => (&*stream).read_exact(bytes),
            Self::Unix(stream) => (&*stream).read_exact(bytes),
        }
    }

    pub(super) fn write_all(&self, bytes: &[u8]) -> io::Result<()> {
        match self {
            Self::Tcp(stream) => (&*stream).write_all(bytes),
            Self::Unix(stream) => (&*stream).write_all(bytes),
        }
    }

    /// Fills buffers that others may change meanwhile.
    pub(super) fn read_buffers(&self, buffers: &[VolatileSlice<'_>]) -> io::Result<()> {
        let mut fd = self.as_fd();
        for buffer in buffers {
            let mut buffer = *buffer;
            fd.read_exact_volatile(&mut buffer).map_err(host_error)?;
        }
        Ok(())
    }

    /// Sends buffers that others may change meanwhile.
    pub(super) fn write_buffers(&self, buffers: &[VolatileSlice<'_>]) -> io::Result<()> {
        let mut fd = self.as_fd();
        for buffer in buffers {
            fd.write_all_volatile(buffer).map_err(host_error)?;
        }
        Ok(())
    }
}

impl AsFd for Socket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Tcp(stream) => stream.as_fd(),
            Self::Unix(stream) => stream.as_fd(),
        }
    }
}

fn host_error(error: VolatileMemoryError) -> io::Error {
    match error {
        VolatileMemoryError::IOError(error) => error,
        other => io::Error::other(other),
    }
}

/// A socket that everything has to be done with before a moment: a server that sends a byte now and then does
/// not hold anybody up.
pub(super) struct Deadline<'a> {
    socket: &'a Socket,
    end: Instant,
}

impl<'a> Deadline<'a> {
    pub(super) fn new(socket: &'a Socket, limit: Duration) -> Self {
        Self { socket, end: Instant::now() + limit }
    }

    fn arm(&self) -> io::Result<()> {
        let left = self.end.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(io::ErrorKind::TimedOut.into());
        }
        self.socket.set_timeouts(left, left)
    }
}

impl Read for Deadline<'_> {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        self.arm()?;
        match self.socket {
            Socket::Tcp(stream) => (&*stream).read(bytes),
            Socket::Unix(stream) => (&*stream).read(bytes),
        }
    }
}

impl Write for Deadline<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.arm()?;
        match self.socket {
            Socket::Tcp(stream) => (&*stream).write(bytes),
            Socket::Unix(stream) => (&*stream).write(bytes),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// What an error of a socket means, in words: the host's text for a wait that ended is about resources.
pub(super) fn explain(error: &io::Error) -> String {
    match error.kind() {
        io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => "the server did not answer in time".to_owned(),
        io::ErrorKind::UnexpectedEof => "the server closed the connection".to_owned(),
        _ => error.to_string(),
    }
}
