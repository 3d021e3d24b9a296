use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use atoll_machine::inputs::{InputKind, Recorder};
use prost::Message;

use super::*;
use crate::blk::{Blk, BlkOptions};
use crate::console::Console;
use crate::device::feature;
use crate::rng::Rng;
use crate::testing::{MemoryDisk, Setup, TestDriver, TestMachine, into, out};

fn rng(machine: &TestMachine) -> TestDriver {
    TestDriver::probe(machine, Rng::new(machine.inputs.clone()), 0)
}

fn console(machine: &TestMachine) -> Arc<Console> {
    Console::new(Arc::new(|_| {}), (80, 25), machine.inputs.clone())
}

#[test]
fn the_function_is_a_modern_virtio_device() {
    let d = rng(&TestMachine::new());
    assert_eq!(d.pci_read(0), 0x1044_1af4);
    assert_eq!(d.pci_read(8), 0x00ff_0001);
    assert_eq!(d.read16(0x12), 1);
    assert_eq!(d.offered(), feature::TRANSPORT);
    let machine = TestMachine::new();
    let blk = Blk::new(MemoryDisk::new(8, false), &BlkOptions::default());
    let d = TestDriver::probe(&machine, blk, 0);
    assert_eq!((d.pci_read(0), d.pci_read(8)), (0x1042_1af4, 0x0100_0001));
    let d = TestDriver::probe(&machine, console(&machine), 1);
    assert_eq!((d.pci_read(0), d.pci_read(8)), (0x1043_1af4, 0x0780_0001));
}

#[test]
fn negotiation_refuses_what_was_not_offered_and_a_legacy_driver() {
    let mut d = rng(&TestMachine::new());
    for features in [0, feature::EVENT_IDX, feature::VERSION_1 | 1, feature::VERSION_1 | 1 << 34, !0] {
        d.reset();
        assert!(!d.negotiate(features), "{features:#x}");
        d.write8(0x14, 15);
        assert_eq!(d.status(), 3, "neither FEATURES_OK nor DRIVER_OK stick");
    }
    d.reset();
    assert!(d.negotiate(feature::VERSION_1));
    // What is agreed on does not change any more.
    d.write32(8, 0);
    d.write32(0xc, 1 << 29);
    assert_eq!(d.read32(0xc), 0);
    d.reset();
    d.write32(8, 2);
    d.write32(0xc, 1);
    assert_eq!(d.read32(0xc), 0, "there are 64 feature bits");
}

#[test]
fn a_driver_that_was_refused_may_try_again() {
    let mut d = rng(&TestMachine::new());
    assert!(!d.negotiate(!0));
    d.start(Setup::default());
    assert_eq!(d.status(), 15);
}

#[test]
fn queue_registers_are_checked_when_a_queue_is_enabled() {
    // Size, descriptor table, available ring, used ring.
    for (size, desc, avail, used) in [
        (0, 0x1000, 0x2000, 0x3000),
        (3, 0x1000, 0x2000, 0x3000),
        (128, 0x1000, 0x2000, 0x3000),
        (16, 0x1008, 0x2000, 0x3000),
        (16, 0x1000, 0x2001, 0x3000),
        (16, 0x1000, 0x2000, 0x3002),
        (16, 0x7f_fff0, 0x2000, 0x3000),
        (16, 0x1000, 0xe000_0000, 0x3000),
        (16, 0x1000, 0x2000, u64::MAX - 3),
    ] {
        let mut d = rng(&TestMachine::new());
        d.reset();
        assert!(d.negotiate(feature::VERSION_1));
        d.write16(0x18, size);
        for (at, address) in [(0x20, desc), (0x28, avail), (0x30, used)] {
            d.write32(at, address as u32);
            d.write32(at + 4, (address >> 32) as u32);
        }
        d.write16(0x1c, 1);
        assert_eq!(d.read16(0x1c), 0, "{size} {desc:#x} {avail:#x} {used:#x}");
        assert!(d.needs_reset());
        d.start(Setup::default());
        assert_eq!(d.read16(0x1c), 1);
    }
}

#[test]
fn a_queue_that_does_not_exist_has_size_zero() {
    let mut d = rng(&TestMachine::new());
    d.start(Setup::default());
    d.write16(0x16, 7);
    assert_eq!((d.read16(0x18), d.read16(0x1c)), (0, 0));
    d.write16(0x18, 8);
    d.write16(0x1c, 1);
    d.kick(7);
    assert_eq!(d.status(), 15);
}

