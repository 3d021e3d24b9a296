//! Images made, looked at, checked and converted, with `qemu-img`'s opinion where it is installed.

use std::process::Command;
use std::sync::atomic::{AtomicU64, Ordering};

use super::*;
use crate::disk::{read_bytes, write_bytes};
use crate::faulty::Random;
use crate::format::open_disk;
use crate::qcow2::{Compression, CreateOptions};
use crate::raw::OpenOptions;

const READ: OpenOptions = OpenOptions { read_only: true };

fn listing(folder: &Path) -> Vec<String> {
    let name = |entry: io::Result<std::fs::DirEntry>| entry.unwrap().file_name().into_string().unwrap();
    let mut names: Vec<_> = std::fs::read_dir(folder).unwrap().map(name).collect();
    names.sort();
    names
}

fn qemu_img(arguments: &[&str], path: &Path) -> Option<String> {
    let output = Command::new("qemu-img").args(arguments).arg(path).output().ok()?;
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    Some(String::from_utf8(output.stdout).unwrap())
}

fn sized(size: u64) -> NewImage {
    NewImage { size: Some(size), ..NewImage::default() }
}

#[test]
fn an_image_has_the_format_that_its_name_stands_for() {
    let folder = tempfile::tempdir().unwrap();
    for (name, format) in
        [("a.img", DiskFormat::Raw), ("a.qcow2", DiskFormat::Qcow2), ("b.QCOW2", DiskFormat::Qcow2)]
    {
        let path = folder.path().join(name);
        assert_eq!(create(&path, &sized(1 << 20)).unwrap(), 1 << 20);
        let found = info(&path, None).unwrap();
        assert_eq!((found.format, found.capacity_bytes), (format, 1 << 20));
        assert_eq!(open_disk(&path, READ, None).unwrap().capacity_bytes(), 1 << 20);
        assert!(found.allocated_bytes.unwrap() < 1 << 20);
    }
}

#[test]
fn a_refused_image_leaves_nothing_and_replaces_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    std::fs::write(path("there.qcow2"), b"precious").unwrap();
    std::os::unix::fs::symlink("nowhere", path("link.img")).unwrap();
    let before = listing(folder.path());
    let qcow2 = |qcow2: CreateOptions| NewImage { qcow2, ..sized(1 << 20) };
    let behind = |name: &str| Backing { path: path(name), format: None };
    let cases: Vec<(&str, NewImage, &str)> = vec![
        ("there.qcow2", sized(1 << 20), "exists already"),
        ("link.img", sized(1 << 20), "exists already"),
        ("absent/a.img", sized(1 << 20), "its folder does not exist"),
        ("there.qcow2/a.img", sized(1 << 20), "its folder does not exist"),
        ("a.img", sized(0), "multiple of 512"),
        ("a.img", sized(513), "multiple of 512"),
        ("a.img", sized(u64::MAX - 511), "multiple of 512"),
        ("a.img", NewImage::default(), "size is missing"),
        ("a.qcow2", NewImage { format: Some(DiskFormat::Raw), ..sized(512) }, "not for a raw image"),
        ("a.img", NewImage { backing: Some(behind("x")), ..sized(512) }, "nothing behind it"),
        ("a.qcow2", NewImage { backing: Some(behind("x")), ..sized(512) }, "does not exist"),
        ("a.qcow2", NewImage { backing: Some(behind("there.qcow2")), ..sized(512) }, "corrupt"),
        ("a.qcow2", qcow2(CreateOptions { cluster_bits: 8, ..Default::default() }), "512 bytes to 2 MiB"),
        ("a.qcow2", qcow2(CreateOptions { refcount_bits: 3, ..Default::default() }), "1, 2, 4, 8"),
        (
            "a.qcow2",
            qcow2(CreateOptions { version: 2, extended_l2: true, ..Default::default() }),
            "version 3",
        ),
        (
            "a.qcow2",
            NewImage { qcow2: CreateOptions { cluster_bits: 9, ..Default::default() }, ..sized(1 << 50) },
            "larger clusters",
        ),
    ];
    for (name, wanted, named) in cases {
        let error = create(&path(name), &wanted).unwrap_err();
        let text = error.to_string();
        assert!(error.is_input() && text.contains(named) && text.lines().count() == 1, "{name}: {text}");
        assert_eq!(listing(folder.path()), before);
    }
    assert_eq!(std::fs::read(path("there.qcow2")).unwrap(), b"precious");
}

