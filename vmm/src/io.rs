//! How a vCPU's port and memory-mapped accesses reach the devices of its machine.

use std::sync::Arc;

use atoll_machine::backend::CpuIo;
use atoll_machine::bus::PortBus;
use atoll_machine::memory::AddressSpace;

/// The buses of one machine, as every vCPU sees them. Dispatch takes no lock; devices lock themselves.
#[derive(Clone)]
pub(crate) struct MachineIo {
    ports: Arc<PortBus>,
    memory: Arc<AddressSpace>,
}

impl MachineIo {
    /// The given buses.
    pub(crate) fn new(ports: Arc<PortBus>, memory: Arc<AddressSpace>) -> Self {
        Self { ports, memory }
    }
}

impl CpuIo for MachineIo {
    fn port_read(&self, port: u16, data: &mut [u8]) {
        self.ports.read(port, data);
    }
    fn port_write(&self, port: u16, data: &[u8]) {
        self.ports.write(port, data);
    }
    fn mmio_read(&self, address: u64, data: &mut [u8]) {
        self.memory.mmio_read(address, data);
    }
    fn mmio_write(&self, address: u64, data: &[u8]) {
        self.memory.mmio_write(address, data);
    }
}
