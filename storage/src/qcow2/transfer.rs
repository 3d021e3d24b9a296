//! Data to and from the image, outside the lock.
//!
//! The lock covers the mapping and the counts: where data goes is looked up under it, the transfer itself is not. Two
//! marks keep that right:
//!
//! * **Pinned** clusters of the image have transfers under way. One that is let go meanwhile (by a discard, or because
//!   the cluster moved) stays counted until they end, so a read never sees, and a write never hits, what somebody else
//!   keeps there since.
//! * **Busy** clusters of the disk are being given a place: one is found under the lock, data and what surrounds it are
//!   written outside, and then the entry changes under the lock. Meanwhile nobody else changes that entry: another
//!   write that would, a zeroing or a discard of the same cluster waits.
//!
//! ```text
//!   write:   in place ──── pin ──► transfer ──► unpin
//!            otherwise ─── busy? wait : plan, busy ──► read around, transfer ──► set entry, not busy
//! ```
//!
//! Transfers to one place that overlap have no order among each other, which is what a disk promises. A write in place
//! next to a cluster's pieces that are being given their place touches none of the bytes that the other does.

use std::io;
use std::sync::{Arc, MutexGuard, PoisonError, TryLockError};

use vm_memory::VolatileSlice;

use super::Qcow2Disk;
use super::compression::decompress;
use super::image::{Extent, Image, read_padded};
use super::layout::{Mapping, Standard};
use super::write::Plan;
use crate::buffers::{copy_out, part_of, zero};
use crate::disk::total_len;
use crate::error::{earlier_flush_failed, writes_lost};
use crate::file::ImageFile;

type Locked<'a, F> = MutexGuard<'a, Image<Arc<F>>>;

/// A range of the image with a transfer under way; ends with it.
struct Pinned<'a, F: ImageFile> {
    disk: &'a Qcow2Disk<F>,
    offset: u64,
    len: u64,
}

impl<F: ImageFile> Drop for Pinned<'_, F> {
    fn drop(&mut self) {
        self.disk.unpin(self.offset, self.len);
    }
}

