//! `atoll`, the one binary. Each verb is a file under `commands/`.
//!
//! Exit codes: 0 the guest powered off; 1 something of ours failed; 2 wrong usage or input, nothing started;
//! 3 the guest crashed; 130 ended by the user; a kernel that is a test chooses its own (`--debug-exit`).

#![forbid(unsafe_code)]

mod commands;
mod console;
mod failure;

use clap::{Parser, Subcommand};

use failure::Failure;

#[derive(Parser)]
#[command(
    name = "atoll",
    version,
    about = "Runs virtual machines, with or without hardware virtualization",
    subcommand_required = true,
    arg_required_else_help = true,
    disable_help_subcommand = true
)]
struct Cli {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Subcommand)]
enum Verb {
    /// Run a virtual machine in this terminal
    Run(Box<commands::run::Args>),
    /// Make, look at, check, convert and enlarge disk images
    Disk(commands::disk::Args),
    /// List the CPU models and whether this host can give them
    Cpus(commands::cpus::Args),
    /// Say what this host gives to machines, what will be slow or refused, and how to mend it
    Doctor(commands::doctor::Args),
    /// The process of user-mode NAT; started by a machine's process
    #[command(hide = true)]
    NetworkUser,
}

fn main() -> std::process::ExitCode {
    atoll_foundation::allocator::return_freed_memory();
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => return usage(&error),
    };
    init_logging();
    let result = match cli.verb {
        Verb::Run(args) => commands::run::run(*args),
        Verb::Disk(args) => commands::disk::run(args),
        Verb::Cpus(args) => commands::cpus::run(&args),
        Verb::Doctor(args) => commands::doctor::run(&args),
        Verb::NetworkUser => return commands::network_user::run(),
    };
    match result {
        Ok(code) => code.into(),
        Err(failure) => {
            eprintln!("atoll: {failure}");
            failure.exit_code().into()
        }
    }
}

/// Help and version are printed as they are; wrong usage is one line like every other refusal.
fn usage(error: &clap::Error) -> std::process::ExitCode {
    if error.use_stderr() && error.kind() != clap::error::ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand
    {
        let text = error.to_string();
        let what = text.split("\n\n").next().unwrap_or_default().trim_start_matches("error: ");
        let words: Vec<&str> = what.split_whitespace().collect();
        eprintln!("atoll: {}; see --help", words.join(" "));
    } else {
        let _ = error.print();
    }
    u8::try_from(error.exit_code()).unwrap_or(2).into()
}

/// Our own log goes to standard error, warnings and worse unless `ATOLL_LOG` says otherwise (`ATOLL_LOG=debug`).
fn init_logging() {
    let filter = tracing_subscriber::EnvFilter::try_from_env("ATOLL_LOG")
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new("warn"));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(|| console::RawStderr)
        .with_target(false)
        .without_time()
        .init();
}

/// The result of a verb: the process's exit code, or why it could not do its work.
pub(crate) type VerbResult = Result<u8, Failure>;
