//! The guest side: runs a case on the interpreter.
//!
//! The machine has one processor and 2 MiB of RAM. Paging maps the window of [`crate::layout`] to the pages at
//! [`WINDOW_RAM`], with the permissions that the host side has, and descriptor tables, out of user code's
//! reach, hold what Linux's hold. Exceptions are taken from the interpreter before it delivers them.

// UNSAFETY: reads and writes guest RAM pages in place; copying them through the checked interface would cost
// more than the interpreter takes for a case.
#![allow(unsafe_code)]

use std::sync::Arc;

use atoll_cpu_software::cpu::{Cpu, control, flag};
use atoll_cpu_software::exception::{Exception, SoftwareInterrupt, vector};
use atoll_cpu_software::execute::{self, Leave};
use atoll_cpu_software::partition::Shared;
use atoll_machine::backend::{CpuIo, PartitionConfig};
use atoll_machine::cpu::model::{CpuModel, HostCpu};
use atoll_machine::cpu::state::{Activity, DescriptorTable, Segment, seg};
use atoll_machine::cpu::topology::Topology;
use atoll_machine::inputs::InputGate;
use atoll_machine::memory::{AddressSpace, RamBlock};
use atoll_machine::time::VirtualClock;

use crate::case::{After, Case, Mode, Patterns, Trap, XSAVE};
use crate::layout::{self, BASE, CODE, CODE_LEN, PAGE, WINDOW};

/// Instructions after which a case counts as endless.
pub const BUDGET: u64 = 20_000;
/// Guest-physical address of the window's pages.
const WINDOW_RAM: u64 = 0x10_0000;
const RAM: u64 = 0x20_0000;
const PML4: u64 = 0x1000;
const GDT: u64 = 0x8000;
const LDT: u64 = 0x9000;
const TSS: u64 = 0xa000;
/// Linear address at which the kernel half maps guest-physical 0.
const KERNEL: u64 = 0xffff_8000_0000_0000;

/// How the interpreter's run of a case ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ended {
    /// With an exception; the state is filled in.
    Trap,
    /// Not within the budget.
    Endless,
    /// The processor stopped executing, which user code cannot cause.
    Stopped,
}

/// No devices.
struct Nothing;

impl CpuIo for Nothing {
    fn port_read(&self, _port: u16, data: &mut [u8]) {
        data.fill(0xff);
    }
    fn port_write(&self, _port: u16, _data: &[u8]) {}
    fn mmio_read(&self, _address: u64, data: &mut [u8]) {
        data.fill(0xff);
    }
    fn mmio_write(&self, _address: u64, _data: &[u8]) {}
}

/// The interpreter with its machine.
pub struct Guest {
    cpu: Cpu,
    ram: Arc<RamBlock>,
    code_used: (usize, usize),
}

/// The CPU model that is compared: all that the interpreter offers on this host.
pub fn model() -> anyhow::Result<CpuModel> {
    Ok(CpuModel::resolve("host", &HostCpu::detect(), 3_000_000)?)
}

impl Guest {
    /// A machine of its own.
    pub fn new(model: CpuModel, patterns: &Patterns) -> anyhow::Result<Self> {
        let memory = AddressSpace::new();
        let ram = RamBlock::new_shared("oracle", RAM)?;
        memory.map_ram(0, &ram, 0, RAM, 0)?;
        let config = PartitionConfig {
            memory,
            model: Arc::new(model),
            topology: Topology::flat(1),
            clock: VirtualClock::new(0, 3_000_000),
            inputs: InputGate::live(),
            extint: None,
            eoi: None,
        };
        let mut cpu = Cpu::new(Shared::new(config), 0)?;
        build_tables(&ram)?;
        ram.write(WINDOW_RAM + layout::READ_ONLY as u64, patterns.read_only())?;
        ram.write(WINDOW_RAM + CODE as u64, &[0xcc; CODE_LEN])?;
        enter_long_mode(&mut cpu);
        Ok(Self { cpu, ram, code_used: (0, 0) })
    }

