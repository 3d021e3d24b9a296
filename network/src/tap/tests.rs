//! Real tap devices, in a network namespace of the test's own, with the kernel's stack at the other end.
//!
//! A test runs itself again under `unshare`; where that is not permitted, or the host has no tap devices, it says so
//! and ends.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpStream, UdpSocket};
use std::process::Command;
use std::sync::Arc;
use std::sync::mpsc::{Receiver as Inbox, channel};
use std::time::{Duration, Instant};

use super::*;
use crate::header::{PartialChecksum, SegmentKind, Segmentation};
use atoll_foundation::EventLoop;

/// Set in the process that runs in the namespace.
const INSIDE: &str = "ATOLL_TEST_IN_NAMESPACE";
const PATIENCE: Duration = Duration::from_secs(10);

const GUEST_MAC: [u8; 6] = [0x52, 0x54, 0, 0, 0, 2];
const HOST: Ipv4Addr = Ipv4Addr::new(10, 9, 0, 1);
const GUEST: Ipv4Addr = Ipv4Addr::new(10, 9, 0, 2);

/// True in a network namespace of our own. Otherwise runs `test` (its full path) there, and returns false.
fn in_namespace(test: &str) -> bool {
    if std::env::var_os(INSIDE).is_some() {
        return true;
    }
    let usable = |arguments: &[&str]| {
        let probe = Command::new("unshare").args(arguments).args(["ip", "link"]).output();
        probe.is_ok_and(|output| output.status.success())
    };
    if !Path::new(TUN_DEVICE).exists() {
        println!("skipped: the host has no {TUN_DEVICE}");
    } else if !usable(&["--net"]) {
        println!("skipped: 'unshare --net ip link' does not work for this user");
    } else {
        let output = Command::new("unshare")
            .arg("--net")
            .arg(std::env::current_exe().unwrap())
            .args(["--exact", test, "--nocapture"])
            .env(INSIDE, "1")
            .output()
            .unwrap();
        let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        assert!(output.status.success(), "{out}\n{err}");
        assert!(out.contains("1 passed"), "the test was not found: {out}");
        // The harness prints the test's name before it, on the same line.
        let reason = out.lines().find_map(|line| line.find("skipped: ").map(|at| &line[at..]));
        if let Some(reason) = reason {
            println!("{reason}");
        }
    }
    false
}

fn ip(arguments: &str) -> bool {
    Command::new("ip").args(arguments.split(' ')).status().unwrap().success()
}

/// A tap device with the host's address on it, and what its events are.
struct Bench {
    port: TapPort,
    events: EventLoop,
    inbox: Inbox<PortEvent>,
}

impl Bench {
    fn new(name: &str, pairs: u16) -> Self {
        let port = TapPort::open_tap(name, pairs).unwrap();
        assert!(ip(&format!("addr add 10.9.0.1/24 dev {name}")));
        // A new interface sends multicasts of its own, which are not what is tested.
        std::fs::write(format!("/proc/sys/net/ipv6/conf/{name}/disable_ipv6"), "1").unwrap();
        let guest = MacAddress(GUEST_MAC);
        assert!(ip(&format!("neigh add 10.9.0.2 lladdr {guest} dev {name} nud permanent")));
        let events = EventLoop::new().unwrap();
        let (sender, inbox) = channel();
        port.watch(&events.handle(), Arc::new(move |event| sender.send(event).unwrap())).unwrap();
        Self { port, events, inbox }
    }

    fn send(&self, header: &FrameHeader, frame: &[u8]) {
        let mut copy = frame.to_vec();
        let (a, b) = copy.split_at_mut(20);
        let sent = self.port.send(0, header, &[VolatileSlice::from(a), VolatileSlice::from(b)]);
        assert_eq!(sent.unwrap(), Sent::Done);
    }

    /// The next frame that `wanted` likes, on any pair; sleeps on the port's events.
    fn next(&mut self, wanted: impl Fn(&[u8]) -> bool) -> (FrameHeader, Vec<u8>) {
        let deadline = Instant::now() + PATIENCE;
        loop {
            for pair in 0..self.port.queue_pairs() {
                let mut found = None;
                loop {
                    let received = self.port.receive(pair, &mut |header, frame| {
                        found = Some((*header, frame.to_vec()));
                        Taken::Yes
                    });
                    if received.unwrap() == Received::Empty {
                        break;
                    }
                    if let Some(frame) = found.take().filter(|(_, frame)| wanted(frame)) {
                        return frame;
                    }
                }
            }
            while self.inbox.try_recv().is_err() {
                assert!(Instant::now() < deadline, "no frame came");
                self.events.run_once(Some(Duration::from_millis(500))).unwrap();
            }
        }
    }

