//! A machine with RAM, a virtual clock and two ports, and the surroundings of a guest in it.
//!
//! | address | contents |
//! |---|---|
//! | 0x1000 | GDT |
//! | 0x2000 | IDT (256 gates) |
//! | 0x3000 | TSS |
//! | 0x8000 | page tables: identity map of the first 1 GiB |
//! | 0x20000 | one stub of 16 bytes per vector, then the common handler |
//! | 0x30000 | where each vector continues after it was recorded |
//! | 0x40000 | record of events |
//! | 0x70000 | stacks: ring 0 below 0x70000, IST 1 below 0x78000, ring 3 below 0x7c000 |
//! | 0x100000 | code of the test |

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};

use atoll_cpu_software::partition::{SoftwareBackend, SoftwarePartition};
use atoll_cpu_software::vcpu::SoftwareVcpu;
use atoll_machine::backend::{Backend, CpuIo, HaltReason, Partition, PartitionConfig, StopFlag, Vcpu};
use atoll_machine::cpu::model::{CpuModel, HostCpu, Vendor};
use atoll_machine::cpu::state::{CpuState, DescriptorTable, Segment, gpr, seg};
use atoll_machine::cpu::topology::Topology;
use atoll_machine::inputs::InputGate;
use atoll_machine::interrupt::{EoiSink, ExtIntSource};
use atoll_machine::memory::{AddressSpace, RamBlock};
use atoll_machine::time::VirtualClock;
use iced_x86::code_asm::*;

pub(crate) const GDT: u64 = 0x1000;
pub(crate) const IDT: u64 = 0x2000;
pub(crate) const TSS: u64 = 0x3000;
pub(crate) const TABLES: u64 = 0x8000;
pub(crate) const STUBS: u64 = 0x20000;
pub(crate) const CONTINUE: u64 = 0x30000;
pub(crate) const COUNT: u64 = 0x3fff8;
pub(crate) const RECORD: u64 = 0x40000;
pub(crate) const STACK: u64 = 0x70000;
pub(crate) const IST_STACK: u64 = 0x78000;
pub(crate) const USER_STACK: u64 = 0x7c000;
pub(crate) const CODE: u64 = 0x100000;
pub(crate) const USER_CODE: u64 = 0x180000;
pub(crate) const EXIT_PORT: u16 = 0xf4;

/// Selectors of the GDT.
pub(crate) mod sel {
    pub(crate) const CODE64: u16 = 0x08;
    pub(crate) const DATA: u16 = 0x10;
    pub(crate) const CODE32: u16 = 0x18;
    pub(crate) const USER32: u16 = 0x20 | 3;
    pub(crate) const USER_DATA: u16 = 0x28 | 3;
    pub(crate) const USER64: u16 = 0x30 | 3;
    pub(crate) const TSS: u16 = 0x38;
    pub(crate) const FREE: u16 = 0x58;
}

/// What a guest wrote.
#[derive(Default)]
pub(crate) struct Io {
    pub(crate) stop: StopFlag,
    pub(crate) exit: AtomicU32,
    pub(crate) log: Mutex<Vec<u32>>,
    pub(crate) mmio: Mutex<Vec<(u64, Vec<u8>)>>,
}

impl CpuIo for Io {
    fn port_read(&self, port: u16, data: &mut [u8]) {
        data.fill(port as u8);
    }
    fn port_write(&self, port: u16, data: &[u8]) {
        let mut word = [0; 4];
        word[..data.len()].copy_from_slice(data);
        let value = u32::from_le_bytes(word);
        match port {
            EXIT_PORT => {
                self.exit.store(value, Ordering::SeqCst);
                self.stop.set();
            }
            _ => self.log.lock().unwrap().push(value),
        }
    }
    fn mmio_read(&self, _address: u64, data: &mut [u8]) {
        data.fill(0xff);
    }
    fn mmio_write(&self, address: u64, data: &[u8]) {
        self.mmio.lock().unwrap().push((address, data.to_vec()));
    }
}

/// Remembers ended interrupts.
#[derive(Default)]
pub(crate) struct Eois(pub(crate) Mutex<Vec<u8>>);
impl EoiSink for Eois {
    fn end_of_interrupt(&self, vector: u8) {
        self.0.lock().unwrap().push(vector);
    }
}

