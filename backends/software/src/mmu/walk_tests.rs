//! Tests of the walker on paging structures in a map.

use std::collections::HashMap;

use super::walk::{Page, Paging, Request, Structures, Tables, code, walk};

#[derive(Default)]
struct Memory {
    entries: HashMap<u64, u64>,
    writes: Vec<(u64, u64)>,
    /// Replaced by another processor just before the next `replace` of this address.
    race: Option<(u64, u64)>,
}

impl Tables for Memory {
    fn read(&mut self, address: u64, _wide: bool) -> u64 {
        self.entries.get(&address).copied().unwrap_or(0)
    }
    fn replace(&mut self, address: u64, _wide: bool, old: u64, new: u64) -> bool {
        if let Some((at, value)) = self.race.take() {
            self.entries.insert(at, value);
        }
        if self.read(address, true) != old {
            return false;
        }
        self.entries.insert(address, new);
        self.writes.push((address, new));
        true
    }
}

fn paging(structures: Structures) -> Paging {
    Paging {
        structures,
        cr3: 0x1000,
        pdpte: [0x2001, 0, 0, 0],
        write_protect: true,
        page_size_extensions: true,
        global_pages: true,
        no_execute: true,
        smep: false,
        smap: false,
        physical_bits: 40,
    }
}

const READ: Request = Request { write: false, user: false, fetch: false, smap_override: false };
const WRITE: Request = Request { write: true, ..READ };
const FETCH: Request = Request { fetch: true, ..READ };
const USER: Request = Request { user: true, ..READ };

/// A 4-level mapping of linear 0x0000_1234_5678_9000 to frame 0xabc000 with the given leaf flags.
fn four_level(leaf: u64, upper: u64) -> (Memory, u64) {
    let linear = 0x0000_1234_5678_9abc;
    let index = |level: u64| (linear >> (12 + 9 * level) & 0x1ff) * 8;
    let mut m = Memory::default();
    m.entries.insert(0x1000 + index(3), 0x2000 | upper);
    m.entries.insert(0x2000 + index(2), 0x3000 | upper);
    m.entries.insert(0x3000 + index(1), 0x4000 | upper);
    m.entries.insert(0x4000 + index(0), 0xab_c000 | leaf);
    (m, linear)
}

#[test]
fn paging_off_is_the_identity() {
    let page = walk(&paging(Structures::Off), &mut Memory::default(), 0x1234_5678, WRITE).unwrap();
    assert_eq!((page.frame, page.shift, page.writable), (0x1234_5000, 12, true));
}

#[test]
fn four_levels_lead_to_the_frame_and_set_accessed_and_dirty() {
    let (mut m, linear) = four_level(7, 7);
    let page = walk(&paging(Structures::FourLevel), &mut m, linear, READ).unwrap();
    assert_eq!(
        page,
        Page { frame: 0xab_c000, shift: 12, writable: true, user: true, global: false, dirty: false }
    );
    assert!(m.entries.values().all(|e| e & 0x20 != 0), "accessed at every level");
    assert!(m.entries.values().all(|e| e & 0x40 == 0), "dirty only on writes");
    m.writes.clear();
    let page = walk(&paging(Structures::FourLevel), &mut m, linear, WRITE).unwrap();
    assert!(page.dirty);
    assert_eq!(m.writes.len(), 1, "only the leaf changes");
    assert!(walk(&paging(Structures::FourLevel), &mut m, linear, READ).unwrap().dirty);
}

#[test]
fn absent_entries_fault_at_every_level_without_touching_flags() {
    for level in 0..4u64 {
        let (mut m, linear) = four_level(7, 7);
        let address = 0x1000 * (4 - level) + (linear >> (12 + 9 * level) & 0x1ff) * 8;
        m.entries.insert(address, 0xffff_ffff_ffff_fffe);
        let error = walk(&paging(Structures::FourLevel), &mut m, linear, Request { write: true, ..USER });
        assert_eq!(error, Err(code::WRITE | code::USER));
        assert!(m.writes.is_empty());
    }
}

