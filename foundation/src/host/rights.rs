//! What this process may do, found out by trying. Nothing that is tried stays: descriptors are closed, and what
//! would change the process is done in a child.

#![allow(unsafe_code)]
// UNSAFETY: these system calls have no safe form, and a child of a process with threads may only do what is
// async-signal-safe.

use std::fs::OpenOptions;
use std::io;
use std::os::fd::{FromRawFd, OwnedFd};

/// What an attempt came to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Attempt {
    /// It works.
    Works,
    /// The host has it and this user may not.
    Denied,
    /// The host does not have it.
    Absent,
    /// Something else; the text is the host's.
    Failed(String),
}

impl Attempt {
    /// Sorts the host's error.
    pub fn from_error(error: &io::Error) -> Self {
        match error.raw_os_error() {
            Some(libc::EPERM | libc::EACCES) => Self::Denied,
            Some(libc::ENOSYS | libc::ENOENT | libc::ENODEV | libc::ENXIO | libc::EINVAL) => Self::Absent,
            _ => Self::Failed(error.to_string()),
        }
    }

    fn of<T>(result: io::Result<T>) -> Self {
        result.map_or_else(|error| Self::from_error(&error), |_| Self::Works)
    }

    /// Whether it works.
    pub fn works(&self) -> bool {
        *self == Self::Works
    }
}

/// Opens the device at `path` for reading and writing, and closes it.
pub fn open_device(path: &str) -> Attempt {
    Attempt::of(OpenOptions::new().read(true).write(true).open(path))
}

/// Handles page faults (`userfaultfd(2)`): of this program's own accesses only, or of the kernel's on its behalf
/// as well (which system calls and KVM need).
pub fn userfaultfd(kernel_too: bool) -> Attempt {
    /// `UFFD_USER_MODE_ONLY`, Linux 5.11.
    const USER_MODE_ONLY: libc::c_int = 1;
    let flags = libc::O_CLOEXEC | if kernel_too { 0 } else { USER_MODE_ONLY };
    // SAFETY: the call takes one number and makes a descriptor.
    Attempt::of(adopt(unsafe { libc::syscall(libc::SYS_userfaultfd, flags) }))
}

/// Makes an io_uring (`io_uring_setup(2)`).
pub fn io_uring() -> Attempt {
    // `struct io_uring_params` has 120 bytes; more are not written.
    let mut parameters = [0u64; 16];
    // SAFETY: one entry is asked for; the parameters outlive the call and are larger than the kernel's structure,
    // which is all zero.
    Attempt::of(adopt(unsafe { libc::syscall(libc::SYS_io_uring_setup, 1, parameters.as_mut_ptr()) }))
}

/// Makes a user namespace, and in it a network namespace: the second takes the rights that the first should have
/// given, and fails where the host gives none inside (AppArmor's restriction). Tried in a child.
pub fn user_namespace() -> Attempt {
    /// What the child says: 0 for success, else the error of the first or, plus this, of the second step.
    const SECOND: libc::c_int = 128;
    // SAFETY: the child makes system calls only, no memory is allocated and no lock taken, and it leaves by _exit.
    let child = unsafe { libc::fork() };
    match child {
        -1 => Attempt::Failed(io::Error::last_os_error().to_string()),
        0 => {
            // SAFETY: as above; these change the child alone.
            unsafe {
                if libc::unshare(libc::CLONE_NEWUSER) != 0 {
                    libc::_exit((*libc::__errno_location()).clamp(1, SECOND - 1));
                }
                if libc::unshare(libc::CLONE_NEWNET) != 0 {
                    libc::_exit(SECOND + (*libc::__errno_location()).clamp(0, SECOND - 1));
                }
                libc::_exit(0)
            }
        }
        child => match wait(child) {
            Err(error) => Attempt::Failed(error.to_string()),
            Ok(0) => Attempt::Works,
            // A limit of zero namespaces is ENOSPC or EUSERS.
            Ok(libc::ENOSPC | libc::EUSERS) => Attempt::Denied,
            Ok(code) if code >= SECOND => Attempt::Denied,
            Ok(code) => Attempt::from_error(&io::Error::from_raw_os_error(code)),
        },
    }
}

/// The exit code of `child`.
fn wait(child: libc::pid_t) -> io::Result<libc::c_int> {
    let mut status = 0;
    loop {
        // SAFETY: the status outlives the call; the child is ours and is waited for once.
        if unsafe { libc::waitpid(child, &raw mut status, 0) } == child {
            break;
        }
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
    }
    if libc::WIFEXITED(status) {
        Ok(libc::WEXITSTATUS(status))
    } else {
        Err(io::Error::other("the child died"))
    }
}

/// The descriptor that a system call returned, or its error.
fn adopt(result: libc::c_long) -> io::Result<OwnedFd> {
    match i32::try_from(result) {
        // SAFETY: the kernel has just made this descriptor for us.
        Ok(fd) if fd >= 0 => Ok(unsafe { OwnedFd::from_raw_fd(fd) }),
        _ => Err(io::Error::last_os_error()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_hosts_errors_are_sorted_by_what_mends_them() {
        let of = |number| Attempt::from_error(&io::Error::from_raw_os_error(number));
        assert_eq!((of(libc::EPERM), of(libc::ENOSYS)), (Attempt::Denied, Attempt::Absent));
        assert!(matches!(of(libc::EMFILE), Attempt::Failed(_)));
        assert_eq!(open_device("/dev/there/is/none"), Attempt::Absent);
        assert_eq!(open_device("/dev/null"), Attempt::Works);
    }

    #[test]
    fn attempts_leave_no_descriptor_and_no_child_and_no_namespace_behind() {
        let own = || std::fs::read_link("/proc/self/ns/user").unwrap();
        let open = || {
            std::fs::read_dir("/proc/self/fd")
                .unwrap()
                .flatten()
                .map(|e| e.path())
                .filter_map(|p| std::fs::read_link(p).ok())
                .filter(|t| {
                    t.to_string_lossy().contains("userfaultfd") || t.to_string_lossy().contains("io_uring")
                })
                .count()
        };
        let before = own();
        let results = [userfaultfd(true), userfaultfd(false), io_uring(), user_namespace()];
        assert_eq!((own(), open()), (before, 0), "{results:?}");
        assert!(results.iter().all(|r| !matches!(r, Attempt::Failed(_))), "{results:?}");
        // Whoever may handle the kernel's faults may handle the program's.
        assert!(!results[0].works() || results[1].works(), "{results:?}");
    }
}
