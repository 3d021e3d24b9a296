//! The guest-physical address space: regions, priorities, and their publication as a [`FlatView`].
//!
//! At every address the enabled region with the highest priority answers; of equal priorities the one mapped
//! last. An alias shows what the space shows at its source address; where that is nothing (or another alias
//! beyond [`MAX_ALIAS_DEPTH`]), the alias is transparent.
//!
//! ```text
//! change ──► regions (under the lock) ──► flatten ──► FlatView ──ArcSwap──► readers, without a lock
//!                                                        └──► generation += 1 ──► vCPUs flush their TLBs
//! ```
//!
//! A vCPU that sees the new generation is certain to load a view at least that new.
//!
//! Who has to mirror the space somewhere else (a hypervisor's memory slots) is a [`ViewListener`]: it is told of
//! every change inside the change, after the publication. Until it is done a vCPU may still reach through the
//! mirror what the space does not show any more; when the change returns, no more.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, Weak};

use arc_swap::ArcSwap;

use super::view::{FlatRange, FlatTarget, FlatView};
use super::{GPA_END, MemoryError, PAGE_SIZE, RamBlock};
use crate::bus::MmioDevice;

/// How often an alias may lead to another alias. PC chipsets need one (PAM shows the BIOS below 1 MiB).
const MAX_ALIAS_DEPTH: u32 = 4;

/// Names a region of one [`AddressSpace`]; never used again after [`AddressSpace::unmap`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RegionId(u64);

#[derive(Clone)]
enum Backing {
    Target(FlatTarget),
    Alias { source: u64 },
}

struct Region {
    id: RegionId,
    gpa: u64,
    len: u64,
    priority: i32,
    enabled: bool,
    backing: Backing,
}

#[derive(Default)]
struct Regions {
    /// Sorted: highest priority first, of equal ones the newest first.
    list: Vec<Region>,
    next_id: u64,
    listeners: Vec<Weak<dyn ViewListener>>,
}

/// Told about every change of an [`AddressSpace`].
pub trait ViewListener: Send + Sync {
    /// The space showed `old` and shows `new` from now on. Called with the changes' lock held, one change after the
    /// other: it may look at the space but not change it.
    fn view_changed(&self, old: &FlatView, new: &FlatView);
}

/// The guest-physical address space of a machine. See the module's documentation.
pub struct AddressSpace {
    regions: Mutex<Regions>,
    view: ArcSwap<FlatView>,
    generation: AtomicU64,
}

/// Several changes that become visible together. See [`AddressSpace::transaction`].
pub struct Transaction<'a> {
    regions: &'a mut Regions,
    changed: bool,
}

impl AddressSpace {
    /// An empty address space.
    #[allow(clippy::new_ret_no_self)]
    pub fn new() -> Arc<Self> {
        Arc::new(Self {
            regions: Mutex::default(),
            view: ArcSwap::from_pointee(FlatView::default()),
            generation: AtomicU64::new(0),
        })
    }

