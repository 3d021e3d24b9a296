//! Making empty images.

use std::fs::File;
use std::io;
use std::path::{Component, Path, PathBuf};

use super::new_file::{NewFile, folder_of};
use super::{CreateError, format_of_name};
use crate::disk::SECTOR_SIZE;
use crate::file::HostFile;
use crate::format::{DiskFormat, open_disk};
use crate::qcow2::{CreateOptions, format_image};
use crate::raw::OpenOptions;

/// The largest image, in bytes; more than any file system holds.
const MAX_SIZE: u64 = 1 << 60;

/// An image to be behind another one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Backing {
    /// Its path as this process sees it.
    pub path: PathBuf,
    /// Its format; `None` for the one that its name stands for.
    pub format: Option<DiskFormat>,
}

/// What image is wanted.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct NewImage {
    /// Size of the disk in bytes, a multiple of 512; `None` for that of what is behind it.
    pub size: Option<u64>,
    /// The format; `None` for the one that its name stands for.
    pub format: Option<DiskFormat>,
    /// What is behind it. qcow2 only.
    pub backing: Option<Backing>,
    /// Everything else about a qcow2 image; size and backing image in it are not looked at.
    pub qcow2: CreateOptions,
}

/// Makes an empty image. Returns the size of its disk in bytes.
pub fn create(path: &Path, wanted: &NewImage) -> Result<u64, CreateError> {
    let refused = |reason: &str| CreateError::Refused { path: path.to_owned(), reason: reason.to_owned() };
    let format = choose_format(path, wanted.format)?;
    if format == DiskFormat::Raw && wanted.backing.is_some() {
        return Err(refused("a raw image has nothing behind it; use qcow2"));
    }
    let mut options = wanted.qcow2.clone();
    options.backing = None;
    let mut size = wanted.size;
    if let Some(backing) = &wanted.backing {
        let (name, format, capacity) = look_behind(path, backing)?;
        options.backing = Some((name, format));
        size = size.or(Some(capacity));
    }
    let size = size.ok_or_else(|| refused("its size is missing"))?;
    if size == 0 || !size.is_multiple_of(SECTOR_SIZE) || size > MAX_SIZE {
        return Err(refused("the size must be a multiple of 512 bytes, at least one and at most 1 EiB"));
    }
    options.size = size;
    make(path, format, &options, |_| Ok(())).map(|()| size)
}

/// The format of an image to be, which its name must not contradict: it could not be opened by that name.
pub(super) fn choose_format(path: &Path, format: Option<DiskFormat>) -> Result<DiskFormat, CreateError> {
    let named = format_of_name(path);
    match format {
        Some(DiskFormat::Raw) if named == DiskFormat::Qcow2 => Err(CreateError::Refused {
            path: path.to_owned(),
            reason: "a name that ends in .qcow2 is not for a raw image; choose another".to_owned(),
        }),
        other => Ok(other.unwrap_or(named)),
    }
}

/// Makes an image, has it filled, and publishes it.
pub(super) fn make(
    path: &Path,
    format: DiskFormat,
    options: &CreateOptions,
    fill: impl FnOnce(File) -> io::Result<()>,
) -> Result<(), CreateError> {
    let host = |error| CreateError::host(path, error);
    let new = NewFile::prepare(path).map_err(host)?;
    let file = new.file().map_err(host)?;
    match format {
        DiskFormat::Raw => file.set_len(options.size).map_err(host)?,
        DiskFormat::Qcow2 => drop(format_image(&HostFile::new(file), options).map_err(host)?),
    }
    fill(new.file().map_err(host)?).map_err(host)?;
    new.publish().map_err(host)
}

/// Opens what is to be behind an image, with everything behind that. Returns how the image should name it, its
/// format, and its size.
fn look_behind(image: &Path, backing: &Backing) -> Result<(String, DiskFormat, u64), CreateError> {
    let refused = |reason: String| CreateError::Refused { path: image.to_owned(), reason };
    if crate::nbd::text_of(&backing.path).is_some() {
        return Err(refused(
            "a backing image is a file or block device; an address cannot be one".to_owned(),
        ));
    }
    let disk = open_disk(&backing.path, OpenOptions { read_only: true }, backing.format)?;
    let host = |error| CreateError::host(image, error);
    let name = if backing.path.is_absolute() {
        backing.path.clone()
    } else {
        let folder = std::fs::canonicalize(folder_of(image)).map_err(host)?;
        let target = std::fs::canonicalize(folder_of(&backing.path)).map_err(host)?;
        relative(&folder, &target).join(backing.path.file_name().unwrap_or_default())
    };
    let Some(name) = name.to_str() else {
        return Err(refused("the backing image's name is no text, which the format needs".to_owned()));
    };
    // A colon before the first slash would make it an address.
    let has_scheme = name.split('/').next().is_some_and(|first| first.contains(':'));
    let name = if has_scheme { format!("./{name}") } else { name.to_owned() };
    let format = backing.format.unwrap_or_else(|| format_of_name(&backing.path));
    Ok((name, format, disk.capacity_bytes()))
}

/// The way from one folder to another; both are absolute and without links.
fn relative(from: &Path, to: &Path) -> PathBuf {
    let common = from.components().zip(to.components()).take_while(|(a, b)| a == b).count();
    let up = from.components().skip(common).map(|_| Component::ParentDir);
    up.chain(to.components().skip(common)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_way_between_folders_goes_up_and_down() {
        for (from, to, way) in [
            ("/a/b", "/a/b", ""),
            ("/a/b", "/a", ".."),
            ("/a", "/a/b/c", "b/c"),
            ("/a/b", "/c", "../../c"),
            ("/", "/x", "x"),
        ] {
            assert_eq!(relative(Path::new(from), Path::new(to)), Path::new(way), "{from} {to}");
        }
    }
}
