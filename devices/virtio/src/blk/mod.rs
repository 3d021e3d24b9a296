//! The block device (VIRTIO 1.2, section 5.2).
//!
//! Data goes straight between the disk and guest memory. A vCPU thread carries out short reads and writes itself;
//! flushes, discards, zeroing and transfers above [`INLINE_BYTES`] go to the device's thread. What a request means
//! is in `request`; what a flush promises is [`atoll_storage::Disk`]'s.
//!
//! A driver that does not accept VIRTIO_BLK_F_FLUSH gets a disk that writes through (5.2.6.2): each write is
//! flushed before it is reported.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use atoll_storage::Disk;
use prost::Message;

use crate::device::{DeviceHandle, DeviceKind, RestoreError, VirtioDevice, read_bytes_at};
use crate::queue::{Progress, QueueError, QueueRun};

pub mod metrics;
mod request;
pub mod saved_state;
#[cfg(test)]
mod tests;

use metrics::BlkMetrics;
use saved_state::BlkStateV1;

/// Bytes of a disk's serial number (5.2.6.1).
pub const SERIAL_BYTES: usize = 20;
/// Entries of each queue.
pub const QUEUE_SIZE: u16 = 256;
/// Most queues: as many as Linux can use with 64 vCPUs, far below what the notification page holds.
pub const MAX_QUEUES: u16 = 64;
/// Longest transfer that a vCPU thread carries out itself.
pub const INLINE_BYTES: u64 = 1 << 20;

/// Largest buffer of a request.
const SIZE_MAX: u32 = 1 << 20;
/// Most buffers of a request: the queue's size less header and status.
const SEG_MAX: u32 = QUEUE_SIZE as u32 - 2;
/// Most bytes of a request, following from the two.
const MAX_BYTES: u64 = SIZE_MAX as u64 * SEG_MAX as u64;
/// Most ranges in a discard or write-zeroes request.
const MAX_RANGES: u32 = 32;

/// Feature bits (5.2.3).
mod feature {
    pub(super) const SIZE_MAX: u64 = 1 << 1;
    pub(super) const SEG_MAX: u64 = 1 << 2;
    pub(super) const RO: u64 = 1 << 5;
    pub(super) const BLK_SIZE: u64 = 1 << 6;
    pub(super) const FLUSH: u64 = 1 << 9;
    pub(super) const MQ: u64 = 1 << 12;
    pub(super) const DISCARD: u64 = 1 << 13;
    pub(super) const WRITE_ZEROES: u64 = 1 << 14;
}

/// How a disk appears to the guest.
#[derive(Clone, Debug)]
pub struct BlkOptions {
    /// Serial number, cut to [`SERIAL_BYTES`].
    pub serial: String,
    /// Request queues, 1 to [`MAX_QUEUES`]: usually one a vCPU.
    pub queues: u16,
}

impl Default for BlkOptions {
    fn default() -> Self {
        Self { serial: String::new(), queues: 1 }
    }
}

/// A block device over a [`Disk`].
pub struct Blk {
    disk: Arc<dyn Disk>,
    serial: [u8; SERIAL_BYTES],
    queue_sizes: Vec<u16>,
    write_through: AtomicBool,
    metrics: BlkMetrics,
}

impl Blk {
    /// A block device over `disk`. It is read-only when the disk is.
    pub fn new(disk: Arc<dyn Disk>, options: &BlkOptions) -> Arc<Self> {
        let mut serial = [0; SERIAL_BYTES];
        for (to, from) in serial.iter_mut().zip(options.serial.bytes()) {
            *to = from;
        }
        let queue_sizes = vec![QUEUE_SIZE; usize::from(options.queues.clamp(1, MAX_QUEUES))];
        let write_through = AtomicBool::new(false);
        Arc::new(Self { disk, serial, queue_sizes, write_through, metrics: BlkMetrics::default() })
    }

    /// Counters.
    pub fn metrics(&self) -> &BlkMetrics {
        &self.metrics
    }

    fn sectors(&self) -> u64 {
        self.disk.capacity_bytes() / 512
    }

