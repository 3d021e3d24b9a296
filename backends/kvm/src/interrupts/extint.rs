//! The legacy controller's interrupts: INTR pin, acknowledge cycle, `KVM_INTERRUPT`.
//!
//! ```text
//!            pin high: kick                 window closed: ask KVM to return when it opens
//!   Idle ─────────────────► Requested ◄────────────────────────────────┐
//!    ▲                          │ window open (IF set, no shadow, LINT0 takes ExtINT)
//!    │                          ▼
//!    │                  ExtIntSource::acknowledge ──► KVM_INTERRUPT ──► Acknowledged
//!    └── KVM took the vector for delivery ◄───────────────────────────────┘
//! ```
//!
//! An acknowledged vector is committed: the controller has it in service. So it is asked for only when it can be
//! delivered at once, which KVM decides as it does for its own PIC (`kvm_vcpu_ready_for_interrupt_injection`):
//! the vCPU can take an interrupt, no event is half delivered, and LINT0 is unmasked in ExtINT mode or the local
//! APIC is off. While LINT0 is masked the request waits without a cost, since KVM opens no window.
//!
//! Between `KVM_INTERRUPT` and delivery the vector lies in a word of KVM that no ioctl reads. A stop there
//! would lose it for a saved state, and leave it behind for the next one. So a stop first enters KVM with a
//! signal waiting ([`RunPage::run_without_guest`]): that turns the vector into a pending event, which is part
//! of the state, and runs no instruction. (An NMI that comes in the same moment goes first; the vector then
//! follows it on the same vCPU, and would be lost for a copy. KVM has no way to tell.)
//!
//! Only the boot processor has the pin: LINT0 of others is never connected, as on the boards where the pin goes
//! through the IOAPIC or the boot processor only. A LINT0 in fixed or NMI mode gets nothing.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use atoll_foundation::log_limited;
use atoll_machine::interrupt::{ExtIntSink, ExtIntSource};

use crate::exits::Exit;
use crate::kick::Kick;
use crate::run_page::RunPage;

/// The INTR pin of a machine.
pub(crate) struct Pin {
    high: AtomicBool,
    /// The boot processor.
    kick: Arc<Kick>,
}

impl Pin {
    pub(crate) fn new(kick: Arc<Kick>) -> Self {
        Self { high: AtomicBool::new(false), kick }
    }
}

impl ExtIntSink for Pin {
    fn set_extint(&self, high: bool) {
        if self.high.swap(high, Ordering::SeqCst) != high && high {
            self.kick.kick();
        }
    }
}

/// The boot processor's side of the handshake.
pub(crate) struct ExtInt {
    pin: Arc<Pin>,
    source: Arc<dyn ExtIntSource>,
    /// What the page says about the window is of the last run, and nothing changed since.
    fresh: bool,
    /// A vector was given to KVM, and it is not known to be on its way to the guest.
    acknowledged: Option<u8>,
}

impl ExtInt {
    pub(crate) fn new(pin: Arc<Pin>, source: Arc<dyn ExtIntSource>) -> Self {
        Self { pin, source, fresh: false, acknowledged: None }
    }

    /// Before each `KVM_RUN`. `between` is false while an instruction waits for its completion.
    pub(crate) fn offer(&mut self, page: &mut RunPage, between: bool) {
        let mut high = self.pin.high.load(Ordering::SeqCst);
        if high && between && self.fresh && page.ready_for_interrupt() {
            let vector = self.source.acknowledge();
            // It cannot fail: KVM said that it holds no other vector.
            if let Err(error) = page.interrupt(vector) {
                log_limited!(error, "KVM refuses legacy interrupt {vector:#x}: {error}");
            }
            self.acknowledged = Some(vector);
            self.fresh = false;
            high = self.pin.high.load(Ordering::SeqCst);
        }
        page.request_interrupt_window(high);
    }

    /// After each `KVM_RUN`. Any exit but those that KVM makes before it enters the guest means that the vector
    /// was taken.
    pub(crate) fn ran(&mut self, page: &RunPage, exit: &Exit) {
        self.fresh = true;
        let before_entry = matches!(exit, Exit::Interrupted | Exit::EndOfInterrupt(_) | Exit::DirtyRingFull);
        if !before_entry || page.ready_for_interrupt() {
            self.acknowledged = None;
        }
    }

    /// Whether a vector was given to KVM and may not be in delivery yet.
    pub(crate) fn in_transit(&self) -> bool {
        self.acknowledged.is_some()
    }

    /// The vCPU is at a boundary, or its state was replaced.
    pub(crate) fn forget(&mut self) {
        self.fresh = false;
        self.acknowledged = None;
    }
}
