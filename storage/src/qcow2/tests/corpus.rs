//! Every combination of the options that `qemu-img` makes images with, in both directions.
//!
//! Each case: `qemu-img` and `qemu-io` make an image with data, zeroes, discards, compressed clusters and perhaps
//! a snapshot or an unclean end; this implementation has to read what they read, works on the image, and they
//! have to find it right. Then an image made here with the same options. A part of the cases runs with the other
//! tests, all of them in the long lane.

use super::super::create;
use super::interop::{Images, option_text, patchy, qemu_img, require_qemu_img, run, writable};
use super::*;
use crate::raw::OpenOptions;

/// What stands behind an image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Behind {
    Nothing,
    Raw,
    Qcow2,
    /// A qcow2 image in another folder, named relative to the image.
    Elsewhere,
}

#[derive(Debug, Clone)]
struct Case {
    options: CreateOptions,
    behind: Behind,
    preallocation: &'static str,
    snapshot: bool,
    /// The last writer ends without closing the image, which it may with late reference counts.
    unclean: bool,
}

/// Every combination of version, cluster size, width of counts, subclusters, late counts and compression, each
/// with everything that can be behind; the rest by chance from the number of the case.
fn cases() -> Vec<Case> {
    let mut shapes = Vec::new();
    for cluster_bits in 9..=21 {
        let base = CreateOptions { cluster_bits, ..Default::default() };
        shapes.push(CreateOptions { version: 2, ..base.clone() });
        for bits in 0..7 {
            for flags in 0..8 {
                let extended_l2 = flags & 1 != 0;
                if !extended_l2 || cluster_bits >= 14 {
                    shapes.push(CreateOptions {
                        refcount_bits: 1 << bits,
                        extended_l2,
                        lazy_refcounts: flags & 2 != 0,
                        compression: if flags & 4 != 0 { Compression::Zstd } else { Compression::Deflate },
                        ..base.clone()
                    });
                }
            }
        }
    }
    let mut cases = Vec::new();
    for options in shapes {
        for behind in [Behind::Nothing, Behind::Raw, Behind::Qcow2, Behind::Elsewhere] {
            let mut random = Random::new(cases.len() as u64);
            let largest = (1u64 << options.cluster_bits) * 40;
            let size = (1 + random.below(largest.min(6 << 20) / 512)) * 512;
            let choice = ["off", "metadata", "falloc", "full"][random.below(4) as usize];
            // QEMU refuses the combination otherwise.
            let can_allocate = behind == Behind::Nothing || options.extended_l2;
            cases.push(Case {
                behind,
                preallocation: if can_allocate { choice } else { "off" },
                snapshot: options.refcount_bits != 1 && random.below(2) == 0,
                unclean: options.lazy_refcounts && random.below(2) == 0,
                options: CreateOptions { size, ..options.clone() },
            });
        }
    }
    cases
}

/// Commands for `qemu-io` that touch a disk at random; on a fresh image also some compressed clusters, which QEMU
/// writes only where nothing is yet.
fn commands(options: &CreateOptions, fresh: bool, random: &mut Random) -> Vec<String> {
    let cluster = 1u64 << options.cluster_bits;
    let mut list = Vec::new();
    for number in random.below(3)..options.size.div_ceil(cluster).min(if fresh { 5 } else { 0 }) {
        let (start, pattern) = (number * cluster, 1 + random.below(255));
        list.push(format!("write -c -P {pattern} {start} {}", cluster.min(options.size - start)));
    }
    for _ in 0..8 {
        let unit =
            [512, cluster / if options.extended_l2 { 32 } else { 1 }, cluster][random.below(3) as usize];
        let units = options.size.div_ceil(unit);
        let start = random.below(units) * unit;
        let len = ((1 + random.below(units.min(8))) * unit).min(options.size - start);
        let pattern = 1 + random.below(255);
        list.push(match random.below(8) {
            0 => format!("discard {start} {len}"),
            1 => format!("write -z {start} {len}"),
            2 => format!("write -z -u {start} {len}"),
            _ => format!("write -P {pattern} {start} {len}"),
        });
    }
    list
}

/// Runs `qemu-io`. With `unclean` it writes everything out and then aborts.
fn qemu_io(image: &str, commands: &[String], unclean: bool) {
    let mut command = std::process::Command::new("qemu-io");
    command.args(["-f", "qcow2", "-d", "unmap"]);
    for text in commands {
        command.args(["-c", text]);
    }
    if unclean {
        command.args(["-c", "flush", "-c", "abort"]);
    }
    let output = command.arg(image).output().expect("qemu-io starts");
    let said = String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
    assert!(unclean || output.status.success(), "{commands:?}: {said}");
    assert!(!said.contains("failed") && !said.contains("Invalid"), "{commands:?}: {said}");
}

