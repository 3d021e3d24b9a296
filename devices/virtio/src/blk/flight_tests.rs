//! Requests under way: out of order, limited, kept after errors of the host, and across pauses and saved states.

use std::sync::atomic::AtomicUsize;
use std::time::{Duration, Instant};

use atoll_foundation::throttle::Rate;
use atoll_storage::error::Operation;
use atoll_storage::faulty::{Fault, FaultPlan, FaultyDisk};
use atoll_storage::{EngineKind, OpenOptions, RawDisk};

use super::request::{kind, status};
use super::*;
use crate::testing::{MemoryDisk, Setup, TestDriver, TestMachine, into, out};

const SECTORS: usize = 8192;

struct Bench {
    machine: TestMachine,
    blk: Arc<Blk>,
    driver: TestDriver,
}

fn bench(engine: Arc<dyn AsyncDisk>, options: &BlkOptions) -> Bench {
    let machine = TestMachine::new();
    let blk = Blk::with_engine(engine, options);
    let mut driver = TestDriver::probe(&machine, blk.clone(), 0);
    driver.start(Setup { queue_size: 256, ..Setup::default() });
    Bench { machine, blk, driver }
}

/// A raw image of the host that reads as its sector numbers.
fn image(kind: EngineKind) -> Option<(tempfile::TempDir, Arc<Engine>)> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("disk.img");
    let content: Vec<u8> = (0..SECTORS as u64).flat_map(|n| [n.to_le_bytes(); 64].concat()).collect();
    std::fs::write(&path, content).unwrap();
    let disk = Arc::new(RawDisk::open(&path, OpenOptions { read_only: false }).unwrap());
    match Engine::new(disk, kind) {
        Ok(engine) => Some((folder, engine)),
        Err(error) => {
            println!("skipped: this host gives no io_uring: {error}");
            None
        }
    }
}

impl Bench {
    /// Adds a request of `len` bytes without notifying. Head, data and status.
    fn add(&mut self, kind: u32, sector: u64, len: u32) -> (u16, u64, u64) {
        let d = &mut self.driver;
        let mut header = kind.to_le_bytes().to_vec();
        header.extend_from_slice(&[0; 4]);
        header.extend_from_slice(&sector.to_le_bytes());
        let (header, data, status) =
            (d.alloc_bytes(&header), d.alloc(u64::from(len), 16), d.alloc_bytes(&[9]));
        let piece = if kind == kind::IN { into(data, len) } else { out(data, len) };
        let pieces = [out(header, 16), piece, into(status, 1)];
        let pieces: Vec<_> = pieces.into_iter().filter(|piece| piece.len != 0).collect();
        (d.add_indirect(0, &pieces), data, status)
    }

    fn ask(&mut self, kind: u32, sector: u64, len: u32) -> (u16, u64, u64) {
        let request = self.add(kind, sector, len);
        self.driver.kick(0);
        request
    }
}

#[test]
fn a_full_ring_of_requests_is_under_way_at_once_and_each_gets_its_own_data() {
    for kind in [EngineKind::IoUring, EngineKind::Threads] {
        let Some((_folder, engine)) = image(kind) else { continue };
        let mut b = bench(engine, &BlkOptions { inline: false, ..BlkOptions::default() });
        let asked: Vec<_> = (0..200).map(|n| b.add(kind::IN, n * 40, 4096)).collect();
        b.driver.kick(0);
        let mut heads: Vec<u16> = asked
            .iter()
            .map(|_| b.driver.wait_used(0).unwrap())
            .map(|(head, len)| {
                assert_eq!(len, 4097);
                head
            })
            .collect();
        heads.sort_unstable();
        let mut expected: Vec<u16> = asked.iter().map(|(head, ..)| *head).collect();
        expected.sort_unstable();
        assert_eq!(heads, expected, "each is handed back once");
        for (n, (_, data, status)) in (0u64..).zip(&asked) {
            assert_eq!(b.driver.load(*status, 1), [status::OK]);
            assert_eq!(b.driver.load(*data, 8), (n * 40).to_le_bytes());
            assert_eq!(b.driver.load(*data + 4088, 8), (n * 40 + 7).to_le_bytes());
        }
        assert_eq!(b.blk.metrics().snapshot().reads, 200);
    }
}

