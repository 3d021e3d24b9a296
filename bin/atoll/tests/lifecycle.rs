//! How a run ends, and what it does to the terminal: with kernels of a few bytes, so each takes a moment.

use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use atoll_scenarios::console::Machine;
use atoll_scenarios::payload;

const SOON: Duration = Duration::from_secs(60);
/// What cannot be seen to have happened is given this long.
const WHILE: Duration = Duration::from_millis(300);

struct Bench {
    directory: tempfile::TempDir,
}

impl Bench {
    fn new() -> Self {
        Self { directory: tempfile::tempdir().unwrap() }
    }

    fn log(&self) -> PathBuf {
        self.directory.path().join("log")
    }

    fn command(&self, kernel: &[u8], words: &[&str]) -> Command {
        let path = self.directory.path().join("kernel");
        std::fs::write(&path, kernel).unwrap();
        let mut command = Command::new(env!("CARGO_BIN_EXE_atoll"));
        command.args(["run", "--memory", "64M"]).args(words).arg("--kernel").arg(path);
        command
    }

    fn start(&self, kernel: &[u8], words: &[&str]) -> Machine {
        Machine::start(self.command(kernel, words), &self.log()).unwrap()
    }

    fn ends(&self, kernel: &[u8], words: &[&str], code: i32) -> String {
        let mut machine = self.start(kernel, words);
        let status = machine.wait(SOON).unwrap();
        assert_eq!(status.code(), Some(code), "{words:?}: {}", machine.text());
        machine.text()
    }
}

#[test]
fn a_debug_exit_chooses_the_exit_code_and_needs_its_option() {
    let bench = Bench::new();
    bench.ends(&payload::debug_exit(16), &["--debug-exit"], 33);
    bench.ends(&payload::debug_exit(0), &["--debug-exit"], 1);
    let mut machine = bench.start(&payload::debug_exit(16), &[]);
    std::thread::sleep(WHILE);
    assert!(machine.is_running().unwrap(), "without --debug-exit the port does nothing");
}

#[test]
fn a_triple_fault_is_a_crash() {
    let text = Bench::new().ends(&payload::triple_fault(), &[], 3);
    assert!(text.contains("triple fault on CPU 0"), "{text}");
}

#[test]
fn a_panic_that_the_guest_reports_is_a_crash() {
    let text = Bench::new().ends(&payload::out(0x505, 1), &[], 3);
    assert!(text.contains("panic"), "{text}");
}

#[test]
fn a_crash_may_reset_instead() {
    // Says hello, then panics or faults: with reset it says hello again and again.
    let panics = payload::print("HELLO\n", &[0x66, 0xba, 0x05, 0x05, 0xb0, 0x01, 0xee, 0xf4]);
    let bench = Bench::new();
    let mut machine = bench.start(&panics, &["--on-crash", "reset"]);
    for _ in 0..3 {
        machine.expect("HELLO", SOON).unwrap();
    }
}

#[test]
fn a_reboot_starts_over_or_ends_the_run() {
    let reboots = payload::print("HELLO\n", &[0x66, 0xba, 0xf9, 0x0c, 0xb0, 0x0e, 0xee, 0xf4]);
    let bench = Bench::new();
    let mut machine = bench.start(&reboots, &[]);
    for _ in 0..3 {
        machine.expect("HELLO", SOON).unwrap();
    }
    drop(machine);
    let text = bench.ends(&reboots, &["--no-reboot"], 0);
    assert_eq!(text.matches("HELLO").count(), 1, "{text}");
}

