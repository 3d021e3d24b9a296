//! (being written)
pub struct Shared {}
