//! qcow2 images: every byte of one is untrusted. The input mutates an image that is well formed and holds data,
//! then works on it. What is damaged may be refused or fail; an image that was not changed has to hold what a
//! vector of bytes does.
#![no_main]

use std::sync::Arc;

use atoll_storage::disk::{Disk, read_bytes, write_bytes};
use atoll_storage::faulty::MemoryFile;
use atoll_storage::qcow2::{CreateOptions, Qcow2Disk, format_image};
use libfuzzer_sys::fuzz_target;

/// The most an image grows to, in bytes.
const LIMIT: u64 = 16 << 20;

fuzz_target!(|data: &[u8]| {
    let [shape, mutations, rest @ ..] = data else { return };
    let Some((disk, mut model)) = image(*shape) else { return };
    let mut bytes = disk;
    let (mutations, script) = rest.split_at(rest.len().min(usize::from(mutations % 16) * 4));
    for change in mutations.chunks_exact(4) {
        // Half of them in the header, the others in the first megabyte.
        let place = usize::from(u16::from_le_bytes([change[0], change[1]]));
        let place = if change[2] & 1 == 0 { place % 160 } else { place * 16 + usize::from(change[2] >> 4) };
        if let Some(byte) = bytes.get_mut(place) {
            *byte ^= change[3];
        }
    }
    let intact = mutations.chunks_exact(4).all(|change| change[3] == 0);
    let size = bytes.len() as u64;
    let Ok(disk) = Qcow2Disk::over(Arc::new(MemoryFile::new(bytes, LIMIT)), size, false, None) else {
        assert!(!intact, "an intact image was refused");
        return;
    };
    for step in script.chunks_exact(5) {
        let place =
            u64::from(u16::from_le_bytes([step[1], step[2]])) * 16 % disk.capacity_bytes().min(1 << 20);
        let len = (u64::from(u16::from_le_bytes([step[3], step[4]])) + 1).min(disk.capacity_bytes() - place);
        operate(&disk, &mut model, intact, (step[0], place, len));
    }
    let report = disk.check();
    if intact {
        assert!(report.is_ok_and(|report| report.is_clean()));
    } else {
        let _ = disk.repair();
    }
});

fn operate(disk: &dyn Disk, model: &mut [u8], intact: bool, (operation, place, len): (u8, u64, u64)) {
    let mut bytes = vec![operation | 1; len as usize];
    let result = match operation % 5 {
        0 => write_bytes(disk, place, &bytes),
        1 => disk.write_zeroes(place, len, operation & 8 != 0),
        2 => disk.discard(place, len),
        3 => disk.flush(),
        _ => Ok(()),
    };
    let read = read_bytes(disk, place, &mut bytes);
    if !intact {
        return;
    }
    assert!(result.is_ok() && read.is_ok(), "{result:?} {read:?}");
    let model = &mut model[place as usize..(place + len) as usize];
    match operation % 5 {
        0 => model.fill(operation | 1),
        1 => model.fill(0),
        2 => model.copy_from_slice(&bytes),
        _ => {}
    }
    assert!(model == bytes);
}

/// A well-formed image of one of many shapes, and what it holds.
fn image(shape: u8) -> Option<(Vec<u8>, Vec<u8>)> {
    let version = if shape & 0xc0 == 0 { 2 } else { 3 };
    let options = CreateOptions {
        size: 1 << 20,
        version,
        cluster_bits: 9 + u32::from(shape % 8),
        refcount_bits: if version == 2 { 16 } else { 1 << (shape >> 3) % 7 },
        extended_l2: version == 3 && shape % 8 >= 5 && shape & 0x80 != 0,
        ..Default::default()
    };
    let file = Arc::new(MemoryFile::new(Vec::new(), LIMIT));
    let size = format_image(&file, &options).ok()?;
    let disk = Qcow2Disk::over(file.clone(), size, false, None).ok()?;
    let mut model = vec![0; 1 << 20];
    for place in [0usize, 70_000, 300_000] {
        model[place..place + 5000].fill(0xa5);
        write_bytes(&disk, place as u64, &model[place..place + 5000]).ok()?;
    }
    drop(disk);
    Some((file.content(), model))
}
