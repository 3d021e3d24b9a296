//! Numbers of the format: sizes that follow from the header, and the entries of the mapping tables.
//!
//! A guest cluster is looked at in pieces that can be allocated by themselves: the 32 subclusters of an extended
//! entry, or the cluster as its own single piece. Everything above this module works on [`Mapping`] and needs
//! not know which of the two an image has. Specification: "Cluster mapping" and "Extended L2 Entries" in
//! QEMU's qcow2 specification.

use std::io;

/// Bits 9 to 55 of an entry: an offset in the image.
pub(super) const OFFSET_MASK: u64 = 0x00ff_ffff_ffff_fe00;
/// The table or cluster has a reference count of exactly one.
pub(super) const COPIED: u64 = 1 << 63;
const COMPRESSED: u64 = 1 << 62;
const ZERO: u64 = 1;
/// Bits of a standard descriptor that must not be set.
const RESERVED: u64 = 0x3f00_0000_0000_01fe;

/// Sizes of one image. All in bytes unless said otherwise.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Layout {
    pub(super) version: u32,
    /// 9 to 21.
    pub(super) cluster_bits: u32,
    /// Entries of 16 bytes with subclusters.
    pub(super) extended: bool,
    /// Logarithm of the bits of a reference count: 0 to 6.
    pub(super) refcount_order: u32,
}

impl Layout {
    pub(super) fn cluster_size(&self) -> u64 {
        1 << self.cluster_bits
    }

    /// Bytes of an L2 entry.
    pub(super) fn entry_size(&self) -> u64 {
        if self.extended { 16 } else { 8 }
    }

    /// Entries in an L2 table.
    pub(super) fn l2_entries(&self) -> u64 {
        self.cluster_size() / self.entry_size()
    }

    /// Pieces of a cluster: 32 or 1.
    pub(super) fn pieces(&self) -> u32 {
        if self.extended { 32 } else { 1 }
    }

    /// Bytes of a piece.
    pub(super) fn piece_size(&self) -> u64 {
        self.cluster_size() / u64::from(self.pieces())
    }

    /// A bit for every piece.
    pub(super) fn all_pieces(&self) -> u32 {
        if self.extended { u32::MAX } else { 1 }
    }

    /// Clusters whose reference counts are in one block.
    pub(super) fn counts_per_block(&self) -> u64 {
        (self.cluster_size() * 8) >> self.refcount_order
    }

    /// The largest reference count.
    pub(super) fn max_refcount(&self) -> u64 {
        match self.refcount_order {
            6 => u64::MAX,
            order => (1 << (1u64 << order)) - 1,
        }
    }

    /// Whether a cluster can be marked as zero.
    pub(super) fn has_zero_clusters(&self) -> bool {
        self.version >= 3
    }

    /// The pieces that the bytes `start..end` of a cluster touch. `start < end <= cluster_size()`.
    pub(super) fn pieces_in(&self, start: u64, end: u64) -> u32 {
        let first = start / self.piece_size();
        let last = (end - 1) / self.piece_size();
        let count = last - first + 1;
        let ones = if count >= 32 { u32::MAX } else { (1u32 << count) - 1 };
        ones << first
    }
}

/// What an L2 entry says about its cluster.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Mapping {
    Standard(Standard),
    /// Compressed data of at most `len` bytes at byte `offset` of the image.
    Compressed {
        offset: u64,
        len: u64,
    },
}

/// A cluster that is not compressed. A piece that is neither allocated nor zero is the backing image's.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Standard {
    /// Offset in the image; 0 when there is no cluster.
    pub(super) host: u64,
    /// Pieces whose data is in the cluster.
    pub(super) allocated: u32,
    /// Pieces that read as zero.
    pub(super) zero: u32,
}

/// An L2 entry as stored; the second word is zero in images without subclusters.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Entry {
    pub(super) descriptor: u64,
    pub(super) bitmap: u64,
}

impl Entry {
    /// The entry for a standard cluster that only the active mapping refers to.
    pub(super) fn standard(layout: &Layout, mapping: Standard) -> Self {
        let copied = if mapping.host == 0 { 0 } else { COPIED };
        let descriptor = mapping.host | copied;
        if layout.extended {
            Self { descriptor, bitmap: u64::from(mapping.zero) << 32 | u64::from(mapping.allocated) }
        } else {
            Self { descriptor: descriptor | if mapping.zero != 0 { ZERO } else { 0 }, bitmap: 0 }
        }
    }

    /// Says what the entry means, or what is wrong with it.
    pub(super) fn mapping(&self, layout: &Layout) -> Result<Mapping, &'static str> {
        let descriptor = self.descriptor;
        if descriptor & COMPRESSED != 0 {
            return self.compressed(layout);
        }
        let host = descriptor & OFFSET_MASK;
        if descriptor & RESERVED != 0 {
            return Err("has reserved bits set");
        }
        if host & (layout.cluster_size() - 1) != 0 {
            return Err("is not aligned to a cluster");
        }
        if descriptor & COPIED != 0 && host == 0 {
            return Err("claims the image's header as data");
        }
        let zero_flag = descriptor & ZERO != 0;
        if zero_flag && (layout.extended || !layout.has_zero_clusters()) {
            return Err("has a zero flag that its version does not have");
        }
        let (allocated, zero) = if layout.extended {
            (self.bitmap as u32, (self.bitmap >> 32) as u32)
        } else {
            (u32::from(host != 0 && !zero_flag), u32::from(zero_flag))
        };
        if allocated & zero != 0 {
            return Err("has subclusters both allocated and zero");
        }
        if allocated != 0 && host == 0 {
            return Err("has allocated subclusters without a cluster");
        }
        Ok(Mapping::Standard(Standard { host, allocated, zero }))
    }

    fn compressed(&self, layout: &Layout) -> Result<Mapping, &'static str> {
        let split = 62 - (layout.cluster_bits - 8);
        let offset = self.descriptor & ((1 << split) - 1);
        if self.descriptor & COPIED != 0 {
            return Err("is compressed and claims to be writable in place");
        }
        if offset >> 56 != 0 {
            return Err("is compressed at an offset beyond 64 PiB");
        }
        let sectors = (self.descriptor & (COMPRESSED - 1)) >> split;
        let len = (sectors + 1) * 512 - offset % 512;
        Ok(Mapping::Compressed { offset, len })
    }

    /// Whether it says that the cluster's reference count is one.
    pub(super) fn is_copied(&self) -> bool {
        self.descriptor & COPIED != 0
    }
}

