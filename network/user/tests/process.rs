//! A network's process from start to end, with a TCP/IP stack of another hand as its guest.
//!
//! The process is this test program itself: [`network_process`] is what it runs.

use std::collections::VecDeque;
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{IpAddr, Ipv4Addr, TcpListener, TcpStream, UdpSocket};
use std::process::Command;
use std::time::{Duration, Instant as Clock};

use atoll_foundation::jail::{self, JailOptions, Layer, Process};
use atoll_network::ring::RingPort;
use atoll_network::{FrameHeader, Port, Received, Taken};
use atoll_network_user::process::run_on_stdin;
use atoll_network_user::{Forward, Protocol, UserNet, UserNetConfig, UserNetError};
use smoltcp::iface::{Config, Interface, SocketHandle, SocketSet};
use smoltcp::phy::{Device, DeviceCapabilities, Medium, RxToken, TxToken};
use smoltcp::socket::{dhcpv4, tcp, udp};
use smoltcp::time::Instant;
use smoltcp::wire::{EthernetAddress, HardwareAddress, IpAddress, IpCidr, IpEndpoint};
use vm_memory::VolatileSlice;

const OWNER: &str = "ATOLL_TEST_NETWORK_OWNER";
const VARIABLE: &str = "ATOLL_TEST_NETWORK_PROCESS";
const MAC: [u8; 6] = [0x52, 0x54, 0, 0x12, 0x34, 0x56];

/// Not a test but the process that the others start.
#[test]
fn network_process() {
    if std::env::var_os(VARIABLE).is_some() {
        // As locked in as the program locks it in.
        let code = run_on_stdin(|_| {
            let report = jail::enter(&JailOptions::new(Process::NetworkHelper));
            report.map(|report| assert!(report.holds(Layer::SystemCalls))).map_err(|error| error.to_string())
        });
        let failed = format!("{code:?}") != format!("{:?}", std::process::ExitCode::SUCCESS);
        std::process::exit(failed.into());
    }
}

fn start(config: UserNetConfig) -> Result<(UserNet, RingPort), UserNetError> {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", "network_process", "--nocapture"]).env(VARIABLE, "1");
    UserNet::start_command(command, config)
}

/// The machine's end of the ring as a device of the guest's stack.
struct RingDevice {
    port: RingPort,
    received: VecDeque<Vec<u8>>,
}

struct Frame(Vec<u8>);
struct Room<'a>(&'a RingPort);

impl RxToken for Frame {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, f: F) -> R {
        f(&self.0)
    }
}

impl TxToken for Room<'_> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, len: usize, f: F) -> R {
        let mut bytes = vec![0; len];
        let result = f(&mut bytes);
        let frame = [VolatileSlice::from(&mut bytes[..])];
        self.0.send(0, &FrameHeader::default(), &frame).unwrap();
        self.0.flush(0);
        result
    }
}

impl Device for RingDevice {
    type RxToken<'a> = Frame;
    type TxToken<'a> = Room<'a>;

    fn receive(&mut self, _: Instant) -> Option<(Frame, Room<'_>)> {
        let received = &mut self.received;
        while let Received::Frame = self
            .port
            .receive(0, &mut |_, frame| {
                received.push_back(frame.to_vec());
                Taken::Yes
            })
            .unwrap()
        {}
        Some((Frame(self.received.pop_front()?), Room(&self.port)))
    }

    fn transmit(&mut self, _: Instant) -> Option<Room<'_>> {
        Some(Room(&self.port))
    }

    fn capabilities(&self) -> DeviceCapabilities {
        let mut capabilities = DeviceCapabilities::default();
        capabilities.medium = Medium::Ethernet;
        capabilities.max_transmission_unit = 1514;
        capabilities
    }
}

struct Guest {
    device: RingDevice,
    interface: Interface,
    sockets: SocketSet<'static>,
    started: Clock,
}

impl Guest {
    fn new(port: RingPort) -> Self {
        let mut device = RingDevice { port, received: VecDeque::new() };
        let config = Config::new(HardwareAddress::Ethernet(EthernetAddress(MAC)));
        let interface = Interface::new(config, &mut device, Instant::ZERO);
        Self { device, interface, sockets: SocketSet::new(Vec::new()), started: Clock::now() }
    }

    /// Runs the stack until `done` gives something.
    fn until<R>(&mut self, what: &str, mut done: impl FnMut(&mut Self) -> Option<R>) -> R {
        let deadline = Clock::now() + Duration::from_secs(20);
        loop {
            let now = Instant::from_micros(self.started.elapsed().as_micros() as i64);
            self.interface.poll(now, &mut self.device, &mut self.sockets);
            if let Some(result) = done(self) {
                return result;
            }
            assert!(Clock::now() < deadline, "{what} did not happen");
            std::thread::sleep(Duration::from_micros(100));
        }
    }

