//! Requests under way: from the ring to the engine and back.
//!
//! ```text
//!            start                    ended, steps left
//!  taken ───────────► in the engine ◄───────────────────┐
//!                       │   │   └───────────────────────┘
//!                       │   └─ host error, and it may be kept ──► kept ──retry──► in the engine
//!                       ▼
//!                     ended ──hand_back (in a run)──► used ring
//! ```
//!
//! A request has one step, but for zeroing and discarding (one a range) and for writes of a disk that writes through
//! (then a flush follows). A step that failed is the one that is done again.
//!
//! At most as many requests of a queue are under way as it has entries, whatever a driver puts into it.

use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};

use atoll_foundation::log_limited;
use atoll_foundation::uring::TransferBuffers;
use atoll_storage::engine::Submission;
use atoll_storage::error::Operation;
use atoll_storage::{DiskError, DiskErrorKind};

use super::request::{Failure, Range, SECTOR};
use super::{Blk, BlkMetrics};
use crate::lock;
use crate::queue::{OwnedBuffers, QueueError, QueueRun};

/// What a request does.
pub(super) enum Work {
    Read { offset: u64, len: u64, data: Arc<OwnedBuffers> },
    Write { offset: u64, len: u64, data: Arc<OwnedBuffers>, flush: bool },
    Flush,
    Discard(Vec<Range>),
    WriteZeroes(Vec<Range>),
}

/// What the engine is asked for: operation, offset, length, whether space may be released, buffers.
type Asked = (Operation, u64, u64, bool, Option<Arc<dyn TransferBuffers>>);

/// A request that was taken out of its ring.
pub(super) struct Request {
    pub(super) queue: u16,
    pub(super) head: u16,
    pub(super) work: Work,
    /// Steps that are done.
    pub(super) step: usize,
    /// One byte.
    pub(super) status: OwnedBuffers,
    /// Bytes before the status byte.
    pub(super) data_len: u64,
}

impl Request {
    /// The next step, if there is one.
    fn next(&self) -> Option<Asked> {
        let ranges = |ranges: &[Range], operation| {
            ranges.get(self.step).map(|r| (operation, r.offset, r.len, r.unmap, None))
        };
        match (&self.work, self.step) {
            (Work::Read { offset, len, data }, 0) => {
                Some((Operation::Read, *offset, *len, false, Some(data.clone())))
            }
            (Work::Write { offset, len, data, .. }, 0) => {
                Some((Operation::Write, *offset, *len, false, Some(data.clone())))
            }
            (Work::Write { flush: true, .. }, 1) | (Work::Flush, 0) => {
                Some((Operation::Flush, 0, 0, false, None))
            }
            (Work::Discard(list), _) => ranges(list, Operation::Discard),
            (Work::WriteZeroes(list), _) => ranges(list, Operation::WriteZeroes),
            _ => None,
        }
    }
}

#[derive(Default)]
struct QueueFlight {
    /// Requests taken and not handed back, those that are kept included.
    under_way: Vec<u16>,
    ended: Vec<(Request, Result<(), DiskError>)>,
    /// Taken before the state was saved; to be carried out again.
    restored: Vec<u16>,
}

/// All requests under way.
pub(super) struct Flight {
    queues: Vec<Mutex<QueueFlight>>,
    kept: Mutex<Vec<Request>>,
}

impl Flight {
    pub(super) fn new(queues: usize) -> Self {
        Self { queues: (0..queues).map(|_| Mutex::default()).collect(), kept: Mutex::default() }
    }

    fn with<R>(&self, queue: u16, act: impl FnOnce(&mut QueueFlight) -> R) -> Option<R> {
        self.queues.get(usize::from(queue)).map(|flight| act(&mut lock(flight)))
    }

    /// Forgets everything. Nothing is in the engine.
    pub(super) fn forget(&self) {
        lock(&self.kept).clear();
        for queue in &self.queues {
            *lock(queue) = QueueFlight::default();
        }
    }

