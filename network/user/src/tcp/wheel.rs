//! Deadlines of flows, one each, on a wheel: setting one costs a few stores, none needs memory of its own.
//!
//! ```text
//! slot        0      1      2            255
//!          ┌──────┬──────┬──────┬─ ─ ─┬──────┐
//!          │ list │ list │ list │     │ list │   a deadline at millisecond t is in slot (t / 16) mod 256, with
//!          └──────┴──────┴──────┴─ ─ ─┴──────┘   whatever turns of the wheel it is still away
//!            each with the earliest time for which it needs to be looked at
//! ```
//!
//! A deadline that moves to a later time stays where it is until its old time comes: most deadlines are moved with
//! every packet, and few ever come. A deadline that moves to an earlier time changes its slot.

use super::links::{Links, List};

const SLOTS: usize = 256;
/// Milliseconds of a slot: what a deadline may be late.
const SLOT_MS: u64 = 16;

/// "Never", in milliseconds.
pub(super) const NEVER: u64 = u64::MAX;

#[derive(Clone, Copy)]
struct Entry {
    /// When the number is due.
    deadline: u64,
    /// What decides its slot: at or before `deadline`. [`NEVER`]: in no slot.
    filed: u64,
}

/// The wheel. Times are milliseconds of any clock that does not go backwards.
pub(super) struct Wheel {
    slots: [(List, u64); SLOTS],
    links: Links,
    entries: Vec<Entry>,
    /// No slot needs to be looked at before.
    next: u64,
}

impl Wheel {
    pub(super) fn with_capacity(numbers: usize) -> Self {
        Self {
            slots: [(List::EMPTY, NEVER); SLOTS],
            links: Links::with_capacity(numbers),
            entries: Vec::with_capacity(numbers),
            next: NEVER,
        }
    }

    /// Makes room for the numbers below `count`.
    pub(super) fn grow(&mut self, count: usize) {
        if self.entries.len() < count {
            self.entries.resize(count, Entry { deadline: NEVER, filed: NEVER });
        }
        self.links.grow(count);
    }

    /// Sets when `number` is due; [`NEVER`] takes it off.
    pub(super) fn set(&mut self, number: u32, deadline: u64) {
        let Some(entry) = self.entries.get_mut(number as usize) else { return };
        entry.deadline = deadline;
        let filed = entry.filed;
        if deadline == NEVER {
            self.unfile(number, filed);
        } else if deadline < filed {
            self.unfile(number, filed);
            self.file(number, deadline);
        }
    }

    /// Takes one number whose time has come, if there is one. It has no deadline from then on.
    pub(super) fn pop(&mut self, now: u64) -> Option<u32> {
        while self.next <= now {
            let mut due = None;
            for slot in 0..SLOTS {
                if self.slots[slot].1 <= now {
                    due = self.pop_from(slot, now);
                    if due.is_some() {
                        break;
                    }
                }
            }
            if due.is_some() {
                return due;
            }
            self.next = self.slots.iter().map(|slot| slot.1).min().unwrap_or(NEVER);
        }
        None
    }

    /// When to call [`Wheel::pop`] again at the latest.
    pub(super) fn next(&self) -> Option<u64> {
        (self.next != NEVER).then_some(self.next)
    }

    /// Goes through one slot's list up to the first number that is due; numbers whose deadline was moved go to
    /// their new slots. A list without a due number gets the time when it has to be looked at again.
    fn pop_from(&mut self, slot: usize, now: u64) -> Option<u32> {
        let mut kept = List::EMPTY;
        let mut earliest = NEVER;
        let mut due = None;
        while let Some(number) = self.links.pop(&mut self.slots[slot].0) {
            let Some(entry) = self.entries.get_mut(number as usize) else { continue };
            if entry.deadline <= now {
                *entry = Entry { deadline: NEVER, filed: NEVER };
                due = Some(number);
                break;
            }
            if entry.filed <= now {
                entry.filed = entry.deadline;
            }
            let filed = entry.filed;
            if slot_of(filed) == slot {
                self.links.push(&mut kept, number);
                earliest = earliest.min(filed);
            } else {
                self.file(number, filed);
            }
        }
        // What was not looked at keeps the slot due.
        while let Some(number) = self.links.pop(&mut kept) {
            self.links.push(&mut self.slots[slot].0, number);
        }
        if due.is_none() {
            self.slots[slot].1 = earliest;
        }
        due
    }

    fn file(&mut self, number: u32, at: u64) {
        let Some(entry) = self.entries.get_mut(number as usize) else { return };
        entry.filed = at;
        let (list, earliest) = &mut self.slots[slot_of(at)];
        self.links.push(list, number);
        *earliest = at.min(*earliest);
        self.next = at.min(self.next);
    }

    fn unfile(&mut self, number: u32, filed: u64) {
        if filed == NEVER {
            return;
        }
        self.links.remove(&mut self.slots[slot_of(filed)].0, number);
        if let Some(entry) = self.entries.get_mut(number as usize) {
            entry.filed = NEVER;
        }
    }
}

fn slot_of(at: u64) -> usize {
    (at / SLOT_MS) as usize % SLOTS
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn due(wheel: &mut Wheel, now: u64) -> Vec<u32> {
        let mut all: Vec<u32> = std::iter::from_fn(|| wheel.pop(now)).collect();
        all.sort_unstable();
        all
    }

    #[test]
    fn a_later_deadline_replaces_an_earlier_one_and_the_other_way_round() {
        let mut wheel = Wheel::with_capacity(2);
        wheel.grow(2);
        wheel.set(0, 100);
        wheel.set(0, 10_000_000);
        wheel.set(1, 10_000_000);
        wheel.set(1, 100);
        assert!(due(&mut wheel, 99).is_empty());
        assert_eq!(due(&mut wheel, 100), [1]);
        assert!(due(&mut wheel, 9_999_999).is_empty());
        assert_eq!(due(&mut wheel, 10_000_000), [0]);
        assert_eq!(wheel.next(), None);
    }

    #[test]
    fn idle_flows_do_not_wake_every_slot() {
        let mut wheel = Wheel::with_capacity(300);
        wheel.grow(300);
        for number in 0..300 {
            wheel.set(number, 7_000_000 + u64::from(number) * 16);
        }
        assert!(due(&mut wheel, 6_999_999).is_empty());
        assert_eq!(wheel.next(), Some(7_000_000));
    }

    proptest! {
        #[test]
        fn numbers_come_out_when_a_sorted_map_says_so(
            steps in proptest::collection::vec((0_u32..20, 0_u64..20_000, 0_u64..600, any::<bool>()), 1..300)
        ) {
            let mut wheel = Wheel::with_capacity(20);
            wheel.grow(20);
            let mut model = std::collections::BTreeMap::new();
            let mut now = 0;
            for (number, away, passes, off) in steps {
                let deadline = if off { NEVER } else { now + away };
                wheel.set(number, deadline);
                model.insert(number, deadline);
                now += passes;
                let expected: Vec<u32> = model.iter().filter(|(_, at)| **at <= now).map(|(n, _)| *n).collect();
                model.retain(|_, at| *at > now);
                prop_assert_eq!(due(&mut wheel, now), expected);
                let earliest = model.values().copied().filter(|at| *at != NEVER).min();
                match (wheel.next(), earliest) {
                    (Some(next), Some(earliest)) => prop_assert!(next <= earliest && next > now),
                    (None, Some(_)) => prop_assert!(false, "a deadline without a wake-up"),
                    _ => {}
                }
            }
        }
    }
}
