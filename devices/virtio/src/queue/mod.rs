//! Split virtqueues (VIRTIO 1.2, section 2.7).
//!
//! [`VirtQueue`] is one ring as the transport keeps it; [`QueueRun`] is the ring while a device works on it;
//! [`Chain`] is one request. Everything in the ring is the guest's and untrusted:
//!
//! * a ring that breaks the rules (an index too far ahead, a loop, a buffer where there is no RAM) is a
//!   [`QueueError`]: the device stops and asks for a reset (DEVICE_NEEDS_RESET), and nothing else is affected;
//! * no number in it sizes an allocation beyond [`MAX_CHAIN`] descriptors.
//!
//! A run works on one snapshot of the address space, so RAM that is unplugged meanwhile stays valid to its end.

use std::num::Wrapping;
use std::sync::atomic::{Ordering, fence};
use std::time::{Duration, Instant};

use atoll_machine::memory::FlatView;
use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemory, Permissions};

mod chain;
pub mod saved_state;

pub use chain::{Buffers, Chain, OwnedBuffers};

use saved_state::VirtQueueStateV1;

/// Most descriptors in one chain and most entries in one ring. Linux uses at most 1024, and the bound keeps one
/// request's list of buffers in a few tens of KiB.
pub const MAX_CHAIN: u16 = 1024;

/// Requests that a vCPU thread carries out before the rest goes to the device's thread.
const INLINE_REQUESTS: u32 = 32;
/// Host time after which a vCPU thread takes no further request: twice what waking another thread costs.
const INLINE_TIME: Duration = Duration::from_micros(200);
/// Requests of one turn of the device's thread, after which other queues get theirs.
const WORKER_REQUESTS: u32 = 256;
/// Host time of one turn, so that finished requests are announced and a pause need not wait long.
const WORKER_TIME: Duration = Duration::from_millis(2);

/// `flags` of the available ring: the driver wants no interrupts.
const AVAIL_F_NO_INTERRUPT: u16 = 1;

/// What the driver did wrong.
#[derive(Debug, thiserror::Error)]
pub enum QueueError {
    /// The available index is more than a ring ahead.
    #[error("available index {available} is more than {size} ahead of {expected}")]
    AvailableIndex {
        /// Found in the ring.
        available: u16,
        /// Next index to process.
        expected: u16,
        /// Entries in the ring.
        size: u16,
    },
    /// A descriptor number is outside its table.
    #[error("descriptor {index} is outside a table of {len}")]
    DescriptorIndex {
        /// The number.
        index: u16,
        /// Entries in the table.
        len: u32,
    },
    /// A chain has more descriptors than it may, which a loop also has.
    #[error("a descriptor chain loops or is longer than {0}")]
    ChainTooLong(u32),
    /// All buffers of a chain together exceed 32 bits.
    #[error("the buffers of a descriptor chain exceed 4 GiB")]
    BytesTooMany,
    /// An indirect descriptor in a table, with a successor, without the feature, or with a bad length.
    #[error("indirect descriptor with flags {flags:#x} and length {len} is not allowed")]
    Indirect {
        /// The descriptor's flags.
        flags: u16,
        /// Its length, bytes.
        len: u32,
    },
    /// A buffer for reading follows one for writing.
    #[error("a device-readable buffer follows a device-writable one")]
    Order,
    /// A buffer, table or ring is not in RAM.
    #[error("no RAM at {gpa:#x}+{len:#x}")]
    NotRam {
        /// Guest-physical address.
        gpa: u64,
        /// Bytes.
        len: u64,
    },
    /// The registers of an enabled queue cannot work.
    #[error("queue registers are not usable: {0}")]
    Registers(&'static str),
    /// A request has no place for its answer, or the like.
    #[error("malformed request: {0}")]
    Request(&'static str),
    /// The ring could not be reached.
    #[error("ring access failed: {0}")]
    Ring(#[from] virtio_queue::Error),
}

/// What a queue's registers say when the driver enables it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct QueueLayout {
    /// Entries.
    pub size: u16,
    /// Guest-physical address of the descriptor table.
    pub desc: u64,
    /// Guest-physical address of the available ring.
    pub avail: u64,
    /// Guest-physical address of the used ring.
    pub used: u64,
}

/// Whether [`crate::VirtioDevice::process_queue`] reached the end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Progress {
    /// Nothing left; the driver will notify.
    Done,
    /// There is more, for another turn.
    More,
}

/// What became of one request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// Finished; so many bytes were written to its buffers.
    Done(u32),
    /// Not begun: it would take longer than a vCPU thread should wait. Put back.
    Defer,
    /// Begun; [`QueueRun::push_used`] follows in a later run.
    Pending,
    /// Not begun, nor is anything after it, until the device asks for another run. Put back.
    Wait,
}

/// Who carries out a run, and how much of it.
#[derive(Clone, Copy, Debug)]
pub struct Budget {
    requests: u32,
    deadline: Instant,
    inline: bool,
}

