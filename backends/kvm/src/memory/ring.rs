//! Harvesting a dirty ring (api.rst, 8.29).
//!
//! Every vCPU has a ring of entries, each naming a page by slot and page number within the slot. An entry's flags go
//! round like this:
//!
//! ```text
//!      0 ──kernel: page stored to──► DIRTY ──harvest──► RESET ──KVM_RESET_DIRTY_RINGS──► 0
//! ```
//!
//! The kernel writes slot and page before the flag, with release; reading the flag with acquire shows both. Handing
//! an entry back is a release store: the kernel must not reuse it before it has been read here. The kernel
//! watches the page again when the rings are reset, not when the entry is handed back; so the page's content counts
//! only after the reset (see [`super`]).

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

/// The kernel has filled the entry.
const DIRTY: u32 = 1;
/// User space has read it.
const RESET: u32 = 2;

/// `struct kvm_dirty_gfn`.
#[repr(C)]
#[derive(Debug, Default)]
pub(super) struct Entry {
    pub(super) flags: AtomicU32,
    pub(super) slot: AtomicU32,
    pub(super) page: AtomicU64,
}

const _: () = assert!(size_of::<Entry>() == size_of::<kvm_bindings::kvm_dirty_gfn>());

/// A ring and the place where the next entry will appear.
pub(super) struct Ring {
    memory: Box<dyn AsRef<[Entry]> + Send>,
    next: usize,
}

impl Ring {
    /// The ring in `memory`, which is not empty, from its first entry on.
    pub(super) fn new(memory: impl AsRef<[Entry]> + Send + 'static) -> Self {
        Self { memory: Box::new(memory), next: 0 }
    }

    /// Calls `found` with the slot and page of every entry that is filled, in order, and hands them back. At most
    /// once round: a guest that fills as fast as this reads cannot hold it here. Returns how many there were.
    pub(super) fn harvest(&mut self, mut found: impl FnMut(u32, u64)) -> usize {
        let entries = (*self.memory).as_ref();
        for count in 0..entries.len() {
            let entry = &entries[self.next];
            if entry.flags.load(Ordering::Acquire) & (DIRTY | RESET) != DIRTY {
                return count;
            }
            found(entry.slot.load(Ordering::Relaxed), entry.page.load(Ordering::Relaxed));
            entry.flags.store(RESET, Ordering::Release);
            self.next = (self.next + 1) % entries.len();
        }
        entries.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fill(entries: &[Entry], at: usize, slot: u32, page: u64) {
        let entry = &entries[at % entries.len()];
        assert_eq!(entry.flags.load(Ordering::Acquire), 0, "the kernel overwrites no entry in use");
        entry.slot.store(slot, Ordering::Relaxed);
        entry.page.store(page, Ordering::Relaxed);
        entry.flags.store(DIRTY, Ordering::Release);
    }

    fn reset(entries: &[Entry]) {
        entries.iter().for_each(|e| {
            let _ = e.flags.compare_exchange(RESET, 0, Ordering::SeqCst, Ordering::SeqCst);
        });
    }

    #[test]
    fn entries_come_in_order_round_the_ring_and_only_once() {
        let memory: std::sync::Arc<[Entry]> = (0..8).map(|_| Entry::default()).collect();
        let mut ring = Ring::new(memory.clone());
        let mut pushed = 0;
        for round in 0..10usize {
            let expected: Vec<_> = (0..round % 9).map(|n| (round as u32, n as u64)).collect();
            for (slot, page) in &expected {
                fill(&memory, pushed, *slot, *page);
                pushed += 1;
            }
            let mut seen = Vec::new();
            assert_eq!(ring.harvest(|slot, page| seen.push((slot, page))), expected.len());
            assert_eq!(seen, expected);
            assert_eq!(ring.harvest(|_, _| panic!("handed back entries are not read again")), 0);
            reset(&memory);
        }
    }

    #[test]
    fn an_entry_handed_back_and_not_yet_reset_stops_the_harvest() {
        let memory: std::sync::Arc<[Entry]> = (0..2).map(|_| Entry::default()).collect();
        let mut ring = Ring::new(memory.clone());
        fill(&memory, 0, 1, 10);
        fill(&memory, 1, 1, 11);
        assert_eq!(ring.harvest(|_, _| {}), 2);
        assert_eq!(ring.harvest(|_, _| panic!("nothing new")), 0);
    }

    #[test]
    fn a_producer_on_another_thread_loses_nothing() {
        let memory: std::sync::Arc<[Entry]> = (0..16).map(|_| Entry::default()).collect();
        const COUNT: u64 = 20_000;
        let producer = {
            let memory = memory.clone();
            std::thread::spawn(move || {
                for n in 0..COUNT {
                    let entry = &memory[n as usize % memory.len()];
                    while entry.flags.load(Ordering::Acquire) != 0 {
                        std::thread::yield_now();
                    }
                    fill(&memory, n as usize, !(n as u32), n);
                }
            })
        };
        let mut ring = Ring::new(memory.clone());
        let mut expected = 0;
        while expected < COUNT {
            ring.harvest(|slot, page| {
                assert_eq!((slot, page), (!(expected as u32), expected));
                expected += 1;
            });
            reset(&memory);
            std::thread::yield_now();
        }
        producer.join().unwrap();
    }
}
