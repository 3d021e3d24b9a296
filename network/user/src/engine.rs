//! The event loop of a network's process: the ring, the control socket and the sockets of all flows in one epoll.
//!
//! ```text
//!   wait ─▶ events ─▶ frames (until none, or a batch) ─▶ flush TCP ─▶ clock ─▶ ring the bells ─▶ wait
//! ```
//!
//! The time is taken once a round. While frames are left, the wait is none.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use atoll_network::ring::{Peer, RingError};
use rustix::net::RecvFlags;

use crate::control::{Reply, Request, receive, send};
use crate::forward::{Bound, ForwardError};
use crate::host::Linux;
use crate::nat::Nat;
use crate::poller::{Epoll, Owner, Poller, Readiness};

const DATA: u64 = 0;
const ROOM: u64 = 1;
const CONTROL: u64 = 2;

/// Why a network has ended.
#[derive(Debug, thiserror::Error)]
pub enum EngineError {
    /// The machine's process broke the rules, or was taken over.
    #[error(transparent)]
    Ring(#[from] RingError),
    /// The host.
    #[error("the network's event loop failed: {0}")]
    Host(#[from] io::Error),
}

/// The network of a process.
pub type ProcessNat = Nat<Peer, Epoll, Linux>;

/// Runs a network until the machine's process is gone.
pub fn run(nat: &mut ProcessNat, control: &OwnedFd) -> Result<(), EngineError> {
    let data = nat.sender.frames.data_event().try_clone_to_owned()?;
    let room = nat.sender.frames.room_event().try_clone_to_owned()?;
    for (fd, token) in [(&data, DATA), (&room, ROOM), (control, CONTROL)] {
        nat.poller.watch(fd.as_fd(), Owner::Engine.token(token), true, false, false)?;
    }
    let mut ready = Vec::new();
    let mut more = true;
    let mut next = nat.expire(Instant::now());
    loop {
        let timeout = match next {
            _ if more => Some(Duration::ZERO),
            Some(next) => Some(next.saturating_duration_since(Instant::now())),
            None => None,
        };
        nat.poller.wait(timeout, &mut ready)?;
        let now = Instant::now();
        if ready.iter().any(|(token, _)| matches!(Owner::of(*token), Some((Owner::Engine, DATA | ROOM)))) {
            nat.sender.frames.clear_events();
        }
        for (token, readiness) in ready.iter().copied() {
            match Owner::of(token) {
                Some((Owner::Engine, value)) => match engine_event(nat, control, value, readiness, now)? {
                    Next::GoOn => {}
                    Next::End => return Ok(()),
                },
                Some((owner, value)) => nat.ready(owner, value, readiness, now),
                None => {}
            }
        }
        more = nat.take_frames(now);
        nat.flush(now);
        next = nat.expire(now);
        nat.sender.frames.ring_bells();
        if let Some(error) = nat.sender.take_failure() {
            return Err(error.into());
        }
    }
}

enum Next {
    GoOn,
    End,
}

fn engine_event(
    nat: &mut ProcessNat,
    control: &OwnedFd,
    value: u64,
    readiness: Readiness,
    now: Instant,
) -> Result<Next, EngineError> {
    match value {
        DATA | ROOM if readiness.hung_up => return Ok(Next::End),
        ROOM => nat.room(now),
        CONTROL => {
            let Some((request, _)) = receive::<Request>(control, RecvFlags::DONTWAIT)? else {
                return Ok(Next::End);
            };
            let reply = answer(nat, request);
            // A machine's process that does not read its replies loses them.
            if let Err(error) = send(control, &reply, &[]) {
                tracing::warn!("a reply to the machine's process was lost: {error}");
            }
        }
        _ => {}
    }
    Ok(Next::GoOn)
}

fn answer(nat: &mut ProcessNat, request: Request) -> Reply {
    let done = |result: Result<(), ForwardError>| match result {
        Ok(()) => Reply::Done,
        Err(error) => Reply::Failed(error.to_string()),
    };
    match request {
        Request::Start(_) => Reply::Failed("the network has started already".to_owned()),
        Request::AddForward(forward) => done(Bound::new(forward).and_then(|bound| nat.add_forward(bound))),
        Request::RemoveForward(forward) => done(nat.remove_forward(&forward)),
        Request::Stats => Reply::Stats(Box::new(nat.stats())),
    }
}
