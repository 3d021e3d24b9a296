//! The scenarios: what a guest must be able to do, and what the program must say when asked for nonsense.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, bail, ensure};
use atoll_guests::{Cache, GuestKernel, debian, initramfs, kernel};

use super::machine::{Machine, Spec, Vmm};
use super::{Lane, Scenario, memory, network};
use crate::guests::{Lines, fetch};
use crate::process::output_within;

/// What no guest may print: the kernel's own words for "this machine is broken".
const BAD_SIGNS: [&str; 10] = [
    "BUG:",
    "WARNING: CPU",
    "soft lockup",
    "rcu_sched self-detected stall",
    "Marking clocksource",
    "Marking TSC unstable",
    "ACPI Error",
    "ACPI BIOS Error",
    "ACPI Warning",
    "Kernel panic",
];

/// Prints the kernel's bad lines. Written so that the echo of the command is none of them.
const BAD_LINES: &str =
    "dmesg | grep -E 'BU[G]:|WARNIN[G]: CPU|soft lock[u]p|[u]nstable|ACPI (BIOS )?(Err[o]r|Warn[i]ng)'";

/// The prompt of the quick start's shell.
pub(super) const PROMPT: &str = "atoll:/root#";

/// For a guest that is up already to answer or to end.
pub(super) const SHORT: Duration = Duration::from_secs(120);

fn scenario(name: &str, run: impl Fn(&Lane) -> Result<()> + 'static) -> Scenario {
    Scenario { name: name.to_owned(), atoll_only: false, run: Box::new(run) }
}

pub(super) fn atoll_only(name: &str, run: impl Fn(&Lane) -> Result<()> + 'static) -> Scenario {
    Scenario { atoll_only: true, ..scenario(name, run) }
}

/// The scenarios of every run.
pub(super) fn short() -> Vec<Scenario> {
    let mut list = vec![
        scenario("kernel reaches init and powers off", |lane| {
            reaches_init(lane, &lane.quick_start.kernel, 1, "init")
        }),
        scenario("shell, two processors, disk, power-off", shell_session),
        atoll_only("terminal: window size, reboot in place, power-off", terminal_session),
        atoll_only("a panic ends with exit code 3", panic_ends),
    ];
    list.extend(network::short());
    list
}

/// The scenarios of the long lane.
pub(super) fn long() -> Vec<Scenario> {
    let mut list = Vec::new();
    for which in GuestKernel::DEBIAN_12 {
        for cpus in [1, 2] {
            list.push(scenario(
                &format!("kernel {} with {cpus} vCPU reaches init", which.name()),
                move |lane| {
                    let files = fetch(which)?;
                    reaches_init(lane, &files.vmlinuz, cpus, &format!("{}-{cpus}", which.name()))
                },
            ));
        }
    }
    list.push(scenario("Debian 12 boots to a login with no failed unit", debian_login));
    list.extend(network::long());
    list.push(scenario("clock: guest time agrees with the host's, idle and loaded", clock));
    list
}

/// What only a machine with a processor behind it must show.
pub(super) fn on_kvm() -> Vec<Scenario> {
    vec![atoll_only("memory beyond guest RAM with one vCPU and 128 MiB", small_process)]
}

impl Lane {
    pub(super) fn spec(&self, cpus: u32) -> Spec {
        Spec {
            kernel: self.quick_start.kernel.clone(),
            initrd: self.quick_start.initrd.clone(),
            append: "console=ttyS0".to_owned(),
            cpus,
            memory_mib: 512,
            disk: None,
            extra: Vec::new(),
        }
    }

    pub(super) fn start(&self, spec: &Spec, log: &str) -> Result<Machine> {
        Machine::start(self.vmm.command(spec), &self.logs.join(format!("{log}.log")))
    }

    /// Starts the quick start and waits for its prompt.
    pub(super) fn shell(&self, spec: &Spec, log: &str) -> Result<Machine> {
        let mut machine = self.start(spec, log)?;
        machine.expect("Atoll quick start:", self.patience)?;
        machine.expect(PROMPT, SHORT)?;
        Ok(machine)
    }
}

fn reaches_init(lane: &Lane, kernel: &Path, cpus: u32, log: &str) -> Result<()> {
    let spec = Spec { kernel: kernel.to_path_buf(), initrd: lane.bench_initrd.clone(), ..lane.spec(cpus) };
    let mut machine = lane.start(&spec, log)?;
    let wall = machine.expect("INIT-REACHED", lane.patience)?;
    machine.expect("UPTIME ", SHORT)?;
    let status = machine.wait(SHORT)?;
    ensure!(status.code() == Some(0), "power-off ended with {status}, expected exit code 0");
    println!("  init after {:.1} s", wall.as_secs_f64());
    no_bad_signs(&lane.vmm, &machine.text())
}

