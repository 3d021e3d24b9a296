//! Copying a disk into a new image of any format, zeros left out.

use std::fs::File;
use std::io;
use std::path::Path;

use vm_memory::VolatileSlice;

use super::CreateError;
use super::create::{choose_format, make};
use crate::disk::{Disk, read_bytes};
use crate::file::{HostFile, ImageFile};
use crate::format::DiskFormat;
use crate::qcow2::{CreateOptions, Qcow2Disk};

/// Bytes that are read at once.
const STEP: u64 = 2 << 20;

/// Unit in which zeros are left out, in bytes.
const GRAIN: usize = 4 << 10;

/// What a conversion did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Converted {
    /// Size of the disk in bytes.
    pub size: u64,
    /// Bytes that were written; the others are zeros.
    pub written: u64,
}

/// Copies what a disk holds, with all that is behind it, into a new image. `options` says more about a qcow2
/// image; its size and backing image are not looked at. `progress` is told how many bytes of the disk are done.
pub fn convert(
    source: &dyn Disk,
    path: &Path,
    format: Option<DiskFormat>,
    options: &CreateOptions,
    mut progress: impl FnMut(u64),
) -> Result<Converted, CreateError> {
    let format = choose_format(path, format)?;
    let size = source.capacity_bytes();
    let options = CreateOptions { size, backing: None, ..options.clone() };
    let mut written = 0;
    make(path, format, &options, |file| {
        written = match format {
            DiskFormat::Raw => {
                let file = HostFile::new(file);
                let write = |offset, bytes: &mut [u8]| file.write_at(offset, &[VolatileSlice::from(bytes)]);
                copy(source, GRAIN, write, &mut progress)?
            }
            DiskFormat::Qcow2 => fill_qcow2(source, file, &options, &mut progress)?,
        };
        Ok(())
    })?;
    Ok(Converted { size, written })
}

fn fill_qcow2(
    source: &dyn Disk,
    file: File,
    options: &CreateOptions,
    progress: &mut dyn FnMut(u64),
) -> io::Result<u64> {
    let length = file.metadata()?.len();
    let disk = Qcow2Disk::over(HostFile::new(file), length, false, None)?;
    // A part of a cluster would be filled up with zeros anyway.
    let grain = if options.extended_l2 { GRAIN } else { 1 << options.cluster_bits.clamp(12, 21) };
    let write = |offset, bytes: &mut [u8]| {
        disk.write_at(offset, &[VolatileSlice::from(bytes)]).map_err(io::Error::other)
    };
    let written = copy(source, grain, write, progress)?;
    disk.flush().map_err(io::Error::other)?;
    Ok(written)
}

/// Copies runs of what is not zero; returns how many bytes that were. `grain` divides [`STEP`].
fn copy(
    source: &dyn Disk,
    grain: usize,
    mut write: impl FnMut(u64, &mut [u8]) -> io::Result<()>,
    progress: &mut dyn FnMut(u64),
) -> io::Result<u64> {
    let size = source.capacity_bytes();
    let mut buffer = vec![0; STEP as usize];
    let (mut at, mut written) = (0, 0);
    while at < size {
        let bytes = &mut buffer[..STEP.min(size - at) as usize];
        read_bytes(source, at, bytes).map_err(io::Error::other)?;
        let mut start = 0;
        while start < bytes.len() {
            let is_zero =
                |from: usize| bytes[from..bytes.len().min(from + grain)].iter().all(|byte| *byte == 0);
            if is_zero(start) {
                start += grain;
                continue;
            }
            let mut end = start + grain;
            while end < bytes.len() && !is_zero(end) {
                end += grain;
            }
            let end = end.min(bytes.len());
            write(at + start as u64, &mut bytes[start..end])?;
            written += (end - start) as u64;
            start = end;
        }
        at += bytes.len() as u64;
        progress(at);
    }
    Ok(written)
}
