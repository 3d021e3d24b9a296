//! `cargo xtask guests`: everything the tests boot, fetched and built into the cache.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};
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

fn is_newer(product: &Path, source: &Path) -> bool {
    let time = |path: &Path| std::fs::metadata(path).and_then(|m| m.modified()).ok();
    matches!((time(product), time(source)), (Some(p), Some(s)) if p >= s)
}
