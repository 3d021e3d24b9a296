//! A whole Debian 12 as a disk image: the guest that shows an ordinary operating system at work.
//!
//! `mmdebstrap` puts the root file system together as a tar archive, as root directly and otherwise in a user
//! namespace. A second step unpacks it with the same ownership and lets `mke2fs -d` write the ext4 image, so
//! nothing is ever mounted. The image has no partition table and no kernel: boot it with a kernel of
//! [`crate::kernel`] and the archive of [`crate::initramfs::root_on_disk`].

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::cache::Cache;
use crate::{Error, Progress, Result, apt};

/// Size of the image file, of which about a quarter is in use; the rest is a hole.
const IMAGE_SIZE: &str = "2G";

/// Part of the cache key: raise it when the contents below change.
const REVISION: u32 = 3;

/// Packages beyond the essential ones.
const PACKAGES: &str = "systemd-sysv,udev,dbus,kmod,procps,util-linux,login,passwd,iproute2,openssh-server";

/// Finishing touches, run in the new root: an empty root password, a name, the file-system table, addresses for every
/// network interface by DHCP and router advertisement, the DNS server of user-mode NAT, an SSH server. The login
/// prompts on `ttyS0` and `hvc0` come from systemd's own getty generator.
const CUSTOMIZE: &str = r#"set -e
chroot "$1" passwd -d root
echo atoll-debian >"$1/etc/hostname"
echo '127.0.0.1 localhost atoll-debian' >"$1/etc/hosts"
echo '/dev/vda / ext4 errors=remount-ro 0 1' >"$1/etc/fstab"
printf 'ttyS0\nhvc0\n' >>"$1/etc/securetty"
: >"$1/etc/machine-id"
printf '[Match]\nName=en* eth*\n[Network]\nDHCP=yes\n' >"$1/etc/systemd/network/80-dhcp.network"
rm -f "$1/etc/resolv.conf"
echo 'nameserver 10.0.2.3' >"$1/etc/resolv.conf"
chroot "$1" systemctl enable systemd-networkd ssh
chroot "$1" systemctl mask systemd-networkd-wait-online
"#;

/// Unpacks a tar archive from standard input and writes the image named by `$1`, `$2` long. Device nodes stay
/// out: a user namespace may not make them, and the guest's `/dev` is a file system of its own.
const MAKE_IMAGE: &str = r#"set -e
root=$(mktemp -d)
trap 'rm -rf "$root"' EXIT
tar -C "$root" --numeric-owner --xattrs --xattrs-include='*' --exclude='./dev/*' -xpf -
PATH=$PATH:/sbin:/usr/sbin
mke2fs -q -F -t ext4 -L root -E hash_seed=11111111-2222-3333-4444-555555555555 -d "$root" "$1" "$2"
"#;

/// The cached image; built on the first call, which downloads about 60 MB and takes a minute or two. The file
/// is shared by everyone: copy it (it is sparse) before giving it to a guest that writes.
///
/// # Errors
/// [`Error::MissingProgram`] without `mmdebstrap` or `mke2fs`, [`Error::Command`] if one of them fails.
pub fn root_image(cache: &Cache, progress: &mut dyn Progress) -> Result<PathBuf> {
    let relative = format!("images/debian-12-r{REVISION}.img");
    let target = cache.path(&relative);
    if target.is_file() {
        return Ok(target);
    }
    let lock = cache.lock()?;
    if target.is_file() {
        return Ok(target);
    }
    let directory = cache.publish_directory(&lock, &format!("debian-12-r{REVISION}"), |directory| {
        progress.step("building a Debian 12 root file system");
        debian_root_image(&directory.join("root.img"))
    })?;
    let image = directory.join("root.img");
    let images = cache.path("images");
    fs::create_dir_all(&images).map_err(Error::io("create", &images))?;
    fs::rename(&image, &target).map_err(Error::io("rename into the cache", &target))?;
    fs::remove_dir(&directory).map_err(Error::io("remove", &directory))?;
    Ok(target)
}

/// Builds the image at `path`, which is replaced.
///
/// # Errors
/// As [`root_image`].
pub fn debian_root_image(path: &Path) -> Result<()> {
    for (program, package) in [("mmdebstrap", "mmdebstrap"), ("mke2fs", "e2fsprogs"), ("tar", "tar")] {
        if !apt::is_in_path(program) {
            return Err(Error::MissingProgram { program: program.to_owned(), package: package.to_owned() });
        }
    }
    // In a user namespace the work runs as another user id: it needs a place that this id can write.
    let scratch = tempfile::Builder::new()
        .prefix("atoll-debian-")
        .tempdir()
        .map_err(Error::io("create a directory in", &std::env::temp_dir()))?;
    let open = fs::Permissions::from_mode(0o777);
    fs::set_permissions(scratch.path(), open).map_err(Error::io("change the mode of", scratch.path()))?;
    let customize = scratch.path().join("customize.sh");
    fs::write(&customize, CUSTOMIZE).map_err(Error::io("write", &customize))?;
    let archive = scratch.path().join("root.tar");
    bootstrap(&customize, &archive)?;
    let image = scratch.path().join("root.img");
    make_image(&archive, &image)?;
    let copy = Command::new("cp").arg("--sparse=always").arg(&image).arg(path).status();
    match copy {
        Ok(status) if status.success() => Ok(()),
        Ok(status) => Err(Error::Command {
            program: "cp".to_owned(),
            status: status.to_string(),
            message: format!("copying the image to {}", path.display()),
        }),
        Err(source) => Err(Error::Io { action: "copy the image to", path: path.to_path_buf(), source }),
    }
}

fn bootstrap(customize: &Path, archive: &Path) -> Result<()> {
    let hook = format!("sh {} \"$1\"", customize.display());
    let mut command = Command::new("mmdebstrap");
    command
        .args(["--mode=auto", "--variant=minbase", "--format=tar", "--quiet"])
        .arg(format!("--include={PACKAGES}"))
        .arg(format!("--customize-hook={hook}"))
        .args(["--aptopt=Acquire::Retries \"3\"", "--aptopt=Acquire::Check-Date \"false\""])
        .args(["--dpkgopt=path-exclude=/usr/share/man/*", "--dpkgopt=path-exclude=/usr/share/locale/*"])
        .arg("bookworm")
        .arg(archive);
    apt::run("mmdebstrap", &mut command).map(|_| ())
}

fn make_image(archive: &Path, image: &Path) -> Result<()> {
    // As root the archive's owners can be set directly; otherwise in the user namespace that made it.
    let mut command = if is_root() {
        Command::new("sh")
    } else {
        let mut helper = Command::new("mmdebstrap");
        helper.args(["--unshare-helper", "sh"]);
        helper
    };
    let input = fs::File::open(archive).map_err(Error::io("open", archive))?;
    command.args(["-c", MAKE_IMAGE, "sh"]).arg(image).arg(IMAGE_SIZE).stdin(input).stdout(Stdio::null());
    let output = command.stderr(Stdio::piped()).output().map_err(Error::io("run mke2fs for", image))?;
    if output.status.success() {
        return Ok(());
    }
    Err(Error::Command {
        program: "mke2fs".to_owned(),
        status: output.status.to_string(),
        message: String::from_utf8_lossy(&output.stderr).trim().to_owned(),
    })
}

fn is_root() -> bool {
    use std::os::unix::fs::MetadataExt;
    fs::metadata("/proc/self").is_ok_and(|m| m.uid() == 0)
}