    /// Asks for an address and takes it.
    fn configure(&mut self) {
        let dhcp = self.sockets.add(dhcpv4::Socket::new());
        let config =
            self.until("DHCP", |guest| match guest.sockets.get_mut::<dhcpv4::Socket<'_>>(dhcp).poll() {
                Some(dhcpv4::Event::Configured(config)) => {
                    Some((config.address, config.router, config.dns_servers.to_vec()))
                }
                _ => None,
            });
        assert_eq!(config.0.to_string(), "10.0.2.15/24");
        assert_eq!(config.1, Some(Ipv4Addr::new(10, 0, 2, 2)));
        assert_eq!(config.2, [Ipv4Addr::new(10, 0, 2, 3)]);
        self.interface.update_ip_addrs(|addresses| addresses.push(IpCidr::Ipv4(config.0)).unwrap());
        self.interface.routes_mut().add_default_ipv4_route(config.1.unwrap()).unwrap();
    }

    fn tcp(&mut self) -> SocketHandle {
        let buffer = || tcp::SocketBuffer::new(vec![0; 65_536]);
        self.sockets.add(tcp::Socket::new(buffer(), buffer()))
    }
}

fn config() -> UserNetConfig {
    UserNetConfig { guest_mac: Some(MAC), ..UserNetConfig::default() }
}

#[test]
fn a_guest_configures_itself_and_speaks_udp_and_tcp() {
    let config = UserNetConfig { host_loopback: true, ..config() };
    let (network, port) = start(config).unwrap();
    assert_eq!(port.mtu(), Some(1500));
    let mut guest = Guest::new(port);
    guest.configure();

    let server = UdpSocket::bind("127.0.0.1:0").unwrap();
    let remote = IpEndpoint::new(IpAddress::v4(10, 0, 2, 2), server.local_addr().unwrap().port());
    let buffer = || udp::PacketBuffer::new(vec![udp::PacketMetadata::EMPTY; 8], vec![0; 4096]);
    let handle = guest.sockets.add(udp::Socket::new(buffer(), buffer()));
    let socket = guest.sockets.get_mut::<udp::Socket<'_>>(handle);
    socket.bind(9999).unwrap();
    socket.send_slice(b"ping", remote).unwrap();
    server.set_nonblocking(true).unwrap();
    let from = guest.until("a datagram to the host", |_| {
        let mut bytes = [0; 64];
        server.recv_from(&mut bytes).ok().map(|(length, from)| {
            assert_eq!(&bytes[..length], b"ping");
            from
        })
    });
    server.send_to(b"pong", from).unwrap();
    guest.until("a datagram to the guest", |guest| {
        let socket = guest.sockets.get_mut::<udp::Socket<'_>>(handle);
        socket
            .recv()
            .ok()
            .map(|(bytes, metadata)| assert_eq!((bytes, metadata.endpoint), (&b"pong"[..], remote)))
    });

    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let server = std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        let mut bytes = Vec::new();
        stream.read_to_end(&mut bytes).unwrap();
        stream.write_all(&bytes).unwrap();
    });
    let handle = guest.tcp();
    let socket = guest.sockets.get_mut::<tcp::Socket<'_>>(handle);
    socket.connect(guest.interface.context(), (IpAddress::v4(10, 0, 2, 2), port), 40_000).unwrap();
    let sent: Vec<u8> = (0..300_000_u32).map(|n| (n % 253) as u8).collect();
    let (mut at, mut got) = (0, Vec::new());
    guest.until("300 kB there and back", |guest| {
        let socket = guest.sockets.get_mut::<tcp::Socket<'_>>(handle);
        if socket.can_send() && at < sent.len() {
            at += socket.send_slice(&sent[at..]).unwrap();
            if at == sent.len() {
                socket.close();
            }
        }
        while socket.can_recv() {
            let length = socket.recv(|bytes| {
                got.extend_from_slice(bytes);
                (bytes.len(), bytes.len())
            });
            length.unwrap();
        }
        (got.len() >= sent.len()).then_some(())
    });
    assert!(got == sent);
    server.join().unwrap();
    let stats = network.stats().unwrap();
    assert!(stats.dhcp_answers >= 2 && stats.udp_flows == 1, "{stats:?}");
}

#[test]
fn forwards_come_and_go_while_the_network_runs() {
    let (network, port) = start(config()).unwrap();
    let mut guest = Guest::new(port);
    guest.configure();
    let host = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let forward = Forward { protocol: Protocol::Tcp, host, guest: None, guest_port: 22 };
    assert!(TcpStream::connect(host).is_err());
    network.forward_add(forward).unwrap();
    let error = network.forward_add(forward).unwrap_err().to_string();
    assert!(error.contains("in use") && !error.contains('\n'), "{error}");
    let handle = guest.tcp();
    guest.sockets.get_mut::<tcp::Socket<'_>>(handle).listen(22).unwrap();
    let mut stream = TcpStream::connect(host).unwrap();
    stream.write_all(b"knock").unwrap();
    stream.set_nonblocking(true).unwrap();
    guest.until("a connection to the guest", |guest| {
        let socket = guest.sockets.get_mut::<tcp::Socket<'_>>(handle);
        if socket.can_recv() {
            socket.recv(|bytes| (bytes.len(), assert_eq!(bytes, b"knock"))).unwrap();
            assert_eq!(socket.remote_endpoint().unwrap().addr, IpAddress::v4(10, 0, 2, 2));
            socket.send_slice(b"SSH-2.0").unwrap();
        }
        let mut bytes = [0; 16];
        stream.read(&mut bytes).ok().map(|length| assert_eq!(&bytes[..length], b"SSH-2.0"))
    });
    network.forward_remove(forward).unwrap();
    assert!(network.forward_remove(forward).is_err());
    assert!(TcpStream::connect(host).is_err());
}

