//! Tests of the format as a whole: against a model, against `qemu-img`, with power cuts, and with damage.

mod bad_images;
mod corpus;
mod interop;
mod model;
mod parallel;
mod power;
mod resize;

use std::sync::Arc;

use super::{Compression, CreateOptions, Qcow2Disk, format_image};
use crate::disk::{Disk, read_bytes, write_bytes};
use crate::faulty::{MemoryFile, Random};
use crate::file::ImageFile;
use crate::format::DiskFormat;
use crate::raw::{RawDisk, RawGeometry};

/// Options of every kind, by chance. The size is small where clusters are small.
fn random_options(random: &mut Random) -> CreateOptions {
    let version = if random.below(4) == 0 { 2 } else { 3 };
    let cluster_bits = 9 + random.below(13) as u32;
    let new = version == 3;
    let largest = (1u64 << cluster_bits) * 40;
    CreateOptions {
        size: (1 + random.below(largest.min(6 << 20) / 512)) * 512,
        version,
        cluster_bits,
        refcount_bits: if new { 1 << random.below(7) } else { 16 },
        extended_l2: new && cluster_bits >= 14 && random.below(2) == 0,
        lazy_refcounts: new && random.below(4) == 0,
        compression: if new && random.below(2) == 0 { Compression::Zstd } else { Compression::Deflate },
        backing: None,
    }
}

/// Bytes that are easy to tell apart.
fn random_bytes(random: &mut Random, len: u64) -> Vec<u8> {
    let mut bytes: Vec<u8> = Vec::with_capacity(len as usize + 8);
    while (bytes.len() as u64) < len {
        bytes.extend_from_slice(&random.next_u64().to_le_bytes());
    }
    bytes.truncate(len as usize);
    bytes
}

/// A raw disk in memory, to be behind an image.
fn raw_backing(content: Vec<u8>) -> Arc<dyn Disk> {
    let geometry = RawGeometry {
        file_size: content.len() as u64,
        logical_block_size: 512,
        discard_granularity: None,
        range_alignment: 1,
        read_only: true,
    };
    Arc::new(RawDisk::over(MemoryFile::new(content, 0), geometry))
}

/// One random operation on a disk and on the bytes that it should hold. A discard may leave a sector or zero it.
fn random_operation(disk: &dyn Disk, model: &mut [u8], random: &mut Random, unit: u64) {
    let capacity = disk.capacity_bytes() / unit;
    let longest = if random.below(4) == 0 { capacity } else { capacity.min((128 << 10) / unit) };
    let offset = random.below(capacity);
    let len = (1 + random.below(longest)).min(capacity - offset) * unit;
    let offset = offset * unit;
    let range = offset as usize..(offset + len) as usize;
    match random.below(16) {
        0..=7 => {
            let bytes = random_bytes(random, len);
            write_bytes(disk, offset, &bytes).unwrap();
            model[range].copy_from_slice(&bytes);
        }
        8 | 9 => {
            disk.write_zeroes(offset, len, random.below(2) == 0).unwrap();
            model[range].fill(0);
        }
        10 => {
            disk.discard(offset, len).unwrap();
            let mut now = vec![0; len as usize];
            read_bytes(disk, offset, &mut now).unwrap();
            let kept_or_zero =
                now.iter().zip(&model[range.clone()]).all(|(new, old)| new == old || *new == 0);
            assert!(kept_or_zero, "a discard may only keep or zero");
            model[range].copy_from_slice(&now);
        }
        11 => disk.flush().unwrap(),
        _ => {
            let mut now = vec![1; len as usize];
            read_bytes(disk, offset, &mut now).unwrap();
            assert!(now == model[range], "{len} bytes at {offset} differ");
        }
    }
}

/// Everything a disk holds.
fn content(disk: &dyn Disk) -> Vec<u8> {
    let mut bytes = vec![1; disk.capacity_bytes() as usize];
    read_bytes(disk, 0, &mut bytes).unwrap();
    bytes
}

/// An empty image in memory.
fn memory_image(options: &CreateOptions) -> (Arc<MemoryFile>, u64) {
    let file = Arc::new(MemoryFile::new(Vec::new(), 1 << 30));
    let size = format_image(&file, options).unwrap();
    (file, size)
}

/// Opens an image in memory for writing.
fn open<F: ImageFile>(file: F, size: u64, backing: Option<Arc<dyn Disk>>) -> Qcow2Disk<F> {
    Qcow2Disk::over(file, size, false, backing).unwrap()
}

/// A name for a backing image that tests give to the image themselves.
fn backing_name() -> Option<(String, DiskFormat)> {
    Some(("base.img".to_owned(), DiskFormat::Raw))
}
