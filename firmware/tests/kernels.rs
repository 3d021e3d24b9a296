//! Each kind of kernel: where its parts go, what it is told, and what is said when it cannot start.

mod images;

use atoll_firmware::acpi::{self, AcpiConfig, CpuEntry, FixedDevices};
use atoll_firmware::entry::{RAX, RBX, RSI};
use atoll_firmware::layout::{self, AddressMap, E820Entry, GIB, Range};
use atoll_firmware::{EntryMode, KernelKind, LoadError, LoadParams, LoadedKernel, Segment, load};
use images::{Part, bzimage, elf32, elf64, multiboot_header, put, pvh_notes};

const MIB: u64 = 1 << 20;

fn map(memory: u64) -> AddressMap {
    AddressMap::new(memory, memory).unwrap()
}

/// The ranges that the ACPI tables of a machine take.
fn reserved(map: &AddressMap) -> Vec<E820Entry> {
    let cpus = [CpuEntry { apic_id: 0, present: true }];
    let devices = FixedDevices { com1: true, i8042: true, pvpanic: true, vga: false };
    acpi::build(&AcpiConfig { map, cpus: &cpus, root_ports: &[], devices }).unwrap().regions
}

fn load_in<'a>(
    memory: u64,
    kernel: &'a [u8],
    initrd: Option<&'a [u8]>,
    cmdline: &str,
) -> Result<LoadedKernel<'a>, LoadError> {
    let map = map(memory);
    let reserved = reserved(&map);
    let params = LoadParams {
        map: &map,
        rsdp_address: layout::RSDP_ADDRESS,
        reserved: &reserved,
        kernel_name: "test.elf",
    };
    let loaded = load(kernel, initrd, cmdline, &params)?;
    assert_segments_are_apart(&loaded, &map, &reserved);
    Ok(loaded)
}

fn assert_segments_are_apart(loaded: &LoadedKernel<'_>, map: &AddressMap, reserved: &[E820Entry]) {
    let usable = map.usable_ram(reserved);
    let mut ranges: Vec<Range> = loaded.segments.iter().map(Segment::range).collect();
    ranges.sort_by_key(|range| range.start);
    for pair in ranges.windows(2) {
        assert!(pair[0].end <= pair[1].start, "{:?} overlap", pair);
    }
    for range in ranges {
        assert!(usable.iter().any(|ram| ram.contains(&range)), "{range} is not usable RAM");
    }
}

fn segment<'a, 'b>(loaded: &'b LoadedKernel<'a>, what: &str) -> &'b Segment<'a> {
    loaded.segments.iter().find(|segment| segment.what == what).unwrap_or_else(|| panic!("no {what}"))
}

fn number(data: &[u8], offset: usize, size: usize) -> u64 {
    let mut bytes = [0; 8];
    bytes[..size].copy_from_slice(&data[offset..offset + size]);
    u64::from_le_bytes(bytes)
}

#[test]
fn a_64_bit_bzimage_starts_at_its_preferred_address_in_long_mode() {
    let kernel = bzimage(100_000);
    let initrd = vec![7; 5000];
    let loaded = load_in(64 * MIB, &kernel, Some(&initrd), "console=ttyS0").unwrap();
    assert_eq!(loaded.kind, KernelKind::Linux64);
    assert_eq!(loaded.entry.mode, EntryMode::Long64);
    assert_eq!(loaded.entry.rip, 0x100_0200);
    assert_eq!(loaded.entry.gpr[RSI], layout::BOOT_PARAMS);
    assert_eq!(loaded.entry.cr3, layout::BOOT_PAGE_TABLES);
    let image = segment(&loaded, "the Linux kernel");
    assert_eq!((image.address, &*image.data), (0x100_0000, &kernel[1024..]));
    assert_eq!(&*segment(&loaded, "command line").data, b"console=ttyS0\0");

    let params = &segment(&loaded, "boot parameters").data;
    assert_eq!(number(params, 0x070, 8), layout::RSDP_ADDRESS);
    assert_eq!(&params[0x202..0x206], b"HdrS");
    assert_eq!(number(params, 0x210, 1), 0xFF);
    assert_eq!(number(params, 0x228, 4), layout::BOOT_CMDLINE);
    let place = loaded.initrd.unwrap();
    assert_eq!(number(params, 0x218, 4), place.start);
    assert_eq!(number(params, 0x21C, 4), 5000);
    assert_eq!(place.start % 4096, 0);
    assert_eq!(segment(&loaded, "initial RAM disk").address, place.start);
}