#[test]
fn rights_are_those_of_all_levels() {
    let p = paging(Structures::FourLevel);
    let (mut m, linear) = four_level(7, 3);
    assert_eq!(walk(&p, &mut m, linear, USER), Err(code::PRESENT | code::USER));
    let (mut m, linear) = four_level(7, 5);
    assert_eq!(walk(&p, &mut m, linear, WRITE), Err(code::PRESENT | code::WRITE));
    let page = walk(&Paging { write_protect: false, ..p }, &mut m, linear, WRITE).unwrap();
    assert!(!page.writable, "allowed by CR0.WP = 0 only");
    let user_write = Request { write: true, ..USER };
    let error = walk(&Paging { write_protect: false, ..p }, &mut m, linear, user_write);
    assert_eq!(error, Err(code::PRESENT | code::WRITE | code::USER));
}

#[test]
fn no_execute_counts_at_any_level_and_is_reserved_without_nxe() {
    let p = paging(Structures::FourLevel);
    let (mut m, linear) = four_level(7, 7 | 1 << 63);
    assert_eq!(walk(&p, &mut m, linear, FETCH), Err(code::PRESENT | code::FETCH));
    assert!(walk(&p, &mut m, linear, READ).is_ok());
    let without = Paging { no_execute: false, ..p };
    assert_eq!(walk(&without, &mut m, linear, READ), Err(code::PRESENT | code::RESERVED));
    assert_eq!(walk(&without, &mut m, linear, FETCH), Err(code::PRESENT | code::RESERVED), "no I/D then");
}

#[test]
fn smep_and_smap_keep_the_supervisor_off_user_pages() {
    let p = Paging { smep: true, smap: true, ..paging(Structures::FourLevel) };
    let (mut m, linear) = four_level(7, 7);
    assert_eq!(walk(&p, &mut m, linear, FETCH), Err(code::PRESENT | code::FETCH));
    assert_eq!(walk(&p, &mut m, linear, READ), Err(code::PRESENT));
    assert!(walk(&p, &mut m, linear, Request { smap_override: true, ..READ }).is_ok());
    assert!(walk(&p, &mut m, linear, Request { fetch: true, ..USER }).is_ok());
    let (mut m, linear) = four_level(3, 7);
    assert!(walk(&p, &mut m, linear, FETCH).is_ok(), "a supervisor page");
}

#[test]
fn physical_address_bits_beyond_the_model_are_reserved() {
    for bit in [40, 51] {
        let (mut m, linear) = four_level(7 | 1 << bit, 7);
        let error = walk(&paging(Structures::FourLevel), &mut m, linear, READ);
        assert_eq!(error, Err(code::PRESENT | code::RESERVED), "bit {bit}");
    }
    let (mut m, linear) = four_level(7 | 1 << 39 | 1 << 52, 7);
    let page = walk(&paging(Structures::FourLevel), &mut m, linear, READ).unwrap();
    assert_eq!(page.frame, 0xab_c000 | 1 << 39, "bit 52 is ignored");
}

#[test]
fn large_pages_take_the_offset_and_reserve_the_bits_below() {
    let p = paging(Structures::FourLevel);
    let (mut m, linear) = four_level(7, 7);
    let pd = 0x3000 + (linear >> 21 & 0x1ff) * 8;
    m.entries.insert(pd, 0x4000_0000 | 0x187 | 1 << 12);
    let page = walk(&p, &mut m, linear, WRITE).unwrap();
    assert_eq!((page.frame, page.shift), (0x4000_0000 | (linear & 0x1f_f000), 21));
    assert!(page.global);
    m.entries.insert(pd, 0x4000_0000 | 0x187 | 1 << 13);
    assert_eq!(walk(&p, &mut m, linear, READ), Err(code::PRESENT | code::RESERVED));

    let (mut m, linear) = four_level(7, 7);
    let pdpt = 0x2000 + (linear >> 30 & 0x1ff) * 8;
    m.entries.insert(pdpt, 0x8000_0087);
    let page = walk(&p, &mut m, linear, READ).unwrap();
    assert_eq!((page.frame, page.shift), (0x8000_0000 | (linear & 0x3fff_f000), 30));
    let (mut m, linear) = four_level(7, 7 | 1 << 7);
    let error = walk(&p, &mut m, linear, READ);
    assert_eq!(error, Err(code::PRESENT | code::RESERVED), "no page size bit in the PML4");
}

