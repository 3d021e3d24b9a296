//! The linear addresses and segments that a case sees, the same on the host and in the guest.
//!
//! Everything lies in one 64 KiB window below 2 GiB, so that it can be reached from 16-bit, 32-bit and 64-bit
//! code:
//!
//! | offset | pages | |
//! |---|---|---|
//! | 0x1000 | 2 | code, read and execute |
//! | 0x4000 | 2 | data, read and write, not executable |
//! | 0x7000 | 1 | read-only data |
//! | 0x9000 | 1 | stack, read and write |
//! | 0xf000 | 1 | read and write: the end of 16-bit segments |
//!
//! Nothing else in the lower 4 GiB is mapped.

use atoll_machine::cpu::state::Segment;

/// Bytes per page.
pub const PAGE: usize = 4096;
/// First address of the window.
pub const BASE: u64 = 0x1000_0000;
/// Bytes of the window.
pub const WINDOW: usize = 0x1_0000;
/// Offset of the code pages.
pub const CODE: usize = 0x1000;
/// Bytes of code pages.
pub const CODE_LEN: usize = 2 * PAGE;
/// Offset of the data pages.
pub const DATA: usize = 0x4000;
/// Bytes of data pages.
pub const DATA_LEN: usize = 2 * PAGE;
/// Offset of the read-only page.
pub const READ_ONLY: usize = 0x7000;
/// Offset of the stack page.
pub const STACK: usize = 0x9000;
/// Offset of the window's last page.
pub const TOP: usize = 0xf000;
/// Offsets of the pages that cases may write.
pub const WRITABLE: [usize; 4] = [DATA, DATA + PAGE, STACK, TOP];

/// 32-bit user code of the host's global descriptor table.
pub const USER_CODE32: u16 = 0x23;
/// User data of the host's global descriptor table.
pub const USER_DATA: u16 = 0x2b;
/// 64-bit user code of the host's global descriptor table.
pub const USER_CODE64: u16 = 0x33;

/// A segment of the local descriptor table.
#[derive(Clone, Copy, Debug)]
pub struct LocalSegment {
    /// Linear base.
    pub base: u32,
    /// Raw limit, in bytes or pages.
    pub limit: u32,
    /// 32-bit or big.
    pub big: bool,
    /// Kind: 0 data, 1 expand-down data, 2 code.
    pub contents: u8,
    /// Not writable (data) or not readable (code).
    pub restricted: bool,
    /// The limit counts pages.
    pub pages: bool,
    /// Present.
    pub present: bool,
}

const fn local(limit: u32, big: bool, contents: u8, restricted: bool) -> LocalSegment {
    LocalSegment { base: BASE as u32, limit, big, contents, restricted, pages: false, present: true }
}

/// The local descriptor table, from index 0.
pub const LOCAL: [LocalSegment; 9] = [
    local(0xffff, false, 2, false),
    local(0xffff, false, 0, false),
    local(0x8fff, true, 0, false),
    local(0x4fff, true, 1, false),
    local(0xffff, false, 0, true),
    LocalSegment { present: false, ..local(0xffff, true, 0, false) },
    local(0xffff, true, 2, true),
    LocalSegment { pages: true, ..local(0xfffff, true, 2, false) },
    local(0x3fff, false, 1, false),
];

/// Selector of [`LOCAL`]'s entry `index`.
pub const fn selector(index: u16) -> u16 {
    index << 3 | 7
}

/// 16-bit code.
pub const CODE16: u16 = selector(0);
/// 16-bit data and stack.
pub const DATA16: u16 = selector(1);
/// 32-bit code with a base.
pub const CODE32_BASED: u16 = selector(7);
/// Selectors that DS, ES, FS and GS may hold at the start of a case.
pub const DATA_SELECTORS: [u16; 8] =
    [0, USER_DATA, selector(1), selector(2), selector(3), selector(4), selector(7), selector(8)];
/// Selectors that SS may hold at the start of a case.
pub const STACK_SELECTORS: [u16; 5] = [USER_DATA, selector(1), selector(2), selector(3), selector(8)];

/// Bytes of the global descriptor table that matter to user code; its other entries have DPL 0 or are empty.
pub const GLOBAL: [(u16, u64); 7] = [
    (1, 0x00cf_9b00_0000_ffff),
    (2, 0x00af_9b00_0000_ffff),
    (3, 0x00cf_9300_0000_ffff),
    (4, 0x00cf_fb00_0000_ffff),
    (5, 0x00cf_f300_0000_ffff),
    (6, 0x00af_fb00_0000_ffff),
    (15, 0x0040_f500_0000_0000),
];

impl LocalSegment {
    fn access(&self) -> u32 {
        let kind = 1 | u32::from(!self.restricted) << 1 | u32::from(self.contents) << 2;
        // S, DPL 3; AVL is set.
        kind | 0x70
            | u32::from(self.present) << 7
            | 1 << 12
            | u32::from(self.big) << 14
            | u32::from(self.pages) << 15
    }

    /// Its descriptor.
    pub fn descriptor(&self) -> u64 {
        let (base, limit, access) = (u64::from(self.base), u64::from(self.limit), u64::from(self.access()));
        limit & 0xffff
            | (base & 0xff_ffff) << 16
            | (access & 0xf0ff) << 40
            | (limit >> 16 & 0xf) << 48
            | (base >> 24) << 56
    }

    /// What a segment register holds after loading `selector`.
    pub fn segment(&self, selector: u16) -> Segment {
        let limit = if self.pages { self.limit << 12 | 0xfff } else { self.limit };
        Segment { selector, base: self.base.into(), limit, attributes: self.access() }
    }
}

/// What a segment register holds after loading `selector`, one of those that cases start with.
pub fn loaded(selector: u16) -> Segment {
    let flat = |attributes| Segment { selector, base: 0, limit: u32::MAX, attributes };
    match selector {
        USER_CODE32 => flat(0xc0fb),
        USER_DATA => flat(0xc0f3),
        USER_CODE64 => flat(0xa0fb),
        _ if selector & 4 != 0 => match LOCAL.get(usize::from(selector >> 3)) {
            Some(local) => local.segment(selector),
            None => null(selector),
        },
        _ => null(selector),
    }
}

fn null(selector: u16) -> Segment {
    Segment { selector, base: 0, limit: 0, attributes: Segment::UNUSABLE }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn descriptors_have_their_fields_where_the_processor_looks() {
        let d = LOCAL[7].descriptor();
        assert_eq!(d & 0xffff, 0xffff);
        assert_eq!(d >> 16 & 0xff_ffff | (d >> 56) << 24, BASE);
        assert_eq!(d >> 40 & 0xff, 0xfb);
        assert_eq!(d >> 52 & 0xf, 0b1101);
        assert_eq!(loaded(selector(7)).limit, u32::MAX);
        assert_eq!(loaded(0).attributes, Segment::UNUSABLE);
    }
}
