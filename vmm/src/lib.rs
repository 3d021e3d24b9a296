//! One virtual machine: built from its description, driven, and ended.
//!
//! ```text
//! VmSpec ──prepare──► Vm (files opened, everything checked, nothing started)
//!                      │ start
//!                      ▼
//!   driver thread ── owns the machine; requests queue up and it decides them (driver.rs)
//!      │ builds                           ▲ MachineRequest (reset, power off, crash)
//!      ▼                                  │
//!   Machine ── vCPU threads (vcpu_thread.rs) ── buses (io.rs) ── devices
//!      └────── device thread: timers and host events (device_thread.rs)
//! ```
//!
//! A reset builds a new machine over the same memory, disks and consoles, so every device starts from its
//! power-on state by construction. Nothing here is asynchronous or knows of other machines.

#![forbid(unsafe_code)]

mod accelerator;
mod boot;
mod boot_files;
mod config;
mod console;
mod device_thread;
mod disks;
mod driver;
mod engine;
mod error;
mod event;
mod host_options;
mod io;
mod limits;
mod machine;
mod models;
mod network;
mod vcpu_thread;

pub use accelerator::{BackendKind, Choice, HostFacts, choose};
pub use console::{ConsoleId, ConsoleOutput};
pub use driver::{Resources, RunEnd, Vm, VmHandle, VmOutputs};
pub use error::VmError;
pub use event::VmEvent;
pub use models::{Given, ModelInfo, cpu_models};
