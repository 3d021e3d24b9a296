//! Reads and writes of one file through io_uring (`io_uring(7)`), with memory that others may change meanwhile.
//!
//! ```text
//!  submit (any thread) ──► submission queue ──► kernel ──► completion queue ──► reaper thread ──► `done`
//!            slot: buffers, vectors, `done`  ............ kept until the completion .........┘
//! ```
//!
//! A [`FileRing`] can do little, on purpose: it is made disabled, the file is registered, restrictions are
//! registered that permit reads, writes and no-ops on registered files only, and then it is enabled. From then
//! on the kernel refuses any other operation, any other file and every further registration, whoever gets hold of
//! the descriptor (`io_uring_register(2)`, IORING_REGISTER_RESTRICTIONS).
//!
//! Where the host has no io_uring or forbids it, [`FileRing::new`] fails, and the caller uses threads.
//!
//! Lock order: the submission lock, then the slots'. Neither is held while `done` runs.

#![allow(unsafe_code)]
// UNSAFETY: the kernel works on raw addresses after the call that handed them over has returned.

use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

use io_uring::squeue::Flags;
use io_uring::types::Fixed;
use io_uring::{IoUring, opcode, register::Restriction, squeue};
use vm_memory::VolatileSlice;

use crate::sync::lock;
use crate::threads;

/// Memory for a transfer that goes on after the call that asked for it. The object owns what keeps the memory
/// in place, so the memory is valid for as long as the object is.
pub trait TransferBuffers: Send + Sync {
    /// The memory, in order. The same at every call.
    fn slices(&self) -> Vec<VolatileSlice<'_>>;
}

/// Which way the bytes go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Direction {
    /// From the file to memory.
    Read,
    /// From memory to the file.
    Write,
}

/// Called once with the number of bytes transferred, which may be short, or the host's error.
pub type Done = Box<dyn FnOnce(io::Result<usize>) + Send>;

/// Transfers under way at most.
const MAX_IN_FLIGHT: u32 = 256;
/// Vectors of one transfer at most (`IOV_MAX`).
const MAX_VECTORS: usize = 1024;
/// `user_data` of the no-op that ends the reaper.
const STOP: u64 = u64::MAX;

/// What the kernel uses until a transfer has completed.
struct InFlight {
    done: Done,
    _vectors: Box<[libc::iovec]>,
    _buffers: Arc<dyn TransferBuffers>,
}

// SAFETY: the addresses in the vectors are for the kernel and are not dereferenced here.
unsafe impl Send for InFlight {}

#[derive(Default)]
struct Slots {
    used: Vec<Option<InFlight>>,
    free: Vec<usize>,
}

impl Slots {
    fn take(&mut self, index: usize) -> Option<InFlight> {
        let entry = self.used.get_mut(index)?.take()?;
        self.free.push(index);
        Some(entry)
    }

    fn put(&mut self, entry: InFlight) -> Result<usize, InFlight> {
        if let Some(index) = self.free.pop() {
            self.used[index] = Some(entry);
            return Ok(index);
        }
        if self.used.len() >= MAX_IN_FLIGHT as usize {
            return Err(entry);
        }
        self.used.push(Some(entry));
        Ok(self.used.len() - 1)
    }
}

struct Inner {
    ring: IoUring,
    /// Serialises use of the submission queue. The completion queue is the reaper's alone.
    submission: Mutex<()>,
    slots: Mutex<Slots>,
}

/// An io_uring for one file. Dropping it waits for what is under way.
pub struct FileRing {
    inner: Arc<Inner>,
    reaper: Option<JoinHandle<()>>,
}

impl FileRing {
    /// A ring for `file`, of which the kernel keeps its own reference. Fails where the host has no io_uring, forbids
    /// it (`kernel.io_uring_disabled`, a seccomp filter), or lacks restrictions.
    pub fn new(file: impl AsFd) -> io::Result<Self> {
        let ring: IoUring = IoUring::builder().setup_r_disabled().dontfork().build(MAX_IN_FLIGHT)?;
        let submitter = ring.submitter();
        submitter.register_files(&[file.as_fd().as_raw_fd()])?;
        submitter.register_restrictions(&mut [
            Restriction::sqe_op(opcode::Readv::CODE),
            Restriction::sqe_op(opcode::Writev::CODE),
            Restriction::sqe_op(opcode::Nop::CODE),
            Restriction::sqe_flags_required(Flags::FIXED_FILE.bits()),
        ])?;
        submitter.register_enable_rings()?;
        let inner = Arc::new(Inner { ring, submission: Mutex::new(()), slots: Mutex::default() });
        let reaped = inner.clone();
        let reaper = threads::spawn("disk-ring", move || reaped.reap())?;
        Ok(Self { inner, reaper: Some(reaper) })
    }

