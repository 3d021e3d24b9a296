//! Drivers that write nonsense everywhere: nothing panics or hangs, the device asks for a reset, and a device
//! beside it does not notice. Seeds are in the failure messages.

use std::sync::Arc;

use atoll_network::test_utils::pair;
use atoll_network::{FrameHeader, MacAddress};
use atoll_pci::PciDevice;

use crate::blk::{Blk, BlkOptions};
use crate::console::Console;
use crate::device::VirtioDevice;
use crate::net::{Net, NetOptions};
use crate::rng::Rng;
use crate::testing::{MemoryDisk, RAM_BYTES, Random, Setup, TestDriver, TestMachine, into, out};

/// Operations over all seeds of one device.
const OPERATIONS: u64 = 100_000;
const SEEDS: u64 = 20;

fn device(which: u64, machine: &TestMachine) -> Arc<dyn VirtioDevice> {
    match which {
        0 => Blk::new(MemoryDisk::new(64, false), &BlkOptions { queues: 2, ..BlkOptions::default() }),
        1 => Console::new(Arc::new(|_| {}), (80, 25), machine.inputs.clone()),
        3 => network(),
        _ => Rng::new(machine.inputs.clone()),
    }
}

/// A network device of two pairs with frames of all sizes waiting for it, whose port fills up at some time.
fn network() -> Arc<dyn VirtioDevice> {
    let (port, peer) = pair(2, 4000);
    let mut r = Random::new(0);
    for n in 0..4000 {
        let len = 14 + r.below(if n % 10 == 0 { 60_000 } else { 1500 });
        peer.send_bytes(n % 2, &FrameHeader::default(), &vec![n as u8; len as usize]);
    }
    let options = NetOptions { queue_pairs: 2, ..NetOptions::new(MacAddress([2, 0, 0, 0, 0, 1])) };
    Net::new(Arc::new(port), &options)
}

/// An address that is often near something: rings, RAM's end, the end of everything.
fn address(r: &mut Random, d: &TestDriver) -> u64 {
    let ring = d.queues.get(r.below(3) as usize).map_or(0x1000, |q| match r.below(3) {
        0 => q.desc,
        1 => q.avail,
        _ => q.used,
    });
    match r.below(8) {
        0 => r.bits(),
        1 => RAM_BYTES - r.below(64),
        2 => u64::MAX - r.below(64),
        3 => 0xe000_0000 + r.below(0x8000),
        4 => ring + r.below(256),
        _ => r.below(0x8_0000),
    }
}

fn length(r: &mut Random) -> u32 {
    match r.below(6) {
        0 => r.bits() as u32,
        1 => u32::MAX - r.below(4) as u32,
        2 => 16 * r.below(2000) as u32,
        3 => 0,
        _ => r.below(2048) as u32,
    }
}

/// Puts something into the rings: mostly plausible, so that it gets far.
fn ring_nonsense(r: &mut Random, d: &mut TestDriver) {
    let count = d.queues.len() as u64;
    if count == 0 {
        return;
    }
    let queue = r.below(count) as usize;
    let q = d.queues[queue];
    match r.below(10) {
        0 => d.store16(q.avail + 2, r.bits() as u16),
        1 => d.publish(queue, r.bits() as u16),
        2 => d.store16(q.avail, r.bits() as u16),
        3 => d.set_used_event(queue, r.bits() as u16),
        4 => d.store16(q.used + 2, r.bits() as u16),
        5 => {
            let base = 0x4_0000 + r.below(0x1000) * 16;
            for i in 0..8 {
                let (gpa, len) = (address(r, d), length(r));
                d.descriptor(base, i, gpa, len, r.below(8) as u16, r.below(10) as u16);
            }
            d.descriptor(q.desc, 0, base, 16 * r.below(12) as u32, 4 | r.below(2) as u16, 1);
            d.publish(queue, 0);
        }
        _ => {
            for _ in 0..4 {
                let (index, gpa, len) = (r.below(u64::from(q.size)) as u16, address(r, d), length(r));
                let (flags, next) = (r.below(10) as u16, r.below(u64::from(q.size) + 2) as u16);
                d.descriptor(q.desc, index, gpa, len, flags, next);
            }
            d.publish(queue, r.below(u64::from(q.size) + 1) as u16);
        }
    }
    d.kick(queue as u16);
}

