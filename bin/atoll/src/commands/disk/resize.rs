//! `atoll disk resize`: a disk made larger.

use std::path::PathBuf;

use atoll_api_types::ByteSize;
use atoll_storage::{DiskErrorKind, DiskFormat, OpenOptions, open_disk};

use super::{open_failure, plain, readable};
use crate::VerbResult;
use crate::failure::Failure;

#[derive(clap::Args)]
pub(super) struct Args {
    /// The image; no machine may be using it
    path: PathBuf,
    /// New size of the disk, such as 40G; not smaller than it is
    size: ByteSize,
    /// Format of the image, if its name does not say it
    #[arg(long)]
    format: Option<DiskFormat>,
}

pub(super) fn run(args: &Args) -> VerbResult {
    let name = plain(&args.path.to_string_lossy());
    let refused = |why: String| Failure::input(format_args!("disk image '{name}' cannot be resized: {why}"));
    // What is wrong with the request is said before anything is opened for writing.
    let reading =
        open_disk(&args.path, OpenOptions { read_only: true }, args.format).map_err(open_failure)?;
    let before = reading.capacity_bytes();
    drop(reading);
    if args.size.0 < before {
        return Err(refused(format!("it has {} and would lose what is behind the end", readable(before))));
    }
    if !args.size.0.is_multiple_of(512) {
        return Err(refused("the size must be a multiple of 512 bytes".to_owned()));
    }
    if args.size.0 > 1 << 60 {
        return Err(refused("the size must be at most 1 EiB".to_owned()));
    }
    let disk = open_disk(&args.path, OpenOptions { read_only: false }, args.format).map_err(open_failure)?;
    disk.resize(args.size.0).and_then(|()| disk.flush()).map_err(|error| match error.kind() {
        DiskErrorKind::Unsupported | DiskErrorKind::OutOfRange => refused(error.to_string()),
        _ => Failure::Internal(error.into()),
    })?;
    println!("{}: {} (was {})", name, readable(disk.capacity_bytes()), readable(before));
    Ok(0)
}
