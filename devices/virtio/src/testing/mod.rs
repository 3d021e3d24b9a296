//! A small machine and a guest driver, for tests and fuzz targets.
//!
//! [`TestDriver`] does what Linux does: finds the capabilities in configuration space, sizes and places the BARs,
//! negotiates through the registers, sets up rings in guest memory and then adds buffers and notifies.

use std::sync::{Arc, Mutex};

use atoll_machine::backend::EventRoutes;
use atoll_machine::bus::PortBus;
use atoll_machine::inputs::InputGate;
use atoll_machine::interrupt::{IrqLine, LineSink, Msi, MsiSink};
use atoll_machine::memory::{AddressSpace, GuestMemory, RamBlock};
use atoll_pci::{BarMapper, PciBarMapper, PciDevice};

use crate::device::{VirtioDevice, feature};
use crate::transport::pci::{VirtioPciDevice, VirtioPciParts};

mod bells;
mod disk;
mod play;

pub use bells::Bells;
pub use disk::MemoryDisk;
pub use play::play;

/// Bytes of RAM in a [`TestMachine`], from address 0.
pub const RAM_BYTES: u64 = 8 << 20;
/// RAM below this is left to tests; the driver's rings and buffers lie above.
pub const DRIVER_MEMORY: u64 = 1 << 20;
/// Vector number in the message data of MSI-X entry 0.
pub const FIRST_VECTOR: u32 = 0x40;

/// Records messages and wires.
#[derive(Default)]
pub struct Interrupts {
    messages: Mutex<Vec<Msi>>,
    level: Mutex<bool>,
}

impl Interrupts {
    /// The MSI-X entries that fired since the last call, in order.
    pub fn take(&self) -> Vec<u32> {
        let messages = std::mem::take(&mut *crate::lock(&self.messages));
        messages.iter().map(|m| m.data.wrapping_sub(FIRST_VECTOR)).collect()
    }
    /// The level of the INTx wire.
    pub fn intx(&self) -> bool {
        *crate::lock(&self.level)
    }
}
impl MsiSink for Interrupts {
    fn signal_msi(&self, msi: Msi) {
        let mut messages = crate::lock(&self.messages);
        if messages.len() < 1 << 20 {
            messages.push(msi);
        }
    }
}
impl LineSink for Interrupts {
    fn set_line(&self, _line: u32, high: bool) {
        *crate::lock(&self.level) = high;
    }
}

/// RAM, address space and input gate.
pub struct TestMachine {
    /// The address space, with RAM at 0.
    pub space: Arc<AddressSpace>,
    /// The devices' handle on it.
    pub memory: GuestMemory,
    /// The gate.
    pub inputs: Arc<InputGate>,
    /// Doorbells, where the machine has any.
    pub bells: Option<Arc<Bells>>,
    mapper: Arc<dyn BarMapper>,
}

impl Default for TestMachine {
    fn default() -> Self {
        Self::new()
    }
}

impl TestMachine {
    /// A machine with [`RAM_BYTES`] of RAM.
    pub fn new() -> Self {
        Self::with_inputs(InputGate::live())
    }

    /// A machine with a given gate.
    pub fn with_inputs(inputs: Arc<InputGate>) -> Self {
        let space = AddressSpace::new();
        let ram = RamBlock::new_shared("test-ram", RAM_BYTES).expect("the host has 8 MiB");
        space.map_ram(0, &ram, 0, RAM_BYTES, 0).expect("an empty space has room");
        let mapper = PciBarMapper::new(&space, &Arc::new(PortBus::new()));
        Self { memory: GuestMemory::new(&space), space, inputs, bells: None, mapper }
    }

    /// A machine whose writes may be doorbells.
    pub fn with_bells() -> Self {
        Self { bells: Some(Arc::default()), ..Self::new() }
    }

    /// Plugs `device` in.
    pub fn plug(&self, device: Arc<dyn VirtioDevice>) -> (Arc<VirtioPciDevice>, Arc<Interrupts>) {
        let interrupts = Arc::new(Interrupts::default());
        let parts = VirtioPciParts {
            memory: self.memory.clone(),
            msi: interrupts.clone(),
            intx: IrqLine::new(interrupts.clone(), 0),
            inputs: self.inputs.clone(),
            mapper: self.mapper.clone(),
        };
        let routes = self.bells.clone().map(|bells| bells as Arc<dyn EventRoutes>);
        (VirtioPciDevice::with_routes(device, parts, routes), interrupts)
    }
}

