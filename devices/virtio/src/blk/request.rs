//! One request of the block device (VIRTIO 1.2, 5.2.6).
//!
//! ```text
//! readable: header (16 bytes), data to write or ranges      writable: data read, then one status byte
//! ```
//!
//! Where the pieces are cut into descriptors is the driver's choice (2.7.4). A request that has a place for the
//! status gets one, whatever else is wrong with it; one that has none stops the device.

use std::sync::atomic::Ordering;

use atoll_foundation::log_limited;
use atoll_storage::disk::{read_tracked, write_tracked};
use atoll_storage::{DiskError, DiskErrorKind};

use super::metrics::BlkMetrics;
use super::{Blk, INLINE_BYTES, MAX_BYTES, MAX_RANGES};
use crate::queue::{Buffers, Chain, QueueError, Step};

/// Request types (5.2.6).
pub(super) mod kind {
    pub(in super::super) const IN: u32 = 0;
    pub(in super::super) const OUT: u32 = 1;
    pub(in super::super) const FLUSH: u32 = 4;
    pub(in super::super) const GET_ID: u32 = 8;
    pub(in super::super) const DISCARD: u32 = 11;
    pub(in super::super) const WRITE_ZEROES: u32 = 13;
}

/// Values of the status byte.
pub(super) mod status {
    pub(in super::super) const OK: u8 = 0;
    pub(in super::super) const IOERR: u8 = 1;
    pub(in super::super) const UNSUPP: u8 = 2;
}

const SECTOR: u64 = 512;
/// Range flag of write-zeroes: the space may be released.
const FLAG_UNMAP: u32 = 1;

/// Why a request did not succeed.
enum Failure {
    /// Its form or range is wrong.
    Bad,
    /// The device does not have it.
    Unsupported,
    /// The disk failed it.
    Disk(DiskError),
}

impl From<DiskError> for Failure {
    fn from(error: DiskError) -> Self {
        match error.kind() {
            DiskErrorKind::OutOfRange | DiskErrorKind::ReadOnly => Self::Bad,
            DiskErrorKind::Unsupported => Self::Unsupported,
            _ => Self::Disk(error),
        }
    }
}

/// One range of a discard or write-zeroes request, checked.
#[derive(Clone, Copy)]
struct Range {
    offset: u64,
    len: u64,
    unmap: bool,
}

impl Blk {
    /// Carries out one request, or declines it on a vCPU thread.
    pub(super) fn request(&self, chain: &mut Chain<'_>, inline: bool) -> Result<Step, QueueError> {
        let Some(data_len) = chain.writable.remaining().checked_sub(1) else {
            return Err(QueueError::Request("a block request has no place for its status"));
        };
        let mut header = [0; 16];
        let complete = chain.readable.read(&mut header) == header.len();
        let header = u128::from_le_bytes(header);
        let (kind, sector) = (header as u32, (header >> 64) as u64);
        if inline && complete && self.slow(kind, chain.readable.remaining().max(data_len)) {
            return Ok(Step::Defer);
        }
        let data = chain.writable.split_to(data_len);
        let result =
            if complete { self.dispatch(kind, sector, &mut chain.readable, data) } else { Err(Failure::Bad) };
        let (status, written) = self.conclude(result, data_len);
        chain.writable.write(&[status]);
        Ok(Step::Done(written))
    }

    /// Whether a vCPU should not wait for this.
    fn slow(&self, kind: u32, len: u64) -> bool {
        match kind {
            kind::IN => len > INLINE_BYTES,
            kind::OUT => len > INLINE_BYTES || self.write_through.load(Ordering::SeqCst),
            kind::FLUSH | kind::DISCARD | kind::WRITE_ZEROES => true,
            _ => false,
        }
    }

