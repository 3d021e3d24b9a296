//! The CPU backend on the Linux kernel's KVM, for Intel and AMD hosts.
//!
//! ```text
//!   KvmBackend ── create_partition ──► KvmPartition ── create_vcpu ──► KvmVcpu, one thread each
//!       │                                  │                               │
//!     host.rs                          partition.rs                     vcpu.rs: the run loop
//!     /dev/kvm, capabilities               │                               │
//!                                          │     kick.rs ◄── any thread ───┤ leave KVM_RUN soon
//!                                          │     exits.rs, run_page.rs ◄───┤ why KVM_RUN returned
//!                                          │     interrupts/extint.rs ◄────┤ the PIC's handshake
//!   devices ── MSI ── interrupts/msi.rs ───┤     state/, cpuid.rs, msrs.rs, tsc.rs: CpuState to and from KVM
//!   IOAPIC ─ routes ─ interrupts/routing.rs┤
//!   eventfds ──────── events.rs ───────────┤
//!   AddressSpace ──── memory/ ─────────────┘  memory slots, dirty ring and dirty log
//! ```
//!
//! The interrupt controllers are split: local APICs with their timers are the kernel's, PIC, IOAPIC and PIT are
//! Atoll's own devices. So a machine on KVM has the same devices and the same saved state as one on the software
//! CPU, and the kernel still delivers IPIs, timers and messages without a return to user space.
//!
//! # Threads and lock order
//!
//! A vCPU is driven by one thread at a time; everything that other threads may do to it goes through
//! [`kick`] (stop, NMI, INTR pin) or the kernel (messages, events). Locks, outermost first: the IOAPIC's lock
//! (a device's), the table of GSI routes; the slot table of `memory`; a [`kick`] entry. None is held while the guest
//! runs.
//!
//! # What the host must have
//!
//! Linux 5.16 or newer. [`host`] lists the capabilities; a missing one is refused by name. Virtualization nested in
//! the guest is never offered: the CPU models have neither VMX nor SVM.

mod backend;
mod cpuid;
mod events;
mod exits;
mod host;
mod interrupts;
mod kick;
mod memory;
mod msrs;
mod partition;
mod run_page;
mod state;
mod tsc;
mod vcpu;

pub use backend::KvmBackend;
pub use host::KvmHost;
pub use partition::KvmPartition;
pub use vcpu::KvmVcpu;
