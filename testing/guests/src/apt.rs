//! The host's package manager, driven without root.
//!
//! Two configurations are written into the cache. Both are the host's own (`apt-config dump`: sources, proxies,
//! keys, preferences), with archives, binary caches and logs moved into the cache and without the hooks that
//! would touch the system. `system` keeps the host's package lists; `private` has lists of its own, which
//! `apt-get update` fills. The host's lists are tried first, because then nothing but the package itself is
//! downloaded; they may be missing (containers), unreadable, or so old that the package is gone from the
//! archive, and then the private ones are used. Signatures are verified by the package manager in either case.

use std::ffi::OsStr;
use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::cache::{Cache, CacheLock};
use crate::{Error, Progress, Result};

/// Which package lists to read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Lists {
    System,
    Private,
}

/// The package manager, with its private state in a cache that the caller has locked.
#[derive(Debug)]
pub struct Apt<'a> {
    cache: &'a Cache,
    lock: &'a CacheLock,
    /// The private lists were fetched in the life of this value: no others are needed.
    fresh: bool,
}

impl<'a> Apt<'a> {
    /// Prepares the private state.
    ///
    /// # Errors
    /// [`Error::NoPackageManager`] if the host has none; [`Error::Io`].
    pub fn new(cache: &'a Cache, lock: &'a CacheLock) -> Result<Self> {
        for program in ["apt-get", "apt-cache", "apt-config", "dpkg-deb"] {
            if !is_in_path(program) {
                return Err(Error::NoPackageManager { missing: program });
            }
        }
        let apt = Self { cache, lock, fresh: false };
        let dump = run("apt-config dump", Command::new("apt-config").arg("dump").env("LC_ALL", "C"))?;
        for lists in [Lists::System, Lists::Private] {
            let text = apt.configuration(&dump, lists);
            cache.publish_file(lock, apt.configuration_name(lists), text.as_bytes())?;
        }
        for directory in ["apt/state/lists/partial", "apt/cache/archives/partial", "apt/log"] {
            let path = cache.path(directory);
            fs::create_dir_all(&path).map_err(Error::io("create", &path))?;
        }
        Ok(apt)
    }

    /// Does `work` with the lists that are there; if that fails, once more with lists fetched anew. Lists that are
    /// missing, or so old that the archive no longer has what they name, are both mended that way.
    ///
    /// # Errors
    /// What the second attempt, or the fetching, said.
    pub fn with_fresh_lists_if_needed<T>(
        &mut self,
        progress: &mut dyn Progress,
        work: impl Fn(&Self, &mut dyn Progress) -> Result<T>,
    ) -> Result<T> {
        match work(self, progress) {
            Err(_) if !self.fresh => {
                self.update(progress)?;
                work(self, progress)
            }
            result => result,
        }
    }

    /// The first of `names` that the package lists know, with the names of the packages it depends on.
    ///
    /// # Errors
    /// [`Error::NoPackage`].
    pub fn depends(&self, names: &[&str]) -> Result<(String, Vec<String>)> {
        for lists in self.lists() {
            for name in names {
                let mut command = self.command(lists, "apt-cache");
                if let Ok(text) = run("apt-cache depends", command.args(["depends", "--important", name])) {
                    let depends = parse_depends(&text);
                    if !depends.is_empty() {
                        return Ok(((*name).to_owned(), depends));
                    }
                }
            }
        }
        Err(Error::NoPackage { names: names.join(", ") })
    }

    /// Downloads `package` and unpacks it into the cache; returns the tree.
    ///
    /// # Errors
    /// What the package manager said, or [`Error::Io`].
    pub fn obtain(&self, package: &str, progress: &mut dyn Progress) -> Result<PathBuf> {
        let relative = format!("packages/{package}");
        self.cache.publish_directory(self.lock, &relative, |directory| {
            let archives = directory.join("archive");
            fs::create_dir(&archives).map_err(Error::io("create", &archives))?;
            progress.step(&format!("downloading {package}"));
            let mut result = Err(Error::NoPackage { names: package.to_owned() });
            for lists in self.lists() {
                result = self.download(lists, package, &archives, progress);
                if result.is_ok() {
                    break;
                }
            }
            result?;
            let archive = only_entry(&archives)?;
            progress.step(&format!("unpacking {package}"));
            run("dpkg-deb", Command::new("dpkg-deb").arg("-x").arg(&archive).arg(directory))?;
            fs::remove_dir_all(&archives).map_err(Error::io("remove", &archives))
        })
    }

    fn download(&self, lists: Lists, package: &str, into: &Path, progress: &mut dyn Progress) -> Result<()> {
        let mut command = self.command(lists, "apt-get");
        command.args(["-qq", "download", package]).current_dir(into);
        run_with_progress("apt-get download", &mut command, progress)
    }