/// An event as the handlers recorded it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Recorded {
    pub(crate) vector: u64,
    pub(crate) error_code: u64,
    pub(crate) rip: u64,
    pub(crate) cs: u64,
    pub(crate) flags: u64,
    pub(crate) rsp: u64,
    pub(crate) ss: u64,
    pub(crate) cr2: u64,
}

pub(crate) struct Machine {
    pub(crate) partition: Arc<SoftwarePartition>,
    pub(crate) memory: Arc<AddressSpace>,
    pub(crate) clock: Arc<VirtualClock>,
    pub(crate) eois: Arc<Eois>,
    pub(crate) io: Io,
    pub(crate) vcpu: SoftwareVcpu,
}

/// The features of the newest model, whatever this host has: tests here use no vector arithmetic.
pub(crate) fn model(vendor: Vendor) -> CpuModel {
    let mut host = HostCpu::detect();
    host.vendor = vendor;
    CpuModel::resolve("atoll-2026", &host, 1_000_000)
        .or_else(|_| CpuModel::resolve("host", &host, 1_000_000))
        .expect("the host's model")
}

impl Machine {
    pub(crate) fn new() -> Self {
        Self::with(Vendor::Intel, 1)
    }

    pub(crate) fn with(vendor: Vendor, cpus: u32) -> Self {
        Self::build(vendor, cpus, None)
    }

    pub(crate) fn with_extint(extint: Arc<dyn ExtIntSource>) -> Self {
        Self::build(Vendor::Intel, 1, Some(extint))
    }

    fn build(vendor: Vendor, cpus: u32, extint: Option<Arc<dyn ExtIntSource>>) -> Self {
        let memory = AddressSpace::new();
        let ram = RamBlock::new_shared("ram", 16 << 20).unwrap();
        memory.map_ram(0, &ram, 0, 16 << 20, 0).unwrap();
        let clock = VirtualClock::new(1_700_000_000_000_000_000, 1_000_000);
        let eois = Arc::new(Eois::default());
        let topology = Topology::flat(cpus);
        let partition = SoftwareBackend
            .create_partition(PartitionConfig {
                memory: memory.clone(),
                model: Arc::new(model(vendor)),
                topology,
                clock: clock.clone(),
                inputs: InputGate::live(),
                extint,
                eoi: Some(eois.clone()),
            })
            .unwrap();
        let vcpu = partition.create_vcpu(0).unwrap();
        let machine = Self { partition, memory, clock, eois, io: Io::default(), vcpu };
        machine.write_tables();
        machine
    }

    pub(crate) fn write(&self, address: u64, data: &[u8]) {
        self.memory.write(address, data).unwrap();
    }
    pub(crate) fn write64(&self, address: u64, value: u64) {
        self.write(address, &value.to_le_bytes());
    }
    pub(crate) fn write32(&self, address: u64, value: u32) {
        self.write(address, &value.to_le_bytes());
    }
    pub(crate) fn read64(&self, address: u64) -> u64 {
        let mut b = [0; 8];
        self.memory.read(address, &mut b).unwrap();
        u64::from_le_bytes(b)
    }
    pub(crate) fn read32(&self, address: u64) -> u32 {
        self.read64(address) as u32
    }
    pub(crate) fn read16(&self, address: u64) -> u16 {
        self.read64(address) as u16
    }

    fn write_tables(&self) {
        let gdt = [
            0u64,
            0x00af_9b00_0000_ffff,
            0x00cf_9300_0000_ffff,
            0x00cf_9b00_0000_ffff,
            0x00cf_fb00_0000_ffff,
            0x00cf_f300_0000_ffff,
            0x00af_fb00_0000_ffff,
            0x0000_8900_0000_0067 | TSS << 16,
            0,
            0x0000_9b00_0000_ffff,
            0x0000_9300_0000_ffff,
        ];
        for (n, raw) in (0u64..).zip(gdt) {
            self.write64(GDT + n * 8, raw);
        }
        // Level 4, level 3, then 2 MiB pages.
        self.write64(TABLES, (TABLES + 0x1000) | 7);
        self.write64(TABLES + 0x1000, (TABLES + 0x2000) | 7);
        for n in 0..512 {
            self.write64(TABLES + 0x2000 + n * 8, n << 21 | 0x87);
        }
    }

