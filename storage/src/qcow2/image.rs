//! The state of an open image and where a byte of the disk is.
//!
//! # Order of writes
//!
//! Data goes to the file at once. Changes of tables stay in memory until [`Image::commit`], which brings them to
//! the disk in an order in which a power cut at any point leaves a consistent image, at worst with clusters
//! that are counted and not used:
//!
//! ```text
//!   data, refcount blocks
//!     -- sync --
//!   refcount table entries     (a block is whole before anything points to it)
//!     -- sync --               [moved table: its copy, sync, header, sync]
//!   L2 tables                  (what they point to is counted, and its data is there)
//!     -- sync --
//!   L1 entries                 (the L2 tables they point to are whole)
//!     -- sync --               (this one is what makes a guest's flush durable)
//!   counts of clusters that nothing points to any more go down, in memory; now they may be allocated again
//! ```
//!
//! Data goes to and from the file outside the lock (`transfer`), which changes nothing of this: an entry is set, under
//! the lock, when its data has been written, so whatever a commit finds in a table may be made durable by its syncs.
//!
//! Steps with nothing to do are left out together with their sync: overwriting in place costs one. A cluster
//! that was let go is never used again before the tables without it are durable, so everything the old tables
//! say is true until the new ones replace them.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::io;
use std::sync::Arc;

use vm_memory::VolatileSlice;

use super::cache::TableCache;
use super::header::{CORRUPT, Header};
use super::layout::{Entry, Layout, Mapping, OFFSET_MASK, corrupt, word};
use crate::buffers::{part_of, zero};
use crate::disk::{Disk, total_len};
use crate::file::ImageFile;

/// Bytes of L2 tables that opening looks through for damage; what lies behind is checked when it is used.
const OPENING_SCAN_BYTES: u64 = 64 << 20;

/// The state. One lock (the disk's) covers all of it.
pub(super) struct Image<F> {
    pub(super) file: F,
    pub(super) header: Header,
    pub(super) layout: Layout,
    /// Bytes that the image has or will have when everything allocated is written.
    pub(super) file_end: u64,
    pub(super) l1: Vec<u64>,
    pub(super) l1_dirty: BTreeSet<usize>,
    pub(super) l2: TableCache,
    /// Offsets of the refcount blocks, 0 where there is none.
    pub(super) blocks: Vec<u64>,
    pub(super) blocks_dirty: BTreeSet<usize>,
    /// The refcount table has a new place, to which it was not written yet.
    pub(super) table_moved: bool,
    pub(super) counts: TableCache,
    /// Clusters that lose a reference once what replaces them is durable.
    pub(super) released: Vec<u64>,
    /// No cluster below is free.
    pub(super) free_hint: u64,
    /// Clusters that hold tables: never data, whatever an entry claims.
    pub(super) metadata: HashSet<u64>,
    pub(super) backing: Option<Arc<dyn Disk>>,
    /// The compressed cluster read last, by descriptor offset.
    pub(super) decompressed: Option<(u64, Arc<Vec<u8>>)>,
    /// Clusters of the image with transfers under way outside the lock, and how many.
    pub(super) pins: HashMap<u64, u32>,
    /// Clusters of the disk, by offset, that are being given a place outside the lock. Their entries change by whoever
    /// does that alone.
    pub(super) busy: HashSet<u64>,
    /// The header was made ready for changes.
    pub(super) prepared: bool,
    pub(super) no_punch_hole: bool,
    /// A sync has failed, after which none may succeed.
    pub(super) sync_failed: bool,
}

/// Where a range of the disk is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Extent {
    /// In the backing image, or zero without one.
    Backing,
    Zero,
    /// At this offset of the image.
    Host(u64),
    /// In a compressed cluster that begins at this offset of the disk.
    Compressed {
        offset: u64,
        len: u64,
        start: u64,
    },
}

