//! `atoll disk convert`: a disk copied into a new image.

use std::io::{IsTerminal, stderr};
use std::path::PathBuf;

use atoll_storage::images::convert;
use atoll_storage::{DiskFormat, OpenOptions, open_disk};
use indicatif::{ProgressBar, ProgressStyle};

use super::{Qcow2Args, format_for, open_failure, readable};
use crate::VerbResult;

#[derive(clap::Args)]
pub(super) struct Args {
    /// What to copy: an image with all that is behind it, a block device, or an address (nbd://...)
    source: PathBuf,
    /// The new image; a name that ends in .qcow2 makes a qcow2 image, every other one a raw image
    target: PathBuf,
    /// Format of the source, if its name does not say it
    #[arg(long, value_name = "FORMAT")]
    source_format: Option<DiskFormat>,
    /// Format of the new image: raw or qcow2
    #[arg(long)]
    format: Option<DiskFormat>,
    #[command(flatten)]
    qcow2: Qcow2Args,
}

pub(super) fn run(args: &Args) -> VerbResult {
    let format = format_for(&args.target, args.format);
    let options = args.qcow2.options(format == DiskFormat::Qcow2)?;
    let read_only = OpenOptions { read_only: true };
    let source = open_disk(&args.source, read_only, args.source_format).map_err(open_failure)?;
    let bar = if stderr().is_terminal() {
        ProgressBar::new(source.capacity_bytes())
    } else {
        ProgressBar::hidden()
    };
    if let Ok(style) = ProgressStyle::with_template("{bar:40} {bytes} of {total_bytes}, {eta} left") {
        bar.set_style(style);
    }
    let result = convert(&*source, &args.target, Some(format), &options, |done| bar.set_position(done));
    bar.finish_and_clear();
    let converted = result?;
    println!(
        "{}: {}, {}, of which {} are not zero",
        args.target.display(),
        format.name(),
        readable(converted.size),
        readable(converted.written)
    );
    Ok(0)
}
