//! The common configuration structure (VIRTIO 1.2, 4.1.4.3).
//!
//! Fields are accessed with their own width; the 64-bit addresses also as two halves (4.1.3.1). Other widths read
//! the bytes that are there and write nothing.

use crate::queue::QueueLayout;

/// Offsets of the fields.
pub(crate) mod at {
    pub(crate) const DEVICE_FEATURE_SELECT: u64 = 0x00;
    pub(crate) const DEVICE_FEATURE: usize = 0x04;
    pub(crate) const DRIVER_FEATURE_SELECT: u64 = 0x08;
    pub(crate) const DRIVER_FEATURE: u64 = 0x0c;
    pub(crate) const CONFIG_VECTOR: u64 = 0x10;
    pub(crate) const NUM_QUEUES: usize = 0x12;
    pub(crate) const STATUS: u64 = 0x14;
    pub(crate) const GENERATION: usize = 0x15;
    pub(crate) const QUEUE_SELECT: u64 = 0x16;
    pub(crate) const QUEUE_SIZE: u64 = 0x18;
    pub(crate) const QUEUE_VECTOR: u64 = 0x1a;
    pub(crate) const QUEUE_ENABLE: u64 = 0x1c;
    pub(crate) const QUEUE_NOTIFY_OFF: usize = 0x1e;
    pub(crate) const QUEUE_DESC: u64 = 0x20;
    pub(crate) const QUEUE_AVAIL: u64 = 0x28;
    pub(crate) const QUEUE_USED: u64 = 0x30;
}

/// Bits of `device_status` (2.1).
pub(crate) mod status {
    pub(crate) const ACKNOWLEDGE: u8 = 1;
    pub(crate) const DRIVER: u8 = 2;
    pub(crate) const DRIVER_OK: u8 = 4;
    pub(crate) const FEATURES_OK: u8 = 8;
    pub(crate) const NEEDS_RESET: u8 = 64;
    pub(crate) const FAILED: u8 = 128;
}

/// "No vector".
pub(crate) const NO_VECTOR: u16 = 0xffff;

/// What the driver programs for one queue.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct QueueRegisters {
    pub(crate) layout: QueueLayout,
    pub(crate) enabled: bool,
}

/// What the driver programs, apart from what the processing of queues reads (status and vectors).
#[derive(Clone, Debug, Default)]
pub(crate) struct Registers {
    pub(crate) device_feature_select: u32,
    pub(crate) driver_feature_select: u32,
    pub(crate) driver_features: u64,
    pub(crate) queue_select: u16,
    pub(crate) queues: Vec<QueueRegisters>,
}

impl Registers {
    /// Power-on values for queues of these sizes.
    pub(crate) fn new(sizes: &[u16]) -> Self {
        let queue = |&size: &u16| QueueRegisters {
            layout: QueueLayout { size, ..QueueLayout::default() },
            enabled: false,
        };
        Self { queues: sizes.iter().map(queue).collect(), ..Self::default() }
    }

    /// The selected queue.
    pub(crate) fn selected(&mut self) -> Option<&mut QueueRegisters> {
        self.queues.get_mut(usize::from(self.queue_select))
    }

    /// Takes half `half` (32 bits) of the features that the driver accepts.
    pub(crate) fn write_driver_feature(&mut self, half: u32) {
        match self.driver_feature_select {
            0 => self.driver_features = self.driver_features & !0xffff_ffff | u64::from(half),
            1 => self.driver_features = self.driver_features & 0xffff_ffff | u64::from(half) << 32,
            // Nobody offers bits from 64 on.
            _ => {}
        }
    }

    /// Takes a write to one of the ring addresses of the selected queue.
    pub(crate) fn write_address(&mut self, offset: u64, value: u32) {
        let Some(queue) = self.selected().filter(|q| !q.enabled) else { return };
        let field = match offset & !7 {
            at::QUEUE_DESC => &mut queue.layout.desc,
            at::QUEUE_AVAIL => &mut queue.layout.avail,
            _ => &mut queue.layout.used,
        };
        *field = if offset & 4 == 0 {
            *field & !0xffff_ffff | u64::from(value)
        } else {
            *field & 0xffff_ffff | u64::from(value) << 32
        };
    }
}

/// Half `select` of `features`.
pub(crate) fn feature_half(features: u64, select: u32) -> u32 {
    match select {
        0 => features as u32,
        1 => (features >> 32) as u32,
        _ => 0,
    }
}
