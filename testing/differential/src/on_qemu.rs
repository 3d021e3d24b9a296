//! Runs a kernel on the reference emulator, QEMU's TCG, if it is installed.

use std::io::{Read, Write};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use anyhow::Context;

const PROGRAM: &str = "qemu-system-x86_64";
/// Time without output after which a kernel counts as stuck.
const PATIENCE: Duration = Duration::from_secs(5);

/// Whether the reference emulator is there.
pub fn installed() -> bool {
    Command::new(PROGRAM).arg("--version").stdout(Stdio::null()).stderr(Stdio::null()).status().is_ok()
}

/// Runs `kernel` until it ends, crashes or writes no more, and returns what it wrote to the serial port.
///
/// # Errors
/// If the emulator cannot be started.
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
    let written = Arc::new(AtomicUsize::new(0));
    let count = Arc::clone(&written);
    let reader = std::thread::spawn(move || {
        let (mut output, mut chunk) = (Vec::new(), [0; 4096]);
        loop {
            match pipe.read(&mut chunk)? {
                0 => return Ok::<_, std::io::Error>(output),
                n => {
                    output.extend_from_slice(&chunk[..n]);
                    count.store(output.len(), Ordering::Relaxed);
                }
            }
        }
    });
    let (mut seen, mut since) = (0, Instant::now());
    while child.try_wait()?.is_none() && since.elapsed() < PATIENCE {
        std::thread::sleep(Duration::from_millis(5));
        let now = written.load(Ordering::Relaxed);
        if now != seen {
            (seen, since) = (now, Instant::now());
        }
    }
    // Already ended, usually.
    let _ = child.kill();
    child.wait()?;
    let output =
        reader.join().map_err(|_| anyhow::anyhow!("the reader of the emulator's output failed"))??;
    Ok(String::from_utf8_lossy(&output).into_owned())
}
