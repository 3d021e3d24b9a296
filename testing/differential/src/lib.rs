//! Compares the software CPU with a reference emulator on what no host processor runs from user space: real and
//! virtual-8086 mode, ring 0, descriptor checks, gates, task switches, paging, system registers.
//!
//! ```text
//! real*.rs, protected.rs, long.rs  written cases ─┐
//! family.rs (descriptors.rs,       seeded cases  ─┴─► case.rs (Suite) ─► image.rs (Multiboot kernel)
//!   sequences.rs, ring0*.rs)                                                 │    ▲
//!                                                                            │    └ monitor_common.rs,
//!                                                                            │      monitor{32,64,_real}.rs
//!                     on_atoll.rs (in this process) ◄── run.rs ──────────────┴──► on_qemu.rs (as a program)
//!                                │ lines over the serial port                         │
//!                                └──────────────────► record.rs ◄─────────────────────┘
//! ```
//!
//! A kernel holds a *monitor* and a table of cases. For each case the monitor restores its tables and a known
//! state of all registers and jumps to the case; whatever exception or interrupt comes next ends the case, is
//! written to the serial port as numbers, and the monitor goes on with the next one.
//!
//! The written cases are also kept as text under `expected/`, which needs no reference emulator. Where the
//! reference is known to differ from the architecture, [`deviations`] says so with the manual's section, and
//! only the text counts.

pub mod case;
mod descriptors;
pub mod deviations;
pub mod family;
mod generator;
mod image;
mod layout;
mod left_out;
mod long;
mod monitor32;
mod monitor64;
mod monitor_common;
mod monitor_real;
pub mod on_atoll;
pub mod on_qemu;
mod protected;
mod real;
mod real_faults;
pub mod record;
mod ring0;
mod ring0_steps;
mod rng;
pub mod run;
mod sequences;

pub use case::{Suite, Width};
pub use family::Family;

/// The written cases of one width.
///
/// # Errors
/// If a case does not fit its place.
pub fn written(width: Width) -> anyhow::Result<Suite> {
    match width {
        Width::Real => real::suite(),
        Width::Protected => protected::suite(),
        Width::Long => long::suite(),
    }
}

/// The Multiboot kernel that runs the cases of `suite` from number `first` on.
///
/// # Errors
/// If a piece of the monitor cannot be assembled.
pub fn kernel(suite: &Suite, first: usize) -> anyhow::Result<Vec<u8>> {
    image::build(suite, first)
}
