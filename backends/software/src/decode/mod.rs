//! (being written)
pub struct CodeCache {}