fn register_nonsense(r: &mut Random, d: &TestDriver) {
    let region = d.regions()[r.below(5) as usize];
    let offset = if r.below(4) == 0 { r.below(0xfc0) } else { r.below(0x48) };
    let len = [1, 2, 4, 8, 64, 3][r.below(6) as usize];
    let bytes: Vec<u8> = (0..len)
        .map(|_| match r.below(3) {
            0 => 0,
            1 => 1 << r.below(8),
            _ => r.bits() as u8,
        })
        .collect();
    if r.below(2) == 0 {
        d.mmio_read::<64>(region + offset);
    } else {
        d.mmio_write(region + offset, &bytes);
    }
}

fn plausible_request(r: &mut Random, d: &mut TestDriver) {
    let count = d.queues.len() as u64;
    if count == 0 {
        return;
    }
    let queue = r.below(count) as usize;
    if count == 5 {
        return plausible_frame(r, d, queue);
    }
    let header = 0x3_0000;
    let kind = [0, 1, 4, 8, 11, 13, r.bits() as u32][r.below(7) as usize];
    d.store(header, &kind.to_le_bytes());
    d.store(header + 8, &r.below(80).to_le_bytes());
    let data = address(r, d);
    let len = length(r);
    let middle = if r.below(2) == 0 { into(data, len) } else { out(data, len) };
    d.add(queue, &[out(header, 16), middle, into(header + 64, 1)]);
    d.kick(queue as u16);
}

/// What a network driver puts into one of its five queues, mostly.
fn plausible_frame(r: &mut Random, d: &mut TestDriver, queue: usize) {
    let (header, data, len) = (0x3_0000, address(r, d), length(r));
    let mut bytes = [0; 16];
    for byte in &mut bytes {
        *byte = if r.below(3) == 0 { r.below(8) as u8 } else { 0 };
    }
    d.store(header, &bytes);
    let pieces = match (r.below(8), queue) {
        (0, _) => vec![out(header, 3), into(header + 64, 1)],
        (_, 4) => vec![out(header, 2), out(header + 2, r.below(10) as u32), into(header + 64, 1)],
        (1, 0 | 2) => vec![into(data, len)],
        (_, 0 | 2) => vec![into(0x5_0000 + r.below(0x1_0000), 12 + r.below(4096) as u32)],
        (1, _) => vec![out(header, 12), out(data, len)],
        _ => vec![out(header, 12), out(0x5_0000, r.below(70_000) as u32)],
    };
    d.add(queue, &pieces);
    d.kick(queue as u16);
}

fn assault(which: u64, seed: u64) -> u64 {
    let machine = TestMachine::new();
    let mut bystander = TestDriver::probe(&machine, Rng::new(machine.inputs.clone()), 15);
    bystander.start(Setup::default());
    let bystander_buffer = bystander.alloc(16, 16);
    let mut d = TestDriver::probe(&machine, device(which, &machine), 0);
    let memory_start = d.alloc(0, 16);
    let mut r = Random::new(seed * 4 + which);
    let mut stopped = 0;
    for _ in 0..OPERATIONS / SEEDS {
        match r.below(12) {
            0..=3 => ring_nonsense(&mut r, &mut d),
            4..=6 => plausible_request(&mut r, &mut d),
            7..=9 => register_nonsense(&mut r, &d),
            10 => {
                d.pci_read(r.below(0x40) as u16 * 4);
                // Not the BARs: where the registers are is the test's business.
                let offset = 0x40 + r.below(0x30) as u16 * 4;
                d.pci_write(offset, r.bits() as u32);
            }
            _ => {}
        }
        if d.needs_reset() {
            stopped += 1;
        }
        if d.status() & 0x44 != 4 && r.below(4) == 0 {
            d.pci.reset();
            let (pci, interrupts) = (d.pci.clone(), d.interrupts.clone());
            d = TestDriver::attach(&machine, pci, interrupts, 0);
            assert_eq!(d.alloc(0, 16), memory_start);
            d.start(Setup { msix: r.below(2) == 0, features: r.bits() | 1 << 28, queue_size: 16 });
        }
    }
    // Whatever was written to the bystander's memory, its registers and rings are its own.
    let working = bystander.status();
    bystander.start(Setup::default());
    bystander.add(0, &[into(bystander_buffer, 16)]);
    bystander.kick(0);
    assert!(bystander.take_used(0).is_some(), "device {which}, seed {seed}");
    assert_eq!(working & !0x40, 15, "device {which}, seed {seed}");
    // And so does the device itself after a reset.
    d.pci.reset();
    let (pci, interrupts) = (d.pci.clone(), d.interrupts.clone());
    let mut d = TestDriver::attach(&machine, pci, interrupts, 0);
    d.start(Setup::default());
    assert_eq!(d.status(), 15, "device {which}, seed {seed}");
    stopped
}