    /// One page of the window, as it is now.
    pub fn page(&self, offset: usize) -> &[u8; PAGE] {
        assert!(offset.is_multiple_of(PAGE) && offset < WINDOW);
        // SAFETY: inside the RAM block, which `self` keeps alive; only `run`, which borrows `self` exclusively,
        // lets anyone write to it.
        unsafe { &*self.ram.as_ptr().add(WINDOW_RAM as usize + offset).cast() }
    }

    /// A page of the window, to be prepared. Not for code pages: their changes must be announced.
    pub fn writable(&mut self, offset: usize) -> &mut [u8; PAGE] {
        assert!(layout::WRITABLE.contains(&offset));
        // SAFETY: as in `page`, and `self` is borrowed exclusively.
        unsafe { &mut *self.ram.as_ptr().add(WINDOW_RAM as usize + offset).cast() }
    }

    fn place_code(&mut self, case: &Case) {
        let at = case.at.clamp(CODE, CODE + CODE_LEN);
        let len = case.code.len().min(CODE + CODE_LEN - at);
        let (from, used) = self.code_used;
        let filler = [0xcc; CODE_LEN];
        // The block is larger than the window, so that neither write fails.
        let _ = self.ram.write(WINDOW_RAM + (CODE + from) as u64, &filler[..used]);
        let _ = self.ram.write(WINDOW_RAM + at as u64, &case.code[..len]);
        self.code_used = (at - CODE, len);
    }

    /// Puts the processor into the state that `case` starts with.
    fn load(&mut self, case: &Case) {
        let cpu = &mut self.cpu;
        cpu.gpr = case.gpr;
        cpu.rip = case.start();
        cpu.next_rip = cpu.rip;
        cpu.rflags = case.rflags;
        cpu.segments = case.selectors.map(layout::loaded);
        if case.mode == Mode::Long {
            cpu.segments[seg::FS].base = case.fs_base;
            cpu.segments[seg::GS].base = case.gs_base;
        }
        cpu.xsave.0[..XSAVE].copy_from_slice(&case.vectors.0);
        cpu.activity = Activity::Active;
        cpu.interrupt_shadow = false;
        cpu.recheck = false;
        cpu.fpu.forget_selectors();
        cpu.dr6 = 0xffff_0ff0;
        cpu.retired = 0;
        cpu.budget_end = BUDGET;
        cpu.refresh_mode();
    }

    /// Runs a case whose memory is already in place.
    pub fn run(&mut self, case: &Case, after: &mut After) -> Ended {
        self.place_code(case);
        self.load(case);
        let cpu = &mut self.cpu;
        for _ in 0..BUDGET {
            match execute::run(cpu, &Nothing) {
                Leave::Exception(exception) => {
                    collect(cpu, exception, after);
                    return Ended::Trap;
                }
                Leave::Budget => return Ended::Endless,
                Leave::Inactive => return Ended::Stopped,
                Leave::Events => {}
            }
        }
        Ended::Endless
    }

    /// Linear addresses of the instructions that a case executes, up to `limit`. The state is lost.
    pub fn trace(&mut self, case: &Case, limit: usize) -> Vec<(u64, u32)> {
        self.place_code(case);
        self.load(case);
        let cpu = &mut self.cpu;
        let mut trace = Vec::new();
        while trace.len() < limit {
            let base = if cpu.mode.bits == 64 { 0 } else { cpu.segments[seg::CS].base };
            trace.push((cpu.rip.wrapping_add(base), cpu.mode.bits));
            let before = cpu.retired;
            match execute::step(cpu, &Nothing) {
                Leave::Events if cpu.retired != before => {}
                Leave::Events => {
                    trace.pop();
                }
                _ => break,
            }
        }
        trace
    }
}

