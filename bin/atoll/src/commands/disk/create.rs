//! `atoll disk create`: an empty image.

use std::path::PathBuf;

use atoll_api_types::ByteSize;
use atoll_storage::DiskFormat;
use atoll_storage::images::{Backing, NewImage, create};

use super::{Qcow2Args, format_for, readable};
use crate::VerbResult;
use crate::failure::Failure;

#[derive(clap::Args)]
pub(super) struct Args {
    /// The image; a name that ends in .qcow2 makes a qcow2 image, every other one a raw image
    path: PathBuf,
    /// Size of the disk, such as 20G; with --backing, that of the backing image if left out
    size: Option<ByteSize>,
    /// Format of the image: raw or qcow2
    #[arg(long)]
    format: Option<DiskFormat>,
    /// Image whose content shows where the new one has none; it must not change from now on
    #[arg(long, value_name = "FILE")]
    backing: Option<PathBuf>,
    /// Format of the backing image, if its name does not say it
    #[arg(long, value_name = "FORMAT", requires = "backing")]
    backing_format: Option<DiskFormat>,
    #[command(flatten)]
    qcow2: Qcow2Args,
}

pub(super) fn run(args: Args) -> VerbResult {
    let format = format_for(&args.path, args.format);
    if args.size.is_none() && args.backing.is_none() {
        return Err(Failure::input("the size of the disk is missing; say for example 20G"));
    }
    let wanted = NewImage {
        size: args.size.map(|size| size.0),
        format: Some(format),
        backing: args.backing.map(|path| Backing { path, format: args.backing_format }),
        qcow2: args.qcow2.options(format == DiskFormat::Qcow2)?,
    };
    let size = create(&args.path, &wanted)?;
    println!("{}: {}, {}", args.path.display(), format.name(), readable(size));
    Ok(0)
}
