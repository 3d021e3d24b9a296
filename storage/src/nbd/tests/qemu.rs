//! The client against `qemu-nbd`. Left out, with a line that says so, where it (package qemu-utils) is not
//! installed.

use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use super::*;
use crate::disk::Disk;

fn require_qemu_nbd() -> bool {
    let there = Command::new("qemu-nbd").arg("--version").output().is_ok();
    if !there {
        eprintln!("left out: qemu-nbd is not installed (package qemu-utils)");
    }
    there
}

/// A running `qemu-nbd`, ended with the value.
struct Served {
    child: Child,
    address: String,
}

impl Served {
    fn start(folder: &Path, image: &Path, arguments: &[&str]) -> Self {
        let socket = folder.join("socket");
        let child = Command::new("qemu-nbd")
            .args(["--persistent", "--shared=4", "--export-name=disk one", "--socket"])
            .arg(&socket)
            .args(arguments)
            .arg(image)
            .stdin(Stdio::null())
            .spawn()
            .unwrap();
        let served = Self { child, address: format!("nbd+unix:///disk%20one?socket={}", socket.display()) };
        let end = Instant::now() + Duration::from_secs(30);
        while !socket.exists() {
            assert!(Instant::now() < end, "qemu-nbd does not listen");
            std::thread::sleep(Duration::from_millis(10));
        }
        served
    }
}

/// A port that was free a moment ago.
fn free_port() -> u16 {
    std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

impl Drop for Served {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn exercise(disk: &dyn Disk, model: &mut [u8], seed: u64, operations: u64) {
    let mut random = Random::new(seed);
    let capacity = disk.capacity_bytes();
    for _ in 0..operations {
        let unit = if random.below(3) == 0 { 1 } else { 512 };
        let longest = if random.below(10) == 0 { 5 << 20 } else { 128 << 10 };
        let offset = random.below(capacity / unit) * unit;
        let len = ((1 + random.below(longest / unit)) * unit).min(capacity - offset);
        let range = offset as usize..(offset + len) as usize;
        let mut bytes = vec![0; len as usize];
        match random.below(8) {
            0..=2 => {
                bytes = random_bytes(&mut random, len);
                write_bytes(disk, offset, &bytes).unwrap();
                model[range].copy_from_slice(&bytes);
            }
            3 => {
                disk.write_zeroes(offset, len, random.below(2) == 0).unwrap();
                model[range].fill(0);
            }
            4 => {
                disk.discard(offset, len).unwrap();
                read_bytes(disk, offset, &mut bytes).unwrap();
                let kept = bytes.iter().zip(&model[range.clone()]).all(|(new, old)| new == old || *new == 0);
                assert!(kept, "a discard may only keep or zero");
                model[range].copy_from_slice(&bytes);
            }
            5 => disk.flush().unwrap(),
            _ => {
                read_bytes(disk, offset, &mut bytes).unwrap();
                assert!(bytes == model[range], "{len} bytes at {offset} differ");
            }
        }
    }
}

#[test]
fn qemu_nbd_keeps_what_is_written_to_it() {
    if !require_qemu_nbd() {
        return;
    }
    for (seed, (format, arguments)) in [
        ("raw", &["--format=raw", "--discard=unmap"][..]),
        ("raw", &["--format=raw", "--cache=none", "--discard=unmap"]),
        ("qcow2", &["--format=qcow2", "--discard=unmap", "--detect-zeroes=unmap"]),
    ]
    .into_iter()
    .enumerate()
    {
        let folder = tempfile::tempdir().unwrap();
        let image = folder.path().join("image");
        let output =
            Command::new("qemu-img").args(["create", "-q", "-f", format]).arg(&image).arg("16M").output();
        assert!(output.unwrap().status.success());
        let mut model = vec![0; 16 << 20];
        let served = Served::start(folder.path(), &image, arguments);
        let disk = open_disk(&served.address, WRITE, None).unwrap();
        assert_eq!(disk.capacity_bytes(), 16 << 20);
        exercise(&*disk, &mut model, seed as u64, 300);
        assert!(content(&*disk) == model, "{arguments:?}");
        disk.flush().unwrap();
        drop(disk);
        drop(served);
        std::fs::write(folder.path().join("model"), &model).unwrap();
        let output = Command::new("qemu-img")
            .args(["compare", "-f", format, "-F", "raw"])
            .args([&image, &folder.path().join("model")])
            .output()
            .unwrap();
        assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stdout));
    }
}