#[test]
fn a_port_in_use_stops_the_start_with_one_line() {
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let host = taken.local_addr().unwrap();
    let forward = Forward { protocol: Protocol::Tcp, host, guest: None, guest_port: 22 };
    let error = start(UserNetConfig { forwards: vec![forward], ..config() }).unwrap_err().to_string();
    assert!(error.contains(&format!("port {} on 127.0.0.1 is in use", host.port())), "{error}");
    assert!(!error.contains('\n'));
    let outside = UserNetConfig { address: Some(Ipv4Addr::new(10, 9, 9, 9)), ..config() };
    let error = start(outside).unwrap_err().to_string();
    assert!(error.contains("10.9.9.9") && !error.contains('\n'), "{error}");
}

#[test]
fn the_machine_notices_when_the_network_dies() {
    let (network, port) = start(config()).unwrap();
    assert!(port.link_up() && network.is_alive());
    let pid = rustix::process::Pid::from_raw(network.pid() as i32).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
    let deadline = Clock::now() + Duration::from_secs(10);
    while network.is_alive() || port.link_up() {
        assert!(Clock::now() < deadline);
        std::thread::sleep(Duration::from_millis(5));
    }
    let error = network.stats().unwrap_err().to_string();
    assert!(error.contains("signal 9"), "{error}");
}

#[test]
fn the_network_ends_with_its_owner() {
    let (network, _port) = start(config()).unwrap();
    let pid = rustix::process::Pid::from_raw(network.pid() as i32).unwrap();
    assert!(rustix::process::test_kill_process(pid).is_ok());
    drop(network);
    assert!(rustix::process::test_kill_process(pid).is_err(), "killed and waited for");
}

/// Not a test but the owner that [`the_network_ends_when_its_owner_is_killed`] kills.
#[test]
fn owner_process() {
    if std::env::var_os(OWNER).is_some() {
        let (network, _port) = start(config()).unwrap();
        println!("pid {}", network.pid());
        std::thread::sleep(Duration::from_secs(60));
    }
}

#[test]
fn the_network_ends_when_its_owner_is_killed() {
    let mut owner = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "owner_process", "--nocapture"])
        .env(OWNER, "1")
        .stdout(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    let lines = BufReader::new(owner.stdout.take().unwrap()).lines();
    let pid =
        lines.map_while(Result::ok).find_map(|line| Some(line.split_once("pid ")?.1.to_owned())).unwrap();
    let ended = || {
        // Ended, and perhaps not waited for by whoever inherited it.
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        stat.rsplit_once(')').is_none_or(|(_, rest)| rest.trim_start().starts_with(['Z', 'X']))
    };
    assert!(!ended());
    owner.kill().unwrap();
    owner.wait().unwrap();
    let deadline = Clock::now() + Duration::from_secs(10);
    while !ended() {
        assert!(Clock::now() < deadline);
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn resolvers_that_are_given_are_asked() {
    // Port 53 is root's on most hosts.
    let Ok(server) = UdpSocket::bind("127.0.0.66:53") else { return };
    let servers = vec![IpAddr::from([127, 0, 0, 66])];
    let (_network, port) = start(UserNetConfig { dns_servers: servers, ..config() }).unwrap();
    let mut guest = Guest::new(port);
    guest.configure();
    let buffer = || udp::PacketBuffer::new(vec![udp::PacketMetadata::EMPTY; 8], vec![0; 4096]);
    let handle = guest.sockets.add(udp::Socket::new(buffer(), buffer()));
    let socket = guest.sockets.get_mut::<udp::Socket<'_>>(handle);
    socket.bind(1234).unwrap();
    let query = b"\x12\x34\x01\0\0\x01\0\0\0\0\0\0\x01a\0\0\x01\0\x01";
    socket.send_slice(query, (IpAddress::v4(10, 0, 2, 3), 53)).unwrap();
    server.set_nonblocking(true).unwrap();
    guest.until("a query", |_| {
        let mut bytes = [0; 64];
        server.recv_from(&mut bytes).ok().map(|(length, from)| {
            assert_eq!(bytes[2..length], query[2..]);
            assert_ne!(&bytes[..2], b"\x12\x34");
            bytes[2] |= 0x80;
            server.send_to(&bytes[..length], from).unwrap();
        })
    });
    guest.until("an answer", |guest| {
        let socket = guest.sockets.get_mut::<udp::Socket<'_>>(handle);
        socket.recv().ok().map(|(bytes, _)| assert_eq!(bytes[..2], query[..2]))
    });
}
