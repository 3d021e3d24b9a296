//! The vocabulary of a computer: memory, buses, interrupt lines, time, architectural CPU state, and the
//! traits that whatever executes instructions implements.
//!
//! This crate holds no device and no execution engine. `backends/` implements [`backend`], `devices/`
//! implements [`bus`] and uses [`interrupt`], [`time`] and [`inputs`], and `vmm/` puts them together.
//!
//! | module | what it defines |
//! |---|---|
//! | [`memory`] | guest RAM blocks, the address space with priorities and a generation, dirty logs |
//! | [`bus`] | port and memory-mapped device traits and the port bus |
//! | [`interrupt`] | interrupt lines, message-signalled interrupts, ExtINT |
//! | [`time`] | the one clock of a machine and its timers |
//! | [`inputs`] | the one gate through which every other nondeterministic input enters |
//! | [`control`] | what devices ask of the machine: reset, power off, crash |
//! | [`cpu`] | architectural state, named CPU models, topology |
//! | [`backend`] | partitions and vCPUs |
//! | [`state`] | the saved-state container |

pub mod backend;
pub mod bus;
pub mod control;
pub mod cpu;
pub mod inputs;
pub mod interrupt;
pub mod memory;
pub mod state;
pub mod time;
