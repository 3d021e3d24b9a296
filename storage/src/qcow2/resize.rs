//! Making the disk larger.
//!
//! ```text
//!   longer L1 table: place counted, durable ──► table written, durable ──► header: its place, durable
//!   bytes that would show through (the rest of the last cluster, a longer backing image) are zeroed
//!   everything durable ──► header: the size, durable ──► the disk is larger
//! ```
//!
//! A power cut at any point leaves the disk as large as it was, or as it will be.

use std::io;
use std::sync::atomic::Ordering;

use super::Qcow2Disk;
use super::commit::write_bytes;
use super::header::{Header, MAX_L1_BYTES};
use super::image::Image;
use super::layout::refused;
use crate::disk::Disk;
use crate::file::ImageFile;

impl<F: ImageFile> Qcow2Disk<F> {
    /// Makes the disk `size` bytes large, which is not less than it is.
    pub(super) fn grow(&self, size: u64) -> io::Result<()> {
        // Two at once would each think the other's size is the old one.
        let _turn = self.growing.lock().unwrap_or_else(|e| e.into_inner());
        let before = self.capacity_bytes();
        if size <= before {
            return Ok(());
        }
        if !self.snapshots.is_empty() {
            return Err(refused("an image with internal snapshots cannot be made larger"));
        }
        let old_size = {
            let mut image = self.lock();
            image.prepare_change()?;
            image.lengthen_l1(size)?;
            std::mem::replace(&mut image.header.size, size)
        };
        let result = self.show_nothing(old_size, size).and_then(|()| {
            let mut image = self.lock();
            image.commit()?;
            image.header.write_changes(&image.file)?;
            image.sync()
        });
        match result {
            Ok(()) => self.capacity.store(size, Ordering::SeqCst),
            Err(_) => self.lock().header.size = old_size,
        }
        result
    }

    /// Zeroes what was outside the disk and would show when it grows from `old` to `new` bytes.
    fn show_nothing(&self, old: u64, new: u64) -> io::Result<()> {
        let backing = self.backing.as_ref().map_or(0, |backing| backing.capacity_bytes());
        let end = old.next_multiple_of(self.cluster_size).max(backing).min(new);
        if end > old { self.zero_range(old, end - old, true) } else { Ok(()) }
    }
}

impl<F: ImageFile> Image<F> {
    /// Moves the L1 table to a longer one if a disk of `size` bytes needs that.
    fn lengthen_l1(&mut self, size: u64) -> io::Result<()> {
        let needed = Header::l1_entries_needed(&self.layout, size);
        if needed <= self.l1.len() as u64 {
            return Ok(());
        }
        let cluster = self.layout.cluster_size();
        if needed * 8 > MAX_L1_BYTES {
            return Err(refused("its L1 table would be longer than 32 MiB"));
        }
        let clusters = (needed * 8).div_ceil(cluster);
        let offset = self.allocate_run(clusters)?;
        // All entries and counts are durable before the new table is, which has them all.
        self.commit()?;
        let entries = (clusters * cluster / 8) as usize;
        let mut bytes: Vec<u8> = self.l1.iter().flat_map(|entry| entry.to_be_bytes()).collect();
        bytes.resize(entries * 8, 0);
        write_bytes(&self.file, offset, &bytes)?;
        self.sync()?;
        let old = (self.header.l1_offset, self.header.l1_entries);
        (self.header.l1_offset, self.header.l1_entries) = (offset, needed as u32);
        if let Err(error) = self.header.write_changes(&self.file).and_then(|()| self.sync()) {
            (self.header.l1_offset, self.header.l1_entries) = old;
            return Err(error);
        }
        let old = self.clusters(old.0, u64::from(old.1) * 8);
        self.released.extend(old);
        self.metadata.extend(offset / cluster..offset / cluster + clusters);
        self.l1.resize(needed as usize, 0);
        Ok(())
    }

    /// Takes `count` free clusters in a row; the offset of the first.
    fn allocate_run(&mut self, count: u64) -> io::Result<u64> {
        let cluster = self.layout.cluster_size();
        let mut rejected = Vec::new();
        let mut run: Vec<u64> = Vec::new();
        let result = loop {
            match self.allocate() {
                Ok(next) => {
                    if run.last().is_some_and(|last| last + cluster != next) {
                        rejected.append(&mut run);
                    }
                    run.push(next);
                    if run.len() as u64 == count {
                        break Ok(run[0]);
                    }
                }
                Err(error) => {
                    rejected.append(&mut run);
                    break Err(error);
                }
            }
        };
        for offset in rejected {
            self.unallocate(offset)?;
        }
        result
    }
}
