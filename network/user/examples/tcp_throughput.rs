//! How much TCP the table carries: real sockets of the loopback on one side, on the other a guest that takes and
//! makes packets in memory and does nothing else.
//!
//! `cargo run --release -p atoll-network-user --example tcp_throughput [seconds per figure]`
//!
//! "whole" is a guest with segmentation offload (packets of 64 KiB), "cut" one without (1,460 bytes each). The
//! peer is a thread of this process, so two processors are at work. "processor" is the time that the table's own
//! thread needed per gigabyte, the copy of each packet into a ring's worth of memory included.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

use atoll_network_user::poller::Epoll;
use atoll_network_user::tcp::{BYTES_PER_FLOW, Context, Limits, Table};
use atoll_network_user::{
    Flow4Tuple, Output, Owner, Policy, Poller, Readiness, TcpFlags, TcpHeader, TcpOptions,
};
use rustix::time::{ClockId, clock_gettime};

const RING_BYTES: usize = 4 << 20;
const GUEST_SCALE: u8 = 8;
const GUEST_WINDOW: u16 = 4096;

/// The guest: a ring's worth of memory, and the numbers of one connection.
struct Guest {
    ring: Vec<u8>,
    at: usize,
    large: bool,
    /// What was sent to it last.
    last: Option<TcpHeader>,
    expected: u32,
    received: u64,
    packets: u64,
}

impl Output for Guest {
    fn tcp(&mut self, _: &Flow4Tuple, header: &TcpHeader, payload: &[&[u8]], segment: Option<u16>) -> bool {
        let mut length = 0;
        for piece in payload {
            if self.at + piece.len() > RING_BYTES {
                self.at = 0;
            }
            self.ring[self.at..self.at + piece.len()].copy_from_slice(piece);
            self.at += piece.len();
            length += piece.len();
        }
        assert!(self.large || segment.is_none());
        let ends = header.flags.has(TcpFlags::SYN) || header.flags.has(TcpFlags::FIN);
        if length > 0 || ends {
            self.expected = header.seq.wrapping_add(length as u32).wrapping_add(u32::from(ends));
        }
        self.received += length as u64;
        self.packets += 1;
        self.last = Some(*header);
        true
    }

    fn max_payload(&self, _: bool) -> usize {
        if self.large { 65_495 } else { 1460 }
    }

    fn mtu(&self) -> u16 {
        1500
    }
}

struct To(SocketAddr);

impl Policy for To {
    fn connect_to(&self, _: SocketAddr) -> Option<SocketAddr> {
        Some(self.0)
    }
}

/// A table, its guest and its sockets.
struct World {
    table: Table,
    guest: Guest,
    epoll: Epoll,
    policy: To,
    ready: Vec<(u64, Readiness)>,
}

impl World {
    fn new(to: SocketAddr, large: bool) -> Self {
        Self {
            table: Table::new(Limits { half_open: 4096, ..Limits::default() }),
            guest: Guest {
                ring: vec![0; RING_BYTES],
                at: 0,
                large,
                last: None,
                expected: 0,
                received: 0,
                packets: 0,
            },
            epoll: Epoll::new().expect("epoll"),
            policy: To(to),
            ready: Vec::new(),
        }
    }

