//! Runs suites on the software CPU and on the reference emulator and shows where they differ.

use std::path::PathBuf;

use anyhow::Context;
use atoll_differential::{Family, Suite, Width, kernel, on_atoll, run, written};
use clap::Parser;

/// Seeded cases of one kernel.
const BATCH: usize = 2000;

/// Compare the software CPU with QEMU's TCG outside user mode
#[derive(Parser)]
struct Options {
    /// Write the expectations of the written cases into this folder instead of comparing
    #[arg(long, value_name = "DIR")]
    bless: Option<PathBuf>,
    /// Seeded cases per family
    #[arg(long, default_value_t = 2000)]
    random: usize,
    /// Their seed
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Number of the first one
    #[arg(long, default_value_t = 0)]
    first: usize,
    /// Only this family of seeded cases, and no written ones; may be repeated
    #[arg(long, value_parser = Family::parse)]
    family: Vec<Family>,
    /// Show known deviations too
    #[arg(long)]
    all: bool,
    /// Keep the kernels in this folder
    #[arg(long, value_name = "DIR")]
    keep: Option<PathBuf>,
}

/// Cases compared, of which differ, of which without explanation.
#[derive(Clone, Copy, Default)]
struct Tally {
    cases: usize,
    known: usize,
    different: usize,
}

impl Tally {
    fn add(&mut self, other: Self) {
        self.cases += other.cases;
        self.known += other.known;
        self.different += other.different;
    }

    fn print(&self, title: &str) {
        let Self { cases, known, different } = self;
        println!("{title}: {cases} cases, {different} differ, {known} known deviations");
    }
}

fn main() -> anyhow::Result<()> {
    let options = Options::parse();
    let mut total = Tally::default();
    if options.family.is_empty() {
        for width in Width::ALL {
            let suite = written(width)?;
            if let Some(folder) = &options.bless {
                bless(folder, &suite)?;
                continue;
            }
            let title = format!("written-{}", width.name());
            let tally = compare(&options, &suite, &title)?;
            tally.print(&title);
            total.add(tally);
        }
    }
    if options.bless.is_none() {
        let families = if options.family.is_empty() { &Family::ALL[..] } else { &options.family };
        for family in families {
            total.add(seeded(&options, *family)?);
        }
        total.print(&format!("all, seed {}", options.seed));
    }
    anyhow::ensure!(total.different == 0, "{} cases differ", total.different);
    Ok(())
}

fn seeded(options: &Options, family: Family) -> anyhow::Result<Tally> {
    let mut tally = Tally::default();
    let end = options.first + options.random;
    for first in (options.first..end).step_by(BATCH) {
        let suite = family.suite(options.seed, first..end.min(first + BATCH))?;
        tally.add(compare(options, &suite, &format!("seeded-{}-{first}", family.name()))?);
    }
    tally.print(&format!("seeded-{}, seed {}", family.name(), options.seed));
    Ok(tally)
}

fn bless(folder: &std::path::Path, suite: &Suite) -> anyhow::Result<()> {
    let lines: Option<Vec<String>> = run::lines(suite, on_atoll::run)?.into_iter().collect();
    let lines = lines.context("a written case crashed or hung")?;
    let path = folder.join(format!("{}.txt", suite.width.name()));
    std::fs::write(&path, lines.join("\n") + "\n").with_context(|| path.display().to_string())
}

fn compare(options: &Options, suite: &Suite, title: &str) -> anyhow::Result<Tally> {
    if let Some(folder) = &options.keep {
        std::fs::write(folder.join(format!("{title}.elf")), kernel(suite, 0)?)?;
    }
    let mut tally = Tally { cases: suite.names().count(), ..Tally::default() };
    for difference in run::compare(suite)? {
        if difference.known {
            tally.known += 1;
        } else {
            tally.different += 1;
        }
        if !difference.known || options.all {
            let show = |line: &Option<String>| line.clone().unwrap_or_else(|| "crashed or hung".into());
            println!("atoll {}", show(&difference.ours));
            println!(" qemu {}", show(&difference.theirs));
            for line in suite.listing(difference.index) {
                println!("      {line}");
            }
        }
    }
    Ok(tally)
}
