//! Bus numbers and addresses for a machine that starts without firmware.
//!
//! Two passes over the tree: [`measure`] adds up what each bridge must forward (largest first, so that nothing is
//! lost to alignment), [`place`] hands out addresses. Hot-plug ports get room to spare.

use std::ops::Range;

use atoll_machine::memory::PAGE_SIZE;

use crate::bar::BarKind;
use crate::regs::{
    COMMAND, COMMAND_BUS_MASTER, COMMAND_IO, COMMAND_MEMORY, INTERRUPT_LINE, IO_BASE, MEMORY_BASE,
    PREFETCH_BASE, PREFETCH_BASE_UPPER, PRIMARY_BUS,
};
use crate::{PciBus, PciDevice, intx_gsi, swizzle};

/// The address ranges that the host bridge forwards to PCI; the ACPI `_CRS` says the same.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AssignWindows {
    /// I/O ports.
    pub io: Range<u64>,
    /// Memory below 4 GiB.
    pub memory32: Range<u64>,
    /// Memory above 4 GiB, for prefetchable 64-bit BARs. May be empty.
    pub memory64: Range<u64>,
}

/// Why addresses could not be assigned.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum AssignError {
    /// A window is too small.
    #[error(
        "PCI {window} window {start:#x}..{end:#x} has no room for {size:#x} more bytes; use fewer or smaller devices"
    )]
    WindowFull {
        /// Which window.
        window: &'static str,
        /// Its start.
        start: u64,
        /// Its end.
        end: u64,
        /// What did not fit.
        size: u64,
    },
    /// More than 255 buses.
    #[error("more than 255 PCI buses; use fewer bridges")]
    TooManyBuses,
}

/// Room behind a bridge for a device that is plugged in later.
const SPARE_MEMORY32: u64 = 2 << 20;
const SPARE_MEMORY64: u64 = 32 << 20;
const BRIDGE_GRAIN: u64 = 1 << 20;
const BRIDGE_IO_GRAIN: u64 = 0x1000;

const IO: usize = 0;
const MEMORY32: usize = 1;
const MEMORY64: usize = 2;
const NAMES: [&str; 3] = ["I/O", "32-bit memory", "64-bit memory"];

/// One thing that needs addresses. Memory BARs start on a page of their own: accesses to whole pages are faster.
struct Request {
    size: u64,
    align: u64,
    device: usize,
    /// BAR slot, or `None` for a bridge window.
    bar: Option<u8>,
}

/// Gives every bridge its bus numbers, every BAR an address inside `windows`, and every INTx pin the GSI in its
/// interrupt line register; then switches I/O and memory decoding on (and bus mastering of bridges, without
/// which they would not forward upstream).
pub fn assign_bars(root: &PciBus, windows: &AssignWindows) -> Result<(), AssignError> {
    number_buses(root, 0, &mut 0)?;
    let windows = [windows.io.clone(), windows.memory32.clone(), windows.memory64.clone()];
    place(root, &windows, windows[MEMORY64].is_empty())?;
    enable(root, &|device, pin| intx_gsi(device, pin) as u8);
    Ok(())
}

fn number_buses(bus: &PciBus, number: u8, last: &mut u8) -> Result<(), AssignError> {
    for (_, device) in bus.devices() {
        let Some(behind) = device.secondary_bus() else { continue };
        let secondary = last.checked_add(1).filter(|&n| n < 255).ok_or(AssignError::TooManyBuses)?;
        *last = secondary;
        // Everything until the subordinate number is known.
        device.config_write(PRIMARY_BUS, &[number, secondary, 0xff]);
        number_buses(behind, secondary, last)?;
        device.config_write(PRIMARY_BUS, &[number, secondary, *last]);
    }
    Ok(())
}

fn class(kind: BarKind, no_high: bool) -> usize {
    match kind {
        BarKind::Io => IO,
        BarKind::Memory64 { prefetchable: true } if !no_high => MEMORY64,
        _ => MEMORY32,
    }
}

/// Requests of kind `class_wanted` on `bus`, largest first.
fn requests(bus: &PciBus, class_wanted: usize, no_high: bool) -> Vec<Request> {
    let mut list = Vec::new();
    for (index, (_, device)) in bus.devices().into_iter().enumerate() {
        for bar in device.function().bars() {
            if class(bar.kind, no_high) == class_wanted {
                let align = if class_wanted == IO { bar.size } else { bar.size.max(PAGE_SIZE) };
                list.push(Request { size: bar.size, align, device: index, bar: Some(bar.index) });
            }
        }
        if let Some(behind) = device.secondary_bus() {
            let (size, align) = measure(behind, class_wanted, no_high);
            if size != 0 {
                list.push(Request { size, align, device: index, bar: None });
            }
        }
    }
    list.sort_by_key(|r| (std::cmp::Reverse(r.align), r.device, r.bar));
    list
}

