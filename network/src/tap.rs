//! Tap and macvtap devices: the machine as a station on one of the host's networks.
//!
//! A tap device ([`TapPort::open_tap`]) is an interface of the host whose other end is the machine; the host's
//! administrator bridges or routes it. A macvtap device ([`TapPort::open_macvtap`]) puts the machine beside the
//! host on a network card, with an address of its own. Both are Linux' (`Documentation/networking/tuntap.rst`),
//! speak the same headers as the machine's network device (`IFF_VNET_HDR`, 12 bytes), and take and give unfinished
//! frames, so that checksums and segments are made by the card or not at all.
//!
//! Each pair is a descriptor of its own (`IFF_MULTI_QUEUE`); the kernel spreads flows over them. Nothing is copied
//! on the way out: the kernel gathers a frame from the guest's memory. On the way in it is read into private
//! memory first, because the device decides only when it sees the frame where it goes.
//!
//! Whoever opens the device needs rights, the machine does not: a tap device that belongs to the user
//! (`ip tuntap add dev tap0 mode tap user NAME`) is opened by that user without any.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::sync::Mutex;

use atoll_foundation::EventLoopHandle;
use atoll_foundation::sync::lock;
use atoll_foundation::tun::{self, TunOffloads};
use rustix::fs::OFlags;
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketFlags, SocketType};
use vm_memory::VolatileSlice;

use crate::header::{FrameHeader, HEADER_BYTES, Offloads};
use crate::port::{MAX_FRAME, MacAddress, Port, PortError, PortEvent, PortListener, Received, Sent, Taken};
use crate::ready::{Direction, Ready};

/// Most pairs that Linux gives one tap device (`MAX_TAP_QUEUES`).
pub const MAX_PAIRS: u16 = 256;

/// The shortest frame that a device takes: an Ethernet header.
const MIN_FRAME: usize = 14;

const TUN_DEVICE: &str = "/dev/net/tun";

/// Why a tap or macvtap device cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum TapError {
    /// The name cannot be an interface's.
    #[error("'{}' is not the name of a network interface: expected 1 to 15 letters, digits, dots, dashes", .0.escape_debug())]
    Name(String),
    /// More pairs than possible.
    #[error("a tap device has 1 to {MAX_PAIRS} queue pairs, not {0}")]
    Pairs(u16),
    /// The host has no tap devices.
    #[error("cannot open tap device {name}: the host has no {TUN_DEVICE}; load the kernel module 'tun'")]
    NoTun {
        /// The device.
        name: String,
    },
    /// The device node may not be opened.
    #[error(
        "cannot open {path} for {name}: permission denied; run as root, or have root give this user access to {path}"
    )]
    Node {
        /// The device node.
        path: String,
        /// The device.
        name: String,
    },
    /// There is no such device, and this user may not create one.
    #[error("there is no tap device {name}, and creating one needs root; have root run: ip tuntap add dev {name} mode tap user {user}{}", if *.multi_queue { " multi_queue" } else { "" })]
    Missing {
        /// The device.
        name: String,
        /// Who this process is.
        user: String,
        /// Several pairs were asked for.
        multi_queue: bool,
    },
    /// It belongs to somebody else.
    #[error(
        "tap device {name} does not belong to this user; run as root, or have root create it with: ip tuntap add dev {name} mode tap user {user}"
    )]
    NotOwner {
        /// The device.
        name: String,
        /// Who this process is.
        user: String,
    },
    /// Another process has it.
    #[error("tap device {name} is in use; each machine needs a device of its own")]
    Busy {
        /// The device.
        name: String,
    },
    /// It has one queue.
    #[error(
        "tap device {name} cannot have {pairs} queue pairs; create it with: ip tuntap add dev {name} mode tap multi_queue, or ask for one pair"
    )]
    NotMultiQueue {
        /// The device.
        name: String,
        /// Pairs asked for.
        pairs: u16,
    },
    /// The name is that of another kind of interface.
    #[error(
        "network interface {name} is not a tap device; create one with: ip tuntap add dev tap0 mode tap, and connect it to {name} with a bridge"
    )]
    NotTap {
        /// The interface.
        name: String,
    },
    /// There is no such macvtap device.
    #[error(
        "there is no macvtap device {name}; have root run: ip link add link CARD name {name} type macvtap mode bridge"
    )]
    NoMacvtap {
        /// The interface.
        name: String,
    },
    /// Another failure.
    #[error("cannot use tap device {name}: {what}: {source}")]
    Host {
        /// The device.
        name: String,
        /// What was tried.
        what: &'static str,
        /// The host's error.
        source: io::Error,
    },
}

