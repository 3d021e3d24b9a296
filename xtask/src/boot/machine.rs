//! What to run, as the command line of Atoll or of the reference.

use std::path::{Path, PathBuf};
use std::process::Command;

pub(crate) use atoll_scenarios::console::Machine;

/// Which program runs the machine.
#[derive(Debug, Clone)]
pub(crate) enum Vmm {
    /// `atoll`: the program, and what `--accel` says.
    Atoll(PathBuf, String),
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
            Self::Atoll(program, accel) => atoll(program, accel, spec),
            Self::Qemu => qemu(spec),
        }
    }
}

fn atoll(program: &Path, accel: &str, spec: &Spec) -> Command {
    let mut command = Command::new(program);
    command.args(["run", "--accel", accel]);
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
