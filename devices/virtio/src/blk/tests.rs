use super::request::{kind, status};
use super::*;
use crate::testing::{MemoryDisk, Piece, Setup, TestDriver, TestMachine, into, out};

const SECTORS: usize = 8192;

struct Bench {
    machine: TestMachine,
    disk: Arc<MemoryDisk>,
    blk: Arc<Blk>,
    driver: TestDriver,
}

fn bench(read_only: bool) -> Bench {
    let machine = TestMachine::new();
    let disk = MemoryDisk::new(SECTORS, read_only);
    let blk =
        Blk::new(disk.clone(), &BlkOptions { serial: "disk-0".into(), queues: 2, ..Default::default() });
    let mut driver = TestDriver::probe(&machine, blk.clone(), 0);
    driver.start(Setup::default());
    Bench { machine, disk, blk, driver }
}

fn header(kind: u32, sector: u64) -> [u8; 16] {
    let mut h = [0; 16];
    h[..4].copy_from_slice(&kind.to_le_bytes());
    h[8..].copy_from_slice(&sector.to_le_bytes());
    h
}

impl Bench {
    /// Sends a request with data pieces between header and status. Returns the status and the length written.
    fn request(&mut self, kind: u32, sector: u64, data: &[Piece]) -> (u8, u32) {
        let d = &mut self.driver;
        let header = d.alloc_bytes(&header(kind, sector));
        let status = d.alloc_bytes(&[0xaa]);
        let mut pieces = vec![out(header, 16)];
        pieces.extend_from_slice(data);
        pieces.push(into(status, 1));
        let head = d.add(0, &pieces);
        d.kick(0);
        let (id, len) = d.wait_used(0).expect("the request finishes");
        assert_eq!(id, head);
        (d.load(status, 1)[0], len)
    }
}

#[test]
fn configuration_describes_the_disk() {
    let b = bench(false);
    assert_eq!(u64::from_le_bytes(b.driver.config(0)), SECTORS as u64);
    assert_eq!(u32::from_le_bytes(b.driver.config(12)), SEG_MAX);
    assert_eq!(u32::from_le_bytes(b.driver.config(20)), 512);
    assert_eq!(u16::from_le_bytes(b.driver.config(34)), 2);
    assert_eq!(u32::from_le_bytes(b.driver.config(36)), 2048);
    assert_eq!(b.driver.config::<4>(1000), [0; 4]);
    assert_ne!(b.driver.offered() & feature::MQ, 0);
    assert_eq!(b.driver.offered() & feature::RO, 0);
    assert_eq!(b.driver.pci_read(0), 0x1042_1af4);
}

#[test]
fn what_is_written_is_read_back_on_either_queue() {
    let mut b = bench(false);
    let pattern: Vec<u8> = (0..1024u32).map(|i| (i * 7) as u8).collect();
    let source = b.driver.alloc_bytes(&pattern);
    assert_eq!(b.request(kind::OUT, 5, &[out(source, 512), out(source + 512, 512)]), (status::OK, 1));
    assert_eq!(&b.disk.content()[5 * 512..7 * 512], &pattern[..]);
    let to = b.driver.alloc(1024, 16);
    assert_eq!(b.request(kind::IN, 5, &[into(to, 100), into(to + 100, 924)]), (status::OK, 1025));
    assert_eq!(b.driver.load(to, 1024), pattern);
    let (h, s) = (b.driver.alloc_bytes(&header(kind::IN, 6)), b.driver.alloc(1, 1));
    b.driver.interrupts.take();
    b.driver.add_indirect(1, &[out(h, 16), into(to, 512), into(s, 1)]);
    b.driver.kick(1);
    assert_eq!(b.driver.take_used(1).unwrap().1, 513, "short requests finish on the thread that notifies");
    assert_eq!(b.driver.load(to, 512), pattern[512..]);
    assert_eq!(b.driver.interrupts.take(), [2]);
    assert_eq!(b.driver.pci.handed_over(), 0);
}

#[test]
fn header_and_status_may_be_cut_anywhere() {
    let mut b = bench(false);
    let d = &mut b.driver;
    let h = d.alloc_bytes(&header(kind::IN, 0));
    let to = d.alloc(1024, 16);
    // Status shares a descriptor with data, the header lies in three.
    d.add(0, &[out(h, 1), out(h + 1, 10), out(h + 11, 5), into(to, 513)]);
    d.kick(0);
    assert_eq!(d.take_used(0).unwrap().1, 513);
    assert_eq!(d.load(to + 512, 1), [status::OK]);
    // Header and data to write share one.
    let mut w = header(kind::OUT, 3).to_vec();
    w.extend_from_slice(&[7; 512]);
    let (w, s) = (d.alloc_bytes(&w), d.alloc_bytes(&[9]));
    d.add(0, &[out(w, 528), into(s, 1)]);
    d.kick(0);
    assert_eq!(d.take_used(0).unwrap().1, 1);
    assert_eq!(d.load(s, 1), [status::OK]);
    assert_eq!(b.disk.content()[3 * 512..4 * 512], [7; 512]);
}

