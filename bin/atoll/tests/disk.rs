//! `atoll disk`, and images that `atoll run` refuses: exit code 2, one line on standard error that names the image,
//! nothing written and nothing left behind.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::process::{Command, Output, Stdio};

use atoll_scenarios::payload;
use atoll_storage::disk::{read_bytes, write_bytes};
use atoll_storage::{OpenOptions, open_disk};

const ATOLL: &str = env!("CARGO_BIN_EXE_atoll");

/// A folder in which the program works.
struct Folder(tempfile::TempDir);

impl Folder {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn write(&self, name: &str, content: &[u8]) {
        fs::write(self.path(name), content).unwrap();
    }

    fn run(&self, words: &[&str]) -> Output {
        Command::new(ATOLL).args(words).current_dir(self.0.path()).stdin(Stdio::null()).output().unwrap()
    }

    /// Runs `atoll disk` with words separated by spaces; returns standard output. The exit code is as stated.
    fn disk(&self, words: &str, code: i32) -> String {
        let words: Vec<&str> = ["disk"].into_iter().chain(words.split(' ')).collect();
        let output = self.run(&words);
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(code), "{words:?}: {said}");
        assert!(said.is_empty(), "{words:?}: {said}");
        String::from_utf8(output.stdout).unwrap()
    }

    fn json(&self, words: &str) -> serde_json::Value {
        serde_json::from_str(&self.disk(words, 0)).unwrap()
    }

    /// Everything in the folder with its content.
    fn content(&self) -> BTreeMap<PathBuf, Option<Vec<u8>>> {
        let entries = fs::read_dir(self.0.path()).unwrap().map(|entry| entry.unwrap().path());
        entries.map(|path| (path.clone(), fs::read(&path).ok())).collect()
    }

    /// Runs it with words, of which it must say one line that has each of `named`.
    fn refused(&self, words: &[&str], named: &[&str]) {
        let before = self.content();
        let output = self.run(words);
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{words:?}: {said}");
        assert_eq!(said.lines().count(), 1, "{words:?}: {said}");
        for name in named {
            assert!(said.contains(name), "{words:?}: {name:?} is not in {said:?}");
        }
        assert!(output.stdout.is_empty(), "{words:?}: something on standard output");
        assert!(self.content() == before, "{words:?} changed something");
    }

    fn disk_refused(&self, words: &str, named: &[&str]) {
        let words: Vec<&str> = ["disk"].into_iter().chain(words.split(' ')).collect();
        self.refused(&words, named);
    }
}

#[test]
fn images_are_made_and_described() {
    let folder = Folder::new();
    assert_eq!(folder.disk("create a.img 3M", 0), "a.img: raw, 3 MiB (3145728 bytes)\n");
    folder.disk("create b.qcow2 1G --cluster-size 32K --refcount-bits 8 --compression zstd", 0);
    folder.disk("create c.qcow2 --backing b.qcow2 --extended-l2 --lazy-refcounts", 0);
    folder.disk("create d.qcow2 2M --backing a.img --qcow2-version 2", 0);
    folder.disk("create e.disk 512 --format qcow2", 0);
    let a = folder.json("info a.img --json");
    assert_eq!(
        (&a["format"], &a["capacity_bytes"], &a["qcow2"]),
        (&"raw".into(), &(3 << 20).into(), &().into())
    );
    let b = folder.json("info b.qcow2 --json");
    assert_eq!(b["capacity_bytes"], 1 << 30);
    assert_eq!((&b["qcow2"]["cluster_bytes"], &b["qcow2"]["refcount_bits"]), (&(32 << 10).into(), &8.into()));
    assert_eq!((&b["qcow2"]["compression"], &b["qcow2"]["backing"]), (&"zstd".into(), &().into()));
    let c = folder.json("info c.qcow2 --json");
    assert_eq!((&c["capacity_bytes"], &c["qcow2"]["extended_l2"]), (&(1 << 30).into(), &true.into()));
    assert_eq!(c["qcow2"]["backing"]["name"], "b.qcow2");
    assert_eq!(c["qcow2"]["backing"]["format"], "qcow2");
    assert_eq!(folder.json("info d.qcow2 --json")["qcow2"]["version"], 2);
    assert_eq!(folder.json("info e.disk --format qcow2 --json")["capacity_bytes"], 512);
    let text = folder.disk("info c.qcow2", 0);
    for part in ["qcow2", "1 GiB", "128 KiB", "extended L2", "lazy", "b.qcow2 (qcow2)"] {
        assert!(text.contains(part), "{part}: {text}");
    }
    for image in ["b.qcow2", "c.qcow2", "d.qcow2"] {
        assert!(folder.disk(&format!("check {image}"), 0).starts_with("nothing is wrong"));
        let path = folder.path(image);
        if let Ok(output) = Command::new("qemu-img").args(["check", "-q"]).arg(path).output() {
            assert!(output.status.success(), "{image}: {output:?}");
        }
    }
}