    /// Starts a transfer between the buffers and the file from byte `offset`. `done` is called later, on the
    /// ring's own thread. Gives `done` back, and does nothing, when too much is under way already or the list of
    /// buffers is too long.
    pub fn submit(
        &self,
        direction: Direction,
        offset: u64,
        buffers: Arc<dyn TransferBuffers>,
        done: Done,
    ) -> Result<(), Done> {
        let vectors: Box<[libc::iovec]> = buffers
            .slices()
            .iter()
            .map(|slice| libc::iovec {
                iov_base: slice.ptr_guard_mut().as_ptr().cast(),
                iov_len: slice.len(),
            })
            .collect();
        if vectors.is_empty() || vectors.len() > MAX_VECTORS {
            return Err(done);
        }
        let (list, count) = (vectors.as_ptr(), vectors.len() as u32);
        // Boxed, the vectors stay where they are when the entry moves.
        let entry = InFlight { done, _vectors: vectors, _buffers: buffers };
        let index = lock(&self.inner.slots).put(entry).map_err(|entry| entry.done)?;
        let operation = match direction {
            Direction::Read => opcode::Readv::new(Fixed(0), list, count).offset(offset).build(),
            Direction::Write => opcode::Writev::new(Fixed(0), list, count).offset(offset).build(),
        };
        // SAFETY: the vectors, and through `_buffers` the memory they name, are in the slot until the completion
        // has been taken: slices borrow from the object, which the slot's own reference keeps alive and unmoved
        // (no `&mut` to it can exist meanwhile). That memory changes under the kernel's copy is no hazard.
        unsafe { self.inner.push(operation.flags(Flags::FIXED_FILE).user_data(index as u64)) };
        Ok(())
    }
}

impl Inner {
    /// Hands one operation to the kernel.
    ///
    /// # Safety
    ///
    /// What the operation refers to stays valid until its completion.
    unsafe fn push(&self, operation: squeue::Entry) {
        let _guard = lock(&self.submission);
        // SAFETY: the lock makes this the only use of the submission queue.
        let mut queue = unsafe { self.ring.submission_shared() };
        loop {
            // SAFETY: the caller promises it.
            if unsafe { queue.push(&operation) }.is_ok() {
                break;
            }
            queue.sync();
            self.enter();
            queue.sync();
        }
        drop(queue);
        self.enter();
    }

    /// Has the kernel take what is in the submission queue.
    fn enter(&self) {
        while let Err(error) = self.ring.submit() {
            match error.raw_os_error() {
                Some(libc::EINTR) => {}
                // The kernel is short of memory or completions wait to be taken, which the reaper does.
                _ => {
                    crate::log_limited!(warn, "io_uring takes no request: {error}; trying again");
                    std::thread::sleep(std::time::Duration::from_millis(1));
                }
            }
        }
    }

    /// Takes completions until the no-op with [`STOP`] and everything else have completed.
    fn reap(&self) {
        let mut stopping = false;
        loop {
            // SAFETY: only this thread uses the completion queue.
            let completions: Vec<_> = unsafe { self.ring.completion_shared() }.collect();
            for completion in &completions {
                if completion.user_data() == STOP {
                    stopping = true;
                    continue;
                }
                let entry = lock(&self.slots).take(completion.user_data() as usize);
                if let Some(entry) = entry {
                    let result = usize::try_from(completion.result())
                        .map_err(|_| io::Error::from_raw_os_error(-completion.result()));
                    (entry.done)(result);
                }
            }
            if stopping && lock(&self.slots).used.iter().all(Option::is_none) {
                return;
            }
            if completions.is_empty() {
                self.wait();
            }
        }
    }

    fn wait(&self) {
        /// `IORING_ENTER_GETEVENTS`
        const GET_EVENTS: u32 = 1;
        // SAFETY: no argument is passed; nothing is submitted, so the submission queue is not touched.
        let result = unsafe { self.ring.submitter().enter::<libc::sigset_t>(0, 1, GET_EVENTS, None) };
        if let Err(error) = result
            && error.kind() != io::ErrorKind::Interrupted
        {
            crate::log_limited!(error, "cannot wait for io_uring: {error}; trying again");
            std::thread::sleep(std::time::Duration::from_millis(1));
        }
    }
}

