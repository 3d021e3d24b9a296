//! Queues that are looked at again after a time.

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use crate::device::{DeviceHandle, DeviceKind, RestoreError, VirtioDevice};
use crate::lock;
use crate::queue::{Progress, QueueError, QueueRun, Step};
use crate::testing::{Setup, TestDriver, TestMachine, into};

/// Takes no request before its time has come.
struct Later {
    delay: Duration,
    ready: Mutex<Option<Instant>>,
    handle: Mutex<DeviceHandle>,
}

impl VirtioDevice for Later {
    fn kind(&self) -> DeviceKind {
        DeviceKind::Entropy
    }
    fn queue_sizes(&self) -> &[u16] {
        &[16, 16]
    }
    fn features(&self) -> u64 {
        0
    }
    fn config_read(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }
    fn config_write(&self, _offset: u64, _data: &[u8]) {}
    fn activate(&self, _features: u64, handle: &DeviceHandle) {
        *lock(&self.handle) = handle.clone();
    }
    fn reset(&self) {}
    fn process_queue(&self, index: u16, run: &mut QueueRun<'_>) -> Result<Progress, QueueError> {
        let ready = *lock(&self.ready).get_or_insert_with(|| Instant::now() + self.delay);
        let now = Instant::now();
        if now < ready {
            let handle = lock(&self.handle).clone();
            // A longer wait for the same queue does not replace a shorter one.
            handle.kick_after(index, ready - now);
            handle.kick_after(index, Duration::from_secs(3600));
            return Ok(Progress::Done);
        }
        run.pump(|_, _| Ok(Step::Done(0)))
    }
    fn save(&self) -> Vec<u8> {
        Vec::new()
    }
    fn restore(&self, _state: &[u8]) -> Result<(), RestoreError> {
        Ok(())
    }
}

fn later(delay: Duration) -> (TestDriver, u64) {
    let device = Later { delay, ready: Mutex::default(), handle: Mutex::default() };
    let mut d = TestDriver::probe(&TestMachine::new(), Arc::new(device), 0);
    d.start(Setup::default());
    let buffer = d.alloc(16, 16);
    (d, buffer)
}

#[test]
fn a_queue_is_processed_after_the_delay_without_a_notification() {
    let delay = Duration::from_millis(50);
    let (mut d, buffer) = later(delay);
    let start = Instant::now();
    for queue in 0..2 {
        d.add(queue, &[into(buffer, 16)]);
        d.kick(queue as u16);
        assert!(d.take_used(queue).is_none());
    }
    assert!(d.wait_used(0).is_some() && d.wait_used(1).is_some());
    assert!(start.elapsed() >= delay / 2, "{:?}", start.elapsed());
}

#[test]
fn a_delay_that_ends_while_paused_is_noticed_on_resume() {
    let (mut d, buffer) = later(Duration::from_millis(20));
    d.add(0, &[into(buffer, 16)]);
    d.kick(0);
    d.pci.pause();
    std::thread::sleep(Duration::from_millis(60));
    assert!(d.take_used(0).is_none());
    d.pci.resume();
    assert!(d.wait_used(0).is_some());
}