/// One piece of a request.
#[derive(Clone, Copy, Debug)]
pub struct Piece {
    /// Guest-physical address.
    pub gpa: u64,
    /// Bytes.
    pub len: u32,
    /// Whether the device writes it.
    pub write: bool,
}

/// For the device to read.
pub fn out(gpa: u64, len: u32) -> Piece {
    Piece { gpa, len, write: false }
}
/// For the device to write.
pub fn into(gpa: u64, len: u32) -> Piece {
    Piece { gpa, len, write: true }
}

/// A ring as the driver keeps it.
#[derive(Clone, Copy, Debug)]
pub struct DriverQueue {
    /// Entries.
    pub size: u16,
    /// Descriptor table.
    pub desc: u64,
    /// Available ring.
    pub avail: u64,
    /// Used ring.
    pub used: u64,
    next_desc: u16,
    avail_idx: u16,
    used_idx: u16,
}

/// How the driver sets the device up.
#[derive(Clone, Copy, Debug)]
pub struct Setup {
    /// Features to accept if offered.
    pub features: u64,
    /// Entries of each ring, at most; rounded down by the device's maximum.
    pub queue_size: u16,
    /// MSI-X, or else INTx.
    pub msix: bool,
}

impl Default for Setup {
    fn default() -> Self {
        Self { features: !0, queue_size: 16, msix: true }
    }
}

/// A guest's driver for one device.
pub struct TestDriver {
    /// Guest memory.
    pub memory: GuestMemory,
    /// The function.
    pub pci: Arc<VirtioPciDevice>,
    /// What it raised.
    pub interrupts: Arc<Interrupts>,
    space: Arc<AddressSpace>,
    bells: Option<Arc<Bells>>,
    common: u64,
    isr: u64,
    config: u64,
    notify: u64,
    notify_multiplier: u32,
    msix_table: u64,
    /// The rings.
    pub queues: Vec<DriverQueue>,
    next_free: u64,
}

impl TestDriver {
    /// Plugs `device` into `machine` and finds its registers. `slot` keeps several devices apart, 0 to 15.
    pub fn probe(machine: &TestMachine, device: Arc<dyn VirtioDevice>, slot: u64) -> Self {
        let (pci, interrupts) = machine.plug(device);
        Self::attach(machine, pci, interrupts, slot)
    }

    /// Finds the registers of a function that is plugged in already.
    pub fn attach(
        machine: &TestMachine,
        pci: Arc<VirtioPciDevice>,
        interrupts: Arc<Interrupts>,
        slot: u64,
    ) -> Self {
        let share = (RAM_BYTES - DRIVER_MEMORY) / 16;
        let mut driver = Self {
            memory: machine.memory.clone(),
            pci,
            interrupts,
            space: machine.space.clone(),
            bells: machine.bells.clone(),
            common: 0,
            isr: 0,
            config: 0,
            notify: 0,
            notify_multiplier: 0,
            msix_table: 0,
            queues: Vec::new(),
            next_free: DRIVER_MEMORY + share * (slot & 15),
        };
        driver.place_bars(0xe000_0000 + slot * 0x10_0000);
        driver.find_capabilities();
        driver
    }

    /// Reads configuration space.
    pub fn pci_read(&self, offset: u16) -> u32 {
        let mut b = [0; 4];
        self.pci.config_read(offset, &mut b);
        u32::from_le_bytes(b)
    }
    /// Writes configuration space.
    pub fn pci_write(&self, offset: u16, value: u32) {
        self.pci.config_write(offset, &value.to_le_bytes());
    }

    /// Places the BARs one after the other from `base` on, and switches decoding and bus mastering on.
    pub fn place_bars(&mut self, base: u64) {
        let mut at = base;
        let mut slot = 0;
        while slot < 6 {
            let register = 0x10 + slot * 4;
            self.pci_write(register, !0);
            let mask = self.pci_read(register);
            let wide = mask & 6 == 4;
            let size = u64::from((!(mask & !15)).wrapping_add(1));
            if mask != 0 {
                at = at.next_multiple_of(size.max(1));
                self.pci_write(register, at as u32);
                if wide {
                    self.pci_write(register + 4, 0);
                }
                at += size;
            }
            slot += if wide { 2 } else { 1 };
        }
        // Memory and bus mastering.
        self.pci_write(4, 6);
    }

