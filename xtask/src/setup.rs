//! The set-up step: installs the programs that tests and guests need, by package name, where they are missing.
//!
//! This is the only step that changes the machine and the only one that needs root (directly or through sudo).
//! On hosts without `apt-get` it only says what is missing.

use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::process::{has, run};

/// A program and the Debian package that has it.
struct Need {
    /// Its name, or the whole path of a file that is no program.
    program: &'static str,
    package: &'static str,
    /// Without it the short `ci` still passes: only measurements and the long lane need it.
    optional: bool,
}

const fn need(program: &'static str, package: &'static str) -> Need {
    Need { program, package, optional: false }
}

const fn wish(program: &'static str, package: &'static str) -> Need {
    Need { program, package, optional: true }
}

const NEEDS: [Need; 26] = [
    need("gcc", "gcc"),
    need("g++", "g++"),
    need("iasl", "acpica-tools"),
    need("cpio", "cpio"),
    need("modinfo", "kmod"),
    need("mke2fs", "e2fsprogs"),
    need("xz", "xz-utils"),
    // Tests of networks make namespaces and devices in them.
    need("ip", "iproute2"),
    need("ping", "iputils-ping"),
    // The lab: a processor that virtualizes, emulated.
    need("busybox", "busybox-static"),
    need("qemu-system-x86_64", "qemu-system-x86"),
    wish("qemu-img", "qemu-utils"),
    wish("mmdebstrap", "mmdebstrap"),
    wish("newuidmap", "uidmap"),
    wish("iperf3", "iperf3"),
    wish("fio", "fio"),
    wish("passt", "passt"),
    wish("ssh", "openssh-client"),
    // What `lab --intel` boots with.
    wish("/usr/lib/x86_64-linux-gnu/bochs/plugins/libbx_term_gui.so", "bochs-term"),
    wish("bochs", "bochs"),
    wish("grub-mkrescue", "grub-common"),
    wish("xorriso", "xorriso"),
    wish("mformat", "mtools"),
    wish("/usr/share/bochs/BIOS-bochs-latest", "bochsbios"),
    wish("/usr/share/vgabios/vgabios.bin", "vgabios"),
    wish("/usr/lib/grub/i386-pc/boot.img", "grub-pc-bin"),
];

/// Installs what is missing.
///
/// # Errors
/// If a program that is not optional is still missing afterwards; the message names the packages.
pub(crate) fn install() -> Result<()> {
    let packages: Vec<&str> = missing(|_| true);
    if packages.is_empty() {
        println!("everything is installed");
        return Ok(());
    }
    println!("missing: {}", packages.join(" "));
    if has("apt-get") {
        apt_get(&["-qq", "update"]).context("cannot read the package lists")?;
        let mut arguments = vec!["-qq", "-y", "--no-install-recommends", "install"];
        arguments.extend(&packages);
        // One package that cannot be had must not keep the others away: one by one if all at once fails.
        if apt_get(&arguments).is_err() {
            for package in &packages {
                let _ = apt_get(&[
                    "-qq",
                    "-y",
                    "--no-install-recommends",
                    "--allow-downgrades",
                    "install",
                    package,
                ]);
            }
        }
    }
    let absent = missing(|need| !need.optional);
    if !absent.is_empty() {
        bail!("install these packages and run again: {}", absent.join(" "));
    }
    for package in missing(|_| true) {
        println!("warning: {package} could not be installed; what needs it will say so");
    }
    Ok(())
}

fn missing(which: impl Fn(&Need) -> bool) -> Vec<&'static str> {
    let there =
        |program: &str| if program.starts_with('/') { Path::new(program).exists() } else { has(program) };
    NEEDS.iter().filter(|need| which(need) && !there(need.program)).map(|need| need.package).collect()
}

fn apt_get(arguments: &[&str]) -> Result<()> {
    let mut command = if is_root() {
        Command::new("apt-get")
    } else {
        let mut sudo = Command::new("sudo");
        sudo.args(["-n", "--preserve-env=DEBIAN_FRONTEND", "apt-get"]);
        sudo
    };
    run(command.args(arguments).env("DEBIAN_FRONTEND", "noninteractive"))
}

fn is_root() -> bool {
    use std::os::unix::fs::MetadataExt;
    std::fs::metadata("/proc/self").is_ok_and(|m| m.uid() == 0)
}