#[test]
fn what_cannot_be_made_is_refused_and_nothing_is_left() {
    let folder = Folder::new();
    folder.write("there.qcow2", b"precious");
    folder.disk("create base.qcow2 1M", 0);
    for (words, named) in [
        ("create there.qcow2 1M", &["there.qcow2", "exists already"][..]),
        ("create absent/a.img 1M", &["absent/a.img", "folder"]),
        ("create a.img", &["size"]),
        ("create a.img 0", &["a.img", "512"]),
        ("create a.img 1000", &["a.img", "512"]),
        ("create a.img lots", &["lots"]),
        ("create a.img 17E", &["17E"]),
        ("create a.img 1M --format vmdk", &["vmdk", "raw, qcow2"]),
        ("create a.qcow2 1M --format raw", &["a.qcow2", "raw"]),
        ("create a.img 1M --backing base.qcow2", &["a.img", "qcow2"]),
        ("create a.img 1M --cluster-size 64K", &["qcow2"]),
        ("create a.qcow2 1M --cluster-size 65000", &["65000", "power of two"]),
        ("create a.qcow2 1M --cluster-size 4M", &["4M", "2M"]),
        ("create a.qcow2 1M --refcount-bits 5", &["a.qcow2", "64 bits"]),
        ("create a.qcow2 1M --qcow2-version 4", &["a.qcow2", "2 or 3"]),
        ("create a.qcow2 1M --qcow2-version 2 --compression zstd", &["a.qcow2", "version 3"]),
        ("create a.qcow2 1M --extended-l2 --cluster-size 4K", &["a.qcow2", "16 KiB"]),
        ("create a.qcow2 --backing absent.img", &["absent.img", "does not exist"]),
        ("create a.qcow2 --backing there.qcow2", &["there.qcow2", "corrupt"]),
        ("create a.qcow2 1M --backing-format raw", &["--backing"]),
        ("create a.qcow2 1M --backing nbd://h/x", &["address"]),
        ("convert absent.img a.qcow2", &["absent.img"]),
        ("convert base.qcow2 there.qcow2", &["there.qcow2", "exists already"]),
        ("convert base.qcow2 base.qcow2", &["base.qcow2", "exists already"]),
        ("convert there.qcow2 a.img", &["there.qcow2", "corrupt"]),
        ("info absent.img", &["absent.img", "does not exist"]),
        ("info .", &["directory"]),
        ("info there.qcow2", &["there.qcow2", "corrupt"]),
        ("check there.qcow2", &["there.qcow2", "corrupt"]),
        ("check there.qcow2 --format raw", &["there.qcow2", "raw"]),
        ("resize base.qcow2 512", &["base.qcow2", "lose"]),
        ("resize base.qcow2 1000001", &["base.qcow2"]),
        ("resize absent.img 1M", &["absent.img"]),
        ("paint a.img", &["paint"]),
    ] {
        folder.disk_refused(words, named);
    }
}

#[test]
fn a_folder_that_may_not_be_written_is_refused() {
    let folder = Folder::new();
    if fs::metadata("/proc/self").map(|m| std::os::unix::fs::MetadataExt::uid(&m)).unwrap() == 0 {
        // Permissions mean nothing to root; a file system that cannot be written does.
        folder.disk_refused("create /proc/a.img 1M", &["/proc/a.img"]);
        return;
    }
    fs::set_permissions(folder.0.path(), fs::Permissions::from_mode(0o555)).unwrap();
    folder.disk_refused("create a.img 1M", &["a.img", "permission"]);
    fs::set_permissions(folder.0.path(), fs::Permissions::from_mode(0o755)).unwrap();
}

#[test]
fn disks_are_copied_between_formats_and_enlarged() {
    let folder = Folder::new();
    let mut bytes = vec![0; 5 << 20];
    bytes[1_000_000..1_200_000].fill(7);
    folder.write("a.img", &bytes);
    folder.disk("create b.qcow2 --backing a.img", 0);
    let disk = open_disk(folder.path("b.qcow2"), OpenOptions { read_only: false }, None).unwrap();
    write_bytes(&*disk, 3_000_000, &[9; 1000]).unwrap();
    drop(disk);
    bytes[3_000_000..3_001_000].fill(9);
    let said = folder.disk("convert b.qcow2 c.qcow2", 0);
    assert!(said.starts_with("c.qcow2: qcow2, 5 MiB") && said.contains("not zero"), "{said}");
    folder.disk("convert c.qcow2 d.img", 0);
    assert!(fs::read(folder.path("d.img")).unwrap() == bytes);
    fs::remove_file(folder.path("a.img")).unwrap();
    let disk = open_disk(folder.path("c.qcow2"), OpenOptions { read_only: true }, None).unwrap();
    let mut found = vec![1; 5 << 20];
    read_bytes(&*disk, 0, &mut found).unwrap();
    assert!(found == bytes, "the copy is not complete by itself");
    drop(disk);
    folder.disk("resize d.img 6M", 0);
    bytes.resize(6 << 20, 0);
    assert!(fs::read(folder.path("d.img")).unwrap() == bytes);
}

