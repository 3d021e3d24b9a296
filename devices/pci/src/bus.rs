//! Buses and the routing of configuration cycles.

use std::collections::BTreeMap;
use std::sync::Arc;

use arc_swap::ArcSwap;

use crate::regs::{SECONDARY_BUS, SUBORDINATE_BUS};
use crate::{Bdf, PciDevice};

/// Why a device could not be put on a bus.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum BusError {
    /// Another device is there.
    #[error("PCI slot {:02x}.{} is taken; choose a free one", devfn >> 3, devfn & 7)]
    SlotTaken {
        /// Device and function number.
        devfn: u8,
    },
    /// No free device number.
    #[error("all 32 PCI slots of the bus are taken; put the device behind a root port")]
    Full,
}

/// The functions on one bus. Look-ups take no lock; changes replace the table.
#[derive(Default)]
pub struct PciBus {
    slots: ArcSwap<BTreeMap<u8, Arc<dyn PciDevice>>>,
}

impl PciBus {
    /// An empty bus.
    pub fn new() -> Self {
        Self::default()
    }

    /// Puts `device` at `devfn` (see [`crate::devfn`]).
    pub fn attach(&self, devfn: u8, device: Arc<dyn PciDevice>) -> Result<(), BusError> {
        let mut taken = false;
        self.slots.rcu(|old| {
            let mut new = (**old).clone();
            taken = new.contains_key(&devfn);
            if !taken {
                new.insert(devfn, device.clone());
            }
            new
        });
        if taken { Err(BusError::SlotTaken { devfn }) } else { Ok(()) }
    }

    /// The lowest free device number from `first` up, as a devfn of function 0.
    pub fn free_slot(&self, first: u8) -> Result<u8, BusError> {
        let slots = self.slots.load();
        let free = |device: &u8| slots.range(device << 3..=device << 3 | 7).next().is_none();
        (first.min(31)..32).find(free).map(|device| device << 3).ok_or(BusError::Full)
    }

    /// Takes the function at `devfn` off the bus; its BARs disappear.
    pub fn detach(&self, devfn: u8) -> Option<Arc<dyn PciDevice>> {
        let mut gone = None;
        self.slots.rcu(|old| {
            let mut new = (**old).clone();
            gone = new.remove(&devfn);
            new
        });
        if let Some(device) = &gone {
            device.function().disconnect();
        }
        gone
    }

    /// The function at `devfn`.
    pub fn get(&self, devfn: u8) -> Option<Arc<dyn PciDevice>> {
        self.slots.load().get(&devfn).cloned()
    }

    /// Every function, by devfn.
    pub fn devices(&self) -> Vec<(u8, Arc<dyn PciDevice>)> {
        self.slots.load().iter().map(|(&devfn, device)| (devfn, device.clone())).collect()
    }

    /// Resets every function on this bus and behind its bridges.
    pub fn reset(&self) {
        for (_, device) in self.devices() {
            if let Some(bus) = device.secondary_bus() {
                bus.reset();
            }
            device.reset();
        }
    }

    /// The function that `bdf` addresses, this bus being number `number`.
    fn route(&self, number: u8, bdf: Bdf) -> Option<Arc<dyn PciDevice>> {
        if bdf.bus == number {
            return self.get(bdf.devfn);
        }
        for device in self.slots.load().values() {
            let Some(bus) = device.secondary_bus() else { continue };
            let (first, last) =
                device.function().with_config(|c| (c.u8(SECONDARY_BUS), c.u8(SUBORDINATE_BUS)));
            // A bridge whose numbers are not set yet (or point back up) forwards nothing.
            if first > number && (first..=last).contains(&bdf.bus) {
                return bus.route(first, bdf);
            }
        }
        None
    }
}

/// The root complex: bus 0 and everything behind it.
#[derive(Default)]
pub struct PciRoot {
    bus: PciBus,
}

impl PciRoot {
    /// A root complex without devices.
    pub fn new() -> Arc<Self> {
        Arc::new(Self::default())
    }

    /// Bus 0.
    pub fn bus(&self) -> &PciBus {
        &self.bus
    }

    /// The function at `bdf`, by the bus numbers that software gave the bridges.
    pub fn find(&self, bdf: Bdf) -> Option<Arc<dyn PciDevice>> {
        self.bus.route(0, bdf)
    }

    /// Reads configuration space: `data` of any length, split at 4-byte boundaries. Absent functions read as
    /// ones.
    pub fn config_read(&self, bdf: Bdf, offset: u16, data: &mut [u8]) {
        let device = self.find(bdf);
        let mut at = offset;
        for chunk in split_mut(offset, data) {
            let len = chunk.len() as u16;
            match &device {
                Some(device) if at < 4096 => device.config_read(at, chunk),
                _ => chunk.fill(0xff),
            }
            at = at.saturating_add(len);
        }
    }

