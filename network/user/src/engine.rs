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
use rustix::net::{RecvFlags, SendFlags};

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
        if let Next::End = hear(nat, control, &ready, now)? {
            return Ok(());
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

/// Sees to what is ready, frames of the guest excepted.
fn hear(
    nat: &mut ProcessNat,
    control: &OwnedFd,
    ready: &[(u64, Readiness)],
    now: Instant,
) -> Result<Next, EngineError> {
    if ready.iter().any(|(token, _)| matches!(Owner::of(*token), Some((Owner::Engine, DATA | ROOM)))) {
        // Both bells are forgotten, so both are answered: the other one may have rung since it was looked at. Frames
        // are taken in every round.
        nat.sender.frames.clear_events();
        nat.room(now);
    }
    for (token, readiness) in ready.iter().copied() {
        match Owner::of(token) {
            Some((Owner::Engine, value)) => match engine_event(nat, control, value, readiness)? {
                Next::GoOn => {}
                Next::End => return Ok(Next::End),
            },
            Some((owner, value)) => nat.ready(owner, value, readiness, now),
            None => {}
        }
    }
    Ok(Next::GoOn)
}

fn engine_event(
    nat: &mut ProcessNat,
    control: &OwnedFd,
    value: u64,
    readiness: Readiness,
) -> Result<Next, EngineError> {
    match value {
        DATA | ROOM if readiness.hung_up => return Ok(Next::End),
        CONTROL => {
            let Some((request, _)) = receive::<Request>(control, RecvFlags::DONTWAIT)? else {
                return Ok(Next::End);
            };
            let reply = answer(nat, request);
            // A machine's process that does not read its replies loses them.
            if let Err(error) = send(control, &reply, &[], SendFlags::DONTWAIT) {
                atoll_foundation::log_limited!(warn, "a reply to the machine's process was lost: {error}");
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

#[cfg(test)]
mod tests {
    use std::net::UdpSocket;

    use atoll_foundation::eventfd::wait_readable;
    use atoll_network::ring::{self, MIN_RING_BYTES, RingPort};
    use atoll_network::{FrameHeader, Port, Received, Taken};
    use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
    use vm_memory::VolatileSlice;

    use super::*;
    use crate::config::UserNetConfig;
    use crate::dns::Resolvers;
    use crate::testing::datagram;

    const MAC: crate::wire::Mac = [0x52, 0x54, 0, 0x12, 0x34, 0x56];
    const GUEST: &str = "10.0.2.15:5000";

    fn network() -> (RingPort, ProcessNat, OwnedFd, OwnedFd) {
        let (port, setup) = ring::create(1, MIN_RING_BYTES).unwrap();
        let config = UserNetConfig { host_loopback: true, guest_mac: Some(MAC), ..UserNetConfig::default() };
        let parts = (Peer::attach(setup).unwrap(), Epoll::new().unwrap(), Linux);
        let nat = Nat::new(&config, config.check().unwrap(), Resolvers::default(), parts);
        let (ours, theirs) =
            socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None).unwrap();
        (port, nat, ours, theirs)
    }

    fn sockets_that_are_ready(nat: &mut ProcessNat) -> Vec<(u64, Readiness)> {
        let mut ready = Vec::new();
        nat.poller.wait(Some(Duration::from_millis(100)), &mut ready).unwrap();
        ready
    }

    #[test]
    fn room_that_is_told_while_only_data_was_looked_for_is_not_missed() {
        let (port, mut nat, _ours, control) = network();
        let server = UdpSocket::bind("127.0.0.1:0").unwrap();
        let remote = format!("10.0.2.2:{}", server.local_addr().unwrap().port()).parse().unwrap();
        let mut frame = datagram(MAC, GUEST.parse().unwrap(), remote, b"x");
        nat.take_frame(&FrameHeader::default(), &frame, Instant::now());
        let from = server.recv_from(&mut [0; 8]).unwrap().1;
        // The guest takes nothing until the flow's socket is put aside.
        while !nat.sender.take_full() {
            server.send_to(&[0; 8000], from).unwrap();
            let ready = sockets_that_are_ready(&mut nat);
            hear(&mut nat, &control, &ready, Instant::now()).unwrap_or(Next::End);
        }
        server.send_to(b"the last one", from).unwrap();
        assert!(sockets_that_are_ready(&mut nat).is_empty(), "it is put aside");
        // The guest sends, which wakes the network, and makes room before the network has looked at its bells.
        let frame = [VolatileSlice::from(&mut frame[..])];
        port.send(0, &FrameHeader::default(), &frame).unwrap();
        port.flush(0);
        let data = [(Owner::Engine.token(DATA), Readiness { readable: true, ..Readiness::default() })];
        while port.receive(0, &mut |_, _| Taken::Yes).unwrap() != Received::Empty {}
        assert!(wait_readable(nat.sender.frames.room_event(), Some(Duration::ZERO)).unwrap());
        assert!(matches!(hear(&mut nat, &control, &data, Instant::now()), Ok(Next::GoOn)));
        let ready = sockets_that_are_ready(&mut nat);
        assert!(
            ready.iter().any(|(token, _)| matches!(Owner::of(*token), Some((Owner::Udp, _)))),
            "{ready:?}"
        );
    }

    #[test]
    fn who_does_not_read_replies_does_not_stop_the_network() {
        let readable = Readiness { readable: true, ..Readiness::default() };
        let event = [(Owner::Engine.token(CONTROL), readable)];
        let (done, is_done) = std::sync::mpsc::channel();
        std::thread::spawn(move || {
            let (_port, mut nat, ours, control) = network();
            for _ in 0..5000 {
                send(&ours, &Request::Stats, &[], SendFlags::empty()).unwrap();
                assert!(matches!(hear(&mut nat, &control, &event, Instant::now()), Ok(Next::GoOn)));
            }
            done.send(()).unwrap();
        });
        is_done.recv_timeout(Duration::from_secs(20)).expect("the network waits for its reply to be read");
    }
}
