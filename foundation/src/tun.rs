//! Tap and macvtap devices: the requests to the kernel that have no safe form.
//!
//! A tap device is a network interface whose other end is a descriptor: each `write(2)` is a frame that arrives at
//! the host, each `read(2)` one that the host sends there (Linux `Documentation/networking/tuntap.rst`). Here are
//! thin wrappers that check what they are given and return the kernel's error; what errors mean to a user is for
//! the caller to say.

#![allow(unsafe_code)]
// UNSAFETY: ioctl(2) with structures of its own, and writev(2) of memory to which no reference may exist.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};

use rustix::ioctl::opcode;
use vm_memory::VolatileSlice;

use crate::volatile_io::uninterrupted;

/// Most buffers that [`send`] takes; the kernel's own limit is 1024.
pub const MAX_BUFFERS: usize = 63;

/// Longest name of a network interface, in bytes.
pub const MAX_NAME: usize = 15;

const IFF_TAP: u16 = 0x0002;
const IFF_MULTI_QUEUE: u16 = 0x0100;
const IFF_NO_PI: u16 = 0x1000;
const IFF_VNET_HDR: u16 = 0x4000;

const TUN_F_CSUM: u32 = 0x01;
const TUN_F_TSO4: u32 = 0x02;
const TUN_F_TSO6: u32 = 0x04;
const TUN_F_TSO_ECN: u32 = 0x08;
const TUN_F_USO4: u32 = 0x20;
const TUN_F_USO6: u32 = 0x40;

/// `TUNSETIFF`: makes the descriptor one of a named device.
const SET_INTERFACE: rustix::ioctl::Opcode = opcode::write::<libc::c_int>(b'T', 202);
/// `TUNSETOFFLOAD`: what may be read.
const SET_OFFLOAD: rustix::ioctl::Opcode = opcode::write::<libc::c_uint>(b'T', 208);
/// `TUNSETVNETHDRSZ`: bytes of the header before each frame.
const SET_HEADER_SIZE: rustix::ioctl::Opcode = opcode::write::<libc::c_int>(b'T', 216);

/// `struct ifreq` as these requests use it: the name, then a union of at most 24 bytes.
#[repr(C, align(8))]
#[derive(Clone, Copy)]
struct Request {
    name: [u8; MAX_NAME + 1],
    union: [u8; 24],
}

impl Request {
    /// `InvalidInput` when `name` cannot be an interface's. A percent sign would have the kernel choose a number.
    fn named(name: &str) -> io::Result<Self> {
        let bytes = name.as_bytes();
        let good = (1..=MAX_NAME).contains(&bytes.len())
            && bytes.iter().all(|b| b.is_ascii_graphic() && !b"/:%".contains(b))
            && name != "."
            && name != "..";
        if !good {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "not the name of a network interface"));
        }
        let mut request = Self { name: [0; MAX_NAME + 1], union: [0; 24] };
        request.name[..bytes.len()].copy_from_slice(bytes);
        Ok(request)
    }

    /// The first two bytes of the union, where flags are.
    fn flags(&self) -> u16 {
        u16::from_ne_bytes([self.union[0], self.union[1]])
    }

    fn set_flags(&mut self, flags: u16) {
        self.union[..2].copy_from_slice(&flags.to_ne_bytes());
    }

    fn call(&mut self, fd: BorrowedFd<'_>, request: libc::c_ulong) -> io::Result<()> {
        // SAFETY: every request passed here takes a `struct ifreq`, which has 40 bytes; `self` has as many, is
        // aligned for any of its fields, and outlives the call.
        let result = unsafe { libc::ioctl(fd.as_raw_fd(), request as _, std::ptr::from_mut(self)) };
        if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
    }
}

/// Whether a text can be the name of a network interface.
pub fn is_interface_name(name: &str) -> bool {
    Request::named(name).is_ok()
}

/// Makes `fd`, a new descriptor of `/dev/net/tun`, a queue of the tap device `name`, with a virtio header before
/// each frame. The device is created when there is none, if the process may. With a descriptor of a macvtap
/// device, `name` has no effect.
pub fn attach(fd: impl AsFd, name: &str, multi_queue: bool) -> io::Result<()> {
    let mut request = Request::named(name)?;
    let queues = if multi_queue { IFF_MULTI_QUEUE } else { 0 };
    request.set_flags(IFF_TAP | IFF_NO_PI | IFF_VNET_HDR | queues);
    request.call(fd.as_fd(), SET_INTERFACE as libc::c_ulong)
}

