//! The cache directory: `$XDG_CACHE_HOME/atoll/guests` or `~/.cache/atoll/guests`.
//!
//! Invariants: an entry that has its final name is complete (it was written under a temporary name in the
//! same file system and renamed), and only the holder of `lock` writes. Readers need no lock.
//!
//! ```text
//! guests/
//!   lock                      held by the one writer
//!   apt/                      private package-manager state, see `apt`
//!   packages/NAME/            one unpacked package
//!   resolved/META             the package that a meta package led to
//!   images/                   initramfs and disk images
//!   tmp-*                     being written; left only by a killed writer, removed by the next one
//! ```

use std::fs::{self, File, OpenOptions};
use std::path::{Path, PathBuf};

use crate::{Error, Result};

/// The cache. Cheap to open; creates its directory.
#[derive(Debug, Clone)]
pub struct Cache {
    root: PathBuf,
}

/// Exclusive right to write, released on drop.
#[derive(Debug)]
pub struct CacheLock {
    _file: File,
}

impl Cache {
    /// The user's cache.
    ///
    /// # Errors
    /// [`Error::NoCacheDirectory`] without `HOME` and `XDG_CACHE_HOME`; [`Error::Io`] if it cannot be created.
    pub fn open() -> Result<Self> {
        let base = directory_from(std::env::var_os("XDG_CACHE_HOME").map(PathBuf::from))
            .or_else(|| directory_from(std::env::var_os("HOME").map(PathBuf::from)).map(|h| h.join(".cache")))
            .ok_or(Error::NoCacheDirectory)?;
        Self::at(&base.join("atoll").join("guests"))
    }

    /// A cache in `root`, which is created.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn at(root: &Path) -> Result<Self> {
        fs::create_dir_all(root).map_err(Error::io("create the cache directory", root))?;
        Ok(Self { root: root.to_path_buf() })
    }

    /// The cache's directory.
    #[must_use]
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// Where the entry `relative` is, whether or not it exists.
    #[must_use]
    pub fn path(&self, relative: &str) -> PathBuf {
        self.root.join(relative)
    }

    /// Waits for the right to write and removes what a killed writer left behind.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn lock(&self) -> Result<CacheLock> {
        let path = self.path("lock");
        let file = OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .open(&path)
            .map_err(Error::io("open the lock file", &path))?;
        file.lock().map_err(Error::io("lock", &path))?;
        for entry in fs::read_dir(&self.root).into_iter().flatten().flatten() {
            if entry.file_name().to_string_lossy().starts_with("tmp-") {
                let path = entry.path();
                let _ = if path.is_dir() { fs::remove_dir_all(&path) } else { fs::remove_file(&path) };
            }
        }
        Ok(CacheLock { _file: file })
    }

    /// Fills a new directory with `fill` and gives it its final name. An existing entry is kept.
    ///
    /// # Errors
    /// Whatever `fill` says, or [`Error::Io`]; nothing is left behind then.
    pub fn publish_directory<F>(&self, _lock: &CacheLock, relative: &str, fill: F) -> Result<PathBuf>
    where
        F: FnOnce(&Path) -> Result<()>,
    {
        let target = self.path(relative);
        if target.exists() {
            return Ok(target);
        }
        let temporary = tempfile::Builder::new()
            .prefix("tmp-")
            .tempdir_in(&self.root)
            .map_err(Error::io("create a directory in", &self.root))?;
        fill(temporary.path())?;
        self.make_parent(&target)?;
        let path = temporary.keep();
        fs::rename(&path, &target).map_err(|source| {
            let _ = fs::remove_dir_all(&path);
            Error::Io { action: "rename into the cache", path: target.clone(), source }
        })?;
        Ok(target)
    }

    /// Writes `bytes` as the entry `relative`, replacing it in one step.
    ///
    /// # Errors
    /// [`Error::Io`]; nothing is left behind then.
    pub fn publish_file(&self, _lock: &CacheLock, relative: &str, bytes: &[u8]) -> Result<PathBuf> {
        let target = self.path(relative);
        self.make_parent(&target)?;
        let file = tempfile::Builder::new()
            .prefix("tmp-")
            .tempfile_in(&self.root)
            .map_err(Error::io("create a file in", &self.root))?;
        fs::write(file.path(), bytes).map_err(Error::io("write", file.path()))?;
        file.persist(&target).map_err(|e| Error::Io {
            action: "rename into the cache",
            path: target.clone(),
            source: e.error,
        })?;
        Ok(target)
    }

    fn make_parent(&self, target: &Path) -> Result<()> {
        let parent = target.parent().unwrap_or(&self.root);
        fs::create_dir_all(parent).map_err(Error::io("create", parent))
    }
}