    /// Writes configuration space: `data` of any length, split at 4-byte boundaries.
    pub fn config_write(&self, bdf: Bdf, offset: u16, data: &[u8]) {
        let Some(device) = self.find(bdf) else { return };
        let (mut at, mut rest) = (offset, data);
        while !rest.is_empty() && at < 4096 {
            let (chunk, tail) = rest.split_at(rest.len().min(4 - usize::from(at & 3)));
            device.config_write(at, chunk);
            at += chunk.len() as u16;
            rest = tail;
        }
    }
}

/// Pieces of `data` that do not cross 4-byte boundaries.
fn split_mut(offset: u16, data: &mut [u8]) -> impl Iterator<Item = &mut [u8]> {
    let first = data.len().min(4 - usize::from(offset & 3));
    let (head, tail) = data.split_at_mut(first);
    std::iter::once(head).chain(tail.chunks_mut(4))
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::regs;
    use crate::testing::{MapLog, MsiLog};
    use crate::{FunctionBuilder, Identity, PciFunction, devfn};

    pub(crate) struct Plain {
        pub(crate) function: PciFunction,
        pub(crate) bus: Option<PciBus>,
    }
    impl PciDevice for Plain {
        fn function(&self) -> &PciFunction {
            &self.function
        }
        fn reset(&self) {
            self.function.reset();
        }
        fn secondary_bus(&self) -> Option<&PciBus> {
            self.bus.as_ref()
        }
    }
    pub(crate) fn finish(b: FunctionBuilder, maps: &Arc<MapLog>, bus: Option<PciBus>) -> Arc<Plain> {
        Arc::new(Plain { function: b.build(maps.clone(), Arc::new(MsiLog::default())), bus })
    }
    fn endpoint(device: u16) -> Arc<Plain> {
        let b = FunctionBuilder::new(Identity { vendor: 0x1234, device, ..Identity::default() });
        finish(b, &Arc::new(MapLog::default()), None)
    }
    fn bridge(bus: PciBus) -> Arc<Plain> {
        let b = FunctionBuilder::bridge(Identity { vendor: 0x1234, device: 0xb, ..Identity::default() });
        finish(b, &Arc::new(MapLog::default()), Some(bus))
    }
    fn id(root: &PciRoot, bdf: Bdf) -> u32 {
        let mut b = [0; 4];
        root.config_read(bdf, 0, &mut b);
        u32::from_le_bytes(b)
    }

    #[test]
    fn cycles_follow_the_bus_numbers_of_nested_bridges() {
        let deep = PciBus::new();
        deep.attach(devfn(2, 0), endpoint(7)).unwrap();
        let middle = PciBus::new();
        middle.attach(devfn(0, 0), bridge(deep)).unwrap();
        let root = PciRoot::new();
        root.bus().attach(devfn(3, 0), bridge(middle)).unwrap();
        assert_eq!(id(&root, Bdf::new(1, 0, 0)), u32::MAX, "numbers are not set yet");
        root.config_write(Bdf::new(0, 3, 0), regs::PRIMARY_BUS, &[0, 4, 9]);
        root.config_write(Bdf::new(4, 0, 0), regs::PRIMARY_BUS, &[4, 6, 6]);
        assert_eq!(id(&root, Bdf::new(6, 2, 0)), 0x0007_1234);
        assert_eq!(id(&root, Bdf::new(5, 2, 0)), u32::MAX);
        root.config_write(Bdf::new(4, 0, 0), regs::PRIMARY_BUS, &[4, 4, 9]);
        assert_eq!(id(&root, Bdf::new(6, 2, 0)), u32::MAX, "a bridge cannot lead back to itself");
    }

    #[test]
    fn long_and_unaligned_accesses_are_split() {
        let root = PciRoot::new();
        root.bus().attach(0, endpoint(0x5678)).unwrap();
        let mut b = [0; 7];
        root.config_read(Bdf::new(0, 0, 0), 1, &mut b[..3]);
        assert_eq!(b[..3], [0x12, 0x78, 0x56]);
        root.config_read(Bdf::new(0, 0, 0), 4093, &mut b);
        assert_eq!(b, [0, 0, 0, 0xff, 0xff, 0xff, 0xff]);
        root.config_write(Bdf::new(0, 0, 0), 2, &[0xff; 64]);
        assert_eq!(id(&root, Bdf::new(0, 0, 0)), 0x5678_1234);
    }

    #[test]
    fn slots_are_exclusive_and_free_ones_are_found() {
        let bus = PciBus::new();
        bus.attach(devfn(2, 3), endpoint(1)).unwrap();
        assert_eq!(bus.attach(devfn(2, 3), endpoint(1)), Err(BusError::SlotTaken { devfn: 0x13 }));
        assert_eq!(bus.free_slot(2), Ok(devfn(3, 0)));
        assert!(bus.detach(devfn(2, 3)).is_some());
        assert_eq!(bus.free_slot(2), Ok(devfn(2, 0)));
        for d in 0..32 {
            bus.attach(devfn(d, 0), endpoint(1)).unwrap();
        }
        assert_eq!(bus.free_slot(0), Err(BusError::Full));
    }
}
