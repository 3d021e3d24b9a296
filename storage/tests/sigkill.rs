//! A process that writes disks and is killed in the middle of it: what it had flushed is there, and the image is
//! clean or has lost nothing but space.
//!
//! The test starts itself as the process to be killed. That one writes from several threads, each in its own part
//! of the disk, and says in a pipe which operation begins and which flush has returned. The operations follow
//! from a seed, so the test knows what every sector may hold: what the last operation before the last flush left
//! there, or what any operation since that had begun gave it.

use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use atoll_storage::disk::{Disk, read_bytes, write_bytes};
use atoll_storage::qcow2::{CreateOptions, Qcow2Disk, create};
use atoll_storage::{DiskFormat, OpenOptions, open_disk};

const KILLS: u64 = 20;
const THREADS: u64 = 4;
/// Bytes of the disk that belong to one thread.
const PART: u64 = 4 << 20;
const SECTOR: u64 = 512;

/// For the process to be killed: the image and the seed.
const IMAGE_VARIABLE: &str = "ATOLL_SIGKILL_IMAGE";
const SEED_VARIABLE: &str = "ATOLL_SIGKILL_SEED";

/// Numbers that are the same for the same seed (splitmix64).
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut x = self.0;
        x = (x ^ x >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        x = (x ^ x >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        x ^ x >> 31
    }

    fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound
    }
}

#[derive(Clone, Copy)]
enum Action {
    Write,
    Zero { unmap: bool },
    Flush,
}

/// One operation; sectors are within the thread's part.
#[derive(Clone, Copy)]
struct Planned {
    action: Action,
    first: u64,
    count: u64,
}

/// What a thread does, without end.
fn plan(seed: u64, thread: u64) -> impl Iterator<Item = Planned> {
    let mut random = Random(seed << 8 | thread);
    let sectors = PART / SECTOR;
    std::iter::repeat_with(move || {
        let first = random.below(sectors);
        let longest = if random.below(8) == 0 { 512 } else { 32 };
        let count = (1 + random.below(longest)).min(sectors - first);
        let action = match random.below(12) {
            0 | 1 => Action::Flush,
            2 => Action::Zero { unmap: true },
            3 => Action::Zero { unmap: false },
            _ => Action::Write,
        };
        Planned { action, first, count }
    })
}

/// What an operation writes into each of its sectors: different for every operation of every round.
fn pattern(seed: u64, thread: u64, number: u64) -> [u8; 8] {
    (seed << 40 | thread << 32 | (number + 1)).to_le_bytes()
}

/// The process to be killed. Does nothing unless it is started as such.
#[test]
fn the_process_to_be_killed() {
    let (Ok(image), Ok(seed)) = (std::env::var(IMAGE_VARIABLE), std::env::var(SEED_VARIABLE)) else { return };
    let seed: u64 = seed.parse().unwrap();
    let disk = open_disk(image, OpenOptions { read_only: false }, None).unwrap();
    say("ready");
    std::thread::scope(|scope| {
        for thread in 0..THREADS {
            let disk = &disk;
            scope.spawn(move || work(&**disk, seed, thread));
        }
    });
}

fn work(disk: &dyn Disk, seed: u64, thread: u64) {
    for (number, operation) in plan(seed, thread).enumerate() {
        let number = number as u64;
        let (offset, len) = (thread * PART + operation.first * SECTOR, operation.count * SECTOR);
        say(&format!("begun {thread} {number}"));
        match operation.action {
            Action::Write => {
                let bytes = pattern(seed, thread, number).repeat(len as usize / 8);
                write_bytes(disk, offset, &bytes).unwrap();
            }
            Action::Zero { unmap } => disk.write_zeroes(offset, len, unmap).unwrap(),
            Action::Flush => {
                disk.flush().unwrap();
                say(&format!("flushed {thread} {number}"));
            }
        }
    }
}

/// One record in the pipe, whole when this returns.
fn say(text: &str) {
    std::io::stdout().lock().write_all(format!("\n@{text}\n").as_bytes()).unwrap();
}

/// How far each thread came.
#[derive(Debug, Clone, Default)]
struct Progress {
    /// Operations that had begun.
    begun: u64,
    /// Operations that a flush covers.
    flushed: u64,
}

/// Starts the process, kills it after a while, and returns how far it came.
fn run_and_kill(image: &Path, seed: u64, after: Duration) -> Vec<Progress> {
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "the_process_to_be_killed", "--nocapture"])
        .env(IMAGE_VARIABLE, image)
        .env(SEED_VARIABLE, seed.to_string())
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let lines = BufReader::new(child.stdout.take().unwrap()).lines();
    let (ready, wait) = std::sync::mpsc::channel();
    let reader = std::thread::spawn(move || {
        let mut progress = vec![Progress::default(); THREADS as usize];
        for line in lines.map_while(Result::ok) {
            let Some(text) = line.strip_prefix('@') else { continue };
            let words: Vec<&str> = text.split(' ').collect();
            match words[..] {
                ["begun", thread, number] => {
                    progress[thread.parse::<usize>().unwrap()].begun = number.parse::<u64>().unwrap() + 1;
                }
                ["flushed", thread, number] => {
                    progress[thread.parse::<usize>().unwrap()].flushed = number.parse().unwrap();
                }
                _ => drop(ready.send(())),
            }
        }
        progress
    });
    wait.recv_timeout(Duration::from_secs(60)).expect("the process opens the disk");
    std::thread::sleep(after);
    child.kill().unwrap();
    let status = child.wait().unwrap();
    assert_eq!(std::os::unix::process::ExitStatusExt::signal(&status), Some(9), "it failed by itself");
    reader.join().unwrap()
}

