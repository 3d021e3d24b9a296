//! Tests of [`super`] against a kernel that only keeps books.

use std::sync::atomic::AtomicUsize;

use atoll_machine::memory::PAGE_SIZE;

use super::ring::Entry;
use super::*;

const P: u64 = PAGE_SIZE;

/// What the kernel was asked, and what it refuses.
#[derive(Default)]
struct Books {
    /// Slot number to address, length, host address, whether stores are logged.
    slots: Mutex<BTreeMap<u32, (u64, u64, u64, bool)>>,
    calls: AtomicUsize,
    refuse_new: AtomicBool,
    refuse_remove: AtomicBool,
    /// Pages that the bitmap of a slot will have.
    bits: Mutex<BTreeMap<u32, Vec<u64>>>,
    /// Each with the number of entries ever filled.
    rings: Mutex<Vec<(usize, Arc<[Entry]>)>>,
}

#[derive(Clone, Default)]
struct Fake(Arc<Books>);

impl Host for Fake {
    fn max_slots(&self) -> usize {
        8
    }
    fn set(&self, number: u32, piece: &Piece, logged: bool) -> io::Result<()> {
        self.0.calls.fetch_add(1, Ordering::SeqCst);
        if self.0.refuse_new.load(Ordering::SeqCst) {
            return Err(io::Error::from_raw_os_error(libc::ENOMEM));
        }
        let host = piece.block.as_ptr() as u64 + piece.offset;
        let mut slots = self.0.slots.lock().unwrap();
        let overlap = slots
            .iter()
            .any(|(n, (gpa, len, ..))| *n != number && *gpa < piece.end() && piece.gpa < gpa + len);
        assert!(!overlap, "the kernel refuses slots that overlap");
        slots.insert(number, (piece.gpa, piece.len, host, logged));
        Ok(())
    }
    fn remove(&self, number: u32, _piece: &Piece) -> io::Result<()> {
        self.0.calls.fetch_add(1, Ordering::SeqCst);
        if self.0.refuse_remove.load(Ordering::SeqCst) {
            return Err(io::Error::from_raw_os_error(libc::EINVAL));
        }
        assert!(self.0.slots.lock().unwrap().remove(&number).is_some());
        Ok(())
    }
    fn take_log(&self, number: u32, piece: &Piece) -> io::Result<Vec<u64>> {
        assert!(self.0.slots.lock().unwrap()[&number].3, "not logged");
        let mut words = vec![0; (piece.len / P).div_ceil(64) as usize];
        for page in self.0.bits.lock().unwrap().remove(&number).unwrap_or_default() {
            words[(page / 64) as usize] |= 1 << (page % 64);
        }
        Ok(words)
    }
    fn reset_rings(&self) -> io::Result<()> {
        for entry in self.0.rings.lock().unwrap().iter().flat_map(|(_, ring)| ring.iter()) {
            let _ = entry.flags.compare_exchange(2, 0, Ordering::SeqCst, Ordering::SeqCst);
        }
        Ok(())
    }
}

impl Fake {
    fn slots(&self) -> Vec<(u64, u64, bool)> {
        self.0.slots.lock().unwrap().values().map(|(gpa, len, _, logged)| (*gpa, *len, *logged)).collect()
    }

    /// The guest stores to pages of slots: slot number and page within it.
    fn dirty(&self, ring: usize, pages: &[(u32, u64)]) {
        let (filled, entries) = &mut self.0.rings.lock().unwrap()[ring];
        for (slot, page) in pages {
            let entry = &entries[*filled % entries.len()];
            assert_eq!(entry.flags.load(Ordering::SeqCst), 0, "the ring is full");
            *filled += 1;
            entry.slot.store(*slot, Ordering::SeqCst);
            entry.page.store(*page, Ordering::SeqCst);
            entry.flags.store(1, Ordering::SeqCst);
        }
    }
}

fn ram(pages: u64) -> Arc<RamBlock> {
    RamBlock::new_shared("slots", pages * P).unwrap()
}

/// Slots with two rings of `entries`.
fn ringed(space: &AddressSpace, entries: u32) -> (Fake, Arc<Slots>) {
    let fake = Fake::default();
    let slots = Slots::with_host(Box::new(fake.clone()), Some(entries), space).unwrap();
    for index in 0..2 {
        let memory: Arc<[Entry]> = (0..entries).map(|_| Entry::default()).collect();
        fake.0.rings.lock().unwrap().push((0, memory.clone()));
        let Log::Rings(_, rings) = &mut slots.lock().log else { panic!() };
        rings.insert(index, Ring::new(memory));
    }
    (fake, slots)
}

fn take(log: &mut atoll_machine::memory::DirtyReader) -> Vec<u64> {
    log.take().iter().collect()
}

