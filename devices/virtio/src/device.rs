//! What a kind of virtio device implements, and how it reaches its transport.

use std::sync::Weak;
use std::time::Duration;

use atoll_machine::inputs::InputKind;

use crate::queue::{Progress, QueueError, QueueRun};
use crate::transport::pci::Core;

/// Kinds of devices (VIRTIO 1.2, chapter 5) with their device ids.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DeviceKind {
    /// Network device, id 1.
    Network,
    /// Block device, id 2.
    Block,
    /// Console, id 3.
    Console,
    /// Entropy device, id 4.
    Entropy,
}

impl DeviceKind {
    /// The virtio device id.
    pub const fn id(self) -> u16 {
        match self {
            Self::Network => 1,
            Self::Block => 2,
            Self::Console => 3,
            Self::Entropy => 4,
        }
    }

    /// The PCI class code: class, subclass, programming interface.
    pub const fn pci_class(self) -> u32 {
        match self {
            Self::Network => 0x02_00_00,
            Self::Block => 0x01_00_00,
            Self::Console => 0x07_80_00,
            Self::Entropy => 0x00_ff_00,
        }
    }

    /// Name of the device's helper thread.
    pub(crate) const fn thread_name(self) -> &'static str {
        match self {
            Self::Network => "virtio-net",
            Self::Block => "virtio-blk",
            Self::Console => "virtio-console",
            Self::Entropy => "virtio-rng",
        }
    }
}

/// Feature bits that belong to the ring and the transport (VIRTIO 1.2, chapter 6).
pub mod feature {
    /// Descriptors may refer to tables of descriptors.
    pub const INDIRECT_DESC: u64 = 1 << 28;
    /// Each side tells the other how far it may go without a notification.
    pub const EVENT_IDX: u64 = 1 << 29;
    /// The modern interface. A driver that does not accept it is refused.
    pub const VERSION_1: u64 = 1 << 32;

    /// What the transport offers for every device.
    pub const TRANSPORT: u64 = INDIRECT_DESC | EVENT_IDX | VERSION_1;
}

/// Why a saved state was not accepted.
#[derive(Debug, thiserror::Error)]
pub enum RestoreError {
    /// The bytes are not a state of this device.
    #[error("saved state of {device} cannot be decoded: {source}; it is damaged or not of this device")]
    Decode {
        /// Which device.
        device: &'static str,
        /// The decoder's error.
        source: prost::DecodeError,
    },
    /// The PCI function refused its part.
    #[error(transparent)]
    Pci(#[from] atoll_pci::RestoreError),
    /// The driver uses features that this device does not offer.
    #[error(
        "saved virtio features {saved:#x} are not among the offered {offered:#x}; use the device options it was saved with"
    )]
    Features {
        /// Accepted by the driver.
        saved: u64,
        /// Offered now.
        offered: u64,
    },
    /// A queue's saved registers cannot be used.
    #[error("saved virtio queue {index} cannot be restored: {reason}")]
    Queue {
        /// Queue number.
        index: usize,
        /// What is wrong.
        reason: String,
    },
    /// Something the guest relies on differs.
    #[error("saved {what} is {saved}, this device has {have}; use the one it was saved with")]
    Mismatch {
        /// Name of the property.
        what: &'static str,
        /// Saved value.
        saved: u64,
        /// Present value.
        have: u64,
    },
}

/// A virtio device behind a transport.
///
/// The transport owns registers, rings and interrupts; the device owns what requests mean. Methods take `&self`
/// and may be called from several threads; [`VirtioDevice::process_queue`] never runs twice at once for the same
/// queue, and not while [`VirtioDevice::reset`] runs.
pub trait VirtioDevice: Send + Sync {
    /// What kind of device it is.
    fn kind(&self) -> DeviceKind;

    /// Largest size of each queue, a power of two up to [`crate::queue::MAX_CHAIN`]. As many queues as entries.
    fn queue_sizes(&self) -> &[u16];

    /// Feature bits of the device itself; the transport adds [`feature::TRANSPORT`].
    fn features(&self) -> u64;

    /// Reads the device's configuration space. Bytes that it does not have read as zero.
    fn config_read(&self, offset: u64, data: &mut [u8]);

