//! The block device (VIRTIO 1.2, section 5.2).
//!
//! ```text
//!  ring ──take──► throttle ──► no waiting needed? ─yes─► done at once, on the thread that notified
//!   ▲                 │ later       │ no
//!   │                 ▼             ▼
//!   │          put back, timer   engine: many under way, ended in any order, on other threads
//!   │                                │ ended                    │ no space, host error
//!   └──hand back──◄── `ended` ◄──────┴────────◄── again ◄── kept until told (`Blk::retry`)
//! ```
//!
//! Data goes straight between the disk and guest memory; a request owns what it needs of both until it is handed
//! back. A flush covers the writes that were handed back before it was taken, as a driver may expect (5.2.6.2). What
//! a request means is in `request`, its way through the engine in `flight`; what a flush promises is
//! [`atoll_storage::Disk`]'s.
//!
//! A driver that does not accept VIRTIO_BLK_F_FLUSH gets a disk that writes through (5.2.6.2): each write is
//! flushed before it is reported. A machine that records its inputs carries out everything inside the run.
//!
//! Carrying out at once what needs no waiting is worth a case of its own. For requests that the page cache answers, the
//! time of one in microseconds (driver's side included; the measurement is in `flight_tests`), as the range of two
//! runs on a host of two processors with other work, where single figures mean little and the order does:
//!
//! | request | at once | io_uring | threads |
//! |---|---|---|---|
//! | read 4 KiB, depth 1 | 4 to 26 | 11 to 31 | 22 to 28 |
//! | read 4 KiB, depth 32 | 2 to 5 | 15 to 32 | 28 to 38 |
//! | write 4 KiB, depth 1 | 9 to 14 | 37 to 88 | 44 to 48 |
//! | read 64 KiB, depth 32 | 3 to 18 | 32 to 41 | 17 to 32 |
//!
//! Of transfers of 1 MiB neither way was reliably faster, and at once they would keep a vCPU from its guest: see
//! [`INLINE_BYTES`].
//!
//! Lock order: a queue's lock (the transport's), then one of this device's, which are leaves.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, Weak};

use atoll_foundation::throttle::{RateLimits, Throttle};
use atoll_storage::{AsyncDisk, Disk, DiskError, Engine};
use prost::Message;

use crate::device::{DeviceHandle, DeviceKind, RestoreError, VirtioDevice, read_bytes_at};
use crate::lock;
use crate::queue::{Progress, QueueError, QueueRun};

mod flight;
#[cfg(test)]
mod flight_tests;
pub mod metrics;
mod request;
pub mod saved_state;
#[cfg(test)]
mod tests;

use flight::Flight;
use metrics::BlkMetrics;
use saved_state::{BlkStateV1, TakenRequestV1};

/// Bytes of a disk's serial number (5.2.6.1).
pub const SERIAL_BYTES: usize = 20;
/// Entries of each queue.
pub const QUEUE_SIZE: u16 = 256;
/// Most queues: as many as Linux can use with 64 vCPUs, far below what the notification page holds.
pub const MAX_QUEUES: u16 = 64;
/// Longest transfer that the thread that notified carries out itself, if it need not wait for the device.
pub const INLINE_BYTES: u64 = 64 << 10;

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

/// Called when requests were kept because of an error of the host, with the first one's.
pub type OnTrouble = Arc<dyn Fn(&DiskError) + Send + Sync>;

/// How a disk appears to the guest, and how it is driven.
#[derive(Clone)]
pub struct BlkOptions {
    /// Serial number, cut to [`SERIAL_BYTES`].
    pub serial: String,
    /// Request queues, 1 to [`MAX_QUEUES`]: usually one a vCPU.
    pub queues: u16,
    /// What reads and writes may use of the disk. Discards and zeroing count as operations without bytes, flushes
    /// not at all.
    pub limits: RateLimits,
    /// With it, a request that fails for lack of space or by an error of the host is kept, not reported to the guest,
    /// and this is called; [`Blk::retry`] has the request carried out again. It is called on any thread and must not
    /// wait for the device.
    pub on_trouble: Option<OnTrouble>,
    /// Whether the thread that notifies carries out what needs no waiting.
    pub inline: bool,
}

impl Default for BlkOptions {
    fn default() -> Self {
        Self {
            serial: String::new(),
            queues: 1,
            limits: RateLimits::default(),
            on_trouble: None,
            inline: true,
        }
    }
}

