//! A program with a machine's console: its command line, what it prints, how it ends.
//!
//! The console is on pipes ([`Machine::start`]) or on a pseudo terminal that is the program's controlling terminal
//! ([`Machine::start_on_terminal`]), whose size can be changed.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use rustix::process::{Pid, Signal};
use rustix::pty::OpenptFlags;
use rustix::termios::Winsize;

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
pub struct Machine {
    child: Child,
    input: Option<File>,
    terminal: Option<OwnedFd>,
    console: Arc<Console>,
    /// Everything before this offset has been matched by an earlier [`Machine::expect`].
    seen: usize,
    started: Instant,
}

impl Machine {
    /// Starts `command` with its console on pipes; what it prints also goes to `log`.
    ///
    /// # Errors
    /// If the log cannot be written or the program cannot be started.
    pub fn start(mut command: Command, log: &Path) -> Result<Self> {
        let file = open_log(&command, log)?;
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
        let input = child.stdin.take().map(|stdin| File::from(OwnedFd::from(stdin)));
        Ok(Self { input, terminal: None, child, console, seen: 0, started })
    }

    /// Starts `command` in a session of its own whose controlling terminal is a new pseudo terminal of `columns`
    /// by `rows`: standard input, output and error are that terminal. Needs util-linux's `setsid`.
    ///
    /// # Errors
    /// As [`Machine::start`], and if the host gives no pseudo terminal.
    pub fn start_on_terminal(command: &Command, log: &Path, columns: u16, rows: u16) -> Result<Self> {
        let file = open_log(command, log)?;
        let near =
            rustix::pty::openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).context("no pseudo terminal")?;
        rustix::pty::grantpt(&near)
            .and_then(|()| rustix::pty::unlockpt(&near))
            .context("cannot unlock it")?;
        let name = rustix::pty::ptsname(&near, Vec::new()).context("it has no name")?;
        let far = File::options().read(true).write(true).open(name.to_str().context("odd name")?);
        let far = far.context("cannot open the terminal")?;
        resize(&near, columns, rows)?;
        // `setsid` becomes the program by exec, so the process id and the exit status are the program's.
        let mut wrapped = Command::new("setsid");
        wrapped.arg("--ctty").arg(command.get_program()).args(command.get_args());
        for (name, value) in command.get_envs() {
            match value {
                Some(value) => wrapped.env(name, value),
                None => wrapped.env_remove(name),
            };
        }
        let again = || far.try_clone().context("cannot share the terminal");
        wrapped.stdin(again()?).stdout(again()?).stderr(again()?);
        let started = Instant::now();
        let child = wrapped.spawn().with_context(|| format!("cannot start `{}`", show(&wrapped)))?;
        drop((wrapped, far));
        let console = Arc::new(Console::default());
        let near_file = |fd: &OwnedFd| fd.try_clone().map(File::from).context("cannot share the terminal");
        pump(near_file(&near)?, file, Arc::clone(&console), true);
        Ok(Self { input: Some(near_file(&near)?), terminal: Some(near), child, console, seen: 0, started })
    }

    /// Changes the size of the terminal; the program is told by SIGWINCH.
    ///
    /// # Errors
    /// If the console is on pipes.
    pub fn resize(&self, columns: u16, rows: u16) -> Result<()> {
        resize(self.terminal.as_ref().context("the console is on pipes")?, columns, rows)
    }

    /// Whether the terminal is in canonical mode, as shells leave it.
    ///
    /// # Errors
    /// If the console is on pipes.
    pub fn terminal_is_cooked(&self) -> Result<bool> {
        let modes = rustix::termios::tcgetattr(self.terminal.as_ref().context("the console is on pipes")?)?;
        Ok(modes.local_modes.contains(rustix::termios::LocalModes::ICANON))
    }

    /// Sends SIGTERM.
    ///
    /// # Errors
    /// If the program has gone.
    pub fn terminate(&self) -> Result<()> {
        let pid = i32::try_from(self.child.id()).ok().and_then(Pid::from_raw).context("no process id")?;
        rustix::process::kill_process(pid, Signal::TERM).context("cannot send SIGTERM")
    }

    /// Closes standard input.
    pub fn close_input(&mut self) {
        self.input = None;
    }

    /// Sends `bytes` as they are.
    ///
    /// # Errors
    /// If standard input is closed.
    pub fn type_bytes(&mut self, bytes: &[u8]) -> Result<()> {
        let input = self.input.as_mut().context("standard input is closed")?;
        input.write_all(bytes).and_then(|()| input.flush()).context("cannot type")
    }

    /// The program's process id.
    #[must_use]
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// Whether the program still runs.
    ///
    /// # Errors
    /// What the host said.
    pub fn is_running(&mut self) -> Result<bool> {
        Ok(self.child.try_wait().context("cannot ask for the program")?.is_none())
    }

    /// Waits until the console has printed `text` (after everything matched so far); gives the time since the
    /// start.
    ///
    /// # Errors
    /// If it does not within `patience`, or the machine ends before; with the console's last lines.
    pub fn expect(&mut self, text: &str, patience: Duration) -> Result<Duration> {
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
    ///
    /// # Errors
    /// If standard input is closed.
    pub fn type_line(&mut self, line: &str) -> Result<()> {
        self.type_bytes(format!("{line}\n").as_bytes())
    }

    /// Waits for the machine's end.
    ///
    /// # Errors
    /// If it does not end within `patience`.
    pub fn wait(&mut self, patience: Duration) -> Result<ExitStatus> {
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
    #[must_use]
    pub fn text(&self) -> String {
        self.console.lock().0.clone()
    }

    /// What was printed after the last match, which is left unmatched.
    #[must_use]
    pub fn rest(&self) -> String {
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

fn resize(terminal: &OwnedFd, columns: u16, rows: u16) -> Result<()> {
    let size = Winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 };
    rustix::termios::tcsetwinsize(terminal, size).context("cannot set the terminal's size")
}

fn open_log(command: &Command, log: &Path) -> Result<File> {
    let mut file = File::create(log).with_context(|| format!("cannot create {}", log.display()))?;
    writeln!(file, "$ {}", show(command)).context("cannot write the log")?;
    Ok(file)
}

/// The command as one would type it.
fn show(command: &Command) -> String {
    let words = std::iter::once(command.get_program()).chain(command.get_args());
    words.map(|w| w.to_string_lossy().into_owned()).collect::<Vec<_>>().join(" ")
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
    fn a_terminal_is_the_programs_own_and_tells_its_size() {
        let dir = tempfile::tempdir().unwrap();
        let mut command = Command::new("sh");
        command.args([
            "-c",
            "trap 'stty size; exit 4' WINCH; stty size; echo </dev/tty; read x; sleep 1; exit 5",
        ]);
        let log = dir.path().join("log");
        let mut machine = Machine::start_on_terminal(&command, &log, 91, 37).unwrap();
        machine.expect("37 91", SOON).unwrap();
        machine.resize(100, 40).unwrap();
        machine.type_line("go").unwrap();
        machine.expect("40 100", SOON).unwrap();
        assert_eq!(machine.wait(SOON).unwrap().code(), Some(4));
    }

    #[test]
    fn patience_ends() {
        let (_dir, mut machine) = shell("exec sleep 60");
        assert!(machine.expect("x", Duration::from_millis(50)).is_err());
        assert!(machine.wait(Duration::from_millis(50)).is_err());
    }
}
