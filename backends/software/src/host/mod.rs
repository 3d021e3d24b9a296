//! Access to the host processor: its vector and x87 units run the guest's arithmetic.
//!
//! ```text
//! fpu/ ──► thunk (safe interface, cache) ──► thunk_build (one instruction → native code) ──► thunk_arena (W^X)
//!                    │ run                                                                      ▲ ranges
//!                    └── native code ── SIGFPE / SIGILL ──► signal (redirects to the fault exit) ┘
//! ```
//!
//! Nothing outside this folder uses `unsafe` for that purpose.

pub(crate) mod arith;
mod signal;
pub mod thunk;
mod thunk_arena;
mod thunk_build;
