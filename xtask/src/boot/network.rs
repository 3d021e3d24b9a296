//! Guests with a network: what they reach, what they must not reach, and how fast it is.
//!
//! Everything that guests talk to runs in this process, on the host's own addresses; nothing leaves the host.

use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, UdpSocket};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use atoll_guests::cpio::Archive;
use atoll_scenarios::servers::{self, Content, Server};

use super::machine::{Machine, Spec, Vmm};
use super::scenarios::{PROMPT, SHORT, ask, atoll_only, debian_spec, log_in};
use super::{Lane, Scenario};
use crate::guests;
use crate::process::{has, output_within};

/// The scenarios of every run.
pub(super) fn short() -> Vec<Scenario> {
    vec![
        atoll_only("network: addresses, DNS, host, forwards, IPv6", everything_that_is_asked_for),
        atoll_only("network: no host loopback, no network", nothing_that_is_not_asked_for),
        atoll_only("network: four thousand flows at once", four_thousand_flows),
    ]
}

/// The scenarios of the long lane.
pub(super) fn long() -> Vec<Scenario> {
    vec![
        atoll_only("network: Debian 12 with apt-get and ssh", debian),
        atoll_only("network: throughput beside the reference", throughput),
    ]
}

/// A name that only the test's own server knows, and where that listens.
const NAME: &str = "gateway.atoll.test";
const DNS: &str = "127.0.0.61";

/// What servers give, long enough for many segments, and never the same by chance.
fn content() -> Arc<Vec<u8>> {
    Arc::new((0..1_000_000u32).flat_map(|n| n.wrapping_mul(2_654_435_761).to_le_bytes()).collect())
}

/// MD5 as the guest's busybox prints it.
fn md5(directory: &Path, bytes: &[u8]) -> Result<String> {
    let path = directory.join("content");
    std::fs::write(&path, bytes).context("cannot write")?;
    let output = Command::new("md5sum").arg(&path).output().context("cannot run md5sum")?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    Ok(text.split_whitespace().next().unwrap_or_default().to_owned())
}

/// A port of the host's loopback that is free now.
fn free_port() -> Result<u16> {
    Ok(TcpListener::bind("127.0.0.1:0").and_then(|l| l.local_addr()).context("no free port")?.port())
}

/// An address of the host on a network, if it has one: no packet is sent to find out.
fn own_address() -> Option<IpAddr> {
    let socket = UdpSocket::bind("0.0.0.0:0").ok()?;
    socket.connect("192.0.2.1:9").ok()?;
    Some(socket.local_addr().ok()?.ip()).filter(|ip| !ip.is_loopback() && !ip.is_unspecified())
}

fn start(lane: &Lane, net: &str, log: &str) -> Result<Machine> {
    let spec = Spec { extra: vec!["--net".to_owned(), net.to_owned()], ..lane.spec(1) };
    lane.shell(&spec, log)
}

fn expect_answer(machine: &mut Machine, command: &str, wanted: &str) -> Result<()> {
    let answer = ask(machine, command)?;
    ensure!(answer == wanted, "`{command}` said {answer:?}, expected {wanted:?}");
    Ok(())
}

/// `wget` must bring what the server has. (Its own `-T` crashes in Debian 12's static busybox.)
fn fetches(machine: &mut Machine, url: &str, sum: &str) -> Result<()> {
    let started = Instant::now();
    expect_answer(machine, &format!("timeout 60 wget -q -O - '{url}' | md5sum | cut -d' ' -f1"), sum)
        .with_context(|| format!("fetching {url}"))?;
    println!("  {url}: {:.2} s", started.elapsed().as_secs_f64());
    Ok(())
}

