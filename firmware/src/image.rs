//! What is written into guest RAM, and the placing of it: every part is checked against the guest's RAM and
//! against the parts before it.

use crate::LoadParams;
use crate::bytes::{align_down, align_up};
use crate::error::LoadError;
use crate::layout::{self, E820Entry, Range};
use std::borrow::Cow;

/// Bytes to write at a guest-physical address, followed by zeros to write.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Segment<'a> {
    /// What this is, for messages.
    pub what: &'static str,
    /// Guest-physical address of the first byte.
    pub address: u64,
    /// The bytes.
    pub data: Cow<'a, [u8]>,
    /// Number of zero bytes behind them. They have to be written: after a reboot in place RAM is not clear.
    pub zero_after: u64,
}

impl Segment<'_> {
    /// The addresses that the segment occupies, zeros included.
    pub fn range(&self) -> Range {
        let size = (self.data.len() as u64).saturating_add(self.zero_after);
        Range { start: self.address, end: self.address.saturating_add(size) }
    }
}

/// The parts of a call of [`crate::load`] that every loader needs.
#[derive(Clone, Copy)]
pub(crate) struct Request<'a, 'p> {
    pub(crate) initrd: Option<&'a [u8]>,
    pub(crate) cmdline: &'p str,
    pub(crate) params: &'p LoadParams<'p>,
}

/// Pages are this big; modules and initial RAM disks start on one.
pub(crate) const PAGE: u64 = 0x1000;

/// Collects segments, keeping them inside usable RAM and apart from each other.
pub(crate) struct Placement<'a> {
    usable: Vec<Range>,
    e820: Vec<E820Entry>,
    segments: Vec<Segment<'a>>,
    /// Ranges that hold no segment but must stay free, such as the room where a kernel unpacks itself.
    kept: Vec<(&'static str, Range)>,
}