/// Sectors of a thread's part that hold what they cannot hold.
fn lost_sectors(before: &[u8], after: &[u8], seed: u64, thread: u64, progress: &Progress) -> Vec<u64> {
    let part = (thread * PART) as usize;
    let sector_of = |bytes: &[u8], sector: u64| -> [u8; 512] {
        let start = part + (sector * SECTOR) as usize;
        bytes[start..start + 512].try_into().unwrap()
    };
    // For each sector: the content that is safe, and what may have replaced it.
    let sectors = PART / SECTOR;
    let mut allowed: Vec<Vec<[u8; 512]>> =
        (0..sectors).map(|sector| vec![sector_of(before, sector)]).collect();
    for (number, operation) in plan(seed, thread).take(progress.begun as usize).enumerate() {
        let bytes = match operation.action {
            Action::Flush => continue,
            Action::Zero { .. } => [0; 512],
            Action::Write => pattern(seed, thread, number as u64).repeat(64).try_into().unwrap(),
        };
        for list in &mut allowed[operation.first as usize..(operation.first + operation.count) as usize] {
            if (number as u64) < progress.flushed {
                list.clear();
            }
            list.push(bytes);
        }
    }
    (0..sectors).filter(|sector| !allowed[*sector as usize].contains(&sector_of(after, *sector))).collect()
}

fn content(disk: &dyn Disk) -> Vec<u8> {
    let mut bytes = vec![0; disk.capacity_bytes() as usize];
    read_bytes(disk, 0, &mut bytes).unwrap();
    bytes
}

fn require_qemu_img() -> bool {
    let there = Command::new("qemu-img").arg("--version").output().is_ok();
    if !there {
        eprintln!("without qemu-img (package qemu-utils), only this implementation checks");
    }
    there
}

fn qemu_check(image: &Path, arguments: &[&str]) -> Option<i32> {
    let output =
        Command::new("qemu-img").args(["check", "-q", "-f", "qcow2"]).args(arguments).arg(image).output();
    output.unwrap().status.code()
}

/// Kills the process twenty times on the same image; `checked` looks at the image's structure each time.
fn kill_again_and_again(image: &Path, round: u64, mut checked: impl FnMut(&Path)) {
    let mut random = Random(round);
    let mut before = content(&*read_only(image));
    let (mut begun, mut flushed) = (0, 0);
    for kill in 0..KILLS {
        let seed = round * 1000 + kill;
        let after = Duration::from_millis(5 + random.below(70));
        let progress = run_and_kill(image, seed, after);
        checked(image);
        let now = content(&*read_only(image));
        for (thread, progress) in progress.iter().enumerate() {
            let lost = lost_sectors(&before, &now, seed, thread as u64, progress);
            assert!(lost.is_empty(), "kill {kill}, thread {thread}, {progress:?}: sectors {lost:?}");
            begun += progress.begun;
            flushed += progress.flushed;
        }
        before = now;
    }
    println!("{}: {KILLS} kills, {begun} operations begun, {flushed} of them flushed", image.display());
    assert!(begun > flushed && flushed > 0, "{begun} {flushed}");
}

fn read_only(image: &Path) -> Arc<dyn Disk> {
    open_disk(image, OpenOptions { read_only: true }, None).unwrap()
}

#[test]
fn a_killed_writer_of_a_raw_disk_has_lost_nothing_flushed() {
    let folder = tempfile::tempdir().unwrap();
    let image = folder.path().join("disk.img");
    std::fs::File::create(&image).unwrap().set_len(THREADS * PART).unwrap();
    kill_again_and_again(&image, 1, |_| ());
}

fn kill_qcow2(options: &CreateOptions, round: u64) {
    let folder = tempfile::tempdir().unwrap();
    if options.backing.is_some() {
        std::fs::write(folder.path().join("base.img"), vec![0x5a; (THREADS * PART) as usize]).unwrap();
    }
    let image: PathBuf = folder.path().join("disk.qcow2");
    create(&image, options).unwrap();
    let other = require_qemu_img();
    let mut leaked = 0;
    kill_again_and_again(&image, round, |image| {
        let report = Qcow2Disk::open(image, OpenOptions { read_only: true }).unwrap().check().unwrap();
        assert!(report.is_consistent(), "{report:?}");
        leaked += report.leaked_clusters;
        if other {
            // 3: nothing but leaked clusters.
            let code = qemu_check(image, &[]);
            assert!(matches!(code, Some(0 | 3)), "qemu-img check says {code:?}");
        }
    });
    println!("{leaked} clusters lost over all kills, found and given back");
    let disk = Qcow2Disk::open(&image, OpenOptions { read_only: false }).unwrap();
    let before = content(&disk);
    disk.repair().unwrap();
    assert!(disk.check().unwrap().is_clean());
    assert!(content(&disk) == before);
    drop(disk);
    assert!(!other || qemu_check(&image, &[]) == Some(0));
}

fn options() -> CreateOptions {
    CreateOptions { size: THREADS * PART, ..Default::default() }
}

#[test]
fn a_killed_writer_of_a_qcow2_disk_has_lost_nothing_flushed() {
    kill_qcow2(&options(), 2);
}

#[test]
fn a_killed_writer_of_small_clusters_and_late_counts_has_lost_nothing_flushed() {
    kill_qcow2(&CreateOptions { cluster_bits: 12, lazy_refcounts: true, refcount_bits: 64, ..options() }, 3);
}

#[test]
fn a_killed_writer_of_subclusters_over_a_backing_image_has_lost_nothing_flushed() {
    let backing = Some(("base.img".to_owned(), DiskFormat::Raw));
    kill_qcow2(&CreateOptions { cluster_bits: 17, extended_l2: true, backing, ..options() }, 4);
}
