//! One request: the buffers of a descriptor chain (VIRTIO 1.2, 2.7.5).

use std::marker::PhantomData;

use atoll_foundation::uring::TransferBuffers;
use atoll_foundation::volatile_io;
use atoll_machine::memory::{FlatView, GuestBuffers, PageNotes};
use vm_memory::{Bytes, GuestAddress, VolatileSlice};

use super::{MAX_CHAIN, QueueError};

const F_NEXT: u16 = 1;
const F_WRITE: u16 = 2;
const F_INDIRECT: u16 = 4;
const DESCRIPTOR_BYTES: u64 = 16;

/// A descriptor as it lies in guest memory.
#[derive(Clone, Copy)]
struct Descriptor {
    addr: u64,
    len: u32,
    flags: u16,
    next: u16,
}

impl Descriptor {
    fn read(memory: &FlatView, table: u64, index: u16) -> Result<Self, QueueError> {
        let gpa = table.wrapping_add(u64::from(index) * DESCRIPTOR_BYTES);
        let mut bytes = [0; 16];
        memory
            .read_slice(&mut bytes, GuestAddress(gpa))
            .map_err(|_| QueueError::NotRam { gpa, len: DESCRIPTOR_BYTES })?;
        let value = u128::from_le_bytes(bytes);
        Ok(Self {
            addr: value as u64,
            len: (value >> 64) as u32,
            flags: (value >> 96) as u16,
            next: (value >> 112) as u16,
        })
    }
}

/// A list of pieces of guest memory that is read or written from front to back.
#[derive(Default)]
pub struct Buffers<'a> {
    slices: Vec<VolatileSlice<'static, PageNotes>>,
    /// Slices before this one are used up.
    first: usize,
    remaining: u64,
    run: PhantomData<&'a FlatView>,
}

impl<'a> Buffers<'a> {
    fn push(&mut self, memory: &FlatView, gpa: u64, len: u32) -> Result<(), QueueError> {
        let error = || QueueError::NotRam { gpa, len: u64::from(len) };
        if gpa.checked_add(u64::from(len)).is_none() {
            return Err(error());
        }
        self.slices.extend(memory.slices(gpa, u64::from(len)).map_err(|_| error())?);
        self.remaining += u64::from(len);
        Ok(())
    }

    /// Bytes left.
    pub fn remaining(&self) -> u64 {
        self.remaining
    }

    /// What is left, as slices.
    pub fn slices(&self) -> &[VolatileSlice<'a, PageNotes>] {
        self.slices.get(self.first..).unwrap_or_default()
    }

    /// What is left, to go on being used after the run.
    pub fn into_owned(mut self) -> OwnedBuffers {
        self.slices.drain(..self.first.min(self.slices.len()));
        OwnedBuffers(GuestBuffers::new(self.slices))
    }

    /// Copies the next bytes into `to`, as many as there are. Returns their number.
    pub fn read(&mut self, to: &mut [u8]) -> usize {
        let mut done = 0;
        while let Some(slice) = self.slices.get(self.first).filter(|_| done < to.len()) {
            let n = slice.len().min(to.len() - done);
            slice.copy_to(&mut to[done..done + n]);
            done += n;
            self.advance(n);
        }
        done
    }

    /// Stores `from` into the next bytes, as many as there are. Returns their number.
    pub fn write(&mut self, from: &[u8]) -> usize {
        let mut done = 0;
        while let Some(slice) = self.slices.get(self.first).filter(|_| done < from.len()) {
            let n = slice.len().min(from.len() - done);
            slice.copy_from(&from[done..done + n]);
            done += n;
            self.advance(n);
        }
        done
    }

    /// Drops `n` bytes of the first slice, which has that many.
    fn advance(&mut self, n: usize) {
        self.remaining -= n as u64;
        let slice = &mut self.slices[self.first];
        match slice.offset(n) {
            Ok(rest) if !rest.is_empty() => *slice = rest,
            _ => self.first += 1,
        }
    }

