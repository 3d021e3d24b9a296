//! A process enters the jail and tries to get out.
//!
//! The program starts itself: the test is one process, what it locks in another with one thread, which prints what
//! became of each attempt. As root it is also run by a user who is not root.

use std::fs;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream, UdpSocket};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixListener, UnixStream};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};

use atoll_foundation::jail::{self, JailOptions, Layer, Network, Process};
use rustix::io::Errno;
use rustix::process::{Pid, Signal};

fn main() {
    let arguments: Vec<String> = std::env::args().collect();
    match arguments.get(1).map(String::as_str) {
        Some("inside") => inside(&arguments[2], &arguments[3], &arguments[4]),
        Some("without-network") => without_network(&arguments[2]),
        // The harness asks for the list of tests; there is one.
        Some("--list") => println!("what_is_locked_in_stays_in: test"),
        _ => outside(),
    }
}

/// The host, with what an attacker would like to have.
fn outside() {
    let directory = tempfile::tempdir().unwrap();
    let secret = directory.path().join("secret");
    fs::write(&secret, "secret").unwrap();
    let named = directory.path().join("socket");
    let _named = UnixListener::bind(&named).unwrap();
    let name = format!("atoll-jail-test-{}", std::process::id());
    let _abstract = UnixListener::bind_addr(&SocketAddr::from_abstract_name(&name).unwrap()).unwrap();
    let program = directory.path().join("jail");
    fs::copy(std::env::current_exe().unwrap(), &program).unwrap();
    for path in [directory.path(), &secret, &named] {
        let mode = std::os::unix::fs::PermissionsExt::from_mode(0o777);
        fs::set_permissions(path, mode).unwrap();
    }
    let server = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = server.local_addr().unwrap().port().to_string();
    std::thread::spawn(move || {
        for stream in server.incoming() {
            let _ = stream.and_then(|mut stream| stream.write_all(b"hello"));
        }
    });
    let users: &[Option<u32>] =
        if rustix::process::geteuid().is_root() { &[None, Some(1234)] } else { &[None] };
    for user in users {
        let said = run(&program, *user, &["inside", secret.to_str().unwrap(), &name, &port]);
        println!("as {}:\n{said}", user.map_or("this user".to_owned(), |id| format!("user {id}")));
        check_inside(&said);
        let said = run(&program, *user, &["without-network", &port]);
        println!("{said}");
        check_without_network(&said);
    }
    println!("test what_is_locked_in_stays_in ... ok");
}

/// What the program says. It waits for the end of its input, so that it can be looked at from outside.
fn run(program: &Path, user: Option<u32>, arguments: &[&str]) -> String {
    let mut command = Command::new(program);
    command.args(arguments).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::inherit());
    if let Some(user) = user {
        command.uid(user).gid(user);
    }
    let mut child = command.spawn().unwrap();
    let mut said = String::new();
    for line in BufReader::new(child.stdout.take().unwrap()).lines().map_while(Result::ok) {
        said.push_str(&line);
        said.push('\n');
        if line == "DONE" {
            break;
        }
    }
    if arguments[0] == "inside" && rustix::process::geteuid().is_root() {
        look_from_outside(child.id(), &said);
    }
    drop(child.stdin.take());
    let status = child.wait().unwrap();
    assert!(status.success(), "{status} after:\n{said}");
    said
}

/// The layers one by one: from inside, one refusal hides the others.
fn look_from_outside(pid: u32, said: &str) {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let field = |name: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
        line.unwrap_or_default().split_whitespace().next().unwrap_or_default().to_owned()
    };
    for set in ["CapInh", "CapPrm", "CapEff", "CapAmb"] {
        assert_eq!(u64::from_str_radix(&field(set), 16), Ok(0), "{set}");
    }
    assert_eq!(
        (field("NoNewPrivs"), field("Seccomp"), field("Groups")),
        ("1".into(), "2".into(), String::new())
    );
    assert_ne!(field("Uid"), "0");
    let own = |name: &str| fs::read_link(format!("/proc/self/ns/{name}")).unwrap();
    let theirs = |name: &str| fs::read_link(format!("/proc/{pid}/ns/{name}")).unwrap();
    assert_eq!(own("net"), theirs("net"), "the network is what it is for");
    let namespaces = [(Layer::UserNamespace, "user"), (Layer::EmptyRoot, "mnt"), (Layer::Namespaces, "ipc")];
    for (layer, name) in namespaces {
        assert_eq!(said.contains(&format!("HOLDS {layer}")), own(name) != theirs(name), "{layer}");
    }
    if said.contains(&format!("HOLDS {}", Layer::EmptyRoot)) {
        let entries = fs::read_dir(format!("/proc/{pid}/root/")).unwrap();
        assert_eq!(entries.count(), 0, "the root folder is not empty");
        assert!(fs::write(format!("/proc/{pid}/root/new"), "").is_err(), "the root folder can be written");
        let mounts = fs::read_to_string(format!("/proc/{pid}/mounts")).unwrap();
        assert_eq!(mounts.lines().count(), 1, "{mounts}");
    }
}

