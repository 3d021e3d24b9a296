//! What TCP sockets of Linux offer beyond what has a safe wrapper: reading without consuming from any position of
//! the receive queue, throwing received bytes away without copying them, and asking how full the send queue is.
//!
//! All descriptors are expected to be TCP sockets; others get the kernel's error. No call here waits.

#![allow(unsafe_code)]
// UNSAFETY: SO_PEEK_OFF, SO_MEMINFO, recvmsg into the same memory several times and recv without a buffer have no
// safe wrapper.

use std::io;
use std::mem::size_of_val;
use std::os::fd::{AsFd, AsRawFd};

/// Bytes of the buffer that skipped bytes are copied to where the kernel has no SO_PEEK_OFF for TCP.
const SKIP_BUFFER: usize = 64 << 10;

/// Vectors of one recvmsg: those of the skipped bytes and one of the wanted ones. With [`SKIP_BUFFER`] this skips
/// up to 15.9 MiB, and the list stays small enough for the stack.
const MAX_VECTORS: usize = 256;

/// `asm-generic/socket.h`: the same on every architecture that Atoll runs on.
const SO_PEEK_OFF: libc::c_int = 42;
const SO_MEMINFO: libc::c_int = 55;

/// Most bytes that [`peek_after`] can skip.
pub const MAX_SKIP: usize = SKIP_BUFFER * (MAX_VECTORS - 1);

/// How full a socket's send queue is, in bytes of kernel memory (which is what its limit counts).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SendQueue {
    /// Limit of the queue now; the kernel raises it as the connection gets faster.
    pub limit: u32,
    /// Bytes in use, of data and of what is kept about them.
    pub used: u32,
}

impl SendQueue {
    /// Bytes that may still be used.
    pub fn free(self) -> u32 {
        self.limit.saturating_sub(self.used)
    }
}

/// Asks how full the send queue is (SO_MEMINFO, since Linux 4.12).
pub fn send_queue(fd: impl AsFd) -> io::Result<SendQueue> {
    // The array grows with the kernel: [RMEM_ALLOC, RCVBUF, WMEM_ALLOC, SNDBUF, FWD_ALLOC, WMEM_QUEUED, ...].
    const SNDBUF: usize = 3;
    const WMEM_QUEUED: usize = 5;
    let mut info = [0_u32; 9];
    let mut bytes = size_of_val(&info) as libc::socklen_t;
    // SAFETY: the kernel writes at most `bytes` bytes to `info`, which is that large, and the length it wrote.
    let result = unsafe {
        libc::getsockopt(
            fd.as_fd().as_raw_fd(),
            libc::SOL_SOCKET,
            SO_MEMINFO,
            info.as_mut_ptr().cast(),
            &raw mut bytes,
        )
    };
    check(result)?;
    if (bytes as usize) < (WMEM_QUEUED + 1) * 4 {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "the kernel's SO_MEMINFO is too short"));
    }
    Ok(SendQueue { limit: info[SNDBUF], used: info[WMEM_QUEUED] })
}

/// Sets where the next peek starts, in bytes from the head of the receive queue (SO_PEEK_OFF; for TCP since Linux
/// 6.9). From then on each peek moves it forward by what it returned, and reading or [`discard`]ing moves it back.
/// Fails with EOPNOTSUPP on older kernels.
pub fn set_peek_offset(fd: impl AsFd, offset: u32) -> io::Result<()> {
    let value = libc::c_int::try_from(offset)
        .map_err(|_| io::Error::new(io::ErrorKind::InvalidInput, "peek offset beyond the kernel's limit"))?;
    write_peek_offset(fd, value)
}

/// Has peeks start at the head of the receive queue again, always.
pub fn clear_peek_offset(fd: impl AsFd) -> io::Result<()> {
    write_peek_offset(fd, -1)
}

fn write_peek_offset(fd: impl AsFd, value: libc::c_int) -> io::Result<()> {
    // SAFETY: the kernel reads the four bytes of `value`.
    let result = unsafe {
        libc::setsockopt(
            fd.as_fd().as_raw_fd(),
            libc::SOL_SOCKET,
            SO_PEEK_OFF,
            (&raw const value).cast(),
            size_of_val(&value) as libc::socklen_t,
        )
    };
    check(result)
}

