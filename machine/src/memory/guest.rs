//! The handle through which devices reach guest memory.

use std::iter::FusedIterator;
use std::marker::PhantomData;
use std::sync::Arc;

use vm_memory::bitmap::BS;
use vm_memory::guest_memory::GuestMemorySliceIterator;
use vm_memory::{
    ByteValued, GuestAddress, GuestAddressSpace, GuestMemoryError, GuestMemoryResult, Permissions,
    VolatileSlice,
};

use super::view::{FlatTarget, FlatView};
use super::{AddressSpace, MemoryError, PageNotes};

/// A guest-physical address: a number, or vm-memory's type.
pub trait ToGpa {
    /// The address.
    fn to_gpa(self) -> u64;
}

impl ToGpa for u64 {
    fn to_gpa(self) -> u64 {
        self
    }
}

impl ToGpa for GuestAddress {
    fn to_gpa(self) -> u64 {
        self.0
    }
}

/// A device's handle on guest memory. Cheap to clone.
///
/// Every call sees the address space as it is at that moment. It implements vm-memory's `GuestMemory` trait, so
/// `&GuestMemory` is what `virtio_queue` wants; [`GuestMemory::snapshot`] is a fixed picture that implements
/// `GuestMemoryBackend`, for kernel loaders. A slice keeps the RAM under it alive, even if it is unplugged.
#[derive(Clone)]
pub struct GuestMemory {
    space: Arc<AddressSpace>,
}

impl From<Arc<AddressSpace>> for GuestMemory {
    fn from(space: Arc<AddressSpace>) -> Self {
        Self { space }
    }
}

impl GuestMemory {
    /// A handle on `space`.
    pub fn new(space: &Arc<AddressSpace>) -> Self {
        Self { space: space.clone() }
    }

    /// The address space.
    pub fn address_space(&self) -> &Arc<AddressSpace> {
        &self.space
    }

    /// The address space as it is now.
    pub fn snapshot(&self) -> Arc<FlatView> {
        self.space.view()
    }

    /// Fills `buf` from guest memory; see [`AddressSpace::read`].
    pub fn read(&self, gpa: impl ToGpa, buf: &mut [u8]) -> Result<(), MemoryError> {
        self.space.read(gpa.to_gpa(), buf)
    }

    /// Stores `data` to guest RAM; see [`AddressSpace::write`].
    pub fn write(&self, gpa: impl ToGpa, data: &[u8]) -> Result<(), MemoryError> {
        self.space.write(gpa.to_gpa(), data)
    }

    /// Reads an object. Aligned objects of 2, 4 and 8 bytes are read in one access.
    pub fn read_obj<T: ByteValued>(&self, gpa: impl ToGpa) -> Result<T, MemoryError> {
        let mut value = T::zeroed();
        self.space.read(gpa.to_gpa(), value.as_mut_slice())?;
        Ok(value)
    }

    /// Stores an object. Aligned objects of 2, 4 and 8 bytes are stored in one access.
    pub fn write_obj<T: ByteValued>(&self, value: T, gpa: impl ToGpa) -> Result<(), MemoryError> {
        self.space.write(gpa.to_gpa(), value.as_slice())
    }

    /// The `len` bytes of RAM at `gpa`, one slice per host-contiguous run, for disk and network I/O. Fails if
    /// any byte is not RAM. The number of slices is bounded by the ranges of the address space, not by `len`.
    pub fn slices(
        &self,
        gpa: impl ToGpa,
        len: u64,
    ) -> Result<Vec<VolatileSlice<'static, PageNotes>>, MemoryError> {
        self.space.view().slices(gpa.to_gpa(), len)
    }
}

impl FlatView {
    /// The `len` bytes of RAM at `gpa` in this view; see [`GuestMemory::slices`].
    pub fn slices(&self, gpa: u64, len: u64) -> Result<Vec<VolatileSlice<'static, PageNotes>>, MemoryError> {
        let mut slices = Vec::new();
        self.walk_ram(gpa, len, false, |block, offset, len| {
            slices.push(block.owned_slice(offset, len)?);
            Ok(())
        })?;
        Ok(slices)
    }
}

impl GuestAddressSpace for GuestMemory {
    type M = FlatView;
    type T = Arc<FlatView>;

    fn memory(&self) -> Arc<FlatView> {
        self.space.view()
    }
}

impl vm_memory::GuestMemory for GuestMemory {
    type PhysicalMemory = FlatView;
    type Bitmap = PageNotes;

    fn check_range(&self, addr: GuestAddress, count: usize, _access: Permissions) -> bool {
        self.space.view().walk_ram(addr.0, count as u64, false, |_, _, _| Ok(())).is_ok()
    }

    fn get_slices<'a>(
        &'a self,
        addr: GuestAddress,
        count: usize,
        _access: Permissions,
    ) -> GuestMemoryResult<impl GuestMemorySliceIterator<'a, BS<'a, PageNotes>>> {
        Ok(Slices { view: self.space.view(), at: addr.0, rest: count as u64, lifetime: PhantomData })
    }
}

/// Iterates over the RAM of a range, run by run, and ends with an error where there is none.
struct Slices<'a> {
    view: Arc<FlatView>,
    at: u64,
    rest: u64,
    lifetime: PhantomData<&'a GuestMemory>,
}

impl<'a> Slices<'a> {
    fn step(&mut self) -> GuestMemoryResult<VolatileSlice<'a, PageNotes>> {
        let invalid = || GuestMemoryError::InvalidGuestAddress(GuestAddress(self.at));
        let range = self.view.lookup(self.at).ok_or_else(invalid)?;
        let FlatTarget::Ram { block, offset } = &range.target else { return Err(invalid()) };
        let inside = self.at - range.start;
        let now = self.rest.min(range.len - inside);
        let slice = block.owned_slice(offset + inside, now).map_err(|_| invalid())?;
        self.at = self.at.wrapping_add(now);
        self.rest -= now;
        Ok(slice)
    }
}

impl<'a> Iterator for Slices<'a> {
    type Item = GuestMemoryResult<VolatileSlice<'a, PageNotes>>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.rest == 0 {
            return None;
        }
        let step = self.step();
        if step.is_err() {
            self.rest = 0;
        }
        Some(step)
    }
}

impl FusedIterator for Slices<'_> {}
impl<'a> GuestMemorySliceIterator<'a, PageNotes> for Slices<'a> {}

#[cfg(test)]
#[path = "guest_tests.rs"]
mod tests;
