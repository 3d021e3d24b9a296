//! The whole chipset on its buses, as a machine puts it together, with a clock that is moved by hand: for tests
//! and fuzz targets.

use std::sync::{Arc, Mutex};

use atoll_machine::bus::{PortBus, PortDevice};
use atoll_machine::control::{MachineControl, MachineRequest};
use atoll_machine::inputs::InputGate;
use atoll_machine::interrupt::{EoiSink, ExtIntSource, Msi, MsiSink};
use atoll_machine::memory::AddressSpace;
use atoll_machine::state::StateSection;
use atoll_machine::time::{Timers, VirtualClock};
use atoll_pci::{
    AssignWindows, Bdf, ConfigPorts, PciBarMapper, PciDevice, PciRoot, assign_bars, devfn, intx_gsi,
};

use crate::acpi_pm::AcpiPm;
use crate::debug_port::PostPort;
use crate::gsi::Gsi;
use crate::host_bridge::{self, HostBridge, PamAlwaysRam};
use crate::i8042::I8042;
use crate::ioapic::{self, IoApic};
use crate::lock;
use crate::lpc::{self, LpcBridge};
use crate::pic::Pic;
use crate::pit::Pit;
use crate::pvpanic::{self, PvPanic};
use crate::reset::ResetControl;
use crate::root_port::{RootPort, SlotListener};
use crate::rtc::{Rtc, RtcConfig};
use crate::uart::{SerialBackend, Uart};
use crate::watchdog::Watchdog;

#[cfg(test)]
mod tests;

/// What the board did to the outside.
#[derive(Default)]
pub struct World {
    /// Requests to the machine.
    pub requests: Mutex<Vec<MachineRequest>>,
    /// Interrupt messages.
    pub messages: Mutex<Vec<Msi>>,
    /// Serial output.
    pub output: Mutex<Vec<u8>>,
}
impl MachineControl for World {
    fn request(&self, request: MachineRequest) {
        lock(&self.requests).push(request);
    }
}
impl MsiSink for World {
    fn signal_msi(&self, msi: Msi) {
        lock(&self.messages).push(msi);
    }
}
impl SerialBackend for World {
    fn write(&self, bytes: &[u8]) {
        lock(&self.output).extend(bytes);
    }
}
impl SlotListener for World {
    fn removed(&self, _slot: u16, _device: Arc<dyn PciDevice>) {}
}

/// The assembled chipset. See the module's documentation.
pub struct Board {
    /// What it did to the outside.
    pub world: Arc<World>,
    /// Guest time.
    pub clock: Arc<VirtualClock>,
    /// The timers on it.
    pub timers: Arc<Timers>,
    /// Guest-physical addresses: no RAM, the IOAPIC, ECAM and BARs.
    pub memory: Arc<AddressSpace>,
    /// I/O ports.
    pub ports: Arc<PortBus>,
    /// PCI.
    pub root: Arc<PciRoot>,
    /// 8259A pair.
    pub pic: Arc<Pic>,
    /// IOAPIC.
    pub ioapic: Arc<IoApic>,
    /// The first serial port.
    pub uart: Arc<Uart>,
    /// Everything with state, in the order in which it is restored.
    pub sections: Vec<(&'static str, Arc<dyn StateSection>)>,
}

/// Where the configuration window is.
pub const ECAM: u64 = 0xe000_0000;

impl Board {
    /// A board in its power-on state, PCIEXBAR and PMBASE as without firmware.
    ///
    /// # Panics
    ///
    /// When two devices claim the same port, which the tests would show.
    pub fn new() -> Self {
        let world = Arc::new(World::default());
        let clock = VirtualClock::new(1_700_000_000_000_000_000, 1_000_000);
        let timers = Timers::new(clock.clone());
        let (memory, ports, root) = (AddressSpace::new(), Arc::new(PortBus::new()), PciRoot::new());
        let (pic, ioapic) = (Pic::new(), IoApic::new());
        let gsi = Gsi::new(pic.clone(), ioapic.clone());
        ioapic.connect_cpu(world.clone());
        memory.map_mmio(ioapic::BASE, ioapic::SIZE, ioapic.clone(), -1).expect("the IOAPIC's place is free");
        let uart = Uart::new(world.clone(), InputGate::live(), gsi.input(4));
        let sections: Vec<(&'static str, Arc<dyn StateSection>)> = vec![
            ("gsi", gsi.clone()),
            ("pic", pic.clone()),
            ("ioapic", ioapic.clone()),
            ("uart", uart.clone()),
        ];
        let mut board = Self { world, clock, timers, memory, ports, root, pic, ioapic, uart, sections };
        let pm = board.add_legacy(&gsi);
        board.add_pci(&gsi, pm);
        board
    }

    fn register(&self, first: u16, len: u16, device: Arc<dyn PortDevice>) {
        self.ports.register(first, len, device).expect("ports are free");
    }

