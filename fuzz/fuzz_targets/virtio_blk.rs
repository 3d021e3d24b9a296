//! The block device: the input is a script of register, ring and buffer accesses by a guest's driver. The
//! device must survive it and work after a reset.
#![no_main]

use atoll_virtio::blk::{Blk, BlkOptions};
use atoll_virtio::testing::{MemoryDisk, TestMachine, play};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let machine = TestMachine::new();
    let disk = MemoryDisk::new(64, data.len() % 16 == 0);
    let options = BlkOptions { queues: 2, ..BlkOptions::default() };
    play(&machine, Blk::new(disk, &options), data);
});
