//! How the mapping changes when the disk does; the data itself is `transfer`'s.
//!
//! A cluster is written in place when its reference count is one; its `copied` flag is not believed. Otherwise
//! it gets a new cluster, and the mapping changes only after the data is written.

use std::io;

use super::image::{Extent, Image};
use super::layout::{COPIED, Entry, Mapping, OFFSET_MASK, Standard, corrupt, set_word};
use crate::file::ImageFile;

/// How a write within one cluster changes its mapping. Everything in it holds until [`Image::finish`], because the
/// cluster is busy meanwhile.
pub(super) struct Plan {
    /// The cluster's offset on the disk.
    pub(super) start: u64,
    /// The bytes of the cluster to write, with those around the ones that are asked for.
    pub(super) first: u64,
    pub(super) last: u64,
    /// Where the cluster is in the image.
    pub(super) host: u64,
    /// It was there before.
    own: bool,
    before: Mapping,
    entry: Entry,
}

impl<F: ImageFile> Image<F> {
    /// Where bytes can be overwritten, and how many.
    pub(super) fn in_place(&mut self, offset: u64, len: u64) -> io::Result<Option<(u64, u64)>> {
        let (mut place, mut run) = (0, 0);
        while run < len {
            let (Extent::Host(host), more) = self.resolve(offset + run, len - run)? else { break };
            if run == 0 {
                place = host;
            }
            if host != place + run || self.refcount(host)? != 1 {
                break;
            }
            run += more;
        }
        Ok((run != 0).then_some((place, run)))
    }

    /// Plans a write of the bytes `from..to` of the cluster at `start` of the disk, which makes the cluster busy, and
    /// takes a cluster of the image for it if it needs one.
    pub(super) fn plan(&mut self, start: u64, from: u64, to: u64) -> io::Result<Plan> {
        let layout = self.layout;
        let touched = layout.pieces_in(from, to);
        let mapping = self.mapping_at(start)?;
        // What of the old content moves along, and whether there is a cluster to go on using.
        let (old, keep, own) = match mapping {
            Mapping::Compressed { .. } => (Standard::default(), layout.all_pieces(), false),
            Mapping::Standard(old) if old.host == 0 => (old, 0, false),
            Mapping::Standard(old) => match self.refcount(old.host)? {
                0 => return Err(corrupt(format_args!("data at {:#x} is counted as free", old.host))),
                1 => (old, 0, true),
                _ => (old, old.allocated, false),
            },
        };
        // Pieces are written whole, unless the rest of them is in the cluster already.
        let size = layout.piece_size();
        let mut first = from / size * size;
        let mut last = to.div_ceil(size) * size;
        if own && old.allocated & layout.pieces_in(from, from + 1) != 0 {
            first = from;
        }
        if own && old.allocated & layout.pieces_in(to - 1, to) != 0 {
            last = to;
        }
        if keep & !touched != 0 {
            (first, last) = (0, layout.cluster_size());
        }
        let host = if own { old.host } else { self.allocate()? };
        let allocated = touched | keep | if own { old.allocated } else { 0 };
        let entry = Entry::standard(&layout, Standard { host, allocated, zero: old.zero & !allocated });
        self.busy.insert(start);
        Ok(Plan { start, first, last, host, own, before: mapping, entry })
    }

    /// Ends a planned write: `written` is what became of its data.
    pub(super) fn finish(&mut self, plan: &Plan, written: io::Result<()>) -> io::Result<()> {
        self.busy.remove(&plan.start);
        if let Err(error) = written.and_then(|()| self.set_entry(plan.start, plan.entry)) {
            if !plan.own {
                self.unallocate(plan.host)?;
            }
            return Err(error);
        }
        if !plan.own {
            self.release(plan.before);
        }
        self.commit_if_much_released()
    }

    /// Notes that the mapping lost its references to a cluster.
    fn release(&mut self, mapping: Mapping) {
        match mapping {
            Mapping::Standard(old) if old.host == 0 => {}
            Mapping::Standard(old) => self.released.push(old.host >> self.layout.cluster_bits),
            Mapping::Compressed { offset, len } => {
                let clusters = self.clusters(offset, len);
                self.released.extend(clusters);
            }
        }
    }

    /// Changes the entry of the cluster at `start` of the disk.
    fn set_entry(&mut self, start: u64, entry: Entry) -> io::Result<()> {
        let (index, slot) = self.indices(start);
        let table = self.own_l2(index)?;
        self.load_l2(table)?;
        let Some(bytes) = self.l2.get_mut(table) else { return Err(corrupt("a table is not in memory")) };
        if self.layout.extended {
            set_word(bytes, slot * 2, entry.descriptor);
            set_word(bytes, slot * 2 + 1, entry.bitmap);
        } else {
            set_word(bytes, slot, entry.descriptor);
        }
        Ok(())
    }

    /// The L2 table of an L1 entry, made or copied if it is missing or shared with a snapshot.
    fn own_l2(&mut self, index: usize) -> io::Result<u64> {
        let Some(entry) = self.l1.get(index).copied() else {
            return Err(corrupt("the L1 table is shorter than the disk"));
        };
        let old = entry & OFFSET_MASK;
        let bytes: Box<[u8]> = if old == 0 {
            vec![0u8; self.layout.cluster_size() as usize].into()
        } else {
            match self.refcount(old)? {
                0 => return Err(corrupt(format_args!("the L2 table at {old:#x} is counted as free"))),
                1 => return Ok(old),
                _ => {}
            }
            self.load_l2(old)?;
            self.l2.get(old).unwrap_or(&[]).into()
        };
        self.make_room_for_l2()?;
        let table = self.allocate()?;
        self.l2.insert(table, bytes, true);
        self.metadata.insert(table >> self.layout.cluster_bits);
        self.l1[index] = table | COPIED;
        self.l1_dirty.insert(index);
        if old != 0 {
            self.released.push(old >> self.layout.cluster_bits);
        }
        Ok(table)
    }

    /// Whether a range within a cluster is known to be zero without looking at data.
    pub(super) fn reads_zero(&mut self, offset: u64, len: u64) -> io::Result<bool> {
        let mut done = 0;
        while done < len {
            let (extent, run) = self.resolve(offset + done, len - done)?;
            let beyond = self.backing.as_ref().is_none_or(|backing| offset >= backing.capacity_bytes());
            match extent {
                Extent::Zero => {}
                Extent::Backing if beyond => {}
                _ => return Ok(false),
            }
            done += run;
        }
        Ok(true)
    }

    /// Makes a whole cluster zero by its entry; `false` if the format cannot say that of it. Its place is kept
    /// unless `unmap` is set or others use it too.
    pub(super) fn zero_cluster(&mut self, start: u64, unmap: bool) -> io::Result<bool> {
        let mapping = self.mapping_at(start)?;
        let zero = if self.layout.has_zero_clusters() {
            self.layout.all_pieces()
        } else if self.backing.is_none() {
            0
        } else {
            return Ok(false);
        };
        let mut host = 0;
        if let Mapping::Standard(old) = mapping
            && old.host != 0
            && zero != 0
            && !unmap
            && self.refcount(old.host)? == 1
        {
            host = old.host;
        }
        self.set_entry(start, Entry::standard(&self.layout, Standard { host, allocated: 0, zero }))?;
        if host == 0 {
            self.release(mapping);
        }
        Ok(true)
    }
}
