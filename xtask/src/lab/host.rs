//! One boot of the lab: starts it, reads what its tests say, and knows how it ended.

use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail, ensure};

use super::results::{self, Counts, Line};
use crate::process::root;

/// What to boot and to run there.
pub(super) struct Boot {
    /// Memory of the lab in MiB.
    pub(super) memory: u32,
    /// Its processors.
    pub(super) cpus: u32,
    /// Seconds after which the lab is ended and the group has failed.
    pub(super) patience: u64,
    /// Files and folders, with their paths inside.
    pub(super) files: Vec<(PathBuf, String)>,
    /// Kernel of the lab.
    pub(super) kernel: PathBuf,
    /// A disk image that the lab sees as `/dev/vda`; what is written is lost.
    pub(super) disk: Option<PathBuf>,
    /// The shell script that runs inside. Its exit status is the group's.
    pub(super) script: String,
    /// Tests that must at least have passed: fewer means that some did not run.
    pub(super) at_least: usize,
}

/// Boots, runs, counts.
///
/// # Errors
/// If the lab did not end in time, its script failed, or a test failed; the end of the console is printed then.
pub(super) fn run(name: &str, boot: &Boot, logs: &Path) -> Result<Counts> {
    let log = logs.join(format!("{name}.log"));
    let mut file = File::create(&log).with_context(|| format!("cannot create {}", log.display()))?;
    let mut child = command(boot)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .context("cannot start the lab: timeout and bash are needed")?;
    let output = child.stdout.take().context("the lab has no output")?;
    let (counts, text) = follow(output, &mut file);
    let status = child.wait().context("cannot wait for the lab")?;
    let judged = judge(status.code(), &counts, boot);
    if judged.is_err() {
        for line in &text[text.len().saturating_sub(60)..] {
            println!("    | {line}");
        }
        println!("    | (all of it is in {})", log.display());
    }
    judged.map(|()| counts)
}

/// `timeout` ends the emulator too, which a shell that is killed would leave behind.
fn command(boot: &Boot) -> Command {
    let mut command = Command::new("timeout");
    command.args(["--kill-after=10", &boot.patience.to_string()]);
    command.args(["bash", "-c", "exec bash \"$0\" \"$@\" 2>&1"]);
    command.arg(root().join("testing/kvm-lab/kvm-lab.sh"));
    command.args(["-c", &boot.cpus.to_string(), "-m", &boot.memory.to_string()]);
    command.arg("-k").arg(&boot.kernel);
    for (from, to) in &boot.files {
        command.arg("-f").arg(format!("{}:{to}", from.display()));
    }
    if let Some(disk) = &boot.disk {
        command.arg("-q");
        command.arg(format!("-drive file={},format=raw,if=virtio,snapshot=on", disk.display()));
    }
    command.arg("--").arg(&boot.script);
    command
}

/// Copies the console to `log`, shows the ends of tests, and gives their number and all lines.
fn follow(output: impl std::io::Read, log: &mut File) -> (Counts, Vec<String>) {
    let (mut counts, mut text) = (Counts::default(), Vec::new());
    for line in BufReader::new(output).split(b'\n').map_while(|l| l.ok()) {
        let line = String::from_utf8_lossy(&line).trim_end().to_owned();
        let _ = writeln!(log, "{line}");
        let read = results::read(&line);
        match read {
            Line::Passed => counts.passed += 1,
            Line::Failed => counts.failed += 1,
            Line::Ignored => counts.ignored += 1,
            Line::Remark | Line::Other => {}
        }
        if matches!(read, Line::Failed | Line::Remark) || line.starts_with("guest ") {
            println!("  {}", line.trim_start());
        }
        text.push(line);
    }
    (counts, text)
}

fn judge(status: Option<i32>, counts: &Counts, boot: &Boot) -> Result<()> {
    match status {
        Some(0) => {}
        Some(124 | 137) | None => bail!("the lab did not end within {} s; {counts}", boot.patience),
        Some(125) => bail!("the lab ended before its script did; {counts}"),
        Some(code) => bail!("the script in the lab ended with {code}; {counts}"),
    }
    ensure!(counts.failed == 0, "{counts}");
    ensure!(counts.passed >= boot.at_least, "{counts}; expected at least {} to pass", boot.at_least);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn boot(at_least: usize) -> Boot {
        Boot {
            memory: 1,
            cpus: 1,
            patience: 1,
            files: Vec::new(),
            kernel: PathBuf::new(),
            disk: None,
            script: String::new(),
            at_least,
        }
    }

    #[test]
    fn a_group_passes_only_when_its_script_and_enough_tests_did() {
        let counts = |passed, failed| Counts { passed, failed, ignored: 0 };
        assert!(judge(Some(0), &counts(3, 0), &boot(3)).is_ok());
        assert!(judge(Some(0), &counts(2, 0), &boot(3)).is_err());
        assert!(judge(Some(0), &counts(3, 1), &boot(3)).is_err());
        assert!(judge(Some(1), &counts(3, 0), &boot(3)).is_err());
        assert!(judge(Some(124), &counts(3, 0), &boot(3)).unwrap_err().to_string().contains("did not end"));
        assert!(judge(None, &counts(3, 0), &boot(3)).is_err());
    }

    #[test]
    fn every_line_of_the_console_is_kept_and_tests_are_counted() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("log");
        let console: &[u8] = b"booting\r\ntest a ... ok\r\ntest b ... FAILED\r\n\xffgarbage";
        let (counts, text) = follow(console, &mut File::create(&path).unwrap());
        assert_eq!(counts, Counts { passed: 1, failed: 1, ignored: 0 });
        assert_eq!(text.len(), 4);
        assert_eq!(std::fs::read_to_string(&path).unwrap().lines().count(), 4);
    }
}