#[test]
fn a_pause_hands_back_all_that_is_under_way_and_marks_what_was_read() {
    for kind in [EngineKind::IoUring, EngineKind::Threads] {
        let Some((_folder, engine)) = image(kind) else { continue };
        let mut b = bench(engine, &BlkOptions { inline: false, ..BlkOptions::default() });
        let view = b.machine.memory.snapshot();
        let atoll_machine::memory::FlatTarget::Ram { block, .. } = &view.lookup(0).unwrap().target else {
            panic!("RAM at 0");
        };
        let asked: Vec<_> = (0..50).map(|n| b.add(kind::IN, n, 4096)).collect();
        let mut log = block.dirty_log();
        log.take();
        b.driver.kick(0);
        b.driver.pci.pause();
        let before = b.driver.pci.save();
        let handed_back: Vec<u16> = std::iter::from_fn(|| b.driver.take_used(0)).map(|used| used.0).collect();
        assert!(!handed_back.is_empty());
        let state = BlkStateV1::decode(&before.device.clone().unwrap()[..]).unwrap();
        assert_eq!(state.taken, [], "{kind:?}: what was taken was handed back");
        let dirty: Vec<u64> = log.take().iter().collect();
        for (_, data, _) in asked.iter().filter(|(head, ..)| handed_back.contains(head)) {
            assert!(dirty.contains(&(data / 4096)), "{data:#x} of {dirty:x?}");
        }
        assert_eq!(b.driver.pci.save(), before, "nothing changes while paused");
        b.driver.pci.resume();
        (handed_back.len()..50).for_each(|_| assert!(b.driver.wait_used(0).is_some()));
    }
}

#[test]
fn rates_hold_within_five_percent_and_change_at_once() {
    let rate = |per_second, burst| Some(Rate { per_second, burst });
    let limits = RateLimits { operations: rate(1000, 10), bytes: None };
    let disk = MemoryDisk::new(SECTORS, false);
    let mut b = bench(Engine::auto(disk), &BlkOptions { limits, ..BlkOptions::default() });
    let read = |b: &mut Bench, count: u64, len: u32| {
        let start = Instant::now();
        // Many are in the ring all the time.
        let (mut added, mut done) = (0, 0);
        let (_, data, _) = b.add(kind::IN, 0, len);
        let header = b.driver.alloc(16, 16);
        added += 1;
        while done < count {
            while added < count && added - done < 32 {
                b.driver.add(0, &[out(header, 16), into(data, len + 1)]);
                added += 1;
            }
            b.driver.kick(0);
            assert!(b.driver.wait_used(0).is_some());
            done += 1;
        }
        start.elapsed().as_secs_f64()
    };
    let time = read(&mut b, 510, 512);
    assert!((0.475..0.56).contains(&time), "500 operations at 1000 a second took {time} s");
    b.blk.set_limits(RateLimits { operations: None, bytes: rate(4 << 20, 64 << 10) });
    assert_eq!(b.blk.limits().operations, None);
    let bytes = (2u64 << 20) + (64 << 10);
    let time = read(&mut b, bytes / 16384, 16384);
    assert!((0.475..0.56).contains(&time), "2 MiB at 4 MiB a second took {time} s");
    // A request that waits for a slow rate goes on when the rate is lifted.
    b.blk.set_limits(RateLimits { operations: None, bytes: rate(1, 1) });
    b.ask(kind::IN, 0, 16384);
    b.ask(kind::IN, 0, 16384);
    assert!(b.driver.take_used(0).is_none());
    b.blk.set_limits(RateLimits::default());
    assert!(b.driver.wait_used(0).is_some() && b.driver.wait_used(0).is_some());
}