    fn lock(&self) -> MutexGuard<'_, Regions> {
        // A panic cannot leave the list half changed: every change is one push, retain or assignment.
        self.regions.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// Makes several changes and publishes them as one. `changes` must not call this address space itself,
    /// nor a device.
    pub fn transaction<R>(&self, changes: impl FnOnce(&mut Transaction<'_>) -> R) -> R {
        let mut regions = self.lock();
        let mut transaction = Transaction { regions: &mut regions, changed: false };
        let result = changes(&mut transaction);
        if transaction.changed {
            let generation = self.generation.load(Ordering::Relaxed) + 1;
            let view = Arc::new(FlatView::new(regions.flatten(), generation));
            let old = self.view.swap(view.clone());
            self.generation.store(generation, Ordering::SeqCst);
            regions.tell(&old, &view);
        }
        result
    }

    /// Has `listener` told about every change, as long as it lives. Its first call comes before this returns: from
    /// an empty view to the present one.
    pub fn add_listener(&self, listener: &Arc<dyn ViewListener>) {
        let mut regions = self.lock();
        regions.listeners.retain(|l| l.strong_count() > 0);
        regions.listeners.push(Arc::downgrade(listener));
        listener.view_changed(&FlatView::default(), &self.view.load());
    }

    /// Shows `len` bytes of `block` from `offset` as RAM at `gpa`, all multiples of 4 KiB.
    pub fn map_ram(
        &self,
        gpa: u64,
        block: &Arc<RamBlock>,
        offset: u64,
        len: u64,
        priority: i32,
    ) -> Result<RegionId, MemoryError> {
        self.transaction(|t| t.map_ram(gpa, block, offset, len, priority))
    }

    /// Like [`AddressSpace::map_ram`], but the guest's writes are ignored.
    pub fn map_rom(
        &self,
        gpa: u64,
        block: &Arc<RamBlock>,
        offset: u64,
        len: u64,
        priority: i32,
    ) -> Result<RegionId, MemoryError> {
        self.transaction(|t| t.map_rom(gpa, block, offset, len, priority))
    }

    /// Like [`AddressSpace::map_rom`], but the guest's writes go to `device`, whose offset 0 is the region's
    /// first byte: flash.
    pub fn map_rom_device(
        &self,
        gpa: u64,
        block: &Arc<RamBlock>,
        offset: u64,
        len: u64,
        device: Arc<dyn MmioDevice>,
        priority: i32,
    ) -> Result<RegionId, MemoryError> {
        self.transaction(|t| t.map_rom_device(gpa, block, offset, len, device, priority))
    }

    /// Gives `len` bytes at `gpa` to `device`. Any alignment; a region of whole pages is faster to reach.
    pub fn map_mmio(
        &self,
        gpa: u64,
        len: u64,
        device: Arc<dyn MmioDevice>,
        priority: i32,
    ) -> Result<RegionId, MemoryError> {
        self.transaction(|t| t.map_mmio(gpa, len, device, priority))
    }

    /// Shows at `gpa` what the space shows at `source`, `len` bytes, all multiples of 4 KiB.
    pub fn map_alias(&self, gpa: u64, source: u64, len: u64, priority: i32) -> Result<RegionId, MemoryError> {
        self.transaction(|t| t.map_alias(gpa, source, len, priority))
    }

    /// Takes the region away. Returns whether there was one.
    pub fn unmap(&self, id: RegionId) -> bool {
        self.transaction(|t| t.unmap(id))
    }

    /// Shows or hides the region. Returns whether there is one.
    pub fn set_enabled(&self, id: RegionId, enabled: bool) -> bool {
        self.transaction(|t| t.set_enabled(id, enabled))
    }

    /// Moves the region to `gpa`. Returns whether there is one. What lies beyond [`GPA_END`] is not visible,
    /// nor is a RAM, ROM or alias region whose new address is not a multiple of 4 KiB: a guest may program
    /// any address into a BAR.
    pub fn relocate(&self, id: RegionId, gpa: u64) -> bool {
        self.transaction(|t| t.relocate(id, gpa))
    }

    /// Raised by every change, after the new view is published.
    #[inline]
    pub fn generation(&self) -> u64 {
        self.generation.load(Ordering::SeqCst)
    }

    /// What the space shows now.
    pub fn view(&self) -> Arc<FlatView> {
        self.view.load_full()
    }

    /// Fills `buf` from guest RAM or ROM at `gpa`, as DMA does. May span ranges; on an error `buf` may be
    /// partly filled.
    pub fn read(&self, gpa: u64, buf: &mut [u8]) -> Result<(), MemoryError> {
        let view = self.view.load();
        let mut done = 0;
        view.walk_ram(gpa, buf.len() as u64, true, |block, offset, len| {
            let end = done + len as usize;
            block.read(offset, &mut buf[done..end])?;
            done = end;
            Ok(())
        })
    }

    /// Stores `data` to guest RAM at `gpa`, as DMA does, and notes it. May span ranges; nothing is stored
    /// unless all of it is RAM.
    pub fn write(&self, gpa: u64, data: &[u8]) -> Result<(), MemoryError> {
        let view = self.view.load();
        view.walk_ram(gpa, data.len() as u64, false, |_, _, _| Ok(()))?;
        let mut done = 0;
        view.walk_ram(gpa, data.len() as u64, false, |block, offset, len| {
            let end = done + len as usize;
            block.write(offset, &data[done..end])?;
            done = end;
            Ok(())
        })
    }

    /// A processor's read of any address: RAM and ROM answer themselves, devices are called, and bytes that
    /// nobody claims read as 0xff.
    pub fn mmio_read(&self, gpa: u64, data: &mut [u8]) {
        let view = self.view.load();
        split(&view, gpa, data.len(), |range, part, at| {
            let part = &mut data[part];
            match range {
                None => part.fill(0xff),
                Some(range) => {
                    let inside = at - range.start;
                    match &range.target {
                        FlatTarget::Ram { block, offset } | FlatTarget::Rom { block, offset, .. } => {
                            if block.read(offset + inside, part).is_err() {
                                part.fill(0xff);
                            }
                        }
                        FlatTarget::Mmio { device, offset } => device.mmio_read(offset + inside, part),
                    }
                }
            }
        });
    }

    /// A processor's write to any address: RAM takes it, devices are called, ROM without a device and
    /// unclaimed addresses ignore it.
    pub fn mmio_write(&self, gpa: u64, data: &[u8]) {
        let view = self.view.load();
        split(&view, gpa, data.len(), |range, part, at| {
            let part = &data[part];
            let Some(range) = range else { return };
            let inside = at - range.start;
            match &range.target {
                FlatTarget::Ram { block, offset } => {
                    // In range by construction of the view.
                    let _ = block.write(offset + inside, part);
                }
                FlatTarget::Rom { writes: Some(device), device_offset, .. } => {
                    device.mmio_write(device_offset + inside, part);
                }
                FlatTarget::Rom { writes: None, .. } => {}
                FlatTarget::Mmio { device, offset } => device.mmio_write(offset + inside, part),
            }
        });
    }
}

/// Cuts an access of `len` bytes at `gpa` where ranges begin and end. Addresses wrap at 64 bits.
fn split(
    view: &FlatView,
    gpa: u64,
    len: usize,
    mut part: impl FnMut(Option<&FlatRange>, std::ops::Range<usize>, u64),
) {
    let mut done = 0;
    while done < len {
        let at = gpa.wrapping_add(done as u64);
        let range = view.lookup(at);
        let until = match range {
            Some(range) => range.end(),
            None => view.next_start(at).unwrap_or(u64::MAX),
        };
        let now = (len - done).min(usize::try_from(until - at).unwrap_or(usize::MAX)).max(1);
        part(range, done..done + now, at);
        done += now;
    }
}

impl Transaction<'_> {
    fn map(&mut self, gpa: u64, len: u64, priority: i32, backing: Backing) -> Result<RegionId, MemoryError> {
        match gpa.checked_add(len) {
            Some(end) if len > 0 && end <= GPA_END => {}
            _ => return Err(MemoryError::BadRange { gpa, len }),
        }
        let id = RegionId(self.regions.next_id);
        self.regions.next_id += 1;
        let at = self.regions.list.partition_point(|r| r.priority > priority);
        self.regions.list.insert(at, Region { id, gpa, len, priority, enabled: true, backing });
        self.changed = true;
        Ok(id)
    }

