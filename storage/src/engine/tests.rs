//! Engines of both kinds against a model, flushes, errors, and the end of an engine.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc;
use std::time::Duration;

use vm_memory::{MmapRegion, VolatileMemory, VolatileSlice};

use super::*;
use crate::disk::{Capabilities, read_bytes};
use crate::error::DiskErrorKind;
use crate::faulty::{Fault, FaultPlan, FaultyDisk, FaultyFile, MemoryFile, Random};
use crate::metrics::DiskMetrics;
use crate::raw::{OpenOptions, RawDisk, RawGeometry};

/// Memory in two pieces.
struct Memory(MmapRegion<()>, usize);

impl Memory {
    fn new(bytes: &[u8]) -> Arc<Self> {
        let region = MmapRegion::new(bytes.len().max(1)).unwrap();
        region.as_volatile_slice().copy_from(bytes);
        Arc::new(Self(region, bytes.len() / 3))
    }
    fn bytes(&self) -> Vec<u8> {
        let mut bytes = vec![0; self.0.size()];
        self.0.as_volatile_slice().copy_to(&mut bytes[..]);
        bytes
    }
}

impl TransferBuffers for Memory {
    fn slices(&self) -> Vec<VolatileSlice<'_>> {
        let (first, second) = self.0.as_volatile_slice().split_at(self.1).unwrap();
        vec![first, second]
    }
}

type Results = mpsc::Receiver<(usize, Result<(), DiskError>)>;

/// Submits and gives results with tags.
struct Client {
    engine: Arc<Engine>,
    sender: mpsc::Sender<(usize, Result<(), DiskError>)>,
}

impl Client {
    fn new(engine: Arc<Engine>) -> (Self, Results) {
        let (sender, results) = mpsc::channel();
        (Self { engine, sender }, results)
    }
    fn submit(&self, tag: usize, operation: Operation, offset: u64, len: u64, buffers: Option<Arc<Memory>>) {
        let sender = self.sender.clone();
        self.engine.submit(Submission {
            operation,
            offset,
            len,
            unmap: true,
            buffers: buffers.map(|b| b as Arc<dyn TransferBuffers>),
            done: Box::new(move |result| sender.send((tag, result)).unwrap_or_default()),
        });
    }
}

/// An engine over a raw image with this content, or `None` where the host has no such engine.
fn engine(kind: EngineKind, content: &[u8]) -> Option<(tempfile::TempDir, Arc<Engine>)> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("disk.raw");
    std::fs::write(&path, content).unwrap();
    let disk = RawDisk::open(&path, OpenOptions::default()).unwrap();
    match Engine::new(Arc::new(disk), kind) {
        Ok(engine) => Some((folder, engine)),
        Err(error) => {
            println!("skipped: this host gives no io_uring: {error}");
            None
        }
    }
}

#[test]
fn a_random_load_at_depth_32_leaves_what_a_vector_holds() {
    const SIZE: u64 = 4 << 20;
    const SLOT: u64 = SIZE / 32;
    for kind in [EngineKind::IoUring, EngineKind::Threads] {
        let Some((_folder, engine)) = engine(kind, &vec![0; SIZE as usize]) else { continue };
        assert_eq!(engine.uses_io_uring(), kind == EngineKind::IoUring);
        let (client, results) = Client::new(engine.clone());
        let mut model = vec![0u8; SIZE as usize];
        let mut reads: Vec<Option<(Arc<Memory>, Vec<u8>)>> = vec![None; 32];
        let mut random = Random::new(5);
        // Every slot of the disk has at most one request under way, so the outcome is certain.
        for step in 0..3000usize {
            let slot = if step < 32 {
                step
            } else {
                results.recv().map(|(slot, r)| r.map(|()| slot)).unwrap().unwrap()
            };
            if let Some((memory, expected)) = reads[slot].take() {
                assert!(memory.bytes() == expected, "{kind:?} step {step}");
            }
            let len = 1 + random.below(40_000);
            let offset = slot as u64 * SLOT + random.below(SLOT - len);
            let range = offset as usize..(offset + len) as usize;
            match random.below(8) {
                0 => client.submit(slot, Operation::Flush, 0, 0, None),
                1 => {
                    client.submit(slot, Operation::WriteZeroes, offset, len, None);
                    model[range].fill(0);
                }
                2..=4 => {
                    let bytes: Vec<u8> = (0..len).map(|_| random.next_u64() as u8).collect();
                    client.submit(slot, Operation::Write, offset, len, Some(Memory::new(&bytes)));
                    model[range].copy_from_slice(&bytes);
                }
                _ => {
                    let memory = Memory::new(&vec![0xee; len as usize]);
                    client.submit(slot, Operation::Read, offset, len, Some(memory.clone()));
                    reads[slot] = Some((memory, model[range].to_vec()));
                }
            }
        }
        engine.drain();
        assert_eq!(results.try_iter().filter(|(_, result)| result.is_ok()).count(), 32);
        let mut found = vec![1; SIZE as usize];
        read_bytes(&**engine.disk(), 0, &mut found).unwrap();
        assert!(found == model, "{kind:?}");
        assert_eq!(engine.disk().metrics().snapshot().errors, 0);
    }
}

