//! Root's privileges, one by one: none are kept, and none can come back.

#![allow(unsafe_code)]
// UNSAFETY: these system calls have no safe form.

use super::process::check;

/// `_LINUX_CAPABILITY_VERSION_3`: 64 capabilities in two words each.
const VERSION_3: u32 = 0x2008_0522;
/// More capabilities than Linux can number.
const ALL: libc::c_ulong = 64;

/// `cap_user_header_t`.
#[repr(C)]
struct Header {
    version: u32,
    pid: libc::c_int,
}

/// `cap_user_data_t`.
#[repr(C)]
struct Data {
    effective: u32,
    permitted: u32,
    inheritable: u32,
}

const NONE: Data = Data { effective: 0, permitted: 0, inheritable: 0 };

/// Empties the effective, permitted, inheritable, ambient and, where that is permitted, the bounding set.
pub(super) fn drop_all() -> Result<(), String> {
    for capability in 0..ALL {
        // Numbers that this kernel does not have are refused, and so is everything without CAP_SETPCAP: then there
        // is nothing to give up that executing could bring back once new privileges are off.
        // SAFETY: the call takes numbers.
        unsafe { libc::prctl(libc::PR_CAPBSET_DROP, capability, 0, 0, 0) };
    }
    // SAFETY: the call takes numbers. Kernels without ambient capabilities refuse it and have none.
    unsafe { libc::prctl(libc::PR_CAP_AMBIENT, libc::PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0) };
    let header = Header { version: VERSION_3, pid: 0 };
    let data = [NONE, NONE];
    // SAFETY: header and data have the layout of version 3, two words, and outlive the call, which only reads them.
    let result = unsafe { libc::syscall(libc::SYS_capset, &raw const header, data.as_ptr()) };
    check(if result < 0 { -1 } else { 0 })
}
