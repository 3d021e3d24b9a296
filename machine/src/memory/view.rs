//! What an address space adds up to: a sorted list of ranges that do not overlap.

use std::cmp::Ordering;
use std::fmt;
use std::sync::Arc;

use vm_memory::bitmap::BS;
use vm_memory::{
    GuestAddress, GuestMemoryBackend, GuestMemoryError, GuestMemoryRegion, GuestMemoryRegionBytes,
    GuestMemoryResult, GuestUsize, MemoryRegionAddress, VolatileSlice,
};

use super::ram::{PageNotes, RamBlock};
use crate::bus::MmioDevice;

/// What answers at a [`FlatRange`].
#[derive(Clone)]
pub enum FlatTarget {
    /// Memory, read and written.
    Ram {
        /// The block.
        block: Arc<RamBlock>,
        /// Offset into the block of the range's first byte.
        offset: u64,
    },
    /// Memory that is read and executed; writes go to the device, or nowhere.
    Rom {
        /// The block.
        block: Arc<RamBlock>,
        /// Offset into the block of the range's first byte.
        offset: u64,
        /// Takes the writes.
        writes: Option<Arc<dyn MmioDevice>>,
        /// Offset into the device of the range's first byte.
        device_offset: u64,
    },
    /// A device.
    Mmio {
        /// The device.
        device: Arc<dyn MmioDevice>,
        /// Offset into the device of the range's first byte.
        offset: u64,
    },
}

impl FlatTarget {
    /// The same target seen from `by` bytes further on.
    pub(super) fn advanced(&self, by: u64) -> Self {
        let mut target = self.clone();
        match &mut target {
            Self::Ram { offset, .. } | Self::Mmio { offset, .. } => *offset = offset.wrapping_add(by),
            Self::Rom { offset, device_offset, .. } => {
                *offset = offset.wrapping_add(by);
                *device_offset = device_offset.wrapping_add(by);
            }
        }
        target
    }

    /// Whether `next` continues `self` after `len` bytes.
    pub(super) fn continues(&self, len: u64, next: &Self) -> bool {
        match (self, next) {
            (Self::Ram { block: a, offset: x }, Self::Ram { block: b, offset: y }) => {
                Arc::ptr_eq(a, b) && x.wrapping_add(len) == *y
            }
            (Self::Mmio { device: a, offset: x }, Self::Mmio { device: b, offset: y }) => {
                same_device(a, b) && x.wrapping_add(len) == *y
            }
            (
                Self::Rom { block: a, offset: x, writes: v, device_offset: p },
                Self::Rom { block: b, offset: y, writes: w, device_offset: q },
            ) => {
                let devices = match (v, w) {
                    (None, None) => true,
                    (Some(v), Some(w)) => same_device(v, w) && p.wrapping_add(len) == *q,
                    _ => false,
                };
                Arc::ptr_eq(a, b) && x.wrapping_add(len) == *y && devices
            }
            _ => false,
        }
    }
}

fn same_device(a: &Arc<dyn MmioDevice>, b: &Arc<dyn MmioDevice>) -> bool {
    std::ptr::addr_eq(Arc::as_ptr(a), Arc::as_ptr(b))
}

impl fmt::Debug for FlatTarget {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Ram { block, offset } => write!(f, "Ram({}+{offset:#x})", block.name()),
            Self::Rom { block, offset, writes: None, .. } => write!(f, "Rom({}+{offset:#x})", block.name()),
            Self::Rom { block, offset, writes: Some(_), device_offset } => {
                write!(f, "RomDevice({}+{offset:#x}, device+{device_offset:#x})", block.name())
            }
            Self::Mmio { offset, .. } => write!(f, "Mmio(device+{offset:#x})"),
        }
    }
}

/// A range of guest-physical addresses with one target. Starts and lengths of RAM are whole pages unless an
/// MMIO region of part of a page lies over it.
#[derive(Clone, Debug)]
pub struct FlatRange {
    /// First address.
    pub start: u64,
    /// Bytes.
    pub len: u64,
    /// What answers.
    pub target: FlatTarget,
}

impl FlatRange {
    /// First address after the range.
    pub fn end(&self) -> u64 {
        self.start.saturating_add(self.len)
    }
}

/// An immutable picture of an [`super::AddressSpace`]: sorted ranges that do not overlap.
///
/// It implements vm-memory's `GuestMemoryBackend` over its RAM, so kernel loaders and the like can use it.
#[derive(Debug, Default)]
pub struct FlatView {
    ranges: Vec<FlatRange>,
    ram: Vec<RamRegion>,
    generation: u64,
}

