//! `atoll disk info`: what an image is.

use std::fmt::Write;
use std::path::{Path, PathBuf};

use atoll_storage::DiskFormat;
use atoll_storage::images::{ImageInfo, info};
use atoll_storage::qcow2::{Compression, Qcow2Info};
use serde::Serialize;

use super::{open_failure, plain, readable};
use crate::VerbResult;

#[derive(clap::Args)]
pub(super) struct Args {
    /// The image
    path: PathBuf,
    /// Format of the image, if its name does not say it
    #[arg(long)]
    format: Option<DiskFormat>,
    /// Print JSON for programs
    #[arg(long)]
    json: bool,
}

/// What programs are told. Sizes in bytes.
#[derive(Serialize)]
struct Report {
    path: String,
    format: &'static str,
    capacity_bytes: u64,
    file_bytes: u64,
    /// `null` for a device.
    allocated_bytes: Option<u64>,
    /// `null` for other formats.
    qcow2: Option<Qcow2Report>,
}

#[derive(Serialize)]
struct Qcow2Report {
    version: u32,
    cluster_bytes: u64,
    refcount_bits: u32,
    extended_l2: bool,
    lazy_refcounts: bool,
    compression: &'static str,
    dirty: bool,
    marked_corrupt: bool,
    /// `null` without one.
    backing: Option<BackingReport>,
    snapshots: Vec<SnapshotReport>,
    /// `null` without any.
    bitmaps: Option<BitmapsReport>,
}

#[derive(Serialize)]
struct BackingReport {
    /// As the image has it.
    name: String,
    /// Where that is; `null` if it cannot be said.
    path: Option<String>,
    /// `null` if the image does not say.
    format: Option<String>,
}

#[derive(Serialize)]
struct SnapshotReport {
    id: String,
    name: String,
    taken_seconds: u32,
    state_bytes: u64,
}

#[derive(Serialize)]
struct BitmapsReport {
    count: u32,
    consistent: bool,
}

pub(super) fn run(args: &Args) -> VerbResult {
    let found = info(&args.path, args.format).map_err(open_failure)?;
    let report = report(&args.path, found);
    if args.json {
        println!("{}", serde_json::to_string_pretty(&report).map_err(anyhow::Error::from)?);
    } else {
        print!("{}", text(&report));
    }
    Ok(0)
}

fn report(path: &Path, found: ImageInfo) -> Report {
    let backing_path = found.backing_path.map(|path| path.to_string_lossy().into_owned());
    Report {
        path: path.to_string_lossy().into_owned(),
        format: found.format.name(),
        capacity_bytes: found.capacity_bytes,
        file_bytes: found.file_bytes,
        allocated_bytes: found.allocated_bytes,
        qcow2: found.qcow2.map(|image| qcow2_report(image, backing_path)),
    }
}

fn qcow2_report(image: Qcow2Info, path: Option<String>) -> Qcow2Report {
    let snapshot = |snapshot: atoll_storage::qcow2::Snapshot| SnapshotReport {
        id: snapshot.id,
        name: snapshot.name,
        taken_seconds: snapshot.taken_seconds,
        state_bytes: snapshot.state_bytes,
    };
    Qcow2Report {
        version: image.version,
        cluster_bytes: image.cluster_size,
        refcount_bits: image.refcount_bits,
        extended_l2: image.extended_l2,
        lazy_refcounts: image.lazy_refcounts,
        compression: match image.compression {
            Compression::Deflate => "zlib",
            Compression::Zstd => "zstd",
        },
        dirty: image.dirty,
        marked_corrupt: image.marked_corrupt,
        backing: image.backing.map(|(name, format)| BackingReport { name, path, format }),
        snapshots: image.snapshots.into_iter().map(snapshot).collect(),
        bitmaps: image.bitmaps.map(|(count, consistent)| BitmapsReport { count, consistent }),
    }
}

/// A line for each fact.
fn text(report: &Report) -> String {
    let mut text = String::new();
    let mut line = |name: &str, value: String| {
        let _ = writeln!(text, "{name:<12} {value}");
    };
    line("image", plain(&report.path));
    line("format", report.format.to_owned());
    line("disk size", readable(report.capacity_bytes));
    line("file size", readable(report.file_bytes));
    if let Some(bytes) = report.allocated_bytes {
        line("on the host", readable(bytes));
    }
    let Some(image) = &report.qcow2 else { return text };
    line("version", image.version.to_string());
    line("clusters", readable(image.cluster_bytes));
    let mut features =
        vec![format!("{}-bit reference counts", image.refcount_bits), image.compression.to_owned()];
    features.extend(image.extended_l2.then(|| "extended L2".to_owned()));
    features.extend(image.lazy_refcounts.then(|| "lazy reference counts".to_owned()));
    line("features", features.join(", "));
    if let Some(backing) = &image.backing {
        let format = backing.format.as_deref().map_or("format not stated".to_owned(), plain);
        line("backing", format!("{} ({format})", plain(&backing.name)));
        if let Some(path) = backing.path.as_ref().filter(|path| **path != backing.name) {
            line("which is", plain(path));
        }
    }
    for snapshot in &image.snapshots {
        line("snapshot", format!("{} '{}'", plain(&snapshot.id), plain(&snapshot.name)));
    }
    if let Some(bitmaps) = &image.bitmaps {
        let state = if bitmaps.consistent { "" } else { ", not consistent" };
        line("bitmaps", format!("{}{state}", bitmaps.count));
    }
    if image.dirty {
        line("state", "not closed properly; mended when it is opened for writing".to_owned());
    }
    if image.marked_corrupt {
        line("state", "marked as corrupt; see 'atoll disk check'".to_owned());
    }
    text
}