fn check_inside(said: &str) {
    assert!(said.contains("DONE"), "it did not get to its end");
    let escaped: Vec<&str> = said.lines().filter(|line| line.starts_with("ESCAPED")).collect();
    assert!(escaped.is_empty(), "{escaped:?}");
    let broken: Vec<&str> = said.lines().filter(|line| line.starts_with("BROKEN")).collect();
    assert!(broken.is_empty(), "{broken:?}");
    // What needs nothing of the host must be there on any.
    for layer in
        [Layer::Capabilities, Layer::NoNewPrivileges, Layer::Unreadable, Layer::Limits, Layer::SystemCalls]
    {
        assert!(said.contains(&format!("HOLDS {layer}")), "{layer} is missing");
    }
    assert!(said.matches("REFUSED").count() >= 15, "attempts are missing");
}

/// An attempt that must fail.
fn refused<T>(what: &str, result: io::Result<T>) {
    match result {
        Ok(_) => println!("ESCAPED {what}"),
        Err(error) => println!("REFUSED {what}: {error}"),
    }
}

/// Something that the process needs.
fn works<T>(what: &str, result: io::Result<T>) -> Option<T> {
    match result {
        Ok(value) => {
            println!("WORKS {what}");
            Some(value)
        }
        Err(error) => {
            println!("BROKEN {what}: {error}");
            None
        }
    }
}

fn inside(secret: &str, abstract_name: &str, port: &str) {
    let parent = rustix::process::getppid().unwrap();
    // What is open before stays usable.
    let mut before = TcpStream::connect(format!("127.0.0.1:{port}")).unwrap();
    let folder = fs::File::open("/").unwrap();
    drop(folder);
    let options = JailOptions {
        open_files: Some(200),
        address_space: Some(1 << 30),
        ..JailOptions::new(Process::NetworkHelper)
    };
    let report = jail::enter(&options).unwrap();
    for layer in report.holding() {
        println!("HOLDS {layer}");
    }
    for (layer, why) in report.missing() {
        println!("MISSING {layer}: {why}");
    }
    println!("{report}");

    files(secret);
    sockets(secret, abstract_name);
    arguments();
    processes(parent);

    let mut text = [0; 5];
    works("a socket from before", before.read_exact(&mut text));
    let server = works("listening", TcpListener::bind("127.0.0.1:0"));
    if let Some(server) = server {
        let client = works("connecting", TcpStream::connect(server.local_addr().unwrap()));
        let accepted = works("accepting", server.accept());
        if let (Some(mut client), Some((mut accepted, _))) = (client, accepted) {
            works("sending", accepted.write_all(b"x"));
            works("receiving", client.read_exact(&mut [0]));
        }
    }
    let udp = works("a datagram socket", UdpSocket::bind("127.0.0.1:0"));
    drop(udp);
    works("a timer", atoll_foundation::TimerFd::new());
    works("an event counter", atoll_foundation::EventFd::new());
    works("memory", Ok(vec![1u8; 10 << 20]));
    let many: Vec<_> = (0..300).map_while(|_| UdpSocket::bind("127.0.0.1:0").ok()).collect();
    println!("{} {} sockets at once", if many.len() < 200 { "REFUSED" } else { "ESCAPED" }, many.len());
    done();
}

fn files(secret: &str) {
    refused("reading a file", fs::read(secret));
    refused("writing a file", fs::write(secret, "changed"));
    refused("making a file", fs::write(format!("{secret}-new"), ""));
    refused("making a file in /", fs::write("/new", ""));
    refused("removing a file", fs::remove_file(secret));
    refused("listing /", fs::read_dir("/"));
    refused("looking at itself", fs::read("/proc/self/mem"));
    refused("looking at the parent", fs::read("/proc/1/environ"));
    refused("a device", fs::File::open("/dev/kvm"));
    refused("a folder", rustix::process::chdir(secret.trim_end_matches("/secret")).map_err(io::Error::from));
}

