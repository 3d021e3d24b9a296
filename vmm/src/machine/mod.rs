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

mod chipset;
mod pci;
mod saved_state;

use std::sync::Arc;

use atoll_chipset::acpi_pm::AcpiPm;
use atoll_chipset::uart::Uart;
use atoll_firmware::acpi::RootPort;
use atoll_firmware::layout::{self, AddressMap};
use atoll_machine::backend::{Backend, Partition, PartitionConfig};
use atoll_machine::bus::PortBus;
use atoll_machine::control::SharedControl;
use atoll_machine::cpu::topology::Topology;
use atoll_machine::inputs::InputGate;
use atoll_machine::memory::{AddressSpace, MemoryError, RamBlock};
use atoll_machine::state::{ContainerError, StateSection};
use atoll_machine::time::{HostClock, Timers};
use atoll_pci::PciRoot;
use atoll_virtio::blk::Blk;
use atoll_virtio::console::Console;
use atoll_virtio::net::Net;
use atoll_virtio::transport::pci::VirtioPciDevice;

use crate::boot::{self, Tables};
use crate::config::Config;
use crate::console::ConsoleId;
use crate::device_thread::DeviceThread;
use crate::error::VmError;
use crate::io::MachineIo;
use crate::vcpu_thread::VcpuThread;
use chipset::Controllers;

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

/// What every part of the machine is built from.
struct Common {
    timers: Arc<Timers>,
    inputs: Arc<InputGate>,
    memory: Arc<AddressSpace>,
    ports: Arc<PortBus>,
    control: SharedControl,
}

/// What the outside can do to a running machine without its driver.
pub(crate) struct MachineInputs {
    serial: Arc<Uart>,
    console: Arc<Console>,
    disks: Vec<Arc<Blk>>,
    networks: Vec<Arc<Net>>,
}

impl MachineInputs {
    /// Types `data`; returns how many bytes were taken.
    pub(crate) fn console_input(&self, id: ConsoleId, data: &[u8]) -> usize {
        match id {
            ConsoleId::Serial => self.serial.receive(data),
            ConsoleId::Virtio => self.console.receive(data),
        }
    }

    /// The virtio console has a new size.
    pub(crate) fn console_resized(&self, columns: u16, rows: u16) {
        self.console.resize(columns, rows);
    }

    /// The disks' devices, in order.
    pub(crate) fn disks(&self) -> &[Arc<Blk>] {
        &self.disks
    }

    /// The network devices, in order.
    pub(crate) fn networks(&self) -> &[Arc<Net>] {
        &self.networks
    }
}

/// A machine, built and wired; its vCPUs are paused until [`Machine::resume`].
pub(crate) struct Machine<B: Backend> {
    vcpus: Vec<VcpuThread<B::Partition>>,
    device_thread: DeviceThread,
    clock: Arc<HostClock>,
    memory: Arc<AddressSpace>,
    serial: Arc<Uart>,
    console: Arc<Console>,
    disks: Vec<Arc<Blk>>,
    networks: Vec<Arc<Net>>,
    pm: Arc<AcpiPm>,
    virtio: Vec<Arc<VirtioPciDevice>>,
    root: Arc<PciRoot>,
    /// Everything with state but the vCPUs, in the order in which it is restored.
    sections: Vec<(String, Arc<dyn StateSection>)>,
}

