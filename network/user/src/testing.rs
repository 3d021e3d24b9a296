//! For tests and fuzzing: frames in lists instead of a ring, and a host without a network.

use std::collections::VecDeque;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{BorrowedFd, OwnedFd};

use atoll_network::ring::RingError;
use atoll_network::{FrameHeader, Offloads};
use rustix::net::{AddressFamily, SocketFlags, SocketType};

use crate::config::GATEWAY_MAC;
use crate::host::Host;
use crate::poller::Poller;
use crate::sender::FrameIo;
use crate::wire::{ETHERTYPE_IPV4, ETHERTYPE_IPV6, Headers, Mac, Sum, UDP, UDP_BYTES};

/// A packet of the guest whose Ethernet address is `mac`.
pub fn packet(mac: Mac, (from, to): (IpAddr, IpAddr), protocol: u8, hops: u8, payload: &[u8]) -> Vec<u8> {
    let kind = if from.is_ipv4() { ETHERTYPE_IPV4 } else { ETHERTYPE_IPV6 };
    let mut headers = Headers::ethernet(GATEWAY_MAC, mac, kind);
    headers.ip(from, to, protocol, hops, payload.len(), None);
    [headers.bytes(), payload].concat()
}

/// A datagram of the guest with its checksum.
pub fn datagram(mac: Mac, from: SocketAddr, to: SocketAddr, payload: &[u8]) -> Vec<u8> {
    let length = UDP_BYTES + payload.len();
    let mut udp = Vec::new();
    udp.extend_from_slice(&from.port().to_be_bytes());
    udp.extend_from_slice(&to.port().to_be_bytes());
    udp.extend_from_slice(&(length as u16).to_be_bytes());
    udp.extend_from_slice(&[0, 0]);
    udp.extend_from_slice(payload);
    let sum = Sum::default().pseudo_header(from.ip(), to.ip(), UDP, length).bytes(&udp);
    udp[6..8].copy_from_slice(&sum.checksum().to_be_bytes());
    packet(mac, (from.ip(), to.ip()), UDP, 64, &udp)
}

/// Most frames kept for a guest that takes none.
const LIMIT: usize = 512;

/// Frames in lists.
pub struct Lists {
    /// What the guest sends.
    pub from_guest: VecDeque<(FrameHeader, Vec<u8>)>,
    sent: VecDeque<(FrameHeader, Vec<u8>)>,
    offloads: Offloads,
    blocked: bool,
}

impl Lists {
    /// For a guest that takes `offloads`.
    pub fn new(offloads: Offloads) -> Self {
        Self { from_guest: VecDeque::new(), sent: VecDeque::new(), offloads, blocked: false }
    }

    /// What was sent to the guest since the last call.
    pub fn take_sent(&mut self) -> Vec<(FrameHeader, Vec<u8>)> {
        self.sent.drain(..).collect()
    }

    /// From now on there is no room.
    pub fn block(&mut self) {
        self.blocked = true;
    }

    /// From now on there is room.
    pub fn unblock(&mut self) {
        self.blocked = false;
    }
}

impl FrameIo for Lists {
    fn pairs(&self) -> u16 {
        1
    }
    fn next(&mut self, _pair: u16, into: &mut Vec<u8>) -> Result<Option<FrameHeader>, RingError> {
        Ok(self.from_guest.pop_front().map(|(header, frame)| {
            into.clear();
            into.extend_from_slice(&frame);
            header
        }))
    }
    fn push(&mut self, _pair: u16, header: &FrameHeader, frame: &[&[u8]]) -> Result<bool, RingError> {
        if self.blocked || self.sent.len() >= LIMIT {
            return Ok(false);
        }
        self.sent.push_back((*header, frame.concat()));
        Ok(true)
    }
    fn room(&self, _pair: u16) -> usize {
        if self.blocked || self.sent.len() >= LIMIT { 0 } else { atoll_network::port::MAX_FRAME }
    }
    fn request_room(&mut self, pair: u16) -> Result<bool, RingError> {
        Ok(self.room(pair) > 0)
    }
    fn offloads(&self) -> Offloads {
        self.offloads
    }
}

/// A host whose sockets lead nowhere: nothing of it reaches a network.
#[derive(Debug, Default)]
pub struct NoHost {
    /// The far ends of the sockets that were made, with where they should lead; the last few.
    pub sockets: VecDeque<(SocketAddr, OwnedFd)>,
    /// Where all of TCP leads: nowhere, or to a listener of the test.
    pub tcp: Option<SocketAddr>,
}

impl NoHost {
    /// Far ends kept.
    const KEPT: usize = 16;

    fn pair(&mut self, remote: SocketAddr) -> io::Result<OwnedFd> {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let (near, far) = rustix::net::socketpair(AddressFamily::UNIX, SocketType::DGRAM, flags, None)?;
        if self.sockets.len() == Self::KEPT {
            self.sockets.pop_front();
        }
        self.sockets.push_back((remote, far));
        Ok(near)
    }
}

impl Host for NoHost {
    fn udp(&mut self, remote: SocketAddr, port: Option<u16>, _loopback: bool) -> io::Result<(OwnedFd, u16)> {
        Ok((self.pair(remote)?, port.unwrap_or(40_000)))
    }

    fn echo(&mut self, remote: IpAddr) -> io::Result<OwnedFd> {
        self.pair(SocketAddr::new(remote, 0))
    }

    fn redirect_tcp(&self, _remote: SocketAddr) -> Option<SocketAddr> {
        self.tcp
    }
}

/// Watches nothing.
#[derive(Debug, Default)]
pub struct NoPoller;

impl Poller for NoPoller {
    fn watch(&mut self, _: BorrowedFd<'_>, _: u64, _: bool, _: bool, _: bool) -> io::Result<()> {
        Ok(())
    }
    fn unwatch(&mut self, _: BorrowedFd<'_>) {}
}
