//! A processor with a little memory, and operands worth trying.

use std::sync::Arc;

use atoll_machine::backend::{CpuIo, PartitionConfig};
use atoll_machine::cpu::model::{CpuModel, HostCpu};
use atoll_machine::cpu::topology::Topology;
use atoll_machine::inputs::InputGate;
use atoll_machine::memory::{AddressSpace, RamBlock};
use atoll_machine::time::VirtualClock;
use iced_x86::{Decoder, DecoderOptions, Instruction};

use crate::access::Access;
use crate::cpu::{Cpu, XsaveArea, control};
use crate::exception::Outcome;
use crate::fpu::{Fpu, FpuConfig, execute};
use crate::partition::Shared;

/// Linear address of the memory operand (64-byte aligned, followed by more than a megabyte of RAM).
pub(super) const DATA: u64 = 0x1_0000;
/// First address that is not mapped.
pub(super) const UNMAPPED: u64 = 0x20_0000;
/// Page tables: the first 2 MiB are identity-mapped with one large page.
const TABLES: [u64; 3] = [0x1000, 0x2000, 0x3000];

/// No devices.
struct NoIo;

impl CpuIo for NoIo {
    fn port_read(&self, _: u16, _: &mut [u8]) {}
    fn port_write(&self, _: u16, _: &[u8]) {}
    fn mmio_read(&self, _: u64, _: &mut [u8]) {}
    fn mmio_write(&self, _: u64, _: &[u8]) {}
}

fn shared() -> Arc<Shared> {
    let memory = AddressSpace::new();
    let ram = RamBlock::new_shared("test", UNMAPPED).expect("test memory");
    for (table, entry) in TABLES.iter().zip([TABLES[1] | 3, TABLES[2] | 3, 0x83]) {
        ram.write(*table, &entry.to_le_bytes()).expect("page tables");
    }
    memory.map_ram(0, &ram, 0, UNMAPPED, 0).expect("test memory");
    let model = CpuModel::resolve("host", &HostCpu::detect(), 1_000_000).expect("the host's own model");
    Shared::new(PartitionConfig {
        memory,
        model: Arc::new(model),
        topology: Topology::flat(1),
        clock: VirtualClock::new(0, 1_000_000),
        inputs: InputGate::live(),
        extint: None,
        eoi: None,
    })
}

/// A CPU in 64-bit mode, ring 0, everything enabled.
pub(super) struct Fixture {
    pub(super) cpu: Cpu,
    io: NoIo,
}

impl Fixture {
    pub(super) fn new() -> Self {
        let mut cpu = Cpu::new(shared(), 0).expect("executable memory");
        cpu.fpu = Box::new(
            Fpu::new(FpuConfig { compaction: true, pointers_only_when_pending: false }).expect("thunks"),
        );
        cpu.cr0 = control::CR0_PE | control::CR0_MP | control::CR0_NE | control::CR0_ET | control::CR0_PG;
        cpu.cr3 = TABLES[0];
        cpu.cr4 = control::CR4_PAE | control::CR4_OSFXSR | control::CR4_OSXMMEXCPT | control::CR4_OSXSAVE;
        cpu.efer = control::EFER_LME | control::EFER_LMA;
        cpu.segments[1].attributes = 0xa09b;
        cpu.segments.iter_mut().for_each(|s| s.limit = u32::MAX);
        cpu.refresh_mode();
        cpu.refresh_execution();
        assert_eq!(cpu.mode.bits, 64);
        cpu.xcr0 = 7;
        *cpu.xsave = XsaveArea::init();
        cpu.gpr[7] = DATA;
        Self { cpu, io: NoIo }
    }

    /// Executes one instruction given as bytes (64-bit code).
    pub(super) fn run(&mut self, code: &[u8]) -> Outcome {
        let instruction = decode(code, 64);
        assert!(!instruction.is_invalid(), "{code:02x?} does not decode");
        self.run_decoded(&instruction)
    }

