//! DSDT: the devices that software cannot find by itself, in AML.
//!
//! ```text
//!  \_S5_                    power off
//!  \_SB_.PCI0               PCI Express host bridge: windows, interrupt routing, feature negotiation
//!       .PCI0.ISA_          LPC bridge: serial port, keyboard, mouse, clock, pvpanic
//!       .PCI0.Rxxx          root ports, each with its slot
//!  \_SB_.MRES               what is reserved: configuration space, power-management ports
//!  \_SB_.CPUS.Cxxx          processors
//! ```
//!
//! Processors that can be added later are in the MADT; they get device objects here when the chipset has a
//! register block to ask for their presence.

use super::{AcpiConfig, RootPort, sdt};
use crate::layout::{self, Range};
use acpi_tables::aml::{
    AddressSpace, AddressSpaceCacheable, And, Arg, CreateDWordField, Device, EISAName, Else, Equal, IO, If,
    Local, Memory32Fixed, Method, Name, NotEqual, Or, PackageBuilder, Path, ResourceTemplate, Return, Scope,
    Store, Uuid, ZERO,
};
use acpi_tables::{Aml, AmlSink};

/// AML that is already bytes.
struct Raw(Vec<u8>);

impl Aml for Raw {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        sink.vec(&self.0);
    }
}

/// Small IRQ descriptor without flags: edge-triggered, active high, exclusive, as ISA has it (ACPI 6.5, 6.4.2.1).
struct IsaIrq(u8);

impl Aml for IsaIrq {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        sink.byte(0x22);
        sink.word(1u16 << (self.0 & 15));
    }
}

/// Fixed ports.
fn ports(port: u16, count: u8) -> IO {
    IO::new(port, port, 1, count)
}

/// The AML of `object`.
fn bytes(object: &dyn Aml) -> Vec<u8> {
    let mut aml = Vec::new();
    object.to_aml_bytes(&mut aml);
    aml
}

/// `Name (_xxx, value)`
fn name(path: &str, value: &dyn Aml) -> Name {
    Name::new(path.into(), value)
}

/// Builds the table.
pub(super) fn build(config: &AcpiConfig<'_>) -> Vec<u8> {
    let mut aml = Vec::new();
    power_off().to_aml_bytes(&mut aml);
    let mut system_bus = Vec::new();
    host_bridge(config, &mut system_bus);
    motherboard_resources(&mut system_bus);
    processors(config, &mut system_bus);
    Scope::new("_SB_".into(), vec![&Raw(system_bus)]).to_aml_bytes(&mut aml);
    sdt::table(b"DSDT", 2, &aml)
}

/// `\_S5_`: what to write into `SLP_TYP` of PM1a and PM1b control.
fn power_off() -> Name {
    let mut package = PackageBuilder::new();
    for value in [layout::S5_SLEEP_TYPE, 0, 0, 0] {
        package.add_element(&value);
    }
    name("_S5_", &package)
}

fn host_bridge(config: &AcpiConfig<'_>, aml: &mut Vec<u8>) {
    let isa = Raw(isa_bridge(config));
    let ports = Raw(config.root_ports.iter().flat_map(root_port).collect());
    Device::new(
        "PCI0".into(),
        vec![
            &name("_HID", &EISAName::new("PNP0A08")),
            &name("_CID", &EISAName::new("PNP0A03")),
            &name("_SEG", &ZERO),
            &name("_BBN", &ZERO),
            &name("_UID", &ZERO),
            &name("_CRS", &windows(config)),
            &name("_PRT", &interrupt_routing()),
            &Raw(negotiate_features()),
            &isa,
            &ports,
        ],
    )
    .to_aml_bytes(aml);
}

fn memory32(range: Range, cache: AddressSpaceCacheable) -> AddressSpace<u32> {
    AddressSpace::new_memory(cache, true, range.start as u32, (range.end - 1) as u32, None)
}