/// A block device over a [`Disk`].
pub struct Blk {
    me: Weak<Self>,
    disk: Arc<dyn Disk>,
    engine: Arc<dyn AsyncDisk>,
    serial: [u8; SERIAL_BYTES],
    queue_sizes: Vec<u16>,
    inline: bool,
    write_through: AtomicBool,
    throttle: Throttle,
    on_trouble: Option<OnTrouble>,
    handle: Mutex<DeviceHandle>,
    flight: Flight,
    metrics: BlkMetrics,
}

impl Blk {
    /// A block device over `disk`, with an engine of its own. It is read-only when the disk is.
    pub fn new(disk: Arc<dyn Disk>, options: &BlkOptions) -> Arc<Self> {
        Self::with_engine(Engine::auto(disk), options)
    }

    /// A block device over the disk of `engine`, which nobody else submits to.
    pub fn with_engine(engine: Arc<dyn AsyncDisk>, options: &BlkOptions) -> Arc<Self> {
        let mut serial = [0; SERIAL_BYTES];
        for (to, from) in serial.iter_mut().zip(options.serial.bytes()) {
            *to = from;
        }
        let queue_sizes = vec![QUEUE_SIZE; usize::from(options.queues.clamp(1, MAX_QUEUES))];
        Arc::new_cyclic(|me| Self {
            me: me.clone(),
            disk: engine.disk().clone(),
            engine,
            serial,
            flight: Flight::new(queue_sizes.len()),
            queue_sizes,
            inline: options.inline,
            write_through: AtomicBool::new(false),
            throttle: Throttle::new(options.limits),
            on_trouble: options.on_trouble.clone(),
            handle: Mutex::default(),
            metrics: BlkMetrics::default(),
        })
    }

    /// What reads and writes may use.
    pub fn limits(&self) -> RateLimits {
        self.throttle.limits()
    }

    /// Changes what reads and writes may use, at once.
    pub fn set_limits(&self, limits: RateLimits) {
        self.throttle.set(limits);
        // What waits for the old limits need not any more.
        let handle = self.handle();
        for index in 0..self.queue_sizes.len() {
            handle.kick(index as u16);
        }
    }

    /// Makes the disk `capacity` bytes large and tells the driver.
    pub fn resize(&self, capacity: u64) -> Result<(), DiskError> {
        self.disk.resize(capacity)?;
        self.handle().config_changed();
        Ok(())
    }

    fn handle(&self) -> DeviceHandle {
        lock(&self.handle).clone()
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

    fn activate(&self, features: u64, handle: &DeviceHandle) {
        self.write_through.store(features & feature::FLUSH == 0, Ordering::SeqCst);
        *lock(&self.handle) = handle.clone();
    }

    fn reset(&self) {
        self.engine.drain();
        self.flight.forget();
        self.write_through.store(false, Ordering::SeqCst);
    }

    fn process_queue(&self, index: u16, run: &mut QueueRun<'_>) -> Result<Progress, QueueError> {
        self.hand_back(index, run)?;
        self.take_restored(index, run)?;
        let handle = self.handle();
        let size = usize::from(run.size());
        run.pump(|chain, inline| self.request(index, size, chain, inline, &handle))
    }

    fn drain(&self) {
        self.engine.drain();
    }

    fn finish_queue(&self, index: u16, run: &mut QueueRun<'_>) -> Result<(), QueueError> {
        self.hand_back(index, run)
    }

    fn save(&self) -> Vec<u8> {
        let taken = |(queue, head): (u16, u16)| TakenRequestV1 {
            queue: Some(u32::from(queue)),
            head: Some(u32::from(head)),
        };
        let state = BlkStateV1 {
            capacity_sectors: Some(self.sectors()),
            read_only: Some(self.disk.capabilities().read_only),
            block_size: Some(self.disk.logical_block_size()),
            taken: self.flight.taken().into_iter().map(taken).collect(),
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
        check("read-only property of a disk", saved.read_only.map(u64::from), read_only)?;
        let number = |n: Option<u32>| n.unwrap_or(0) as u16;
        self.flight.restore(saved.taken.iter().map(|taken| (number(taken.queue), number(taken.head))));
        Ok(())
    }
}