fn no_bad_signs(vmm: &Vmm, text: &str) -> Result<()> {
    // The reference has no invariant TSC; that is not the guest's fault.
    let excused = |sign: &str| matches!(vmm, Vmm::Qemu) && sign == "Marking TSC unstable";
    for line in text.lines() {
        if let Some(sign) = BAD_SIGNS.iter().find(|sign| line.contains(**sign) && !excused(sign)) {
            bail!("the guest said {sign:?}: {}", line.trim());
        }
    }
    Ok(())
}

/// Runs `command` in the guest's shell and gives the line that it prints. The echo of what was typed cannot be
/// taken for the answer: the marker is put together by the shell.
pub(super) fn ask(machine: &mut Machine, command: &str) -> Result<String> {
    machine.type_line(&format!("echo \"<an\"\"swer>$({command})</an\"\"swer>\""))?;
    machine.expect("<answer>", SHORT)?;
    let deadline = Instant::now() + SHORT;
    loop {
        let rest = machine.rest();
        if let Some((answer, _)) = rest.split_once("</answer>") {
            return Ok(answer.trim().to_owned());
        }
        ensure!(Instant::now() < deadline, "no end of the answer to `{command}`");
        std::thread::sleep(Duration::from_millis(10));
    }
}

fn shell_session(lane: &Lane) -> Result<()> {
    let directory = tempfile::tempdir().context("cannot create a directory")?;
    let disk = directory.path().join("disk.raw");
    std::fs::File::create(&disk).and_then(|f| f.set_len(8 << 20)).context("cannot create a disk")?;
    let spec = Spec { disk: Some(disk.clone()), ..lane.spec(2) };
    let mut machine = lane.shell(&spec, "shell")?;
    let processors = ask(&mut machine, "nproc")?;
    ensure!(processors == "2", "the guest sees {processors:?} processors, expected 2");
    let sectors = ask(&mut machine, "cat /sys/block/vda/size")?;
    ensure!(sectors == "16384", "the guest sees {sectors:?} sectors, expected 16384");
    // Written, flushed, and on the host before the machine ends.
    let written = ask(
        &mut machine,
        "echo through-the-ring | dd of=/dev/vda bs=512 conv=sync,fsync 2>/dev/null && echo done",
    )?;
    ensure!(written == "done", "dd said {written:?}");
    let bytes = std::fs::read(&disk).context("cannot read the disk")?;
    ensure!(bytes.starts_with(b"through-the-ring\n"), "what the guest flushed is not in the image");
    if matches!(lane.vmm, Vmm::Atoll(..)) {
        let random = ask(&mut machine, "cat /sys/class/misc/hw_random/rng_current")?;
        ensure!(random.starts_with("virtio_rng"), "the guest's random source is {random:?}");
        let refused = refused(lane, &spec, &disk.display().to_string());
        refused.context("a second machine on the same disk")?;
        let lines = ask(&mut machine, BAD_LINES)?;
        ensure!(lines.is_empty(), "bad lines in the guest's dmesg: {lines}");
    }
    machine.type_line("poweroff")?;
    let status = machine.wait(SHORT)?;
    ensure!(status.code() == Some(0), "power-off ended with {status}, expected exit code 0");
    no_bad_signs(&lane.vmm, &machine.text())
}

/// The guest's window size, which must become `wanted` (rows, columns): a resize takes a moment to arrive.
fn window_size_becomes(machine: &mut Machine, wanted: &str) -> Result<()> {
    let deadline = Instant::now() + SHORT;
    loop {
        let size = ask(machine, "stty size")?;
        if size == wanted {
            return Ok(());
        }
        ensure!(Instant::now() < deadline, "the guest's window is {size:?}, expected {wanted:?}");
        std::thread::sleep(Duration::from_millis(50));
    }
}

fn terminal_session(lane: &Lane) -> Result<()> {
    let command = lane.vmm.command(&lane.spec(1));
    let log = lane.logs.join("terminal.log");
    let mut machine = Machine::start_on_terminal(&command, &log, 103, 31)?;
    machine.expect("Atoll quick start:", lane.patience)?;
    machine.expect(PROMPT, SHORT)?;
    let terminal = ask(&mut machine, "tty")?;
    ensure!(terminal == "/dev/hvc0", "the shell is on {terminal:?}, expected /dev/hvc0");
    window_size_becomes(&mut machine, "31 103")?;
    machine.resize(91, 43)?;
    window_size_becomes(&mut machine, "43 91")?;
    // Typed before the shell has let go of the line, Ctrl-C would only clear the line.
    machine.type_line("echo run\"\"ning; sleep 1000")?;
    machine.expect("running", SHORT)?;
    machine.type_bytes(b"\x03")?;
    machine.expect(PROMPT, SHORT).context("after Ctrl-C")?;
    machine.type_line("reboot")?;
    machine.expect("Atoll quick start:", lane.patience).context("after reboot")?;
    machine.expect(PROMPT, SHORT)?;
    window_size_becomes(&mut machine, "43 91").context("after reboot")?;
    let lines = ask(&mut machine, BAD_LINES)?;
    ensure!(lines.is_empty(), "bad lines in the guest's dmesg: {lines}");
    machine.type_line("poweroff")?;
    let status = machine.wait(SHORT)?;
    ensure!(status.code() == Some(0), "power-off ended with {status}, expected exit code 0");
    ensure!(machine.terminal_is_cooked()?, "the terminal was left in raw mode");
    no_bad_signs(&lane.vmm, &machine.text())
}

