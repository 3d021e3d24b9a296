//! UDP flows (RFC 4787).
//!
//! A flow is the guest's address and port and the remote's. Each has a connected socket, which flows of the same
//! guest endpoint share the local port of ([`crate::host`]), or belongs to a port forward, whose socket it uses:
//!
//! ```text
//!   guest sends to R            ─▶ socket connected to R; what R sends there goes to the guest
//!   client C sends to a forward ─▶ to the guest as from C (the gateway, when C is the host itself);
//!                                  what the guest sends back goes to C from the forward's socket
//! ```
//!
//! Flows end after [`IDLE`] without a datagram in either direction (REQ-5, REQ-6: a guest's or a remote's counts).
//! There are at most as many as the network was told; the one idle longest makes room. Flows to port 53 have a table
//! and a time of their own ([`IDLE_QUERIES`], as RFC 4787 allows): a guest that resolves names itself asks each
//! question from a new port, and must not displace its own calls and tunnels. A socket that is refused
//! tells the guest (REQ-14: by ICMP), the flow stays.
//!
//! # Path MTU
//!
//! A guest that forbids fragmentation, as Linux does with every datagram that fits its MTU, wants to be told what
//! the way carries: its flow's socket forbids it too, and what the host says is too long becomes "fragmentation
//! needed" or "packet too big". When the guest allows it or has fragmented a datagram itself, the host may as well.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use rustix::io::Errno;
use rustix::net::sockopt::{self, Ipv4PathMtuDiscovery, Ipv6PathMtuDiscovery};
use rustix::net::{RecvFlags, SendFlags, SocketAddrAny};

use crate::forward::Forwards;
use crate::host::Host;
use crate::icmp::{Trouble, tell_about, tell_udp};
use crate::lru::{Handle, LruTable};
use crate::output::Flow4Tuple;
use crate::policy::{NatPolicy, Policy};
use crate::poller::{Owner, Poller};
use crate::sender::{FrameIo, Sender, Sending};
use crate::wire::{IPV4_BYTES, IPV6_BYTES, Ip, UDP_BYTES};

/// How long a flow lives without a datagram. RFC 4787 (REQ-5) has two minutes at least.
pub const IDLE: Duration = Duration::from_secs(180);
/// How long a flow to a DNS server lives without a datagram.
pub const IDLE_QUERIES: Duration = Duration::from_secs(10);
/// Most datagrams that a large frame stands for (Linux' UDP_MAX_SEGMENTS): each is a call of the host.
pub const MAX_SEGMENTS: usize = 128;
/// Datagrams taken from one socket before others have their turn.
const BATCH: usize = 64;
/// Ports tried for a client whose own is taken by another client under the gateway's address.
const PORTS_TRIED: u16 = 16;

enum Way {
    /// A socket of its own, connected there.
    Socket { socket: OwnedFd, peer: SocketAddr },
    /// The socket of a forward, to a client.
    Forward { forward: u64, client: SocketAddr },
}

struct Flow {
    tuple: Flow4Tuple,
    way: Way,
    /// Not watched until there is room for the guest.
    paused: bool,
    /// The host must not fragment what it sends.
    whole: bool,
}

/// Memory of one flow, with its share of the table, of the map of ports and of the list of those that wait, bytes.
pub const BYTES_PER_FLOW: usize = 2 * size_of::<Flow>() + 4 * size_of::<Flow4Tuple>() + 128;
const _: () = assert!(BYTES_PER_FLOW <= 2048, "a flow must not take more than 2 KiB");

/// What a call works with.
pub struct UdpContext<'a, F> {
    /// To the guest.
    pub sender: &'a mut Sender<F>,
    /// Watches sockets.
    pub poller: &'a mut dyn Poller,
    /// Makes sockets.
    pub host: &'a mut dyn Host,
    /// Where the guest may go.
    pub policy: NatPolicy,
    /// Sockets of port forwards.
    pub forwards: &'a Forwards,
    /// The time.
    pub now: Instant,
    /// For one datagram.
    pub buffer: &'a mut Vec<u8>,
}

/// All UDP flows of a guest.
pub struct UdpTable {
    flows: LruTable<Flow4Tuple, Flow>,
    /// The local port that the flows of a guest's endpoint share, and how many do. By family, as ports are.
    ports: HashMap<SocketAddr, (u16, u32)>,
    paused: Vec<Handle>,
    owner: Owner,
    idle: Duration,
}

impl UdpTable {
    /// An empty table for so many flows that live for `idle` without a datagram. Its sockets' readiness is for
    /// `owner`.
    pub fn new(max_flows: usize, idle: Duration, owner: Owner) -> Self {
        let (flows, ports) = (LruTable::new(max_flows), HashMap::new());
        Self { flows, ports, paused: Vec::new(), owner, idle }
    }

