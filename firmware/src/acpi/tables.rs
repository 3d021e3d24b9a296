//! The small static tables: FADT, FACS, XSDT, RSDT, MCFG, WAET, SRAT.

use super::{AcpiConfig, FixedDevices, sdt};
use crate::bytes::put;
use crate::layout::{self, Range};

/// Size of the FADT in bytes, revision 6.
pub(super) const FADT_SIZE: usize = 276;

/// Size of an XSDT with `entries` entries, in bytes.
pub(super) fn xsdt_size(entries: usize) -> usize {
    sdt::HEADER_SIZE + entries * 8
}

/// Size of an RSDT with `entries` entries, in bytes.
pub(super) fn rsdt_size(entries: usize) -> usize {
    sdt::HEADER_SIZE + entries * 4
}

pub(super) fn xsdt(entries: &[u64]) -> Vec<u8> {
    let body: Vec<u8> = entries.iter().flat_map(|address| address.to_le_bytes()).collect();
    sdt::table(b"XSDT", 1, &body)
}

/// The tables lie below 4 GiB, so their addresses fit.
pub(super) fn rsdt(entries: &[u64]) -> Vec<u8> {
    let body: Vec<u8> = entries.iter().flat_map(|address| (*address as u32).to_le_bytes()).collect();
    sdt::table(b"RSDT", 1, &body)
}

/// FACS version 2, without a hardware signature (ACPI 6.5, section 5.2.10).
pub(super) fn facs() -> Vec<u8> {
    let mut bytes = vec![0; 64];
    put(&mut bytes, 0, b"FACS");
    put(&mut bytes, 4, &64u32.to_le_bytes());
    put(&mut bytes, 32, &[2]);
    bytes
}

/// Generic address structure of an I/O port block (ACPI 6.5, section 5.2.3.2).
fn io_address(port: u16, bits: u8, access: u8) -> [u8; 12] {
    let mut gas = [0; 12];
    gas[..4].copy_from_slice(&[1, bits, 0, access]);
    gas[4..6].copy_from_slice(&port.to_le_bytes());
    gas
}

/// FADT revision 6.4 with fixed hardware (ACPI 6.5, section 5.2.9).
pub(super) fn fadt(facs: u32, dsdt: u64, devices: FixedDevices) -> Vec<u8> {
    /// WBINVD works; C1 on every processor; no fixed sleep button (the power button is fixed: bit 4 clear); the
    /// real-time clock's wake status is not in the PM1 block; 32-bit timer; reset register.
    const FLAGS: u32 = 1 | 1 << 2 | 1 << 5 | 1 << 6 | 1 << 8 | 1 << 10;
    /// Latencies that say: no C2 and no C3.
    const NO_C2: u16 = 101;
    const NO_C3: u16 = 1001;
    const BYTE: u8 = 1;
    const WORD: u8 = 2;
    const DWORD: u8 = 3;
    let boot_flags: u16 = 1 | u16::from(devices.i8042) << 1 | u16::from(!devices.vga) << 2;
    let mut body = vec![0; FADT_SIZE - sdt::HEADER_SIZE];
    let mut field = |offset: usize, value: &[u8]| put(&mut body, offset - sdt::HEADER_SIZE, value);
    field(36, &facs.to_le_bytes());
    field(40, &(dsdt as u32).to_le_bytes());
    field(46, &u16::from(layout::SCI_GSI).to_le_bytes());
    field(56, &u32::from(layout::PM1_EVENT_PORT).to_le_bytes());
    field(64, &u32::from(layout::PM1_CONTROL_PORT).to_le_bytes());
    field(76, &u32::from(layout::PM_TIMER_PORT).to_le_bytes());
    field(80, &u32::from(layout::GPE0_PORT).to_le_bytes());
    // Lengths of PM1 event, PM1 control, PM2 control, timer, GPE0.
    field(88, &[4, 2, 0, 4, layout::GPE0_SIZE]);
    field(96, &NO_C2.to_le_bytes());
    field(98, &NO_C3.to_le_bytes());
    // Century byte of the real-time clock.
    field(108, &[0x32]);
    field(109, &boot_flags.to_le_bytes());
    field(112, &FLAGS.to_le_bytes());
    field(116, &io_address(layout::RESET_PORT, 8, BYTE));
    field(128, &[layout::RESET_VALUE]);
    // Minor version: 6.4.
    field(131, &[4]);
    field(140, &dsdt.to_le_bytes());
    field(148, &io_address(layout::PM1_EVENT_PORT, 32, WORD));
    field(172, &io_address(layout::PM1_CONTROL_PORT, 16, WORD));
    field(208, &io_address(layout::PM_TIMER_PORT, 32, DWORD));
    field(220, &io_address(layout::GPE0_PORT, layout::GPE0_SIZE * 8, BYTE));
    field(268, b"ATOLL\0\0\0");
    sdt::table(b"FACP", 6, &body)
}

/// PCI configuration space (PCI Firmware specification 3.3, section 4.1.2).
pub(super) fn mcfg() -> Vec<u8> {
    let mut body = vec![0; 8];
    body.extend_from_slice(&layout::ECAM_BASE.to_le_bytes());
    body.extend_from_slice(&[0, 0, 0, (layout::ECAM_BUSES - 1) as u8, 0, 0, 0, 0]);
    sdt::table(b"MCFG", 1, &body)
}

/// Windows ACPI emulated devices table: one read of the power-management timer is enough. The real-time clock is
/// like a real one: its interrupt has to be acknowledged in register C, so bit 0 stays clear.
pub(super) fn waet() -> Vec<u8> {
    const PM_TIMER_GOOD: u32 = 1 << 1;
    sdt::table(b"WAET", 1, &PM_TIMER_GOOD.to_le_bytes())
}

/// SRAT: everything in one proximity domain, with the room for added RAM (ACPI 6.5, section 5.2.16).
pub(super) fn srat(config: &AcpiConfig<'_>) -> Vec<u8> {
    const ENABLED: u32 = 1;
    const HOTPLUGGABLE: u32 = 2;
    let mut body = Vec::new();
    body.extend_from_slice(&1u32.to_le_bytes());
    body.extend_from_slice(&[0; 8]);
    for cpu in config.cpus {
        match u8::try_from(cpu.apic_id) {
            Ok(apic_id) if apic_id < 0xFF => {
                body.extend_from_slice(&[0, 16, 0, apic_id]);
                body.extend_from_slice(&ENABLED.to_le_bytes());
                body.extend_from_slice(&[0; 8]);
            }
            _ => {
                body.extend_from_slice(&[2, 24, 0, 0]);
                body.extend_from_slice(&0u32.to_le_bytes());
                body.extend_from_slice(&cpu.apic_id.to_le_bytes());
                body.extend_from_slice(&ENABLED.to_le_bytes());
                body.extend_from_slice(&[0; 8]);
            }
        }
    }
    let mut memory = |range: Range, flags: u32| {
        if !range.is_empty() {
            body.extend_from_slice(&[1, 40, 0, 0, 0, 0, 0, 0]);
            body.extend_from_slice(&range.start.to_le_bytes());
            body.extend_from_slice(&range.size().to_le_bytes());
            body.extend_from_slice(&0u32.to_le_bytes());
            body.extend_from_slice(&flags.to_le_bytes());
            body.extend_from_slice(&[0; 8]);
        }
    };
    memory(config.map.low_ram, ENABLED);
    memory(config.map.high_ram, ENABLED);
    memory(config.map.hotplug_ram, ENABLED | HOTPLUGGABLE);
    sdt::table(b"SRAT", 3, &body)
}
