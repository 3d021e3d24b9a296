//! Virtio over PCI (VIRTIO 1.2, section 4.1): the function that a machine plugs in.
//!
//! ```text
//! BAR 0/1 (64-bit memory, 16 KiB)            BAR 2 (32-bit memory): MSI-X table
//!   0x0000 common configuration
//!   0x1000 ISR status
//!   0x2000 device configuration
//!   0x3000 notifications, 4 bytes a queue
//! ```
//!
//! The same registers can be reached through the configuration-access capability (4.1.4.9). `core` has the state
//! and the processing of queues, `registers` the common configuration, `worker` the helper thread, and `doorbell`
//! the notifications that go to that thread past the vCPU's, where the backend can.

use std::sync::{Arc, Weak};

use atoll_machine::backend::EventRoutes;
use atoll_machine::bus::MmioDevice;
use atoll_machine::inputs::InputGate;
use atoll_machine::interrupt::{IrqLine, MsiSink};
use atoll_machine::memory::GuestMemory;
use atoll_pci::{BarKind, BarMapper, BarSpec, BarTarget, FunctionBuilder, Identity, PciDevice, PciFunction};

use crate::device::{RestoreError, VirtioDevice};

mod core;
mod doorbell;
mod registers;
pub mod saved_state;
mod worker;

pub(crate) use self::core::Core;
use doorbell::{BellMapper, Doorbells};
use saved_state::VirtioPciStateV1;

/// Vendor id of virtio devices.
pub const VENDOR: u16 = 0x1af4;
/// PCI device id of virtio device id 0 (4.1.2.1).
pub const DEVICE_BASE: u16 = 0x1040;

/// Register slot of the BAR with the virtio registers.
pub const REGISTER_BAR: u8 = 0;
/// Register slot of the BAR with the MSI-X table.
pub const MSIX_BAR: u8 = 2;

/// Offsets in the register BAR, one page each.
pub(crate) const COMMON: u64 = 0x0000;
pub(crate) const ISR: u64 = 0x1000;
pub(crate) const DEVICE: u64 = 0x2000;
pub(crate) const NOTIFY: u64 = 0x3000;
const REGION: u64 = 0x1000;
const BAR_SIZE: u64 = 0x4000;
/// Bytes between the notification registers of two queues.
pub(crate) const NOTIFY_MULTIPLIER: u32 = 4;
/// Bytes of the common configuration, `queue_reset` included.
pub(crate) const COMMON_BYTES: u64 = 0x3c;

/// `cfg_type` of the capabilities (4.1.4).
const CFG_COMMON: u8 = 1;
const CFG_NOTIFY: u8 = 2;
const CFG_ISR: u8 = 3;
const CFG_DEVICE: u8 = 4;
const CFG_PCI: u8 = 5;
/// The vendor-specific capability id.
const CAP_VENDOR: u8 = 0x09;

/// What a device gets from its machine.
pub struct VirtioPciParts {
    /// Guest memory for rings and buffers.
    pub memory: GuestMemory,
    /// Takes MSI-X messages.
    pub msi: Arc<dyn MsiSink>,
    /// The INTx wire, an input that no other device drives.
    pub intx: IrqLine,
    /// The gate for what happens on the device's own thread.
    pub inputs: Arc<InputGate>,
    /// Maps the BARs.
    pub mapper: Arc<dyn BarMapper>,
}

/// A virtio device as a PCI function. Dropping it ends its helper thread.
pub struct VirtioPciDevice {
    core: Arc<Core>,
    /// Offset of the configuration-access capability.
    access: u16,
}

impl VirtioPciDevice {
    /// Makes the function. It does nothing until software finds it on its bus. Notifications are processed on the
    /// vCPU's thread as far as that is short.
    pub fn new(device: Arc<dyn VirtioDevice>, parts: VirtioPciParts) -> Arc<Self> {
        Self::with_routes(device, parts, None)
    }

    /// As [`VirtioPciDevice::new`]; with `routes`, notifications go to the device's own thread without a return
    /// from [`Vcpu::run`](atoll_machine::backend::Vcpu::run). Those that cannot be routed are processed as ever.
    pub fn with_routes(
        device: Arc<dyn VirtioDevice>,
        parts: VirtioPciParts,
        routes: Option<Arc<dyn EventRoutes>>,
    ) -> Arc<Self> {
        let kind = device.kind();
        let queues = device.queue_sizes().len() as u16;
        let mut builder = FunctionBuilder::new(Identity {
            vendor: VENDOR,
            device: DEVICE_BASE + kind.id(),
            class: kind.pci_class(),
            revision: 1,
            subsystem_vendor: VENDOR,
            subsystem: 0x1100,
        });
        builder.interrupt_pin(0);
        let bar = BarKind::Memory64 { prefetchable: false };
        builder.bar(BarSpec { index: REGISTER_BAR, kind: bar, size: BAR_SIZE, target: None });
        // One vector a queue and one for configuration changes.
        builder.msix(MSIX_BAR, queues.saturating_add(1));
        capability(&mut builder, CFG_COMMON, COMMON, COMMON_BYTES, &[]);
        capability(&mut builder, CFG_ISR, ISR, 4, &[]);
        capability(&mut builder, CFG_DEVICE, DEVICE, REGION, &[]);
        let notify_bytes = u64::from(queues) * u64::from(NOTIFY_MULTIPLIER);
        capability(&mut builder, CFG_NOTIFY, NOTIFY, notify_bytes, &NOTIFY_MULTIPLIER.to_le_bytes());
        let access = capability(&mut builder, CFG_PCI, 0, 0, &[0; 4]);
        let bells = routes.map(Doorbells::new);
        let mapper = match &bells {
            Some(bells) => Arc::new(BellMapper { inner: parts.mapper, bells: bells.clone() }),
            None => parts.mapper,
        };
        let function = builder.build(mapper, parts.msi);
        function.connect_intx(parts.intx);
        let core = Core::new(device, function, parts.memory, parts.inputs, bells.clone());
        let registers: Arc<dyn MmioDevice> = Arc::new(RegisterBar(Arc::downgrade(&core)));
        if let Some(bells) = bells {
            bells.set_registers(&registers);
        }
        core.function().set_bar_target(REGISTER_BAR, BarTarget::Mmio(registers));
        Arc::new(Self { core, access })
    }