impl<F: ImageFile> Image<F> {
    /// Reads header and top tables of an image of `file_size` bytes. Changes nothing.
    pub(super) fn load(
        file: F,
        header: Header,
        file_size: u64,
        backing: Option<Arc<dyn Disk>>,
    ) -> io::Result<Self> {
        let layout = header.layout;
        let cluster = layout.cluster_size();
        // Both sizes were checked against limits and against the file.
        let l1 = read_words(&file, header.l1_offset, u64::from(header.l1_entries))?;
        let table_bytes = u64::from(header.refcount_table_clusters) * cluster;
        let blocks = read_words(&file, header.refcount_table_offset, table_bytes / 8)?;
        let mut image = Self {
            file,
            layout,
            file_end: file_size.next_multiple_of(cluster),
            l1,
            l1_dirty: BTreeSet::new(),
            l2: TableCache::new(cluster),
            blocks,
            blocks_dirty: BTreeSet::new(),
            table_moved: false,
            counts: TableCache::new(cluster),
            released: Vec::new(),
            free_hint: 0,
            metadata: HashSet::new(),
            backing,
            decompressed: None,
            pins: HashMap::new(),
            busy: HashSet::new(),
            prepared: false,
            no_punch_hole: false,
            sync_failed: false,
            header,
        };
        image.claim_metadata()?;
        Ok(image)
    }

    /// Collects where tables are, and refuses an image whose tables overlap or lie outside.
    fn claim_metadata(&mut self) -> io::Result<()> {
        let cluster = self.layout.cluster_size();
        self.claim("header", 0, cluster)?;
        self.claim("L1 table", self.header.l1_offset, self.l1.len() as u64 * 8)?;
        self.claim("refcount table", self.header.refcount_table_offset, self.blocks.len() as u64 * 8)?;
        for index in 0..self.blocks.len() {
            let offset = self.blocks[index];
            if offset & 0x1ff != 0 {
                return Err(corrupt(format_args!("refcount table entry {index} has reserved bits set")));
            }
            if offset != 0 {
                self.claim("refcount block", offset, cluster)?;
            }
        }
        for index in 0..self.l1.len() {
            let entry = self.l1[index];
            if entry & !(OFFSET_MASK | super::layout::COPIED) != 0 {
                return Err(corrupt(format_args!("L1 entry {index} has reserved bits set")));
            }
            if entry & OFFSET_MASK != 0 {
                self.claim("L2 table", entry & OFFSET_MASK, cluster)?;
            }
        }
        Ok(())
    }

    fn claim(&mut self, what: &str, offset: u64, len: u64) -> io::Result<()> {
        let cluster = self.layout.cluster_size();
        let end =
            offset.checked_add(len).filter(|end| *end <= self.file_end && offset.is_multiple_of(cluster));
        let Some(end) = end else {
            return Err(corrupt(format_args!("its {what} at {offset:#x} is not within the image")));
        };
        for index in offset / cluster..end.div_ceil(cluster) {
            if !self.metadata.insert(index) {
                return Err(corrupt(format_args!("its {what} at {offset:#x} overlaps another table")));
            }
        }
        Ok(())
    }

    /// Looks through L2 tables for entries that cannot be right; with `counted`, also for clusters that are used
    /// and counted as free. Stops after [`OPENING_SCAN_BYTES`].
    pub(super) fn scan(&mut self, counted: bool) -> io::Result<()> {
        let mut budget = OPENING_SCAN_BYTES / self.layout.cluster_size();
        for index in 0..self.l1.len() {
            let offset = self.l1[index] & OFFSET_MASK;
            if offset == 0 {
                continue;
            }
            if budget == 0 {
                return Ok(());
            }
            budget -= 1;
            if counted && self.refcount(offset)? == 0 {
                return Err(corrupt(format_args!(
                    "its L2 table at {offset:#x} is counted as free; repair it first"
                )));
            }
            for slot in 0..self.layout.l2_entries() {
                let mapping = self.mapping_in(offset, slot)?;
                let Mapping::Standard(standard) = mapping else { continue };
                if counted && standard.host != 0 && self.refcount(standard.host)? == 0 {
                    return Err(corrupt(format_args!(
                        "its data at {:#x} is counted as free; repair it first",
                        standard.host
                    )));
                }
            }
        }
        Ok(())
    }

