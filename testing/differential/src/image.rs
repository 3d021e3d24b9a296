//! The Multiboot kernel: header, monitor, tables, cases.

use crate::case::{Suite, Width};
use crate::layout::*;
use crate::{monitor_real, monitor32, monitor64};

/// Guest memory while it is being filled.
struct Image(Vec<u8>);

impl Image {
    fn put(&mut self, at: u64, bytes: &[u8]) {
        let at = (at - IMAGE) as usize;
        self.0[at..at + bytes.len()].copy_from_slice(bytes);
    }

    /// Puts into the pristine copy of the working area.
    fn work(&mut self, at: u64, bytes: &[u8]) {
        self.put(at - WORK + PRISTINE, bytes);
    }

    fn work64(&mut self, at: u64, value: u64) {
        self.work(at, &value.to_le_bytes());
    }

    fn work32(&mut self, at: u64, value: u32) {
        self.work(at, &value.to_le_bytes());
    }
}

/// A segment descriptor; `flags` holds the byte of type and DPL and, from bit 8, G, D, L, AVL as bits 3 to 0.
pub(crate) const fn segment(base: u64, limit: u64, flags: u64) -> u64 {
    limit & 0xffff
        | (base & 0xff_ffff) << 16
        | (flags & 0xff) << 40
        | (limit >> 16 & 15) << 48
        | (flags >> 8 & 15) << 52
        | (base >> 24 & 0xff) << 56
}

/// A gate descriptor's low eight bytes.
pub(crate) const fn gate(selector: u16, offset: u64, kind: u64, count: u64) -> u64 {
    offset & 0xffff | (selector as u64) << 16 | count << 32 | kind << 40 | (offset >> 16 & 0xffff) << 48
}

/// Builds the kernel that runs the cases of `suite` from number `first` on.
pub(crate) fn build(suite: &Suite, first: usize) -> anyhow::Result<Vec<u8>> {
    let end = CASES + CASE_LEN * suite.cases.len() as u64;
    let mut image = Image(vec![0; (end - IMAGE) as usize]);
    header(&mut image, end);
    let pieces = match suite.width {
        Width::Real | Width::Protected => monitor32::pieces(suite.width, suite.cases.len())?,
        Width::Long => monitor64::pieces(suite.cases.len())?,
    };
    for (at, code) in pieces {
        image.put(at, &code);
    }
    image.put(INDEX, &(first as u32).to_le_bytes());
    for (i, number) in usual(suite.width).into_iter().enumerate() {
        image.put(USUAL + i as u64 * 4, &number.to_le_bytes());
    }
    let msrs = match suite.width {
        Width::Real | Width::Protected => monitor32::MSRS,
        Width::Long => monitor64::MSRS,
    };
    for (i, (number, value)) in msrs.iter().enumerate() {
        image.put(MSRS + i as u64 * 12, &number.to_le_bytes());
        image.put(MSRS + i as u64 * 12 + 4, &value.to_le_bytes());
    }
    image.put(GDTR, &GDT_LIMIT.to_le_bytes());
    image.put(GDTR + 2, &GDT.to_le_bytes());
    image.put(IDTR, &0xfff_u16.to_le_bytes());
    image.put(IDTR + 2, &IDT.to_le_bytes());
    descriptors(&mut image, suite.width);
    interrupts(&mut image, suite.width);
    tasks(&mut image, suite.width);
    page_tables(&mut image);
    for i in 0..0x400 {
        image.work32(DATA + i * 4, 0xda7a_0000 + i as u32 * 4);
    }
    for (i, case) in suite.cases.iter().enumerate() {
        let at = CASES + CASE_LEN * i as u64;
        image.put(at, &case.entry);
        // What gates and far transfers lead to: INT 41h, the same in code of any width.
        image.put(at + INNER_LEN + 0x100, &[0xcd, DONE]);
        image.put(at + INNER_LEN, &case.inner);
    }
    Ok(image.0)
}