/// Relative directories are ignored, as the XDG base directory specification asks.
fn directory_from(value: Option<PathBuf>) -> Option<PathBuf> {
    value.filter(|p| p.is_absolute())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cache() -> (tempfile::TempDir, Cache) {
        let dir = tempfile::tempdir().unwrap();
        let cache = Cache::at(&dir.path().join("c")).unwrap();
        (dir, cache)
    }

    fn names(cache: &Cache) -> Vec<String> {
        let mut names: Vec<_> = fs::read_dir(cache.root())
            .unwrap()
            .map(|e| e.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }

    #[test]
    fn a_failed_fill_leaves_nothing_behind() {
        let (_dir, cache) = cache();
        let lock = cache.lock().unwrap();
        let result = cache.publish_directory(&lock, "packages/p", |at| {
            fs::write(at.join("half"), b"x").unwrap();
            Err(Error::NoCacheDirectory)
        });
        assert!(result.is_err());
        assert!(!cache.path("packages/p").exists());
        assert_eq!(names(&cache), ["lock"]);
    }

    #[test]
    fn a_published_directory_is_complete_and_is_not_filled_twice() {
        let (_dir, cache) = cache();
        let lock = cache.lock().unwrap();
        let path = cache
            .publish_directory(&lock, "packages/p", |at| {
                assert!(!cache.path("packages/p").exists(), "not visible while it is being written");
                fs::write(at.join("f"), b"1").map_err(Error::io("write", at))
            })
            .unwrap();
        assert_eq!(fs::read(path.join("f")).unwrap(), b"1");
        cache.publish_directory(&lock, "packages/p", |_| panic!("filled again")).unwrap();
    }

    #[test]
    fn the_next_writer_removes_what_a_killed_one_left() {
        let (_dir, cache) = cache();
        fs::create_dir(cache.path("tmp-dead")).unwrap();
        fs::write(cache.path("tmp-dead/x"), b"x").unwrap();
        fs::write(cache.path("tmp-dead-file"), b"x").unwrap();
        let _lock = cache.lock().unwrap();
        assert_eq!(names(&cache), ["lock"]);
    }

    #[test]
    fn a_second_writer_waits_for_the_first() {
        let (_dir, cache) = cache();
        let lock = cache.lock().unwrap();
        let other = cache.clone();
        let (tell, told) = std::sync::mpsc::channel();
        let thread = std::thread::spawn(move || {
            let _lock = other.lock().unwrap();
            tell.send(()).unwrap();
        });
        assert!(told.recv_timeout(std::time::Duration::from_millis(100)).is_err(), "locked while held");
        drop(lock);
        told.recv_timeout(std::time::Duration::from_secs(10)).unwrap();
        thread.join().unwrap();
    }

    #[test]
    fn a_published_file_replaces_the_old_one() {
        let (_dir, cache) = cache();
        let lock = cache.lock().unwrap();
        cache.publish_file(&lock, "images/i", b"old").unwrap();
        let path = cache.publish_file(&lock, "images/i", b"new").unwrap();
        assert_eq!(fs::read(path).unwrap(), b"new");
        assert_eq!(names(&cache), ["images", "lock"]);
    }

    #[test]
    fn relative_cache_directories_are_ignored() {
        assert_eq!(directory_from(Some(PathBuf::from("relative"))), None);
        assert_eq!(directory_from(Some(PathBuf::from("/a"))), Some(PathBuf::from("/a")));
    }
}
