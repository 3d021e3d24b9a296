//! Power cuts: what was flushed is there, whatever sectors of the rest reached the disk.
//!
//! Each operation on the disk is marked in the log of the file under it, and each flush when it has returned.
//! After a cut, every sector must hold what it held at the last flush that is marked, or what any operation
//! after that flush gave it.

use super::interop::{qemu_img, require_qemu_img};
use super::*;
use crate::faulty::{RecordingFile, WriteLog};

const CUTS: u64 = 200;
const OPERATIONS: u64 = 150;
const FLUSHED: u64 = 1 << 32;

/// What the test did, by number.
struct Recorded {
    log: Arc<WriteLog>,
    /// The disk after each operation.
    states: Vec<Vec<u8>>,
}

fn record(options: &CreateOptions, backing: Option<&Vec<u8>>, seed: u64) -> Recorded {
    let mut random = Random::new(seed);
    let (file, size) = memory_image(options);
    let file = RecordingFile::new(file, size).unwrap();
    let log = file.log();
    let disk = open(file, size, backing.cloned().map(raw_backing));
    let mut model = content(&disk);
    let mut states = vec![model.clone()];
    for number in 0..OPERATIONS {
        log.mark(number);
        if random.below(6) == 0 {
            disk.flush().unwrap();
            log.mark(FLUSHED | number);
        } else {
            random_operation(&disk, &mut model, &mut random, 512);
        }
        states.push(model.clone());
    }
    std::mem::forget(disk);
    Recorded { log, states }
}

/// Sectors that hold what they cannot hold.
fn lost_sectors(found: &[u8], marks: &[u64], states: &[Vec<u8>]) -> Vec<usize> {
    // states[n] is the disk before operation n.
    let flushed = marks.iter().filter(|mark| *mark & FLUSHED != 0).map(|mark| mark & 0xffff_ffff).max();
    let started = marks.iter().filter(|mark| *mark & FLUSHED == 0).max();
    let first = flushed.unwrap_or(0) as usize;
    let last = started.map_or(0, |number| *number as usize + 1);
    (0..found.len() / 512)
        .filter(|sector| {
            let range = sector * 512..sector * 512 + 512;
            let held = states[first..=last].iter().any(|state| state[range.clone()] == found[range.clone()]);
            !held
        })
        .collect()
}

fn cases() -> Vec<(CreateOptions, bool)> {
    let base = CreateOptions { size: 1 << 20, ..Default::default() };
    vec![
        (CreateOptions { cluster_bits: 12, ..base.clone() }, false),
        (CreateOptions { cluster_bits: 9, refcount_bits: 64, ..base.clone() }, true),
        (CreateOptions { cluster_bits: 16, extended_l2: true, ..base.clone() }, true),
        (CreateOptions { cluster_bits: 14, version: 2, ..base.clone() }, true),
        (CreateOptions { cluster_bits: 10, refcount_bits: 1, lazy_refcounts: true, ..base }, false),
    ]
}

#[test]
fn no_cut_loses_what_was_flushed_or_leaves_a_broken_image() {
    let mut leaked = 0;
    let mut lost_by_disk = 0;
    for (case, (mut options, with_backing)) in cases().into_iter().enumerate() {
        let backing = with_backing.then(|| random_bytes(&mut Random::new(99), options.size));
        options.backing = backing.as_ref().and_then(|_| backing_name());
        let recorded = record(&options, backing.as_ref(), case as u64);
        let mut random = Random::new(case as u64 ^ 0xc07);
        for number in 0..CUTS {
            let (point, seed) = (random.below(recorded.log.len() as u64 + 1) as usize, random.next_u64());
            let cut = recorded.log.cut(point, seed);
            lost_by_disk += cut.lost_sectors;
            let size = cut.bytes.len() as u64;
            let file = Arc::new(MemoryFile::new(cut.bytes, 1 << 30));
            let disk = open(file.clone(), size, backing.clone().map(raw_backing));
            let lost = lost_sectors(&content(&disk), &cut.marks, &recorded.states);
            assert!(lost.is_empty(), "case {case} cut {number} at {point}: sectors {lost:?}");
            let report = disk.check().unwrap();
            assert!(report.is_consistent(), "case {case} cut {number}: {report:?}");
            leaked += report.leaked_clusters;
            let before = content(&disk);
            disk.repair().unwrap();
            assert!(disk.check().unwrap().is_clean(), "case {case} cut {number}");
            assert!(content(&disk) == before);
        }
    }
    assert!(lost_by_disk > 0, "the cuts dropped nothing");
    assert!(leaked > 0, "no cut fell between counting a cluster and using it");
}

#[test]
fn qemu_img_finds_cut_images_clean_or_repairs_them() {
    if !require_qemu_img() {
        return;
    }
    for (case, (options, _)) in cases().into_iter().enumerate() {
        let recorded = record(&options, None, case as u64);
        let mut random = Random::new(case as u64);
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("cut.qcow2");
        for _ in 0..CUTS / 5 {
            let point = random.below(recorded.log.len() as u64 + 1) as usize;
            std::fs::write(&path, recorded.log.cut(point, random.next_u64()).bytes).unwrap();
            let path = path.to_str().unwrap();
            // 3: nothing but leaked clusters.
            let code = qemu_img(&["check", "-q", "-f", "qcow2", path]).status.code();
            assert!(matches!(code, Some(0 | 3)), "case {case}: {code:?}");
            assert!(qemu_img(&["check", "-q", "-r", "all", "-f", "qcow2", path]).status.success());
        }
    }
}