#[test]
fn boot_parameters_carry_the_memory_map_with_the_ecam_window() {
    let kernel = bzimage(1000);
    let loaded = load_in(5 * GIB, &kernel, None, "").unwrap();
    let params = &segment(&loaded, "boot parameters").data;
    let count = number(params, 0x1E8, 1) as usize;
    let entries: Vec<(u64, u64, u64)> = (0..count)
        .map(|index| 0x2D0 + index * 20)
        .map(|at| (number(params, at, 8), number(params, at + 8, 8), number(params, at + 16, 4)))
        .collect();
    assert_eq!(entries[0], (0, layout::EBDA.start, 1));
    assert!(entries.contains(&(layout::ECAM_BASE, 256 * MIB, 2)), "{entries:x?}");
    assert!(entries.contains(&(4 * GIB, 2 * GIB, 1)), "{entries:x?}");
    assert!(entries.iter().any(|entry| entry.2 == 3), "{entries:x?}");
}

#[test]
fn a_kernel_without_the_64_bit_entry_starts_in_protected_mode() {
    let mut kernel = bzimage(1000);
    put(&mut kernel, 0x236, &0u16.to_le_bytes());
    put(&mut kernel, 0x234, &[0]);
    let loaded = load_in(64 * MIB, &kernel, None, "").unwrap();
    assert_eq!(loaded.kind, KernelKind::Linux32);
    assert_eq!((loaded.entry.rip, loaded.entry.cr0 >> 31, loaded.entry.efer), (MIB, 0, 0));
}

#[test]
fn an_initrd_stays_below_the_limit_that_the_kernel_names() {
    let mut kernel = bzimage(1000);
    put(&mut kernel, 0x22C, &0x2FF_FFFFu32.to_le_bytes());
    let initrd = vec![1; 4097];
    let loaded = load_in(256 * MIB, &kernel, Some(&initrd), "").unwrap();
    assert_eq!(loaded.initrd, Some(Range { start: 0x2FF_E000, end: 0x2FF_F001 }));
}

