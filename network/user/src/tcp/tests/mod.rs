//! The table against real sockets of the host's loopback, with guests of two kinds: one that sends exactly the
//! segments a test says ([`Script`]), and an independent TCP ([`stack`]).

mod hostile;
mod opening;
mod scripted;
mod stack;
mod transfers;

use std::collections::VecDeque;
use std::io::{self, ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::time::{Duration, Instant};

use super::{Context, Limits, Metrics, Table};
use crate::output::{Flow4Tuple, Output, TcpFlags, TcpHeader, TcpOptions, Unreachable};
use crate::policy::Policy;
use crate::poller::{Epoll, Owner, Readiness};

/// A packet to the guest.
#[derive(Clone, Debug)]
struct Packet {
    flow: Flow4Tuple,
    header: TcpHeader,
    payload: Vec<u8>,
}

/// An output that keeps packets.
struct Wire {
    packets: VecDeque<Packet>,
    unreachable: Vec<(Flow4Tuple, u32, Unreachable)>,
    /// Packets it keeps before it is full.
    room: usize,
    /// Whether large segments stay whole.
    large: bool,
    mtu: u16,
}

impl Output for Wire {
    fn tcp(
        &mut self,
        flow: &Flow4Tuple,
        header: &TcpHeader,
        payload: &[&[u8]],
        segment: Option<u16>,
    ) -> bool {
        let payload = payload.concat();
        assert!(payload.len() <= self.max_payload(flow.is_v6()), "{} bytes at once", payload.len());
        if self.packets.len() >= self.room {
            return false;
        }
        let size = match segment {
            Some(mss) if !self.large => usize::from(mss),
            None => {
                let most = usize::from(self.mtu) - if flow.is_v6() { 60 } else { 40 };
                assert!(payload.len() <= most, "{} bytes in one segment", payload.len());
                payload.len()
            }
            _ => payload.len(),
        };
        let pieces: Vec<&[u8]> =
            if payload.is_empty() { vec![&[][..]] } else { payload.chunks(size).collect() };
        let mut seq = header.seq;
        for (index, piece) in pieces.iter().enumerate() {
            let mut header = TcpHeader { seq, ..*header };
            if index + 1 < pieces.len() {
                header.flags = header.flags.without(TcpFlags::FIN.with(TcpFlags::PSH));
            }
            seq = seq.wrapping_add(piece.len() as u32);
            self.packets.push_back(Packet { flow: *flow, header, payload: piece.to_vec() });
        }
        true
    }

    fn max_payload(&self, v6: bool) -> usize {
        let headers = if v6 { 60 } else { 40 };
        if self.large { 65_535 - headers } else { usize::from(self.mtu) - headers }
    }

    fn mtu(&self) -> u16 {
        self.mtu
    }

    fn unreachable(&mut self, flow: &Flow4Tuple, header: &TcpHeader, why: Unreachable) {
        self.unreachable.push((*flow, header.seq, why));
    }
}

/// Every destination is one address of the host.
struct To(Option<SocketAddr>);

impl Policy for To {
    fn connect_to(&self, _: SocketAddr) -> Option<SocketAddr> {
        self.0
    }
}

/// A table and all around it, with a clock that goes when told to.
struct World {
    table: Table,
    wire: Wire,
    epoll: Epoll,
    policy: To,
    now: Instant,
    ready: Vec<(u64, Readiness)>,
    /// When the table wants to be called again.
    wakes_at: Option<Instant>,
    old_kernel: bool,
}

impl World {
    fn new(limits: Limits, to: Option<SocketAddr>) -> Self {
        Self {
            table: Table::new(limits),
            wire: Wire {
                packets: VecDeque::new(),
                unreachable: Vec::new(),
                room: usize::MAX,
                large: false,
                mtu: 1500,
            },
            epoll: Epoll::new().unwrap(),
            policy: To(to),
            now: Instant::now(),
            ready: Vec::new(),
            wakes_at: None,
            old_kernel: false,
        }
    }

    fn with<R>(&mut self, what: impl FnOnce(&mut Table, &mut Context<'_>) -> R) -> R {
        let mut cx =
            Context { now: self.now, output: &mut self.wire, poller: &mut self.epoll, policy: &self.policy };
        what(&mut self.table, &mut cx)
    }

    /// One turn of an engine's loop; waits up to `wait` for sockets. Whether anything was ready.
    fn turn(&mut self, wait: Duration) -> bool {
        let mut ready = std::mem::take(&mut self.ready);
        self.epoll.wait(Some(wait), &mut ready).unwrap();
        for (token, readiness) in &ready {
            let (owner, token) = Owner::of(*token).unwrap();
            assert_eq!(owner, Owner::Tcp);
            self.with(|table, cx| table.socket_ready(token, *readiness, cx));
        }
        let any = !ready.is_empty();
        self.ready = ready;
        if self.old_kernel {
            self.table.forget_peek_offsets();
        }
        self.with(|table, cx| table.flush(cx));
        self.wakes_at = self.with(|table, cx| table.expire(cx));
        self.table.check();
        any
    }

    /// Turns until a packet is there, and takes it. Panics if there is none for seconds.
    fn packet(&mut self) -> Packet {
        self.packet_within(Duration::from_secs(10)).expect("a packet to the guest")
    }

    fn packet_within(&mut self, time: Duration) -> Option<Packet> {
        let end = Instant::now() + time;
        loop {
            if let Some(packet) = self.wire.packets.pop_front() {
                return Some(packet);
            }
            if Instant::now() > end {
                return None;
            }
            self.turn(Duration::from_millis(5));
        }
    }

    /// Turns for long enough that whatever the host's kernel does is done; no packet may have come of it.
    fn nothing(&mut self) {
        if let Some(packet) = self.packet_within(Duration::from_millis(60)) {
            panic!("nothing was to be sent, but: {packet:?}");
        }
    }

    /// Lets `time` pass for the table.
    fn pass(&mut self, time: Duration) {
        self.now += time;
        self.turn(Duration::ZERO);
    }

    fn send(&mut self, flow: &Flow4Tuple, header: &TcpHeader, payload: &[u8]) {
        self.with(|table, cx| table.packet(flow, header, payload, cx));
    }

    fn metrics(&self) -> Metrics {
        self.table.metrics()
    }
}

impl Table {
    /// Invariants that hold between calls.
    fn check(&self) {
        let flows = self.slots.iter().filter_map(|slot| slot.flow.as_ref());
        let (mut count, mut half_open) = (0, 0);
        for flow in flows {
            count += 1;
            half_open += usize::from(flow.half_open);
            assert_eq!(flow.half_open, flow.state != super::State::Open);
            let consumed = flow.una.wrapping_sub(flow.consumed) as i32;
            let in_flight = flow.nxt.wrapping_sub(flow.una) as i32;
            let again = flow.max.wrapping_sub(flow.nxt) as i32;
            assert!(consumed >= -1 && in_flight >= 0 && again >= 0, "{consumed} {in_flight} {again}");
            assert!(flow.acks_due <= super::MANY_ACKS);
        }
        assert_eq!(count, self.metrics.flows);
        assert_eq!(count, self.flows.len());
        assert_eq!(half_open, self.metrics.half_open);
        assert_eq!(self.free.len() + count, self.slots.len());
        assert!(self.slots.len() <= self.limits.flows);
    }

    /// Makes all sockets like those of kernels before 6.9.
    fn forget_peek_offsets(&mut self) {
        for flow in self.slots.iter_mut().filter_map(|slot| slot.flow.as_mut()) {
            flow.socket.without_peek_offset();
        }
    }
}

fn flow(guest_port: u16) -> Flow4Tuple {
    Flow4Tuple {
        guest: SocketAddr::from(([10, 0, 2, 15], guest_port)),
        remote: SocketAddr::from(([192, 0, 2, 7], 80)),
    }
}

fn listener() -> (TcpListener, SocketAddr) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    (listener, address)
}

const GUEST_ISN: u32 = 0xffff_fff0;
const GUEST_SCALE: u8 = 4;

/// A guest that sends what a test says.
struct Script {
    world: World,
    flow: Flow4Tuple,
    /// Next number to send.
    seq: u32,
    /// Next number expected.
    ack: u32,
    /// Window on the wire.
    window: u16,
}

impl Script {
    fn new(to: Option<SocketAddr>) -> Self {
        let world = World::new(Limits::default(), to);
        Self { world, flow: flow(40_000), seq: GUEST_ISN, ack: 0, window: 4096 }
    }

    /// A guest and the peer that it is connected to.
    fn connected() -> (Self, TcpStream) {
        let (listener, address) = listener();
        let mut script = Self::new(Some(address));
        script.handshake();
        let peer = listener.accept().unwrap().0;
        peer.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        (script, peer)
    }

    fn syn(&mut self) {
        let options =
            TcpOptions { mss: Some(1460), window_scale: Some(GUEST_SCALE), ..TcpOptions::default() };
        let header = TcpHeader { options, ..self.header(TcpFlags::SYN) };
        self.world.send(&self.flow, &TcpHeader { ack: 0, ..header }, &[]);
    }

    fn handshake(&mut self) {
        self.syn();
        let answer = self.world.packet();
        assert_eq!(answer.header.flags, TcpFlags::SYN.with(TcpFlags::ACK));
        assert_eq!(answer.header.ack, self.seq.wrapping_add(1));
        self.seq = self.seq.wrapping_add(1);
        self.ack = answer.header.seq.wrapping_add(1);
        self.send(TcpFlags::ACK, &[]);
    }

    fn header(&self, flags: TcpFlags) -> TcpHeader {
        TcpHeader { seq: self.seq, ack: self.ack, flags, window: self.window, ..TcpHeader::default() }
    }

    /// Sends a segment and counts its bytes as sent.
    fn send(&mut self, flags: TcpFlags, payload: &[u8]) {
        self.send_from(self.seq, flags, payload);
        let fin = u32::from(flags.has(TcpFlags::FIN));
        self.seq = self.seq.wrapping_add(payload.len() as u32).wrapping_add(fin);
    }

    /// Sends a segment with any sequence number.
    fn send_from(&mut self, seq: u32, flags: TcpFlags, payload: &[u8]) {
        let header = TcpHeader { seq, ..self.header(flags.with(TcpFlags::ACK)) };
        self.world.send(&self.flow, &header, payload);
    }

    /// The next packet.
    fn next(&mut self) -> Packet {
        let packet = self.world.packet();
        assert_eq!(packet.flow, self.flow);
        packet
    }

    /// The next packet is an acknowledgement without payload, of everything sent.
    fn acknowledged(&mut self) -> TcpHeader {
        let packet = self.next();
        assert_eq!(packet.header.flags, TcpFlags::ACK, "{packet:?}");
        assert_eq!(packet.header.ack, self.seq, "{packet:?}");
        assert!(packet.payload.is_empty());
        packet.header
    }

    /// The next packets have `bytes`; they are acknowledged unless `acknowledge` is false.
    fn receive(&mut self, bytes: &[u8], acknowledge: bool) {
        let mut got = Vec::new();
        while got.len() < bytes.len() {
            let packet = self.next();
            assert_eq!(packet.header.seq, self.ack.wrapping_add(got.len() as u32), "{:?}", packet.header);
            got.extend(packet.payload);
        }
        assert!(got == bytes);
        if acknowledge {
            self.ack = self.ack.wrapping_add(bytes.len() as u32);
            self.send(TcpFlags::ACK, &[]);
        }
    }
}

/// Reads exactly `count` bytes while the world turns.
fn read(world: &mut World, from: &mut TcpStream, count: usize) -> Vec<u8> {
    from.set_nonblocking(true).unwrap();
    let mut all = vec![0; count];
    let mut done = 0;
    let end = Instant::now() + Duration::from_secs(10);
    while done < count {
        assert!(Instant::now() < end, "{done} of {count} bytes came");
        match from.read(&mut all[done..]) {
            Ok(0) => panic!("the stream ended after {done} of {count} bytes"),
            Ok(more) => done += more,
            Err(error) if error.kind() == ErrorKind::WouldBlock => {
                world.turn(Duration::from_millis(1));
            }
            Err(error) => panic!("{error}"),
        }
    }
    all
}

/// What a read says next that is not "would block".
fn outcome(world: &mut World, from: &mut TcpStream) -> io::Result<usize> {
    from.set_nonblocking(true).unwrap();
    let end = Instant::now() + Duration::from_secs(10);
    loop {
        match from.read(&mut [0; 16]) {
            Err(error) if error.kind() == ErrorKind::WouldBlock && Instant::now() < end => {
                world.turn(Duration::from_millis(1));
            }
            other => return other,
        }
    }
}

fn write(to: &mut TcpStream, bytes: &[u8]) {
    to.set_nonblocking(false).unwrap();
    to.write_all(bytes).unwrap();
}
