//! The guest-physical map and the fixed resources of machine `atoll-1` (Q35-compatible), and the E820 map.
//!
//! ```text
//!  0x0000_0000  RAM          real-mode area, boot structures (see below), EBDA at 0x9_FC00
//!  0x000A_0000  VGA window   not RAM
//!  0x000C_0000  option ROMs  RAM when shadowed, not offered to the kernel
//!  0x000E_0000  F segment    RAM when shadowed: ACPI root pointer, SMBIOS
//!  0x0010_0000  RAM          to at most 3 GiB; ACPI tables at its end
//!  0xC000_0000  32-bit memory-mapped devices, first window
//!  0xE000_0000  ECAM         PCI configuration space of 256 buses
//!  0xF000_0000  32-bit memory-mapped devices, second window
//!  0xFEC0_0000  IOAPIC;      0xFEE0_0000  local APIC
//!  0x1_0000_0000  RAM beyond 3 GiB, then room for hot-added RAM
//!  64 GiB or above, after all RAM: 64-bit memory-mapped devices, 256 GiB
//!  0xFD_0000_0000  nothing (the range some processors keep for HyperTransport) up to 40 bits
//! ```
//!
//! Without firmware nobody programs the chipset, so whoever builds the machine leaves it as these constants say:
//! PCIEXBAR enabled at [`ECAM_BASE`] with 256 buses, PMBASE at [`PM_BASE`] with ACPI I/O enabled and `SCI_EN` set
//! in PM1 control, the SCI routed to [`SCI_GSI`], the PAM registers reading 0xC0000-0xFFFFF from RAM, A20 open.
//! Spec: ACPI 6.5 section 15 (E820), Intel ICH9 datasheet sections 9 and 13.

use crate::bytes::align_up;
use std::fmt;

/// 1 GiB in bytes.
pub const GIB: u64 = 1 << 30;
/// End of the RAM below 4 GiB: what a machine has beyond it starts at [`HIGH_RAM_BASE`].
pub const LOW_RAM_MAX: u64 = 0xC000_0000;
/// Guest-physical address of the RAM that does not fit below [`LOW_RAM_MAX`].
pub const HIGH_RAM_BASE: u64 = 1 << 32;
/// Least RAM of a machine, in bytes: a kernel and its tables need more than this anyway.
pub const MIN_MEMORY: u64 = 4 << 20;
/// RAM sizes are multiples of this many bytes.
pub const MEMORY_GRANULE: u64 = 1 << 20;
/// Physical address bits of every Atoll CPU model.
pub const PHYSICAL_ADDRESS_BITS: u8 = 40;
/// Nothing is placed here or above: AMD processors with 40 bits keep it for HyperTransport.
pub const ADDRESS_CEILING: u64 = 0xFD_0000_0000;

/// VGA window, never RAM.
pub const VGA_WINDOW: Range = Range { start: 0xA_0000, end: 0xC_0000 };
/// Where the BIOS keeps its tables: option ROMs and the E and F segments.
pub const BIOS_AREA: Range = Range { start: 0xC_0000, end: 0x10_0000 };
/// Extended BIOS data area, 1 KiB at the end of conventional memory.
pub const EBDA: Range = Range { start: 0x9_FC00, end: 0xA_0000 };
/// First address of the RAM above the real-mode megabyte.
pub const HIGH_MEMORY_START: u64 = 0x10_0000;

/// ACPI root pointer: the first of the 16-byte steps at which an operating system looks for it.
pub const RSDP_ADDRESS: u64 = 0xF_0000;
/// SMBIOS entry points and structures: the rest of the F segment.
pub const SMBIOS_AREA: Range = Range { start: 0xF_0040, end: 0x10_0000 };

/// PCIEXBAR: memory-mapped PCI configuration space of [`ECAM_BUSES`] buses, 1 MiB each.
pub const ECAM_BASE: u64 = 0xE000_0000;
/// Number of PCI buses.
pub const ECAM_BUSES: u64 = 256;
/// The memory-mapped configuration space.
pub const ECAM: Range = Range { start: ECAM_BASE, end: ECAM_BASE + (ECAM_BUSES << 20) };
/// Windows below 4 GiB from which PCI memory BARs are assigned.
pub const MMIO32_WINDOWS: [Range; 2] = [
    Range { start: LOW_RAM_MAX, end: ECAM_BASE },
    Range { start: ECAM_BASE + (ECAM_BUSES << 20), end: IOAPIC_BASE },
];
/// Lowest start of the window above 4 GiB from which PCI memory BARs are assigned.
pub const MMIO64_BASE_MIN: u64 = 64 * GIB;
/// Size in bytes of that window.
pub const MMIO64_SIZE: u64 = 256 * GIB;
/// IOAPIC registers.
pub const IOAPIC_BASE: u64 = 0xFEC0_0000;
/// APIC identifier that the IOAPIC reports.
pub const IOAPIC_ID: u8 = 0;
/// Number of IOAPIC inputs; input n is global system interrupt n.
pub const IOAPIC_PINS: u8 = 24;
/// Local APIC registers.
pub const LAPIC_BASE: u64 = 0xFEE0_0000;

