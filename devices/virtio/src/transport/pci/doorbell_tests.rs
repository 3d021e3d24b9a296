//! Tests of [`super`]: where doorbells are bound, and that none is lost.

use std::sync::atomic::AtomicBool;
use std::sync::atomic::Ordering::SeqCst;
use std::time::{Duration, Instant};

use atoll_pci::PciDevice;

use super::super::VirtioPciDevice;
use super::*;
use crate::blk::{Blk, BlkOptions};
use crate::rng::Rng;
use crate::testing::{Bells, MemoryDisk, Setup, TestDriver, TestMachine, into};

fn rng(machine: &TestMachine) -> TestDriver {
    TestDriver::probe(machine, Rng::new(machine.inputs.clone()), 0)
}

fn machine() -> (TestMachine, Arc<Bells>) {
    let machine = TestMachine::with_bells();
    let bells = machine.bells.clone().unwrap();
    (machine, bells)
}

fn notify_of(d: &TestDriver) -> u64 {
    d.regions()[3]
}

#[test]
fn a_doorbell_runs_the_queue_on_the_devices_thread() {
    let (machine, bells) = machine();
    let mut d = rng(&machine);
    assert_eq!(bells.changes.load(SeqCst), 0, "a device nobody drives costs nothing");
    d.start(Setup::default());
    assert_eq!(bells.addresses(), [notify_of(&d)]);
    let a = d.alloc(64, 8);
    for _ in 0..100 {
        d.add(0, &[into(a, 8)]);
        d.kick(0);
        assert!(d.wait_used(0).is_some());
    }
    assert_eq!(bells.changes.load(SeqCst), 1);
}

#[test]
fn only_enabled_queues_have_doorbells_and_each_its_own() {
    let (machine, bells) = machine();
    let options = BlkOptions { queues: 4, ..BlkOptions::default() };
    let mut d = TestDriver::probe(&machine, Blk::new(MemoryDisk::new(8, false), &options), 0);
    d.start(Setup::default());
    let base = notify_of(&d);
    assert_eq!(bells.addresses(), [base, base + 4, base + 8, base + 12]);
    d.reset();
    assert!(bells.addresses().is_empty());
    assert!(d.negotiate(d.offered()));
    d.write8(0x14, 15);
    assert!(bells.addresses().is_empty(), "no queue is enabled");
}

#[test]
fn doorbells_follow_the_bar_and_end_with_it() {
    let (machine, bells) = machine();
    let mut d = rng(&machine);
    d.start(Setup::default());
    let first = notify_of(&d);
    d.pci_write(4, 4);
    assert!(bells.addresses().is_empty(), "the BAR is switched off");
    d.pci_write(4, 6);
    assert_eq!(bells.addresses(), [first]);
    d.place_bars(0xe400_0000);
    d.find_capabilities();
    assert_eq!(bells.addresses(), [0xe400_0000 + NOTIFY]);
    assert_eq!(notify_of(&d), 0xe400_0000 + NOTIFY);
    let a = d.alloc(8, 8);
    d.add(0, &[into(a, 8)]);
    d.kick(0);
    assert!(d.wait_used(0).is_some());
    d.reset();
    assert!(bells.addresses().is_empty());
    d.start(Setup::default());
    assert_eq!(bells.addresses().len(), 1);
    drop(d);
    assert!(bells.addresses().is_empty());
}

#[test]
fn what_cannot_be_bound_is_processed_as_without_routes() {
    let (machine, bells) = machine();
    bells.refuse.store(true, SeqCst);
    let mut d = rng(&machine);
    d.start(Setup::default());
    let a = d.alloc(8, 8);
    d.add(0, &[into(a, 8)]);
    d.kick(0);
    assert!(d.take_used(0).is_some(), "at once, on the vCPU's thread");
}

#[test]
fn a_kick_in_the_event_while_paused_is_processed_after_the_resume() {
    for held in [false, true] {
        let (machine, bells) = machine();
        let mut d = rng(&machine);
        d.start(Setup::default());
        let a = d.alloc(8, 8);
        bells.hold.store(held, SeqCst);
        d.pci.pause();
        d.add(0, &[into(a, 8)]);
        d.kick(0);
        std::thread::sleep(Duration::from_millis(20));
        assert!(d.take_used(0).is_none(), "paused");
        d.pci.resume();
        // The thread may get to the event only now.
        bells.release();
        assert!(d.wait_used(0).is_some());
    }
}

#[test]
fn a_kick_in_the_event_is_in_the_saved_state() {
    let (machine, bells) = machine();
    let mut d = rng(&machine);
    d.start(Setup::default());
    let a = d.alloc(8, 8);
    bells.hold.store(true, SeqCst);
    d.add(0, &[into(a, 8)]);
    d.kick(0);
    d.pci.pause();
    let saved = d.pci.save();
    let queues = d.queues.clone();
    drop(d);
    assert!(bells.addresses().is_empty());

    let (pci, interrupts) = machine.plug(Rng::new(machine.inputs.clone()));
    pci.restore(&saved).unwrap();
    assert_eq!(bells.addresses().len(), 1, "bound where the saved BAR is");
    pci.resume();
    let mut d = TestDriver::attach(&machine, pci, interrupts, 0);
    d.queues = queues;
    assert!(d.take_used(0).is_some());
    bells.hold.store(false, SeqCst);
    d.add(0, &[into(a, 8)]);
    d.kick(0);
    assert!(d.wait_used(0).is_some());
}

/// A driver kicks once for each request, while another thread switches the BAR off and on and a third pauses and
/// resumes: every request is finished. Kicks and switches take turns, as a guest's would.
#[test]
fn no_kick_is_lost_while_the_bar_is_remapped_and_the_device_pauses() {
    let (machine, bells) = machine();
    let mut d = rng(&machine);
    d.start(Setup::default());
    let (stop, decoding) = (Arc::new(AtomicBool::new(false)), Arc::new(Mutex::new(())));
    let disturb = |step: fn(&VirtioPciDevice, &Mutex<()>)| {
        let (pci, stop, decoding) = (d.pci.clone(), stop.clone(), decoding.clone());
        std::thread::spawn(move || {
            while !stop.load(SeqCst) {
                step(&pci, &decoding);
                std::thread::sleep(Duration::from_micros(50));
            }
        })
    };
    let pauses = disturb(|pci, _| {
        pci.pause();
        std::thread::yield_now();
        pci.resume();
    });
    let switches = disturb(|pci, decoding| {
        let _turn = lock(decoding);
        // Bus mastering stays on.
        pci.config_write(4, &4u16.to_le_bytes());
        pci.config_write(4, &6u16.to_le_bytes());
    });
    let a = d.alloc(8, 8);
    for n in 0..2000 {
        d.add(0, &[into(a, 8)]);
        let turn = lock(&decoding);
        d.kick(0);
        drop(turn);
        // Without a look at the registers, which may be switched off.
        let end = Instant::now() + Duration::from_secs(10);
        while d.take_used(0).is_none() {
            assert!(Instant::now() < end, "request {n}");
            std::thread::yield_now();
        }
    }
    stop.store(true, SeqCst);
    pauses.join().unwrap();
    switches.join().unwrap();
    assert!(bells.changes.load(SeqCst) > 2);
}
