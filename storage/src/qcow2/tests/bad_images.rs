//! Images that are damaged, hostile or not supported: one clear error, and the file left as it was.

use super::super::create;
use super::*;
use crate::error::OpenError;
use crate::format::open_disk;
use crate::raw::OpenOptions;

const WRITE: OpenOptions = OpenOptions { read_only: false };

fn small() -> CreateOptions {
    CreateOptions { size: 1 << 20, cluster_bits: 12, ..Default::default() }
}

/// An image with data, changed by `damage`, and what opening it for writing says.
fn refusal(damage: impl FnOnce(&mut Vec<u8>)) -> String {
    let (file, size) = memory_image(&small());
    let disk = open(file.clone(), size, None);
    write_bytes(&disk, 0, &vec![7; 64 << 10]).unwrap();
    drop(disk);
    let mut bytes = file.content();
    damage(&mut bytes);
    let file = Arc::new(MemoryFile::new(bytes.clone(), 1 << 30));
    let result = Qcow2Disk::over(file.clone(), bytes.len() as u64, false, None);
    assert!(file.content() == bytes, "a refused image was written to");
    result.err().expect("it is refused").to_string()
}

fn put(bytes: &mut [u8], at: usize, value: &[u8]) {
    bytes[at..at + value.len()].copy_from_slice(value);
}

#[test]
fn features_that_are_not_supported_are_refused_by_name() {
    assert!(refusal(|bytes| put(bytes, 32, &1u32.to_be_bytes())).contains("encrypted (AES)"));
    assert!(refusal(|bytes| put(bytes, 32, &2u32.to_be_bytes())).contains("encrypted (LUKS)"));
    assert!(refusal(|bytes| put(bytes, 79, &[1 << 2])).contains("external data file"));
    assert!(refusal(|bytes| put(bytes, 78, &[1])).contains("incompatible feature 8"));
    assert!(refusal(|bytes| put(bytes, 79, &[1 << 1])).contains("marked as corrupt"));
    assert!(refusal(|bytes| put(bytes, 7, &[4])).contains("version 4"));
}

#[test]
fn the_image_names_a_feature_that_nobody_knows() {
    let text = refusal(|bytes| {
        put(bytes, 78, &[1]);
        let mut extension = 0x6803_f857u32.to_be_bytes().to_vec();
        extension.extend_from_slice(&48u32.to_be_bytes());
        extension.extend_from_slice(&[0, 8]);
        extension.extend_from_slice(b"holograms");
        put(bytes, 112, &extension);
    });
    assert!(text.contains("incompatible feature 8 ('holograms')"), "{text}");
}

#[test]
fn numbers_that_cannot_be_are_refused() {
    let max = &u64::MAX.to_be_bytes();
    for (at, value) in [
        (20, &[0, 0, 0, 64][..]),
        (24, max),
        (36, &[0xff; 4]),
        (40, max),
        (48, max),
        (56, &[0xff; 4]),
        (96, &[9; 4]),
    ] {
        refusal(|bytes| put(bytes, at, value));
    }
    refusal(|bytes| put(bytes, 60, &[0, 0, 0, 9]));
    refusal(|bytes| put(bytes, 8, max));
    // L1 entry: into the header, unaligned, reserved bits, behind the end.
    for value in [0x8000_0000_0000_0200u64, 1 << 60, 0x00ff_0000_0000_0000, 0x1000] {
        refusal(|bytes| put(bytes, 0x3000, &value.to_be_bytes()));
    }
}

#[test]
fn a_truncated_image_is_refused() {
    assert!(refusal(|bytes| bytes.truncate(40)).contains("header"));
    assert!(refusal(|bytes| bytes.truncate(0x2800)).contains("not within the image"));
    assert!(refusal(|bytes| bytes.truncate(0x8000)).contains("truncated"));
}

#[test]
fn a_cluster_counted_as_free_is_refused_and_a_dirty_image_is_mended() {
    let wrong_count = |bytes: &mut Vec<u8>| put(bytes, 0x2000 + 2 * 6, &[0, 0]);
    assert!(refusal(wrong_count).contains("counted as free"));
    let (file, size) = memory_image(&small());
    let disk = open(file.clone(), size, None);
    write_bytes(&disk, 0, &vec![7; 64 << 10]).unwrap();
    drop(disk);
    let mut bytes = file.content();
    wrong_count(&mut bytes);
    bytes[79] |= 1;
    let file = Arc::new(MemoryFile::new(bytes, 1 << 30));
    let size = file.content().len() as u64;
    let disk = open(file.clone(), size, None);
    assert!(content(&disk)[..64 << 10].iter().all(|byte| *byte == 7));
    assert!(disk.check().unwrap().is_clean());
    assert_eq!(file.content()[79] & 1, 0, "the dirty bit stays");
}