/// A qcow2 image with data in clusters of 4 KiB.
fn small_image(folder: &Folder, name: &str) -> Vec<u8> {
    folder.disk(&format!("create {name} 1M --cluster-size 4K"), 0);
    let disk = open_disk(folder.path(name), OpenOptions { read_only: false }, None).unwrap();
    write_bytes(&*disk, 0, &vec![7; 64 << 10]).unwrap();
    drop(disk);
    fs::read(folder.path(name)).unwrap()
}

#[test]
fn checks_tell_lost_space_and_mend_it() {
    let folder = Folder::new();
    let mut bytes = small_image(&folder, "a.qcow2");
    let lost = bytes.len() / 4096 + 3;
    bytes[0x2000 + lost * 2 + 1] = 1;
    folder.write("a.qcow2", &bytes);
    let said = folder.disk("check a.qcow2", 1);
    assert!(said.contains("1 clusters are counted and not used") && said.contains("--repair"), "{said}");
    assert!(fs::read(folder.path("a.qcow2")).unwrap() == bytes, "checking changed the image");
    assert!(folder.disk("check a.qcow2 --repair", 0).contains("mended"));
    let report = folder.json("check a.qcow2 --json");
    assert_eq!((&report["leaked_clusters"], &report["damage"]), (&0.into(), &serde_json::json!([])));
    // An entry that points behind the end cannot be mended, and stays as it is.
    let mut bytes = fs::read(folder.path("a.qcow2")).unwrap();
    let table = u64::from_be_bytes(bytes[0x3000..0x3008].try_into().unwrap()) as usize & 0xff_ffff;
    bytes[table..table + 8].copy_from_slice(&0x8000_0000_00ff_0000u64.to_be_bytes());
    folder.write("a.qcow2", &bytes);
    for words in ["check a.qcow2", "check a.qcow2 --repair"] {
        let said = folder.disk(words, 1);
        assert!(said.starts_with("damage: ") && said.contains("cannot be repaired"), "{said}");
    }
    assert!(fs::read(folder.path("a.qcow2")).unwrap() == bytes);
}

#[test]
fn images_that_are_damaged_or_not_supported_are_refused_by_every_verb() {
    let folder = Folder::new();
    folder.write("kernel", &payload::debug_exit(16));
    let good = small_image(&folder, "good.qcow2");
    let damaged = |name: &str, damage: &dyn Fn(&mut Vec<u8>)| {
        let mut bytes = good.clone();
        damage(&mut bytes);
        folder.write(name, &bytes);
    };
    damaged("cut-header.qcow2", &|bytes| bytes.truncate(50));
    damaged("cut-tables.qcow2", &|bytes| bytes.truncate(0x2800));
    damaged("cut-data.qcow2", &|bytes| bytes.truncate(0x8000));
    damaged("l1.qcow2", &|bytes| bytes[0x3000..0x3008].copy_from_slice(&u64::MAX.to_be_bytes()));
    damaged("size.qcow2", &|bytes| bytes[24..32].fill(0xff));
    damaged("overlap.qcow2", &|bytes| bytes[40..48].copy_from_slice(&0x1000u64.to_be_bytes()));
    damaged("version.qcow2", &|bytes| bytes[7] = 9);
    damaged("encrypted.qcow2", &|bytes| bytes[35] = 2);
    damaged("external.qcow2", &|bytes| bytes[79] = 4);
    damaged("future.qcow2", &|bytes| bytes[78] = 1);
    damaged("empty.qcow2", &|bytes| bytes.clear());
    damaged("text.qcow2", &|bytes| *bytes = b"just words".to_vec());
    // What a guest could write into its raw disk.
    damaged("guest.img", &|_| ());
    for (name, why) in [
        ("cut-header.qcow2", "corrupt"),
        ("cut-tables.qcow2", "not within the image"),
        ("cut-data.qcow2", "truncated"),
        ("l1.qcow2", "corrupt"),
        ("size.qcow2", "corrupt"),
        ("overlap.qcow2", "overlaps"),
        ("version.qcow2", "version 9"),
        ("encrypted.qcow2", "encrypted (LUKS)"),
        ("external.qcow2", "external data file"),
        ("future.qcow2", "incompatible feature 8"),
        ("empty.qcow2", "empty"),
        ("text.qcow2", "corrupt"),
        ("guest.img", "begins with a qcow2 header"),
    ] {
        folder.refused(&["run", "--debug-exit", "--kernel", "kernel", "--disk", name], &[name, why]);
        folder.refused(&["disk", "convert", name, "copy.img"], &[name, why]);
        folder.refused(&["disk", "create", "over.qcow2", "--backing", name], &[name, why]);
    }
}