#[test]
fn pae_uses_the_pdpte_registers() {
    let mut p = paging(Structures::Pae);
    let linear = 0x1234_5678;
    let mut m = Memory::default();
    m.entries.insert(0x2000 + (linear >> 21) * 8, 0x3003);
    m.entries.insert(0x3000 + (linear >> 12 & 0x1ff) * 8, 0x9_8765_4000 | 3);
    assert_eq!(walk(&p, &mut m, linear, WRITE).unwrap().frame, 0x9_8765_4000);
    m.entries.insert(0x3000 + (linear >> 12 & 0x1ff) * 8, 3 | 1 << 62);
    let error = walk(&p, &mut m, linear, READ);
    assert_eq!(error, Err(code::PRESENT | code::RESERVED), "bits 62..52 are reserved in PAE paging");
    p.pdpte[0] = 0;
    assert_eq!(walk(&p, &mut m, linear, READ), Err(0));
}

#[test]
fn legacy_paging_has_two_levels_and_36_bit_large_pages() {
    let p = paging(Structures::Legacy);
    let linear = 0xc012_3456;
    let mut m = Memory::default();
    let pde = 0x1000 + (linear >> 22) * 4;
    m.entries.insert(pde, 0x2007);
    m.entries.insert(0x2000 + (linear >> 12 & 0x3ff) * 4, 0x5000 | 7);
    assert_eq!(walk(&p, &mut m, linear, WRITE).unwrap().frame, 0x5000);
    assert_eq!(m.entries[&pde] & 0x60, 0x20);

    m.entries.insert(pde, 0x0040_0000 | 0x87 | 3 << 13);
    let page = walk(&p, &mut m, linear, READ).unwrap();
    assert_eq!((page.frame, page.shift), (0x3_0040_0000 | (linear & 0x3f_f000), 22));
    m.entries.insert(pde, 0x0040_0000 | 0x87 | 1 << 21);
    assert_eq!(walk(&p, &mut m, linear, READ), Err(code::PRESENT | code::RESERVED));
    let without = Paging { page_size_extensions: false, ..p };
    m.entries.insert(pde, 0x2087);
    assert_eq!(walk(&without, &mut m, linear, READ).unwrap().shift, 12, "PS is ignored without CR4.PSE");
    let execute = Request { fetch: true, ..USER };
    m.entries.insert(0x2000 + (linear >> 12 & 0x3ff) * 4, 0x5003);
    let p = Paging { no_execute: true, ..p };
    m.entries.insert(pde, 0x2007);
    assert_eq!(walk(&p, &mut m, linear, execute), Err(code::PRESENT | code::USER), "no I/D in 32-bit paging");
}

#[test]
fn an_entry_that_changes_under_the_walk_restarts_it() {
    let (mut m, linear) = four_level(7, 7);
    let leaf = 0x4000 + (linear >> 12 & 0x1ff) * 8;
    m.race = Some((leaf, 0xde_f000 | 7));
    let page = walk(&paging(Structures::FourLevel), &mut m, linear, WRITE).unwrap();
    assert_eq!(page.frame, 0xde_f000);
    assert_eq!(m.entries[&leaf], 0xde_f000 | 0x67);
}