#[test]
fn qemu_nbd_serves_many_callers_on_one_connection() {
    if !require_qemu_nbd() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let image = folder.path().join("image");
    std::fs::File::create(&image).unwrap().set_len(16 << 20).unwrap();
    let served = Served::start(folder.path(), &image, &["--format=raw"]);
    let disk = open_disk(&served.address, WRITE, None).unwrap();
    std::thread::scope(|scope| {
        for caller in 0..16u64 {
            let disk = &disk;
            scope.spawn(move || {
                let mut random = Random::new(caller);
                let mut model = vec![0; 1 << 20];
                for _ in 0..200 {
                    let offset = random.below((1 << 20) - 8192);
                    let bytes = random_bytes(&mut random, 8192);
                    write_bytes(&**disk, (caller << 20) + offset, &bytes).unwrap();
                    model[offset as usize..offset as usize + 8192].copy_from_slice(&bytes);
                    let mut found = vec![0; 4096];
                    let offset = random.below((1 << 20) - 4096);
                    read_bytes(&**disk, (caller << 20) + offset, &mut found).unwrap();
                    assert!(found == model[offset as usize..offset as usize + 4096], "caller {caller}");
                }
                disk.flush().unwrap();
            });
        }
    });
    assert_eq!(disk.metrics().snapshot().writes, 16 * 200);
}

#[test]
fn what_qemu_nbd_refuses_is_one_clear_line() {
    if !require_qemu_nbd() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let image = folder.path().join("image");
    std::fs::File::create(&image).unwrap().set_len(1 << 20).unwrap();
    let served = Served::start(folder.path(), &image, &["--format=raw", "--read-only"]);
    let text = |address: &str, options| open_disk(address, options, None).err().unwrap().to_string();
    assert!(text(&served.address, WRITE).contains("read-only at its server"));
    let disk = open_disk(&served.address, READ, None).unwrap();
    assert_eq!(write_bytes(&*disk, 0, &[1; 512]).unwrap_err().kind(), DiskErrorKind::ReadOnly);
    assert!(content(&*disk).iter().all(|byte| *byte == 0));
    disk.flush().unwrap();
    let other = served.address.replace("disk%20one", "other");
    let error = text(&other, READ);
    assert!(error.contains("the server has no export 'other'") && error.lines().count() == 1, "{error}");
}

#[test]
fn a_server_that_was_killed_and_started_again_goes_on_where_nothing_was_unflushed() {
    if !require_qemu_nbd() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let image = folder.path().join("image");
    std::fs::File::create(&image).unwrap().set_len(1 << 20).unwrap();
    let served = Served::start(folder.path(), &image, &["--format=raw"]);
    let disk = open_disk(&served.address, WRITE, None).unwrap();
    write_bytes(&*disk, 0, &[5; 4096]).unwrap();
    disk.flush().unwrap();
    drop(served);
    assert_eq!(read_bytes(&*disk, 0, &mut [0; 512]).unwrap_err().kind(), DiskErrorKind::Io);
    std::fs::remove_file(folder.path().join("socket")).unwrap();
    let _served = Served::start(folder.path(), &image, &["--format=raw"]);
    let end = Instant::now() + Duration::from_secs(20);
    let mut bytes = [0; 4096];
    while let Err(error) = read_bytes(&*disk, 0, &mut bytes) {
        assert!(Instant::now() < end, "{error}");
        std::thread::sleep(Duration::from_millis(20));
    }
    assert!(bytes.iter().all(|byte| *byte == 5));
    write_bytes(&*disk, 0, &[6; 512]).unwrap();
    disk.flush().unwrap();
}

#[test]
fn qemu_nbd_is_reached_over_tcp() {
    if !require_qemu_nbd() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let image = folder.path().join("image");
    std::fs::File::create(&image).unwrap().set_len(8 << 20).unwrap();
    let port = free_port().to_string();
    let mut child = Command::new("qemu-nbd")
        .args(["--persistent", "--bind=127.0.0.1", "--format=raw", "--port", &port])
        .arg(&image)
        .stdin(Stdio::null())
        .spawn()
        .unwrap();
    let end = Instant::now() + Duration::from_secs(30);
    let disk = loop {
        match open_disk(format!("nbd://localhost:{port}"), WRITE, None) {
            Ok(disk) => break disk,
            Err(error) => assert!(Instant::now() < end, "{error}"),
        }
        std::thread::sleep(Duration::from_millis(20));
    };
    let mut model = vec![0; 8 << 20];
    exercise(&*disk, &mut model, 11, 200);
    disk.flush().unwrap();
    drop(disk);
    child.kill().unwrap();
    child.wait().unwrap();
    assert!(std::fs::read(&image).unwrap() == model);
}
