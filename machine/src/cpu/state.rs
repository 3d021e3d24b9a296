//! The complete architectural state of one x86-64 processor, local APIC included.
//!
//! It is what moves a machine between backends and hosts, so nothing here is shaped by one engine.
//! Widths and bit layouts are those of the Intel SDM; attribute words of segments are in the layout of the
//! VMX "access rights" field (vol. 3, 25.4.1): bits 3..0 type, 4 S, 6..5 DPL, 7 P, 12 AVL, 13 L, 14 D/B,
//! 15 G, 16 unusable.

/// Number of general registers.
pub const GPR_COUNT: usize = 16;

/// Index of a general register in encoding order.
#[allow(missing_docs)]
pub mod gpr {
    pub const RAX: usize = 0;
    pub const RCX: usize = 1;
    pub const RDX: usize = 2;
    pub const RBX: usize = 3;
    pub const RSP: usize = 4;
    pub const RBP: usize = 5;
    pub const RSI: usize = 6;
    pub const RDI: usize = 7;
    pub const R8: usize = 8;
    pub const R9: usize = 9;
    pub const R10: usize = 10;
    pub const R11: usize = 11;
    pub const R12: usize = 12;
    pub const R13: usize = 13;
    pub const R14: usize = 14;
    pub const R15: usize = 15;
}

/// A segment register with its hidden part.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// Visible selector.
    pub selector: u16,
    /// Linear base.
    pub base: u64,
    /// Last valid offset, granularity already applied.
    pub limit: u32,
    /// Access rights, VMX layout (see the module's documentation).
    pub attributes: u32,
}

impl Segment {
    /// Present bit.
    pub const PRESENT: u32 = 1 << 7;
    /// Code or data, not system.
    pub const NON_SYSTEM: u32 = 1 << 4;
    /// 64-bit code.
    pub const LONG: u32 = 1 << 13;
    /// 32-bit default size, or big.
    pub const DEFAULT_BIG: u32 = 1 << 14;
    /// Limit was scaled by 4 KiB.
    pub const GRANULARITY: u32 = 1 << 15;
    /// Loaded with a null selector.
    pub const UNUSABLE: u32 = 1 << 16;

    /// A real-mode segment: base = selector * 16, 64 KiB, `attributes` 0x93 for data or 0x9b for code.
    pub const fn real_mode(selector: u16, attributes: u32) -> Self {
        Self { selector, base: (selector as u64) << 4, limit: 0xffff, attributes }
    }
    /// The 4-bit type field.
    pub const fn kind(&self) -> u32 {
        self.attributes & 0xf
    }
    /// Descriptor privilege level.
    pub const fn dpl(&self) -> u8 {
        (self.attributes >> 5 & 3) as u8
    }
    /// Whether a null selector was loaded.
    pub const fn unusable(&self) -> bool {
        self.attributes & Self::UNUSABLE != 0
    }
}

/// GDTR or IDTR.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DescriptorTable {
    /// Linear base.
    pub base: u64,
    /// Last valid byte.
    pub limit: u16,
}

/// The six segment registers in encoding order.
#[allow(missing_docs)]
pub mod seg {
    pub const ES: usize = 0;
    pub const CS: usize = 1;
    pub const SS: usize = 2;
    pub const DS: usize = 3;
    pub const FS: usize = 4;
    pub const GS: usize = 5;
}

/// Whether and why a processor does not fetch instructions.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Activity {
    /// Executing.
    #[default]
    Active,
    /// In HLT (or MWAIT), waiting for an interrupt.
    Halted,
    /// After a triple fault.
    Shutdown,
    /// After INIT, waiting for a start-up IPI.
    WaitForSipi,
}

/// An event that was accepted but whose delivery has not completed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PendingEvent {
    /// Interrupt vector.
    pub vector: u8,
    /// What kind of event.
    pub kind: EventKind,
    /// Error code, for exceptions that push one.
    pub error_code: Option<u32>,
}

/// Kind of a [`PendingEvent`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EventKind {
    /// Maskable external interrupt.
    ExternalInterrupt,
    /// Non-maskable interrupt.
    Nmi,
    /// Hardware exception.
    Exception,
    /// INT n, INT3, INTO.
    SoftwareInterrupt,
}

/// Local APIC: the register page in xAPIC layout plus what the page does not show.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LapicState {
    /// IA32_APIC_BASE, mode bits included.
    pub apic_base: u64,
    /// 4 KiB register page, one 32-bit register per 16 bytes as in xAPIC mode (Intel SDM vol. 3, table 11-1),
    /// first 1 KiB. In x2APIC mode ICR high holds bits 63..32 of the 64-bit ICR.
    pub registers: [u8; 1024],
    /// Guest time in ns (see [`crate::time::Clock`]) at which the running one-shot or periodic timer expires.
    pub timer_expires_at: Option<u64>,
    /// IA32_TSC_DEADLINE.
    pub tsc_deadline: u64,
}

impl Default for LapicState {
    fn default() -> Self {
        Self { apic_base: 0, registers: [0; 1024], timer_expires_at: None, tsc_deadline: 0 }
    }
}

