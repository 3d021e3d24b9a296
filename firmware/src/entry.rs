//! The processor state at a kernel's first instruction, and the state that firmware leaves beside it.
//!
//! Plain numbers in architectural form, so that whoever owns a vCPU can fill in its own state without this crate
//! knowing it. Segment access rights are bits 40-55 of a descriptor as they stand there (Intel SDM volume 3,
//! section 3.4.5): type in bits 0-3, S 4, DPL 5-6, P 7, AVL 12, L 13, D/B 14, G 15, bits 8-11 zero.

use crate::bytes::put;
use crate::image::Segment;
use crate::layout;
use std::borrow::Cow;

/// Number of RAX in [`EntryState::gpr`].
pub const RAX: usize = 0;
/// Number of RBX in [`EntryState::gpr`].
pub const RBX: usize = 3;
/// Number of RSP in [`EntryState::gpr`].
pub const RSP: usize = 4;
/// Number of RSI in [`EntryState::gpr`].
pub const RSI: usize = 6;

/// `CR0.PE`, protected mode.
const CR0_PE: u64 = 1;
/// `CR0.ET`, always one on these processors.
const CR0_ET: u64 = 1 << 4;
/// `CR0.NE`, native x87 error reporting.
const CR0_NE: u64 = 1 << 5;
/// `CR0.PG`, paging.
const CR0_PG: u64 = 1 << 31;
/// `CR4.PAE`.
const CR4_PAE: u64 = 1 << 5;
/// `EFER.LME` and `EFER.LMA`.
const EFER_LONG_MODE: u64 = 1 << 8 | 1 << 10;

/// The mode in which a kernel is entered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum EntryMode {
    /// 64-bit mode, the first 4 GiB mapped one to one with 2 MiB pages.
    Long64,
    /// 32-bit protected mode with flat segments, paging off.
    Protected32,
}

/// A segment register with its hidden part.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SegmentRegister {
    /// Selector.
    pub selector: u16,
    /// Linear base address.
    pub base: u64,
    /// Limit in bytes, granularity already applied.
    pub limit: u32,
    /// Access rights, see the module's documentation.
    pub access: u16,
}

/// GDTR or IDTR.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct TableRegister {
    /// Linear address of the table.
    pub base: u64,
    /// Size of the table in bytes, less one.
    pub limit: u16,
}

/// State of the boot processor at the kernel's first instruction. Everything that is not named here is as after
/// reset; in particular the other processors wait for a startup IPI.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EntryState {
    /// Mode that the control registers below select.
    pub mode: EntryMode,
    /// Address of the first instruction.
    pub rip: u64,
    /// Flags: interrupts off, direction up.
    pub rflags: u64,
    /// General registers by their hardware number (RAX 0, RCX 1, RDX 2, RBX 3, RSP 4, RBP 5, RSI 6, RDI 7, R8...).
    pub gpr: [u64; 16],
    /// CR0.
    pub cr0: u64,
    /// CR3: the page tables in 64-bit mode, 0 otherwise.
    pub cr3: u64,
    /// CR4.
    pub cr4: u64,
    /// EFER.
    pub efer: u64,
    /// Global descriptor table, which is in the loaded segments.
    pub gdt: TableRegister,
    /// Interrupt descriptor table: empty.
    pub idt: TableRegister,
    /// Code segment.
    pub cs: SegmentRegister,
    /// Data segment, in DS, ES, FS, GS and SS.
    pub data: SegmentRegister,
    /// Task register: a busy 32/64-bit TSS whose contents nobody uses.
    pub tr: SegmentRegister,
    /// Local descriptor table: not present.
    pub ldt: SegmentRegister,
}

/// Selector of the code segment, the one that the Linux boot protocol names.
const CODE_SELECTOR: u16 = 0x10;
/// Selector of the data segment, likewise.
const DATA_SELECTOR: u16 = 0x18;
/// Selector of the task state segment.
const TSS_SELECTOR: u16 = 0x20;
/// Code: execute/read, accessed, present, 4 KiB granularity, 64-bit.
const CODE64: u16 = 0xA09B;
/// Code: execute/read, accessed, present, 4 KiB granularity, 32-bit.
const CODE32: u16 = 0xC09B;
/// Data: read/write, accessed, present, 4 KiB granularity, 32-bit stack.
const DATA: u16 = 0xC093;
/// Busy task state segment, present, byte granularity.
const TSS_BUSY: u16 = 0x008B;
/// Limit of the task state segment.
const TSS_LIMIT: u32 = 0x67;
/// Size in bytes of the boot GDT: null, unused, code, data and a TSS descriptor of 16 bytes.
const GDT_SIZE: usize = 48;

