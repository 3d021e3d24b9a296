//! A guest with a TCP of its own that knows nothing of this one (smoltcp), behind a wire that loses, doubles and
//! reorders packets.

use std::net::IpAddr;

use smoltcp::iface::{Config, Interface, SocketHandle, SocketSet};
use smoltcp::phy::{ChecksumCapabilities, Device, DeviceCapabilities, Medium, RxToken, TxToken};
use smoltcp::socket::tcp;
use smoltcp::time::Instant as Clock;
use smoltcp::wire::{HardwareAddress, IpAddress, IpCidr, IpEndpoint, IpProtocol};

use super::*;

/// What a wire does to packets, in thousandths each.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Faults {
    pub(super) lost: u32,
    pub(super) doubled: u32,
    pub(super) late: u32,
}

/// Numbers that look random (xorshift).
pub(super) struct Dice(pub(super) u64);

impl Dice {
    pub(super) fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn hit(&mut self, thousandths: u32) -> bool {
        self.next() % 1000 < u64::from(thousandths)
    }
}

/// A direction of the wire.
struct Lane<T> {
    packets: VecDeque<T>,
    /// What others overtake.
    late: Option<T>,
}

impl<T: Clone> Lane<T> {
    fn new() -> Self {
        Self { packets: VecDeque::new(), late: None }
    }

    fn carry(&mut self, packet: T, faults: Faults, dice: &mut Dice) {
        if dice.hit(faults.lost) {
            return;
        }
        if dice.hit(faults.doubled) {
            self.packets.push_back(packet.clone());
        }
        if self.late.is_none() && dice.hit(faults.late) {
            self.late = Some(packet);
            return;
        }
        self.packets.push_back(packet);
        if dice.hit(300) {
            self.packets.extend(self.late.take());
        }
    }

    /// Nothing else comes: what was late arrives.
    fn settle(&mut self) {
        self.packets.extend(self.late.take());
    }
}

/// The guest's network card: IP packets.
struct Card {
    received: Lane<Vec<u8>>,
    sent: Vec<Vec<u8>>,
    mtu: usize,
}

struct Received(Vec<u8>);
struct Sending<'a>(&'a mut Vec<Vec<u8>>);

impl RxToken for Received {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, f: F) -> R {
        f(&self.0)
    }
}

impl TxToken for Sending<'_> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, len: usize, f: F) -> R {
        let mut packet = vec![0; len];
        let result = f(&mut packet);
        self.0.push(packet);
        result
    }
}

impl Device for Card {
    type RxToken<'a> = Received;
    type TxToken<'a> = Sending<'a>;

    fn receive(&mut self, _: Clock) -> Option<(Received, Sending<'_>)> {
        let packet = self.received.packets.pop_front()?;
        Some((Received(packet), Sending(&mut self.sent)))
    }

    fn transmit(&mut self, _: Clock) -> Option<Sending<'_>> {
        Some(Sending(&mut self.sent))
    }

    fn capabilities(&self) -> DeviceCapabilities {
        let mut capabilities = DeviceCapabilities::default();
        capabilities.medium = Medium::Ip;
        capabilities.max_transmission_unit = self.mtu;
        capabilities.checksum = ChecksumCapabilities::ignored();
        capabilities
    }
}

/// A world whose guest is the independent stack.
pub(super) struct Guest {
    pub(super) world: World,
    started: Instant,
    interface: Interface,
    card: Card,
    pub(super) sockets: SocketSet<'static>,
    faults: Faults,
    dice: Dice,
    to_table: Lane<(Flow4Tuple, TcpHeader, Vec<u8>)>,
}

pub(super) const GUEST_V4: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(10, 0, 2, 15));
const GUEST_V6: IpAddr = IpAddr::V6(std::net::Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, 0x15));