/// The guest's address comes by DHCP, DNS answers, the host is reached where it should be, a forward leads in, and
/// all of it with IPv6.
fn everything_that_is_asked_for(lane: &Lane) -> Result<()> {
    let directory = tempfile::tempdir().context("no directory")?;
    let content = content();
    let sum = md5(directory.path(), &content)?;
    let serve = |address: &str| servers::http(address, Content::Bytes(content.clone()));
    let (loopback, loopback6) = (serve("127.0.0.1:0")?, serve("[::1]:0"));
    let stated = own_address().map(|ip| serve(&SocketAddr::new(ip, 0).to_string())).transpose()?;
    let forward = free_port()?;
    let dns = servers::dns(&format!("{DNS}:53"), NAME, Ipv4Addr::new(10, 0, 2, 2)).is_ok();
    let server = if dns { format!(",dns={DNS}") } else { String::new() };
    let net = format!("user,host-loopback,forward=tcp:{forward}:8080{server}");
    let mut machine = start(lane, &net, "network")?;

    expect_answer(&mut machine, "ip -4 -o addr show eth0 | awk '{print $4}'", "10.0.2.15/24")?;
    expect_answer(&mut machine, "ip route | sed -n 's/^default via \\([0-9.]*\\).*/\\1/p'", "10.0.2.2")?;
    expect_answer(&mut machine, "sed -n 's/^nameserver //p' /etc/resolv.conf | head -n 1", "10.0.2.3")?;
    fetches(&mut machine, &format!("http://10.0.2.2:{}/x", loopback.port()), &sum)?;
    match &stated {
        Some(server) => fetches(&mut machine, &format!("http://{}/x", server.address()), &sum)?,
        None => println!("  skipped: this host has no address but its loopback's"),
    }
    names(&mut machine, dns, loopback.port(), &sum)?;

    ask(&mut machine, "mkdir -p /srv; yes forwarded | head -c 500000 >/srv/file; httpd -p 8080 -h /srv")?;
    let address = SocketAddr::from(([127, 0, 0, 1], forward));
    let through = servers::get(address, "/file", SHORT).context("through the forward")?;
    ensure!(through.len() == 500_000 && through.starts_with(b"forwarded\n"), "the forward gave other bytes");

    let six = "ip -6 -o addr show dev eth0 scope global | grep -c -v tentative";
    wait_for(&mut machine, six, |count| count.parse::<u32>().is_ok_and(|n| n > 0)).context("IPv6")?;
    match loopback6 {
        Ok(server) => {
            fetches(&mut machine, &format!("http://[fd61:746f:6c6c::2]:{}/x", server.port()), &sum)?;
        }
        Err(error) => println!("  skipped: {error:#}"),
    }
    machine.type_line("poweroff")?;
    let status = machine.wait(SHORT)?;
    ensure!(status.code() == Some(0), "power-off ended with {status}, expected exit code 0");
    Ok(())
}

/// The network's DNS server knows what the server on the host knows.
fn names(machine: &mut Machine, has_server: bool, port: u16, sum: &str) -> Result<()> {
    if has_server {
        return fetches(machine, &format!("http://{NAME}:{port}/x"), sum);
    }
    println!("  skipped: only root may have a DNS server");
    let answer = ask(machine, "nslookup localhost 10.0.2.3 2>&1 | tr '\n' ' '")?;
    ensure!(answer.contains("10.0.2.3"), "no DNS server answers: {answer}");
    Ok(())
}

fn wait_for(machine: &mut Machine, command: &str, good: impl Fn(&str) -> bool) -> Result<String> {
    let deadline = Instant::now() + SHORT;
    loop {
        let answer = ask(machine, command)?;
        if good(&answer) {
            return Ok(answer);
        }
        ensure!(Instant::now() < deadline, "`{command}` still says {answer:?}");
        std::thread::sleep(Duration::from_millis(200));
    }
}

/// Without being asked for, the host's loopback is out of reach whatever the guest tries; with `none` there is no
/// network.
fn nothing_that_is_not_asked_for(lane: &Lane) -> Result<()> {
    let server = servers::http("127.0.0.1:0", Content::Bytes(Arc::new(b"secret".to_vec())))?;
    let server6 = servers::http("[::1]:0", Content::Bytes(Arc::new(b"secret".to_vec())));
    let mut machine = start(lane, "user", "network-closed")?;
    let ports = std::iter::once(server.port()).chain(server6.as_ref().ok().map(Server::port));
    for port in ports {
        // 127/8 and ::1 do not leave a guest by themselves: routes send them out.
        for address in [
            "10.0.2.2",
            "10.0.2.3",
            "127.0.0.2",
            "[fd61:746f:6c6c::2]",
            "[fe80::2%eth0]",
            "[::ffff:127.0.0.1]",
        ] {
            let command = format!("timeout 5 wget -q -O - 'http://{address}:{port}/' 2>&1 | grep -c secret");
            expect_answer(&mut machine, &command, "0").with_context(|| format!("{address} was asked"))?;
        }
    }
    let all = server.connections() + server6.as_ref().map_or(0, Server::connections);
    ensure!(all == 0, "{all} connections of the guest reached the host's loopback");
    // The guest's own 127.0.0.1 goes out over the wire, as a hostile guest would have it.
    let routed = "ip route del table local 127.0.0.0/8 dev lo; ip addr del 127.0.0.1/8 dev lo; \
                  ip route add 127.0.0.0/8 via 10.0.2.2; echo 1 >/proc/sys/net/ipv4/conf/eth0/route_localnet; \
                  echo 1 >/proc/sys/net/ipv4/conf/all/route_localnet";
    ask(&mut machine, &format!("{{ {routed}; }} >/dev/null 2>&1"))?;
    let command = format!("timeout 5 wget -q -O - http://127.0.0.1:{}/ 2>&1 | grep -c secret", server.port());
    expect_answer(&mut machine, &command, "0")?;
    ensure!(server.connections() == 0, "127.0.0.1 over the wire reached the host's loopback");
    machine.type_line("poweroff")?;
    machine.wait(SHORT)?;

    let mut machine = start(lane, "none", "network-none")?;
    expect_answer(&mut machine, "ls /sys/class/net", "lo")?;
    machine.type_line("poweroff")?;
    machine.wait(SHORT)?;
    Ok(())
}

