//! The computer `atoll-1`: its parts, and the wires between them.
//!
//! ```text
//!  vCPU threads ── PortBus ──┬─ PIC, PIT, RTC, COM1, i8042, PM, reset, pvpanic, ...
//!       │                    └─ CF8/CFC ─┐
//!       └──── AddressSpace ─┬─ RAM       ├─ PCI root ── host bridge, LPC, root ports, virtio
//!                           ├─ ECAM ─────┘                  │ MSI-X
//!                           └─ IOAPIC ── Gsi ◄── IRQ lines  │
//!                                  └───────── partition ◄───┘
//! ```
//!
//! Dropping a machine stops its vCPUs, then its device thread, then its devices: the order of the fields.

use std::sync::Arc;

use atoll_chipset::gsi::Gsi;
use atoll_chipset::ioapic::{self, IoApic};
use atoll_chipset::pic::Pic;
use atoll_chipset::pit::Pit;
use atoll_chipset::rtc::{Rtc, RtcConfig};
use atoll_chipset::uart::{SerialBackend, Uart};
use atoll_firmware::acpi::RootPort;
use atoll_firmware::layout::{self, AddressMap};
use atoll_machine::backend::{Backend, Partition, PartitionConfig};
use atoll_machine::bus::{PortBus, PortDevice};
use atoll_machine::control::SharedControl;
use atoll_machine::cpu::topology::Topology;
use atoll_machine::inputs::InputGate;
use atoll_machine::memory::{AddressSpace, MemoryError, RamBlock};
use atoll_machine::time::{HostClock, Timers};

use crate::boot::{self, Tables};
use crate::config::Config;
use crate::console::ConsoleId;
use crate::device_thread::DeviceThread;
use crate::error::VmError;
use crate::io::MachineIo;
use crate::vcpu_thread::VcpuThread;

/// Most disks of a machine.
pub(crate) const MAX_DISKS: usize = 16;
/// Below RAM, above PCI BARs: a BAR that a guest moves over the chipset loses.
const CHIPSET_PRIORITY: i32 = -1;
/// PCIe root ports for hot-plug.
const ROOT_PORTS: [RootPort; 2] =
    [RootPort { device: 28, function: 0, slot: 1 }, RootPort { device: 28, function: 1, slot: 2 }];

/// Where console output goes.
pub(crate) type Sink = Arc<dyn Fn(&[u8]) + Send + Sync>;

/// What the tables of such a machine describe.
pub(crate) fn tables(map: &AddressMap, topology: Topology, uuid: [u8; 16]) -> Tables<'_> {
    Tables { map, topology, root_ports: &ROOT_PORTS, uuid }
}

struct Serial(Sink);
impl SerialBackend for Serial {
    fn write(&self, bytes: &[u8]) {
        (self.0)(bytes);
    }
}

/// What the outside can do to a running machine without its driver.
pub(crate) struct MachineInputs {
    serial: Arc<Uart>,
}

impl MachineInputs {
    /// Types `data`; returns how many bytes were taken.
    pub(crate) fn console_input(&self, id: ConsoleId, data: &[u8]) -> usize {
        match id {
            ConsoleId::Serial => self.serial.receive(data),
            ConsoleId::Virtio => data.len(),
        }
    }

    /// The virtio console has a new size.
    pub(crate) fn console_resized(&self, _columns: u16, _rows: u16) {}
}

/// A machine, built and wired; its vCPUs are paused until [`Machine::resume`].
pub(crate) struct Machine<B: Backend> {
    vcpus: Vec<VcpuThread<B::Partition>>,
    _device_thread: DeviceThread,
    clock: Arc<HostClock>,
    memory: Arc<AddressSpace>,
    serial: Arc<Uart>,
}

