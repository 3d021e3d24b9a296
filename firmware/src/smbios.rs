//! SMBIOS structures (SMBIOS reference specification 3.6): what `dmidecode` and installers show of the machine.
//!
//! Structures and both entry points lie in the F segment, where operating systems without UEFI look: `_SM3_`
//! first, `_SM_` behind it for older ones.

use crate::bytes::{align_up, checksum, put};
use crate::image::Segment;
use crate::layout::{self, AddressMap, Range};
use std::borrow::Cow;

/// Most memory in one memory device structure, in bytes: larger machines show several modules.
const MODULE_MAX: u64 = 16 * layout::GIB;
/// Size in bytes that each entry point's place has.
const ENTRY_POINT_SIZE: u64 = 0x20;

/// What the structures say.
#[derive(Debug, Clone)]
pub struct SmbiosConfig<'a> {
    /// Memory sizes and ranges.
    pub map: &'a AddressMap,
    /// The machine's identity: bytes in the order in which a UUID is written.
    pub uuid: [u8; 16],
    /// Serial number, normally empty.
    pub serial: &'a str,
    /// Version of Atoll.
    pub version: &'a str,
    /// Sockets, each one processor structure.
    pub sockets: u32,
    /// Cores in a socket.
    pub cores_per_socket: u32,
    /// Threads in a core.
    pub threads_per_core: u32,
    /// Lines for programs in the guest (type 11), for example a host name for first-boot configuration.
    pub oem_strings: &'a [&'a str],
}

/// Why structures cannot be built.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SmbiosError {
    /// They do not fit into the F segment.
    #[error(
        "the SMBIOS structures need {size} bytes, the BIOS area has {available}; use fewer or shorter strings"
    )]
    TooBig {
        /// Their size in bytes.
        size: u64,
        /// The room in bytes.
        available: u64,
    },
}

/// Collects structures.
#[derive(Default)]
struct Structures {
    bytes: Vec<u8>,
    count: u16,
    largest: u16,
}

impl Structures {
    /// Adds a structure: `body` is what follows the 4-byte header; strings are numbered from 1.
    fn add(&mut self, kind: u8, handle: u16, body: &[u8], strings: &[&str]) {
        let start = self.bytes.len();
        self.bytes.extend_from_slice(&[kind, 4 + body.len() as u8]);
        self.bytes.extend_from_slice(&handle.to_le_bytes());
        self.bytes.extend_from_slice(body);
        for text in strings {
            // An empty string would end the list: callers give those the number 0 instead.
            let text = text.bytes().filter(|byte| (0x20..0x7F).contains(byte));
            let before = self.bytes.len();
            self.bytes.extend(text);
            if self.bytes.len() == before {
                self.bytes.push(b' ');
            }
            self.bytes.push(0);
        }
        if strings.is_empty() {
            self.bytes.push(0);
        }
        self.bytes.push(0);
        self.count = self.count.saturating_add(1);
        self.largest = self.largest.max((self.bytes.len() - start).min(usize::from(u16::MAX)) as u16);
    }
}

const MANUFACTURER: &str = "Atoll";
const PRODUCT: &str = "atoll-1";
const HANDLE_CHASSIS: u16 = 0x300;
const HANDLE_CPU: u16 = 0x400;
const HANDLE_MEMORY: u16 = 0x1000;
const HANDLE_MODULE: u16 = 0x1100;
const HANDLE_MAPPED: u16 = 0x1300;
/// "Not available" and "no error information" handle.
const NO_HANDLE: u16 = 0xFFFE;