impl EntryState {
    /// State for a kernel entered at `rip` in `mode`; registers other than RSP are zero.
    pub(crate) fn new(mode: EntryMode, rip: u64) -> EntryState {
        let long = mode == EntryMode::Long64;
        let mut gpr = [0; 16];
        gpr[RSP] = layout::BOOT_STACK_TOP;
        EntryState {
            mode,
            rip,
            rflags: 2,
            gpr,
            cr0: CR0_PE | CR0_ET | CR0_NE | if long { CR0_PG } else { 0 },
            cr3: if long { layout::BOOT_PAGE_TABLES } else { 0 },
            cr4: if long { CR4_PAE } else { 0 },
            efer: if long { EFER_LONG_MODE } else { 0 },
            gdt: TableRegister { base: layout::BOOT_GDT, limit: GDT_SIZE as u16 - 1 },
            idt: TableRegister::default(),
            cs: SegmentRegister {
                selector: CODE_SELECTOR,
                base: 0,
                limit: u32::MAX,
                access: if long { CODE64 } else { CODE32 },
            },
            data: SegmentRegister { selector: DATA_SELECTOR, base: 0, limit: u32::MAX, access: DATA },
            tr: SegmentRegister { selector: TSS_SELECTOR, base: 0, limit: TSS_LIMIT, access: TSS_BUSY },
            ldt: SegmentRegister { selector: 0, base: 0, limit: 0, access: 0 },
        }
    }

    /// The tables in memory that this state points to: the GDT and, in 64-bit mode, the page tables.
    pub(crate) fn tables(&self) -> Vec<Segment<'static>> {
        let mut segments = vec![Segment {
            what: "descriptor table",
            address: layout::BOOT_GDT,
            data: Cow::Owned(gdt(self.cs.access)),
            zero_after: 0,
        }];
        if self.mode == EntryMode::Long64 {
            segments.push(Segment {
                what: "page tables",
                address: layout::BOOT_PAGE_TABLES,
                data: Cow::Owned(identity_page_tables(layout::BOOT_PAGE_TABLES)),
                zero_after: 0,
            });
        }
        segments
    }
}

/// A descriptor with base 0 and limit 4 GiB.
fn flat_descriptor(access: u16) -> u64 {
    0x000F_0000_0000_FFFF | u64::from(access) << 40
}

fn gdt(code_access: u16) -> Vec<u8> {
    let mut table = vec![0; GDT_SIZE];
    put(&mut table, usize::from(CODE_SELECTOR), &flat_descriptor(code_access).to_le_bytes());
    put(&mut table, usize::from(DATA_SELECTOR), &flat_descriptor(DATA).to_le_bytes());
    let tss = u64::from(TSS_LIMIT) | u64::from(TSS_BUSY) << 40;
    put(&mut table, usize::from(TSS_SELECTOR), &tss.to_le_bytes());
    table
}

/// Page tables that map the first 4 GiB one to one, writable, with 2 MiB pages: PML4, PDPT, four directories.
fn identity_page_tables(base: u64) -> Vec<u8> {
    const PAGE: u64 = 0x1000;
    /// Present and writable.
    const TABLE: u64 = 0x3;
    /// Present, writable, large page.
    const LARGE: u64 = 0x83;
    let mut tables = vec![0; 6 * PAGE as usize];
    put(&mut tables, 0, &((base + PAGE) | TABLE).to_le_bytes());
    for gib in 0..4 {
        let directory = base + (2 + gib) * PAGE;
        put(&mut tables, (PAGE + gib * 8) as usize, &(directory | TABLE).to_le_bytes());
        for large in 0..512 {
            let entry = (gib << 30 | large << 21) | LARGE;
            put(&mut tables, ((2 + gib) * PAGE + large * 8) as usize, &entry.to_le_bytes());
        }
    }
    tables
}

/// Offset and value of the local APIC registers that firmware leaves set on every processor, in the order of
/// writing: the APIC enabled with spurious vector 0x0F, LINT0 delivering the 8259's interrupts (ExtINT), LINT1
/// delivering NMI (MultiProcessor specification 1.4, section 3.6.2.2, virtual wire mode). An application
/// processor gets only LINT1; its LINT0 stays masked.
pub const FIRMWARE_LAPIC: [(u32, u32); 3] = [(0xF0, 0x10F), (0x350, 0x700), (0x360, 0x400)];

