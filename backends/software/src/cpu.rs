//! The runtime state of one vCPU of the software CPU, shared by the interpreter's instruction handlers, the
//! MMU, exception delivery and, later, the translator.
//!
//! Conventions for instruction handlers:
//! * [`Cpu::rip`] is the address of the instruction that executes, [`Cpu::next_rip`] that of the next one; a
//!   branch changes `next_rip`. The run loop commits `rip = next_rip` when the handler succeeds.
//! * A handler that returns an [`Exception`](crate::exception::Exception) fault has changed no architectural
//!   state (partially executed string instructions excepted: they keep their counters exact).
//! * `rflags` always holds all flags, materialised.

use std::sync::Arc;
use std::sync::atomic::AtomicU32;

use atoll_machine::cpu::state::{Activity, DescriptorTable, Segment};

/// EFLAGS bits.
#[allow(missing_docs)]
pub mod flag {
    pub const CF: u64 = 1 << 0;
    pub const PF: u64 = 1 << 2;
    pub const AF: u64 = 1 << 4;
    pub const ZF: u64 = 1 << 6;
    pub const SF: u64 = 1 << 7;
    pub const TF: u64 = 1 << 8;
    pub const IF: u64 = 1 << 9;
    pub const DF: u64 = 1 << 10;
    pub const OF: u64 = 1 << 11;
    pub const IOPL: u64 = 3 << 12;
    pub const NT: u64 = 1 << 14;
    pub const RF: u64 = 1 << 16;
    pub const VM: u64 = 1 << 17;
    pub const AC: u64 = 1 << 18;
    pub const VIF: u64 = 1 << 19;
    pub const VIP: u64 = 1 << 20;
    pub const ID: u64 = 1 << 21;
    /// The six arithmetic flags.
    pub const ARITHMETIC: u64 = CF | PF | AF | ZF | SF | OF;
}

/// CR0, CR4 and EFER bits.
#[allow(missing_docs)]
pub mod control {
    pub const CR0_PE: u64 = 1 << 0;
    pub const CR0_MP: u64 = 1 << 1;
    pub const CR0_EM: u64 = 1 << 2;
    pub const CR0_TS: u64 = 1 << 3;
    pub const CR0_ET: u64 = 1 << 4;
    pub const CR0_NE: u64 = 1 << 5;
    pub const CR0_WP: u64 = 1 << 16;
    pub const CR0_AM: u64 = 1 << 18;
    pub const CR0_NW: u64 = 1 << 29;
    pub const CR0_CD: u64 = 1 << 30;
    pub const CR0_PG: u64 = 1 << 31;
    pub const CR4_VME: u64 = 1 << 0;
    pub const CR4_PVI: u64 = 1 << 1;
    pub const CR4_TSD: u64 = 1 << 2;
    pub const CR4_DE: u64 = 1 << 3;
    pub const CR4_PSE: u64 = 1 << 4;
    pub const CR4_PAE: u64 = 1 << 5;
    pub const CR4_MCE: u64 = 1 << 6;
    pub const CR4_PGE: u64 = 1 << 7;
    pub const CR4_PCE: u64 = 1 << 8;
    pub const CR4_OSFXSR: u64 = 1 << 9;
    pub const CR4_OSXMMEXCPT: u64 = 1 << 10;
    pub const CR4_UMIP: u64 = 1 << 11;
    pub const CR4_FSGSBASE: u64 = 1 << 16;
    pub const CR4_PCIDE: u64 = 1 << 17;
    pub const CR4_OSXSAVE: u64 = 1 << 18;
    pub const CR4_SMEP: u64 = 1 << 20;
    pub const CR4_SMAP: u64 = 1 << 21;
    pub const EFER_SCE: u64 = 1 << 0;
    pub const EFER_LME: u64 = 1 << 8;
    pub const EFER_LMA: u64 = 1 << 10;
    pub const EFER_NXE: u64 = 1 << 11;
}