    /// The host's address, asked for with ARP.
    fn resolve(&mut self) -> [u8; 6] {
        let mut request = Vec::from([0xff; 6]);
        request.extend(GUEST_MAC);
        request.extend([8, 6, 0, 1, 8, 0, 6, 4, 0, 1]);
        request.extend(GUEST_MAC);
        request.extend(GUEST.octets());
        request.extend([0; 6]);
        request.extend(HOST.octets());
        self.send(&FrameHeader::default(), &request);
        let (_, reply) = self.next(|frame| frame[12..14] == [8, 6] && frame[20..22] == [0, 2]);
        assert_eq!(reply[28..32], HOST.octets());
        reply[22..28].try_into().unwrap()
    }
}

fn sum(bytes: &[u8]) -> u32 {
    bytes.chunks(2).map(|pair| u32::from(pair[0]) << 8 | u32::from(*pair.get(1).unwrap_or(&0))).sum()
}

fn fold(mut sum: u32) -> u16 {
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    sum as u16
}

fn pseudo_header(protocol: u8, len: usize) -> u32 {
    sum(&HOST.octets()) + sum(&GUEST.octets()) + u32::from(protocol) + len as u32
}

/// An IPv4 frame from the guest to the host, whose transport checksum is left at the pseudo header's sum.
fn frame_to(mac: [u8; 6], protocol: u8, checksum_at: usize, transport: &[u8]) -> (FrameHeader, Vec<u8>) {
    let mut frame = Vec::from(mac);
    frame.extend(GUEST_MAC);
    frame.extend([8, 0]);
    let total = (20 + transport.len()) as u16;
    let mut header = [0x45, 0, 0, 0, 0, 1, 0, 0, 64, protocol, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    header[2..4].copy_from_slice(&total.to_be_bytes());
    header[12..16].copy_from_slice(&GUEST.octets());
    header[16..20].copy_from_slice(&HOST.octets());
    let check = !fold(sum(&header));
    header[10..12].copy_from_slice(&check.to_be_bytes());
    frame.extend(header);
    frame.extend(transport);
    let partial = fold(pseudo_header(protocol, transport.len()));
    frame[34 + checksum_at..36 + checksum_at].copy_from_slice(&partial.to_be_bytes());
    let checksum = Some(PartialChecksum { start: 34, offset: checksum_at as u16 });
    (FrameHeader { checksum, ..FrameHeader::default() }, frame)
}

fn udp_to(mac: [u8; 6], port: u16, payload: &[u8]) -> (FrameHeader, Vec<u8>) {
    let mut udp = Vec::from(7777u16.to_be_bytes());
    udp.extend(port.to_be_bytes());
    udp.extend(((8 + payload.len()) as u16).to_be_bytes());
    udp.extend([0, 0]);
    udp.extend(payload);
    frame_to(mac, 17, 6, &udp)
}

fn is_ip(frame: &[u8], protocol: u8) -> bool {
    frame.len() > 34 && frame[12..14] == [8, 0] && frame[23] == protocol
}

#[test]
fn arp_and_udp_pass_both_ways_with_and_without_offloads() {
    if !in_namespace("tap::tests::arp_and_udp_pass_both_ways_with_and_without_offloads") {
        return;
    }
    let mut bench = Bench::new("tap0", 1);
    assert_eq!((bench.port.name().as_str(), bench.port.mtu()), ("tap device tap0", Some(1500)));
    let mac = bench.resolve();
    let socket = UdpSocket::bind((HOST, 0)).unwrap();
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    // In: the kernel completes the checksum that the frame left open.
    let (header, frame) = udp_to(mac, socket.local_addr().unwrap().port(), b"from the guest");
    bench.send(&header, &frame);
    let mut buffer = [0; 100];
    let (len, from) = socket.recv_from(&mut buffer).unwrap();
    assert_eq!((&buffer[..len], from.to_string().as_str()), (&b"from the guest"[..], "10.9.0.2:7777"));
    // Out: complete as long as the device takes nothing else.
    for offloads in [Offloads::NONE, Offloads::TCP, Offloads::NONE] {
        bench.port.set_receive_offloads(offloads).unwrap();
        socket.send_to(b"to the guest", (GUEST, 7777)).unwrap();
        let (header, frame) = bench.next(|frame| is_ip(frame, 17));
        assert_eq!(&frame[42..], b"to the guest");
        let complete = fold(sum(&frame[34..]) + pseudo_header(17, frame.len() - 34)) == 0xffff;
        assert_eq!(complete, !offloads.checksum);
        let partial = PartialChecksum { start: 34, offset: 6 };
        assert_eq!(header.checksum, offloads.checksum.then_some(partial));
    }
    // What is no frame, or makes no sense, is lost and harms nothing.
    bench.port.send(0, &FrameHeader::default(), &[]).unwrap();
    let nonsense = PartialChecksum { start: 60_000, offset: 60_000 };
    bench.send(&FrameHeader { checksum: Some(nonsense), ..FrameHeader::default() }, &frame);
    assert!(ip("link set tap0 down"));
    bench.send(&header, &frame);
    assert!(ip("link set tap0 up"));
    bench.send(&header, &frame);
    assert_eq!(socket.recv_from(&mut buffer).unwrap().0, 14);
    // More buffers than one call takes.
    let mut copy = frame.clone();
    let pieces: Vec<VolatileSlice<'_>> = copy.chunks_mut(1).map(VolatileSlice::from).collect();
    for _ in 0..2 {
        assert_eq!(bench.port.send(0, &header, &[&pieces[..], &pieces[..0]].concat()).unwrap(), Sent::Done);
    }
    assert_eq!(socket.recv_from(&mut buffer).unwrap().0, 14);
}

#[test]
fn large_tcp_frames_pass_both_ways() {
    if !in_namespace("tap::tests::large_tcp_frames_pass_both_ways") {
        return;
    }
    let mut bench = Bench::new("tap0", 1);
    bench.port.set_receive_offloads(Offloads::TCP).unwrap();
    let mac = bench.resolve();
    let client = std::thread::spawn(|| {
        let mut stream = TcpStream::connect((GUEST, 80)).unwrap();
        stream.write_all(&[b'q'; 12_000]).unwrap();
        let mut answer = vec![0; 20_000];
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.read_exact(&mut answer).unwrap();
        assert!(answer.iter().all(|byte| *byte == b'a'));
    });
    let word = |frame: &[u8], at: usize| u32::from_be_bytes(frame[at..at + 4].try_into().unwrap());
    let (_, syn) = bench.next(|frame| is_ip(frame, 6) && frame[47] == 2);
    let peer = u16::from_be_bytes([syn[34], syn[35]]);
    let tcp = |sequence: u32, acknowledged: u32, flags: u8, options: &[u8], payload: &[u8]| {
        let mut tcp = Vec::from(80u16.to_be_bytes());
        tcp.extend(peer.to_be_bytes());
        tcp.extend(sequence.to_be_bytes());
        tcp.extend(acknowledged.to_be_bytes());
        tcp.extend([(20 + options.len() as u8) << 2, flags, 0xff, 0xff, 0, 0, 0, 0]);
        tcp.extend(options);
        tcp.extend(payload);
        frame_to(mac, 6, 16, &tcp)
    };
    let mut next = word(&syn, 38).wrapping_add(1);
    let (header, frame) = tcp(1000, next, 0x12, &[2, 4, 5, 0xb4], &[]);
    bench.send(&header, &frame);
    // The query: larger than any packet of the network, with its size of segments beside it.
    let mut query = 0;
    let mut largest = 0;
    while query < 12_000 {
        let (header, frame) = bench.next(|frame| is_ip(frame, 6) && frame[47] & 0x12 == 0x10);
        let start = 34 + usize::from(frame[46] >> 4) * 4;
        if frame.len() > 1514 {
            let segmentation = header.segmentation.expect("a frame this large stands for several");
            assert_eq!((segmentation.kind, segmentation.size), (SegmentKind::Tcp4, 1460));
        }
        largest = largest.max(frame.len());
        query += frame.len() - start;
        next = word(&frame, 38).wrapping_add((frame.len() - start) as u32);
    }
    assert!(largest > 1514, "{largest}");
    // The answer, as one frame.
    let (mut header, frame) = tcp(1001, next, 0x18, &[], &vec![b'a'; 20_000]);
    header.segmentation =
        Some(Segmentation { kind: SegmentKind::Tcp4, size: 1460, header_len: 54, ecn: false });
    bench.send(&header, &frame);
    client.join().unwrap();
}

#[test]
fn several_queues_share_one_device() {
    if !in_namespace("tap::tests::several_queues_share_one_device") {
        return;
    }
    let mut bench = Bench::new("tap0", 4);
    assert_eq!(bench.port.queue_pairs(), 4);
    let mac = bench.resolve();
    let socket = UdpSocket::bind((HOST, 0)).unwrap();
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    for pair in 0..4 {
        let payload = [b'0' + pair as u8];
        let (header, mut frame) = udp_to(mac, socket.local_addr().unwrap().port(), &payload);
        let slice = VolatileSlice::from(&mut frame[..]);
        assert_eq!(bench.port.send(pair, &header, &[slice]).unwrap(), Sent::Done);
        let mut buffer = [0; 10];
        assert_eq!(socket.recv_from(&mut buffer).unwrap().0, 1);
        assert_eq!(buffer[0], payload[0]);
        socket.send_to(&payload, (GUEST, 7777 + pair)).unwrap();
        assert_eq!(bench.next(|frame| is_ip(frame, 17)).1[42], payload[0], "on whichever pair");
    }
    assert!(matches!(bench.port.receive(4, &mut |_, _| Taken::Yes), Err(PortError::Host { .. })));
}

#[test]
fn a_frame_that_is_not_taken_is_kept_and_the_loop_does_not_spin() {
    if !in_namespace("tap::tests::a_frame_that_is_not_taken_is_kept_and_the_loop_does_not_spin") {
        return;
    }
    let mut bench = Bench::new("tap0", 1);
    bench.resolve();
    let socket = UdpSocket::bind((HOST, 0)).unwrap();
    for payload in [b"one", b"two"] {
        socket.send_to(payload, (GUEST, 7777)).unwrap();
    }
    let deadline = Instant::now() + PATIENCE;
    let kept = |bench: &Bench| {
        let mut payload = Vec::new();
        let received = bench.port.receive(0, &mut |_, frame| {
            payload = frame[42..].to_vec();
            Taken::NotNow
        });
        (received.unwrap(), payload)
    };
    while kept(&bench).0 != Received::Kept {
        assert!(Instant::now() < deadline);
    }
    for _ in 0..2 {
        assert_eq!(kept(&bench), (Received::Kept, b"one".to_vec()));
        while bench.events.run_once(Some(Duration::ZERO)).unwrap() > 0 {}
    }
    assert!(bench.inbox.try_iter().count() <= 2);
    assert_eq!(&bench.next(|frame| is_ip(frame, 17)).1[42..], b"one");
    assert_eq!(&bench.next(|frame| is_ip(frame, 17)).1[42..], b"two");
}

#[test]
fn devices_that_cannot_be_used_are_named_with_what_to_do() {
    if !in_namespace("tap::tests::devices_that_cannot_be_used_are_named_with_what_to_do") {
        return;
    }
    let error = |result: Result<TapPort, TapError>| result.err().expect("an error").to_string();
    assert!(ip("tuntap add dev single mode tap"));
    assert!(error(TapPort::open_tap("single", 2)).starts_with("tap device single cannot have 2 queue pairs"));
    let first = TapPort::open_tap("single", 1).unwrap();
    assert_eq!(
        error(TapPort::open_tap("single", 1)),
        "tap device single is in use; each machine needs a device of its own"
    );
    drop(first);
    TapPort::open_tap("single", 1).expect("free again");
    assert!(ip("tuntap add dev multi mode tap multi_queue"));
    assert_eq!(TapPort::open_tap("multi", 1).expect("one of several").queue_pairs(), 1);
    assert_eq!(TapPort::open_tap("multi", 3).unwrap().queue_pairs(), 3);
    assert!(error(TapPort::open_tap("lo", 1)).starts_with("network interface lo is not a tap device"));
    assert!(error(TapPort::open_macvtap("none0", 1)).starts_with("there is no macvtap device none0"));
    // Deleted under the port's feet.
    let port = TapPort::open_tap("single", 1).unwrap();
    assert!(ip("link del single"));
    let gone = port.receive(0, &mut |_, _| Taken::Yes).unwrap_err();
    assert_eq!(gone.to_string(), "tap device single is gone: the interface was deleted");
}

#[test]
fn a_user_without_rights_is_told_what_to_ask_for() {
    const USER: &str = "ATOLL_TEST_WITHOUT_RIGHTS";
    if std::env::var_os(USER).is_some() {
        let error = TapPort::open_tap("tap0", 1).err().expect("an error");
        match &error {
            // Depends on who may open the node; some hosts let everybody.
            TapError::Node { path, .. } => assert_eq!(path, TUN_DEVICE),
            TapError::Missing { .. } => {
                assert!(error.to_string().contains("ip tuntap add dev tap0 mode tap"))
            }
            other => panic!("{other}"),
        }
        return;
    }
    if !rustix::process::geteuid().is_root() || !Path::new(TUN_DEVICE).exists() {
        println!("skipped: only root can become a user without rights, and the host must have {TUN_DEVICE}");
        return;
    }
    let mut command = Command::new("setpriv");
    command.args(["--reuid", "65534", "--regid", "65534", "--clear-groups", "--bounding-set=-all"]);
    command.arg(std::env::current_exe().unwrap());
    command.args(["--exact", "tap::tests::a_user_without_rights_is_told_what_to_ask_for"]).env(USER, "1");
    match command.output() {
        Ok(output) if output.status.code() == Some(126 | 127) => {
            println!("skipped: nobody may run this test")
        }
        Ok(output) => assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stdout)),
        Err(error) => println!("skipped: no setpriv: {error}"),
    }
}