    /// Queue and head of all that was taken and not handed back.
    pub(super) fn taken(&self) -> Vec<(u16, u16)> {
        let mut taken = Vec::new();
        for (index, queue) in (0..).zip(&self.queues) {
            let queue = lock(queue);
            taken.extend(queue.under_way.iter().chain(&queue.restored).map(|head| (index, *head)));
        }
        taken
    }

    /// Takes over what [`Flight::taken`] told. What no queue can have is left out.
    pub(super) fn restore(&self, taken: impl Iterator<Item = (u16, u16)>) {
        for (queue, head) in taken {
            self.with(queue, |flight| {
                if flight.restored.len() < usize::from(super::QUEUE_SIZE) {
                    flight.restored.push(head);
                }
            });
        }
    }

    /// Whether another request of a queue of `size` entries may be taken.
    pub(super) fn has_room(&self, queue: u16, size: usize) -> bool {
        self.with(queue, |flight| flight.under_way.len() < size).unwrap_or(false)
    }
}

impl Blk {
    /// Takes a request on its way.
    pub(super) fn start(&self, request: Request) {
        self.flight.with(request.queue, |flight| flight.under_way.push(request.head));
        self.go_on(request);
    }

    /// Submits the next step, or ends the request.
    fn go_on(&self, request: Request) {
        let (Some(me), Some((operation, offset, len, unmap, buffers))) = (self.me.upgrade(), request.next())
        else {
            return self.ended(request, Ok(()));
        };
        let done = Box::new(move |result| me.step_ended(request, result));
        self.engine.submit(Submission { operation, offset, len, unmap, buffers, done });
    }

    fn step_ended(&self, mut request: Request, result: Result<(), DiskError>) {
        match result {
            Ok(()) => {
                request.step += 1;
                self.go_on(request);
            }
            Err(error) if self.can_wait(&error) => self.keep(request, &error),
            Err(error) => self.ended(request, Err(error)),
        }
    }

    /// Whether an error is one that may go away, and somebody is there to wait for that.
    pub(super) fn can_wait(&self, error: &DiskError) -> bool {
        let passing = matches!(error.kind(), DiskErrorKind::NoSpace | DiskErrorKind::Io);
        self.on_trouble.is_some() && passing && !error.is_final()
    }

    fn keep(&self, request: Request, error: &DiskError) {
        let first = {
            let mut kept = lock(&self.flight.kept);
            kept.push(request);
            kept.len() == 1
        };
        BlkMetrics::add(&self.metrics.kept, 1);
        if let (true, Some(on_trouble)) = (first, &self.on_trouble) {
            on_trouble(error);
        }
    }

    /// Requests that are kept because of an error of the host.
    pub fn kept(&self) -> usize {
        lock(&self.flight.kept).len()
    }

    /// Has every request that was kept carried out again, and waits for the outcome; returns whether none is kept
    /// afterwards. Those that fail again are kept again, and said to be in trouble. May be called while the device is
    /// paused, by whoever paused it: then what succeeded is handed back by another pause or by resuming.
    pub fn retry(&self) -> bool {
        for request in std::mem::take(&mut *lock(&self.flight.kept)) {
            self.go_on(request);
        }
        self.engine.drain();
        self.kept() == 0
    }

    fn ended(&self, request: Request, result: Result<(), DiskError>) {
        let queue = request.queue;
        self.flight.with(queue, |flight| flight.ended.push((request, result)));
        self.handle().ended(queue);
    }

    /// Hands back what has ended.
    pub(super) fn hand_back(&self, index: u16, run: &mut QueueRun<'_>) -> Result<(), QueueError> {
        let ended = self.flight.with(index, |flight| {
            let ended = std::mem::take(&mut flight.ended);
            for (request, _) in &ended {
                if let Some(at) = flight.under_way.iter().position(|head| *head == request.head) {
                    flight.under_way.swap_remove(at);
                }
            }
            ended
        });
        for (request, result) in ended.unwrap_or_default() {
            if let Work::Read { data, .. } = &request.work {
                // The kernel wrote past the tracking; also a failed read may have.
                data.mark_dirty();
            }
            let result = result.map_err(Failure::from).inspect(|()| self.count(&request.work));
            let (status, written) = self.conclude(result, request.data_len);
            if let Some(place) = request.status.tracked().first() {
                place.copy_from(&[status]);
            }
            run.push_used(request.head, written)?;
        }
        Ok(())
    }