/// A machine on whichever backend, as its driver sees it.
pub(crate) trait AnyMachine: Send {
    /// Loads the kernel and sets every vCPU as firmware would leave it.
    fn load(&self, config: &Config) -> Result<(), VmError>;
    /// What the outside can type at.
    fn inputs(&self) -> MachineInputs;
    /// Presses the ACPI power button.
    fn press_power_button(&self);
    /// Lets time, devices and every vCPU run.
    fn resume(&self);
    /// Stops every vCPU at a consistent point, then time, then the devices: nothing of the machine changes until
    /// [`AnyMachine::resume`].
    fn pause(&self);
    /// Carries out again what the disks kept after errors of the host. The machine must be paused, and stays so.
    /// Returns whether nothing is kept any more.
    fn retry_disks(&self) -> bool;
    /// The state of everything but memory. The machine must be paused.
    fn save(&self) -> Result<Vec<u8>, VmError>;
    /// Takes over a state that a machine of the same description saved. The machine stays paused; after an error
    /// it must not run.
    fn restore(&self, saved: &[u8]) -> Result<(), ContainerError>;
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
        let clock = HostClock::paused_at(0, config.model.tsc_khz);
        let common = Common {
            timers: Timers::new(clock.clone()),
            inputs: InputGate::live(),
            memory: AddressSpace::new(),
            ports: Arc::new(PortBus::new()),
            control,
        };
        map_ram(&common.memory, &config.map, &config.ram).map_err(VmError::build)?;
        let controllers = Controllers::new();
        let partition = backend.create_partition(PartitionConfig {
            memory: common.memory.clone(),
            model: config.model.clone(),
            topology: config.topology,
            clock: clock.clone(),
            inputs: common.inputs.clone(),
            extint: Some(controllers.pic.clone()),
            eoi: Some(controllers.ioapic.clone()),
        })?;
        controllers.connect_cpus(&partition.extint_sink(), &partition.msi_sink());
        if let Some(routes) = partition.ioapic_routes() {
            controllers.ioapic.connect_routes(routes);
        }
        let chipset = chipset::build(config, &common, &controllers, serial)?;
        let pci = pci::build(config, &common, &chipset, &controllers.gsi, &*partition, virtio)?;
        let vcpus = start_vcpus(config, &partition, &common)?;
        Ok(Self {
            vcpus,
            device_thread: DeviceThread::start(&common.timers)?,
            clock,
            memory: common.memory,
            serial: chipset.serial,
            console: pci.console,
            disks: pci.disks,
            networks: pci.networks,
            pm: chipset.pm,
            virtio: pci.virtio,
            root: chipset.root,
            sections: chipset.sections.into_iter().chain(pci.sections).collect(),
        })
    }
}