#[test]
fn a_backing_image_is_named_so_that_it_is_found_from_the_image() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    for name in ["images", "bases"] {
        std::fs::create_dir(path(name)).unwrap();
    }
    std::fs::write(path("bases/base:1.img"), vec![7; 3000]).unwrap();
    // Absolute as given; relative as seen from this process's folder, which no test may change.
    let here = std::env::current_dir().unwrap();
    let up: PathBuf = here.components().skip(1).map(|_| "..").collect();
    let relative = up.join(path("bases/base:1.img").strip_prefix("/").unwrap());
    for (image, behind, stored) in [
        ("images/a.qcow2", path("bases/base:1.img"), None),
        ("images/b.qcow2", relative.clone(), Some("../bases/base:1.img")),
        ("bases/c.qcow2", relative, Some("./base:1.img")),
    ] {
        let backing = Some(Backing { path: behind.clone(), format: None });
        let wanted = NewImage { backing, ..NewImage::default() };
        assert_eq!(create(&path(image), &wanted).unwrap(), 3072);
        let found = info(&path(image), None).unwrap();
        let expected = stored.map_or(behind.to_str().unwrap(), |stored| stored);
        let stored = found.qcow2.unwrap().backing;
        assert_eq!(stored, Some((expected.to_owned(), Some("raw".to_owned()))));
        let disk = open_disk(path(image), READ, None).unwrap();
        let mut bytes = [0; 3072];
        read_bytes(&*disk, 0, &mut bytes).unwrap();
        assert!(bytes[..3000].iter().all(|byte| *byte == 7) && bytes[3000..].iter().all(|byte| *byte == 0));
        drop(disk);
        qemu_img(&["check", "-q"], &path(image));
    }
}

#[test]
fn conversions_keep_every_byte_and_leave_zeros_out() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    let mut random = Random::new(5);
    let mut bytes = vec![0; 9 << 20];
    for _ in 0..40 {
        let start = random.below((9 << 20) - 70_000) as usize;
        let len = 1 + random.below(70_000) as usize;
        bytes[start..start + len].fill(1 + random.below(255) as u8);
    }
    std::fs::write(path("0.img"), &bytes).unwrap();
    let steps = [
        ("1.qcow2", CreateOptions::default()),
        ("2.img", CreateOptions::default()),
        ("3.qcow2", CreateOptions { cluster_bits: 9, ..Default::default() }),
        ("4.qcow2", CreateOptions { cluster_bits: 21, extended_l2: true, ..Default::default() }),
        ("5.qcow2", CreateOptions { version: 2, ..Default::default() }),
        ("6.img", CreateOptions::default()),
    ];
    let mut from = "0.img".to_owned();
    for (to, options) in steps {
        let source = open_disk(path(&from), READ, None).unwrap();
        let done = AtomicU64::new(0);
        let result =
            convert(&*source, &path(to), None, &options, |bytes| done.store(bytes, Ordering::Relaxed))
                .unwrap();
        assert_eq!((result.size, done.into_inner()), (9 << 20, 9 << 20));
        assert!(result.written < 9 << 20, "nothing was left out");
        let mut found = vec![1; 9 << 20];
        read_bytes(&*open_disk(path(to), READ, None).unwrap(), 0, &mut found).unwrap();
        assert!(found == bytes, "{from} to {to}");
        if to.ends_with("qcow2") {
            assert!(check(&path(to)).unwrap().is_clean());
            qemu_img(&["check", "-q"], &path(to));
        }
        from = to.to_owned();
    }
    assert!(info(&path("6.img"), None).unwrap().allocated_bytes.unwrap() < 9 << 20);
    let error = convert(
        &*open_disk(path("0.img"), READ, None).unwrap(),
        &path("6.img"),
        None,
        &Default::default(),
        |_| (),
    )
    .unwrap_err();
    assert!(matches!(error, CreateError::Exists(_)), "{error}");
}

