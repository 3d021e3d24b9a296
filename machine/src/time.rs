//! The one clock of a machine, and its timers.
//!
//! Everything in a machine that knows the time takes it from one [`Clock`]: the TSC of every vCPU, the PIT,
//! the ACPI PM timer, the RTC and the paravirtual clocks. So they can never disagree, a stopped machine's
//! time stands still, and a test drives all of them by hand ([`VirtualClock`]).
//!
//! Guest time is nanoseconds since the machine was created, excluding time spent stopped. The TSC is guest
//! time scaled by the machine's TSC frequency (plus each vCPU's own adjustment), so the two cannot drift apart.
//! [`HostClock`] is the clock of a machine in real time.

mod host;

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, Weak};

pub use host::HostClock;

/// Nanoseconds of guest time.
pub type Nanos = u64;

/// The source of a machine's time.
pub trait Clock: Send + Sync {
    /// Guest time in nanoseconds. Never decreases while the machine runs.
    fn now(&self) -> Nanos;
    /// Wall-clock time in nanoseconds since 1970-01-01 UTC, as the RTC and kvmclock report it.
    fn wall(&self) -> u64;
    /// TSC ticks per second divided by 1000.
    fn tsc_khz(&self) -> u32;
    /// The TSC of a vCPU whose TSC_ADJUST is zero.
    fn tsc(&self) -> u64;
    /// Converts TSC ticks to nanoseconds of the same clock, rounding down.
    fn tsc_to_nanos(&self, tsc: u64) -> Nanos {
        tsc_to_nanos(tsc, self.tsc_khz())
    }
    /// How long a host thread should sleep until guest time `at`: `None` when the clock does not advance by
    /// itself (a virtual clock, a stopped machine).
    fn host_delay(&self, at: Nanos) -> Option<std::time::Duration>;
}

/// `nanos * khz / 1_000_000`, rounded down, without 128-bit arithmetic. Wraps at 64 bits as a TSC does.
pub fn nanos_to_tsc(nanos: Nanos, khz: u32) -> u64 {
    let (millis, rest) = (nanos / 1_000_000, nanos % 1_000_000);
    let khz = u64::from(khz);
    millis.wrapping_mul(khz).wrapping_add(rest * khz / 1_000_000)
}

/// `tsc * 1_000_000 / khz`, rounded down, without 128-bit arithmetic. Wraps at 64 bits.
pub fn tsc_to_nanos(tsc: u64, khz: u32) -> Nanos {
    let khz = u64::from(khz.max(1));
    let (millis, rest) = (tsc / khz, tsc % khz);
    millis.wrapping_mul(1_000_000).wrapping_add(rest * 1_000_000 / khz)
}

/// A clock that advances only when told to: for tests and, later, replay.
pub struct VirtualClock {
    now: AtomicU64,
    epoch: u64,
    tsc_khz: u32,
}

impl VirtualClock {
    /// Starts at zero with wall-clock time `epoch` (ns since 1970) and a TSC of `tsc_khz`.
    pub fn new(epoch: u64, tsc_khz: u32) -> Arc<Self> {
        Arc::new(Self { now: AtomicU64::new(0), epoch, tsc_khz })
    }

    /// Moves time forward by `by` nanoseconds. Timers fire when [`Timers::expire`] is called next.
    pub fn advance(&self, by: Nanos) {
        self.now.fetch_add(by, Ordering::SeqCst);
    }
}

impl Clock for VirtualClock {
    fn now(&self) -> Nanos {
        self.now.load(Ordering::SeqCst)
    }
    fn wall(&self) -> u64 {
        self.epoch.wrapping_add(self.now())
    }
    fn tsc_khz(&self) -> u32 {
        self.tsc_khz
    }
    fn tsc(&self) -> u64 {
        nanos_to_tsc(self.now(), self.tsc_khz)
    }
    fn host_delay(&self, _at: Nanos) -> Option<std::time::Duration> {
        None
    }
}

/// Called when a timer expires, with the guest time it was armed for. Runs on the timer thread, without the
/// timer queue's lock, so it may arm timers again.
pub type TimerCallback = Box<dyn Fn(Nanos) + Send + Sync>;

struct TimerState {
    /// Sequence number of the live entry in the heap; 0 while disarmed. Entries with another number are stale.
    armed: AtomicU64,
    /// Deadline of that entry.
    deadline: AtomicU64,
    callback: TimerCallback,
}