    /// Writes the device's configuration space. Writes to read-only fields are ignored.
    fn config_write(&self, offset: u64, data: &[u8]);

    /// The driver is ready (DRIVER_OK) having accepted `features`. `handle` stays valid until
    /// [`VirtioDevice::reset`].
    fn activate(&self, features: u64, handle: &DeviceHandle);

    /// Forgets what the driver set up. No queue is being processed.
    fn reset(&self);

    /// Carries out what is in queue `index`, until there is no more or `run` says that it is enough for now. An
    /// error stops the device until the driver resets it.
    fn process_queue(&self, index: u16, run: &mut QueueRun<'_>) -> Result<Progress, QueueError>;

    /// Waits until nothing that the device began outside a run, such as a transfer to or from guest memory, is under
    /// way. No queue is being processed.
    fn drain(&self) {}

    /// Hands back what has ended in queue `index`, and takes nothing new: the end of a pause.
    fn finish_queue(&self, _index: u16, _run: &mut QueueRun<'_>) -> Result<(), QueueError> {
        Ok(())
    }

    /// The device's own saved state, encoded.
    fn save(&self) -> Vec<u8>;

    /// Takes over a saved state. [`VirtioDevice::activate`] follows if the driver was ready.
    fn restore(&self, state: &[u8]) -> Result<(), RestoreError>;
}

/// How a device reaches its transport from outside [`VirtioDevice::process_queue`].
#[derive(Clone, Default)]
pub struct DeviceHandle {
    core: Weak<Core>,
}

impl DeviceHandle {
    pub(crate) fn new(core: Weak<Core>) -> Self {
        Self { core }
    }

    /// Has queue `index` processed, on this thread if it is short.
    pub fn kick(&self, index: u16) {
        if let Some(core) = self.core.upgrade() {
            core.kick(index);
        }
    }

    /// Has queue `index` processed on this thread with the turn of the device's own thread: for what arrives from
    /// outside on an event loop. What exceeds the turn goes to the device's thread.
    pub fn deliver(&self, index: u16) {
        if let Some(core) = self.core.upgrade() {
            core.rung(index);
        }
    }

    /// Lets `change` happen as an input to the machine (see [`InputGate`](atoll_machine::inputs::InputGate)), or
    /// at once while there is no driver.
    pub fn input(&self, kind: InputKind, change: impl FnOnce() + Send + 'static) {
        match self.core.upgrade() {
            Some(core) => core.input(kind, change),
            None => change(),
        }
    }

    /// Has queue `index` processed on this thread, as an input to the machine, for what ended outside a run. Returns
    /// at once if the queue is being processed; whoever does that looks again.
    pub fn ended(&self, index: u16) {
        if let Some(core) = self.core.upgrade() {
            core.rung(index);
        }
    }

    /// Whether inputs are recorded: nothing but a run may write guest memory then, so a device begins nothing that
    /// ends outside one.
    pub fn is_recorded(&self) -> bool {
        self.core.upgrade().is_some_and(|core| core.is_recorded())
    }

    /// Has queue `index` processed by the device's thread after `delay` of host time, or earlier if something else
    /// asks for it: what a throttle that says "later" needs. Of several delays for a queue the earliest counts.
    /// May be called while the queue is processed. A reset forgets it; while the device is paused, the queue is
    /// noted and processed on resume.
    pub fn kick_after(&self, index: u16, delay: Duration) {
        if let Some(core) = self.core.upgrade() {
            core.kick_after(index, delay);
        }
    }

    /// Tells the driver that the configuration space changed.
    pub fn config_changed(&self) {
        if let Some(core) = self.core.upgrade() {
            core.config_changed();
        }
    }
}

/// Copies the part of `bytes` at `offset` into `data`; the rest reads as zero.
pub(crate) fn read_bytes_at(bytes: &[u8], offset: u64, data: &mut [u8]) {
    data.fill(0);
    let rest = usize::try_from(offset).ok().and_then(|at| bytes.get(at..)).unwrap_or_default();
    for (to, from) in data.iter_mut().zip(rest) {
        *to = *from;
    }
}
