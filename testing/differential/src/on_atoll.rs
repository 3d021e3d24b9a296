//! Runs a kernel on the software CPU, in a machine of RAM and a serial port.

use std::sync::{Mutex, MutexGuard};

use anyhow::Context;
use atoll_cpu_software::partition::SoftwareBackend;
use atoll_machine::backend::{Backend, CpuIo, HaltReason, Partition, PartitionConfig, StopFlag, Vcpu};
use atoll_machine::cpu::model::{CpuModel, HostCpu, Vendor};
use atoll_machine::cpu::state::{DescriptorTable, Segment, seg};
use atoll_machine::cpu::topology::Topology;
use atoll_machine::inputs::InputGate;
use atoll_machine::memory::{AddressSpace, RamBlock};
use atoll_machine::time::VirtualClock;

use crate::layout::{ENTRY, IMAGE};

const RAM: u64 = 16 << 20;
/// Instructions without a new record after which a kernel counts as stuck.
const PATIENCE: u64 = 3_000_000;

struct Board {
    serial: Mutex<Vec<u8>>,
    stop: StopFlag,
}

impl CpuIo for Board {
    fn port_read(&self, port: u16, data: &mut [u8]) {
        data.fill(if port == 0x3fd { 0x60 } else { 0xff });
    }
    fn port_write(&self, port: u16, data: &[u8]) {
        match port {
            0x3f8 => self.output().extend(data.first()),
            0xf4 => self.stop.set(),
            _ => {}
        }
    }
    fn mmio_read(&self, _address: u64, data: &mut [u8]) {
        data.fill(0xff);
    }
    fn mmio_write(&self, _address: u64, _data: &[u8]) {}
}

impl Board {
    fn output(&self) -> MutexGuard<'_, Vec<u8>> {
        self.serial.lock().unwrap_or_else(|e| e.into_inner())
    }
}

/// Runs `kernel` until it ends, crashes or writes no more, and returns what it wrote to the serial port.
///
/// # Errors
/// If the host lacks memory.
pub fn run(kernel: &[u8]) -> anyhow::Result<String> {
    let memory = AddressSpace::new();
    let ram = RamBlock::new_shared("differential", RAM)?;
    memory.map_ram(0, &ram, 0, RAM, 0)?;
    ram.write(IMAGE, kernel).context("the kernel is larger than the machine's RAM")?;
    // The reference's processor is one of AMD whatever the host is.
    let host = HostCpu { vendor: Vendor::Amd, ..HostCpu::detect() };
    let config = PartitionConfig {
        memory,
        model: CpuModel::resolve("atoll-base", &host, 2_000_000)?.into(),
        topology: Topology::flat(1),
        clock: VirtualClock::new(0, 2_000_000),
        inputs: InputGate::live(),
        extint: None,
        eoi: None,
    };
    let partition = SoftwareBackend.create_partition(config)?;
    let mut vcpu = partition.create_vcpu(0)?;
    let mut state = vcpu.state();
    // Multiboot 0.6.96, section 3.2.
    let flat = |selector, attributes| Segment { selector, base: 0, limit: u32::MAX, attributes };
    state.segments = [flat(0x10, 0xc093); 6];
    state.segments[seg::CS] = flat(0x08, 0xc09b);
    state.cr0 = 0x31;
    state.rip = ENTRY;
    state.rflags = 2;
    state.gdtr = DescriptorTable { base: 0, limit: 0 };
    vcpu.set_state(&state)?;
    let counting = partition.counting().context("the backend does not count instructions")?;
    let board = Board { serial: Mutex::default(), stop: StopFlag::new() };
    let mut written = 0;
    loop {
        counting.set_budget(0, Some(PATIENCE));
        let reason = vcpu.run(&board.stop, &board)?;
        let now = board.output().len();
        if reason != HaltReason::BudgetSpent || now == written {
            break;
        }
        written = now;
    }
    let serial = std::mem::take(&mut *board.output());
    Ok(String::from_utf8_lossy(&serial).into_owned())
}