    /// Counts a request that succeeded.
    pub(super) fn count(&self, work: &Work) {
        let m = &self.metrics;
        let (operations, volume) = match work {
            Work::Read { len, .. } => (&m.reads, Some((&m.read_bytes, *len))),
            Work::Write { len, .. } => (&m.writes, Some((&m.written_bytes, *len))),
            Work::Flush => (&m.flushes, None),
            Work::Discard(_) => (&m.discards, None),
            Work::WriteZeroes(_) => (&m.zeroes, None),
        };
        BlkMetrics::add(operations, 1);
        if let Some((counter, bytes)) = volume {
            BlkMetrics::add(counter, bytes);
        }
    }

    /// Takes on what was under way when the state was saved. A request that the ring does not have any more is the
    /// driver's mistake, as any other.
    pub(super) fn take_restored(&self, index: u16, run: &mut QueueRun<'_>) -> Result<(), QueueError> {
        let heads =
            self.flight.with(index, |flight| std::mem::take(&mut flight.restored)).unwrap_or_default();
        for head in heads {
            let mut chain = run.chain(head)?;
            if let Some(written) = self.take_again(index, &mut chain)? {
                run.push_used(head, written)?;
            }
        }
        Ok(())
    }

    /// Carries a request out on this thread, waiting for the disk.
    pub(super) fn carry_out(&self, work: &Work) -> Result<(), DiskError> {
        match work {
            Work::Read { offset, data, .. } => self.disk.read_at(*offset, &data.slices()).inspect(|()| {
                data.mark_dirty();
            }),
            Work::Write { offset, data, flush, .. } => {
                self.disk.write_at(*offset, &data.slices())?;
                if *flush { self.disk.flush() } else { Ok(()) }
            }
            Work::Flush => self.disk.flush(),
            Work::Discard(ranges) => ranges.iter().try_for_each(|r| self.disk.discard(r.offset, r.len)),
            Work::WriteZeroes(ranges) => {
                ranges.iter().try_for_each(|r| self.disk.write_zeroes(r.offset, r.len, r.unmap))
            }
        }
    }

    /// Bytes that a throttle counts, or `None` for what it does not count.
    pub(super) fn cost(work: &Work) -> Option<u64> {
        match work {
            Work::Read { len, .. } | Work::Write { len, .. } => Some(*len),
            Work::Discard(_) | Work::WriteZeroes(_) => Some(0),
            Work::Flush => None,
        }
    }

    /// Whether each write is followed by a flush.
    pub(super) fn writes_through(&self) -> bool {
        self.write_through.load(Ordering::SeqCst)
    }

    /// Status byte and number of bytes written, which ends with the status byte.
    pub(super) fn conclude(&self, result: Result<(), Failure>, data_len: u64) -> (u8, u32) {
        use super::request::status;
        let status = match result {
            Ok(()) => status::OK,
            Err(Failure::Bad) => {
                BlkMetrics::add(&self.metrics.refused, 1);
                status::IOERR
            }
            Err(Failure::Unsupported) => {
                BlkMetrics::add(&self.metrics.refused, 1);
                status::UNSUPP
            }
            Err(Failure::Disk(error)) => {
                BlkMetrics::add(&self.metrics.errors, 1);
                log_limited!(error, "virtio-blk: {error}");
                status::IOERR
            }
        };
        // A chain is at most 4 GiB - 1 long.
        (status, (data_len + 1) as u32)
    }

    /// The byte offset of `sector` if `len` bytes from there are within the disk.
    pub(super) fn range_in_disk(&self, sector: u64, len: u64) -> Result<u64, Failure> {
        let offset = sector.checked_mul(SECTOR).ok_or(Failure::Bad)?;
        match offset.checked_add(len) {
            Some(end) if end <= self.disk.capacity_bytes() => Ok(offset),
            _ => Err(Failure::Bad),
        }
    }
}
