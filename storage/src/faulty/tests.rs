//! The power-cut test of the raw format, and tests of the layers themselves.
//!
//! The guest of the power-cut test is an append-only log: records with a sequence number and a checksum, written
//! one behind the other, flushed now and then. After a flush has returned, its writer counts the records as
//! durable. After a cut, recovery reads records until the first that is not valid; it must find at least every
//! record counted as durable at that moment.

use std::sync::Arc;

use super::*;
use crate::disk::{Disk, read_bytes, write_bytes};
use crate::error::{DiskErrorKind, Operation};
use crate::file::{HostFile, ImageFile};
use crate::raw::{RawDisk, RawGeometry};

const CAPACITY: u64 = 2 << 20;
const WRITERS: u64 = 4;
const REGION: u64 = CAPACITY / WRITERS;
const RECORDS: u32 = 60;
const CUTS: u64 = 200;

fn geometry(file_size: u64) -> RawGeometry {
    RawGeometry {
        file_size,
        logical_block_size: 512,
        discard_granularity: Some(4096),
        range_alignment: 1,
        read_only: false,
    }
}

fn host_file(size: u64) -> HostFile {
    let file = tempfile::tempfile().unwrap();
    file.set_len(size).unwrap();
    HostFile::new(file)
}

/// Sequence number, length of the content, checksum of both and the content, content.
fn record(sequence: u32, content: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::new();
    bytes.extend_from_slice(&sequence.to_le_bytes());
    bytes.extend_from_slice(&(content.len() as u32).to_le_bytes());
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(&bytes);
    hasher.update(content);
    bytes.extend_from_slice(&hasher.finalize().to_le_bytes());
    bytes.extend_from_slice(content);
    bytes
}

/// How many valid records with ascending numbers a region begins with.
fn recover(region: &[u8]) -> u32 {
    let word =
        |at: usize| region.get(at..at + 4).map_or(u32::MAX, |b| u32::from_le_bytes([b[0], b[1], b[2], b[3]]));
    let (mut position, mut count) = (0usize, 0u32);
    loop {
        let len = word(position + 4) as usize;
        let Some(content) = region.get(position + 12..).and_then(|rest| rest.get(..len)) else {
            return count;
        };
        // Valid if writing it again gives the same bytes; number zero never occurs, so zeros are no record.
        if region[position..position + 12 + len] != record(count + 1, content)[..] {
            return count;
        }
        position += 12 + len;
        count += 1;
    }
}

/// Appends records to one region. Marks `writer << 32 | n` once records 1 to n are known to be durable.
fn append_records(disk: &dyn Disk, log: &WriteLog, writer: u64, seed: u64) {
    let mut random = Random::new(seed ^ writer);
    let start = writer * REGION;
    let mut position = 0;
    for sequence in 1..=RECORDS {
        let content: Vec<u8> = (0..random.below(6000)).map(|_| random.next_u64() as u8).collect();
        let bytes = record(sequence, &content);
        assert!(position + bytes.len() as u64 <= REGION);
        match random.below(8) {
            // The ways a file system prepares space: zeroed ahead, or trimmed, both behind the records.
            0 => disk.write_zeroes(start + position, bytes.len() as u64, random.below(2) == 0).unwrap(),
            1 => disk.discard(start + position, REGION - position).unwrap(),
            // In two pieces, the second first.
            2 if bytes.len() > 600 => {
                let half = 600;
                write_bytes(disk, start + position + half as u64, &bytes[half..]).unwrap();
            }
            _ => {}
        }
        write_bytes(disk, start + position, &bytes).unwrap();
        position += bytes.len() as u64;
        if random.below(3) == 0 {
            disk.flush().unwrap();
            log.mark(writer << 32 | u64::from(sequence));
        }
    }
}

/// A record that was counted as durable and is gone.
#[derive(Debug)]
#[allow(dead_code, reason = "shown by a failing test")]
struct Lost {
    seed: u64,
    point: usize,
    writer: u64,
    durable: u64,
    recovered: u32,
}

/// What the cuts of one stream came to, in all.
#[derive(Debug, Default)]
struct Outcome {
    lost: Vec<Lost>,
    durable_records: u64,
    recovered_records: u64,
    dropped_sectors: u64,
}

/// Cuts the power at random points and recovers each region.
fn cut_and_recover(log: &WriteLog, seed: u64) -> Outcome {
    let mut outcome = Outcome::default();
    let mut random = Random::new(seed);
    for _ in 0..CUTS {
        let (point, seed) = (random.below(log.len() as u64 + 1) as usize, random.next_u64());
        let image = log.cut(point, seed);
        outcome.dropped_sectors += image.lost_sectors;
        for writer in 0..WRITERS {
            let of_writer = image.marks.iter().filter(|mark| *mark >> 32 == writer);
            let durable = of_writer.map(|mark| mark & 0xffff_ffff).max().unwrap_or(0);
            let region = &image.bytes[(writer * REGION) as usize..((writer + 1) * REGION) as usize];
            let recovered = recover(region);
            outcome.durable_records += durable;
            outcome.recovered_records += u64::from(recovered);
            if u64::from(recovered) < durable {
                outcome.lost.push(Lost { seed, point, writer, durable, recovered });
            }
        }
    }
    outcome
}

