use atoll_machine::bus::PortBus;
use atoll_machine::memory::AddressSpace;
use atoll_pci::PciBarMapper;

use super::*;
use crate::testing::{MsiLog, Requests, Time, garbage_mmio};

struct Bench {
    time: Time,
    dev: Arc<Watchdog>,
    requests: Arc<Requests>,
    memory: Arc<AddressSpace>,
}

const BAR: u64 = 0xfe00_0000;

fn bench() -> Bench {
    let (time, requests, memory) = (Time::new(), Requests::new(), AddressSpace::new());
    let mapper = PciBarMapper::new(&memory, &Arc::new(PortBus::new()));
    let msi = Arc::new(MsiLog::default());
    let dev = Watchdog::new(&time.timers, &InputGate::live(), requests.clone(), mapper, msi);
    dev.config_write(0x10, &(BAR as u32).to_le_bytes());
    dev.config_write(0x04, &[2]);
    Bench { time, dev, requests, memory }
}

impl Bench {
    fn unlocked(&self, offset: u64, data: &[u8]) {
        self.memory.mmio_write(BAR + 0xc, &[0x80, 0]);
        self.memory.mmio_write(BAR + 0xc, &[0x86, 0]);
        self.memory.mmio_write(BAR + offset, data);
    }
    /// What the Linux driver does for a heartbeat of `seconds`.
    fn start(&self, seconds: u32) {
        self.dev.config_write(CONFIG, &[3, 0]);
        self.dev.config_write(LOCK, &[0]);
        self.unlocked(0, &(seconds << 9).to_le_bytes());
        self.unlocked(4, &(seconds << 9).to_le_bytes());
        self.ping();
        self.dev.config_write(LOCK, &[LOCK_ENABLE]);
    }
    fn ping(&self) {
        self.unlocked(0xc, &RELOAD.to_le_bytes());
    }
    fn timed_out(&self) -> bool {
        let mut b = [0; 2];
        self.memory.mmio_read(BAR + 0xc, &mut b);
        u16::from_le_bytes(b) & TIMEOUT != 0
    }
}

const SECOND: u64 = 1_000_000_000;

#[test]
fn a_guest_that_pings_lives_and_one_that_stops_is_reset() {
    let b = bench();
    b.start(30);
    for _ in 0..10 {
        b.time.run(25 * SECOND);
        b.ping();
    }
    assert!(b.requests.take().is_empty());
    b.time.run(30 * SECOND);
    assert!(b.requests.take().is_empty());
    b.time.run(2 * SECOND);
    assert_eq!(b.requests.take(), [MachineRequest::Reset]);
    b.dev.reset();
    b.dev.config_write(0x10, &(BAR as u32).to_le_bytes());
    b.dev.config_write(0x04, &[2]);
    assert!(b.timed_out(), "the next boot can tell");
    b.unlocked(0xc, &TIMEOUT.to_le_bytes());
    assert!(!b.timed_out());
    b.time.run(1000 * SECOND);
    assert!(b.requests.take().is_empty(), "disabled by the reset");
}

#[test]
fn writes_without_the_unlock_sequence_do_nothing() {
    let b = bench();
    b.start(2);
    for _ in 0..5 {
        b.time.run(SECOND / 2);
        b.memory.mmio_write(BAR + 0xc, &RELOAD.to_le_bytes());
    }
    assert_eq!(b.requests.take(), [MachineRequest::Reset]);
}

#[test]
fn a_locked_watchdog_cannot_be_stopped() {
    let b = bench();
    b.start(5);
    b.dev.config_write(LOCK, &[LOCK_ENABLE | LOCK_LOCKED]);
    b.dev.config_write(LOCK, &[0]);
    b.time.run(6 * SECOND);
    assert_eq!(b.requests.take(), [MachineRequest::Reset]);
    let b = bench();
    b.start(5);
    b.dev.config_write(LOCK, &[0]);
    b.time.run(60 * SECOND);
    assert!(b.requests.take().is_empty());
}

#[test]
fn state_survives_a_round_trip() {
    let b = bench();
    b.start(10);
    b.time.run(6 * SECOND);
    let saved = b.dev.save();
    let c = bench();
    c.time.run(6 * SECOND);
    c.dev.restore(&saved).unwrap();
    assert_eq!(c.dev.save(), saved);
    c.time.run(5 * SECOND);
    assert_eq!(c.requests.take(), [MachineRequest::Reset]);
}

#[test]
fn garbage_is_survived() {
    let b = bench();
    garbage_mmio(&*b.dev.core, 16, 13, |rng| {
        b.unlocked(rng.below(16), &(rng.next() as u32).to_le_bytes());
        let register = if rng.below(2) == 0 { CONFIG } else { LOCK };
        b.dev.config_write(register, &[rng.next() as u8 & 0xfe]);
        b.time.jump(rng.below(SECOND));
        b.requests.take();
    });
    b.dev.reset();
    b.time.run(10_000 * SECOND);
    b.requests.take();
    assert_eq!(b.time.timers.next_deadline(), None);
}