/// How the current mode executes, derived from CR0, EFER, RFLAGS.VM, CS: kept up to date by
/// `Cpu::refresh_mode` whenever one of its sources changes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mode {
    /// Current privilege level (3 in virtual-8086 mode, 0 in real mode).
    pub cpl: u8,
    /// Code size: 16, 32 or 64.
    pub bits: u32,
    /// CR0.PE and not virtual-8086.
    pub protected: bool,
    /// EFLAGS.VM.
    pub v8086: bool,
    /// EFER.LMA: long mode, compatibility mode included.
    pub long: bool,
    /// CR0.PG.
    pub paging: bool,
    /// The stack pointer's width: 16, 32 or 64.
    pub stack_bits: u32,
}

/// The vector and x87 state in XSAVE standard layout (Intel SDM vol. 1, 13.4): 512 bytes legacy area, 64 bytes
/// header, then the upper halves of YMM0..15 at offset 576. Bytes are architectural at all times.
#[repr(C, align(64))]
#[derive(Clone)]
pub struct XsaveArea(pub [u8; XsaveArea::SIZE]);

impl XsaveArea {
    /// Legacy area, header and AVX state; more follows when a model exposes AVX-512.
    pub const SIZE: usize = 832;
}

/// One vCPU's runtime state. Fields are plain: the handlers of this crate are its only users.
pub struct Cpu {
    /// General registers in encoding order (RAX, RCX, RDX, RBX, RSP, RBP, RSI, RDI, R8…R15).
    pub gpr: [u64; 16],
    /// Address of the current instruction.
    pub rip: u64,
    /// Address of the next instruction.
    pub next_rip: u64,
    /// All flags.
    pub rflags: u64,
    /// ES, CS, SS, DS, FS, GS.
    pub segments: [Segment; 6],
    /// Cached mode.
    pub mode: Mode,
    /// Control registers.
    pub cr0: u64,
    /// Page-fault address.
    pub cr2: u64,
    /// Page-table base and PCID.
    pub cr3: u64,
    /// Control register 4.
    pub cr4: u64,
    /// IA32_EFER.
    pub efer: u64,
    /// XCR0.
    pub xcr0: u64,
    /// Local descriptor table.
    pub ldtr: Segment,
    /// Task register.
    pub tr: Segment,
    /// GDTR.
    pub gdtr: DescriptorTable,
    /// IDTR.
    pub idtr: DescriptorTable,
    /// DR0..DR3.
    pub dr: [u64; 4],
    /// DR6.
    pub dr6: u64,
    /// DR7.
    pub dr7: u64,
    /// PDPTE registers of PAE paging, loaded with CR3.
    pub pdpte: [u64; 4],
    /// Vector and x87 state.
    pub xsave: Box<XsaveArea>,
    /// Executing, halted, shut down or waiting.
    pub activity: Activity,
    /// Interrupts are blocked until after the next instruction (STI, MOV SS, POP SS).
    pub interrupt_shadow: bool,
    /// NMIs are blocked until IRET.
    pub nmi_blocked: bool,
    /// Instructions retired since creation.
    pub retired: u64,
    /// `retired` value at which `execute::run` returns `Leave::Budget` (`u64::MAX`: none). Exact.
    pub budget_end: u64,
    /// Set by handlers after which pending events must be looked at before the next instruction (STI, POPF,
    /// IRET, MOV CR8, a TLB-changing write …): `execute::run` returns `Leave::Events` after the instruction.
    pub recheck: bool,
    /// Non-zero when another thread wants this vCPU's attention (interrupt, kick): polled at block boundaries.
    pub requests: Arc<AtomicU32>,
    /// System-wide registers that only `system/` touches: MSRs, local APIC, paravirtual clocks.
    pub system: Box<crate::system::SystemState>,
    /// Linear-address translation: TLB and paging-structure walks.
    pub mmu: Box<crate::mmu::Mmu>,
    /// The interpreter's own state; nothing architectural.
    pub exec: crate::execute::ExecState,
    /// Decoded code by physical page.
    pub code: Box<crate::decode::CodeCache>,
    /// Scratch of the vector and x87 engine.
    pub fpu: Box<crate::fpu::Fpu>,
    /// What this vCPU shares with its machine.
    pub shared: Arc<crate::partition::Shared>,
}