    /// Stops processing and waits until nothing is in flight: until [`VirtioPciDevice::resume`] the device
    /// touches neither guest memory nor interrupts. Call with the vCPUs stopped.
    pub fn pause(&self) {
        self.core.pause();
    }

    /// Goes on, with what was asked for meanwhile.
    pub fn resume(&self) {
        self.core.resume();
    }

    /// The saved form. Call between [`VirtioPciDevice::pause`] and [`VirtioPciDevice::resume`].
    pub fn save(&self) -> VirtioPciStateV1 {
        self.core.save()
    }

    /// Takes over a saved state into a device made with the same options; guest memory must be there already.
    /// After an error the device is reset. Either way it is paused: once everything that interrupts go to is
    /// restored too, [`VirtioPciDevice::resume`] lets it go on with what is in its queues.
    pub fn restore(&self, saved: &VirtioPciStateV1) -> Result<(), RestoreError> {
        let result = self.core.restore(saved);
        if result.is_err() {
            self.reset();
        }
        result
    }

    /// Requests that the device thread was given because a vCPU should not wait for them.
    pub fn handed_over(&self) -> u64 {
        self.core.handed_over()
    }

    /// Whether `offset..offset + len` touches the data field of the configuration-access capability.
    fn touches_access(&self, offset: u16, len: usize) -> bool {
        let data = self.access + 16;
        offset < data + 4 && usize::from(offset) + len > usize::from(data)
    }

    /// Where the configuration-access capability points: offset in the register BAR and 1, 2 or 4 bytes.
    fn access_target(&self) -> Option<(u64, usize)> {
        let (bar, offset, len) = self
            .function()
            .with_config(|c| (c.u8(self.access + 4), c.u32(self.access + 8), c.u32(self.access + 12)));
        let fits = bar == REGISTER_BAR
            && matches!(len, 1 | 2 | 4)
            && offset % len == 0
            && u64::from(offset) + u64::from(len) <= BAR_SIZE;
        fits.then_some((u64::from(offset), len as usize))
    }
}

/// Adds a virtio capability; `extra` follows the common part. Returns its offset.
fn capability(builder: &mut FunctionBuilder, kind: u8, offset: u64, len: u64, extra: &[u8]) -> u16 {
    let mut body = vec![16 + extra.len() as u8, kind, REGISTER_BAR, 0, 0, 0];
    body.extend_from_slice(&(offset as u32).to_le_bytes());
    body.extend_from_slice(&(len as u32).to_le_bytes());
    body.extend_from_slice(extra);
    let mut writable = [0; 18];
    if kind == CFG_PCI {
        writable[2] = 0xff;
        writable[6..].fill(0xff);
    }
    builder.capability(CAP_VENDOR, &body, &writable[..body.len()])
}

impl PciDevice for VirtioPciDevice {
    fn function(&self) -> &PciFunction {
        self.core.function()
    }

    fn reset(&self) {
        self.core.function().reset();
        self.core.reset_device();
    }

    fn config_read(&self, offset: u16, data: &mut [u8]) {
        if self.touches_access(offset, data.len())
            && let Some((at, len)) = self.access_target()
        {
            let mut value = [0; 4];
            self.core.bar_read(at, &mut value[..len]);
            self.function().with_config(|c| c.set(self.access + 16, &value[..len]));
        }
        self.function().config_read(offset, data);
    }

    fn config_write(&self, offset: u16, data: &[u8]) {
        let mastered = self.function().bus_master();
        self.default_config_write(offset, data);
        if self.touches_access(offset, data.len())
            && let Some((at, len)) = self.access_target()
        {
            let value = self.function().with_config(|c| c.u32(self.access + 16)).to_le_bytes();
            self.core.bar_write(at, &value[..len]);
        }
        if !mastered && self.function().bus_master() {
            self.core.kick_all();
        }
    }
}

impl Drop for VirtioPciDevice {
    fn drop(&mut self) {
        self.function().disconnect();
        self.core.stop();
    }
}

/// What the register BAR maps: a weak reference, since the function holds it and the core holds the function.
struct RegisterBar(Weak<Core>);

impl MmioDevice for RegisterBar {
    fn mmio_read(&self, offset: u64, data: &mut [u8]) {
        match self.0.upgrade() {
            Some(core) => core.bar_read(offset, data),
            None => data.fill(0xff),
        }
    }

    fn mmio_write(&self, offset: u64, data: &[u8]) {
        if let Some(core) = self.0.upgrade() {
            core.bar_write(offset, data);
        }
    }
}

#[cfg(test)]
#[path = "pci_tests.rs"]
mod tests;