/// Puts something behind an image; says how to name it.
fn backing(images: &Images, case: &Case, random: &mut Random) -> Option<(String, DiskFormat)> {
    let len = (1 + random.below(case.options.size * 2 / 512)) * 512;
    std::fs::write(images.path("base.raw"), patchy(random, len)).unwrap();
    let raw = images.text("base.raw");
    let (name, format) = match case.behind {
        Behind::Nothing => return None,
        Behind::Raw => ("base.raw", DiskFormat::Raw),
        Behind::Qcow2 => ("base.qcow2", DiskFormat::Qcow2),
        Behind::Elsewhere => ("../elsewhere/base.qcow2", DiskFormat::Qcow2),
    };
    if format == DiskFormat::Qcow2 {
        std::fs::create_dir_all(images.path("../elsewhere")).unwrap();
        run(&["convert", "-f", "raw", "-O", "qcow2", "-c", &raw, &images.text(name)]);
    }
    Some((name.to_owned(), format))
}

/// What `qemu-img` reads of an image.
fn as_qemu_reads(images: &Images, snapshot: Option<&str>) -> Vec<u8> {
    let (image, out) = (images.text("a.qcow2"), images.text("out"));
    let mut arguments = vec!["convert", "-f", "qcow2", "-O", "raw"];
    if let Some(name) = snapshot {
        arguments.extend(["-l", name]);
    }
    arguments.extend([image.as_str(), out.as_str()]);
    run(&arguments);
    std::fs::read(images.path("out")).unwrap()
}

fn run_case(number: usize, case: &Case) {
    let what = format!("case {number}: {case:?}");
    let mut random = Random::new(number as u64);
    let images = Images::in_subfolder();
    let behind = backing(&images, case, &mut random);
    let text = format!("{},preallocation={}", option_text(&case.options), case.preallocation);
    let (image, size) = (images.text("a.qcow2"), case.options.size.to_string());
    let mut arguments = vec!["create", "-q", "-f", "qcow2", "-o", &text];
    if let Some((name, format)) = &behind {
        arguments.extend(["-b", name, "-F", format.name()]);
    }
    arguments.extend([image.as_str(), size.as_str()]);
    run(&arguments);

    // A snapshot doubles the uses of a cluster, which several compressed ones may share: not with two bits.
    let fresh = case.preallocation == "off" && !(case.snapshot && case.options.refcount_bits == 2);
    qemu_io(&image, &commands(&case.options, fresh, &mut random), false);
    let mut kept = None;
    if case.snapshot {
        kept = Some(as_qemu_reads(&images, None));
        run(&["snapshot", "-c", "kept", &image]);
    }
    qemu_io(&image, &commands(&case.options, false, &mut random), case.unclean);

    // Read as they read it, without changing a byte of it.
    let mut model = as_qemu_reads(&images, None);
    let before = std::fs::read(&image).unwrap();
    let disk = Qcow2Disk::open(&image, OpenOptions { read_only: true }).unwrap();
    assert!(content(&disk) == model, "{what}");
    if !case.unclean {
        let report = disk.check().unwrap();
        assert!(report.is_clean(), "{what}: {report:?}");
    }
    drop(disk);
    assert!(std::fs::read(&image).unwrap() == before, "{what}: reading changed the image");

    // Work on it, and they agree.
    let disk = writable(&images.path("a.qcow2"));
    for _ in 0..15 {
        random_operation(&disk, &mut model, &mut random, 512);
    }
    assert!(content(&disk) == model, "{what}");
    drop(disk);
    images.agree("a.qcow2", &model, &what);
    if let Some(kept) = kept {
        assert!(as_qemu_reads(&images, Some("kept")) == kept, "{what}: the snapshot changed");
    }

    // The same options, made here.
    let mut options = case.options.clone();
    options.backing = behind;
    create(&images.path("b.qcow2"), &options).unwrap();
    let disk = writable(&images.path("b.qcow2"));
    let mut model = content(&disk);
    for _ in 0..15 {
        random_operation(&disk, &mut model, &mut random, 512);
    }
    drop(disk);
    images.agree("b.qcow2", &model, &what);
}

#[test]
fn a_sample_of_all_combinations_is_read_and_written_as_qemu_does() {
    if !require_qemu_img() {
        return;
    }
    let cases = cases();
    // A step without a factor in common with anything the list repeats by.
    for number in (5..cases.len()).step_by(113) {
        run_case(number, &cases[number]);
    }
}

#[test]
#[ignore = "long: every combination of options takes minutes"]
fn every_combination_is_read_and_written_as_qemu_does() {
    if !require_qemu_img() {
        return;
    }
    let cases = cases();
    // Most of the time goes into starting programs and waiting for the host's disk.
    let threads = std::thread::available_parallelism().map_or(1, usize::from).min(8);
    std::thread::scope(|scope| {
        for first in 0..threads {
            let cases = &cases;
            scope.spawn(move || {
                (first..cases.len()).step_by(threads).for_each(|number| run_case(number, &cases[number]));
            });
        }
    });
    println!("{} combinations of options, {} images", cases.len(), 2 * cases.len());
}

