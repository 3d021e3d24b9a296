//! What is on PCI bus 0 of `atoll-1`.
//!
//! | device | what |
//! |---|---|
//! | 00.0 | host bridge |
//! | 01.0 | virtio console |
//! | 02.0 | virtio entropy |
//! | 03.0 to 12.0 | virtio disks, in order |
//! | 13.0 to 1a.0 | virtio network interfaces, in order |
//! | 1b.0 | watchdog |
//! | 1c.0, 1c.1 | PCIe root ports, empty, for hot-plug |
//! | 1f.0 | LPC bridge |

use std::sync::Arc;

use atoll_chipset::gsi::Gsi;
use atoll_chipset::host_bridge::{self, HostBridge, PamAlwaysRam};
use atoll_chipset::lpc::{self, LpcBridge};
use atoll_chipset::root_port::{RootPort, SlotListener};
use atoll_chipset::watchdog::Watchdog;
use atoll_firmware::layout;
use atoll_machine::backend::{EventRoutes, Partition};
use atoll_machine::interrupt::MsiSink;
use atoll_machine::memory::GuestMemory;
use atoll_machine::state::{RestoreError, SaveState, StateSection};
use atoll_pci::{AssignWindows, BarMapper, PciBarMapper, PciDevice, assign_bars, devfn, intx_gsi};
use atoll_virtio::blk::Blk;
use atoll_virtio::console::Console;
use atoll_virtio::device::VirtioDevice;
use atoll_virtio::net::Net;
use atoll_virtio::rng::Rng;
use atoll_virtio::transport::pci::saved_state::VirtioPciStateV1;
use atoll_virtio::transport::pci::{VirtioPciDevice, VirtioPciParts};

use super::chipset::Chipset;
use super::{Common, ROOT_PORTS, Sink};
use crate::config::Config;
use crate::error::VmError;

const CONSOLE: u8 = 1;
const RNG: u8 = 2;
const FIRST_DISK: u8 = 3;
const FIRST_NETWORK: u8 = 0x13;
const WATCHDOG: u8 = 0x1b;
/// I/O ports that BARs are assigned from: above everything with a fixed place.
const IO_WINDOW: std::ops::Range<u64> = 0xc000..0x1_0000;
/// Characters of a console whose window nobody has told yet.
const DEFAULT_WINDOW: (u16, u16) = (80, 25);

/// The parts that others have to do with.
pub(super) struct PciDevices {
    pub(super) console: Arc<Console>,
    pub(super) disks: Vec<Arc<Blk>>,
    pub(super) networks: Vec<Arc<Net>>,
    pub(super) virtio: Vec<Arc<VirtioPciDevice>>,
    pub(super) sections: Vec<(String, Arc<dyn StateSection>)>,
}

/// A virtio function in a saved machine. It must be paused while it is saved, and is paused after a restore.
struct VirtioSection(Arc<VirtioPciDevice>);

impl SaveState for VirtioSection {
    type Saved = VirtioPciStateV1;
    fn save(&self) -> VirtioPciStateV1 {
        self.0.save()
    }
    fn restore(&self, saved: VirtioPciStateV1) -> Result<(), RestoreError> {
        self.0.restore(&saved).map_err(|e| RestoreError::invalid("virtio", e.to_string()))
    }
}

/// Hot-unplugged devices end when the last handle on them goes.
struct Forget;
impl SlotListener for Forget {
    fn removed(&self, _slot: u16, _device: Arc<dyn PciDevice>) {}
}

struct Builder<'a> {
    common: &'a Common,
    chipset: &'a Chipset,
    gsi: &'a Arc<Gsi>,
    msi: Arc<dyn MsiSink>,
    routes: Option<Arc<dyn EventRoutes>>,
    mapper: Arc<dyn BarMapper>,
    sections: Vec<(String, Arc<dyn StateSection>)>,
    virtio: Vec<Arc<VirtioPciDevice>>,
}

