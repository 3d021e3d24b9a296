//! The whole chipset on its buses, as a machine puts it together: firmware's and an operating system's view of
//! enumeration, one interrupt's way, and garbage everywhere at once.

use std::sync::{Arc, Mutex};

use atoll_chipset::acpi_pm::AcpiPm;
use atoll_chipset::debug_port::PostPort;
use atoll_chipset::gsi::Gsi;
use atoll_chipset::host_bridge::{self, HostBridge, PamAlwaysRam};
use atoll_chipset::i8042::I8042;
use atoll_chipset::ioapic::{self, IoApic};
use atoll_chipset::lpc::{self, LpcBridge};
use atoll_chipset::pic::Pic;
use atoll_chipset::pit::Pit;
use atoll_chipset::pvpanic::{self, PvPanic};
use atoll_chipset::reset::ResetControl;
use atoll_chipset::root_port::{RootPort, SlotListener};
use atoll_chipset::rtc::{Rtc, RtcConfig};
use atoll_chipset::uart::{SerialBackend, Uart};
use atoll_chipset::watchdog::Watchdog;
use atoll_machine::bus::PortBus;
use atoll_machine::control::{MachineControl, MachineRequest};
use atoll_machine::inputs::InputGate;
use atoll_machine::interrupt::{EoiSink, ExtIntSource, Msi, MsiSink};
use atoll_machine::memory::AddressSpace;
use atoll_machine::state::StateSection;
use atoll_machine::time::{Timers, VirtualClock};
use atoll_pci::{
    AssignWindows, Bdf, ConfigPorts, PciBarMapper, PciDevice, PciRoot, assign_bars, devfn, intx_gsi, swizzle,
};

#[derive(Default)]
struct World {
    requests: Mutex<Vec<MachineRequest>>,
    messages: Mutex<Vec<Msi>>,
    output: Mutex<Vec<u8>>,
}
impl MachineControl for World {
    fn request(&self, request: MachineRequest) {
        self.requests.lock().unwrap().push(request);
    }
}
impl MsiSink for World {
    fn signal_msi(&self, msi: Msi) {
        self.messages.lock().unwrap().push(msi);
    }
}
impl SerialBackend for World {
    fn write(&self, bytes: &[u8]) {
        self.output.lock().unwrap().extend(bytes);
    }
}
impl SlotListener for World {
    fn removed(&self, _slot: u16, _device: Arc<dyn PciDevice>) {}
}

