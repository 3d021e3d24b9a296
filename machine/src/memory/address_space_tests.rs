//! Tests of [`super`], among them a comparison of the flattened view with a page-by-page model.

use std::sync::Mutex;

use proptest::prelude::*;

use super::*;

/// Answers reads with its tag and records accesses.
struct Probe {
    tag: u8,
    log: Mutex<Vec<(u64, Vec<u8>)>>,
}

impl Probe {
    fn new(tag: u8) -> Arc<Self> {
        Arc::new(Self { tag, log: Mutex::default() })
    }
    fn writes(&self) -> Vec<(u64, Vec<u8>)> {
        std::mem::take(&mut self.log.lock().unwrap())
    }
}

impl MmioDevice for Probe {
    fn mmio_read(&self, offset: u64, data: &mut [u8]) {
        for (i, byte) in data.iter_mut().enumerate() {
            *byte = self.tag.wrapping_add(offset as u8).wrapping_add(i as u8);
        }
    }
    fn mmio_write(&self, offset: u64, data: &[u8]) {
        self.log.lock().unwrap().push((offset, data.to_vec()));
    }
}

fn ram(name: &str, pages: u64) -> Arc<RamBlock> {
    RamBlock::new_shared(name, pages * PAGE_SIZE).unwrap()
}

const P: u64 = PAGE_SIZE;

#[test]
fn dma_spans_ranges_and_stops_at_what_is_not_ram() {
    let space = AddressSpace::new();
    let (a, b) = (ram("a", 1), ram("b", 1));
    space.map_ram(0, &a, 0, P, 0).unwrap();
    space.map_ram(P, &b, 0, P, 0).unwrap();
    space.map_mmio(2 * P, P, Probe::new(0), 0).unwrap();
    space.write(P - 2, b"abcd").unwrap();
    let mut buf = [0; 4];
    space.read(P - 2, &mut buf).unwrap();
    assert_eq!(&buf, b"abcd");
    b.read(0, &mut buf[..2]).unwrap();
    assert_eq!(&buf[..2], b"cd");
    let error = space.write(2 * P - 1, b"xy").unwrap_err();
    assert_eq!(error.to_string(), "no RAM at guest-physical address 0x2000");
    b.read(P - 1, &mut buf[..1]).unwrap();
    assert_eq!(buf[0], 0, "a refused write stores nothing");
    assert!(space.read(u64::MAX, &mut buf).is_err());
}

#[test]
fn higher_priority_wins_then_the_newer_region() {
    let space = AddressSpace::new();
    let (low, high, newer) = (ram("low", 4), ram("high", 1), ram("newer", 1));
    let name = |gpa| {
        let view = space.view();
        let range = view.lookup(gpa)?;
        match &range.target {
            FlatTarget::Ram { block, offset } => Some((block.name().to_owned(), offset + gpa - range.start)),
            _ => None,
        }
    };
    let h = space.map_ram(P, &high, 0, P, 5).unwrap();
    space.map_ram(0, &low, 0, 4 * P, 0).unwrap();
    let n = space.map_ram(P, &newer, 0, P, 0).unwrap();
    assert_eq!(name(P), Some(("high".into(), 0)));
    assert!(space.set_enabled(h, false));
    assert_eq!(name(P), Some(("newer".into(), 0)));
    assert!(space.unmap(n));
    assert!(!space.unmap(n));
    assert_eq!(name(P), Some(("low".into(), P)));
    assert_eq!(space.view().ranges().len(), 1, "neighbours that continue each other are joined");
    assert!(space.relocate(h, 8 * P));
    assert!(space.set_enabled(h, true));
    assert_eq!(name(8 * P), Some(("high".into(), 0)));
    assert_eq!(name(9 * P), None);
}

#[test]
fn an_alias_shows_what_its_source_shows_and_follows_changes() {
    // PAM: the BIOS at the top of 4 GiB also shows below 1 MiB, over RAM.
    let space = AddressSpace::new();
    let (dram, bios) = (ram("dram", 512), ram("bios", 64));
    bios.write(0x3fff0, &[0xea]).unwrap();
    space.map_ram(0, &dram, 0, 512 * P, 0).unwrap();
    space.map_rom(0xfffc_0000, &bios, 0, 64 * P, 0).unwrap();
    let shadow = space.map_alias(0xf_0000, 0xffff_0000, 0x1_0000, 1).unwrap();
    let mut byte = [0];
    space.mmio_read(0xf_fff0, &mut byte);
    assert_eq!(byte, [0xea]);
    space.mmio_write(0xf_fff0, &[1]);
    space.mmio_read(0xf_fff0, &mut byte);
    assert_eq!(byte, [0xea], "ROM ignores writes");
    space.set_enabled(shadow, false);
    space.mmio_write(0xf_fff0, &[1]);
    dram.read(0xf_fff0, &mut byte).unwrap();
    assert_eq!(byte, [1]);
}

