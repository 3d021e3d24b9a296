//! Small guests on the software CPU: modes, events, tasks, calls between rings, the local APIC, state.
//!
//! Each test assembles a guest, runs it until it writes the exit port, and looks at what it left in memory,
//! on the log port and in the registers. [`guest`] builds the surroundings: descriptor tables, page tables,
//! and handlers that record every event.

mod apic;
mod debug;
mod events;
mod guest;
mod legacy;
mod modes;
mod noise;
mod rings;
mod smp;
mod state;
