//! Checking an image as a whole and mending its reference counts.
//!
//! Every reference from every table is counted anew and compared with the counts that are stored. Mending does
//! not touch the stored counts: a new refcount table and its blocks are written behind everything in use, and
//! one write of the header switches to them, so a power cut leaves either the old counts or the right ones.

use std::collections::{BTreeMap, BTreeSet};
use std::io;

use super::commit::write_bytes;
use super::header::{BITMAPS, CORRUPT, DIRTY, MAX_REFCOUNT_TABLE_BYTES};
use super::image::{Image, read_table, read_words};
use super::layout::{COPIED, Entry, Mapping, OFFSET_MASK, corrupt, refused, set_count_at, set_word, word};
use super::snapshot;
use crate::file::ImageFile;

/// Descriptions of damage kept for a report.
const MAX_DESCRIPTIONS: usize = 16;

/// Counts in one piece of [`References`].
const PIECE: u64 = 4096;

/// What a check found.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct CheckReport {
    /// Clusters in use.
    pub used_clusters: u64,
    /// Clusters counted more often than used: space lost, nothing else.
    pub leaked_clusters: u64,
    /// Clusters counted less often than used: writing could destroy data.
    pub undercounted_clusters: u64,
    /// Entries whose flag "used once" is wrong.
    pub wrong_flags: u64,
    /// Damage that mending reference counts does not cure, the first 16 of it described.
    pub damage: Vec<String>,
}

impl CheckReport {
    /// Whether nothing is wrong at all.
    pub fn is_clean(&self) -> bool {
        self.is_consistent() && self.leaked_clusters == 0
    }

    /// Whether nothing is wrong but lost space.
    pub fn is_consistent(&self) -> bool {
        self.undercounted_clusters == 0 && self.wrong_flags == 0 && self.damage.is_empty()
    }
}

/// References to each cluster. Sparse; four bytes for a cluster in use.
#[derive(Default)]
struct References {
    pieces: BTreeMap<u64, Box<[u32]>>,
}

impl References {
    fn add(&mut self, cluster: u64) {
        let piece = self.pieces.entry(cluster / PIECE).or_insert_with(|| vec![0; PIECE as usize].into());
        let count = &mut piece[(cluster % PIECE) as usize];
        *count = count.saturating_add(1);
    }

    fn remove(&mut self, cluster: u64) {
        if let Some(piece) = self.pieces.get_mut(&(cluster / PIECE)) {
            let count = &mut piece[(cluster % PIECE) as usize];
            *count = count.saturating_sub(1);
        }
    }

    fn get(&self, cluster: u64) -> u64 {
        self.pieces.get(&(cluster / PIECE)).map_or(0, |piece| u64::from(piece[(cluster % PIECE) as usize]))
    }

    /// The clusters in use and their counts, ascending.
    fn iter(&self) -> impl Iterator<Item = (u64, u64)> + '_ {
        self.pieces.iter().flat_map(|(number, piece)| {
            let used = piece.iter().enumerate().filter(|(_, count)| **count != 0);
            used.map(move |(at, count)| (number * PIECE + at as u64, u64::from(*count)))
        })
    }
}

impl<F: ImageFile> Image<F> {
    /// Checks everything. Nothing is changed; nothing may be waiting for a commit.
    pub(super) fn check(&mut self) -> io::Result<CheckReport> {
        Ok(self.compare()?.0)
    }

    /// Mends reference counts and flags and clears the dirty bit and the corrupt one. An image with other damage is refused and left
    /// as it is. Returns what was found before.
    pub(super) fn repair(&mut self) -> io::Result<CheckReport> {
        let (report, references) = self.compare()?;
        if let Some(first) = report.damage.first() {
            return Err(corrupt(format_args!("{first}; this cannot be repaired")));
        }
        if report.is_clean() && self.header.incompatible & (DIRTY | CORRUPT) == 0 {
            return Ok(report);
        }
        // Bitmaps describe what the disk holds, which stays the same.
        self.clear_autoclear(BITMAPS)?;
        self.mend_flags(&references)?;
        self.rebuild_counts(references)?;
        Ok(report)
    }

