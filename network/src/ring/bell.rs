//! How one side wakes the other: a byte in a pipe.
//!
//! A pipe and not an eventfd, for two reasons. Whether an operation waits (`O_NONBLOCK`) belongs to the open file
//! description, and an eventfd has only one, which both sides share: the other side could make ours wait. The ends
//! of a pipe are two. And when the last writer is gone the reader is told (a hang-up), which is how a side learns
//! that the other one's process has ended.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::io::Errno;
use rustix::pipe::PipeFlags;

/// Most bytes that a bell's pipe holds; more rings than that change nothing.
const PIPE_BYTES: usize = 4096;

/// The end that rings.
#[derive(Debug)]
pub(super) struct Bell(OwnedFd);

/// The end that hears.
#[derive(Debug)]
pub(super) struct Ear(OwnedFd);

/// A bell and who hears it.
pub(super) fn bell() -> io::Result<(Bell, Ear)> {
    let (read, write) = rustix::pipe::pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK)?;
    // Only a wish: an unprivileged user's pipes are counted by the size they may have.
    let _ = rustix::pipe::fcntl_setpipe_size(&write, PIPE_BYTES);
    Ok((Bell(write), Ear(read)))
}

impl Bell {
    /// Adopts a descriptor that came from the other side, and makes it non-blocking.
    pub(super) fn adopt(fd: OwnedFd) -> io::Result<Self> {
        make_nonblocking(&fd)?;
        Ok(Self(fd))
    }

    pub(super) fn into_fd(self) -> OwnedFd {
        self.0
    }

    /// Wakes the other side. A pipe that is full was rung already, one that nobody reads is reported to the
    /// reader of this side's own ear: neither is an error here.
    pub(super) fn ring(&self) {
        while let Err(Errno::INTR) = rustix::io::write(&self.0, &[1]) {}
    }
}

impl Ear {
    /// Adopts a descriptor that came from the other side, and makes it non-blocking.
    pub(super) fn adopt(fd: OwnedFd) -> io::Result<Self> {
        make_nonblocking(&fd)?;
        Ok(Self(fd))
    }

    pub(super) fn into_fd(self) -> OwnedFd {
        self.0
    }

    /// Forgets the rings so far. At most one page of them at once: a side that rings without end keeps the
    /// descriptor readable and costs one call a round, not more.
    pub(super) fn clear(&self) {
        let mut buffer = [0u8; PIPE_BYTES];
        while let Err(Errno::INTR) = rustix::io::read(&self.0, &mut buffer) {}
    }
}

impl AsFd for Ear {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

fn make_nonblocking(fd: &OwnedFd) -> io::Result<()> {
    let flags = rustix::fs::fcntl_getfl(fd)?;
    if !flags.contains(rustix::fs::OFlags::NONBLOCK) {
        rustix::fs::fcntl_setfl(fd, flags | rustix::fs::OFlags::NONBLOCK)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use atoll_foundation::eventfd::wait_readable;
    use std::time::Duration;

    fn heard(ear: &Ear) -> bool {
        wait_readable(ear.as_fd(), Some(Duration::ZERO)).unwrap()
    }

    #[test]
    fn rings_are_heard_until_cleared_and_never_wait() {
        let (bell, ear) = bell().unwrap();
        assert!(!heard(&ear));
        for _ in 0..PIPE_BYTES + 100 {
            bell.ring();
        }
        assert!(heard(&ear));
        ear.clear();
        assert!(!heard(&ear));
        ear.clear();
        bell.ring();
        assert!(heard(&ear));
    }

    #[test]
    fn the_end_of_the_ringing_side_is_heard() {
        let (bell, ear) = bell().unwrap();
        drop(bell);
        assert!(heard(&ear));
        ear.clear();
        assert!(heard(&ear), "for good");
    }

    #[test]
    fn a_blocking_descriptor_is_made_non_blocking() {
        let (read, write) = rustix::pipe::pipe_with(PipeFlags::CLOEXEC).unwrap();
        let (bell, ear) = (Bell::adopt(write).unwrap(), Ear::adopt(read).unwrap());
        ear.clear();
        for _ in 0..70_000 {
            bell.ring();
        }
        assert!(heard(&ear));
    }
}