/// A tap or macvtap device as a port. The device goes down, or away if it was created by opening it, when the port
/// is dropped.
pub struct TapPort {
    name: String,
    /// "tap" or "macvtap".
    kind: &'static str,
    queues: Vec<Queue>,
    mtu: Option<u16>,
    address: Option<MacAddress>,
    offloads: Offloads,
}

struct Queue {
    ready: Ready,
    receive: Mutex<Receiver>,
}

struct Receiver {
    /// Header and frame, as the kernel wrote them.
    buffer: Box<[u8]>,
    /// A frame that the caller has not taken, and its length.
    kept: Option<(FrameHeader, usize)>,
}

impl TapPort {
    /// Opens the tap device `name` with `pairs` queue pairs. If there is none, it is created and switched on, which
    /// needs `CAP_NET_ADMIN`; such a device ends with the port.
    pub fn open_tap(name: &str, pairs: u16) -> Result<Self, TapError> {
        check(name, pairs)?;
        let existed = exists(name)?;
        let first = open_node(TUN_DEVICE, name)?;
        // A device with one queue and one with several cannot be opened in each other's way; which one it is,
        // only the attempt tells.
        let attached = match tun::attach(&first, name, pairs > 1) {
            Err(error) if is(&error, Errno::INVAL) && pairs == 1 && existed => {
                tun::attach(&first, name, true)
            }
            other => other,
        };
        attached.map_err(|error| attach_error(name, pairs, existed, error))?;
        let mut files = vec![first];
        for _ in 1..pairs {
            let file = open_node(TUN_DEVICE, name)?;
            tun::attach(&file, name, true).map_err(|error| attach_error(name, pairs, existed, error))?;
            files.push(file);
        }
        if !existed {
            bring_up(name)?;
        }
        Self::new(name, "tap", files, None)
    }

    /// Opens the macvtap device `name` with `pairs` queue pairs, through its node `/dev/tapN`. The machine's
    /// network device must have the interface's address ([`TapPort::address`]), or nothing comes in.
    pub fn open_macvtap(name: &str, pairs: u16) -> Result<Self, TapError> {
        check(name, pairs)?;
        let index = index(name)?.ok_or_else(|| TapError::NoMacvtap { name: name.to_owned() })?;
        Self::open_macvtap_at(Path::new(&format!("/dev/tap{index}")), name, pairs)
    }

    /// As [`TapPort::open_macvtap`] with the node at `path`.
    pub fn open_macvtap_at(path: &Path, name: &str, pairs: u16) -> Result<Self, TapError> {
        check(name, pairs)?;
        let path = path.to_string_lossy();
        let mut files = Vec::new();
        for _ in 0..pairs {
            let file = open_node(&path, name)?;
            tun::attach(&file, name, pairs > 1).map_err(|error| attach_error(name, pairs, true, error))?;
            files.push(file);
        }
        let address = tun::hardware_address(socket(name)?, name)
            .map_err(|source| host(name, "reading its Ethernet address", source))?;
        Self::new(name, "macvtap", files, Some(MacAddress(address)))
    }

    fn new(
        name: &str,
        kind: &'static str,
        files: Vec<File>,
        address: Option<MacAddress>,
    ) -> Result<Self, TapError> {
        for file in &files {
            tun::set_header_size(file, HEADER_BYTES as u8)
                .map_err(|source| host(name, "setting the size of its headers", source))?;
        }
        let offloads = files.first().map_or(Offloads::NONE, possible_offloads);
        let mtu = socket(name).ok().and_then(|socket| tun::mtu(socket, name).ok());
        let queue = |file: File| Queue {
            ready: Ready::new(OwnedFd::from(file)),
            receive: Mutex::new(Receiver {
                buffer: vec![0; HEADER_BYTES + MAX_FRAME].into_boxed_slice(),
                kept: None,
            }),
        };
        Ok(Self {
            name: name.to_owned(),
            kind,
            queues: files.into_iter().map(queue).collect(),
            mtu: mtu.and_then(|mtu| u16::try_from(mtu).ok()),
            address,
            offloads,
        })
    }

    /// The only address that the machine's network device can have with this port; `None`: any.
    pub fn address(&self) -> Option<MacAddress> {
        self.address
    }

    fn queue(&self, pair: u16) -> Result<&Queue, PortError> {
        self.queues.get(usize::from(pair)).ok_or_else(|| {
            self.failed(io::Error::new(io::ErrorKind::InvalidInput, format!("it has no pair {pair}")))
        })
    }

    fn failed(&self, source: io::Error) -> PortError {
        let port = Port::name(self);
        // EBADFD from a tap device, ENODEV from a macvtap device: the interface was deleted.
        if is(&source, Errno::BADFD) || is(&source, Errno::NODEV) {
            return PortError::Gone { port, reason: "the interface was deleted".to_owned() };
        }
        PortError::Host { port, source }
    }
}