impl TimerState {
    fn is_live(&self, entry: &Entry) -> bool {
        self.armed.load(Ordering::SeqCst) == entry.sequence
    }
}

/// One timer of a device. Dropping it disarms it.
pub struct Timer {
    state: Arc<TimerState>,
    queue: Weak<Timers>,
}

impl Timer {
    /// Arms the timer for guest time `at`, replacing an earlier deadline. `u64::MAX` is never: it disarms.
    pub fn arm(&self, at: Nanos) {
        match self.queue.upgrade() {
            Some(queue) if at != u64::MAX => queue.push(at, &self.state),
            _ => self.disarm(),
        }
    }

    /// Disarms the timer. A callback that is already running completes.
    pub fn disarm(&self) {
        self.state.armed.store(0, Ordering::SeqCst);
    }

    /// The armed deadline.
    pub fn deadline(&self) -> Option<Nanos> {
        let deadline = self.state.deadline.load(Ordering::SeqCst);
        (self.state.armed.load(Ordering::SeqCst) != 0).then_some(deadline)
    }
}

impl Drop for Timer {
    fn drop(&mut self) {
        self.disarm();
    }
}

struct Entry {
    at: Nanos,
    sequence: u64,
    timer: Weak<TimerState>,
}
impl PartialEq for Entry {
    fn eq(&self, other: &Self) -> bool {
        (self.at, self.sequence) == (other.at, other.sequence)
    }
}
impl Eq for Entry {}
impl PartialOrd for Entry {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}
impl Ord for Entry {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        (self.at, self.sequence).cmp(&(other.at, other.sequence))
    }
}

#[derive(Default)]
struct Heap {
    entries: BinaryHeap<Reverse<Entry>>,
    sequence: u64,
}

/// The timers of one machine. One thread (or a test) calls [`Timers::expire`] when the next deadline comes.
pub struct Timers {
    clock: Arc<dyn Clock>,
    heap: Mutex<Heap>,
    /// Called when the earliest deadline moved earlier, so that the sleeping thread can look again.
    wake: Mutex<Option<Arc<dyn Fn() + Send + Sync>>>,
}

/// Stale heap entries (re-armed timers) beyond this multiple of live ones are swept out, so that a guest that
/// re-arms a timer in a loop cannot grow the heap.
const SWEEP_AT: usize = 1024;

impl Timers {
    /// An empty queue on `clock`.
    pub fn new(clock: Arc<dyn Clock>) -> Arc<Self> {
        Arc::new(Self { clock, heap: Mutex::default(), wake: Mutex::new(None) })
    }

    /// The clock the deadlines refer to.
    pub fn clock(&self) -> &Arc<dyn Clock> {
        &self.clock
    }

    /// Sets the function that wakes the thread which sleeps until the next deadline.
    pub fn set_wake(&self, wake: Arc<dyn Fn() + Send + Sync>) {
        *self.wake.lock().unwrap_or_else(|e| e.into_inner()) = Some(wake);
    }

    /// A new, disarmed timer.
    pub fn timer(self: &Arc<Self>, callback: impl Fn(Nanos) + Send + Sync + 'static) -> Timer {
        let (armed, deadline) = (AtomicU64::new(0), AtomicU64::new(0));
        let state = TimerState { armed, deadline, callback: Box::new(callback) };
        Timer { state: Arc::new(state), queue: Arc::downgrade(self) }
    }

    fn push(&self, at: Nanos, timer: &Arc<TimerState>) {
        let earliest = {
            let mut heap = self.heap.lock().unwrap_or_else(|e| e.into_inner());
            if heap.entries.len() >= SWEEP_AT {
                heap.entries.retain(|Reverse(e)| e.timer.upgrade().is_some_and(|t| t.is_live(e)));
            }
            heap.sequence += 1;
            let sequence = heap.sequence;
            timer.deadline.store(at, Ordering::SeqCst);
            timer.armed.store(sequence, Ordering::SeqCst);
            let earliest = heap.entries.peek().is_none_or(|Reverse(e)| at < e.at);
            heap.entries.push(Reverse(Entry { at, sequence, timer: Arc::downgrade(timer) }));
            earliest
        };
        if earliest {
            self.wake();
        }
    }

    /// Wakes the thread that sleeps until the next deadline, so that it looks again: the clock was resumed or set.
    pub fn wake(&self) {
        let wake = self.wake.lock().unwrap_or_else(|e| e.into_inner()).clone();
        if let Some(wake) = wake {
            wake();
        }
    }

