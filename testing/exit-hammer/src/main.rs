//! The exit hammer: guests that leave their vCPUs in every way there is, at random, for as long as one likes, on any
//! backend; checked for what comes back, for hangs, and for a clean stop.
//!
//! ```text
//! main ──► host (machine, threads that kick, interrupt, move memory, log dirty pages) ──► guest (the program)
//! ```
//!
//! The seed is printed and makes the guests' choices again; what the host's threads do depends on time as well.

#![forbid(unsafe_code)]

mod guest;
mod host;
mod random;

use std::process::ExitCode;
use std::sync::atomic::Ordering;
use std::time::Duration;

use anyhow::{Result, bail};
use atoll_cpu_software::partition::SoftwareBackend;
use atoll_kvm::KvmBackend;
use clap::Parser;

#[derive(Debug, Parser)]
#[command(name = "atoll-exit-hammer", about = "Guests that leave their vCPUs in every way, at random")]
struct Arguments {
    /// What executes the guests: software or kvm
    #[arg(long, default_value = "software")]
    accel: String,
    /// How long
    #[arg(long, default_value_t = 10)]
    seconds: u64,
    /// Seconds that a vCPU may take for one round before it counts as hung; hosts may be slow and busy
    #[arg(long, default_value_t = 60)]
    patience: u64,
    /// Only the ways whose name contains one of these words, which commas separate
    #[arg(long, default_value = "")]
    only: String,
    /// Not the ways whose name contains one of these words, which commas separate
    #[arg(long)]
    except: Option<String>,
    /// The host does nothing that the guest did not ask for
    #[arg(long)]
    calm: bool,
    /// Of the guests' choices; from the clock if it is not given
    #[arg(long)]
    seed: Option<u64>,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let seed = arguments.seed.unwrap_or_else(|| {
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
        now.map_or(1, |n| n.as_nanos() as u64)
    });
    let name = format!("hammer on {}, {} s, seed {seed}", arguments.accel, arguments.seconds);
    println!("hammer: seed {seed}");
    match hammer(&arguments, seed) {
        Ok(statistics) => {
            report(&statistics);
            println!("test {name} ... ok");
            ExitCode::SUCCESS
        }
        Err(error) => {
            println!("test {name} ... FAILED: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn report(s: &host::Statistics) {
    println!(
        "hammer: {} rounds, {} accesses, {} stops, {} states set, {} unasked messages, {} dirty logs, {} level ends",
        s.rounds,
        s.exits,
        s.stops.load(Ordering::Relaxed),
        s.states.load(Ordering::Relaxed),
        s.messages.load(Ordering::Relaxed),
        s.dirty_checks.load(Ordering::Relaxed),
        s.level_ends
    );
    for (name, count, micros) in &s.ways {
        println!("hammer: {name}: {count} times, {micros} us each");
    }
}

fn hammer(arguments: &Arguments, seed: u64) -> Result<host::Statistics> {
    let seconds = Duration::from_secs;
    let plan = host::Plan {
        seed,
        whole: seconds(arguments.seconds),
        round: seconds(arguments.patience),
        choice: guest::Choice { only: arguments.only.clone(), except: arguments.except.clone() },
        calm: arguments.calm,
    };
    let statistics = match arguments.accel.as_str() {
        "software" => host::run(&SoftwareBackend, &plan)?,
        "kvm" => host::run(&KvmBackend::open()?, &plan)?,
        other => bail!("there is no --accel {other}; there are software and kvm"),
    };
    if statistics.rounds < 100 {
        bail!("only {} rounds: that shows nothing", statistics.rounds);
    }
    Ok(statistics)
}