/// Sets how many bytes the header before each frame has.
pub fn set_header_size(fd: impl AsFd, bytes: u8) -> io::Result<()> {
    let bytes = libc::c_int::from(bytes);
    // SAFETY: the request reads one int, which outlives the call.
    let result =
        unsafe { libc::ioctl(fd.as_fd().as_raw_fd(), SET_HEADER_SIZE as _, std::ptr::from_ref(&bytes)) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Which unfinished frames may be read from a device.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct TunOffloads {
    /// With a partial checksum; the others need it.
    pub checksum: bool,
    /// Large TCP over IPv4.
    pub tcp4: bool,
    /// Large TCP over IPv6.
    pub tcp6: bool,
    /// Large TCP with ECN.
    pub ecn: bool,
    /// Large UDP, both families (Linux 6.2).
    pub udp: bool,
}

/// Sets which unfinished frames may be read from the device, on all its queues. `InvalidInput` when the kernel
/// does not know one.
pub fn set_offloads(fd: impl AsFd, offloads: TunOffloads) -> io::Result<()> {
    let bit = |set: bool, bits: u32| if set { bits } else { 0 };
    let bits = bit(offloads.checksum, TUN_F_CSUM)
        | bit(offloads.tcp4, TUN_F_TSO4)
        | bit(offloads.tcp6, TUN_F_TSO6)
        | bit(offloads.ecn, TUN_F_TSO_ECN)
        | bit(offloads.udp, TUN_F_USO4 | TUN_F_USO6);
    // SAFETY: the request takes a number.
    let result = unsafe { libc::ioctl(fd.as_fd().as_raw_fd(), SET_OFFLOAD as _, libc::c_ulong::from(bits)) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Largest IP packet of the interface `name`, in bytes. `socket` is any socket, in the interface's namespace.
pub fn mtu(socket: impl AsFd, name: &str) -> io::Result<u32> {
    let mut request = Request::named(name)?;
    request.call(socket.as_fd(), libc::SIOCGIFMTU as libc::c_ulong)?;
    let [a, b, c, d, ..] = request.union;
    Ok(u32::from_ne_bytes([a, b, c, d]))
}

/// The Ethernet address of the interface `name`. `socket` as for [`mtu`].
pub fn hardware_address(socket: impl AsFd, name: &str) -> io::Result<[u8; 6]> {
    let mut request = Request::named(name)?;
    request.call(socket.as_fd(), libc::SIOCGIFHWADDR as libc::c_ulong)?;
    // A `struct sockaddr`: the family, then the address.
    let [_, _, a, b, c, d, e, f, ..] = request.union;
    Ok([a, b, c, d, e, f])
}

/// Switches the interface `name` on, which needs `CAP_NET_ADMIN`. `socket` as for [`mtu`].
pub fn bring_up(socket: impl AsFd, name: &str) -> io::Result<()> {
    let mut request = Request::named(name)?;
    request.call(socket.as_fd(), libc::SIOCGIFFLAGS as libc::c_ulong)?;
    let flags = request.flags() | libc::IFF_UP as u16;
    request.set_flags(flags);
    request.call(socket.as_fd(), libc::SIOCSIFFLAGS as libc::c_ulong)
}

/// Writes `header` and then `buffers`, in order, with one call: a device takes that as one frame. At most
/// [`MAX_BUFFERS`] buffers (`InvalidInput`). Does not wait on a non-blocking descriptor (`WouldBlock`). What others
/// change in the buffers meanwhile is sent with its old or new value.
pub fn send(fd: impl AsFd, header: &[u8], buffers: &[VolatileSlice<'_>]) -> io::Result<usize> {
    if buffers.len() > MAX_BUFFERS {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "too many buffers for one frame"));
    }
    let mut vectors = [libc::iovec { iov_base: std::ptr::null_mut(), iov_len: 0 }; MAX_BUFFERS + 1];
    vectors[0] = libc::iovec { iov_base: header.as_ptr().cast_mut().cast(), iov_len: header.len() };
    for (vector, buffer) in vectors[1..].iter_mut().zip(buffers) {
        vector.iov_base = buffer.ptr_guard_mut().as_ptr().cast();
        vector.iov_len = buffer.len();
    }
    let used = buffers.len() as libc::c_int + 1;
    uninterrupted(|| {
        // SAFETY: the first vector is `header`, which the kernel only reads; every other one is a slice that is
        // valid for its lifetime, which outlasts the call, and to which no reference exists.
        unsafe { libc::writev(fd.as_fd().as_raw_fd(), vectors.as_ptr(), used) }
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;
    use std::net::UdpSocket;
    use std::os::unix::net::UnixStream;

    #[test]
    fn names_that_no_interface_can_have_are_refused() {
        for name in ["", ".", "..", "a/b", "tap%d", "sixteen_letters_", "with space", "eth0:1", "täp"] {
            assert!(!is_interface_name(name), "{name}");
        }
        assert!(is_interface_name("tap0") && is_interface_name("fifteen_letters"));
    }

    #[test]
    fn what_is_not_a_tap_device_is_the_kernels_error() {
        let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
        assert!(attach(&socket, "tap0", false).is_err());
        assert!(set_header_size(&socket, 12).is_err());
        assert!(set_offloads(&socket, TunOffloads::default()).is_err());
        assert!(mtu(&socket, "no_such_device").is_err());
        assert!(hardware_address(&socket, "no_such_device").is_err());
    }

    #[test]
    fn the_loopback_has_its_mtu_and_no_address() {
        let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
        assert!(mtu(&socket, "lo").unwrap() >= 1280);
        assert_eq!(hardware_address(&socket, "lo").unwrap(), [0; 6]);
    }

    #[test]
    fn a_header_and_scattered_buffers_are_one_message() {
        let (out, mut back) = UnixStream::pair().unwrap();
        let (mut a, mut b) = (*b"abc", *b"defg");
        let buffers = [VolatileSlice::from(&mut a[..]), VolatileSlice::from(&mut b[..])];
        assert_eq!(send(&out, b"12", &buffers).unwrap(), 9);
        let mut read = [0; 9];
        back.read_exact(&mut read).unwrap();
        assert_eq!(&read, b"12abcdefg");
        let many = vec![buffers[0]; MAX_BUFFERS + 1];
        assert_eq!(send(&out, b"", &many).unwrap_err().kind(), io::ErrorKind::InvalidInput);
    }
}