    pub(super) fn run_decoded(&mut self, instruction: &Instruction) -> Outcome {
        self.cpu.next_rip = self.cpu.rip.wrapping_add(instruction.len() as u64);
        execute(&mut self.cpu, &self.io, instruction)
    }

    pub(super) fn store(&mut self, address: u64, data: &[u8]) {
        self.cpu.write_bytes(&self.io, address, data, Access::Write).expect("test memory");
    }

    pub(super) fn load<const N: usize>(&mut self, address: u64) -> [u8; N] {
        let mut data = [0; N];
        self.cpu.read_bytes(&self.io, address, &mut data, Access::Read).expect("test memory");
        data
    }
}

pub(super) fn decode(code: &[u8], bits: u32) -> Instruction {
    Decoder::with_ip(bits, code, 0, DecoderOptions::NONE).decode()
}

/// xorshift64*: repeatable operands; failures print the seed.
pub(super) struct Random(pub(super) u64);

impl Random {
    pub(super) fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    /// Eight bytes that are often special as one f64, two f32 or small integers.
    pub(super) fn interesting(&mut self) -> u64 {
        const DOUBLES: [u64; 12] = [
            0,
            1 << 63,
            1,
            0x000f_ffff_ffff_ffff,
            0x3ff0_0000_0000_0000,
            0xbff8_0000_0000_0000,
            0x7fef_ffff_ffff_ffff,
            0x7ff0_0000_0000_0000,
            0xfff0_0000_0000_0000,
            0x7ff8_0000_0000_0000,
            0x7ff0_0000_0000_0001,
            0x41df_ffff_ffc0_0000,
        ];
        const SINGLES: [u32; 12] = [
            0,
            1 << 31,
            1,
            0x007f_ffff,
            0x3f80_0000,
            0xc020_0000,
            0x7f7f_ffff,
            0x7f80_0000,
            0xff80_0000,
            0x7fc0_0000,
            0x7f80_0001,
            0x4f00_0000,
        ];
        let pick = self.next();
        let single = |r: u64| u64::from(SINGLES[r as usize % SINGLES.len()]);
        match pick % 5 {
            0 => self.next(),
            1 => DOUBLES[(pick >> 8) as usize % DOUBLES.len()],
            2 => single(pick >> 8) | single(pick >> 24) << 32,
            3 => (self.next() % 512).wrapping_sub(256),
            _ => 0x3f80_0000_3f80_0000 ^ self.next() >> 9 & 0x807f_ffff_807f_ffff,
        }
    }

    pub(super) fn fill(&mut self, bytes: &mut [u8]) {
        for chunk in bytes.chunks_mut(8) {
            let value = self.interesting().to_le_bytes();
            chunk.copy_from_slice(&value[..chunk.len()]);
        }
    }

    /// An 80-bit operand: normal, special or unsupported.
    pub(super) fn extended(&mut self) -> [u8; 10] {
        let exponents = [0u16, 1, 0x3ffe, 0x3fff, 0x4000, 0x401e, 0x403e, 0x7ffe, 0x7fff];
        let mantissas = [0, 1, 1 << 63, 3 << 62, u64::MAX, 1 << 62];
        let pick = self.next();
        let exponent = match pick & 3 {
            0 => exponents[(pick >> 8) as usize % exponents.len()],
            1 => pick as u16 >> 1,
            _ => 0x3fd7 + (pick >> 8) as u16 % 80,
        };
        let mantissa = match pick >> 2 & 3 {
            0 => mantissas[(pick >> 20) as usize % mantissas.len()],
            _ => self.next() | 1 << 63,
        };
        let sign = (pick >> 60 & 1) as u16;
        let mut out = [0; 10];
        out[..8].copy_from_slice(&mantissa.to_le_bytes());
        out[8..].copy_from_slice(&(exponent | sign << 15).to_le_bytes());
        out
    }
}
