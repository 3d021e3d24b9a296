//! Linux' own network stack as a guest: a tap device in a network namespace on one side, a network's process on the
//! other. What it takes (root, iproute2, a tun device, busybox, bash) not every host has; without, it says so.

use std::io::{Read as _, Write as _};
use std::net::{Ipv4Addr, TcpListener, UdpSocket};
use std::process::{Command, Output};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use atoll_foundation::jail::{self, JailOptions, Process};
use atoll_network::ring::RingPort;
use atoll_network::tap::TapPort;
use atoll_network::{Port, Received, Sent, Taken};
use atoll_network_user::process::run_on_stdin;
use atoll_network_user::{UserNet, UserNetConfig};
use vm_memory::VolatileSlice;

const VARIABLE: &str = "ATOLL_TEST_NETWORK_PROCESS";

/// Not a test but the process that the others start.
#[test]
fn network_process() {
    if std::env::var_os(VARIABLE).is_some() {
        run_on_stdin(|_| match jail::enter(&JailOptions::new(Process::NetworkHelper)) {
            Ok(_) => Ok(()),
            Err(error) => Err(error.to_string()),
        });
        std::process::exit(0);
    }
}

/// A namespace with an interface that leads to a network.
struct Guest {
    name: String,
    network: UserNet,
    stop: Arc<AtomicBool>,
    pump: Option<std::thread::JoinHandle<()>>,
}

fn run(program: &str, arguments: &[&str]) -> Option<Output> {
    Command::new(program).args(arguments).output().ok()
}

/// Carries all frames of one port to the other; says whether there were any.
fn carry(from: &dyn Port, to: &dyn Port) -> bool {
    let mut any = false;
    loop {
        let mut full = false;
        let received = from.receive(0, &mut |header, frame| {
            let mut frame = frame.to_vec();
            let slices = [VolatileSlice::from(&mut frame[..])];
            match to.send(0, header, &slices) {
                Ok(Sent::Full) => {
                    full = true;
                    Taken::NotNow
                }
                _ => Taken::Yes,
            }
        });
        match received {
            Ok(Received::Frame) => any = true,
            _ => break,
        }
        if full {
            break;
        }
    }
    to.flush(0);
    any
}

impl Guest {
    fn new(test: &str, config: UserNetConfig) -> Option<Self> {
        let name = format!("al{}{}", test, std::process::id());
        let made = run("ip", &["netns", "add", &name]).is_some_and(|output| output.status.success());
        let tap = TapPort::open_tap(&name, 1);
        let Ok(tap) = tap else {
            run("ip", &["netns", "delete", &name]);
            eprintln!("{test}: this host lets this process make no tap device; not run");
            return None;
        };
        let moved = made && run("ip", &["link", "set", &name, "netns", &name])?.status.success();
        if !moved || run("busybox", &["true"]).is_none() {
            run("ip", &["netns", "delete", &name]);
            eprintln!("{test}: this host has no namespaces or no busybox; not run");
            return None;
        }
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.args(["--exact", "network_process", "--nocapture"]).env(VARIABLE, "1");
        let (network, ring) = UserNet::start_command(command, config).unwrap();
        let stop = Arc::new(AtomicBool::new(false));
        let pump = pump(tap, ring, stop.clone());
        let guest = Self { name, network, stop, pump: Some(pump) };
        guest.sh("sysctl -q -w net.ipv6.conf.default.accept_dad=0 || true");
        guest.sh("ip link set lo up; ip link set $DEV up");
        guest.sh(
            "printf '#!/bin/sh\n[ \"$1\" = bound ] || exit 0\nip address add $ip/$mask dev $interface\n\
             ip route add default via $router\nip link set $interface mtu $mtu\n' > /tmp/$DEV.sh
             chmod +x /tmp/$DEV.sh; busybox udhcpc -q -n -f -O mtu -i $DEV -s /tmp/$DEV.sh; rm /tmp/$DEV.sh",
        );
        Some(guest)
    }

    /// What a shell command in the namespace prints.
    fn sh(&self, script: &str) -> String {
        let output = Command::new("ip")
            .args(["netns", "exec", &self.name, "sh", "-c", script])
            .env("DEV", &self.name)
            .output()
            .unwrap();
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        eprint!("{}", text(&output.stderr));
        text(&output.stdout)
    }
}