/// PMBASE: I/O port of the ACPI power-management block.
pub const PM_BASE: u16 = 0x600;
/// Size in ports of the block that PMBASE decodes.
pub const PM_SIZE: u16 = 0x80;
/// PM1 status and enable, 4 bytes.
pub const PM1_EVENT_PORT: u16 = PM_BASE;
/// PM1 control, 2 bytes.
pub const PM1_CONTROL_PORT: u16 = PM_BASE + 0x04;
/// Power-management timer, 4 bytes, 32-bit counter at 3.579545 MHz.
pub const PM_TIMER_PORT: u16 = PM_BASE + 0x08;
/// General-purpose events, 8 bytes of status then 8 bytes of enable.
pub const GPE0_PORT: u16 = PM_BASE + 0x20;
/// Size in ports of the GPE0 block.
pub const GPE0_SIZE: u8 = 16;
/// Value of `SLP_TYP` that powers the machine off, as on every Q35 that firmware knows.
pub const S5_SLEEP_TYPE: u8 = 0;
/// Global system interrupt of ACPI events: level-triggered, active high.
pub const SCI_GSI: u8 = 9;
/// Reset control register.
pub const RESET_PORT: u16 = 0xCF9;
/// Value that resets the machine when written to [`RESET_PORT`].
pub const RESET_VALUE: u8 = 0x0E;
/// pvpanic event port.
pub const PVPANIC_PORT: u16 = 0x505;
/// First serial port, 8 ports.
pub const COM1_PORT: u16 = 0x3F8;
/// Interrupt of the first serial port.
pub const COM1_IRQ: u8 = 4;

/// GDT of the entry state.
pub const BOOT_GDT: u64 = 0x500;
/// Start information of PVH and Multiboot kernels: a page each for the information and its tables.
pub const BOOT_INFO: u64 = 0x5000;
/// Linux `boot_params`, one page.
pub const BOOT_PARAMS: u64 = 0x7000;
/// Stack of the entry state grows down from here.
pub const BOOT_STACK_TOP: u64 = 0x8FF0;
/// Page tables of the 64-bit entry, six pages.
pub const BOOT_PAGE_TABLES: u64 = 0x9000;
/// Kernel command line.
pub const BOOT_CMDLINE: u64 = 0x2_0000;
/// Longest command line in bytes, terminating NUL included, whatever the kernel takes.
pub const BOOT_CMDLINE_MAX: u64 = 0x1_0000;

/// A half-open range of guest-physical addresses.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct Range {
    /// First address.
    pub start: u64,
    /// First address behind the range.
    pub end: u64,
}

impl Range {
    /// The range of `size` bytes at `start`; `None` if it would leave the 64-bit address space.
    pub fn sized(start: u64, size: u64) -> Option<Range> {
        Some(Range { start, end: start.checked_add(size)? })
    }

    /// Size in bytes.
    pub fn size(&self) -> u64 {
        self.end.saturating_sub(self.start)
    }

    /// Whether the range has no byte.
    pub fn is_empty(&self) -> bool {
        self.start >= self.end
    }

    /// Whether every byte of `other` is in this range.
    pub fn contains(&self, other: &Range) -> bool {
        self.start <= other.start && other.end <= self.end
    }

    /// Whether the two share a byte.
    pub fn overlaps(&self, other: &Range) -> bool {
        self.start < other.end && other.start < self.end && !self.is_empty() && !other.is_empty()
    }
}

impl fmt::Display for Range {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}-{:#x}", self.start, self.end)
    }
}

impl fmt::Debug for Range {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// What a range of the E820 map is; the number is the one in the map (ACPI 6.5, table 15.3).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum E820Kind {
    /// Memory that the operating system may use.
    Ram = 1,
    /// Memory or addresses that it must leave alone.
    Reserved = 2,
    /// ACPI tables; usable after they were read.
    AcpiData = 3,
    /// ACPI memory that must be kept.
    AcpiNvs = 4,
}

/// One range of the E820 map.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct E820Entry {
    /// The addresses.
    pub range: Range,
    /// What they are.
    pub kind: E820Kind,
}