    /// How many flows there are.
    pub fn len(&self) -> usize {
        self.flows.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.flows.is_empty()
    }

    /// Whether there is such a flow.
    pub fn has(&self, tuple: &Flow4Tuple) -> bool {
        self.flows.find(tuple).is_some()
    }

    /// Takes a datagram of the guest: `ip` is the packet, for errors about it. A large frame is cut into datagrams
    /// of `segment` bytes.
    pub fn packet<F: FrameIo>(
        &mut self,
        tuple: Flow4Tuple,
        payload: &[u8],
        segment: Option<u16>,
        ip: &Ip<'_>,
        cx: &mut UdpContext<'_, F>,
    ) {
        let handle = match self.flows.find(&tuple) {
            Some(handle) => handle,
            None => match self.open(tuple, cx) {
                Ok(handle) => handle,
                Err(trouble) => {
                    cx.sender.stats.refused += 1;
                    if let Some(trouble) = trouble {
                        tell_about(cx.sender, ip, trouble);
                    }
                    return;
                }
            },
        };
        self.flows.touch(handle, cx.now);
        let Some(flow) = self.flows.get_mut(handle) else { return };
        flow.forbid_fragments(ip.dont_fragment);
        let size = segment.map_or(payload.len(), usize::from).max(1);
        if payload.is_empty() {
            return flow.send(payload, ip, cx);
        }
        for datagram in payload.chunks(size) {
            flow.send(datagram, ip, cx);
        }
    }

    /// Opens a flow for the guest.
    fn open<F: FrameIo>(
        &mut self,
        tuple: Flow4Tuple,
        cx: &mut UdpContext<'_, F>,
    ) -> Result<Handle, Option<Trouble>> {
        let peer = cx.policy.connect_to(tuple.remote).ok_or(Some(Trouble::Prohibited))?;
        let loopback = cx.policy.means_loopback(tuple.remote.ip());
        let shared = self.ports.get(&tuple.guest).map(|(port, _)| *port);
        let mut made = cx.host.udp(peer, shared, loopback);
        if let Err(error) = &made {
            let exhausted = matches!(
                Errno::from_io_error(error),
                Some(Errno::MFILE | Errno::NFILE | Errno::NOBUFS | Errno::NOMEM)
            );
            if exhausted && let Some(oldest) = self.flows.oldest() {
                cx.sender.stats.udp_flows_evicted += 1;
                self.close(oldest, cx.poller);
                made = cx.host.udp(peer, shared, loopback);
            }
        }
        let mtu = cx.sender.addresses.mtu.into();
        let (socket, port) = made.map_err(|error| Trouble::of(&error, mtu))?;
        let uses = self.ports.entry(tuple.guest).or_insert((port, 0));
        uses.1 += 1;
        let flow = Flow { tuple, way: Way::Socket { socket, peer }, paused: false, whole: false };
        Ok(self.insert(flow, cx))
    }

    fn insert<F: FrameIo>(&mut self, flow: Flow, cx: &mut UdpContext<'_, F>) -> Handle {
        cx.sender.stats.udp_flows_opened += 1;
        let (handle, out) = self.flows.insert(flow.tuple, flow, cx.now);
        if let Some((_, old)) = out {
            cx.sender.stats.udp_flows_evicted += 1;
            self.closed(&old, cx.poller);
        }
        if let Some(Flow { way: Way::Socket { socket, .. }, .. }) = self.flows.get(handle) {
            let token = self.owner.token(handle.0);
            if let Err(error) = cx.poller.watch(socket.as_fd(), token, true, false, false) {
                atoll_foundation::log_limited!(warn, "a UDP socket cannot be watched: {error}");
            }
        }
        handle
    }

    fn close(&mut self, handle: Handle, poller: &mut dyn Poller) {
        if let Some((_, flow)) = self.flows.remove(handle) {
            self.closed(&flow, poller);
        }
    }

    fn closed(&mut self, flow: &Flow, poller: &mut dyn Poller) {
        let Way::Socket { socket, .. } = &flow.way else { return };
        poller.unwatch(socket.as_fd());
        if let Some(uses) = self.ports.get_mut(&flow.tuple.guest) {
            uses.1 = uses.1.saturating_sub(1);
            if uses.1 == 0 {
                self.ports.remove(&flow.tuple.guest);
            }
        }
    }

