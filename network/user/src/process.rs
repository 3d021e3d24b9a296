//! The network's process.
//!
//! The program that [`crate::client::UserNet`] starts calls [`run_on_stdin`]. Its control socket is standard input
//! (the one descriptor that a parent can hand over without `unsafe` on either side). What goes wrong before the
//! network is ready is told to the parent, later failures are one line on standard error; either way the process
//! ends with status 1. It ends with status 0 when the parent is gone or lets go of the socket, which is also how
//! it dies with its parent.

use std::os::fd::{AsFd, OwnedFd};
use std::process::ExitCode;

use atoll_network::ring::{Peer, RingSetup};
use rustix::net::{RecvFlags, SendFlags};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

use crate::config::UserNetConfig;
use crate::control::{Reply, Request, receive, send};
use crate::dns::Resolvers;
use crate::engine::{self, ProcessNat};
use crate::forward::Bound;
use crate::host::Linux;
use crate::nat::Nat;
use crate::poller::Epoll;

/// Descriptors besides flows and forwards: standard ones, ring, epoll, queries, echo, those on their way.
const OTHER_DESCRIPTORS: u64 = 640;

/// As [`run`], with standard input as control socket.
pub fn run_on_stdin(enter_jail: impl FnOnce(&UserNetConfig) -> Result<(), String>) -> ExitCode {
    match std::io::stdin().as_fd().try_clone_to_owned() {
        Ok(control) => run(control, enter_jail),
        Err(error) => {
            tracing::error!("the network's process has no control socket: {error}");
            ExitCode::FAILURE
        }
    }
}

/// Runs a network until the parent is gone. `enter_jail` is called when everything that needs rights was done,
/// before a byte of the guest is read; its error ends the process.
pub fn run(control: OwnedFd, enter_jail: impl FnOnce(&UserNetConfig) -> Result<(), String>) -> ExitCode {
    let (config, fds) = match receive::<Request>(&control, RecvFlags::empty()) {
        Ok(Some((Request::Start(config), fds))) => (config, fds),
        Ok(None) => return ExitCode::SUCCESS,
        Ok(Some(_)) => return refuse(&control, "the first request has to start the network"),
        Err(error) => return refuse(&control, &format!("the network's control socket failed: {error}")),
    };
    let mut nat = match prepare(&config, fds) {
        Ok(nat) => nat,
        Err(message) => return refuse(&control, &message),
    };
    if let Err(message) = enter_jail(&config) {
        return refuse(&control, &format!("the network's process cannot lock itself in: {message}"));
    }
    if send(&control, &Reply::Ready, &[], SendFlags::empty()).is_err() {
        return ExitCode::SUCCESS;
    }
    match engine::run(&mut nat, &control) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!("network {} ended: {error}", config.name);
            ExitCode::FAILURE
        }
    }
}

/// Does everything that needs rights.
fn prepare(config: &UserNetConfig, fds: Vec<OwnedFd>) -> Result<ProcessNat, String> {
    let addresses = config.check().map_err(|error| error.to_string())?;
    let config = &UserNetConfig { max_flows: raise_open_files(config), ..config.clone() };
    let mut resolvers = Resolvers::of_host();
    if !config.dns_servers.is_empty() {
        resolvers = resolvers.with_servers(&config.dns_servers);
    }
    let bound = config.forwards.iter().map(|forward| Bound::new(*forward));
    let bound = bound.collect::<Result<Vec<_>, _>>().map_err(|error| error.to_string())?;
    let setup = RingSetup::from_fds(fds).map_err(|error| error.to_string())?;
    let peer = Peer::attach(setup).map_err(|error| error.to_string())?;
    let epoll = Epoll::new().map_err(|error| format!("the host gives no epoll: {error}"))?;
    let mut nat = Nat::new(config, addresses, resolvers, (peer, epoll, Linux));
    for bound in bound {
        nat.add_forward(bound).map_err(|error| error.to_string())?;
    }
    Ok(nat)
}

/// Sees to a descriptor for each flow that may be, and returns how many these are: fewer than were asked for where the
/// host allows fewer descriptors. Flows of one protocol would take those of the others otherwise.
fn raise_open_files(config: &UserNetConfig) -> usize {
    let wanted = descriptors(config.max_flows as u64, config.forwards.len() as u64);
    let limit = getrlimit(Resource::Nofile);
    let most = limit.maximum.unwrap_or(u64::MAX);
    let mut current = limit.current.unwrap_or(u64::MAX);
    if current < wanted {
        let raised = Rlimit { current: Some(wanted.min(most)), maximum: limit.maximum };
        match setrlimit(Resource::Nofile, raised) {
            Ok(()) => current = wanted.min(most),
            Err(error) => tracing::warn!("the limit of open files stays at {current}: {error}"),
        }
    }
    let flows = flows_within(current, config.max_flows, config.forwards.len() as u64);
    if flows < config.max_flows {
        tracing::warn!(
            "network {}: {current} open files (ulimit -Hn) are enough for {flows} flows, not {}",
            config.name,
            config.max_flows
        );
    }
    flows
}

/// Descriptors for so many flows of TCP, as many of UDP, and a quarter of that of UDP to DNS servers.
fn descriptors(flows: u64, forwards: u64) -> u64 {
    let flows = flows.saturating_mul(2).saturating_add(flows.div_ceil(4));
    flows.saturating_add(forwards).saturating_add(OTHER_DESCRIPTORS)
}

/// Flows, at most `wanted`, for which `limit` descriptors are enough; one at least.
fn flows_within(limit: u64, wanted: usize, forwards: u64) -> usize {
    let left = limit.saturating_sub(forwards).saturating_sub(OTHER_DESCRIPTORS);
    // The quarter is rounded up, which takes one descriptor more at most.
    let flows = left.saturating_sub(1).saturating_mul(4) / 9;
    if descriptors(wanted as u64, forwards) <= limit { wanted } else { (flows as usize).clamp(1, wanted) }
}

fn refuse(control: &OwnedFd, message: &str) -> ExitCode {
    // Without a parent there is nobody to tell.
    let _ = send(control, &Reply::Failed(message.to_owned()), &[], SendFlags::empty());
    ExitCode::FAILURE
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flows_of_all_protocols_have_descriptors_under_any_limit() {
        for wanted in [1, 7, 4096, 65_536] {
            for forwards in [0, 100] {
                for limit in (800..20_000).step_by(61).chain([1 << 20]) {
                    let flows = flows_within(limit, wanted, forwards);
                    assert!((1..=wanted).contains(&flows));
                    assert!(
                        descriptors(flows as u64, forwards) <= limit,
                        "{wanted} {forwards} {limit}: {flows}"
                    );
                }
            }
        }
        assert_eq!(flows_within(10_000, 4096, 0), 4096);
        assert!(flows_within(4096, 4096, 0) >= 1500, "nothing is given away");
        assert_eq!(flows_within(64, 4096, 0), 1);
    }
}
