//! An event loop on one thread, over `epoll(7)`.
//!
//! [`EventLoop`] belongs to the thread that runs it. Everybody else holds an [`EventLoopHandle`]: it registers
//! descriptors with callbacks, posts closures, and stops the loop, from any thread and also from inside a
//! callback. Timers are not here: a timer is a descriptor ([`TimerFd`](crate::TimerFd)) that its owner arms.
//!
//! # Rules a callback can rely on
//!
//! * Callbacks and posted closures run on the loop's thread only, one at a time.
//! * Readiness is level-triggered: a callback that leaves data unread is called again.
//! * A token is never reused. An event that was fetched before its source was removed is not delivered, even if
//!   another source got the same descriptor number meanwhile.
//! * The loop keeps the registered object, and so the descriptor, open until the source is removed.
//! * After [`EventLoopHandle::remove`] the callback does not start again. If it was running on the loop's
//!   thread at that moment it finishes; [`EventLoopHandle::remove_and_wait`] waits for that.
//! * A source whose interest is [`Interest::NONE`] is not watched at all, so that a peer that hung up does not
//!   make the loop spin.
//! * Regular files and `/dev/null`, which epoll refuses, count as always ready, as they do for `poll(2)`:
//!   standard input redirected from a file needs no special case.
//!
//! # Lock order
//!
//! source table → one source's interest; one source's callback is locked with nothing else held. The queue of
//! posted closures is a leaf.

use std::collections::{BTreeSet, HashMap};
use std::fmt;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::ThreadId;
use std::time::Duration;

use rustix::event::{Timespec, epoll};
use rustix::io::Errno;

use crate::eventfd::EventFd;
use crate::sync::lock;

/// Events fetched by one `epoll_wait`; more are fetched in the next round.
const EVENTS_PER_ROUND: usize = 64;

/// The token of the loop's own doorbell; sources count from one.
const WAKE_TOKEN: u64 = 0;

/// What a source wants to hear about. Errors and hang-ups are reported with either.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Interest {
    /// Data, a connection or end of file can be read.
    pub readable: bool,
    /// Data can be written.
    pub writable: bool,
}

impl Interest {
    /// Nothing: the source stays registered but is not watched.
    pub const NONE: Self = Self { readable: false, writable: false };
    /// Reading.
    pub const READ: Self = Self { readable: true, writable: false };
    /// Writing.
    pub const WRITE: Self = Self { readable: false, writable: true };
    /// Reading and writing.
    pub const READ_WRITE: Self = Self { readable: true, writable: true };

    fn flags(self) -> epoll::EventFlags {
        let mut flags = epoll::EventFlags::empty();
        flags.set(epoll::EventFlags::IN | epoll::EventFlags::RDHUP, self.readable);
        flags.set(epoll::EventFlags::OUT, self.writable);
        flags
    }
}

/// What a source is ready for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Readiness {
    /// A read will not block (it may return end of file).
    pub readable: bool,
    /// A write will not block.
    pub writable: bool,
    /// The other side has closed, at least for its writing half.
    pub hangup: bool,
    /// The descriptor has an error pending.
    pub error: bool,
}

impl Readiness {
    fn of(flags: epoll::EventFlags) -> Self {
        Self {
            readable: flags.intersects(epoll::EventFlags::IN),
            writable: flags.intersects(epoll::EventFlags::OUT),
            hangup: flags.intersects(epoll::EventFlags::HUP | epoll::EventFlags::RDHUP),
            error: flags.intersects(epoll::EventFlags::ERR),
        }
    }
}

/// Names one registered source of one loop. Never reused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SourceToken(u64);

/// What runs when a source is ready.
pub type Callback = Box<dyn FnMut(Readiness) + Send>;

/// A closure posted onto the loop.
type Posted = Box<dyn FnOnce() + Send>;

/// An object with a descriptor, kept alive by the loop.
type AnyFd = Box<dyn AsFdObject>;

/// Object-safe form of [`AsFd`] plus the bounds the loop needs.
trait AsFdObject: Send + Sync {
    fn borrow_fd(&self) -> std::os::fd::BorrowedFd<'_>;
}