#[test]
fn alias_loops_end_and_are_transparent() {
    let space = AddressSpace::new();
    let below = ram("below", 1);
    space.map_ram(0, &below, 0, P, -1).unwrap();
    space.map_alias(0, P, P, 0).unwrap();
    space.map_alias(P, 0, P, 0).unwrap();
    space.map_alias(4 * P, 4 * P, P, 0).unwrap();
    let view = space.view();
    assert!(matches!(&view.lookup(0).unwrap().target, FlatTarget::Ram { offset: 0, .. }));
    assert!(matches!(&view.lookup(P).unwrap().target, FlatTarget::Ram { offset: 0, .. }));
    assert!(view.lookup(4 * P).is_none());
}

#[test]
fn mmio_dispatch_splits_at_edges_and_floats_high() {
    let space = AddressSpace::new();
    let (a, flash) = (Probe::new(0x40), Probe::new(0));
    let rom = ram("flash", 1);
    rom.write(0, &[0x77]).unwrap();
    space.map_mmio(0x10, 4, a.clone(), 0).unwrap();
    space.map_rom_device(P, &rom, 0, P, flash.clone(), 0).unwrap();
    let mut data = [0; 8];
    space.mmio_read(0xe, &mut data);
    assert_eq!(data, [0xff, 0xff, 0x40, 0x41, 0x42, 0x43, 0xff, 0xff]);
    space.mmio_write(0x12, &[1, 2, 3, 4]);
    assert_eq!(a.writes(), [(2, vec![1, 2])]);
    space.mmio_read(P - 1, &mut data[..2]);
    assert_eq!(data[..2], [0xff, 0x77]);
    space.mmio_write(P - 1, &[9, 8]);
    assert_eq!(flash.writes(), [(0, vec![8])]);
    space.mmio_read(u64::MAX - 2, &mut data);
    assert_eq!(data[..3], [0xff; 3]);
}

#[test]
fn a_transaction_publishes_once_and_every_change_raises_the_generation() {
    let space = AddressSpace::new();
    let block = ram("ram", 2);
    let before = space.generation();
    let ids = space.transaction(|t| {
        let a = t.map_ram(0, &block, 0, P, 0).unwrap();
        let b = t.map_ram(P, &block, P, P, 0).unwrap();
        (a, b)
    });
    assert_eq!(space.generation(), before + 1);
    assert_eq!(space.view().generation(), before + 1);
    space.set_enabled(ids.0, true);
    assert_eq!(space.generation(), before + 1, "a change that changes nothing flushes nothing");
    space.set_enabled(ids.0, false);
    assert_eq!(space.generation(), before + 2);
}

#[test]
fn impossible_mappings_are_refused_and_impossible_bars_are_invisible() {
    let space = AddressSpace::new();
    let block = ram("ram", 2);
    assert!(matches!(space.map_ram(0, &block, P, 2 * P, 0), Err(MemoryError::OutsideBlock { .. })));
    assert!(matches!(space.map_ram(1, &block, 0, P, 0), Err(MemoryError::Misaligned { .. })));
    assert!(matches!(space.map_ram(0, &block, 0, 0, 0), Err(MemoryError::BadRange { .. })));
    assert!(matches!(space.map_ram(GPA_END - P, &block, 0, 2 * P, 0), Err(MemoryError::BadRange { .. })));
    assert!(matches!(space.map_alias(0, GPA_END, P, 0), Err(MemoryError::BadRange { .. })));
    assert_eq!(space.generation(), 0);
    let bar = space.map_mmio(P, 2 * P, Probe::new(0), 0).unwrap();
    for gpa in [u64::MAX - 4095, GPA_END, u64::MAX] {
        space.relocate(bar, gpa);
        assert!(space.view().ranges().is_empty(), "{gpa:#x}");
    }
    space.relocate(bar, GPA_END - P);
    assert_eq!(space.view().ranges()[0].len, P, "the part below the end shows");
}

#[derive(Clone, Debug)]
struct Spec {
    kind: u8,
    page: u64,
    pages: u64,
    source: u64,
    priority: i32,
    enabled: bool,
}

const PAGES: u64 = 48;

fn spec() -> impl Strategy<Value = Spec> {
    (0u8..5, 0..PAGES, 1u64..16, 0..PAGES, -1i32..3, prop::bool::weighted(0.85)).prop_map(
        |(kind, page, pages, source, priority, enabled)| Spec {
            kind,
            page,
            pages,
            source,
            priority,
            enabled,
        },
    )
}