/// The quick start's archive with more behind it: the kernel unpacks one after the other.
fn initrd_with(lane: &Lane, directory: &Path, more: Archive) -> Result<PathBuf> {
    let mut bytes = std::fs::read(&lane.quick_start.initrd).context("cannot read the initrd")?;
    bytes.resize(bytes.len().next_multiple_of(4), 0);
    bytes.extend(more.finish());
    let path = directory.join("initrd.cpio");
    std::fs::write(&path, bytes).context("cannot write the initrd")?;
    Ok(path)
}

fn four_thousand_flows(lane: &Lane) -> Result<()> {
    const FLOWS: usize = 4000;
    let directory = tempfile::tempdir().context("no directory")?;
    let mut more = Archive::new();
    more.file("bin/flows", 0o755, &std::fs::read(guests::flows_program()?).context("cannot read flows")?);
    let server = servers::echo("127.0.0.1:0")?;
    let spec = Spec {
        initrd: initrd_with(lane, directory.path(), more)?,
        extra: vec!["--net".to_owned(), "user,host-loopback".to_owned()],
        ..lane.spec(1)
    };
    let mut machine = lane.shell(&spec, "network-flows")?;
    let process = nat_process(machine.id());
    let before = process.and_then(resident_kib);
    machine.type_line(&format!("flows 10.0.2.2 {} {FLOWS}", server.port()))?;
    machine.expect("FLOWS ", Duration::from_secs(400))?;
    let after = process.and_then(resident_kib);
    machine.expect(PROMPT, SHORT)?;
    let text = machine.text();
    let line = text.lines().rev().find(|line| line.contains("FLOWS ")).unwrap_or_default().trim().to_owned();
    println!("  {line}; {} at once on the host", server.most_at_once());
    if let (Some(before), Some(after)) = (before, after) {
        let per_flow = (after.saturating_sub(before) * 1024) as f64 / FLOWS as f64;
        println!("  the network process grew from {before} to {after} KiB: {per_flow:.0} bytes a flow");
    }
    ensure!(line.contains(&format!("FLOWS {FLOWS} of {FLOWS}")), "not all flows came back: {line}");
    ensure!(server.most_at_once() == FLOWS, "only {} flows at once", server.most_at_once());
    machine.type_line("poweroff")?;
    machine.wait(SHORT)?;
    Ok(())
}

/// The child of `parent` that is its network.
fn nat_process(parent: u32) -> Option<u32> {
    let children = std::fs::read_to_string(format!("/proc/{parent}/task/{parent}/children")).ok()?;
    children.split_whitespace().filter_map(|pid| pid.parse().ok()).find(|pid| {
        std::fs::read(format!("/proc/{pid}/cmdline"))
            .is_ok_and(|line| line.windows(12).any(|w| w == b"network-user"))
    })
}

fn resident_kib(pid: u32) -> Option<u64> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:"))?;
    line.split_whitespace().next()?.parse().ok()
}

