//! Guest memory: blocks of RAM and the guest-physical address space that shows them.
//!
//! * [`RamOptions`] says where the host takes a block's memory from: which pages, which node, locked, at once.
//! * [`RamBlock`] is host memory with page flags, code versions and dirty logs. Its module says what whoever
//!   stores to guest memory owes.
//! * [`AddressSpace`] holds regions (RAM, ROM, ROM with a device behind its writes, MMIO, aliases) with
//!   priorities, and publishes what they add up to as a [`FlatView`], read without a lock.
//! * [`GuestMemory`] is the handle that devices hold. It implements vm-memory's traits, so `virtio_queue`
//!   and the other rust-vmm crates work on it.
//! * [`DirtyReader`] is one reader of one block's dirty log; a [`DirtySource`] is how a backend feeds the logs with
//!   stores that only the host's kernel sees.
//! * [`ViewListener`] is how a backend that has to mirror the address space hears of changes.
//!
//! Neighbours: backends take an [`AddressSpace`] and compare [`AddressSpace::generation`] to know when to
//! flush their TLBs; devices take a [`GuestMemory`].
//!
//! Lock order: the region lock of an [`AddressSpace`] is taken by changes only, never while a device is called. Then
//! the listeners' own locks; then a block's list of dirty sources; then the sources' own locks.

mod address_space;
mod backing;
mod buffers;
mod guest;
mod mapping;
#[cfg(test)]
mod race;
mod ram;
mod source;
mod view;

pub use address_space::{AddressSpace, RegionId, Transaction, ViewListener};
pub use backing::{RamOptions, RamPages};
pub use buffers::GuestBuffers;
pub use guest::{GuestMemory, ToGpa};
pub use ram::{
    DirtyPages, DirtyReader, MAX_BLOCK_SIZE, PAGE_DIRTY_WANTED, PAGE_HAS_CODE, PAGE_SIZE, PageNotes, RamBlock,
};
pub use source::DirtySource;
pub use view::{FlatRange, FlatTarget, FlatView, RamRegion};

/// End of the guest-physical address space: addresses have at most 52 bits (Intel SDM vol. 3, 4.1.4).
pub const GPA_END: u64 = 1 << 52;

/// Why memory could not be made, mapped or reached.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// A block's size is zero, not a multiple of 4 KiB or larger than [`MAX_BLOCK_SIZE`].
    #[error("memory block {name}: size {size:#x} must be a multiple of 4 KiB between 4 KiB and 4 TiB")]
    BadSize {
        /// Name of the block.
        name: String,
        /// Size asked for, in bytes.
        size: u64,
    },
    /// A block's size is no multiple of the huge pages it is to be made of.
    #[error("memory block {name}: size {size:#x} is not a multiple of its pages of {page:#x} bytes")]
    NotInPages {
        /// Name of the block.
        name: String,
        /// Size asked for, in bytes.
        size: u64,
        /// Size of a page, in bytes.
        page: u64,
    },
    /// The host refused something.
    #[error("memory block {name}: {what}: {source}")]
    Host {
        /// Name of the block.
        name: String,
        /// What was attempted.
        what: &'static str,
        /// The host's error.
        source: std::io::Error,
    },
    /// An access or mapping passes the end of a block.
    #[error("{offset:#x}+{len:#x} is outside memory block {name}")]
    OutsideBlock {
        /// Name of the block.
        name: String,
        /// First byte.
        offset: u64,
        /// Bytes.
        len: u64,
    },
    /// A region is empty or passes [`GPA_END`].
    #[error("guest-physical range {gpa:#x}+{len:#x} is empty or passes 52 bits")]
    BadRange {
        /// First address.
        gpa: u64,
        /// Bytes.
        len: u64,
    },
    /// RAM, ROM and aliases are mapped in whole pages.
    #[error("guest-physical range {gpa:#x}+{len:#x} (offset {offset:#x}) is not in whole 4 KiB pages")]
    Misaligned {
        /// First address.
        gpa: u64,
        /// Bytes.
        len: u64,
        /// Offset into the block, or source address of an alias.
        offset: u64,
    },
    /// A DMA access touches an address where there is no RAM.
    #[error("no RAM at guest-physical address {gpa:#x}")]
    NotRam {
        /// The first such address.
        gpa: u64,
    },
}
