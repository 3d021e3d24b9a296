//! Whole machines under test.
//!
//! The library has what tests of whole machines share, and names no other crate of the workspace:
//!
//! * [`console`]: a program with a machine's console, on pipes or on a pseudo terminal of its own;
//! * [`payload`]: the smallest kernels, made of a few bytes of machine code;
//! * [`servers`]: servers on the host that guests talk to.
//!
//! The tests under `tests/` build machines in their own process: `power_cut.rs` cuts the power of a real guest's
//! disks, `hostile.rs` lets a guest write garbage everywhere. The binary's own tests and `cargo xtask boot` use
//! the library to drive the program from outside.

#![forbid(unsafe_code)]

pub mod console;
pub mod payload;
pub mod servers;