#[test]
fn a_conversion_that_fails_leaves_nothing() {
    use crate::faulty::{Fault, FaultPlan, FaultyDisk};
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("a.img"), vec![7; 5 << 20]).unwrap();
    let disk = crate::RawDisk::open(folder.path().join("a.img"), READ).unwrap();
    let plan = FaultPlan::new();
    let disk = FaultyDisk::new(disk, plan.clone());
    for name in ["b.qcow2", "b.img"] {
        plan.clear();
        plan.fail_nth(crate::error::Operation::Read, 1, Fault::Io);
        let error = convert(&disk, &folder.path().join(name), None, &Default::default(), |_| ()).unwrap_err();
        assert!(!error.is_input(), "{error}");
        assert_eq!(listing(folder.path()), ["a.img"]);
    }
}

#[test]
fn information_is_what_qemu_says() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.qcow2");
    let options = CreateOptions {
        cluster_bits: 15,
        refcount_bits: 8,
        extended_l2: true,
        lazy_refcounts: true,
        compression: Compression::Zstd,
        ..Default::default()
    };
    create(&path, &NewImage { qcow2: options, ..sized(3 << 20) }).unwrap();
    let found = info(&path, None).unwrap().qcow2.unwrap();
    assert_eq!((found.version, found.cluster_size, found.refcount_bits), (3, 32 << 10, 8));
    assert!(found.extended_l2 && found.lazy_refcounts && !found.dirty && !found.marked_corrupt);
    assert_eq!((found.compression, found.bitmaps, found.backing), (Compression::Zstd, None, None));
    if qemu_img(&["bitmap", "--add", path.to_str().unwrap()], Path::new("first")).is_none() {
        return println!("left out: qemu-img is not installed (package qemu-utils)");
    }
    qemu_img(&["snapshot", "-c", "now"], &path);
    let text = qemu_img(&["info"], &path).unwrap();
    for part in ["extended l2: true", "refcount bits: 8", "lazy refcounts: true", "zstd"] {
        assert!(text.contains(part), "{part}: {text}");
    }
    let found = info(&path, None).unwrap().qcow2.unwrap();
    assert_eq!(found.bitmaps, Some((1, true)));
    assert_eq!(found.snapshots.iter().map(|s| s.name.as_str()).collect::<Vec<_>>(), ["now"]);
}

#[test]
fn a_repair_mends_counts_and_other_damage_is_described_and_left() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.qcow2");
    create(
        &path,
        &NewImage { qcow2: CreateOptions { cluster_bits: 12, ..Default::default() }, ..sized(1 << 20) },
    )
    .unwrap();
    let disk = open_disk(&path, OpenOptions::default(), None).unwrap();
    write_bytes(&*disk, 0, &vec![7; 64 << 10]).unwrap();
    drop(disk);
    assert!(check(&path).unwrap().is_clean());
    let good = std::fs::read(&path).unwrap();
    // A data cluster counted as free, and the image marked as corrupt by who noticed.
    let mut bytes = good.clone();
    bytes[0x2000 + 2 * 6..0x2000 + 2 * 6 + 2].fill(0);
    bytes[79] |= 2;
    std::fs::write(&path, &bytes).unwrap();
    assert!(open_disk(&path, OpenOptions::default(), None).is_err());
    assert_eq!(check(&path).unwrap().undercounted_clusters, 1);
    assert!(std::fs::read(&path).unwrap() == bytes, "checking changed the image");
    assert_eq!(repair(&path).unwrap().undercounted_clusters, 1);
    assert!(check(&path).unwrap().is_clean() && !info(&path, None).unwrap().qcow2.unwrap().marked_corrupt);
    let disk = open_disk(&path, OpenOptions::default(), None).unwrap();
    let mut found = vec![0; 64 << 10];
    read_bytes(&*disk, 0, &mut found).unwrap();
    assert!(found.iter().all(|byte| *byte == 7));
    drop(disk);
    qemu_img(&["check", "-q"], &path);
    // An entry that points behind the end.
    let mut bytes = good;
    let table = u64::from_be_bytes(bytes[0x3000..0x3008].try_into().unwrap()) as usize & 0xff_ffff;
    bytes[table..table + 8].copy_from_slice(&0x8000_0000_00ff_0000u64.to_be_bytes());
    std::fs::write(&path, &bytes).unwrap();
    assert!(check(&path).unwrap().damage[0].contains("behind the end"));
    assert!(!repair(&path).unwrap().damage.is_empty());
    assert!(std::fs::read(&path).unwrap() == bytes, "what cannot be mended was changed");
}
