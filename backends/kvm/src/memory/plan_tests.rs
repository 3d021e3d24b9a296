//! Tests of [`super`]: every change of the table against a page-by-page model.

use atoll_machine::bus::MmioDevice;
use atoll_machine::memory::AddressSpace;
use proptest::prelude::*;

use super::*;

struct Nothing;
impl MmioDevice for Nothing {
    fn mmio_read(&self, _offset: u64, _data: &mut [u8]) {}
    fn mmio_write(&self, _offset: u64, _data: &[u8]) {}
}

const P: u64 = PAGE_SIZE;

fn block(pages: u64) -> Arc<RamBlock> {
    RamBlock::new_shared("plan", pages * P).unwrap()
}

/// Carries a plan out as the kernel would: no overlap is ever allowed.
fn apply(table: &mut Table, plan: Plan) {
    for number in plan.remove {
        assert!(table.remove(&number).is_some());
    }
    for piece in plan.add {
        assert!(piece.len > 0 && table.values().all(|p| !p.overlaps(&piece)), "{piece:?} over {table:?}");
        let number = free_number(table);
        assert!(table.insert(number, piece).is_none());
    }
}

fn shown(table: &Table, gpa: u64) -> Option<(*const RamBlock, u64, Kind)> {
    let piece = table.values().find(|p| (p.gpa..p.end()).contains(&gpa))?;
    Some((Arc::as_ptr(&piece.block), piece.offset + (gpa - piece.gpa), piece.kind))
}

#[test]
fn an_unchanged_view_needs_no_change_and_numbers_are_used_again() {
    let space = AddressSpace::new();
    let ram = block(8);
    space.map_ram(0, &ram, 0, 8 * P, 0).unwrap();
    let hole = space.map_mmio(3 * P, P, Arc::new(Nothing), 1).unwrap();
    let mut table = Table::new();
    let step = |table: &mut Table| {
        let plan = plan(table, &pieces(&space.view()), 32).unwrap();
        let counts = (plan.remove.len(), plan.add.len(), plan.replaces(table));
        apply(table, plan);
        counts
    };
    assert_eq!(step(&mut table), (0, 2, false));
    assert_eq!(step(&mut table), (0, 0, false));
    space.set_enabled(hole, false);
    assert_eq!(step(&mut table), (0, 1, false), "only the hole is filled");
    space.set_enabled(hole, true);
    assert_eq!(step(&mut table), (1, 0, false), "and taken away again");
    space.relocate(hole, 5 * P);
    assert_eq!(step(&mut table), (1, 2, true), "a slot that loses its middle is replaced");
    assert_eq!(table.keys().copied().collect::<Vec<_>>(), [0, 1, 2]);
}

#[test]
fn a_page_that_a_device_covers_in_part_has_no_slot() {
    let space = AddressSpace::new();
    let ram = block(4);
    space.map_ram(0, &ram, 0, 4 * P, 0).unwrap();
    space.map_mmio(P + 0x800, 4, Arc::new(Nothing), 1).unwrap();
    let ranges: Vec<_> = pieces(&space.view()).iter().map(|p| (p.gpa, p.len, p.offset)).collect();
    assert_eq!(ranges, [(0, P, 0), (2 * P, 2 * P, 2 * P)]);
}

#[test]
fn at_the_limit_the_table_is_made_anew_and_beyond_it_refused() {
    let space = AddressSpace::new();
    let ram = block(16);
    space.map_ram(0, &ram, 0, 16 * P, 0).unwrap();
    let holes: Vec<_> =
        (0..4).map(|n| space.map_mmio((n * 4 + 1) * P, P, Arc::new(Nothing), 1).unwrap()).collect();
    let mut table = Table::new();
    let first = plan(&table, &pieces(&space.view()), 5).unwrap();
    apply(&mut table, first);
    assert_eq!(plan(&table, &pieces(&space.view()), 4).unwrap_err(), 5);
    assert!(holes.into_iter().all(|hole| space.unmap(hole)));
    let wanted = pieces(&space.view());
    let all = plan(&table, &wanted, 5).unwrap();
    assert!(all.replaces(&table));
    apply(&mut table, all);
    assert_eq!(table.len(), 1);
}

#[derive(Clone, Debug)]
enum Change {
    Ram(u64, u64, u64, i32),
    Rom(u64, u64, u64, i32),
    Device(u64, u64, i32),
    Toggle(usize, bool),
    Move(usize, u64),
}

const PAGES: u64 = 40;

fn change() -> impl Strategy<Value = Change> {
    let place = || (0..PAGES, 1u64..12, 0u64..20, 0i32..3);
    prop_oneof![
        3 => place().prop_map(|(at, len, offset, p)| Change::Ram(at, len, offset, p)),
        1 => place().prop_map(|(at, len, offset, p)| Change::Rom(at, len, offset, p)),
        2 => (0..PAGES * 4, 1u64..16, 0i32..4).prop_map(|(at, len, p)| Change::Device(at, len, p)),
        3 => (0usize..12, any::<bool>()).prop_map(|(n, on)| Change::Toggle(n, on)),
        2 => (0usize..12, 0..PAGES).prop_map(|(n, at)| Change::Move(n, at)),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]
    #[test]
    fn slots_show_what_the_view_shows_and_leave_alone_what_stays(
        changes in prop::collection::vec(change(), 1..25),
        limit in 3usize..64,
    ) {
        let space = AddressSpace::new();
        let blocks = [block(32), block(32)];
        let mut ids = Vec::new();
        let mut table = Table::new();
        for change in changes {
            match change {
                Change::Ram(at, len, offset, p) => {
                    ids.push(space.map_ram(at * P, &blocks[0], offset * P, len * P, p).unwrap());
                }
                Change::Rom(at, len, offset, p) => {
                    ids.push(space.map_rom(at * P, &blocks[1], offset * P, len * P, p).unwrap());
                }
                // In quarters of a page.
                Change::Device(at, len, p) => {
                    ids.push(space.map_mmio(at * P / 4, len * P / 4, Arc::new(Nothing), p).unwrap());
                }
                Change::Toggle(n, on) => drop(ids.get(n).map(|id| space.set_enabled(*id, on))),
                Change::Move(n, at) => drop(ids.get(n).map(|id| space.relocate(*id, at * P))),
            }
            let view = space.view();
            let wanted = pieces(&view);
            for number in plan(&table, &wanted, usize::MAX).unwrap().remove {
                prop_assert!(!wanted.iter().any(|w| table[&number].is_part_of(w)), "slot {} is disturbed", number);
            }
            match plan(&table, &wanted, limit) {
                Ok(plan) => apply(&mut table, plan),
                Err(needed) => {
                    prop_assert!(needed > limit && needed == wanted.len());
                    continue;
                }
            }
            prop_assert!(table.len() <= limit);
            for page in 0..PAGES + 12 {
                let whole = |gpa: u64| view.lookup(gpa).and_then(|r| {
                    let inside = gpa - r.start;
                    let (block, offset, kind) = match &r.target {
                        FlatTarget::Ram { block, offset } => (block, offset, Kind::Ram),
                        FlatTarget::Rom { block, offset, .. } => (block, offset, Kind::Rom),
                        FlatTarget::Mmio { .. } => return None,
                    };
                    let all = r.start <= page * P && r.end() >= (page + 1) * P;
                    all.then_some((Arc::as_ptr(block), offset + inside, kind))
                });
                prop_assert_eq!(shown(&table, page * P), whole(page * P), "page {}", page);
            }
        }
    }
}
