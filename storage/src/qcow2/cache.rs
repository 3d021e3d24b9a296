//! Tables of one cluster each, kept in memory up to a bound.
//!
//! Only clean tables are thrown out. What to do with dirty ones is the owner's business, because it depends on
//! the order in which tables may reach the disk.

use std::collections::HashMap;

/// Memory for tables of one kind, in bytes; at least [`MIN_TABLES`] tables whatever their size.
const BUDGET_BYTES: u64 = 16 << 20;
const MIN_TABLES: usize = 8;

struct Table {
    bytes: Box<[u8]>,
    dirty: bool,
    used: u64,
}

/// The cache. Tables are known by their offset in the image.
pub(super) struct TableCache {
    tables: HashMap<u64, Table>,
    capacity: usize,
    dirty: usize,
    clock: u64,
}

impl TableCache {
    /// For tables of `size` bytes.
    pub(super) fn new(size: u64) -> Self {
        // Bounded from both sides: 8 to 32768 tables.
        let capacity = ((BUDGET_BYTES / size) as usize).max(MIN_TABLES);
        Self { tables: HashMap::new(), capacity, dirty: 0, clock: 0 }
    }

    pub(super) fn get(&mut self, offset: u64) -> Option<&[u8]> {
        self.clock += 1;
        let table = self.tables.get_mut(&offset)?;
        table.used = self.clock;
        Some(&table.bytes)
    }

    /// The table for changing it; it is dirty from now on.
    pub(super) fn get_mut(&mut self, offset: u64) -> Option<&mut [u8]> {
        self.clock += 1;
        let table = self.tables.get_mut(&offset)?;
        table.used = self.clock;
        self.dirty += usize::from(!table.dirty);
        table.dirty = true;
        Some(&mut table.bytes)
    }

    pub(super) fn insert(&mut self, offset: u64, bytes: Box<[u8]>, dirty: bool) {
        self.remove(offset);
        self.clock += 1;
        self.dirty += usize::from(dirty);
        self.tables.insert(offset, Table { bytes, dirty, used: self.clock });
    }

    pub(super) fn remove(&mut self, offset: u64) {
        if self.tables.remove(&offset).is_some_and(|table| table.dirty) {
            self.dirty -= 1;
        }
    }

    /// Whether there are so many that some should go before another comes.
    pub(super) fn is_full(&self) -> bool {
        self.tables.len() >= self.capacity
    }

    /// Whether so many are dirty that throwing out clean ones does not help for long.
    pub(super) fn is_mostly_dirty(&self) -> bool {
        self.dirty * 2 > self.capacity
    }

    /// Throws out clean tables, the least recently used half of all.
    pub(super) fn evict(&mut self) {
        let mut clean: Vec<(u64, u64)> =
            self.tables.iter().filter(|(_, t)| !t.dirty).map(|(offset, t)| (t.used, *offset)).collect();
        clean.sort_unstable();
        for (_, offset) in clean.into_iter().take(self.tables.len().div_ceil(2)) {
            self.tables.remove(&offset);
        }
    }

    pub(super) fn has_dirty(&self) -> bool {
        self.dirty != 0
    }

    /// Offsets of the dirty tables, ascending.
    pub(super) fn dirty_offsets(&self) -> Vec<u64> {
        let mut offsets: Vec<u64> = self.tables.iter().filter(|(_, t)| t.dirty).map(|(o, _)| *o).collect();
        offsets.sort_unstable();
        offsets
    }

    /// Notes that the file holds the table as it is here.
    pub(super) fn mark_clean(&mut self, offset: u64) {
        if let Some(table) = self.tables.get_mut(&offset) {
            self.dirty -= usize::from(table.dirty);
            table.dirty = false;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_clean_tables_are_thrown_out_the_oldest_first() {
        let mut cache = TableCache::new(2 << 20);
        for offset in 0..8 {
            cache.insert(offset, vec![0; 8].into(), offset % 2 == 0);
        }
        assert!(cache.is_full() && !cache.is_mostly_dirty());
        cache.get(1);
        cache.evict();
        assert_eq!(cache.dirty_offsets(), [0, 2, 4, 6]);
        assert!(cache.get(3).is_none());
        cache.mark_clean(0);
        cache.evict();
        assert_eq!(cache.dirty_offsets(), [2, 4, 6]);
        assert!(cache.get(2).is_some());
        cache.get_mut(2).unwrap()[0] = 1;
        cache.remove(2);
        assert_eq!(cache.dirty_offsets(), [4, 6]);
    }
}