#[test]
fn names_and_numbers_that_cannot_be_are_refused_before_anything_is_opened() {
    let error = |name, pairs| TapPort::open_tap(name, pairs).err().expect("an error");
    assert!(matches!(error("tap%d", 1), TapError::Name(_)));
    assert!(matches!(error("", 1), TapError::Name(_)));
    assert!(matches!(error("tap0", 0), TapError::Pairs(0)));
    assert!(matches!(error("tap0", 257), TapError::Pairs(257)));
    let node = TapPort::open_macvtap_at(Path::new("/dev/tap999999999"), "mac0", 1).err().expect("an error");
    assert!(node.to_string().starts_with("there is no macvtap device mac0"), "{node}");
}

#[test]
fn what_the_kernel_says_about_rights_becomes_what_to_do() {
    let denied = || io::Error::from(Errno::PERM);
    let missing = attach_error("tap7", 4, false, denied()).to_string();
    assert!(missing.starts_with("there is no tap device tap7, and creating one needs root; have root run: "));
    assert!(missing.ends_with(" multi_queue"), "{missing}");
    let owned = attach_error("tap7", 1, true, denied()).to_string();
    assert!(owned.starts_with("tap device tap7 does not belong to this user"), "{owned}");
    let other = attach_error("tap7", 1, false, io::Error::from(Errno::NOMEM)).to_string();
    assert!(other.starts_with("cannot use tap device tap7: attaching to it: "), "{other}");
}