/// The record of a case that changes nothing, as 32-bit numbers.
pub(crate) fn usual(width: Width) -> Vec<u32> {
    match width {
        Width::Real => monitor_real::usual(),
        Width::Protected => monitor32::usual(),
        Width::Long => monitor64::usual(),
    }
}

/// Multiboot 0.6.96, section 3.1: flag 16 gives the addresses, so that no ELF file is needed.
fn header(image: &mut Image, end: u64) {
    const MAGIC: u32 = 0x1bad_b002;
    const FLAGS: u32 = 1 << 16;
    let words = [
        MAGIC,
        FLAGS,
        MAGIC.wrapping_add(FLAGS).wrapping_neg(),
        IMAGE as u32,
        IMAGE as u32,
        end as u32,
        end as u32,
        ENTRY as u32,
    ];
    for (i, word) in words.into_iter().enumerate() {
        image.put(IMAGE + i as u64 * 4, &word.to_le_bytes());
    }
}

fn descriptors(image: &mut Image, width: Width) {
    const FLAT: u64 = 0xf_ffff;
    let user = width.user();
    // The 32-bit one has an I/O permission bitmap behind it.
    let tss = if width == Width::Long { 0x67 } else { 0x106 };
    let entries = [
        (sel::CODE32, segment(0, FLAT, 0xc9b)),
        (sel::DATA, segment(0, FLAT, 0xc93)),
        (sel::USER_CODE32, segment(0, FLAT, 0xcfb)),
        (sel::USER_DATA, segment(0, FLAT, 0xcf3)),
        (sel::CODE16, segment(INNER, 0xffff, 0x09b)),
        (sel::DATA16, segment(WORK, 0xffff, 0x093)),
        (sel::USER_CODE16, segment(user + INNER, 0xffff, 0x0fb)),
        (sel::USER_DATA16, segment(user + WORK, 0xffff, 0x0f3)),
        (sel::TSS, segment(TSS, tss, 0x089)),
        (sel::LDT, segment(LDT, 0x3f, 0x082)),
        (sel::TSS2, segment(TSS2, 0x67, 0x089)),
        (sel::TSS_DF, segment(TSS_DF, 0x67, 0x089)),
        (sel::CODE64, segment(0, FLAT, 0xa9b)),
        (sel::USER_CODE64, segment(0, FLAT, 0xafb)),
        (sel::CONFORMING, segment(0, FLAT, 0xc9f)),
        (sel::EXPAND_DOWN, segment(0, 0xf, 0xcf7)),
        (sel::READ_ONLY, segment(0, FLAT, 0xcf1)),
        (sel::EXECUTE_ONLY, segment(0, FLAT, 0xcf9)),
        (sel::ABSENT_DATA, segment(0, FLAT, 0xc73)),
        (sel::ABSENT_CODE, segment(0, FLAT, 0xc7b)),
    ];
    for (selector, entry) in entries {
        image.work64(GDT + u64::from(selector & !7), entry);
    }
    if width == Width::Real {
        image.work64(GDT + u64::from(sel::REAL_CODE), segment(REAL, 0xffff, 0x09b));
        image.work64(GDT + u64::from(sel::REAL_DATA), segment(0, 0xffff, 0x093));
    }
    let target = INNER + 0x100;
    if width == Width::Long {
        image.work64(GDT + u64::from(sel::GATE), gate(sel::CODE64, target, 0xec, 0));
    } else {
        let more = [
            (sel::GATE, gate(sel::CODE32, target, 0xec, 2)),
            (sel::TASK_GATE, gate(sel::TSS2, 0, 0xe5, 0)),
            (sel::BUSY_TSS, segment(TSS2, 0x67, 0x08b)),
            (sel::ABSENT_TSS, segment(TSS2, 0x67, 0x009)),
            (sel::GATE16, gate(sel::CODE16, 0x100, 0xe4, 1)),
            (sel::TSS16, segment(TSS2, 0x2b, 0x081)),
            (sel::GATE_INWARD, gate(sel::USER_CODE32, target, 0xec, 0)),
        ];
        for (selector, entry) in more {
            image.work64(GDT + u64::from(selector), entry);
        }
    }
    image.work64(LDT + 8, segment(0, FLAT, 0xcf3));
    image.work64(LDT + 16, segment(0, FLAT, 0xc93));
    image.work64(LDT + 24, segment(0, FLAT, 0xcfb));
}