impl Guest {
    pub(super) fn new(world: World, faults: Faults, seed: u64) -> Self {
        let mtu = if world.wire.large { 65_535 } else { usize::from(world.wire.mtu) };
        let mut card = Card { received: Lane::new(), sent: Vec::new(), mtu };
        let mut interface = Interface::new(Config::new(HardwareAddress::Ip), &mut card, Clock::ZERO);
        interface.update_ip_addrs(|addresses| {
            addresses.push(IpCidr::new(GUEST_V4.into(), 24)).unwrap();
            addresses.push(IpCidr::new(GUEST_V6.into(), 64)).unwrap();
        });
        interface.routes_mut().add_default_ipv4_route(std::net::Ipv4Addr::new(10, 0, 2, 2)).unwrap();
        let gateway = std::net::Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, 2);
        interface.routes_mut().add_default_ipv6_route(gateway).unwrap();
        Self {
            started: world.now,
            world,
            interface,
            card,
            sockets: SocketSet::new(Vec::new()),
            faults,
            dice: Dice(seed | 1),
            to_table: Lane::new(),
        }
    }

    /// A socket with buffers of `bytes` each.
    pub(super) fn socket(&mut self, bytes: usize) -> SocketHandle {
        let buffer = || tcp::SocketBuffer::new(vec![0; bytes]);
        self.sockets.add(tcp::Socket::new(buffer(), buffer()))
    }

    pub(super) fn connect(&mut self, handle: SocketHandle, v6: bool, port: u16) {
        let remote: IpAddress = if v6 {
            std::net::Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 7).into()
        } else {
            std::net::Ipv4Addr::new(192, 0, 2, 7).into()
        };
        let socket = self.sockets.get_mut::<tcp::Socket<'_>>(handle);
        socket.connect(self.interface.context(), IpEndpoint::new(remote, 80), port).unwrap();
    }

    pub(super) fn tcp(&mut self, handle: SocketHandle) -> &mut tcp::Socket<'static> {
        self.sockets.get_mut(handle)
    }

    fn clock(&self) -> Clock {
        Clock::from_micros((self.world.now - self.started).as_micros() as i64)
    }

    /// Moves packets both ways and has both sides work on them. If nothing at all happens, time passes up to the
    /// next deadline of either.
    pub(super) fn step(&mut self) {
        let mut busy = self.exchange();
        if !busy {
            // The host's kernel works on its own time.
            busy = self.world.turn(Duration::from_micros(300));
            busy |= self.exchange();
        }
        if busy {
            self.world.now += Duration::from_micros(20);
            return;
        }
        self.card.received.settle();
        self.to_table.settle();
        if self.exchange() {
            return;
        }
        let clock = self.clock();
        let guest = self.interface.poll_delay(clock, &self.sockets).map(Duration::from);
        let table = self.world.wakes_at.map(|at| at.saturating_duration_since(self.world.now));
        let pass = guest.into_iter().chain(table).min().unwrap_or(Duration::from_millis(1));
        self.world.now += pass.clamp(Duration::from_millis(1), Duration::from_millis(200));
    }

    fn exchange(&mut self) -> bool {
        let mut busy = false;
        while let Some(packet) = self.world.wire.packets.pop_front() {
            self.card.received.carry(to_ip(&packet), self.faults, &mut self.dice);
            busy = true;
        }
        let clock = self.clock();
        self.interface.poll(clock, &mut self.card, &mut self.sockets);
        for packet in std::mem::take(&mut self.card.sent) {
            if let Some(segment) = from_ip(&packet) {
                self.to_table.carry(segment, self.faults, &mut self.dice);
                busy = true;
            }
        }
        while let Some((flow, header, payload)) = self.to_table.packets.pop_front() {
            self.world.send(&flow, &header, &payload);
            busy = true;
        }
        self.world.turn(Duration::ZERO) || busy
    }
}

/// An IP packet without checksums, which the stack was told to ignore.
fn to_ip(packet: &Packet) -> Vec<u8> {
    let mut tcp = [0; crate::output::TCP_HEADER_MAX];
    let (guest, remote) = (packet.flow.guest, packet.flow.remote);
    let length = packet.header.write(remote.port(), guest.port(), &mut tcp);
    let total = length + packet.payload.len();
    let mut bytes = Vec::with_capacity(total + 40);
    match (remote.ip(), guest.ip()) {
        (IpAddr::V4(remote), IpAddr::V4(guest)) => {
            bytes.extend([0x45, 0]);
            bytes.extend(((total + 20) as u16).to_be_bytes());
            bytes.extend([0, 0, 0, 0, 64, 6, 0, 0]);
            bytes.extend(remote.octets());
            bytes.extend(guest.octets());
        }
        (IpAddr::V6(remote), IpAddr::V6(guest)) => {
            bytes.extend([0x60, 0, 0, 0]);
            bytes.extend((total as u16).to_be_bytes());
            bytes.extend([6, 64]);
            bytes.extend(remote.octets());
            bytes.extend(guest.octets());
        }
        _ => panic!("a flow of two families"),
    }
    bytes.extend(&tcp[..length]);
    bytes.extend(&packet.payload);
    bytes
}

fn from_ip(packet: &[u8]) -> Option<(Flow4Tuple, TcpHeader, Vec<u8>)> {
    let (guest, remote, tcp): (IpAddr, IpAddr, &[u8]) = if packet[0] >> 4 == 4 {
        let ip = smoltcp::wire::Ipv4Packet::new_checked(packet).unwrap();
        if ip.next_header() != IpProtocol::Tcp {
            return None;
        }
        (ip.src_addr().into(), ip.dst_addr().into(), &packet[20..usize::from(ip.total_len())])
    } else {
        let ip = smoltcp::wire::Ipv6Packet::new_checked(packet).unwrap();
        if ip.next_header() != IpProtocol::Tcp {
            return None;
        }
        (ip.src_addr().into(), ip.dst_addr().into(), &packet[40..])
    };
    let (source, destination, header, payload) = TcpHeader::parse(tcp).unwrap();
    let flow =
        Flow4Tuple { guest: SocketAddr::new(guest, source), remote: SocketAddr::new(remote, destination) };
    Some((flow, header, payload.to_vec()))
}
