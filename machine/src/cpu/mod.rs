//! The architectural processor: its state, the named models and the topology.

pub mod model;
pub mod saved_state;
pub mod state;
pub mod topology;
