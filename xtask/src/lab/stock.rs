//! What boots of the lab need from outside: built programs, test programs, and a guests cache with the few files
//! that tests inside read.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail, ensure};
use atoll_guests::{Cache, GuestKernel, KernelFiles, debian, initramfs, kernel, modules, quick_start};

use crate::boot::inside;
use crate::guests::{self, Lines};
use crate::process::{cargo, root, run as run_command, show, target};

/// Where test programs are inside.
const TESTS: &str = "/tests";
/// Where this program is inside.
pub(super) const XTASK: &str = "/bin/xtask";
/// The random exits.
pub(super) const HAMMER: &str = "/bin/atoll-exit-hammer";
/// `XDG_CACHE_HOME` inside.
pub(super) const CACHE: &str = "/cache";

/// A test program of one package.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct TestProgram {
    pub(super) package: String,
    /// Name of the target: the library, or the file under `tests`.
    pub(super) name: String,
    pub(super) path: PathBuf,
}

impl TestProgram {
    /// Its path inside.
    pub(super) fn inside(&self) -> String {
        format!("{TESTS}/{}-{}", self.package, self.name)
    }
}

/// Everything that is built and fetched.
pub(super) struct Stock {
    /// What executes guests inside: `kvm`, or `software` to tell a fault of the lab from one of the backend.
    pub(super) accel: String,
    /// Kernel of the lab itself.
    pub(super) lab_kernel: PathBuf,
    logs: PathBuf,
}

impl Stock {
    /// Fetches the lab's kernel.
    ///
    /// # Errors
    /// What the package manager or the file system said.
    pub(super) fn make(accel: &str, logs: &Path) -> Result<Self> {
        let lab_kernel = guests::fetch(GuestKernel::Cloud61)?.vmlinuz;
        Ok(Self { accel: accel.to_owned(), lab_kernel, logs: logs.to_path_buf() })
    }

    /// The test programs `names` of the package of scenarios.
    pub(super) fn scenarios(&self, names: &[&str]) -> Result<Vec<TestProgram>> {
        let mut tests = build_tests(&["atoll-scenarios"])?;
        tests.retain(|t| names.contains(&t.name.as_str()));
        ensure!(tests.len() == names.len(), "not all of {names:?} are test programs");
        Ok(tests)
    }

    /// Guests for tests of whole machines: the quick start's, and `kernels`.
    pub(super) fn cache(&self, kernels: &[GuestKernel]) -> Result<(PathBuf, String)> {
        let staged = self.logs.join("cache");
        stage(&staged, kernels).context("cannot put the guests together")?;
        Ok((staged, CACHE.to_owned()))
    }

    /// Programs and guests for `xtask boot --inside`.
    pub(super) fn guests(&self, kernels: &[GuestKernel]) -> Result<Vec<(PathBuf, String)>> {
        run_command(&mut cargo(&["build", "--release", "--package", "atoll"]))?;
        let this = std::env::current_exe().context("cannot find this program")?;
        let mut files = vec![
            (target().join("release/atoll"), inside::ATOLL.to_owned()),
            (this, XTASK.to_owned()),
            self.cache(kernels)?,
            (guests::bench_initrd()?, inside::BENCH_INITRD.to_owned()),
        ];
        // The terminal's scenario starts the program in a session of its own; busybox has no `setsid --ctty`.
        if let Some(setsid) = ["/usr/bin/setsid", "/bin/setsid"].iter().find(|p| Path::new(p).is_file()) {
            files.push((setsid.into(), "/usr/bin/setsid".to_owned()));
        }
        Ok(files)
    }

    /// The program of random exits.
    pub(super) fn hammer(&self) -> Result<(PathBuf, String)> {
        run_command(&mut cargo(&["build", "--release", "--package", "atoll-exit-hammer"]))?;
        Ok((target().join("release/atoll-exit-hammer"), HAMMER.to_owned()))
    }

    /// A Debian root file system.
    pub(super) fn debian(&self) -> Result<PathBuf> {
        Ok(debian::root_image(&Cache::open()?, &mut Lines)?)
    }
}

/// Builds the test programs of `packages` without running them.
pub(super) fn build_tests(packages: &[&str]) -> Result<Vec<TestProgram>> {
    let mut command = cargo(&["test", "--release", "--no-run", "--message-format=json"]);
    for package in packages {
        command.args(["--package", package]);
    }
    command.stdin(Stdio::null()).stderr(Stdio::inherit());
    let output = command.output().with_context(|| format!("cannot start `{}`", show(&command)))?;
    let messages = String::from_utf8_lossy(&output.stdout);
    if !output.status.success() {
        bail!("`{}` ended with {}:\n{}", show(&command), output.status, rendered(&messages));
    }
    Ok(test_programs(&messages, &root()))
}

