//! Processors set up for tests: a few MiB of RAM, page tables, and a recorder instead of devices.
//!
//! Not part of the product's interface; tests of this crate, its examples and the comparison with the host
//! processor build on it.

use std::sync::{Arc, Mutex};

use atoll_machine::backend::{CpuIo, PartitionConfig};
use atoll_machine::cpu::model::{CpuModel, HostCpu};
use atoll_machine::cpu::state::{Segment, gpr, seg};
use atoll_machine::cpu::topology::Topology;
use atoll_machine::inputs::InputGate;
use atoll_machine::memory::{AddressSpace, RamBlock};
use atoll_machine::time::VirtualClock;

use crate::cpu::{Cpu, control};
use crate::exception::Exception;
use crate::execute::{Leave, run};
use crate::partition::Shared;

/// Where [`Machine::run_code`] puts code.
pub const CODE: u64 = 0x1_0000;
/// A page of data.
pub const DATA: u64 = 0x2_0000;
/// Initial stack pointer.
pub const STACK: u64 = 0x3_8000;
/// Page tables of the 64-bit set-up: PML4, PDPT, page directory of the first GiB.
pub const PAGE_TABLES: u64 = 0x1000;
/// Guest-physical addresses from here on are devices.
pub const DEVICE: u64 = 0x8000_0000;

/// One access to a device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DeviceAccess {
    /// IN of so many bytes.
    PortRead(u16, usize),
    /// OUT.
    PortWrite(u16, Vec<u8>),
    /// A load of so many bytes.
    Read(u64, usize),
    /// A store.
    Write(u64, Vec<u8>),
}

/// Answers every read with bytes counting from the address, and records all accesses.
#[derive(Default)]
pub struct Recorder(Mutex<Vec<DeviceAccess>>);

impl Recorder {
    /// The accesses so far.
    pub fn take(&self) -> Vec<DeviceAccess> {
        std::mem::take(&mut *self.0.lock().unwrap_or_else(|e| e.into_inner()))
    }
    fn note(&self, access: DeviceAccess) {
        self.0.lock().unwrap_or_else(|e| e.into_inner()).push(access);
    }
}

fn count_from(first: u8, data: &mut [u8]) {
    for (i, byte) in data.iter_mut().enumerate() {
        *byte = first.wrapping_add(i as u8);
    }
}

impl CpuIo for Recorder {
    fn port_read(&self, port: u16, data: &mut [u8]) {
        self.note(DeviceAccess::PortRead(port, data.len()));
        count_from(port as u8, data);
    }
    fn port_write(&self, port: u16, data: &[u8]) {
        self.note(DeviceAccess::PortWrite(port, data.to_vec()));
    }
    fn mmio_read(&self, address: u64, data: &mut [u8]) {
        self.note(DeviceAccess::Read(address, data.len()));
        count_from(address as u8, data);
    }
    fn mmio_write(&self, address: u64, data: &[u8]) {
        self.note(DeviceAccess::Write(address, data.to_vec()));
    }
}

/// A processor with RAM from guest-physical 0.
pub struct Machine {
    /// The processor.
    pub cpu: Cpu,
    /// Its RAM.
    pub ram: Arc<RamBlock>,
    /// Its devices.
    pub io: Recorder,
}

impl Machine {
    /// A processor in its power-on state, general registers cleared, with `mib` MiB of RAM.
    ///
    /// # Panics
    /// If the host lacks memory or the default CPU model's features.
    pub fn new(mib: u64) -> Self {
        Self::with_model(mib, "atoll-base")
    }

    /// Like [`Machine::new`] with CPU model `model`.
    ///
    /// # Panics
    /// As [`Machine::new`].
    pub fn with_model(mib: u64, model: &str) -> Self {
        let memory = AddressSpace::new();
        let ram = RamBlock::new_shared("test", mib << 20).expect("guest RAM");
        memory.map_ram(0, &ram, 0, mib << 20, 0).expect("map");
        let model = CpuModel::resolve(model, &HostCpu::detect(), 2_000_000).expect("CPU model");
        let shared = Shared::new(PartitionConfig {
            memory,
            model: Arc::new(model),
            topology: Topology::flat(1),
            clock: VirtualClock::new(0, 2_000_000),
            inputs: InputGate::live(),
            extint: None,
            eoi: None,
        });
        let mut cpu = Cpu::new(shared, 0).expect("executable memory");
        cpu.gpr = [0; 16];
        Self { cpu, ram, io: Recorder::default() }
    }

    /// 64-bit mode at CPL 0: the first GiB mapped to itself by 2 MiB pages that everyone may read, write and
    /// execute.
    pub fn long(mib: u64) -> Self {
        let mut machine = Self::new(mib);
        machine.enter_long();
        machine
    }