impl Budget {
    /// For a vCPU thread.
    pub fn inline() -> Self {
        Self { requests: INLINE_REQUESTS, deadline: Instant::now() + INLINE_TIME, inline: true }
    }

    /// For the device's own thread.
    pub fn worker() -> Self {
        Self { requests: WORKER_REQUESTS, deadline: Instant::now() + WORKER_TIME, inline: false }
    }

    fn exhausted(&self) -> bool {
        self.requests == 0 || Instant::now() >= self.deadline
    }
}

/// One virtqueue. Not enabled until [`VirtQueue::enable`].
#[derive(Default)]
pub struct VirtQueue {
    queue: Option<Queue>,
    indirect: bool,
}

impl VirtQueue {
    /// Starts the ring at `layout` from index 0, checking sizes, alignment (2.7) and that it lies in RAM.
    pub fn enable(
        &mut self,
        memory: &FlatView,
        layout: QueueLayout,
        max_size: u16,
        event_idx: bool,
        indirect: bool,
    ) -> Result<(), QueueError> {
        let mut queue =
            Queue::new(max_size).map_err(|_| QueueError::Registers("the device's maximum size"))?;
        queue.try_set_size(layout.size).map_err(|_| QueueError::Registers("size"))?;
        let alignment = |_| QueueError::Registers("alignment of a ring");
        queue.try_set_desc_table_address(GuestAddress(layout.desc)).map_err(alignment)?;
        queue.try_set_avail_ring_address(GuestAddress(layout.avail)).map_err(alignment)?;
        queue.try_set_used_ring_address(GuestAddress(layout.used)).map_err(alignment)?;
        let size = u64::from(layout.size);
        let parts = [(layout.desc, 16 * size), (layout.avail, 6 + 2 * size), (layout.used, 6 + 8 * size)];
        for (gpa, len) in parts {
            if !GuestMemory::check_range(memory, GuestAddress(gpa), len as usize, Permissions::ReadWrite) {
                return Err(QueueError::NotRam { gpa, len });
            }
        }
        queue.set_event_idx(event_idx);
        queue.set_ready(true);
        self.queue = Some(queue);
        self.indirect = indirect;
        Ok(())
    }

    /// Whether the driver enabled the queue.
    pub fn enabled(&self) -> bool {
        self.queue.is_some()
    }

    /// Forgets the ring.
    pub fn reset(&mut self) {
        *self = Self::default();
    }

    /// Works on the ring through `body`. Returns what `body` did and whether the driver wants an interrupt.
    pub fn run(
        &mut self,
        memory: &FlatView,
        budget: Budget,
        body: impl FnOnce(&mut QueueRun<'_>) -> Result<Progress, QueueError>,
    ) -> (Result<Progress, QueueError>, bool) {
        let Some(queue) = &mut self.queue else { return (Ok(Progress::Done), false) };
        let mut run = QueueRun { queue, memory, budget, indirect: self.indirect, used: 0 };
        let result = body(&mut run);
        match run.wants_interrupt() {
            Ok(wanted) => (result, wanted),
            Err(error) => (result.and(Err(error)), false),
        }
    }

    /// The positions in the ring; the layout is in the transport's registers.
    pub fn save(&self) -> VirtQueueStateV1 {
        let position = |f: fn(&Queue) -> u16| self.queue.as_ref().map(|q| u32::from(f(q)));
        VirtQueueStateV1 {
            next_avail: position(QueueT::next_avail),
            next_used: position(QueueT::next_used),
            ..VirtQueueStateV1::default()
        }
    }

    /// Takes over saved positions after [`VirtQueue::enable`].
    pub fn restore(&mut self, saved: &VirtQueueStateV1) {
        if let Some(queue) = &mut self.queue {
            queue.set_next_avail(saved.next_avail.unwrap_or(0) as u16);
            queue.set_next_used(saved.next_used.unwrap_or(0) as u16);
        }
    }
}

/// A queue while a device works on it.
pub struct QueueRun<'a> {
    queue: &'a mut Queue,
    memory: &'a FlatView,
    budget: Budget,
    indirect: bool,
    /// Requests finished in this run.
    used: u32,
}

impl<'a> QueueRun<'a> {
    /// Whether this runs on a vCPU thread, which should not wait long.
    pub fn inline(&self) -> bool {
        self.budget.inline
    }

    /// Entries of the ring.
    pub fn size(&self) -> u16 {
        self.queue.size()
    }

    /// Whether this run has done enough.
    pub fn exhausted(&self) -> bool {
        self.budget.exhausted()
    }

