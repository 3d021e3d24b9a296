//! Signals as a readable descriptor (`signalfd(2)`), so that the event loop handles them like any other event.
//!
//! A signal can be read only while it is blocked in every thread that could otherwise receive it. Threads
//! inherit the mask of the thread that starts them: call [`Signals::block`] first thing in `main`. Programs
//! started with `std::process::Command` get an empty mask again.

#![allow(unsafe_code)]
// UNSAFETY: signal masks and signalfd have no safe wrapper in the libraries used.

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

/// The signals a program of this kind handles.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Signal {
    /// SIGINT: interrupted, usually by Ctrl-C.
    Interrupt,
    /// SIGTERM: asked to end.
    Terminate,
    /// SIGHUP: the terminal is gone.
    HangUp,
    /// SIGQUIT: asked to end with a core dump, usually by Ctrl-\.
    Quit,
    /// SIGWINCH: the terminal's size has changed.
    WindowChange,
    /// SIGCHLD: a child process has changed its state.
    Child,
    /// SIGUSR1.
    User1,
    /// SIGUSR2.
    User2,
}

impl Signal {
    const ALL: [Self; 8] = [
        Self::Interrupt,
        Self::Terminate,
        Self::HangUp,
        Self::Quit,
        Self::WindowChange,
        Self::Child,
        Self::User1,
        Self::User2,
    ];

    /// The kernel's number.
    pub fn number(self) -> i32 {
        match self {
            Self::Interrupt => libc::SIGINT,
            Self::Terminate => libc::SIGTERM,
            Self::HangUp => libc::SIGHUP,
            Self::Quit => libc::SIGQUIT,
            Self::WindowChange => libc::SIGWINCH,
            Self::Child => libc::SIGCHLD,
            Self::User1 => libc::SIGUSR1,
            Self::User2 => libc::SIGUSR2,
        }
    }

    fn of_number(number: u32) -> Option<Self> {
        Self::ALL.into_iter().find(|signal| signal.number() as u32 == number)
    }
}

/// One received signal.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Received {
    /// Which.
    pub signal: Signal,
    /// The process that sent it, zero when the kernel did.
    pub sender: u32,
}

/// A non-blocking source of blocked signals. Register it on an [`EventLoop`](crate::EventLoop) for reading.
#[derive(Debug)]
pub struct Signals {
    fd: OwnedFd,
}

impl Signals {
    /// Blocks `signals` in the calling thread, and so in every thread it starts later, and opens the source
    /// that reads them. They stay blocked when the source is dropped.
    pub fn block(signals: &[Signal]) -> io::Result<Self> {
        let mut set = MaybeUninit::<libc::sigset_t>::uninit();
        // SAFETY: sigemptyset initialises the set before the other calls read it; the numbers are valid. The
        // descriptor returned by a successful signalfd is new and owned by nobody else.
        unsafe {
            libc::sigemptyset(set.as_mut_ptr());
            for signal in signals {
                libc::sigaddset(set.as_mut_ptr(), signal.number());
            }
            let error = libc::pthread_sigmask(libc::SIG_BLOCK, set.as_ptr(), std::ptr::null_mut());
            if error != 0 {
                return Err(io::Error::from_raw_os_error(error));
            }
            let fd = libc::signalfd(-1, set.as_ptr(), libc::SFD_CLOEXEC | libc::SFD_NONBLOCK);
            if fd < 0 {
                return Err(io::Error::last_os_error());
            }
            Ok(Self { fd: OwnedFd::from_raw_fd(fd) })
        }
    }

    /// The next pending signal, `None` when there is none. A signal sent several times before it is read may
    /// be reported once.
    pub fn next(&self) -> io::Result<Option<Received>> {
        loop {
            let mut info = MaybeUninit::<libc::signalfd_siginfo>::uninit();
            let size = std::mem::size_of_val(&info);
            // SAFETY: the buffer is writable and as long as said.
            let count = unsafe { libc::read(self.fd.as_raw_fd(), info.as_mut_ptr().cast(), size) };
            if count < 0 {
                let error = io::Error::last_os_error();
                match error.kind() {
                    io::ErrorKind::WouldBlock => return Ok(None),
                    io::ErrorKind::Interrupted => continue,
                    _ => return Err(error),
                }
            }
            if usize::try_from(count) != Ok(size) {
                return Err(io::Error::other("short read from a signalfd"));
            }
            // SAFETY: the kernel filled the whole structure, in which every bit pattern is valid.
            let info = unsafe { info.assume_init() };
            if let Some(signal) = Signal::of_number(info.ssi_signo) {
                return Ok(Some(Received { signal, sender: info.ssi_pid }));
            }
        }
    }
}

impl AsFd for Signals {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::event_loop::{EventLoop, Interest};
    use std::sync::{Arc, Mutex};

    /// Sends a signal to the calling thread only: the test program has other threads that do not block it.
    fn raise(signal: Signal) {
        // SAFETY: raise has no preconditions; the signal is blocked in this thread.
        assert_eq!(unsafe { libc::raise(signal.number()) }, 0);
    }

    #[test]
    fn a_blocked_signal_is_read_once_with_its_sender() {
        let signals = Signals::block(&[Signal::User1, Signal::WindowChange]).unwrap();
        assert_eq!(signals.next().unwrap(), None);
        raise(Signal::User1);
        raise(Signal::User1);
        let sender = std::process::id();
        assert_eq!(signals.next().unwrap(), Some(Received { signal: Signal::User1, sender }));
        assert_eq!(signals.next().unwrap(), None);
        raise(Signal::WindowChange);
        assert_eq!(signals.next().unwrap().unwrap().signal, Signal::WindowChange);
    }

    #[test]
    fn a_signal_arrives_on_the_event_loop() {
        let signals = Arc::new(Signals::block(&[Signal::User2]).unwrap());
        let mut event_loop = EventLoop::new().unwrap();
        let seen: Arc<Mutex<Vec<Signal>>> = Arc::default();
        let (source, sink) = (signals.clone(), seen.clone());
        let callback = move |_| {
            while let Some(received) = source.next().unwrap() {
                sink.lock().unwrap().push(received.signal);
            }
        };
        event_loop.handle().register(signals, Interest::READ, callback).unwrap();
        raise(Signal::User2);
        assert_eq!(event_loop.run_once(Some(std::time::Duration::from_secs(10))).unwrap(), 1);
        assert_eq!(*seen.lock().unwrap(), [Signal::User2]);
    }

    #[test]
    fn threads_started_later_inherit_the_mask() {
        let thread = std::thread::spawn(|| {
            let _signals = Signals::block(&[Signal::HangUp]).unwrap();
            std::thread::spawn(|| raise(Signal::HangUp)).join().unwrap();
        });
        thread.join().unwrap();
    }
}
