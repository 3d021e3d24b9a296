//! The NBD client with a server that sends what it likes. All of the server's bytes are there from the beginning, in
//! a socket; the client negotiates over them and then reads, writes, zeroes, discards and flushes until one fails.
//! Whatever comes, every call has to return, and a read must not touch more than its buffer.
#![no_main]

use std::io::Write;
use std::net::Shutdown;
use std::os::unix::net::UnixStream;

use atoll_fuzz::seeds;
use atoll_storage::disk::{Disk, read_bytes, write_bytes};
use atoll_storage::{NbdDisk, OpenOptions};
use libfuzzer_sys::fuzz_target;

/// What a socket takes without anybody reading it, with room to spare.
const MAX_BYTES: usize = 64 << 10;

/// Operations, all of them together with less data than a socket takes.
const OPERATIONS: u64 = 12;

fuzz_target!(init: seeds::plant(seeds()), |data: &[u8]| {
    let [choice, bytes @ ..] = data else { return };
    let Ok((client, mut server)) = UnixStream::pair() else { return };
    if server.write_all(&bytes[..bytes.len().min(MAX_BYTES)]).is_err() || server.shutdown(Shutdown::Write).is_err() {
        return;
    }
    let options = OpenOptions { read_only: choice & 0x80 != 0 };
    let Ok(disk) = NbdDisk::over_stream(client, "export", options) else { return };
    let capacity = disk.capacity_bytes();
    assert!(capacity != 0 && capacity.is_multiple_of(u64::from(disk.logical_block_size())));
    for number in 0..OPERATIONS {
        let mut buffer = [0xa5u8; 4096];
        let len = capacity.min(1500 + number * 64);
        let place = (capacity - len) / OPERATIONS * number;
        let middle = &mut buffer[64..64 + len as usize];
        let _ = match (u64::from(*choice) + number) % 5 {
            0 | 1 => read_bytes(&disk, place, middle),
            2 => write_bytes(&disk, place, middle),
            3 => disk.flush(),
            _ if choice & 0x40 == 0 => disk.discard(place, len),
            _ => disk.write_zeroes(place, len, choice & 0x20 != 0),
        };
        let outside = buffer[..64].iter().chain(&buffer[64 + len as usize..]);
        assert!(outside.copied().all(|byte| byte == 0xa5));
    }
});

/// Servers that keep to the protocol for a while, with and without structured replies.
fn seeds() -> Vec<Vec<u8>> {
    let mut list = Vec::new();
    for choice in [0u8, 1, 2, 3, 4, 0x44, 0x80] {
        for structured in [false, true] {
            let mut bytes = vec![choice];
            bytes.extend_from_slice(b"NBDMAGICIHAVEOPT\x00\x03");
            answer(&mut bytes, 8, if structured { 1 } else { 0x8000_0001 }, &[]);
            let export = [&[0, 0][..], &(1u64 << 20).to_be_bytes(), &[0, 0x6d]].concat();
            answer(&mut bytes, 7, 3, &export);
            answer(&mut bytes, 7, 3, &[0, 3, 0, 0, 2, 0, 0, 0, 16, 0, 0, 16, 0, 0]);
            answer(&mut bytes, 7, 1, &[]);
            for cookie in 1..16u64 {
                if structured {
                    bytes.extend_from_slice(&0x668e_33efu32.to_be_bytes());
                    bytes.extend_from_slice(&[0, 1, 0, 2]);
                    bytes.extend_from_slice(&cookie.to_be_bytes());
                    bytes.extend_from_slice(&12u32.to_be_bytes());
                    bytes.extend_from_slice(&[0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 8, 0]);
                } else {
                    bytes.extend_from_slice(&0x6744_6698u32.to_be_bytes());
                    bytes.extend_from_slice(&0u32.to_be_bytes());
                    bytes.extend_from_slice(&cookie.to_be_bytes());
                    bytes.extend_from_slice(&[7; 2048]);
                }
            }
            list.push(bytes);
        }
    }
    list
}

fn answer(bytes: &mut Vec<u8>, option: u32, kind: u32, data: &[u8]) {
    bytes.extend_from_slice(&0x0003_e889_0455_65a9u64.to_be_bytes());
    bytes.extend_from_slice(&option.to_be_bytes());
    bytes.extend_from_slice(&kind.to_be_bytes());
    bytes.extend_from_slice(&(data.len() as u32).to_be_bytes());
    bytes.extend_from_slice(data);
}