fn pump(tap: TapPort, ring: RingPort, stop: Arc<AtomicBool>) -> std::thread::JoinHandle<()> {
    let to_ring = tap.receive_offloads().and(ring.send_offloads());
    let to_tap = ring.receive_offloads().and(tap.send_offloads());
    tap.set_receive_offloads(to_ring).unwrap();
    ring.set_receive_offloads(to_tap).unwrap();
    std::thread::spawn(move || {
        while !stop.load(Ordering::Relaxed) {
            let sent = carry(&tap, &ring);
            if !carry(&ring, &tap) && !sent {
                std::thread::sleep(Duration::from_micros(50));
            }
        }
    })
}

impl Drop for Guest {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(pump) = self.pump.take() {
            let _ = pump.join();
        }
        run("ip", &["netns", "delete", &self.name]);
    }
}

#[test]
fn linux_configures_itself_by_dhcp_and_router_advertisement() {
    let Some(guest) = Guest::new("a", UserNetConfig::default()) else { return };
    let v4 = guest.sh("ip -4 address show dev $DEV; ip route");
    assert!(v4.contains("10.0.2.15/24") && v4.contains("default via 10.0.2.2"), "{v4}");
    let deadline = Instant::now() + Duration::from_secs(20);
    loop {
        let v6 = guest.sh("ip -6 address show dev $DEV; ip -6 route");
        if v6.contains("fd61:746f:6c6c:") && v6.contains("default via fe80::2") {
            break;
        }
        assert!(Instant::now() < deadline, "{v6} {:?}", guest.network.stats());
        std::thread::sleep(Duration::from_millis(100));
    }
    for gateway in ["10.0.2.2", "10.0.2.3", "fd61:746f:6c6c::2", "fd61:746f:6c6c::3"] {
        let ping = guest.sh(&format!("ping -c 2 -i 0.2 -W 5 -s 3000 {gateway}"));
        assert!(ping.contains(" 0% packet loss"), "{ping}");
    }
    let refused = guest.sh("ping -c 1 -W 5 169.254.169.254");
    assert!(refused.contains("Packet filtered"), "{refused}");
}

#[test]
fn linux_carries_streams_and_large_datagrams_with_offloads() {
    for mtu in [1500, 65_520] {
        let config = UserNetConfig { host_loopback: true, mtu: Some(mtu), ..UserNetConfig::default() };
        let Some(guest) = Guest::new(if mtu == 1500 { "b" } else { "c" }, config) else { return };
        assert!(guest.sh("cat /sys/class/net/$DEV/mtu").trim() == mtu.to_string());
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let port = listener.local_addr().unwrap().port();
        const BYTES: usize = 64 << 20;
        let server = std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let block: Vec<u8> = (0..1 << 20).map(|n: u32| (n % 251) as u8).collect();
            for _ in 0..BYTES >> 20 {
                stream.write_all(&block).unwrap();
            }
            stream.shutdown(std::net::Shutdown::Write).unwrap();
            let mut sum = Vec::new();
            stream.read_to_end(&mut sum).unwrap();
        });
        let start = Instant::now();
        let count = guest.sh(&format!("busybox nc 10.0.2.2 {port} < /dev/null | wc -c"));
        eprintln!("mtu {mtu}: {BYTES} bytes to the guest in {:?}", start.elapsed());
        assert_eq!(count.trim(), BYTES.to_string());
        server.join().unwrap();
        let frames = guest.network.stats().unwrap().frames_to_guest;
        assert!(frames < BYTES as u64 / 8000, "large frames: {frames}");

        let server = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        server.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        let port = server.local_addr().unwrap().port();
        // Larger than the MTU: the guest fragments, or does not need to.
        guest.sh(&format!("bash -c 'head -c 20000 /dev/zero | dd bs=20000 iflag=fullblock status=none > /dev/udp/10.0.2.2/{port}'"));
        let mut buffer = vec![0; 65_536];
        assert_eq!(server.recv(&mut buffer).unwrap(), 20_000);
    }
}
