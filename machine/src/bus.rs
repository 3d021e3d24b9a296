//! Port and memory-mapped device access.
//!
//! A device implements [`PortDevice`] or [`MmioDevice`] with `&self` and does its own locking, so an access
//! never takes a lock that another device can hold: the bus tables themselves are read without a lock.
//! Accesses of any width reach the device as they were issued; a device that knows only some widths answers
//! the others the way its hardware would (usually all ones on reads, ignored on writes).

use std::sync::Arc;

use arc_swap::ArcSwap;

/// A device behind I/O ports. `offset` counts from the start of the registered range.
///
/// `data` is 1, 2 or 4 bytes, little endian.
pub trait PortDevice: Send + Sync {
    /// Reads `data.len()` bytes at `offset`.
    fn port_read(&self, offset: u16, data: &mut [u8]);
    /// Writes `data` at `offset`.
    fn port_write(&self, offset: u16, data: &[u8]);
}

/// A device behind memory addresses. `offset` counts from the start of the registered region.
///
/// `data` is 1 to 64 bytes (wide vector accesses arrive whole); it never crosses the end of the region.
pub trait MmioDevice: Send + Sync {
    /// Reads `data.len()` bytes at `offset`.
    fn mmio_read(&self, offset: u64, data: &mut [u8]);
    /// Writes `data` at `offset`.
    fn mmio_write(&self, offset: u64, data: &[u8]);
}

/// One registered range of the [`PortBus`].
#[derive(Clone)]
struct PortRange {
    first: u16,
    /// Inclusive, so that a range may end at 0xffff.
    last: u16,
    device: Arc<dyn PortDevice>,
}

/// Why a range of ports could not be registered.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum PortBusError {
    /// The range is empty or passes port 0xffff.
    #[error("I/O port range {first:#x}+{len:#x} is empty or passes 0xffff")]
    BadRange {
        /// First port.
        first: u16,
        /// Number of ports.
        len: u16,
    },
    /// Another device already owns a port of the range.
    #[error("I/O ports {first:#x}..={last:#x} overlap a range that is already in use")]
    Overlap {
        /// First port.
        first: u16,
        /// Last port.
        last: u16,
    },
}

/// The 64 Ki I/O ports of a machine.
///
/// Look-ups read an immutable sorted table without a lock; registration replaces the table.
/// An access that no device answers reads as all ones and ignores writes. An access that spans the end of a
/// range is split into bytes, as the chipset of a PC does.
pub struct PortBus {
    ranges: ArcSwap<Vec<PortRange>>,
}

impl Default for PortBus {
    fn default() -> Self {
        Self::new()
    }
}

impl PortBus {
    /// An empty bus.
    pub fn new() -> Self {
        Self { ranges: ArcSwap::from_pointee(Vec::new()) }
    }

    /// Gives `len` ports from `first` to `device`.
    pub fn register(&self, first: u16, len: u16, device: Arc<dyn PortDevice>) -> Result<(), PortBusError> {
        let last = match len.checked_sub(1).and_then(|n| first.checked_add(n)) {
            Some(last) => last,
            None => return Err(PortBusError::BadRange { first, len }),
        };
        let mut result = Ok(());
        self.ranges.rcu(|old| {
            let at = old.partition_point(|r| r.first < first);
            let clash_before = at > 0 && old[at - 1].last >= first;
            let clash_after = old.get(at).is_some_and(|r| r.first <= last);
            let mut new = (**old).clone();
            if clash_before || clash_after {
                result = Err(PortBusError::Overlap { first, last });
            } else {
                result = Ok(());
                new.insert(at, PortRange { first, last, device: device.clone() });
            }
            new
        });
        result
    }

    /// Takes the range that starts at `first` off the bus. Returns whether there was one.
    pub fn unregister(&self, first: u16) -> bool {
        let mut found = false;
        self.ranges.rcu(|old| {
            let mut new = (**old).clone();
            let before = new.len();
            new.retain(|r| r.first != first);
            found = new.len() != before;
            new
        });
        found
    }

    /// Reads 1, 2 or 4 bytes at `port`.
    pub fn read(&self, port: u16, data: &mut [u8]) {
        let ranges = self.ranges.load();
        match find(&ranges, port, data.len()) {
            Hit::Whole(r) => r.device.port_read(port - r.first, data),
            Hit::None => data.fill(0xff),
            Hit::Split => {
                for (i, byte) in data.iter_mut().enumerate() {
                    let p = port.wrapping_add(i as u16);
                    match find(&ranges, p, 1) {
                        Hit::Whole(r) => r.device.port_read(p - r.first, std::slice::from_mut(byte)),
                        _ => *byte = 0xff,
                    }
                }
            }
        }
    }

