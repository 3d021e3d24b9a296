//! Disks without waiting: requests are submitted and complete later, many at a time.
//!
//! ```text
//!                  ┌─ one piece of a host file ─► io_uring ─► all bytes? ─yes──────────► done
//!  submit ─────────┤                                             │ no, or an error
//!                  ├─ anything else ─────────────────────────────┴─► thread pool ───────► done
//!                  └─ flush ─► one at a time; those that come meanwhile share the next ─► done
//! ```
//!
//! [`AsyncDisk`] is the second interface beside [`Disk`], with the same requests and the same rules of order and
//! durability (see [`crate::disk`]): a flush covers everything whose completion was called before the flush was
//! submitted, operations under way at the same time have no order, and buffers stay in place because their
//! owner travels with the request. Completions come on any thread and in any order.
//!
//! [`Engine`] drives any [`Disk`]. Transfers that a format can place in its host file ([`Disk::begin_direct`]) go
//! through io_uring, with no thread waiting; whatever does not end there with all its bytes is done again by a
//! thread, whose blocking call has the last word on errors. Everything else takes a thread of a bounded pool. Where
//! the host has no io_uring or forbids it, that is everything.
//!
//! All transfers go through the host's page cache, which takes any address and any length, so nothing above the
//! image file knows of alignment. (`O_DIRECT` is not used; [`crate::file`] is where it would be dealt with.)
//!
//! Flushes never overlap: of two at the same time the host reports a lost write to one only, and the other would
//! promise what is not true.
//!
//! Lock order: each lock is a leaf; none is held while a disk works or a completion runs.

mod pool;

use std::cell::Cell;
use std::io;
use std::str::FromStr;
use std::sync::{Arc, Condvar, Mutex};

use atoll_foundation::sync::lock;
use atoll_foundation::uring::{Direction, FileRing, TransferBuffers};

use crate::disk::{DirectEnd, Disk};
use crate::error::{DiskError, Operation};
use pool::Pool;

/// Called once when a request has ended, on any thread. It must not wait for the engine.
pub type Completion = Box<dyn FnOnce(Result<(), DiskError>) + Send>;

/// A request. Parameters mean what they mean to [`Disk`].
pub struct Submission {
    /// What to do; [`Operation::Resize`] is not a request.
    pub operation: Operation,
    /// Byte of the disk; 0 for a flush.
    pub offset: u64,
    /// Bytes: those of the buffers for a transfer, 0 for a flush.
    pub len: u64,
    /// For zeroing: whether space may be released.
    pub unmap: bool,
    /// For transfers.
    pub buffers: Option<Arc<dyn TransferBuffers>>,
    /// Who hears of the end.
    pub done: Completion,
}

/// A disk that takes requests and completes them later.
pub trait AsyncDisk: Send + Sync {
    /// The disk itself, for what needs no waiting or may wait.
    fn disk(&self) -> &Arc<dyn Disk>;

    /// Takes a request. Never waits for the disk.
    fn submit(&self, submission: Submission);

    /// Waits until nothing is under way. Who goes on submitting may wait for ever.
    fn drain(&self);
}

/// What carries requests out.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum EngineKind {
    /// io_uring where the host and the format can, threads otherwise.
    #[default]
    Auto,
    /// io_uring, or an error; formats that cannot use it for a transfer still take a thread.
    IoUring,
    /// Threads only.
    Threads,
}

impl FromStr for EngineKind {
    type Err = ();

    /// `auto`, `io_uring` or `threads`.
    fn from_str(text: &str) -> Result<Self, ()> {
        match text {
            "auto" => Ok(Self::Auto),
            "io_uring" => Ok(Self::IoUring),
            "threads" => Ok(Self::Threads),
            _ => Err(()),
        }
    }
}

thread_local! {
    /// Completions that this thread is in the middle of.
    static COMPLETING: Cell<usize> = const { Cell::new(0) };
}

#[derive(Default)]
struct Flushes {
    running: bool,
    waiting: Vec<Completion>,
}

/// What requests under way need.
struct Shared {
    disk: Arc<dyn Disk>,
    pool: Pool,
    flushes: Mutex<Flushes>,
    in_flight: Mutex<usize>,
    ended: Condvar,
}

/// An [`AsyncDisk`] over any [`Disk`]. Dropping it waits for what is under way.
pub struct Engine {
    shared: Arc<Shared>,
    ring: Option<FileRing>,
}

impl Engine {
    /// An engine for `disk`. Fails only for [`EngineKind::IoUring`], when there is none to be had.
    pub fn new(disk: Arc<dyn Disk>, kind: EngineKind) -> io::Result<Arc<Self>> {
        let ring = match kind {
            EngineKind::Threads => None,
            EngineKind::Auto => disk.direct_file().and_then(|file| FileRing::new(file).ok()),
            EngineKind::IoUring => {
                let file = disk.direct_file().ok_or_else(|| {
                    io::Error::new(io::ErrorKind::Unsupported, "the disk is not a file of this host")
                })?;
                Some(FileRing::new(file)?)
            }
        };
        let shared = Arc::new(Shared {
            disk,
            pool: Pool::default(),
            flushes: Mutex::default(),
            in_flight: Mutex::new(0),
            ended: Condvar::new(),
        });
        Ok(Arc::new(Self { shared, ring }))
    }