#[test]
fn an_initrd_that_does_not_fit_beside_the_unpacked_kernel_is_refused_with_its_sizes() {
    // The kernel takes 16 to 24 MiB of 32 MiB.
    let kernel = bzimage(1000);
    let initrd = vec![1; 9 << 20];
    match load_in(32 * MIB, &kernel, Some(&initrd), "") {
        Err(LoadError::InitrdTooBig { size, available }) => {
            assert_eq!(size, 9 << 20);
            assert!((7 << 20..8 << 20).contains(&available), "{available}");
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_kernel_that_unpacks_beyond_the_memory_is_refused() {
    let kernel = bzimage(1000);
    let error = load_in(20 * MIB, &kernel, None, "").unwrap_err();
    assert!(matches!(error, LoadError::NeedsMoreMemory { .. }), "{error}");
    assert!(error.to_string().contains("more memory"), "{error}");
}

#[test]
fn a_command_line_is_limited_by_the_kernel_and_has_no_nul() {
    let kernel = bzimage(1000);
    assert!(load_in(64 * MIB, &kernel, None, &"x".repeat(2047)).is_ok());
    let error = load_in(64 * MIB, &kernel, None, &"x".repeat(2048)).unwrap_err();
    assert_eq!(error, LoadError::CommandLineTooLong { length: 2048, max: 2047 });
    assert_eq!(load_in(64 * MIB, &kernel, None, "a\0b").unwrap_err(), LoadError::CommandLineNul);
}

#[test]
fn old_and_low_kernels_are_refused_by_name() {
    let mut kernel = bzimage(1000);
    put(&mut kernel, 0x206, &0x0203u16.to_le_bytes());
    let error = load_in(64 * MIB, &kernel, None, "").unwrap_err().to_string();
    assert!(error.contains("protocol 2.03"), "{error}");
    let mut kernel = bzimage(1000);
    put(&mut kernel, 0x211, &[0]);
    assert!(load_in(64 * MIB, &kernel, None, "").unwrap_err().to_string().contains("zImage"));
}

#[test]
fn every_truncation_of_every_image_is_an_error_and_never_a_panic() {
    let entry = MIB + 0x10;
    let notes = pvh_notes(entry, 4);
    let header = multiboot_header(0, None);
    let code = [0x90; 64];
    let multiboot_code = [&header[..], &code].concat();
    let note = || Part {
        kind: 4,
        virtual_address: 0,
        physical_address: 0,
        data: &notes,
        memory_size: notes.len() as u64,
    };
    let images = [
        bzimage(512),
        elf64(entry, &[note(), images::load(MIB, &code)]),
        elf32(entry as u32, &[note(), images::load(MIB, &code)]),
        elf64(entry, &[images::load(MIB, &code)]),
        elf32(entry as u32, &[images::load(MIB, &multiboot_code)]),
    ];
    for image in &images {
        assert!(load_in(64 * MIB, image, None, "").is_ok());
        for length in 0..image.len() {
            // The sizes of a bzImage are in 16 bytes: one that is up to 15 bytes short is whole.
            let whole = image.starts_with(&[0]) && image.len() - length < 16;
            assert_eq!(load_in(64 * MIB, &image[..length], None, "").is_ok(), whole, "length {length}");
        }
    }
}

#[test]
fn a_pvh_note_decides_for_the_pvh_entry() {
    for value_size in [4, 8] {
        let notes = pvh_notes(0x20_0040, value_size);
        let code = [0x90; 4096];
        let note = Part {
            kind: 4,
            virtual_address: 0,
            physical_address: 0,
            data: &notes,
            memory_size: notes.len() as u64,
        };
        let kernel = elf64(0xFFFF_FFFF_8100_0000, &[images::load(0x20_0000, &code), note]);
        let initrd = [3; 100];
        let loaded = load_in(64 * MIB, &kernel, Some(&initrd), "quiet").unwrap();
        assert_eq!(loaded.kind, KernelKind::Pvh);
        assert_eq!(loaded.entry.mode, EntryMode::Protected32);
        assert_eq!(loaded.entry.rip, 0x20_0040);
        assert_eq!(loaded.entry.gpr[RBX], layout::BOOT_INFO);
        let info = segment(&loaded, "start information");
        assert_eq!(number(&info.data, 0, 4), 0x336E_C578);
        assert_eq!(number(&info.data, 4, 4), 1);
        assert_eq!(number(&info.data, 24, 8), layout::BOOT_CMDLINE);
        assert_eq!(number(&info.data, 32, 8), layout::RSDP_ADDRESS);
        let module = (number(&info.data, 16, 8) - info.address) as usize;
        assert_eq!(number(&info.data, module, 8), loaded.initrd.unwrap().start);
        assert_eq!(number(&info.data, module + 8, 8), 100);
        let entries = (number(&info.data, 40, 8) - info.address) as usize;
        assert_eq!(number(&info.data, entries + 8, 8), layout::EBDA.start);
        assert_eq!(number(&info.data, entries + 16, 4), 1);
        assert_eq!(entries + number(&info.data, 48, 4) as usize * 24, info.data.len());
    }
}

#[test]
fn an_elf_kernel_linked_high_is_entered_at_its_physical_address() {
    let code = [0x90; 300];
    let part = Part {
        kind: 1,
        virtual_address: 0xFFFF_FFFF_8100_0000,
        physical_address: 0x100_0000,
        data: &code,
        memory_size: 0x5000,
    };
    let kernel = elf64(0xFFFF_FFFF_8100_0020, &[part]);
    let loaded = load_in(64 * MIB, &kernel, None, "").unwrap();
    assert_eq!((loaded.kind, loaded.entry.rip), (KernelKind::Elf64, 0x100_0020));
    let segment = segment(&loaded, "an ELF segment");
    assert_eq!((segment.data.len(), segment.zero_after), (300, 0x5000 - 300));
    let loaded = load_in(64 * MIB, &kernel, None, "").unwrap();
    assert_eq!(loaded.entry.gpr[RSI], layout::BOOT_PARAMS);
}

#[test]
fn elf_segments_outside_the_memory_or_on_each_other_are_refused() {
    let code = [0x90; 64];
    let far = elf64(MIB, &[images::load(MIB, &code), images::load(3 * GIB, &code)]);
    assert!(matches!(load_in(64 * MIB, &far, None, ""), Err(LoadError::NeedsMoreMemory { .. })));
    let legacy = elf64(MIB, &[images::load(0xF_0000, &code)]);
    assert!(matches!(load_in(64 * MIB, &legacy, None, ""), Err(LoadError::NeedsMoreMemory { .. })));
    let low = elf64(0x7000, &[images::load(0x7000, &code)]);
    assert!(matches!(load_in(64 * MIB, &low, None, ""), Err(LoadError::Overlap { .. })));
    let twice = elf64(MIB, &[images::load(MIB, &code), images::load(MIB + 63, &code)]);
    let error = load_in(64 * MIB, &twice, None, "").unwrap_err();
    assert!(matches!(error, LoadError::Overlap { at, .. } if at == MIB + 63), "{error}");
    let wrap = elf64(MIB, &[images::load(u64::MAX - 10, &code)]);
    assert!(matches!(load_in(64 * MIB, &wrap, None, ""), Err(LoadError::Invalid { .. })));
}

#[test]
fn a_multiboot_elf_gets_its_magic_its_name_and_its_module() {
    let header = multiboot_header(3, None);
    let code = [&header[..], &[0x90; 100]].concat();
    let kernel = elf32(0x40_000C, &[images::load(0x40_0000, &code)]);
    let initrd = [9; 10];
    let loaded = load_in(64 * MIB, &kernel, Some(&initrd), "a b").unwrap();
    assert_eq!(loaded.kind, KernelKind::Multiboot);
    assert_eq!(loaded.entry.rip, 0x40_000C);
    assert_eq!(loaded.entry.gpr[RAX], 0x2BAD_B002);
    assert_eq!(&*segment(&loaded, "command line").data, b"test.elf a b\0");
    let info = segment(&loaded, "Multiboot information");
    assert_eq!(loaded.entry.gpr[RBX], info.address);
    assert_eq!(number(&info.data, 4, 4), 639);
    assert_eq!(number(&info.data, 20, 4), 1);
    let module = (number(&info.data, 24, 4) - info.address) as usize;
    let place = loaded.initrd.unwrap();
    assert_eq!(place, Range { start: 0x40_1000, end: 0x40_100A });
    assert_eq!((number(&info.data, module, 4), number(&info.data, module + 4, 4)), (place.start, place.end));
    let entries = (number(&info.data, 48, 4) - info.address) as usize;
    assert_eq!(entries + number(&info.data, 44, 4) as usize, info.data.len());
    assert_eq!(number(&info.data, entries, 4), 20);
}

#[test]
fn a_multiboot_image_with_load_addresses_needs_no_elf() {
    let header_address = 0x10_0010u32;
    // Loads from the byte 16 before the header, 64 bytes, zeros up to 0x200.
    let addresses = [header_address, 0x10_0000, 0x10_0040, 0x10_0200, 0x10_0030];
    let mut kernel = vec![0xCC; 8 + 16];
    kernel.extend(multiboot_header(1 << 16, Some(addresses)));
    kernel.extend([0x90; 100]);
    let loaded = load_in(16 * MIB, &kernel, None, "").unwrap();
    let image = segment(&loaded, "the Multiboot image");
    assert_eq!((image.address, &*image.data, image.zero_after), (MIB, &kernel[8..72], 0x1C0));
    assert_eq!(loaded.entry.rip, 0x10_0030);

    let mut wrong = vec![0xCC; 8];
    wrong.extend(multiboot_header(1 << 16, Some(addresses)));
    wrong.extend([0x90; 100]);
    assert!(matches!(load_in(16 * MIB, &wrong, None, ""), Err(LoadError::Invalid { .. })));
}

#[test]
fn a_multiboot_kernel_may_lie_in_low_memory_but_not_over_its_information() {
    let header = multiboot_header(0, None);
    let low = elf32(0x8000, &[images::load(0x8000, &header)]);
    assert!(load_in(16 * MIB, &low, None, "").is_ok());
    for address in [0x5000, 0x2_0000] {
        let over = elf32(address, &[images::load(u64::from(address), &header)]);
        assert!(matches!(load_in(16 * MIB, &over, None, ""), Err(LoadError::Overlap { .. })), "{address:#x}");
    }
}

#[test]
fn multiboot_features_that_nobody_knows_are_refused() {
    let header = multiboot_header(1 << 5, None);
    let kernel = elf32(MIB as u32, &[images::load(MIB, &header)]);
    assert!(matches!(load_in(16 * MIB, &kernel, None, ""), Err(LoadError::Unsupported { .. })));
}

#[test]
fn a_file_that_is_no_kernel_is_told_what_would_be_one() {
    for (data, word) in [(&b"#!/bin/sh\n"[..], "script"), (b"\x1f\x8b\x08", "gzip"), (b"", "empty")] {
        let error = load_in(64 * MIB, data, None, "").unwrap_err().to_string();
        assert!(error.starts_with("not a kernel") && error.contains(word), "{error}");
    }
    let interpreter =
        Part { kind: 3, virtual_address: 0, physical_address: 0, data: b"/lib/ld.so\0", memory_size: 11 };
    let program = elf64(MIB, &[interpreter, images::load(MIB, &[0; 8])]);
    assert!(load_in(64 * MIB, &program, None, "").unwrap_err().to_string().contains("program"));
    let mut arm = elf64(MIB, &[images::load(MIB, &[0; 8])]);
    put(&mut arm, 18, &183u16.to_le_bytes());
    assert!(load_in(64 * MIB, &arm, None, "").unwrap_err().to_string().contains("183"));
}