#[test]
fn an_enabled_queue_does_not_move() {
    let mut d = rng(&TestMachine::new());
    d.start(Setup::default());
    let before = (d.read16(0x18), d.read32(0x20));
    d.write16(0x18, 4);
    d.write32(0x20, 0x1000);
    d.write16(0x1c, 0);
    assert_eq!((d.read16(0x18), d.read32(0x20), d.read16(0x1c)), (before.0, before.1, 1));
}

#[test]
fn a_vector_that_does_not_exist_reads_back_as_none() {
    let mut d = rng(&TestMachine::new());
    d.start(Setup::default());
    d.write16(0x1a, 2);
    assert_eq!(d.read16(0x1a), 0xffff);
    d.write16(0x10, 1);
    assert_eq!(d.read16(0x10), 1);
    let a = d.alloc(8, 8);
    d.add(0, &[into(a, 8)]);
    d.kick(0);
    assert!(d.take_used(0).is_some());
    assert!(d.interrupts.take().is_empty(), "no vector, no interrupt");
    assert!(!d.interrupts.intx());
}

#[test]
fn event_index_decides_which_requests_interrupt() {
    let mut d = rng(&TestMachine::new());
    assert_ne!(d.start(Setup::default()) & feature::EVENT_IDX, 0);
    let a = d.alloc(8, 8);
    let one = |d: &mut TestDriver| {
        d.add(0, &[into(a, 8)]);
        d.kick(0);
        assert!(d.take_used(0).is_some());
        d.interrupts.take().len()
    };
    d.set_used_event(0, 0);
    assert_eq!(one(&mut d), 1);
    assert_eq!([one(&mut d), one(&mut d)], [0, 0], "the driver asked for the first only");
    d.set_used_event(0, 4);
    assert_eq!([one(&mut d), one(&mut d), one(&mut d)], [0, 1, 0]);
    assert_eq!(d.avail_event(0), 6, "the device wants to hear about the next request");
    // Four requests in one notification that pass the event: one interrupt.
    d.set_used_event(0, 7);
    for _ in 0..4 {
        d.add(0, &[into(a, 8)]);
    }
    d.kick(0);
    assert_eq!(d.interrupts.take().len(), 1);
}

#[test]
fn without_event_index_the_flag_decides() {
    let mut d = rng(&TestMachine::new());
    assert_eq!(d.start(Setup { features: 0, ..Setup::default() }), feature::VERSION_1);
    let a = d.alloc(8, 8);
    for (flag, interrupts) in [(0, 1), (1, 0), (0, 1)] {
        d.store16(d.queues[0].avail, flag);
        d.add(0, &[into(a, 8)]);
        d.kick(0);
        assert_eq!(d.interrupts.take().len(), interrupts);
    }
    assert_eq!(d.load16(d.queues[0].used), 0, "the device wants notifications");
    d.add_indirect(0, &[into(a, 8)]);
    d.kick(0);
    assert!(d.needs_reset(), "indirect descriptors were not negotiated");
}

#[test]
fn a_masked_vector_fires_when_unmasked() {
    let mut d = rng(&TestMachine::new());
    d.start(Setup::default());
    let a = d.alloc(8, 8);
    d.mask_vector(1, true);
    d.add(0, &[into(a, 8)]);
    d.kick(0);
    assert!(d.interrupts.take().is_empty());
    d.mask_vector(1, false);
    assert_eq!(d.interrupts.take(), [1]);
}

#[test]
fn without_msix_the_isr_and_the_wire_are_used() {
    let machine = TestMachine::new();
    let console = console(&machine);
    let mut d = TestDriver::probe(&machine, console.clone(), 0);
    d.start(Setup { msix: false, ..Setup::default() });
    let a = d.alloc(8, 8);
    d.add(1, &[out(a, 8)]);
    d.kick(1);
    assert!(d.interrupts.intx());
    console.resize(1, 1);
    assert_eq!(d.isr(), 3, "queue and configuration");
    assert!(!d.interrupts.intx(), "reading acknowledges");
    assert_eq!(d.isr(), 0);
    d.set_used_event(1, 1);
    d.add(1, &[out(a, 8)]);
    d.kick(1);
    assert!(d.interrupts.intx());
    d.reset();
    assert!(!d.interrupts.intx(), "a reset takes the interrupt back");
    assert!(d.interrupts.take().is_empty());
}

