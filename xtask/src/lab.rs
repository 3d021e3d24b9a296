//! `cargo xtask lab`: the KVM backend on a processor that virtualizes, on any machine.
//!
//! `testing/kvm-lab/kvm-lab.sh` boots a Linux under QEMU's emulator whose processor has AMD's SVM, so `/dev/kvm`
//! there is real. A boot takes ten seconds, so tests come in groups, one boot each:
//!
//! ```text
//! groups (what a boot shows) ──► stock (programs and guests, built and fetched here) ──► host (one boot: runs the
//!                                script in the lab, reads `test NAME ... ok` and `guest NAME ... ok`, knows the end)
//! ```
//!
//! `--intel` does it under Bochs, whose processor has Intel's VMX ([`intel`]). `--start` measures what the first
//! guest instruction costs on this machine ([`start`]). What each group printed is kept in `target/lab`.

mod groups;
mod host;
mod intel;
mod results;
mod start;
mod stock;

use std::time::Instant;

use anyhow::{Context, Result, bail};

use crate::process::target;
use results::Counts;

#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    /// Also what takes long: every kernel, a whole Debian, ten minutes of random exits
    #[arg(long)]
    long: bool,
    /// VMX and EPT instead of SVM: the processor is Bochs' (minutes)
    #[arg(long)]
    intel: bool,
    /// Only measure the processor time from the start of a process to its guest's first instruction, here
    #[arg(long)]
    start: bool,
    /// What executes the guests; software tells a fault of the lab from one of the backend
    #[arg(long, default_value = "kvm")]
    accel: String,
    /// With `--start`: measurements, of which the median counts
    #[arg(long, default_value_t = 51)]
    rounds: usize,
    /// Only groups whose name contains this
    filter: Option<String>,
}

impl Arguments {
    /// The groups without `--long`.
    pub(crate) fn short() -> Self {
        Self { long: false, intel: false, start: false, accel: "kvm".to_owned(), rounds: 51, filter: None }
    }

    /// The groups with `--long`.
    pub(crate) fn long() -> Self {
        Self { long: true, ..Self::short() }
    }

    /// Intel's virtualization.
    pub(crate) fn intel() -> Self {
        Self { intel: true, ..Self::short() }
    }
}

/// Runs the lane; prints the tests as they end, a line per group, and `N passed, N failed`.
///
/// # Errors
/// If something cannot be built or fetched, or a test failed.
pub(crate) fn run(arguments: &Arguments) -> Result<()> {
    if arguments.start {
        return start::run(&arguments.accel, arguments.rounds);
    }
    let logs = target().join("lab");
    std::fs::create_dir_all(&logs).with_context(|| format!("cannot create {}", logs.display()))?;
    if arguments.intel {
        return conclude("lab --intel", &[("intel", intel::run(&logs))]);
    }
    let wanted = |name: &str| arguments.filter.as_ref().is_none_or(|f| name.contains(f.as_str()));
    let list: Vec<_> =
        groups::all().into_iter().filter(|g| g.long == arguments.long && wanted(g.name)).collect();
    if list.is_empty() {
        bail!("no group has that name; there are: {}", groups::names());
    }
    let stock = stock::Stock::make(&arguments.accel, &logs)?;
    let mut results = Vec::new();
    for group in &list {
        println!("lab {} ...", group.name);
        let started = Instant::now();
        let result = (group.boot)(&stock).and_then(|boot| host::run(group.name, &boot, &logs));
        println!("lab {} took {:.0} s", group.name, started.elapsed().as_secs_f64());
        results.push((group.name, result));
    }
    conclude("lab", &results)
}

fn conclude(what: &str, results: &[(&str, Result<Counts>)]) -> Result<()> {
    let mut sum = Counts::default();
    for (name, result) in results {
        match result {
            Ok(counts) => {
                println!("{what} {name}: {counts}");
                sum.add(counts);
            }
            Err(error) => {
                println!("{what} {name} FAILED: {error:#}");
                sum.failed += 1;
            }
        }
    }
    println!("{what}: {} passed, {} failed", sum.passed, sum.failed);
    if sum.failed > 0 || sum.passed == 0 {
        bail!("{} failed, {} passed", sum.failed, sum.passed);
    }
    Ok(())
}