fn small_process(lane: &Lane) -> Result<()> {
    const LIMIT_KIB: u64 = 5 << 10;
    let mut machine = lane.shell(&Spec { memory_mib: 128, ..lane.spec(1) }, "memory")?;
    let use_ = memory::of(machine.id())?;
    println!("  {use_}");
    machine.type_line("poweroff")?;
    machine.wait(SHORT)?;
    let beyond = use_.beyond_ram_kib();
    ensure!(beyond <= LIMIT_KIB, "{beyond} KiB beyond guest RAM, {LIMIT_KIB} are allowed");
    Ok(())
}

fn panic_ends(lane: &Lane) -> Result<()> {
    let mut machine = lane.shell(&lane.spec(1), "panic")?;
    machine.type_line("echo c >/proc/sysrq-trigger")?;
    let status = machine.wait(SHORT)?;
    ensure!(status.code() == Some(3), "a guest panic ended with {status}, expected exit code 3");
    Ok(())
}

/// Runs `spec`, which must be refused: exit code 2, nothing on standard output, one line on standard error
/// that names `what`.
fn refused(lane: &Lane, spec: &Spec, what: &str) -> Result<()> {
    refused_command(lane.vmm.command(spec), what)
}

fn refused_command(command: Command, what: &str) -> Result<()> {
    let output =
        output_within(command, Duration::from_secs(20)).with_context(|| format!("{what} was not refused"))?;
    let errors = String::from_utf8_lossy(&output.stderr).into_owned();
    ensure!(
        output.status.code() == Some(2),
        "{what}: ended with {}, expected exit code 2: {errors}",
        output.status
    );
    ensure!(errors.trim_end().lines().count() == 1, "{what}: expected one line, got {errors:?}");
    ensure!(errors.contains(what), "the message does not name {what:?}: {errors:?}");
    ensure!(output.stdout.is_empty(), "{what}: something was printed on standard output");
    Ok(())
}

fn copy_of_debian(cache: &Cache, directory: &Path) -> Result<PathBuf> {
    let original = debian::root_image(cache, &mut Lines)?;
    let disk = directory.join("root.img");
    let copied = Command::new("cp").arg("--sparse=always").arg(&original).arg(&disk).status();
    ensure!(copied.is_ok_and(|s| s.success()), "cannot copy {}", original.display());
    Ok(disk)
}

/// A Debian of its own, whose files are in `directory`.
pub(super) fn debian_spec(lane: &Lane, directory: &Path) -> Result<Spec> {
    let cache = Cache::open()?;
    let files = kernel::fetch(&cache, GuestKernel::Cloud61, &mut Lines)?;
    let busybox = kernel::busybox(&cache, &mut Lines)?;
    let initrd = directory.join("initrd.cpio");
    let disk = match &lane.debian_disk {
        Some(disk) => disk.clone(),
        None => copy_of_debian(&cache, directory)?,
    };
    std::fs::write(&initrd, initramfs::root_on_disk(&files, &busybox)?).context("cannot write the initrd")?;
    Ok(Spec {
        kernel: files.vmlinuz,
        initrd,
        append: "console=ttyS0 root=/dev/vda rw systemd.default_timeout_start_sec=900".to_owned(),
        memory_mib: 2048,
        disk: Some(disk),
        ..lane.spec(1)
    })
}

/// Waits for the login prompt, which root passes without a password.
pub(super) fn log_in(machine: &mut Machine, patience: Duration) -> Result<()> {
    let wall = machine.expect(" login: ", patience)?;
    println!("  login prompt after {:.1} s", wall.as_secs_f64());
    machine.type_line("root")?;
    machine.expect("~#", patience)?;
    Ok(())
}

