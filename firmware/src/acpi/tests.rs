use super::*;
use crate::bytes::{u32_at, u64_at};

const DEVICES: FixedDevices = FixedDevices { com1: true, i8042: true, pvpanic: true, vga: false };

fn image(memory: u64, max: u64, cpus: &[CpuEntry]) -> AcpiImage {
    let map = AddressMap::new(memory, max).unwrap();
    build(&AcpiConfig { map: &map, cpus, root_ports: &[], devices: DEVICES }).unwrap()
}

fn two_cpus() -> [CpuEntry; 2] {
    [CpuEntry { apic_id: 0, present: true }, CpuEntry { apic_id: 1, present: true }]
}

fn find<'a>(image: &'a AcpiImage, signature: &[u8; 4]) -> &'a Table {
    image.tables.iter().find(|table| &table.signature == signature).expect("table is built")
}

#[test]
fn every_table_sums_to_zero_and_tells_its_length() {
    let image = image(256 << 20, 1 << 30, &two_cpus());
    for table in &image.tables {
        match &table.signature {
            b"FACS" => assert_eq!(table.bytes.len(), 64),
            b"RSD " => {
                assert_eq!(checksum(&table.bytes[..20]), 0);
                assert_eq!(checksum(&table.bytes), 0);
            }
            _ => {
                assert_eq!(checksum(&table.bytes), 0, "{:?}", table.signature);
                assert_eq!(u32_at(&table.bytes, 4), Some(table.bytes.len() as u32));
            }
        }
    }
}

#[test]
fn the_root_pointer_leads_to_every_table() {
    let image = image(256 << 20, 1 << 30, &two_cpus());
    let rsdp = find(&image, b"RSD ");
    assert_eq!(rsdp.address, image.rsdp_address);
    let at = |address: u64| image.tables.iter().find(|table| table.address == address).unwrap();
    let xsdt = at(u64_at(&rsdp.bytes, 24).unwrap());
    let rsdt = at(u64::from(u32_at(&rsdp.bytes, 16).unwrap()));
    let entries: Vec<u64> = xsdt.bytes[36..].chunks(8).map(|b| u64_at(b, 0).unwrap()).collect();
    let short: Vec<u64> = rsdt.bytes[36..].chunks(4).map(|b| u64::from(u32_at(b, 0).unwrap())).collect();
    assert_eq!(entries, short);
    let signatures: Vec<[u8; 4]> = entries.iter().map(|address| at(*address).signature).collect();
    assert_eq!(signatures, [*b"FACP", *b"APIC", *b"MCFG", *b"WAET", *b"SRAT"]);
    let fadt = find(&image, b"FACP");
    assert_eq!(&at(u64_at(&fadt.bytes, 140).unwrap()).signature, b"DSDT");
    assert_eq!(&at(u64::from(u32_at(&fadt.bytes, 36).unwrap())).signature, b"FACS");
}

#[test]
fn tables_stay_inside_their_regions_and_apart() {
    let image = image(64 << 20, 64 << 20, &two_cpus());
    let mut ranges: Vec<Range> = image.segments().map(|segment| segment.range()).collect();
    ranges.sort_by_key(|range| range.start);
    assert!(ranges.windows(2).all(|pair| pair[0].end <= pair[1].start));
    for table in image.tables.iter().filter(|table| &table.signature != b"RSD ") {
        let range = Range::sized(table.address, table.bytes.len() as u64).unwrap();
        assert!(image.regions.iter().any(|region| region.range.contains(&range)), "{range}");
    }
    assert_eq!(image.regions.last().unwrap().range.end, 64 << 20);
}

#[test]
fn absent_processors_are_online_capable_and_large_ids_use_x2apic() {
    let cpus = [
        CpuEntry { apic_id: 0, present: true },
        CpuEntry { apic_id: 254, present: false },
        CpuEntry { apic_id: 255, present: true },
    ];
    let image = image(64 << 20, 64 << 20, &cpus);
    let madt = &find(&image, b"APIC").bytes[44..];
    assert_eq!(&madt[..8], [0, 8, 0, 0, 1, 0, 0, 0]);
    assert_eq!(&madt[8..16], [0, 8, 1, 254, 2, 0, 0, 0]);
    assert_eq!(&madt[16..32], [9, 16, 0, 0, 255, 0, 0, 0, 1, 0, 0, 0, 2, 0, 0, 0]);
}

#[test]
fn memory_affinity_exists_only_when_memory_can_be_added() {
    let fixed = image(64 << 20, 64 << 20, &two_cpus());
    assert!(!fixed.tables.iter().any(|table| &table.signature == b"SRAT"));
    let growing = image(64 << 20, 128 << 20, &two_cpus());
    let srat = find(&growing, b"SRAT");
    let last = &srat.bytes[srat.bytes.len() - 40..];
    assert_eq!(u64_at(last, 8), Some(layout::HIGH_RAM_BASE));
    assert_eq!(u64_at(last, 16), Some(64 << 20));
    assert_eq!(u32_at(last, 28), Some(3));
}

#[test]
fn descriptions_that_contradict_themselves_are_refused() {
    let map = AddressMap::new(64 << 20, 64 << 20).unwrap();
    let try_build = |cpus: &[CpuEntry], root_ports: &[RootPort]| {
        build(&AcpiConfig { map: &map, cpus, root_ports, devices: DEVICES }).map(|_| ())
    };
    assert_eq!(try_build(&[], &[]), Err(AcpiError::CpuCount { count: 0 }));
    let same = [CpuEntry { apic_id: 3, present: true }; 2];
    assert_eq!(try_build(&same, &[]), Err(AcpiError::DuplicateApicId { apic_id: 3 }));
    let port = RootPort { device: 32, function: 0, slot: 1 };
    assert!(matches!(try_build(&two_cpus(), &[port]), Err(AcpiError::RootPort { .. })));
    let port = RootPort { device: 2, function: 0, slot: 1 };
    assert!(matches!(try_build(&two_cpus(), &[port, port]), Err(AcpiError::RootPort { .. })));
}

#[test]
fn a_thousand_processors_fit_into_the_smallest_machine() {
    let cpus: Vec<CpuEntry> =
        (0..MAX_CPUS as u32).map(|apic_id| CpuEntry { apic_id, present: true }).collect();
    let large = image(layout::MIN_MEMORY, layout::MIN_MEMORY, &cpus);
    assert!(find(&large, b"DSDT").bytes.len() > MAX_CPUS * 20);
    assert!(large.regions[0].range.start > layout::MIN_MEMORY / 2);
}