#[test]
fn external_data_and_encryption_are_refused_by_name_and_left_alone() {
    if !require_qemu_img() {
        return;
    }
    let images = Images::new();
    let data = format!("data_file={}", images.text("data"));
    let aes = ["--object", "secret,id=s,data=123456", "-o", "encrypt.format=aes,encrypt.key-secret=s"];
    run(&["create", "-q", "-f", "qcow2", "-o", &data, &images.text("data.qcow2"), "1M"]);
    run(&[&["create", "-q", "-f", "qcow2"][..], &aes, &[&images.text("aes.qcow2"), "1M"]].concat());
    // Making one takes seconds and sometimes fails for the want of them; its header differs in one number.
    let mut luks = std::fs::read(images.path("aes.qcow2")).unwrap();
    luks[35] = 2;
    std::fs::write(images.path("luks.qcow2"), luks).unwrap();
    for (name, named) in [
        ("data.qcow2", "external data file"),
        ("luks.qcow2", "encrypted (LUKS)"),
        ("aes.qcow2", "encrypted (AES)"),
    ] {
        let image = images.text(name);
        let before = std::fs::read(&image).unwrap();
        for read_only in [false, true] {
            let error = Qcow2Disk::open(&image, OpenOptions { read_only }).err().unwrap().to_string();
            assert!(error.contains(named) && error.contains(name), "{error}");
        }
        assert!(std::fs::read(&image).unwrap() == before);
    }
}

#[test]
fn bitmaps_are_kept_by_a_repair_and_given_up_by_a_write() {
    if !require_qemu_img() {
        return;
    }
    for (seed, cluster_bits) in [9, 12, 16, 21].into_iter().enumerate() {
        let mut random = Random::new(seed as u64);
        let images = Images::new();
        let image = images.text("m.qcow2");
        let options = CreateOptions { size: 6 << 20, cluster_bits, ..Default::default() };
        run(&["create", "-q", "-f", "qcow2", "-o", &option_text(&options), &image, "6M"]);
        run(&["bitmap", "--add", "-g", "4096", &image, "first"]);
        run(&["bitmap", "--add", "-g", "512", &image, "second"]);
        qemu_io(&image, &commands(&options, true, &mut random), false);
        let bitmaps = |image: &str| {
            let output = qemu_img(&["info", "--output=json", image]);
            let text = String::from_utf8(output.stdout).unwrap();
            (text.matches("\"granularity\"").count(), text.matches("in-use").count())
        };
        assert_eq!(bitmaps(&image), (2, 0));
        let mut model = content(&Qcow2Disk::open(&image, OpenOptions { read_only: true }).unwrap());

        // A repair of lost space: a cluster behind the end that is counted and not used.
        let mut bytes = std::fs::read(&image).unwrap();
        let table = u64::from_be_bytes(bytes[48..56].try_into().unwrap()) as usize;
        let block = u64::from_be_bytes(bytes[table..table + 8].try_into().unwrap()) as usize;
        let cluster = 1usize << cluster_bits;
        let lost = bytes.len().div_ceil(cluster);
        if lost < cluster / 2 {
            bytes[block + lost * 2 + 1] = 1;
            std::fs::write(&image, &bytes).unwrap();
            let disk = writable(&images.path("m.qcow2"));
            assert_eq!(disk.check().unwrap().leaked_clusters, 1);
            assert_eq!(disk.repair().unwrap().leaked_clusters, 1);
            assert!(disk.check().unwrap().is_clean());
            drop(disk);
            assert_eq!(bitmaps(&image), (2, 0), "clusters of 2^{cluster_bits}");
            images.agree("m.qcow2", &model, "repaired");
        }

        // A write gives them up; their space is lost until somebody repairs the image.
        let disk = writable(&images.path("m.qcow2"));
        assert!(disk.check().unwrap().is_clean());
        for _ in 0..20 {
            random_operation(&disk, &mut model, &mut random, 512);
        }
        write_bytes(&disk, 0, &[1; 512]).unwrap();
        model[..512].fill(1);
        drop(disk);
        assert_eq!(bitmaps(&image).0, 0, "bitmaps that are not true any more count as true");
        let code = qemu_img(&["check", "-q", "-f", "qcow2", &image]).status.code();
        assert_eq!(code, Some(3), "lost clusters and nothing else");
        let disk = writable(&images.path("m.qcow2"));
        assert!(disk.repair().unwrap().leaked_clusters > 0);
        drop(disk);
        images.agree("m.qcow2", &model, "written and repaired");
    }
}
