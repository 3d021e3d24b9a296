//! Where everything is in guest memory, and the selectors of the GDT.
//!
//! ```text
//! 0x000000  real mode's interrupt table      ┐ restored too, when the cases
//! 0x008000  the monitor's part in real mode   ┘ run in real mode
//! 0x010000  working area: restored from its pristine copy before every case
//! 0x100000  Multiboot header, monitor, exception stubs, variables, pristine copy
//! 0x200000  cases, 1 KiB each: entry code, and at +0x200 the inner code copied to INNER
//! ```
//!
//! With paging, linear 0.. is supervisor memory mapped to itself, [`WINDOW`] a page of which a case changes the
//! entry, and [`USER`] an alias of everything that user code may reach.

pub(crate) const WORK: u64 = 0x1_0000;
pub(crate) const WORK_LEN: u64 = 0x1_0000;
/// Stack of user code, of case code, and the one that gates switch to: all in the working area's first page.
pub(crate) const USER_STACK: u64 = 0x1_0400;
pub(crate) const CASE_STACK: u64 = 0x1_0800;
pub(crate) const GATE_STACK: u64 = 0x1_0f00;
pub(crate) const PML4: u64 = 0x1_1000;
pub(crate) const PDPT: u64 = 0x1_2000;
pub(crate) const PD_LOW: u64 = 0x1_3000;
pub(crate) const PD_WINDOW: u64 = 0x1_4000;
pub(crate) const PT_WINDOW: u64 = 0x1_5000;
pub(crate) const PD_USER: u64 = 0x1_6000;
pub(crate) const PD32: u64 = 0x1_7000;
pub(crate) const PT32: u64 = 0x1_8000;
pub(crate) const PDPT_PAE: u64 = 0x1_9000;
pub(crate) const GDT: u64 = 0x1_a000;
pub(crate) const GDT_LIMIT: u16 = 0x13f;
pub(crate) const IDT: u64 = 0x1_b000;
pub(crate) const LDT: u64 = 0x1_c000;
pub(crate) const TSS: u64 = 0x1_d000;
pub(crate) const TSS2: u64 = 0x1_d400;
pub(crate) const TSS_DF: u64 = 0x1_d600;
pub(crate) const DATA: u64 = 0x1_e000;
/// The inner code of a case.
pub(crate) const INNER: u64 = 0x1_f000;
pub(crate) const INNER_LEN: u64 = 0x200;

/// The page whose entry a case changes: 1 GiB; its frame is [`DATA`].
pub(crate) const WINDOW: u64 = 0x4000_0000;
/// The alias for user code.
pub(crate) const USER: u64 = 0x8000_0000;

pub(crate) const IMAGE: u64 = 0x10_0000;
pub(crate) const ENTRY: u64 = 0x10_0040;
pub(crate) const NEXT: u64 = 0x10_0200;
pub(crate) const COMMON: u64 = 0x10_0600;
pub(crate) const PRINT: u64 = 0x10_0c00;
pub(crate) const DOUBLE_FAULT: u64 = 0x10_0e00;
pub(crate) const STUBS: u64 = 0x10_1000;
/// The end of a case, common to protected and real mode; the way from real mode to it.
pub(crate) const FINISH: u64 = 0x10_1600;
pub(crate) const FROM_REAL: u64 = 0x10_1f00;
/// Vectors with a stub; one more ends a kernel in a triple fault.
pub(crate) const VECTORS: u64 = 0x50;
pub(crate) const GDTR: u64 = 0x10_2000;
pub(crate) const IDTR: u64 = 0x10_2010;
pub(crate) const INDEX: u64 = 0x10_2020;
pub(crate) const TARGET: u64 = 0x10_2028;
pub(crate) const RECORD: u64 = 0x10_2100;
/// What a record usually holds: only other numbers are written.
pub(crate) const USUAL: u64 = 0x10_2500;
/// The model-specific registers that are recorded and then set back: number, value.
pub(crate) const MSRS: u64 = 0x10_2900;
/// Top of the monitor's stack, and of the one that 64-bit gates use.
pub(crate) const MONITOR_STACK: u64 = 0x10_4000;
pub(crate) const IST_STACK: u64 = 0x10_6000;
pub(crate) const PRISTINE: u64 = 0x11_0000;
/// Copies of the real-mode interrupt table and of the monitor's part in real mode.
pub(crate) const PRISTINE_VECTORS: u64 = 0x12_0000;
pub(crate) const PRISTINE_REAL: u64 = 0x12_0400;
pub(crate) const CASES: u64 = 0x20_0000;
pub(crate) const CASE_LEN: u64 = 0x400;

/// The interrupt that ends a case without an exception; gates of 0x40..=0x4f are open to user code.
pub(crate) const DONE: u8 = 0x41;

/// The monitor's part in real mode, and how much of it there is.
pub(crate) const REAL: u64 = 0x8000;
pub(crate) const REAL_LEN: u64 = 0xe00;

pub(crate) mod sel {
    pub(crate) const CODE32: u16 = 0x08;
    pub(crate) const DATA: u16 = 0x10;
    pub(crate) const USER_CODE32: u16 = 0x1b;
    pub(crate) const USER_DATA: u16 = 0x23;
    pub(crate) const CODE16: u16 = 0x28;
    pub(crate) const DATA16: u16 = 0x30;
    pub(crate) const USER_CODE16: u16 = 0x3b;
    pub(crate) const USER_DATA16: u16 = 0x43;
    pub(crate) const TSS: u16 = 0x48;
    pub(crate) const LDT: u16 = 0x58;
    pub(crate) const TSS2: u16 = 0x68;
    pub(crate) const TSS_DF: u16 = 0x70;
    pub(crate) const CODE64: u16 = 0x78;
    pub(crate) const USER_CODE64: u16 = 0x83;
    pub(crate) const CONFORMING: u16 = 0x88;
    pub(crate) const EXPAND_DOWN: u16 = 0x90;
    pub(crate) const READ_ONLY: u16 = 0x98;
    pub(crate) const EXECUTE_ONLY: u16 = 0xa0;
    pub(crate) const ABSENT_DATA: u16 = 0xa8;
    pub(crate) const GATE: u16 = 0xb0;
    pub(crate) const TASK_GATE: u16 = 0xc0;
    pub(crate) const BUSY_TSS: u16 = 0xc8;
    pub(crate) const ABSENT_CODE: u16 = 0xd0;
    pub(crate) const ABSENT_TSS: u16 = 0xd8;
    pub(crate) const GATE16: u16 = 0xe0;
    pub(crate) const TSS16: u16 = 0xe8;
    pub(crate) const GATE_INWARD: u16 = 0xf0;
    /// From here on free for seeded descriptors.
    pub(crate) const FREE: u16 = 0x100;
    /// Segments of real mode's shape, in kernels whose cases run in real mode.
    pub(crate) const REAL_CODE: u16 = 0x130;
    pub(crate) const REAL_DATA: u16 = 0x138;
    /// One past the GDT's end.
    pub(crate) const BEYOND: u16 = 0x140;
}
