//! The client against a server of these tests that misbehaves as told, and against `qemu-nbd`.

mod hostile;
mod qemu;
mod server;

use crate::disk::{Disk, read_bytes, write_bytes};
use crate::error::DiskErrorKind;
use crate::faulty::Random;
use crate::format::open_disk;
use crate::raw::OpenOptions;

const WRITE: OpenOptions = OpenOptions { read_only: false };
const READ: OpenOptions = OpenOptions { read_only: true };

/// Bytes that are easy to tell apart.
fn random_bytes(random: &mut Random, len: u64) -> Vec<u8> {
    let mut bytes: Vec<u8> = Vec::with_capacity(len as usize + 8);
    while (bytes.len() as u64) < len {
        bytes.extend_from_slice(&random.next_u64().to_le_bytes());
    }
    bytes.truncate(len as usize);
    bytes
}

/// Everything a disk holds.
fn content(disk: &dyn Disk) -> Vec<u8> {
    let mut bytes = vec![1; disk.capacity_bytes() as usize];
    read_bytes(disk, 0, &mut bytes).unwrap();
    bytes
}