/// A disk that fails by plan, with its plan and how often trouble was told.
fn troubled(disk: Arc<MemoryDisk>) -> (Bench, Arc<FaultPlan>, Arc<AtomicUsize>) {
    let plan = FaultPlan::new();
    let told = Arc::new(AtomicUsize::new(0));
    let counter = told.clone();
    let options = BlkOptions {
        on_trouble: Some(Arc::new(move |_| {
            counter.fetch_add(1, Ordering::SeqCst);
        })),
        ..BlkOptions::default()
    };
    (bench(Engine::auto(Arc::new(FaultyDisk::new(disk, plan.clone()))), &options), plan, told)
}

fn wait_kept(b: &Bench, count: usize) {
    let end = Instant::now() + Duration::from_secs(10);
    while b.blk.kept() != count {
        assert!(Instant::now() < end, "{} kept", b.blk.kept());
        std::thread::yield_now();
    }
}

#[test]
fn a_request_that_fails_for_lack_of_space_is_kept_until_it_succeeds() {
    let disk = MemoryDisk::new(SECTORS, false);
    let (mut b, plan, told) = troubled(disk.clone());
    plan.fail_all(Operation::Write, Fault::NoSpace);
    let (_, data, place) = b.add(kind::OUT, 7, 512);
    b.driver.store(data, &[5; 512]);
    b.driver.kick(0);
    b.ask(kind::OUT, 9, 512);
    wait_kept(&b, 2);
    assert_eq!(told.load(Ordering::SeqCst), 1, "the first tells");
    // Others go on.
    let (_, _, other) = b.ask(kind::IN, 0, 512);
    assert!(b.driver.wait_used(0).is_some());
    assert_eq!(b.driver.load(other, 1), [status::OK]);
    b.driver.pci.pause();
    assert!(!b.blk.retry(), "it still fails");
    assert_eq!((b.blk.kept(), told.load(Ordering::SeqCst)), (2, 2));
    plan.clear();
    assert!(b.blk.retry());
    assert!(b.driver.take_used(0).is_none(), "a paused device touches nothing");
    b.driver.pci.resume();
    assert!(b.driver.wait_used(0).is_some() && b.driver.wait_used(0).is_some());
    assert_eq!(b.driver.load(place, 1), [status::OK]);
    assert_eq!(disk.content()[7 * 512..8 * 512], [5; 512]);
    assert_eq!(b.blk.metrics().snapshot().errors, 0);
}

#[test]
fn without_a_place_to_tell_an_error_is_the_guests() {
    let plan = FaultPlan::new();
    let disk = FaultyDisk::new(MemoryDisk::new(SECTORS, false), plan.clone());
    let mut b = bench(Engine::auto(Arc::new(disk)), &BlkOptions::default());
    plan.fail_nth(Operation::Read, 0, Fault::Io);
    let (_, _, place) = b.ask(kind::IN, 0, 512);
    assert!(b.driver.wait_used(0).is_some());
    assert_eq!(b.driver.load(place, 1), [status::IOERR]);
    assert_eq!((b.blk.kept(), b.blk.metrics().snapshot().errors), (0, 1));
}

#[test]
fn kept_requests_are_in_the_saved_state_and_carried_out_by_whoever_restores_it() {
    let disk = MemoryDisk::new(SECTORS, false);
    let (mut b, plan, _) = troubled(disk.clone());
    plan.fail_all(Operation::Write, Fault::Io);
    let (_, data, place) = b.add(kind::OUT, 3, 512);
    b.driver.store(data, &[8; 512]);
    b.driver.kick(0);
    wait_kept(&b, 1);
    b.driver.pci.pause();
    let saved = b.driver.pci.save();
    // The same machine, on a disk that works.
    let blk = Blk::new(disk.clone(), &BlkOptions::default());
    let (pci, interrupts) = b.machine.plug(blk.clone());
    pci.restore(&saved).unwrap();
    assert_eq!(pci.save().device, saved.device, "still not done");
    pci.resume();
    let mut d = TestDriver::attach(&b.machine, pci, interrupts, 0);
    d.queues = b.driver.queues.clone();
    assert!(d.wait_used(0).is_some());
    assert_eq!(d.load(place, 1), [status::OK]);
    assert_eq!(disk.content()[3 * 512..4 * 512], [8; 512]);
}