impl<T: AsFd + Send + Sync> AsFdObject for T {
    fn borrow_fd(&self) -> std::os::fd::BorrowedFd<'_> {
        self.as_fd()
    }
}

struct Source {
    fd: AnyFd,
    /// False for what epoll refuses and the loop treats as always ready.
    pollable: bool,
    interest: Mutex<Interest>,
    callback: Mutex<Callback>,
    removed: AtomicBool,
}

#[derive(Default)]
struct Table {
    sources: HashMap<u64, Arc<Source>>,
    /// Tokens of sources that are always ready and have an interest.
    always_ready: BTreeSet<u64>,
}

struct Shared {
    epoll: OwnedFd,
    wake: EventFd,
    next_token: AtomicU64,
    stop: AtomicBool,
    table: Mutex<Table>,
    /// `None` once the loop is gone: nothing posted will ever run.
    posted: Mutex<Option<Vec<Posted>>>,
    /// The thread inside [`EventLoop::run`] or [`EventLoop::run_once`].
    runner: Mutex<Option<ThreadId>>,
}

/// The loop itself; see the module's documentation. Create it anywhere, run it on one thread.
pub struct EventLoop {
    shared: Arc<Shared>,
}

/// Access to an [`EventLoop`] from any thread. Cloning is cheap.
#[derive(Clone)]
pub struct EventLoopHandle {
    shared: Arc<Shared>,
}

impl fmt::Debug for EventLoop {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("EventLoop").field("sources", &lock(&self.shared.table).sources.len()).finish()
    }
}

impl fmt::Debug for EventLoopHandle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("EventLoopHandle").finish_non_exhaustive()
    }
}

impl EventLoop {
    /// Creates a loop without sources. Fails only when the process or host is out of descriptors or memory.
    pub fn new() -> io::Result<Self> {
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        let wake = EventFd::new()?;
        epoll::add(&epoll, &wake, epoll::EventData::new_u64(WAKE_TOKEN), epoll::EventFlags::IN)?;
        let shared = Shared {
            epoll,
            wake,
            next_token: AtomicU64::new(WAKE_TOKEN + 1),
            stop: AtomicBool::new(false),
            table: Mutex::default(),
            posted: Mutex::new(Some(Vec::new())),
            runner: Mutex::new(None),
        };
        Ok(Self { shared: Arc::new(shared) })
    }

    /// A handle for other threads and for callbacks.
    pub fn handle(&self) -> EventLoopHandle {
        EventLoopHandle { shared: self.shared.clone() }
    }

    /// Runs callbacks and posted closures until [`EventLoopHandle::stop`]. A stop that came before `run` makes
    /// it return after one round, with everything posted before the stop done. Can be run again afterwards.
    pub fn run(&mut self) -> io::Result<()> {
        loop {
            let stopping = self.shared.stop.load(Ordering::Acquire);
            self.run_once(if stopping { Some(Duration::ZERO) } else { None })?;
            if self.shared.stop.swap(false, Ordering::AcqRel) {
                let _runner = Runner::enter(&self.shared);
                self.run_posted();
                return Ok(());
            }
        }
    }

    /// One round: waits at most `timeout` (`None`: for ever) for something to be ready, runs what is, then the
    /// closures posted before that. Returns how many callbacks ran.
    pub fn run_once(&mut self, timeout: Option<Duration>) -> io::Result<usize> {
        let _runner = Runner::enter(&self.shared);
        let always_ready: Vec<u64> = lock(&self.shared.table).always_ready.iter().copied().collect();
        let timeout = if always_ready.is_empty() { timeout } else { Some(Duration::ZERO) };
        let timespec = timeout
            .map(|t| Timespec { tv_sec: t.as_secs() as i64, tv_nsec: i64::from(t.subsec_nanos()) as _ });
        let mut buffer = [const { MaybeUninit::<epoll::Event>::uninit() }; EVENTS_PER_ROUND];
        let events = match epoll::wait(&self.shared.epoll, &mut buffer, timespec.as_ref()) {
            Ok((events, _unused)) => &*events,
            Err(Errno::INTR) => &[],
            Err(error) => return Err(error.into()),
        };
        let mut ran = 0;
        let mut woken = false;
        for event in events {
            let token = event.data.u64();
            if token == WAKE_TOKEN {
                woken = true;
            } else {
                ran += usize::from(self.shared.dispatch(token, |_| Readiness::of(event.flags)));
            }
        }
        for token in always_ready {
            let ready = |interest: Interest| Readiness {
                readable: interest.readable,
                writable: interest.writable,
                hangup: false,
                error: false,
            };
            ran += usize::from(self.shared.dispatch(token, ready));
        }
        if woken {
            self.shared.wake.drain();
            self.run_posted();
        }
        Ok(ran)
    }