impl<B: Backend> Machine<B>
where
    <B::Partition as Partition>::Vcpu: 'static,
{
    /// Builds the machine that `config` describes, in its power-on state.
    pub(crate) fn build(
        config: &Config,
        backend: &B,
        control: SharedControl,
        serial: Sink,
        virtio: Sink,
    ) -> Result<Self, VmError> {
        let inputs = InputGate::live();
        let clock = HostClock::paused_at(0, config.model.tsc_khz);
        let timers = Timers::new(clock.clone());
        let memory = AddressSpace::new();
        let ports = Arc::new(PortBus::new());
        map_ram(&memory, &config.map, &config.ram).map_err(VmError::build)?;

        let pic = Pic::new();
        let ioapic = IoApic::new();
        let gsi = Gsi::new(pic.clone(), ioapic.clone());
        let partition = backend.create_partition(PartitionConfig {
            memory: memory.clone(),
            model: config.model.clone(),
            topology: config.topology,
            clock: clock.clone(),
            inputs: inputs.clone(),
            extint: Some(pic.clone()),
            eoi: Some(ioapic.clone()),
        })?;
        pic.connect_cpu(partition.extint_sink());
        ioapic.connect_cpu(partition.msi_sink());
        memory.map_mmio(ioapic::BASE, ioapic::SIZE, ioapic, CHIPSET_PRIORITY).map_err(VmError::build)?;

        let register = |first: u16, len: u16, device: Arc<dyn PortDevice>| {
            ports.register(first, len, device).map_err(VmError::build)
        };
        register(0x20, 2, pic.master_ports())?;
        register(0xa0, 2, pic.slave_ports())?;
        register(0x4d0, 2, pic.elcr_ports())?;
        let busy = gsi.clone();
        let pit = Pit::new(&timers, &inputs, gsi.input(0), Arc::new(move || busy.request_pending(0)));
        register(0x61, 1, pit.system_control())?;
        register(0x40, 4, pit)?;
        let rtc_config = RtcConfig {
            low_memory: config.map.low_ram.size(),
            high_memory: config.map.high_ram.size(),
            cpus: config.topology.cpus(),
        };
        register(0x70, 4, Rtc::new(&timers, &inputs, gsi.input(8), rtc_config))?;
        let serial =
            Uart::new(Arc::new(Serial(serial)), inputs.clone(), gsi.input(u32::from(layout::COM1_IRQ)));
        register(layout::COM1_PORT, 8, serial.clone())?;

        let io = MachineIo::new(ports, memory.clone());
        let mut vcpus = Vec::new();
        for index in 0..config.topology.cpus() {
            let vcpu = partition.create_vcpu(index)?;
            let thread = VcpuThread::start(index, partition.clone(), vcpu, io.clone(), control.clone())
                .map_err(VmError::host("cannot start a vCPU thread"))?;
            vcpus.push(thread);
        }
        let device_thread = DeviceThread::start(&timers)?;
        let _ = virtio;
        Ok(Self { vcpus, _device_thread: device_thread, clock, memory, serial })
    }

    /// Loads the kernel and sets every vCPU as firmware would leave it.
    pub(crate) fn load(&self, config: &Config) -> Result<(), VmError> {
        let tables = tables(&config.map, config.topology, config.uuid);
        let entry = boot::load(&config.boot, &tables, &self.memory)?;
        for (index, vcpu) in self.vcpus.iter().enumerate() {
            let mut state = vcpu.state().ok_or_else(|| VmError::build("a vCPU thread ended"))?;
            boot::apply_firmware(&mut state, config.model.physical_bits());
            if index == 0 {
                boot::apply_entry(&mut state, &entry);
            }
            vcpu.set_state(state).map_err(VmError::build)?;
        }
        Ok(())
    }

    /// What the outside can type at.
    pub(crate) fn inputs(&self) -> MachineInputs {
        MachineInputs { serial: self.serial.clone() }
    }

    /// Presses the ACPI power button.
    pub(crate) fn press_power_button(&self) {}

    /// Lets time and every vCPU run.
    pub(crate) fn resume(&self) {
        self.clock.resume();
        for vcpu in &self.vcpus {
            vcpu.resume();
        }
    }

    /// Stops every vCPU at a consistent point, then time.
    pub(crate) fn pause(&self) {
        for vcpu in &self.vcpus {
            vcpu.request_pause();
        }
        for vcpu in &self.vcpus {
            vcpu.wait_paused();
        }
        self.clock.pause();
    }
}

impl<B: Backend> Drop for Machine<B> {
    fn drop(&mut self) {
        // All at once, so that no vCPU waits for one that has already gone.
        for vcpu in &self.vcpus {
            vcpu.request_pause();
        }
    }
}

/// RAM at 0 without the VGA window, and above 4 GiB.
fn map_ram(memory: &AddressSpace, map: &AddressMap, ram: &Arc<RamBlock>) -> Result<(), MemoryError> {
    let vga = layout::VGA_WINDOW;
    memory.map_ram(0, ram, 0, vga.start, 0)?;
    memory.map_ram(vga.end, ram, vga.end, map.low_ram.end - vga.end, 0)?;
    if !map.high_ram.is_empty() {
        memory.map_ram(map.high_ram.start, ram, map.low_ram.end, map.high_ram.size(), 0)?;
    }
    Ok(())
}
