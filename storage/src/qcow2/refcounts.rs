//! Reference counts, and finding free clusters with them.

use std::io;

use super::header::MAX_REFCOUNT_TABLE_BYTES;
use super::image::{Image, read_table};
use super::layout::{corrupt, count_at, set_count_at};
use crate::file::ImageFile;

/// Entries of tables hold offsets below this many bytes.
const MAX_HOST_BYTES: u64 = 1 << 56;

impl<F: ImageFile> Image<F> {
    /// Brings a refcount block into memory. Dirty blocks may be written at any time: counts that are too high
    /// cost space only, and counts go down only when nothing durable needs them.
    fn load_block(&mut self, offset: u64) -> io::Result<()> {
        if self.counts.get(offset).is_some() {
            return Ok(());
        }
        self.make_room_for_block()?;
        let bytes = read_table(&self.file, offset, self.layout.cluster_size())?;
        self.counts.insert(offset, bytes, false);
        Ok(())
    }

    fn make_room_for_block(&mut self) -> io::Result<()> {
        if self.counts.is_full() {
            if self.counts.is_mostly_dirty() {
                self.write_blocks()?;
            }
            self.counts.evict();
        }
        Ok(())
    }

    /// The count of the cluster at byte `offset` of the image.
    pub(super) fn refcount(&mut self, offset: u64) -> io::Result<u64> {
        let cluster = offset >> self.layout.cluster_bits;
        let per_block = self.layout.counts_per_block();
        let block = self.blocks.get((cluster / per_block) as usize).copied().unwrap_or(0);
        if block == 0 {
            return Ok(0);
        }
        self.load_block(block)?;
        let bytes = self.counts.get(block).unwrap_or(&[]);
        Ok(count_at(bytes, self.layout.refcount_order, cluster % per_block))
    }

    /// Whether the counts of a range are in memory.
    pub(super) fn counts_cached(&mut self, offset: u64, len: u64) -> bool {
        let per_block = self.layout.counts_per_block();
        let clusters = self.clusters(offset, len);
        let last = clusters.end.saturating_sub(1).max(clusters.start) / per_block;
        (clusters.start / per_block..=last).all(|index| {
            let block = self.blocks.get(index as usize).copied().unwrap_or(0);
            block == 0 || self.counts.get(block).is_some()
        })
    }

    /// Changes the count of a cluster whose block exists.
    fn set_refcount(&mut self, cluster: u64, value: u64) -> io::Result<()> {
        let per_block = self.layout.counts_per_block();
        let block = self.blocks.get((cluster / per_block) as usize).copied().unwrap_or(0);
        if block == 0 {
            return Err(corrupt(format_args!("cluster {cluster} has no reference count")));
        }
        self.load_block(block)?;
        if let Some(bytes) = self.counts.get_mut(block) {
            set_count_at(bytes, self.layout.refcount_order, cluster % per_block, value);
        }
        Ok(())
    }

    /// Takes a free cluster and counts it; returns its offset. Its content is whatever was there.
    pub(super) fn allocate(&mut self) -> io::Result<u64> {
        let per_block = self.layout.counts_per_block();
        let order = self.layout.refcount_order;
        loop {
            let index = self.free_hint / per_block;
            let Some(block) = self.blocks.get(index as usize).copied() else {
                self.grow_table()?;
                continue;
            };
            if block == 0 {
                self.add_block(index)?;
                continue;
            }
            self.load_block(block)?;
            let bytes = self.counts.get(block).unwrap_or(&[]);
            let from = self.free_hint % per_block;
            let Some(free) = (from..per_block).find(|slot| count_at(bytes, order, *slot) == 0) else {
                self.free_hint = (index + 1) * per_block;
                continue;
            };
            let cluster = index * per_block + free;
            self.check_free(cluster)?;
            self.set_refcount(cluster, 1)?;
            self.free_hint = cluster + 1;
            return Ok(self.take(cluster));
        }
    }

    /// Refuses a cluster that is counted as free and cannot be.
    fn check_free(&self, cluster: u64) -> io::Result<()> {
        if self.metadata.contains(&cluster) {
            return Err(corrupt(format_args!(
                "the table in cluster {cluster} is counted as free; repair the image"
            )));
        }
        if cluster >= MAX_HOST_BYTES >> self.layout.cluster_bits {
            return Err(io::ErrorKind::StorageFull.into());
        }
        Ok(())
    }