/// What the compiler said, from cargo's messages.
fn rendered(messages: &str) -> String {
    let values = messages.lines().filter_map(|l| serde_json::from_str::<serde_json::Value>(l).ok());
    values.filter_map(|v| v["message"]["rendered"].as_str().map(str::to_owned)).collect()
}

/// The test programs that cargo's messages name. The package is told apart by its manifest's folder in `root`.
fn test_programs(messages: &str, root: &Path) -> Vec<TestProgram> {
    let mut programs = Vec::new();
    for line in messages.lines() {
        let Ok(message) = serde_json::from_str::<serde_json::Value>(line) else { continue };
        let (Some(path), Some(true)) = (message["executable"].as_str(), message["profile"]["test"].as_bool())
        else {
            continue;
        };
        let folder = message["manifest_path"].as_str().map(Path::new).and_then(Path::parent);
        let relative = folder.and_then(|f| f.strip_prefix(root).ok()).map(Path::to_path_buf);
        let package = match relative.as_deref().and_then(Path::to_str) {
            Some("backends/kvm") => "atoll-kvm",
            Some("testing/scenarios") => "atoll-scenarios",
            _ => continue,
        };
        let name = message["target"]["name"].as_str().unwrap_or_default().to_owned();
        programs.push(TestProgram { package: package.to_owned(), name, path: path.into() });
    }
    programs
}

/// Fills `folder` with a cache that holds what tests inside read: the quick start with its kernel and the modules of
/// the machine's drivers, busybox, other kernels without modules. It becomes part of the lab's initial root file
/// system, so it is small.
fn stage(folder: &Path, kernels: &[GuestKernel]) -> Result<()> {
    let _ = std::fs::remove_dir_all(folder);
    let cache = Cache::open()?;
    let start = quick_start::in_cache(&cache, GuestKernel::Host, &mut Lines)?;
    let base = folder.join("atoll/guests");
    let relative = start.initrd.strip_prefix(cache.root()).context("the quick start is outside the cache")?;
    put(&start.initrd, &base.join(relative))?;
    let busybox = kernel::busybox(&cache, &mut Lines)?;
    put(&busybox, &base.join("packages/busybox-static/bin/busybox"))?;
    for which in [GuestKernel::Host].iter().chain(kernels) {
        stage_kernel(&cache, &base, *which, &guests::fetch(*which)?)?;
    }
    Ok(())
}

fn stage_kernel(cache: &Cache, base: &Path, which: GuestKernel, files: &KernelFiles) -> Result<()> {
    let entry = format!("resolved/{}", which.name());
    put(&cache.path(&entry), &base.join(&entry))?;
    for path in [&files.vmlinuz, &files.modules_dir] {
        let relative = path.strip_prefix(cache.root()).context("a kernel is outside the cache")?;
        let to = base.join(relative);
        if path.is_file() {
            put(path, &to)?;
            continue;
        }
        std::fs::create_dir_all(&to).with_context(|| format!("cannot create {}", to.display()))?;
        if !matches!(which, GuestKernel::Host | GuestKernel::Cloud61) {
            // A folder that is empty does for kernels that only have to reach init.
            continue;
        }
        for module in modules::closure(path, &initramfs::DRIVERS)? {
            let file = to.join(format!("{}.ko", module.name));
            std::fs::write(&file, module.bytes)
                .with_context(|| format!("cannot write {}", file.display()))?;
        }
    }
    Ok(())
}

fn put(from: &Path, to: &Path) -> Result<()> {
    let folder = to.parent().context("a path without a folder")?;
    std::fs::create_dir_all(folder).with_context(|| format!("cannot create {}", folder.display()))?;
    if to.exists() {
        return Ok(());
    }
    std::fs::copy(from, to).with_context(|| format!("cannot copy {}", from.display()))?;
    Ok(())
}

/// Whether `program` can be run.
pub(super) fn is_there(program: &str) -> bool {
    Command::new(program).arg("--version").stdout(Stdio::null()).stderr(Stdio::null()).status().is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn test_programs_are_found_among_cargos_messages() {
        let line = |executable: &str, test: bool, folder: &str, name: &str| {
            format!(
                "{{\"reason\":\"compiler-artifact\",\"executable\":{executable},\"profile\":{{\"test\":{test}}},\
                 \"manifest_path\":\"/r/{folder}/Cargo.toml\",\"target\":{{\"name\":\"{name}\"}}}}\n"
            )
        };
        let messages = [
            line("null", true, "backends/kvm", "atoll_kvm"),
            line("\"/t/a\"", true, "backends/kvm", "conformance"),
            line("\"/t/b\"", false, "testing/scenarios", "atoll"),
            line("\"/t/c\"", true, "machine", "atoll_machine"),
            "{\"reason\":\"build-finished\"}\nnot json\n".to_owned(),
        ]
        .concat();
        let found = test_programs(&messages, Path::new("/r"));
        assert_eq!(found.len(), 1);
        assert_eq!(found[0].inside(), "/tests/atoll-kvm-conformance");
    }
}