#[test]
fn a_transfer_that_ends_short_is_done_again_and_counted_once() {
    for kind in [EngineKind::IoUring, EngineKind::Threads] {
        // 700 bytes are two sectors, of which the second has a tail that is not in the file.
        let Some((_folder, engine)) = engine(kind, &[7; 700]) else { continue };
        let (client, results) = Client::new(engine.clone());
        let memory = Memory::new(&[1; 1024]);
        client.submit(0, Operation::Read, 0, 1024, Some(memory.clone()));
        results.recv().unwrap().1.unwrap();
        assert_eq!(memory.bytes(), [vec![7; 700], vec![0; 324]].concat());
        client.submit(1, Operation::Read, 1000, 1024, Some(memory));
        assert_eq!(results.recv().unwrap().1.unwrap_err().kind(), DiskErrorKind::OutOfRange);
        let counted = engine.disk().metrics().snapshot();
        assert_eq!((counted.reads, counted.read_bytes, counted.errors), (1, 1024, 1));
    }
}

#[test]
fn an_engine_that_must_use_io_uring_says_when_the_disk_cannot() {
    let geometry = RawGeometry {
        file_size: 512,
        logical_block_size: 512,
        discard_granularity: None,
        range_alignment: 1,
        read_only: false,
    };
    let disk: Arc<dyn Disk> = Arc::new(RawDisk::over(MemoryFile::new(vec![0; 512], 512), geometry));
    assert!(Engine::new(disk.clone(), EngineKind::IoUring).is_err());
    assert!(!Engine::auto(disk).uses_io_uring());
}

/// A disk whose flushes wait to be let go.
#[derive(Default)]
struct Gate {
    open: AtomicBool,
    begun: AtomicUsize,
    at_once: AtomicUsize,
    metrics: DiskMetrics,
}