    /// The offset of a cluster that is in use from now on.
    fn take(&mut self, cluster: u64) -> u64 {
        let offset = cluster << self.layout.cluster_bits;
        self.file_end = self.file_end.max(offset + self.layout.cluster_size());
        offset
    }

    /// Gives a cluster back that no table on the disk or in memory refers to.
    pub(super) fn unallocate(&mut self, offset: u64) -> io::Result<()> {
        let cluster = offset >> self.layout.cluster_bits;
        self.metadata.remove(&cluster);
        self.free_hint = self.free_hint.min(cluster);
        self.set_refcount(cluster, 0)
    }

    /// Makes the block of counts `index`, in the first of the clusters that it counts.
    fn add_block(&mut self, index: u64) -> io::Result<()> {
        let cluster = index * self.layout.counts_per_block();
        self.check_free(cluster)?;
        self.make_room_for_block()?;
        let offset = self.take(cluster);
        self.metadata.insert(cluster);
        let mut bytes = vec![0u8; self.layout.cluster_size() as usize];
        set_count_at(&mut bytes, self.layout.refcount_order, 0, 1);
        self.counts.insert(offset, bytes.into(), true);
        self.blocks[index as usize] = offset;
        self.blocks_dirty.insert(index as usize);
        Ok(())
    }

    /// Moves the refcount table to a larger one behind everything that the old one covers. In front of it go
    /// the blocks that count it.
    fn grow_table(&mut self) -> io::Result<()> {
        let cluster_size = self.layout.cluster_size();
        let per_block = self.layout.counts_per_block();
        let old_clusters = u64::from(self.header.refcount_table_clusters);
        let new_clusters = old_clusters * 2;
        if new_clusters * cluster_size > MAX_REFCOUNT_TABLE_BYTES.max(cluster_size) {
            return Err(io::ErrorKind::StorageFull.into());
        }
        let first_block = self.blocks.len();
        let start = first_block as u64 * per_block;
        let mut count = 1;
        while count * per_block < count + new_clusters {
            count += 1;
        }
        for cluster in start..start + count + new_clusters {
            self.check_free(cluster)?;
        }
        self.blocks.resize((new_clusters * cluster_size / 8) as usize, 0);
        for number in 0..count {
            self.make_room_for_block()?;
            let offset = self.take(start + number);
            self.metadata.insert(start + number);
            self.counts.insert(offset, vec![0u8; cluster_size as usize].into(), true);
            self.blocks[first_block + number as usize] = offset;
        }
        for cluster in start..start + count + new_clusters {
            self.set_refcount(cluster, 1)?;
        }
        let table = start + count;
        for cluster in table..table + new_clusters {
            self.take(cluster);
            self.metadata.insert(cluster);
        }
        let old = self.header.refcount_table_offset >> self.layout.cluster_bits;
        self.released.extend(old..old + old_clusters);
        self.header.refcount_table_offset = table << self.layout.cluster_bits;
        self.header.refcount_table_clusters = new_clusters as u32;
        self.table_moved = true;
        Ok(())
    }

    /// Lowers the counts of everything released. Only after what replaced it is durable.
    pub(super) fn apply_released(&mut self) -> io::Result<()> {
        let mut free = Vec::new();
        for cluster in std::mem::take(&mut self.released) {
            if self.pins.contains_key(&cluster) {
                // A transfer that began before it was let go is still under way.
                self.released.push(cluster);
                continue;
            }
            let count = self.refcount(cluster << self.layout.cluster_bits)?;
            // Zero already: the image counted it wrongly. There is nothing to give back.
            if count != 0 {
                self.set_refcount(cluster, count - 1)?;
            }
            if count == 1 {
                self.metadata.remove(&cluster);
                self.free_hint = self.free_hint.min(cluster);
                free.push(cluster);
            }
        }
        self.forget_decompressed();
        free.sort_unstable();
        self.punch_holes(&free);
        Ok(())
    }

    /// Gives the space of free clusters back to the host. Advice: what fails stays allocated there.
    fn punch_holes(&mut self, clusters: &[u64]) {
        let mut rest = clusters;
        while let Some(first) = rest.first() {
            let run =
                rest.iter().zip(*first..).take_while(|(cluster, expected)| *cluster == expected).count();
            let offset = first << self.layout.cluster_bits;
            if self.no_punch_hole {
                return;
            }
            if let Err(error) = self.file.punch_hole(offset, (run as u64) << self.layout.cluster_bits) {
                self.no_punch_hole = error.kind() == io::ErrorKind::Unsupported;
            }
            rest = &rest[run..];
        }
    }
}