    fn map_block(
        &mut self,
        gpa: u64,
        len: u64,
        priority: i32,
        target: FlatTarget,
    ) -> Result<RegionId, MemoryError> {
        if let FlatTarget::Ram { block, offset } | FlatTarget::Rom { block, offset, .. } = &target {
            check_pages(gpa, len, *offset)?;
            if offset.checked_add(len).is_none_or(|end| end > block.len()) {
                let name = block.name().to_owned();
                return Err(MemoryError::OutsideBlock { name, offset: *offset, len });
            }
        }
        self.map(gpa, len, priority, Backing::Target(target))
    }

    /// See [`AddressSpace::map_ram`].
    pub fn map_ram(
        &mut self,
        gpa: u64,
        block: &Arc<RamBlock>,
        offset: u64,
        len: u64,
        priority: i32,
    ) -> Result<RegionId, MemoryError> {
        self.map_block(gpa, len, priority, FlatTarget::Ram { block: block.clone(), offset })
    }

    /// See [`AddressSpace::map_rom`].
    pub fn map_rom(
        &mut self,
        gpa: u64,
        block: &Arc<RamBlock>,
        offset: u64,
        len: u64,
        priority: i32,
    ) -> Result<RegionId, MemoryError> {
        let target = FlatTarget::Rom { block: block.clone(), offset, writes: None, device_offset: 0 };
        self.map_block(gpa, len, priority, target)
    }

    /// See [`AddressSpace::map_rom_device`].
    pub fn map_rom_device(
        &mut self,
        gpa: u64,
        block: &Arc<RamBlock>,
        offset: u64,
        len: u64,
        device: Arc<dyn MmioDevice>,
        priority: i32,
    ) -> Result<RegionId, MemoryError> {
        let target = FlatTarget::Rom { block: block.clone(), offset, writes: Some(device), device_offset: 0 };
        self.map_block(gpa, len, priority, target)
    }

    /// See [`AddressSpace::map_mmio`].
    pub fn map_mmio(
        &mut self,
        gpa: u64,
        len: u64,
        device: Arc<dyn MmioDevice>,
        priority: i32,
    ) -> Result<RegionId, MemoryError> {
        self.map(gpa, len, priority, Backing::Target(FlatTarget::Mmio { device, offset: 0 }))
    }