    /// Fills in 64-bit handlers, IDT and TSS.
    pub(crate) fn long_surroundings(&self) {
        let common = STUBS + 256 * 16;
        let exit = self.assemble_at(64, common + 0x100, |a| {
            a.mov(al, 0xeeu32)?;
            a.out(EXIT_PORT as u32, al)?;
            a.hlt()
        });
        assert!(exit <= 0x100);
        for v in 0..256u64 {
            self.assemble_at(64, STUBS + v * 16, |a| {
                if !matches!(v, 8 | 10..=14 | 17) {
                    a.push(0)?;
                }
                a.push(v as i32)?;
                a.jmp(common)
            });
            self.gate(v, sel::CODE64, 0x8e, 0);
            self.write64(CONTINUE + v * 8, common + 0x100);
        }
        self.assemble_at(64, common, |a| {
            a.push(rax)?;
            a.push(rbx)?;
            a.mov(rbx, qword_ptr(COUNT))?;
            a.inc(qword_ptr(COUNT))?;
            a.shl(rbx, 6)?;
            for n in 0..7i32 {
                a.mov(rax, qword_ptr(rsp + 16 + n * 8))?;
                a.mov(qword_ptr(rbx + RECORD + n * 8), rax)?;
            }
            a.mov(rax, cr2)?;
            a.mov(qword_ptr(rbx + RECORD + 56), rax)?;
            a.mov(rbx, qword_ptr(rsp + 16))?;
            a.mov(rax, qword_ptr(rbx * 8 + CONTINUE))?;
            a.mov(qword_ptr(rsp + 24), rax)?;
            a.pop(rbx)?;
            a.pop(rax)?;
            a.lea(rsp, ptr(rsp + 8))?;
            a.ret()
        });
        self.write64(TSS + 4, STACK);
        self.write64(TSS + 0x24, IST_STACK);
        self.write(TSS + 0x66, &[0xff, 0xff]);
    }

    /// Writes a 64-bit gate for vector `v` that leads to its stub.
    pub(crate) fn gate(&self, v: u64, selector: u16, kind: u8, ist: u8) {
        let target = STUBS + v * 16;
        let low = target & 0xffff
            | u64::from(selector) << 16
            | u64::from(ist) << 32
            | u64::from(kind) << 40
            | (target & 0xffff_0000) << 32;
        self.write64(IDT + v * 16, low);
        self.write64(IDT + v * 16 + 8, target >> 32);
    }

    /// Events of vector `v` continue at `address` (with RSP at the frame) after they were recorded.
    pub(crate) fn continue_at(&self, v: u64, address: u64) {
        self.write64(CONTINUE + v * 8, address);
    }

    /// Assembles `build` at `address` and returns its length.
    pub(crate) fn assemble_at(
        &self,
        bits: u32,
        address: u64,
        build: impl FnOnce(&mut CodeAssembler) -> Result<(), iced_x86::IcedError>,
    ) -> u64 {
        let mut a = CodeAssembler::new(bits).unwrap();
        build(&mut a).unwrap();
        let bytes = a.assemble(address).unwrap();
        self.write(address, &bytes);
        bytes.len() as u64
    }

    /// Addresses of an IRET that returns from a recorded event.
    pub(crate) fn iret64(&self) -> u64 {
        let at = STUBS + 256 * 16 + 0x200;
        self.assemble_at(64, at, |a| a.iretq());
        at
    }

    /// 64-bit ring 0 at CODE.
    pub(crate) fn long_state(&self) -> CpuState {
        let mut s = CpuState::power_on(0, true, 0);
        s.cr0 = 0x8001_0031;
        s.cr4 = 0x6a0;
        s.cr3 = TABLES;
        s.efer = 0xd01;
        s.rip = CODE;
        s.gpr[gpr::RSP] = STACK - 0x1000;
        s.segments = [segment(sel::DATA, 0xc093); 6];
        s.segments[seg::CS] = segment(sel::CODE64, 0xa09b);
        s.gdtr = DescriptorTable { base: GDT, limit: 0xfff };
        s.idtr = DescriptorTable { base: IDT, limit: 0xfff };
        s.tr = Segment { selector: sel::TSS, base: TSS, limit: 0x67, attributes: 0x8b };
        s
    }

