//! Guest memory: the address space as memory slots of the kernel's, and dirty logs.
//!
//! ```text
//! AddressSpace ── view_changed ──► plan.rs ──► Slots ──► host.rs: KVM_SET_USER_MEMORY_REGION
//! RamBlock ────── start, stop ───────────────►  │           dirty ring (ring.rs) or KVM_GET_DIRTY_LOG
//! DirtyReader ─── collect ───────────────────►  │──► RamBlock::mark_stored
//! vCPU ────────── enter, ring_full ──────────►  └ gate.rs: nobody is in the guest for a moment
//! ```
//!
//! # Slots
//!
//! RAM is a slot, ROM a read-only slot whose writes leave the guest, and a device is no slot at all. A change of
//! the view takes away what is not shown any more, then adds what is new (the kernel allows no overlap), and leaves
//! alone every slot that still shows the same (`plan.rs`). Where a part of a slot stays and the rest goes, the
//! slot is replaced while the gate is closed. Pages that a device covers in part have no slot: accesses leave the
//! guest, and the address space answers each byte.
//!
//! The space publishes its new view before the slots follow. A vCPU that touches a page whose slot is gone or not
//! there yet leaves the guest with an MMIO access, which the new view answers, RAM included.
//!
//! A slot that the kernel refuses leaves a machine that no longer shows what it should. [`Slots::enter`] then fails
//! with the reason, so that each vCPU ends its run with an error and the machine stops.
//!
//! # Dirty logs
//!
//! Slots are logged only while their block has a [`DirtyReader`](atoll_machine::memory::DirtyReader): the rest of
//! the time stores cost nothing, and of the dirty ring there is only its memory ([`RING_ENTRIES`]).
//!
//! | | dirty ring | dirty log (fallback) |
//! |---|---|---|
//! | kernel | 5.11, asked for when the partition is made | always, `MANUAL_DIRTY_LOG_PROTECT2` from 4.18 |
//! | found out | per vCPU, page by page | a bitmap per slot |
//! | watched again | `KVM_RESET_DIRTY_RINGS` | `KVM_CLEAR_DIRTY_LOG`, or when fetched |
//! | costs | what was dirtied | the size of memory |
//!
//! A store faults *before* it is made, so an entry may name a page that changes a moment later. The page is watched
//! again by the reset. Hence the order of every report: harvest, reset, and only then `mark_stored`. Who reads the
//! page after the report sees all stores before the reset; later ones fault and are reported again. Reports are
//! made under the lock of the table, so that a `take` that comes while another one reports waits for it.
//!
//! The kernel keeps entries back so that a ring never overflows between two looks at it. A `/dev/kvm` that executes
//! guests without the processor's virtualization does not look often enough; there the log is used. A ring that
//! is found full to the last entry has overflowed, and what was in it is not known: the machine stops.
//!
//! Ring entries are of all blocks: whoever harvests reports for all. On KVM_EXIT_DIRTY_RING_FULL the vCPU's own
//! thread does ([`Slots::ring_full`]).
//!
//! Intel processors note stores in a buffer of their own first, and empty it into the ring when they leave the
//! guest. So `collect` closes the gate for a moment before it harvests: what a vCPU stored before the `take` is in
//! it. For the log the kernel does the same.
//!
//! When a slot that is logged goes, what the processor has not told yet goes with it. All its pages are then
//! reported: rare, and safe.
//!
//! # Lock order
//!
//! The address space's changes, a block's dirty sources, the table, the gate (which nobody holds while taking
//! another lock).

mod gate;
mod host;
mod plan;
mod ring;

use std::collections::BTreeMap;
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use atoll_foundation::log_limited;
use atoll_machine::backend::BackendError;
use atoll_machine::cpu::topology::MAX_CPUS;
use atoll_machine::memory::{AddressSpace, DirtySource, FlatView, RamBlock, ViewListener};
use kvm_ioctls::{VcpuFd, VmFd};

use self::gate::Gate;
pub(crate) use self::gate::{Inside, Kick};
use self::host::{Host, Kernel, RingMemory};
use self::plan::{Kind, Piece, Table, free_number, pieces, plan};
use self::ring::Ring;
use crate::host::Capabilities;

/// Entries of one vCPU's dirty ring: 64 KiB of the host's memory. The kernel keeps back some 600 of them for what
/// the processor has in its own buffer; the rest is 14 MiB of pages between two exits.
pub(crate) const RING_ENTRIES: u32 = 4096;

/// How stores are found out.
enum Log {
    /// A ring of so many entries for every vCPU that has been attached.
    Rings(usize, BTreeMap<u32, Ring>),
    /// The bitmap of each slot.
    Bitmaps,
}

struct Inner {
    table: Table,
    log: Log,
    /// Blocks that have a reader.
    logged: Vec<Arc<RamBlock>>,
    /// Why the slots are not what they should be.
    failure: Option<String>,
}