    fn compare(&mut self) -> io::Result<(CheckReport, References)> {
        let mut report = CheckReport::default();
        let references = self.count_references(&mut report)?;
        report.used_clusters = references.iter().count() as u64;
        let per_block = self.layout.counts_per_block();
        for index in 0..self.blocks.len() as u64 {
            if self.blocks[index as usize] == 0 {
                continue;
            }
            for cluster in index * per_block..(index + 1) * per_block {
                let (stored, used) =
                    (self.refcount(cluster << self.layout.cluster_bits)?, references.get(cluster));
                report.leaked_clusters += u64::from(stored > used);
                report.undercounted_clusters += u64::from(stored < used);
            }
        }
        for (cluster, _) in references.iter() {
            let block = self.blocks.get((cluster / per_block) as usize).copied().unwrap_or(0);
            report.undercounted_clusters += u64::from(block == 0);
        }
        report.wrong_flags = self.for_wrong_flags(&references, |_, _, _| Ok(()))?;
        Ok((report, references))
    }

    fn count_references(&mut self, report: &mut CheckReport) -> io::Result<References> {
        let mut references = References::default();
        let mut add = |image: &Self, offset: u64, len: u64| {
            image.clusters(offset, len).for_each(|cluster| references.add(cluster));
        };
        let cluster = self.layout.cluster_size();
        add(self, 0, cluster);
        add(self, self.header.refcount_table_offset, self.blocks.len() as u64 * 8);
        self.blocks.iter().filter(|offset| **offset != 0).for_each(|offset| add(self, *offset, cluster));
        let (snapshots, directory) = snapshot::read(&self.file, &self.header, self.file_end)?;
        add(self, self.header.snapshots_offset, directory);
        add(self, self.header.l1_offset, self.l1.len() as u64 * 8);
        let bitmaps = super::bitmaps::for_ranges(&self.file, &self.header, self.file_end, |at, len| {
            add(self, at, len);
        });
        if let Err(error) = bitmaps {
            report.damage.push(error.to_string());
        }
        for snapshot in &snapshots {
            add(self, snapshot.l1_offset, u64::from(snapshot.l1_entries) * 8);
        }
        let mut l1 = self.l1.clone();
        self.count_mapping(&l1, report, &mut references)?;
        for snapshot in snapshots {
            l1 = read_words(&self.file, snapshot.l1_offset, u64::from(snapshot.l1_entries))?;
            self.count_mapping(&l1, report, &mut references)?;
        }
        Ok(references)
    }

    /// Counts what one L1 table refers to.
    fn count_mapping(
        &mut self,
        l1: &[u64],
        report: &mut CheckReport,
        references: &mut References,
    ) -> io::Result<()> {
        let cluster = self.layout.cluster_size();
        let mut damage = |text: String| {
            if report.damage.len() < MAX_DESCRIPTIONS {
                report.damage.push(text);
            }
        };
        for entry in l1 {
            let table = entry & OFFSET_MASK;
            if table == 0 {
                continue;
            }
            if table & (cluster - 1) != 0 || table >= self.file_end {
                damage(format!("its L2 table at {table:#x} is not within the image"));
                continue;
            }
            references.add(table / cluster);
            for slot in 0..self.layout.l2_entries() {
                match self.mapping_in(table, slot) {
                    Ok(Mapping::Standard(standard)) if standard.host == 0 => {}
                    Ok(Mapping::Standard(standard)) => references.add(standard.host / cluster),
                    Ok(Mapping::Compressed { offset, len }) => {
                        self.clusters(offset, len).for_each(|cluster| references.add(cluster));
                    }
                    Err(error) => damage(error.to_string()),
                }
            }
        }
        Ok(())
    }

    /// Calls for each wrong flag with the table's offset (0 for the L1 table) and the word in it; returns how
    /// many there are.
    fn for_wrong_flags(
        &mut self,
        references: &References,
        mut each: impl FnMut(&mut Self, u64, u64) -> io::Result<()>,
    ) -> io::Result<u64> {
        let cluster = self.layout.cluster_size();
        let words = self.layout.entry_size() / 8;
        let mut wrong = 0;
        for index in 0..self.l1.len() {
            let entry = self.l1[index];
            let table = entry & OFFSET_MASK;
            if table == 0 || table >= self.file_end {
                continue;
            }
            if (entry & COPIED != 0) != (references.get(table / cluster) == 1) {
                wrong += 1;
                each(self, 0, index as u64)?;
            }
            for slot in 0..self.layout.l2_entries() {
                let entry: Entry = self.entry_in(table, slot)?;
                let Ok(Mapping::Standard(standard)) = entry.mapping(&self.layout) else { continue };
                let once = references.get(standard.host / cluster) == 1;
                if standard.host != 0 && entry.is_copied() != once {
                    wrong += 1;
                    each(self, table, slot * words)?;
                }
            }
        }
        Ok(wrong)
    }