    /// The lists to try, in order. Private ones that an earlier run fetched come after the host's, which the
    /// host keeps up to date.
    fn lists(&self) -> Vec<Lists> {
        let directory = self.cache.path("apt/state/lists");
        let mut entries = fs::read_dir(directory).into_iter().flatten().flatten();
        let has_private = entries.any(|e| e.file_name().to_string_lossy().contains("_Packages"));
        match (self.fresh, has_private) {
            (true, _) => vec![Lists::Private],
            (false, true) => vec![Lists::System, Lists::Private],
            (false, false) => vec![Lists::System],
        }
    }

    /// Fetches the package lists into the private state.
    fn update(&mut self, progress: &mut dyn Progress) -> Result<()> {
        progress.step("reading the distribution's package lists");
        let mut command = self.command(Lists::Private, "apt-get");
        command.args(["-qq", "update"]);
        run_with_progress("apt-get update", &mut command, progress)?;
        self.fresh = true;
        Ok(())
    }

    fn command(&self, lists: Lists, program: &str) -> Command {
        let mut command = Command::new(program);
        command.env("APT_CONFIG", self.cache.path(self.configuration_name(lists))).env("LC_ALL", "C");
        command
    }

    fn configuration_name(&self, lists: Lists) -> &'static str {
        match lists {
            Lists::System => "apt/system.conf",
            Lists::Private => "apt/private.conf",
        }
    }

    fn configuration(&self, dump: &str, lists: Lists) -> String {
        let mut text = host_configuration(dump);
        let mut set = |name: &str, value: &str| {
            text.push_str(&format!("{name} \"{value}\";\n"));
        };
        let at = |relative: &str| self.cache.path(relative).display().to_string();
        // The dump above already holds what these files say; they must not be read on top of it.
        set("Dir::Etc::main", "/dev/null");
        set("Dir::Etc::parts", "/dev/null");
        set("Dir::Cache", &at("apt/cache"));
        set("Dir::Cache::archives", "archives/");
        set("Dir::Log", &at("apt/log"));
        set("APT::Sandbox::User", "root"); // no change of user: the cache is private to this one
        set("Acquire::Languages", "none");
        set("Acquire::Retries", "3");
        if lists == Lists::Private {
            set("Dir::State", &at("apt/state"));
            set("Dir::State::lists", "lists/");
        }
        text
    }
}

/// The lines of `apt-config dump` to keep: no hooks, no package-installer settings, no software-centre indexes.
fn host_configuration(dump: &str) -> String {
    const DROP: [&str; 6] = [
        "APT::Update::",
        "DPkg",
        "RPM",
        "CommandLine",
        "Acquire::IndexTargets::deb::DEP-11",
        "Acquire::IndexTargets::deb::CNF",
    ];
    let mut text = String::new();
    for line in dump.lines() {
        let quotes = line.matches('"').count();
        if quotes == 2 && line.ends_with("\";") && !DROP.iter().any(|d| line.starts_with(d)) {
            text.push_str(line);
            text.push('\n');
        }
    }
    text
}

/// `  Depends: name` and `  PreDepends: name` lines; virtual packages (in angle brackets) are left out.
fn parse_depends(text: &str) -> Vec<String> {
    text.lines()
        .filter_map(|line| line.trim_start().trim_start_matches('|').split_once("Depends: "))
        .map(|(_, name)| name.trim().to_owned())
        .filter(|name| !name.starts_with('<'))
        .collect()
}

/// Percentage in a line of the package manager's status protocol (`dlstatus:ITEM:PERCENT:TEXT`).
fn parse_status(line: &str) -> Option<f32> {
    let rest = line.strip_prefix("dlstatus:")?;
    let percent: f32 = rest.split(':').nth(1)?.parse().ok()?;
    percent.is_finite().then_some(percent.clamp(0.0, 100.0))
}

/// Runs `command` and feeds its status lines to `progress`. The status protocol shares standard output,
/// because a further descriptor cannot be handed to a child in safe code; `-qq` keeps everything else off it.
fn run_with_progress(name: &str, command: &mut Command, progress: &mut dyn Progress) -> Result<()> {
    command
        .args(["-o", "APT::Status-Fd=1"])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let mut child = command.spawn().map_err(|e| cannot_start(name, command, &e))?;
    let errors = child.stderr.take();
    let reader = std::thread::spawn(move || {
        let mut text = String::new();
        if let Some(mut errors) = errors {
            let _ = errors.read_to_string(&mut text);
        }
        text
    });
    if let Some(output) = child.stdout.take() {
        for line in BufReader::new(output).lines().map_while(std::result::Result::ok) {
            if let Some(percent) = parse_status(&line) {
                progress.percent(percent);
            }
        }
    }
    let status = child.wait().map_err(|e| cannot_start(name, command, &e))?;
    let errors = reader.join().unwrap_or_default();
    // `apt-get update` succeeds with a warning when every list failed to download.
    if !status.success() || errors.lines().any(|l| l.starts_with("E:") || l.contains("Failed to fetch")) {
        return Err(failed(name, &status.to_string(), &errors));
    }
    Ok(())
}

