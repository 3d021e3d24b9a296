//! Bringing tables to the disk, in the order that `image` explains.

use std::io;

use vm_memory::VolatileSlice;

use super::image::Image;
use super::layout::OFFSET_MASK;
use crate::error::{earlier_flush_failed, writes_lost};
use crate::file::ImageFile;

/// Released clusters that are remembered at most before a commit gives them back.
const MAX_RELEASED: usize = 65_536;

impl<F: ImageFile> Image<F> {
    /// Makes everything written so far durable.
    pub(super) fn commit(&mut self) -> io::Result<()> {
        self.write_blocks()?;
        if self.table_moved || !self.blocks_dirty.is_empty() {
            self.sync()?;
            self.write_refcount_table()?;
        }
        if self.l2.has_dirty() {
            self.sync()?;
            for offset in self.l2.dirty_offsets() {
                let bytes = self.l2.get(offset).unwrap_or(&[]);
                write_bytes(&self.file, offset, bytes)?;
                self.l2.mark_clean(offset);
            }
        }
        if !self.l1_dirty.is_empty() {
            self.sync()?;
            self.write_l1()?;
        }
        self.sync()?;
        self.apply_released()
    }

    /// Whether a flush needs no more than one sync.
    pub(super) fn is_committed(&self) -> bool {
        let tables = self.counts.has_dirty() || self.l2.has_dirty();
        !tables
            && !self.table_moved
            && self.blocks_dirty.is_empty()
            && self.l1_dirty.is_empty()
            && self.released.is_empty()
    }

    /// Syncs the file. When that has failed once the host may have dropped what it could not write and report
    /// success the next time, so it never succeeds again.
    pub(super) fn sync(&mut self) -> io::Result<()> {
        if self.sync_failed {
            return Err(earlier_flush_failed());
        }
        self.file.sync_data().map_err(|error| {
            self.sync_failed = true;
            writes_lost(error)
        })
    }

    /// Commits when much was released, so that the list stays short.
    pub(super) fn commit_if_much_released(&mut self) -> io::Result<()> {
        if self.released.len() >= MAX_RELEASED { self.commit() } else { Ok(()) }
    }

    /// Writes all dirty refcount blocks, without a sync.
    pub(super) fn write_blocks(&mut self) -> io::Result<()> {
        for offset in self.counts.dirty_offsets() {
            let bytes = self.counts.get(offset).unwrap_or(&[]);
            write_bytes(&self.file, offset, bytes)?;
            self.counts.mark_clean(offset);
        }
        Ok(())
    }

    fn write_refcount_table(&mut self) -> io::Result<()> {
        if self.table_moved {
            let bytes: Vec<u8> = self.blocks.iter().flat_map(|offset| offset.to_be_bytes()).collect();
            write_bytes(&self.file, self.header.refcount_table_offset, &bytes)?;
            self.sync()?;
            self.header.write_changes(&self.file)?;
            self.table_moved = false;
        } else {
            for index in &self.blocks_dirty {
                let place = self.header.refcount_table_offset + *index as u64 * 8;
                write_bytes(&self.file, place, &self.blocks[*index].to_be_bytes())?;
            }
        }
        self.blocks_dirty.clear();
        // Nothing may rely on counts that a cut could still lose.
        self.sync()
    }

    fn write_l1(&mut self) -> io::Result<()> {
        for index in &self.l1_dirty {
            let place = self.header.l1_offset + *index as u64 * 8;
            let entry = self.l1.get(*index).copied().unwrap_or(0);
            debug_assert_ne!(entry & OFFSET_MASK, 0, "L1 entries only ever gain or change a table");
            write_bytes(&self.file, place, &entry.to_be_bytes())?;
        }
        self.l1_dirty.clear();
        Ok(())
    }

    /// Before the first change: clears the autoclear features, which this does not maintain.
    pub(super) fn prepare_change(&mut self) -> io::Result<()> {
        if self.prepared {
            return Ok(());
        }
        self.clear_autoclear(0)?;
        self.prepared = true;
        Ok(())
    }

    /// Clears the autoclear features but those to `keep`, durably.
    pub(super) fn clear_autoclear(&mut self, keep: u64) -> io::Result<()> {
        let before = self.header.autoclear;
        if before & !keep == 0 {
            return Ok(());
        }
        self.header.autoclear &= keep;
        let result = self.header.write_changes(&self.file).and_then(|()| self.sync());
        result.inspect_err(|_| self.header.autoclear = before)
    }
}

/// Writes ordinary memory, which is copied once.
pub(super) fn write_bytes(file: &impl ImageFile, offset: u64, bytes: &[u8]) -> io::Result<()> {
    if bytes.is_empty() {
        return Ok(());
    }
    let mut copy = bytes.to_vec();
    file.write_at(offset, &[VolatileSlice::from(&mut copy[..])])
}