/// What shows at `page`: the index of the region and the page inside it.
fn model(specs: &[Spec], page: u64, depth: u32) -> Option<(usize, u64)> {
    let mut order: Vec<usize> = (0..specs.len()).collect();
    order.sort_by_key(|&i| (std::cmp::Reverse(specs[i].priority), std::cmp::Reverse(i)));
    for i in order {
        let s = &specs[i];
        if !s.enabled || page < s.page || page >= s.page + s.pages {
            continue;
        }
        if s.kind != 4 {
            return Some((i, page - s.page));
        }
        if depth < MAX_ALIAS_DEPTH
            && let Some(hit) = model(specs, s.source + page - s.page, depth + 1)
        {
            return Some(hit);
        }
    }
    None
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]
    #[test]
    fn flattened_view_equals_the_page_by_page_model(specs in prop::collection::vec(spec(), 0..9)) {
        let space = AddressSpace::new();
        let blocks: Vec<_> = (0..specs.len()).map(|i| ram(&i.to_string(), 16)).collect();
        let devices: Vec<Arc<dyn MmioDevice>> = (0..specs.len()).map(|_| Probe::new(0) as _).collect();
        for (i, s) in specs.iter().enumerate() {
            let (gpa, len, block) = (s.page * P, s.pages * P, &blocks[i]);
            let device = devices[i].clone();
            let id = match s.kind {
                0 => space.map_ram(gpa, block, 0, len, s.priority),
                1 => space.map_rom(gpa, block, 0, len, s.priority),
                2 => space.map_rom_device(gpa, block, 0, len, device, s.priority),
                3 => space.map_mmio(gpa, len, device, s.priority),
                _ => space.map_alias(gpa, s.source * P, len, s.priority),
            }.unwrap();
            space.set_enabled(id, s.enabled);
        }
        let view = space.view();
        prop_assert!(view.ranges().windows(2).all(|w| w[0].end() <= w[1].start));
        for page in 0..2 * PAGES {
            let gpa = page * P + 123;
            let shown = view.lookup(gpa).map(|r| {
                let inside = gpa - r.start;
                match &r.target {
                    FlatTarget::Ram { block, offset } => {
                        (0, block.name().parse().unwrap(), offset + inside)
                    }
                    FlatTarget::Rom { block, offset, writes: None, .. } => {
                        (1, block.name().parse().unwrap(), offset + inside)
                    }
                    FlatTarget::Rom { block, offset, device_offset, .. } => {
                        assert_eq!(offset, device_offset);
                        (2, block.name().parse().unwrap(), offset + inside)
                    }
                    FlatTarget::Mmio { device, offset } => {
                        let same = |d: &Arc<dyn MmioDevice>| {
                            std::ptr::addr_eq(Arc::as_ptr(d), Arc::as_ptr(device))
                        };
                        (3, devices.iter().position(same).unwrap(), offset + inside)
                    }
                }
            });
            let wanted = model(&specs, page, 0).map(|(i, p)| (specs[i].kind, i, p * P + 123));
            prop_assert_eq!(shown, wanted, "page {}", page);
        }
    }
}

/// Keeps every change it is told of.
#[derive(Default)]
struct Listener(Mutex<Vec<(u64, u64, usize)>>);

impl ViewListener for Listener {
    fn view_changed(&self, old: &FlatView, new: &FlatView) {
        let change = (old.generation(), new.generation(), new.ranges().len());
        self.0.lock().unwrap().push(change);
    }
}

#[test]
fn listeners_are_told_of_every_change_once_it_is_published_and_of_no_other() {
    let space = AddressSpace::new();
    let block = ram("ram", 4);
    let first = space.map_ram(0, &block, 0, P, 0).unwrap();
    let (kept, dropped) = (Arc::new(Listener::default()), Arc::new(Listener::default()));
    let listener: Arc<dyn ViewListener> = kept.clone();
    space.add_listener(&listener);
    space.add_listener(&(dropped.clone() as Arc<dyn ViewListener>));
    assert_eq!(*kept.0.lock().unwrap(), [(0, 1, 1)], "begins with what is there");
    drop(dropped);
    space.transaction(|t| {
        t.map_ram(2 * P, &block, P, P, 0).unwrap();
        t.unmap(first)
    });
    space.set_enabled(first, false);
    space.map_mmio(P, P, Probe::new(0), 0).unwrap();
    assert_eq!(*kept.0.lock().unwrap(), [(0, 1, 1), (1, 2, 1), (2, 3, 2)]);
}

/// A hypervisor's guest whose page is not mapped yet comes out as an MMIO access: RAM must answer that too.
#[test]
fn ram_answers_processor_accesses_across_pages_and_notes_them() {
    let space = AddressSpace::new();
    let block = ram("ram", 2);
    space.map_ram(0, &block, P, P, 0).unwrap();
    space.map_ram(P, &block, 0, P, 0).unwrap();
    let mut log = block.dirty_log();
    space.mmio_write(P - 4, &[1, 2, 3, 4, 5, 6, 7, 8]);
    let mut data = [0; 8];
    space.mmio_read(P - 4, &mut data);
    assert_eq!(data, [1, 2, 3, 4, 5, 6, 7, 8]);
    block.read(2 * P - 4, &mut data[..4]).unwrap();
    assert_eq!(data[..4], [1, 2, 3, 4]);
    assert_eq!(log.take().iter().collect::<Vec<_>>(), [0, 1]);
}
