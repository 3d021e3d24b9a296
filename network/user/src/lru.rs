//! A table of bounded size that knows which entry was idle longest.
//!
//! Entries live in a slab and are linked in the order of their last use; a map finds them by key. Everything but
//! [`LruTable::values`] takes constant time. An entry has a [`Handle`] that is never that of another, so that a
//! late event for a removed entry finds nothing.

use std::collections::HashMap;
use std::hash::Hash;
use std::time::{Duration, Instant};

const NONE: u32 = u32::MAX;

/// Names an entry, as a number of 56 bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Handle(pub u64);

impl Handle {
    fn new(index: u32, generation: u32) -> Self {
        Self(u64::from(generation & 0xff_ffff) << 32 | u64::from(index))
    }
}

struct Entry<K, V> {
    key: K,
    value: V,
    last_use: Instant,
    earlier: u32,
    later: u32,
}

struct Slot<K, V> {
    generation: u32,
    entry: Option<Entry<K, V>>,
}

/// The table; see the module's documentation.
pub struct LruTable<K, V> {
    map: HashMap<K, u32>,
    slots: Vec<Slot<K, V>>,
    free: Vec<u32>,
    earliest: u32,
    latest: u32,
    limit: usize,
}

impl<K: Hash + Eq + Clone, V> LruTable<K, V> {
    /// An empty table for up to `limit` entries, at least one.
    pub fn new(limit: usize) -> Self {
        let limit = limit.clamp(1, NONE as usize - 1);
        Self { map: HashMap::new(), slots: Vec::new(), free: Vec::new(), earliest: NONE, latest: NONE, limit }
    }

    /// How many entries there are.
    pub fn len(&self) -> usize {
        self.map.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.map.is_empty()
    }

    /// Whether an entry must go before another can come.
    pub fn is_full(&self) -> bool {
        self.map.len() >= self.limit
    }

    /// The entry of a key.
    pub fn find(&self, key: &K) -> Option<Handle> {
        let index = *self.map.get(key)?;
        Some(Handle::new(index, self.slots.get(index as usize)?.generation))
    }

    fn index(&self, handle: Handle) -> Option<u32> {
        let index = handle.0 as u32;
        let slot = self.slots.get(index as usize)?;
        (slot.entry.is_some() && Handle::new(index, slot.generation) == handle).then_some(index)
    }

    fn entry(&self, index: u32) -> Option<&Entry<K, V>> {
        self.slots.get(index as usize)?.entry.as_ref()
    }

    fn entry_mut(&mut self, index: u32) -> Option<&mut Entry<K, V>> {
        self.slots.get_mut(index as usize)?.entry.as_mut()
    }

    /// An entry's value.
    pub fn get(&self, handle: Handle) -> Option<&V> {
        Some(&self.entry(self.index(handle)?)?.value)
    }

    /// An entry's value.
    pub fn get_mut(&mut self, handle: Handle) -> Option<&mut V> {
        let index = self.index(handle)?;
        Some(&mut self.entry_mut(index)?.value)
    }

    /// Notes that an entry was used now.
    pub fn touch(&mut self, handle: Handle, now: Instant) {
        let Some(index) = self.index(handle) else { return };
        self.unlink(index);
        self.link_latest(index);
        if let Some(entry) = self.entry_mut(index) {
            entry.last_use = now;
        }
    }

    /// Adds an entry. One with the same key, or when the table is full the one idle longest, is removed and
    /// returned.
    pub fn insert(&mut self, key: K, value: V, now: Instant) -> (Handle, Option<(K, V)>) {
        let out = match self.find(&key) {
            Some(handle) => self.remove(handle),
            None if self.is_full() => self.remove_oldest(),
            None => None,
        };
        let index = self.free.pop().unwrap_or_else(|| {
            self.slots.push(Slot { generation: 0, entry: None });
            self.slots.len() as u32 - 1
        });
        self.map.insert(key.clone(), index);
        let entry = Entry { key, value, last_use: now, earlier: NONE, later: NONE };
        let generation = self.slots.get_mut(index as usize).map_or(0, |slot| {
            slot.entry = Some(entry);
            slot.generation
        });
        self.link_latest(index);
        (Handle::new(index, generation), out)
    }

    /// Removes an entry.
    pub fn remove(&mut self, handle: Handle) -> Option<(K, V)> {
        let index = self.index(handle)?;
        self.unlink(index);
        let slot = self.slots.get_mut(index as usize)?;
        let entry = slot.entry.take()?;
        slot.generation = slot.generation.wrapping_add(1);
        self.map.remove(&entry.key);
        self.free.push(index);
        Some((entry.key, entry.value))
    }

