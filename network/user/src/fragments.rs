//! Putting together the guest's fragmented datagrams (RFC 791 and RFC 8200, section 4.5).
//!
//! Guests fragment what is larger than the MTU: NFS over UDP, large DNS messages. Reassembly is strictly bounded:
//! [`MAX_DATAGRAMS`] at once (the oldest makes room), each of at most 64 KiB and [`MAX_PARTS`] fragments, for
//! [`TIMEOUT`]. A datagram whose fragments overlap is dropped as a whole (RFC 5722), in IPv4 too.

use std::net::IpAddr;
use std::time::{Duration, Instant};

use crate::lru::LruTable;
use crate::wire::{Fragment, Ip, MAX_PACKET};

/// Datagrams put together at once: with the largest ones 1 MiB.
pub const MAX_DATAGRAMS: usize = 16;
/// Fragments of one datagram: 64 KiB at the least MTU of IPv4, with some to spare.
pub const MAX_PARTS: usize = 160;
/// How long the fragments of a datagram are waited for.
pub const TIMEOUT: Duration = Duration::from_secs(15);

#[derive(Clone, Copy, PartialEq, Eq, Hash)]
struct Key {
    source: IpAddr,
    destination: IpAddr,
    protocol: u8,
    id: u32,
}

#[derive(Default)]
struct Datagram {
    /// Bytes so far; gaps are zero.
    bytes: Vec<u8>,
    /// Which of them came: start and end, in order.
    parts: Vec<(usize, usize)>,
    /// Its length, when the last fragment came.
    total: Option<usize>,
}

impl Datagram {
    /// Takes a fragment. False: it cannot be.
    fn add(&mut self, fragment: Fragment, payload: &[u8]) -> bool {
        let (start, end) = (fragment.offset, fragment.offset + payload.len());
        let cut_evenly = !fragment.more || payload.len().is_multiple_of(8);
        if payload.is_empty() || !cut_evenly || end > MAX_PACKET || self.parts.len() >= MAX_PARTS {
            return false;
        }
        if !fragment.more && self.total.replace(end).is_some_and(|total| total != end) {
            return false;
        }
        let place = self.parts.partition_point(|part| part.0 < start);
        let before = place.checked_sub(1).and_then(|place| self.parts.get(place));
        let after = self.parts.get(place);
        if before.is_some_and(|part| part.1 > start) || after.is_some_and(|part| part.0 < end) {
            return false;
        }
        self.parts.insert(place, (start, end));
        if self.bytes.len() < end {
            self.bytes.resize(end, 0);
        }
        if let Some(bytes) = self.bytes.get_mut(start..end) {
            bytes.copy_from_slice(payload);
        }
        self.total.is_none_or(|total| self.bytes.len() <= total)
    }

    fn is_complete(&self) -> bool {
        let gapless = self.parts.windows(2).all(|pair| pair[0].1 == pair[1].0);
        self.total == Some(self.bytes.len()) && self.parts.first().is_some_and(|part| part.0 == 0) && gapless
    }
}

/// Datagrams of which not all fragments have come.
pub struct Reassembly {
    table: LruTable<Key, Datagram>,
    /// Fragments, or datagrams with all theirs, that were dropped.
    pub dropped: u64,
}

impl Default for Reassembly {
    fn default() -> Self {
        Self { table: LruTable::new(MAX_DATAGRAMS), dropped: 0 }
    }
}

impl Reassembly {
    /// Takes a fragment; returns the datagram's payload when it was the last missing one.
    pub fn add(&mut self, ip: &Ip<'_>, fragment: Fragment, now: Instant) -> Option<Vec<u8>> {
        self.expire(now);
        let Ip { source, destination, protocol, .. } = *ip;
        // In IPv6 the protocol is of no account (RFC 8200), but that of all fragments is the same.
        let key = Key { source, destination, protocol, id: fragment.id };
        let handle = self.table.find(&key).unwrap_or_else(|| {
            let (handle, out) = self.table.insert(key, Datagram::default(), now);
            self.dropped += out.map_or(0, |(_, datagram)| datagram.parts.len() as u64);
            handle
        });
        let datagram = self.table.get_mut(handle)?;
        if !datagram.add(fragment, ip.payload) {
            self.dropped += 1 + datagram.parts.len() as u64;
            self.table.remove(handle);
            return None;
        }
        if !datagram.is_complete() {
            return None;
        }
        self.table.remove(handle).map(|(_, datagram)| datagram.bytes)
    }

    /// Forgets datagrams that were waited for too long. (An entry is never touched: its age is that of its first
    /// fragment.)
    pub fn expire(&mut self, now: Instant) {
        while let Some((_, datagram)) = self.table.remove_idle(TIMEOUT, now) {
            self.dropped += datagram.parts.len() as u64;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ip(payload: &[u8]) -> Ip<'_> {
        Ip {
            source: "10.0.2.15".parse().unwrap(),
            destination: "1.1.1.1".parse().unwrap(),
            protocol: 17,
            hops: 64,
            dont_fragment: false,
            fragment: None,
            payload,
            packet: &[],
        }
    }

    fn fragment(id: u32, offset: usize, more: bool) -> Fragment {
        Fragment { id, offset, more }
    }

    #[test]
    fn fragments_in_any_order_make_the_datagram() {
        let now = Instant::now();
        let whole: Vec<u8> = (0..100).collect();
        let cuts = [(0, 40), (40, 72), (72, 100)];
        for order in [[0, 1, 2], [2, 1, 0], [1, 2, 0], [2, 0, 1]] {
            let mut table = Reassembly::default();
            let mut results = order.iter().map(|n| {
                let (start, end) = cuts[*n];
                table.add(&ip(&whole[start..end]), fragment(1, start, end < 100), now)
            });
            assert_eq!(results.next().unwrap(), None);
            assert_eq!(results.next().unwrap(), None);
            assert_eq!(results.next().unwrap().as_ref(), Some(&whole));
            drop(results);
            assert!(table.table.is_empty());
        }
    }

    #[test]
    fn what_overlaps_or_cannot_be_is_dropped() {
        let now = Instant::now();
        let mut table = Reassembly::default();
        let bad = [
            [(0, 16, true), (8, 16, true)],
            [(0, 16, true), (0, 16, true)],
            [(16, 8, false), (24, 8, true)],
            [(16, 8, false), (32, 8, false)],
            [(0, 16, true), (16, 7, true)],
            [(0, 16, true), (65_528, 8, false)],
            [(0, 16, true), (16, 0, false)],
        ];
        for (n, steps) in bad.into_iter().enumerate() {
            for (offset, length, more) in steps {
                let bytes = vec![0; length];
                assert_eq!(table.add(&ip(&bytes), fragment(n as u32, offset, more), now), None);
            }
            assert!(table.table.is_empty(), "{steps:?}");
        }
        assert!(table.dropped > 0);
    }

    #[test]
    fn memory_is_bounded_and_freed() {
        let now = Instant::now();
        let mut table = Reassembly::default();
        for id in 0..10_000 {
            table.add(&ip(&[0; 8]), fragment(id, 65_512, true), now);
        }
        assert_eq!(table.table.len(), MAX_DATAGRAMS);
        table.expire(now + TIMEOUT);
        assert!(table.table.is_empty());
        assert_eq!(table.dropped, 10_000);
        for part in 0..2 * MAX_PARTS {
            table.add(&ip(&[0; 8]), fragment(7, part * 8, true), now);
            assert!(table.table.values().all(|(_, datagram)| datagram.parts.len() <= MAX_PARTS));
        }
    }
}
