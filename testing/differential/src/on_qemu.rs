//! Runs a kernel on the reference emulator, QEMU's TCG, if it is installed.

use std::io::{Read, Write};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::Context;

const PROGRAM: &str = "qemu-system-x86_64";
const TIME_LIMIT: Duration = Duration::from_secs(180);

/// Whether the reference emulator is there.
pub fn installed() -> bool {
    Command::new(PROGRAM).arg("--version").stdout(Stdio::null()).stderr(Stdio::null()).status().is_ok()
}

/// Runs `kernel` and returns what it wrote to the serial port.
///
/// # Errors
/// If the emulator cannot be started or does not end in time.
pub fn run(kernel: &[u8]) -> anyhow::Result<String> {
    let mut file = tempfile::NamedTempFile::new()?;
    file.write_all(kernel)?;
    let mut child = Command::new(PROGRAM)
        .args(["-accel", "tcg", "-cpu", "max,la57=off", "-m", "64", "-display", "none", "-monitor", "none"])
        .args(["-no-reboot", "-serial", "stdio", "-device", "isa-debug-exit,iobase=0xf4,iosize=4", "-kernel"])
        .arg(file.path())
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .with_context(|| format!("{PROGRAM} cannot be started; install it"))?;
    let mut pipe = child.stdout.take().context("the emulator's output is not connected")?;
    let reader = std::thread::spawn(move || {
        let mut output = Vec::new();
        pipe.read_to_end(&mut output).map(|_| output)
    });
    let end = Instant::now() + TIME_LIMIT;
    while child.try_wait()?.is_none() && Instant::now() < end {
        std::thread::sleep(Duration::from_millis(20));
    }
    // Already ended, usually.
    let _ = child.kill();
    child.wait()?;
    let output =
        reader.join().map_err(|_| anyhow::anyhow!("the reader of the emulator's output failed"))??;
    Ok(String::from_utf8_lossy(&output).into_owned())
}