/// The host bridge's resources: bus numbers, ports and addresses that it passes on.
fn windows(config: &AcpiConfig<'_>) -> Raw {
    use AddressSpaceCacheable::{Cacheable, NotCacheable};
    let last_bus = (layout::ECAM_BUSES - 1) as u16;
    let mut resources: Vec<Box<dyn Aml>> = vec![
        Box::new(AddressSpace::<u16>::new_bus_number(0, last_bus)),
        Box::new(ports(0xCF8, 8)),
        Box::new(AddressSpace::<u16>::new_io(0, 0xCF7, None)),
        Box::new(AddressSpace::<u16>::new_io(0xD00, 0xFFFF, None)),
        Box::new(memory32(layout::VGA_WINDOW, Cacheable)),
    ];
    for window in layout::MMIO32_WINDOWS {
        resources.push(Box::new(memory32(window, NotCacheable)));
    }
    let high = config.map.mmio64;
    resources.push(Box::new(AddressSpace::<u64>::new_memory(
        Cacheable,
        true,
        high.start,
        high.end - 1,
        None,
    )));
    Raw(bytes(&ResourceTemplate::new(resources.iter().map(|resource| &**resource).collect())))
}

/// `_PRT`: for each device and pin of bus 0 its global system interrupt (ACPI 6.5, section 6.2.13).
fn interrupt_routing() -> PackageBuilder {
    let mut routes = PackageBuilder::new();
    for device in 0..32u8 {
        for pin in 0..4u8 {
            let mut route = PackageBuilder::new();
            route.add_element(&(u32::from(device) << 16 | 0xFFFF));
            route.add_element(&pin);
            route.add_element(&ZERO);
            route.add_element(&layout::pci_intx_gsi(device, pin));
            routes.add_element(&route);
        }
    }
    routes
}

/// `_OSC`: the operating system gets everything of PCI Express except the standard (SHPC) hot-plug controller,
/// which the machine does not have (PCI Firmware specification 3.3, section 4.5.1).
fn negotiate_features() -> Vec<u8> {
    const PCI_HOST_BRIDGE: &str = "33DB4D5B-1FF7-401C-9657-7441C03DD766";
    /// Native hot-plug, power-management events, error reporting, capability structure, latency tolerance.
    const GRANTED: u8 = 0x1 | 0x4 | 0x8 | 0x10 | 0x20;
    const UNKNOWN_UUID: u8 = 0x4;
    const UNKNOWN_REVISION: u8 = 0x8;
    const MASKED: u8 = 0x10;
    let (status, control) = (Path::new("CDW1"), Path::new("CDW3"));
    let mark = |bit: u8| Raw(bytes(&Or::new(&Path::new("CDW1"), &Path::new("CDW1"), &bit)));
    let known = Raw([
        bytes(&CreateDWordField::new(&control, &Arg(3), &8u8)),
        bytes(&Store::new(&Local(0), &control)),
        bytes(&And::new(&Local(0), &Local(0), &GRANTED)),
        bytes(&If::new(&NotEqual::new(&Arg(1), &1u8), vec![&mark(UNKNOWN_REVISION)])),
        bytes(&If::new(&NotEqual::new(&control, &Local(0)), vec![&mark(MASKED)])),
        bytes(&Store::new(&control, &Local(0))),
    ]
    .concat());
    bytes(&Method::new(
        "_OSC".into(),
        4,
        true,
        vec![
            &CreateDWordField::new(&status, &Arg(3), &0u8),
            &If::new(&Equal::new(&Arg(0), &Uuid::new(PCI_HOST_BRIDGE)), vec![&known]),
            &Else::new(vec![&mark(UNKNOWN_UUID)]),
            &Return::new(&Arg(3)),
        ],
    ))
}

