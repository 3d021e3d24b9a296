//! Tests of [`super`] with the host's kernel: small 16-bit programs, run by the bare ioctls.

use std::time::Duration;

use atoll_machine::bus::MmioDevice;
use atoll_machine::memory::{DirtyReader, PAGE_SIZE};
use kvm_ioctls::{Kvm, VcpuExit};

use super::*;
use crate::host::virtualizes;

const P: u64 = PAGE_SIZE;
/// RAM of the guest, in pages: 8 MiB. Code is in page 1.
const RAM_PAGES: u64 = 2048;
/// Entries of the ring: the fewest that leave room beside what the kernel keeps back.
const ENTRIES: u32 = 1024;
/// KVM_EXIT_DIRTY_RING_FULL.
const RING_FULL: u32 = 31;

struct Nothing;
impl MmioDevice for Nothing {
    fn mmio_read(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0x5a);
    }
    fn mmio_write(&self, _offset: u64, _data: &[u8]) {}
}

/// A guest of one vCPU without interrupts.
pub(crate) struct Guest {
    pub(crate) vm: Arc<VmFd>,
    slots: Arc<Slots>,
    space: Arc<AddressSpace>,
    ram: Arc<RamBlock>,
    vcpu: VcpuFd,
    /// Addresses of accesses that left the guest, and whether they were writes.
    pub(crate) mmio: Vec<(u64, bool)>,
    full: u32,
}

impl Guest {
    /// A guest in real mode that starts at 0:1000 with `code`. `None`, with a printed reason, without KVM.
    pub(crate) fn new(code: &[u8], ring: bool) -> Option<Self> {
        let kvm = match Kvm::new() {
            Ok(kvm) => kvm,
            Err(error) => {
                println!("skipped: /dev/kvm cannot be opened: {error}");
                return None;
            }
        };
        let vm = Arc::new(kvm.create_vm().expect("a virtual machine"));
        let space = AddressSpace::new();
        let ram = RamBlock::new_shared("guest", RAM_PAGES * P).expect("RAM");
        ram.write(P, code).expect("room for the code");
        space.map_ram(0, &ram, 0, RAM_PAGES * P, 0).expect("mapping RAM");
        let (kernel, entries) = Kernel::new(vm.clone(), ring.then_some(ENTRIES));
        if ring && entries.is_none() {
            println!("skipped: this kernel has no dirty ring");
            return None;
        }
        if ring && !virtualizes() {
            println!(
                "a KVM without the processor's virtualization: its ring only works if it never fills up"
            );
        }
        let slots = Slots::with_host(Box::new(kernel), entries, &space).expect("slots");
        let vcpu = vm.create_vcpu(0).expect("a vCPU");
        slots.attach_vcpu(0, &vcpu).expect("the dirty ring");
        let mut sregs = vcpu.get_sregs().expect("registers");
        for segment in [&mut sregs.cs, &mut sregs.ds, &mut sregs.es, &mut sregs.ss] {
            (segment.base, segment.selector) = (0, 0);
        }
        vcpu.set_sregs(&sregs).expect("registers");
        let mut regs = vcpu.get_regs().expect("registers");
        (regs.rip, regs.rflags, regs.rsp) = (P, 2, 0x800);
        vcpu.set_regs(&regs).expect("registers");
        Some(Self { vm, slots, space, ram, vcpu, mmio: Vec::new(), full: 0 })
    }

    /// Takes the page of RAM at `gpa` away.
    pub(crate) fn hole(&self, gpa: u64) {
        self.space.map_mmio(gpa, P, Arc::new(Nothing), 1).expect("mapping a device");
    }

    /// Switches the guest to 32-bit code with flat segments.
    fn protect(&self) {
        let mut sregs = self.vcpu.get_sregs().expect("registers");
        sregs.cr0 |= 1;
        for segment in [&mut sregs.cs, &mut sregs.ds, &mut sregs.es, &mut sregs.ss] {
            (segment.limit, segment.g, segment.db, segment.s, segment.present) = (u32::MAX, 1, 1, 1, 1);
            (segment.selector, segment.type_) = (16, 3);
        }
        (sregs.cs.selector, sregs.cs.type_) = (8, 11);
        self.vcpu.set_sregs(&sregs).expect("registers");
    }

    /// Runs until the guest writes a port, and returns what it wrote; its memory accesses are answered meanwhile.
    pub(crate) fn run(&mut self) -> u8 {
        loop {
            let inside = self.slots.enter(0).expect("slots as they should be");
            let exit = self.vcpu.run();
            drop(inside);
            match exit.expect("a run") {
                VcpuExit::IoOut(_, data) => return data[0],
                VcpuExit::MmioRead(address, data) => {
                    self.space.mmio_read(address, data);
                    self.mmio.push((address, false));
                }
                VcpuExit::MmioWrite(address, data) => {
                    self.space.mmio_write(address, data);
                    self.mmio.push((address, true));
                }
                VcpuExit::Unsupported(RING_FULL) => {
                    self.full += 1;
                    self.slots.ring_full();
                }
                exit => panic!("{exit:?}"),
            }
        }
    }
}