    /// The entry idle longest.
    pub fn oldest(&self) -> Option<Handle> {
        let slot = self.slots.get(self.earliest as usize)?;
        slot.entry.as_ref().map(|_| Handle::new(self.earliest, slot.generation))
    }

    /// Removes the entry idle longest.
    pub fn remove_oldest(&mut self) -> Option<(K, V)> {
        self.remove(self.oldest()?)
    }

    /// Removes one entry that was idle for `idle` or more. To be called until it gives `None`.
    pub fn remove_idle(&mut self, idle: Duration, now: Instant) -> Option<(K, V)> {
        let last_use = self.entry(self.earliest)?.last_use;
        (now.saturating_duration_since(last_use) >= idle).then(|| self.remove_oldest()).flatten()
    }

    /// When the next entry will have been idle for `idle`.
    pub fn next_expiry(&self, idle: Duration) -> Option<Instant> {
        self.entry(self.earliest)?.last_use.checked_add(idle)
    }

    /// All entries, in no order.
    pub fn values(&self) -> impl Iterator<Item = (Handle, &V)> {
        self.slots.iter().enumerate().filter_map(|(index, slot)| {
            let entry = slot.entry.as_ref()?;
            Some((Handle::new(index as u32, slot.generation), &entry.value))
        })
    }

    fn unlink(&mut self, index: u32) {
        let Some((earlier, later)) = self.entry(index).map(|entry| (entry.earlier, entry.later)) else {
            return;
        };
        match self.entry_mut(earlier) {
            Some(entry) => entry.later = later,
            None => self.earliest = later,
        }
        match self.entry_mut(later) {
            Some(entry) => entry.earlier = earlier,
            None => self.latest = earlier,
        }
    }

    fn link_latest(&mut self, index: u32) {
        let latest = self.latest;
        if let Some(entry) = self.entry_mut(index) {
            (entry.earlier, entry.later) = (latest, NONE);
        }
        match self.entry_mut(latest) {
            Some(entry) => entry.later = index,
            None => self.earliest = index,
        }
        self.latest = index;
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn handles_of_removed_entries_find_nothing() {
        let now = Instant::now();
        let mut table = LruTable::new(4);
        let (a, _) = table.insert("a", 1, now);
        assert_eq!(table.remove(a), Some(("a", 1)));
        let (b, _) = table.insert("b", 2, now);
        assert_ne!(a, b);
        assert!(table.get(a).is_none() && table.remove(a).is_none());
        assert_eq!(table.get(b), Some(&2));
    }

    proptest! {
        /// Against a list in order of use.
        #[test]
        fn the_oldest_goes_first(steps in proptest::collection::vec((0..4_u8, 0..12_u8), 1..300)) {
            let start = Instant::now();
            let mut model: Vec<(u8, u64)> = Vec::new();
            let mut table = LruTable::new(5);
            for (n, (what, key)) in steps.into_iter().enumerate() {
                let at = n as u64;
                let now = start + Duration::from_secs(at);
                match what {
                    0 => {
                        let (_, out) = table.insert(key, key, now);
                        let gone = match model.iter().position(|(k, _)| *k == key) {
                            Some(place) => Some(model.remove(place).0),
                            None if model.len() == 5 => Some(model.remove(0).0),
                            None => None,
                        };
                        prop_assert_eq!(out.map(|(k, _)| k), gone);
                        model.push((key, at));
                    }
                    1 => if let Some(handle) = table.find(&key) {
                        table.touch(handle, now);
                        let place = model.iter().position(|(k, _)| *k == key).unwrap();
                        model.remove(place);
                        model.push((key, at));
                    }
                    2 => {
                        let removed = table.find(&key).and_then(|handle| table.remove(handle));
                        let place = model.iter().position(|(k, _)| *k == key);
                        prop_assert_eq!(removed.is_some(), place.is_some());
                        if let Some(place) = place { model.remove(place); }
                    }
                    _ => {
                        let out = table.remove_idle(Duration::from_secs(key.into()), now);
                        let due = model.first().is_some_and(|(_, used)| at - used >= u64::from(key));
                        prop_assert_eq!(out.is_some(), due);
                        if due { model.remove(0); }
                    }
                }
                prop_assert_eq!(table.len(), model.len());
                prop_assert_eq!(table.oldest().and_then(|h| table.get(h).copied()), model.first().map(|(k, _)| *k));
                prop_assert_eq!(table.values().count(), model.len());
            }
        }
    }
}
