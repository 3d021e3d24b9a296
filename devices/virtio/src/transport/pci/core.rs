//! The transport's state, and the processing of queues.
//!
//! A notification runs the queue on the vCPU's own thread within a [`Budget`], because waking another thread costs
//! more than most requests. What is left goes to the device's thread, through the input gate. Where notifications
//! arrive as doorbells (see `doorbell`), the device's thread runs the queue. At most one thread works on a queue:
//!
//! ```text
//! kick: pending = true --> lock free? --no--> return (its holder looks at `pending` after unlocking)
//!                             | yes
//!                             v
//!            pending = false, process --Done--> unlock --> pending again? --> from the top
//!                             |  |
//!                             |  +-- More --> pending = true, unlock --> device thread
//!                             +-- error --> DEVICE_NEEDS_RESET, configuration interrupt
//! ```
//!
//! A device may begin what ends later, on other threads (see [`VirtioDevice::drain`]); its end is one more reason to
//! look at the queue. A pause stops the runs, waits for what is under way, and hands back what ended; a reset waits
//! and forgets.
//!
//! What processing reads (status, vectors) is atomic, so that a vCPU at the registers never waits for a disk,
//! except for a reset, which must wait until requests in flight no longer touch guest memory.

use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU16, AtomicU64, Ordering::SeqCst};
use std::sync::{Arc, Mutex, TryLockError, Weak};

use atoll_foundation::log_limited;
use atoll_machine::inputs::{InputGate, InputKind};
use atoll_machine::memory::GuestMemory;
use atoll_pci::PciFunction;

use super::doorbell::Doorbells;
use super::registers::{NO_VECTOR, Registers, at, feature_half, status};
use super::saved_state::VirtioPciStateV1;
use super::worker::Worker;
use super::{COMMON, COMMON_BYTES, DEVICE, ISR, NOTIFY, NOTIFY_MULTIPLIER, REGION};
use crate::device::{DeviceHandle, RestoreError, VirtioDevice, feature};
use crate::lock;
use crate::queue::saved_state::VirtQueueStateV1;
use crate::queue::{Budget, Progress, QueueError, VirtQueue};

/// ISR bits (4.1.4.5).
const ISR_QUEUE: u8 = 1;
const ISR_CONFIG: u8 = 2;

/// A queue and what its processing needs without the register lock.
struct Slot {
    queue: Mutex<VirtQueue>,
    /// There may be requests that nobody looked at.
    pending: AtomicBool,
    vector: AtomicU16,
}

/// Everything behind one virtio PCI function.
pub(crate) struct Core {
    me: Weak<Self>,
    device: Arc<dyn VirtioDevice>,
    function: PciFunction,
    memory: GuestMemory,
    inputs: Arc<InputGate>,
    registers: Mutex<Registers>,
    status: AtomicU8,
    config_vector: AtomicU16,
    generation: AtomicU8,
    /// ISR status; its lock also orders changes of the INTx wire.
    isr: Mutex<u8>,
    slots: Vec<Slot>,
    paused: AtomicBool,
    worker: Worker,
    handed_over: AtomicU64,
    bells: Option<Arc<Doorbells>>,
}

impl Core {
    pub(crate) fn new(
        device: Arc<dyn VirtioDevice>,
        function: PciFunction,
        memory: GuestMemory,
        inputs: Arc<InputGate>,
        bells: Option<Arc<Doorbells>>,
    ) -> Arc<Self> {
        let slot = |_: &u16| Slot {
            queue: Mutex::default(),
            pending: AtomicBool::new(false),
            vector: AtomicU16::new(NO_VECTOR),
        };
        Arc::new_cyclic(|me| Self {
            me: me.clone(),
            registers: Mutex::new(Registers::new(device.queue_sizes())),
            slots: device.queue_sizes().iter().map(slot).collect(),
            device,
            function,
            memory,
            inputs,
            status: AtomicU8::new(0),
            config_vector: AtomicU16::new(NO_VECTOR),
            generation: AtomicU8::new(0),
            isr: Mutex::new(0),
            paused: AtomicBool::new(false),
            worker: Worker::default(),
            handed_over: AtomicU64::new(0),
            bells,
        })
    }