impl<'a> Placement<'a> {
    pub(crate) fn new(params: &LoadParams<'_>) -> Placement<'a> {
        Placement {
            usable: params.map.usable_ram(params.reserved),
            e820: params.map.e820(params.reserved),
            segments: Vec::new(),
            kept: Vec::new(),
        }
    }

    /// The memory map to hand to the kernel.
    pub(crate) fn e820(&self) -> &[E820Entry] {
        &self.e820
    }

    /// Adds a segment.
    pub(crate) fn add(&mut self, segment: Segment<'a>) -> Result<(), LoadError> {
        let range = segment.range();
        self.check(segment.what, range)?;
        self.segments.push(segment);
        Ok(())
    }

    /// Adds segments whose memory is already kept by [`Placement::keep_boot_area`].
    pub(crate) fn add_boot(&mut self, segments: impl IntoIterator<Item = Segment<'a>>) {
        self.segments.extend(segments);
    }

    /// Keeps a range free of segments.
    pub(crate) fn keep(&mut self, what: &'static str, range: Range) -> Result<(), LoadError> {
        self.check(what, range)?;
        self.kept.push((what, range));
        Ok(())
    }

    /// Keeps the low memory free in which the boot structures are.
    pub(crate) fn keep_boot_area(&mut self) -> Result<(), LoadError> {
        let end = layout::BOOT_CMDLINE + layout::BOOT_CMDLINE_MAX;
        self.keep("the boot information", Range { start: layout::BOOT_GDT, end })
    }

    /// Keeps free what a kernel without page tables and `boot_params` is given: descriptor table, information and
    /// command line. Such a kernel brings its own stack and may lie right behind the information.
    pub(crate) fn keep_small_boot_area(&mut self) -> Result<(), LoadError> {
        let cmdline = Range::sized(layout::BOOT_CMDLINE, layout::BOOT_CMDLINE_MAX).unwrap_or_default();
        self.keep("the boot information", Range { start: layout::BOOT_GDT, end: layout::BOOT_PARAMS })?;
        self.keep("the command line", cmdline)
    }

    fn taken(&self) -> impl Iterator<Item = (&'static str, Range)> + '_ {
        self.segments.iter().map(|s| (s.what, s.range())).chain(self.kept.iter().copied())
    }

    fn check(&self, what: &'static str, range: Range) -> Result<(), LoadError> {
        if range.is_empty() {
            return Ok(());
        }
        if !self.usable.iter().any(|ram| ram.contains(&range)) {
            return Err(LoadError::NeedsMoreMemory { what, needed: range, available: self.end_for(range) });
        }
        match self.taken().find(|(_, other)| other.overlaps(&range)) {
            Some((first, other)) => {
                Err(LoadError::Overlap { first, second: what, at: other.start.max(range.start) })
            }
            None => Ok(()),
        }
    }

    /// End of the usable RAM that a part starting at `range` could have had.
    fn end_for(&self, range: Range) -> u64 {
        let containing = self.usable.iter().find(|ram| ram.start <= range.start && range.start < ram.end);
        containing
            .or_else(|| self.usable.iter().rev().find(|ram| ram.end <= range.start))
            .map_or(0, |r| r.end)
    }

    /// First page-aligned address behind everything placed so far, at least 1 MiB.
    pub(crate) fn end(&self) -> u64 {
        let end = self.taken().map(|(_, range)| range.end).filter(|end| *end <= layout::LOW_RAM_MAX).max();
        let end = end.unwrap_or(0).max(layout::HIGH_MEMORY_START);
        align_up(end, PAGE).unwrap_or(end)
    }

    /// Places the initial RAM disk as high as it goes below `limit` (first address that it may not use), in the
    /// RAM below 4 GiB and above everything that was placed so far.
    pub(crate) fn add_initrd_high(&mut self, data: &'a [u8], limit: u64) -> Result<Range, LoadError> {
        let size = data.len() as u64;
        let floor = self.end();
        let mut available = 0;
        for ram in self.usable.iter().rev().filter(|ram| ram.end <= layout::LOW_RAM_MAX) {
            let room = Range { start: ram.start.max(floor), end: align_down(ram.end.min(limit), PAGE) };
            if room.size() >= size {
                let start = align_down(room.end - size, PAGE);
                return self.add_initrd_at(data, start);
            }
            available = available.max(room.size());
        }
        Err(LoadError::InitrdTooBig { size, available })
    }

    /// Places the initial RAM disk on the first page behind everything that was placed so far.
    pub(crate) fn add_initrd_low(&mut self, data: &'a [u8]) -> Result<Range, LoadError> {
        let size = data.len() as u64;
        let start = self.end();
        let ram = self.usable.iter().find(|ram| ram.start <= start && start < ram.end);
        let available = ram.map_or(0, |ram| ram.end - start);
        if available < size {
            return Err(LoadError::InitrdTooBig { size, available });
        }
        self.add_initrd_at(data, start)
    }

    fn add_initrd_at(&mut self, data: &'a [u8], start: u64) -> Result<Range, LoadError> {
        let what = "initial RAM disk";
        self.add(Segment { what, address: start, data: Cow::Borrowed(data), zero_after: 0 })?;
        Ok(Range { start, end: start + data.len() as u64 })
    }

    /// Adds the command line with its terminating NUL; `max` is the longest that the kernel takes, without it.
    pub(crate) fn add_cmdline(&mut self, cmdline: &str, max: u64) -> Result<(), LoadError> {
        let length = cmdline.len() as u64;
        let max = max.min(layout::BOOT_CMDLINE_MAX - 1);
        if length > max {
            return Err(LoadError::CommandLineTooLong { length, max });
        }
        let mut data = cmdline.as_bytes().to_vec();
        data.push(0);
        self.add_boot([Segment {
            what: "command line",
            address: layout::BOOT_CMDLINE,
            data: Cow::Owned(data),
            zero_after: 0,
        }]);
        Ok(())
    }

    pub(crate) fn finish(self) -> Vec<Segment<'a>> {
        self.segments.into_iter().filter(|segment| !segment.range().is_empty()).collect()
    }
}
