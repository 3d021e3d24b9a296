//! First inputs, made by code instead of being kept.

use std::path::Path;

/// Writes `seeds` into every corpus folder of the command line, under names that say that they are seeds. To be
/// called before the fuzzer reads its corpus (`init:` of `fuzz_target!`).
///
/// # Panics
/// If a folder cannot be written to.
pub fn plant(seeds: impl IntoIterator<Item = Vec<u8>>) {
    let folders: Vec<String> =
        std::env::args().skip(1).filter(|a| !a.starts_with('-') && Path::new(a).is_dir()).collect();
    for (number, seed) in seeds.into_iter().enumerate() {
        for folder in &folders {
            let path = Path::new(folder).join(format!("seed-{number:03}"));
            std::fs::write(&path, &seed).unwrap_or_else(|e| panic!("cannot write {}: {e}", path.display()));
        }
    }
}

/// `count` seeds of `len` bytes without a plan, the same every time.
pub fn arbitrary(count: usize, len: usize) -> Vec<Vec<u8>> {
    let mut x = 0x9e37_79b9_7f4a_7c15u64;
    let mut byte = || {
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        (x >> 24) as u8
    };
    (0..count).map(|_| (0..len).map(|_| byte()).collect()).collect()
}
