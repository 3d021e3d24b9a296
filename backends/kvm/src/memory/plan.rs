//! Which slots a view of the address space needs, and the fewest changes that lead there.
//!
//! A slot that the new view shows unchanged over its whole length stays, even where the view shows more of the
//! same block beside it: memory that a guest is using is not taken away and given back for the sake of a tidy
//! table. What the view shows and no kept slot covers becomes new slots. Only when that would exceed the kernel's
//! limit is the table made anew with one slot per range.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;

use atoll_machine::memory::{FlatTarget, FlatView, PAGE_SIZE, RamBlock};

/// How a piece may be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// Read, written and executed.
    Ram,
    /// Read and executed; writes leave the guest.
    Rom,
}

/// Whole pages of one block at a place in the guest's address space.
#[derive(Clone)]
pub(super) struct Piece {
    pub(super) gpa: u64,
    pub(super) len: u64,
    pub(super) block: Arc<RamBlock>,
    pub(super) offset: u64,
    pub(super) kind: Kind,
}

impl Piece {
    pub(super) fn end(&self) -> u64 {
        self.gpa + self.len
    }

    /// Whether `self` is `other` or a part of it.
    fn is_part_of(&self, other: &Self) -> bool {
        self.gpa >= other.gpa
            && self.end() <= other.end()
            && self.kind == other.kind
            && Arc::ptr_eq(&self.block, &other.block)
            && self.offset == other.offset + (self.gpa - other.gpa)
    }

    pub(super) fn overlaps(&self, other: &Self) -> bool {
        self.gpa < other.end() && other.gpa < self.end()
    }

    /// The part of it in `from..to`, which lies inside.
    fn part(&self, from: u64, to: u64) -> Self {
        let offset = self.offset + (from - self.gpa);
        Self { gpa: from, len: to - from, offset, ..self.clone() }
    }

    /// Numbers of its pages in the block.
    pub(super) fn pages(&self) -> std::ops::Range<u64> {
        self.offset / PAGE_SIZE..(self.offset + self.len) / PAGE_SIZE
    }
}

impl fmt::Debug for Piece {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (gpa, len, name, offset) = (self.gpa, self.len, self.block.name(), self.offset);
        write!(f, "{:?} {gpa:#x}+{len:#x} of {name}+{offset:#x}", self.kind)
    }
}

/// Slots by number.
pub(super) type Table = BTreeMap<u32, Piece>;

/// What `view` shows of blocks, ascending. Pages of which a device has a part belong to no piece: accesses to them
/// leave the guest, and the address space answers each byte as it should.
pub(super) fn pieces(view: &FlatView) -> Vec<Piece> {
    let piece = |range: &atoll_machine::memory::FlatRange| {
        let (block, offset, kind) = match &range.target {
            FlatTarget::Ram { block, offset } => (block, *offset, Kind::Ram),
            FlatTarget::Rom { block, offset, .. } => (block, *offset, Kind::Rom),
            FlatTarget::Mmio { .. } => return None,
        };
        let gpa = range.start.next_multiple_of(PAGE_SIZE);
        let end = range.end() / PAGE_SIZE * PAGE_SIZE;
        let offset = offset + (gpa - range.start);
        (gpa < end).then(|| Piece { gpa, len: end - gpa, block: block.clone(), offset, kind })
    };
    view.ranges().iter().filter_map(piece).collect()
}

/// Slots to remove, and then pieces to add.
#[derive(Debug)]
pub(super) struct Plan {
    pub(super) remove: Vec<u32>,
    pub(super) add: Vec<Piece>,
}

impl Plan {
    /// Whether something that the guest may be using goes and comes back in another slot.
    pub(super) fn replaces(&self, table: &Table) -> bool {
        let removed = self.remove.iter().filter_map(|number| table.get(number));
        removed.into_iter().any(|old| self.add.iter().any(|new| new.overlaps(old)))
    }
}

/// The changes that make `table` show `wanted` with at most `limit` slots. Fails with the number of slots needed
/// when the limit does not suffice.
pub(super) fn plan(table: &Table, wanted: &[Piece], limit: usize) -> Result<Plan, usize> {
    let fits = |piece: &Piece| {
        let after = wanted.partition_point(|w| w.gpa <= piece.gpa);
        after.checked_sub(1).is_some_and(|i| piece.is_part_of(&wanted[i]))
    };
    let plan = keeping(table, wanted, fits);
    if table.len() - plan.remove.len() + plan.add.len() <= limit {
        return Ok(plan);
    }
    if wanted.len() > limit {
        return Err(wanted.len());
    }
    let same = |piece: &Piece| wanted.iter().any(|w| w.gpa == piece.gpa && w.len == piece.len);
    Ok(keeping(table, wanted, |piece| fits(piece) && same(piece)))
}

/// Keeps the slots of `table` for which `keep` says so, each a part of `wanted`, and adds what they do not cover.
fn keeping(table: &Table, wanted: &[Piece], keep: impl Fn(&Piece) -> bool) -> Plan {
    let remove = table.iter().filter(|(_, piece)| !keep(piece)).map(|(number, _)| *number).collect();
    let mut kept: Vec<&Piece> = table.values().filter(|piece| keep(piece)).collect();
    kept.sort_by_key(|piece| piece.gpa);
    let mut add = Vec::new();
    let mut kept = kept.into_iter().peekable();
    for piece in wanted {
        let mut at = piece.gpa;
        while let Some(covered) = kept.next_if(|k| k.gpa < piece.end()) {
            if at < covered.gpa {
                add.push(piece.part(at, covered.gpa));
            }
            at = covered.end();
        }
        if at < piece.end() {
            add.push(piece.part(at, piece.end()));
        }
    }
    Plan { remove, add }
}

/// The lowest number that no slot has.
pub(super) fn free_number(table: &Table) -> u32 {
    (0..).zip(table.keys()).find(|(n, used)| n != *used).map_or(table.len() as u32, |(n, _)| n)
}

#[cfg(test)]
#[path = "plan_tests.rs"]
mod tests;
