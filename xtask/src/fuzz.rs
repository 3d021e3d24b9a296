//! `cargo xtask fuzz`: builds the fuzz targets and runs each for a stated time.
//!
//! The crate in `fuzz/` is laid out as cargo-fuzz expects, but nothing more than a nightly compiler is needed:
//! the flags below ask LLVM for the coverage that libFuzzer follows, and for overflow checks and debug
//! assertions on top of optimised code. A crash leaves its input in `fuzz/artifacts/TARGET/`.

use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};

use crate::process::{root, run as run_command, target};

const TRIPLE: &str = "x86_64-unknown-linux-gnu";

const FLAGS: [&str; 9] = [
    "--cfg=fuzzing",
    "-Cpasses=sancov-module",
    "-Cllvm-args=-sanitizer-coverage-level=4",
    "-Cllvm-args=-sanitizer-coverage-inline-8bit-counters",
    "-Cllvm-args=-sanitizer-coverage-pc-table",
    "-Cllvm-args=-sanitizer-coverage-trace-compares",
    "-Cdebug-assertions=on",
    "-Coverflow-checks=on",
    "-Ccodegen-units=1",
];

#[derive(Debug, Clone, clap::Args)]
pub(crate) struct Arguments {
    /// Seconds for each target
    #[arg(long, default_value_t = 60)]
    seconds: u64,
    /// Only this target
    target: Option<String>,
}

impl Arguments {
    /// Every target, `seconds` each.
    pub(crate) fn all(seconds: u64) -> Self {
        Self { seconds, target: None }
    }
}

/// Builds and runs.
///
/// # Errors
/// If a target does not build, crashes, or does not exist.
pub(crate) fn run(arguments: &Arguments) -> Result<()> {
    let all = targets()?;
    let chosen: Vec<&String> =
        all.iter().filter(|name| arguments.target.as_ref().is_none_or(|t| t == *name)).collect();
    ensure!(!chosen.is_empty(), "no such fuzz target; there are: {}", all.join(", "));
    build(&chosen)?;
    let mut crashed = Vec::new();
    for name in &chosen {
        println!("fuzz {name}: {} s", arguments.seconds);
        if let Err(error) = run_one(name, arguments.seconds) {
            println!("fuzz {name}: {error:#}");
            crashed.push(name.as_str());
        }
    }
    if !crashed.is_empty() {
        bail!("crashed: {}", crashed.join(", "));
    }
    println!("fuzz: {} targets, {} s each, no crash", chosen.len(), arguments.seconds);
    Ok(())
}

/// Names of the programs in the manifest.
fn targets() -> Result<Vec<String>> {
    let path = root().join("fuzz/Cargo.toml");
    let text = std::fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
    let manifest: toml::Table =
        toml::from_str(&text).with_context(|| format!("cannot parse {}", path.display()))?;
    let programs = manifest.get("bin").and_then(toml::Value::as_array).cloned().unwrap_or_default();
    Ok(programs.iter().filter_map(|p| p.get("name")?.as_str().map(str::to_owned)).collect())
}

fn build(names: &[&String]) -> Result<()> {
    // `cargo` through rustup's proxy, not the one of the running toolchain, which does not know `+nightly`.
    let mut cargo = Command::new("cargo");
    cargo.args(["+nightly", "build", "--release", "--target", TRIPLE, "--manifest-path"]);
    cargo.arg(root().join("fuzz/Cargo.toml")).arg("--target-dir").arg(directory());
    for name in names {
        cargo.args(["--bin", name]);
    }
    cargo.env("RUSTFLAGS", FLAGS.join(" ")).current_dir(root());
    for variable in ["CARGO", "RUSTC", "RUSTUP_TOOLCHAIN", "RUSTDOC"] {
        cargo.env_remove(variable);
    }
    run_command(&mut cargo).context("fuzzing needs the nightly toolchain: rustup toolchain install nightly")
}

fn directory() -> PathBuf {
    target().join("fuzz")
}

fn run_one(name: &str, seconds: u64) -> Result<()> {
    let corpus = root().join("fuzz/corpus").join(name);
    let artifacts = root().join("fuzz/artifacts").join(name);
    for folder in [&corpus, &artifacts] {
        std::fs::create_dir_all(folder).with_context(|| format!("cannot create {}", folder.display()))?;
    }
    let mut command = Command::new(directory().join(TRIPLE).join("release").join(name));
    command.arg(format!("-max_total_time={seconds}"));
    command.arg(format!("-artifact_prefix={}/", artifacts.display()));
    command.args(["-rss_limit_mb=2048", "-timeout=10", "-print_final_stats=1", "-verbosity=0"]);
    command.arg(&corpus).current_dir(root());
    run_command(&mut command)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_target_has_its_source_file() {
        let names = targets().unwrap();
        assert!(names.iter().any(|n| n == "kernel_image"), "{names:?}");
        for name in names {
            let path = root().join("fuzz/fuzz_targets").join(format!("{name}.rs"));
            assert!(path.is_file(), "{} is missing", path.display());
        }
    }
}
