//! Changing the disk: writing, zeroing, discarding.
//!
//! A cluster is written in place when its reference count is one; its `copied` flag is not believed. Otherwise
//! it gets a new cluster, and the mapping changes only after the data is written.

use std::io;

use vm_memory::VolatileSlice;

use super::image::{Extent, Image, part_of};
use super::layout::{COPIED, Entry, Mapping, OFFSET_MASK, Standard, corrupt, set_word};
use crate::disk::total_len;
use crate::file::ImageFile;

impl<F: ImageFile> Image<F> {
    /// Writes the disk. The range is within the disk.
    pub(super) fn write(&mut self, offset: u64, buffers: &[VolatileSlice<'_>]) -> io::Result<()> {
        self.prepare_change()?;
        let len = total_len(buffers);
        let cluster = self.layout.cluster_size();
        let mut done = 0;
        while done < len {
            let at = offset + done;
            if let Some((host, run)) = self.in_place(at, len - done)? {
                self.file.write_at(host, &part_of(buffers, done, run)?)?;
                done += run;
                continue;
            }
            let within = at & (cluster - 1);
            let piece = (len - done).min(cluster - within);
            self.write_cluster(at - within, within, &part_of(buffers, done, piece)?)?;
            done += piece;
        }
        Ok(())
    }

    /// Where bytes can be overwritten, and how many.
    fn in_place(&mut self, offset: u64, len: u64) -> io::Result<Option<(u64, u64)>> {
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

    /// Writes within one cluster in a way that changes its mapping. `start` is the cluster's offset on the disk,
    /// `from` where in the cluster the buffers go.
    fn write_cluster(&mut self, start: u64, from: u64, buffers: &[VolatileSlice<'_>]) -> io::Result<()> {
        let layout = self.layout;
        let to = from + total_len(buffers);
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
        let bounce = self.with_surroundings(start, (first, from, to, last), buffers)?;
        let host = if own { old.host } else { self.allocate()? };
        let written = match bounce {
            None => self.file.write_at(host + from, buffers),
            Some(mut bytes) => self.file.write_at(host + first, &[VolatileSlice::from(&mut bytes[..])]),
        };
        let allocated = touched | keep | if own { old.allocated } else { 0 };
        let entry = Entry::standard(&layout, Standard { host, allocated, zero: old.zero & !allocated });
        let changed = written.and_then(|()| self.set_entry(start, entry));
        if let Err(error) = changed {
            if !own {
                self.unallocate(host)?;
            }
            return Err(error);
        }
        if !own {
            self.release(mapping);
        }
        self.commit_if_much_released()
    }

    /// The bytes `first..last` of the cluster with the buffers at `from..to`; `None` if nothing surrounds them.
    fn with_surroundings(
        &mut self,
        start: u64,
        (first, from, to, last): (u64, u64, u64, u64),
        buffers: &[VolatileSlice<'_>],
    ) -> io::Result<Option<Vec<u8>>> {
        if (first, last) == (from, to) {
            return Ok(None);
        }
        // At most a cluster.
        let mut bytes = vec![0u8; (last - first) as usize];
        let (head, rest) = bytes.split_at_mut((from - first) as usize);
        let (middle, tail) = rest.split_at_mut((to - from) as usize);
        self.read_bytes(start + first, head)?;
        self.read_bytes(start + to, tail)?;
        let mut done = 0;
        for buffer in buffers {
            done += buffer.copy_to(&mut middle[done..]);
        }
        Ok(Some(bytes))
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

    /// Makes a range read as zero.
    pub(super) fn write_zeroes(&mut self, offset: u64, len: u64, unmap: bool) -> io::Result<()> {
        self.prepare_change()?;
        self.for_clusters(offset, len, |image, start, from, to, whole| {
            if image.reads_zero(start + from, to - from)? {
                return Ok(());
            }
            if whole && image.zero_cluster(start, unmap)? {
                return Ok(());
            }
            let mut zeros = vec![0u8; (to - from) as usize];
            image.write(start + from, &[VolatileSlice::from(&mut zeros[..])])
        })
    }

    /// Releases the whole clusters in a range. Where a backing image would show through, they become zero
    /// clusters; version 2 has none, so there they stay.
    pub(super) fn discard(&mut self, offset: u64, len: u64) -> io::Result<()> {
        self.prepare_change()?;
        self.for_clusters(offset, len, |image, start, _, _, whole| {
            let mapped = image.mapping_at(start)? != Mapping::Standard(Standard::default());
            if whole && mapped {
                image.zero_cluster(start, true)?;
            }
            Ok(())
        })
    }

    /// Calls with each cluster's start on the disk, the range in it, and whether that is all of it (the last
    /// cluster may be longer than the disk).
    fn for_clusters(
        &mut self,
        offset: u64,
        len: u64,
        mut each: impl FnMut(&mut Self, u64, u64, u64, bool) -> io::Result<()>,
    ) -> io::Result<()> {
        let cluster = self.layout.cluster_size();
        let end = offset + len;
        let mut at = offset;
        while at < end {
            let start = at & !(cluster - 1);
            let to = end.min(start + cluster);
            let whole = at == start && (to == start + cluster || to >= self.header.size);
            each(self, start, at - start, to - start, whole)?;
            self.commit_if_much_released()?;
            at = to;
        }
        Ok(())
    }

    /// Whether a range within a cluster is known to be zero without looking at data.
    fn reads_zero(&mut self, offset: u64, len: u64) -> io::Result<bool> {
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
    fn zero_cluster(&mut self, start: u64, unmap: bool) -> io::Result<bool> {
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