    /// Whether the image says that it is damaged.
    pub(super) fn is_marked_corrupt(&self) -> bool {
        self.header.incompatible & CORRUPT != 0
    }

    /// Brings an L2 table into memory.
    pub(super) fn load_l2(&mut self, offset: u64) -> io::Result<()> {
        if self.l2.get(offset).is_some() {
            return Ok(());
        }
        self.make_room_for_l2()?;
        let bytes = read_table(&self.file, offset, self.layout.cluster_size())?;
        self.l2.insert(offset, bytes, false);
        Ok(())
    }

    pub(super) fn make_room_for_l2(&mut self) -> io::Result<()> {
        if self.l2.is_full() {
            if self.l2.is_mostly_dirty() {
                self.commit()?;
            }
            self.l2.evict();
        }
        Ok(())
    }

    pub(super) fn entry_in(&mut self, table: u64, slot: u64) -> io::Result<Entry> {
        self.load_l2(table)?;
        let bytes = self.l2.get(table).unwrap_or(&[]);
        Ok(if self.layout.extended {
            Entry { descriptor: word(bytes, slot * 2), bitmap: word(bytes, slot * 2 + 1) }
        } else {
            Entry { descriptor: word(bytes, slot), bitmap: 0 }
        })
    }

    /// The meaning of an L2 entry, checked against the format and against where the tables are.
    pub(super) fn mapping_in(&mut self, table: u64, slot: u64) -> io::Result<Mapping> {
        let entry = self.entry_in(table, slot)?;
        let wrong = |what: &str| corrupt(format_args!("entry {slot} of its L2 table at {table:#x} {what}"));
        let mapping = entry.mapping(&self.layout).map_err(wrong)?;
        let (start, end) = match mapping {
            Mapping::Standard(standard) if standard.host == 0 => return Ok(mapping),
            Mapping::Standard(standard) => (standard.host, standard.host + 1),
            Mapping::Compressed { offset, len } => (offset, offset + len),
        };
        // A compressed cluster's last sector may be cut short by the end of the file.
        if start >= self.file_end || end > self.file_end.saturating_add(511) {
            return Err(wrong("points behind the end of the image, which may be truncated"));
        }
        for index in self.clusters(start, end - start) {
            if self.metadata.contains(&index) {
                return Err(wrong("points into a table"));
            }
        }
        Ok(mapping)
    }

    /// The clusters of the image that a range touches.
    pub(super) fn clusters(&self, offset: u64, len: u64) -> std::ops::Range<u64> {
        let cluster = self.layout.cluster_size();
        offset / cluster..(offset + len).div_ceil(cluster)
    }

    /// L1 index and slot in the L2 table of a place on the disk.
    pub(super) fn indices(&self, offset: u64) -> (usize, u64) {
        let number = offset >> self.layout.cluster_bits;
        ((number / self.layout.l2_entries()) as usize, number % self.layout.l2_entries())
    }

    /// What the mapping says of the cluster at `offset` of the disk.
    pub(super) fn mapping_at(&mut self, offset: u64) -> io::Result<Mapping> {
        let (index, slot) = self.indices(offset);
        let table = self.l1.get(index).copied().unwrap_or(0) & OFFSET_MASK;
        if table == 0 {
            return Ok(Mapping::Standard(Default::default()));
        }
        self.mapping_in(table, slot)
    }

    /// Where the disk's byte `offset` is, and for how many bytes (at most `len`, at most to the end of the
    /// cluster) that goes on.
    pub(super) fn resolve(&mut self, offset: u64, len: u64) -> io::Result<(Extent, u64)> {
        let layout = self.layout;
        let within = offset & (layout.cluster_size() - 1);
        let len = len.min(layout.cluster_size() - within);
        let standard = match self.mapping_at(offset)? {
            Mapping::Compressed { offset: host, len: size } => {
                return Ok((Extent::Compressed { offset: host, len: size, start: offset - within }, len));
            }
            Mapping::Standard(standard) => standard,
        };
        let kind = |piece: u64| {
            let bit = 1u32 << piece;
            (standard.allocated & bit != 0, standard.zero & bit != 0)
        };
        let size = layout.piece_size();
        let first = within / size;
        let mut next = first + 1;
        while next * size < within + len && kind(next) == kind(first) {
            next += 1;
        }
        let len = len.min(next * size - within);
        let extent = match kind(first) {
            (true, _) => Extent::Host(standard.host + within),
            (_, true) => Extent::Zero,
            _ => Extent::Backing,
        };
        Ok((extent, len))
    }