/// Architectural state of one processor.
#[derive(Clone, Debug, PartialEq)]
pub struct CpuState {
    /// General registers in encoding order.
    pub gpr: [u64; GPR_COUNT],
    /// Instruction pointer.
    pub rip: u64,
    /// Flags.
    pub rflags: u64,
    /// ES, CS, SS, DS, FS, GS.
    pub segments: [Segment; 6],
    /// Local descriptor table register.
    pub ldtr: Segment,
    /// Task register.
    pub tr: Segment,
    /// Global descriptor table register.
    pub gdtr: DescriptorTable,
    /// Interrupt descriptor table register.
    pub idtr: DescriptorTable,
    /// Control registers.
    pub cr0: u64,
    /// Page-fault linear address.
    pub cr2: u64,
    /// Page-table base.
    pub cr3: u64,
    /// Control register 4.
    pub cr4: u64,
    /// Task priority (mirrors the local APIC's TPR bits 7..4).
    pub cr8: u64,
    /// DR0..DR3.
    pub dr: [u64; 4],
    /// Debug status.
    pub dr6: u64,
    /// Debug control.
    pub dr7: u64,
    /// IA32_EFER.
    pub efer: u64,
    /// XCR0.
    pub xcr0: u64,
    /// The XSAVE area in standard (non-compacted) format, as long as XCR0 needs.
    pub xsave: Vec<u8>,
    /// Every other model-specific register of the CPU model, sorted by index.
    pub msrs: Vec<(u32, u64)>,
    /// TSC as the guest reads it at the moment of the copy, TSC_ADJUST included.
    pub tsc: u64,
    /// Local APIC.
    pub lapic: LapicState,
    /// Activity.
    pub activity: Activity,
    /// STI or MOV SS blocks interrupts until after the next instruction.
    pub interrupt_shadow: bool,
    /// NMIs are blocked until IRET.
    pub nmi_blocked: bool,
    /// An NMI is latched.
    pub nmi_pending: bool,
    /// A start-up IPI is latched, with its vector.
    pub sipi_vector: Option<u8>,
    /// An event whose delivery was interrupted by the copy.
    pub pending_event: Option<PendingEvent>,
}

impl CpuState {
    /// The state after RESET (Intel SDM vol. 3, table 10-1): CS:IP at 0xffff_fff0, EDX = `signature` (CPUID 1
    /// EAX). The local APIC is enabled in xAPIC mode with id `apic_id`; the processor is the boot processor
    /// if `bsp`, and waits for SIPI otherwise. `msrs` is empty: they have the reset values of the CPU model.
    pub fn power_on(apic_id: u32, bsp: bool, signature: u32) -> Self {
        let data = Segment::real_mode(0, 0x93);
        let mut code = Segment::real_mode(0xf000, 0x9b);
        code.base = 0xffff_0000;
        let mut gpr = [0; GPR_COUNT];
        gpr[gpr::RDX] = u64::from(signature);
        let mut lapic = LapicState { apic_base: 0xfee0_0800 | u64::from(bsp) << 8, ..LapicState::default() };
        let mut register = |offset: usize, value: u32| {
            lapic.registers[offset..offset + 4].copy_from_slice(&value.to_le_bytes());
        };
        register(0x20, apic_id << 24);
        register(0x30, 0x0005_0014);
        register(0xe0, 0xffff_ffff);
        register(0xf0, 0xff);
        for lvt in [0x320, 0x330, 0x340, 0x350, 0x360, 0x370] {
            register(lvt, 0x1_0000);
        }
        // RESET, unlike FNINIT, leaves FCW 0x40 and all registers zero and not empty. XSTATE_BV says that the
        // x87 state is not the initial one of XRSTOR.
        let mut xsave = vec![0; 576];
        xsave[0..2].copy_from_slice(&0x40u16.to_le_bytes());
        xsave[4] = 0xff;
        xsave[24..28].copy_from_slice(&0x1f80u32.to_le_bytes());
        xsave[512] = 1;
        Self {
            gpr,
            rip: 0xfff0,
            rflags: 2,
            segments: [data, code, data, data, data, data],
            ldtr: Segment { selector: 0, base: 0, limit: 0xffff, attributes: 0x82 },
            tr: Segment { selector: 0, base: 0, limit: 0xffff, attributes: 0x8b },
            gdtr: DescriptorTable { base: 0, limit: 0xffff },
            idtr: DescriptorTable { base: 0, limit: 0xffff },
            cr0: 0x6000_0010,
            cr2: 0,
            cr3: 0,
            cr4: 0,
            cr8: 0,
            dr: [0; 4],
            dr6: 0xffff_0ff0,
            dr7: 0x400,
            efer: 0,
            xcr0: 1,
            xsave,
            msrs: Vec::new(),
            tsc: 0,
            lapic,
            activity: if bsp { Activity::Active } else { Activity::WaitForSipi },
            interrupt_shadow: false,
            nmi_blocked: false,
            nmi_pending: false,
            sipi_vector: None,
            pending_event: None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn power_on_state_is_that_of_the_manual() {
        let boot = CpuState::power_on(3, true, 0x806f8);
        assert_eq!(boot.segments[seg::CS].base + boot.rip, 0xffff_fff0);
        assert_eq!((boot.cr0, boot.rflags, boot.gpr[gpr::RDX]), (0x6000_0010, 2, 0x806f8));
        assert_eq!(boot.lapic.apic_base, 0xfee0_0900);
        assert_eq!(boot.lapic.registers[0x20..0x24], [0, 0, 0, 3], "id in bits 31..24");
        assert_eq!(boot.lapic.registers[0xf0], 0xff, "spurious vector, software-disabled");
        assert_eq!(boot.lapic.registers[0x350..0x353], [0, 0, 1], "LINT0 masked");
        assert_eq!(boot.activity, Activity::Active);
        let other = CpuState::power_on(1, false, 0);
        assert_eq!((other.lapic.apic_base, other.activity), (0xfee0_0800, Activity::WaitForSipi));
    }
}
