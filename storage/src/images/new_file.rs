//! Files that appear under their name when they are whole, or never.
//!
//! The file has no name at first (`O_TMPFILE`), so that it vanishes with this process whatever happens to it.
//! A file system that has no such files gets one with a name that says what it is, removed on failure. Giving it
//! its name is a link, which fails if something has that name.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, CWD, Mode, OFlags};

/// Permissions before the umask.
const MODE: Mode = Mode::from_bits_retain(0o666);

/// A file to be.
pub(super) struct NewFile {
    file: File,
    path: PathBuf,
    /// The name it has meanwhile, where it needs one.
    temporary: Option<PathBuf>,
}

impl NewFile {
    /// Prepares the file at `path`. An existing one is an error already here; nothing is written yet.
    pub(super) fn prepare(path: &Path) -> io::Result<Self> {
        if path.symlink_metadata().is_ok() {
            return Err(io::ErrorKind::AlreadyExists.into());
        }
        let Some(name) = path.file_name() else {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "the path does not end in a name"));
        };
        let folder = folder_of(path);
        let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
        match rustix::fs::open(&folder, flags, MODE) {
            Ok(file) => Ok(Self { file: file.into(), path: path.to_owned(), temporary: None }),
            // Old kernels say "is a directory".
            Err(rustix::io::Errno::OPNOTSUPP | rustix::io::Errno::ISDIR) => {
                let mut temporary = std::ffi::OsString::from(".");
                temporary.push(name);
                temporary.push(format!(".{}.unfinished", std::process::id()));
                let temporary = folder.join(temporary);
                let file = File::options().read(true).write(true).create_new(true).open(&temporary)?;
                Ok(Self { file, path: path.to_owned(), temporary: Some(temporary) })
            }
            Err(error) => Err(error.into()),
        }
    }

    /// Another handle of the open file.
    pub(super) fn file(&self) -> io::Result<File> {
        self.file.try_clone()
    }

    /// Makes it durable and gives it its name.
    pub(super) fn publish(self) -> io::Result<()> {
        self.file.sync_all()?;
        match &self.temporary {
            None => {
                let own = format!("/proc/self/fd/{}", self.file.as_raw_fd());
                rustix::fs::linkat(CWD, own, CWD, &self.path, AtFlags::SYMLINK_FOLLOW)?;
            }
            Some(temporary) => std::fs::hard_link(temporary, &self.path)?,
        }
        File::open(folder_of(&self.path))?.sync_all()
    }
}

impl Drop for NewFile {
    fn drop(&mut self) {
        if let Some(temporary) = &self.temporary {
            let _ = std::fs::remove_file(temporary);
        }
    }
}

/// The folder that a path is in.
pub(super) fn folder_of(path: &Path) -> PathBuf {
    match path.parent() {
        Some(parent) if parent.as_os_str().is_empty() => PathBuf::from("."),
        Some(parent) => parent.to_owned(),
        None => PathBuf::from("/"),
    }
}