fn collect(cpu: &Cpu, exception: Exception, after: &mut After) {
    after.gpr = cpu.gpr;
    after.rflags = cpu.rflags;
    after.rip = cpu.rip;
    after.selectors = cpu.segments.map(|s| s.selector);
    after.fs_base = cpu.segments[seg::FS].base;
    after.gs_base = cpu.segments[seg::GS].base;
    after.vectors.0.copy_from_slice(&cpu.xsave.0[..XSAVE]);
    let fault = |vector: u8, code: u64| Trap { vector: vector.into(), error_code: code, address: 0 };
    after.trap = match exception {
        Exception::Fault { vector, error_code } => fault(vector, error_code.unwrap_or(0).into()),
        Exception::PageFault { address, error_code } => {
            Trap { vector: vector::PF.into(), error_code: error_code.into(), address }
        }
        // Linux's gates for the breakpoint and overflow exceptions let user code through, no others.
        Exception::Software { vector, source: SoftwareInterrupt::IntN } if !matches!(vector, 3 | 4) => {
            fault(vector::GP, u64::from(vector) << 3 | 2)
        }
        Exception::Software { vector, .. } => {
            after.rip = cpu.next_rip;
            fault(vector, 0)
        }
        Exception::DebugTrap { .. } => {
            after.rip = cpu.next_rip;
            fault(vector::DB, 0)
        }
    };
}

fn build_tables(ram: &RamBlock) -> anyhow::Result<()> {
    const PRESENT: u64 = 1 | 1 << 5 | 1 << 6; // with A and D: user code never causes a table update
    const WRITABLE: u64 = 1 << 1;
    const USER: u64 = 1 << 2;
    const NO_EXECUTE: u64 = 1 << 63;
    let put = |at: u64, value: u64| ram.write(at, &value.to_le_bytes());
    let (user_pdpt, user_pd, user_pt) = (0x2000, 0x3000, 0x4000);
    let (kernel_pdpt, kernel_pd) = (0x5000, 0x6000);
    let table = PRESENT | WRITABLE | USER;
    put(PML4 + (BASE >> 39) * 8, user_pdpt | table)?;
    put(user_pdpt + (BASE >> 30 & 511) * 8, user_pd | table)?;
    put(user_pd + (BASE >> 21 & 511) * 8, user_pt | table)?;
    let page = |offset: usize, flags: u64| {
        let linear = BASE + offset as u64;
        put(user_pt + (linear >> 12 & 511) * 8, (WINDOW_RAM + offset as u64) | PRESENT | USER | flags)
    };
    page(CODE, 0)?;
    page(CODE + PAGE, 0)?;
    page(layout::READ_ONLY, NO_EXECUTE)?;
    for offset in layout::WRITABLE {
        page(offset, WRITABLE | NO_EXECUTE)?;
    }
    put(PML4 + 256 * 8, kernel_pdpt | PRESENT | WRITABLE)?;
    put(kernel_pdpt, kernel_pd | PRESENT | WRITABLE)?;
    put(kernel_pd, PRESENT | WRITABLE | 1 << 7)?;
    // The I/O bitmap lies beyond the TSS: user code has no ports.
    put(TSS + 0x60, 0x68 << 48)?;
    for (index, descriptor) in layout::GLOBAL {
        put(GDT + u64::from(index) * 8, descriptor)?;
    }
    for (index, local) in layout::LOCAL.iter().enumerate() {
        put(LDT + index as u64 * 8, local.descriptor())?;
    }
    Ok(())
}

fn enter_long_mode(cpu: &mut Cpu) {
    use control::*;
    cpu.cr0 = CR0_PE | CR0_MP | CR0_ET | CR0_NE | CR0_WP | CR0_AM | CR0_PG;
    cpu.cr3 = PML4;
    cpu.cr4 = CR4_PAE | CR4_PSE | CR4_PGE | CR4_OSFXSR | CR4_OSXMMEXCPT | CR4_OSXSAVE;
    cpu.cr4 |= CR4_FSGSBASE | CR4_UMIP | CR4_SMEP | CR4_SMAP;
    cpu.efer = EFER_SCE | EFER_LME | EFER_LMA | EFER_NXE;
    cpu.xcr0 = 7;
    cpu.gdtr = DescriptorTable { base: KERNEL + GDT, limit: 0x7f };
    let system = |selector, at, limit, attributes| Segment { selector, base: KERNEL + at, limit, attributes };
    cpu.ldtr = system(0x50, LDT, layout::LOCAL.len() as u32 * 8 - 1, 0x82);
    cpu.tr = system(0x40, TSS, 0x67, 0x8b);
    cpu.rflags = 2 | flag::IF;
    cpu.refresh_mode();
}
