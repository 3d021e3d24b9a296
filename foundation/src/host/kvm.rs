//! Whether `/dev/kvm` is there, may be used and answers.

#![allow(unsafe_code)]
// UNSAFETY: a device's own ioctl has no safe form.

use std::fs::OpenOptions;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

/// The device.
pub const PATH: &str = "/dev/kvm";

/// The only version of KVM's interface that there has been since 2007. Programs refuse any other
/// (`Documentation/virt/kvm/api.rst`, 4.1).
pub const API_VERSION: i32 = 12;

/// `_IO(KVMIO, 0x00)`.
const KVM_GET_API_VERSION: libc::c_ulong = 0xae00;

/// What opening `/dev/kvm` came to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum KvmDevice {
    /// There is no such file, or no driver behind it.
    Absent,
    /// This user may not open it for reading and writing.
    Denied,
    /// It opens and answers with this interface version.
    Answers(i32),
    /// It is there and does not work; the text is the host's.
    Broken(String),
}

impl KvmDevice {
    /// Opens `/dev/kvm` and asks for its interface version. Nothing is created and nothing stays open.
    pub fn probe() -> Self {
        Self::probe_at(Path::new(PATH))
    }

    fn probe_at(path: &Path) -> Self {
        let device = match OpenOptions::new().read(true).write(true).custom_flags(libc::O_CLOEXEC).open(path)
        {
            Ok(device) => device,
            Err(error) => return Self::from_error(&error),
        };
        match api_version(std::os::fd::AsFd::as_fd(&device)) {
            Ok(version) => Self::Answers(version),
            Err(error) => Self::Broken(error.to_string()),
        }
    }

    fn from_error(error: &io::Error) -> Self {
        match error.raw_os_error() {
            // A device node may outlive its driver.
            Some(libc::ENOENT | libc::ENXIO | libc::ENODEV | libc::ENOTDIR) => Self::Absent,
            Some(libc::EACCES | libc::EPERM) => Self::Denied,
            _ => Self::Broken(error.to_string()),
        }
    }

    /// Whether it can be used at all.
    pub fn is_usable(&self) -> bool {
        *self == Self::Answers(API_VERSION)
    }
}

fn api_version(device: BorrowedFd<'_>) -> io::Result<i32> {
    // SAFETY: KVM_GET_API_VERSION takes no argument and changes nothing; a file that is not KVM answers ENOTTY.
    let version = unsafe { libc::ioctl(device.as_raw_fd(), KVM_GET_API_VERSION, 0) };
    if version < 0 { Err(io::Error::last_os_error()) } else { Ok(version) }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn an_absent_device_and_a_file_that_is_no_kvm_are_told_apart() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("kvm");
        assert_eq!(KvmDevice::probe_at(&path), KvmDevice::Absent);
        std::fs::write(&path, b"").unwrap();
        assert!(matches!(KvmDevice::probe_at(&path), KvmDevice::Broken(_)));
        assert!(!KvmDevice::probe_at(&path).is_usable());
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o000)).unwrap();
        // Permissions mean nothing to root.
        let denied = KvmDevice::probe_at(&path);
        assert!(matches!(denied, KvmDevice::Denied | KvmDevice::Broken(_)), "{denied:?}");
    }

    #[test]
    fn the_hosts_errors_are_sorted_by_what_mends_them() {
        let of = |number| KvmDevice::from_error(&io::Error::from_raw_os_error(number));
        assert_eq!(of(libc::ENOENT), KvmDevice::Absent);
        assert_eq!(of(libc::ENODEV), KvmDevice::Absent);
        assert_eq!(of(libc::EACCES), KvmDevice::Denied);
        assert!(matches!(of(libc::EBUSY), KvmDevice::Broken(_)));
    }

    #[test]
    fn only_the_one_known_version_is_usable() {
        assert!(KvmDevice::Answers(12).is_usable());
        assert!(!KvmDevice::Answers(11).is_usable() && !KvmDevice::Denied.is_usable());
    }
}