    fn dispatch(
        &self,
        kind: u32,
        sector: u64,
        readable: &mut Buffers<'_>,
        mut data: Buffers<'_>,
    ) -> Result<(), Failure> {
        let m = &self.metrics;
        match kind {
            kind::IN => {
                let (offset, len) = self.transfer_range(sector, data.remaining())?;
                read_tracked(&*self.disk, offset, data.slices())?;
                BlkMetrics::add(&m.reads, 1);
                BlkMetrics::add(&m.read_bytes, len);
            }
            kind::OUT => {
                let (offset, len) = self.transfer_range(sector, readable.remaining())?;
                write_tracked(&*self.disk, offset, readable.slices())?;
                if self.write_through.load(Ordering::SeqCst) {
                    self.disk.flush()?;
                }
                BlkMetrics::add(&m.writes, 1);
                BlkMetrics::add(&m.written_bytes, len);
            }
            kind::FLUSH => {
                self.disk.flush()?;
                BlkMetrics::add(&m.flushes, 1);
            }
            kind::GET_ID => {
                data.write(&self.serial);
                BlkMetrics::add(&m.identifications, 1);
            }
            kind::DISCARD => {
                let limits = self.disk.capabilities().discard.ok_or(Failure::Unsupported)?;
                self.each_range(readable, Self::range_sectors(limits.max_bytes), 0, |r| {
                    self.disk.discard(r.offset, r.len)
                })?;
                BlkMetrics::add(&m.discards, 1);
            }
            kind::WRITE_ZEROES => {
                let limits = self.disk.capabilities().write_zeroes.ok_or(Failure::Unsupported)?;
                self.each_range(readable, Self::range_sectors(limits.max_bytes), FLAG_UNMAP, |r| {
                    self.disk.write_zeroes(r.offset, r.len, r.unmap && limits.unmap)
                })?;
                BlkMetrics::add(&m.zeroes, 1);
            }
            _ => return Err(Failure::Unsupported),
        }
        Ok(())
    }

    /// Offset and length in bytes of a transfer, checked against the disk.
    fn transfer_range(&self, sector: u64, len: u64) -> Result<(u64, u64), Failure> {
        if len == 0 || !len.is_multiple_of(SECTOR) || len > MAX_BYTES {
            return Err(Failure::Bad);
        }
        Ok((self.range_in_disk(sector, len)?, len))
    }

    /// The byte offset of `sector` if `len` bytes from there are within the disk.
    fn range_in_disk(&self, sector: u64, len: u64) -> Result<u64, Failure> {
        let offset = sector.checked_mul(SECTOR).ok_or(Failure::Bad)?;
        match offset.checked_add(len) {
            Some(end) if end <= self.disk.capacity_bytes() => Ok(offset),
            _ => Err(Failure::Bad),
        }
    }

    /// Checks all ranges of a discard or zeroing (5.2.6.2), then does `act` for each.
    fn each_range(
        &self,
        readable: &mut Buffers<'_>,
        max_sectors: u32,
        allowed_flags: u32,
        act: impl Fn(Range) -> Result<(), DiskError>,
    ) -> Result<(), Failure> {
        if self.disk.capabilities().read_only {
            return Err(Failure::Bad);
        }
        let bytes = readable.remaining();
        if bytes == 0 || !bytes.is_multiple_of(16) || bytes / 16 > u64::from(MAX_RANGES) {
            return Err(Failure::Bad);
        }
        let mut ranges = Vec::with_capacity(MAX_RANGES as usize);
        for _ in 0..bytes / 16 {
            let mut raw = [0; 16];
            readable.read(&mut raw);
            let raw = u128::from_le_bytes(raw);
            let (sector, sectors, flags) = (raw as u64, (raw >> 64) as u32, (raw >> 96) as u32);
            if flags & !allowed_flags != 0 {
                return Err(Failure::Unsupported);
            }
            if sectors > max_sectors {
                return Err(Failure::Bad);
            }
            let len = u64::from(sectors) * SECTOR;
            let offset = self.range_in_disk(sector, len)?;
            ranges.push(Range { offset, len, unmap: flags & FLAG_UNMAP != 0 });
        }
        for range in ranges.into_iter().filter(|r| r.len != 0) {
            act(range)?;
        }
        Ok(())
    }

    /// Status byte and number of bytes written, which ends with the status byte.
    fn conclude(&self, result: Result<(), Failure>, data_len: u64) -> (u8, u32) {
        let status = match result {
            Ok(()) => status::OK,
            Err(Failure::Bad) => {
                BlkMetrics::add(&self.metrics.refused, 1);
                status::IOERR
            }
            Err(Failure::Unsupported) => {
                BlkMetrics::add(&self.metrics.refused, 1);
                status::UNSUPP
            }
            Err(Failure::Disk(error)) => {
                BlkMetrics::add(&self.metrics.errors, 1);
                log_limited!(error, "virtio-blk: {error}");
                status::IOERR
            }
        };
        // A chain is at most 4 GiB - 1 long.
        (status, (data_len + 1) as u32)
    }
}