fn take(log: &mut DirtyReader) -> Vec<u64> {
    log.take().iter().collect()
}

/// `mov al, [address]; out 1, al`
fn load(address: u16) -> Vec<u8> {
    let [low, high] = address.to_le_bytes();
    vec![0xa0, low, high, 0xe6, 1]
}

/// `mov byte [address], value`
fn store(address: u16, value: u8) -> Vec<u8> {
    let [low, high] = address.to_le_bytes();
    vec![0xc6, 0x06, low, high, value]
}

/// `out 1, al`
const OUT: [u8; 2] = [0xe6, 1];

#[test]
fn ram_is_shared_rom_is_read_only_and_devices_and_holes_leave_the_guest() {
    let code =
        [load(0x2000), store(0x2001, 7), store(0x3000, 9), load(0x3000), load(0x4000), load(0x5000)].concat();
    let Some(mut guest) = Guest::new(&code, false) else { return };
    let rom = RamBlock::new_shared("rom", P).unwrap();
    rom.write(0, &[0x33]).unwrap();
    guest.space.map_rom(3 * P, &rom, 0, P, 1).unwrap();
    guest.space.map_mmio(4 * P, P, Arc::new(Nothing), 1).unwrap();
    guest.ram.write(0x2000, &[0x22]).unwrap();
    assert_eq!(guest.run(), 0x22);
    assert_eq!(guest.run(), 0x33, "ROM kept its value");
    let mut byte = [0];
    guest.ram.read(0x2001, &mut byte).unwrap();
    assert_eq!(byte, [7]);
    assert_eq!(guest.run(), 0x5a);
    guest.space.map_mmio(5 * P, 16, Arc::new(Nothing), 1).unwrap();
    assert_eq!(guest.run(), 0x5a, "a page that a device covers in part");
    assert_eq!(guest.mmio, [(0x3000, true), (0x4000, false), (0x5000, false)]);
}

#[test]
fn a_page_whose_slot_is_elsewhere_is_answered_by_the_space() {
    let code = [load(0x2000), store(0x2000, 0x44), load(0x2000), load(0x2000)].concat();
    let Some(mut guest) = Guest::new(&code, false) else { return };
    guest.ram.write(0x2000, &[0x22]).unwrap();
    assert_eq!(guest.run(), 0x22);
    // The slot goes, the view still shows RAM: what a vCPU meets in the middle of a change.
    let mut inner = guest.slots.lock();
    guest.slots.remove(&mut inner, 0);
    guest.slots.follow(&mut inner, &FlatView::default());
    drop(inner);
    let before = guest.ram.clone();
    let page = RamBlock::new_shared("code", P).unwrap();
    let mut bytes = [0; P as usize];
    before.read(P, &mut bytes).unwrap();
    page.write(0, &bytes).unwrap();
    let kernel_only = AddressSpace::new();
    kernel_only.map_ram(P, &page, 0, P, 0).unwrap();
    guest.slots.follow(&mut guest.slots.lock(), &kernel_only.view());
    assert_eq!(guest.run(), 0x44);
    assert_eq!(guest.mmio, [(0x2000, true), (0x2000, false)]);
    guest.slots.follow(&mut guest.slots.lock(), &guest.space.view());
    assert_eq!(guest.run(), 0x44, "the slot is back and shows the store");
    assert_eq!(guest.mmio.len(), 2);
}

fn readers_are_exact(ring: bool) {
    let round = [store(0x3000, 1), store(0x5fff, 1), store(0x8000, 1), OUT.to_vec()].concat();
    let Some(mut guest) = Guest::new(&[round.clone(), round.clone(), round].concat(), ring) else { return };
    guest.run();
    let mut one = guest.ram.dirty_log();
    guest.run();
    let mut two = guest.ram.dirty_log();
    guest.ram.write(9 * P, &[1]).unwrap();
    assert_eq!(take(&mut one), [3, 5, 8, 9]);
    assert_eq!(take(&mut one), [0u64; 0]);
    guest.run();
    assert_eq!(take(&mut two), [3, 5, 8, 9]);
    assert_eq!(take(&mut one), [3, 5, 8]);
    drop((one, two));
    let flags = guest.slots.lock().logged.len();
    assert_eq!(flags, 0);
}

#[test]
fn readers_see_exactly_the_pages_stored_to_with_the_ring() {
    readers_are_exact(true);
}

#[test]
fn readers_see_exactly_the_pages_stored_to_with_the_log() {
    readers_are_exact(false);
}