    /// Runs what is in the queue now; what these closures post runs in the next round.
    fn run_posted(&self) {
        let batch = lock(&self.shared.posted).as_mut().map(std::mem::take).unwrap_or_default();
        for closure in batch {
            closure();
        }
    }
}

impl Drop for EventLoop {
    fn drop(&mut self) {
        // Sources and closures may own handles to this loop: break the cycle by emptying both. They are dropped
        // outside the locks, because their destructors may call the handle.
        let posted = lock(&self.shared.posted).take();
        drop(posted);
        let table = std::mem::take(&mut *lock(&self.shared.table));
        for source in table.sources.values() {
            source.removed.store(true, Ordering::Release);
            if source.pollable && *lock(&source.interest) != Interest::NONE {
                let _ = epoll::delete(&self.shared.epoll, source.fd.borrow_fd());
            }
        }
    }
}

/// Marks the current thread as the one inside the loop.
struct Runner<'a>(&'a Shared);

impl<'a> Runner<'a> {
    fn enter(shared: &'a Shared) -> Self {
        *lock(&shared.runner) = Some(std::thread::current().id());
        Self(shared)
    }
}

impl Drop for Runner<'_> {
    fn drop(&mut self) {
        *lock(&self.0.runner) = None;
    }
}

impl Shared {
    /// Calls the source's callback unless it was removed meanwhile; returns whether it ran.
    fn dispatch(&self, token: u64, readiness: impl FnOnce(Interest) -> Readiness) -> bool {
        let Some(source) = lock(&self.table).sources.get(&token).cloned() else { return false };
        let mut callback = lock(&source.callback);
        let interest = *lock(&source.interest);
        if source.removed.load(Ordering::Acquire) || interest == Interest::NONE {
            return false;
        }
        callback(readiness(interest));
        true
    }
}

impl EventLoopHandle {
    /// Registers an object with a descriptor; `callback` runs on the loop's thread whenever it is ready for
    /// `interest`. The loop owns `fd` until removal: give it an `Arc` to keep access.
    ///
    /// Fails with `AlreadyExists` when the descriptor is already registered here, with `NotConnected` when the
    /// loop is gone, and with the kernel's error when it is out of memory or watches.
    pub fn register(
        &self,
        fd: impl AsFd + Send + Sync + 'static,
        interest: Interest,
        callback: impl FnMut(Readiness) + Send + 'static,
    ) -> io::Result<SourceToken> {
        if lock(&self.shared.posted).is_none() {
            return Err(io::Error::new(io::ErrorKind::NotConnected, "the event loop has ended"));
        }
        let token = self.shared.next_token.fetch_add(1, Ordering::Relaxed);
        let data = epoll::EventData::new_u64(token);
        let mut table = lock(&self.shared.table);
        // Adding also with no interest, then taking away, tells whether epoll can watch this descriptor.
        let pollable = match epoll::add(&self.shared.epoll, fd.as_fd(), data, interest.flags()) {
            Ok(()) => true,
            Err(Errno::PERM) => false,
            Err(error) => return Err(error.into()),
        };
        if pollable && interest == Interest::NONE {
            epoll::delete(&self.shared.epoll, fd.as_fd())?;
        }
        if !pollable && interest != Interest::NONE {
            table.always_ready.insert(token);
            self.shared.wake.signal();
        }
        let source = Source {
            fd: Box::new(fd),
            pollable,
            interest: Mutex::new(interest),
            callback: Mutex::new(Box::new(callback)),
            removed: AtomicBool::new(false),
        };
        table.sources.insert(token, Arc::new(source));
        Ok(SourceToken(token))
    }

