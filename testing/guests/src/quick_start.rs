//! What `atoll run` without arguments boots.

use std::path::PathBuf;

use crate::cache::Cache;
use crate::kernel::{self, GuestKernel};
use crate::{Progress, Result, initramfs};

/// A kernel, an initial root file system and the command line that belongs to them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct QuickStart {
    /// bzImage of the distribution's kernel for virtual machines.
    pub kernel: PathBuf,
    /// Uncompressed `newc` archive with busybox and the machine's drivers.
    pub initrd: PathBuf,
    /// Kernel command line: kernel messages go to `ttyS0`.
    pub append: String,
    /// What `uname -r` will say.
    pub version: String,
}

/// Gets the quick start from the user's cache, or builds it there. With everything in the cache it takes no
/// network and a few file look-ups; otherwise it downloads about 30 MB through the host's package manager.
///
/// # Errors
/// [`crate::Error::NoPackageManager`] on a host that is neither Debian nor Ubuntu (the text names the two files
/// the user must bring); otherwise what the package manager or the file system said.
pub fn quick_start(progress: &mut dyn Progress) -> Result<QuickStart> {
    in_cache(&Cache::open()?, GuestKernel::Host, progress)
}

/// [`quick_start`] with a given cache and kernel.
///
/// # Errors
/// As [`quick_start`].
pub fn in_cache(cache: &Cache, which: GuestKernel, progress: &mut dyn Progress) -> Result<QuickStart> {
    let files = kernel::fetch(cache, which, progress)?;
    let relative = format!("images/quick-start-{}-{:08x}.cpio", files.version, scripts_fingerprint());
    let mut initrd = cache.path(&relative);
    if !initrd.is_file() {
        let lock = cache.lock()?;
        let busybox = kernel::busybox_locked(cache, &lock, progress)?;
        progress.step("building the initial root file system");
        remove_older(cache);
        initrd = cache.publish_file(&lock, &relative, &initramfs::quick_start(&files, &busybox)?)?;
    }
    progress.done();
    Ok(QuickStart {
        kernel: files.vmlinuz,
        initrd,
        append: command_line(std::env::var("TERM").ok().as_deref()),
        version: files.version,
    })
}

/// Removes the images of other kernels and of other versions of this crate; the caller holds the lock. A machine
/// that is just reading one keeps its open file.
fn remove_older(cache: &Cache) {
    for entry in std::fs::read_dir(cache.path("images")).into_iter().flatten().flatten() {
        if entry.file_name().to_string_lossy().starts_with("quick-start-") {
            let _ = std::fs::remove_file(entry.path());
        }
    }
}

/// The kernel hands `NAME=value` words that it does not know to PID 1 as environment: so the shell learns what
/// kind of terminal it is on.
fn command_line(term: Option<&str>) -> String {
    let plain = |t: &&str| {
        !t.is_empty() && t.len() <= 32 && t.bytes().all(|b| b.is_ascii_alphanumeric() || b"-+._".contains(&b))
    };
    match term.filter(plain) {
        Some(term) => format!("console=ttyS0 TERM={term}"),
        None => "console=ttyS0".to_owned(),
    }
}

/// FNV-1a over the image's scripts and drivers' names: another version of this crate must not use an older one's image.
fn scripts_fingerprint() -> u32 {
    let parts = [initramfs::INIT, initramfs::SESSION, initramfs::LEASE, initramfs::PROFILE];
    let names = initramfs::DRIVERS.iter().flat_map(|name| name.bytes());
    parts
        .iter()
        .flat_map(|part| part.bytes())
        .chain(names)
        .fold(0x811c_9dc5, |hash: u32, byte| (hash ^ u32::from(byte)).wrapping_mul(0x0100_0193))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_terminal_kind_reaches_the_command_line_only_when_it_is_a_plain_word() {
        assert_eq!(command_line(Some("xterm-256color")), "console=ttyS0 TERM=xterm-256color");
        assert_eq!(command_line(Some("a b init=/bin/evil")), "console=ttyS0");
        assert_eq!(command_line(Some("")), "console=ttyS0");
        assert_eq!(command_line(None), "console=ttyS0");
    }
}
