//! A counter in the kernel that one thread signals and another waits for (`eventfd(2)`).
//!
//! [`EventFd`] is the doorbell of the whole program: queues, posted closures and interrupts use it. It never
//! blocks by itself; whoever waits either registers it on an [`EventLoop`](crate::EventLoop) or calls
//! [`EventFd::wait`].

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::time::Duration;

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec};
use rustix::io::Errno;

/// A non-blocking, close-on-exec event counter. All methods take `&self`: share it with `Arc`.
#[derive(Debug)]
pub struct EventFd {
    fd: OwnedFd,
}

impl EventFd {
    /// Creates a counter with value zero. Fails only when the process or host is out of descriptors or memory.
    pub fn new() -> io::Result<Self> {
        let fd = rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        Ok(Self { fd })
    }

    /// Adopts a descriptor received from elsewhere (another process), which must be a non-blocking eventfd.
    pub fn from_owned_fd(fd: OwnedFd) -> Self {
        Self { fd }
    }

    /// Adds one to the counter and so makes the descriptor readable. Cheap, callable from any thread.
    ///
    /// A counter at its maximum is already readable, so that case is a success. No other failure is possible
    /// on a descriptor that this type owns; one would be a bug and is ignored in release builds.
    pub fn signal(&self) {
        loop {
            match rustix::io::write(&self.fd, &1u64.to_ne_bytes()) {
                Err(Errno::INTR) => {}
                Ok(_) | Err(Errno::AGAIN) => return,
                Err(error) => {
                    debug_assert!(false, "signalling an eventfd failed: {error}");
                    return;
                }
            }
        }
    }

    /// Sets the counter to zero and returns how many signals it held; zero when there were none.
    pub fn drain(&self) -> u64 {
        let mut buffer = [0u8; 8];
        loop {
            match rustix::io::read(&self.fd, &mut buffer) {
                Ok(8) => return u64::from_ne_bytes(buffer),
                Err(Errno::INTR) => {}
                Ok(_) | Err(_) => return 0,
            }
        }
    }

    /// Waits until the counter is not zero, or until `timeout` has passed (`None`: for ever). Returns whether
    /// it is signalled. Does not change the counter.
    pub fn wait(&self, timeout: Option<Duration>) -> io::Result<bool> {
        wait_readable(self.fd.as_fd(), timeout)
    }

    /// A second descriptor of the same counter.
    pub fn try_clone(&self) -> io::Result<Self> {
        Ok(Self { fd: self.fd.try_clone()? })
    }
}

impl AsFd for EventFd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl AsRawFd for EventFd {
    fn as_raw_fd(&self) -> RawFd {
        self.fd.as_raw_fd()
    }
}

/// Waits until `fd` can be read without blocking or `timeout` has passed; returns whether it can be read (also
/// true at end of file or after an error, as `poll(2)` has it). Interrupting signals do not end the wait.
pub fn wait_readable(fd: BorrowedFd<'_>, timeout: Option<Duration>) -> io::Result<bool> {
    let deadline = timeout.map(|t| std::time::Instant::now() + t);
    loop {
        let remaining = deadline.map(|d| d.saturating_duration_since(std::time::Instant::now()));
        let timespec = remaining
            .map(|r| Timespec { tv_sec: r.as_secs() as i64, tv_nsec: i64::from(r.subsec_nanos()) as _ });
        let mut fds = [PollFd::from_borrowed_fd(fd, PollFlags::IN)];
        match rustix::event::poll(&mut fds, timespec.as_ref()) {
            Ok(0) => return Ok(false),
            Ok(_) => return Ok(true),
            Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;

    #[test]
    fn drain_returns_the_number_of_signals_and_clears_them() {
        let event = EventFd::new().unwrap();
        assert_eq!(event.drain(), 0);
        event.signal();
        event.signal();
        assert_eq!(event.drain(), 2);
        assert_eq!(event.drain(), 0);
    }

    #[test]
    fn wait_times_out_without_a_signal_and_returns_with_one() {
        let event = Arc::new(EventFd::new().unwrap());
        assert!(!event.wait(Some(Duration::from_millis(5))).unwrap());
        let other = event.clone();
        let thread = std::thread::spawn(move || other.signal());
        assert!(event.wait(None).unwrap());
        assert!(event.wait(Some(Duration::ZERO)).unwrap(), "waiting must not consume the signal");
        thread.join().unwrap();
    }

    #[test]
    fn a_saturated_counter_stays_signalled() {
        let event = EventFd::new().unwrap();
        rustix::io::write(&event, &(u64::MAX - 1).to_ne_bytes()).unwrap();
        event.signal();
        assert_eq!(event.drain(), u64::MAX - 1);
    }

    #[test]
    fn a_clone_shares_the_counter() {
        let event = EventFd::new().unwrap();
        let clone = event.try_clone().unwrap();
        clone.signal();
        assert_eq!(event.drain(), 1);
        assert_eq!(clone.drain(), 0);
    }
}
