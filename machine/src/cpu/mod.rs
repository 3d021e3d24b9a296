//! The architectural processor: its state, the named models and the topology.

pub mod assurances;
mod check;
mod cpuid;
pub mod feature;
pub mod host;
pub mod model;
pub mod msr;
pub mod saved_state;
pub mod state;
pub mod topology;
