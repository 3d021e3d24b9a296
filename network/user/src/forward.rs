//! Ports of the host that lead to the guest.
//!
//! Listening sockets are bound before the network says that it is ready, so that a port in use is an error of the
//! machine's start. Loopback is where a forward listens unless its address says otherwise: a port on every address
//! of the host is open to everybody who reaches the host, which has to be asked for.
//!
//! A UDP forward on every address of a host that has several answers from the one that the host's routes prefer. A
//! client that came to another one does not know it: give the address.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::net::{SocketType, bind, listen, sockopt};

use crate::config::{ConfigError, Forward, MAX_FORWARDS, Protocol};
use crate::host::socket;
use crate::poller::{Owner, Poller};

/// Connections that the kernel accepts before this process does.
const BACKLOG: i32 = 128;

/// A forward that cannot be.
#[derive(Debug, thiserror::Error)]
pub enum ForwardError {
    /// Somebody has the port.
    #[error("cannot forward {0}: port {port} on {address} is in use on the host; choose another port", port = .0.host.port(), address = .0.host.ip())]
    InUse(Forward),
    /// Ports below 1024 are root's.
    #[error("cannot forward {0}: port {port} of the host is for root only (net.ipv4.ip_unprivileged_port_start); choose a port from 1024 on", port = .0.host.port())]
    Privileged(Forward),
    /// Not an address of the host.
    #[error("cannot forward {0}: {address} is not an address of the host", address = .0.host.ip())]
    NotOurs(Forward),
    /// Anything else.
    #[error("cannot forward {0}: {1}")]
    Host(Forward, io::Error),
    /// There is none.
    #[error("there is no forward {0}")]
    Unknown(Forward),
    /// It is none.
    #[error(transparent)]
    Config(#[from] ConfigError),
}

impl ForwardError {
    fn of(forward: Forward, error: io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::AddrInUse => Self::InUse(forward),
            io::ErrorKind::PermissionDenied => Self::Privileged(forward),
            io::ErrorKind::AddrNotAvailable => Self::NotOurs(forward),
            _ => Self::Host(forward, error),
        }
    }
}

/// A socket that listens.
#[derive(Debug)]
pub struct Bound {
    /// What for.
    pub forward: Forward,
    /// The socket.
    pub socket: OwnedFd,
}

impl Bound {
    /// Binds, and for TCP listens.
    pub fn new(forward: Forward) -> Result<Self, ForwardError> {
        let bound = || -> io::Result<OwnedFd> {
            let stream = forward.protocol == Protocol::Tcp;
            let kind = if stream { SocketType::STREAM } else { SocketType::DGRAM };
            let socket = socket(forward.host.ip(), kind, None)?;
            if stream {
                // Connections of an earlier run that linger do not take the port.
                sockopt::set_socket_reuseaddr(&socket, true)?;
            }
            bind(&socket, &forward.host)?;
            if stream {
                listen(&socket, BACKLOG)?;
            }
            Ok(socket)
        };
        let socket = bound().map_err(|error| ForwardError::of(forward, error))?;
        Ok(Self { forward, socket })
    }
}

/// All forwards, each with a number.
#[derive(Debug, Default)]
pub struct Forwards {
    bound: BTreeMap<u64, Bound>,
    next: u64,
}

impl Forwards {
    /// How many there are.
    pub fn len(&self) -> usize {
        self.bound.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.bound.is_empty()
    }

    /// Adds a forward and watches it.
    pub fn add(&mut self, bound: Bound, poller: &mut dyn Poller) -> Result<(), ForwardError> {
        if self.bound.len() >= MAX_FORWARDS {
            return Err(ConfigError::TooMany(self.bound.len() + 1).into());
        }
        let number = self.next;
        self.next += 1;
        let forward = bound.forward;
        self.bound.insert(number, bound);
        self.watch(number, true, poller).map_err(|error| ForwardError::Host(forward, error))
    }

    fn watch(&self, number: u64, on: bool, poller: &mut dyn Poller) -> io::Result<()> {
        let Some(bound) = self.bound.get(&number) else { return Ok(()) };
        if on {
            poller.watch(bound.socket.as_fd(), Owner::Forward.token(number), true, false, false)
        } else {
            poller.unwatch(bound.socket.as_fd());
            Ok(())
        }
    }

    /// Watches all of them, or none: while there is nothing to accept connections with.
    pub fn watch_all(&self, on: bool, poller: &mut dyn Poller) {
        for number in self.bound.keys() {
            let _ = self.watch(*number, on, poller);
        }
    }

    /// Removes a forward (found by protocol and host address) and returns its number.
    pub fn remove(&mut self, forward: &Forward, poller: &mut dyn Poller) -> Result<u64, ForwardError> {
        let same =
            |bound: &Bound| bound.forward.protocol == forward.protocol && bound.forward.host == forward.host;
        let number = self.bound.iter().find(|(_, bound)| same(bound)).map(|(number, _)| *number);
        let number = number.ok_or(ForwardError::Unknown(*forward))?;
        if let Some(bound) = self.bound.remove(&number) {
            poller.unwatch(bound.socket.as_fd());
        }
        Ok(number)
    }

    /// The forward of a number.
    pub fn get(&self, number: u64) -> Option<&Bound> {
        self.bound.get(&number)
    }

    /// The socket of a UDP forward.
    pub fn udp_socket(&self, number: u64) -> Option<BorrowedFd<'_>> {
        let bound = self.bound.get(&number)?;
        (bound.forward.protocol == Protocol::Udp).then(|| bound.socket.as_fd())
    }
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use super::*;

    #[test]
    fn a_port_in_use_is_one_clear_line() {
        let taken = TcpListener::bind("127.0.0.1:0").unwrap();
        let host = taken.local_addr().unwrap();
        let forward = Forward { protocol: Protocol::Tcp, host, guest: None, guest_port: 22 };
        let error = Bound::new(forward).unwrap_err().to_string();
        let port = host.port();
        assert_eq!(
            error,
            format!(
                "cannot forward tcp:127.0.0.1:{port}:22: port {port} on 127.0.0.1 is in use on the host; \
                 choose another port"
            )
        );
        let elsewhere = Forward { host: "192.0.2.200:9".parse().unwrap(), ..forward };
        assert!(Bound::new(elsewhere).unwrap_err().to_string().contains("not an address of the host"));
    }
}
