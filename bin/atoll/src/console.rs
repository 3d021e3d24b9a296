//! The terminal as the machine's console.
//!
//! Two guest consoles share one terminal: the serial port (`ttyS0`, where kernels print) and the virtio console
//! (`hvc0`). Both print here; `focus.rs` says which of them gets what is typed.
//!
//! ```text
//! vCPU threads ──► Output (bounded) ──► writer thread ──► standard output
//! standard input ──► reader thread ──► escape keys ──► serial port or virtio console
//! ```
//!
//! End of standard input ends input, not the machine.

mod escape;
mod focus;
mod output;

use std::io::{Read, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use atoll_foundation::terminal::{self, RawMode};
use atoll_vmm::{ConsoleId, VmHandle};

use escape::{EscapeFilter, Key};
use focus::Focus;
pub(crate) use output::Output;

/// How often a guest that takes no input is asked again.
const INPUT_RETRY: Duration = Duration::from_millis(5);

/// What the escape keys of the console ask for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum UserRequest {
    /// Ctrl-A x: end the machine at once.
    Quit,
    /// Ctrl-A p: press the power button.
    PowerButton,
}

const HELP: &str = "\r\n\
    Ctrl-A x   end the machine now, as if its plug were pulled\r\n\
    Ctrl-A p   press the power button\r\n\
    Ctrl-A c   switch what is typed between the serial and the virtio console\r\n\
    Ctrl-A a   send Ctrl-A to the guest\r\n\
    Ctrl-A h   this help\r\n";

/// The terminal side of a machine's consoles.
pub(crate) struct Console {
    output: Arc<Output>,
    focus: Arc<Focus>,
}

impl Console {
    /// Starts the writer.
    pub(crate) fn new() -> std::io::Result<Self> {
        let output = Output::start(std::io::stdout())?;
        Ok(Self { output, focus: Arc::new(Focus::new()) })
    }

    /// Where the machine's console `id` prints.
    pub(crate) fn sink(&self, id: ConsoleId) -> impl Fn(&[u8]) + Send + Sync + 'static {
        let (output, focus) = (self.output.clone(), self.focus.clone());
        move |data: &[u8]| {
            focus.printed(id, data);
            output.write(data);
        }
    }

    /// The guest starts over: its kernel prints on the serial port again.
    pub(crate) fn rebooted(&self) -> impl Fn() + Send + 'static {
        let focus = self.focus.clone();
        move || focus.rebooted()
    }

    /// Puts the terminal into raw mode, if standard input and output are one. `None` if they are not.
    pub(crate) fn raw_mode(&self) -> std::io::Result<Option<RawGuard>> {
        let stdin = std::io::stdin();
        if !terminal::is_terminal(&stdin) {
            return Ok(None);
        }
        let guard = RawMode::enter(&stdin)?;
        RAW.store(true, Ordering::Relaxed);
        Ok(Some(RawGuard { _guard: guard }))
    }

    /// Reads standard input on a thread of its own and feeds the guest; escape keys count only if `escape`.
    /// `request` is called with what the escape keys ask for.
    pub(crate) fn read_input(
        &self,
        vm: VmHandle,
        escape: bool,
        request: impl Fn(UserRequest) + Send + 'static,
    ) -> std::io::Result<()> {
        let (output, focus) = (self.output.clone(), self.focus.clone());
        atoll_foundation::threads::spawn("stdin", move || {
            let mut filter = EscapeFilter::new(escape);
            let mut buffer = [0; 4096];
            loop {
                let count = match std::io::stdin().lock().read(&mut buffer) {
                    Ok(0) => return,
                    Ok(count) => count,
                    Err(error) if error.kind() == std::io::ErrorKind::Interrupted => continue,
                    Err(_) => return,
                };
                for key in filter.feed(&buffer[..count]) {
                    match key {
                        Key::Data(data) => feed(&vm, &focus, &data),
                        Key::Quit => request(UserRequest::Quit),
                        Key::PowerButton => request(UserRequest::PowerButton),
                        Key::Switch => {
                            let name = focus.switch();
                            output.write(format!("\r\n[atoll: typing to the {name}]\r\n").as_bytes());
                        }
                        Key::Help => output.write(HELP.as_bytes()),
                    }
                }
            }
        })?;
        Ok(())
    }

    /// Writes out what the guest printed last and stops the writer; waits at most a second.
    pub(crate) fn finish(&self) {
        self.output.finish(Duration::from_secs(1));
    }
}

/// Gives `data` to the focused console, as fast as the guest takes it.
fn feed(vm: &VmHandle, focus: &Focus, data: &[u8]) {
    let mut rest = data;
    while !rest.is_empty() {
        let taken = vm.console_input(focus.typed(), rest);
        rest = &rest[taken..];
        if !rest.is_empty() {
            if vm.has_ended() {
                return;
            }
            std::thread::sleep(INPUT_RETRY);
        }
    }
}

/// Whether the terminal is raw, so that our own lines end in CR LF.
static RAW: AtomicBool = AtomicBool::new(false);

/// Raw mode; dropping it restores the terminal.
pub(crate) struct RawGuard {
    _guard: RawMode,
}

impl Drop for RawGuard {
    fn drop(&mut self) {
        RAW.store(false, Ordering::Relaxed);
    }
}

/// Standard error that stays readable while the terminal is raw.
pub(crate) struct RawStderr;

impl Write for RawStderr {
    fn write(&mut self, data: &[u8]) -> std::io::Result<usize> {
        let mut stderr = std::io::stderr().lock();
        if RAW.load(Ordering::Relaxed) {
            for part in data.split_inclusive(|b| *b == b'\n') {
                match part.strip_suffix(b"\n") {
                    Some(line) => {
                        stderr.write_all(line)?;
                        stderr.write_all(b"\r\n")?;
                    }
                    None => stderr.write_all(part)?,
                }
            }
        } else {
            stderr.write_all(data)?;
        }
        Ok(data.len())
    }
    fn flush(&mut self) -> std::io::Result<()> {
        std::io::stderr().flush()
    }
}