#[test]
fn a_block_device_survives_garbage() {
    let stopped: u64 = (0..SEEDS).map(|seed| assault(0, seed)).sum();
    assert!(stopped > 100, "the garbage must reach the rings: stopped {stopped} times");
}

#[test]
fn a_console_survives_garbage() {
    let stopped: u64 = (0..SEEDS).map(|seed| assault(1, seed)).sum();
    assert!(stopped > 100, "the garbage must reach the rings: stopped {stopped} times");
}

#[test]
fn an_entropy_device_survives_garbage() {
    let stopped: u64 = (0..SEEDS).map(|seed| assault(2, seed)).sum();
    assert!(stopped > 100, "the garbage must reach the rings: stopped {stopped} times");
}

#[test]
fn a_network_device_survives_garbage() {
    let stopped: u64 = (0..SEEDS).map(|seed| assault(3, seed)).sum();
    assert!(stopped > 100, "the garbage must reach the rings: stopped {stopped} times");
}

/// A started entropy device, what its ring 0 looks like, and a change to it.
fn broken(change: impl FnOnce(&mut TestDriver)) -> bool {
    let machine = TestMachine::new();
    let mut d = TestDriver::probe(&machine, Rng::new(machine.inputs.clone()), 0);
    d.start(Setup::default());
    change(&mut d);
    d.kick(0);
    d.needs_reset() && d.interrupts.take().contains(&0)
}

#[test]
fn each_kind_of_malformed_ring_stops_the_device() {
    let publish = |d: &mut TestDriver, list: &[(u64, u32, u16, u16)]| {
        let table = d.queues[0].desc;
        for (i, &(gpa, len, flags, next)) in list.iter().enumerate() {
            d.descriptor(table, i as u16, gpa, len, flags, next);
        }
        d.publish(0, 0);
    };
    assert!(!broken(|d| publish(d, &[(0, 8, 2, 0)])), "a good request");
    assert!(!broken(|d| publish(d, &[(0, 0, 2, 0)])), "an empty buffer");
    assert!(broken(|d| d.store16(d.queues[0].avail + 2, 17)), "more available than there are entries");
    assert!(broken(|d| d.publish(0, 16)), "a head outside the table");
    assert!(broken(|d| publish(d, &[(0, 8, 3, 16)])), "a successor outside the table");
    assert!(broken(|d| publish(d, &[(0, 8, 3, 0)])), "a loop of one");
    assert!(broken(|d| publish(d, &[(0, 8, 3, 1), (0, 8, 3, 0)])), "a loop of two");
    assert!(broken(|d| publish(d, &[(RAM_BYTES, 8, 2, 0)])), "a buffer outside RAM");
    assert!(broken(|d| publish(d, &[(RAM_BYTES - 4, 8, 2, 0)])), "a buffer that leaves RAM");
    assert!(broken(|d| publish(d, &[(u64::MAX, 8, 2, 0)])), "a buffer that wraps around");
    assert!(broken(|d| publish(d, &[(0, u32::MAX, 2, 0)])), "a buffer of 4 GiB");
    assert!(broken(|d| publish(d, &[(0, 8, 3, 1), (0, 8, 0, 0)])), "readable after writable");
    assert!(broken(|d| publish(d, &[(0x1000, 0, 4, 0)])), "an empty indirect table");
    assert!(broken(|d| publish(d, &[(0x1000, 24, 4, 0)])), "an indirect table of one and a half");
    assert!(
        broken(|d| publish(d, &[(0x1000, 16, 5, 1), (0, 8, 2, 0)])),
        "an indirect table with a successor"
    );
    assert!(broken(|d| publish(d, &[(RAM_BYTES, 16, 4, 0)])), "an indirect table outside RAM");
    assert!(
        broken(|d| {
            d.descriptor(0x1000, 0, 0x1000, 16, 4, 0);
            publish(d, &[(0x1000, 16, 4, 0)]);
        }),
        "an indirect table in an indirect table"
    );
    assert!(
        broken(|d| {
            for i in 0..1025 {
                d.descriptor(0x1000, i, 0, 0, 3, i + 1);
            }
            publish(d, &[(0x1000, 16 * 2000, 4, 0)]);
        }),
        "a chain longer than any queue"
    );
}
