//! `cargo xtask guests`: everything the tests boot, fetched and built into the cache.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};
use atoll_guests::cpio::Archive;
use atoll_guests::{Cache, GuestKernel, KernelFiles, Progress, debian, initramfs, kernel, quick_start};

use crate::process::{root, run as run_command, target};

#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    /// Also the other kernels and a Debian 12 root file system (300 MB of downloads)
    #[arg(long)]
    all: bool,
}

/// Prints one line per step, for logs rather than for terminals.
#[derive(Debug, Default)]
pub(crate) struct Lines;

impl Progress for Lines {
    fn step(&mut self, what: &str) {
        println!("guests: {what}");
    }
    fn percent(&mut self, _percent: f32) {}
    fn done(&mut self) {}
}

/// Fetches, builds and prints.
///
/// # Errors
/// What the package manager, the compiler or the file system said.
pub(crate) fn run(arguments: &Arguments) -> Result<()> {
    let cache = Cache::open()?;
    let start = quick_start::in_cache(&cache, GuestKernel::Host, &mut Lines)?;
    println!("{:<22} {}", "quick start kernel", start.kernel.display());
    println!("{:<22} {}", "quick start initrd", start.initrd.display());
    println!("{:<22} {}", "benchmark initrd", bench_initrd()?.display());
    if arguments.all {
        for which in GuestKernel::DEBIAN_12 {
            let files = kernel::fetch(&cache, which, &mut Lines)?;
            println!("{:<22} {}", which.name(), files.vmlinuz.display());
        }
        println!("{:<22} {}", "Debian 12 root", debian::root_image(&cache, &mut Lines)?.display());
    }
    Ok(())
}

/// A kernel of the tests.
///
/// # Errors
/// What the package manager or the file system said.
pub(crate) fn fetch(which: GuestKernel) -> Result<KernelFiles> {
    Ok(kernel::fetch(&Cache::open()?, which, &mut Lines)?)
}

/// The benchmark program, built statically with the host's compiler into the target directory.
///
/// # Errors
/// If the compiler is missing or fails.
pub(crate) fn bench_program() -> Result<PathBuf> {
    static_program("guest_bench", "testing/bench/guest_bench.c")
}

fn static_program(name: &str, source: &str) -> Result<PathBuf> {
    let source = root().join(source);
    let program = target().join("guests").join(name);
    if is_newer(&program, &source) {
        return Ok(program);
    }
    std::fs::create_dir_all(target().join("guests")).context("cannot create target/guests")?;
    let mut gcc = Command::new("gcc");
    gcc.args(["-O2", "-static", "-w", "-o"]).arg(&program).arg(&source).arg("-lm");
    run_command(&mut gcc)?;
    Ok(program)
}

/// The program that opens thousands of connections, built likewise.
///
/// # Errors
/// As [`bench_program`].
pub(crate) fn flows_program() -> Result<PathBuf> {
    static_program("flows", "testing/bench/flows.c")
}

/// An initial root file system whose PID 1 is the benchmark program.
///
/// # Errors
/// As [`bench_program`].
pub(crate) fn bench_initrd() -> Result<PathBuf> {
    let program = bench_program()?;
    let bytes = std::fs::read(&program).with_context(|| format!("cannot read {}", program.display()))?;
    let path = program.with_extension("cpio");
    std::fs::write(&path, initramfs::program(&bytes))
        .with_context(|| format!("cannot write {}", path.display()))?;
    Ok(path)
}

/// A program of the host with its shared libraries, for a guest.
pub(crate) struct HostProgram {
    /// Program and libraries, each where the host has it.
    pub(crate) archive: Archive,
    libraries: Vec<PathBuf>,
}

impl HostProgram {
    /// Whether it needs the library `name`, such as `libaio`, in any version.
    pub(crate) fn contains(&self, name: &str) -> bool {
        let is_it = |file: &str| file.strip_prefix(name).is_some_and(|rest| rest.starts_with(".so"));
        self.libraries.iter().any(|path| path.file_name().and_then(|n| n.to_str()).is_some_and(is_it))
    }
}

/// Packs the program `name` of the host. Its `PATH` in the guest is where it is on the host.
///
/// # Errors
/// If it is not there, a file cannot be read, or `ldd` is missing.
pub(crate) fn host_program(name: &str) -> Result<HostProgram> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let program = std::env::split_paths(&path).map(|directory| directory.join(name)).find(|p| p.is_file());
    let program = program.with_context(|| format!("{name} is not in PATH"))?;
    let output = Command::new("ldd").arg(&program).output().context("cannot start `ldd`")?;
    let libraries = absolute_words(&String::from_utf8_lossy(&output.stdout));
    let mut archive = Archive::new();
    for file in std::iter::once(&program).chain(&libraries) {
        let bytes = std::fs::read(file).with_context(|| format!("cannot read {}", file.display()))?;
        archive.file(file.to_string_lossy().trim_start_matches('/'), 0o755, &bytes);
    }
    Ok(HostProgram { archive, libraries })
}

/// The paths in what `ldd` prints: libraries and the loader.
pub(crate) fn absolute_words(text: &str) -> Vec<PathBuf> {
    text.split_whitespace().filter(|w| w.starts_with('/')).map(PathBuf::from).collect()
}

fn is_newer(product: &Path, source: &Path) -> bool {
    let time = |path: &Path| std::fs::metadata(path).and_then(|m| m.modified()).ok();
    matches!((time(product), time(source)), (Some(p), Some(s)) if p >= s)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_program_of_the_host_comes_with_its_libraries() {
        let packed = host_program("ldd").unwrap();
        assert!(packed.libraries.is_empty() && !packed.contains("libc"), "it is a script");
        let packed = host_program("sh").unwrap();
        assert!(packed.contains("libc") && !packed.contains("lib"), "{:?}", packed.libraries);
        assert!(packed.archive.finish().windows(9).any(|w| w == b"libc.so.6"));
        assert!(host_program("no-such-program").is_err());
    }

    #[test]
    fn libraries_and_the_loader_are_found() {
        let text = "\tlinux-vdso.so.1 (0x7f)\n\tlibc.so.6 => /lib/libc.so.6 (0x7f)\n\t/lib64/ld.so (0x7f)\n";
        assert_eq!(absolute_words(text), [Path::new("/lib/libc.so.6"), Path::new("/lib64/ld.so")]);
    }
}
