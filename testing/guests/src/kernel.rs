//! Distribution kernels: which there are and how to get one.

use std::fs;
use std::path::{Path, PathBuf};

use crate::apt::Apt;
use crate::cache::{Cache, CacheLock};
use crate::{Error, Progress, Result};

/// A kernel that the tests boot, or the one of the quick start.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum GuestKernel {
    /// The host distribution's own kernel for virtual machines.
    Host,
    /// Debian 12's 6.1 kernel for virtual machines.
    Cloud61,
    /// Debian 12's 6.1 kernel for physical machines.
    Generic61,
    /// Debian 12's 6.1 kernel with real-time preemption.
    Rt61,
    /// The 6.12 kernel for virtual machines.
    Cloud612,
    /// The 6.12 kernel for physical machines.
    Generic612,
    /// The 6.12 kernel with real-time preemption.
    Rt612,
}

/// Where a kernel is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KernelFiles {
    /// The bzImage.
    pub vmlinuz: PathBuf,
    /// `lib/modules/VERSION` of the same package.
    pub modules_dir: PathBuf,
    /// What `uname -r` says in the guest.
    pub version: String,
}

impl GuestKernel {
    /// The kernels of a Debian 12 host that the long test lane boots.
    pub const DEBIAN_12: [Self; 6] =
        [Self::Cloud61, Self::Generic61, Self::Rt61, Self::Cloud612, Self::Generic612, Self::Rt612];

    /// A short name for messages and cache entries.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Host => "host",
            Self::Cloud61 => "6.1-cloud",
            Self::Generic61 => "6.1-generic",
            Self::Rt61 => "6.1-rt",
            Self::Cloud612 => "6.12-cloud",
            Self::Generic612 => "6.12-generic",
            Self::Rt612 => "6.12-rt",
        }
    }

    /// Meta packages that lead to it, the preferred one first.
    fn meta_packages(self) -> &'static [&'static str] {
        match self {
            Self::Host => &["linux-image-cloud-amd64", "linux-image-virtual", "linux-image-kvm"],
            Self::Cloud61 => &["linux-image-cloud-amd64"],
            Self::Generic61 => &["linux-image-amd64"],
            Self::Rt61 => &["linux-image-rt-amd64"],
            Self::Cloud612 => &["linux-image-6.12-cloud-amd64"],
            Self::Generic612 => &["linux-image-6.12-amd64"],
            Self::Rt612 => &["linux-image-6.12-rt-amd64"],
        }
    }
}

/// Gets `kernel` from the cache, or through the package manager if it is not there yet.
///
/// # Errors
/// Whatever the package manager or the file system says; see [`Error`].
pub fn fetch(cache: &Cache, kernel: GuestKernel, progress: &mut dyn Progress) -> Result<KernelFiles> {
    if let Some(files) = cached(cache, kernel) {
        return Ok(files);
    }
    let lock = cache.lock()?;
    fetch_locked(cache, &lock, kernel, progress)
}

/// [`fetch`] for a caller that holds the lock.
pub(crate) fn fetch_locked(
    cache: &Cache,
    lock: &CacheLock,
    kernel: GuestKernel,
    progress: &mut dyn Progress,
) -> Result<KernelFiles> {
    if let Some(files) = cached(cache, kernel) {
        return Ok(files);
    }
    progress.step(&format!("looking for a kernel ({})", kernel.name()));
    let mut apt = Apt::new(cache, lock)?;
    let (image, modules, files) =
        apt.with_fresh_lists_if_needed(progress, |apt, progress| obtain(apt, kernel, progress))?;
    let entry = format!("{image}\n{modules}\n");
    cache.publish_file(lock, &format!("resolved/{}", kernel.name()), entry.as_bytes())?;
    Ok(files)
}

/// Downloads the packages of `kernel`; gives their names: the image's and the modules', which may be the same.
fn obtain(
    apt: &Apt<'_>,
    kernel: GuestKernel,
    progress: &mut dyn Progress,
) -> Result<(String, String, KernelFiles)> {
    let (meta, depends) = apt.depends(kernel.meta_packages())?;
    let image = depends
        .iter()
        .find(|name| name.starts_with("linux-image-"))
        .ok_or_else(|| Error::NoPackage { names: format!("the kernel image that {meta} depends on") })?;
    let tree = apt.obtain(image, progress)?;
    let mut modules = image.clone();
    let mut modules_tree = tree.clone();
    if ["lib/modules", "usr/lib/modules"].iter().all(|d| only_version(&tree.join(d)).is_none()) {
        // Ubuntu keeps the modules in a package of their own, named by the same version.
        modules = image.replacen("linux-image-", "linux-modules-", 1);
        modules_tree = apt.obtain(&modules, progress)?;
    }
    let files = describe(image, &tree, &modules_tree)?;
    Ok((image.clone(), modules, files))
}

