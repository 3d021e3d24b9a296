//! Keeps vCPUs out of the guest for a moment.
//!
//! ```text
//! vCPU thread:  enter ─► KVM_RUN ─► leave          enter waits while the gate is closed
//! other thread: close ─► kick and wait until nobody is inside ─► … ─► open
//! ```
//!
//! What it is for: a slot that is replaced is missing for a moment, in which a fetch from it would be an error and
//! a locked instruction would not be atomic; and a processor may keep the addresses of pages that it stored to in a
//! buffer of its own (Intel's page-modification log) which it only empties when it leaves the guest.
//!
//! A vCPU's thread is inside only during KVM_RUN itself, where it holds no lock of the machine's, so waiting for it
//! cannot deadlock, whatever the waiting thread holds. Both sides store first and look after, in one order for all
//! (`SeqCst`): either the vCPU sees the gate closed, or the closer sees the vCPU inside.
//!
//! Entering and leaving cost two atomic stores on a cache line of the vCPU's own.

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering::SeqCst};
use std::sync::{Condvar, Mutex, MutexGuard, OnceLock};
use std::time::Duration;

/// How long a closer waits before it kicks again: a lost kick costs a moment and never hangs.
const PATIENCE: Duration = Duration::from_millis(10);

/// Makes vCPU `index` leave KVM_RUN.
pub(crate) type Kick = Box<dyn Fn(u32) + Send + Sync>;

#[repr(align(64))]
#[derive(Default)]
struct Seat(AtomicBool);

pub(super) struct Gate {
    seats: Box<[Seat]>,
    closed: AtomicU32,
    moved: Mutex<()>,
    changed: Condvar,
    kick: OnceLock<Kick>,
}

/// A vCPU's thread inside the guest. Dropping it is leaving.
pub(crate) struct Inside<'a> {
    gate: &'a Gate,
    seat: &'a Seat,
}

/// A closed gate. Dropping it opens.
pub(super) struct Closed<'a>(&'a Gate);

impl Gate {
    /// An open gate for vCPUs `0..vcpus`.
    pub(super) fn new(vcpus: u32) -> Self {
        Self {
            seats: (0..vcpus).map(|_| Seat::default()).collect(),
            closed: AtomicU32::new(0),
            moved: Mutex::new(()),
            changed: Condvar::new(),
            kick: OnceLock::new(),
        }
    }

    /// Says how a vCPU is kicked. The first call counts.
    pub(super) fn set_kick(&self, kick: Kick) {
        let _ = self.kick.set(kick);
    }

    fn lock(&self) -> MutexGuard<'_, ()> {
        self.moved.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// Goes inside, once the gate is open. `None` for a vCPU that has no seat.
    pub(super) fn enter(&self, index: u32) -> Option<Inside<'_>> {
        let seat = self.seats.get(index as usize)?;
        loop {
            seat.0.store(true, SeqCst);
            if self.closed.load(SeqCst) == 0 {
                return Some(Inside { gate: self, seat });
            }
            self.leave(seat);
            let mut guard = self.lock();
            while self.closed.load(SeqCst) != 0 {
                guard = self.changed.wait(guard).unwrap_or_else(|e| e.into_inner());
            }
        }
    }

    fn leave(&self, seat: &Seat) {
        seat.0.store(false, SeqCst);
        if self.closed.load(SeqCst) != 0 {
            drop(self.lock());
            self.changed.notify_all();
        }
    }

    /// Closes the gate and waits until nobody is inside. Several may have it closed at once. Not to be called by a
    /// thread that is inside.
    pub(super) fn close(&self) -> Closed<'_> {
        self.closed.fetch_add(1, SeqCst);
        let closed = Closed(self);
        loop {
            let inside = |i: &u32| self.seats[*i as usize].0.load(SeqCst);
            let mut anybody = false;
            for index in (0..self.seats.len() as u32).filter(inside) {
                anybody = true;
                if let Some(kick) = self.kick.get() {
                    kick(index);
                }
            }
            if !anybody {
                return closed;
            }
            let guard = self.lock();
            let waiting = |(): &mut ()| self.seats.iter().any(|s| s.0.load(SeqCst));
            drop(self.changed.wait_timeout_while(guard, PATIENCE, waiting));
        }
    }
}

impl Drop for Inside<'_> {
    fn drop(&mut self) {
        self.gate.leave(self.seat);
    }
}

impl Drop for Closed<'_> {
    fn drop(&mut self) {
        if self.0.closed.fetch_sub(1, SeqCst) == 1 {
            drop(self.0.lock());
            self.0.changed.notify_all();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::AtomicUsize;

    use super::*;

    #[test]
    fn nobody_is_inside_while_the_gate_is_closed() {
        const VCPUS: u32 = 3;
        let kicked: Arc<Vec<AtomicBool>> = Arc::new((0..VCPUS).map(|_| AtomicBool::new(false)).collect());
        let gate = Arc::new(Gate::new(VCPUS));
        let flags = kicked.clone();
        gate.set_kick(Box::new(move |index| flags[index as usize].store(true, SeqCst)));
        let (inside, stop) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicBool::new(false)));
        let vcpus: Vec<_> = (0..VCPUS)
            .map(|index| {
                let (gate, inside, stop) = (gate.clone(), inside.clone(), stop.clone());
                let kicked = kicked.clone();
                std::thread::spawn(move || {
                    let mut rounds = 0u32;
                    while !stop.load(SeqCst) {
                        let within = gate.enter(index).unwrap();
                        inside.fetch_add(1, SeqCst);
                        // The guest runs until it is kicked, or sometimes leaves by itself.
                        rounds += 1;
                        while !kicked[index as usize].swap(false, SeqCst)
                            && !rounds.is_multiple_of(3)
                            && !stop.load(SeqCst)
                        {
                            std::thread::yield_now();
                        }
                        inside.fetch_sub(1, SeqCst);
                        drop(within);
                    }
                })
            })
            .collect();
        let closers: Vec<_> = (0..2)
            .map(|_| {
                let (gate, inside) = (gate.clone(), inside.clone());
                std::thread::spawn(move || {
                    for _ in 0..300 {
                        let closed = gate.close();
                        assert_eq!(inside.load(SeqCst), 0);
                        drop(closed);
                    }
                })
            })
            .collect();
        closers.into_iter().for_each(|c| c.join().unwrap());
        stop.store(true, SeqCst);
        vcpus.into_iter().for_each(|v| v.join().unwrap());
    }

    #[test]
    fn a_vcpu_without_a_seat_is_refused() {
        assert!(Gate::new(1).enter(1).is_none());
    }
}