/// Runs the writers, at the same time, on a raw disk over a recorded file. Returns the log.
fn record_stream<F: ImageFile>(seed: u64, wrap: impl FnOnce(RecordingFile<HostFile>) -> F) -> Arc<WriteLog> {
    let file = RecordingFile::new(host_file(CAPACITY), CAPACITY).unwrap();
    let log = file.log();
    let disk = RawDisk::over(wrap(file), geometry(CAPACITY));
    std::thread::scope(|scope| {
        for writer in 0..WRITERS {
            let (disk, log) = (&disk, &log);
            scope.spawn(move || append_records(disk, log, writer, seed));
        }
    });
    let mut bytes = vec![0; CAPACITY as usize];
    read_bytes(&disk, 0, &mut bytes).unwrap();
    for region in bytes.chunks(REGION as usize) {
        assert_eq!(recover(region), RECORDS, "without a cut everything is there");
    }
    log
}

#[test]
fn in_200_power_cuts_under_raw_no_flushed_record_is_lost() {
    let log = record_stream(2026, |file| file);
    let outcome = cut_and_recover(&log, 7);
    println!("{CUTS} cuts of {} events: {outcome:?}", log.len());
    assert!(outcome.lost.is_empty(), "{:?}", outcome.lost);
    assert!(outcome.durable_records > CUTS * WRITERS * 10, "the cuts must fall where records are durable");
    assert!(outcome.recovered_records > outcome.durable_records, "and some records survive by chance");
    assert!(outcome.dropped_sectors > CUTS, "and much that was not flushed is dropped");
}

/// A file that only pretends to make data durable.
struct LyingFile<F>(F);