/// Why a machine of the wanted size cannot be laid out.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum LayoutError {
    /// RAM size is not acceptable.
    #[error("{size} bytes of memory: expected a multiple of 1 MiB, from {min} to {max} bytes")]
    MemorySize {
        /// The size that was asked for, in bytes.
        size: u64,
        /// Smallest size in bytes.
        min: u64,
        /// Largest size in bytes.
        max: u64,
    },
    /// The limit for hot-added RAM is below the RAM that is there from the start.
    #[error("maximum memory of {max_memory} bytes is less than the machine's {memory} bytes")]
    MaximumBelowMemory {
        /// RAM at start, in bytes.
        memory: u64,
        /// Limit in bytes.
        max_memory: u64,
    },
}

/// Most RAM of a machine in bytes: with it the 64-bit device window still ends below [`ADDRESS_CEILING`].
pub const MAX_MEMORY: u64 = 700 * GIB;

/// Where RAM and the 64-bit device window of one machine are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AddressMap {
    /// RAM from address 0; the holes below 1 MiB are part of it as far as backing memory is concerned.
    pub low_ram: Range,
    /// RAM from 4 GiB; empty on a small machine.
    pub high_ram: Range,
    /// Room for RAM that is added later, right after `high_ram`; empty if none was asked for.
    pub hotplug_ram: Range,
    /// Window above all RAM from which 64-bit PCI BARs are assigned.
    pub mmio64: Range,
}

impl AddressMap {
    /// Lays out `memory` bytes of RAM that may grow to `max_memory` bytes.
    ///
    /// # Errors
    ///
    /// [`LayoutError`] if a size is not a multiple of [`MEMORY_GRANULE`] between [`MIN_MEMORY`] and
    /// [`MAX_MEMORY`], or the maximum is below the start.
    pub fn new(memory: u64, max_memory: u64) -> Result<AddressMap, LayoutError> {
        for size in [memory, max_memory] {
            if !(MIN_MEMORY..=MAX_MEMORY).contains(&size) || size % MEMORY_GRANULE != 0 {
                return Err(LayoutError::MemorySize { size, min: MIN_MEMORY, max: MAX_MEMORY });
            }
        }
        if max_memory < memory {
            return Err(LayoutError::MaximumBelowMemory { memory, max_memory });
        }
        let low = memory.min(LOW_RAM_MAX);
        let high = memory - low;
        let high_end = HIGH_RAM_BASE + high;
        // RAM is added above 4 GiB even when there is a gap below: nothing that exists has to move.
        let hotplug_end = high_end + (max_memory - memory);
        let mmio64_start = align_up(hotplug_end, MMIO64_BASE_MIN).unwrap_or(MMIO64_BASE_MIN);
        Ok(AddressMap {
            low_ram: Range { start: 0, end: low },
            high_ram: Range { start: HIGH_RAM_BASE, end: high_end },
            hotplug_ram: Range { start: high_end, end: hotplug_end },
            mmio64: Range { start: mmio64_start, end: mmio64_start + MMIO64_SIZE },
        })
    }

    /// Total RAM at start, in bytes.
    pub fn memory(&self) -> u64 {
        self.low_ram.size() + self.high_ram.size()
    }

    /// The E820 map: sorted, without overlaps. `reserved` are ranges of RAM that hold tables; they are cut out
    /// of the RAM and listed under their own kind.
    pub fn e820(&self, reserved: &[E820Entry]) -> Vec<E820Entry> {
        let mut taken: Vec<E820Entry> = reserved.to_vec();
        taken.push(E820Entry { range: EBDA, kind: E820Kind::Reserved });
        taken.push(E820Entry {
            range: Range { start: 0xF_0000, end: HIGH_MEMORY_START },
            kind: E820Kind::Reserved,
        });
        taken.push(E820Entry { range: ECAM, kind: E820Kind::Reserved });
        let mut entries: Vec<E820Entry> = self.usable_ram(&taken).into_iter().map(ram).collect();
        entries.extend(taken);
        entries.retain(|entry| !entry.range.is_empty());
        entries.sort_by_key(|entry| entry.range.start);
        entries
    }

    /// Ranges of RAM that a kernel may use, sorted: all RAM without the legacy hole and `taken`.
    pub fn usable_ram(&self, taken: &[E820Entry]) -> Vec<Range> {
        let mut holes: Vec<Range> = taken.iter().map(|entry| entry.range).collect();
        holes.push(Range { start: EBDA.start, end: HIGH_MEMORY_START });
        holes.sort_by_key(|hole| hole.start);
        let mut usable = Vec::new();
        for ram in [self.low_ram, self.high_ram] {
            let mut start = ram.start;
            for hole in holes.iter().filter(|hole| hole.overlaps(&ram)) {
                if start < hole.start {
                    usable.push(Range { start, end: hole.start });
                }
                start = start.max(hole.end);
            }
            if start < ram.end {
                usable.push(Range { start, end: ram.end });
            }
        }
        usable
    }
}

