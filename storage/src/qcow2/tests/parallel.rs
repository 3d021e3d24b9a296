//! Random operations from several threads at once.
//!
//! Each thread has slices of the disk of its own, a few sectors long and mixed with those of the others, so that
//! clusters and tables are shared and the outcome is still certain. The file under the image takes its time now and
//! then, so that transfers, allocations and commits meet.

use std::io;
use std::os::fd::BorrowedFd;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

use vm_memory::VolatileSlice;

use super::*;
use crate::disk::{DirectEnd, total_len};
use crate::error::Operation;
use crate::faulty::{RecordingFile, WriteLog};

const THREADS: u64 = 4;

/// A file that dawdles by chance before and after what it does.
struct Slow<F> {
    inner: F,
    turn: AtomicU64,
}

impl<F> Slow<F> {
    fn new(inner: F) -> Self {
        Self { inner, turn: AtomicU64::new(0) }
    }
    fn dawdle(&self) {
        match Random::new(self.turn.fetch_add(1, Ordering::Relaxed)).below(16) {
            0 => std::thread::sleep(std::time::Duration::from_micros(100)),
            1..=6 => std::thread::yield_now(),
            _ => {}
        }
    }
    fn slowly<R>(&self, operation: impl FnOnce(&F) -> R) -> R {
        self.dawdle();
        let result = operation(&self.inner);
        self.dawdle();
        result
    }
}

