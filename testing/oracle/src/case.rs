//! A case: code, registers and memory before, and what is observed after.

use crate::layout::{self, PAGE};
use crate::rng::Rng;

/// What kind of code a case is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// 64-bit.
    Long,
    /// 32-bit protected.
    Protected32,
    /// 16-bit protected.
    Protected16,
}

impl Mode {
    /// 64, 32 or 16.
    pub fn bits(self) -> u32 {
        match self {
            Self::Long => 64,
            Self::Protected32 => 32,
            Self::Protected16 => 16,
        }
    }
    /// Number of general registers.
    pub fn registers(self) -> usize {
        if self == Self::Long { 16 } else { 8 }
    }
    /// Bits of a general register that are architectural.
    pub fn register_mask(self) -> u64 {
        if self == Self::Long { u64::MAX } else { 0xffff_ffff }
    }
}

/// Bytes of vector and x87 state: XSAVE standard layout up to the upper halves of YMM15.
pub const XSAVE: usize = 832;
/// Where the upper halves of the YMM registers start.
pub const YMM_HIGH: usize = 576;

/// Vector and x87 state.
#[derive(Clone)]
#[repr(C, align(64))]
pub struct Vectors(pub [u8; XSAVE]);

/// The state before.
#[derive(Clone)]
pub struct Case {
    /// Kind of code.
    pub mode: Mode,
    /// The instructions; INT3 follows them.
    pub code: Vec<u8>,
    /// Offset in the window of the first instruction.
    pub at: usize,
    /// RAX, RCX, RDX, RBX, RSP, RBP, RSI, RDI, R8 to R15.
    pub gpr: [u64; 16],
    /// Flags.
    pub rflags: u64,
    /// ES, CS, SS, DS, FS, GS.
    pub selectors: [u16; 6],
    /// FS base in 64-bit mode.
    pub fs_base: u64,
    /// GS base in 64-bit mode.
    pub gs_base: u64,
    /// Vector and x87 state.
    pub vectors: Box<Vectors>,
    /// Which pattern each page of [`layout::WRITABLE`] starts with.
    pub patterns: [u8; 4],
    /// Bytes planted on top of the patterns: offset in the window and contents.
    pub planted: Vec<(usize, Vec<u8>)>,
}

impl Case {
    /// RIP of the first instruction.
    pub fn start(&self) -> u64 {
        let linear = layout::BASE + self.at as u64;
        if self.mode == Mode::Long {
            linear
        } else {
            linear.wrapping_sub(layout::loaded(self.selectors[1]).base) & 0xffff_ffff
        }
    }
}

/// The exception that ended a case.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Trap {
    /// Vector.
    pub vector: u64,
    /// Error code, 0 where there is none.
    pub error_code: u64,
    /// Page-fault address, 0 for other vectors.
    pub address: u64,
}

/// Registers after.
#[derive(Clone)]
pub struct After {
    /// The exception that ended it.
    pub trap: Trap,
    /// Where it did.
    pub rip: u64,
    /// General registers.
    pub gpr: [u64; 16],
    /// Flags.
    pub rflags: u64,
    /// ES, CS, SS, DS, FS, GS.
    pub selectors: [u16; 6],
    /// FS base.
    pub fs_base: u64,
    /// GS base.
    pub gs_base: u64,
    /// Vector and x87 state.
    pub vectors: Box<Vectors>,
}

impl Default for After {
    fn default() -> Self {
        Self {
            trap: Trap::default(),
            rip: 0,
            gpr: [0; 16],
            rflags: 0,
            selectors: [0; 6],
            fs_base: 0,
            gs_base: 0,
            vectors: Box::new(Vectors([0; XSAVE])),
        }
    }
}

/// Number of page patterns.
pub const PATTERNS: usize = 64;

/// The page contents that cases start from; the same for every seed.
pub struct Patterns(Vec<[u8; PAGE]>);

impl Default for Patterns {
    fn default() -> Self {
        let mut rng = Rng::for_case(0x6f72_6163_6c65, 0);
        let page = |_| {
            let mut page = [0; PAGE];
            for word in page.chunks_exact_mut(8) {
                word.copy_from_slice(&crate::values::memory_word(&mut rng).to_le_bytes());
            }
            page
        };
        Self((0..PATTERNS).map(page).collect())
    }
}

impl Patterns {
    /// Pattern `index`.
    pub fn page(&self, index: u8) -> &[u8; PAGE] {
        &self.0[usize::from(index) % PATTERNS]
    }
    /// What the read-only page holds.
    pub fn read_only(&self) -> &[u8; PAGE] {
        &self.0[0]
    }
}