/// Write-back memory type.
const WB: u64 = 6;
/// Write-protected memory type.
const WP: u64 = 5;

/// The model-specific registers that firmware leaves set on every processor, as (index, value).
///
/// Memory is write-back by default, the hole from [`layout::LOW_RAM_MAX`] to 4 GiB is uncached by one variable
/// range, the legacy ranges by the fixed ones: conventional memory write-back, the VGA window uncached, the BIOS
/// area write-protected (Intel SDM volume 3, section 12.11). `physical_bits` is the processor's MAXPHYADDR.
pub fn firmware_msrs(physical_bits: u8) -> Vec<(u32, u64)> {
    const FIX64K_00000: u32 = 0x250;
    const FIX16K_80000: u32 = 0x258;
    const FIX16K_A0000: u32 = 0x259;
    const FIX4K_C0000: u32 = 0x268;
    const PHYS_BASE0: u32 = 0x200;
    const DEF_TYPE: u32 = 0x2FF;
    const EIGHT: u64 = 0x0101_0101_0101_0101;
    let mut msrs = vec![(FIX64K_00000, WB * EIGHT), (FIX16K_80000, WB * EIGHT), (FIX16K_A0000, 0)];
    msrs.extend((FIX4K_C0000..FIX4K_C0000 + 8).map(|index| (index, WP * EIGHT)));
    let hole = (1u64 << 32) - layout::LOW_RAM_MAX;
    let addresses = (1u64 << physical_bits.clamp(32, 52)) - 1;
    msrs.push((PHYS_BASE0, layout::LOW_RAM_MAX));
    msrs.push((PHYS_BASE0 + 1, (!(hole - 1) & addresses) | 1 << 11));
    // Last, because it turns the others on: enabled, fixed ranges enabled, write-back elsewhere.
    msrs.push((DEF_TYPE, 1 << 11 | 1 << 10 | WB));
    msrs
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bytes::u64_at;

    #[test]
    fn page_tables_map_the_first_four_gib_one_to_one() {
        let base = layout::BOOT_PAGE_TABLES;
        let tables = identity_page_tables(base);
        for address in [0u64, 0x20_0000, 0x1234_5678, 0xC000_0000, 0xFFFF_FFFF] {
            let mut table = base;
            for shift in [39, 30] {
                let entry = u64_at(&tables, table - base + (address >> shift & 511) * 8).unwrap();
                assert_eq!(entry & 0xFFF, 3);
                table = entry & !0xFFF;
            }
            let entry = u64_at(&tables, table - base + (address >> 21 & 511) * 8).unwrap();
            assert_eq!(entry & 0x1F_FFFF, 0x83);
            assert_eq!(entry & !0x1F_FFFF, address & !0x1F_FFFF);
        }
    }

    #[test]
    fn the_descriptor_table_agrees_with_the_segment_registers() {
        for mode in [EntryMode::Long64, EntryMode::Protected32] {
            let state = EntryState::new(mode, 0x10_0000);
            let tables = state.tables();
            let gdt = &tables[0].data;
            assert_eq!(gdt.len(), usize::from(state.gdt.limit) + 1);
            for register in [state.cs, state.data, state.tr] {
                let descriptor = u64_at(gdt, u64::from(register.selector)).unwrap();
                let access = (descriptor >> 40) as u16 & 0xF0FF;
                assert_eq!(access, register.access);
                let limit = (descriptor & 0xFFFF | descriptor >> 32 & 0xF_0000) as u32;
                let bytes = if access >> 15 == 1 { limit << 12 | 0xFFF } else { limit };
                assert_eq!(bytes, register.limit);
            }
        }
    }

    #[test]
    fn memory_types_cover_the_hole_and_default_to_write_back() {
        let msrs = firmware_msrs(40);
        assert_eq!(msrs.last(), Some(&(0x2FF, 0xC06)));
        assert!(msrs.contains(&(0x200, 0xC000_0000)));
        assert!(msrs.contains(&(0x201, 0xFF_C000_0800)));
        assert!(msrs.contains(&(0x259, 0)));
        assert!(msrs.contains(&(0x250, 0x0606_0606_0606_0606)));
        assert_eq!(msrs.iter().filter(|(index, _)| (0x268..=0x26F).contains(index)).count(), 8);
    }
}
