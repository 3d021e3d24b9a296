//! One request of the block device (VIRTIO 1.2, 5.2.6).
//!
//! ```text
//! readable: header (16 bytes), data to write or ranges      writable: data read, then one status byte
//! ```
//!
//! Where the pieces are cut into descriptors is the driver's choice (2.7.4). A request that has a place for the
//! status gets one, whatever else is wrong with it; one that has none stops the device.

use std::sync::Arc;
use std::time::Instant;

use atoll_foundation::uring::TransferBuffers;
use atoll_storage::{DiskError, DiskErrorKind};

use super::flight::{Request, Work};
use super::metrics::BlkMetrics;
use super::{Blk, INLINE_BYTES, MAX_BYTES, MAX_RANGES};
use crate::device::DeviceHandle;
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

pub(super) const SECTOR: u64 = 512;
/// Range flag of write-zeroes: the space may be released.
const FLAG_UNMAP: u32 = 1;

/// Why a request did not succeed.
pub(super) enum Failure {
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
pub(super) struct Range {
    pub(super) offset: u64,
    pub(super) len: u64,
    pub(super) unmap: bool,
}

/// What a chain asks for.
enum Asked {
    /// Its answer, at once.
    Answer(Result<(), Failure>),
    /// The disk's work.
    Work(Work),
}

impl Blk {
    /// Takes one request of queue `index`: carries it out, has the engine do so, or leaves it for later.
    pub(super) fn request(
        &self,
        index: u16,
        size: usize,
        chain: &mut Chain<'_>,
        inline: bool,
        handle: &DeviceHandle,
    ) -> Result<Step, QueueError> {
        if !self.flight.has_room(index, size) {
            // What ends makes room, and has the queue looked at.
            return Ok(Step::Wait);
        }
        let (asked, data_len) = self.parse(chain)?;
        let work = match asked {
            Asked::Answer(result) => return Ok(self.answer(chain, result, data_len)),
            Asked::Work(work) => work,
        };
        let recorded = handle.is_recorded();
        if recorded && inline && Self::slow(&work) {
            return Ok(Step::Defer);
        }
        if let Some(bytes) = Self::cost(&work)
            && let Err(delay) = self.throttle.take(bytes, Instant::now())
        {
            handle.kick_after(index, delay);
            return Ok(Step::Wait);
        }
        let result = if recorded { Some(self.carry_out(&work)) } else { self.at_once(&work) };
        if let Some(result) = result {
            // An error that is to be waited for goes the long way, where it shows again.
            if recorded || result.as_ref().err().is_none_or(|error| !self.can_wait(error)) {
                let result = result.map_err(Failure::from).inspect(|()| self.count(&work));
                return Ok(self.answer(chain, result, data_len));
            }
        }
        self.launch(index, chain, work, data_len);
        Ok(Step::Pending)
    }

    /// As [`Blk::request`], for one that was taken before: `Some` with the bytes written if it is answered at once.
    pub(super) fn take_again(&self, index: u16, chain: &mut Chain<'_>) -> Result<Option<u32>, QueueError> {
        let (asked, data_len) = self.parse(chain)?;
        match asked {
            Asked::Answer(result) => match self.answer(chain, result, data_len) {
                Step::Done(written) => Ok(Some(written)),
                _ => Ok(None),
            },
            Asked::Work(work) => {
                self.launch(index, chain, work, data_len);
                Ok(None)
            }
        }
    }

    fn launch(&self, queue: u16, chain: &mut Chain<'_>, work: Work, data_len: u64) {
        let status = std::mem::take(&mut chain.writable).into_owned();
        self.start(Request { queue, head: chain.head(), work, step: 0, status, data_len });
    }

    /// Writes the status byte.
    fn answer(&self, chain: &mut Chain<'_>, result: Result<(), Failure>, data_len: u64) -> Step {
        let (status, written) = self.conclude(result, data_len);
        chain.writable.write(&[status]);
        Step::Done(written)
    }

