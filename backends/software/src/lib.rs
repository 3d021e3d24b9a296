//! The software CPU: an exact x86-64 interpreter with its own MMU and local APIC.
//!
//! ```text
//! vcpu.rs  run loop: events, interrupts, halting ──► execute/ (dispatch) ──► decode/ (cached by physical page)
//!             │                                        │  integer instructions
//!             ├──► apic/  local APIC and its timer     ├──► system/ segments, far transfers, delivery, MSRs
//!             └──► system/delivery exceptions          ├──► fpu/    x87, SSE, AVX, XSAVE (host arithmetic)
//!                                                      └──► access.rs ──► mmu/ (TLB, walker) ──► guest memory
//! ```
//!
//! The interpreter is the oracle for the later translator and its path for rare instructions, so it stays
//! simple: exactness first, then speed.

pub mod access;
pub mod apic;
pub mod cpu;
pub mod decode;
pub mod exception;
pub mod execute;
pub mod fpu;
pub mod host;
pub mod mmu;
pub mod partition;
mod saved_state;
pub mod system;
#[doc(hidden)]
pub mod test_support;
pub mod vcpu;
