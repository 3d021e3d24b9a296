//! A machine in the test's own process, and a Linux for it.

#![allow(dead_code)] // Not every test program uses everything.

use std::path::Path;
use std::sync::mpsc::{self, Receiver};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use atoll_api_types::{Accelerator, ByteSize, VmSpec};
use atoll_guests::{Cache, GuestKernel, Quiet, initramfs, kernel};
use atoll_storage::Disk;
use atoll_vmm::{Resources, RunEnd, Vm, VmHandle, VmOutputs};

/// What the serial port has printed, as far as it was not taken.
#[derive(Default)]
pub(crate) struct Lines {
    text: Mutex<Vec<u8>>,
    changed: Condvar,
}

impl Lines {
    /// Most bytes that are kept: a guest that prints garbage for ever must not fill the test's memory.
    const MAX: usize = 1 << 20;

    fn push(&self, data: &[u8]) {
        let mut text = self.text.lock().unwrap_or_else(PoisonError::into_inner);
        if text.len() + data.len() <= Self::MAX {
            text.extend_from_slice(data);
        }
        self.changed.notify_all();
    }

    /// Takes the next whole line; `None` if none came within `patience`.
    pub(crate) fn next(&self, patience: Duration) -> Option<String> {
        let deadline = Instant::now() + patience;
        let mut text = self.text.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            if let Some(end) = text.iter().position(|b| *b == b'\n') {
                let line: Vec<u8> = text.drain(..=end).collect();
                return Some(String::from_utf8_lossy(&line).trim().to_owned());
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return None;
            }
            text = self.changed.wait_timeout(text, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

/// A machine that runs. Dropping it ends it.
pub(crate) struct Running {
    pub(crate) handle: VmHandle,
    pub(crate) lines: Arc<Lines>,
    ended: Receiver<RunEnd>,
}

impl Running {
    pub(crate) fn start(spec: &VmSpec, disks: Vec<Arc<dyn Disk>>) -> Self {
        Self::start_with(spec, Resources { disks, ..Resources::default() })
    }

    pub(crate) fn start_with(spec: &VmSpec, resources: Resources) -> Self {
        let vm = Vm::prepare_with(spec, resources).unwrap();
        let lines = Arc::new(Lines::default());
        let (sender, ended) = mpsc::channel();
        let sink = lines.clone();
        let outputs = VmOutputs {
            serial: Box::new(move |data| sink.push(data)),
            virtio: Box::new(|_| {}),
            rebooted: Box::new(|| {}),
            event: Box::new(|_| {}),
            ended: Box::new(move |end| drop(sender.send(end))),
        };
        Self { handle: vm.start(outputs).unwrap(), lines, ended }
    }

    /// How the run ended; `None` if it has not within `patience`.
    pub(crate) fn end(&self, patience: Duration) -> Option<RunEnd> {
        self.ended.recv_timeout(patience).ok()
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.handle.stop();
    }
}

/// A machine that boots `kernel`, on the backend that `ATOLL_TEST_ACCEL` names: `kvm` in the lab.
pub(crate) fn spec(kernel: &Path) -> VmSpec {
    let mut spec = VmSpec::named("scenario");
    // User-mode NAT is a process of the program, which is not here.
    spec.networks = Vec::new();
    spec.boot.kernel = Some(kernel.to_owned());
    spec.accel = match std::env::var("ATOLL_TEST_ACCEL").as_deref() {
        Ok("kvm") => Accelerator::Kvm,
        _ => Accelerator::Software,
    };
    spec
}

/// How PID 1 of every Linux here begins: file systems, drivers, and no messages of the kernel among its own lines.
const PRELUDE: &str = r#"#!/bin/sh
export PATH=/bin:/sbin:/usr/bin:/usr/sbin
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
while read -r module; do insmod "/lib/modules/$module.ko"; done </etc/modules
dmesg -n 1
"#;

/// A machine with 256 MiB that boots the distribution's kernel, without a word, and runs `script` in busybox's shell
/// as PID 1 behind [`PRELUDE`]. `parameters` are added to the kernel's command line: the script finds them as
/// variables. The initial root file system is written to `directory`.
///
/// Says why and returns `None` where the distribution's kernels cannot be had.
pub(crate) fn linux(directory: &Path, script: &str, parameters: &str) -> Option<VmSpec> {
    let cache = Cache::open().unwrap();
    let files = match kernel::fetch(&cache, GuestKernel::Host, &mut Quiet) {
        Ok(files) => files,
        Err(error @ atoll_guests::Error::NoPackageManager { .. }) => {
            println!("skipped: {error}");
            return None;
        }
        Err(error) => panic!("{error}"),
    };
    let busybox = kernel::busybox(&cache, &mut Quiet).unwrap();
    let initrd = directory.join("initrd.cpio");
    let script = format!("{PRELUDE}{script}");
    std::fs::write(&initrd, initramfs::scripted(&files, &busybox, &script).unwrap()).unwrap();
    let mut spec = spec(&files.vmlinuz);
    spec.boot.initrd = Some(initrd);
    spec.boot.append = format!("console=ttyS0 quiet {parameters}").trim_end().to_owned();
    spec.memory = ByteSize(256 << 20);
    Some(spec)
}
