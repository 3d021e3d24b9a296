//! BARs in the machine's own address spaces.

use std::sync::{Arc, Weak};

use atoll_machine::bus::PortBus;
use atoll_machine::memory::{AddressSpace, RegionId};

use crate::bar::{BarMapper, BarMapping, BarTarget};

/// Priority of memory BARs: below RAM (0) and the chipset's own ranges (-1), so that a guest that programs a BAR
/// over them loses the BAR and not the machine.
pub(crate) const BAR_PRIORITY: i32 = -2;

/// Maps BARs into an [`AddressSpace`] and a [`PortBus`].
///
/// It refers to both weakly: they own the devices that are mapped into them, and a device owns its mapper.
pub struct PciBarMapper {
    memory: Weak<AddressSpace>,
    ports: Weak<PortBus>,
}

impl PciBarMapper {
    /// Memory BARs go to `memory`, I/O BARs to `ports`.
    pub fn new(memory: &Arc<AddressSpace>, ports: &Arc<PortBus>) -> Arc<Self> {
        Arc::new(Self { memory: Arc::downgrade(memory), ports: Arc::downgrade(ports) })
    }
}

struct Memory(Weak<AddressSpace>, RegionId);
impl Drop for Memory {
    fn drop(&mut self) {
        if let Some(space) = self.0.upgrade() {
            space.unmap(self.1);
        }
    }
}

struct Ports(Weak<PortBus>, u16);
impl Drop for Ports {
    fn drop(&mut self) {
        if let Some(bus) = self.0.upgrade() {
            bus.unregister(self.1);
        }
    }
}

impl BarMapper for PciBarMapper {
    fn map(&self, address: u64, size: u64, target: &BarTarget) -> Option<BarMapping> {
        match target {
            BarTarget::Mmio(device) => {
                let memory = self.memory.upgrade()?;
                let id = memory.map_mmio(address, size, device.clone(), BAR_PRIORITY).ok()?;
                Some(Box::new(Memory(self.memory.clone(), id)))
            }
            BarTarget::Ports(device) => {
                let first = u16::try_from(address).ok()?;
                self.ports.upgrade()?.register(first, u16::try_from(size).ok()?, device.clone()).ok()?;
                Some(Box::new(Ports(self.ports.clone(), first)))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::Nothing;

    #[test]
    fn mappings_answer_until_dropped() {
        let (space, bus) = (AddressSpace::new(), Arc::new(PortBus::new()));
        let mapper = PciBarMapper::new(&space, &bus);
        let mut b = [1; 4];
        let memory = mapper.map(0xc000_0000, 0x1000, &BarTarget::Mmio(Arc::new(Nothing)));
        space.mmio_read(0xc000_0010, &mut b);
        assert_eq!(b, [0; 4]);
        drop(memory);
        space.mmio_read(0xc000_0010, &mut b);
        assert_eq!(b, [0xff; 4]);

        let ports = mapper.map(0xc000, 0x40, &BarTarget::Ports(Arc::new(Nothing)));
        bus.read(0xc03c, &mut b);
        assert_eq!(b, [0; 4]);
        assert!(mapper.map(0xc020, 0x40, &BarTarget::Ports(Arc::new(Nothing))).is_none(), "ports in use");
        drop(ports);
        bus.read(0xc03c, &mut b);
        assert_eq!(b, [0xff; 4]);
    }
}
