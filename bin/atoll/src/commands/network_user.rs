//! `atoll network-user`: the process of user-mode NAT. Not for people: a machine's process starts it and tells it
//! what to do over the socket that is its standard input.

use std::process::ExitCode;

use atoll_foundation::jail::{self, JailOptions, Layer, Process};
use atoll_foundation::signals::{Signal, Signals};

/// Most address space, in bytes: several times what flows, rings and the program take.
const ADDRESS_SPACE: u64 = 512 << 20;

/// Runs until the machine's process is gone.
pub(crate) fn run() -> ExitCode {
    // What a terminal or a service manager sends to all processes ends the machine; the network ends with that.
    let _held = Signals::block(&[Signal::Interrupt, Signal::Terminate, Signal::HangUp]);
    atoll_network_user::process::run_on_stdin(|config| {
        let options =
            JailOptions { address_space: Some(ADDRESS_SPACE), ..JailOptions::new(Process::NetworkHelper) };
        let report = jail::enter(&options).map_err(|error| error.to_string())?;
        if report.holds(Layer::SystemCalls) && report.holds(Layer::NoNewPrivileges) {
            tracing::info!("the process of network {} is locked in; {report}", config.name);
        } else {
            // Every kernel that Atoll runs on has these; a host without them is worth a word.
            tracing::warn!("the process of network {} is hardly locked in; {report}", config.name);
        }
        Ok(())
    })
}