    /// See [`AddressSpace::map_alias`].
    pub fn map_alias(
        &mut self,
        gpa: u64,
        source: u64,
        len: u64,
        priority: i32,
    ) -> Result<RegionId, MemoryError> {
        check_pages(gpa, len, source)?;
        match source.checked_add(len) {
            Some(end) if end <= GPA_END => self.map(gpa, len, priority, Backing::Alias { source }),
            _ => Err(MemoryError::BadRange { gpa: source, len }),
        }
    }

    /// See [`AddressSpace::unmap`].
    pub fn unmap(&mut self, id: RegionId) -> bool {
        let before = self.regions.list.len();
        self.regions.list.retain(|r| r.id != id);
        let found = self.regions.list.len() != before;
        self.changed |= found;
        found
    }

    /// See [`AddressSpace::set_enabled`].
    pub fn set_enabled(&mut self, id: RegionId, enabled: bool) -> bool {
        self.change(id, |r| std::mem::replace(&mut r.enabled, enabled) != enabled)
    }

    /// See [`AddressSpace::relocate`].
    pub fn relocate(&mut self, id: RegionId, gpa: u64) -> bool {
        self.change(id, |r| std::mem::replace(&mut r.gpa, gpa) != gpa)
    }

    fn change(&mut self, id: RegionId, change: impl FnOnce(&mut Region) -> bool) -> bool {
        let Some(region) = self.regions.list.iter_mut().find(|r| r.id == id) else { return false };
        self.changed |= change(region);
        true
    }
}

fn check_pages(gpa: u64, len: u64, offset: u64) -> Result<(), MemoryError> {
    if [gpa, len, offset].iter().all(|v| v.is_multiple_of(PAGE_SIZE)) {
        Ok(())
    } else {
        Err(MemoryError::Misaligned { gpa, len, offset })
    }
}

impl Region {
    fn visible(&self) -> bool {
        let whole_pages = match &self.backing {
            Backing::Target(FlatTarget::Mmio { .. }) => true,
            _ => self.gpa.is_multiple_of(PAGE_SIZE),
        };
        self.enabled && whole_pages && self.gpa < GPA_END
    }
}

impl Regions {
    fn tell(&self, old: &FlatView, new: &FlatView) {
        self.listeners.iter().filter_map(Weak::upgrade).for_each(|l| l.view_changed(old, new));
    }

    /// What the regions add up to, with neighbours that continue each other joined.
    fn flatten(&self) -> Vec<FlatRange> {
        let mut joined: Vec<FlatRange> = Vec::new();
        for range in self.show(0, GPA_END, 0) {
            match joined.last_mut() {
                Some(last) if last.end() == range.start && last.target.continues(last.len, &range.target) => {
                    last.len += range.len;
                }
                _ => joined.push(range),
            }
        }
        joined
    }

    /// What shows in `from..to`: regions in order of precedence, each filling what is still open.
    fn show(&self, from: u64, to: u64, depth: u32) -> Vec<FlatRange> {
        let mut shown: Vec<FlatRange> = Vec::new();
        for region in self.list.iter().filter(|r| r.visible()) {
            let start = region.gpa.max(from);
            let end = region.gpa.saturating_add(region.len).min(to);
            for (start, end) in holes(&shown, start, end) {
                let inside = start - region.gpa;
                match &region.backing {
                    Backing::Target(target) => {
                        let target = target.advanced(inside);
                        shown.push(FlatRange { start, len: end - start, target });
                    }
                    Backing::Alias { source } if depth < MAX_ALIAS_DEPTH => {
                        let source = source + inside;
                        for mut range in self.show(source, source + (end - start), depth + 1) {
                            range.start = range.start - source + start;
                            shown.push(range);
                        }
                    }
                    Backing::Alias { .. } => {}
                }
            }
            shown.sort_by_key(|r| r.start);
        }
        shown
    }
}

/// The parts of `start..end` that no range of the sorted list `shown` covers.
fn holes(shown: &[FlatRange], start: u64, end: u64) -> Vec<(u64, u64)> {
    let mut holes = Vec::new();
    let mut at = start;
    let first = shown.partition_point(|r| r.end() <= start);
    for range in &shown[first..] {
        if range.start >= end {
            break;
        }
        if range.start > at {
            holes.push((at, range.start));
        }
        at = at.max(range.end());
    }
    if at < end {
        holes.push((at, end));
    }
    holes
}

#[cfg(test)]
#[path = "address_space_tests.rs"]
mod tests;