/// Size and alignment of the window that a bridge in front of `bus` needs.
fn measure(bus: &PciBus, class: usize, no_high: bool) -> (u64, u64) {
    let (grain, spare) = match class {
        IO => (BRIDGE_IO_GRAIN, 0),
        MEMORY32 => (BRIDGE_GRAIN, SPARE_MEMORY32),
        _ if no_high => return (0, 0),
        _ => (BRIDGE_GRAIN, SPARE_MEMORY64),
    };
    let (mut size, mut align) = (0u64, grain);
    for r in requests(bus, class, no_high) {
        size = size.next_multiple_of(r.align) + r.size;
        align = align.max(r.align);
    }
    (size.max(spare).next_multiple_of(grain), align)
}

fn place(bus: &PciBus, windows: &[Range<u64>; 3], no_high: bool) -> Result<(), AssignError> {
    let devices = bus.devices();
    let mut behind: Vec<[Range<u64>; 3]> = devices.iter().map(|_| Default::default()).collect();
    for class in [IO, MEMORY32, MEMORY64] {
        let mut next = windows[class].start;
        for r in requests(bus, class, no_high) {
            let at = next.next_multiple_of(r.align);
            if at + r.size > windows[class].end {
                let Range { start, end } = windows[class].clone();
                return Err(AssignError::WindowFull { window: NAMES[class], start, end, size: r.size });
            }
            next = at + r.size;
            match r.bar {
                Some(slot) => write_bar(&*devices[r.device].1, slot, at),
                None => behind[r.device][class] = at..at + r.size,
            }
        }
    }
    for ((_, device), windows) in devices.iter().zip(&behind) {
        if let Some(bus) = device.secondary_bus() {
            write_windows(&**device, windows);
            place(bus, windows, no_high)?;
        }
    }
    Ok(())
}

fn write_bar(device: &dyn PciDevice, slot: u8, address: u64) {
    let register = crate::regs::BAR0 + u16::from(slot) * 4;
    device.config_write(register, &(address as u32).to_le_bytes());
    let wide = |b: &crate::BarInfo| b.index == slot && matches!(b.kind, BarKind::Memory64 { .. });
    if device.function().bars().iter().any(wide) {
        device.config_write(register + 4, &((address >> 32) as u32).to_le_bytes());
    }
}

/// Programs a bridge's windows; an empty one gets a base above its limit, which closes it.
fn write_windows(device: &dyn PciDevice, windows: &[Range<u64>; 3]) {
    let [io, memory, prefetch] = windows;
    let bounds = |r: &Range<u64>, closed: u64| if r.is_empty() { (closed, 0) } else { (r.start, r.end - 1) };
    let (base, limit) = bounds(io, 0xf000);
    device.config_write(IO_BASE, &[(base >> 8) as u8, (limit >> 8) as u8]);
    let halves = |base: u64, limit: u64| {
        let word = (base >> 16) as u16 as u32 | ((limit >> 16) as u16 as u32) << 16;
        word.to_le_bytes()
    };
    let (base, limit) = bounds(memory, 0xfff0_0000);
    device.config_write(MEMORY_BASE, &halves(base, limit));
    let (base, limit) = bounds(prefetch, 0xfff0_0000);
    device.config_write(PREFETCH_BASE, &halves(base, limit));
    device.config_write(PREFETCH_BASE_UPPER, &((base >> 32) as u32).to_le_bytes());
    device.config_write(PREFETCH_BASE_UPPER + 4, &((limit >> 32) as u32).to_le_bytes());
}