fn sockets(secret: &str, abstract_name: &str) {
    refused("a named socket", UnixStream::connect(secret.replace("secret", "socket")));
    let address = SocketAddr::from_abstract_name(abstract_name).unwrap();
    refused("an abstract socket", UnixStream::connect_addr(&address));
    let kinds =
        [("packets", rustix::net::AddressFamily::PACKET), ("netlink", rustix::net::AddressFamily::NETLINK)];
    for (what, family) in kinds {
        let socket = rustix::net::socket(family, rustix::net::SocketType::RAW, None);
        refused(what, socket.map_err(io::Error::from));
    }
}

/// Calls that are listed, with arguments that are not. EPERM tells the list's refusal from the kernel's own.
fn arguments() {
    use rustix::net::{AddressFamily, SocketType, ipproto, sockopt};
    let listed = |result: Result<(), Errno>| match result {
        Err(Errno::PERM) => Err(io::Error::from(Errno::PERM)),
        _ => Ok(()),
    };
    let make = |kind, protocol| rustix::net::socket(AddressFamily::INET, kind, protocol).map(drop);
    // SOCK_PACKET (10): of the internet family, and yet a socket of packets.
    for kind in [SocketType::RAW, SocketType::SEQPACKET, SocketType::RDM, SocketType::from_raw(10)] {
        refused(&format!("a socket of {kind:?}"), listed(make(kind, None)));
    }
    refused("raw ICMP", listed(make(SocketType::RAW, Some(ipproto::ICMP))));
    refused("TCP over datagrams", listed(make(SocketType::DGRAM, Some(ipproto::TCP))));
    let udp = UdpSocket::bind("127.0.0.1:0").unwrap();
    refused("sending to everybody", listed(sockopt::set_socket_broadcast(&udp, true)));
    refused("a group", udp.join_multicast_v4(&"224.0.0.251".parse().unwrap(), &"127.0.0.1".parse().unwrap()));
    refused("a filter of the kernel's", listed(sockopt::set_tcp_congestion(&udp, "reno")));
    // Standard error's file is also the parent's, and its terminal's.
    let stderr = io::stderr();
    let flags = rustix::fs::fcntl_getfl(&stderr).unwrap();
    refused("the flags of standard error", rustix::fs::fcntl_setfl(&stderr, flags).map_err(io::Error::from));
    refused("waiting on standard error", rustix::io::ioctl_fionbio(&stderr, false).map_err(io::Error::from));
}

fn processes(parent: Pid) {
    refused("a program", Command::new("/bin/true").status());
    refused("a thread", std::thread::Builder::new().spawn(|| ()));
    refused(
        "a signal to the parent",
        rustix::process::kill_process(parent, Signal::CONT).map_err(io::Error::from),
    );
    let test = rustix::process::test_kill_process(parent);
    refused("asking for the parent", test.map_err(io::Error::from));
    let handle = rustix::process::pidfd_open(parent, rustix::process::PidfdFlags::empty());
    refused("a handle on the parent", handle.map_err(io::Error::from));
    let limits = rustix::process::prlimit(
        Some(parent),
        rustix::process::Resource::Core,
        rustix::process::Rlimit { current: Some(0), maximum: Some(0) },
    );
    refused("the parent's limits", limits.map_err(io::Error::from));
}

fn without_network(port: &str) {
    let mut before = TcpStream::connect(format!("127.0.0.1:{port}")).unwrap();
    let user = rustix::process::geteuid();
    let network = jail::leave_network();
    println!("{network}");
    if network == Network::Left {
        refused("the host's loopback", TcpStream::connect(format!("127.0.0.1:{port}")));
        let mut interfaces = fs::read_to_string("/proc/self/net/dev").unwrap();
        interfaces.retain(|c| c == ':' || c == '\n' || c.is_ascii_alphabetic());
        println!("{} interfaces", interfaces.lines().filter(|line| line.contains(':')).count());
        works("a socket from before", before.read_exact(&mut [0; 5]));
        works(
            "the same user",
            if rustix::process::geteuid() == user { Ok(()) } else { Err(io::Error::other("other")) },
        );
        works("files", fs::read("/proc/self/status"));
        works("threads", std::thread::Builder::new().spawn(|| ()).map(|thread| thread.join().unwrap()));
        works("programs", Command::new("/bin/true").status());
    }
    done();
}

/// Says so, and waits for whoever looks.
fn done() {
    println!("DONE");
    let _ = io::stdin().read(&mut [0]);
}

fn check_without_network(said: &str) {
    assert!(said.contains("DONE"));
    if said.contains("keeps the host's network") {
        println!("skipped: this host gives no network namespace");
        return;
    }
    assert!(!said.contains("ESCAPED") && !said.contains("BROKEN"), "{said}");
    assert!(said.contains("REFUSED the host's loopback"));
}
