//! Saved form of an entropy device: it has no state of its own, and says so.

/// An entropy device.
#[derive(Clone, PartialEq, prost::Message)]
pub struct RngStateV1 {}
