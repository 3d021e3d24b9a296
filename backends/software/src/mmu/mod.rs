//! (being written)
#[derive(Default)]
pub struct Mmu {}