#[test]
fn the_registers_can_be_reached_through_configuration_space() {
    let mut d = rng(&TestMachine::new());
    d.start(Setup::default());
    let cap = d.capability(0x09, Some(5)).unwrap();
    let access = |d: &TestDriver, offset: u32, len: u32| {
        d.pci.config_write(cap + 4, &[0]);
        d.pci_write(cap + 8, offset);
        d.pci_write(cap + 12, len);
    };
    access(&d, 0x14, 1);
    assert_eq!(d.pci_read(cap + 16) & 0xff, 15);
    access(&d, 0x12, 2);
    assert_eq!(d.pci_read(cap + 16) & 0xffff, 1);
    let a = d.alloc(8, 8);
    d.add(0, &[into(a, 8)]);
    access(&d, 0x3000, 2);
    d.pci_write(cap + 16, 0);
    assert!(d.take_used(0).is_some(), "a notification through configuration space");
    for (offset, len) in [(0x14, 3), (0x3fff, 4), (0x4000, 1), (0x15, 2), (u32::MAX, 1), (0x14, 0)] {
        access(&d, offset, len);
        d.pci_write(cap + 16, 0);
        d.pci_read(cap + 16);
    }
    access(&d, 0x14, 1);
    d.pci_write(cap + 16, 0);
    assert_eq!(d.status(), 0, "a reset through configuration space");
}

#[test]
fn nothing_is_touched_without_bus_mastering() {
    let mut d = rng(&TestMachine::new());
    d.start(Setup::default());
    let a = d.alloc(8, 8);
    d.pci_write(4, 2);
    d.add(0, &[into(a, 8)]);
    d.kick(0);
    assert!(d.take_used(0).is_none());
    d.pci_write(4, 6);
    assert!(d.take_used(0).is_some());
}

#[test]
fn a_paused_device_waits_and_then_catches_up() {
    let mut d = rng(&TestMachine::new());
    d.start(Setup::default());
    let a = d.alloc(8, 8);
    d.pci.pause();
    d.add(0, &[into(a, 8)]);
    d.kick(0);
    assert!(d.take_used(0).is_none());
    d.pci.resume();
    assert!(d.take_used(0).is_some());
}

#[test]
fn a_device_saved_with_outstanding_buffers_goes_on_where_it_was() {
    let machine = TestMachine::new();
    let before = console(&machine);
    let mut d = TestDriver::probe(&machine, before.clone(), 0);
    d.start(Setup::default());
    let a = d.alloc(64, 16);
    // One buffer used, two outstanding, and one piece of output nobody looked at.
    for i in 0..3 {
        d.add(0, &[into(a + i * 16, 16)]);
    }
    d.kick(0);
    before.receive(b"first");
    assert_eq!(d.take_used(0).unwrap().1, 5);
    d.set_used_event(0, 1);
    d.pci.pause();
    let text = d.alloc_bytes(b"output");
    d.add(1, &[out(text, 6)]);
    before.receive(b"later");
    let saved = d.pci.save();
    let saved = VirtioPciStateV1::decode(&saved.encode_to_vec()[..]).unwrap();
    let queues = d.queues.clone();
    let (status, regions) = (d.status(), d.regions());
    drop(d);

    let output = Arc::new(Mutex::new(Vec::new()));
    let sink = output.clone();
    let after = Console::new(
        Arc::new(move |b: &[u8]| sink.lock().unwrap().extend_from_slice(b)),
        (1, 1),
        machine.inputs.clone(),
    );
    let (pci, interrupts) = machine.plug(after.clone());
    pci.restore(&saved).unwrap();
    assert_eq!(pci.save(), saved, "everything is in the saved state");
    assert!(interrupts.take().is_empty() && output.lock().unwrap().is_empty(), "nothing before resume");
    pci.resume();
    assert_eq!(*output.lock().unwrap(), b"output");
    let mut d = TestDriver::attach(&machine, pci, interrupts, 0);
    assert_eq!((d.status(), d.regions()), (status, regions));
    d.queues = queues;
    assert_eq!(d.take_used(0).unwrap().1, 5);
    assert_eq!(d.load(a + 16, 5), b"later");
    after.receive(b"and more");
    assert_eq!(d.take_used(0).unwrap().1, 8);
    assert_eq!(d.config::<2>(0), [80, 0]);
    assert!(d.interrupts.take().contains(&1));
}

