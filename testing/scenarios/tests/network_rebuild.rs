//! A guest that downloads through user-mode NAT while its machine is taken apart and rebuilt several times a second,
//! and then a limit and a cable that change while it runs. What the saved state of the network device lacks, or an
//! event that got lost on the way to the new device, would stop the download.
//!
//! The network's process is this program with another argument, so the harness is its own. It boots a distribution's
//! kernel and runs in the long lane only: `cargo test -p atoll-scenarios --test network_rebuild -- --ignored`.

mod support;

use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

use atoll_api_types::{ByteSize, Limits, NetSpec};
use atoll_scenarios::servers::{self, Content};
use atoll_vmm::{Resources, RunEnd};
use support::{Running, linux};

/// A guest says something at least this often, on a busy host too.
const PATIENCE: Duration = Duration::from_secs(300);
const BYTES: usize = 3_000_000;

/// PID 1. `$port` comes from the kernel's command line.
const SCRIPT: &str = r#"ifconfig eth0 10.0.2.15 netmask 255.255.255.0 up
route add default gw 10.0.2.2
for round in 1 2 3 4 5; do
  echo "GOT $(wget -q -O - http://10.0.2.2:$port/ | md5sum | cut -d' ' -f1)"
done
echo LIMIT
read -r go
begin=$(cut -d. -f1 /proc/uptime)
echo "GOT $(wget -q -O - http://10.0.2.2:$port/ | md5sum | cut -d' ' -f1)"
echo "TOOK $(( $(cut -d. -f1 /proc/uptime) - begin ))"
echo PULL
while [ "$(cat /sys/class/net/eth0/carrier)" = 1 ]; do sleep 0.1; done
echo PULLED
while [ "$(cat /sys/class/net/eth0/carrier)" = 0 ]; do sleep 0.1; done
echo "GOT $(wget -q -O - http://10.0.2.2:$port/ | md5sum | cut -d' ' -f1)"
echo ALL
poweroff -f
"#;

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().collect();
    let has = |what: &str| arguments.iter().any(|argument| argument == what);
    if has("network-user") {
        return atoll_network_user::process::run_on_stdin(|_| Ok(()));
    }
    const NAME: &str = "a_download_does_not_notice_that_its_machine_is_rebuilt";
    if has("--list") {
        println!("{NAME}: test");
    } else if has("--ignored") || has("--include-ignored") {
        a_download_does_not_notice_that_its_machine_is_rebuilt();
        println!("test {NAME} ... ok");
    } else {
        println!("test {NAME} ... ignored, long: boots a distribution's kernel");
    }
    ExitCode::SUCCESS
}

fn a_download_does_not_notice_that_its_machine_is_rebuilt() {
    let content: Arc<Vec<u8>> =
        Arc::new((0..BYTES as u32).map(|n| (n.wrapping_mul(2_654_435_761) >> 24) as u8).collect());
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("content");
    std::fs::write(&file, &*content).unwrap();
    let sum = std::process::Command::new("md5sum").arg(&file).output().unwrap().stdout;
    let sum = String::from_utf8(sum).unwrap().split_whitespace().next().unwrap().to_owned();
    let server = servers::http("127.0.0.1:0", Content::Bytes(content)).unwrap();

    let parameters = format!("port={}", server.port());
    let Some(mut spec) = linux(directory.path(), SCRIPT, &parameters) else { return };
    spec.networks = vec!["user,host-loopback".parse::<NetSpec>().unwrap()];
    let resources = Resources { helper: Some("/proc/self/exe".into()), ..Resources::default() };
    let running = Running::start_with(&spec, resources);

    let rebuilds = five_downloads(&running, &sum);
    println!("{rebuilds} rebuilds during five downloads");
    assert!(rebuilds > 10, "only {rebuilds} rebuilds");
    limits_and_cable(&running, &sum);
    assert_eq!(running.end(PATIENCE), Some(RunEnd::PoweredOff));
}

/// Rebuilds the machine all the while; returns how often.
fn five_downloads(running: &Running, sum: &str) -> u32 {
    let (mut rebuilds, mut downloads) = (0, 0);
    let mut last = Instant::now();
    loop {
        match running.lines.next(Duration::from_millis(100)) {
            Some(line) if line.starts_with("GOT") => {
                assert_eq!(line, format!("GOT {sum}"), "after {rebuilds} rebuilds");
                downloads += 1;
                last = Instant::now();
            }
            Some(line) if line == "LIMIT" => break,
            Some(_) => last = Instant::now(),
            None => assert!(last.elapsed() < PATIENCE, "the guest hangs after {rebuilds} rebuilds"),
        }
        let size = running.handle.rebuild().unwrap();
        assert!(size > 4000, "{size} bytes cannot be a whole machine");
        rebuilds += 1;
    }
    assert_eq!(downloads, 5);
    rebuilds
}

/// Three million bytes at half a million a second take six seconds; a pulled cable shows.
fn limits_and_cable(running: &Running, sum: &str) {
    let next = |what: &str| loop {
        let line = running.lines.next(PATIENCE).unwrap_or_else(|| panic!("no '{what}'"));
        if line.starts_with(what) {
            return line;
        }
    };
    let limits = Limits { bytes_per_second: Some(ByteSize(500_000)), ..Limits::default() };
    assert!(running.handle.set_network_limits(0, &limits));
    assert!(!running.handle.set_network_limits(1, &limits), "there is one interface");
    // The limit stays when the machine is rebuilt.
    running.handle.rebuild().unwrap();
    running.handle.console_input(atoll_vmm::ConsoleId::Serial, b"go\n");
    assert_eq!(next("GOT"), format!("GOT {sum}"));
    let seconds: u32 = next("TOOK").trim_start_matches("TOOK ").parse().unwrap();
    assert!((4..60).contains(&seconds), "{BYTES} bytes at 500,000 a second took {seconds} s");
    assert!(running.handle.set_network_limits(0, &Limits::default()));
    next("PULL");
    assert!(running.handle.set_network_link(0, false));
    next("PULLED");
    assert!(running.handle.set_network_link(0, true));
    assert_eq!(next("GOT"), format!("GOT {sum}"));
    next("ALL");
}