    fn bar_address(&self, bar: u8) -> u64 {
        u64::from(self.pci_read(0x10 + u16::from(bar) * 4) & !15)
    }

    /// Finds the registers where the BARs are now.
    pub fn find_capabilities(&mut self) {
        let mut at = (self.pci_read(0x34) & 0xfc) as u16;
        while at != 0 {
            let head = self.pci_read(at);
            match head as u8 {
                0x09 => {
                    let address =
                        self.bar_address(self.pci_read(at + 4) as u8) + u64::from(self.pci_read(at + 8));
                    match (head >> 24) as u8 {
                        1 => self.common = address,
                        2 => {
                            self.notify = address;
                            self.notify_multiplier = self.pci_read(at + 16);
                        }
                        3 => self.isr = address,
                        4 => self.config = address,
                        _ => {}
                    }
                }
                0x11 => {
                    let table = self.pci_read(at + 4);
                    self.msix_table = self.bar_address(table as u8 & 7) + u64::from(table & !7);
                    // Enabled later: remembered by its place.
                }
                _ => {}
            }
            at = (head >> 8 & 0xfc) as u16;
        }
    }

    /// Offset of the first capability `id` in configuration space.
    pub fn capability(&self, id: u8, kind: Option<u8>) -> Option<u16> {
        let mut at = (self.pci_read(0x34) & 0xfc) as u16;
        while at != 0 {
            let head = self.pci_read(at);
            if head as u8 == id && kind.is_none_or(|k| (head >> 24) as u8 == k) {
                return Some(at);
            }
            at = (head >> 8 & 0xfc) as u16;
        }
        None
    }

    /// Reads `N` bytes of memory-mapped registers.
    pub fn mmio_read<const N: usize>(&self, gpa: u64) -> [u8; N] {
        let mut b = [0; N];
        self.space.mmio_read(gpa, &mut b);
        b
    }
    /// Writes memory-mapped registers.
    pub fn mmio_write(&self, gpa: u64, data: &[u8]) {
        if !self.bells.as_ref().is_some_and(|bells| bells.write(gpa, data)) {
            self.space.mmio_write(gpa, data);
        }
    }

    /// Reads a byte of the common configuration.
    pub fn read8(&self, offset: u64) -> u8 {
        self.mmio_read::<1>(self.common + offset)[0]
    }
    /// Reads 16 bits of the common configuration.
    pub fn read16(&self, offset: u64) -> u16 {
        u16::from_le_bytes(self.mmio_read(self.common + offset))
    }
    /// Reads 32 bits of the common configuration.
    pub fn read32(&self, offset: u64) -> u32 {
        u32::from_le_bytes(self.mmio_read(self.common + offset))
    }
    /// Writes a byte of the common configuration.
    pub fn write8(&self, offset: u64, value: u8) {
        self.mmio_write(self.common + offset, &[value]);
    }
    /// Writes 16 bits of the common configuration.
    pub fn write16(&self, offset: u64, value: u16) {
        self.mmio_write(self.common + offset, &value.to_le_bytes());
    }
    /// Writes 32 bits of the common configuration.
    pub fn write32(&self, offset: u64, value: u32) {
        self.mmio_write(self.common + offset, &value.to_le_bytes());
    }
    /// Reads `N` bytes of the device's configuration.
    pub fn config<const N: usize>(&self, offset: u64) -> [u8; N] {
        self.mmio_read(self.config + offset)
    }
    /// Writes the device's configuration.
    pub fn config_write(&self, offset: u64, data: &[u8]) {
        self.mmio_write(self.config + offset, data);
    }
    /// `device_status`.
    pub fn status(&self) -> u8 {
        self.read8(0x14)
    }
    /// ISR status, which reading clears.
    pub fn isr(&self) -> u8 {
        self.mmio_read::<1>(self.isr)[0]
    }
    /// Whether the device asks for a reset.
    pub fn needs_reset(&self) -> bool {
        self.status() & 0x40 != 0
    }

    /// Resets the device and forgets rings and interrupts.
    pub fn reset(&mut self) {
        self.write8(0x14, 0);
        self.queues.clear();
        self.interrupts.take();
    }

    /// The features the device offers.
    pub fn offered(&self) -> u64 {
        self.write32(0, 0);
        let low = self.read32(4);
        self.write32(0, 1);
        u64::from(low) | u64::from(self.read32(4)) << 32
    }

