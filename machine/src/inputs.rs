//! The one gate through which nondeterministic inputs enter a machine.
//!
//! Clock and TSC come from [`crate::time::Clock`]; everything else that a second run would see differently
//! passes here: random numbers, interrupts raised by device threads, completions that write guest memory,
//! console input, control requests.
//!
//! An ordinary run is *live*: [`InputGate::deliver`] runs the delivery at once on the caller's thread and costs
//! one relaxed load. A later record mode installs a [`Recorder`]: deliveries then queue up until a vCPU is at a
//! countable instruction boundary and run there, on that vCPU's thread, so a device thread never touches guest
//! memory behind the record's back.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};

/// What kind of input a delivery is, for the record.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum InputKind {
    /// An interrupt line or message.
    Interrupt,
    /// A device finished a request: writes to guest memory and the interrupt that follows.
    Completion,
    /// Bytes from a console.
    Console,
    /// A timer of a device expired.
    Timer,
    /// A request from the control side (power button, hot-plug, pause).
    Control,
}

/// Takes deliveries over in record or replay mode.
pub trait Recorder: Send + Sync {
    /// Runs `delivery` when, and on the thread where, the record wants it.
    fn deliver(&self, kind: InputKind, delivery: Box<dyn FnOnce() + Send>);
    /// Fills `bytes` with recorded random numbers.
    fn random(&self, bytes: &mut [u8]);
}

/// The gate. One per machine, shared by every device and vCPU.
#[derive(Default)]
pub struct InputGate {
    recording: AtomicBool,
    recorder: OnceLock<Arc<dyn Recorder>>,
}

impl InputGate {
    /// A live gate.
    pub fn live() -> Arc<Self> {
        Arc::new(Self::default())
    }

    /// A gate that hands everything to `recorder`.
    pub fn recorded(recorder: Arc<dyn Recorder>) -> Arc<Self> {
        let gate = Self { recording: AtomicBool::new(true), recorder: OnceLock::new() };
        let _ = gate.recorder.set(recorder);
        Arc::new(gate)
    }

    fn recorder(&self) -> Option<&Arc<dyn Recorder>> {
        if self.recording.load(Ordering::Relaxed) { self.recorder.get() } else { None }
    }

    /// Whether inputs are recorded or replayed, so that nothing may write guest memory but inside a delivery.
    pub fn is_recorded(&self) -> bool {
        self.recorder().is_some()
    }

    /// Lets `delivery` happen: now in an ordinary run, at a countable boundary in a recorded one.
    pub fn deliver(&self, kind: InputKind, delivery: impl FnOnce() + Send + 'static) {
        match self.recorder() {
            None => delivery(),
            Some(recorder) => recorder.deliver(kind, Box::new(delivery)),
        }
    }

    /// Fills `bytes` with random numbers for the guest (RDRAND, RDSEED, virtio-rng).
    pub fn random(&self, bytes: &mut [u8]) {
        match self.recorder() {
            None => host_random(bytes),
            Some(recorder) => recorder.random(bytes),
        }
    }
}

fn host_random(bytes: &mut [u8]) {
    let mut filled = 0;
    while filled < bytes.len() {
        match rustix::rand::getrandom(&mut bytes[filled..], rustix::rand::GetRandomFlags::empty()) {
            Ok(n) => filled += n,
            Err(rustix::io::Errno::INTR) => {}
            // getrandom cannot fail otherwise on a kernel that has it; an unlucky sandbox shows here, at once.
            Err(e) => panic!("getrandom failed: {e}; the host kernel or its sandbox denies random numbers"),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;

    #[derive(Default)]
    struct Hold(Mutex<Vec<Box<dyn FnOnce() + Send>>>);
    impl Recorder for Hold {
        fn deliver(&self, _kind: InputKind, delivery: Box<dyn FnOnce() + Send>) {
            self.0.lock().unwrap().push(delivery);
        }
        fn random(&self, bytes: &mut [u8]) {
            bytes.fill(4);
        }
    }

    #[test]
    fn live_gate_delivers_at_once_and_recorded_gate_holds() {
        let flag = Arc::new(AtomicBool::new(false));
        let f = flag.clone();
        InputGate::live().deliver(InputKind::Timer, move || f.store(true, Ordering::SeqCst));
        assert!(flag.swap(false, Ordering::SeqCst));

        let hold = Arc::new(Hold::default());
        let gate = InputGate::recorded(hold.clone());
        let f = flag.clone();
        gate.deliver(InputKind::Console, move || f.store(true, Ordering::SeqCst));
        assert!(!flag.load(Ordering::SeqCst));
        for d in hold.0.lock().unwrap().drain(..) {
            d();
        }
        assert!(flag.load(Ordering::SeqCst));
        let mut r = [0; 3];
        gate.random(&mut r);
        assert_eq!(r, [4; 3]);
    }
}