#[test]
fn powering_off_is_a_success() {
    // S5 through PM1 control: sleep type 0, sleep enable (ACPI 6.5, 4.8.3.2.1).
    let code = [0x66, 0xba, 0x04, 0x06, 0x66, 0xb8, 0x00, 0x20, 0x66, 0xef, 0xf4, 0xeb, 0xfd];
    let bench = Bench::new();
    bench.ends(&payload::kernel(&code), &[], 0);
    let text = bench.ends(&payload::kernel(&code), &["--json"], 0);
    assert!(text.contains(r#""end":"powered-off""#), "{text}");
}

#[test]
fn the_end_of_standard_input_ends_input_only() {
    let bench = Bench::new();
    let mut machine = bench.start(&payload::echo("UP\n"), &[]);
    machine.expect("UP", SOON).unwrap();
    machine.type_bytes(b"marco").unwrap();
    machine.expect("marco", SOON).unwrap();
    machine.close_input();
    std::thread::sleep(WHILE);
    assert!(machine.is_running().unwrap());
}

#[test]
fn the_first_signal_presses_the_power_button_and_the_second_ends_the_machine() {
    let bench = Bench::new();
    let mut machine = bench.start(&payload::print("UP\n", &[0xf4, 0xeb, 0xfd]), &[]);
    machine.expect("UP", SOON).unwrap();
    machine.terminate().unwrap();
    machine.expect("power button", SOON).unwrap();
    std::thread::sleep(WHILE);
    assert!(machine.is_running().unwrap(), "this guest does not listen to the button");
    machine.terminate().unwrap();
    assert_eq!(machine.wait(SOON).unwrap().code(), Some(130));
}

#[test]
fn the_escape_key_ends_the_machine_and_the_terminal_is_as_before() {
    let bench = Bench::new();
    let command = bench.command(&payload::echo("UP\n"), &[]);
    let mut machine = Machine::start_on_terminal(&command, &bench.log(), 80, 25).unwrap();
    machine.expect("UP", SOON).unwrap();
    assert!(!machine.terminal_is_cooked().unwrap());
    // Ctrl-C belongs to the guest, which sends it back.
    machine.type_bytes(b"\x03marco").unwrap();
    machine.expect("\x03marco", SOON).unwrap();
    machine.type_bytes(b"\x01h").unwrap();
    machine.expect("Ctrl-A x", SOON).unwrap();
    machine.type_bytes(b"\x01x").unwrap();
    assert_eq!(machine.wait(SOON).unwrap().code(), Some(130));
    assert!(machine.terminal_is_cooked().unwrap());
}

#[test]
fn a_crash_restores_the_terminal_too() {
    let bench = Bench::new();
    let command = bench.command(&payload::triple_fault(), &[]);
    let mut machine = Machine::start_on_terminal(&command, &bench.log(), 80, 25).unwrap();
    assert_eq!(machine.wait(SOON).unwrap().code(), Some(3));
    assert!(machine.terminal_is_cooked().unwrap());
}

/// The network namespaces of a process, by thread.
fn networks_of(pid: u32) -> std::io::Result<Vec<PathBuf>> {
    let threads = std::fs::read_dir(format!("/proc/{pid}/task"))?;
    threads.map(|thread| std::fs::read_link(thread?.path().join("ns/net"))).collect()
}

fn network_helper_of(pid: u32) -> u32 {
    let children = std::fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap();
    let children: Vec<u32> = children.split_whitespace().map(|child| child.parse().unwrap()).collect();
    assert_eq!(children.len(), 1, "{children:?}");
    children[0]
}

#[test]
fn a_machine_leaves_the_hosts_network_to_its_helper() {
    let bench = Bench::new();
    let mut machine = bench.start(&payload::print("UP\n", &[0xf4, 0xeb, 0xfd]), &[]);
    machine.expect("UP", SOON).unwrap();
    let own = std::fs::read_link("/proc/self/ns/net").unwrap();
    let helper = network_helper_of(machine.id());
    match networks_of(helper) {
        Ok(networks) => {
            assert_eq!(networks, std::slice::from_ref(&own), "the helper has the network, and one thread")
        }
        Err(error) => println!("skipped: only root may look at the helper: {error}"),
    }
    let networks = networks_of(machine.id()).unwrap();
    if networks.contains(&own) {
        let allowed = atoll_foundation::host::rights::user_namespace().works();
        assert!(!allowed, "the machine's process is still in the host's network: {networks:?}");
        println!("skipped: this host gives no network namespace");
    }
    // The helper is gone soon after the machine, however that ends.
    drop(machine);
    let deadline = std::time::Instant::now() + SOON;
    while std::path::Path::new(&format!("/proc/{helper}")).exists() {
        assert!(std::time::Instant::now() < deadline, "the helper outlives its machine");
        std::thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn a_helper_that_dies_is_told_and_the_machine_runs_on() {
    let bench = Bench::new();
    let mut machine = bench.start(&payload::print("UP\n", &[0xf4, 0xeb, 0xfd]), &[]);
    machine.expect("UP", SOON).unwrap();
    let helper = i32::try_from(network_helper_of(machine.id())).unwrap();
    let status = std::process::Command::new("kill").args(["-KILL", &helper.to_string()]).status().unwrap();
    assert!(status.success());
    machine.expect("network interface 0 has lost its connection", SOON).unwrap();
    assert!(machine.is_running().unwrap());
}
