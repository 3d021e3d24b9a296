//! What other threads may do to a vCPU: post interrupts, NMI, INIT and SIPI, kick it, wake it from HLT.
//!
//! Everything is atomic. A poster first makes the event visible (bitmap or control word), then sets a bit of
//! the request word, then wakes the vCPU if it sleeps:
//!
//! ```text
//!  poster                               owner (vCPU thread)
//!  posted |= vector                     sleeping = true
//!  requests |= bit     (SeqCst)         futex_wait(requests == 0)   the kernel compares again
//!  if sleeping: futex_wake              sleeping = false
//! ```
//!
//! With sequentially consistent accesses either the poster sees `sleeping`, or the owner sees the request.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::time::Duration;

use rustix::thread::futex;
use rustix::time::Timespec;

/// Bits of the request word.
pub mod request {
    /// Vectors wait in the posted bitmaps.
    pub const INTERRUPT: u32 = 1 << 0;
    /// NMI, INIT or SIPI waits in the control word.
    pub const CONTROL: u32 = 1 << 1;
    /// Somebody wants the vCPU to look at its stop flag or its budget.
    pub const KICK: u32 = 1 << 2;
    /// The level of the legacy INTR pin changed.
    pub const EXTINT: u32 = 1 << 3;
}

/// Bits of the control word.
pub mod control {
    /// An NMI is latched.
    pub const NMI: u32 = 1 << 8;
    /// A second NMI came before the first was seen.
    pub const SECOND_NMI: u32 = 1 << 11;
    /// An INIT is latched.
    pub const INIT: u32 = 1 << 9;
    /// A start-up IPI is latched; bits 7..0 hold its vector.
    pub const SIPI: u32 = 1 << 10;
}

/// How a local APIC can be addressed; published by its owner whenever it changes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Reachability {
    /// Logical destination register: bits 31..24 in xAPIC mode, all 32 bits in x2APIC mode.
    pub ldr: u32,
    /// Globally enabled in IA32_APIC_BASE.
    pub enabled: bool,
    /// x2APIC mode.
    pub x2apic: bool,
    /// DFR selects the flat model (else cluster).
    pub flat: bool,
    /// Software-enabled in SVR.
    pub software_enabled: bool,
    /// LINT0 passes the legacy INTR pin through.
    pub takes_extint: bool,
}

impl Reachability {
    fn pack(self) -> u64 {
        u64::from(self.ldr)
            | u64::from(self.enabled) << 32
            | u64::from(self.x2apic) << 33
            | u64::from(self.flat) << 34
            | u64::from(self.software_enabled) << 35
            | u64::from(self.takes_extint) << 36
    }
    fn unpack(word: u64) -> Self {
        let bit = |n: u32| word >> n & 1 != 0;
        Self {
            ldr: word as u32,
            enabled: bit(32),
            x2apic: bit(33),
            flat: bit(34),
            software_enabled: bit(35),
            takes_extint: bit(36),
        }
    }
}

/// No budget.
pub const NO_BUDGET: u64 = u64::MAX;

/// The part of a vCPU that other threads see.
#[derive(Debug)]
pub struct Mailbox {
    /// Physical APIC id.
    pub apic_id: u32,
    /// The request word: polled by the interpreter, also the futex a halted vCPU sleeps on.
    pub requests: Arc<AtomicU32>,
    posted: [AtomicU64; 4],
    posted_level: [AtomicU64; 4],
    control: AtomicU32,
    sleeping: AtomicBool,
    reach: AtomicU64,
    /// Instructions retired, published when the vCPU leaves its inner loop.
    pub retired: AtomicU64,
    /// `retired` value at which the vCPU returns, [`NO_BUDGET`] for none.
    pub budget_end: AtomicU64,
}

impl Mailbox {
    /// An empty mailbox for the vCPU with `apic_id`.
    pub fn new(apic_id: u32) -> Arc<Self> {
        Arc::new(Self {
            apic_id,
            requests: Arc::new(AtomicU32::new(0)),
            posted: Default::default(),
            posted_level: Default::default(),
            control: AtomicU32::new(0),
            sleeping: AtomicBool::new(false),
            reach: AtomicU64::new(0),
            retired: AtomicU64::new(0),
            budget_end: AtomicU64::new(NO_BUDGET),
        })
    }

    /// Sets `bit` of the request word and wakes the vCPU if it sleeps.
    pub fn request(&self, bit: u32) {
        self.requests.fetch_or(bit, Ordering::SeqCst);
        if self.sleeping.load(Ordering::SeqCst) {
            // A failing wake means that nobody waits any more.
            let _ = futex::wake(&self.requests, futex::Flags::PRIVATE, 1);
        }
    }