struct Board {
    world: Arc<World>,
    clock: Arc<VirtualClock>,
    timers: Arc<Timers>,
    memory: Arc<AddressSpace>,
    ports: Arc<PortBus>,
    root: Arc<PciRoot>,
    pic: Arc<Pic>,
    ioapic: Arc<IoApic>,
    uart: Arc<Uart>,
    sections: Vec<(&'static str, Arc<dyn StateSection>)>,
}

const ECAM: u64 = 0xe000_0000;

fn board() -> Board {
    let world = Arc::new(World::default());
    let clock = VirtualClock::new(1_700_000_000_000_000_000, 1_000_000);
    let timers = Timers::new(clock.clone());
    let gate = InputGate::live();
    let (memory, ports, root) = (AddressSpace::new(), Arc::new(PortBus::new()), PciRoot::new());
    let mapper = Arc::new(PciBarMapper { memory: memory.clone(), ports: ports.clone() });
    let (pic, ioapic) = (Pic::new(), IoApic::new());
    let gsi = Gsi::new(pic.clone(), ioapic.clone());
    ioapic.connect_cpu(world.clone());
    memory.map_mmio(ioapic::BASE, ioapic::SIZE, ioapic.clone(), -1).unwrap();

    let probe = gsi.clone();
    let pit = Pit::new(&timers, &gate, gsi.input(0), Arc::new(move || probe.request_pending(0)));
    let rtc = Rtc::new(&timers, &gate, gsi.input(8), RtcConfig::default());
    let uart = Uart::new(world.clone(), gate.clone(), gsi.input(4));
    let i8042 = I8042::new(gsi.input(1), gsi.input(12), world.clone(), gate.clone());
    let pm = AcpiPm::new(&timers, &gate, gsi.input(9), world.clone(), true);
    let reset = ResetControl::new(world.clone());
    let config = Arc::new(ConfigPorts::new(root.clone()));
    config.set_narrow(reset.cf8_ports());
    let post = PostPort::new();

    let register = |first, len, device| ports.register(first, len, device).unwrap();
    register(0x20, 2, pic.master_ports());
    register(0xa0, 2, pic.slave_ports());
    register(0x4d0, 2, pic.elcr_ports());
    register(0x40, 4, pit.clone());
    register(0x61, 1, pit.system_control());
    register(0x70, 8, rtc.clone());
    register(0x3f8, 8, uart.clone());
    register(0x60, 1, i8042.data_port());
    register(0x64, 1, i8042.command_port());
    register(0xb2, 2, pm.smi_ports());
    register(0x92, 1, reset.port92());
    register(0x80, 0x10, post.clone());
    register(pvpanic::PORT, 1, PvPanic::new(world.clone()));
    register(ConfigPorts::FIRST, ConfigPorts::LEN, config.clone());

    let host = HostBridge::new(&root, &memory, Arc::new(PamAlwaysRam), mapper.clone(), world.clone());
    let bridge = LpcBridge::new(ports.clone(), pm.clone(), gsi.clone(), mapper.clone(), world.clone());
    let port = RootPort::new(1, world.clone(), gate.clone(), mapper.clone(), world.clone());
    let watchdog = Watchdog::new(&timers, &gate, world.clone(), mapper, world.clone());
    port.function().connect_intx(gsi.input(intx_gsi(28, 0)));
    root.bus().attach(host_bridge::DEVFN, host.clone()).unwrap();
    root.bus().attach(lpc::DEVFN, bridge.clone()).unwrap();
    root.bus().attach(devfn(28, 0), port.clone()).unwrap();
    port.insert(watchdog.clone()).unwrap();
    host.program_without_firmware(ECAM);
    bridge.program_without_firmware(0x600);

    let sections: Vec<(&'static str, Arc<dyn StateSection>)> = vec![
        ("gsi", gsi),
        ("pic", pic.clone()),
        ("ioapic", ioapic.clone()),
        ("pit", pit),
        ("rtc", rtc),
        ("uart", uart.clone()),
        ("i8042", i8042),
        ("acpi_pm", pm),
        ("reset", reset),
        ("config_ports", config),
        ("post", post),
        ("host_bridge", host),
        ("lpc", bridge),
        ("root_port", port),
        ("watchdog", watchdog),
    ];
    Board { world, clock, timers, memory, ports, root, pic, ioapic, uart, sections }
}

impl Board {
    fn outb(&self, port: u16, value: u8) {
        self.ports.write(port, &[value]);
    }
    fn config_read(&self, bdf: Bdf, offset: u8) -> u32 {
        let address = 1 << 31 | u32::from(bdf.bus) << 16 | u32::from(bdf.devfn) << 8 | u32::from(offset);
        self.ports.write(0xcf8, &address.to_le_bytes());
        let mut b = [0; 4];
        self.ports.read(0xcfc, &mut b);
        u32::from_le_bytes(b)
    }
    fn assign(&self) {
        let windows =
            AssignWindows { io: 0xc000..0x1_0000, memory32: 0xc000_0000..ECAM, memory64: 1 << 36..1 << 38 };
        assign_bars(self.root.bus(), &windows).unwrap();
    }
    fn save(&self) -> Vec<Vec<u8>> {
        self.sections.iter().map(|(_, s)| s.save_section().0).collect()
    }
}

#[test]
fn enumeration_finds_the_functions_and_both_mechanisms_agree() {
    let b = board();
    b.assign();
    let ids: Vec<_> = [(0, 0, 0), (0, 31, 0), (0, 28, 0), (1, 0, 0), (0, 1, 0)]
        .map(|(bus, device, function)| Bdf::new(bus, device, function))
        .iter()
        .map(|&bdf| {
            let mut b4 = [0; 4];
            let at = ECAM + (u64::from(bdf.bus) << 20) + (u64::from(bdf.devfn) << 12);
            b.memory.mmio_read(at, &mut b4);
            assert_eq!(u32::from_le_bytes(b4), b.config_read(bdf, 0));
            u32::from_le_bytes(b4)
        })
        .collect();
    assert_eq!(ids, [0x29c0_8086, 0x2918_8086, 0x000c_1b36, 0x25ab_8086, u32::MAX]);
    let bar = u64::from(b.config_read(Bdf::new(1, 0, 0), 0x10));
    let window = b.config_read(Bdf::new(0, 28, 0), 0x20);
    assert!((u64::from(window & 0xfff0) << 16..=u64::from(window >> 16 | 0xf) << 16).contains(&bar));
    let mut reload = [0xaa; 2];
    b.memory.mmio_read(bar + 0xc, &mut reload);
    assert_eq!(reload, [0, 0], "the watchdog answers where it was placed");
}

#[test]
fn a_key_stroke_on_the_serial_line_reaches_both_controllers() {
    let b = board();
    for (port, value) in [(0x20, 0x11), (0x21, 0x20), (0x21, 4), (0x21, 1), (0x21, 0xef)] {
        b.outb(port, value);
    }
    b.memory.mmio_write(ioapic::BASE, &[0x18]);
    b.memory.mmio_write(ioapic::BASE + 0x10, &0x34u32.to_le_bytes());
    b.outb(0x3fc, 8);
    b.outb(0x3f9, 1);
    assert_eq!(b.uart.receive(b"x"), 1);
    assert_eq!(*b.world.messages.lock().unwrap(), [Msi { address: 0xfee0_0000, data: 0x34 }]);
    assert_eq!(b.pic.acknowledge(), 0x24);
}

#[test]
fn guests_can_end_the_machine_in_every_documented_way() {
    let b = board();
    b.outb(0xcf9, 0x02);
    b.outb(0xcf9, 0x06);
    b.outb(0x64, 0xfe);
    b.ports.write(0x604, &0x2001u16.to_le_bytes());
    b.outb(0x505, 1);
    use MachineRequest::{GuestPanic, PowerOff, Reset};
    assert_eq!(*b.world.requests.lock().unwrap(), [Reset, Reset, PowerOff, GuestPanic]);
}

#[test]
fn the_whole_board_survives_a_round_trip() {
    let b = board();
    b.assign();
    b.outb(0x43, 0x34);
    b.outb(0x40, 0x9c);
    b.outb(0x40, 0x2e);
    b.outb(0x64, 0xd4);
    b.uart.receive(b"typed ahead");
    b.clock.advance(15_000_000);
    b.timers.expire();
    let saved = b.save();
    let c = board();
    c.clock.advance(15_000_000);
    for ((name, section), payload) in c.sections.iter().zip(&saved) {
        section.check_section(payload).unwrap();
        section.restore_section(payload).unwrap_or_else(|e| panic!("{name}: {e}"));
    }
    for (((name, _), now), then) in c.sections.iter().zip(c.save()).zip(&saved) {
        assert_eq!(now, *then, "{name}");
    }
    assert_eq!(c.timers.next_deadline(), b.timers.next_deadline());
    assert_eq!(c.config_read(Bdf::new(1, 0, 0), 0), 0x25ab_8086);
}

#[test]
fn corrupt_saved_states_are_refused_or_harmless() {
    let b = board();
    let saved = b.save();
    let mut seed = 99u64;
    for round in 0..2000 {
        for ((_, section), payload) in b.sections.iter().zip(&saved) {
            let mut payload = payload.clone();
            for _ in 0..=round % 4 {
                seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                if !payload.is_empty() {
                    let at = (seed >> 33) as usize % payload.len();
                    payload[at] = (seed >> 20) as u8;
                }
            }
            let _ = section.restore_section(&payload);
        }
        b.clock.advance(seed >> 36);
        b.timers.expire();
        b.outb(0x43, (seed >> 40) as u8);
        b.outb(0x40, (seed >> 48) as u8);
    }
}

#[test]
fn garbage_on_every_port_and_register_is_survived() {
    let b = board();
    b.assign();
    let mut state = 0x2545_f491_4f6c_dd1du64;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    };
    for i in 0..1_000_000u32 {
        let (r, len) = (next(), 1usize << (next() % 3));
        // Half of the accesses go where most devices are.
        let port = if r & 1 == 0 { (r >> 8) as u16 & 0x3ff } else { (r >> 8) as u16 };
        let mut data = next().to_le_bytes();
        match r >> 60 {
            0..=5 => b.ports.write(port, &data[..len]),
            6..=9 => b.ports.read(port, &mut data[..len]),
            10 => b.memory.mmio_write(ECAM + (r >> 4 & 0x1f_ffff), &data[..len]),
            11 => b.memory.mmio_read(ECAM + (r >> 4 & 0xfff_ffff), &mut data[..len]),
            12 => b.memory.mmio_write(ioapic::BASE + (r >> 8 & 0x5f), &data[..4]),
            13 => b.ioapic.end_of_interrupt(r as u8),
            14 => drop(b.pic.acknowledge()),
            _ => {
                b.clock.advance(next() % 1_000_000);
                b.timers.expire();
            }
        }
        if i % 64 == 0 {
            b.uart.receive(&data);
            b.world.requests.lock().unwrap().clear();
            b.world.messages.lock().unwrap().clear();
            b.world.output.lock().unwrap().clear();
        }
    }
    assert_eq!(b.config_read(Bdf::new(0, 0, 0), 0), 0x29c0_8086);
}

#[test]
fn intx_of_devices_behind_ports_lands_on_pci_wires() {
    for device in 0..32 {
        for pin in 0..4 {
            assert!((16..24).contains(&intx_gsi(device, swizzle(0, pin))));
        }
    }
}
