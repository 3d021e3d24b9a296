//! Tests of [`super`]: a guest whose stores only a simulated hypervisor sees, against a model.

use std::collections::BTreeSet;
use std::sync::RwLock;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use proptest::prelude::*;

use super::*;
use crate::memory::race::{Race, block};
use crate::memory::{DirtyReader, PAGE_SIZE};

/// Write protection and a log, as a hypervisor's kernel has them: a store to a watched page faults, the fault logs
/// the page and ends the watch, and only then the store is made.
#[derive(Default)]
struct Hypervisor {
    watched: Vec<AtomicBool>,
    log: Mutex<Vec<u64>>,
    logging: AtomicBool,
    starts: AtomicUsize,
    /// Held by a store from its fault on: watching a page again waits for the stores in flight, as a TLB
    /// shoot-down does.
    in_guest: RwLock<()>,
    /// One report after the other, so that none is under way when a `take` looks at its bits.
    reporting: Mutex<()>,
}

impl Hypervisor {
    fn new(block: &Arc<RamBlock>) -> Arc<Self> {
        let watched = (0..block.pages()).map(|_| AtomicBool::new(false)).collect();
        let this = Arc::new(Self { watched, ..Self::default() });
        let source: Arc<dyn DirtySource> = this.clone();
        block.add_dirty_source(&source);
        this
    }

    /// A store of the guest: notes nothing.
    fn store(&self, block: &RamBlock, page: u64, at: u64, value: u64) {
        let _in = self.in_guest.read().unwrap();
        if self.watched[page as usize].swap(false, Ordering::SeqCst) {
            self.log.lock().unwrap().push(page);
        }
        std::thread::yield_now();
        // Past `RamBlock::write`, which would note the store.
        let bytes = value.to_le_bytes();
        rustix::io::pwrite(block.file().unwrap(), &bytes, page * PAGE_SIZE + at).unwrap();
    }
}

impl DirtySource for Hypervisor {
    fn start(&self, _block: &Arc<RamBlock>) {
        assert!(!self.logging.swap(true, Ordering::SeqCst), "started twice");
        self.starts.fetch_add(1, Ordering::SeqCst);
        let _out = self.in_guest.write().unwrap();
        self.watched.iter().for_each(|w| w.store(true, Ordering::SeqCst));
    }

    fn stop(&self, _block: &Arc<RamBlock>) {
        assert!(self.logging.swap(false, Ordering::SeqCst), "stopped twice");
        let _out = self.in_guest.write().unwrap();
        self.watched.iter().for_each(|w| w.store(false, Ordering::SeqCst));
        self.log.lock().unwrap().clear();
    }

    fn collect(&self, block: &Arc<RamBlock>) {
        let _reporting = self.reporting.lock().unwrap();
        let pages = std::mem::take(&mut *self.log.lock().unwrap());
        for page in &pages {
            self.watched[*page as usize].store(true, Ordering::SeqCst);
        }
        drop(self.in_guest.write());
        block.mark_stored(pages);
    }
}

#[test]
fn a_source_logs_only_while_there_is_a_reader() {
    let ram = block(4);
    let guest = Hypervisor::new(&ram);
    let logging = || guest.logging.load(Ordering::SeqCst);
    assert!(!logging());
    let a = ram.dirty_log();
    let b = ram.dirty_log();
    assert!(logging());
    drop(a);
    assert!(logging());
    drop(b);
    assert!(!logging());
    assert_eq!(guest.starts.load(Ordering::SeqCst), 1);
    let _c = ram.dirty_log();
    assert!(logging());
}

#[test]
fn a_source_that_comes_later_starts_at_once_and_one_that_is_gone_is_forgotten() {
    let ram = block(2);
    let mut log = ram.dirty_log();
    let guest = Hypervisor::new(&ram);
    let again: Arc<dyn DirtySource> = guest.clone();
    ram.add_dirty_source(&again);
    assert_eq!(guest.starts.load(Ordering::SeqCst), 1, "a second registration is ignored");
    guest.store(&ram, 1, 0, 7);
    assert_eq!(log.take().iter().collect::<Vec<_>>(), [1]);
    drop((guest, again));
    assert!(log.take().is_empty());
    ram.mark_stored([0, 99]);
    assert_eq!(log.take().iter().collect::<Vec<_>>(), [0], "pages outside are ignored");
}

#[derive(Clone, Debug)]
enum Step {
    GuestStores(u64),
    DeviceStores(u64),
    Comes,
    Goes(usize),
    Takes(usize),
}

const PAGES: u64 = 70;

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        4 => (0..PAGES).prop_map(Step::GuestStores),
        3 => (0..PAGES).prop_map(Step::DeviceStores),
        1 => Just(Step::Comes),
        1 => (0usize..4).prop_map(Step::Goes),
        3 => (0usize..4).prop_map(Step::Takes),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]
    #[test]
    fn every_reader_sees_the_union_of_noted_and_found_stores(steps in prop::collection::vec(step(), 1..80)) {
        let ram = block(PAGES);
        let guest = Hypervisor::new(&ram);
        let mut readers: Vec<(DirtyReader, BTreeSet<u64>)> = Vec::new();
        for step in steps {
            match step {
                Step::GuestStores(page) => {
                    guest.store(&ram, page, 8, page);
                    readers.iter_mut().for_each(|(_, model)| { model.insert(page); });
                }
                Step::DeviceStores(page) => {
                    ram.write(page * PAGE_SIZE, &[1]).unwrap();
                    readers.iter_mut().for_each(|(_, model)| { model.insert(page); });
                }
                Step::Comes if readers.len() < 4 => readers.push((ram.dirty_log(), BTreeSet::new())),
                Step::Comes => {}
                Step::Goes(n) if n < readers.len() => drop(readers.remove(n)),
                Step::Takes(n) if n < readers.len() => {
                    let (log, model) = &mut readers[n];
                    let taken: BTreeSet<u64> = log.take().iter().collect();
                    prop_assert_eq!(taken, std::mem::take(model));
                }
                Step::Goes(_) | Step::Takes(_) => {}
            }
            prop_assert_eq!(guest.logging.load(Ordering::SeqCst), !readers.is_empty());
        }
    }
}

#[test]
fn no_store_of_a_guest_is_lost_between_concurrent_readers() {
    for round in 0..60 {
        let ram = block(3);
        let guest = Hypervisor::new(&ram);
        // The first writer is a device, the others are guests.
        let race = Race { round, writers: 3, readers: 2, takes: 100 };
        race.run(&ram, |w, page, n| match w {
            0 => ram.write(page * PAGE_SIZE, &n.to_le_bytes()).unwrap(),
            _ => guest.store(&ram, page, w * 8, n),
        });
    }
}