impl<F: ImageFile> ImageFile for LyingFile<F> {
    fn read_at(&self, offset: u64, buffers: &[vm_memory::VolatileSlice<'_>]) -> std::io::Result<usize> {
        self.0.read_at(offset, buffers)
    }

    fn write_at(&self, offset: u64, buffers: &[vm_memory::VolatileSlice<'_>]) -> std::io::Result<()> {
        self.0.write_at(offset, buffers)
    }

    fn sync_data(&self) -> std::io::Result<()> {
        Ok(())
    }

    fn punch_hole(&self, offset: u64, len: u64) -> std::io::Result<()> {
        self.0.punch_hole(offset, len)
    }

    fn zero_range(&self, offset: u64, len: u64) -> std::io::Result<()> {
        self.0.zero_range(offset, len)
    }
}

#[test]
fn the_power_cut_test_notices_a_flush_that_does_nothing() {
    let log = record_stream(2026, LyingFile);
    let lost = cut_and_recover(&log, 7).lost.len();
    assert!(lost as u64 > CUTS, "only {lost} losses noticed");
}

#[test]
fn a_cut_keeps_flushed_writes_and_any_sectors_of_the_others() {
    let disk = RecordingDisk::new(RawDisk::over(host_file(8192), geometry(8192))).unwrap();
    let log = disk.log();
    write_bytes(&disk, 0, &[1; 2048]).unwrap();
    disk.flush().unwrap();
    let flushed = log.len();
    write_bytes(&disk, 1024, &[2; 2048]).unwrap();
    let mut outcomes = std::collections::BTreeSet::new();
    for seed in 0..1000 {
        assert_eq!(log.cut(flushed, seed).volatile_changes, 0);
        let image = log.cut(log.len(), seed);
        assert_eq!(image.volatile_changes, 1);
        assert!(image.bytes[..1024].iter().all(|b| *b == 1));
        let sectors: Vec<u8> = image.bytes[1024..3072].chunks(512).map(|s| s[0]).collect();
        for (index, sector) in image.bytes[1024..3072].chunks(512).enumerate() {
            let old = if index < 2 { 1 } else { 0 };
            assert!(sector.iter().all(|b| *b == 2) || sector.iter().all(|b| *b == old), "torn sector");
        }
        let lost = sectors.iter().filter(|s| **s != 2).count();
        assert_eq!(image.lost_sectors, lost as u64);
        assert!(image.bytes[3072..].iter().all(|b| *b == 0));
        outcomes.insert(sectors);
    }
    assert_eq!(outcomes.len(), 16, "every subset of four sectors must occur");
    assert_eq!(log.cut(log.len(), 5).bytes, log.cut(log.len(), 5).bytes, "same seed, same cut");
}

#[test]
fn a_write_that_ended_after_the_flush_began_is_not_durable() {
    let log = WriteLog::new(vec![0; 512]);
    let write = log.begin_write(0, vec![1; 512]);
    let flush = log.begin_flush();
    log.end_change(write);
    log.end_flush(flush);
    let survives = |seed| log.cut(log.len(), seed).bytes[0] == 1;
    assert!((0..100).any(survives) && !(0..100).all(survives));
    let flush = log.begin_flush();
    assert!(!(0..100).all(survives), "a flush that has not returned promises nothing");
    log.end_flush(flush);
    assert!((0..100).all(survives));
}

#[test]
fn planned_faults_hit_exactly_the_planned_operations() {
    let plan = FaultPlan::new();
    let disk = FaultyDisk::new(RawDisk::over(host_file(4096), geometry(4096)), plan.clone());
    plan.fail_nth(Operation::Write, 1, Fault::NoSpace);
    plan.fail_nth(Operation::Write, 2, Fault::Io);
    plan.fail_all(Operation::Flush, Fault::Io);
    let kinds: Vec<_> =
        (0..4).map(|n| write_bytes(&disk, n * 512, &[9; 512]).err().map(|e| e.kind())).collect();
    assert_eq!(kinds, [None, Some(DiskErrorKind::NoSpace), Some(DiskErrorKind::Io), None]);
    assert!(disk.flush().is_err() && disk.flush().is_err());
    assert_eq!(plan.injected(), 4);
    plan.clear();
    disk.flush().unwrap();
    let mut bytes = [0; 2048];
    read_bytes(&disk, 0, &mut bytes).unwrap();
    let sectors: Vec<u8> = bytes.chunks(512).map(|s| s[0]).collect();
    assert_eq!(sectors, [9, 0, 0, 9], "a failed write changes nothing");
}

#[test]
fn after_one_failed_flush_a_raw_disk_never_claims_durability_again() {
    let plan = FaultPlan::new();
    let disk = RawDisk::over(FaultyFile::new(host_file(4096), plan.clone()), geometry(4096));
    disk.flush().unwrap();
    plan.fail_nth(Operation::Flush, 0, Fault::Io);
    for _ in 0..3 {
        assert_eq!(disk.flush().unwrap_err().kind(), DiskErrorKind::Io);
    }
    assert_eq!(plan.injected(), 1);
    let metrics = disk.metrics().snapshot();
    assert_eq!((metrics.flushes, metrics.errors), (1, 3));
}

#[test]
fn raw_falls_back_to_writing_zeros_and_remembers_it() {
    let plan = FaultPlan::new();
    let size = 3 << 20;
    let disk = RawDisk::over(FaultyFile::new(host_file(size), plan.clone()), geometry(size));
    write_bytes(&disk, 0, &vec![7; size as usize]).unwrap();
    plan.fail_all(Operation::Discard, Fault::Unsupported);
    plan.fail_all(Operation::WriteZeroes, Fault::Unsupported);
    disk.discard(0, 4096).unwrap();
    disk.write_zeroes(100, (2 << 20) + 5, true).unwrap();
    disk.write_zeroes(0, 10, false).unwrap();
    assert_eq!(plan.injected(), 2, "what is not supported is tried once");
    let mut bytes = vec![0; size as usize];
    read_bytes(&disk, 0, &mut bytes).unwrap();
    let end = 100 + (2 << 20) + 5;
    assert!(bytes[..10].iter().all(|b| *b == 0) && bytes[10..100].iter().all(|b| *b == 7));
    assert!(bytes[100..end].iter().all(|b| *b == 0) && bytes[end..].iter().all(|b| *b == 7));
}

#[test]
fn raw_reports_the_hosts_errors_by_kind() {
    let plan = FaultPlan::new();
    let disk = RawDisk::over(FaultyFile::new(host_file(4096), plan.clone()), geometry(4096));
    plan.fail_nth(Operation::Read, 0, Fault::Io);
    plan.fail_nth(Operation::Write, 0, Fault::NoSpace);
    plan.fail_nth(Operation::WriteZeroes, 0, Fault::NoSpace);
    plan.fail_nth(Operation::Discard, 0, Fault::Io);
    assert_eq!(read_bytes(&disk, 0, &mut [0; 512]).unwrap_err().kind(), DiskErrorKind::Io);
    assert_eq!(write_bytes(&disk, 0, &[0; 512]).unwrap_err().kind(), DiskErrorKind::NoSpace);
    assert_eq!(disk.write_zeroes(0, 512, false).unwrap_err().kind(), DiskErrorKind::NoSpace);
    assert_eq!(disk.discard(0, 512).unwrap_err().kind(), DiskErrorKind::Io);
    assert_eq!(disk.metrics().snapshot().errors, 4);
}