#[test]
fn a_machine_nobody_reads_logs_nothing_and_one_reader_logs_its_block_alone() {
    let space = AddressSpace::new();
    let (a, b, rom) = (ram(4), ram(4), ram(2));
    space.map_ram(0, &a, 0, 4 * P, 0).unwrap();
    space.map_rom(16 * P, &rom, 0, 2 * P, 0).unwrap();
    let (fake, _slots) = ringed(&space, 8);
    space.map_ram(8 * P, &b, 0, 4 * P, 0).unwrap();
    let off = [(0, 4 * P, false), (16 * P, 2 * P, false), (8 * P, 4 * P, false)];
    assert_eq!(fake.slots(), off);
    let calls = fake.0.calls.load(Ordering::SeqCst);
    let (first, second, of_rom) = (b.dirty_log(), b.dirty_log(), rom.dirty_log());
    assert_eq!(fake.slots()[2], (8 * P, 4 * P, true));
    assert_eq!(fake.slots()[..2], off[..2]);
    drop((first, of_rom));
    assert!(fake.slots()[2].2);
    drop(second);
    assert_eq!(fake.slots(), off);
    assert_eq!(fake.0.calls.load(Ordering::SeqCst) - calls, 2, "one change to begin, one to end");
}

#[test]
fn ring_entries_reach_every_reader_of_their_own_block() {
    let space = AddressSpace::new();
    let (a, b) = (ram(8), ram(8));
    // Slot 0 shows pages 2 to 7 of a, slot 1 all of b.
    space.map_ram(0, &a, 2 * P, 6 * P, 0).unwrap();
    space.map_ram(32 * P, &b, 0, 8 * P, 0).unwrap();
    let (fake, slots) = ringed(&space, 8);
    let (mut one, mut two, mut other) = (a.dirty_log(), a.dirty_log(), b.dirty_log());
    fake.dirty(0, &[(0, 1), (1, 7), (0, 1)]);
    fake.dirty(1, &[(0, 5), (9, 0), (0, 99)]);
    assert_eq!(take(&mut one), [3, 7]);
    assert_eq!(take(&mut one), [0u64; 0]);
    fake.dirty(1, &[(0, 0)]);
    slots.ring_full();
    assert_eq!(take(&mut two), [2, 3, 7]);
    assert_eq!(take(&mut other), [7]);
    assert_eq!(take(&mut one), [2]);
    // Stores that nobody wants any more do not turn up in the next log.
    fake.dirty(0, &[(0, 3)]);
    drop((one, two));
    assert!(take(&mut a.dirty_log()).is_empty());
}

#[test]
fn a_logged_slot_that_goes_reports_all_its_pages_and_leaves_no_entry_to_its_successor() {
    let space = AddressSpace::new();
    let (a, b) = (ram(4), ram(4));
    let id = space.map_ram(0, &a, 0, 4 * P, 0).unwrap();
    let (fake, _slots) = ringed(&space, 8);
    let (mut of_a, mut of_b) = (a.dirty_log(), b.dirty_log());
    fake.dirty(0, &[(0, 1)]);
    space.transaction(|t| {
        t.unmap(id);
        t.map_ram(8 * P, &b, 0, 4 * P, 0).unwrap();
    });
    assert_eq!(fake.slots(), [(8 * P, 4 * P, true)], "the number is used again, and logged from the start");
    assert_eq!(take(&mut of_a), [0, 1, 2, 3]);
    assert_eq!(take(&mut of_b), [0u64; 0]);
    fake.dirty(0, &[(0, 2)]);
    assert_eq!(take(&mut of_b), [2]);
}

#[test]
fn bitmaps_are_fetched_for_the_block_that_is_read() {
    let space = AddressSpace::new();
    let (a, b) = (ram(80), ram(4));
    space.map_ram(0, &a, 2 * P, 70 * P, 0).unwrap();
    space.map_ram(128 * P, &b, 0, 4 * P, 0).unwrap();
    let fake = Fake::default();
    let _slots = Slots::with_host(Box::new(fake.clone()), None, &space).unwrap();
    let (mut one, mut two, mut other) = (a.dirty_log(), a.dirty_log(), b.dirty_log());
    let bits = |slot, pages: &[u64]| drop(fake.0.bits.lock().unwrap().insert(slot, pages.to_vec()));
    bits(0, &[0, 63, 64, 69]);
    bits(1, &[3]);
    assert_eq!(take(&mut one), [2, 65, 66, 71]);
    assert_eq!(take(&mut two), [2, 65, 66, 71]);
    assert_eq!(take(&mut other), [3]);
    assert_eq!(take(&mut one), [0u64; 0]);
}