/// Copies bytes from the receive queue to `buffer`, past the first `skip` ones, and leaves all of them there: for
/// kernels without [`set_peek_offset`]. The skipped bytes are copied by the kernel to a buffer of the thread that
/// nobody looks at. Returns how many bytes `buffer` got; `Ok(0)` is the end of the stream after exactly `skip`
/// bytes. `WouldBlock` if there are not more than `skip` bytes, and `InvalidInput` beyond [`MAX_SKIP`].
pub fn peek_after(fd: impl AsFd, skip: usize, buffer: &mut [u8]) -> io::Result<usize> {
    thread_local! {
        static SKIPPED: std::cell::RefCell<Box<[u8]>> =
            std::cell::RefCell::new(vec![0; SKIP_BUFFER].into_boxed_slice());
    }
    if skip > MAX_SKIP {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "too many bytes to skip"));
    }
    SKIPPED.with_borrow_mut(|skipped| {
        let mut ended = false;
        loop {
            let got = peek_past(&fd, skip, skipped, buffer)?;
            if got > skip || buffer.is_empty() || (ended && got == skip) {
                return Ok(got.saturating_sub(skip));
            }
            // Nothing beyond the skipped bytes: either it is still to come or the stream ends here. If it has
            // ended by now, nothing more can come, but something may have come just before.
            if got < skip || !stream_ended(&fd)? {
                return Err(io::ErrorKind::WouldBlock.into());
            }
            ended = true;
        }
    })
}

/// One peek of up to `skip` bytes to `skipped`, again and again, and then of what follows to `buffer`. Returns how
/// many bytes there were of both.
fn peek_past(fd: impl AsFd, skip: usize, skipped: &mut [u8], buffer: &mut [u8]) -> io::Result<usize> {
    let mut vectors = [libc::iovec { iov_base: std::ptr::null_mut(), iov_len: 0 }; MAX_VECTORS];
    let mut count = 0;
    let mut left = skip;
    while left > 0 {
        let part = left.min(skipped.len());
        vectors[count] = libc::iovec { iov_base: skipped.as_mut_ptr().cast(), iov_len: part };
        left -= part;
        count += 1;
    }
    vectors[count] = libc::iovec { iov_base: buffer.as_mut_ptr().cast(), iov_len: buffer.len() };
    receive_message(fd, &mut vectors[..=count])
}

/// Whether the peer's FIN has arrived behind everything that is queued.
fn stream_ended(fd: impl AsFd) -> io::Result<bool> {
    let fd = fd.as_fd();
    let mut poll = [rustix::event::PollFd::new(&fd, rustix::event::PollFlags::RDHUP)];
    let now = rustix::event::Timespec { tv_sec: 0, tv_nsec: 0 };
    rustix::event::poll(&mut poll, Some(&now))?;
    Ok(poll[0].revents().intersects(rustix::event::PollFlags::RDHUP | rustix::event::PollFlags::HUP))
}

fn receive_message(fd: impl AsFd, vectors: &mut [libc::iovec]) -> io::Result<usize> {
    // SAFETY: all zeros is a valid msghdr: no address, no buffers, no control data.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = vectors.as_mut_ptr();
    message.msg_iovlen = vectors.len() as _;
    // SAFETY: the vectors name memory that the caller borrowed mutably; that some name the same bytes is fine, the
    // kernel copies one after the other.
    let got = unsafe {
        libc::recvmsg(fd.as_fd().as_raw_fd(), &raw mut message, libc::MSG_PEEK | libc::MSG_DONTWAIT)
    };
    usize::try_from(got).map_err(|_| io::Error::last_os_error())
}

/// Removes up to `count` bytes from the head of the receive queue without copying them (MSG_TRUNC on TCP,
/// tcp(7)). Returns how many there were; `Ok(0)` for `count > 0` is the end of the stream.
pub fn discard(fd: impl AsFd, count: usize) -> io::Result<usize> {
    // SAFETY: with MSG_TRUNC a TCP socket does not touch the buffer, so there is none.
    let got = unsafe {
        libc::recv(fd.as_fd().as_raw_fd(), std::ptr::null_mut(), count, libc::MSG_TRUNC | libc::MSG_DONTWAIT)
    };
    usize::try_from(got).map_err(|_| io::Error::last_os_error())
}

