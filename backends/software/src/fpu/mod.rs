//! (being written)
#[derive(Default)]
pub struct Fpu {}