    /// The earliest armed deadline.
    pub fn next_deadline(&self) -> Option<Nanos> {
        let mut heap = self.heap.lock().unwrap_or_else(|e| e.into_inner());
        while let Some(Reverse(entry)) = heap.entries.peek() {
            if entry.timer.upgrade().is_some_and(|t| t.is_live(entry)) {
                return Some(entry.at);
            }
            heap.entries.pop();
        }
        None
    }

    /// Runs every timer whose deadline has come. Returns the next deadline.
    pub fn expire(&self) -> Option<Nanos> {
        loop {
            let next = self.next_deadline()?;
            if next > self.clock.now() {
                return Some(next);
            }
            let popped = {
                let mut heap = self.heap.lock().unwrap_or_else(|e| e.into_inner());
                heap.entries.pop().and_then(|Reverse(e)| e.timer.upgrade().map(|t| (e.at, e.sequence, t)))
            };
            if let Some((at, sequence, timer)) = popped
                && timer.armed.compare_exchange(sequence, 0, Ordering::SeqCst, Ordering::SeqCst).is_ok()
            {
                (timer.callback)(at);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn timers_fire_in_order_once_and_not_early() {
        let clock = VirtualClock::new(0, 1_000_000);
        let timers = Timers::new(clock.clone());
        let log = Arc::new(Mutex::new(Vec::new()));
        let make = |name: u32| {
            let log = log.clone();
            timers.timer(move |at| log.lock().unwrap().push((name, at)))
        };
        let (a, b, c) = (make(1), make(2), make(3));
        b.arm(200);
        a.arm(100);
        c.arm(150);
        c.disarm();
        assert_eq!(timers.expire(), Some(100));
        clock.advance(120);
        assert_eq!(timers.expire(), Some(200));
        b.arm(500);
        clock.advance(100);
        assert_eq!(timers.expire(), Some(500));
        clock.advance(1000);
        assert_eq!(timers.expire(), None);
        assert_eq!(*log.lock().unwrap(), vec![(1, 100), (2, 500)]);
        drop((a, b, c));
    }

    #[test]
    fn rearming_in_a_loop_does_not_grow_the_queue() {
        let timers = Timers::new(VirtualClock::new(0, 1000));
        let t = timers.timer(|_| {});
        for i in 0..100_000 {
            t.arm(1000 + i);
        }
        assert!(timers.heap.lock().unwrap().entries.len() <= SWEEP_AT + 1);
        assert_eq!(timers.next_deadline(), Some(100_999));
        for i in 0..100_000 {
            t.arm(1000 + i % 2);
        }
        assert!(timers.heap.lock().unwrap().entries.len() <= SWEEP_AT + 1);
        assert_eq!(t.deadline(), Some(1001));
    }

    #[test]
    fn a_timer_rearmed_for_the_same_moment_fires_once_and_never_means_never() {
        let clock = VirtualClock::new(0, 1000);
        let timers = Timers::new(clock.clone());
        let count = Arc::new(AtomicU64::new(0));
        let c = count.clone();
        let t = timers.timer(move |_| {
            c.fetch_add(1, Ordering::SeqCst);
        });
        t.arm(10);
        t.arm(10);
        clock.advance(10);
        assert_eq!(timers.expire(), None);
        assert_eq!((count.load(Ordering::SeqCst), t.deadline()), (1, None));
        t.arm(u64::MAX);
        assert_eq!(timers.next_deadline(), None);
    }

    #[test]
    fn conversions_are_exact_for_years() {
        for khz in [1u32, 999, 1_000_000, 2_595_124, 4_200_000, u32::MAX] {
            for x in [0u64, 1, 999_999, 1_000_001, 123_456_789_012_345, 1 << 55] {
                assert_eq!(nanos_to_tsc(x, khz), (u128::from(x) * u128::from(khz) / 1_000_000) as u64);
                assert_eq!(tsc_to_nanos(x, khz), (u128::from(x) * 1_000_000 / u128::from(khz)) as u64);
            }
        }
        assert_eq!(tsc_to_nanos(5, 0), 5_000_000, "a frequency of zero does not divide");
    }

    #[test]
    fn virtual_tsc_follows_guest_time() {
        let clock = VirtualClock::new(5, 2_600_000);
        clock.advance(1_000);
        assert_eq!(clock.tsc(), 2600);
        assert_eq!(clock.tsc_to_nanos(2600), 1000);
        assert_eq!(clock.wall(), 1005);
    }
}