/// Fills bus 0 and gives every function its addresses, as firmware would.
pub(super) fn build(
    config: &Config,
    common: &Common,
    chipset: &Chipset,
    gsi: &Arc<Gsi>,
    partition: &impl Partition,
    console_sink: Sink,
) -> Result<PciDevices, VmError> {
    let mut builder = Builder {
        common,
        chipset,
        gsi,
        msi: partition.msi_sink(),
        routes: partition.event_routes(),
        mapper: PciBarMapper::new(&common.memory, &common.ports),
        sections: Vec::new(),
        virtio: Vec::new(),
    };
    builder.bridges()?;
    let console = Console::new(console_sink, DEFAULT_WINDOW, common.inputs.clone());
    builder.virtio("console", CONSOLE, console.clone())?;
    builder.virtio("rng", RNG, Rng::new(common.inputs.clone()))?;
    let mut disks = Vec::new();
    for (index, disk) in (0u8..).zip(&config.disks) {
        let queues = config.topology.cpus().min(64) as u16;
        let blk = disk.device(queues, config.troubles.of(usize::from(index)));
        builder.virtio(&format!("blk{index}"), FIRST_DISK + index, blk.clone())?;
        disks.push(blk);
    }
    let mut networks = Vec::new();
    for (index, interface) in (0..).zip(&config.networks) {
        let net = interface.device();
        builder.virtio(&format!("net{index}"), FIRST_NETWORK + index, net.clone())?;
        networks.push(net);
    }
    let windows = AssignWindows {
        io: IO_WINDOW,
        memory32: layout::MMIO32_WINDOWS[0].start..layout::MMIO32_WINDOWS[0].end,
        memory64: config.map.mmio64.start..config.map.mmio64.end,
    };
    assign_bars(chipset.root.bus(), &windows).map_err(VmError::build)?;
    Ok(PciDevices { console, disks, networks, virtio: builder.virtio, sections: builder.sections })
}

impl Builder<'_> {
    fn attach(&self, devfn: u8, device: Arc<dyn PciDevice>) -> Result<(), VmError> {
        if let Some(pin) = device.function().intx_pin() {
            device.function().connect_intx(self.gsi.input(intx_gsi(devfn >> 3, pin)));
        }
        self.chipset.root.bus().attach(devfn, device).map_err(VmError::build)
    }

    fn section(&mut self, name: String, section: Arc<dyn StateSection>) {
        self.sections.push((format!("pci/{name}"), section));
    }

    /// Host bridge, LPC bridge, root ports and watchdog.
    fn bridges(&mut self) -> Result<(), VmError> {
        let Common { timers, inputs, memory, ports, control, .. } = self.common;
        let (mapper, msi) = (self.mapper.clone(), self.msi.clone());
        let host =
            HostBridge::new(&self.chipset.root, memory, Arc::new(PamAlwaysRam), mapper.clone(), msi.clone());
        let lpc =
            LpcBridge::new(ports, self.chipset.pm.clone(), self.gsi.clone(), mapper.clone(), msi.clone());
        self.attach(host_bridge::DEVFN, host.clone())?;
        self.attach(lpc::DEVFN, lpc.clone())?;
        host.program_without_firmware(layout::ECAM_BASE);
        lpc.program_without_firmware(layout::PM_BASE);
        self.section("host_bridge".to_owned(), host);
        self.section("lpc".to_owned(), lpc);
        for port in ROOT_PORTS {
            let device =
                RootPort::new(port.slot, Arc::new(Forget), inputs.clone(), mapper.clone(), msi.clone());
            self.attach(devfn(port.device, port.function), device.clone())?;
            self.section(format!("root_port{}", port.slot), device);
        }
        let watchdog = Watchdog::new(timers, inputs, control.clone(), mapper, msi);
        self.attach(devfn(WATCHDOG, 0), watchdog.clone())?;
        self.section("watchdog".to_owned(), watchdog);
        Ok(())
    }

    fn virtio(&mut self, name: &str, device: u8, behind: Arc<dyn VirtioDevice>) -> Result<(), VmError> {
        let function = VirtioPciDevice::with_routes(
            behind,
            VirtioPciParts {
                memory: GuestMemory::new(&self.common.memory),
                msi: self.msi.clone(),
                intx: self.gsi.input(intx_gsi(device, 0)),
                inputs: self.common.inputs.clone(),
                mapper: self.mapper.clone(),
            },
            self.routes.clone(),
        );
        self.chipset.root.bus().attach(devfn(device, 0), function.clone()).map_err(VmError::build)?;
        self.section(name.to_owned(), Arc::new(VirtioSection(function.clone())));
        self.virtio.push(function);
        Ok(())
    }
}
