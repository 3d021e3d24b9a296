//! What a process can give up by itself.

#![allow(unsafe_code)]
// UNSAFETY: these system calls have no safe form.

use std::io;

use rustix::process::{Resource, Rlimit, geteuid, getrlimit, setrlimit};

/// The user and group that own nothing (`nobody`, `nogroup`); also what unmapped ids are shown as.
const NOBODY: libc::id_t = 65_534;

pub(super) fn is_root() -> bool {
    geteuid().is_root()
}

/// Fails when the process has threads: they would keep what this one gives up.
pub(super) fn single_thread() -> Result<(), String> {
    let threads = std::fs::read_dir("/proc/self/task").map_or(1, Iterator::count);
    if threads > 1 { Err(format!("the process has {threads} threads already")) } else { Ok(()) }
}

/// No core dumps, and no tracer but root.
pub(super) fn make_unreadable() -> Result<(), String> {
    setrlimit(Resource::Core, Rlimit { current: Some(0), maximum: Some(0) }).map_err(|e| e.to_string())?;
    // SAFETY: the call takes numbers.
    check(unsafe { libc::prctl(libc::PR_SET_DUMPABLE, 0, 0, 0, 0) })
}

/// Root becomes the user who owns nothing, in the group and only the group that owns nothing.
pub(super) fn become_nobody() -> Result<(), String> {
    // SAFETY: an empty list is given, so the pointer is not followed.
    check(unsafe { libc::setgroups(0, std::ptr::null()) })?;
    // SAFETY: the calls take numbers. The process has one thread, so nothing has to be told to others.
    unsafe {
        check(libc::setresgid(NOBODY, NOBODY, NOBODY))?;
        check(libc::setresuid(NOBODY, NOBODY, NOBODY))
    }
}

pub(super) fn no_new_privileges() -> Result<(), String> {
    // SAFETY: the call takes numbers.
    check(unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) })
}

/// Limits descriptors and address space as asked for, and takes away making processes and locking memory.
pub(super) fn limit(open_files: Option<u64>, address_space: Option<u64>) -> Result<(), String> {
    let wanted = [
        (Resource::Nofile, open_files),
        (Resource::As, address_space),
        (Resource::Nproc, Some(0)),
        (Resource::Memlock, Some(0)),
    ];
    for (resource, most) in wanted {
        let Some(most) = most else { continue };
        let most = getrlimit(resource).maximum.map_or(most, |hard| most.min(hard));
        setrlimit(resource, Rlimit { current: Some(most), maximum: Some(most) })
            .map_err(|e| e.to_string())?;
    }
    Ok(())
}

/// The host's words for a call that failed.
pub(super) fn check(result: libc::c_int) -> Result<(), String> {
    if result < 0 { Err(io::Error::last_os_error().to_string()) } else { Ok(()) }
}
