//! `atoll-oracle`: compares the software CPU with this processor on random instructions. See the library.

use std::process::ExitCode;

use anyhow::Context;
use atoll_oracle::case::Mode;
use atoll_oracle::corpus::CORPUS;
use atoll_oracle::generate::Modes;
use atoll_oracle::progress::SharedProgress;
use atoll_oracle::run::{self, Plan};
use clap::Parser;

/// Compares the software CPU with this processor on random instructions.
#[derive(Parser)]
struct Arguments {
    /// Cases to run.
    #[arg(long, default_value_t = 1_000_000)]
    cases: u64,
    /// Seed; a random one unless given.
    #[arg(long, value_parser = number)]
    seed: Option<u64>,
    /// Code to run: 64, 32, 16 or all.
    #[arg(long, default_value = "all", value_parser = modes)]
    mode: Modes,
    /// Processes.
    #[arg(long, default_value_t = 2)]
    jobs: usize,
    /// Differences after which a process stops.
    #[arg(long, default_value_t = 5)]
    max_differences: u64,
    /// Run this one case in detail.
    #[arg(long)]
    only: Option<u64>,
    /// Replay the corpus of known cases, each with this many states.
    #[arg(long)]
    corpus: Option<u64>,
    #[arg(long, hide = true)]
    child: Option<String>,
}

fn number(text: &str) -> Result<u64, String> {
    let parsed = match text.strip_prefix("0x") {
        Some(hex) => u64::from_str_radix(hex, 16),
        None => text.parse(),
    };
    parsed.map_err(|e| format!("{e}; expected a decimal or 0x number"))
}

fn modes(text: &str) -> Result<Modes, String> {
    match text {
        "64" => Ok(Modes::One(Mode::Long)),
        "32" => Ok(Modes::One(Mode::Protected32)),
        "16" => Ok(Modes::One(Mode::Protected16)),
        "all" => Ok(Modes::All),
        _ => Err("expected 64, 32, 16 or all".to_owned()),
    }
}

fn random_seed() -> u64 {
    use std::hash::{BuildHasher, Hasher};
    std::collections::hash_map::RandomState::new().build_hasher().finish()
}

fn main() -> anyhow::Result<ExitCode> {
    let arguments = Arguments::parse();
    let plan = Plan {
        seed: arguments.seed.unwrap_or_else(random_seed),
        cases: arguments.cases,
        modes: arguments.mode,
        jobs: arguments.jobs,
        max_differences: arguments.max_differences,
    };
    let status = |good: bool| if good { ExitCode::SUCCESS } else { ExitCode::FAILURE };
    if let Some(child) = &arguments.child {
        let parts: Option<Vec<u64>> = child.split(',').map(|p| p.parse().ok()).collect();
        let [first, slot, fd] = parts.unwrap_or_default()[..] else { anyhow::bail!("--child is internal") };
        let progress = SharedProgress::map(fd as i32).context("the parent's counters")?;
        run::child(&plan, first, slot as usize, &progress)?;
        return Ok(ExitCode::SUCCESS);
    }
    if let Some(index) = arguments.only {
        return Ok(status(run::only(&plan, index)?));
    }
    if let Some(states) = arguments.corpus {
        let reports = run::replay(CORPUS, states)?;
        reports.iter().for_each(|r| println!("{r}"));
        return Ok(status(reports.is_empty()));
    }
    Ok(status(run::parent(&plan)? == 0))
}