#[test]
fn loops_and_missing_links_of_backing_images_are_refused() {
    let folder = Folder::new();
    folder.write("kernel", &payload::debug_exit(16));
    let over = |name: &str, backing: &str, target: &str| {
        folder.write(backing, &[0; 4096]);
        folder.disk(&format!("create {name} 1M --backing {backing}"), 0);
        fs::remove_file(folder.path(backing)).unwrap();
        // The same length, so it can be replaced in place.
        assert_eq!(backing.len(), target.len());
        let mut bytes = fs::read(folder.path(name)).unwrap();
        let at = u64::from_be_bytes(bytes[8..16].try_into().unwrap()) as usize;
        bytes[at..at + target.len()].copy_from_slice(target.as_bytes());
        // "raw" becomes "qcow2" where the name is one of such an image.
        if target.ends_with(".qcow2") {
            bytes[112 + 4..112 + 8].copy_from_slice(&5u32.to_be_bytes());
            bytes[112 + 8..112 + 13].copy_from_slice(b"qcow2");
        }
        folder.write(name, &bytes);
    };
    over("self.qcow2", "raw--image", "self.qcow2");
    over("x.qcow2", "a-image", "y.qcow2");
    over("y.qcow2", "a-image", "x.qcow2");
    over("lone.qcow2", "a-image", "n-image");
    for (name, named) in [
        ("self.qcow2", "is its own backing image"),
        ("x.qcow2", "is its own backing image"),
        ("lone.qcow2", "n-image' does not exist"),
    ] {
        folder.refused(&["run", "--debug-exit", "--kernel", "kernel", "--disk", name], &[named]);
        folder.refused(&["disk", "convert", name, "copy.img"], &[named]);
    }
    // Such an image can still be looked at and checked by itself.
    assert!(folder.disk("info x.qcow2", 0).contains("y.qcow2"));
    assert!(folder.disk("check x.qcow2", 0).contains("nothing is wrong"));
}

#[test]
fn an_image_in_use_is_refused_by_all_that_would_change_or_copy_it() {
    let folder = Folder::new();
    folder.write("kernel", &payload::debug_exit(16));
    small_image(&folder, "a.qcow2");
    let disk = open_disk(folder.path("a.qcow2"), OpenOptions { read_only: false }, None).unwrap();
    for words in [
        &["run", "--debug-exit", "--kernel", "kernel", "--disk", "a.qcow2"][..],
        &["disk", "check", "a.qcow2"],
        &["disk", "check", "--repair", "a.qcow2"],
        &["disk", "convert", "a.qcow2", "b.img"],
        &["disk", "resize", "a.qcow2", "2M"],
        &["disk", "create", "b.qcow2", "--backing", "a.qcow2"],
    ] {
        folder.refused(words, &["a.qcow2", "in use"]);
    }
    // Looking needs no lock.
    assert!(folder.disk("info a.qcow2", 0).contains("1 MiB"));
    drop(disk);
    // What is behind an image in use may be read by others and not written.
    folder.disk("create top.qcow2 --backing a.qcow2", 0);
    let disk = open_disk(folder.path("top.qcow2"), OpenOptions { read_only: false }, None).unwrap();
    folder.disk("check a.qcow2", 0);
    folder.refused(&["disk", "check", "--repair", "a.qcow2"], &["a.qcow2", "in use"]);
    drop(disk);
}

#[test]
fn servers_that_cannot_be_used_are_refused_by_address() {
    let folder = Folder::new();
    folder.write("kernel", &payload::debug_exit(16));
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let closed = format!("nbd://127.0.0.1:{port}/x");
    for (address, named) in [
        (closed.as_str(), "cannot be reached"),
        ("nbd+unix:///x?socket=absent", "cannot be reached"),
        ("nbds://h/x", "TLS"),
        ("nbd://h:0/x", "port"),
        ("nbd:h", "'://'"),
    ] {
        folder.refused(&["run", "--debug-exit", "--kernel", "kernel", "--disk", address], &[address, named]);
        folder.refused(&["disk", "convert", address, "copy.img"], &[address, named]);
    }
}
