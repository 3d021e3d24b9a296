//! The VM's table of GSI routes (`KVM_SET_GSI_ROUTING`).
//!
//! | GSI | what |
//! |---|---|
//! | 0 to 23 | the level-triggered entries of the IOAPIC. Nothing is ever sent through them: KVM compares the vectors that end with these routes, and returns from `KVM_RUN` for those that match |
//! | 24 and up | messages of bound eventfds (irqfd), given out by [`Routing::allocate`] |
//!
//! The kernel takes the table as a whole, and waits for a grace period: up to some milliseconds for each change on a
//! busy host. The IOAPIC announces changes only, and masking is none.

use std::collections::BTreeMap;
use std::io;
use std::sync::{Arc, Mutex};

use atoll_foundation::log_limited;
use atoll_machine::interrupt::{IoApicRoutes, Msi};
use kvm_bindings::{
    KVM_IRQ_ROUTING_MSI, KvmIrqRouting, kvm_irq_routing_entry, kvm_irq_routing_entry__bindgen_ty_1,
    kvm_irq_routing_msi,
};
use kvm_ioctls::VmFd;

/// Pins of the IOAPIC, and the number of GSIs that are reserved for them.
pub(crate) const PINS: u32 = 24;
/// Most routes that any kernel takes.
const MAX_ROUTES: usize = 4096;

/// The table of one VM.
pub(crate) struct Routing {
    vm: Arc<VmFd>,
    table: Mutex<Table>,
}

#[derive(Default)]
struct Table {
    pins: BTreeMap<u32, Msi>,
    /// GSIs that are given out; `None` while masked.
    events: BTreeMap<u32, Option<Msi>>,
}

impl Table {
    /// The lowest GSI that is free.
    fn free_gsi(&self) -> Option<u32> {
        let taken = self.events.keys();
        let free = (PINS..).zip(taken).find(|(gsi, taken)| gsi != *taken).map(|(gsi, _)| gsi);
        let gsi = free.unwrap_or(PINS + self.events.len() as u32);
        ((gsi as usize) < MAX_ROUTES).then_some(gsi)
    }

    fn entries(&self) -> Vec<kvm_irq_routing_entry> {
        let pins = self.pins.iter().map(|(gsi, msi)| (*gsi, *msi));
        let events = self.events.iter().filter_map(|(gsi, msi)| Some((*gsi, (*msi)?)));
        pins.chain(events).map(|(gsi, msi)| entry(gsi, msi)).collect()
    }
}

/// A route. Destinations have 8 bits (see `msi.rs`); KVM refuses other bits in the address's upper half.
fn entry(gsi: u32, msi: Msi) -> kvm_irq_routing_entry {
    let msi = kvm_irq_routing_msi {
        address_lo: msi.address as u32,
        address_hi: 0,
        data: msi.data,
        ..Default::default()
    };
    kvm_irq_routing_entry {
        gsi,
        type_: KVM_IRQ_ROUTING_MSI,
        u: kvm_irq_routing_entry__bindgen_ty_1 { msi },
        ..Default::default()
    }
}

impl Routing {
    /// An empty table, which is what a new VM with a split irqchip has.
    pub(crate) fn new(vm: Arc<VmFd>) -> Arc<Self> {
        Arc::new(Self { vm, table: Mutex::default() })
    }

    /// Whether the IOAPIC has level-triggered entries.
    pub(crate) fn has_level_routes(&self) -> bool {
        !self.table.lock().unwrap_or_else(|e| e.into_inner()).pins.is_empty()
    }

    /// Changes the table and tells KVM. Undoes the change if KVM refuses it.
    fn change<T>(&self, change: impl FnOnce(&mut Table) -> T) -> io::Result<T> {
        let mut table = self.table.lock().unwrap_or_else(|e| e.into_inner());
        let before = (table.pins.clone(), table.events.clone());
        let result = change(&mut table);
        let routes = KvmIrqRouting::from_entries(&table.entries());
        let told = routes
            .map_err(|_| io::Error::from_raw_os_error(libc::E2BIG))
            .and_then(|routes| Ok(self.vm.set_gsi_routing(&routes)?));
        if let Err(error) = told {
            (table.pins, table.events) = before;
            return Err(error);
        }
        Ok(result)
    }

    /// A GSI without a route, for an eventfd.
    ///
    /// # Errors
    ///
    /// ENOSPC when all are in use.
    pub(crate) fn allocate(&self) -> io::Result<u32> {
        let mut table = self.table.lock().unwrap_or_else(|e| e.into_inner());
        let gsi = table.free_gsi().ok_or_else(|| io::Error::from_raw_os_error(libc::ENOSPC))?;
        table.events.insert(gsi, None);
        Ok(gsi)
    }

    /// Sets what `gsi` sends; `None`: nothing. The GSI must have been allocated.
    pub(crate) fn set(&self, gsi: u32, msi: Option<Msi>) -> io::Result<()> {
        // A message elsewhere than to local APICs means nothing (see `msi.rs`).
        let msi = msi.filter(|msi| msi.address >> 20 == 0xfee);
        {
            let table = self.table.lock().unwrap_or_else(|e| e.into_inner());
            match table.events.get(&gsi) {
                Some(now) if *now == msi => return Ok(()),
                Some(_) => {}
                None => return Err(io::Error::from_raw_os_error(libc::EINVAL)),
            }
        }
        self.change(|table| {
            table.events.insert(gsi, msi);
        })
    }

    /// Gives `gsi` back.
    pub(crate) fn free(&self, gsi: u32) -> io::Result<()> {
        self.change(|table| {
            table.events.remove(&gsi);
        })
    }
}

impl IoApicRoutes for Routing {
    fn set_route(&self, pin: u32, msi: Option<Msi>) {
        if pin >= PINS {
            return;
        }
        let result = self.change(|table| match msi {
            Some(msi) => {
                table.pins.insert(pin, msi);
            }
            None => {
                table.pins.remove(&pin);
            }
        });
        if let Err(error) = result {
            log_limited!(
                error,
                "KVM refuses the route of IOAPIC pin {pin}: {error}; its interrupts may stop"
            );
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn freed_gsis_are_given_out_again_and_pins_never() {
        let mut table = Table::default();
        for expected in 24..30 {
            let gsi = table.free_gsi().unwrap();
            assert_eq!(gsi, expected);
            table.events.insert(gsi, None);
        }
        table.events.remove(&26);
        assert_eq!(table.free_gsi(), Some(26));
        table.events.extend((24..4096).map(|gsi| (gsi, None)));
        assert_eq!(table.free_gsi(), None);
    }

    #[test]
    fn masked_events_have_no_route() {
        let mut table = Table::default();
        let msi = Msi { address: 0xfee0_1000, data: 0xc033 };
        table.pins.insert(9, msi);
        table.events.insert(24, None);
        table.events.insert(25, Some(msi));
        let routes: Vec<_> = table.entries().iter().map(|e| (e.gsi, e.type_)).collect();
        assert_eq!(routes, [(9, KVM_IRQ_ROUTING_MSI), (25, KVM_IRQ_ROUTING_MSI)]);
    }
}
