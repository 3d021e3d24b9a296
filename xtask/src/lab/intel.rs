//! Intel's side: Bochs emulates a Haswell with VMX and EPT, boots Debian's kernel from a GRUB image, loads
//! `kvm_intel` and runs the backend's conformance suite there. Its results come through the serial port into a file.
//!
//! Bochs' clock follows its instructions (`ips`), so the guest sees a slow host as nothing worse than that. A boot
//! takes a minute and a half.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail, ensure};
use atoll_guests::cpio::Archive;
use atoll_guests::{Cache, GuestKernel, kernel, modules};

use super::results::{self, Counts, Line};
use super::stock::{TestProgram, build_tests, is_there};
use crate::guests::{self, Lines};
use crate::process::{run as run_command, show};

/// Programs and the Debian packages that have them.
const NEEDS: [(&str, &str); 5] = [
    ("bochs", "bochs"),
    ("grub-mkrescue", "grub-common"),
    ("xorriso", "xorriso"),
    ("mformat", "mtools"),
    ("ldd", "libc-bin"),
];
/// Files and the Debian packages that have them.
const NEEDED_FILES: [(&str, &str); 3] = [
    ("/usr/share/bochs/BIOS-bochs-latest", "bochsbios"),
    ("/usr/share/vgabios/vgabios.bin", "vgabios"),
    ("/usr/lib/grub/i386-pc/boot.img", "grub-pc-bin"),
];
/// Seconds for everything.
const PATIENCE: u64 = 3000;

const GRUB: &str = "set timeout=0\nlinux /boot/vmlinuz console=ttyS0 panic=-1 quiet loglevel=0\n\
                    initrd /boot/initrd\nboot\n";

/// The parts of the conformance suite that run there (see `testing/kvm-lab/README.md` for the others).
const PARTS: [&str; 13] = [
    "io::",
    "memory::",
    "modes::",
    "interrupts::",
    "registers::power_on",
    "registers::reset",
    "registers::general",
    "registers::segments",
    "registers::control",
    "registers::vector",
    "registers::msrs",
    "registers::local_apic",
    "registers::events",
];

