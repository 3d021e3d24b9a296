//! The ACPI tables of machine `atoll-1` (ACPI 6.5 chapters 5 and 6, PCI Firmware specification 3.3).
//!
//! ```text
//!  0xF0000   RSDP ──► XSDT (and RSDT) ──► FADT ──► DSDT      namespace: PCI, legacy devices, processors
//!                                      │       └─► FACS      kept by the operating system
//!                                      ├─► MADT               processors and interrupt controllers
//!                                      ├─► MCFG               PCI configuration space
//!                                      ├─► WAET               "this is virtual": cheap timer reads
//!                                      └─► SRAT               only when RAM can be added
//!  end of low RAM:  [ tables (ACPI data) ][ FACS (ACPI NVS) ]
//! ```
//!
//! Tables other than the root pointer lie at the end of the RAM below 4 GiB. The RSDT repeats the XSDT for small
//! kernels that know ACPI 1.0 only. There is no `SMI_CMD`: the machine is always in ACPI mode.

mod dsdt;
mod madt;
mod sdt;
mod tables;

use crate::bytes::{align_down, align_up, checksum, put};
use crate::image::{PAGE, Segment};
use crate::layout::{self, AddressMap, E820Entry, E820Kind, Range};
use std::borrow::Cow;

/// Most processors that the tables can name.
pub const MAX_CPUS: usize = 1024;
/// Most PCIe root ports that the tables can name: functions of bus 0.
pub const MAX_ROOT_PORTS: usize = 256;

/// One processor that the machine has or can get.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CpuEntry {
    /// Its APIC identifier. Processor identifiers in the tables are the positions in [`AcpiConfig::cpus`].
    pub apic_id: u32,
    /// Whether it is there from the start; otherwise it can be added while the machine runs.
    pub present: bool,
}

/// One PCIe root port on bus 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RootPort {
    /// Device number, 0-31.
    pub device: u8,
    /// Function number, 0-7.
    pub function: u8,
    /// Physical slot number, as in the port's slot capabilities.
    pub slot: u16,
}

/// Which fixed devices the machine has. Everything else is on PCI and needs no table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FixedDevices {
    /// Serial port at [`layout::COM1_PORT`].
    pub com1: bool,
    /// Keyboard and mouse controller at ports 0x60 and 0x64.
    pub i8042: bool,
    /// pvpanic at [`layout::PVPANIC_PORT`].
    pub pvpanic: bool,
    /// VGA registers and window.
    pub vga: bool,
}

/// What the tables describe.
#[derive(Debug, Clone)]
pub struct AcpiConfig<'a> {
    /// RAM and device windows.
    pub map: &'a AddressMap,
    /// Processors, present ones and those that can be added.
    pub cpus: &'a [CpuEntry],
    /// PCIe root ports.
    pub root_ports: &'a [RootPort],
    /// Fixed devices.
    pub devices: FixedDevices,
}

/// Why tables cannot be built.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum AcpiError {
    /// Too many or no processors.
    #[error("{count} processors: ACPI tables need 1 to {MAX_CPUS}")]
    CpuCount {
        /// How many were asked for.
        count: usize,
    },
    /// Two processors have the same identifier.
    #[error("two processors have APIC identifier {apic_id}")]
    DuplicateApicId {
        /// The identifier.
        apic_id: u32,
    },
    /// A root port that PCI cannot have, or twice the same.
    #[error("PCIe root port {device:#x}.{function} does not exist on a PCI bus or is listed twice")]
    RootPort {
        /// Device number.
        device: u8,
        /// Function number.
        function: u8,
    },
    /// The RAM below 4 GiB is too small for the tables.
    #[error("the ACPI tables need {needed} bytes, more than the machine's memory below 4 GiB can give")]
    NoRoom {
        /// Their size in bytes.
        needed: u64,
    },
}

/// One table as it lies in memory, for those who want to look at it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Table {
    /// Signature.
    pub signature: [u8; 4],
    /// Guest-physical address.
    pub address: u64,
    /// Contents.
    pub bytes: Vec<u8>,
}

/// The tables in memory.
#[derive(Debug, Clone)]
pub struct AcpiImage {
    /// Address of the root pointer, for kernels that are told it.
    pub rsdp_address: u64,
    /// RAM that the tables occupy, to be left out of what the kernel may use.
    pub regions: Vec<E820Entry>,
    /// Every table, the root pointer (signature `RSD `) included.
    pub tables: Vec<Table>,
}

impl AcpiImage {
    /// What to write into guest RAM.
    pub fn segments(&self) -> impl Iterator<Item = Segment<'_>> {
        self.tables.iter().map(|table| Segment {
            what: "ACPI table",
            address: table.address,
            data: Cow::Borrowed(&table.bytes),
            zero_after: 0,
        })
    }
}