impl Drop for FileRing {
    fn drop(&mut self) {
        // SAFETY: a no-op refers to nothing.
        unsafe {
            self.inner.push(opcode::Nop::new().build().flags(Flags::FIXED_FILE).user_data(STOP));
        }
        if let Some(reaper) = self.reaper.take() {
            // The last owner may be a `done` that the reaper itself runs; then it ends by itself.
            if reaper.thread().id() != std::thread::current().id() {
                let _ = reaper.join();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::sync::mpsc;

    use super::*;

    /// Two pieces of memory.
    struct Pieces([Box<[std::sync::atomic::AtomicU8]>; 2]);

    impl Pieces {
        fn new(fill: u8, len: usize) -> Arc<Self> {
            let piece = || (0..len).map(|_| std::sync::atomic::AtomicU8::new(fill)).collect();
            Arc::new(Self([piece(), piece()]))
        }
        fn bytes(&self) -> Vec<u8> {
            self.0.iter().flatten().map(|b| b.load(std::sync::atomic::Ordering::Relaxed)).collect()
        }
    }

    impl TransferBuffers for Pieces {
        fn slices(&self) -> Vec<VolatileSlice<'_>> {
            let slice = |piece: &[std::sync::atomic::AtomicU8]| {
                // SAFETY: atomics may change at any time; the memory lives as long as `self`.
                unsafe { VolatileSlice::new(piece.as_ptr() as *mut u8, piece.len()) }
            };
            self.0.iter().map(|piece| slice(piece)).collect()
        }
    }

    fn ring(file: &std::fs::File) -> Option<FileRing> {
        match FileRing::new(file) {
            Ok(ring) => Some(ring),
            Err(error) => {
                println!("skipped: this host gives no io_uring: {error}");
                None
            }
        }
    }

    #[test]
    fn transfers_complete_with_their_data_and_in_any_number() {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&[7; 8192]).unwrap();
        let Some(ring) = ring(&file) else { return };
        let (sender, results) = mpsc::channel();
        let written = Pieces::new(9, 1024);
        let done = |tag: usize| {
            let sender = sender.clone();
            Box::new(move |result: io::Result<usize>| sender.send((tag, result.unwrap())).unwrap()) as Done
        };
        assert!(ring.submit(Direction::Write, 4096, written, done(1000)).is_ok());
        assert_eq!(results.recv().unwrap(), (1000, 2048));
        let all: Vec<_> = (0..200).map(|_| Pieces::new(0, 2048)).collect();
        for (tag, pieces) in all.iter().enumerate() {
            assert!(ring.submit(Direction::Read, 2048, pieces.clone(), done(tag)).is_ok());
        }
        let mut seen: Vec<usize> = (0..200).map(|_| results.recv().unwrap().0).collect();
        seen.sort_unstable();
        assert_eq!(seen, (0..200).collect::<Vec<_>>());
        let expected = [vec![7; 2048], vec![9; 2048]].concat();
        assert!(all.iter().all(|pieces| pieces.bytes() == expected));
        // At the end of the file the count is short.
        assert!(ring.submit(Direction::Read, 8000, Pieces::new(0, 512), done(1)).is_ok());
        assert_eq!(results.recv().unwrap(), (1, 192));
    }

    #[test]
    fn a_host_error_reaches_the_caller() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("f");
        std::fs::write(&path, [0; 512]).unwrap();
        let file = std::fs::File::open(&path).unwrap();
        let Some(ring) = ring(&file) else { return };
        let (sender, results) = mpsc::channel();
        let done: Done = Box::new(move |result| sender.send(result).unwrap());
        assert!(ring.submit(Direction::Write, 0, Pieces::new(1, 8), done).is_ok());
        assert_eq!(results.recv().unwrap().unwrap_err().raw_os_error(), Some(libc::EBADF));
    }

    #[test]
    fn dropping_the_ring_waits_for_what_is_under_way() {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&vec![7; 1 << 20]).unwrap();
        let Some(ring) = ring(&file) else { return };
        let (sender, results) = mpsc::channel();
        for _ in 0..100 {
            let sender = sender.clone();
            let done: Done = Box::new(move |result| sender.send(result.unwrap()).unwrap());
            assert!(ring.submit(Direction::Read, 0, Pieces::new(0, 4096), done).is_ok());
        }
        drop(ring);
        assert_eq!(results.try_iter().count(), 100);
    }

    #[test]
    fn the_kernel_refuses_everything_that_is_not_permitted() {
        let file = tempfile::tempfile().unwrap();
        let Some(ring) = ring(&file) else { return };
        assert!(ring.inner.ring.submitter().register_files_update(0, &[0]).is_err());
        let (sender, results) = mpsc::channel();
        let attempt = |operation: squeue::Entry| {
            let sender = sender.clone();
            let done: Done = Box::new(move |result| sender.send(result).unwrap());
            let entry = InFlight { done, _vectors: Box::new([]), _buffers: Pieces::new(0, 1) };
            let index = lock(&ring.inner.slots).put(entry).ok().unwrap();
            // SAFETY: these operations refer to no memory.
            unsafe { ring.inner.push(operation.user_data(index as u64)) };
            results.recv().unwrap().unwrap_err().raw_os_error()
        };
        let other_operation = opcode::Fsync::new(Fixed(0)).build();
        assert_eq!(attempt(other_operation), Some(libc::EACCES));
        let other_file =
            opcode::Readv::new(io_uring::types::Fd(file.as_raw_fd()), std::ptr::null(), 0).build();
        assert_eq!(attempt(other_file), Some(libc::EACCES));
    }
}
