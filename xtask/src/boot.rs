//! `cargo xtask boot`: real guests on the built program, told apart by what they print and how they end.
//!
//! A scenario starts machines ([`machine::Machine`]), talks to them over their console and checks the answers.
//! With `--reference` the scenarios that do not depend on Atoll itself run on QEMU instead: that is how one
//! tells a broken guest or scenario from a broken machine. Everything a machine printed is kept in
//! `target/boot/SCENARIO.log`.

mod machine;
mod memory;
mod network;
mod scenarios;

use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use atoll_guests::{Cache, GuestKernel, quick_start};

use crate::guests::{self, Lines};
use crate::process::target;
use machine::Vmm;

#[derive(Debug, Clone, clap::Args)]
pub(crate) struct Arguments {
    /// Also every kernel with 1 and 2 vCPUs, a whole Debian 12, and the clock test
    #[arg(long)]
    long: bool,
    /// Run on QEMU what can run there, to check guests and scenarios themselves
    #[arg(long)]
    reference: bool,
    /// Minutes of each half of the clock test
    #[arg(long, default_value_t = 10)]
    clock_minutes: u64,
    /// Seconds a guest may take to reach its shell
    #[arg(long, default_value_t = 600)]
    patience: u64,
    /// What executes the guests: software or kvm
    #[arg(long, default_value = "software")]
    accel: String,
    /// Programs and guests are where `cargo xtask lab` puts them
    #[arg(long, hide = true)]
    inside: bool,
    /// Only scenarios whose name contains one of these
    filter: Vec<String>,
}

/// Where `cargo xtask lab` puts what the scenarios need, for `--inside`.
pub(crate) mod inside {
    /// The program under test.
    pub(crate) const ATOLL: &str = "/bin/atoll";
    /// The benchmark program as an initial root file system.
    pub(crate) const BENCH_INITRD: &str = "/guests/bench.cpio";
    /// A Debian root file system that may be written.
    pub(crate) const DEBIAN_DISK: &str = "/dev/vda";
}

impl Arguments {
    /// The lane of every `ci`.
    pub(crate) fn short() -> Self {
        Self {
            long: false,
            reference: false,
            clock_minutes: 10,
            patience: 600,
            accel: "software".to_owned(),
            inside: false,
            filter: Vec::new(),
        }
    }

    /// The lane of `ci --long`.
    pub(crate) fn long() -> Self {
        Self { long: true, ..Self::short() }
    }
}

/// What scenarios share.
pub(crate) struct Lane {
    vmm: Vmm,
    quick_start: quick_start::QuickStart,
    bench_initrd: PathBuf,
    /// A Debian root file system of this run's own; otherwise a copy of the cache's is made.
    debian_disk: Option<PathBuf>,
    patience: Duration,
    clock: Duration,
    logs: PathBuf,
}

type Action = Box<dyn Fn(&Lane) -> Result<()>>;

/// One thing to show.
pub(crate) struct Scenario {
    name: String,
    /// Needs Atoll's own command line or exit codes.
    atoll_only: bool,
    run: Action,
}

/// Runs the lane; prints a line per scenario and `N passed, N failed`.
///
/// # Errors
/// If the guests cannot be had or a scenario failed.
pub(crate) fn run(arguments: &Arguments) -> Result<()> {
    let program = if arguments.inside { inside::ATOLL.into() } else { target().join("release/atoll") };
    let vmm = if arguments.reference { Vmm::Qemu } else { Vmm::Atoll(program, arguments.accel.clone()) };
    let bench_initrd = if arguments.inside { inside::BENCH_INITRD.into() } else { guests::bench_initrd()? };
    let cache = Cache::open()?;
    let logs = target().join("boot");
    std::fs::create_dir_all(&logs).with_context(|| format!("cannot create {}", logs.display()))?;
    let lane = Lane {
        vmm,
        quick_start: quick_start::in_cache(&cache, GuestKernel::Host, &mut Lines)?,
        bench_initrd,
        debian_disk: arguments.inside.then(|| inside::DEBIAN_DISK.into()),
        patience: Duration::from_secs(arguments.patience),
        clock: Duration::from_secs(60 * arguments.clock_minutes),
        logs,
    };
    let mut scenarios = scenarios::short();
    if arguments.accel == "kvm" {
        scenarios.extend(scenarios::on_kvm());
    }
    if arguments.long {
        scenarios.extend(scenarios::long());
    }
    let filter = &arguments.filter;
    let wanted = |s: &Scenario| filter.is_empty() || filter.iter().any(|f| s.name.contains(f.as_str()));
    let (mut passed, mut failed) = (0, 0);
    for scenario in scenarios.iter().filter(|s| wanted(s)) {
        if scenario.atoll_only && arguments.reference {
            continue;
        }
        let start = Instant::now();
        let result = (scenario.run)(&lane);
        let seconds = start.elapsed().as_secs_f64();
        match result {
            Ok(()) => {
                passed += 1;
                println!("guest {} ... ok ({seconds:.1} s)", scenario.name);
            }
            Err(error) => {
                failed += 1;
                println!("guest {} ... FAILED ({seconds:.1} s): {error:#}", scenario.name);
            }
        }
    }
    println!("guests: {passed} passed, {failed} failed");
    if failed > 0 || passed == 0 {
        bail!("{failed} guest scenarios failed, {passed} passed");
    }
    Ok(())
}