/// The LPC bridge, device 31 of bus 0, with the legacy devices behind it.
fn isa_bridge(config: &AcpiConfig<'_>) -> Vec<u8> {
    let mut devices = Vec::new();
    isa_device(&mut devices, "RTC_", &EISAName::new("PNP0B00"), None, &[&ports(0x70, 8), &IsaIrq(8)]);
    if config.devices.i8042 {
        let controller = [&ports(0x60, 1) as &dyn Aml, &ports(0x64, 1), &IsaIrq(1)];
        isa_device(&mut devices, "KBD_", &EISAName::new("PNP0303"), None, &controller);
        isa_device(&mut devices, "MOU_", &EISAName::new("PNP0F13"), None, &[&IsaIrq(12)]);
    }
    if config.devices.com1 {
        let serial = [&ports(layout::COM1_PORT, 8) as &dyn Aml, &IsaIrq(layout::COM1_IRQ)];
        isa_device(&mut devices, "COM1", &EISAName::new("PNP0501"), Some(1), &serial);
    }
    if config.devices.pvpanic {
        isa_device(&mut devices, "PEVT", &"QEMU0001", None, &[&ports(layout::PVPANIC_PORT, 1)]);
    }
    bytes(&Device::new("ISA_".into(), vec![&name("_ADR", &0x001F_0000u32), &Raw(devices)]))
}

/// A device with fixed resources that is always present and working.
fn isa_device(aml: &mut Vec<u8>, path: &str, hid: &dyn Aml, uid: Option<u8>, resources: &[&dyn Aml]) {
    /// Present, enabled, shown, working.
    const STATUS: u8 = 0xF;
    let uid = Raw(uid.map_or_else(Vec::new, |uid| bytes(&name("_UID", &uid))));
    Device::new(
        path.into(),
        vec![
            &name("_HID", hid),
            &uid,
            &name("_STA", &STATUS),
            &name("_CRS", &ResourceTemplate::new(resources.to_vec())),
        ],
    )
    .to_aml_bytes(aml);
}

/// A root port, with the slot behind it so that its number can be shown.
fn root_port(port: &RootPort) -> Vec<u8> {
    let path = format!("R{:02X}{}", port.device & 31, port.function & 7);
    let address = u32::from(port.device) << 16 | u32::from(port.function);
    // Device 0 of the bus behind the port, whatever number the operating system gives that bus.
    let (slot_address, slot_number) = (name("_ADR", &ZERO), name("_SUN", &port.slot));
    let slot = Device::new("SLOT".into(), vec![&slot_address, &slot_number]);
    bytes(&Device::new(path.as_str().into(), vec![&name("_ADR", &address), &slot]))
}

/// Addresses and ports that belong to no other device and must not be given away.
fn motherboard_resources(aml: &mut Vec<u8>) {
    let ecam = Memory32Fixed::new(true, layout::ECAM.start as u32, layout::ECAM.size() as u32);
    let power = ports(layout::PM_BASE, layout::PM_SIZE as u8);
    Device::new(
        "MRES".into(),
        vec![
            &name("_HID", &EISAName::new("PNP0C02")),
            &name("_UID", &ZERO),
            &name("_CRS", &ResourceTemplate::new(vec![&ecam, &power])),
        ],
    )
    .to_aml_bytes(aml);
}

/// A container with one device for each processor that is present. Numbers are those of the MADT.
fn processors(config: &AcpiConfig<'_>, aml: &mut Vec<u8>) {
    let mut devices = Vec::new();
    for (uid, _) in config.cpus.iter().enumerate().filter(|(_, cpu)| cpu.present) {
        let path = format!("C{:03X}", uid & 0xFFF);
        Device::new(path.as_str().into(), vec![&name("_HID", &"ACPI0007"), &name("_UID", &(uid as u32))])
            .to_aml_bytes(&mut devices);
    }
    Device::new(
        "CPUS".into(),
        vec![&name("_HID", &"ACPI0010"), &name("_CID", &EISAName::new("PNP0A05")), &Raw(devices)],
    )
    .to_aml_bytes(aml);
}
