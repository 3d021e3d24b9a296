//! The local APIC of the software CPU (Intel SDM vol. 3, chapter 11).
//!
//! ```text
//!  other vCPUs, IOAPIC, devices ──post──► mailbox ──drain (owner thread)──► lapic (IRR, ISR, TMR, LVT, timer)
//!  guest MMIO / MSR access ───────────────────────────────────────────────► registers ──ICR──► routing ──post
//! ```
//!
//! | file | contents |
//! |---|---|
//! | [`mailbox`] | what other threads may do to a vCPU: lock-free posting, waking |
//! | [`routing`] | which vCPUs a destination means (physical, logical, shorthand, lowest priority) |
//!
//! Only the vCPU's own thread touches its APIC registers; everybody else posts to its [`mailbox::Mailbox`].
//! There is no lock anywhere in this module.

pub mod mailbox;
pub mod routing;