#[test]
fn a_macvtap_device_takes_and_gives_frames() {
    if !in_namespace("tap::tests::a_macvtap_device_takes_and_gives_frames") {
        return;
    }
    // Two stations on one wire, and a macvtap device on one end of it.
    let made = ip("link add wire0 type veth peer name wire1")
        && ip("link add link wire0 name mac0 address 52:54:00:00:00:02 type macvtap mode bridge");
    if !made {
        println!("skipped: the kernel makes no veth or macvtap devices");
        return;
    }
    for interface in ["wire0", "wire1", "mac0"] {
        assert!(ip(&format!("link set {interface} up")));
    }
    assert!(ip("addr add 10.9.0.1/24 dev wire1"));
    let port = match TapPort::open_macvtap("mac0", 1) {
        Ok(port) => port,
        Err(error) => {
            println!("skipped: {error} (its device node is not in this namespace's /dev)");
            return;
        }
    };
    assert_eq!(port.address(), Some(MacAddress(GUEST_MAC)));
    assert_eq!(port.name(), "macvtap device mac0");
    let events = EventLoop::new().unwrap();
    let (sender, inbox) = channel();
    port.watch(&events.handle(), Arc::new(move |event| sender.send(event).unwrap())).unwrap();
    let mut bench = Bench { port, events, inbox };
    bench.resolve();
}