/// `apt-get` through a proxy on the host, and `ssh` through a forward, in a whole Debian.
fn debian(lane: &Lane) -> Result<()> {
    const PATIENCE: Duration = Duration::from_secs(1800);
    for program in ["dpkg-deb", "ssh", "ssh-keygen"] {
        if !has(program) {
            println!("  skipped: install {program}");
            return Ok(());
        }
    }
    let directory = tempfile::tempdir().context("no directory")?;
    let proxy = servers::http("127.0.0.1:0", Content::Folder(mirror(directory.path())?))?;
    let (key, public) = ssh_key(directory.path())?;
    let forward = free_port()?;
    let net = format!("user,host-loopback,forward=tcp:{forward}:22");
    let spec = debian_spec(lane, directory.path())?;
    let spec = Spec { extra: vec!["--net".to_owned(), net], ..spec };
    let mut machine = lane.start(&spec, "network-debian")?;
    log_in(&mut machine, PATIENCE)?;

    let address = wait_for(&mut machine, "ip -4 -br addr show scope global", |a| a.contains("10.0.2.15/24"))?;
    let six = wait_for(&mut machine, "ip -6 -br addr show scope global", |a| a.contains("fd61:746f:6c6c:"))?;
    println!("  {address}; {six}");
    // The mirror's name exists nowhere: only the proxy is asked.
    let list = "deb [trusted=yes] http://mirror.invalid/debian ./";
    let proxy = format!("-o Acquire::http::Proxy=http://10.0.2.2:{}", proxy.port());
    machine.type_line(&format!(
        "rm -f /etc/apt/sources.list.d/*; echo '{list}' >/etc/apt/sources.list; apt-get {proxy} -q update && \
         apt-get {proxy} -qy install atoll-probe; echo \"apt-\"done"
    ))?;
    machine.expect("apt-done", PATIENCE)?;
    expect_answer(&mut machine, "cat /usr/share/atoll-probe", "came through the proxy")?;

    expect_answer(
        &mut machine,
        &format!("mkdir -p ~/.ssh; echo '{public}' >~/.ssh/authorized_keys; echo ok"),
        "ok",
    )?;
    let mut ssh = Command::new("ssh");
    ssh.arg("-i").arg(&key).args(["-p", &forward.to_string(), "-o", "ConnectTimeout=300"]);
    ssh.args(["-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=/dev/null", "-o", "BatchMode=yes"]);
    ssh.args(["root@127.0.0.1", "cat /etc/hostname; head -c 1000000 /dev/zero | wc -c"]);
    let output = output_within(ssh, PATIENCE)?;
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    ensure!(
        said == "atoll-debian\n1000000\n",
        "ssh said {said:?} {:?}",
        String::from_utf8_lossy(&output.stderr)
    );
    machine.type_line("systemctl poweroff")?;
    let status = machine.wait(PATIENCE)?;
    ensure!(status.code() == Some(0), "power-off ended with {status}, expected exit code 0");
    Ok(())
}

/// A folder with one package and its index, as a mirror has them.
fn mirror(directory: &Path) -> Result<PathBuf> {
    let (root, tree) = (directory.join("mirror/debian"), directory.join("probe"));
    for folder in [root.clone(), tree.join("DEBIAN"), tree.join("usr/share")] {
        std::fs::create_dir_all(folder).context("cannot make the mirror")?;
    }
    let control = "Package: atoll-probe\nVersion: 1\nArchitecture: all\nMaintainer: nobody <nobody@example.org>\n\
                   Description: shows that it came\n";
    std::fs::write(tree.join("DEBIAN/control"), control).context("cannot write")?;
    std::fs::write(tree.join("usr/share/atoll-probe"), "came through the proxy\n").context("cannot write")?;
    let package = root.join("atoll-probe_1_all.deb");
    let mut build = Command::new("dpkg-deb");
    build.args(["--root-owner-group", "-Zgzip", "--build"]).arg(&tree).arg(&package);
    ensure!(output_within(build, SHORT)?.status.success(), "dpkg-deb failed");
    let mut sum = Command::new("sha256sum");
    sum.arg(&package);
    let sum = String::from_utf8_lossy(&output_within(sum, SHORT)?.stdout).into_owned();
    let sum = sum.split_whitespace().next().unwrap_or_default().to_owned();
    let size = std::fs::metadata(&package).context("no package")?.len();
    let index = format!("{control}Filename: ./atoll-probe_1_all.deb\nSize: {size}\nSHA256: {sum}\n");
    std::fs::write(root.join("Packages"), index).context("cannot write")?;
    Ok(directory.join("mirror"))
}

/// A key of this run's own, and its public half.
fn ssh_key(directory: &Path) -> Result<(PathBuf, String)> {
    let path = directory.join("key");
    let mut generate = Command::new("ssh-keygen");
    generate.args(["-q", "-t", "ed25519", "-N", "", "-f"]).arg(&path);
    ensure!(output_within(generate, SHORT)?.status.success(), "ssh-keygen failed");
    let public = std::fs::read_to_string(directory.join("key.pub")).context("no public key")?;
    Ok((path, public.trim().to_owned()))
}

