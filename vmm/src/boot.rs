//! Loading: what a machine without firmware finds in its memory and registers.
//!
//! The loader leaves what firmware would: the kernel, ACPI and SMBIOS tables in memory, MTRRs on with
//! write-back default on every processor, the boot processor's LINT0 as ExtINT and LINT1 as NMI.

use atoll_firmware::acpi::{self, AcpiConfig, AcpiImage, CpuEntry, FixedDevices, RootPort};
use atoll_firmware::layout::AddressMap;
use atoll_firmware::smbios::{self, SmbiosConfig};
use atoll_firmware::{EntryState, LoadParams, LoadedKernel, Segment, SegmentRegister};
use atoll_machine::cpu::state::{CpuState, DescriptorTable, seg};
use atoll_machine::cpu::topology::Topology;
use atoll_machine::memory::AddressSpace;

use crate::boot_files::{BootBytes, BootFiles};
use crate::error::VmError;

/// Written in pieces of this size where a segment ends in zeros.
static ZEROS: [u8; 64 * 1024] = [0; 64 * 1024];

/// What the tables describe.
pub(crate) struct Tables<'a> {
    pub(crate) map: &'a AddressMap,
    pub(crate) topology: Topology,
    pub(crate) root_ports: &'a [RootPort],
    pub(crate) uuid: [u8; 16],
}

impl Tables<'_> {
    fn acpi(&self) -> Result<AcpiImage, VmError> {
        let cpus: Vec<CpuEntry> = (0..self.topology.cpus())
            .map(|index| CpuEntry { apic_id: self.topology.apic_id(index), present: true })
            .collect();
        acpi::build(&AcpiConfig {
            map: self.map,
            cpus: &cpus,
            root_ports: self.root_ports,
            devices: FixedDevices { com1: true, i8042: true, pvpanic: true, vga: false },
        })
        .map_err(VmError::build)
    }

    fn smbios(&self) -> Result<Vec<Segment<'static>>, VmError> {
        smbios::build(&SmbiosConfig {
            map: self.map,
            uuid: self.uuid,
            serial: "",
            version: env!("CARGO_PKG_VERSION"),
            sockets: self.topology.sockets,
            cores_per_socket: self.topology.cores,
            threads_per_core: self.topology.threads,
            oem_strings: &[],
        })
        .map_err(VmError::build)
    }
}

/// Writes the kernel and the tables into memory and returns the boot processor's entry state.
pub(crate) fn load(
    files: &BootFiles,
    tables: &Tables<'_>,
    memory: &AddressSpace,
) -> Result<EntryState, VmError> {
    let (acpi, smbios) = (tables.acpi()?, tables.smbios()?);
    let bytes = files.read()?;
    let kernel = parse(files, &bytes, tables.map, &acpi)?;
    for segment in acpi.segments().chain(smbios) {
        write(&segment, memory)?;
    }
    for segment in &kernel.segments {
        write(segment, memory)?;
    }
    Ok(kernel.entry)
}

/// Whether the files can be started on a machine with these tables, without touching its memory.
pub(crate) fn check(files: &BootFiles, bytes: &BootBytes, tables: &Tables<'_>) -> Result<(), VmError> {
    parse(files, bytes, tables.map, &tables.acpi()?).map(drop)
}

fn parse<'a>(
    files: &BootFiles,
    bytes: &'a BootBytes,
    map: &AddressMap,
    acpi: &AcpiImage,
) -> Result<LoadedKernel<'a>, VmError> {
    let kernel_name = files.kernel_path().display().to_string();
    let params = LoadParams {
        map,
        rsdp_address: acpi.rsdp_address,
        reserved: &acpi.regions,
        kernel_name: &kernel_name,
    };
    atoll_firmware::load(&bytes.kernel, bytes.initrd.as_deref(), files.append(), &params)
        .map_err(|source| VmError::Kernel { path: files.kernel_path().to_owned(), source })
}

fn write(segment: &Segment<'_>, memory: &AddressSpace) -> Result<(), VmError> {
    memory.write(segment.address, &segment.data).map_err(VmError::build)?;
    let mut at = segment.address + segment.data.len() as u64;
    let mut left = segment.zero_after;
    while left > 0 {
        let part = left.min(ZEROS.len() as u64);
        memory.write(at, &ZEROS[..part as usize]).map_err(VmError::build)?;
        at += part;
        left -= part;
    }
    Ok(())
}

/// What firmware leaves on every processor.
pub(crate) fn apply_firmware(state: &mut CpuState, physical_bits: u8) {
    for (index, value) in atoll_firmware::entry::firmware_msrs(physical_bits) {
        match state.msrs.binary_search_by_key(&index, |(i, _)| *i) {
            Ok(at) => state.msrs[at].1 = value,
            Err(at) => state.msrs.insert(at, (index, value)),
        }
    }
}

/// The boot processor as `entry` wants it, on top of its power-on state.
pub(crate) fn apply_entry(state: &mut CpuState, entry: &EntryState) {
    state.gpr = entry.gpr;
    state.rip = entry.rip;
    state.rflags = entry.rflags;
    state.cr0 = entry.cr0;
    state.cr3 = entry.cr3;
    state.cr4 = entry.cr4;
    state.efer = entry.efer;
    state.gdtr = DescriptorTable { base: entry.gdt.base, limit: entry.gdt.limit };
    state.idtr = DescriptorTable { base: entry.idt.base, limit: entry.idt.limit };
    state.segments = [segment(&entry.data); 6];
    state.segments[seg::CS] = segment(&entry.cs);
    state.tr = segment(&entry.tr);
    state.ldtr = segment(&entry.ldt);
    for (offset, value) in atoll_firmware::entry::FIRMWARE_LAPIC {
        let offset = offset as usize;
        state.lapic.registers[offset..offset + 4].copy_from_slice(&value.to_le_bytes());
    }
}

fn segment(register: &SegmentRegister) -> atoll_machine::cpu::state::Segment {
    use atoll_machine::cpu::state::Segment as Cached;
    // Bits 15..0 of an access word are those of a descriptor's bytes 5 and 6; the limit's bits between are masked.
    let mut attributes = u32::from(register.access) & 0xf0ff;
    if attributes & Cached::PRESENT == 0 {
        attributes |= Cached::UNUSABLE;
    }
    Cached { selector: register.selector, base: register.base, limit: register.limit, attributes }
}