/// Switches decoding on and notes the GSI of each INTx pin; `gsi` maps a device and pin of this bus.
fn enable(bus: &PciBus, gsi: &dyn Fn(u8, u8) -> u8) {
    for (devfn, device) in bus.devices() {
        let slot = devfn >> 3;
        if let Some(pin) = device.function().intx_pin() {
            device.config_write(INTERRUPT_LINE, &[gsi(slot, pin)]);
        }
        let mut command = [0; 2];
        device.config_read(COMMAND, &mut command);
        let mut command = u16::from_le_bytes(command) | COMMAND_IO | COMMAND_MEMORY;
        if let Some(behind) = device.secondary_bus() {
            command |= COMMAND_BUS_MASTER;
            enable(behind, &|device, pin| gsi(slot, swizzle(device, pin)));
        }
        device.config_write(COMMAND, &command.to_le_bytes());
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::bar::{BarSpec, BarTarget};
    use crate::bus::tests::finish;
    use crate::testing::{MapLog, Nothing};
    use crate::{Bdf, FunctionBuilder, Identity, PciRoot, devfn};

    fn windows() -> AssignWindows {
        AssignWindows { io: 0xc000..0x1_0000, memory32: 0xc000_0000..0xe000_0000, memory64: 1 << 38..1 << 39 }
    }

    fn endpoint(maps: &Arc<MapLog>, bars: &[(u8, BarKind, u64)]) -> Arc<dyn PciDevice> {
        let mut b = FunctionBuilder::new(Identity { vendor: 1, ..Identity::default() });
        b.interrupt_pin(0);
        for &(index, kind, size) in bars {
            let target = match kind {
                BarKind::Io => BarTarget::Ports(Arc::new(Nothing)),
                _ => BarTarget::Mmio(Arc::new(Nothing)),
            };
            b.bar(BarSpec { index, kind, size, target: Some(target) });
        }
        finish(b, maps, None)
    }

    fn bridge(maps: &Arc<MapLog>, bus: PciBus) -> Arc<dyn PciDevice> {
        finish(FunctionBuilder::bridge(Identity { vendor: 1, ..Identity::default() }), maps, Some(bus))
    }

    const HIGH: BarKind = BarKind::Memory64 { prefetchable: true };

    #[test]
    fn every_bar_is_mapped_aligned_and_disjoint() {
        let maps = Arc::new(MapLog::default());
        let behind = PciBus::new();
        behind.attach(0, endpoint(&maps, &[(0, BarKind::Memory32, 0x1000), (4, HIGH, 1 << 26)])).unwrap();
        let root = PciRoot::new();
        root.bus().attach(devfn(1, 0), bridge(&maps, behind)).unwrap();
        root.bus().attach(devfn(2, 0), bridge(&maps, PciBus::new())).unwrap();
        let bars = [(0, BarKind::Io, 0x40), (1, BarKind::Memory32, 0x1000), (4, HIGH, 0x4000)];
        root.bus().attach(devfn(3, 0), endpoint(&maps, &bars)).unwrap();
        assign_bars(root.bus(), &windows()).unwrap();
        let mut all = maps.now();
        all.sort_unstable();
        assert_eq!(all.len(), 5);
        for pair in all.windows(2) {
            assert!(pair[0].0 + pair[0].1 <= pair[1].0);
        }
        assert!(all.iter().all(|(at, size)| at % size == 0));
        let mut b = [0; 4];
        root.config_read(Bdf::new(1, 0, 0), INTERRUPT_LINE, &mut b[..1]);
        assert_eq!(u32::from(b[0]), intx_gsi(1, 0));
        root.config_read(Bdf::new(0, 1, 0), MEMORY_BASE, &mut b);
        let (base, limit) = (u16::from_le_bytes([b[0], b[1]]), u16::from_le_bytes([b[2], b[3]]));
        let inside = all.iter().filter(|(at, _)| (at >> 16) as u16 >= base && at >> 16 <= u64::from(limit));
        assert_eq!(inside.count(), 1);
        root.config_read(Bdf::new(0, 1, 0), IO_BASE, &mut b[..2]);
        assert!(b[0] & 0xf0 > b[1] & 0xf0, "no I/O behind the bridge: its window is closed");
    }

    #[test]
    fn high_bars_fall_back_below_four_gib() {
        let maps = Arc::new(MapLog::default());
        let root = PciRoot::new();
        root.bus().attach(devfn(3, 0), endpoint(&maps, &[(4, HIGH, 0x4000)])).unwrap();
        assign_bars(root.bus(), &AssignWindows { memory64: 0..0, ..windows() }).unwrap();
        assert_eq!(maps.now(), vec![(0xc000_0000, 0x4000)]);
    }

    #[test]
    fn a_full_window_is_an_error_that_names_it() {
        let root = PciRoot::new();
        let device = endpoint(&Arc::new(MapLog::default()), &[(0, BarKind::Memory32, 1 << 30)]);
        root.bus().attach(0, device).unwrap();
        let error = assign_bars(root.bus(), &windows()).unwrap_err();
        assert!(error.to_string().contains("32-bit memory window"), "{error}");
    }
}