fn debian_login(lane: &Lane) -> Result<()> {
    let directory = tempfile::tempdir().context("cannot create a directory")?;
    let mut machine = lane.start(&debian_spec(lane, directory.path())?, "debian")?;
    let patience = Duration::from_secs(1800);
    log_in(&mut machine, patience)?;
    // Whatever is still starting is waited for, then counted.
    machine.type_line(
        "systemctl is-system-running --wait; echo \"fai\"led-units=$(systemctl --failed --no-legend | wc -l)",
    )?;
    machine.expect("failed-units=0", patience)?;
    machine.type_line(&format!("{BAD_LINES}; echo \"dme\"sg-read"))?;
    machine.expect("dmesg-read", patience)?;
    machine.type_line("systemctl poweroff")?;
    let status = machine.wait(patience)?;
    ensure!(status.code() == Some(0), "power-off ended with {status}, expected exit code 0");
    no_bad_signs(&lane.vmm, &machine.text())
}

/// The smallest of several differences "host time when the answer came minus guest time in the answer": what is
/// left is the constant part of the way, which cancels between two measurements.
fn clock_offset(machine: &mut Machine) -> Result<f64> {
    let mut best = f64::INFINITY;
    for _ in 0..10 {
        let answer = ask(machine, "adjtimex | sed -n 's/.*tv_u*sec: *//p' | tr '\\n' ' '")?;
        let guest = guest_time(&answer).with_context(|| format!("the guest's time is {answer:?}"))?;
        let host = SystemTime::now().duration_since(UNIX_EPOCH).context("the host's clock is before 1970")?;
        best = best.min(host.as_secs_f64() - guest);
    }
    Ok(best)
}

/// Seconds from the `SECONDS MICROSECONDS` that busybox's adjtimex shows (its date knows whole seconds only).
fn guest_time(answer: &str) -> Option<f64> {
    let (seconds, micros) = answer.split_once(' ')?;
    Some(seconds.parse::<f64>().ok()? + micros.trim().parse::<f64>().ok()? / 1e6)
}

fn clock(lane: &Lane) -> Result<()> {
    let mut machine = lane.shell(&lane.spec(1), "clock")?;
    for (name, load) in [("idle", ""), ("loaded", "while :; do :; done &")] {
        let before = clock_offset(&mut machine)?;
        machine.type_line(load)?;
        std::thread::sleep(lane.clock);
        if !load.is_empty() {
            machine.type_line("kill %1")?;
        }
        let drift = clock_offset(&mut machine)? - before;
        println!(
            "  guest clock moved {:+.1} ms against the host's in {} s, {name}",
            -drift * 1e3,
            lane.clock.as_secs()
        );
        ensure!(drift.abs() <= 0.050, "{:.1} ms of drift, {name}; 50 ms are allowed", drift * 1e3);
    }
    machine.type_line("poweroff")?;
    machine.wait(SHORT)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stub(script: &str) -> Command {
        let mut command = Command::new("sh");
        command.args(["-c", script]);
        command
    }

    #[test]
    fn a_refusal_is_one_line_that_names_the_thing_with_exit_code_2() {
        assert!(refused_command(stub("echo 'atoll: no kernel k' >&2; exit 2"), "k").is_ok());
    }

    #[test]
    fn other_exit_codes_more_lines_other_names_and_output_are_no_refusal() {
        for script in [
            "echo 'no k' >&2; exit 1",
            "echo 'no k' >&2; echo more >&2; exit 2",
            "echo 'no such file' >&2; exit 2",
            "echo 'no k' >&2; echo out; exit 2",
        ] {
            assert!(refused_command(stub(script), " k").is_err(), "{script}");
        }
    }

    #[test]
    fn a_kernel_that_complains_is_noticed() {
        let atoll = Vmm::Atoll("atoll".into(), "software".into());
        assert!(no_bad_signs(&atoll, "[ 0.1] ACPI: Core revision\n").is_ok());
        assert!(no_bad_signs(&atoll, "[ 0.1] ACPI Error: AE_NOT_FOUND\n").is_err());
        assert!(no_bad_signs(&atoll, "[ 9.1] watchdog: BUG: soft lockup - CPU#0\n").is_err());
    }

    #[test]
    fn an_answer_is_not_mistaken_for_the_echo_of_the_question() {
        let directory = tempfile::tempdir().unwrap();
        let script = "read line; echo \"$line\"; eval \"$line\"; sleep 5";
        let mut machine = Machine::start(stub(script), &directory.path().join("log")).unwrap();
        assert_eq!(ask(&mut machine, "echo $((6*7))").unwrap(), "42");
    }

    #[test]
    fn the_guests_time_is_read_to_the_microsecond() {
        assert_eq!(guest_time("100 250000"), Some(100.25));
        assert_eq!(guest_time("100"), None);
    }

    #[test]
    fn scenario_names_are_unique() {
        let mut names: Vec<String> =
            short().into_iter().chain(long()).chain(on_kvm()).map(|s| s.name).collect();
        let count = names.len();
        names.sort();
        names.dedup();
        assert_eq!(names.len(), count);
    }
}