    /// Offers `features` back. Returns whether the device agreed.
    pub fn negotiate(&self, features: u64) -> bool {
        self.write8(0x14, 1);
        self.write8(0x14, 3);
        self.write32(8, 0);
        self.write32(0xc, features as u32);
        self.write32(8, 1);
        self.write32(0xc, (features >> 32) as u32);
        self.write8(0x14, 11);
        self.status() & 8 != 0
    }

    /// Reset, negotiation, queues, interrupts, DRIVER_OK. Returns the features in use.
    pub fn start(&mut self, setup: Setup) -> u64 {
        self.reset();
        let features = self.offered() & (setup.features | feature::VERSION_1);
        assert!(self.negotiate(features), "a subset of the offered features is refused");
        let count = self.read16(0x12);
        if setup.msix {
            self.enable_msix(count + 1);
            self.write16(0x10, 0);
        }
        for index in 0..count {
            self.add_queue(index, setup);
        }
        self.write8(0x14, 15);
        features
    }

    fn enable_msix(&self, vectors: u16) {
        let at = self.capability(0x11, None).expect("the function has MSI-X");
        self.pci.config_write(at + 2, &0x8000u16.to_le_bytes());
        for vector in 0..u64::from(vectors) {
            let entry = self.msix_table + vector * 16;
            self.mmio_write(entry, &0xfee0_0000u64.to_le_bytes());
            self.mmio_write(entry + 8, &(FIRST_VECTOR + vector as u32).to_le_bytes());
            self.mmio_write(entry + 12, &0u32.to_le_bytes());
        }
    }

    /// Masks or unmasks MSI-X entry `vector`.
    pub fn mask_vector(&self, vector: u16, masked: bool) {
        self.mmio_write(self.msix_table + u64::from(vector) * 16 + 12, &u32::from(masked).to_le_bytes());
    }

    fn add_queue(&mut self, index: u16, setup: Setup) {
        self.write16(0x16, index);
        let size = self.read16(0x18).min(setup.queue_size);
        self.write16(0x18, size);
        let entries = u64::from(size);
        let desc = self.alloc(16 * entries, 16);
        let avail = self.alloc(6 + 2 * entries, 2);
        let used = self.alloc(6 + 8 * entries, 4);
        for (at, address) in [(0x20, desc), (0x28, avail), (0x30, used)] {
            self.write32(at, address as u32);
            self.write32(at + 4, (address >> 32) as u32);
        }
        if setup.msix {
            self.write16(0x1a, index + 1);
        }
        self.write16(0x1c, 1);
        self.queues.push(DriverQueue { size, desc, avail, used, next_desc: 0, avail_idx: 0, used_idx: 0 });
    }

    /// Takes `len` bytes of zeroed guest memory. There is no freeing.
    pub fn alloc(&mut self, len: u64, align: u64) -> u64 {
        let at = self.next_free.next_multiple_of(align);
        self.next_free = at + len;
        self.store(at, &vec![0; len as usize]);
        at
    }

    /// Takes guest memory with `bytes` in it.
    pub fn alloc_bytes(&mut self, bytes: &[u8]) -> u64 {
        let at = self.alloc(bytes.len() as u64, 16);
        self.store(at, bytes);
        at
    }

    /// Reads guest memory.
    pub fn load(&self, gpa: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.memory.read(gpa, &mut bytes).expect("the address is RAM");
        bytes
    }
    /// Writes guest memory.
    pub fn store(&self, gpa: u64, bytes: &[u8]) {
        self.memory.write(gpa, bytes).expect("the address is RAM");
    }
    /// Reads 16 bits of guest memory.
    pub fn load16(&self, gpa: u64) -> u16 {
        let b = self.load(gpa, 2);
        u16::from_le_bytes([b[0], b[1]])
    }
    /// Writes 16 bits of guest memory.
    pub fn store16(&self, gpa: u64, value: u16) {
        self.store(gpa, &value.to_le_bytes());
    }

    /// Writes descriptor `index` of a table.
    pub fn descriptor(&self, table: u64, index: u16, gpa: u64, len: u32, flags: u16, next: u16) {
        let mut d = gpa.to_le_bytes().to_vec();
        d.extend_from_slice(&len.to_le_bytes());
        d.extend_from_slice(&flags.to_le_bytes());
        d.extend_from_slice(&next.to_le_bytes());
        self.store(table + u64::from(index) * 16, &d);
    }

