//! Named parts of the XSAVE-format area that holds a vCPU's vector and x87 state.
//!
//! The area is architectural at all times, in 64-bit FXSAVE format. The header's XSTATE_BV is not kept up to
//! date: which components are in use is computed from their contents when it matters ([`XsaveArea::in_use`]),
//! so no instruction has to track it. In a fresh or imported area the header counts; see
//! [`XsaveArea::import`] and [`XsaveArea::export`].

use crate::cpu::XsaveArea;

/// XCR0 and XSTATE_BV bits.
#[allow(missing_docs)]
pub mod component {
    pub const X87: u64 = 1 << 0;
    pub const SSE: u64 = 1 << 1;
    pub const AVX: u64 = 1 << 2;
    /// All that this engine implements.
    pub const ALL: u64 = X87 | SSE | AVX;
}

/// Writable bits of MXCSR, and what FXSAVE stores as MXCSR_MASK.
pub const MXCSR_MASK: u32 = 0xffff;
/// MXCSR after reset and in the init configuration.
pub const MXCSR_INIT: u32 = 0x1f80;
/// x87 control word in the init configuration.
pub const FCW_INIT: u16 = 0x037f;

/// x87 status word bits.
#[allow(missing_docs)]
pub mod status {
    pub const EXCEPTIONS: u16 = 0x3f;
    pub const PRECISION: u16 = 1 << 5;
    pub const SUMMARY: u16 = 1 << 7;
    pub const BUSY: u16 = 1 << 15;
    pub const TOP_SHIFT: u16 = 11;
    pub const TOP: u16 = 7 << TOP_SHIFT;
}

/// Where the parts of the area lie.
#[allow(missing_docs)]
pub mod offset {
    pub const FCW: usize = 0;
    pub const FSW: usize = 2;
    pub const FTW: usize = 4;
    pub const FOP: usize = 6;
    pub const FIP: usize = 8;
    pub const FDP: usize = 16;
    pub const MXCSR: usize = 24;
    pub const MXCSR_MASK: usize = 28;
    pub const ST: usize = 32;
    pub const XMM: usize = 160;
    pub const LEGACY_END: usize = 416;
    pub const HEADER: usize = 512;
    pub const YMM_HIGH: usize = 576;
    pub const END: usize = 832;
}

macro_rules! field {
    ($get:ident, $set:ident, $type:ty, $offset:expr, $what:literal) => {
        #[doc = $what]
        #[inline]
        pub fn $get(&self) -> $type {
            <$type>::from_le_bytes(self.bytes($offset))
        }
        #[doc = concat!("Sets: ", $what)]
        #[inline]
        pub fn $set(&mut self, value: $type) {
            self.set_bytes($offset, value.to_le_bytes());
        }
    };
}

impl XsaveArea {
    /// All components in their init configuration.
    pub fn init() -> Self {
        let mut area = Self([0; Self::SIZE]);
        area.set_fcw(FCW_INIT);
        area.set_mxcsr(MXCSR_INIT);
        area
    }

    #[inline]
    fn bytes<const N: usize>(&self, offset: usize) -> [u8; N] {
        let mut out = [0; N];
        out.copy_from_slice(&self.0[offset..offset + N]);
        out
    }
    #[inline]
    fn set_bytes<const N: usize>(&mut self, offset: usize, value: [u8; N]) {
        self.0[offset..offset + N].copy_from_slice(&value);
    }

    field!(fcw, set_fcw, u16, offset::FCW, "x87 control word.");
    field!(fsw, set_fsw, u16, offset::FSW, "x87 status word.");
    field!(ftw, set_ftw, u8, offset::FTW, "Abridged tag word: bit per physical register, 1 is in use.");
    field!(fop, set_fop, u16, offset::FOP, "Last x87 opcode, 11 bits.");
    field!(fip, set_fip, u64, offset::FIP, "Last x87 instruction pointer.");
    field!(fdp, set_fdp, u64, offset::FDP, "Last x87 data pointer.");
    field!(mxcsr, set_mxcsr, u32, offset::MXCSR, "MXCSR.");

