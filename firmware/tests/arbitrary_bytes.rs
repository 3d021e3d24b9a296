//! Whatever the bytes are: no panic, and what is accepted lies in RAM, apart, without more data than was given.

mod images;

use atoll_firmware::layout::{self, AddressMap, E820Entry, E820Kind, Range};
use atoll_firmware::{LoadParams, Segment, load};
use images::{Part, bzimage, elf32, elf64, multiboot_header, pvh_notes};
use proptest::prelude::*;

/// Loads into a small machine and checks what comes out.
fn check(kernel: &[u8], initrd: Option<&[u8]>, cmdline: &str, mib: u64) {
    let map = AddressMap::new(mib << 20, mib << 20).unwrap();
    let top = map.low_ram.end;
    let reserved = [E820Entry { range: Range { start: top - 0x2000, end: top }, kind: E820Kind::AcpiData }];
    let params = LoadParams {
        map: &map,
        rsdp_address: layout::RSDP_ADDRESS,
        reserved: &reserved,
        kernel_name: "kernel",
    };
    let Ok(loaded) = load(kernel, initrd, cmdline, &params) else { return };
    let usable = map.usable_ram(&reserved);
    let mut ranges: Vec<Range> = loaded.segments.iter().map(Segment::range).collect();
    ranges.sort_by_key(|range| range.start);
    assert!(ranges.windows(2).all(|pair| pair[0].end <= pair[1].start), "{ranges:?}");
    assert!(ranges.iter().all(|range| usable.iter().any(|ram| ram.contains(range))), "{ranges:?}");
    let owned: usize = loaded
        .segments
        .iter()
        .map(|segment| if let std::borrow::Cow::Owned(data) = &segment.data { data.len() } else { 0 })
        .sum();
    assert!(owned < 64 << 10, "{owned} bytes allocated");
    assert!(loaded.entry.rip < 1 << 32);
}

/// Images that are right, for damaging.
fn sound_images() -> Vec<Vec<u8>> {
    let notes = pvh_notes(0x10_0010, 4);
    let header = multiboot_header(3, None);
    let flat = multiboot_header(1 << 16, Some([0x10_0000, 0x10_0000, 0, 0x10_1000, 0x10_0020]));
    let code = [&header[..], &[0x90; 200]].concat();
    let plain = [0x90; 200];
    let note = || Part { kind: 4, virtual_address: 0, physical_address: 0, data: &notes, memory_size: 40 };
    vec![
        bzimage(2000),
        elf64(0x10_0010, &[note(), images::load(0x10_0000, &plain)]),
        elf32(0x10_0010, &[note(), images::load(0x10_0000, &plain), images::load(0x20_0000, &plain)]),
        elf64(0x10_0010, &[images::load(0x10_0000, &plain)]),
        elf32(0x10_0010, &[images::load(0x10_0000, &code)]),
        [&flat[..], &plain].concat(),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig {
        // `PROPTEST_CASES` asks for more.
        cases: ProptestConfig::default().cases.max(4096),
        failure_persistence: None,
        ..ProptestConfig::default()
    })]

    #[test]
    fn random_bytes_never_panic(kernel in prop::collection::vec(any::<u8>(), 0..4096), mib in 4u64..64) {
        check(&kernel, None, "quiet", mib);
    }

    #[test]
    fn damaged_headers_never_panic(
        which in 0usize..6,
        damage in prop::collection::vec((0usize..1200, any::<u8>()), 0..12),
        length in prop::option::of(0usize..3000),
        initrd in prop::option::of(0usize..100_000),
        cmdline in "[ -~]{0,64}",
        mib in 4u64..64,
    ) {
        let mut kernel = sound_images().swap_remove(which);
        for (offset, byte) in damage {
            let offset = offset % kernel.len();
            kernel[offset] = byte;
        }
        if let Some(length) = length {
            kernel.truncate(length);
        }
        let initrd = initrd.map(|size| vec![0; size]);
        check(&kernel, initrd.as_deref(), &cmdline, mib);
    }

    #[test]
    fn extreme_numbers_in_headers_never_panic(
        which in 0usize..6,
        fields in prop::collection::vec((0usize..300, prop::sample::select(vec![
            0u64, 1, 0x7FFF_FFFF, 0x8000_0000, 0xFFFF_FFFF, 0xFFFF_F000, u64::MAX, u64::MAX - 0xFFF, 1 << 63, 0x10_0000,
        ])), 1..6),
    ) {
        let mut kernel = sound_images().swap_remove(which);
        let base = if which == 0 { 0x1F0 } else { 0 };
        for (offset, value) in fields {
            let at = base + offset;
            for (index, byte) in value.to_le_bytes().into_iter().enumerate() {
                // The magic numbers stay, so that the fields behind them are read.
                if let Some(place) = kernel.get_mut(at + index)
                    && !(which == 0 && (0x1FE..0x212).contains(&(at + index)))
                    && !(which != 0 && at + index < 20)
                {
                    *place = byte;
                }
            }
        }
        check(&kernel, Some(&[1; 5000]), "a=b", 32);
    }
}
