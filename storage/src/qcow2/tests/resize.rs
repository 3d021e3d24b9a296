//! Making disks larger.

use super::interop::{qemu_img, require_qemu_img};
use super::*;
use crate::disk::SECTOR_SIZE;
use crate::error::DiskErrorKind;
use crate::faulty::RecordingFile;

#[test]
fn what_a_larger_disk_gains_reads_as_zero_and_can_be_written() {
    for seed in 0..80 {
        let mut random = Random::new(seed ^ 0x9e0);
        let mut options = random_options(&mut random);
        // Behind the end of the disk the backing image goes on.
        let backing = (random.below(2) == 0).then(|| random_bytes(&mut random, options.size * 2));
        options.backing = backing.as_ref().and_then(|_| backing_name());
        let (file, size) = memory_image(&options);
        let disk = open(file.clone(), size, backing.clone().map(raw_backing));
        let mut model = content(&disk);
        for _ in 0..3 {
            (0..10).for_each(|_| random_operation(&disk, &mut model, &mut random, 512));
            // Far enough to need a longer L1 table now and then.
            let more = (1 + random.below(options.size / 512 * 4)) * SECTOR_SIZE;
            disk.resize(disk.capacity_bytes() + more).unwrap();
            model.resize(disk.capacity_bytes() as usize, 0);
            assert!(content(&disk) == model, "seed {seed}: {options:?}");
        }
        assert!(disk.check().unwrap().is_clean(), "seed {seed}: {options:?}");
        assert_eq!(disk.resize(512).unwrap_err().kind(), DiskErrorKind::Unsupported);
        drop(disk);
        let size = file.content().len() as u64;
        let disk = open(file, size, backing.map(raw_backing));
        assert!(content(&disk) == model, "seed {seed} after opening again");
    }
}

#[test]
fn a_power_cut_leaves_the_old_size_or_the_new_one() {
    let options = CreateOptions { size: 32 << 10, cluster_bits: 9, ..Default::default() };
    let (file, size) = memory_image(&options);
    let file = RecordingFile::new(file, size).unwrap();
    let log = file.log();
    let disk = open(file, size, None);
    let bytes = random_bytes(&mut Random::new(3), 32 << 10);
    write_bytes(&disk, 0, &bytes).unwrap();
    disk.flush().unwrap();
    let begin = log.len();
    // Many L1 entries more.
    disk.resize(16 << 20).unwrap();
    let end = log.len();
    std::mem::forget(disk);
    let mut random = Random::new(1);
    let (mut small, mut large) = (0, 0);
    for point in (begin..=end).cycle().take(300) {
        let cut = log.cut(point, random.next_u64());
        let size = cut.bytes.len() as u64;
        let disk = open(Arc::new(MemoryFile::new(cut.bytes, 1 << 30)), size, None);
        match disk.capacity_bytes() {
            0x8000 => small += 1,
            0x100_0000 => large += 1,
            other => panic!("{other} bytes"),
        }
        let found = content(&disk);
        assert!(found[..bytes.len()] == bytes && found[bytes.len()..].iter().all(|b| *b == 0), "at {point}");
        assert!(disk.check().unwrap().is_consistent(), "at {point}");
    }
    assert!(small > 0 && large > 0, "{small} {large}");
}

#[test]
fn qemu_img_agrees_with_a_larger_disk() {
    if !require_qemu_img() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("grown.qcow2");
    let options = CreateOptions { size: 1 << 20, cluster_bits: 9, ..Default::default() };
    let (file, size) = memory_image(&options);
    let disk = open(file.clone(), size, None);
    write_bytes(&disk, (1 << 20) - 512, &[5; 512]).unwrap();
    disk.resize(64 << 20).unwrap();
    write_bytes(&disk, (64 << 20) - 512, &[6; 512]).unwrap();
    drop(disk);
    std::fs::write(&path, file.content()).unwrap();
    let checked = qemu_img(&["check", "-f", "qcow2", path.to_str().unwrap()]);
    assert!(checked.status.success(), "{checked:?}");
    let info = qemu_img(&["info", "--output=json", "-f", "qcow2", path.to_str().unwrap()]);
    assert!(String::from_utf8_lossy(&info.stdout).contains("67108864"), "{info:?}");
}
