//! A running machine: its command line, its console, its end.

use std::fs::File;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, ExitStatus, Stdio};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::process::show;

/// Which program runs the machine.
#[derive(Debug, Clone)]
pub(crate) enum Vmm {
    /// The built `atoll`.
    Atoll(PathBuf),
    /// QEMU's emulator, as the reference.
    Qemu,
}

/// What to run.
#[derive(Debug, Clone)]
pub(crate) struct Spec {
    pub(crate) kernel: PathBuf,
    pub(crate) initrd: PathBuf,
    pub(crate) append: String,
    pub(crate) cpus: u32,
    pub(crate) memory_mib: u32,
    pub(crate) disk: Option<PathBuf>,
    /// More arguments for `atoll run`.
    pub(crate) extra: Vec<String>,
}

impl Vmm {
    /// The command that runs `spec`.
    pub(crate) fn command(&self, spec: &Spec) -> Command {
        match self {
            Self::Atoll(program) => atoll(program, spec),
            Self::Qemu => qemu(spec),
        }
    }
}

fn atoll(program: &Path, spec: &Spec) -> Command {
    let mut command = Command::new(program);
    command.args(["run", "--accel", "software"]);
    command.arg("--kernel").arg(&spec.kernel).arg("--initrd").arg(&spec.initrd);
    command.args(["--append", &spec.append, "--cpus", &spec.cpus.to_string()]);
    command.args(["--memory", &format!("{}M", spec.memory_mib)]);
    if let Some(disk) = &spec.disk {
        command.arg("--disk").arg(disk);
    }
    command.args(&spec.extra);
    command
}

fn qemu(spec: &Spec) -> Command {
    let mut command = Command::new("qemu-system-x86_64");
    command.args(["-accel", "tcg", "-cpu", "max", "-nodefaults", "-nographic", "-serial", "stdio"]);
    command.args(["-M", "q35", "-smp", &spec.cpus.to_string(), "-m", &spec.memory_mib.to_string()]);
    command.arg("-kernel").arg(&spec.kernel).arg("-initrd").arg(&spec.initrd).args(["-append", &spec.append]);
    if let Some(disk) = &spec.disk {
        command.args(["-drive", &format!("file={},format=raw,if=virtio", disk.display())]);
    }
    command
}

#[derive(Default)]
struct Console {
    text: Mutex<(String, bool)>,
    changed: Condvar,
}

impl Console {
    fn lock(&self) -> MutexGuard<'_, (String, bool)> {
        self.text.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A machine that is running. Dropping it ends it.
pub(crate) struct Machine {
    child: Child,
    input: Option<ChildStdin>,
    console: Arc<Console>,
    /// Everything before this offset has been matched by an earlier [`Machine::expect`].
    seen: usize,
    started: Instant,
}

impl Machine {
    /// Starts `command` with its console on pipes; what it prints also goes to `log`.
    pub(crate) fn start(mut command: Command, log: &Path) -> Result<Self> {
        let mut file = File::create(log).with_context(|| format!("cannot create {}", log.display()))?;
        writeln!(file, "$ {}", show(&command)).context("cannot write the log")?;
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let started = Instant::now();
        let mut child = command.spawn().with_context(|| format!("cannot start `{}`", show(&command)))?;
        let console = Arc::new(Console::default());
        let (output, errors) = (child.stdout.take(), child.stderr.take());
        if let Some(errors) = errors {
            let file = file.try_clone().context("cannot share the log")?;
            pump(errors, file, Arc::clone(&console), false);
        }
        if let Some(output) = output {
            pump(output, file, Arc::clone(&console), true);
        }
        Ok(Self { input: child.stdin.take(), child, console, seen: 0, started })
    }

