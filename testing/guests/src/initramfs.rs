//! The initial root file systems: an interactive shell, a single program, and a step to a disk.
//!
//! Each is a `newc` archive built in memory. The same kernel modules and busybox give the same bytes. The
//! archives are not compressed: the kernel would spend more guest instructions on unpacking than the host
//! saves on reading.

use std::path::Path;
use std::process::Command;

use crate::cpio::Archive;
use crate::kernel::KernelFiles;
use crate::modules::{self, Module};
use crate::{Error, Result, apt};

/// Drivers of the machine's devices, in the order in which to load them. A kernel that has one built in, or
/// none of that name, does without.
pub const DRIVERS: [&str; 11] = [
    "virtio_pci",
    "virtio_console",
    "virtio_blk",
    "virtio_rng",
    "virtio_net",
    "pvpanic",
    "pvpanic_mmio",
    "pvpanic_pci",
    "crc32c_generic",
    "crc32c_intel",
    "ext4",
];

pub(crate) const PROFILE: &str = "export PATH=/bin:/sbin:/usr/bin:/usr/sbin PS1='\\h:\\w# '\n";

/// The scripts of the images; part of the cache key of [`crate::quick_start`].
pub(crate) const INIT: &str = include_str!("scripts/init.sh");
pub(crate) const SESSION: &str = include_str!("scripts/session.sh");
pub(crate) const LEASE: &str = include_str!("scripts/lease.sh");
const DISK: &str = include_str!("scripts/disk.sh");

/// The quick start: busybox, the machine's drivers, an address for each network interface that gets one by DHCP or
/// router advertisement, a root shell on `hvc0` (on `ttyS0` where there is no virtio
/// console). Leaving the shell powers the machine off; `poweroff` and `reboot` work.
///
/// # Errors
/// [`Error::Io`], [`Error::Module`], or [`Error::Command`] if `busybox` cannot say which commands it has.
pub fn quick_start(kernel: &KernelFiles, busybox: &Path) -> Result<Vec<u8>> {
    let mut archive = base();
    add_busybox(&mut archive, busybox)?;
    add_modules(&mut archive, &modules::closure(&kernel.modules_dir, &DRIVERS)?);
    archive.file("init", 0o755, INIT.as_bytes());
    archive.file("etc/session", 0o755, SESSION.as_bytes());
    // Where the distribution's busybox looks for it.
    archive.file("etc/udhcpc/default.script", 0o755, LEASE.as_bytes());
    archive.file("etc/hosts", 0o644, b"127.0.0.1 localhost\n::1 localhost\n");
    archive.file("etc/profile", 0o644, PROFILE.as_bytes());
    archive.file("etc/hostname", 0o644, b"atoll\n");
    archive.file("etc/passwd", 0o644, b"root::0:0:root:/root:/bin/sh\n");
    archive.file("etc/group", 0o644, b"root:x:0:\n");
    archive.directory("root");
    archive.directory("mnt");
    Ok(archive.finish())
}

/// One statically linked program as PID 1, without drivers: the smallest guest that reaches user space.
#[must_use]
pub fn program(program: &[u8]) -> Vec<u8> {
    let mut archive = base();
    archive.file("init", 0o755, program);
    archive.finish()
}

/// Loads the drivers and hands over to `/sbin/init` of the ext4 file system on the first virtio disk.
///
/// # Errors
/// As [`quick_start`].
pub fn root_on_disk(kernel: &KernelFiles, busybox: &Path) -> Result<Vec<u8>> {
    let mut archive = base();
    add_busybox(&mut archive, busybox)?;
    add_modules(&mut archive, &modules::closure(&kernel.modules_dir, &DRIVERS)?);
    archive.file("init", 0o755, DISK.as_bytes());
    archive.directory("root");
    Ok(archive.finish())
}

/// busybox, the machine's drivers and a shell script of the caller's as PID 1. The drivers are in `/lib/modules`,
/// listed in `/etc/modules` in the order in which to load them.
///
/// # Errors
/// As [`quick_start`].
pub fn scripted(kernel: &KernelFiles, busybox: &Path, script: &str) -> Result<Vec<u8>> {
    let mut archive = base();
    add_busybox(&mut archive, busybox)?;
    add_modules(&mut archive, &modules::closure(&kernel.modules_dir, &DRIVERS)?);
    archive.file("init", 0o755, script.as_bytes());
    archive.directory("mnt");
    Ok(archive.finish())
}

/// Mount points, and the device nodes that PID 1 needs before `/dev` is mounted.
fn base() -> Archive {
    let mut archive = Archive::new();
    for directory in ["dev", "proc", "sys", "tmp", "run"] {
        archive.directory(directory);
    }
    archive.character_device("dev/console", 0o600, 5, 1);
    archive.character_device("dev/null", 0o666, 1, 3);
    archive
}

fn add_modules(archive: &mut Archive, modules: &[Module]) {
    let mut list = String::new();
    for module in modules {
        archive.file(&format!("lib/modules/{}.ko", module.name), 0o644, &module.bytes);
        list.push_str(&module.name);
        list.push('\n');
    }
    archive.file("etc/modules", 0o644, list.as_bytes());
}

/// busybox and a symbolic link for each of its commands, as it lists them itself.
fn add_busybox(archive: &mut Archive, busybox: &Path) -> Result<()> {
    let bytes = std::fs::read(busybox).map_err(Error::io("read", busybox))?;
    archive.file("bin/busybox", 0o755, &bytes);
    let list = apt::run("busybox --list-full", Command::new(busybox).arg("--list-full"))?;
    for path in list.lines().filter(|p| is_command_path(p)) {
        archive.symlink(path, "/bin/busybox");
    }
    Ok(())
}

/// `bin/sh`, `usr/bin/awk` and the like; not busybox itself, and nothing that would replace `/init`.
fn is_command_path(path: &str) -> bool {
    let known = ["bin/", "sbin/", "usr/bin/", "usr/sbin/"];
    path != "bin/busybox" && known.iter().any(|k| path.strip_prefix(k).is_some_and(|n| !n.contains('/')))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_command_paths_become_links() {
        assert!(is_command_path("bin/sh") && is_command_path("usr/sbin/chroot"));
        assert!(
            !is_command_path("bin/busybox") && !is_command_path("linuxrc") && !is_command_path("bin/../init")
        );
    }

    #[test]
    fn the_program_image_has_an_executable_init_and_a_console() {
        let text = String::from_utf8_lossy(&program(b"ELF")).into_owned();
        assert!(text.contains("init\0") && text.contains("dev/console\0") && text.contains("TRAILER!!!"));
        assert_eq!(program(b"ELF"), program(b"ELF"));
    }

    #[test]
    fn modules_are_listed_in_the_order_in_which_they_load() {
        let mut archive = Archive::new();
        let module = |name: &str| Module { name: name.to_owned(), bytes: Vec::new() };
        add_modules(&mut archive, &[module("virtio"), module("virtio_ring")]);
        assert!(String::from_utf8_lossy(&archive.finish()).contains("virtio\nvirtio_ring\n"));
    }
}