    pub(crate) fn function(&self) -> &PciFunction {
        &self.function
    }

    pub(crate) fn handed_over(&self) -> u64 {
        self.handed_over.load(SeqCst)
    }

    fn offered(&self) -> u64 {
        self.device.features() | feature::TRANSPORT
    }

    // Registers.

    pub(crate) fn bar_read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        match offset & !(REGION - 1) {
            COMMON => self.common_read(offset, data),
            ISR => {
                if offset == ISR
                    && let Some(byte) = data.first_mut()
                {
                    *byte = self.take_isr();
                }
            }
            DEVICE => self.device.config_read(offset - DEVICE, data),
            _ => {}
        }
    }

    pub(crate) fn bar_write(&self, offset: u64, data: &[u8]) {
        match offset & !(REGION - 1) {
            COMMON => self.common_write(offset, data),
            DEVICE => self.device.config_write(offset - DEVICE, data),
            NOTIFY => {
                let index = (offset - NOTIFY) / u64::from(NOTIFY_MULTIPLIER);
                if let Ok(index) = u16::try_from(index) {
                    self.kick(index);
                }
            }
            _ => {}
        }
    }

    fn common_read(&self, offset: u64, data: &mut [u8]) {
        let mut image = [0; COMMON_BYTES as usize];
        let mut put = |at: usize, bytes: &[u8]| image[at..at + bytes.len()].copy_from_slice(bytes);
        let mut r = lock(&self.registers);
        put(at::DEVICE_FEATURE_SELECT as usize, &r.device_feature_select.to_le_bytes());
        put(at::DEVICE_FEATURE, &feature_half(self.offered(), r.device_feature_select).to_le_bytes());
        put(at::DRIVER_FEATURE_SELECT as usize, &r.driver_feature_select.to_le_bytes());
        let half = feature_half(r.driver_features, r.driver_feature_select);
        put(at::DRIVER_FEATURE as usize, &half.to_le_bytes());
        put(at::CONFIG_VECTOR as usize, &self.config_vector.load(SeqCst).to_le_bytes());
        put(at::NUM_QUEUES, &(self.slots.len() as u16).to_le_bytes());
        put(at::STATUS as usize, &[self.status.load(SeqCst)]);
        put(at::GENERATION, &[self.generation.load(SeqCst)]);
        put(at::QUEUE_SELECT as usize, &r.queue_select.to_le_bytes());
        let select = r.queue_select;
        if let (Some(slot), Some(queue)) = (self.slots.get(usize::from(select)), r.selected()) {
            put(at::QUEUE_SIZE as usize, &queue.layout.size.to_le_bytes());
            put(at::QUEUE_VECTOR as usize, &slot.vector.load(SeqCst).to_le_bytes());
            put(at::QUEUE_ENABLE as usize, &u16::from(queue.enabled).to_le_bytes());
            put(at::QUEUE_NOTIFY_OFF, &select.to_le_bytes());
            put(at::QUEUE_DESC as usize, &queue.layout.desc.to_le_bytes());
            put(at::QUEUE_AVAIL as usize, &queue.layout.avail.to_le_bytes());
            put(at::QUEUE_USED as usize, &queue.layout.used.to_le_bytes());
        }
        drop(r);
        crate::device::read_bytes_at(&image, offset, data);
    }

    fn common_write(&self, offset: u64, data: &[u8]) {
        match *data {
            [b] if offset == at::STATUS => self.write_status(b),
            [a, b] => self.write_u16(offset, u16::from_le_bytes([a, b])),
            [a, b, c, d] => self.write_u32(offset, u32::from_le_bytes([a, b, c, d])),
            [a, b, c, d, e, f, g, h] if offset & 7 == 0 && offset >= at::QUEUE_DESC => {
                self.write_u32(offset, u32::from_le_bytes([a, b, c, d]));
                self.write_u32(offset + 4, u32::from_le_bytes([e, f, g, h]));
            }
            _ => {}
        }
    }

    fn write_u32(&self, offset: u64, value: u32) {
        let mut r = lock(&self.registers);
        match offset {
            at::DEVICE_FEATURE_SELECT => r.device_feature_select = value,
            at::DRIVER_FEATURE_SELECT => r.driver_feature_select = value,
            // Negotiated features stay as they are until a reset (3.1.1).
            at::DRIVER_FEATURE if self.status.load(SeqCst) & status::FEATURES_OK == 0 => {
                r.write_driver_feature(value);
            }
            at::QUEUE_DESC..0x38 if offset & 3 == 0 => r.write_address(offset, value),
            _ => {}
        }
    }

    fn write_u16(&self, offset: u64, value: u16) {
        let mut r = lock(&self.registers);
        let slot = self.slots.get(usize::from(r.queue_select));
        match offset {
            at::CONFIG_VECTOR => self.config_vector.store(self.usable_vector(value), SeqCst),
            at::QUEUE_SELECT => r.queue_select = value,
            at::QUEUE_SIZE => {
                if let Some(queue) = r.selected().filter(|q| !q.enabled) {
                    queue.layout.size = value;
                }
            }
            at::QUEUE_VECTOR => {
                if let Some(slot) = slot {
                    slot.vector.store(self.usable_vector(value), SeqCst);
                }
            }
            at::QUEUE_ENABLE if value == 1 => self.enable_queue(&mut r),
            _ => {}
        }
    }

    /// A vector that the function does not have reads back as none, which tells the driver (4.1.5.1.2).
    fn usable_vector(&self, vector: u16) -> u16 {
        let vectors = self.function.msix().map_or(0, |m| m.vectors());
        if vector < vectors { vector } else { NO_VECTOR }
    }

    fn enable_queue(&self, r: &mut Registers) {
        let index = usize::from(r.queue_select);
        let now = self.status.load(SeqCst);
        let features = r.driver_features;
        let Some(queue) = r.selected().filter(|q| !q.enabled) else { return };
        if now & status::FEATURES_OK == 0 || now & status::NEEDS_RESET != 0 {
            return;
        }
        match self.start_queue(index, queue.layout, features) {
            Ok(()) => queue.enabled = true,
            Err(error) => self.fail(index as u16, &error),
        }
    }

    fn start_queue(
        &self,
        index: usize,
        layout: crate::queue::QueueLayout,
        features: u64,
    ) -> Result<(), QueueError> {
        let (Some(slot), Some(&max)) = (self.slots.get(index), self.device.queue_sizes().get(index)) else {
            return Err(QueueError::Registers("number"));
        };
        let event_idx = features & feature::EVENT_IDX != 0;
        let indirect = features & feature::INDIRECT_DESC != 0;
        lock(&slot.queue).enable(&self.memory.snapshot(), layout, max, event_idx, indirect)
    }

    /// `device_status` (2.1): bits are only added; zero resets.
    fn write_status(&self, value: u8) {
        if value == 0 {
            return self.reset_device();
        }
        let r = lock(&self.registers);
        let old = self.status.load(SeqCst);
        let mut new = old
            | value & (status::ACKNOWLEDGE | status::DRIVER | status::FAILED)
            | value & old & (status::FEATURES_OK | status::DRIVER_OK);
        if value & status::FEATURES_OK != 0 && old & status::FEATURES_OK == 0 {
            let unknown = r.driver_features & !self.offered();
            if unknown == 0 && r.driver_features & feature::VERSION_1 != 0 {
                new |= status::FEATURES_OK;
            } else {
                log_limited!(debug, device = ?self.device.kind(), "features {:#x} refused", r.driver_features);
            }
        }
        let start = value & status::DRIVER_OK != 0
            && old & status::DRIVER_OK == 0
            && new & status::FEATURES_OK != 0
            && new & status::NEEDS_RESET == 0;
        if start {
            self.device.activate(r.driver_features, &DeviceHandle::new(self.me.clone()));
            new |= status::DRIVER_OK;
        }
        // NEEDS_RESET is set by others at any time.
        self.status.fetch_or(new, SeqCst);
        if start {
            self.bind_doorbells(&r);
        }
        drop(r);
        if start {
            self.kick_all();
        }
    }

    /// Back to where a driver begins. Waits for requests in flight.
    pub(crate) fn reset_device(&self) {
        let mut r = lock(&self.registers);
        self.status.store(0, SeqCst);
        self.unbind_doorbells();
        self.worker.forget_alarms();
        for slot in &self.slots {
            let mut queue = lock(&slot.queue);
            queue.reset();
            slot.pending.store(false, SeqCst);
            slot.vector.store(NO_VECTOR, SeqCst);
        }
        self.device.reset();
        *r = Registers::new(self.device.queue_sizes());
        self.config_vector.store(NO_VECTOR, SeqCst);
        // A run that failed before its queue was reset may have set the bit after the store above.
        self.status.store(0, SeqCst);
        self.take_isr();
    }

    // Doorbells.

    /// Binds a doorbell to every enabled queue.
    fn bind_doorbells(&self, r: &Registers) {
        if let Some(bells) = &self.bells {
            let enabled = r.queues.iter().zip(0u16..).filter(|(queue, _)| queue.enabled);
            let queues: Vec<u16> = enabled.map(|(_, index)| index).collect();
            let name = self.device.kind().thread_name();
            bells.set_queues(&queues, &|index, event| self.worker.watch(&self.me, name, index, event));
        }
    }

    fn unbind_doorbells(&self) {
        if let Some(bells) = &self.bells {
            bells.set_queues(&[], &|_, _| Ok(()));
        }
    }

    /// The doorbell of queue `index` rang; called on the device's thread.
    pub(crate) fn rung(self: Arc<Self>, index: u16) {
        if let Some(slot) = self.slots.get(usize::from(index)) {
            slot.pending.store(true, SeqCst);
            self.run_through_gate(index);
        }
    }

    // Interrupts.

    fn take_isr(&self) -> u8 {
        let mut isr = lock(&self.isr);
        self.function.set_intx(false);
        std::mem::take(&mut *isr)
    }

    fn interrupt(&self, vector: u16, bit: u8) {
        let msix = self.function.msix().is_some_and(|m| m.signal(vector));
        if !msix {
            let mut isr = lock(&self.isr);
            *isr |= bit;
            self.function.set_intx(true);
        }
    }

    /// The device's configuration changed: new generation, and an interrupt once the driver is there.
    pub(crate) fn config_changed(&self) {
        self.generation.fetch_add(1, SeqCst);
        if self.status.load(SeqCst) & status::DRIVER_OK != 0 {
            self.interrupt(self.config_vector.load(SeqCst), ISR_CONFIG);
        }
    }

    /// Stops the device after a driver's mistake (2.1.2).
    fn fail(&self, index: u16, error: &QueueError) {
        log_limited!(warn, device = ?self.device.kind(), queue = index, "driver error, device stopped: {error}");
        let old = self.status.fetch_or(status::NEEDS_RESET, SeqCst);
        if old & status::NEEDS_RESET == 0 && old & status::DRIVER_OK != 0 {
            self.interrupt(self.config_vector.load(SeqCst), ISR_CONFIG);
        }
    }

    // Queues.

    /// Whether the device may touch guest memory now.
    fn may_run(&self) -> bool {
        let now = self.status.load(SeqCst);
        now & (status::DRIVER_OK | status::NEEDS_RESET) == status::DRIVER_OK
            && !self.paused.load(SeqCst)
            && self.function.bus_master()
    }

    /// Notes that queue `index` may have requests, and processes it on this thread as far as that is short.
    pub(crate) fn kick(&self, index: u16) {
        if let Some(slot) = self.slots.get(usize::from(index)) {
            slot.pending.store(true, SeqCst);
            if self.run(index, Budget::inline()) {
                self.hand_over(index);
            }
        }
    }

    /// Has the device's thread look at queue `index` after `delay`. Without a thread that is at once.
    pub(crate) fn kick_after(&self, index: u16, delay: std::time::Duration) {
        if usize::from(index) >= self.slots.len() {
            return;
        }
        let name = self.device.kind().thread_name();
        if let Err(error) = self.worker.wake_after(&self.me, name, index, delay) {
            log_limited!(error, "{name}: no timer for the device, it will not wait: {error}");
            self.hand_over(index);
        }
    }

    /// Looks at every queue.
    pub(crate) fn kick_all(&self) {
        for index in 0..self.slots.len() {
            self.kick(index as u16);
        }
    }

    /// Processes queue `index` as the device's thread does: an input to the machine.
    pub(crate) fn run_through_gate(self: Arc<Self>, index: u16) {
        let gate = self.inputs.clone();
        gate.deliver(InputKind::Completion, move || {
            if self.run(index, Budget::worker()) {
                self.hand_over(index);
            }
        });
    }

    /// Lets `change` happen when the machine takes inputs.
    pub(crate) fn input(&self, kind: InputKind, change: impl FnOnce() + Send + 'static) {
        self.inputs.deliver(kind, change);
    }

    /// Processes queue `index` within `budget`. Returns whether there is more that nobody works on.
    fn run(&self, index: u16, budget: Budget) -> bool {
        let Some(slot) = self.slots.get(usize::from(index)) else { return false };
        while slot.pending.load(SeqCst) && self.may_run() {
            let mut queue = match slot.queue.try_lock() {
                Ok(queue) => queue,
                Err(TryLockError::Poisoned(e)) => e.into_inner(),
                Err(TryLockError::WouldBlock) => return false,
            };
            // A reset or a pause may have come between.
            if !self.may_run() {
                return false;
            }
            slot.pending.store(false, SeqCst);
            if self.process(slot, &mut queue, index, budget) {
                slot.pending.store(true, SeqCst);
                return true;
            }
        }
        false
    }

    /// One run over a locked queue. Returns whether there is more.
    fn process(&self, slot: &Slot, queue: &mut VirtQueue, index: u16, budget: Budget) -> bool {
        let memory = self.memory.snapshot();
        let (result, interrupt) = queue.run(&memory, budget, |run| self.device.process_queue(index, run));
        if interrupt {
            self.interrupt(slot.vector.load(SeqCst), ISR_QUEUE);
        }
        match result {
            Ok(progress) => progress == Progress::More,
            Err(error) => {
                self.fail(index, &error);
                false
            }
        }
    }

    fn hand_over(&self, index: u16) {
        self.handed_over.fetch_add(1, SeqCst);
        let name = self.device.kind().thread_name();
        if let Err(error) = self.worker.submit(&self.me, name, index) {
            log_limited!(error, "{name}: no thread for the device, a vCPU does its work: {error}");
            while self.run(index, Budget::worker()) {}
        }
    }

    // Life cycle.

    pub(crate) fn pause(&self) {
        self.paused.store(true, SeqCst);
        for slot in &self.slots {
            drop(lock(&slot.queue));
        }
        self.device.drain();
        for (slot, index) in self.slots.iter().zip(0..) {
            self.finish(slot, index);
        }
    }

    /// Hands back what has ended in a queue of a device that is paused.
    fn finish(&self, slot: &Slot, index: u16) {
        let now = self.status.load(SeqCst);
        let ready = now & (status::DRIVER_OK | status::NEEDS_RESET) == status::DRIVER_OK;
        if !ready || !self.function.bus_master() {
            return;
        }
        let memory = self.memory.snapshot();
        let mut queue = lock(&slot.queue);
        let (result, interrupt) = queue.run(&memory, Budget::worker(), |run| {
            self.device.finish_queue(index, run).map(|()| Progress::Done)
        });
        drop(queue);
        if interrupt {
            self.interrupt(slot.vector.load(SeqCst), ISR_QUEUE);
        }
        if let Err(error) = result {
            self.fail(index, &error);
        }
    }

    pub(crate) fn is_recorded(&self) -> bool {
        self.inputs.is_recorded()
    }

    pub(crate) fn resume(&self) {
        self.paused.store(false, SeqCst);
        for (index, slot) in self.slots.iter().enumerate() {
            if slot.pending.load(SeqCst) {
                self.kick(index as u16);
            }
        }
    }

    pub(crate) fn stop(&self) {
        self.pause();
        self.worker.stop();
    }

    pub(crate) fn save(&self) -> VirtioPciStateV1 {
        let r = lock(&self.registers);
        let queue = |(slot, q): (&Slot, &super::registers::QueueRegisters)| VirtQueueStateV1 {
            size: Some(u32::from(q.layout.size)),
            enabled: Some(q.enabled),
            vector: Some(u32::from(slot.vector.load(SeqCst))),
            desc: Some(q.layout.desc),
            avail: Some(q.layout.avail),
            used: Some(q.layout.used),
            ..lock(&slot.queue).save()
        };
        VirtioPciStateV1 {
            queues: self.slots.iter().zip(&r.queues).map(queue).collect(),
            pci: Some(self.function.save()),
            status: Some(u32::from(self.status.load(SeqCst))),
            device_feature_select: Some(r.device_feature_select),
            driver_feature_select: Some(r.driver_feature_select),
            driver_features: Some(r.driver_features),
            queue_select: Some(u32::from(r.queue_select)),
            config_vector: Some(u32::from(self.config_vector.load(SeqCst))),
            generation: Some(u32::from(self.generation.load(SeqCst))),
            isr: Some(u32::from(*lock(&self.isr))),
            device: Some(self.device.save()),
        }
    }

    pub(crate) fn restore(&self, saved: &VirtioPciStateV1) -> Result<(), RestoreError> {
        self.pause();
        self.reset_device();
        let (features, offered) = (saved.driver_features.unwrap_or(0), self.offered());
        let new = saved.status.unwrap_or(0) as u8;
        if new & status::FEATURES_OK != 0 && features & !offered != 0 {
            return Err(RestoreError::Features { saved: features, offered });
        }
        let (count, have) = (saved.queues.len() as u64, self.slots.len() as u64);
        if count > have {
            return Err(RestoreError::Mismatch { what: "number of virtio queues", saved: count, have });
        }
        self.device.restore(saved.device.as_deref().unwrap_or_default())?;
        self.function.restore(&saved.pci.clone().unwrap_or_default())?;
        let mut r = lock(&self.registers);
        r.device_feature_select = saved.device_feature_select.unwrap_or(0);
        r.driver_feature_select = saved.driver_feature_select.unwrap_or(0);
        r.driver_features = features;
        r.queue_select = saved.queue_select.unwrap_or(0) as u16;
        let vector = saved.config_vector.map_or(NO_VECTOR, |v| v as u16);
        self.config_vector.store(self.usable_vector(vector), SeqCst);
        self.generation.store(saved.generation.unwrap_or(0) as u8, SeqCst);
        for (index, queue) in saved.queues.iter().enumerate() {
            self.restore_queue(&mut r, index, queue)?;
        }
        *lock(&self.isr) = saved.isr.unwrap_or(0) as u8;
        if new & status::DRIVER_OK != 0 {
            self.device.activate(features, &DeviceHandle::new(self.me.clone()));
        }
        self.status.store(new, SeqCst);
        if new & status::DRIVER_OK != 0 {
            self.bind_doorbells(&r);
        }
        for slot in &self.slots {
            slot.pending.store(true, SeqCst);
        }
        Ok(())
    }

    fn restore_queue(
        &self,
        r: &mut Registers,
        index: usize,
        saved: &VirtQueueStateV1,
    ) -> Result<(), RestoreError> {
        let features = r.driver_features;
        let (Some(slot), Some(queue)) = (self.slots.get(index), r.queues.get_mut(index)) else {
            return Ok(());
        };
        if let Some(size) = saved.size {
            queue.layout.size = size as u16;
        }
        queue.layout.desc = saved.desc.unwrap_or(0);
        queue.layout.avail = saved.avail.unwrap_or(0);
        queue.layout.used = saved.used.unwrap_or(0);
        queue.enabled = saved.enabled.unwrap_or(false);
        let vector = saved.vector.map_or(NO_VECTOR, |v| v as u16);
        slot.vector.store(self.usable_vector(vector), SeqCst);
        if queue.enabled {
            let layout = queue.layout;
            self.start_queue(index, layout, features)
                .map_err(|error| RestoreError::Queue { index, reason: error.to_string() })?;
            lock(&slot.queue).restore(saved);
        }
        Ok(())
    }
}