/// Builds the tables and places them.
///
/// # Errors
///
/// [`AcpiError`] if the description contradicts itself or the machine has too little RAM for the tables.
pub fn build(config: &AcpiConfig<'_>) -> Result<AcpiImage, AcpiError> {
    check(config)?;
    let dsdt = dsdt::build(config);
    let mut others = vec![madt::build(config.cpus), tables::mcfg(), tables::waet()];
    if !config.map.hotplug_ram.is_empty() {
        others.push(tables::srat(config));
    }
    let root_entries = 1 + others.len();
    let sizes =
        [dsdt.len(), tables::FADT_SIZE, tables::xsdt_size(root_entries), tables::rsdt_size(root_entries)];
    let sizes = sizes.into_iter().chain(others.iter().map(Vec::len));
    let total = sizes.map(padded).sum::<u64>();

    let top = align_down(config.map.low_ram.end, PAGE);
    let facs = top.saturating_sub(PAGE);
    let base = align_down(facs.saturating_sub(total), PAGE);
    // At least half of a small machine's memory stays usable.
    if base < (top / 2).max(layout::HIGH_MEMORY_START) {
        return Err(AcpiError::NoRoom { needed: total + PAGE });
    }
    let mut cursor = Cursor { next: base, tables: Vec::new() };
    cursor.place_at(facs, tables::facs());
    let dsdt = cursor.place(dsdt);
    let mut entries = vec![cursor.place(tables::fadt(facs as u32, dsdt, config.devices))];
    for table in others {
        let address = cursor.place(table);
        entries.push(address);
    }
    let xsdt = cursor.place(tables::xsdt(&entries));
    let rsdt = cursor.place(tables::rsdt(&entries));
    debug_assert!(cursor.next <= facs);
    cursor.place_at(layout::RSDP_ADDRESS, rsdp(rsdt as u32, xsdt));
    let regions = vec![
        E820Entry { range: Range { start: base, end: facs }, kind: E820Kind::AcpiData },
        E820Entry { range: Range { start: facs, end: config.map.low_ram.end }, kind: E820Kind::AcpiNvs },
    ];
    Ok(AcpiImage { rsdp_address: layout::RSDP_ADDRESS, regions, tables: cursor.tables })
}

fn check(config: &AcpiConfig<'_>) -> Result<(), AcpiError> {
    let count = config.cpus.len();
    if count == 0 || count > MAX_CPUS {
        return Err(AcpiError::CpuCount { count });
    }
    let mut ids: Vec<u32> = config.cpus.iter().map(|cpu| cpu.apic_id).collect();
    ids.sort_unstable();
    if let Some(pair) = ids.windows(2).find(|pair| pair[0] == pair[1]) {
        return Err(AcpiError::DuplicateApicId { apic_id: pair[0] });
    }
    for (index, port) in config.root_ports.iter().enumerate() {
        let twice = || {
            let same = |other: &RootPort| (other.device, other.function) == (port.device, port.function);
            config.root_ports.iter().take(index).any(same)
        };
        if port.device > 31 || port.function > 7 || index >= MAX_ROOT_PORTS || twice() {
            return Err(AcpiError::RootPort { device: port.device, function: port.function });
        }
    }
    Ok(())
}

/// Alignment of tables in memory.
const TABLE_ALIGNMENT: u64 = 64;

fn padded(size: usize) -> u64 {
    align_up(size as u64, TABLE_ALIGNMENT).unwrap_or(u64::MAX)
}

/// Gives tables their addresses, one behind the other.
struct Cursor {
    next: u64,
    tables: Vec<Table>,
}

impl Cursor {
    fn place(&mut self, bytes: Vec<u8>) -> u64 {
        let address = self.next;
        self.next += padded(bytes.len());
        self.place_at(address, bytes);
        address
    }

    fn place_at(&mut self, address: u64, bytes: Vec<u8>) {
        let mut signature = [0; 4];
        signature.copy_from_slice(&bytes[..4]);
        self.tables.push(Table { signature, address, bytes });
    }
}

/// Root pointer, revision 2 (ACPI 6.5, section 5.2.5.3).
fn rsdp(rsdt: u32, xsdt: u64) -> Vec<u8> {
    let mut bytes = vec![0; 36];
    put(&mut bytes, 0, b"RSD PTR ");
    put(&mut bytes, 9, &sdt::OEM_ID);
    put(&mut bytes, 15, &[2]);
    put(&mut bytes, 16, &rsdt.to_le_bytes());
    put(&mut bytes, 20, &36u32.to_le_bytes());
    put(&mut bytes, 24, &xsdt.to_le_bytes());
    bytes[8] = checksum(&bytes[..20]);
    bytes[32] = checksum(&bytes);
    bytes
}

#[cfg(test)]
mod tests;