    /// Cuts the next `n` bytes off, or all if there are fewer.
    pub fn split_to(&mut self, n: u64) -> Buffers<'a> {
        let mut front = Buffers::default();
        while let Some(slice) = self.slices.get(self.first).filter(|_| front.remaining < n) {
            let take = (n - front.remaining).min(slice.len() as u64) as usize;
            if let Ok(part) = slice.subslice(0, take) {
                front.slices.push(part);
            }
            front.remaining += take as u64;
            self.advance(take);
        }
        front
    }
}

/// Buffers that outlast the run in which they were taken; the RAM under them stays valid as long as they are.
#[derive(Default)]
pub struct OwnedBuffers(GuestBuffers);

impl OwnedBuffers {
    /// The buffers, with dirty tracking.
    pub fn tracked(&self) -> &[VolatileSlice<'static, PageNotes>] {
        self.0.slices()
    }

    /// Notes that the host wrote into them past the tracking, as it does through [`TransferBuffers`].
    pub fn mark_dirty(&self) {
        self.0.mark_dirty();
    }
}

impl TransferBuffers for OwnedBuffers {
    fn slices(&self) -> Vec<VolatileSlice<'_>> {
        self.0.slices().iter().map(volatile_io::without_bitmap).collect()
    }
}

/// One request of the driver.
pub struct Chain<'a> {
    head: u16,
    /// What the device reads.
    pub readable: Buffers<'a>,
    /// What the device writes.
    pub writable: Buffers<'a>,
}

impl<'a> Chain<'a> {
    /// Follows the chain from descriptor `head` of the table of `size` at `table`, through an indirect table if
    /// there is one.
    pub(super) fn collect(
        memory: &'a FlatView,
        mut table: u64,
        size: u16,
        head: u16,
        allow_indirect: bool,
    ) -> Result<Self, QueueError> {
        let mut chain = Self { head, readable: Buffers::default(), writable: Buffers::default() };
        let mut len = u32::from(size);
        let (mut index, mut in_table, mut seen) = (head, false, 0u32);
        loop {
            if u32::from(index) >= len {
                return Err(QueueError::DescriptorIndex { index, len });
            }
            seen += 1;
            let limit = len.min(u32::from(MAX_CHAIN));
            if seen > limit {
                return Err(QueueError::ChainTooLong(limit));
            }
            let d = Descriptor::read(memory, table, index)?;
            if d.flags & F_INDIRECT != 0 {
                let fits = d.len != 0 && u64::from(d.len) % DESCRIPTOR_BYTES == 0;
                // Linux sets no other flag. Buffers before the table are legal (2.7.5.3.1), a successor is not.
                if in_table || !allow_indirect || d.flags & F_NEXT != 0 || !fits {
                    return Err(QueueError::Indirect { flags: d.flags, len: d.len });
                }
                (table, len, index, in_table) = (d.addr, d.len / DESCRIPTOR_BYTES as u32, 0, true);
                seen = 0;
                continue;
            }
            chain.add(memory, d)?;
            if d.flags & F_NEXT == 0 {
                return Ok(chain);
            }
            index = d.next;
        }
    }

    fn add(&mut self, memory: &'a FlatView, d: Descriptor) -> Result<(), QueueError> {
        if d.flags & F_WRITE != 0 {
            self.writable.push(memory, d.addr, d.len)?;
        } else if self.writable.slices.is_empty() {
            self.readable.push(memory, d.addr, d.len)?;
        } else {
            return Err(QueueError::Order);
        }
        if self.readable.remaining + self.writable.remaining > u64::from(u32::MAX) {
            return Err(QueueError::BytesTooMany);
        }
        Ok(())
    }

    /// Number of the first descriptor, by which the driver knows the request.
    pub fn head(&self) -> u16 {
        self.head
    }
}