impl<F: ImageFile> Qcow2Disk<F> {
    /// The lock, when nothing is under way outside it.
    pub(super) fn lock_quiet(&self) -> Locked<'_, F> {
        let image = self.lock();
        self.settled.wait_while(image, |image| !image.is_quiet()).unwrap_or_else(PoisonError::into_inner)
    }

    /// The lock, when the cluster at `start` of the disk is not being given a place.
    fn lock_idle(&self, start: u64) -> Locked<'_, F> {
        let image = self.lock();
        let busy = |image: &mut Image<Arc<F>>| image.busy.contains(&start);
        self.settled.wait_while(image, busy).unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn unpin(&self, offset: u64, len: u64) {
        let mut image = self.lock();
        image.unpin(offset, len);
        if image.is_quiet() {
            self.settled.notify_all();
        }
    }

    fn pinned<'a>(&'a self, mut image: Locked<'a, F>, offset: u64, len: u64) -> Pinned<'a, F> {
        image.pin(offset, len);
        drop(image);
        Pinned { disk: self, offset, len }
    }

    /// Reads the disk. The range is within the disk, or in the rest of its last cluster.
    pub(super) fn read(&self, offset: u64, buffers: &[VolatileSlice<'_>]) -> io::Result<()> {
        let len = total_len(buffers);
        let mut done = 0;
        while done < len {
            let at = offset + done;
            let mut image = self.lock();
            let (extent, run) = image.resolve_run(at, len - done)?;
            let part = part_of(buffers, done, run)?;
            match extent {
                Extent::Zero => {
                    drop(image);
                    zero(&part);
                }
                Extent::Host(host) => {
                    let _pinned = self.pinned(image, host, run);
                    read_padded(&self.file, host, &part)?;
                }
                Extent::Backing => {
                    drop(image);
                    self.read_backing(at, &part)?;
                }
                Extent::Compressed { offset: host, len: size, start } => {
                    let cluster = self.decompressed(image, host, size)?;
                    copy_out(cluster.get((at - start) as usize..).unwrap_or(&[]), &part);
                }
            }
            done += run;
        }
        Ok(())
    }

    /// [`Qcow2Disk::read`] into ordinary memory.
    fn read_bytes(&self, offset: u64, bytes: &mut [u8]) -> io::Result<()> {
        if bytes.is_empty() {
            return Ok(());
        }
        self.read(offset, &[VolatileSlice::from(bytes)])
    }

    fn read_backing(&self, offset: u64, buffers: &[VolatileSlice<'_>]) -> io::Result<()> {
        let Some(backing) = &self.backing else {
            zero(buffers);
            return Ok(());
        };
        let len = total_len(buffers);
        let there = backing.capacity_bytes().saturating_sub(offset).min(len);
        if there != 0 {
            backing.read_at(offset, &part_of(buffers, 0, there)?).map_err(io::Error::other)?;
        }
        if there < len {
            zero(&part_of(buffers, there, len - there)?);
        }
        Ok(())
    }

    /// The content of the compressed cluster at `offset` of the image.
    fn decompressed(&self, image: Locked<'_, F>, offset: u64, len: u64) -> io::Result<Arc<Vec<u8>>> {
        if let Some((_, cluster)) = image.decompressed.as_ref().filter(|(known, _)| *known == offset) {
            return Ok(cluster.clone());
        }
        let (compression, size) = (image.header.compression, image.layout.cluster_size());
        let _pinned = self.pinned(image, offset, len);
        // At most two clusters, by the width of the descriptor's field.
        let mut data = vec![0u8; len as usize];
        let count = self.file.read_at(offset, &[VolatileSlice::from(&mut data[..])])?;
        let mut cluster = vec![0u8; size as usize];
        decompress(compression, &data[..count], &mut cluster)?;
        let cluster = Arc::new(cluster);
        // It is pinned still, so nothing else is at its place yet.
        self.lock().decompressed = Some((offset, cluster.clone()));
        Ok(cluster)
    }

    /// Reads what is in memory, tables included; `None` if not all of it is one piece there.
    pub(super) fn read_without_waiting(
        &self,
        offset: u64,
        len: u64,
        buffers: &[VolatileSlice<'_>],
    ) -> Option<()> {
        let mut image = self.try_lock()?;
        if !image.is_cached(offset, len) {
            return None;
        }
        let (extent, run) = image.resolve_run(offset, len).ok()?;
        if run < len {
            return None;
        }
        match (extent, &self.backing) {
            (Extent::Host(host), _) => {
                let _pinned = self.pinned(image, host, len);
                self.file.try_read_at(host, buffers)
            }
            (Extent::Zero, _) | (Extent::Backing, None) => {
                drop(image);
                zero(buffers);
                Some(())
            }
            (Extent::Backing, Some(backing)) => {
                drop(image);
                backing.try_read_at(offset, buffers)?.ok()
            }
            (Extent::Compressed { .. }, _) => None,
        }
    }

    fn try_lock(&self) -> Option<Locked<'_, F>> {
        match self.image.try_lock() {
            Ok(image) => Some(image),
            Err(TryLockError::Poisoned(e)) => Some(e.into_inner()),
            Err(TryLockError::WouldBlock) => None,
        }
    }

    /// Pins a range that is one piece of the image; its place. `None` if it is not, or if that would take waiting.
    pub(super) fn pin_for_reading(&self, offset: u64, len: u64) -> Option<u64> {
        let mut image = self.try_lock()?;
        if !image.is_cached(offset, len) {
            return None;
        }
        let (Extent::Host(host), run) = image.resolve_run(offset, len).ok()? else { return None };
        (run == len).then(|| image.pin(host, len))?;
        Some(host)
    }

    /// As [`Qcow2Disk::pin_for_reading`], for a range that can be overwritten in place.
    pub(super) fn pin_for_writing(&self, offset: u64, len: u64) -> Option<u64> {
        let mut image = self.try_lock()?;
        if !image.prepared || !image.is_cached(offset, len) {
            return None;
        }
        let (Extent::Host(host), run) = image.resolve_run(offset, len).ok()? else { return None };
        if run < len || !image.counts_cached(host, len) {
            return None;
        }
        let (place, run) = image.in_place(offset, len).ok()??;
        (run == len).then(|| image.pin(place, len))?;
        Some(place)
    }

    /// Writes the disk. The range is within the disk.
    pub(super) fn write(&self, offset: u64, buffers: &[VolatileSlice<'_>]) -> io::Result<()> {
        self.lock().prepare_change()?;
        let len = total_len(buffers);
        let mut done = 0;
        while done < len {
            let at = offset + done;
            let start = at & !(self.cluster_size - 1);
            let mut image = self.lock();
            if let Some((host, run)) = image.in_place(at, len - done)? {
                let _pinned = self.pinned(image, host, run);
                self.file.write_at(host, &part_of(buffers, done, run)?)?;
                done += run;
                continue;
            }
            if image.busy.contains(&start) {
                // Afterwards it may be one to write in place.
                drop(image);
                drop(self.lock_idle(start));
                continue;
            }
            let piece = (len - done).min(start + self.cluster_size - at);
            let plan = image.plan(start, at - start, at - start + piece)?;
            drop(image);
            self.write_planned(&plan, at - start, &part_of(buffers, done, piece)?)?;
            done += piece;
        }
        Ok(())
    }

    /// Carries out a write that was planned; the buffers go to byte `from` of the cluster.
    fn write_planned(&self, plan: &Plan, from: u64, buffers: &[VolatileSlice<'_>]) -> io::Result<()> {
        let written = self.with_surroundings(plan, from, buffers).and_then(|around| match around {
            None => self.file.write_at(plan.host + from, buffers),
            Some(mut bytes) => {
                self.file.write_at(plan.host + plan.first, &[VolatileSlice::from(&mut bytes[..])])
            }
        });
        let result = self.lock().finish(plan, written);
        self.settled.notify_all();
        result
    }

    /// The buffers with the bytes around them that the plan has written too; `None` if there are none.
    fn with_surroundings(
        &self,
        plan: &Plan,
        from: u64,
        buffers: &[VolatileSlice<'_>],
    ) -> io::Result<Option<Vec<u8>>> {
        let to = from + total_len(buffers);
        if (plan.first, plan.last) == (from, to) {
            return Ok(None);
        }
        // At most a cluster.
        let mut bytes = vec![0u8; (plan.last - plan.first) as usize];
        let (head, rest) = bytes.split_at_mut((from - plan.first) as usize);
        let (middle, tail) = rest.split_at_mut((to - from) as usize);
        self.read_bytes(plan.start + plan.first, head)?;
        self.read_bytes(plan.start + to, tail)?;
        let mut done = 0;
        for buffer in buffers {
            done += buffer.copy_to(&mut middle[done..]);
        }
        Ok(Some(bytes))
    }

    /// Makes a range read as zero.
    pub(super) fn zero_range(&self, offset: u64, len: u64, unmap: bool) -> io::Result<()> {
        self.for_clusters(offset, len, |mut image, start, (from, to), whole| {
            if image.reads_zero(start + from, to - from)? {
                return Ok(());
            }
            if whole && image.zero_cluster(start, unmap)? {
                return image.commit_if_much_released();
            }
            drop(image);
            let mut zeros = vec![0u8; (to - from) as usize];
            self.write(start + from, &[VolatileSlice::from(&mut zeros[..])])
        })
    }

    /// Releases the whole clusters in a range. Where a backing image would show through, they become zero
    /// clusters; version 2 has none, so there they stay.
    pub(super) fn discard_range(&self, offset: u64, len: u64) -> io::Result<()> {
        self.for_clusters(offset, len, |mut image, start, _, whole| {
            let mapped = image.mapping_at(start)? != Mapping::Standard(Standard::default());
            if whole && mapped {
                image.zero_cluster(start, true)?;
            }
            image.commit_if_much_released()
        })
    }

    /// Calls for each cluster, when it is not busy, with its start on the disk, the range in it, and whether that is all
    /// of it (the last cluster may be longer than the disk).
    fn for_clusters<'a>(
        &'a self,
        offset: u64,
        len: u64,
        each: impl Fn(Locked<'a, F>, u64, (u64, u64), bool) -> io::Result<()>,
    ) -> io::Result<()> {
        self.lock().prepare_change()?;
        let end = offset + len;
        let mut at = offset;
        while at < end {
            let start = at & !(self.cluster_size - 1);
            let to = end.min(start + self.cluster_size);
            let image = self.lock_idle(start);
            let whole = at == start && (to == start + self.cluster_size || to >= image.header.size);
            each(image, start, (at - start, to - start), whole)?;
            at = to;
        }
        Ok(())
    }

    /// Makes everything written so far durable. When no table waits for it, that is one sync, during which the disk goes
    /// on working.
    pub(super) fn commit(&self) -> io::Result<()> {
        // Of two syncs at the same time the host reports a loss to one only.
        let _turn = self.flushes.lock().unwrap_or_else(PoisonError::into_inner);
        let mut image = self.lock();
        if !image.is_committed() {
            return image.commit();
        }
        if image.sync_failed {
            return Err(earlier_flush_failed());
        }
        drop(image);
        let result = self.file.sync_data();
        let mut image = self.lock();
        if let Err(error) = result {
            image.sync_failed = true;
            return Err(writes_lost(error));
        }
        // A commit under the lock, to make room for a table, may have heard of a loss instead.
        if image.sync_failed { Err(earlier_flush_failed()) } else { Ok(()) }
    }
}