impl Port for TapPort {
    fn name(&self) -> String {
        format!("{} device {}", self.kind, self.name)
    }

    fn queue_pairs(&self) -> u16 {
        self.queues.len() as u16
    }

    fn mtu(&self) -> Option<u16> {
        self.mtu
    }

    fn send_offloads(&self) -> Offloads {
        self.offloads
    }

    fn receive_offloads(&self) -> Offloads {
        self.offloads
    }

    fn set_receive_offloads(&self, offloads: Offloads) -> Result<(), PortError> {
        let queue = self.queue(0)?;
        tun::set_offloads(queue.ready.fd(), tun_offloads(offloads.and(self.offloads)))
            .map_err(|error| self.failed(error))
    }

    fn watch(&self, events: &EventLoopHandle, listener: PortListener) -> io::Result<()> {
        for (pair, queue) in self.queues.iter().enumerate() {
            let (pair, listener) = (pair as u16, listener.clone());
            queue.ready.watch(events, move |direction| {
                listener(match direction {
                    Direction::Read => PortEvent::Readable(pair),
                    Direction::Write => PortEvent::Writable(pair),
                });
            })?;
        }
        Ok(())
    }

    fn send(&self, pair: u16, header: &FrameHeader, frame: &[VolatileSlice<'_>]) -> Result<Sent, PortError> {
        let queue = self.queue(pair)?;
        let len = frame.iter().fold(0usize, |sum, piece| sum.saturating_add(piece.len()));
        if !(MIN_FRAME..=MAX_FRAME).contains(&len) {
            return Ok(Sent::Done);
        }
        let header = header.encode(0);
        let result = if frame.len() <= tun::MAX_BUFFERS {
            tun::send(queue.ready.fd(), &header, frame)
        } else {
            let mut copy = gather(frame, len);
            tun::send(queue.ready.fd(), &header, &[VolatileSlice::from(&mut copy[..])])
        };
        match result {
            Ok(_) => Ok(Sent::Done),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                queue.ready.want(Direction::Write);
                Ok(Sent::Full)
            }
            Err(error) if is_dropped(&error) => Ok(Sent::Done),
            Err(error) => Err(self.failed(error)),
        }
    }

    fn flush(&self, _pair: u16) {}

    fn receive(
        &self,
        pair: u16,
        take: &mut dyn FnMut(&FrameHeader, &[u8]) -> Taken,
    ) -> Result<Received, PortError> {
        let queue = self.queue(pair)?;
        let mut receiver = lock(&queue.receive);
        let Receiver { buffer, kept } = &mut *receiver;
        while kept.is_none() {
            match rustix::io::read(queue.ready.fd(), &mut buffer[..]) {
                Ok(count) => *kept = header_of(&buffer[..count.min(buffer.len())]),
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => {
                    queue.ready.want(Direction::Read);
                    return Ok(Received::Empty);
                }
                Err(error) => return Err(self.failed(error.into())),
            }
        }
        let Some((header, len)) = kept else { return Ok(Received::Empty) };
        if take(header, &buffer[HEADER_BYTES..HEADER_BYTES + *len]) == Taken::NotNow {
            return Ok(Received::Kept);
        }
        *kept = None;
        Ok(Received::Frame)
    }
}

/// The header and the length of what the kernel gave. `None` for what cannot be a frame: it is skipped.
fn header_of(bytes: &[u8]) -> Option<(FrameHeader, usize)> {
    let (header, frame) = bytes.split_first_chunk::<HEADER_BYTES>()?;
    if frame.len() < MIN_FRAME {
        return None;
    }
    Some((FrameHeader::decode(header).ok()?, frame.len()))
}