impl<F: ImageFile> ImageFile for Slow<F> {
    fn read_at(&self, offset: u64, buffers: &[VolatileSlice<'_>]) -> io::Result<usize> {
        self.slowly(|file| file.read_at(offset, buffers))
    }
    fn write_at(&self, offset: u64, buffers: &[VolatileSlice<'_>]) -> io::Result<()> {
        self.slowly(|file| file.write_at(offset, buffers))
    }
    fn sync_data(&self) -> io::Result<()> {
        self.slowly(|file| file.sync_data())
    }
    fn punch_hole(&self, offset: u64, len: u64) -> io::Result<()> {
        self.slowly(|file| file.punch_hole(offset, len))
    }
    fn zero_range(&self, offset: u64, len: u64) -> io::Result<()> {
        self.slowly(|file| file.zero_range(offset, len))
    }
    fn descriptor(&self) -> Option<BorrowedFd<'_>> {
        self.inner.descriptor()
    }
}

/// Sectors of a slice: sometimes less than a cluster, sometimes several.
fn slice_sectors(seed: u64) -> u64 {
    1 << Random::new(seed ^ 0x511ce).below(8)
}

/// One random slice of a thread's own: offset and length in bytes.
fn own_range(random: &mut Random, thread: u64, slice: u64, capacity: u64) -> (u64, u64) {
    loop {
        let rounds = capacity.div_ceil(slice * THREADS);
        let start = (random.below(rounds) * THREADS + thread) * slice;
        if start < capacity {
            let len = slice.min(capacity - start);
            let skip = if random.below(2) == 0 { 0 } else { random.below(len / 512) * 512 };
            return (start + skip, len - skip);
        }
    }
}

/// A transfer that the host carries out by itself, as an engine does it.
fn direct_write<F: ImageFile>(
    disk: &Qcow2Disk<F>,
    file: &impl ImageFile,
    offset: u64,
    bytes: &mut [u8],
) -> bool {
    let Some(direct) = disk.begin_direct(Operation::Write, offset, bytes.len() as u64) else { return false };
    file.write_at(direct.host_offset, &[VolatileSlice::from(bytes)]).unwrap();
    disk.end_direct(direct, DirectEnd::Done);
    true
}

/// One operation in a thread's own slices. Discarded bytes become what they read as.
fn operate<F: ImageFile>(
    disk: &Qcow2Disk<F>,
    file: &impl ImageFile,
    model: &mut [u8],
    random: &mut Random,
    (offset, len): (u64, u64),
) {
    let range = offset as usize..(offset + len) as usize;
    match random.below(16) {
        0..=6 => {
            let mut bytes = random_bytes(random, len);
            if random.below(2) == 0 || !direct_write(disk, file, offset, &mut bytes) {
                write_bytes(disk, offset, &bytes).unwrap();
            }
            model[range].copy_from_slice(&bytes);
        }
        7 | 8 => {
            disk.write_zeroes(offset, len, random.below(2) == 0).unwrap();
            model[range].fill(0);
        }
        9 => {
            disk.discard(offset, len).unwrap();
            let mut now = vec![0; len as usize];
            read_bytes(disk, offset, &mut now).unwrap();
            assert!(now.iter().zip(&model[range.clone()]).all(|(new, old)| new == old || *new == 0));
            model[range].copy_from_slice(&now);
        }
        10 => disk.flush().unwrap(),
        11 => {
            // Everybody's, so nothing is known about the content.
            let mut now = vec![1; disk.capacity_bytes().min(64 << 10) as usize];
            read_bytes(disk, 0, &mut now).unwrap();
        }
        12 => {
            let mut now = vec![1; len as usize];
            let buffers = [VolatileSlice::from(&mut now[..])];
            if disk.try_read_at(offset, &buffers).is_some_and(|result| result.is_ok()) {
                assert_eq!(total_len(&buffers), len);
                assert!(now == model[range], "{len} bytes at {offset} differ");
            }
        }
        _ => {
            let mut now = vec![1; len as usize];
            read_bytes(disk, offset, &mut now).unwrap();
            assert!(now == model[range], "{len} bytes at {offset} differ");
        }
    }
}

/// Copies a thread's slices out of its model into the one of the whole.
fn merge(whole: &mut [u8], part: &[u8], thread: u64, slice: u64) {
    for (index, (to, from)) in (0u64..).zip(whole.chunks_mut(slice as usize).zip(part.chunks(slice as usize)))
    {
        if index % THREADS == thread {
            to.copy_from_slice(from);
        }
    }
}

#[test]
fn threads_that_share_clusters_each_find_what_they_wrote() {
    const CASES: u64 = 40;
    const OPERATIONS: u64 = 60;
    for seed in 0..CASES {
        let mut random = Random::new(seed ^ 0x7a2a11e1);
        let mut options = random_options(&mut random);
        let slice = slice_sectors(seed) * 512;
        options.size = options.size.max(slice * THREADS);
        let backing = (random.below(2) == 0).then(|| {
            let len = 1 + random.below(options.size * 2);
            random_bytes(&mut random, len)
        });
        options.backing = backing.as_ref().and_then(|_| backing_name());
        let (file, size) = memory_image(&options);
        let slow = Arc::new(Slow::new(file.clone()));
        let disk = open(slow.clone(), size, backing.clone().map(raw_backing));
        let before = content(&disk);
        let whole = Mutex::new(before.clone());
        std::thread::scope(|scope| {
            for thread in 0..THREADS {
                let (disk, slow, whole, before) = (&disk, &slow, &whole, &before);
                scope.spawn(move || {
                    let mut random = Random::new(seed << 8 | thread);
                    let mut model = before.clone();
                    for _ in 0..OPERATIONS {
                        let range = own_range(&mut random, thread, slice, disk.capacity_bytes());
                        operate(disk, slow, &mut model, &mut random, range);
                    }
                    merge(&mut whole.lock().unwrap(), &model, thread, slice);
                });
            }
        });
        let whole = whole.into_inner().unwrap();
        assert!(content(&disk) == whole, "seed {seed}: {options:?}");
        let report = disk.check().unwrap();
        assert!(report.is_clean(), "seed {seed}: {report:?} {options:?}");
        drop(disk);
        let size = file.content().len() as u64;
        let disk = Qcow2Disk::over(file, size, true, backing.map(raw_backing)).unwrap();
        assert!(content(&disk) == whole, "seed {seed} after opening again");
    }
}

/// What a thread did before a cut: its model after each operation. Marks name thread and operation.
type History = Vec<Vec<u8>>;
const FLUSHED: u64 = 1 << 63;

fn record(options: &CreateOptions, seed: u64, slice: u64) -> (Arc<WriteLog>, Vec<History>) {
    const OPERATIONS: u64 = 40;
    let (file, size) = memory_image(options);
    let file = RecordingFile::new(file, size).unwrap();
    let log = file.log();
    let slow = Arc::new(Slow::new(file));
    let disk = open(slow.clone(), size, None);
    let before = content(&disk);
    let histories = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..THREADS)
            .map(|thread| {
                let (disk, slow, log, before) = (&disk, &slow, &log, &before);
                scope.spawn(move || {
                    let mut random = Random::new(seed << 8 | thread);
                    let mut history = vec![before.clone()];
                    for number in 0..OPERATIONS {
                        let mut model = history[number as usize].clone();
                        log.mark(thread << 32 | number);
                        if random.below(5) == 0 {
                            disk.flush().unwrap();
                            log.mark(FLUSHED | thread << 32 | number);
                        } else {
                            let range = own_range(&mut random, thread, slice, disk.capacity_bytes());
                            operate(disk, slow, &mut model, &mut random, range);
                        }
                        history.push(model);
                    }
                    history
                })
            })
            .collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    std::mem::forget(disk);
    (log, histories)
}

/// Whether a thread's sectors hold what they held at its last flush, or what it gave them since.
fn holds(found: &[u8], marks: &[u64], history: &History, thread: u64, slice: u64) -> bool {
    let own = |mark: &&u64| (**mark & !FLUSHED) >> 32 == thread;
    let number = |mark: &u64| (mark & 0xffff_ffff) as usize;
    let first = marks.iter().filter(own).filter(|m| **m & FLUSHED != 0).map(number).max().unwrap_or(0);
    let last = marks.iter().filter(own).filter(|m| **m & FLUSHED == 0).map(number).max().map_or(0, |n| n + 1);
    found.chunks(512).enumerate().all(|(sector, bytes)| {
        let at = sector * 512;
        (at as u64 / slice) % THREADS != thread
            || history[first..=last].iter().any(|state| state[at..at + bytes.len()] == *bytes)
    })
}

