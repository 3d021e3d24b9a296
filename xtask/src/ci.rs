//! `cargo xtask ci`: the one command that says whether a change may go in.
//!
//! Every step runs even if an earlier one failed (except the set-up, without which nothing makes sense), so one
//! run tells everything. The summary names each step, its outcome and its time.

use std::time::{Duration, Instant};

use anyhow::{Result, bail};

use crate::process::{cargo, run as run_command};
use crate::{boot, fuzz, lab, setup, tidy};

#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    /// Also what takes an hour: every kernel, a whole Debian, ten million instruction cases, fuzzing, power cuts
    #[arg(long)]
    long: bool,
    /// Seconds for each fuzz target of the long lane
    #[arg(long, default_value_t = 60)]
    fuzz_seconds: u64,
}

/// A step's name, outcome and time.
struct Outcome {
    name: &'static str,
    error: Option<String>,
    time: Duration,
}

/// Runs all steps and prints the summary.
///
/// # Errors
/// If any step failed.
pub(crate) fn run(arguments: &Arguments) -> Result<()> {
    let mut outcomes = Vec::new();
    let mut step = |name: &'static str, action: &mut dyn FnMut() -> Result<()>| {
        println!("\n=== {name}");
        let start = Instant::now();
        let result = action();
        if let Err(error) = &result {
            println!("=== {name} FAILED: {error:#}");
        }
        let failed = result.is_err();
        outcomes.push(Outcome { name, error: result.err().map(|e| format!("{e:#}")), time: start.elapsed() });
        failed
    };
    if !step("set-up", &mut setup::install) {
        step("format", &mut || run_command(&mut cargo(&["fmt", "--all", "--check"])));
        step("lints", &mut || {
            run_command(&mut cargo(&[
                "clippy",
                "--quiet",
                "--workspace",
                "--all-targets",
                "--release",
                "--",
                "-D",
                "warnings",
            ]))
        });
        step("tidy", &mut tidy::run);
        step("tests", &mut || {
            run_command(&mut cargo(&["test", "--workspace", "--release", "--no-fail-fast"]))
        });
        let built =
            !step("build", &mut || run_command(&mut cargo(&["build", "--release", "--package", "atoll"])));
        if built {
            step("guests boot", &mut || boot::run(&boot::Arguments::short()));
        }
        if arguments.long {
            long_lane(arguments, built, &mut step);
        }
    }
    summary(&outcomes)
}

type Step<'a> = dyn FnMut(&'static str, &mut dyn FnMut() -> Result<()>) -> bool + 'a;

fn long_lane(arguments: &Arguments, built: bool, step: &mut Step<'_>) {
    // Tests that take minutes are marked `#[ignore = "long: ..."]`.
    step("long tests", &mut || {
        run_command(&mut cargo(&[
            "test",
            "--workspace",
            "--release",
            "--no-fail-fast",
            "--",
            "--ignored",
            "--nocapture",
        ]))
    });
    step("ten million instruction cases", &mut || {
        let arguments = ["run", "--release", "--package", "atoll-oracle", "--", "--cases", "10000000"];
        run_command(&mut cargo(&arguments))
    });
    step("the reference emulator", &mut || {
        let arguments = ["run", "--release", "--package", "atoll-differential", "--", "--random", "8000"];
        run_command(&mut cargo(&arguments))
    });
    if built {
        step("every kernel and a whole Debian", &mut || boot::run(&boot::Arguments::long()));
    }
    // Longer than the five minutes that every change can wait: a processor is emulated.
    step("KVM in the lab", &mut || lab::run(&lab::Arguments::short()));
    step("KVM in the lab, at length", &mut || lab::run(&lab::Arguments::long()));
    step("KVM on Intel's virtualization", &mut || lab::run(&lab::Arguments::intel()));
    step("fuzz", &mut || fuzz::run(&fuzz::Arguments::all(arguments.fuzz_seconds)));
}

fn summary(outcomes: &[Outcome]) -> Result<()> {
    println!("\n{:<34} {:>9}  outcome", "step", "seconds");
    for outcome in outcomes {
        let word = if outcome.error.is_some() { "FAILED" } else { "passed" };
        println!("{:<34} {:>9.1}  {word}", outcome.name, outcome.time.as_secs_f64());
    }
    let failed: Vec<_> = outcomes.iter().filter(|o| o.error.is_some()).map(|o| o.name).collect();
    if !failed.is_empty() {
        bail!("ci failed in: {}", failed.join(", "));
    }
    println!("\nall passed");
    Ok(())
}