impl Inner {
    fn is_logged(&self, piece: &Piece) -> bool {
        piece.kind == Kind::Ram && self.logged.iter().any(|b| Arc::ptr_eq(b, &piece.block))
    }
}

/// The memory slots of one virtual machine. See the module's documentation.
pub(crate) struct Slots {
    me: Weak<Self>,
    host: Box<dyn Host>,
    inner: Mutex<Inner>,
    /// [`Inner::failure`] is set.
    failed: AtomicBool,
    gate: Gate,
}

impl Slots {
    /// Makes the slots of `vm`, which has neither slots nor vCPUs yet, follow `space` from now on.
    pub(crate) fn new(
        vm: Arc<VmFd>,
        space: Arc<AddressSpace>,
        caps: &Capabilities,
    ) -> Result<Arc<Self>, BackendError> {
        let entries = caps.dirty_ring.map(|max| max.min(RING_ENTRIES));
        let (kernel, entries) = Kernel::new(vm, entries);
        Self::with_host(Box::new(kernel), entries, &space)
    }

    /// As [`Slots::new`] with rings of so many entries, which `host` has already, or without rings.
    fn with_host(
        host: Box<dyn Host>,
        ring_entries: Option<u32>,
        space: &AddressSpace,
    ) -> Result<Arc<Self>, BackendError> {
        let log = ring_entries.map_or(Log::Bitmaps, |entries| Log::Rings(entries as usize, BTreeMap::new()));
        let inner = Inner { table: Table::new(), log, logged: Vec::new(), failure: None };
        let slots = Arc::new_cyclic(|me| Self {
            me: me.clone(),
            host,
            inner: Mutex::new(inner),
            failed: AtomicBool::new(false),
            gate: Gate::new(MAX_CPUS),
        });
        let listener: Arc<dyn ViewListener> = slots.clone();
        space.add_listener(&listener);
        match slots.failure() {
            Some(why) => Err(BackendError::Config(why)),
            None => Ok(slots),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Says how a vCPU is made to leave KVM_RUN; called with its index, from any thread. The first call counts.
    pub(crate) fn set_kick(&self, kick: Kick) {
        self.gate.set_kick(kick);
    }

    /// Called by the thread of vCPU `index` right before KVM_RUN, the result dropped right after it. Fails, with the
    /// reason, when the slots are not what they should be: the machine cannot go on.
    pub(crate) fn enter(&self, index: u32) -> Result<Inside<'_>, String> {
        let inside = self.gate.enter(index).ok_or_else(|| format!("vCPU {index} has no seat"))?;
        if self.failed.load(Ordering::Relaxed) {
            // Who holds the table may be waiting for the gate.
            drop(inside);
            return Err(self.failure().unwrap_or_default());
        }
        Ok(inside)
    }

    /// Maps the dirty ring of the new vCPU `index`, when rings are in use.
    pub(crate) fn attach_vcpu(&self, index: u32, fd: &VcpuFd) -> io::Result<()> {
        if let Log::Rings(entries, rings) = &mut self.lock().log {
            rings.insert(index, Ring::new(RingMemory::map(fd, *entries)?));
        }
        Ok(())
    }

    /// A dirty ring is full (KVM_EXIT_DIRTY_RING_FULL): empties the rings, so that the vCPU can go on.
    pub(crate) fn ring_full(&self) {
        self.harvest(&mut self.lock());
    }

    /// Why the slots are not what they should be, if so.
    pub(crate) fn failure(&self) -> Option<String> {
        self.lock().failure.clone()
    }

    /// Stops the machine: each vCPU meets the failure before it enters the guest again, and all leave it now.
    fn fail(&self, inner: &mut Inner, why: String) {
        log_limited!(error, "{why}");
        inner.failure.get_or_insert(why);
        if !self.failed.swap(true, Ordering::SeqCst) {
            drop(self.gate.close());
        }
    }

    /// Brings the slots in line with `view`.
    fn follow(&self, inner: &mut Inner, view: &FlatView) {
        let limit = self.host.max_slots();
        let plan = match plan(&inner.table, &pieces(view), limit) {
            Ok(plan) => plan,
            Err(needed) => {
                let why = format!("guest memory is in {needed} pieces, KVM has {limit} memory slots");
                return self.fail(inner, why);
            }
        };
        let closed = plan.replaces(&inner.table).then(|| self.gate.close());
        for number in plan.remove {
            self.remove(inner, number);
        }
        for piece in plan.add {
            let number = free_number(&inner.table);
            match self.host.set(number, &piece, inner.is_logged(&piece)) {
                Ok(()) => drop(inner.table.insert(number, piece)),
                Err(error) => {
                    self.fail(inner, format!("KVM refuses memory slot {number} ({piece:?}): {error}"))
                }
            }
        }
        drop(closed);
    }

    fn remove(&self, inner: &mut Inner, number: u32) {
        let Some(piece) = inner.table.get(&number).cloned() else { return };
        if let Err(error) = self.host.remove(number, &piece) {
            // The slot stays in the table, and so its block stays mapped.
            return self
                .fail(inner, format!("KVM does not remove memory slot {number} ({piece:?}): {error}"));
        }
        inner.table.remove(&number);
        if inner.is_logged(&piece) {
            // Entries with the number must be gone before another slot gets it.
            self.harvest(inner);
            piece.block.mark_stored(piece.pages());
        }
    }

    /// Switches the logging of the slots that show `block`.
    fn log(&self, inner: &mut Inner, block: &Arc<RamBlock>, on: bool) {
        let of_block = |piece: &Piece| piece.kind == Kind::Ram && Arc::ptr_eq(&piece.block, block);
        let errors: Vec<_> = inner
            .table
            .iter()
            .filter(|(_, piece)| of_block(piece))
            .filter_map(|(number, piece)| Some((*number, self.host.set(*number, piece, on).err()?)))
            .collect();
        for (number, error) in errors {
            self.fail(inner, format!("KVM does not switch the dirty log of memory slot {number}: {error}"));
        }
    }

    /// Empties the rings and reports what was in them, of whatever block.
    fn harvest(&self, inner: &mut Inner) {
        let Inner { table, log: Log::Rings(entries, rings), .. } = inner else { return };
        let mut found = Vec::new();
        let mut most = 0;
        for ring in rings.values_mut() {
            most = most.max(ring.harvest(|slot, page| found.push((slot, page))));
        }
        if most == 0 {
            return;
        }
        if most == *entries {
            return self.fail(inner, format!("KVM overflowed a dirty ring of {most} entries"));
        }
        if let Err(error) = self.host.reset_rings() {
            return self.fail(inner, format!("KVM does not reset the dirty rings: {error}"));
        }
        found.sort_unstable();
        found.dedup();
        for run in found.chunk_by(|a, b| a.0 == b.0) {
            // An entry of a slot that is gone: its pages were all reported.
            let Some(piece) = run.first().and_then(|(number, _)| table.get(number)) else { continue };
            let pages = piece.pages();
            piece
                .block
                .mark_stored(run.iter().map(|(_, page)| pages.start + page).filter(|p| *p < pages.end));
        }
    }

    /// Fetches the bitmaps of the slots that show `block`, and reports them.
    fn fetch(&self, inner: &mut Inner, block: &Arc<RamBlock>) {
        for (number, piece) in &inner.table {
            if !Arc::ptr_eq(&piece.block, block) || !inner.is_logged(piece) {
                continue;
            }
            let pages = piece.pages();
            match self.host.take_log(*number, piece) {
                Ok(words) => {
                    let bits = words.iter().zip(0u64..).flat_map(|(word, at)| {
                        (0..64).filter(move |bit| word >> bit & 1 != 0).map(move |bit| at * 64 + bit)
                    });
                    block.mark_stored(bits.map(|page| pages.start + page).filter(|p| *p < pages.end));
                }
                Err(error) => {
                    log_limited!(
                        error,
                        "dirty log of memory slot {number}: {error}; all its pages count as dirty"
                    );
                    block.mark_stored(pages);
                }
            }
        }
    }
}

impl ViewListener for Slots {
    fn view_changed(&self, _old: &FlatView, new: &FlatView) {
        if let Some(me) = self.me.upgrade() {
            let source: Arc<dyn DirtySource> = me;
            // Before the table is locked: a block that has readers calls `start` at once.
            for piece in pieces(new).iter().filter(|p| p.kind == Kind::Ram) {
                piece.block.add_dirty_source(&source);
            }
        }
        self.follow(&mut self.lock(), new);
    }
}

impl DirtySource for Slots {
    fn start(&self, block: &Arc<RamBlock>) {
        let mut inner = self.lock();
        inner.logged.push(block.clone());
        self.log(&mut inner, block, true);
    }

    fn stop(&self, block: &Arc<RamBlock>) {
        let mut inner = self.lock();
        inner.logged.retain(|b| !Arc::ptr_eq(b, block));
        self.log(&mut inner, block, false);
        // What is left in the rings is not to turn up in the next log.
        self.harvest(&mut inner);
    }

    fn collect(&self, block: &Arc<RamBlock>) {
        if matches!(self.lock().log, Log::Rings(..)) {
            drop(self.gate.close());
            self.harvest(&mut self.lock());
        } else {
            self.fetch(&mut self.lock(), block);
        }
    }
}

#[cfg(test)]
pub(crate) mod kvm_tests;
#[cfg(test)]
mod tests;