/// The kernel as an earlier call left it, without asking the package manager.
fn cached(cache: &Cache, kernel: GuestKernel) -> Option<KernelFiles> {
    let entry = fs::read_to_string(cache.path(&format!("resolved/{}", kernel.name()))).ok()?;
    let mut lines = entry.lines();
    let (image, modules) = (lines.next()?, lines.next()?);
    describe(image, &cache.path(&format!("packages/{image}")), &cache.path(&format!("packages/{modules}")))
        .ok()
}

/// busybox, linked statically, from the distribution.
///
/// # Errors
/// As [`fetch`].
pub(crate) fn busybox_locked(
    cache: &Cache,
    lock: &CacheLock,
    progress: &mut dyn Progress,
) -> Result<PathBuf> {
    let package = "busybox-static";
    let tree = cache.path(&format!("packages/{package}"));
    let tree = if tree.is_dir() {
        tree
    } else {
        Apt::new(cache, lock)?
            .with_fresh_lists_if_needed(progress, |apt, progress| apt.obtain(package, progress))?
    };
    ["bin/busybox", "usr/bin/busybox"].map(|f| tree.join(f)).into_iter().find(|p| p.is_file()).ok_or_else(
        || Error::Incomplete {
            package: package.to_owned(),
            file: "bin/busybox".to_owned(),
            tree: tree.clone(),
        },
    )
}

/// As [`fetch`], for busybox.
///
/// # Errors
/// As [`fetch`].
pub fn busybox(cache: &Cache, progress: &mut dyn Progress) -> Result<PathBuf> {
    let lock = cache.lock()?;
    busybox_locked(cache, &lock, progress)
}

fn describe(package: &str, tree: &Path, modules_tree: &Path) -> Result<KernelFiles> {
    let incomplete = |file: &str| Error::Incomplete {
        package: package.to_owned(),
        file: file.to_owned(),
        tree: tree.to_path_buf(),
    };
    let modules = ["lib/modules", "usr/lib/modules"]
        .iter()
        .find_map(|directory| only_version(&modules_tree.join(directory)))
        .ok_or_else(|| incomplete("lib/modules"))?;
    let version = name_of(&modules);
    let vmlinuz = tree.join("boot").join(format!("vmlinuz-{version}"));
    if !vmlinuz.is_file() {
        return Err(incomplete(&format!("boot/vmlinuz-{version}")));
    }
    Ok(KernelFiles { vmlinuz, modules_dir: modules, version })
}

/// The one directory in `directory`.
fn only_version(directory: &Path) -> Option<PathBuf> {
    let mut entries = fs::read_dir(directory).ok()?.flatten().filter(|e| e.path().is_dir());
    let first = entries.next()?.path();
    entries.next().is_none().then_some(first)
}

fn name_of(path: &Path) -> String {
    path.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plant(cache: &Cache, package: &str, version: &str) {
        let tree = cache.path(&format!("packages/{package}"));
        fs::create_dir_all(tree.join("boot")).unwrap();
        fs::create_dir_all(tree.join("lib/modules").join(version)).unwrap();
        fs::write(tree.join("boot").join(format!("vmlinuz-{version}")), b"k").unwrap();
    }

    #[test]
    fn a_cached_kernel_is_found_without_the_package_manager() {
        let dir = tempfile::tempdir().unwrap();
        let cache = Cache::at(dir.path()).unwrap();
        plant(&cache, "linux-image-9", "9.9-cloud");
        fs::create_dir(cache.path("resolved")).unwrap();
        fs::write(cache.path("resolved/6.1-cloud"), "linux-image-9\nlinux-image-9\n").unwrap();
        let files = fetch(&cache, GuestKernel::Cloud61, &mut crate::Quiet).unwrap();
        assert_eq!(files.version, "9.9-cloud");
        assert!(files.vmlinuz.is_file() && files.modules_dir.is_dir());
    }

    #[test]
    fn an_emptied_cache_entry_counts_as_absent() {
        let dir = tempfile::tempdir().unwrap();
        let cache = Cache::at(dir.path()).unwrap();
        plant(&cache, "linux-image-9", "9.9-cloud");
        fs::create_dir(cache.path("resolved")).unwrap();
        fs::write(cache.path("resolved/6.1-cloud"), "linux-image-9\nlinux-image-9\n").unwrap();
        fs::remove_file(cache.path("packages/linux-image-9/boot/vmlinuz-9.9-cloud")).unwrap();
        assert_eq!(cached(&cache, GuestKernel::Cloud61), None);
    }

    #[test]
    fn modules_may_live_in_a_package_of_their_own() {
        let dir = tempfile::tempdir().unwrap();
        let cache = Cache::at(dir.path()).unwrap();
        plant(&cache, "linux-modules-9", "9.9");
        let boot = cache.path("packages/linux-image-9/boot");
        fs::create_dir_all(&boot).unwrap();
        fs::write(boot.join("vmlinuz-9.9"), b"k").unwrap();
        fs::create_dir(cache.path("resolved")).unwrap();
        fs::write(cache.path("resolved/host"), "linux-image-9\nlinux-modules-9\n").unwrap();
        assert_eq!(cached(&cache, GuestKernel::Host).unwrap().version, "9.9");
    }
}
