//! `qemu-img` and this implementation read each other's images. Left out, with a line that says so, where
//! `qemu-img` (package qemu-utils) is not installed.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use super::super::create;
use super::*;
use crate::raw::OpenOptions;

const CASES: u64 = 60;

/// Runs it; the command itself can always be started once [`require_qemu_img`] has said so.
pub(super) fn qemu_img(arguments: &[&str]) -> Output {
    Command::new("qemu-img").args(arguments).output().expect("qemu-img starts")
}

pub(super) fn require_qemu_img() -> bool {
    let there = Command::new("qemu-img").arg("--version").output().is_ok();
    if !there {
        eprintln!("left out: qemu-img is not installed (package qemu-utils)");
    }
    there
}

pub(super) fn run(arguments: &[&str]) {
    let output = qemu_img(arguments);
    assert!(output.status.success(), "qemu-img {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
}

/// A folder of images.
pub(super) struct Images {
    folder: tempfile::TempDir,
    sub: &'static str,
}

impl Images {
    pub(super) fn new() -> Self {
        Self { folder: tempfile::tempdir().unwrap(), sub: "" }
    }

    /// With room beside the folder.
    pub(super) fn in_subfolder() -> Self {
        let images = Self { sub: "images", ..Self::new() };
        std::fs::create_dir(images.folder.path().join(images.sub)).unwrap();
        images
    }

    pub(super) fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(self.sub).join(name)
    }

    pub(super) fn text(&self, name: &str) -> String {
        self.path(name).to_str().unwrap().to_owned()
    }

    /// Checks an image and compares it with the bytes it should hold.
    pub(super) fn agree(&self, name: &str, model: &[u8], what: &str) {
        std::fs::write(self.path("model"), model).unwrap();
        let output = qemu_img(&["check", "-f", "qcow2", &self.text(name)]);
        assert!(output.status.success(), "{what}: {}", String::from_utf8_lossy(&output.stdout));
        let output =
            qemu_img(&["compare", "-f", "qcow2", "-F", "raw", &self.text(name), &self.text("model")]);
        assert!(output.status.success(), "{what}: {}", String::from_utf8_lossy(&output.stdout));
    }
}

pub(super) fn writable(path: &Path) -> Qcow2Disk {
    Qcow2Disk::open(path, OpenOptions { read_only: false }).unwrap()
}

/// Options as `qemu-img -o` takes them.
pub(super) fn option_text(options: &CreateOptions) -> String {
    let mut text = format!("cluster_size={}", 1u64 << options.cluster_bits);
    if options.version == 2 {
        return text + ",compat=0.10";
    }
    let compression = if options.compression == Compression::Zstd { "zstd" } else { "zlib" };
    let flag = |value: bool| if value { "on" } else { "off" };
    text += &format!(
        ",compat=1.1,refcount_bits={},extended_l2={},lazy_refcounts={},compression_type={compression}",
        options.refcount_bits,
        flag(options.extended_l2),
        flag(options.lazy_refcounts)
    );
    text
}

/// Content with runs of zeros and of the same bytes, so that compression and zero clusters occur.
pub(super) fn patchy(random: &mut Random, len: u64) -> Vec<u8> {
    let mut bytes = Vec::new();
    while (bytes.len() as u64) < len {
        let run = 1 + random.below(96 << 10);
        match random.below(3) {
            0 => bytes.resize(bytes.len() + run as usize, 0),
            1 => bytes.resize(bytes.len() + run as usize, random.next_u64() as u8),
            _ => bytes.extend_from_slice(&random_bytes(random, run)),
        }
    }
    bytes.truncate(len as usize);
    bytes
}

