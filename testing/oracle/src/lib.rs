//! The oracle: compares the software CPU with the processor of the host, case by random case.
//!
//! ```text
//! generate (seed, index) ──► Case ──► guest   the interpreter of atoll-cpu-software ──┐
//!                              └────► native  this processor, in user mode ──────────┴─► compare
//! ```
//!
//! Cases run at privilege level 3 in 64-bit, 32-bit and 16-bit protected code, which is where a process can
//! run arbitrary code; what only the kernel may do is compared as far as its refusal goes.
//! `run` drives it in child processes, so that a crash names the case that caused it.

pub mod case;
pub mod compare;
pub mod corpus;
pub mod eligible;
pub mod encode;
pub mod explain;
pub mod generate;
pub mod guest;
pub mod layout;
pub mod native;
pub mod progress;
pub mod rng;
pub mod run;
pub mod values;
