//! Looking at, checking and mending an image by itself: what is behind it is not opened.

use std::fs::File;
use std::path::{Path, PathBuf};

use rustix::fs::SeekFrom;

use super::check::CheckReport;
use super::header::{CORRUPT, Compression, DIRTY, Header, LAZY_REFCOUNTS};
use super::image::Image;
use super::open::{describe, resolve};
use super::snapshot::{self, Snapshot};
use crate::error::OpenError;
use crate::file::HostFile;
use crate::raw::{OpenOptions, open_and_lock};

/// What an image says of itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Qcow2Info {
    /// Size of the disk in bytes, rounded up to whole sectors.
    pub capacity_bytes: u64,
    /// 2 or 3.
    pub version: u32,
    /// In bytes.
    pub cluster_size: u64,
    /// Bits of a reference count.
    pub refcount_bits: u32,
    /// Whether parts of a cluster can be allocated by themselves.
    pub extended_l2: bool,
    /// Whether programs may postpone reference counts.
    pub lazy_refcounts: bool,
    /// How compressed clusters are compressed.
    pub compression: Compression,
    /// It was not closed properly: its reference counts need mending.
    pub dirty: bool,
    /// Some program found it damaged.
    pub marked_corrupt: bool,
    /// The name and the format of the image behind it, as they are stored.
    pub backing: Option<(String, Option<String>)>,
    /// Its internal snapshots.
    pub snapshots: Vec<Snapshot>,
    /// Number of persistent bitmaps, and whether they are true.
    pub bitmaps: Option<(u32, bool)>,
}

/// Looks at an image that is open; also says where what is behind it would be.
pub(crate) fn inspect_file(
    path: &Path,
    file: File,
    file_size: u64,
) -> Result<(Qcow2Info, Option<PathBuf>), OpenError> {
    let wrong = |error| describe(path, error);
    let file = HostFile::new(file);
    let header = Header::read(&file, file_size).map_err(wrong)?;
    let (snapshots, _) = snapshot::read(&file, &header, file_size).map_err(wrong)?;
    let backing_path = header.backing_file.as_ref().map(|name| resolve(path, name));
    let info = Qcow2Info {
        capacity_bytes: header.size.next_multiple_of(512),
        version: header.layout.version,
        cluster_size: header.layout.cluster_size(),
        refcount_bits: 1 << header.layout.refcount_order,
        extended_l2: header.layout.extended,
        lazy_refcounts: header.compatible & LAZY_REFCOUNTS != 0,
        compression: header.compression,
        dirty: header.incompatible & DIRTY != 0,
        marked_corrupt: header.incompatible & CORRUPT != 0,
        bitmaps: header.bitmaps.map(|bitmaps| (bitmaps.count(), header.consistent_bitmaps().is_some())),
        backing: header.backing_file.map(|name| (name, header.backing_format)),
        snapshots,
    };
    Ok((info, backing_path))
}

fn load(path: &Path, read_only: bool) -> Result<Image<HostFile>, OpenError> {
    let wrong = |error| describe(path, error);
    let (file, _) = open_and_lock(path, OpenOptions { read_only })?;
    let file_size = rustix::fs::seek(&file, SeekFrom::End(0)).map_err(|error| wrong(error.into()))?;
    if file_size == 0 {
        return Err(OpenError::Empty(path.to_owned()));
    }
    let file = HostFile::new(file);
    let header = Header::read(&file, file_size).map_err(wrong)?;
    Image::load(file, header, file_size, None).map_err(wrong)
}

/// Checks an image and changes nothing. Takes as long as reading all tables does.
pub fn check_file(path: &Path) -> Result<CheckReport, OpenError> {
    load(path, true)?.check().map_err(|error| describe(path, error))
}

/// Checks an image and mends its reference counts. One with other damage is left as it is; the report describes
/// that damage. Returns what was found before.
pub fn repair_file(path: &Path) -> Result<CheckReport, OpenError> {
    let mut image = load(path, false)?;
    let wrong = |error| describe(path, error);
    let report = image.check().map_err(wrong)?;
    if report.damage.is_empty() {
        image.repair().map_err(wrong)?;
    }
    Ok(report)
}