#[test]
fn a_saved_state_of_something_else_is_refused_and_leaves_a_reset_device() {
    let machine = TestMachine::new();
    let mut d = TestDriver::probe(&machine, console(&machine), 0);
    d.start(Setup::default());
    let good = d.pci.save();
    let fresh = |machine: &TestMachine| machine.plug(console(machine)).0;
    let mut bad = vec![];
    let mut s = good.clone();
    s.driver_features = Some(!0);
    bad.push(s);
    let mut s = good.clone();
    s.queues.push(s.queues[0].clone());
    bad.push(s);
    let mut s = good.clone();
    s.queues[1].desc = Some(0xe000_0000);
    bad.push(s);
    let mut s = good.clone();
    s.queues[0].size = Some(7);
    bad.push(s);
    let mut s = good.clone();
    s.device = Some(vec![0xff; 3]);
    bad.push(s);
    bad.push(rng(&TestMachine::new()).pci.save());
    for state in bad {
        let pci = fresh(&machine);
        assert!(pci.restore(&state).is_err());
        assert_eq!(pci.save().status, Some(0));
    }
    let pci = fresh(&machine);
    pci.restore(&VirtioPciStateV1::default()).unwrap();
    assert_eq!(pci.save().status, Some(0), "an empty state is power-on");
}

#[test]
fn a_function_reset_returns_to_power_on() {
    let machine = TestMachine::new();
    let mut d = rng(&machine);
    let fresh = machine.plug(Rng::new(machine.inputs.clone())).0.save();
    d.start(Setup::default());
    d.pci.reset();
    assert_eq!(d.pci.save(), fresh);
    assert_eq!(d.mmio_read::<4>(d.regions()[0]), [0xff; 4], "the BAR is not mapped any more");
}

