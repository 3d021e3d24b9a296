//! A machine in the test's own process.

use std::path::Path;
use std::sync::mpsc::{self, Receiver};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use atoll_api_types::{Accelerator, VmSpec};
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
    #[allow(dead_code)] // Not every test program reads lines.
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
    #[allow(dead_code)] // Not every test program reads lines.
    pub(crate) lines: Arc<Lines>,
    ended: Receiver<RunEnd>,
}

impl Running {
    #[allow(dead_code)] // Not every test program has disks of its own.
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