    /// Posts `vector`, edge or level triggered.
    pub fn post(&self, vector: u8, level: bool) {
        let (word, bit) = (usize::from(vector >> 6), 1u64 << (vector & 63));
        if level {
            self.posted_level[word].fetch_or(bit, Ordering::SeqCst);
        } else {
            self.posted_level[word].fetch_and(!bit, Ordering::SeqCst);
        }
        self.posted[word].fetch_or(bit, Ordering::SeqCst);
        self.request(request::INTERRUPT);
    }

    /// Latches an NMI.
    pub fn post_nmi(&self) {
        if self.control.fetch_or(control::NMI, Ordering::SeqCst) & control::NMI != 0 {
            self.control.fetch_or(control::SECOND_NMI, Ordering::SeqCst);
        }
        self.request(request::CONTROL);
    }

    /// Latches an INIT. An earlier start-up IPI is forgotten.
    pub fn post_init(&self) {
        let _ = self.control.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |old| {
            Some(old & !(control::SIPI | 0xff) | control::INIT)
        });
        self.request(request::CONTROL);
    }

    /// Latches a start-up IPI with `vector`.
    pub fn post_sipi(&self, vector: u8) {
        let _ = self.control.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |old| {
            Some(old & !0xff | control::SIPI | u32::from(vector))
        });
        self.request(request::CONTROL);
    }

    /// Takes the posted vectors of one 64-vector word: (vectors, those that are level triggered).
    pub fn take_posted(&self, word: usize) -> (u64, u64) {
        if self.posted[word].load(Ordering::Relaxed) == 0 {
            return (0, 0);
        }
        let vectors = self.posted[word].swap(0, Ordering::SeqCst);
        (vectors, vectors & self.posted_level[word].load(Ordering::SeqCst))
    }

    /// Takes the control word.
    pub fn take_control(&self) -> u32 {
        self.control.swap(0, Ordering::SeqCst)
    }

    /// Forgets everything posted (reset, replaced state).
    pub fn clear(&self) {
        self.posted.iter().for_each(|w| w.store(0, Ordering::SeqCst));
        self.posted_level.iter().for_each(|w| w.store(0, Ordering::SeqCst));
        self.control.store(0, Ordering::SeqCst);
    }

    /// Publishes how this APIC is addressed.
    pub fn publish(&self, reach: Reachability) {
        self.reach.store(reach.pack(), Ordering::SeqCst);
    }

    /// How this APIC is addressed.
    pub fn reach(&self) -> Reachability {
        Reachability::unpack(self.reach.load(Ordering::SeqCst))
    }

    /// Sleeps until a request comes or `timeout` is over (`None`: no timeout). May return early.
    pub fn sleep(&self, timeout: Option<Duration>) {
        self.sleeping.store(true, Ordering::SeqCst);
        let timeout = timeout
            .map(|t| Timespec { tv_sec: t.as_secs().min(3600) as _, tv_nsec: t.subsec_nanos().into() });
        // EAGAIN (a request is there), EINTR and ETIMEDOUT all mean: look again.
        let _ = futex::wait(&self.requests, futex::Flags::PRIVATE, 0, timeout.as_ref());
        self.sleeping.store(false, Ordering::SeqCst);
    }

    /// Whether a request waits.
    pub fn has_request(&self) -> bool {
        self.requests.load(Ordering::SeqCst) != 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn posted_vectors_are_taken_once_with_their_trigger_mode() {
        let m = Mailbox::new(3);
        m.post(0x41, false);
        m.post(0x45, true);
        m.post(0xff, false);
        assert_eq!(m.take_posted(1), (1 << 1 | 1 << 5, 1 << 5));
        assert_eq!(m.take_posted(1), (0, 0));
        assert_eq!(m.take_posted(3), (1 << 63, 0));
        m.post(0x45, false);
        assert_eq!(m.take_posted(1), (1 << 5, 0));
        assert!(m.has_request());
    }

    #[test]
    fn init_forgets_an_earlier_sipi_and_keeps_nmi() {
        let m = Mailbox::new(0);
        m.post_sipi(0x12);
        m.post_nmi();
        m.post_init();
        assert_eq!(m.take_control(), control::INIT | control::NMI);
        m.post_sipi(0x99);
        assert_eq!(m.take_control(), control::SIPI | 0x99);
    }

    #[test]
    fn a_sleeper_is_woken_by_a_request() {
        let m = Mailbox::new(0);
        let poster = m.clone();
        let thread = std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(20));
            poster.post(0x30, false);
        });
        while !m.has_request() {
            m.sleep(None);
        }
        thread.join().unwrap();
        m.sleep(Some(Duration::from_secs(60))); // a request is there: returns at once
    }

    #[test]
    fn reachability_survives_publication() {
        let m = Mailbox::new(0);
        let r =
            Reachability { ldr: 0x0100_0001, enabled: true, flat: true, software_enabled: true, ..m.reach() };
        m.publish(r);
        assert_eq!(m.reach(), r);
    }
}