    /// Most sectors of one range of a discard or zeroing of at most `bytes` bytes.
    fn range_sectors(bytes: u64) -> u32 {
        (bytes / 512).clamp(1, u64::from(u32::MAX / 512)) as u32
    }

    /// `struct virtio_blk_config` (5.2.4).
    fn config(&self) -> [u8; 60] {
        let mut config = [0; 60];
        let mut put = |at: usize, bytes: &[u8]| config[at..at + bytes.len()].copy_from_slice(bytes);
        put(0, &self.sectors().to_le_bytes());
        put(8, &SIZE_MAX.to_le_bytes());
        put(12, &SEG_MAX.to_le_bytes());
        put(20, &self.disk.logical_block_size().to_le_bytes());
        put(34, &(self.queue_sizes.len() as u16).to_le_bytes());
        let capabilities = self.disk.capabilities();
        if let Some(limits) = capabilities.discard {
            put(36, &Self::range_sectors(limits.max_bytes).to_le_bytes());
            put(40, &MAX_RANGES.to_le_bytes());
            put(44, &(limits.granularity / 512).max(1).to_le_bytes());
        }
        if let Some(limits) = capabilities.write_zeroes {
            put(48, &Self::range_sectors(limits.max_bytes).to_le_bytes());
            put(52, &MAX_RANGES.to_le_bytes());
            put(56, &[u8::from(limits.unmap)]);
        }
        config
    }
}

impl VirtioDevice for Blk {
    fn kind(&self) -> DeviceKind {
        DeviceKind::Block
    }

    fn queue_sizes(&self) -> &[u16] {
        &self.queue_sizes
    }

    fn features(&self) -> u64 {
        let capabilities = self.disk.capabilities();
        let on = |condition: bool, bit: u64| if condition { bit } else { 0 };
        feature::SIZE_MAX
            | feature::SEG_MAX
            | feature::BLK_SIZE
            | feature::FLUSH
            | on(capabilities.read_only, feature::RO)
            | on(self.queue_sizes.len() > 1, feature::MQ)
            | on(capabilities.discard.is_some() && !capabilities.read_only, feature::DISCARD)
            | on(capabilities.write_zeroes.is_some() && !capabilities.read_only, feature::WRITE_ZEROES)
    }

    fn config_read(&self, offset: u64, data: &mut [u8]) {
        read_bytes_at(&self.config(), offset, data);
    }

    fn config_write(&self, _offset: u64, _data: &[u8]) {}

    fn activate(&self, features: u64, _handle: &DeviceHandle) {
        self.write_through.store(features & feature::FLUSH == 0, Ordering::SeqCst);
    }

    fn reset(&self) {
        self.write_through.store(false, Ordering::SeqCst);
    }

    fn process_queue(&self, _index: u16, run: &mut QueueRun<'_>) -> Result<Progress, QueueError> {
        run.pump(|chain, inline| self.request(chain, inline))
    }

    fn save(&self) -> Vec<u8> {
        let state = BlkStateV1 {
            capacity_sectors: Some(self.sectors()),
            read_only: Some(self.disk.capabilities().read_only),
            block_size: Some(self.disk.logical_block_size()),
        };
        state.encode_to_vec()
    }

    fn restore(&self, state: &[u8]) -> Result<(), RestoreError> {
        let saved = BlkStateV1::decode(state)
            .map_err(|source| RestoreError::Decode { device: "virtio-blk", source })?;
        let check = |what, saved: Option<u64>, have| match saved {
            Some(saved) if saved != have => Err(RestoreError::Mismatch { what, saved, have }),
            _ => Ok(()),
        };
        check("disk capacity in sectors", saved.capacity_sectors, self.sectors())?;
        let block_size = u64::from(self.disk.logical_block_size());
        check("disk block size", saved.block_size.map(u64::from), block_size)?;
        let read_only = u64::from(self.disk.capabilities().read_only);
        check("read-only property of a disk", saved.read_only.map(u64::from), read_only)
    }
}
