//! The host's sockets that a network needs, behind a trait so that fuzzing reaches no network.
//!
//! # Ports of UDP flows
//!
//! A flow has a connected socket of its own: the kernel filters what others send, and tells of refusals. Flows
//! of one guest endpoint share a local port (RFC 4787, REQ-1, endpoint-independent mapping; REQ-8 with address and
//! port dependent filtering): the first takes one that nobody has, later ones bind to the same with SO_REUSEPORT,
//! which the kernel gives to sockets of the same user only.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::OwnedFd;

use rustix::net::{
    AddressFamily, Protocol, SocketFlags, SocketType, bind, connect, getsockname, ipproto, sockopt,
};

/// Makes sockets.
pub trait Host {
    /// A connected UDP socket, and its local port. `port`: share this one, if possible. Without `loopback`, a
    /// socket that turns out to lead to the host's loopback is an error.
    fn udp(&mut self, remote: SocketAddr, port: Option<u16>, loopback: bool) -> io::Result<(OwnedFd, u16)>;

    /// A connected socket for ICMP echo (a "ping socket").
    fn echo(&mut self, remote: IpAddr) -> io::Result<OwnedFd>;

    /// Where TCP, which makes its sockets itself, connects instead of `remote`, where the policy allows that.
    /// `None`: refused.
    fn redirect_tcp(&self, remote: SocketAddr) -> Option<SocketAddr> {
        Some(remote)
    }
}

/// The kernel's.
#[derive(Debug, Default)]
pub struct Linux;

const FLAGS: SocketFlags = SocketFlags::CLOEXEC.union(SocketFlags::NONBLOCK);

/// The family of an address.
pub fn family(address: IpAddr) -> AddressFamily {
    if address.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 }
}

/// Every address of a family.
pub fn unspecified(address: IpAddr) -> IpAddr {
    match address {
        IpAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
        IpAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
    }
}

/// Where a socket is bound.
pub fn local_address(socket: &OwnedFd) -> io::Result<SocketAddr> {
    getsockname(socket)?.try_into().map_err(io::Error::from)
}

/// A socket that speaks one family only.
pub fn socket(address: IpAddr, kind: SocketType, protocol: Option<Protocol>) -> io::Result<OwnedFd> {
    let socket = rustix::net::socket_with(family(address), kind, FLAGS, protocol)?;
    if address.is_ipv6() && kind != SocketType::RAW && protocol != Some(ipproto::ICMPV6) {
        sockopt::set_ipv6_v6only(&socket, true)?;
    }
    Ok(socket)
}

/// The kernel's choice of a source address says where a socket leads: that a destination is loopback may be a
/// matter of the host's routes.
fn refuse_loopback(socket: &OwnedFd) -> io::Result<SocketAddr> {
    let local = local_address(socket)?;
    if local.ip().to_canonical().is_loopback() {
        return Err(io::Error::from(io::ErrorKind::PermissionDenied));
    }
    Ok(local)
}

impl Host for Linux {
    fn udp(&mut self, remote: SocketAddr, port: Option<u16>, loopback: bool) -> io::Result<(OwnedFd, u16)> {
        let any = unspecified(remote.ip());
        let udp = socket(remote.ip(), SocketType::DGRAM, None)?;
        let shared = port.is_some_and(|port| {
            sockopt::set_socket_reuseport(&udp, true).is_ok()
                && bind(&udp, &SocketAddr::new(any, port)).is_ok()
        });
        if !shared {
            // Without SO_REUSEPORT, so that it is a port that nobody has; then with it, to be shared.
            sockopt::set_socket_reuseport(&udp, false)?;
            bind(&udp, &SocketAddr::new(any, 0))?;
            sockopt::set_socket_reuseport(&udp, true)?;
        }
        connect(&udp, &remote)?;
        let local = if loopback { local_address(&udp)? } else { refuse_loopback(&udp)? };
        Ok((udp, local.port()))
    }

    fn echo(&mut self, remote: IpAddr) -> io::Result<OwnedFd> {
        let protocol = if remote.is_ipv4() { ipproto::ICMP } else { ipproto::ICMPV6 };
        let echo = socket(remote, SocketType::DGRAM, Some(protocol))?;
        connect(&echo, &SocketAddr::new(remote, 0))?;
        refuse_loopback(&echo)?;
        Ok(echo)
    }
}

#[cfg(test)]
mod tests {
    use std::net::UdpSocket;

    use super::*;

    #[test]
    fn flows_of_an_endpoint_share_a_port_and_hear_their_own_peer() {
        let peers = [0; 2].map(|_| UdpSocket::bind("127.0.0.1:0").unwrap());
        let mut host = Linux;
        let (a, port) = host.udp(peers[0].local_addr().unwrap(), None, true).unwrap();
        let (b, port_b) = host.udp(peers[1].local_addr().unwrap(), Some(port), true).unwrap();
        assert_eq!(port, port_b);
        let (_, other) = host.udp(peers[1].local_addr().unwrap(), None, true).unwrap();
        assert_ne!(port, other, "an endpoint of its own has a port of its own");
        for (n, peer) in peers.iter().enumerate() {
            peer.send_to(&[n as u8], ("127.0.0.1", port)).unwrap();
        }
        for (n, socket) in [a, b].into_iter().enumerate() {
            let mut buffer = [0; 4];
            let (length, _) =
                rustix::net::recv(&socket, &mut buffer, rustix::net::RecvFlags::empty()).unwrap();
            assert_eq!(buffer[..length], [n as u8]);
        }
    }

    #[test]
    fn a_socket_that_leads_to_loopback_is_refused() {
        for remote in ["127.0.0.1:9", "0.0.0.0:9", "[::1]:9", "[::]:9"] {
            assert!(Linux.udp(remote.parse().unwrap(), None, false).is_err(), "{remote}");
        }
    }
}