#[test]
fn a_driver_that_adds_the_same_request_for_ever_gets_as_many_as_its_ring_holds() {
    let (mut b, plan, _) = troubled(MemoryDisk::new(SECTORS, false));
    plan.fail_all(Operation::Read, Fault::Io);
    let (head, ..) = b.ask(kind::IN, 0, 512);
    wait_kept(&b, 1);
    for number in 2..300 {
        b.driver.publish(0, head);
        b.driver.kick(0);
        wait_kept(&b, number.min(256));
    }
    b.driver.reset();
    assert_eq!(b.blk.kept(), 0);
}

#[test]
fn a_disk_that_grows_tells_the_driver() {
    let Some((_folder, engine)) = image(EngineKind::Auto) else { return };
    let mut b = bench(engine, &BlkOptions::default());
    let generation = b.driver.read8(0x15);
    b.driver.interrupts.take();
    b.blk.resize(2 * SECTORS as u64 * 512).unwrap();
    assert_eq!(b.driver.interrupts.take(), [0]);
    assert_ne!(b.driver.read8(0x15), generation);
    assert_eq!(u64::from_le_bytes(b.driver.config(0)), 2 * SECTORS as u64);
    let (_, _, place) = b.ask(kind::OUT, 2 * SECTORS as u64 - 1, 512);
    assert!(b.driver.wait_used(0).is_some());
    assert_eq!(b.driver.load(place, 1), [status::OK]);
    assert!(b.blk.resize(512).is_err(), "disks do not shrink");
}

/// Prints how long short requests take both ways: `cargo test --release -p atoll-virtio -- --ignored --nocapture
/// measure`.
#[test]
#[ignore = "a measurement"]
fn measure_requests_carried_out_at_once_and_through_the_engine() {
    for kind in [EngineKind::IoUring, EngineKind::Threads] {
        for inline in [true, false] {
            for (len, depth) in [(4096u32, 1u64), (4096, 32), (65536, 32), (1 << 20, 4)] {
                for operation in [kind::IN, kind::OUT] {
                    let Some((_folder, engine)) = image(kind) else { continue };
                    let mut b = bench(engine, &BlkOptions { inline, ..BlkOptions::default() });
                    let (_, data, _) = b.ask(operation, 0, len);
                    b.driver.wait_used(0).unwrap();
                    let mut header = operation.to_le_bytes().to_vec();
                    header.resize(16, 0);
                    let (header, place) = (b.driver.alloc_bytes(&header), b.driver.alloc(1, 1));
                    let rounds = (256u64 << 20) / u64::from(len) / 8;
                    let start = Instant::now();
                    let (mut added, mut done) = (0, 0);
                    while done < rounds {
                        while added < rounds && added - done < depth {
                            let piece = if operation == kind::IN { into(data, len) } else { out(data, len) };
                            b.driver.add(0, &[out(header, 16), piece, into(place, 1)]);
                            added += 1;
                        }
                        b.driver.kick(0);
                        while done < added && b.driver.take_used(0).is_some() {
                            done += 1;
                        }
                    }
                    let each = start.elapsed().as_secs_f64() * 1e6 / rounds as f64;
                    println!(
                        "{kind:?} inline={inline} op={operation} len={len} depth={depth}: {each:.1} us each"
                    );
                }
            }
        }
    }
}