    /// Changes what a source is watched for; [`Interest::NONE`] pauses it. `NotFound` when it was removed.
    pub fn set_interest(&self, token: SourceToken, interest: Interest) -> io::Result<()> {
        let mut table = lock(&self.shared.table);
        let Some(source) = table.sources.get(&token.0).cloned() else {
            return Err(io::Error::new(io::ErrorKind::NotFound, "the event source was removed"));
        };
        let mut current = lock(&source.interest);
        if source.pollable {
            let (fd, data) = (source.fd.borrow_fd(), epoll::EventData::new_u64(token.0));
            match (*current != Interest::NONE, interest != Interest::NONE) {
                (true, true) => epoll::modify(&self.shared.epoll, fd, data, interest.flags())?,
                (true, false) => epoll::delete(&self.shared.epoll, fd)?,
                (false, true) => epoll::add(&self.shared.epoll, fd, data, interest.flags())?,
                (false, false) => {}
            }
        } else if interest == Interest::NONE {
            table.always_ready.remove(&token.0);
        } else if table.always_ready.insert(token.0) {
            self.shared.wake.signal();
        }
        *current = interest;
        Ok(())
    }

    /// Removes a source; its callback does not start again. May be called from the callback itself. Returns
    /// false when it was already removed. The object and the callback are dropped here, or on the loop's
    /// thread if the callback is running.
    pub fn remove(&self, token: SourceToken) -> bool {
        self.take(token).is_some()
    }

    /// As [`EventLoopHandle::remove`], and if the callback is running on another thread waits until it
    /// returns. The caller must hold no lock that the callback takes.
    pub fn remove_and_wait(&self, token: SourceToken) -> bool {
        let Some(source) = self.take(token) else { return false };
        if !self.is_loop_thread() {
            drop(lock(&source.callback));
        }
        true
    }

    fn take(&self, token: SourceToken) -> Option<Arc<Source>> {
        let mut table = lock(&self.shared.table);
        let source = table.sources.remove(&token.0)?;
        table.always_ready.remove(&token.0);
        source.removed.store(true, Ordering::Release);
        if source.pollable && *lock(&source.interest) != Interest::NONE {
            let _ = epoll::delete(&self.shared.epoll, source.fd.borrow_fd());
        }
        Some(source)
    }

    /// Queues `closure` to run on the loop's thread, in the order of posting. Returns false, dropping the
    /// closure, when the loop is gone. A closure still queued when the loop is dropped is dropped unrun.
    pub fn post(&self, closure: impl FnOnce() + Send + 'static) -> bool {
        {
            let mut posted = lock(&self.shared.posted);
            let Some(queue) = posted.as_mut() else { return false };
            queue.push(Box::new(closure));
        }
        self.shared.wake.signal();
        true
    }

    /// Runs `closure` on the loop's thread and waits for its result; on the loop's thread itself, runs it at
    /// once. `None` when the loop ended without running it. The caller must hold no lock that the closure or a
    /// callback takes.
    pub fn call<R: Send + 'static>(&self, closure: impl FnOnce() -> R + Send + 'static) -> Option<R> {
        if self.is_loop_thread() {
            return Some(closure());
        }
        let (sender, receiver) = std::sync::mpsc::sync_channel(1);
        self.post(move || {
            let _ = sender.send(closure());
        });
        receiver.recv().ok()
    }

    /// Makes [`EventLoop::run`] return after the round in progress and the closures posted before this call.
    pub fn stop(&self) {
        self.shared.stop.store(true, Ordering::Release);
        self.shared.wake.signal();
    }

    /// Whether the caller is on the loop's thread, inside a callback or posted closure.
    pub fn is_loop_thread(&self) -> bool {
        *lock(&self.shared.runner) == Some(std::thread::current().id())
    }
}

#[cfg(test)]
#[path = "event_loop_tests.rs"]
mod tests;
