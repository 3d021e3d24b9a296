//! Kernel images: every byte of one is untrusted. The input is a command line up to its first NUL byte, then
//! the image. Whatever is loaded must lie in RAM and must not overlap.
#![no_main]

use atoll_firmware::layout::AddressMap;
use atoll_firmware::{LoadParams, load};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let (cmdline, kernel) = match data.iter().position(|byte| *byte == 0) {
        Some(at) => data.split_at(at),
        None => (&[][..], data),
    };
    let Ok(cmdline) = std::str::from_utf8(cmdline) else { return };
    let Ok(map) = AddressMap::new(256 << 20, 256 << 20) else { return };
    let initrd = [0x30; 1000];
    for initrd in [None, Some(&initrd[..])] {
        let params = LoadParams { map: &map, rsdp_address: 0xe_0000, reserved: &[], kernel_name: "kernel" };
        let Ok(loaded) = load(kernel, initrd, cmdline, &params) else { continue };
        let mut ranges: Vec<(u64, u64)> =
            loaded.segments.iter().map(|s| (s.range().start, s.range().end)).collect();
        ranges.sort_unstable();
        for pair in ranges.windows(2) {
            assert!(pair[0].1 <= pair[1].0, "segments overlap: {pair:x?}");
        }
        assert!(
            ranges.iter().all(|(start, end)| start <= end && *end <= 256 << 20),
            "outside RAM: {ranges:x?}"
        );
    }
});