    fn mend_flags(&mut self, references: &References) -> io::Result<()> {
        self.for_wrong_flags(references, |image, table, index| {
            if table == 0 {
                image.l1[index as usize] ^= COPIED;
                image.l1_dirty.insert(index as usize);
            } else if let Some(bytes) = image.l2.get_mut(table) {
                let entry = word(bytes, index) ^ COPIED;
                set_word(bytes, index, entry);
            }
            Ok(())
        })?;
        self.commit()
    }

    /// Writes new counts behind everything in use and switches to them.
    fn rebuild_counts(&mut self, mut references: References) -> io::Result<()> {
        let layout = self.layout;
        let (cluster, per_block) = (layout.cluster_size(), layout.counts_per_block());
        let start = references.iter().last().map_or(1, |(last, _)| last + 1);
        let old_blocks: Vec<u64> =
            self.blocks.iter().filter(|offset| **offset != 0).map(|o| o / cluster).collect();
        let old_table = self.clusters(self.header.refcount_table_offset, self.blocks.len() as u64 * 8);
        old_blocks.iter().copied().chain(old_table.clone()).for_each(|cluster| references.remove(cluster));
        if references.iter().any(|(_, count)| count > layout.max_refcount()) {
            return Err(refused("a cluster is used more often than its reference count can say"));
        }
        // The new blocks count themselves too, so their number is found by repeating.
        let mut wanted: BTreeSet<u64> = references.iter().map(|(cluster, _)| cluster / per_block).collect();
        let mut table_clusters = 1;
        loop {
            let area = wanted.len() as u64 + table_clusters;
            let before = area;
            wanted.extend(start / per_block..=(start + area - 1) / per_block);
            let entries = wanted.last().map_or(1, |last| last + 1);
            table_clusters = (entries * 8).div_ceil(cluster);
            if wanted.len() as u64 + table_clusters == before {
                break;
            }
        }
        if table_clusters * cluster > MAX_REFCOUNT_TABLE_BYTES.max(cluster) {
            return Err(refused("it is too large for a refcount table"));
        }
        let first_table = start + wanted.len() as u64;
        (start..first_table + table_clusters).for_each(|cluster| references.add(cluster));
        let mut blocks = vec![0u64; (table_clusters * cluster / 8) as usize];
        for (number, index) in wanted.iter().enumerate() {
            let offset = (start + number as u64) * cluster;
            let mut bytes = vec![0u8; cluster as usize];
            for slot in 0..per_block {
                set_count_at(
                    &mut bytes,
                    layout.refcount_order,
                    slot,
                    references.get(index * per_block + slot),
                );
            }
            write_bytes(&self.file, offset, &bytes)?;
            blocks[*index as usize] = offset;
        }
        let table: Vec<u8> = blocks.iter().flat_map(|offset| offset.to_be_bytes()).collect();
        write_bytes(&self.file, first_table * cluster, &table)?;
        self.sync()?;
        self.header.refcount_table_offset = first_table * cluster;
        self.header.refcount_table_clusters = table_clusters as u32;
        self.header.incompatible &= !(DIRTY | CORRUPT);
        self.header.write_changes(&self.file)?;
        self.sync()?;
        for cluster in old_blocks.into_iter().chain(old_table) {
            self.metadata.remove(&cluster);
        }
        self.metadata.extend(start..first_table + table_clusters);
        self.blocks = blocks;
        self.counts = super::cache::TableCache::new(cluster);
        self.file_end = self.file_end.max((first_table + table_clusters) * cluster);
        self.free_hint = 0;
        // The switch is verified before anybody builds on it.
        read_table(&self.file, self.header.refcount_table_offset, table_clusters * cluster).map(drop)
    }
}