/// A program on the host that ends with its value.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// `iperf3` both ways on Atoll and on QEMU's emulator with its own user network, in turn; the ratios of the medians.
fn throughput(lane: &Lane) -> Result<()> {
    const ROUNDS: usize = 3;
    if !has("iperf3") {
        println!("  skipped: install iperf3");
        return Ok(());
    }
    let directory = tempfile::tempdir().context("no directory")?;
    let initrd = initrd_with(lane, directory.path(), iperf()?)?;
    let port = free_port()?;
    let server = Command::new("iperf3")
        .args(["-s", "-B", "127.0.0.1", "-p", &port.to_string()])
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn();
    let _server = Running(server.context("cannot start iperf3")?);
    let mut figures: [[Vec<f64>; 2]; 2] = Default::default();
    for round in 0..ROUNDS {
        for (which, of_one) in figures.iter_mut().enumerate() {
            let (mut machine, name) = one_of_two(lane, &initrd, which, round)?;
            for (direction, of_direction) in of_one.iter_mut().enumerate() {
                let flag = ["", "-R"][direction];
                let command = format!(
                    "iperf3 -c 10.0.2.2 -p {port} -t 10 -O 1 {flag} -f m 2>&1 | grep receiver | sed 's/.*Bytes *//; s/ Mbits.*//'"
                );
                let answer = ask(&mut machine, &command)?;
                let megabits: f64 =
                    answer.parse().with_context(|| format!("{name}: iperf3 said {answer:?}"))?;
                println!("  {name}, {}: {megabits:.0} Mbit/s", ["sending", "receiving"][direction]);
                of_direction.push(megabits);
            }
            machine.type_line("poweroff -f")?;
            let _ = machine.wait(SHORT);
        }
    }
    println!("  {:<22} {:>12} {:>12} {:>8}", "median of 3, Mbit/s", "Atoll", "QEMU", "ratio");
    for (direction, name) in ["guest sends", "guest receives"].iter().enumerate() {
        let median = |which: usize| {
            let mut all = figures[which][direction].clone();
            all.sort_by(f64::total_cmp);
            all[all.len() / 2]
        };
        let (ours, theirs) = (median(0), median(1));
        println!("  {name:<22} {ours:>12.0} {theirs:>12.0} {:>8.2}", ours / theirs);
    }
    Ok(())
}

/// Atoll (0) or QEMU (1) with the same guest and a network that reaches the host's loopback.
fn one_of_two(lane: &Lane, initrd: &Path, which: usize, round: usize) -> Result<(Machine, &'static str)> {
    let spec = Spec { initrd: initrd.to_owned(), ..lane.spec(1) };
    let (command, name) = if which == 0 {
        let extra = ["--net", "user,host-loopback"].map(str::to_owned).to_vec();
        (lane.vmm.command(&Spec { extra, ..spec }), "Atoll")
    } else {
        let mut command = Vmm::Qemu.command(&spec);
        command.args(["-netdev", "user,id=net0", "-device", "virtio-net-pci,netdev=net0,romfile="]);
        (command, "QEMU")
    };
    let log = lane.logs.join(format!("network-throughput-{name}-{round}.log"));
    let mut machine = Machine::start(command, &log)?;
    machine.expect("Atoll quick start:", lane.patience)?;
    machine.expect(PROMPT, SHORT)?;
    Ok((machine, name))
}

/// The host's iperf3 with its libraries, for the guest.
fn iperf() -> Result<Archive> {
    let mut archive = Archive::new();
    let program = which("iperf3").context("no iperf3")?;
    let output = Command::new("ldd").arg(&program).output().context("cannot run ldd")?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let libraries = text.split_whitespace().filter(|word| word.starts_with('/')).map(PathBuf::from);
    for path in std::iter::once(program.clone()).chain(libraries) {
        let bytes = std::fs::read(&path).with_context(|| format!("cannot read {}", path.display()))?;
        archive.file(path.to_string_lossy().trim_start_matches('/'), 0o755, &bytes);
    }
    Ok(archive)
}

fn which(program: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH")?;
    std::env::split_paths(&path).map(|directory| directory.join(program)).find(|file| file.is_file())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn free_ports_are_free_and_content_is_long() {
        let port = free_port().unwrap();
        assert!(TcpListener::bind(("127.0.0.1", port)).is_ok());
        assert_eq!(content().len(), 4_000_000);
    }

    #[test]
    fn a_process_without_a_network_has_none() {
        assert_eq!(nat_process(std::process::id()), None);
        assert!(resident_kib(std::process::id()).unwrap() > 0);
    }
}
