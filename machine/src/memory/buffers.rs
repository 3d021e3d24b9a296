//! Guest memory that a transfer goes on using after the call that asked for it has returned.

#![allow(unsafe_code)]
// UNSAFETY: slices hold raw pointers, which are not `Send` by themselves.

use vm_memory::VolatileSlice;
use vm_memory::bitmap::Bitmap;

use super::PageNotes;

/// Pieces of guest RAM that belong to a request. They keep the RAM alive, even if it is unplugged meanwhile.
#[derive(Default)]
pub struct GuestBuffers {
    slices: Vec<VolatileSlice<'static, PageNotes>>,
}

// SAFETY: a slice is an address, a length and a handle on the block that keeps the address valid. Everybody reaches
// that memory by atomic or volatile accesses, from whatever thread, and the handle is `Send` and `Sync`.
unsafe impl Send for GuestBuffers {}
// SAFETY: as above; nothing in it changes through a shared reference but the guest memory itself.
unsafe impl Sync for GuestBuffers {}

impl GuestBuffers {
    /// These pieces, in order.
    pub fn new(slices: Vec<VolatileSlice<'static, PageNotes>>) -> Self {
        Self { slices }
    }

    /// The pieces, with their dirty tracking.
    pub fn slices(&self) -> &[VolatileSlice<'static, PageNotes>] {
        &self.slices
    }

    /// Notes that a device wrote here past the tracking, as the kernel does.
    pub fn mark_dirty(&self) {
        for slice in &self.slices {
            slice.bitmap().mark_dirty(0, slice.len());
        }
    }
}