    /// Waits until the console has printed `text` (after everything matched so far); gives the time since the
    /// start.
    pub(crate) fn expect(&mut self, text: &str, patience: Duration) -> Result<Duration> {
        let deadline = Instant::now() + patience;
        let mut guard = self.console.lock();
        loop {
            let from = floor_char_boundary(&guard.0, self.seen);
            if let Some(at) = guard.0[from..].find(text) {
                self.seen = from + at + text.len();
                return Ok(self.started.elapsed());
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if guard.1 {
                bail!("the machine ended before it printed {text:?}; last it said: {}", tail(&guard.0));
            }
            if left.is_zero() {
                bail!("no {text:?} within {} s; last it said: {}", patience.as_secs(), tail(&guard.0));
            }
            guard = self.console.changed.wait_timeout(guard, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Types `line` and the enter key.
    pub(crate) fn type_line(&mut self, line: &str) -> Result<()> {
        let input = self.input.as_mut().context("standard input is closed")?;
        input.write_all(format!("{line}\n").as_bytes()).and_then(|()| input.flush()).context("cannot type")
    }

    /// Waits for the machine's end.
    pub(crate) fn wait(&mut self, patience: Duration) -> Result<ExitStatus> {
        let deadline = Instant::now() + patience;
        loop {
            if let Some(status) = self.child.try_wait().context("cannot wait for the machine")? {
                // The pipes may still hold its last words.
                let _ = self.expect("\u{0}never\u{0}", Duration::from_secs(5));
                return Ok(status);
            }
            if Instant::now() > deadline {
                let said = tail(&self.console.lock().0);
                bail!("the machine did not end within {} s; last it said: {said}", patience.as_secs());
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Everything printed so far.
    pub(crate) fn text(&self) -> String {
        self.console.lock().0.clone()
    }

    /// What was printed after the last match, which is left unmatched.
    pub(crate) fn rest(&self) -> String {
        let guard = self.console.lock();
        let from = floor_char_boundary(&guard.0, self.seen);
        guard.0[from..].to_owned()
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn pump(mut from: impl Read + Send + 'static, mut log: File, console: Arc<Console>, is_last: bool) {
    std::thread::spawn(move || {
        let mut buffer = [0; 4096];
        while let Ok(count @ 1..) = from.read(&mut buffer) {
            let bytes = buffer.get(..count).unwrap_or_default();
            let _ = log.write_all(bytes);
            console.lock().0.push_str(&String::from_utf8_lossy(bytes));
            console.changed.notify_all();
        }
        if is_last {
            console.lock().1 = true;
            console.changed.notify_all();
        }
    });
}

fn floor_char_boundary(text: &str, at: usize) -> usize {
    (0..=at.min(text.len())).rev().find(|i| text.is_char_boundary(*i)).unwrap_or(0)
}

/// The last three lines, for messages.
fn tail(text: &str) -> String {
    let lines: Vec<&str> = text.lines().map(str::trim_end).filter(|l| !l.is_empty()).collect();
    format!("{:?}", lines[lines.len().saturating_sub(3)..].join(" | "))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shell(script: &str) -> (tempfile::TempDir, Machine) {
        let dir = tempfile::tempdir().unwrap();
        let mut command = Command::new("sh");
        command.args(["-c", script]);
        let machine = Machine::start(command, &dir.path().join("log")).unwrap();
        (dir, machine)
    }

    const SOON: Duration = Duration::from_secs(10);

    #[test]
    fn expectations_match_in_order_and_only_once() {
        let (_dir, mut machine) = shell("echo one two; echo one");
        machine.expect("two", SOON).unwrap();
        machine.expect("one", SOON).unwrap();
        assert!(machine.expect("one", SOON).is_err(), "the first `one` came before what was matched");
    }

    #[test]
    fn a_machine_that_ends_early_is_an_error_with_its_last_words() {
        let (_dir, mut machine) = shell("echo last words");
        let error = machine.expect("never", SOON).unwrap_err().to_string();
        assert!(error.contains("ended before") && error.contains("last words"), "{error}");
    }

    #[test]
    fn typing_reaches_the_machine_and_its_exit_status_comes_back() {
        let (_dir, mut machine) = shell("read x; echo got-$x; exit 3");
        machine.type_line("it").unwrap();
        machine.expect("got-it", SOON).unwrap();
        assert_eq!(machine.wait(SOON).unwrap().code(), Some(3));
    }

    #[test]
    fn patience_ends() {
        let (_dir, mut machine) = shell("exec sleep 60");
        assert!(machine.expect("x", Duration::from_millis(50)).is_err());
        assert!(machine.wait(Duration::from_millis(50)).is_err());
    }
}