    /// The devices at fixed ports.
    fn add_legacy(&mut self, gsi: &Arc<Gsi>) -> Arc<AcpiPm> {
        let (world, timers, gate) = (self.world.clone(), self.timers.clone(), InputGate::live());
        let probe = gsi.clone();
        let pit = Pit::new(&timers, &gate, gsi.input(0), Arc::new(move || probe.request_pending(0)));
        let rtc = Rtc::new(&timers, &gate, gsi.input(8), RtcConfig::default());
        let i8042 = I8042::new(gsi.input(1), gsi.input(12), world.clone(), gate.clone());
        let pm = AcpiPm::new(&timers, &gate, gsi.input(9), world.clone(), true);
        let reset = ResetControl::new(world.clone());
        let config = Arc::new(ConfigPorts::new(self.root.clone()));
        config.set_narrow(reset.cf8_ports());
        let post = PostPort::new();
        self.register(0x20, 2, self.pic.master_ports());
        self.register(0xa0, 2, self.pic.slave_ports());
        self.register(0x4d0, 2, self.pic.elcr_ports());
        self.register(0x40, 4, pit.clone());
        self.register(0x61, 1, pit.system_control());
        self.register(0x70, 8, rtc.clone());
        self.register(0x3f8, 8, self.uart.clone());
        self.register(0x60, 1, i8042.data_port());
        self.register(0x64, 1, i8042.command_port());
        self.register(0xb2, 2, pm.smi_ports());
        self.register(0x92, 1, reset.port92());
        self.register(0x80, 0x10, post.clone());
        self.register(pvpanic::PORT, 1, PvPanic::new(world));
        self.register(ConfigPorts::FIRST, ConfigPorts::LEN, config.clone());
        self.sections.extend([
            ("pit", pit as Arc<dyn StateSection>),
            ("rtc", rtc),
            ("i8042", i8042),
            ("acpi_pm", pm.clone()),
            ("reset", reset),
            ("config_ports", config),
            ("post", post),
        ]);
        pm
    }

    /// Host bridge, LPC bridge, and a watchdog behind a root port at 00:1c.0.
    fn add_pci(&mut self, gsi: &Arc<Gsi>, pm: Arc<AcpiPm>) {
        let (world, gate) = (self.world.clone(), InputGate::live());
        let mapper = PciBarMapper::new(&self.memory, &self.ports);
        let host =
            HostBridge::new(&self.root, &self.memory, Arc::new(PamAlwaysRam), mapper.clone(), world.clone());
        let bridge = LpcBridge::new(&self.ports, pm, gsi.clone(), mapper.clone(), world.clone());
        let port = RootPort::new(1, world.clone(), gate.clone(), mapper.clone(), world.clone());
        let watchdog = Watchdog::new(&self.timers, &gate, world.clone(), mapper, world);
        port.function().connect_intx(gsi.input(intx_gsi(28, 0)));
        let bus = self.root.bus();
        bus.attach(host_bridge::DEVFN, host.clone()).expect("slot 0 is free");
        bus.attach(lpc::DEVFN, bridge.clone()).expect("slot 31 is free");
        bus.attach(devfn(28, 0), port.clone()).expect("slot 28 is free");
        port.insert(watchdog.clone()).expect("the port is empty");
        host.program_without_firmware(ECAM);
        bridge.program_without_firmware(0x600);
        self.sections.extend([
            ("host_bridge", host as Arc<dyn StateSection>),
            ("lpc", bridge),
            ("root_port", port),
            ("watchdog", watchdog),
        ]);
    }

    /// Writes a byte to a port.
    pub fn outb(&self, port: u16, value: u8) {
        self.ports.write(port, &[value]);
    }

    /// Reads configuration space through CF8 and CFC.
    pub fn config_read(&self, bdf: Bdf, offset: u8) -> u32 {
        let address = 1 << 31 | u32::from(bdf.bus) << 16 | u32::from(bdf.devfn) << 8 | u32::from(offset);
        self.ports.write(0xcf8, &address.to_le_bytes());
        let mut b = [0; 4];
        self.ports.read(0xcfc, &mut b);
        u32::from_le_bytes(b)
    }

    /// Assigns bus numbers and addresses.
    ///
    /// # Panics
    ///
    /// When the windows are too small, which the tests would show.
    pub fn assign(&self) {
        let windows =
            AssignWindows { io: 0xc000..0x1_0000, memory32: 0xc000_0000..ECAM, memory64: 1 << 36..1 << 38 };
        assign_bars(self.root.bus(), &windows).expect("the windows are large enough");
    }

    /// Every section's payload.
    pub fn save(&self) -> Vec<Vec<u8>> {
        self.sections.iter().map(|(_, s)| s.save_section().0).collect()
    }

    /// Plays a guest whose accesses are written in `script`: nine bytes each, the operation and its width, then
    /// two operands.
    pub fn play(&self, script: &[u8]) {
        for (i, step) in script.chunks_exact(9).enumerate() {
            let operand =
                |at: usize| u32::from_le_bytes([step[at], step[at + 1], step[at + 2], step[at + 3]]);
            let (a, mut data) = (operand(1), operand(5).to_le_bytes());
            let len = 1usize << (step[0] >> 4 & 3).min(2);
            // Half of the port accesses go where most devices are.
            let port = if step[0] & 0x80 != 0 { a as u16 & 0x3ff } else { a as u16 };
            match step[0] & 15 {
                0..=4 => self.ports.write(port, &data[..len]),
                5..=8 => self.ports.read(port, &mut data[..len]),
                9 => self.memory.mmio_write(ECAM + u64::from(a & 0x1f_ffff), &data[..len]),
                10 => self.memory.mmio_read(ECAM + u64::from(a & 0xfff_ffff), &mut data[..len]),
                11 => self.memory.mmio_write(ioapic::BASE + u64::from(a & 0x5f), &data),
                12 => self.ioapic.end_of_interrupt(a as u8),
                13 => drop(self.pic.acknowledge()),
                14 => drop(self.uart.receive(&data[..len])),
                _ => {
                    self.clock.advance(u64::from(a & 0xf_ffff));
                    self.timers.expire();
                }
            }
            if i % 64 == 0 {
                self.world.forget();
            }
        }
    }
}

impl Default for Board {
    fn default() -> Self {
        Self::new()
    }
}

impl World {
    /// Drops what was recorded.
    pub fn forget(&self) {
        lock(&self.requests).clear();
        lock(&self.messages).clear();
        lock(&self.output).clear();
    }
}
