//! (being written)
pub struct Fpu {}
