//! (being written)
pub struct Mmu {}