impl<B: Backend> AnyMachine for Machine<B>
where
    <B::Partition as Partition>::Vcpu: 'static,
{
    fn load(&self, config: &Config) -> Result<(), VmError> {
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

    fn inputs(&self) -> MachineInputs {
        MachineInputs {
            serial: self.serial.clone(),
            console: self.console.clone(),
            disks: self.disks.clone(),
            networks: self.networks.clone(),
        }
    }

    fn press_power_button(&self) {
        self.pm.press_power_button();
    }

    fn resume(&self) {
        self.clock.resume();
        self.device_thread.look_again();
        for device in &self.virtio {
            device.resume();
        }
        for vcpu in &self.vcpus {
            vcpu.resume();
        }
    }

    fn pause(&self) {
        for vcpu in &self.vcpus {
            vcpu.request_pause();
        }
        for vcpu in &self.vcpus {
            vcpu.wait_paused();
        }
        self.clock.pause();
        // Timers that expired before time stopped still run to their end.
        self.device_thread.settle();
        for device in &self.virtio {
            device.pause();
        }
    }

    fn retry_disks(&self) -> bool {
        // Each of them, also after one that still fails.
        let mended = self.disks.iter().filter(|disk| disk.retry()).count() == self.disks.len();
        for device in &self.virtio {
            // Hands back what has succeeded.
            device.pause();
        }
        mended
    }

    fn save(&self) -> Result<Vec<u8>, VmError> {
        self.save_sections()
    }

    fn restore(&self, saved: &[u8]) -> Result<(), ContainerError> {
        self.restore_sections(saved)
    }
}

impl<B: Backend> Drop for Machine<B> {
    fn drop(&mut self) {
        // All at once, so that no vCPU waits for one that has already gone.
        for vcpu in &self.vcpus {
            vcpu.request_pause();
        }
        // Functions hold guest memory, where configuration space is mapped, which leads back to them: a machine that
        // has ended must let go of its disks.
        let bus = self.root.bus();
        for (devfn, _) in bus.devices() {
            drop(bus.detach(devfn));
        }
    }
}

/// One paused thread per vCPU.
fn start_vcpus<P: Partition>(
    config: &Config,
    partition: &Arc<P>,
    common: &Common,
) -> Result<Vec<VcpuThread<P>>, VmError>
where
    P::Vcpu: 'static,
{
    let io = MachineIo::new(common.ports.clone(), common.memory.clone());
    let mut vcpus = Vec::new();
    for index in 0..config.topology.cpus() {
        let vcpu = partition.create_vcpu(index)?;
        let thread = VcpuThread::start(index, partition.clone(), vcpu, io.clone(), common.control.clone())
            .map_err(VmError::host("cannot start a vCPU thread"))?;
        if let Some(host_cpus) = config.pinning.get(index as usize) {
            thread.pin(host_cpus).map_err(VmError::host("cannot pin a vCPU thread to its host CPUs"))?;
        }
        vcpus.push(thread);
    }
    Ok(vcpus)
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

#[cfg(test)]
mod tests {
    use std::io::Write;

    use atoll_api_types::{Accelerator, ByteSize, VmSpec};
    use atoll_cpu_software::partition::SoftwareBackend;
    use atoll_kvm::KvmBackend;
    use atoll_machine::control::{MachineControl, MachineRequest};

    use super::*;

    struct Ignore;
    impl MachineControl for Ignore {
        fn request(&self, _request: MachineRequest) {}
    }

    /// A Multiboot 1 image (0.6.96, 3.1.3) of two instructions: HLT, and a jump back to it.
    fn halting_kernel() -> Vec<u8> {
        let (magic, flags, base) = (0x1bad_b002u32, 0x0001_0000u32, 0x10_0000u32);
        let checksum = magic.wrapping_add(flags).wrapping_neg();
        let header = [magic, flags, checksum, base, base, 0, 0, base + 32];
        header.iter().flat_map(|word| word.to_le_bytes()).chain([0xf4, 0xeb, 0xfd]).collect()
    }

    fn halting_machine(accel: Accelerator) -> Result<Config, VmError> {
        let mut kernel = tempfile::NamedTempFile::new().unwrap();
        kernel.write_all(&halting_kernel()).unwrap();
        let mut spec = VmSpec::named("t");
        spec.networks = Vec::new();
        spec.boot.kernel = Some(kernel.path().to_owned());
        spec.memory = ByteSize(16 << 20);
        spec.cpus.cores = 2;
        spec.cpu = "host".to_owned();
        spec.accel = accel;
        Config::from_spec(&spec)
    }

    fn nothing_outlives<B: Backend>(config: &Config, backend: &B)
    where
        <B::Partition as Partition>::Vcpu: 'static,
    {
        let machine =
            Machine::build(config, backend, Arc::new(Ignore), Arc::new(|_| {}), Arc::new(|_| {})).unwrap();
        machine.load(config).unwrap();
        machine.resume();
        let (memory, serial, virtio) = (
            Arc::downgrade(&machine.memory),
            Arc::downgrade(&machine.serial),
            Arc::downgrade(&machine.virtio[0]),
        );
        drop(machine);
        assert_eq!((memory.strong_count(), serial.strong_count(), virtio.strong_count()), (0, 0, 0));
    }

    /// A guest that resets its machine in a loop must not make the host keep the machines that were.
    #[test]
    fn nothing_of_a_machine_outlives_it() {
        nothing_outlives(&halting_machine(Accelerator::Software).unwrap(), &SoftwareBackend);
    }

    #[test]
    fn nothing_of_a_machine_on_kvm_outlives_it() {
        match halting_machine(Accelerator::Kvm) {
            Ok(config) => nothing_outlives(&config, &KvmBackend::open().unwrap()),
            Err(error) => println!("skipped: {error}"),
        }
    }

    /// The tables are built without naming a device, and the devices without naming the tables.
    #[test]
    fn tables_and_devices_agree_where_things_are() {
        for device in 0..32 {
            for pin in 0..4 {
                let (tables, wires) = (layout::pci_intx_gsi(device, pin), atoll_pci::intx_gsi(device, pin));
                assert_eq!(u32::from(tables), wires, "device {device} pin {pin}");
            }
        }
        assert_eq!(layout::IOAPIC_BASE, atoll_chipset::ioapic::BASE);
        assert_eq!(usize::from(layout::IOAPIC_PINS), atoll_chipset::ioapic::PINS);
        assert_eq!(layout::PVPANIC_PORT, atoll_chipset::pvpanic::PORT);
        assert_eq!(layout::PM_SIZE, atoll_chipset::acpi_pm::SIZE);
        assert_eq!(u16::from(layout::S5_SLEEP_TYPE), atoll_chipset::acpi_pm::S5_SLEEP_TYPE);
        assert_eq!(layout::RESET_VALUE, atoll_chipset::reset::FULL_RESET);
        assert_eq!(layout::ECAM_BUSES, layout::ECAM.size() / atoll_pci::ECAM_BYTES_PER_BUS);
    }
}
