//! Locks on whole files, to keep two processes from writing one image (`F_OFD_SETLK`, fcntl(2)).
//!
//! Open-file-description locks belong to the open file, not to the process: they survive `fork`, end when the
//! last descriptor of that opening is closed (also when the process is killed), and two openings in one process
//! exclude each other. They are advisory: they bind those who ask. QEMU takes locks of the same family on some
//! bytes of an image, so a lock on the whole file meets those too.
//!
//! On a block device the lock is on the device's node: two nodes for one device do not see each other. Opening
//! a block device with `O_EXCL` excludes mounts and other exclusive openers besides.

#![allow(unsafe_code)]
// UNSAFETY: the library used has no open-file-description locks, so fcntl is called directly.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::MetadataExt;

/// Who else may hold a lock at the same time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LockKind {
    /// Other shared locks. The file must be open for reading.
    Shared,
    /// Nobody. The file must be open for writing.
    Exclusive,
}

/// Why a lock was not had.
#[derive(Debug, thiserror::Error)]
pub enum LockError {
    /// Another opening of the file holds a lock that excludes the one asked for.
    #[error("in use by another process{}", describe(.holders))]
    WouldBlock {
        /// Processes seen to hold a lock on the file; empty when they could not be told (other users').
        holders: Vec<u32>,
    },
    /// The file system or kernel cannot lock.
    #[error("cannot be locked: {0}")]
    Failed(#[source] io::Error),
}

fn describe(holders: &[u32]) -> String {
    match holders {
        [] => String::new(),
        [one] => format!(" (pid {one})"),
        many => format!(" (pids {})", many.iter().map(u32::to_string).collect::<Vec<_>>().join(", ")),
    }
}

/// Locks a whole file without waiting. Asking again on the same opening changes the kind. The lock ends with
/// [`unlock`] or when the last descriptor of this opening is closed.
pub fn try_lock(file: &File, kind: LockKind) -> Result<(), LockError> {
    let kind = match kind {
        LockKind::Shared => libc::F_RDLCK,
        LockKind::Exclusive => libc::F_WRLCK,
    };
    set_lock(file, kind).map_err(|error| match error.raw_os_error() {
        Some(libc::EAGAIN | libc::EACCES) => LockError::WouldBlock { holders: lock_holders(file) },
        _ => LockError::Failed(error),
    })
}

/// Gives the lock of this opening up, if it has one.
pub fn unlock(file: &File) -> io::Result<()> {
    set_lock(file, libc::F_UNLCK)
}

fn set_lock(file: &File, kind: libc::c_int) -> io::Result<()> {
    // SAFETY: a zeroed flock is a valid value: whole file from the start, and no pid as these locks demand.
    let mut lock: libc::flock = unsafe { std::mem::zeroed() };
    lock.l_type = kind as libc::c_short;
    lock.l_whence = libc::SEEK_SET as libc::c_short;
    loop {
        // SAFETY: the descriptor is open and the structure outlives the call.
        if unsafe { libc::fcntl(file.as_fd().as_raw_fd(), libc::F_OFD_SETLK, &lock) } == 0 {
            return Ok(());
        }
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
    }
}

/// Processes whose open files show a lock on `file`, as far as this user may look. Best effort, for messages:
/// the kernel does not name the holder of such a lock.
fn lock_holders(file: &File) -> Vec<u32> {
    let Ok(metadata) = file.metadata() else { return Vec::new() };
    let (major, minor) = (rustix::fs::major(metadata.dev()), rustix::fs::minor(metadata.dev()));
    let wanted = format!(" {major:02x}:{minor:02x}:{} ", metadata.ino());
    let mut holders: Vec<u32> = Vec::new();
    for process in std::fs::read_dir("/proc").into_iter().flatten().flatten() {
        let Some(pid) = process.file_name().to_str().and_then(|name| name.parse().ok()) else { continue };
        let descriptors = std::fs::read_dir(process.path().join("fdinfo")).into_iter().flatten().flatten();
        let holds = descriptors
            .filter_map(|entry| std::fs::read_to_string(entry.path()).ok())
            .any(|text| text.lines().any(|line| line.starts_with("lock:") && line.contains(&wanted)));
        if holds {
            holders.push(pid);
        }
    }
    holders
}

#[cfg(test)]
mod tests {
    use super::*;

    fn two_openings() -> (tempfile::NamedTempFile, File, File) {
        let path = tempfile::NamedTempFile::new().unwrap();
        let open = || File::options().read(true).write(true).open(path.path()).unwrap();
        let (a, b) = (open(), open());
        (path, a, b)
    }

    #[test]
    fn an_exclusive_lock_excludes_everybody_and_names_the_holder() {
        let (_path, a, b) = two_openings();
        try_lock(&a, LockKind::Exclusive).unwrap();
        for kind in [LockKind::Shared, LockKind::Exclusive] {
            let error = try_lock(&b, kind).unwrap_err();
            let expected = format!("in use by another process (pid {})", std::process::id());
            assert_eq!(error.to_string(), expected);
        }
        drop(a);
        try_lock(&b, LockKind::Exclusive).unwrap();
    }

    #[test]
    fn shared_locks_live_together_and_exclude_an_exclusive_one() {
        let (_path, a, b) = two_openings();
        try_lock(&a, LockKind::Shared).unwrap();
        try_lock(&b, LockKind::Shared).unwrap();
        assert!(matches!(try_lock(&b, LockKind::Exclusive), Err(LockError::WouldBlock { .. })));
        unlock(&a).unwrap();
        try_lock(&b, LockKind::Exclusive).unwrap();
    }

    #[test]
    fn a_lock_ends_with_the_last_descriptor_of_its_opening() {
        let (_path, a, b) = two_openings();
        try_lock(&a, LockKind::Exclusive).unwrap();
        let duplicate = a.try_clone().unwrap();
        drop(a);
        assert!(try_lock(&b, LockKind::Exclusive).is_err());
        drop(duplicate);
        try_lock(&b, LockKind::Exclusive).unwrap();
    }

    #[test]
    fn a_file_opened_for_reading_only_cannot_be_locked_exclusively() {
        let path = tempfile::NamedTempFile::new().unwrap();
        let file = File::open(path.path()).unwrap();
        assert!(matches!(try_lock(&file, LockKind::Exclusive), Err(LockError::Failed(_))));
        try_lock(&file, LockKind::Shared).unwrap();
    }
}
