//! Namespaces: what a process cannot name, it cannot reach.

#![allow(unsafe_code)]
// UNSAFETY: these system calls have no safe form.

use std::ffi::CStr;
use std::fmt;
use std::fs;

use super::capabilities;
use super::process::{check, is_root, single_thread};

/// Folders that exist everywhere, on one of which the empty root folder is put for a moment.
const PLACES: [&CStr; 5] = [c"/tmp", c"/proc", c"/dev", c"/usr", c"/sys"];

/// Mount, IPC and host-name namespaces of its own, with root's rights.
pub(super) fn unshare_as_root() -> Result<(), String> {
    unshare(libc::CLONE_NEWNS | libc::CLONE_NEWIPC | libc::CLONE_NEWUTS)
}

/// A user namespace of its own, in which no user of the host has a name; with `others`, also mount, IPC and
/// host-name namespaces, which are made with the rights inside it.
pub(super) fn unshare_user(others: bool) -> Result<(), String> {
    let others = if others { libc::CLONE_NEWNS | libc::CLONE_NEWIPC | libc::CLONE_NEWUTS } else { 0 };
    unshare(libc::CLONE_NEWUSER | others)
}

fn unshare(flags: libc::c_int) -> Result<(), String> {
    // SAFETY: the call takes a number and changes this thread alone.
    check(unsafe { libc::unshare(flags) })
}

/// Makes the root folder an empty one that cannot be written. Needs a mount namespace of its own.
pub(super) fn empty_root() -> Result<(), String> {
    // Nothing of what follows is to be seen outside.
    mount(c"none", c"/", None, libc::MS_REC | libc::MS_SLAVE, None)?;
    let flags = libc::MS_NOSUID | libc::MS_NODEV | libc::MS_NOEXEC | libc::MS_RDONLY;
    let mut result = Err(String::new());
    for place in PLACES {
        result = mount(c"none", place, Some(c"tmpfs"), flags, Some(c"size=4k,nr_inodes=2,mode=555"))
            .and_then(|()| move_into(place));
        if result.is_ok() {
            break;
        }
    }
    result
}

/// Makes `place` the root folder and lets go of the old one (`pivot_root(2)`, "pivot_root(".", ".")").
fn move_into(place: &CStr) -> Result<(), String> {
    // SAFETY: all strings end with NUL and outlive the calls.
    unsafe {
        check(libc::chdir(place.as_ptr()))?;
        let moved = libc::syscall(libc::SYS_pivot_root, c".".as_ptr(), c".".as_ptr());
        check(if moved < 0 { -1 } else { 0 })?;
        check(libc::umount2(c".".as_ptr(), libc::MNT_DETACH))?;
        check(libc::chdir(c"/".as_ptr()))
    }
}

fn mount(
    source: &CStr,
    target: &CStr,
    kind: Option<&CStr>,
    flags: libc::c_ulong,
    data: Option<&CStr>,
) -> Result<(), String> {
    let pointer = |text: Option<&CStr>| text.map_or(std::ptr::null(), CStr::as_ptr);
    // SAFETY: all strings end with NUL and outlive the call; the kernel takes null for an absent kind and absent data.
    check(unsafe {
        libc::mount(source.as_ptr(), target.as_ptr(), pointer(kind), flags, pointer(data).cast())
    })
}

/// What [`leave_network`] came to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Network {
    /// The process has no network: sockets that it makes from now on reach nothing, not even the host itself.
    Left,
    /// It still has the host's network; the text says why.
    Kept(String),
}

impl fmt::Display for Network {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Left => f.write_str("this process has left the host's network"),
            Self::Kept(why) => write!(f, "this process keeps the host's network: {why}"),
        }
    }
}

/// Moves this process into an empty network namespace. Sockets and devices that are open stay usable. Root does it
/// with its own rights; everybody else through a user namespace, in which users and groups keep their numbers and
/// no capability is kept. The process must have one thread.
pub fn leave_network() -> Network {
    let (user, group) = (rustix::process::geteuid(), rustix::process::getegid());
    let left = single_thread().and_then(|()| {
        if is_root() && unshare(libc::CLONE_NEWNET).is_ok() {
            return Ok(());
        }
        unshare(libc::CLONE_NEWUSER | libc::CLONE_NEWNET)?;
        // Without these, ids are shown as "nobody"; what the process may do does not change.
        let _ = fs::write("/proc/self/setgroups", "deny");
        let _ = fs::write("/proc/self/uid_map", format!("{0} {0} 1", user.as_raw()));
        let _ = fs::write("/proc/self/gid_map", format!("{0} {0} 1", group.as_raw()));
        capabilities::drop_all()
    });
    match left {
        Ok(()) => Network::Left,
        Err(why) => Network::Kept(why),
    }
}
