//! Compares the software CPU with a reference emulator on what no host processor runs from user space: the
//! virtual-8086 mode, ring 0, descriptor checks, gates, task switches, paging, system registers.
//!
//! ```text
//! protected.rs, long.rs  the written cases ─┐
//! random.rs              the seeded cases  ─┴─► case.rs (Suite) ─► image.rs (Multiboot kernel, monitor*.rs)
//!                                                                        │
//!                     on_atoll.rs (in this process) ◄────────────────────┼──► on_qemu.rs (as a program)
//!                                │ lines over the serial port            │
//!                                └──────────────► record.rs ◄────────────┘
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
pub mod deviations;
mod image;
mod layout;
mod long;
mod monitor32;
mod monitor64;
pub mod on_atoll;
pub mod on_qemu;
mod protected;
mod random;
pub mod record;

pub use case::{Suite, Width};

/// The written cases of one width.
pub fn written(width: Width) -> anyhow::Result<Suite> {
    match width {
        Width::Protected => protected::suite(),
        Width::Long => long::suite(),
    }
}

/// `count` seeded cases of one width.
pub fn seeded(width: Width, seed: u64, count: usize) -> anyhow::Result<Suite> {
    random::suite(width, seed, count)
}

/// The Multiboot kernel that runs `suite`.
pub fn kernel(suite: &Suite) -> anyhow::Result<Vec<u8>> {
    image::build(suite)
}