#[test]
fn unknown_autoclear_features_are_cleared_before_the_first_change_only() {
    let (file, size) = memory_image(&small());
    let mut bytes = file.content();
    bytes[88] = 0x80;
    let file = Arc::new(MemoryFile::new(bytes, 1 << 30));
    drop(open(file.clone(), size, None));
    assert_eq!(file.content()[88], 0x80);
    let disk = open(file.clone(), size, None);
    write_bytes(&disk, 0, &[1; 512]).unwrap();
    assert_eq!(file.content()[88], 0);
}

#[test]
fn random_damage_never_panics() {
    for seed in 0..600 {
        let mut random = Random::new(seed);
        let mut options = random_options(&mut random);
        options.size = options.size.min(1 << 20);
        let (file, size) = memory_image(&options);
        let disk = open(file.clone(), size, None);
        let len = options.size.min(128 << 10);
        write_bytes(&disk, 0, &random_bytes(&mut random, len)).unwrap();
        drop(disk);
        let mut bytes = file.content();
        for _ in 0..1 + random.below(4) {
            let reach = if random.below(2) == 0 { 128 } else { bytes.len() as u64 };
            let at = random.below(reach) as usize;
            bytes[at] ^= 1 << random.below(8);
        }
        let size = bytes.len() as u64;
        let file = MemoryFile::new(bytes, 64 << 20);
        let Ok(disk) = Qcow2Disk::over(file, size, false, None) else { continue };
        if disk.capacity_bytes() > 64 << 20 {
            continue;
        }
        let capacity = disk.capacity_bytes();
        for _ in 0..10 {
            let offset = random.below(capacity);
            let mut bytes = vec![3; random.below(100_000).min(capacity - offset) as usize];
            let _ = write_bytes(&disk, offset, &bytes);
            let _ = read_bytes(&disk, offset, &mut bytes);
            let _ = disk.discard(offset, bytes.len() as u64);
            let _ = disk.flush();
        }
        let _ = disk.repair();
    }
}

#[test]
fn chains_are_opened_relative_to_the_image_and_loops_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    let over = |name: &str, format| CreateOptions { backing: Some((name.to_owned(), format)), ..small() };
    std::fs::write(path("base"), vec![5u8; 3000]).unwrap();
    create(&path("mid.qcow2"), &over("base", DiskFormat::Raw)).unwrap();
    create(&path("top.qcow2"), &over("mid.qcow2", DiskFormat::Qcow2)).unwrap();
    let disk = Qcow2Disk::open(path("top.qcow2"), WRITE).unwrap();
    let bytes = content(&disk);
    assert!(bytes[..3000].iter().all(|byte| *byte == 5) && bytes[3000..].iter().all(|byte| *byte == 0));
    // What is behind it is locked against writers, and itself against everybody.
    assert!(matches!(Qcow2Disk::open(path("mid.qcow2"), WRITE), Err(OpenError::InUse { .. })));
    assert!(matches!(Qcow2Disk::open(path("top.qcow2"), WRITE), Err(OpenError::InUse { .. })));
    drop(disk);
    create(&path("x.qcow2"), &over("y.qcow2", DiskFormat::Qcow2)).unwrap();
    create(&path("y.qcow2"), &over("x.qcow2", DiskFormat::Qcow2)).unwrap();
    let error = Qcow2Disk::open(path("x.qcow2"), WRITE).err().unwrap().to_string();
    assert!(error.contains("is its own backing image"), "{error}");
}

#[test]
fn a_header_in_a_raw_disk_decides_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("guest.img");
    create(&path, &small()).unwrap();
    let error = open_disk(&path, WRITE, None).err().unwrap();
    assert!(matches!(error, OpenError::Ambiguous(_)), "{error}");
    let size = std::fs::metadata(&path).unwrap().len();
    assert_eq!(open_disk(&path, WRITE, Some(DiskFormat::Raw)).unwrap().capacity_bytes(), size);
    assert_eq!(open_disk(&path, WRITE, Some(DiskFormat::Qcow2)).unwrap().capacity_bytes(), 1 << 20);
    let named = folder.path().join("a.qcow2");
    std::fs::rename(&path, &named).unwrap();
    assert_eq!(open_disk(&named, WRITE, None).unwrap().capacity_bytes(), 1 << 20);
    std::fs::write(&named, [0; 4096]).unwrap();
    assert!(matches!(open_disk(&named, WRITE, None), Err(OpenError::Corrupt { .. })));
}
