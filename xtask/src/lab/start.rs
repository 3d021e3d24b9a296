//! What it costs to get to a guest's first instruction on this machine: processor time (user and system) of a whole
//! process that starts a machine whose first three instructions end it through the debug-exit port.
//!
//! The machine is without a network: user-mode NAT is a process of its own, whose start and end are measured with it
//! and shown apart.
//!
//! The process's end is in the figure, so it bounds what the start alone costs. Bash's `time` gives the figure (its
//! `getrusage` after `wait`); its resolution is a millisecond, so ten runs make one measurement. What bash itself and
//! any program's start cost is measured with `/bin/true` and shown apart.

use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use atoll_scenarios::payload;

use crate::process::{cargo, output_within, run as run_command, target};

/// Runs that share one measurement.
const BATCH: u32 = 10;
/// Milliseconds that are allowed.
const LIMIT_MS: f64 = 8.0;
/// What the guest says at the debug-exit port, and the exit code that it leads to (`docs/run.md`).
const SAID: u8 = 16;
const EXPECTED: i32 = 2 * SAID as i32 + 1;

/// Measures, prints the median and the limit.
///
/// # Errors
/// If the machine does not run, or the median is above the limit.
pub(super) fn run(accel: &str, rounds: usize) -> Result<()> {
    run_command(&mut cargo(&["build", "--release", "--package", "atoll"]))?;
    let directory = tempfile::tempdir().context("cannot create a directory")?;
    let kernel = directory.path().join("kernel");
    std::fs::write(&kernel, payload::debug_exit(SAID)).context("cannot write the kernel")?;
    let program = target().join("release/atoll").display().to_string();
    // A `/dev/kvm` without a virtualizing processor has less than the named models: the guest takes what there is.
    let cpu = if accel == "kvm" { "host" } else { "atoll-base" };
    let arguments = ["run", "--accel", accel, "--cpu", cpu, "--debug-exit", "--memory", "128M", "--kernel"];
    let mut atoll = vec![program];
    atoll.extend(arguments.map(str::to_owned));
    atoll.push(kernel.display().to_string());
    probe(&atoll)?;
    let nothing = ["/bin/true".to_owned()];
    let alone: Vec<String> = atoll.iter().cloned().chain(["--net", "none"].map(str::to_owned)).collect();
    let (mut machine, mut with_nat, mut empty) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..rounds.div_ceil(BATCH as usize).max(3) {
        machine.push(batch(&alone, EXPECTED)?);
        with_nat.push(batch(&atoll, EXPECTED)?);
        empty.push(batch(&nothing, 0)?);
    }
    let (machine, with_nat, empty) = (median(machine), median(with_nat), median(empty));
    println!(
        "start with --accel {accel}: {machine:.2} ms of processor time from start to end of the process, median of \
         batches of {BATCH}; {empty:.2} ms of it any program needs ({LIMIT_MS} allowed); with user-mode NAT and its \
         process {with_nat:.2} ms"
    );
    ensure!(machine <= LIMIT_MS, "{machine:.2} ms, {LIMIT_MS} are allowed");
    Ok(())
}

/// Runs once, for a message that says why when it does not work.
fn probe(command: &[String]) -> Result<()> {
    let mut once = Command::new(&command[0]);
    once.args(&command[1..]);
    let output = output_within(once, Duration::from_secs(60))?;
    if output.status.code() != Some(EXPECTED) {
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        bail!("the shortest machine ended with {}, expected {EXPECTED}: {said}", output.status);
    }
    Ok(())
}

/// Milliseconds of processor time that one run of `command` takes, over a batch.
fn batch(command: &[String], expected: i32) -> Result<f64> {
    let script = "TIMEFORMAT='%3U %3S'; n=$1 want=$2; shift 2\n\
                  time for ((i = 0; i < n; i++)); do \"$@\" >/dev/null 2>&1; [ $? = $want ] || exit 9; done";
    let mut bash = Command::new("bash");
    bash.args(["-c", script, "bash", &BATCH.to_string(), &expected.to_string()]).args(command);
    let output = output_within(bash, Duration::from_secs(300))?;
    ensure!(output.status.success(), "a run did not end with exit code {expected}");
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    seconds(&text).map(|s| s * 1e3 / f64::from(BATCH)).with_context(|| format!("bash's time says {text:?}"))
}

/// The sum of `USER SYSTEM`.
fn seconds(text: &str) -> Option<f64> {
    let mut words = text.split_whitespace().map(|w| w.replace(',', ".").parse::<f64>().ok());
    Some(words.next()?? + words.next()??)
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_kinds_of_time_count() {
        assert_eq!(seconds("0.120 0,030\n"), Some(0.15));
        assert_eq!(seconds("0.120"), None);
        assert_eq!(median(vec![3.0, 1.0, 2.0]), 2.0);
    }

    #[test]
    fn the_time_of_a_busy_program_is_seen() {
        let busy = ["bash", "-c", "i=0; while [ $i -lt 20000 ]; do i=$((i + 1)); done"].map(str::to_owned);
        assert!(batch(&busy, 0).unwrap() > batch(&["/bin/true".to_owned()], 0).unwrap());
        assert!(batch(&busy, 1).is_err(), "another exit code is no measurement");
    }
}
