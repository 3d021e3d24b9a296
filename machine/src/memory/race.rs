//! What the tests of dirty logs share: a small block, and writers that race with readers over one.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use super::{DirtyReader, PAGE_SIZE, RamBlock};

/// A block named `test`.
pub(super) fn block(pages: u64) -> Arc<RamBlock> {
    RamBlock::new_shared("test", pages * PAGE_SIZE).unwrap()
}

/// Writers that store as fast as they can while each reader copies the pages that its takes return.
pub(super) struct Race {
    /// Where the writers' numbers start; also what a failure names.
    pub(super) round: u64,
    /// How many threads store.
    pub(super) writers: u64,
    /// How many threads read.
    pub(super) readers: u64,
    /// How often each of these takes while the writers store.
    pub(super) takes: usize,
}

impl Race {
    /// Runs it. `store` is called with a writer, the page that it stores to, and the value. After the writers
    /// stopped and one more take, every reader's copy must equal the memory.
    pub(super) fn run(&self, ram: &Arc<RamBlock>, store: impl Fn(u64, u64, u64) + Sync) {
        let (stop, store) = (AtomicBool::new(false), &store);
        let results: Vec<_> = thread::scope(|scope| {
            for writer in 0..self.writers {
                let (first, stop) = (self.round + writer, &stop);
                scope.spawn(move || {
                    for n in numbers(first).take_while(|_| !stop.load(Ordering::Relaxed)) {
                        store(writer, (n >> 33) % ram.pages(), n);
                    }
                });
            }
            let readers: Vec<_> = (0..self.readers).map(|_| scope.spawn(|| self.read(ram))).collect();
            let results = readers.into_iter().map(|r| r.join()).collect();
            // Before anything can panic: the scope waits for the writers.
            stop.store(true, Ordering::Relaxed);
            results
        });
        let now = copy_of(ram);
        for result in results {
            let (mut log, mut copy) = result.unwrap();
            copy_taken(ram, &mut log, &mut copy);
            assert!(copy == now, "a store was lost in round {}", self.round);
        }
    }

    fn read(&self, ram: &Arc<RamBlock>) -> (DirtyReader, Vec<u8>) {
        let mut log = ram.dirty_log();
        let mut copy = copy_of(ram);
        for _ in 0..self.takes {
            copy_taken(ram, &mut log, &mut copy);
        }
        (log, copy)
    }
}

/// Numbers without a pattern in their upper bits, without end.
fn numbers(first: u64) -> impl Iterator<Item = u64> {
    let next = |n: &u64| Some(n.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407));
    std::iter::successors(Some(first), next).skip(1)
}

fn copy_of(ram: &RamBlock) -> Vec<u8> {
    let mut copy = vec![0; (ram.pages() * PAGE_SIZE) as usize];
    ram.read(0, &mut copy).unwrap();
    copy
}

fn copy_taken(ram: &RamBlock, log: &mut DirtyReader, copy: &mut [u8]) {
    for page in log.take().iter() {
        let at = (page * PAGE_SIZE) as usize;
        ram.read(page * PAGE_SIZE, &mut copy[at..at + PAGE_SIZE as usize]).unwrap();
    }
}
