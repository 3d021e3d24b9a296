//! (being written)
#[derive(Default)]
pub struct CodeCache {}
