//! `atoll disk`: making, looking at, checking, converting and enlarging disk images.
//!
//! Each verb under it is a file; the work is done by `atoll_storage::images`.

mod check;
mod convert;
mod create;
mod info;
mod resize;

use std::path::Path;

use atoll_api_types::ByteSize;
use atoll_storage::DiskFormat;
use atoll_storage::images::CreateError;
use atoll_storage::qcow2::{Compression, CreateOptions};
use clap::Subcommand;

use crate::VerbResult;
use crate::failure::Failure;

#[derive(clap::Args)]
pub(crate) struct Args {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Subcommand)]
enum Verb {
    /// Make an empty image
    Create(create::Args),
    /// Say what an image is
    Info(info::Args),
    /// Look for damage in a qcow2 image, and mend what can be mended
    Check(check::Args),
    /// Copy a disk into a new image
    Convert(convert::Args),
    /// Make a disk larger
    Resize(resize::Args),
}

pub(crate) fn run(args: Args) -> VerbResult {
    match args.verb {
        Verb::Create(args) => create::run(args),
        Verb::Info(args) => info::run(&args),
        Verb::Check(args) => check::run(&args),
        Verb::Convert(args) => convert::run(&args),
        Verb::Resize(args) => resize::run(&args),
    }
}

/// Options of a new qcow2 image.
#[derive(clap::Args)]
struct Qcow2Args {
    /// Unit of allocation, 512 bytes to 2M; larger ones make large disks faster
    #[arg(long, value_name = "SIZE", help_heading = "qcow2")]
    cluster_size: Option<ByteSize>,
    /// Allocate parts of a cluster by themselves (1/32 of it)
    #[arg(long, help_heading = "qcow2")]
    extended_l2: bool,
    /// Bits of a reference count: 1, 2, 4, 8, 16, 32 or 64
    #[arg(long, value_name = "N", help_heading = "qcow2")]
    refcount_bits: Option<u32>,
    /// Let other programs postpone reference counts
    #[arg(long, help_heading = "qcow2")]
    lazy_refcounts: bool,
    /// How other programs are to compress clusters
    #[arg(long, value_name = "KIND", help_heading = "qcow2")]
    compression: Option<CompressionArg>,
    /// Version of the format: 3, or 2 for programs of before 2013
    #[arg(long, value_name = "N", help_heading = "qcow2")]
    qcow2_version: Option<u32>,
}

#[derive(Clone, Copy, clap::ValueEnum)]
enum CompressionArg {
    Zlib,
    Zstd,
}

impl Qcow2Args {
    /// The options; `is_qcow2` says whether there will be a qcow2 image to have them.
    fn options(&self, is_qcow2: bool) -> Result<CreateOptions, Failure> {
        let mut options = CreateOptions::default();
        let cluster_size = self.cluster_size.map(|size| size.0);
        let any =
            cluster_size.is_some() || self.extended_l2 || self.refcount_bits.is_some() || self.lazy_refcounts;
        if !is_qcow2 && (any || self.compression.is_some() || self.qcow2_version.is_some()) {
            return Err(Failure::input(
                "a raw image has none of the options of qcow2; add --format qcow2 or leave them out",
            ));
        }
        if let Some(size) = cluster_size {
            if !size.is_power_of_two() || !(512..=2 << 20).contains(&size) {
                return Err(Failure::input(format_args!(
                    "--cluster-size {}: expected a power of two from 512 to 2M",
                    ByteSize(size)
                )));
            }
            options.cluster_bits = size.trailing_zeros();
        } else if self.extended_l2 {
            // With 64K the parts have 2K, less than the pages that guests write.
            options.cluster_bits = 17;
        }
        options.extended_l2 = self.extended_l2;
        options.lazy_refcounts = self.lazy_refcounts;
        options.refcount_bits = self.refcount_bits.unwrap_or(options.refcount_bits);
        options.version = self.qcow2_version.unwrap_or(options.version);
        if let Some(CompressionArg::Zstd) = self.compression {
            options.compression = Compression::Zstd;
        }
        Ok(options)
    }
}

impl From<CreateError> for Failure {
    fn from(error: CreateError) -> Self {
        if error.is_input() { Self::input(error) } else { Self::Internal(error.into()) }
    }
}

/// The failure to open an image: a host that fails is not the user's fault, everything else is.
fn open_failure(error: atoll_storage::OpenError) -> Failure {
    match error {
        atoll_storage::OpenError::Io { .. } => Failure::Internal(error.into()),
        other => Failure::input(other),
    }
}

/// The format of an image to be.
fn format_for(path: &Path, stated: Option<DiskFormat>) -> DiskFormat {
    stated.unwrap_or_else(|| atoll_storage::images::format_of_name(path))
}

/// Bytes for people: the number, and if it is large, about how much that is.
fn readable(bytes: u64) -> String {
    let units = ["KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    let mut value = bytes as f64 / 1024.0;
    let mut unit = 0;
    while value >= 1024.0 && unit + 1 < units.len() {
        value /= 1024.0;
        unit += 1;
    }
    match bytes {
        0..1024 => format!("{bytes} bytes"),
        _ if value.fract() == 0.0 => format!("{value} {} ({bytes} bytes)", units[unit]),
        _ => format!("{value:.1} {} ({bytes} bytes)", units[unit]),
    }
}

/// Text from an image, fit for a terminal.
fn plain(text: &str) -> String {
    text.escape_debug().to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_given_in_a_unit_that_fits_and_exactly() {
        assert_eq!(readable(0), "0 bytes");
        assert_eq!(readable(1023), "1023 bytes");
        assert_eq!(readable(65536), "64 KiB (65536 bytes)");
        assert_eq!(readable(197_120), "192.5 KiB (197120 bytes)");
        assert_eq!(readable(20 << 30), "20 GiB (21474836480 bytes)");
        assert_eq!(readable(u64::MAX), "16 EiB (18446744073709551615 bytes)");
    }
}