#[test]
fn flush_is_a_flush() {
    let mut b = bench(false);
    assert_eq!(b.request(kind::FLUSH, 0, &[]), (status::OK, 1));
    assert_eq!(b.disk.flushes.load(Ordering::SeqCst), 1);
    assert_eq!(b.blk.metrics().snapshot().flushes, 1);
}

#[test]
fn writes_go_through_when_the_driver_cannot_flush() {
    let mut b = bench(false);
    b.driver.start(Setup { features: !feature::FLUSH, ..Setup::default() });
    let a = b.driver.alloc(512, 16);
    assert_eq!(b.request(kind::OUT, 0, &[out(a, 512)]).0, status::OK);
    assert_eq!(b.disk.flushes.load(Ordering::SeqCst), 1);
}

#[test]
fn requests_outside_the_disk_or_of_odd_length_fail_with_a_status() {
    let mut b = bench(false);
    let a = b.driver.alloc(1024, 16);
    for (sector, len) in [
        (SECTORS as u64, 512),
        (SECTORS as u64 - 1, 1024),
        (u64::MAX, 512),
        (u64::MAX / 512, 512),
        (0, 511),
        (0, 513),
    ] {
        assert_eq!(b.request(kind::IN, sector, &[into(a, len)]).0, status::IOERR, "{sector} {len}");
        assert_eq!(b.request(kind::OUT, sector, &[out(a, len)]).0, status::IOERR, "{sector} {len}");
    }
    assert_eq!(b.request(77, 0, &[]).0, status::UNSUPP);
    assert_eq!(b.blk.metrics().snapshot().refused, 13);
    assert!(!b.driver.needs_reset());
}

#[test]
fn a_short_header_still_gets_its_status() {
    let mut b = bench(false);
    let (h, s) = (b.driver.alloc(16, 16), b.driver.alloc_bytes(&[9]));
    b.driver.add(0, &[out(h, 15), into(s, 1)]);
    b.driver.kick(0);
    assert!(b.driver.take_used(0).is_some());
    assert_eq!(b.driver.load(s, 1), [status::IOERR]);
}

#[test]
fn a_request_without_a_place_for_its_status_stops_this_device_only() {
    let mut b = bench(false);
    let other = Blk::new(MemoryDisk::new(8, false), &BlkOptions::default());
    let mut other = TestDriver::probe(&b.machine, other, 1);
    other.start(Setup::default());
    let h = b.driver.alloc(16, 16);
    b.driver.add(0, &[out(h, 16)]);
    b.driver.kick(0);
    assert!(b.driver.needs_reset());
    assert_eq!(b.driver.interrupts.take(), [0]);
    assert!(!other.needs_reset());
    b.driver.start(Setup::default());
    assert_eq!(b.request(kind::GET_ID, 0, &[]).0, status::OK);
}

#[test]
fn the_serial_number_is_padded_and_cut() {
    let mut b = bench(false);
    let a = b.driver.alloc_bytes(&[0xff; 20]);
    assert_eq!(b.request(kind::GET_ID, 0, &[into(a, 20)]), (status::OK, 21));
    assert_eq!(&b.driver.load(a, 20)[..8], b"disk-0\0\0");
    assert_eq!(b.request(kind::GET_ID, 0, &[into(a, 3)]).0, status::OK);
}

fn range(sector: u64, sectors: u32, flags: u32) -> Vec<u8> {
    let mut r = sector.to_le_bytes().to_vec();
    r.extend_from_slice(&sectors.to_le_bytes());
    r.extend_from_slice(&flags.to_le_bytes());
    r
}

