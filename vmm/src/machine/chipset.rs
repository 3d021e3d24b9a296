//! The chipset of `atoll-1` on its buses.

use std::sync::{Arc, Weak};

use atoll_chipset::acpi_pm::AcpiPm;
use atoll_chipset::debug_exit::{self, DebugExit};
use atoll_chipset::debug_port::{self, PostPort};
use atoll_chipset::gsi::Gsi;
use atoll_chipset::i8042::I8042;
use atoll_chipset::ioapic::{self, IoApic};
use atoll_chipset::pic::Pic;
use atoll_chipset::pit::Pit;
use atoll_chipset::pvpanic::{self, PvPanic};
use atoll_chipset::reset::ResetControl;
use atoll_chipset::rtc::{Rtc, RtcConfig};
use atoll_chipset::uart::{SerialBackend, Uart};
use atoll_firmware::layout;
use atoll_machine::bus::PortDevice;
use atoll_machine::interrupt::{ExtIntSink, Msi, MsiSink};
use atoll_machine::state::StateSection;
use atoll_pci::{ConfigPorts, PciRoot};

use super::{CHIPSET_PRIORITY, Common, Sink};
use crate::config::Config;
use crate::error::VmError;

/// The interrupt controllers: made before the partition, which they talk to.
pub(super) struct Controllers {
    pub(super) pic: Arc<Pic>,
    pub(super) ioapic: Arc<IoApic>,
    pub(super) gsi: Arc<Gsi>,
}

impl Controllers {
    pub(super) fn new() -> Self {
        let (pic, ioapic) = (Pic::new(), IoApic::new());
        let gsi = Gsi::new(pic.clone(), ioapic.clone());
        Self { pic, ioapic, gsi }
    }

    /// Leads the controllers' outputs to the processors. The processors hold the controllers (interrupt
    /// acknowledge, EOI), so these wires are weak: a machine must end when its last handle goes.
    pub(super) fn connect_cpus(&self, extint: &Arc<dyn ExtIntSink>, msi: &Arc<dyn MsiSink>) {
        self.pic.connect_cpu(Arc::new(WeakExtInt(Arc::downgrade(extint))));
        self.ioapic.connect_cpu(Arc::new(WeakMsi(Arc::downgrade(msi))));
    }
}

struct WeakExtInt(Weak<dyn ExtIntSink>);
impl ExtIntSink for WeakExtInt {
    fn set_extint(&self, high: bool) {
        if let Some(sink) = self.0.upgrade() {
            sink.set_extint(high);
        }
    }
}

struct WeakMsi(Weak<dyn MsiSink>);
impl MsiSink for WeakMsi {
    fn signal_msi(&self, msi: Msi) {
        if let Some(sink) = self.0.upgrade() {
            sink.signal_msi(msi);
        }
    }
}

/// The parts that others have to do with.
pub(super) struct Chipset {
    pub(super) serial: Arc<Uart>,
    pub(super) pm: Arc<AcpiPm>,
    pub(super) root: Arc<PciRoot>,
    /// Everything with state, in the order in which it is restored.
    pub(super) sections: Vec<(String, Arc<dyn StateSection>)>,
}

struct Serial(Sink);
impl SerialBackend for Serial {
    fn write(&self, bytes: &[u8]) {
        (self.0)(bytes);
    }
}

/// Puts everything that sits at fixed ports and addresses on its bus.
pub(super) fn build(
    config: &Config,
    common: &Common,
    controllers: &Controllers,
    serial: Sink,
) -> Result<Chipset, VmError> {
    let Common { timers, inputs, memory, ports, control, .. } = common;
    let Controllers { pic, ioapic, gsi } = controllers;
    memory.map_mmio(ioapic::BASE, ioapic::SIZE, ioapic.clone(), CHIPSET_PRIORITY).map_err(VmError::build)?;
    let busy = gsi.clone();
    let pit = Pit::new(timers, inputs, gsi.input(0), Arc::new(move || busy.request_pending(0)));
    let rtc_config = RtcConfig {
        low_memory: config.map.low_ram.size(),
        high_memory: config.map.high_ram.size(),
        cpus: config.topology.cpus(),
    };
    let rtc = Rtc::new(timers, inputs, gsi.input(8), rtc_config);
    let com1 = gsi.input(u32::from(layout::COM1_IRQ));
    let serial = Uart::new(Arc::new(Serial(serial)), inputs.clone(), com1);
    let i8042 = I8042::new(gsi.input(1), gsi.input(12), control.clone(), inputs.clone());
    let sci = gsi.input(u32::from(layout::SCI_GSI));
    let pm = AcpiPm::new(timers, inputs, sci, control.clone(), true);
    let reset = ResetControl::new(control.clone());
    let root = PciRoot::new();
    let config_ports = Arc::new(ConfigPorts::new(root.clone()));
    config_ports.set_narrow(reset.cf8_ports());
    let post = PostPort::new();

    let register = |first: u16, len: u16, device: Arc<dyn PortDevice>| {
        ports.register(first, len, device).map_err(VmError::build)
    };
    register(0x20, 2, pic.master_ports())?;
    register(0xa0, 2, pic.slave_ports())?;
    register(0x4d0, 2, pic.elcr_ports())?;
    register(0x40, 4, pit.clone())?;
    register(0x61, 1, pit.system_control())?;
    register(0x70, 8, rtc.clone())?;
    register(0x60, 1, i8042.data_port())?;
    register(0x64, 1, i8042.command_port())?;
    register(layout::COM1_PORT, 8, serial.clone())?;
    register(0xb2, 2, pm.smi_ports())?;
    register(0x92, 1, reset.port92())?;
    register(debug_port::POST_PORT, debug_port::POST_PORTS, post.clone())?;
    register(pvpanic::PORT, 1, PvPanic::new(control.clone()))?;
    register(ConfigPorts::FIRST, ConfigPorts::LEN, config_ports.clone())?;
    if config.debug_exit {
        register(debug_exit::PORT, debug_exit::PORTS, DebugExit::new(control.clone()))?;
    }
    let sections: Vec<(&str, Arc<dyn StateSection>)> = vec![
        ("gsi", gsi.clone()),
        ("pic", pic.clone()),
        ("ioapic", ioapic.clone()),
        ("pit", pit),
        ("rtc", rtc),
        ("serial", serial.clone()),
        ("i8042", i8042),
        ("acpi_pm", pm.clone()),
        ("reset", reset),
        ("config_ports", config_ports),
        ("post", post),
    ];
    let sections = sections.into_iter().map(|(name, s)| (format!("chipset/{name}"), s)).collect();
    Ok(Chipset { serial, pm, root, sections })
}