    fn chain(&self, table: u64, first: u16, size: u16, pieces: &[Piece]) {
        for (i, piece) in pieces.iter().enumerate() {
            let index = first.wrapping_add(i as u16) % size;
            let last = i + 1 == pieces.len();
            let flags = u16::from(!last) | u16::from(piece.write) << 1;
            self.descriptor(table, index, piece.gpa, piece.len, flags, (index + 1) % size);
        }
    }

    /// Makes a request available without notifying. Returns its head.
    pub fn add(&mut self, queue: usize, pieces: &[Piece]) -> u16 {
        let q = self.queues[queue];
        let head = q.next_desc % q.size;
        self.chain(q.desc, head, q.size, pieces);
        self.queues[queue].next_desc = (head + pieces.len() as u16) % q.size;
        self.publish(queue, head);
        head
    }

    /// As [`TestDriver::add`], through an indirect table.
    pub fn add_indirect(&mut self, queue: usize, pieces: &[Piece]) -> u16 {
        let count = pieces.len() as u16;
        let table = self.alloc(u64::from(count) * 16, 16);
        self.chain(table, 0, count, pieces);
        let q = self.queues[queue];
        let head = q.next_desc % q.size;
        self.descriptor(q.desc, head, table, u32::from(count) * 16, 4, 0);
        self.queues[queue].next_desc = (head + 1) % q.size;
        self.publish(queue, head);
        head
    }

    /// Puts descriptor `head` into the available ring.
    pub fn publish(&mut self, queue: usize, head: u16) {
        let q = &mut self.queues[queue];
        let slot = q.avail + 4 + 2 * u64::from(q.avail_idx % q.size);
        q.avail_idx = q.avail_idx.wrapping_add(1);
        let (index, at) = (q.avail_idx, q.avail + 2);
        self.store16(slot, head);
        self.store16(at, index);
    }

    /// Notifies the device.
    pub fn kick(&self, queue: u16) {
        let at = self.notify + u64::from(queue) * u64::from(self.notify_multiplier);
        self.mmio_write(at, &queue.to_le_bytes());
    }

    /// The next finished request: its head and the number of bytes written.
    pub fn take_used(&mut self, queue: usize) -> Option<(u16, u32)> {
        let q = self.queues[queue];
        if self.load16(q.used + 2) == q.used_idx {
            return None;
        }
        let at = q.used + 4 + 8 * u64::from(q.used_idx % q.size);
        let b = self.load(at, 8);
        self.queues[queue].used_idx = q.used_idx.wrapping_add(1);
        Some((u16::from_le_bytes([b[0], b[1]]), u32::from_le_bytes([b[4], b[5], b[6], b[7]])))
    }

    /// Waits up to ten seconds for a finished request: some finish on another thread.
    pub fn wait_used(&mut self, queue: usize) -> Option<(u16, u32)> {
        let end = std::time::Instant::now() + std::time::Duration::from_secs(10);
        loop {
            if let Some(used) = self.take_used(queue) {
                return Some(used);
            }
            if std::time::Instant::now() > end || self.needs_reset() {
                return None;
            }
            std::thread::yield_now();
        }
    }

    /// `used_event` of a ring: the device interrupts when it finishes the request with this index (2.7.7).
    pub fn set_used_event(&self, queue: usize, index: u16) {
        let q = self.queues[queue];
        self.store16(q.avail + 4 + 2 * u64::from(q.size), index);
    }

    /// `avail_event` of a ring: the device wants a notification for this request.
    pub fn avail_event(&self, queue: usize) -> u16 {
        let q = self.queues[queue];
        self.load16(q.used + 4 + 8 * u64::from(q.size))
    }

    /// Addresses of the register regions: common, ISR, device, notify, MSI-X table.
    pub fn regions(&self) -> [u64; 5] {
        [self.common, self.isr, self.config, self.notify, self.msix_table]
    }
}

/// xorshift64*: deterministic garbage.
#[derive(Clone, Debug)]
pub struct Random(u64);

impl Random {
    /// A sequence that depends on `seed` alone.
    pub fn new(seed: u64) -> Self {
        Self(seed.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }
    /// 64 bits.
    pub fn bits(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }
    /// A number below `n`, which is not zero.
    pub fn below(&mut self, n: u64) -> u64 {
        (self.bits() >> 11) % n
    }
}