    /// 32-bit ring 0 at CODE, without paging.
    pub(crate) fn protected_state(&self) -> CpuState {
        let mut s = self.long_state();
        (s.cr0, s.cr4, s.efer) = (0x31, 0x600, 0);
        s.segments[seg::CS] = segment(sel::CODE32, 0xc09b);
        s
    }

    /// Real mode at 0000:7c00.
    pub(crate) fn real_state(&self) -> CpuState {
        let mut s = CpuState::power_on(0, true, 0);
        s.segments[seg::CS] = Segment::real_mode(0, 0x9b);
        s.rip = 0x7c00;
        s.gpr[gpr::RSP] = 0x7000;
        s.idtr = DescriptorTable { base: 0, limit: 0x3ff };
        s
    }

    /// Runs from `state` until the guest stops it.
    pub(crate) fn run_from(&mut self, state: &CpuState) -> HaltReason {
        self.vcpu.set_state(state).unwrap();
        self.run()
    }

    pub(crate) fn run(&mut self) -> HaltReason {
        self.io.stop.clear();
        self.vcpu.run(&self.io.stop.clone(), &self.io).unwrap()
    }

    /// Assembles a 64-bit guest that ends with the exit port, and runs it in long mode.
    pub(crate) fn run_long(
        &mut self,
        build: impl FnOnce(&mut CodeAssembler) -> Result<(), iced_x86::IcedError>,
    ) -> HaltReason {
        self.long_surroundings();
        self.assemble_at(64, CODE, |a| {
            build(a)?;
            exit(a)
        });
        let state = self.long_state();
        self.run_from(&state)
    }

    pub(crate) fn events(&self) -> Vec<Recorded> {
        (0..self.read64(COUNT).min(64))
            .map(|n| {
                let at = |k: u64| self.read64(RECORD + n * 64 + k * 8);
                Recorded {
                    vector: at(0),
                    error_code: at(1),
                    rip: at(2),
                    cs: at(3),
                    flags: at(4),
                    rsp: at(5),
                    ss: at(6),
                    cr2: at(7),
                }
            })
            .collect()
    }

    /// Vectors and error codes of the recorded events.
    pub(crate) fn vectors(&self) -> Vec<(u64, u64)> {
        self.events().iter().map(|e| (e.vector, e.error_code)).collect()
    }

    pub(crate) fn log(&self) -> Vec<u32> {
        self.io.log.lock().unwrap().clone()
    }

    pub(crate) fn exit_code(&self) -> u32 {
        self.io.exit.load(Ordering::SeqCst)
    }
}

/// Writes 0x11 to the exit port: the guest came to its end.
pub(crate) fn exit(a: &mut CodeAssembler) -> Result<(), iced_x86::IcedError> {
    a.mov(al, 0x11u32)?;
    a.out(EXIT_PORT as u32, al)?;
    a.hlt()
}

pub(crate) const DONE: u32 = 0x11;

pub(crate) fn segment(selector: u16, attributes: u32) -> Segment {
    Segment { selector, base: 0, limit: u32::MAX, attributes }
}

impl Machine {
    /// Like [`Machine::run_long`] with surroundings that are there already.
    pub(crate) fn run_from_code(
        &mut self,
        build: impl FnOnce(&mut CodeAssembler) -> Result<(), iced_x86::IcedError>,
    ) -> HaltReason {
        self.assemble_at(64, CODE, |a| {
            build(a)?;
            exit(a)
        });
        let state = self.long_state();
        self.run_from(&state)
    }
}

/// `state` with the local APIC enabled in SVR.
pub(crate) fn enable_apic(mut state: CpuState) -> CpuState {
    state.lapic.registers[0xf0..0xf4].copy_from_slice(&0x1ffu32.to_le_bytes());
    state
}

/// A fixed, edge-triggered message to APIC `id`.
pub(crate) fn msi(id: u32, vector: u8) -> atoll_machine::interrupt::Msi {
    atoll_machine::interrupt::Msi { address: 0xfee0_0000 | u64::from(id) << 12, data: vector.into() }
}
