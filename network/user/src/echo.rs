//! ICMP and ICMPv6 echo.
//!
//! The network's own addresses are answered here. For others there is a "ping socket" per guest, remote and
//! identifier, if the host lets this process have one (`net.ipv4.ping_group_range`); otherwise the guest is told
//! that it is prohibited. The kernel replaces the identifier by one of its own, which is turned back.

use std::net::IpAddr;
use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags};

use crate::host::Host;
use crate::icmp::{Trouble, tell_about};
use crate::lru::{Handle, LruTable};
use crate::policy::{NatPolicy, Policy};
use crate::poller::{Owner, Poller};
use crate::sender::{FrameIo, HOPS, Sender};
use crate::wire::{Ip, be16};

/// How long a flow lives without a message. RFC 5508 (REQ-2) has 60 seconds at least.
pub const IDLE: Duration = Duration::from_secs(60);
/// Flows at once; the one idle longest makes room.
pub const MAX_FLOWS: usize = 256;
/// Replies taken from one socket before others have their turn.
const BATCH: usize = 32;

const REQUEST_V4: u8 = 8;
const REPLY_V4: u8 = 0;
const REQUEST_V6: u8 = 128;
const REPLY_V6: u8 = 129;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Key {
    guest: IpAddr,
    remote: IpAddr,
    id: u16,
}

struct Flow {
    key: Key,
    socket: OwnedFd,
}

/// What a call works with.
pub struct EchoContext<'a, F> {
    /// To the guest.
    pub sender: &'a mut Sender<F>,
    /// Watches sockets.
    pub poller: &'a mut dyn Poller,
    /// Makes sockets.
    pub host: &'a mut dyn Host,
    /// Where the guest may go.
    pub policy: NatPolicy,
    /// The time.
    pub now: Instant,
    /// For one message.
    pub buffer: &'a mut Vec<u8>,
}

/// All echo flows of a guest.
pub struct Echo {
    flows: LruTable<Key, Flow>,
}

impl Default for Echo {
    fn default() -> Self {
        Self { flows: LruTable::new(MAX_FLOWS) }
    }
}

impl Echo {
    /// Takes an echo request of the guest; other messages are left alone.
    pub fn packet<F: FrameIo>(&mut self, ip: &Ip<'_>, cx: &mut EchoContext<'_, F>) {
        let v6 = ip.source.is_ipv6();
        let (request, reply) = if v6 { (REQUEST_V6, REPLY_V6) } else { (REQUEST_V4, REPLY_V4) };
        let (Some([kind, 0]), Some(id)) = (ip.payload.get(..2), be16(ip.payload, 4)) else { return };
        if *kind != request || ip.payload.len() < 8 {
            return;
        }
        cx.sender.stats.echo_requests += 1;
        if cx.sender.addresses.is_own(ip.destination) {
            let mut message = ip.payload.to_vec();
            message[0] = reply;
            return cx.sender.icmp(ip.destination, ip.source, HOPS, &message);
        }
        let key = Key { guest: ip.source, remote: ip.destination, id };
        if let Err(trouble) = self.pass_on(key, ip.payload, cx)
            && let Some(trouble) = trouble
        {
            tell_about(cx.sender, ip, trouble);
        }
    }

    fn pass_on<F: FrameIo>(
        &mut self,
        key: Key,
        message: &[u8],
        cx: &mut EchoContext<'_, F>,
    ) -> Result<(), Option<Trouble>> {
        let mtu = cx.sender.addresses.mtu.into();
        let handle = match self.flows.find(&key) {
            Some(handle) => handle,
            None => {
                // Any port: the policy is about addresses.
                let allowed = cx.policy.connect_to(std::net::SocketAddr::new(key.remote, 1));
                if allowed.is_none_or(|to| to.ip() != key.remote) {
                    cx.sender.stats.refused += 1;
                    return Err(Some(Trouble::Prohibited));
                }
                let socket = cx.host.echo(key.remote).map_err(|error| Trouble::of(&error, mtu))?;
                let (handle, out) = self.flows.insert(key, Flow { key, socket }, cx.now);
                if let Some((_, old)) = out {
                    cx.poller.unwatch(old.socket.as_fd());
                }
                handle
            }
        };
        self.flows.touch(handle, cx.now);
        let Some(flow) = self.flows.get(handle) else { return Ok(()) };
        let token = Owner::Echo.token(handle.0);
        let watched = cx.poller.watch(flow.socket.as_fd(), token, true, false, false);
        if watched.is_err() {
            return Err(None);
        }
        match rustix::net::send(&flow.socket, message, SendFlags::DONTWAIT) {
            Ok(_) | Err(Errno::AGAIN | Errno::NOBUFS) => Ok(()),
            Err(error) => Err(Trouble::of(&error.into(), mtu)),
        }
    }

    /// A flow's socket is ready.
    pub fn ready<F: FrameIo>(&mut self, value: u64, cx: &mut EchoContext<'_, F>) {
        let handle = Handle(value);
        for _ in 0..BATCH {
            let Some(Flow { key, socket }) = self.flows.get(handle) else { return };
            cx.buffer.clear();
            let spare = rustix::buffer::spare_capacity(cx.buffer);
            match rustix::net::recv(socket, spare, RecvFlags::DONTWAIT) {
                Ok(_) => {}
                Err(Errno::INTR) => continue,
                Err(_) => return,
            }
            let reply = if key.remote.is_ipv6() { REPLY_V6 } else { REPLY_V4 };
            if cx.buffer.len() < 8 || cx.buffer.first() != Some(&reply) {
                continue;
            }
            if let Some(id) = cx.buffer.get_mut(4..6) {
                id.copy_from_slice(&key.id.to_be_bytes());
            }
            cx.sender.icmp(key.remote, key.guest, HOPS, cx.buffer);
        }
    }

    /// Ends idle flows and says when to be called again.
    pub fn expire(&mut self, now: Instant, poller: &mut dyn Poller) -> Option<Instant> {
        while let Some((_, flow)) = self.flows.remove_idle(IDLE, now) {
            poller.unwatch(flow.socket.as_fd());
        }
        self.flows.next_expiry(IDLE)
    }
}