#[test]
fn a_refused_slot_stops_every_vcpu_with_the_reason() {
    let space = AddressSpace::new();
    let (fake, slots) = ringed(&space, 8);
    assert!(slots.enter(0).is_ok());
    fake.0.refuse_new.store(true, Ordering::SeqCst);
    space.map_ram(0, &ram(1), 0, P, 0).unwrap();
    let why = slots.enter(0).err().unwrap();
    assert!(why.starts_with("KVM refuses memory slot 0 (Ram 0x0+0x1000 of slots+0x0): "), "{why}");
    let refused = Fake::default();
    refused.0.refuse_new.store(true, Ordering::SeqCst);
    assert!(Slots::with_host(Box::new(refused), None, &space).is_err(), "and makes no partition");
}

#[test]
fn a_failure_calls_vcpus_out_of_the_guest() {
    let space = AddressSpace::new();
    let (fake, slots) = ringed(&space, 8);
    let kicked = Arc::new(AtomicBool::new(false));
    let flag = kicked.clone();
    slots.set_kick(Box::new(move |_| flag.store(true, Ordering::SeqCst)));
    std::thread::scope(|scope| {
        let inside = slots.enter(1).ok().unwrap();
        let slots = &slots;
        let vcpu = scope.spawn(move || {
            while !kicked.load(Ordering::SeqCst) {
                std::thread::yield_now();
            }
            drop(inside);
            slots.enter(1).err()
        });
        fake.0.refuse_new.store(true, Ordering::SeqCst);
        space.map_ram(0, &ram(1), 0, P, 0).unwrap();
        assert!(vcpu.join().unwrap().is_some());
    });
}

/// Vcpus that meet a failure while slots are still being replaced wait for neither table nor gate for ever.
#[test]
fn a_failure_while_slots_change_blocks_nobody() {
    let space = AddressSpace::new();
    let block = ram(8);
    space.map_ram(0, &block, 0, 8 * P, 0).unwrap();
    let (fake, slots) = ringed(&space, 8);
    slots.set_kick(Box::new(|_| {}));
    let (stop, refused) = (AtomicBool::new(false), AtomicUsize::new(0));
    std::thread::scope(|scope| {
        for index in 0..2 {
            let (slots, stop, refused) = (&slots, &stop, &refused);
            scope.spawn(move || {
                while !stop.load(Ordering::SeqCst) {
                    refused.fetch_add(slots.enter(index).is_err().into(), Ordering::SeqCst);
                }
            });
        }
        let mut n = 0;
        while n < 200 || refused.load(Ordering::SeqCst) < 20_000 {
            n += 1;
            fake.0.refuse_new.store(n == 20, Ordering::SeqCst);
            // A hole comes and goes: the slot is replaced.
            let hole = space.map_rom(3 * P, &block, 0, P, 1).unwrap();
            space.unmap(hole);
        }
        stop.store(true, Ordering::SeqCst);
    });
}

#[test]
fn memory_of_a_slot_that_the_kernel_keeps_stays_mapped() {
    let space = AddressSpace::new();
    let block = ram(1);
    let id = space.map_ram(0, &block, 0, P, 0).unwrap();
    let (fake, slots) = ringed(&space, 8);
    fake.0.refuse_remove.store(true, Ordering::SeqCst);
    space.unmap(id);
    assert!(slots.failure().unwrap().contains("does not remove memory slot 0"));
    let weak = Arc::downgrade(&block);
    drop(block);
    assert!(weak.upgrade().is_some(), "the guest can still reach it");
    drop(slots);
    assert!(weak.upgrade().is_none());
}

#[test]
fn more_pieces_than_slots_are_refused_in_words() {
    let space = AddressSpace::new();
    let (_fake, slots) = ringed(&space, 8);
    let block = ram(32);
    for n in 0..9 {
        space.map_ram(n * 2 * P, &block, n * 2 * P, P, 0).unwrap();
    }
    assert_eq!(slots.failure().unwrap(), "guest memory is in 9 pieces, KVM has 8 memory slots");
}

#[test]
fn a_ring_that_overflowed_stops_the_machine() {
    let space = AddressSpace::new();
    let block = ram(16);
    space.map_ram(0, &block, 0, 16 * P, 0).unwrap();
    let (fake, slots) = ringed(&space, 4);
    let mut log = block.dirty_log();
    fake.dirty(0, &[(0, 1), (0, 2), (0, 3)]);
    assert_eq!(take(&mut log), [1, 2, 3]);
    fake.dirty(1, &[(0, 1), (0, 2), (0, 3), (0, 4)]);
    slots.ring_full();
    assert_eq!(slots.failure().unwrap(), "KVM overflowed a dirty ring of 4 entries");
}
