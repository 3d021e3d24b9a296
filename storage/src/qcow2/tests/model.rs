//! Random operations, compared with a vector of bytes.

use super::*;

const CASES: u64 = 300;
const OPERATIONS: u64 = 60;

#[test]
fn random_operations_leave_what_a_plain_vector_holds() {
    for seed in 0..CASES {
        let mut random = Random::new(seed);
        let mut options = random_options(&mut random);
        let backing = (random.below(2) == 0).then(|| {
            let len = 1 + random.below(options.size * 2);
            random_bytes(&mut random, len)
        });
        options.backing = backing.as_ref().and_then(|_| backing_name());
        let mut model = backing.clone().unwrap_or_default();
        model.resize(options.size as usize, 0);
        let (file, _) = memory_image(&options);
        let unit = if random.below(3) == 0 { 1 } else { 512 };
        for _ in 0..3 {
            let size = file.content().len() as u64;
            let disk = open(file.clone(), size, backing.clone().map(raw_backing));
            for _ in 0..OPERATIONS / 3 {
                random_operation(&disk, &mut model, &mut random, unit);
            }
            assert!(content(&disk) == model, "seed {seed}: {options:?}");
            let report = disk.check().unwrap();
            assert!(report.is_clean(), "seed {seed}: {report:?} {options:?}");
        }
        let size = file.content().len() as u64;
        let disk = Qcow2Disk::over(file, size, true, backing.map(raw_backing)).unwrap();
        assert!(content(&disk) == model, "seed {seed} after opening again");
    }
}

#[test]
fn released_clusters_are_used_again() {
    let (file, size) = memory_image(&CreateOptions { size: 1 << 20, cluster_bits: 12, ..Default::default() });
    let disk = open(file.clone(), size, None);
    for round in 0..20u8 {
        write_bytes(&disk, 0, &vec![round + 1; 1 << 20]).unwrap();
        disk.flush().unwrap();
        disk.discard(0, 1 << 20).unwrap();
        disk.flush().unwrap();
    }
    assert!(file.content().len() < 3 << 20, "{}", file.content().len());
}

#[test]
fn a_full_host_fails_the_write_and_loses_nothing() {
    let options = CreateOptions { size: 4 << 20, cluster_bits: 12, ..Default::default() };
    let empty = MemoryFile::new(Vec::new(), 1 << 20);
    let size = format_image(&empty, &options).unwrap();
    let file = Arc::new(MemoryFile::new(empty.content(), 256 << 10));
    let disk = open(file.clone(), size, None);
    let mut written = 0;
    let error = loop {
        match write_bytes(&disk, written, &[written as u8 | 1; 4096]) {
            Ok(()) => written += 4096,
            Err(error) => break error,
        }
    };
    assert_eq!(error.kind(), crate::DiskErrorKind::NoSpace);
    assert!(written >= 100 << 10, "{written}");
    // What was written before is still there, and so is the room for the tables: they are clusters like others.
    let bytes = content(&disk);
    assert!((0..written).step_by(4096).all(|at| bytes[at as usize] == at as u8 | 1));
    assert!(bytes[written as usize..].iter().all(|byte| *byte == 0));
}

#[test]
fn the_refcount_table_grows() {
    // 64 blocks of 64 counts: the first table covers 2 MiB.
    let options = CreateOptions { size: 12 << 20, cluster_bits: 9, refcount_bits: 64, ..Default::default() };
    let (file, size) = memory_image(&options);
    let model = random_bytes(&mut Random::new(1), 12 << 20);
    let disk = open(file.clone(), size, None);
    for (index, piece) in model.chunks(1 << 20).enumerate() {
        write_bytes(&disk, (index as u64) << 20, piece).unwrap();
    }
    assert!(disk.check().unwrap().is_clean());
    drop(disk);
    let size = file.content().len() as u64;
    let disk = open(file, size, None);
    assert!(content(&disk) == model);
    assert!(disk.check().unwrap().is_clean());
}