    /// [`Image::resolve`], going on over clusters for as long as it stays one piece.
    pub(super) fn resolve_run(&mut self, offset: u64, len: u64) -> io::Result<(Extent, u64)> {
        let (extent, mut run) = self.resolve(offset, len)?;
        while run < len {
            let follows = match (extent, self.resolve(offset + run, len - run)) {
                (Extent::Host(host), Ok((Extent::Host(next), more))) if next == host + run => more,
                (Extent::Zero, Ok((Extent::Zero, more))) => more,
                (Extent::Backing, Ok((Extent::Backing, more))) => more,
                _ => break,
            };
            run += follows;
        }
        Ok((extent, run))
    }

    /// Whether the tables for a range are in memory, so that looking at them needs no waiting.
    pub(super) fn is_cached(&mut self, offset: u64, len: u64) -> bool {
        let covered = self.layout.l2_entries() << self.layout.cluster_bits;
        let first = offset / covered;
        let last = offset.saturating_add(len.saturating_sub(1)) / covered;
        (first..=last).all(|index| {
            let table = self.l1.get(index as usize).copied().unwrap_or(0) & OFFSET_MASK;
            table == 0 || self.l2.get(table).is_some()
        })
    }

    /// Notes that a transfer to or from a range of the image begins: until [`Image::unpin`] its clusters are not used
    /// for anything else, even if they are let go.
    pub(super) fn pin(&mut self, offset: u64, len: u64) {
        for cluster in self.clusters(offset, len) {
            *self.pins.entry(cluster).or_insert(0) += 1;
        }
    }

    /// Ends what [`Image::pin`] began.
    pub(super) fn unpin(&mut self, offset: u64, len: u64) {
        for cluster in self.clusters(offset, len) {
            if let Some(count) = self.pins.get_mut(&cluster) {
                *count -= 1;
                if *count == 0 {
                    self.pins.remove(&cluster);
                }
            }
        }
    }

    /// Whether no transfer is under way and no cluster is being given a place.
    pub(super) fn is_quiet(&self) -> bool {
        self.pins.is_empty() && self.busy.is_empty()
    }

    /// Forgets the decompressed cluster: its place may be used for something else.
    pub(super) fn forget_decompressed(&mut self) {
        self.decompressed = None;
    }
}

/// Fills buffers from a file; what is behind its end reads as zero.
pub(super) fn read_padded(
    file: &impl ImageFile,
    offset: u64,
    buffers: &[VolatileSlice<'_>],
) -> io::Result<()> {
    let count = file.read_at(offset, buffers)? as u64;
    let len = total_len(buffers);
    if count < len {
        zero(&part_of(buffers, count, len - count)?);
    }
    Ok(())
}

/// Reads one whole table; a table cut short by the end of the file is an error.
pub(super) fn read_table(file: &impl ImageFile, offset: u64, len: u64) -> io::Result<Box<[u8]>> {
    let mut bytes = vec![0u8; len as usize];
    if bytes.is_empty() {
        return Ok(bytes.into());
    }
    let count = file.read_at(offset, &[VolatileSlice::from(&mut bytes[..])])?;
    if count < bytes.len() {
        return Err(corrupt(format_args!(
            "the image ends within a table at {offset:#x}; it may be truncated"
        )));
    }
    Ok(bytes.into())
}

/// Reads a table of big-endian words.
pub(super) fn read_words(file: &impl ImageFile, offset: u64, count: u64) -> io::Result<Vec<u64>> {
    let bytes = read_table(file, offset, count * 8)?;
    Ok((0..count).map(|index| word(&bytes, index)).collect())
}