/// Builds the entry points and the structures, as segments for guest RAM.
///
/// # Errors
///
/// [`SmbiosError::TooBig`] if the F segment cannot hold them.
pub fn build(config: &SmbiosConfig<'_>) -> Result<Vec<Segment<'static>>, SmbiosError> {
    let mut all = Structures::default();
    bios(&mut all, config);
    system(&mut all, config);
    chassis(&mut all, config);
    for socket in 0..config.sockets.min(256) as u16 {
        processor(&mut all, config, socket);
    }
    if !config.oem_strings.is_empty() {
        let count = config.oem_strings.len().min(255);
        all.add(11, 0xB00, &[count as u8], &config.oem_strings[..count]);
    }
    memory(&mut all, config);
    all.add(32, 0x2000, &[0; 7], &[]);
    all.add(127, 0x7F00, &[], &[]);

    let area = layout::SMBIOS_AREA;
    let legacy = area.start + ENTRY_POINT_SIZE;
    let table = align_up(legacy + ENTRY_POINT_SIZE, 16).unwrap_or(legacy);
    let (size, available) = (all.bytes.len() as u64, area.end - table);
    if size > available {
        return Err(SmbiosError::TooBig { size, available });
    }
    let segment = |address, data| Segment { what: "SMBIOS", address, data: Cow::Owned(data), zero_after: 0 };
    Ok(vec![
        segment(area.start, entry_point_3(table, size as u32)),
        segment(legacy, entry_point_2(table as u32, &all)),
        segment(table, all.bytes),
    ])
}

/// SMBIOS 3.0 entry point (section 5.2.2).
fn entry_point_3(table: u64, size: u32) -> Vec<u8> {
    let mut bytes = vec![0; 24];
    put(&mut bytes, 0, b"_SM3_");
    put(&mut bytes, 6, &[24, 3, 6, 0, 1]);
    put(&mut bytes, 12, &size.to_le_bytes());
    put(&mut bytes, 16, &table.to_le_bytes());
    bytes[5] = checksum(&bytes);
    bytes
}

/// SMBIOS 2.1 entry point (section 5.2.1).
fn entry_point_2(table: u32, all: &Structures) -> Vec<u8> {
    let mut bytes = vec![0; 31];
    put(&mut bytes, 0, b"_SM_");
    put(&mut bytes, 5, &[31, 2, 8]);
    put(&mut bytes, 8, &all.largest.to_le_bytes());
    put(&mut bytes, 16, b"_DMI_");
    put(&mut bytes, 22, &(all.bytes.len() as u16).to_le_bytes());
    put(&mut bytes, 24, &table.to_le_bytes());
    put(&mut bytes, 28, &all.count.to_le_bytes());
    put(&mut bytes, 30, &[0x28]);
    bytes[21] = checksum(&bytes[16..]);
    bytes[4] = checksum(&bytes);
    bytes
}

/// Type 0: firmware. Its flag "virtual machine" is what programs look at.
fn bios(all: &mut Structures, config: &SmbiosConfig<'_>) {
    let mut body = [0; 22];
    put(&mut body, 0, &[1, 2]);
    put(&mut body, 2, &0xF000u16.to_le_bytes());
    // Characteristics are not stated, except in the extension: ACPI, virtual machine.
    put(&mut body, 6, &(1u64 << 3).to_le_bytes());
    put(&mut body, 14, &[0x01, 0x10, 0xFF, 0xFF, 0xFF, 0xFF]);
    all.add(0, 0, &body, &[MANUFACTURER, config.version]);
}

/// Type 1: the machine and its identity.
fn system(all: &mut Structures, config: &SmbiosConfig<'_>) {
    let mut body = [0; 23];
    let serial = config.serial.trim();
    put(&mut body, 0, &[1, 2, 3, if serial.is_empty() { 0 } else { 4 }]);
    // The first three fields of the UUID are little-endian numbers (section 7.2.1).
    let mut uuid = config.uuid;
    uuid[0..4].reverse();
    uuid[4..6].reverse();
    uuid[6..8].reverse();
    put(&mut body, 4, &uuid);
    // Wake-up by the power switch; no SKU, no family.
    body[20] = 6;
    let strings = [MANUFACTURER, PRODUCT, config.version, serial];
    all.add(1, 0x100, &body, if serial.is_empty() { &strings[..3] } else { &strings });
}

/// Type 3: the enclosure, "other", safe.
fn chassis(all: &mut Structures, config: &SmbiosConfig<'_>) {
    let body = [1, 1, 2, 0, 0, 3, 3, 3, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    all.add(3, HANDLE_CHASSIS, &body, &[MANUFACTURER, config.version]);
}

/// Type 4: one socket.
fn processor(all: &mut Structures, config: &SmbiosConfig<'_>, socket: u16) {
    let cores = config.cores_per_socket;
    let threads = cores.saturating_mul(config.threads_per_core);
    let (byte, word) = (|n: u32| n.min(0xFF) as u8, |n: u32| n.min(0xFFFE) as u16);
    let mut body = [0; 44];
    // Socket name, central processor, family "other", manufacturer.
    put(&mut body, 0, &[1, 3, 1, 2]);
    put(&mut body, 12, &[0]);
    // Populated and enabled; upgrade "other"; no cache structures.
    put(&mut body, 20, &[0x41, 1]);
    put(&mut body, 22, &[0xFF; 6]);
    put(&mut body, 31, &[byte(cores), byte(cores), byte(threads)]);
    // 64-bit capable, multi-core where it is.
    let characteristics: u16 = 1 << 2 | u16::from(cores > 1) << 3 | u16::from(threads > cores) << 4;
    put(&mut body, 34, &characteristics.to_le_bytes());
    put(&mut body, 36, &1u16.to_le_bytes());
    for (index, count) in [cores, cores, threads].into_iter().enumerate() {
        put(&mut body, 38 + index * 2, &word(count).to_le_bytes());
    }
    let name = format!("CPU {socket}");
    all.add(4, HANDLE_CPU.wrapping_add(socket), &body, &[&name, MANUFACTURER]);
}

/// Types 16, 17 and 19: the memory, in modules of at most [`MODULE_MAX`].
fn memory(all: &mut Structures, config: &SmbiosConfig<'_>) {
    let total = config.map.memory();
    let modules = total.div_ceil(MODULE_MAX).clamp(1, 0xFF) as u16;
    let mut body = [0; 19];
    // System board, system memory, multi-bit correction; capacity in the extended field, in bytes.
    put(&mut body, 0, &[3, 3, 6]);
    put(&mut body, 3, &0x8000_0000u32.to_le_bytes());
    put(&mut body, 7, &NO_HANDLE.to_le_bytes());
    put(&mut body, 9, &modules.to_le_bytes());
    put(&mut body, 11, &total.to_le_bytes());
    all.add(16, HANDLE_MEMORY, &body, &[]);
    for module in 0..modules {
        let size = total.saturating_sub(u64::from(module) * MODULE_MAX).min(MODULE_MAX);
        memory_module(all, module, size);
    }
    let ranges = [config.map.low_ram, config.map.high_ram];
    for (index, range) in ranges.into_iter().filter(|range| !range.is_empty()).enumerate() {
        mapped_memory(all, HANDLE_MAPPED + index as u16, range, modules.min(0xFF) as u8);
    }
}

fn memory_module(all: &mut Structures, module: u16, size: u64) {
    let mib = size >> 20;
    let mut body = [0; 36];
    put(&mut body, 0, &HANDLE_MEMORY.to_le_bytes());
    put(&mut body, 2, &NO_HANDLE.to_le_bytes());
    // Widths unknown; size in MiB where it fits, otherwise in the extended field.
    put(&mut body, 4, &[0xFF; 4]);
    let short = if mib < 0x7FFF { mib as u16 } else { 0x7FFF };
    put(&mut body, 8, &short.to_le_bytes());
    // DIMM, no set, locator, no bank, RAM, "other".
    put(&mut body, 10, &[9, 0, 1, 0, 7]);
    put(&mut body, 15, &2u16.to_le_bytes());
    body[19] = 2;
    if short == 0x7FFF {
        put(&mut body, 24, &(mib as u32).to_le_bytes());
    }
    let name = format!("DIMM {module}");
    all.add(17, HANDLE_MODULE.wrapping_add(module), &body, &[&name, MANUFACTURER]);
}

fn mapped_memory(all: &mut Structures, handle: u16, range: Range, modules: u8) {
    let mut body = [0; 27];
    // Addresses in KiB, the last one inclusive; in bytes in the extended fields when they do not fit.
    if range.end >> 10 <= u64::from(u32::MAX) {
        put(&mut body, 0, &((range.start >> 10) as u32).to_le_bytes());
        put(&mut body, 4, &(((range.end - 1) >> 10) as u32).to_le_bytes());
    } else {
        put(&mut body, 0, &[0xFF; 8]);
        put(&mut body, 11, &range.start.to_le_bytes());
        put(&mut body, 19, &(range.end - 1).to_le_bytes());
    }
    put(&mut body, 8, &HANDLE_MEMORY.to_le_bytes());
    body[10] = modules;
    all.add(19, handle, &body, &[]);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bytes::{u16_at, u32_at, u64_at};

    const UUID: [u8; 16] =
        [0, 0x11, 0x22, 0x33, 0x44, 0x55, 0x66, 0x77, 0x88, 0x99, 0xAA, 0xBB, 0xCC, 0xDD, 0xEE, 0xFF];

    fn config<'a>(map: &'a AddressMap, oem_strings: &'a [&'a str]) -> SmbiosConfig<'a> {
        SmbiosConfig {
            map,
            uuid: UUID,
            serial: "",
            version: "0.1",
            sockets: 2,
            cores_per_socket: 3,
            threads_per_core: 2,
            oem_strings,
        }
    }

    /// Walks structures: type, formatted part, strings.
    fn walk(mut bytes: &[u8]) -> Vec<(u8, Vec<u8>, Vec<String>)> {
        let mut found = Vec::new();
        while !bytes.is_empty() {
            let (formatted, rest) = bytes.split_at(usize::from(bytes[1]));
            let end = rest.windows(2).position(|pair| pair == [0, 0]).expect("strings end") + 2;
            let text = String::from_utf8(rest[..end - 2].to_vec()).unwrap();
            let strings = text.split('\0').filter(|s| !s.is_empty()).map(str::to_owned).collect();
            found.push((formatted[0], formatted.to_vec(), strings));
            bytes = &rest[end..];
        }
        found
    }

    #[test]
    fn both_entry_points_lead_to_structures_that_end_with_the_end_marker() {
        let map = AddressMap::new(40 * layout::GIB, 40 * layout::GIB).unwrap();
        let segments = build(&config(&map, &["io.example.key=value"])).unwrap();
        let [modern, legacy, table] = &segments[..] else { panic!("{}", segments.len()) };
        assert_eq!((&modern.data[..5], checksum(&modern.data)), (&b"_SM3_"[..], 0));
        assert_eq!(u64_at(&modern.data, 16), Some(table.address));
        assert_eq!(u32_at(&modern.data, 12), Some(table.data.len() as u32));
        assert_eq!((&legacy.data[..4], checksum(&legacy.data)), (&b"_SM_"[..], 0));
        assert_eq!(checksum(&legacy.data[16..]), 0);
        assert_eq!(u32_at(&legacy.data, 24), Some(table.address as u32));
        for segment in &segments {
            assert!(layout::SMBIOS_AREA.contains(&segment.range()) && segment.address % 16 == 0);
        }
        let structures = walk(&table.data);
        let kinds: Vec<u8> = structures.iter().map(|(kind, ..)| *kind).collect();
        assert_eq!(kinds, [0, 1, 3, 4, 4, 11, 16, 17, 17, 17, 19, 19, 32, 127]);
        assert_eq!(u16_at(&legacy.data, 28), Some(14));
        let (_, _, strings) = structures.iter().find(|(kind, ..)| *kind == 11).unwrap();
        assert_eq!(strings, &["io.example.key=value"]);
    }

    #[test]
    fn the_system_structure_has_the_name_and_the_uuid() {
        let map = AddressMap::new(layout::GIB, layout::GIB).unwrap();
        let segments = build(&config(&map, &[])).unwrap();
        let structures = walk(&segments[2].data);
        let (_, formatted, strings) = &structures[1];
        assert_eq!(strings, &["Atoll", "atoll-1", "0.1"]);
        assert_eq!(formatted[8..16], [0x33, 0x22, 0x11, 0, 0x55, 0x44, 0x77, 0x66]);
        assert_eq!(formatted[16..24], UUID[8..]);
        let (_, module, _) = structures.iter().find(|(kind, ..)| *kind == 17).unwrap();
        assert_eq!(u16_at(module, 12), Some(1024));
    }

    #[test]
    fn texts_fill_the_area_and_no_more() {
        let map = AddressMap::new(layout::GIB, layout::GIB).unwrap();
        let mut large = config(&map, &[]);
        large.sockets = 256;
        assert!(build(&large).is_ok());
        let long = "x".repeat(200);
        assert!(build(&config(&map, &vec![long.as_str(); 255])).is_ok());
        let too_long = "x".repeat(300);
        let error = build(&config(&map, &vec![too_long.as_str(); 255])).unwrap_err();
        assert!(matches!(error, SmbiosError::TooBig { size, available } if size > available), "{error}");
    }
}
