//! (being written)
/// The guest-physical address space.
pub struct AddressSpace {}