impl FlatView {
    pub(super) fn new(ranges: Vec<FlatRange>, generation: u64) -> Self {
        debug_assert!(ranges.windows(2).all(|w| w[0].end() <= w[1].start));
        let ram = ranges.iter().filter_map(RamRegion::of).collect();
        Self { ranges, ram, generation }
    }

    /// The range that holds `gpa`.
    #[inline]
    pub fn lookup(&self, gpa: u64) -> Option<&FlatRange> {
        let after = self.ranges.partition_point(|r| r.start <= gpa);
        let range = self.ranges.get(after.checked_sub(1)?)?;
        (gpa < range.end()).then_some(range)
    }

    /// All ranges, ascending.
    pub fn ranges(&self) -> &[FlatRange] {
        &self.ranges
    }

    /// Start of the first range above `gpa`, or `None`.
    pub(super) fn next_start(&self, gpa: u64) -> Option<u64> {
        self.ranges.get(self.ranges.partition_point(|r| r.start <= gpa)).map(|r| r.start)
    }

    /// The generation of the address space that this view shows.
    pub fn generation(&self) -> u64 {
        self.generation
    }

    /// Walks `len` bytes of RAM from `gpa`, run by run. Fails, possibly after some runs, where RAM ends.
    pub(super) fn walk_ram(
        &self,
        gpa: u64,
        len: u64,
        rom_too: bool,
        mut run: impl FnMut(&Arc<RamBlock>, u64, u64) -> Result<(), super::MemoryError>,
    ) -> Result<(), super::MemoryError> {
        let mut at = gpa;
        let mut rest = len;
        while rest > 0 {
            let range = self.lookup(at).ok_or(super::MemoryError::NotRam { gpa: at })?;
            let (block, offset) = match &range.target {
                FlatTarget::Ram { block, offset } => (block, *offset),
                FlatTarget::Rom { block, offset, .. } if rom_too => (block, *offset),
                _ => return Err(super::MemoryError::NotRam { gpa: at }),
            };
            let inside = at - range.start;
            let now = rest.min(range.len - inside);
            run(block, offset + inside, now)?;
            at = at.wrapping_add(now);
            rest -= now;
        }
        Ok(())
    }
}

/// One range of RAM of a [`FlatView`], as vm-memory sees it.
#[derive(Clone, Debug)]
pub struct RamRegion {
    start: u64,
    len: u64,
    block: Arc<RamBlock>,
    offset: u64,
}

impl RamRegion {
    fn of(range: &FlatRange) -> Option<Self> {
        match &range.target {
            FlatTarget::Ram { block, offset } => {
                Some(Self { start: range.start, len: range.len, block: block.clone(), offset: *offset })
            }
            _ => None,
        }
    }

    /// The block and the offset into it where the region starts.
    pub fn backing(&self) -> (&Arc<RamBlock>, u64) {
        (&self.block, self.offset)
    }
}

impl GuestMemoryRegion for RamRegion {
    type B = PageNotes;

    fn len(&self) -> GuestUsize {
        self.len
    }

    fn start_addr(&self) -> GuestAddress {
        GuestAddress(self.start)
    }

    fn bitmap(&self) -> BS<'_, PageNotes> {
        PageNotes::new(&self.block, self.offset)
    }

    fn get_host_address(&self, addr: MemoryRegionAddress) -> GuestMemoryResult<*mut u8> {
        if addr.0 < self.len {
            Ok(self.block.as_ptr().wrapping_add((self.offset + addr.0) as usize))
        } else {
            Err(GuestMemoryError::InvalidBackendAddress)
        }
    }

    fn get_slice(
        &self,
        offset: MemoryRegionAddress,
        count: usize,
    ) -> GuestMemoryResult<VolatileSlice<'_, PageNotes>> {
        match offset.0.checked_add(count as u64) {
            Some(end) if end <= self.len => self
                .block
                .volatile_slice(self.offset + offset.0, count as u64)
                .map_err(|_| GuestMemoryError::InvalidBackendAddress),
            _ => Err(GuestMemoryError::InvalidBackendAddress),
        }
    }
}

impl GuestMemoryRegionBytes for RamRegion {}

impl GuestMemoryBackend for FlatView {
    type R = RamRegion;

    fn num_regions(&self) -> usize {
        self.ram.len()
    }

    fn find_region(&self, addr: GuestAddress) -> Option<&RamRegion> {
        let at = self
            .ram
            .binary_search_by(|r| {
                if r.start > addr.0 {
                    Ordering::Greater
                } else if addr.0 - r.start >= r.len {
                    Ordering::Less
                } else {
                    Ordering::Equal
                }
            })
            .ok()?;
        self.ram.get(at)
    }

    fn iter(&self) -> impl Iterator<Item = &RamRegion> {
        self.ram.iter()
    }
}