/// PID 1. What a case prints goes to the serial port; the last line says how it went.
const INIT: &str = r#"#!/bin/sh
export PATH=/bin RUST_BACKTRACE=1 TMPDIR=/tmp
mount -t proc proc /proc; mount -t sysfs sys /sys; mount -t devtmpfs dev /dev; mount -t tmpfs tmp /tmp
for m in irqbypass kvm kvm_intel; do [ ! -f /m/$m.ko ] || insmod /m/$m.ko || echo "lab: insmod $m failed"; done
echo "lab: ept $(cat /sys/module/kvm_intel/parameters/ept)"
failed=0
for t in /tests/*; do
  echo "lab: $t"
  case $t in
    # Part by part, so that a failure has a name.
    *conformance) for a in $parts; do
      echo "lab: $a"; ATOLL_CONFORMANCE=$a timeout -s KILL 300 $t --test-threads=1 --show-output || failed=1
    done ;;
    *) timeout -s KILL 300 $t --test-threads=1 --show-output || failed=1 ;;
  esac
done
dmesg | grep -E 'BU[G]:|WARNIN[G]:|kvm.*unhandled' | head -n 20 | sed 's/^/lab: dmesg /'
echo "LAB-EXIT $failed"
# Bochs does not write out what it holds of the serial port's file when the machine powers itself off.
head -c 16384 /dev/zero | tr '\0' '\n'
poweroff -f
"#;

fn configuration(folder: &Path) -> String {
    format!(
        "cpu: model=corei7_haswell_4770, count=1, ips=200000000, reset_on_triple_fault=0, ignore_bad_msrs=1\n\
         memory: guest=1024, host=1024\n\
         romimage: file=/usr/share/bochs/BIOS-bochs-latest\n\
         vgaromimage: file=/usr/share/vgabios/vgabios.bin\n\
         vga: extension=vbe, update_freq=1\n\
         display_library: rfb, options=\"timeout=0\"\n\
         ata0: enabled=1, ioaddr1=0x1f0, ioaddr2=0x3f0, irq=14\n\
         ata0-master: type=cdrom, path=\"{folder}/lab.iso\", status=inserted\n\
         boot: cdrom\n\
         com1: enabled=1, mode=file, dev={folder}/serial.txt\n\
         clock: sync=none, time0=local\n\
         log: {folder}/bochs.log\n\
         panic: action=fatal\nerror: action=ignore\ninfo: action=ignore\ndebug: action=ignore\n",
        folder = folder.display()
    )
}

/// Builds the image, boots it, counts.
///
/// # Errors
/// If a program is missing, the machine did not end in time, or a test failed.
pub(super) fn run(logs: &Path) -> Result<Counts> {
    let programs = NEEDS.iter().filter(|(program, _)| !is_there(program)).map(|(_, package)| *package);
    let files =
        NEEDED_FILES.iter().filter(|(file, _)| !Path::new(file).exists()).map(|(_, package)| *package);
    let missing: Vec<&str> = programs.chain(files).collect();
    ensure!(missing.is_empty(), "install these packages and run again: {}", missing.join(" "));
    let folder = logs.join("intel");
    let _ = std::fs::remove_dir_all(&folder);
    let grub = folder.join("iso/boot/grub");
    std::fs::create_dir_all(&grub).with_context(|| format!("cannot create {}", grub.display()))?;
    let tests: Vec<TestProgram> = build_tests(&["atoll-kvm"])?;
    let files = guests::fetch(GuestKernel::Cloud61)?;
    let write = |name: &str, bytes: &[u8]| {
        let path = folder.join(name);
        std::fs::write(&path, bytes).with_context(|| format!("cannot write {}", path.display()))
    };
    write("iso/boot/initrd", &initrd(&files.modules_dir, &tests)?)?;
    write("iso/boot/grub/grub.cfg", GRUB.as_bytes())?;
    write("bochsrc", configuration(&folder).as_bytes())?;
    // The debugger of Debian's build waits for a command; this one is "continue".
    write("commands", b"c\n")?;
    std::fs::copy(&files.vmlinuz, folder.join("iso/boot/vmlinuz")).context("cannot copy the kernel")?;
    let mut iso = Command::new("grub-mkrescue");
    iso.args(["-d", "/usr/lib/grub/i386-pc", "-o"]).arg(folder.join("lab.iso")).arg(folder.join("iso"));
    run_command(iso.stdout(Stdio::null()).stderr(Stdio::null()))?;
    emulate(&folder)?;
    read(&folder.join("serial.txt"))
}

fn emulate(folder: &Path) -> Result<()> {
    let mut bochs = Command::new("timeout");
    bochs.args(["--kill-after=10", &PATIENCE.to_string(), "bochs", "-q", "-f"]);
    bochs.arg(folder.join("bochsrc")).arg("-rc").arg(folder.join("commands"));
    bochs.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    let text = show(&bochs);
    // Bochs ends with 1 after a power-off: what the serial port said decides.
    let status = bochs.status().with_context(|| format!("cannot start `{text}`"))?;
    if matches!(status.code(), Some(124 | 137)) {
        println!("  the machine did not end within {PATIENCE} s");
    }
    Ok(())
}

fn read(serial: &Path) -> Result<Counts> {
    let bytes = std::fs::read(serial).with_context(|| format!("cannot read {}", serial.display()))?;
    let text = String::from_utf8_lossy(&bytes).replace('\r', "");
    let mut counts = Counts::default();
    for line in text.lines() {
        match results::read(line) {
            Line::Passed => counts.passed += 1,
            Line::Failed => counts.failed += 1,
            Line::Ignored => counts.ignored += 1,
            Line::Remark => {}
            Line::Other => continue,
        }
        println!("  {line}");
    }
    let place = serial.display();
    match text.lines().find_map(|l| l.strip_prefix("LAB-EXIT ")) {
        Some("0") if counts.failed == 0 && counts.passed > 0 => Ok(counts),
        Some(_) => bail!("{counts}; see {place}"),
        None => bail!("the machine ended or was ended before its tests did; {counts}; see {place}"),
    }
}

/// busybox, the modules of KVM, the test programs and their libraries.
fn initrd(modules_dir: &Path, tests: &[TestProgram]) -> Result<Vec<u8>> {
    let mut archive = Archive::new();
    let directories =
        ["bin", "dev", "proc", "sys", "tmp", "m", "tests", "lib", "lib64", "lib/x86_64-linux-gnu"];
    for directory in directories {
        archive.directory(directory);
    }
    archive.character_device("dev/console", 0o600, 5, 1);
    let load = |path: &Path| std::fs::read(path).with_context(|| format!("cannot read {}", path.display()));
    archive.file("bin/busybox", 0o755, &load(&kernel::busybox(&Cache::open()?, &mut Lines)?)?);
    for name in ["sh", "mount", "insmod", "cat", "dmesg", "grep", "head", "sed", "timeout", "tr", "poweroff"]
    {
        archive.symlink(&format!("bin/{name}"), "busybox");
    }
    for module in modules::closure(modules_dir, &["kvm_intel"])? {
        archive.file(&format!("m/{}.ko", module.name), 0o644, &module.bytes);
    }
    let mut libraries: Vec<PathBuf> = Vec::new();
    for test in tests {
        archive.file(test.inside().trim_start_matches('/'), 0o755, &load(&test.path)?);
        libraries.extend(libraries_of(&test.path)?);
    }
    libraries.sort();
    libraries.dedup();
    for library in &libraries {
        archive.file(&library.to_string_lossy()[1..], 0o755, &load(library)?);
    }
    let init = INIT.replacen("failed=0", &format!("failed=0 parts='{}'", PARTS.join(" ")), 1);
    archive.file("init", 0o755, init.as_bytes());
    Ok(archive.finish())
}

/// The shared libraries of `program` and its loader, as `ldd` lists them.
fn libraries_of(program: &Path) -> Result<Vec<PathBuf>> {
    let output = Command::new("ldd").arg(program).output().context("cannot start `ldd`")?;
    Ok(guests::absolute_words(&String::from_utf8_lossy(&output.stdout)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn judged(serial: &str) -> Result<Counts> {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("serial");
        std::fs::write(&path, serial).unwrap();
        read(&path)
    }

    #[test]
    fn the_serial_port_decides() {
        assert_eq!(judged("test a ... ok\r\nLAB-EXIT 0\r\n").unwrap().passed, 1);
        assert!(judged("test a ... ok\r\nLAB-EXIT 1\r\n").is_err());
        assert!(judged("test a ... FAILED\r\nLAB-EXIT 0\r\n").is_err());
        assert!(judged("test a ... ok\r\n").unwrap_err().to_string().contains("ended before"));
        assert!(judged("LAB-EXIT 0\r\n").is_err(), "no test ran");
    }
}