#[test]
fn power_cuts_under_parallel_load_lose_nothing_that_a_thread_flushed() {
    let base = CreateOptions { size: 1 << 20, ..Default::default() };
    let cases = [
        CreateOptions { cluster_bits: 12, ..base.clone() },
        CreateOptions { cluster_bits: 16, extended_l2: true, ..base.clone() },
        CreateOptions { cluster_bits: 9, refcount_bits: 64, ..base },
    ];
    for (case, options) in (0u64..).zip(cases) {
        let slice = 512 << case;
        let (log, histories) = record(&options, case, slice);
        let mut random = Random::new(case ^ 0xc07);
        for number in 0..60 {
            let (point, seed) = (random.below(log.len() as u64 + 1) as usize, random.next_u64());
            let cut = log.cut(point, seed);
            let size = cut.bytes.len() as u64;
            let disk = open(Arc::new(MemoryFile::new(cut.bytes, 1 << 30)), size, None);
            let found = content(&disk);
            for (thread, history) in (0u64..).zip(&histories) {
                let held = holds(&found, &cut.marks, history, thread, slice);
                assert!(held, "case {case} cut {number} at {point}: thread {thread}");
            }
            let report = disk.check().unwrap();
            assert!(report.is_consistent(), "case {case} cut {number}: {report:?}");
        }
    }
}

/// A file whose writes of data wait until they are let go.
struct Held {
    inner: MemoryFile,
    /// Writes at or behind this offset wait.
    from: AtomicU64,
    waiting: AtomicU64,
}

impl Held {
    fn wait(&self, offset: u64) {
        self.waiting.fetch_add(1, Ordering::SeqCst);
        while offset >= self.from.load(Ordering::SeqCst) {
            std::thread::yield_now();
        }
        self.waiting.fetch_sub(1, Ordering::SeqCst);
    }
}

impl ImageFile for Held {
    fn read_at(&self, offset: u64, buffers: &[VolatileSlice<'_>]) -> io::Result<usize> {
        self.wait(offset);
        self.inner.read_at(offset, buffers)
    }
    fn write_at(&self, offset: u64, buffers: &[VolatileSlice<'_>]) -> io::Result<()> {
        self.wait(offset);
        self.inner.write_at(offset, buffers)
    }
    fn sync_data(&self) -> io::Result<()> {
        Ok(())
    }
    fn punch_hole(&self, offset: u64, len: u64) -> io::Result<()> {
        self.inner.punch_hole(offset, len)
    }
    fn zero_range(&self, offset: u64, len: u64) -> io::Result<()> {
        self.inner.zero_range(offset, len)
    }
}

#[test]
fn a_slow_read_holds_up_nobody_and_never_sees_what_comes_to_its_place() {
    let (file, size) = memory_image(&CreateOptions { size: 1 << 20, cluster_bits: 12, ..Default::default() });
    let (from, waiting) = (AtomicU64::new(u64::MAX), AtomicU64::new(0));
    let held = Arc::new(Held { inner: MemoryFile::new(file.content(), 1 << 30), from, waiting });
    let disk = open(held.clone(), size, None);
    write_bytes(&disk, 0, &[1; 4096]).unwrap();
    write_bytes(&disk, 4096, &[2; 4096]).unwrap();
    disk.flush().unwrap();
    // Everything that was allocated lies in front of what comes now.
    let end = held.inner.content().len() as u64;
    std::thread::scope(|scope| {
        held.from.store(end - 4096, Ordering::SeqCst);
        let reader = scope.spawn(|| {
            let mut bytes = [0; 4096];
            read_bytes(&disk, 4096, &mut bytes).unwrap();
            bytes
        });
        while held.waiting.load(Ordering::SeqCst) == 0 {
            std::thread::yield_now();
        }
        // The cluster that is read is let go, and would be used again for the next write.
        let mut other = [0; 4096];
        read_bytes(&disk, 0, &mut other).unwrap();
        assert_eq!(other, [1; 4096]);
        disk.discard(4096, 4096).unwrap();
        disk.flush().unwrap();
        disk.flush().unwrap();
        let writer = scope.spawn(|| write_bytes(&disk, 8192, &[3; 4096]).unwrap());
        while held.waiting.load(Ordering::SeqCst) < 2 {
            std::thread::yield_now();
        }
        held.from.store(u64::MAX, Ordering::SeqCst);
        writer.join().unwrap();
        assert_eq!(reader.join().unwrap(), [2; 4096]);
    });
    disk.flush().unwrap();
    assert!(disk.check().unwrap().is_clean());
}
