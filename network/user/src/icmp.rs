//! ICMP errors for the guest (RFC 792, RFC 1191, RFC 4443): what a router or the other end would tell it.

use std::net::{IpAddr, SocketAddr};

use crate::output::{Flow4Tuple, TCP_HEADER_MAX, TcpHeader};
use crate::sender::{FrameIo, HOPS, Sender};
use crate::wire::{ETHERNET_BYTES, Headers, IPV4_BYTES, IPV6_BYTES, Ip, TCP, UDP, UDP_BYTES};

/// Most bytes of the packet in question that an error quotes: the error fits into 576 bytes (RFC 1812) or 1,280.
const MAX_QUOTE_V4: usize = 576 - IPV4_BYTES - 8;
const MAX_QUOTE_V6: usize = 1280 - IPV6_BYTES - 8;

/// What is the matter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Trouble {
    /// Nobody listens on the port.
    Port,
    /// There is no way to the network.
    Network,
    /// The host does not answer.
    Host,
    /// It is not allowed.
    Prohibited,
    /// The packet is larger than what the way carries: this many bytes.
    TooBig(u32),
    /// The packet has come as far as it may.
    Hops,
}

impl Trouble {
    /// Type, code and the four bytes after the checksum.
    fn v4(self) -> [u8; 8] {
        match self {
            Self::Port => [3, 3, 0, 0, 0, 0, 0, 0],
            Self::Network => [3, 0, 0, 0, 0, 0, 0, 0],
            Self::Host => [3, 1, 0, 0, 0, 0, 0, 0],
            Self::Prohibited => [3, 13, 0, 0, 0, 0, 0, 0],
            Self::TooBig(mtu) => {
                let [a, b] = (mtu.min(65_535) as u16).to_be_bytes();
                [3, 4, 0, 0, 0, 0, a, b]
            }
            Self::Hops => [11, 0, 0, 0, 0, 0, 0, 0],
        }
    }

    fn v6(self) -> [u8; 8] {
        match self {
            Self::Port => [1, 4, 0, 0, 0, 0, 0, 0],
            Self::Network => [1, 0, 0, 0, 0, 0, 0, 0],
            Self::Host => [1, 3, 0, 0, 0, 0, 0, 0],
            Self::Prohibited => [1, 1, 0, 0, 0, 0, 0, 0],
            Self::TooBig(mtu) => {
                let [a, b, c, d] = mtu.max(1280).to_be_bytes();
                [2, 0, 0, 0, a, b, c, d]
            }
            Self::Hops => [3, 0, 0, 0, 0, 0, 0, 0],
        }
    }

    /// The trouble that an error of the host's sockets tells of.
    pub fn of(error: &std::io::Error, mtu: u32) -> Option<Self> {
        use rustix::io::Errno;
        Some(match Errno::from_io_error(error)? {
            Errno::CONNREFUSED => Self::Port,
            Errno::NETUNREACH | Errno::NETDOWN | Errno::ADDRNOTAVAIL | Errno::AFNOSUPPORT => Self::Network,
            Errno::HOSTUNREACH | Errno::HOSTDOWN => Self::Host,
            Errno::ACCESS | Errno::PERM | Errno::INVAL => Self::Prohibited,
            Errno::MSGSIZE => Self::TooBig(mtu),
            _ => return None,
        })
    }
}

/// Tells the guest about a packet of its own (`quote`, from its IP header on). The sender is the packet's
/// destination for [`Trouble::Port`], the gateway otherwise.
pub fn tell<F: FrameIo>(
    sender: &mut Sender<F>,
    guest: IpAddr,
    remote: IpAddr,
    trouble: Trouble,
    quote: &[u8],
) {
    let v6 = guest.is_ipv6();
    let from = if trouble == Trouble::Port { Some(remote) } else { sender.addresses.gateway(v6) };
    let Some(from) = from else { return };
    let (head, most) = if v6 { (trouble.v6(), MAX_QUOTE_V6) } else { (trouble.v4(), MAX_QUOTE_V4) };
    let mut message = head.to_vec();
    message.extend_from_slice(quote.get(..most).unwrap_or(quote));
    sender.stats.icmp_errors += 1;
    sender.icmp(from, guest, HOPS, &message);
}

/// As [`tell`] for a packet at hand. Nothing is told about groups (RFC 1122, section 3.2.2).
pub fn tell_about<F: FrameIo>(sender: &mut Sender<F>, ip: &Ip<'_>, trouble: Trouble) {
    let group = match ip.destination {
        IpAddr::V4(address) => {
            address.is_multicast()
                || address.is_broadcast()
                || sender.addresses.v4.is_some_and(|own| own.broadcast() == address)
        }
        IpAddr::V6(address) => address.is_multicast(),
    };
    if !group {
        tell(sender, ip.source, ip.destination, trouble, ip.packet);
    }
}

/// As [`tell`] for a UDP flow whose packet is no longer at hand: what its headers were is known.
pub fn tell_udp<F: FrameIo>(sender: &mut Sender<F>, flow: &Flow4Tuple, trouble: Trouble) {
    let mut udp = [0; UDP_BYTES];
    udp[..4].copy_from_slice(&ports(flow.guest, flow.remote));
    udp[5] = UDP_BYTES as u8;
    tell_flow(sender, flow, trouble, UDP, &udp);
}

/// As [`tell`] for a SYN of the guest.
pub fn tell_tcp<F: FrameIo>(sender: &mut Sender<F>, flow: &Flow4Tuple, header: &TcpHeader, trouble: Trouble) {
    let mut tcp = [0; TCP_HEADER_MAX];
    let length = header.write(flow.guest.port(), flow.remote.port(), &mut tcp);
    tell_flow(sender, flow, trouble, TCP, tcp.get(..length).unwrap_or_default());
}

fn ports(from: SocketAddr, to: SocketAddr) -> [u8; 4] {
    let ([a, b], [c, d]) = (from.port().to_be_bytes(), to.port().to_be_bytes());
    [a, b, c, d]
}

fn tell_flow<F: FrameIo>(
    sender: &mut Sender<F>,
    flow: &Flow4Tuple,
    trouble: Trouble,
    protocol: u8,
    transport: &[u8],
) {
    let (guest, remote) = (flow.guest.ip(), flow.remote.ip());
    let mut quote = Headers::ethernet([0; 6], [0; 6], 0);
    quote.ip(guest, remote, protocol, HOPS, transport.len(), None);
    quote.push(transport);
    let quote = quote.bytes().get(ETHERNET_BYTES..).unwrap_or_default().to_vec();
    tell(sender, guest, remote, trouble, &quote);
}
