//! Tests of [`super`]: who owes what after a store, under concurrency too.

use std::sync::atomic::AtomicBool;

use super::*;
use crate::memory::race::{Race, block};

/// Makes a window between two steps of a race wide enough to be hit: sometimes lets other threads run.
pub(super) fn stumble() {
    thread_local!(static CALLS: std::cell::Cell<u32> = const { std::cell::Cell::new(0) });
    let calls = CALLS.get().wrapping_add(1);
    CALLS.set(calls);
    if calls.is_multiple_of(7) {
        std::thread::yield_now();
    }
}

#[test]
fn a_new_block_is_zero_and_keeps_what_is_written() {
    let ram = block(4);
    let mut buf = [1u8; 16];
    ram.read(4090, &mut buf).unwrap();
    assert_eq!(buf, [0; 16]);
    ram.write(4090, b"across two pages").unwrap();
    ram.read(4090, &mut buf).unwrap();
    assert_eq!(&buf, b"across two pages");
}

#[test]
fn accesses_outside_and_bad_sizes_are_refused_by_name() {
    let ram = block(1);
    assert_eq!(ram.write(4095, &[0; 2]).unwrap_err().to_string(), "0xfff+0x2 is outside memory block test");
    assert!(ram.read(u64::MAX, &mut [0; 2]).is_err());
    assert!(ram.volatile_slice(4096, 1).is_err());
    for size in [0, 1, 4097, MAX_BLOCK_SIZE + 4096] {
        let error = RamBlock::new_shared("odd", size).unwrap_err();
        assert!(matches!(error, MemoryError::BadSize { .. }), "{size}: {error}");
    }
}

#[test]
fn the_memfd_can_neither_shrink_nor_grow() {
    let ram = block(2);
    assert!(rustix::fs::ftruncate(ram.file().unwrap(), 4096).is_err());
    assert!(rustix::fs::ftruncate(ram.file().unwrap(), 12288).is_err());
}

#[test]
fn bookkeeping_of_an_untouched_block_costs_no_memory() {
    let before = resident();
    let ram = block(4 << 20); // 16 GiB
    let after = resident();
    assert!(after.saturating_sub(before) < 1 << 20, "{before} -> {after}");
    assert_eq!(ram.page_flags().len(), 4 << 20);
    assert!(ram.code_versions().len() >= 4 << 20);
}

fn resident() -> u64 {
    let statm = std::fs::read_to_string("/proc/self/statm").unwrap();
    statm.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() * 4096
}

#[test]
fn stores_raise_the_code_version_only_where_code_is_protected() {
    let ram = block(3);
    ram.write(0, &[1]).unwrap();
    let before = ram.protect_code(1);
    ram.write(0, &[1]).unwrap();
    ram.write(8192, &[1]).unwrap();
    assert_eq!(ram.protect_code(1), before);
    ram.write(4095, &[1, 2]).unwrap();
    assert_ne!(ram.protect_code(1), before);
    assert_eq!(ram.code_versions()[0].load(Ordering::Relaxed), 0);
    // Far outside: ignored.
    assert_eq!(ram.protect_code(99), 0);
    ram.after_store(u64::MAX, 5);
    ram.note_write(u64::MAX - 1, u64::MAX);
}

#[test]
fn unprotecting_invalidates_and_then_stores_are_plain_again() {
    let ram = block(1);
    let v = ram.protect_code(0);
    ram.unprotect_code(0);
    let after = ram.code_versions()[0].load(Ordering::Relaxed);
    assert_ne!(after, v);
    ram.write(0, &[1]).unwrap();
    assert_eq!(ram.code_versions()[0].load(Ordering::Relaxed), after);
    assert_eq!(ram.page_flags()[0].load(Ordering::Relaxed), 0);
}

#[test]
fn dirty_readers_are_independent() {
    let ram = block(200);
    ram.write(0, &[1]).unwrap();
    let mut a = ram.dirty_log();
    assert!(a.take().is_empty(), "stores before the log began are not in it");
    ram.write(PAGE_SIZE * 5, &[1]).unwrap();
    let mut b = ram.dirty_log();
    ram.write(PAGE_SIZE * 199 - 1, &[1, 2]).unwrap();
    assert_eq!(a.take().iter().collect::<Vec<_>>(), [5, 198, 199]);
    assert!(a.take().is_empty());
    ram.write(PAGE_SIZE * 7, &[1]).unwrap();
    let pages = b.take();
    assert_eq!(pages.iter().collect::<Vec<_>>(), [7, 198, 199]);
    assert_eq!(pages.count(), 3);
    assert!(pages.contains(198) && !pages.contains(5));
    drop(b);
    ram.write(PAGE_SIZE * 7, &[1]).unwrap();
    assert_eq!(a.take().iter().collect::<Vec<_>>(), [7]);
}

#[test]
fn writes_through_a_volatile_slice_are_noted() {
    let ram = block(4);
    let mut log = ram.dirty_log();
    let version = ram.protect_code(2);
    let slice = ram.volatile_slice(PAGE_SIZE, 3 * PAGE_SIZE).unwrap();
    slice.subslice(PAGE_SIZE as usize - 1, 2).unwrap().write_slice(&[7, 8], 0).unwrap();
    assert_eq!(log.take().iter().collect::<Vec<_>>(), [1, 2]);
    assert_ne!(ram.protect_code(2), version);
}

#[test]
fn no_store_is_lost_between_concurrent_writers_and_readers() {
    for round in 0..100 {
        let ram = block(2);
        // One reader alone would stay blind after a lost store; two disturb each other.
        let race = Race { round, writers: 2, readers: 1 + round % 2, takes: 200 };
        race.run(&ram, |w, page, n| ram.write(page * PAGE_SIZE + w * 8, &n.to_le_bytes()).unwrap());
    }
}

/// A decoder copies bytes under protection while a writer changes them and another thread unprotects: a copy
/// whose version is still current when all is quiet must equal the memory.
#[test]
fn decoded_bytes_with_a_current_version_are_the_bytes_in_memory() {
    for round in 0..200u64 {
        let ram = block(1);
        let stop = Arc::new(AtomicBool::new(false));
        let spawn = |f: fn(&RamBlock, u64)| {
            let (ram, stop) = (ram.clone(), stop.clone());
            std::thread::spawn(move || {
                let mut n = round;
                while !stop.load(Ordering::Relaxed) {
                    n += 1;
                    f(&ram, n);
                }
            })
        };
        let writer = spawn(|ram, n| ram.write(64, &n.to_le_bytes()).unwrap());
        let other = spawn(|ram, n| {
            if n % 4 == 0 {
                ram.unprotect_code(0);
            }
        });
        let mut last = (0, [0; 8]);
        for _ in 0..50 {
            let version = ram.protect_code(0);
            let mut bytes = [0; 8];
            ram.read(64, &mut bytes).unwrap();
            last = (version, bytes);
        }
        stop.store(true, Ordering::Relaxed);
        writer.join().unwrap();
        other.join().unwrap();
        let mut now = [0; 8];
        ram.read(64, &mut now).unwrap();
        if ram.code_versions()[0].load(Ordering::SeqCst) == last.0 {
            assert_eq!(last.1, now, "round {round}");
        }
    }
}
