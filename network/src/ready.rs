//! Hears from the event loop when a descriptor is ready, once for each time that somebody asked.
//!
//! The event loop is level-triggered: a device without receive buffers would make it spin over frames that wait.
//! A direction is therefore watched only from the moment at which a port answered "nothing" or "no room" until the
//! descriptor is ready.
//!
//! ```text
//!              want(direction)                      ready
//!   not watched ─────────────▶ watched ──────────────────────────────▶ not watched, told
//! ```
//!
//! Lock order: the lock here, then the event loop's. The callback is called with none of them.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex};

use atoll_foundation::sync::lock;
use atoll_foundation::{EventLoopHandle, Interest, Readiness, SourceToken};

/// A descriptor that is watched by need.
pub(crate) struct Ready {
    fd: Arc<OwnedFd>,
    state: Arc<Mutex<State>>,
}

struct State {
    wanted: Interest,
    registered: Option<(EventLoopHandle, SourceToken)>,
}

/// What became ready.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Direction {
    Read,
    Write,
}

struct Shared(Arc<OwnedFd>);

impl AsFd for Shared {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl Ready {
    /// Nothing is watched until [`Ready::watch`]; reading is wanted from the beginning.
    pub(crate) fn new(fd: OwnedFd) -> Self {
        let state = State { wanted: Interest::READ, registered: None };
        Self { fd: Arc::new(fd), state: Arc::new(Mutex::new(state)) }
    }

    pub(crate) fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    /// Starts watching. `told` is called on the loop's thread. A hang-up or an error counts as both directions.
    pub(crate) fn watch(
        &self,
        events: &EventLoopHandle,
        told: impl Fn(Direction) + Send + 'static,
    ) -> io::Result<()> {
        let weak = Arc::downgrade(&self.state);
        let callback = move |readiness: Readiness| {
            let Some(state) = weak.upgrade() else { return };
            let fired = lock(&state).fire(readiness);
            if fired.readable {
                told(Direction::Read);
            }
            if fired.writable {
                told(Direction::Write);
            }
        };
        let mut state = lock(&self.state);
        if state.registered.is_some() {
            return Err(io::Error::new(io::ErrorKind::AlreadyExists, "the port is already watched"));
        }
        let token = events.register(Shared(self.fd.clone()), state.wanted, callback)?;
        state.registered = Some((events.clone(), token));
        Ok(())
    }

    /// Asks to be told when `direction` is ready, also if it is ready already.
    pub(crate) fn want(&self, direction: Direction) {
        let mut state = lock(&self.state);
        let mut wanted = state.wanted;
        match direction {
            Direction::Read => wanted.readable = true,
            Direction::Write => wanted.writable = true,
        }
        state.set(wanted);
    }
}

impl State {
    fn set(&mut self, wanted: Interest) {
        if wanted == self.wanted {
            return;
        }
        self.wanted = wanted;
        if let Some((events, token)) = &self.registered {
            // It fails only when the loop or the registration is gone: then nobody listens any more.
            let _ = events.set_interest(*token, wanted);
        }
    }

    /// What was wanted and is ready; it is not wanted any more.
    fn fire(&mut self, readiness: Readiness) -> Interest {
        let broken = readiness.hangup || readiness.error;
        let fired = Interest {
            readable: self.wanted.readable && (readiness.readable || broken),
            writable: self.wanted.writable && (readiness.writable || broken),
        };
        self.set(Interest {
            readable: self.wanted.readable && !fired.readable,
            writable: self.wanted.writable && !fired.writable,
        });
        fired
    }
}

impl Drop for Ready {
    fn drop(&mut self) {
        let registered = lock(&self.state).registered.take();
        if let Some((events, token)) = registered {
            events.remove(token);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use atoll_foundation::EventLoop;
    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream;
    use std::time::Duration;

    #[test]
    fn it_tells_once_until_asked_again() {
        let mut events = EventLoop::new().unwrap();
        let (mut other, own) = UnixStream::pair().unwrap();
        let ready = Ready::new(own.try_clone().unwrap().into());
        let told = Arc::new(Mutex::new(Vec::new()));
        let sink = told.clone();
        ready.watch(&events.handle(), move |direction| sink.lock().unwrap().push(direction)).unwrap();
        assert!(ready.watch(&events.handle(), |_| ()).is_err());
        let mut round = || {
            events.run_once(Some(Duration::from_millis(10))).unwrap();
            std::mem::take(&mut *told.lock().unwrap())
        };
        assert_eq!(round(), []);
        other.write_all(b"a").unwrap();
        assert_eq!(round(), [Direction::Read]);
        assert_eq!(round(), [], "it is still readable, but nobody asked");
        ready.want(Direction::Read);
        assert_eq!(round(), [Direction::Read]);
        (&own).read_exact(&mut [0]).unwrap();
        ready.want(Direction::Read);
        ready.want(Direction::Write);
        assert_eq!(round(), [Direction::Write]);
        drop(other);
        assert_eq!(round(), [Direction::Read], "the end of the other side");
        assert_eq!(round(), []);
    }
}