    /// Takes the next request out of the available ring.
    pub fn pop(&mut self) -> Result<Option<Chain<'a>>, QueueError> {
        let (next, size) = (Wrapping(self.queue.next_avail()), self.queue.size());
        let available = self.queue.avail_idx(self.memory, Ordering::Acquire)?;
        if available == next {
            return Ok(None);
        }
        if (available - next).0 > size {
            return Err(QueueError::AvailableIndex { available: available.0, expected: next.0, size });
        }
        let slot = u64::from(next.0 & (size - 1));
        let gpa = self.queue.avail_ring().wrapping_add(4 + 2 * slot);
        let head: u16 = self
            .memory
            .read_obj(GuestAddress(gpa))
            .map(u16::from_le)
            .map_err(|_| QueueError::NotRam { gpa, len: 2 })?;
        let chain = Chain::collect(self.memory, self.queue.desc_table(), size, head, self.indirect)?;
        self.queue.set_next_avail((next + Wrapping(1)).0);
        self.budget.requests = self.budget.requests.saturating_sub(1);
        Ok(Some(chain))
    }

    /// The request that begins at descriptor `head`, which was taken in an earlier run and not handed back.
    pub fn chain(&self, head: u16) -> Result<Chain<'a>, QueueError> {
        Chain::collect(self.memory, self.queue.desc_table(), self.queue.size(), head, self.indirect)
    }

    /// Puts the request that was taken last back.
    pub fn put_back(&mut self) {
        self.queue.go_to_previous_position();
    }

    /// Hands the request that began at `head` back to the driver: `written` bytes of its buffers were written.
    pub fn push_used(&mut self, head: u16, written: u32) -> Result<(), QueueError> {
        self.queue.add_used(self.memory, head, written)?;
        self.used = self.used.wrapping_add(1);
        Ok(())
    }

    /// Hands several requests back at once: the driver sees all of them or none yet, as the buffers of one received
    /// frame need it (5.1.6.4). At most as many as the ring has entries.
    pub fn push_used_together(&mut self, finished: &[(u16, u32)]) -> Result<(), QueueError> {
        let Some((&(last_head, last_written), earlier)) = finished.split_last() else { return Ok(()) };
        let (base, size) = (Wrapping(self.queue.next_used()), self.queue.size());
        let mut next = base;
        for &(head, written) in earlier {
            let slot = u64::from(next.0 & (size - 1));
            let gpa = self.queue.used_ring().wrapping_add(4 + 8 * slot);
            let element = u64::from(head) | u64::from(written) << 32;
            self.memory
                .write_slice(&element.to_le_bytes(), GuestAddress(gpa))
                .map_err(|_| QueueError::NotRam { gpa, len: 8 })?;
            next += 1;
        }
        // Only the last one moves the index that the driver looks at.
        self.queue.set_next_used(next.0);
        self.queue.add_used(self.memory, last_head, last_written)?;
        self.used = self.used.wrapping_add(finished.len() as u32);
        Ok(())
    }

    /// Asks the driver to notify when it adds a request. True if it has done so already.
    pub fn enable_notification(&mut self) -> Result<bool, QueueError> {
        Ok(self.queue.enable_notification(self.memory)?)
    }

    /// Tells the driver that it need not notify.
    pub fn disable_notification(&mut self) -> Result<(), QueueError> {
        Ok(self.queue.disable_notification(self.memory)?)
    }

    /// Carries out requests with `request` until the ring is empty or the budget is used up.
    pub fn pump(
        &mut self,
        mut request: impl FnMut(&mut Chain<'a>, bool) -> Result<Step, QueueError>,
    ) -> Result<Progress, QueueError> {
        loop {
            self.disable_notification()?;
            loop {
                if self.exhausted() {
                    return Ok(Progress::More);
                }
                let Some(mut chain) = self.pop()? else { break };
                match request(&mut chain, self.budget.inline)? {
                    Step::Done(written) => self.push_used(chain.head(), written)?,
                    Step::Defer => {
                        self.put_back();
                        return Ok(Progress::More);
                    }
                    Step::Pending => {}
                    Step::Wait => {
                        self.put_back();
                        return Ok(Progress::Done);
                    }
                }
            }
            if !self.enable_notification()? {
                return Ok(Progress::Done);
            }
        }
    }

    /// Whether the driver wants to be interrupted for what was finished (2.7.7).
    fn wants_interrupt(&mut self) -> Result<bool, QueueError> {
        if self.used == 0 {
            return Ok(false);
        }
        // The used index must be visible before the driver's wishes are looked at.
        fence(Ordering::SeqCst);
        if self.queue.event_idx_enabled() {
            let gpa = self.queue.avail_ring().wrapping_add(4 + 2 * u64::from(self.queue.size()));
            let event: u16 =
                self.memory.read_obj(GuestAddress(gpa)).map_err(|_| QueueError::NotRam { gpa, len: 2 })?;
            // Whether one of this run's requests has the index that the driver waits for.
            let (new, event) = (Wrapping(self.queue.next_used()), Wrapping(u16::from_le(event)));
            return Ok(u32::from((new - event - Wrapping(1)).0) < self.used);
        }
        let gpa = self.queue.avail_ring();
        let flags: u16 =
            self.memory.read_obj(GuestAddress(gpa)).map_err(|_| QueueError::NotRam { gpa, len: 2 })?;
        Ok(u16::from_le(flags) & AVAIL_F_NO_INTERRUPT == 0)
    }
}