/// A guest that increments a byte of each of 15 pages for ever, and readers that copy what their takes return.
fn nothing_is_lost(ring: bool) {
    // cx = 15 pages from 0x0000 up, without the code page: di = 0x2000..; inc byte [di]; add di, 0x1000; loop.
    let code = [
        0xbf, 0x00, 0x20, // mov di, 2000
        0xb9, 0x0e, 0x00, // mov cx, 14
        0xfe, 0x05, // inc byte [di]
        0x81, 0xc7, 0x00, 0x10, // add di, 1000
        0xe2, 0xf8, // loop inc
        0xe6, 0x01, // out 1, al
        0xeb, 0xee, // jmp start
    ];
    let Some(mut guest) = Guest::new(&code, ring) else { return };
    let ram = guest.ram.clone();
    let stop = Arc::new(AtomicBool::new(false));
    let readers: Vec<_> = (0..2)
        .map(|n| {
            let (ram, stop) = (ram.clone(), stop.clone());
            std::thread::spawn(move || {
                let mut log = ram.dirty_log();
                let mut copy = vec![0u8; (RAM_PAGES * P) as usize];
                ram.read(0, &mut copy).unwrap();
                while !stop.load(Ordering::SeqCst) {
                    update(&ram, &mut log, &mut copy);
                    std::thread::sleep(Duration::from_micros(n * 200));
                }
                (log, copy)
            })
        })
        .collect();
    let end = std::time::Instant::now() + Duration::from_millis(500);
    while std::time::Instant::now() < end {
        guest.run();
    }
    stop.store(true, Ordering::SeqCst);
    let mut now = vec![0u8; (RAM_PAGES * P) as usize];
    for reader in readers {
        let (mut log, mut copy) = reader.join().unwrap();
        update(&ram, &mut log, &mut copy);
        ram.read(0, &mut now).unwrap();
        let lost = (0..RAM_PAGES).find(|p| {
            let at = (p * P) as usize;
            copy[at..at + P as usize] != now[at..at + P as usize]
        });
        assert_eq!(lost, None);
    }
}

fn update(ram: &RamBlock, log: &mut DirtyReader, copy: &mut [u8]) {
    for page in log.take().iter() {
        let at = (page * P) as usize;
        ram.read(page * P, &mut copy[at..at + P as usize]).unwrap();
    }
}

#[test]
fn no_store_is_lost_while_the_guest_runs_with_the_ring() {
    nothing_is_lost(true);
}

#[test]
fn no_store_is_lost_while_the_guest_runs_with_the_log() {
    nothing_is_lost(false);
}

#[test]
fn a_full_ring_is_emptied_and_no_page_of_it_is_lost() {
    let code = [
        0xbf, 0x00, 0x00, 0x01, 0x00, // mov edi, 10000
        0xb9, 0xd0, 0x07, 0x00, 0x00, // mov ecx, 2000
        0xfe, 0x07, // inc byte [edi]
        0x81, 0xc7, 0x00, 0x10, 0x00, 0x00, // add edi, 1000
        0xe2, 0xf6, // loop inc
        0xe6, 0x01, // out 1, al
        0xeb, 0xe8, // jmp start
    ];
    let Some(mut guest) = Guest::new(&code, true) else { return };
    if !virtualizes() {
        println!("skipped: a KVM without the processor's virtualization overflows its ring");
        return;
    }
    guest.protect();
    guest.run();
    let (mut one, mut two) = (guest.ram.dirty_log(), guest.ram.dirty_log());
    let all: Vec<u64> = (16..2016).collect();
    for round in 1..4 {
        guest.run();
        assert!(guest.full >= round, "the ring holds less than 2000 pages");
        assert!(take(&mut one) == all, "round {round}");
    }
    assert!(take(&mut two) == all);
}

#[test]
fn a_slot_that_is_replaced_under_a_running_guest_never_misses() {
    // The guest counts in RAM while holes come and go in the same slot: were the slot gone for a moment, its fetch
    // would fail.
    let code = [
        0xff, 0x06, 0x00, 0x20, // inc word [2000]
        0xe6, 0x01, // out 1, al
        0xeb, 0xf8, // jmp start
    ];
    let Some(mut guest) = Guest::new(&code, false) else { return };
    let (space, stop) = (guest.space.clone(), Arc::new(AtomicBool::new(false)));
    let done = stop.clone();
    let changer = std::thread::spawn(move || {
        for n in 0..100 {
            let hole = space.map_mmio((4 + n % 8) * P, P, Arc::new(Nothing), 1).unwrap();
            space.unmap(hole);
        }
        done.store(true, Ordering::SeqCst);
    });
    while !stop.load(Ordering::SeqCst) {
        guest.run();
    }
    changer.join().unwrap();
    assert_eq!(guest.mmio, [], "no access left the guest");
    assert_eq!(guest.slots.failure(), None);
}