    /// Low 128 bits of vector register `index` (0 to 15).
    #[inline]
    pub fn xmm(&self, index: usize) -> u128 {
        u128::from_le_bytes(self.bytes(offset::XMM + 16 * (index & 15)))
    }
    /// Sets the low 128 bits; the upper half stays (legacy encoding).
    #[inline]
    pub fn set_xmm(&mut self, index: usize, value: u128) {
        self.set_bytes(offset::XMM + 16 * (index & 15), value.to_le_bytes());
    }
    /// Bits 255..128 of vector register `index`.
    #[inline]
    pub fn ymm_high(&self, index: usize) -> u128 {
        u128::from_le_bytes(self.bytes(offset::YMM_HIGH + 16 * (index & 15)))
    }
    /// Sets bits 255..128.
    #[inline]
    pub fn set_ymm_high(&mut self, index: usize, value: u128) {
        self.set_bytes(offset::YMM_HIGH + 16 * (index & 15), value.to_le_bytes());
    }
    /// Both halves of a vector register.
    pub fn ymm(&self, index: usize) -> [u8; 32] {
        let mut out = [0; 32];
        out[..16].copy_from_slice(&self.xmm(index).to_le_bytes());
        out[16..].copy_from_slice(&self.ymm_high(index).to_le_bytes());
        out
    }
    /// Sets both halves of a vector register.
    pub fn set_ymm(&mut self, index: usize, value: &[u8; 32]) {
        let index = index & 15;
        self.0[offset::XMM + 16 * index..][..16].copy_from_slice(&value[..16]);
        self.0[offset::YMM_HIGH + 16 * index..][..16].copy_from_slice(&value[16..]);
    }
    /// MMX register `index`, valid while TOP is 0.
    pub fn mm(&self, index: usize) -> u64 {
        u64::from_le_bytes(self.bytes(offset::ST + 16 * (index & 7)))
    }
    /// ST(`index`): 80 bits.
    pub fn st(&self, index: usize) -> [u8; 10] {
        self.bytes(offset::ST + 16 * (index & 7))
    }
    /// Sets ST(`index`).
    pub fn set_st(&mut self, index: usize, value: [u8; 10]) {
        self.set_bytes(offset::ST + 16 * (index & 7), value);
        self.set_bytes(offset::ST + 16 * (index & 7) + 10, [0; 6]);
    }
    /// Top of the register stack.
    pub fn top(&self) -> usize {
        usize::from((self.fsw() & status::TOP) >> status::TOP_SHIFT)
    }

    /// An unmasked x87 exception is pending.
    #[inline]
    pub fn x87_pending(&self) -> bool {
        self.fsw() & status::SUMMARY != 0
    }
    /// Makes the summary bits of the status word agree with flags and masks, as every load of either does.
    pub fn update_summary(&mut self) {
        let pending = self.fsw() & !self.fcw() & status::EXCEPTIONS != 0;
        let summary = if pending { status::SUMMARY | status::BUSY } else { 0 };
        self.set_fsw(self.fsw() & !(status::SUMMARY | status::BUSY) | summary);
    }
    /// Renumbers the stack for another TOP: the physical registers keep their contents.
    pub fn set_top(&mut self, top: usize) {
        let turn = (top + 8 - self.top()) & 7;
        if turn != 0 {
            let old: [[u8; 16]; 8] = std::array::from_fn(|i| self.bytes(offset::ST + 16 * i));
            for slot in 0..8 {
                self.set_bytes(offset::ST + 16 * slot, old[(slot + turn) & 7]);
            }
        }
        self.set_fsw(self.fsw() & !status::TOP | (top as u16 & 7) << status::TOP_SHIFT);
    }
    /// FNINIT: control, status, tags and pointers; the physical registers keep their contents.
    pub fn x87_init(&mut self) {
        self.set_top(0);
        self.0[..24].fill(0);
        self.set_fcw(FCW_INIT);
    }
    /// Entry into MMX mode: TOP becomes 0, so that MMn is the physical register n, and all are valid.
    pub fn enter_mmx(&mut self) {
        if self.top() != 0 {
            self.set_top(0);
        }
        self.set_ftw(0xff);
    }