#[test]
fn qemu_img_agrees_with_every_image_written_here() {
    if !require_qemu_img() {
        return;
    }
    for seed in 0..CASES {
        let mut random = Random::new(seed);
        let images = Images::new();
        let mut options = random_options(&mut random);
        let mut model = vec![0; options.size as usize];
        match random.below(3) {
            0 => {
                model = patchy(&mut random, options.size);
                std::fs::write(images.path("base.img"), &model).unwrap();
                options.backing = backing_name();
            }
            1 => {
                let base = CreateOptions { size: options.size, ..Default::default() };
                create(&images.path("base"), &base).unwrap();
                let disk = writable(&images.path("base"));
                model = patchy(&mut random, options.size);
                write_bytes(&disk, 0, &model).unwrap();
                options.backing = Some(("base".to_owned(), DiskFormat::Qcow2));
            }
            _ => {}
        }
        create(&images.path("a.qcow2"), &options).unwrap();
        let disk = writable(&images.path("a.qcow2"));
        for _ in 0..40 {
            random_operation(&disk, &mut model, &mut random, 512);
        }
        drop(disk);
        images.agree("a.qcow2", &model, &format!("seed {seed}: {options:?}"));
    }
}

#[test]
fn every_image_of_qemu_img_is_read_and_written() {
    if !require_qemu_img() {
        return;
    }
    for seed in 0..CASES {
        let mut random = Random::new(seed + 1000);
        let images = Images::new();
        let options = random_options(&mut random);
        let mut model = patchy(&mut random, options.size);
        std::fs::write(images.path("raw"), &model).unwrap();
        let text = option_text(&options);
        let (raw, image) = (images.text("raw"), images.text("b.qcow2"));
        let mut arguments = vec!["convert", "-f", "raw", "-O", "qcow2", "-o", &text];
        if random.below(2) == 0 {
            arguments.push("-c");
        }
        arguments.extend([raw.as_str(), image.as_str()]);
        run(&arguments);
        let overlay = random.below(3) == 0;
        if overlay {
            let top = images.text("c.qcow2");
            run(&["create", "-q", "-f", "qcow2", "-o", &text, "-b", "b.qcow2", "-F", "qcow2", &top]);
        }
        let name = if overlay { "c.qcow2" } else { "b.qcow2" };
        let what = format!("seed {seed}, overlay {overlay}: {options:?}");
        let disk = writable(&images.path(name));
        assert!(content(&disk) == model, "{what}");
        let report = disk.check().unwrap();
        assert!(report.is_clean(), "{what}: {report:?}");
        for _ in 0..40 {
            random_operation(&disk, &mut model, &mut random, 512);
        }
        assert!(content(&disk) == model, "{what}");
        drop(disk);
        images.agree(name, &model, &what);
    }
}

#[test]
fn snapshots_are_listed_and_keep_their_content() {
    if !require_qemu_img() {
        return;
    }
    for seed in 0..12 {
        let mut random = Random::new(seed + 2000);
        let images = Images::new();
        let mut options = random_options(&mut random);
        options.refcount_bits = 16;
        let mut model = patchy(&mut random, options.size);
        std::fs::write(images.path("raw"), &model).unwrap();
        let (raw, image) = (images.text("raw"), images.text("s.qcow2"));
        run(&["convert", "-c", "-f", "raw", "-O", "qcow2", "-o", &option_text(&options), &raw, &image]);
        let mut kept = Vec::new();
        for name in ["first", "second"] {
            run(&["snapshot", "-c", name, &image]);
            kept.push((name, model.clone()));
            let disk = writable(&images.path("s.qcow2"));
            assert_eq!(disk.snapshots().last().map(|s| s.name.as_str()), Some(name));
            for _ in 0..30 {
                random_operation(&disk, &mut model, &mut random, 512);
            }
            assert!(disk.check().unwrap().is_clean(), "seed {seed}");
        }
        let what = format!("seed {seed}: {options:?}");
        images.agree("s.qcow2", &model, &what);
        for (name, content) in kept {
            let out = images.text("out");
            run(&["convert", "-l", name, "-f", "qcow2", "-O", "raw", &image, &out]);
            assert!(std::fs::read(&out).unwrap() == content, "{name} of {what}");
        }
    }
}