    /// Writes 1, 2 or 4 bytes at `port`.
    pub fn write(&self, port: u16, data: &[u8]) {
        let ranges = self.ranges.load();
        match find(&ranges, port, data.len()) {
            Hit::Whole(r) => r.device.port_write(port - r.first, data),
            Hit::None => {}
            Hit::Split => {
                for (i, byte) in data.iter().enumerate() {
                    let p = port.wrapping_add(i as u16);
                    if let Hit::Whole(r) = find(&ranges, p, 1) {
                        r.device.port_write(p - r.first, std::slice::from_ref(byte));
                    }
                }
            }
        }
    }
}

enum Hit<'a> {
    /// One range answers the whole access.
    Whole(&'a PortRange),
    /// The access touches a range but is not inside it.
    Split,
    /// Nobody answers.
    None,
}

fn find(ranges: &[PortRange], port: u16, len: usize) -> Hit<'_> {
    let last = u32::from(port) + len as u32 - 1;
    let after = ranges.partition_point(|r| r.first <= port);
    if let Some(r) = after.checked_sub(1).map(|i| &ranges[i])
        && r.last >= port
    {
        return if u32::from(r.last) >= last { Hit::Whole(r) } else { Hit::Split };
    }
    match ranges.get(after) {
        Some(r) if u32::from(r.first) <= last => Hit::Split,
        _ => Hit::None,
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;

    struct Echo(Mutex<Vec<(u16, Vec<u8>)>>);
    impl PortDevice for Echo {
        fn port_read(&self, offset: u16, data: &mut [u8]) {
            for (i, b) in data.iter_mut().enumerate() {
                *b = offset as u8 + i as u8;
            }
        }
        fn port_write(&self, offset: u16, data: &[u8]) {
            self.0.lock().unwrap().push((offset, data.to_vec()));
        }
    }
    fn echo() -> Arc<Echo> {
        Arc::new(Echo(Mutex::new(Vec::new())))
    }

    #[test]
    fn access_inside_a_range_arrives_whole_and_outside_floats_high() {
        let bus = PortBus::new();
        let dev = echo();
        bus.register(0x60, 4, dev.clone()).unwrap();
        let mut two = [0; 2];
        bus.read(0x61, &mut two);
        assert_eq!(two, [1, 2]);
        bus.read(0x70, &mut two);
        assert_eq!(two, [0xff, 0xff]);
        bus.write(0x62, &[9, 8]);
        assert_eq!(*dev.0.lock().unwrap(), vec![(2, vec![9, 8])]);
    }

    #[test]
    fn access_across_two_ranges_is_split_into_bytes() {
        let bus = PortBus::new();
        let (a, b) = (echo(), echo());
        bus.register(0x60, 2, a.clone()).unwrap();
        bus.register(0x62, 1, b.clone()).unwrap();
        let mut four = [0; 4];
        bus.read(0x60, &mut four);
        assert_eq!(four, [0, 1, 0, 0xff]);
        bus.write(0x61, &[7, 6]);
        assert_eq!(*a.0.lock().unwrap(), vec![(1, vec![7])]);
        assert_eq!(*b.0.lock().unwrap(), vec![(0, vec![6])]);
        bus.read(0xfffe, &mut four);
        assert_eq!(four, [0xff; 4]);
    }

    #[test]
    fn overlapping_or_empty_ranges_are_refused() {
        let bus = PortBus::new();
        bus.register(0x10, 0x10, echo()).unwrap();
        assert_eq!(bus.register(0x1f, 2, echo()), Err(PortBusError::Overlap { first: 0x1f, last: 0x20 }));
        assert_eq!(bus.register(0x8, 9, echo()), Err(PortBusError::Overlap { first: 0x8, last: 0x10 }));
        assert!(bus.register(0, 0, echo()).is_err());
        assert!(bus.register(0xffff, 2, echo()).is_err());
        bus.register(0xffff, 1, echo()).unwrap();
        assert!(bus.unregister(0x10));
        assert!(!bus.unregister(0x10));
        bus.register(0x1f, 2, echo()).unwrap();
    }
}