/// The big-endian number at word `index` of a table; 0 behind its end.
pub(super) fn word(table: &[u8], index: u64) -> u64 {
    let start = (index as usize).saturating_mul(8);
    let bytes = table.get(start..start.saturating_add(8)).and_then(|b| <[u8; 8]>::try_from(b).ok());
    bytes.map_or(0, u64::from_be_bytes)
}

/// Changes word `index` of a table; nothing happens behind its end.
pub(super) fn set_word(table: &mut [u8], index: u64, value: u64) {
    let start = (index as usize).saturating_mul(8);
    if let Some(bytes) = table.get_mut(start..start.saturating_add(8)) {
        bytes.copy_from_slice(&value.to_be_bytes());
    }
}

/// Count `index` of a block of reference counts of `1 << order` bits.
pub(super) fn count_at(block: &[u8], order: u32, index: u64) -> u64 {
    if order < 3 {
        let bit = index << order;
        let byte = block.get((bit / 8) as usize).copied().unwrap_or(0);
        let mask = (1u16 << (1 << order)) - 1;
        return u64::from((u16::from(byte) >> (bit % 8)) & mask);
    }
    let width = 1usize << (order - 3);
    let start = index as usize * width;
    block.get(start..start + width).unwrap_or(&[]).iter().fold(0, |sum, byte| sum << 8 | u64::from(*byte))
}

/// Changes count `index` of a block. The value must fit.
pub(super) fn set_count_at(block: &mut [u8], order: u32, index: u64, value: u64) {
    if order < 3 {
        let bit = index << order;
        let mask = (((1u16 << (1 << order)) - 1) << (bit % 8)) as u8;
        if let Some(byte) = block.get_mut((bit / 8) as usize) {
            *byte = (*byte & !mask) | ((value as u8) << (bit % 8)) & mask;
        }
        return;
    }
    let width = 1usize << (order - 3);
    let start = index as usize * width;
    if let Some(bytes) = block.get_mut(start..start + width) {
        bytes.copy_from_slice(&value.to_be_bytes()[8 - width..]);
    }
}

/// The error for an image whose structures contradict each other or the format.
pub(super) fn corrupt(what: impl std::fmt::Display) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what.to_string())
}

/// The error for something that is valid and not supported.
pub(super) fn refused(what: impl std::fmt::Display) -> io::Error {
    io::Error::new(io::ErrorKind::Unsupported, what.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_of_every_width_are_kept_apart() {
        for order in 0..=6 {
            let max = if order == 6 { u64::MAX } else { (1u64 << (1u64 << order)) - 1 };
            let mut block = vec![0u8; 64];
            let total = (64 * 8) >> order;
            for index in 0..total {
                set_count_at(&mut block, order, index, max);
                assert_eq!(count_at(&block, order, index), max);
                assert_eq!(
                    count_at(&block, order, (index + 1) % total.max(2)),
                    if index + 1 == total { max } else { 0 },
                    "{order} {index}"
                );
            }
            set_count_at(&mut block, order, 1, 0);
            assert_eq!(
                (count_at(&block, order, 0), count_at(&block, order, 1), count_at(&block, order, 2)),
                (max, 0, max)
            );
        }
    }

    #[test]
    fn entries_come_back_as_they_were_made() {
        for extended in [false, true] {
            let layout = Layout { version: 3, cluster_bits: 16, extended, refcount_order: 4 };
            let cases = [
                Standard::default(),
                Standard { host: 0x5_0000, allocated: 1, zero: 0 },
                Standard { host: 0x5_0000, allocated: 0, zero: 1 },
                Standard { host: 0, allocated: 0, zero: 1 },
            ];
            for case in cases {
                let entry = Entry::standard(&layout, case);
                assert_eq!(entry.mapping(&layout), Ok(Mapping::Standard(case)));
                assert_eq!(entry.is_copied(), case.host != 0);
            }
        }
    }

    #[test]
    fn a_compressed_descriptor_ends_at_its_last_sector() {
        let layout = Layout { version: 3, cluster_bits: 16, extended: false, refcount_order: 4 };
        let entry = Entry { descriptor: COMPRESSED | 3 << 54 | 0x1_0050, bitmap: 0 };
        assert_eq!(entry.mapping(&layout), Ok(Mapping::Compressed { offset: 0x1_0050, len: 4 * 512 - 0x50 }));
    }

    #[test]
    fn pieces_cover_the_bytes_asked_for() {
        let layout = Layout { version: 3, cluster_bits: 16, extended: true, refcount_order: 4 };
        assert_eq!(layout.pieces_in(0, 1), 1);
        assert_eq!(layout.pieces_in(2047, 2049), 3);
        assert_eq!(layout.pieces_in(0, 65536), u32::MAX);
        assert_eq!(layout.pieces_in(65535, 65536), 1 << 31);
    }
}