    fn with<R>(&mut self, what: impl FnOnce(&mut Table, &mut Context<'_>) -> R) -> R {
        let mut cx = Context {
            now: Instant::now(),
            output: &mut self.guest,
            poller: &mut self.epoll,
            policy: &self.policy,
        };
        what(&mut self.table, &mut cx)
    }

    fn turn(&mut self, wait: Duration) {
        self.with(|table, cx| table.flush(cx));
        let mut ready = std::mem::take(&mut self.ready);
        self.epoll.wait(Some(wait), &mut ready).expect("epoll");
        for (token, readiness) in &ready {
            if let Some((Owner::Tcp, token)) = Owner::of(*token) {
                self.with(|table, cx| table.socket_ready(token, *readiness, cx));
            }
        }
        self.ready = ready;
        self.with(|table, cx| table.flush(cx));
        self.with(|table, cx| table.expire(cx));
    }

    fn send(&mut self, flow: &Flow4Tuple, seq: u32, flags: TcpFlags, payload: &[u8]) {
        let options = match flags.has(TcpFlags::SYN) {
            true => TcpOptions { mss: Some(1460), window_scale: Some(GUEST_SCALE), ..TcpOptions::default() },
            false => TcpOptions::default(),
        };
        let header = TcpHeader { seq, ack: self.guest.expected, flags, window: GUEST_WINDOW, options };
        self.with(|table, cx| table.packet(flow, &header, payload, cx));
    }

    fn connect(&mut self, flow: &Flow4Tuple) {
        self.send(flow, 0, TcpFlags::SYN, &[]);
        self.guest.last = None;
        while self.guest.last.is_none() {
            self.turn(Duration::from_millis(10));
        }
        self.send(flow, 1, TcpFlags::ACK, &[]);
    }
}

fn flow(port: u16) -> Flow4Tuple {
    Flow4Tuple {
        guest: SocketAddr::from(([10, 0, 2, 15], port)),
        remote: SocketAddr::from(([192, 0, 2, 7], 80)),
    }
}

/// Processor time of this thread, in seconds.
fn processor() -> f64 {
    let time = clock_gettime(ClockId::ThreadCPUTime);
    time.tv_sec as f64 + time.tv_nsec as f64 / 1e9
}

fn report(name: &str, bytes: u64, seconds: f64, processor: f64, packets: u64) {
    let gigabytes = bytes as f64 / 1e9;
    println!(
        "{name:24} {:6.2} GB/s   processor {:5.3} s/GB   {:9.0} packets/s",
        gigabytes / seconds,
        processor / gigabytes,
        packets as f64 / seconds
    );
}

/// Host to guest.
fn down(large: bool, time: Duration) {
    let listener = TcpListener::bind("127.0.0.1:0").expect("listener");
    let mut world = World::new(listener.local_addr().expect("address"), large);
    let peer = std::thread::spawn(move || {
        let mut stream = listener.accept().expect("accept").0;
        let data = vec![1; 256 << 10];
        while stream.write_all(&data).is_ok() {}
    });
    let flow = flow(1);
    world.connect(&flow);
    let (start, used) = (Instant::now(), processor());
    let mut acknowledged = world.guest.expected;
    while start.elapsed() < time {
        world.turn(Duration::from_millis(10));
        if world.guest.expected != acknowledged {
            acknowledged = world.guest.expected;
            world.send(&flow, 1, TcpFlags::ACK, &[]);
        }
    }
    let name = if large { "host to guest, whole" } else { "host to guest, cut" };
    let seconds = start.elapsed().as_secs_f64();
    report(name, world.guest.received, seconds, processor() - used, world.guest.packets);
    world.send(&flow, 1, TcpFlags::RST, &[]);
    peer.join().expect("peer");
}

/// Guest to host.
fn up(large: bool, time: Duration) {
    let listener = TcpListener::bind("127.0.0.1:0").expect("listener");
    let mut world = World::new(listener.local_addr().expect("address"), large);
    let total = std::sync::Arc::new(AtomicU64::new(0));
    let counted = std::sync::Arc::clone(&total);
    let peer = std::thread::spawn(move || {
        let mut stream = listener.accept().expect("accept").0;
        let mut data = vec![1; 256 << 10];
        while let Ok(count @ 1..) = stream.read(&mut data) {
            counted.fetch_add(count as u64, Relaxed);
        }
    });
    let flow = flow(1);
    world.connect(&flow);
    let segment = vec![2; if large { 65_160 } else { 1460 }];
    let (start, used) = (Instant::now(), processor());
    let (mut seq, mut edge, mut packets) = (1_u32, 1_u32.wrapping_add(60_000), 0);
    while start.elapsed() < time {
        // As much as one batch of a ring, within the window.
        for _ in 0..64 {
            if (edge.wrapping_sub(seq) as i32) < segment.len() as i32 {
                break;
            }
            world.send(&flow, seq, TcpFlags::ACK, &segment);
            seq = seq.wrapping_add(segment.len() as u32);
            packets += 1;
        }
        let full = (edge.wrapping_sub(seq) as i32) < segment.len() as i32;
        world.with(|table, cx| table.flush(cx));
        let told = world.guest.last.is_some();
        world.turn(if full && !told { Duration::from_millis(10) } else { Duration::ZERO });
        if let Some(header) = world.guest.last.take() {
            // What was not taken is sent again.
            if world.table.metrics().pinched > 0 && header.ack != seq {
                seq = header.ack;
            }
            edge = header.ack.wrapping_add(u32::from(header.window) << 8);
        }
    }
    let name = if large { "guest to host, whole" } else { "guest to host, cut" };
    let seconds = start.elapsed().as_secs_f64();
    report(name, total.load(Relaxed), seconds, processor() - used, packets);
    if world.table.metrics().pinched > 0 {
        println!("{:24} {} segments taken in part", "", world.table.metrics().pinched);
    }
    world.send(&flow, seq, TcpFlags::RST, &[]);
    peer.join().expect("peer");
}

/// Connections that are opened and reset one after the other, and memory of many at once.
fn connections(time: Duration) {
    let listener = TcpListener::bind("127.0.0.1:0").expect("listener");
    let address = listener.local_addr().expect("address");
    let peer = std::thread::spawn(move || {
        while let Ok((stream, from)) = listener.accept() {
            drop(stream);
            if from.ip() != address.ip() || from.port() == 1 {
                break;
            }
        }
    });
    let mut world = World::new(address, true);
    let (start, used) = (Instant::now(), processor());
    let mut count = 0_u32;
    while start.elapsed() < time {
        let flow = flow((count % 60_000) as u16 + 1);
        world.connect(&flow);
        world.send(&flow, 1, TcpFlags::RST, &[]);
        count += 1;
    }
    let seconds = start.elapsed().as_secs_f64();
    println!(
        "connections              {:6.0} /s     processor {:5.1} µs each   {BYTES_PER_FLOW} bytes a flow",
        f64::from(count) / seconds,
        (processor() - used) / f64::from(count) * 1e6,
    );
    drop(peer);
}

/// What changing a socket's interest costs, as level-triggered watching would for each batch.
fn interest() {
    let listener = TcpListener::bind("127.0.0.1:0").expect("listener");
    let mut stream = TcpStream::connect(listener.local_addr().expect("address")).expect("connect");
    let fd = OwnedFd::from(listener.accept().expect("accept").0);
    let mut epoll = Epoll::new().expect("epoll");
    const TIMES: u32 = 200_000;
    let start = Instant::now();
    for round in 0..TIMES {
        epoll.watch(fd.as_fd(), 1, round % 2 == 0, true, false).expect("watch");
    }
    let change = start.elapsed() / TIMES;
    stream.write_all(&vec![0; 60_000]).expect("write");
    std::thread::sleep(Duration::from_millis(50));
    let mut buffer = vec![0; 60_000];
    let start = Instant::now();
    for _ in 0..TIMES / 10 {
        atoll_foundation::tcp_socket::peek_after(&fd, 0, &mut buffer).expect("peek");
    }
    println!(
        "a change of interest {change:?} (two calls), a peek of 60,000 bytes {:?}",
        start.elapsed() * 10 / TIMES
    );
}

fn main() {
    let seconds = std::env::args().nth(1).and_then(|text| text.parse().ok()).unwrap_or(3.0);
    let time = Duration::from_secs_f64(seconds);
    down(true, time);
    down(false, time);
    up(true, time);
    up(false, time);
    connections(time);
    interest();
}