    /// A flow's socket is ready.
    pub fn ready<F: FrameIo>(&mut self, value: u64, cx: &mut UdpContext<'_, F>) {
        let handle = Handle(value);
        for _ in 0..BATCH {
            let Some(flow) = self.flows.get_mut(handle) else { return };
            let Way::Socket { socket, peer } = &flow.way else { return };
            if !cx.sender.has_room(flow.tuple.guest) {
                // The kernel keeps, and in the end drops, what comes.
                flow.paused = true;
                cx.poller.unwatch(socket.as_fd());
                self.pause(handle);
                return;
            }
            let (result, from) = receive(socket, cx.buffer);
            let tuple = flow.tuple;
            match result {
                // Before it was connected, anybody could have sent.
                Ok(()) if from.is_some_and(|from| from != *peer) => continue,
                Ok(()) => {
                    if cx.sender.udp(tuple.remote, tuple.guest, cx.buffer) == Sending::Full {
                        cx.sender.stats.dropped_full += 1;
                    }
                    self.flows.touch(handle, cx.now);
                }
                Err(Errno::AGAIN) => return,
                Err(Errno::INTR) => {}
                Err(error) => {
                    let mtu = path_mtu(&flow.way, &tuple);
                    if let Some(trouble) = Trouble::of(&error.into(), mtu) {
                        tell_udp(cx.sender, &tuple, trouble);
                    }
                    return;
                }
            }
        }
    }

    fn pause(&mut self, handle: Handle) {
        // Flows that came and went while there was no room are forgotten now and then.
        if self.paused.len() > 2 * self.flows.len() {
            self.paused.retain(|handle| self.flows.get(*handle).is_some_and(|flow| flow.paused));
        }
        self.paused.push(handle);
    }

    /// A forward's socket is ready: `guest` is where the forward leads.
    pub fn forward_ready<F: FrameIo>(
        &mut self,
        forward: u64,
        guest: SocketAddr,
        socket: &OwnedFd,
        cx: &mut UdpContext<'_, F>,
    ) {
        for _ in 0..BATCH {
            let (result, from) = receive(socket, cx.buffer);
            let client = match (result, from) {
                (Ok(()), Some(client)) => client,
                // An error of an earlier send to some client: that one finds out by itself.
                (Err(Errno::INTR), _) | (Ok(()), None) => continue,
                (Err(_), _) => return,
            };
            let Some(handle) = self.client_flow(forward, guest, client, cx) else { continue };
            self.flows.touch(handle, cx.now);
            let Some(flow) = self.flows.get(handle) else { continue };
            if cx.sender.udp(flow.tuple.remote, flow.tuple.guest, cx.buffer) == Sending::Full {
                cx.sender.stats.dropped_full += 1;
            }
        }
    }

    /// The flow of a forward's client, a new one if need be.
    fn client_flow<F: FrameIo>(
        &mut self,
        forward: u64,
        guest: SocketAddr,
        client: SocketAddr,
        cx: &mut UdpContext<'_, F>,
    ) -> Option<Handle> {
        let remote = as_guest_sees(client, guest.is_ipv6(), cx.sender)?;
        for n in 0..PORTS_TRIED {
            let port = remote.port().wrapping_add(n).max(1);
            let tuple = Flow4Tuple { guest, remote: SocketAddr::new(remote.ip(), port) };
            match self.flows.find(&tuple) {
                None => {
                    let way = Way::Forward { forward, client };
                    return Some(self.insert(Flow { tuple, way, paused: false, whole: false }, cx));
                }
                Some(handle) => {
                    let same = self.flows.get(handle).is_some_and(|flow| {
                        matches!(flow.way, Way::Forward { forward: f, client: c } if (f, c) == (forward, client))
                    });
                    if same {
                        return Some(handle);
                    }
                }
            }
        }
        None
    }

    /// There is room for the guest again.
    pub fn room(&mut self, poller: &mut dyn Poller) {
        for handle in std::mem::take(&mut self.paused) {
            let Some(flow) = self.flows.get_mut(handle) else { continue };
            flow.paused = false;
            if let Way::Socket { socket, .. } = &flow.way {
                // It was watched before; there is room for it.
                let _ = poller.watch(socket.as_fd(), self.owner.token(handle.0), true, false, false);
            }
        }
    }

    /// Ends idle flows and says when to be called again.
    pub fn expire(&mut self, now: Instant, poller: &mut dyn Poller) -> Option<Instant> {
        while let Some((_, flow)) = self.flows.remove_idle(self.idle, now) {
            self.closed(&flow, poller);
        }
        self.flows.next_expiry(self.idle)
    }