    /// Puts the processor into the state of [`Machine::long`].
    pub fn enter_long(&mut self) {
        let (pml4, pdpt, pd) = (PAGE_TABLES, PAGE_TABLES + 0x1000, PAGE_TABLES + 0x2000);
        self.write_u64(pml4, pdpt | 7);
        self.write_u64(pdpt, pd | 7);
        for i in 0..512 {
            self.write_u64(pd + i * 8, i << 21 | 0x87);
        }
        let cpu = &mut self.cpu;
        cpu.cr0 = control::CR0_PE | control::CR0_PG | control::CR0_WP | control::CR0_NE | control::CR0_ET;
        cpu.cr3 = pml4;
        cpu.cr4 = control::CR4_PAE
            | control::CR4_PGE
            | control::CR4_OSFXSR
            | control::CR4_OSXMMEXCPT
            | control::CR4_OSXSAVE;
        cpu.xcr0 = 7;
        cpu.efer = control::EFER_LME | control::EFER_LMA | control::EFER_NXE | control::EFER_SCE;
        self.set_segments(0x209b, 0xc093, u32::MAX);
    }

    /// 32-bit protected mode at CPL 0 with flat segments, no paging.
    pub fn protected32(mib: u64) -> Self {
        let mut machine = Self::new(mib);
        machine.cpu.cr0 = control::CR0_PE | control::CR0_NE | control::CR0_ET;
        machine.set_segments(0xc09b, 0xc093, u32::MAX);
        machine
    }

    /// Real mode with all segments at 0.
    pub fn real(mib: u64) -> Self {
        let mut machine = Self::new(mib);
        machine.cpu.cr0 = control::CR0_ET;
        machine.set_segments(0x9b, 0x93, 0xffff);
        machine
    }

    fn set_segments(&mut self, code: u32, data: u32, limit: u32) {
        let segment = |selector, attributes| Segment { selector, base: 0, limit, attributes };
        self.cpu.segments = [segment(0x10, data); 6];
        self.cpu.segments[seg::CS] = segment(0x8, code);
        self.cpu.rflags = 2;
        self.cpu.refresh_mode();
    }

    /// Makes the current mode CPL 3.
    pub fn enter_user(&mut self) {
        for segment in &mut self.cpu.segments {
            segment.attributes |= 0x60;
            segment.selector |= 3;
        }
        self.cpu.refresh_mode();
    }

    /// Writes guest-physical memory.
    ///
    /// # Panics
    /// Outside RAM.
    pub fn write(&self, address: u64, data: &[u8]) {
        self.ram.write(address, data).expect("in RAM");
    }

    /// Writes 8 bytes.
    pub fn write_u64(&self, address: u64, value: u64) {
        self.write(address, &value.to_le_bytes());
    }

    /// Reads guest-physical memory.
    ///
    /// # Panics
    /// Outside RAM.
    pub fn read<const N: usize>(&self, address: u64) -> [u8; N] {
        let mut data = [0; N];
        self.ram.read(address, &mut data).expect("in RAM");
        data
    }

    /// Reads 8 bytes.
    pub fn read_u64(&self, address: u64) -> u64 {
        u64::from_le_bytes(self.read(address))
    }

    /// Puts `code` at [`CODE`] (offset [`CODE`] - 0x8000 in real mode would not fit: there at 0x8000).
    pub fn load_code(&mut self, code: &[u8]) {
        let at = self.code_address();
        self.write(at, code);
        self.cpu.rip = at;
        self.cpu.activity = Default::default();
        let real = self.cpu.mode.bits == 16;
        self.cpu.gpr[gpr::RSP] = if real { 0x7000 } else { STACK };
    }

    /// Where [`Machine::load_code`] puts code in this mode.
    pub fn code_address(&self) -> u64 {
        if self.cpu.mode.bits == 16 { 0x8000 } else { CODE }
    }

    /// Runs until the processor halts, faults, or a million instructions have passed.
    pub fn run(&mut self) -> Leave {
        let end = self.cpu.retired + 1_000_000;
        loop {
            match run(&mut self.cpu, &self.io) {
                Leave::Events if self.cpu.retired < end => {}
                leave => return leave,
            }
        }
    }

    /// Runs `code` followed by HLT.
    ///
    /// # Panics
    /// If it does not end at that HLT.
    pub fn run_code(&mut self, code: &[u8]) {
        let mut bytes = code.to_vec();
        bytes.push(0xf4);
        self.load_code(&bytes);
        let leave = self.run();
        assert_eq!(leave, Leave::Inactive, "at {:#x}", self.cpu.rip);
    }

    /// Runs `code` up to its exception.
    ///
    /// # Panics
    /// If it ends otherwise.
    pub fn fault_of(&mut self, code: &[u8]) -> Exception {
        let mut bytes = code.to_vec();
        bytes.push(0xf4);
        self.load_code(&bytes);
        match self.run() {
            Leave::Exception(exception) => exception,
            leave => panic!("expected an exception, not {leave:?} at {:#x}", self.cpu.rip),
        }
    }
}