fn interrupts(image: &mut Image, width: Width) {
    for vector in 0..VECTORS {
        let open = vector == 3 || vector == 4 || vector >= 0x40;
        let mut kind: u64 = if open { 0xee } else { 0x8e };
        let mut selector = if width == Width::Long { sel::CODE64 } else { sel::CODE32 };
        match vector {
            0x4d => kind = 0x6e,
            0x4e => kind = 0xef,
            0x4f => selector = sel::DATA,
            _ => {}
        }
        let offset = STUBS + vector * 16;
        match width {
            Width::Long => image.work64(IDT + vector * 16, gate(selector, offset, kind, 1)),
            Width::Real | Width::Protected => {
                let entry = match vector {
                    8 => gate(sel::TSS_DF, 0, 0x85, 0),
                    0x4c => gate(sel::TSS2, 0, 0xe5, 0),
                    _ => gate(selector, offset, kind, 0),
                };
                image.work64(IDT + vector * 8, entry);
            }
        }
    }
}

/// SDM vol. 3, 7.2.1 and 7.7.
fn tasks(image: &mut Image, width: Width) {
    if width == Width::Long {
        image.work64(TSS + 4, GATE_STACK);
        image.work64(TSS + 0x24, IST_STACK);
        image.work32(TSS + 0x64, 0x0068_0000);
        return;
    }
    image.work32(TSS + 4, GATE_STACK as u32);
    image.work32(TSS + 8, sel::DATA.into());
    // Bitmap: ports 0xe0..=0xe7 allowed, all others not.
    image.work32(TSS + 0x64, 0x0068_0000);
    image.work(TSS + 0x68, &[0xff; 0x9f]);
    image.work(TSS + 0x68 + 0xe0 / 8, &[0]);
    for (tss, eip, esp) in [(TSS2, INNER + 0x100, CASE_STACK - 0x100), (TSS_DF, DOUBLE_FAULT, MONITOR_STACK)]
    {
        image.work32(tss + 4, GATE_STACK as u32);
        image.work32(tss + 8, sel::DATA.into());
        image.work32(tss + 0x20, eip as u32);
        image.work32(tss + 0x24, 2);
        for i in 0..8 {
            image.work32(tss + 0x28 + i * 4, 0x7500_0000 + i as u32);
        }
        image.work32(tss + 0x38, esp as u32);
        for i in 0..6 {
            image.work32(tss + 0x48 + i * 4, sel::DATA.into());
        }
        image.work32(tss + 0x4c, sel::CODE32.into());
        image.work32(tss + 0x64, 0x0068_0000);
    }
}

fn page_tables(image: &mut Image) {
    const SUPERVISOR: u64 = 0x63;
    const OPEN: u64 = 0x67;
    const LARGE: u64 = 0x80;
    image.work64(PML4, PDPT | OPEN);
    for (i, pd) in [PD_LOW, PD_WINDOW, PD_USER].into_iter().enumerate() {
        image.work64(PDPT + i as u64 * 8, pd | OPEN);
        image.work64(PDPT_PAE + i as u64 * 8, pd | 1);
    }
    for i in 0..8 {
        image.work64(PD_LOW + i * 8, i << 21 | SUPERVISOR | LARGE);
        image.work64(PD_USER + i * 8, i << 21 | OPEN | LARGE);
    }
    image.work64(PD_WINDOW, PT_WINDOW | OPEN);
    image.work64(PT_WINDOW, DATA | OPEN);
    for i in 0..4_u64 {
        image.work32(PD32 + i * 4, (i << 22 | SUPERVISOR | LARGE) as u32);
        image.work32(PD32 + 0x800 + i * 4, (i << 22 | OPEN | LARGE) as u32);
    }
    image.work32(PD32 + 0x400, (PT32 | OPEN) as u32);
    image.work32(PT32, (DATA | OPEN) as u32);
}