/// Runs `command` to its end and gives its standard output.
pub(crate) fn run(name: &str, command: &mut Command) -> Result<String> {
    let output = command.stdin(Stdio::null()).output().map_err(|e| cannot_start(name, command, &e))?;
    if !output.status.success() {
        return Err(failed(name, &output.status.to_string(), &String::from_utf8_lossy(&output.stderr)));
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

fn cannot_start(name: &str, command: &Command, error: &std::io::Error) -> Error {
    let program = command.get_program().to_string_lossy().into_owned();
    if error.kind() == std::io::ErrorKind::NotFound {
        return Error::MissingProgram { package: package_of(&program).to_owned(), program };
    }
    Error::Command { program: name.to_owned(), status: "not started".to_owned(), message: error.to_string() }
}

fn failed(name: &str, status: &str, errors: &str) -> Error {
    let lines: Vec<&str> = errors.lines().map(str::trim).filter(|l| !l.is_empty()).collect();
    let message = lines[lines.len().saturating_sub(4)..].join("; ");
    Error::Command { program: name.to_owned(), status: status.to_owned(), message }
}

/// The Debian package that has `program`.
fn package_of(program: &str) -> &str {
    match Path::new(program).file_name().and_then(OsStr::to_str).unwrap_or(program) {
        "mke2fs" => "e2fsprogs",
        "dpkg-deb" => "dpkg",
        "apt-get" | "apt-cache" | "apt-config" => "apt",
        "unshare" => "util-linux",
        _ => program,
    }
}

/// Whether `program` can be found in `PATH`, or where a normal user's `PATH` often does not reach.
pub(crate) fn is_in_path(program: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .chain(["/usr/sbin".into(), "/sbin".into()])
        .any(|directory| directory.join(program).is_file())
}

fn only_entry(directory: &Path) -> Result<PathBuf> {
    let mut entries = fs::read_dir(directory).map_err(Error::io("read", directory))?;
    match entries.next() {
        Some(Ok(entry)) => Ok(entry.path()),
        Some(Err(source)) => Err(Error::Io { action: "read", path: directory.to_path_buf(), source }),
        None => Err(failed("apt-get download", "success", "it left no package behind")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hooks_and_unquotable_values_are_not_taken_over() {
        let dump = "APT \"\";\nAPT::Update::Post-Invoke:: \"rm -f x\";\nDPkg::Tools \"\";\n\
                    Acquire::http::Proxy \"http://p:1/\";\nBad::Value \"a \"quoted\" word\";\n\
                    Acquire::IndexTargets::deb::DEP-11::MetaKey \"m\";\n";
        assert_eq!(host_configuration(dump), "APT \"\";\nAcquire::http::Proxy \"http://p:1/\";\n");
    }

    #[test]
    fn dependencies_are_read_and_virtual_ones_are_not() {
        let text = "linux-image-cloud-amd64\n  Depends: linux-image-6.1.0-1-cloud-amd64\n |Depends: kmod\n  \
                    PreDepends: dpkg\n  Depends: <linux-initramfs-tool>\n  Recommends: firmware\n";
        assert_eq!(parse_depends(text), ["linux-image-6.1.0-1-cloud-amd64", "kmod", "dpkg"]);
    }

    #[test]
    fn status_lines_give_a_percentage_between_0_and_100() {
        assert_eq!(parse_status("dlstatus:1:1.1504:Retrieving file 1 of 1"), Some(1.1504));
        assert_eq!(parse_status("dlstatus:1:170.0:x"), Some(100.0));
        assert_eq!(parse_status("dlstatus:1:NaN:x"), None);
        assert_eq!(parse_status("pmstatus:dpkg:1.0:x"), None);
        assert_eq!(parse_status("dlstatus:"), None);
    }

    #[test]
    fn a_failing_program_is_named_with_its_last_words() {
        let error =
            run("sh", Command::new("sh").args(["-c", "echo one >&2; echo two >&2; exit 3"])).unwrap_err();
        assert_eq!(error.to_string(), "sh failed (exit status: 3): one; two");
    }

    #[test]
    fn a_missing_program_is_named_with_its_package() {
        let error = run("mke2fs", &mut Command::new("/nonexistent/mke2fs")).unwrap_err();
        assert_eq!(error.to_string(), "/nonexistent/mke2fs is missing: install the package e2fsprogs");
    }
}
