//! The files that the boot loader puts into memory.
//!
//! They are opened and read once to be checked, and those bytes go to the first machine that is loaded. A running
//! machine keeps none of them: a reset reads the open files again, so it starts the same kernel even if another
//! file has taken its name, and a machine's process holds no second copy of what its guest has.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use atoll_api_types::{BootSpec, ByteSize};

use crate::error::VmError;

/// Most bytes of a kernel file: larger than any distribution's, smaller than a mistaken disk image.
const MAX_KERNEL: u64 = 512 << 20;
/// Most bytes of an initial RAM disk.
const MAX_INITRD: u64 = 4 << 30;

/// Kernel, initial RAM disk and command line.
pub(crate) struct BootFiles {
    kernel: BootFile,
    initrd: Option<BootFile>,
    append: String,
    /// What the check has read, for the first load.
    checked: Mutex<Option<BootBytes>>,
}

/// The files' contents.
pub(crate) struct BootBytes {
    pub(crate) kernel: Vec<u8>,
    pub(crate) initrd: Option<Vec<u8>>,
}

impl BootFiles {
    /// Opens what `spec` names.
    pub(crate) fn open(spec: &BootSpec) -> Result<Self, VmError> {
        let kernel = spec.kernel.as_deref().ok_or(VmError::NothingToBoot)?;
        let open_initrd = |path: &PathBuf| BootFile::open("initrd", path, MAX_INITRD);
        Ok(Self {
            kernel: BootFile::open("kernel", kernel, MAX_KERNEL)?,
            initrd: spec.initrd.as_ref().map(open_initrd).transpose()?,
            append: spec.append.clone(),
            checked: Mutex::new(None),
        })
    }

    /// Where the kernel was found.
    pub(crate) fn kernel_path(&self) -> &Path {
        &self.kernel.path
    }

    /// The kernel's command line.
    pub(crate) fn append(&self) -> &str {
        &self.append
    }

    /// The contents: those that [`BootFiles::keep`] was given, once, or the files'.
    pub(crate) fn read(&self) -> Result<BootBytes, VmError> {
        if let Some(bytes) = self.checked.lock().unwrap_or_else(PoisonError::into_inner).take() {
            return Ok(bytes);
        }
        Ok(BootBytes {
            kernel: self.kernel.read()?,
            initrd: self.initrd.as_ref().map(BootFile::read).transpose()?,
        })
    }

    /// Keeps `bytes` for the next [`BootFiles::read`].
    pub(crate) fn keep(&self, bytes: BootBytes) {
        *self.checked.lock().unwrap_or_else(PoisonError::into_inner) = Some(bytes);
    }
}

struct BootFile {
    what: &'static str,
    path: PathBuf,
    file: File,
    max: u64,
}

impl BootFile {
    fn open(what: &'static str, path: &Path, max: u64) -> Result<Self, VmError> {
        let wrong = |why: String| VmError::File { what, path: path.to_owned(), why };
        let file = File::open(path).map_err(|e| wrong(explain(&e)))?;
        if file.metadata().is_ok_and(|meta| meta.is_dir()) {
            return Err(wrong("is a directory; expected a file".to_owned()));
        }
        Ok(Self { what, path: path.to_owned(), file, max })
    }

    /// The whole file.
    fn read(&self) -> Result<Vec<u8>, VmError> {
        let wrong = |why: String| VmError::File { what: self.what, path: self.path.clone(), why };
        let len = self.file.metadata().map_err(|e| wrong(explain(&e)))?.len();
        let max = self.max;
        if len > max {
            return Err(wrong(format!("has {len} bytes, more than the {} that fit", ByteSize(max))));
        }
        let mut bytes = vec![0; len as usize];
        match self.file.read_exact_at(&mut bytes, 0) {
            Ok(()) if bytes.is_empty() => Err(wrong("is empty".to_owned())),
            Ok(()) => Ok(bytes),
            Err(e) => Err(wrong(explain(&e))),
        }
    }
}

/// The host's error in words that say what to do.
fn explain(error: &std::io::Error) -> String {
    match error.kind() {
        std::io::ErrorKind::NotFound => "no such file; check the path".to_owned(),
        std::io::ErrorKind::PermissionDenied => {
            "permission denied; make it readable for this user".to_owned()
        }
        std::io::ErrorKind::UnexpectedEof => "became shorter while it was read; try again".to_owned(),
        _ => error.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    #[test]
    fn a_reset_reads_the_file_that_was_opened_and_not_one_that_took_its_name() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("kernel");
        File::create(&path).unwrap().write_all(b"first").unwrap();
        let spec = BootSpec { kernel: Some(path.clone()), ..BootSpec::default() };
        let files = BootFiles::open(&spec).unwrap();
        let bytes = files.read().unwrap();
        assert_eq!(bytes.kernel, b"first");
        files.keep(bytes);
        let other = directory.path().join("other");
        File::create(&other).unwrap().write_all(b"second").unwrap();
        std::fs::rename(&other, &path).unwrap();
        assert_eq!(files.read().unwrap().kernel, b"first", "what the check has read");
        assert!(files.checked.lock().unwrap().is_none(), "kept once only");
        assert_eq!(files.read().unwrap().kernel, b"first", "the file that is open");
    }
}