fn check(result: libc::c_int) -> io::Result<()> {
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::net::{Shutdown, TcpListener, TcpStream};
    use std::time::{Duration, Instant};

    use super::*;

    fn pair() -> (TcpStream, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        (client, listener.accept().unwrap().0)
    }

    /// Asks `what` again until it does not say "would block".
    fn eventually<T>(mut what: impl FnMut() -> io::Result<T>) -> io::Result<T> {
        let end = Instant::now() + Duration::from_secs(10);
        loop {
            match what() {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock && Instant::now() < end => {
                    std::thread::sleep(Duration::from_millis(1));
                }
                other => return other,
            }
        }
    }

    #[test]
    fn bytes_past_the_skipped_ones_are_seen_and_stay() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        rustix::net::sockopt::set_socket_recv_buffer_size(&listener, 1 << 20).unwrap();
        let mut client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let mut server = listener.accept().unwrap().0;
        let sent: Vec<u8> = (0..200_000_u32).map(|n| (n % 251) as u8).collect();
        client.write_all(&sent).unwrap();
        let mut seen = [0; 100];
        for skip in [0, 1, SKIP_BUFFER - 1, SKIP_BUFFER, SKIP_BUFFER + 1, 150_000] {
            let got = eventually(|| peek_after(&server, skip, &mut seen)).unwrap();
            assert_eq!(seen[..got], sent[skip..skip + got], "skip {skip}");
            assert!(got > 0);
        }
        let mut all = vec![0; sent.len()];
        server.read_exact(&mut all).unwrap();
        assert!(all == sent);
    }

    #[test]
    fn the_end_is_told_from_what_is_still_to_come() {
        let (mut client, server) = pair();
        client.write_all(b"abc").unwrap();
        let mut seen = [0; 8];
        assert_eq!(eventually(|| peek_after(&server, 0, &mut seen)).unwrap(), 3);
        assert_eq!(peek_after(&server, 3, &mut seen).unwrap_err().kind(), io::ErrorKind::WouldBlock);
        assert_eq!(peek_after(&server, 2, &mut seen).unwrap(), 1);
        client.shutdown(Shutdown::Write).unwrap();
        assert_eq!(eventually(|| peek_after(&server, 3, &mut seen)).unwrap(), 0);
        assert_eq!(peek_after(&server, 1, &mut seen).unwrap(), 2);
        let too_far = peek_after(&server, MAX_SKIP + 1, &mut seen).unwrap_err();
        assert_eq!(too_far.kind(), io::ErrorKind::InvalidInput);
    }

    #[test]
    fn discarded_bytes_are_gone() {
        let (mut client, mut server) = pair();
        client.write_all(b"0123456789").unwrap();
        let mut seen = [0; 10];
        while eventually(|| peek_after(&server, 0, &mut seen)).unwrap() < 10 {}
        assert_eq!(discard(&server, 4).unwrap(), 4);
        let mut rest = [0; 6];
        server.read_exact(&mut rest).unwrap();
        assert_eq!(&rest, b"456789");
        assert_eq!(discard(&server, 4).unwrap_err().kind(), io::ErrorKind::WouldBlock);
        drop(client);
        assert_eq!(eventually(|| discard(&server, 4)).unwrap(), 0);
    }

    #[test]
    fn a_peek_offset_moves_with_peeks_and_discards_where_the_kernel_has_it() {
        let (mut client, server) = pair();
        if let Err(error) = set_peek_offset(&server, 0) {
            assert_eq!(error.raw_os_error(), Some(libc::EOPNOTSUPP));
            return;
        }
        client.write_all(b"0123456789").unwrap();
        let mut seen = [0; 4];
        assert_eq!(eventually(|| peek_after(&server, 0, &mut seen)).unwrap(), 4);
        assert_eq!(peek_after(&server, 0, &mut seen).unwrap(), 4);
        assert_eq!(&seen, b"4567");
        assert_eq!(discard(&server, 8).unwrap(), 8);
        assert_eq!(peek_after(&server, 0, &mut seen).unwrap(), 2);
        assert_eq!(&seen[..2], b"89");
        set_peek_offset(&server, 1).unwrap();
        assert_eq!(peek_after(&server, 0, &mut seen).unwrap(), 1);
        assert_eq!(seen[0], b'9');
    }

    #[test]
    fn a_send_queue_fills_and_says_so() {
        let (mut client, server) = pair();
        let empty = send_queue(&client).unwrap();
        assert_eq!(empty.used, 0);
        assert!(empty.limit > 0 && empty.free() == empty.limit);
        client.set_nonblocking(true).unwrap();
        while client.write(&vec![0; 65536]).is_ok() {}
        let full = send_queue(&client).unwrap();
        assert!(full.free() < full.limit / 2, "{full:?}");
        drop(server);
    }
}