/// Private copy of a frame in more buffers than one call takes.
fn gather(frame: &[VolatileSlice<'_>], len: usize) -> Vec<u8> {
    let mut copy = vec![0; len.min(MAX_FRAME)];
    let mut rest = &mut copy[..];
    for piece in frame {
        let (now, later) = rest.split_at_mut(piece.len().min(rest.len()));
        piece.copy_to(now);
        rest = later;
    }
    copy
}

/// Whether a frame that the kernel refused is one that a network would lose: the interface is down (EIO for a tap
/// device, ENETDOWN), the guest's frame or header makes no sense (EINVAL), or the host is short of memory.
fn is_dropped(error: &io::Error) -> bool {
    [Errno::IO, Errno::NETDOWN, Errno::INVAL, Errno::NOBUFS, Errno::NOMEM, Errno::MSGSIZE, Errno::FAULT]
        .into_iter()
        .any(|errno| is(error, errno))
}

fn is(error: &io::Error, errno: Errno) -> bool {
    error.raw_os_error() == Some(errno.raw_os_error())
}

fn tun_offloads(offloads: Offloads) -> TunOffloads {
    let checksum = offloads.checksum;
    TunOffloads {
        checksum,
        tcp4: checksum && offloads.tcp4,
        tcp6: checksum && offloads.tcp6,
        ecn: checksum && offloads.ecn && (offloads.tcp4 || offloads.tcp6),
        udp: checksum && offloads.udp_l4,
    }
}

/// What this kernel can. Leaves the device giving none.
fn possible_offloads(file: &File) -> Offloads {
    let tcp = Offloads { ecn: true, ..Offloads::TCP };
    let all = Offloads { udp_l4: true, ..tcp };
    let best = [all, tcp, Offloads { checksum: true, ..Offloads::NONE }]
        .into_iter()
        .find(|offloads| tun::set_offloads(file, tun_offloads(*offloads)).is_ok());
    let _ = tun::set_offloads(file, TunOffloads::default());
    best.unwrap_or(Offloads::NONE)
}

fn check(name: &str, pairs: u16) -> Result<(), TapError> {
    if !tun::is_interface_name(name) {
        return Err(TapError::Name(name.to_owned()));
    }
    if !(1..=MAX_PAIRS).contains(&pairs) {
        return Err(TapError::Pairs(pairs));
    }
    Ok(())
}

fn host(name: &str, what: &'static str, source: io::Error) -> TapError {
    TapError::Host { name: name.to_owned(), what, source }
}

fn open_node(path: &str, name: &str) -> Result<File, TapError> {
    let flags = (OFlags::NONBLOCK | OFlags::CLOEXEC).bits() as i32;
    let mut options = OpenOptions::new();
    std::os::unix::fs::OpenOptionsExt::custom_flags(&mut options, flags);
    options.read(true).write(true).open(path).map_err(|error| {
        let name = name.to_owned();
        match error.kind() {
            io::ErrorKind::PermissionDenied => TapError::Node { path: path.to_owned(), name },
            io::ErrorKind::NotFound if path == TUN_DEVICE => TapError::NoTun { name },
            io::ErrorKind::NotFound => TapError::NoMacvtap { name },
            _ if is(&error, Errno::BUSY) => TapError::Busy { name },
            _ => TapError::Host { name, what: "opening its device node", source: error },
        }
    })
}

/// A socket through which interfaces are asked for.
fn socket(name: &str) -> Result<OwnedFd, TapError> {
    rustix::net::socket_with(AddressFamily::UNIX, SocketType::DGRAM, SocketFlags::CLOEXEC, None)
        .map_err(|error| host(name, "making a socket", error.into()))
}

/// The number of the interface `name`, if there is one.
fn index(name: &str) -> Result<Option<u32>, TapError> {
    match rustix::net::netdevice::name_to_index(socket(name)?, name) {
        Ok(index) => Ok(Some(index)),
        Err(Errno::NODEV) => Ok(None),
        Err(error) => Err(host(name, "looking it up", error.into())),
    }
}

fn exists(name: &str) -> Result<bool, TapError> {
    Ok(index(name)?.is_some())
}

fn bring_up(name: &str) -> Result<(), TapError> {
    tun::bring_up(socket(name)?.as_fd(), name).map_err(|source| host(name, "switching it on", source))
}

/// Says what the kernel's error on attaching means here.
fn attach_error(name: &str, pairs: u16, existed: bool, error: io::Error) -> TapError {
    let name = name.to_owned();
    let user = || std::env::var("USER").unwrap_or_else(|_| rustix::process::getuid().as_raw().to_string());
    match error.raw_os_error().map(Errno::from_raw_os_error) {
        Some(Errno::PERM | Errno::ACCESS) if existed => TapError::NotOwner { name, user: user() },
        Some(Errno::PERM | Errno::ACCESS) => TapError::Missing { name, user: user(), multi_queue: pairs > 1 },
        Some(Errno::BUSY) => TapError::Busy { name },
        Some(Errno::TOOBIG) => TapError::NotMultiQueue { name, pairs },
        Some(Errno::INVAL) if existed && pairs > 1 && is_single(&name) => {
            TapError::NotMultiQueue { name, pairs }
        }
        Some(Errno::INVAL) if existed => TapError::NotTap { name },
        _ => TapError::Host { name, what: "attaching to it", source: error },
    }
}

/// Whether the interface is a tap device with one queue, which only the attempt tells.
fn is_single(name: &str) -> bool {
    let Ok(file) = open_node(TUN_DEVICE, name) else { return false };
    tun::attach(&file, name, false).map_or_else(|error| is(&error, Errno::BUSY), |()| true)
}

#[cfg(test)]
mod tests;
