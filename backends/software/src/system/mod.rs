//! (being written)
pub struct SystemState {}
