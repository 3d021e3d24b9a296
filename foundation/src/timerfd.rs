//! A deadline as a readable descriptor (`timerfd_create(2)`, `CLOCK_MONOTONIC`).
//!
//! One [`TimerFd`] holds one deadline. Whoever has many timers keeps them in its own queue and arms the
//! `TimerFd` with the earliest, then registers it on an [`EventLoop`](crate::EventLoop).

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use rustix::io::Errno;
use rustix::time::{
    ClockId, Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, clock_gettime,
};

const NANOS_PER_SECOND: u64 = 1_000_000_000;

/// The host's monotonic clock in nanoseconds since an arbitrary point; the clock of every [`TimerFd`].
pub fn monotonic_nanos() -> u64 {
    let now = clock_gettime(ClockId::Monotonic);
    (now.tv_sec as u64).wrapping_mul(NANOS_PER_SECOND).wrapping_add(now.tv_nsec as u64)
}

/// A one-shot, non-blocking timer. All methods take `&self`: share it with `Arc`.
#[derive(Debug)]
pub struct TimerFd {
    fd: OwnedFd,
}

impl TimerFd {
    /// Creates a disarmed timer. Fails only when the process or host is out of descriptors or memory.
    pub fn new() -> io::Result<Self> {
        let flags = TimerfdFlags::CLOEXEC | TimerfdFlags::NONBLOCK;
        Ok(Self { fd: rustix::time::timerfd_create(TimerfdClockId::Monotonic, flags)? })
    }

    /// Arms the timer for the moment [`monotonic_nanos`] reaches `deadline`, replacing an earlier deadline and
    /// forgetting an expiry that was not drained. A deadline in the past expires at once.
    pub fn arm_at(&self, deadline: u64) -> io::Result<()> {
        // Zero would disarm.
        self.set(TimerfdTimerFlags::ABSTIME, deadline.max(1))
    }

    /// Arms the timer for `delay` from now; like [`TimerFd::arm_at`] in everything else.
    pub fn arm_after(&self, delay: Duration) -> io::Result<()> {
        let nanos = u64::try_from(delay.as_nanos()).unwrap_or(u64::MAX);
        self.set(TimerfdTimerFlags::empty(), nanos.max(1))
    }

    /// Disarms the timer and forgets an expiry that was not drained.
    pub fn disarm(&self) -> io::Result<()> {
        self.set(TimerfdTimerFlags::empty(), 0)
    }

    /// Whether the timer has expired since it was last armed or drained; makes it unreadable again.
    pub fn drain(&self) -> bool {
        let mut buffer = [0u8; 8];
        loop {
            match rustix::io::read(&self.fd, &mut buffer) {
                Ok(_) => return true,
                Err(Errno::INTR) => {}
                Err(_) => return false,
            }
        }
    }

    fn set(&self, flags: TimerfdTimerFlags, nanos: u64) -> io::Result<()> {
        let value = Timespec {
            tv_sec: (nanos / NANOS_PER_SECOND) as i64,
            tv_nsec: (nanos % NANOS_PER_SECOND) as i64,
        };
        let once = Itimerspec { it_interval: Timespec { tv_sec: 0, tv_nsec: 0 }, it_value: value };
        rustix::time::timerfd_settime(&self.fd, flags, &once)?;
        Ok(())
    }
}

impl AsFd for TimerFd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::eventfd::wait_readable;

    const LONG: Option<Duration> = Some(Duration::from_secs(10));

    #[test]
    fn expires_at_an_absolute_deadline_and_not_before() {
        let timer = TimerFd::new().unwrap();
        let deadline = monotonic_nanos() + 20_000_000;
        timer.arm_at(deadline).unwrap();
        assert!(!timer.drain());
        assert!(wait_readable(timer.as_fd(), LONG).unwrap());
        assert!(monotonic_nanos() >= deadline);
        assert!(timer.drain());
        assert!(!timer.drain());
    }

    #[test]
    fn a_deadline_in_the_past_expires_at_once() {
        let timer = TimerFd::new().unwrap();
        timer.arm_at(0).unwrap();
        assert!(wait_readable(timer.as_fd(), LONG).unwrap());
    }

    #[test]
    fn disarming_forgets_the_deadline_and_the_expiry() {
        let timer = TimerFd::new().unwrap();
        timer.arm_after(Duration::ZERO).unwrap();
        assert!(wait_readable(timer.as_fd(), LONG).unwrap());
        timer.disarm().unwrap();
        assert!(!wait_readable(timer.as_fd(), Some(Duration::from_millis(5))).unwrap());
        assert!(!timer.drain());
    }

    #[test]
    fn the_furthest_deadline_is_accepted() {
        let timer = TimerFd::new().unwrap();
        timer.arm_at(u64::MAX).unwrap();
        assert!(!timer.drain());
    }
}