impl Disk for Gate {
    fn capacity_bytes(&self) -> u64 {
        1 << 20
    }
    fn logical_block_size(&self) -> u32 {
        512
    }
    fn capabilities(&self) -> Capabilities {
        Capabilities::default()
    }
    fn read_at(&self, _offset: u64, _buffers: &[VolatileSlice<'_>]) -> Result<(), DiskError> {
        Ok(())
    }
    fn write_at(&self, _offset: u64, _buffers: &[VolatileSlice<'_>]) -> Result<(), DiskError> {
        Ok(())
    }
    fn flush(&self) -> Result<(), DiskError> {
        assert_eq!(self.at_once.fetch_add(1, Ordering::SeqCst), 0, "two flushes at the same time");
        self.begun.fetch_add(1, Ordering::SeqCst);
        while !self.open.load(Ordering::SeqCst) {
            std::thread::sleep(Duration::from_millis(1));
        }
        self.at_once.fetch_sub(1, Ordering::SeqCst);
        Ok(())
    }
    fn discard(&self, _offset: u64, _len: u64) -> Result<(), DiskError> {
        Ok(())
    }
    fn write_zeroes(&self, _offset: u64, _len: u64, _unmap: bool) -> Result<(), DiskError> {
        Ok(())
    }
    fn metrics(&self) -> &DiskMetrics {
        &self.metrics
    }
}

#[test]
fn a_flush_that_comes_during_another_waits_for_the_next_and_shares_it() {
    let gate = Arc::new(Gate::default());
    let engine = Engine::auto(gate.clone());
    let (client, results) = Client::new(engine);
    client.submit(0, Operation::Flush, 0, 0, None);
    while gate.begun.load(Ordering::SeqCst) == 0 {
        std::thread::yield_now();
    }
    for tag in 1..10 {
        client.submit(tag, Operation::Flush, 0, 0, None);
    }
    // Other requests do not wait behind it.
    client.submit(99, Operation::Read, 0, 512, Some(Memory::new(&[0; 512])));
    assert_eq!(results.recv().unwrap().0, 99);
    gate.open.store(true, Ordering::SeqCst);
    let tags: Vec<usize> = (0..10).map(|_| results.recv().unwrap().0).collect();
    assert_eq!(tags, (0..10).collect::<Vec<_>>());
    assert_eq!(gate.begun.load(Ordering::SeqCst), 2, "nine flushes share one");
}

#[test]
fn everybody_who_waited_for_a_failed_flush_hears_of_it_and_all_later_ones_fail() {
    let plan = FaultPlan::new();
    let file = FaultyFile::new(MemoryFile::new(vec![0; 4096], 4096), plan.clone());
    let geometry = RawGeometry {
        file_size: 4096,
        logical_block_size: 512,
        discard_granularity: None,
        range_alignment: 1,
        read_only: false,
    };
    let (client, results) = Client::new(Engine::auto(Arc::new(RawDisk::over(file, geometry))));
    plan.fail_nth(Operation::Flush, 0, Fault::Io);
    for tag in 0..20 {
        client.submit(tag, Operation::Flush, 0, 0, None);
    }
    for _ in 0..20 {
        assert!(results.recv().unwrap().1.unwrap_err().is_final());
    }
    assert_eq!(plan.injected(), 1);
}

#[test]
fn errors_of_the_disk_reach_the_one_who_asked() {
    let plan = FaultPlan::new();
    let disk = FaultyDisk::new(Gate { open: true.into(), ..Gate::default() }, plan.clone());
    let (client, results) = Client::new(Engine::auto(Arc::new(disk)));
    plan.fail_nth(Operation::Write, 1, Fault::NoSpace);
    for tag in 0..3 {
        client.submit(tag, Operation::Write, 0, 512, Some(Memory::new(&[0; 512])));
        let (_, result) = results.recv().unwrap();
        assert_eq!(
            result.err().map(|e| (e.kind(), e.is_final())),
            (tag == 1).then_some((DiskErrorKind::NoSpace, false))
        );
    }
}

#[test]
fn dropping_an_engine_waits_for_what_is_under_way_and_a_completion_may_do_it() {
    let gate = Arc::new(Gate::default());
    let engine = Engine::auto(gate.clone());
    let (client, results) = Client::new(engine);
    client.submit(0, Operation::Flush, 0, 0, None);
    let opener = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(20));
        gate.open.store(true, Ordering::SeqCst);
    });
    drop(client);
    assert_eq!(results.recv().unwrap().0, 0);
    opener.join().unwrap();
    let engine = Engine::auto(Arc::new(Gate::default()));
    let (sender, ended) = mpsc::channel();
    let last = engine.clone();
    engine.submit(Submission {
        operation: Operation::Read,
        offset: 0,
        len: 0,
        unmap: false,
        buffers: None,
        done: Box::new(move |_| {
            drop(last);
            sender.send(()).unwrap();
        }),
    });
    drop(engine);
    ended.recv_timeout(Duration::from_secs(10)).unwrap();
}