#[test]
fn discard_and_zeroing_check_all_ranges_before_touching_any() {
    let mut b = bench(false);
    let data = b.driver.alloc_bytes(&[5; 4096]);
    assert_eq!(b.request(kind::OUT, 0, &[out(data, 4096)]).0, status::OK);
    let mut two = range(0, 1, 0);
    two.extend(range(SECTORS as u64, 1, 0));
    let bad = b.driver.alloc_bytes(&two);
    assert_eq!(b.request(kind::WRITE_ZEROES, 0, &[out(bad, 32)]).0, status::IOERR);
    assert_eq!(b.request(kind::DISCARD, 0, &[out(bad, 32)]).0, status::IOERR);
    assert_eq!(b.disk.content()[..4096], [5; 4096]);
    let unmap = b.driver.alloc_bytes(&range(1, 2, 1));
    assert_eq!(b.request(kind::DISCARD, 0, &[out(unmap, 16)]).0, status::UNSUPP);
    assert_eq!(b.request(kind::WRITE_ZEROES, 0, &[out(unmap, 16)]).0, status::OK);
    assert_eq!(b.disk.content()[511..1537], [vec![5], vec![0; 1024], vec![5]].concat()[..]);
    let long = b.driver.alloc_bytes(&range(0, 2049, 0));
    assert_eq!(b.request(kind::WRITE_ZEROES, 0, &[out(long, 16)]).0, status::IOERR);
    assert_eq!(b.request(kind::DISCARD, 0, &[out(long, 15)]).0, status::IOERR);
    let good = b.driver.alloc_bytes(&range(4, 4, 0));
    assert_eq!(b.request(kind::DISCARD, 0, &[out(good, 16)]).0, status::OK);
}

#[test]
fn a_read_only_disk_says_so_and_refuses_changes() {
    let mut b = bench(true);
    assert_ne!(b.driver.offered() & feature::RO, 0);
    assert_eq!(b.driver.offered() & (feature::DISCARD | feature::WRITE_ZEROES), 0);
    let a = b.driver.alloc_bytes(&range(0, 1, 0).repeat(32));
    assert_eq!(b.request(kind::OUT, 0, &[out(a, 512)]).0, status::IOERR);
    assert_eq!(b.request(kind::DISCARD, 0, &[out(a, 16)]).0, status::IOERR);
    assert_eq!(b.request(kind::WRITE_ZEROES, 0, &[out(a, 16)]).0, status::IOERR);
    assert_eq!(b.request(kind::IN, 0, &[into(a, 512)]).0, status::OK);
}

#[test]
fn more_requests_than_a_vcpu_should_serve_all_finish() {
    let mut b = bench(false);
    let d = &mut b.driver;
    d.start(Setup { queue_size: 256, ..Setup::default() });
    let h = d.alloc_bytes(&header(kind::IN, 0));
    let to = d.alloc(4096, 16);
    for _ in 0..200 {
        d.add_indirect(0, &[out(h, 16), into(to, 512), into(to + 1000, 1)]);
    }
    d.kick(0);
    for _ in 0..200 {
        assert!(d.wait_used(0).is_some());
    }
    assert!(d.pci.handed_over() >= 1);
    assert_eq!(b.blk.metrics().snapshot().reads, 200);
}

#[test]
fn a_real_image_works_and_marks_guest_pages_dirty() {
    use atoll_storage::RawDisk;
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("disk.img");
    std::fs::write(&path, vec![3u8; 1 << 20]).unwrap();
    let disk = RawDisk::open(&path, atoll_storage::OpenOptions { read_only: false }).unwrap();
    let machine = TestMachine::new();
    let blk = Blk::new(Arc::new(disk), &BlkOptions::default());
    let mut d = TestDriver::probe(&machine, blk, 0);
    d.start(Setup::default());
    let view = machine.memory.snapshot();
    let atoll_machine::memory::FlatTarget::Ram { block, .. } = &view.lookup(0).unwrap().target else {
        panic!("RAM at 0");
    };
    let to = d.alloc(16 << 10, 4096);
    let h = d.alloc_bytes(&header(kind::IN, 0));
    let s = d.alloc(1, 4096);
    let mut log = block.dirty_log();
    log.take();
    d.add(0, &[out(h, 16), into(to, 16 << 10), into(s, 1)]);
    d.kick(0);
    assert_eq!(d.take_used(0).unwrap().1, (16 << 10) + 1);
    assert_eq!(d.load(to, 16 << 10), vec![3; 16 << 10]);
    let dirty: Vec<u64> = log.take().iter().collect();
    for page in to / 4096..to / 4096 + 4 {
        assert!(dirty.contains(&page), "page {page:#x} of {dirty:x?}");
    }
}

#[test]
fn state_is_checked_against_the_disk() {
    let b = bench(false);
    b.blk.restore(&b.blk.save()).unwrap();
    b.blk.restore(&[]).unwrap();
    let smaller = Blk::new(MemoryDisk::new(8, false), &BlkOptions::default());
    assert!(matches!(smaller.restore(&b.blk.save()), Err(RestoreError::Mismatch { have: 8, .. })));
    let read_only = Blk::new(MemoryDisk::new(SECTORS, true), &BlkOptions::default());
    assert!(read_only.restore(&b.blk.save()).is_err());
    assert!(smaller.restore(&[0xff]).is_err());
}