    /// Says what a chain asks for, and how many bytes come before its status byte, which is all that is left of the
    /// chain afterwards.
    fn parse(&self, chain: &mut Chain<'_>) -> Result<(Asked, u64), QueueError> {
        let Some(data_len) = chain.writable.remaining().checked_sub(1) else {
            return Err(QueueError::Request("a block request has no place for its status"));
        };
        let mut header = [0; 16];
        let complete = chain.readable.read(&mut header) == header.len();
        let header = u128::from_le_bytes(header);
        let (kind, sector) = (header as u32, (header >> 64) as u64);
        let data = chain.writable.split_to(data_len);
        let asked = if complete {
            self.ask(kind, sector, &mut chain.readable, data).unwrap_or_else(|f| Asked::Answer(Err(f)))
        } else {
            Asked::Answer(Err(Failure::Bad))
        };
        Ok((asked, data_len))
    }

    fn ask(
        &self,
        kind: u32,
        sector: u64,
        readable: &mut Buffers<'_>,
        mut data: Buffers<'_>,
    ) -> Result<Asked, Failure> {
        let work = match kind {
            kind::IN => {
                let (offset, len) = self.transfer_range(sector, data.remaining())?;
                Work::Read { offset, len, data: Arc::new(data.into_owned()) }
            }
            kind::OUT => {
                let (offset, len) = self.transfer_range(sector, readable.remaining())?;
                if self.disk.capabilities().read_only {
                    return Err(Failure::Bad);
                }
                let data = Arc::new(std::mem::take(readable).into_owned());
                Work::Write { offset, len, data, flush: self.writes_through() }
            }
            kind::FLUSH => Work::Flush,
            kind::GET_ID => {
                data.write(&self.serial);
                BlkMetrics::add(&self.metrics.identifications, 1);
                return Ok(Asked::Answer(Ok(())));
            }
            kind::DISCARD => {
                let limits = self.disk.capabilities().discard.ok_or(Failure::Unsupported)?;
                Work::Discard(self.ranges(readable, Self::range_sectors(limits.max_bytes), 0)?)
            }
            kind::WRITE_ZEROES => {
                let limits = self.disk.capabilities().write_zeroes.ok_or(Failure::Unsupported)?;
                let mut ranges = self.ranges(readable, Self::range_sectors(limits.max_bytes), FLAG_UNMAP)?;
                ranges.iter_mut().for_each(|range| range.unmap &= limits.unmap);
                Work::WriteZeroes(ranges)
            }
            _ => return Err(Failure::Unsupported),
        };
        Ok(Asked::Work(work))
    }

    /// Whether a vCPU should not wait for this.
    fn slow(work: &Work) -> bool {
        match work {
            Work::Read { len, .. } => *len > INLINE_BYTES,
            Work::Write { len, flush, .. } => *len > INLINE_BYTES || *flush,
            Work::Flush | Work::Discard(_) | Work::WriteZeroes(_) => true,
        }
    }

    /// Does what needs no waiting; `None` if it does.
    fn at_once(&self, work: &Work) -> Option<Result<(), DiskError>> {
        if !self.inline || Self::slow(work) {
            return None;
        }
        match work {
            Work::Read { offset, data, .. } => {
                let result = self.disk.try_read_at(*offset, &data.slices());
                // Parts may have been read even if not all was there.
                data.mark_dirty();
                result
            }
            Work::Write { offset, data, .. } => self.disk.try_write_at(*offset, &data.slices()),
            _ => None,
        }
    }

    /// Offset and length in bytes of a transfer, checked against the disk.
    fn transfer_range(&self, sector: u64, len: u64) -> Result<(u64, u64), Failure> {
        if len == 0 || !len.is_multiple_of(SECTOR) || len > MAX_BYTES {
            return Err(Failure::Bad);
        }
        Ok((self.range_in_disk(sector, len)?, len))
    }

    /// The ranges of a discard or zeroing, all checked (5.2.6.2); those without a sector left out.
    fn ranges(
        &self,
        readable: &mut Buffers<'_>,
        max_sectors: u32,
        allowed_flags: u32,
    ) -> Result<Vec<Range>, Failure> {
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
        ranges.retain(|range: &Range| range.len != 0);
        Ok(ranges)
    }
}
