//! Runs suites on the software CPU and on the reference emulator and shows where they differ.

use std::path::PathBuf;

use anyhow::Context;
use atoll_differential::{Suite, Width, deviations, kernel, on_atoll, on_qemu, record, seeded, written};
use clap::Parser;

/// Compare the software CPU with QEMU's TCG outside user mode
#[derive(Parser)]
struct Options {
    /// Write the expectations of the written cases into this folder instead of comparing
    #[arg(long, value_name = "DIR")]
    bless: Option<PathBuf>,
    /// Seeded cases per width
    #[arg(long, default_value_t = 2000)]
    random: usize,
    /// Their seed
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Show known deviations too
    #[arg(long)]
    all: bool,
    /// Keep the kernels in this folder
    #[arg(long, value_name = "DIR")]
    keep: Option<PathBuf>,
}

fn main() -> anyhow::Result<()> {
    let options = Options::parse();
    let mut different = 0;
    for width in [Width::Protected, Width::Long] {
        let suite = written(width)?;
        if let Some(folder) = &options.bless {
            let lines = record::lines(&suite, &on_atoll::run(&kernel(&suite)?)?);
            let path = folder.join(format!("{}.txt", width.name()));
            std::fs::write(&path, lines.join("\n") + "\n").with_context(|| path.display().to_string())?;
            continue;
        }
        different += compare(&options, &suite, "written")?;
        if options.random > 0 {
            different += compare(&options, &seeded(width, options.seed, options.random)?, "seeded")?;
        }
    }
    anyhow::ensure!(different == 0, "{different} cases differ");
    Ok(())
}

fn compare(options: &Options, suite: &Suite, kind: &str) -> anyhow::Result<usize> {
    let image = kernel(suite)?;
    let title = format!("{kind}-{}", suite.width.name());
    if let Some(folder) = &options.keep {
        std::fs::write(folder.join(format!("{title}.elf")), &image)?;
    }
    let ours = record::lines(suite, &on_atoll::run(&image)?);
    let theirs = record::lines(suite, &on_qemu::run(&image)?);
    let mut different = 0;
    for (i, name) in suite.names().enumerate() {
        let (our, their) = (ours.get(i), theirs.get(i));
        if our.map(|l| record::without_rf(l)) == their.map(|l| record::without_rf(l)) {
            continue;
        }
        if deviations::of(name).is_some() && !options.all {
            continue;
        }
        different += 1;
        println!("atoll {}", our.map_or("stopped before", |l| l));
        println!(" qemu {}", their.map_or("stopped before", |l| l));
        if our.is_none() || their.is_none() {
            break;
        }
    }
    println!("{title}: {} cases, {different} differ", suite.names().count());
    Ok(different)
}