    /// Components that differ from their init configuration: what XGETBV(1) reports within XCR0 and what
    /// XSAVEOPT and XSAVEC write. MXCSR does not count for SSE (Intel SDM vol. 1, 13.6).
    pub fn in_use(&self) -> u64 {
        let clear = |range: std::ops::Range<usize>| self.0[range].iter().fold(0, |all, b| all | b) == 0;
        let x87_init = self.fcw() == FCW_INIT && clear(2..24) && clear(offset::ST..offset::XMM);
        let sse_init = clear(offset::XMM..offset::LEGACY_END);
        let avx_init = clear(offset::YMM_HIGH..offset::END);
        u64::from(!x87_init) | u64::from(!sse_init) << 1 | u64::from(!avx_init) << 2
    }
    /// Puts components into their init configuration. MXCSR is not touched.
    pub fn initialize(&mut self, components: u64) {
        if components & component::X87 != 0 {
            self.x87_init();
            self.0[offset::ST..offset::XMM].fill(0);
        }
        if components & component::SSE != 0 {
            self.0[offset::XMM..offset::LEGACY_END].fill(0);
        }
        if components & component::AVX != 0 {
            self.0[offset::YMM_HIGH..offset::END].fill(0);
        }
    }
    /// Loads a standard-format XSAVE image (shorter ones have no AVX state): components whose XSTATE_BV bit is
    /// clear are in their init configuration. Reserved MXCSR bits are dropped.
    pub fn import(image: &[u8]) -> Self {
        let mut area = Self::init();
        let length = image.len().min(Self::SIZE);
        area.0[..length].copy_from_slice(&image[..length]);
        let header = u64::from_le_bytes(area.bytes(offset::HEADER));
        let mxcsr = area.mxcsr();
        area.initialize(component::ALL & !header);
        area.0[offset::LEGACY_END..offset::YMM_HIGH].fill(0);
        area.set_mxcsr(if header & (component::SSE | component::AVX) == 0 && mxcsr == 0 {
            MXCSR_INIT
        } else {
            mxcsr & MXCSR_MASK
        });
        area.update_summary();
        area
    }
    /// A standard-format XSAVE image with a truthful XSTATE_BV: what a host's XRSTOR would take.
    pub fn export(&self) -> Vec<u8> {
        let mut image = self.clone();
        image.set_bytes(offset::MXCSR_MASK, MXCSR_MASK.to_le_bytes());
        image.0[offset::LEGACY_END..offset::YMM_HIGH].fill(0);
        image.set_bytes(offset::HEADER, (self.in_use() | component::SSE).to_le_bytes());
        image.0.to_vec()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn components_in_use_follow_the_contents() {
        let mut area = XsaveArea::init();
        assert_eq!(area.in_use(), 0);
        area.set_ymm_high(15, 1);
        assert_eq!(area.in_use(), component::AVX);
        area.set_xmm(0, 1);
        area.set_fsw(1);
        assert_eq!(area.in_use(), component::ALL);
        area.initialize(component::X87 | component::AVX);
        assert_eq!(area.in_use(), component::SSE);
    }

    #[test]
    fn import_honours_the_header_and_export_is_its_inverse() {
        let mut area = XsaveArea::init();
        area.set_xmm(3, 77);
        area.set_ymm_high(3, 88);
        area.set_fcw(0x27f);
        let mut image = area.export();
        assert!(XsaveArea::import(&image).0[..512] == area.export()[..512]);
        assert_eq!(XsaveArea::import(&image).ymm_high(3), 88);
        image[offset::HEADER] = component::X87 as u8;
        let part = XsaveArea::import(&image);
        assert_eq!((part.xmm(3), part.ymm_high(3), part.fcw()), (0, 0, 0x27f));
    }

    #[test]
    fn entering_mmx_mode_renumbers_the_stack() {
        let mut area = XsaveArea::init();
        area.set_fsw(6 << status::TOP_SHIFT);
        area.set_st(0, [1; 10]);
        area.set_st(7, [2; 10]);
        area.enter_mmx();
        assert_eq!((area.st(6), area.st(5)), ([1; 10], [2; 10]));
        assert_eq!((area.top(), area.ftw()), (0, 0xff));
    }
}
