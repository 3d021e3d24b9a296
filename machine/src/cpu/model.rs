//! (being written)
/// A CPU model.
pub struct CpuModel {}