fn ram(range: Range) -> E820Entry {
    E820Entry { range, kind: E820Kind::Ram }
}

/// The global system interrupt of pin `pin` (0 = INTA#) of PCI device `device` on bus 0.
///
/// As on Q35: devices 0-24 and 30 rotate through inputs 20-23 (PIRQE-PIRQH), devices 25-29 and 31 use inputs
/// 16-19 (PIRQA-PIRQD) in pin order. The lines are level-triggered; behind a bridge the pins rotate by the
/// device number first (PCI-to-PCI bridge specification 1.2, section 9.1).
pub fn pci_intx_gsi(device: u8, pin: u8) -> u8 {
    let pin = pin & 3;
    match device {
        0..=24 => 20 + (device.wrapping_add(pin) & 3),
        30 => 20 + pin,
        _ => 16 + pin,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check_e820(map: &AddressMap, reserved: &[E820Entry]) -> Vec<E820Entry> {
        let entries = map.e820(reserved);
        for pair in entries.windows(2) {
            assert!(pair[0].range.end <= pair[1].range.start, "{entries:?}");
        }
        entries
    }

    #[test]
    fn memory_beyond_three_gib_goes_above_four_gib() {
        let map = AddressMap::new(4 * GIB, 4 * GIB).unwrap();
        assert_eq!(map.low_ram, Range { start: 0, end: LOW_RAM_MAX });
        assert_eq!(map.high_ram, Range { start: HIGH_RAM_BASE, end: 5 * GIB });
        assert!(map.hotplug_ram.is_empty());
        assert_eq!(map.mmio64.start, MMIO64_BASE_MIN);
        let ram: u64 =
            check_e820(&map, &[]).iter().filter(|e| e.kind == E820Kind::Ram).map(|e| e.range.size()).sum();
        assert_eq!(ram, 4 * GIB - (HIGH_MEMORY_START - EBDA.start));
    }

    #[test]
    fn the_ecam_window_and_reserved_ranges_are_in_the_e820_map() {
        let map = AddressMap::new(64 << 20, 64 << 20).unwrap();
        let tables =
            E820Entry { range: Range { start: 0x3FF_0000, end: 0x400_0000 }, kind: E820Kind::AcpiData };
        let entries = check_e820(&map, &[tables]);
        assert!(entries.contains(&tables));
        assert!(entries.contains(&E820Entry { range: ECAM, kind: E820Kind::Reserved }));
        assert!(entries.contains(&E820Entry {
            range: Range { start: HIGH_MEMORY_START, end: 0x3FF_0000 },
            kind: E820Kind::Ram
        }));
    }

    #[test]
    fn the_largest_machine_stays_below_the_ceiling() {
        let map = AddressMap::new(GIB, MAX_MEMORY).unwrap();
        assert!(map.mmio64.end <= ADDRESS_CEILING, "{map:?}");
        assert!(!map.mmio64.overlaps(&map.hotplug_ram));
        let map = AddressMap::new(MAX_MEMORY, MAX_MEMORY).unwrap();
        assert!(map.mmio64.end <= ADDRESS_CEILING && map.high_ram.end <= map.mmio64.start, "{map:?}");
    }

    #[test]
    fn sizes_that_make_no_machine_are_refused() {
        for size in [0, MIN_MEMORY - MEMORY_GRANULE, MIN_MEMORY + 1, MAX_MEMORY + MEMORY_GRANULE, u64::MAX] {
            assert!(matches!(AddressMap::new(size, size), Err(LayoutError::MemorySize { .. })), "{size}");
        }
        let error = AddressMap::new(2 * GIB, GIB).unwrap_err();
        assert!(matches!(error, LayoutError::MaximumBelowMemory { .. }));
    }

    #[test]
    fn the_windows_tile_the_hole_below_four_gib() {
        assert_eq!(MMIO32_WINDOWS[0].end, ECAM.start);
        assert_eq!(ECAM.end, MMIO32_WINDOWS[1].start);
        assert_eq!(MMIO32_WINDOWS[1].end, IOAPIC_BASE);
    }

    #[test]
    fn pci_interrupts_follow_the_q35_rotation() {
        assert_eq!([0, 1, 2, 3].map(|pin| pci_intx_gsi(0, pin)), [20, 21, 22, 23]);
        assert_eq!([0, 1, 2, 3].map(|pin| pci_intx_gsi(3, pin)), [23, 20, 21, 22]);
        assert_eq!([0, 1, 2, 3].map(|pin| pci_intx_gsi(30, pin)), [20, 21, 22, 23]);
        assert_eq!([0, 1, 2, 3].map(|pin| pci_intx_gsi(31, pin)), [16, 17, 18, 19]);
    }
}