    /// Ends the flows of a forward that is no more.
    pub fn forward_removed(&mut self, forward: u64, poller: &mut dyn Poller) {
        let handles: Vec<Handle> = self
            .flows
            .values()
            .filter(|(_, flow)| matches!(flow.way, Way::Forward { forward: f, .. } if f == forward))
            .map(|(handle, _)| handle)
            .collect();
        for handle in handles {
            self.close(handle, poller);
        }
    }
}

impl Flow {
    /// Has the host fragment datagrams or not.
    fn forbid_fragments(&mut self, whole: bool) {
        let Way::Socket { socket, .. } = &self.way else { return };
        if self.whole == whole {
            return;
        }
        self.whole = whole;
        let (v4, v6) = if whole {
            (Ipv4PathMtuDiscovery::DO, Ipv6PathMtuDiscovery::DO)
        } else {
            (Ipv4PathMtuDiscovery::WANT, Ipv6PathMtuDiscovery::WANT)
        };
        // A host that does not know it fragments.
        let _ = if self.tuple.is_v6() {
            sockopt::set_ipv6_mtu_discover(socket, v6)
        } else {
            sockopt::set_ip_mtu_discover(socket, v4)
        };
    }

    /// Whether the way, as far as it is known, carries a datagram.
    fn fits(&self, datagram: &[u8]) -> bool {
        let headers = UDP_BYTES + if self.tuple.is_v6() { IPV6_BYTES } else { IPV4_BYTES };
        headers + datagram.len() <= path_mtu(&self.way, &self.tuple) as usize
    }

    fn send<F: FrameIo>(&self, datagram: &[u8], ip: &Ip<'_>, cx: &mut UdpContext<'_, F>) {
        let mut attempts = 0;
        loop {
            attempts += 1;
            let result = match &self.way {
                Way::Socket { socket, .. } => rustix::net::send(socket, datagram, SendFlags::DONTWAIT),
                Way::Forward { forward, client } => match cx.forwards.udp_socket(*forward) {
                    Some(socket) => rustix::net::sendto(socket, datagram, SendFlags::DONTWAIT, client),
                    None => return,
                },
            };
            let Err(error) = result else { return };
            let trouble = Trouble::of(&error.into(), path_mtu(&self.way, &self.tuple));
            match error {
                // The send queue is full: dropped as networks do.
                Errno::AGAIN | Errno::NOBUFS => return,
                Errno::INTR if attempts < 3 => {}
                // An earlier datagram's error comes first; this one has not been sent yet.
                Errno::CONNREFUSED if attempts < 3 => {
                    if let Some(trouble) = trouble {
                        tell_about(cx.sender, ip, trouble);
                    }
                }
                // Too long for the way, but not longer than what it carries: the error was an earlier one's.
                Errno::MSGSIZE if attempts < 3 && self.fits(datagram) => {}
                _ => {
                    if let Some(trouble) = trouble {
                        tell_about(cx.sender, ip, trouble);
                    }
                    return;
                }
            }
        }
    }
}

/// What the way of a flow carries, bytes of IP packet.
fn path_mtu(way: &Way, tuple: &Flow4Tuple) -> u32 {
    let Way::Socket { socket, .. } = way else { return 1500 };
    let mtu = if tuple.is_v6() { sockopt::ipv6_mtu(socket) } else { sockopt::ip_mtu(socket) };
    mtu.unwrap_or(1500)
}

/// Takes a datagram into `buffer`, and says from whom it is.
fn receive(socket: &OwnedFd, buffer: &mut Vec<u8>) -> (Result<(), Errno>, Option<SocketAddr>) {
    buffer.clear();
    let spare = rustix::buffer::spare_capacity(buffer);
    match rustix::net::recvfrom(socket, spare, RecvFlags::DONTWAIT) {
        Ok((_, _, from)) => (Ok(()), from.and_then(ip_address)),
        Err(error) => (Err(error), None),
    }
}

/// The internet address of a socket's peer; none for sockets that are no internet sockets.
pub fn ip_address(address: SocketAddrAny) -> Option<SocketAddr> {
    SocketAddr::try_from(address).ok()
}

/// How a client of a port forward appears to the guest: as itself, unless its address is of the other family, the
/// host's own or one that the guest would not send answers to. Then as the gateway.
pub fn as_guest_sees<F: FrameIo>(client: SocketAddr, v6: bool, sender: &Sender<F>) -> Option<SocketAddr> {
    let address = client.ip().to_canonical();
    let itself =
        address.is_ipv6() == v6 && crate::policy::is_outside(address) && !sender.addresses.contains(address);
    let seen = if itself { address } else { sender.addresses.gateway(v6)? };
    Some(SocketAddr::new(seen, client.port()))
}