/// A disk whose flush takes until it is let go.
struct SlowDisk {
    inner: Arc<MemoryDisk>,
    held: Mutex<()>,
    entered: AtomicUsize,
}
impl atoll_storage::Disk for SlowDisk {
    fn capacity_bytes(&self) -> u64 {
        self.inner.capacity_bytes()
    }
    fn logical_block_size(&self) -> u32 {
        512
    }
    fn capabilities(&self) -> atoll_storage::Capabilities {
        self.inner.capabilities()
    }
    fn read_at(
        &self,
        offset: u64,
        buffers: &[vm_memory::VolatileSlice<'_>],
    ) -> Result<(), atoll_storage::DiskError> {
        self.inner.read_at(offset, buffers)
    }
    fn write_at(
        &self,
        offset: u64,
        buffers: &[vm_memory::VolatileSlice<'_>],
    ) -> Result<(), atoll_storage::DiskError> {
        self.inner.write_at(offset, buffers)
    }
    fn flush(&self) -> Result<(), atoll_storage::DiskError> {
        self.entered.fetch_add(1, Ordering::SeqCst);
        drop(self.held.lock());
        self.inner.flush()
    }
    fn discard(&self, offset: u64, len: u64) -> Result<(), atoll_storage::DiskError> {
        self.inner.discard(offset, len)
    }
    fn write_zeroes(&self, offset: u64, len: u64, unmap: bool) -> Result<(), atoll_storage::DiskError> {
        self.inner.write_zeroes(offset, len, unmap)
    }
    fn metrics(&self) -> &atoll_storage::DiskMetrics {
        self.inner.metrics()
    }
}

fn slow_disk() -> Arc<SlowDisk> {
    let inner = MemoryDisk::new(64, false);
    Arc::new(SlowDisk { inner, held: Mutex::new(()), entered: AtomicUsize::new(0) })
}

fn block_request(d: &mut TestDriver, queue: usize, kind: u32) -> u64 {
    let mut header = kind.to_le_bytes().to_vec();
    header.resize(16, 0);
    let (header, status) = (d.alloc_bytes(&header), d.alloc_bytes(&[9]));
    d.add(queue, &[out(header, 16), into(status, 1)]);
    d.kick(queue as u16);
    status
}

fn wait_for(what: impl Fn() -> bool) {
    let end = Instant::now() + Duration::from_secs(10);
    while !what() {
        assert!(Instant::now() < end, "timed out");
        std::thread::yield_now();
    }
}

#[test]
fn a_slow_flush_holds_up_neither_registers_nor_other_queues() {
    let disk = slow_disk();
    let machine = TestMachine::new();
    let blk = Blk::new(disk.clone(), &BlkOptions { queues: 2, ..Default::default() });
    let mut d = TestDriver::probe(&machine, blk, 0);
    d.start(Setup::default());
    let held = disk.held.lock().unwrap();
    let flush = block_request(&mut d, 0, 4);
    wait_for(|| disk.entered.load(Ordering::SeqCst) == 1);
    assert_eq!(d.status(), 15);
    let id = block_request(&mut d, 0, 8);
    assert!(d.take_used(0).is_some(), "what comes after does not wait");
    assert_eq!((d.load(flush, 1), d.load(id, 1)), (vec![9], vec![0]));
    let other = block_request(&mut d, 1, 8);
    assert!(d.take_used(1).is_some());
    assert_eq!(d.load(other, 1), [0]);
    drop(held);
    assert!(d.wait_used(0).is_some());
    assert_eq!(d.load(flush, 1), [0]);
}

#[test]
fn a_reset_waits_for_requests_in_flight_and_forgets_the_rest() {
    let disk = slow_disk();
    let machine = TestMachine::new();
    let mut d = TestDriver::probe(&machine, Blk::new(disk.clone(), &BlkOptions::default()), 0);
    d.start(Setup::default());
    let held = disk.held.lock().unwrap();
    let first = block_request(&mut d, 0, 4);
    wait_for(|| disk.entered.load(Ordering::SeqCst) == 1);
    let second = block_request(&mut d, 0, 4);
    std::thread::scope(|scope| {
        let pci = d.pci.clone();
        let reset = scope.spawn(move || pci.reset());
        std::thread::sleep(Duration::from_millis(20));
        assert!(!reset.is_finished());
        drop(held);
    });
    // Both flushes ended; neither was handed back.
    assert_eq!((d.load(first, 1), d.load(second, 1)), (vec![9], vec![9]));
    let entered = disk.entered.load(Ordering::SeqCst);
    std::thread::sleep(Duration::from_millis(20));
    assert_eq!(disk.entered.load(Ordering::SeqCst), entered);
}

#[test]
fn dropping_a_device_ends_its_thread() {
    let disk = slow_disk();
    let machine = TestMachine::new();
    let mut d = TestDriver::probe(&machine, Blk::new(disk.clone(), &BlkOptions::default()), 0);
    d.start(Setup::default());
    block_request(&mut d, 0, 4);
    assert!(d.wait_used(0).is_some());
    drop(d);
    // The device, and with it the thread's last chance to hold it, is gone.
    assert_eq!(Arc::strong_count(&disk), 1);
}

type Delivery = Box<dyn FnOnce() + Send>;

#[derive(Default)]
struct Hold(Mutex<Vec<(InputKind, Delivery)>>);
impl Recorder for Hold {
    fn deliver(&self, kind: InputKind, delivery: Delivery) {
        self.0.lock().unwrap().push((kind, delivery));
    }
    fn random(&self, bytes: &mut [u8]) {
        bytes.fill(4);
    }
}

#[test]
fn the_devices_thread_reaches_guest_memory_through_the_gate_only() {
    let hold = Arc::new(Hold::default());
    let machine = TestMachine::with_inputs(InputGate::recorded(hold.clone()));
    let disk = slow_disk();
    let mut d = TestDriver::probe(&machine, Blk::new(disk.clone(), &BlkOptions::default()), 0);
    d.start(Setup::default());
    block_request(&mut d, 0, 4);
    wait_for(|| !hold.0.lock().unwrap().is_empty());
    assert!(d.take_used(0).is_none());
    assert_eq!(disk.entered.load(Ordering::SeqCst), 0);
    let (kind, delivery) = hold.0.lock().unwrap().pop().unwrap();
    assert_eq!(kind, InputKind::Completion);
    delivery();
    assert!(d.take_used(0).is_some());
}

#[test]
fn notifications_from_many_threads_lose_no_request() {
    let machine = TestMachine::new();
    let mut d = TestDriver::probe(&machine, Rng::new(machine.inputs.clone()), 0);
    d.start(Setup { queue_size: 64, ..Setup::default() });
    let a = d.alloc(8, 8);
    let notify = d.regions()[3];
    let stop = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                while !stop.load(Ordering::SeqCst) {
                    machine.space.mmio_write(notify, &[0, 0]);
                }
            });
        }
        for _ in 0..2000 {
            d.add(0, &[into(a, 8)]);
            d.kick(0);
            assert!(d.wait_used(0).is_some());
        }
        stop.store(true, Ordering::SeqCst);
    });
    assert!(!d.needs_reset());
}