    /// [`Engine::new`] with [`EngineKind::Auto`], which always gives one.
    pub fn auto(disk: Arc<dyn Disk>) -> Arc<Self> {
        Self::new(disk.clone(), EngineKind::Auto).unwrap_or_else(|_| Self::threads(disk))
    }

    fn threads(disk: Arc<dyn Disk>) -> Arc<Self> {
        Self::new(disk, EngineKind::Threads).unwrap_or_else(|_| unreachable!("threads need no probe"))
    }

    /// Whether transfers go through io_uring.
    pub fn uses_io_uring(&self) -> bool {
        self.ring.is_some()
    }

    /// Hands a transfer to the ring. Gives it back if that is not possible.
    fn through_ring(&self, submission: Submission) -> Result<(), Submission> {
        let (Some(ring), Some(buffers)) = (&self.ring, submission.buffers.clone()) else {
            return Err(submission);
        };
        let direction = match submission.operation {
            Operation::Read => Direction::Read,
            Operation::Write => Direction::Write,
            _ => return Err(submission),
        };
        let shared = self.shared.clone();
        let Submission { operation, offset, len, .. } = submission;
        let Some(direct) = shared.disk.begin_direct(operation, offset, len) else { return Err(submission) };
        let done = Box::new(move |result: io::Result<usize>| match result {
            Ok(count) if count as u64 == len => {
                shared.disk.end_direct(direct, DirectEnd::Done);
                shared.complete(submission.done, Ok(()));
            }
            _ => {
                shared.disk.end_direct(direct, DirectEnd::Abandoned);
                Shared::by_thread(&shared, submission);
            }
        });
        if let Err(done) = ring.submit(direction, direct.host_offset, buffers, done) {
            done(Err(io::ErrorKind::WouldBlock.into()));
        }
        Ok(())
    }
}

impl Shared {
    /// Has a thread carry a request out.
    fn by_thread(this: &Arc<Self>, submission: Submission) {
        let shared = this.clone();
        this.pool.run(Box::new(move || {
            let result = shared.carry_out(&submission);
            let Submission { done, buffers, .. } = submission;
            shared.complete(done, result);
            drop(buffers);
        }));
    }

    fn carry_out(&self, submission: &Submission) -> Result<(), DiskError> {
        let Submission { operation, offset, len, unmap, buffers, .. } = submission;
        let slices = || buffers.as_ref().map(|buffers| buffers.slices()).unwrap_or_default();
        match operation {
            Operation::Read => self.disk.read_at(*offset, &slices()),
            Operation::Write => self.disk.write_at(*offset, &slices()),
            Operation::Flush => self.disk.flush(),
            Operation::Discard => self.disk.discard(*offset, *len),
            Operation::WriteZeroes => self.disk.write_zeroes(*offset, *len, *unmap),
            Operation::Resize => self.disk.resize(*len),
        }
    }

    /// Tells whoever asked, then counts the request as ended.
    fn complete(&self, done: Completion, result: Result<(), DiskError>) {
        COMPLETING.set(COMPLETING.get() + 1);
        done(result);
        COMPLETING.set(COMPLETING.get() - 1);
        *lock(&self.in_flight) -= 1;
        self.ended.notify_all();
    }

    /// Adds a flush to those that wait, and has a thread see to them if none does.
    fn flush(this: &Arc<Self>, done: Completion) {
        let start = {
            let mut flushes = lock(&this.flushes);
            flushes.waiting.push(done);
            !std::mem::replace(&mut flushes.running, true)
        };
        if start {
            let shared = this.clone();
            this.pool.run(Box::new(move || shared.flush_all()));
        }
    }

    fn flush_all(&self) {
        loop {
            let waiting = {
                let mut flushes = lock(&self.flushes);
                flushes.running = !flushes.waiting.is_empty();
                std::mem::take(&mut flushes.waiting)
            };
            if waiting.is_empty() {
                return;
            }
            // It begins after all of these were submitted, so it covers what each of them must.
            let result = self.disk.flush();
            for done in waiting {
                let result = result.as_ref().copied().map_err(DiskError::again);
                self.complete(done, result);
            }
        }
    }
}

impl AsyncDisk for Engine {
    fn disk(&self) -> &Arc<dyn Disk> {
        &self.shared.disk
    }

    fn submit(&self, submission: Submission) {
        *lock(&self.shared.in_flight) += 1;
        if submission.operation == Operation::Flush {
            return Shared::flush(&self.shared, submission.done);
        }
        if let Err(submission) = self.through_ring(submission) {
            Shared::by_thread(&self.shared, submission);
        }
    }

    fn drain(&self) {
        // A completion that ends up here, by letting go of the last handle on a device, cannot wait for itself.
        let own = COMPLETING.get();
        let mut in_flight = lock(&self.shared.in_flight);
        while *in_flight > own {
            in_flight = self.shared.ended.wait(in_flight).unwrap_or_else(|e| e.into_inner());
        }
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        self.drain();
    }
}

#[cfg(test)]
mod tests;
