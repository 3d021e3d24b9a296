//! The project's own chores, run as `cargo xtask VERB`.
//!
//! | verb | does |
//! |---|---|
//! | `ci` | everything that must pass before a change goes in; what `.ci/run` calls |
//! | `tidy` | the house rules that the compiler does not know |
//! | `guests` | fetches and builds the guests of the tests |
//! | `boot` | boots guests with `atoll` and checks what they say |
//! | `lab` | the KVM backend on a processor that virtualizes, emulated |
//! | `bench` | native, Atoll and QEMU side by side |
//! | `fuzz` | builds and runs the fuzz targets |
#![forbid(unsafe_code)]

mod bench;
mod boot;
mod ci;
mod fuzz;
mod guests;
mod lab;
mod process;
mod setup;
mod tidy;

use clap::{Parser, Subcommand};

#[derive(Debug, Parser)]
#[command(name = "cargo xtask", about = "The project's own chores")]
struct Arguments {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// Everything that must pass: set-up, format, lints, house rules, tests, guests that boot
    Ci(ci::Arguments),
    /// Check the house rules that the compiler does not know
    Tidy,
    /// Fetch and build the guests of the tests and print where they are
    Guests(guests::Arguments),
    /// Boot guests and check what they say
    Boot(boot::Arguments),
    /// Prove the KVM backend where an emulated processor virtualizes
    Lab(lab::Arguments),
    /// Measure native, Atoll and QEMU side by side
    Bench(bench::Arguments),
    /// Build the fuzz targets and run each for a while
    Fuzz(fuzz::Arguments),
}

fn main() -> std::process::ExitCode {
    let result = match Arguments::parse().verb {
        Verb::Ci(arguments) => ci::run(&arguments),
        Verb::Tidy => tidy::run(),
        Verb::Guests(arguments) => guests::run(&arguments),
        Verb::Boot(arguments) => boot::run(&arguments),
        Verb::Lab(arguments) => lab::run(&arguments),
        Verb::Bench(arguments) => bench::run(&arguments),
        Verb::Fuzz(arguments) => fuzz::run(&arguments),
    };
    match result {
        Ok(()) => std::process::ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("xtask: {error:#}");
            std::process::ExitCode::FAILURE
        }
    }
}
