//! A block of guest RAM: host memory, one byte of flags per page, code versions and dirty logs.
//!
//! # What a store owes
//!
//! Whoever stores to guest memory (a vCPU, a device, a loader) does this:
//!
//! ```text
//! store;  flag = page_flags[page];  if flag != 0 { note_write(offset, len) }
//! ```
//!
//! [`RamBlock::after_store`] is the second half. There is no fence between the store and the load of the flag,
//! although a processor may carry them out in the other order. The side that *sets* a flag pays instead: it
//! sets the flag and then makes every thread of the process execute a full barrier (`membarrier`). Take any
//! store S, with its flag load L, on another thread, and the barrier B that this thread executes:
//!
//! * B after L: S came before L, so S is visible to the setter when its call returns.
//! * B before L: L sees the flag, and S is noted.
//!
//! B between S and L is both. So after the setter's call every store is visible to it or will be noted.
//!
//! # Dirty logs
//!
//! Each [`DirtyReader`] has its own bitmap. For every reader R and page p, one of these always holds:
//!
//! 1. R's bit for p is set;
//! 2. p has [`PAGE_DIRTY_WANTED`], so that the next store will set the bit;
//! 3. some `note_write` has cleared the flag and has not yet set the bits;
//! 4. R's own `take` has collected the bit and not yet set the flag again, and is going to return p.
//!
//! `note_write` clears the flag *first* and sets the bits *after*: done the other way round, a take between the
//! two would collect the bit and arm the flag, and the late clear would disarm it with nothing recorded.
//! `take` swaps the bits out, arms the flags of the pages it got, and then executes one process barrier: a
//! store that saw the flag clear is visible to whoever reads the page after `take` (4), any later one is noted
//! (2). A reader is published before the flags of all pages are set, and `note_write` looks up the readers
//! after clearing the flag, so one that missed the new reader cleared the flag before it was set again.
//!
//! Because of 3, a page stored to *while* `take` runs may be reported by the next `take` only. The last `take`
//! of a migration or snapshot therefore comes after every writer has stopped.
//!
//! # Stores that look at no flag
//!
//! A guest that runs on the processor itself notes nothing; a [`DirtySource`] of its backend finds its stores
//! out. For those stores the list above has one more entry, which says nothing about the flag:
//!
//! 5. a source knows of the store, or watches p and will: its next `collect` sets R's bit.
//!
//! `take` begins with `collect`, whose reports ([`RamBlock::mark_stored`]) set the bits of *every* reader and
//! leave the flags alone. They do so also where the flag is clear, that is where 3 or 4 holds already: a source
//! may learn of a store before it is made (a write fault comes before the write), so another reader that is
//! about to return p by 4 may read the page before the store and before the source watches the page again. Its
//! bit then brings p back in its next `take`. Both kinds of store end in the same bits, so each reader sees
//! their union. A source logs before the first reader is published, and until after the last one is gone; both
//! are decided under one lock, so that two readers that come and go at once cannot leave it off.
//!
//! # Locks
//!
//! None on any path of a store. The list of readers is replaced, never changed in place. Making and dropping a
//! reader takes the lock of [`super::source`].
#![allow(unsafe_code)]
// UNSAFETY: hands out volatile slices over the host mapping of guest memory.

use std::fmt;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU32, AtomicU64, Ordering, compiler_fence, fence};

use arc_swap::ArcSwap;
use vm_memory::bitmap::{Bitmap, BitmapSlice, WithBitmapSlice};
use vm_memory::{Bytes, VolatileSlice};

use super::MemoryError;
use super::backing::{self, RamOptions};
use super::mapping::{Mapping, has_process_barrier, process_barrier};
use super::source::{DirtySource, Sources};

/// Bytes of a page: the unit of flags, code versions and dirty logs.
pub const PAGE_SIZE: u64 = 4096;
const PAGE_SHIFT: u32 = 12;

/// Page flag: somebody decoded instructions from the page, so a store must raise its code version.
pub const PAGE_HAS_CODE: u8 = 1 << 0;
/// Page flag: some dirty reader does not know yet that the page changed.
pub const PAGE_DIRTY_WANTED: u8 = 1 << 1;

/// Largest block: 4 TiB, more than any host this runs on has, small enough that no size calculation overflows.
pub const MAX_BLOCK_SIZE: u64 = 1 << 42;

/// One contiguous host-mapped block of guest RAM or ROM.
///
/// The kind is *shared* unless asked otherwise: a sealed memfd that other processes can map. The module's
/// documentation says what a store owes to the page flags.
pub struct RamBlock {
    name: String,
    size: u64,
    memory: Mapping,
    /// `None` for private memory.
    file: Option<OwnedFd>,
    flags: Mapping,
    versions: Mapping,
    readers: ArcSwap<Vec<Arc<LogBits>>>,
    sources: Sources,
}

impl RamBlock {
    /// Makes a zeroed block of `size` bytes, a multiple of 4 KiB, in a memfd called `name`.
    ///
    /// Host memory is used only for pages that are touched. The bookkeeping takes at most 5 bytes per page.
    pub fn new_shared(name: &str, size: u64) -> Result<Arc<Self>, MemoryError> {
        Self::with_options(name, size, &RamOptions::default())
    }

    /// As [`RamBlock::new_shared`], with a say in where the host memory comes from. `size` must be a multiple of
    /// the page size that `options` names; what the host cannot give is an error now, not a fault later.
    pub fn with_options(name: &str, size: u64, options: &RamOptions) -> Result<Arc<Self>, MemoryError> {
        let (file, memory) = backing::create(name, size, options)?;
        let host = |what: &'static str| {
            let name = name.to_owned();
            move |source: std::io::Error| MemoryError::Host { name, what, source }
        };
        let pages = (size >> PAGE_SHIFT) as usize;
        let flags = Mapping::anonymous(pages).map_err(host("mmap of page flags"))?;
        let versions = Mapping::anonymous(pages * 4).map_err(host("mmap of code versions"))?;
        if !has_process_barrier() {
            tracing::warn!("the kernel has no membarrier: changes to guest code may be noticed late");
        }
        let readers = ArcSwap::from_pointee(Vec::new());
        let sources = Sources::default();
        Ok(Arc::new(Self { name: name.to_owned(), size, memory, file, flags, versions, readers, sources }))
    }

    /// Name given at creation.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Size in bytes.
    #[allow(clippy::len_without_is_empty)] // a block is never empty
    pub fn len(&self) -> u64 {
        self.size
    }

    /// Number of 4 KiB pages.
    pub fn pages(&self) -> u64 {
        self.size >> PAGE_SHIFT
    }

    /// First byte of the host mapping. It stays where it is as long as the block lives.
    ///
    /// The guest and every device store here at any time: reach it through atomics or volatile accesses, and
    /// follow every store with [`RamBlock::after_store`].
    pub fn as_ptr(&self) -> *mut u8 {
        self.memory.as_ptr()
    }

    /// The memfd, for processes that share the memory. It can be neither shrunk nor grown. `None` for a block of
    /// private memory ([`RamPages::PrivateTransparent`](super::RamPages::PrivateTransparent)).
    pub fn file(&self) -> Option<BorrowedFd<'_>> {
        self.file.as_ref().map(AsFd::as_fd)
    }

    /// Fills `buf` from `offset`. Aligned reads of 2, 4 and 8 bytes are single accesses.
    pub fn read(&self, offset: u64, buf: &mut [u8]) -> Result<(), MemoryError> {
        let slice = self.raw_slice(offset, buf.len() as u64)?;
        slice.read_slice(buf, 0).map_err(|_| self.outside(offset, buf.len() as u64))
    }

    /// Stores `data` at `offset` and notes it. Aligned writes of 2, 4 and 8 bytes are single accesses.
    pub fn write(&self, offset: u64, data: &[u8]) -> Result<(), MemoryError> {
        let slice = self.raw_slice(offset, data.len() as u64)?;
        slice.write_slice(data, 0).map_err(|_| self.outside(offset, data.len() as u64))?;
        self.after_store(offset, data.len() as u64);
        Ok(())
    }

    /// `len` bytes at `offset` for vm-memory's I/O. Writes through the slice are noted.
    pub fn volatile_slice(
        self: &Arc<Self>,
        offset: u64,
        len: u64,
    ) -> Result<VolatileSlice<'_, PageNotes>, MemoryError> {
        self.owned_slice(offset, len)
    }

    /// Like [`RamBlock::volatile_slice`], with a lifetime of the caller's choice: the bitmap inside the slice
    /// keeps the block alive.
    pub(super) fn owned_slice<'a>(
        self: &Arc<Self>,
        offset: u64,
        len: u64,
    ) -> Result<VolatileSlice<'a, PageNotes>, MemoryError> {
        self.check(offset, len)?;
        let notes = PageNotes { block: self.clone(), offset };
        // SAFETY: the range was checked to lie inside the mapping. The mapping lives as long as the block, the
        // block as long as `notes`, and `notes` is part of the slice and of everything derived from it.
        // Everybody else reaches the memory by atomic or volatile accesses.
        Ok(unsafe {
            VolatileSlice::with_bitmap(self.as_ptr().add(offset as usize), len as usize, notes, None)
        })
    }

    fn raw_slice(&self, offset: u64, len: u64) -> Result<VolatileSlice<'_>, MemoryError> {
        self.check(offset, len)?;
        // SAFETY: the range was checked to lie inside the mapping, which lives as long as `self`. Everybody
        // else reaches the memory by atomic or volatile accesses.
        Ok(unsafe { VolatileSlice::new(self.as_ptr().add(offset as usize), len as usize) })
    }

    fn check(&self, offset: u64, len: u64) -> Result<(), MemoryError> {
        match offset.checked_add(len) {
            Some(end) if end <= self.size => Ok(()),
            _ => Err(self.outside(offset, len)),
        }
    }

    fn outside(&self, offset: u64, len: u64) -> MemoryError {
        MemoryError::OutsideBlock { name: self.name.clone(), offset, len }
    }

    /// One byte of flags per page: [`PAGE_HAS_CODE`] and [`PAGE_DIRTY_WANTED`]. Zero means that a plain store
    /// needs nothing more.
    #[inline]
    pub fn page_flags(&self) -> &[AtomicU8] {
        self.flags.as_atomics()
    }

    /// One version per page, raised by every noted store while the page has [`PAGE_HAS_CODE`].
    #[inline]
    pub fn code_versions(&self) -> &[AtomicU32] {
        self.versions.as_atomics()
    }

    /// What follows a store of `len` bytes at `offset`: looks at the flags of the pages and notes the store
    /// where one is set. Offsets outside the block are ignored.
    #[inline]
    pub fn after_store(&self, offset: u64, len: u64) {
        // The processor may reorder the store and the load (see the module's documentation); the compiler not.
        compiler_fence(Ordering::SeqCst);
        if len == 0 {
            return;
        }
        let first = (offset >> PAGE_SHIFT) as usize;
        let last = (offset.saturating_add(len - 1) >> PAGE_SHIFT) as usize;
        let flags = self.page_flags();
        if first >= flags.len() {
            return;
        }
        let pages = &flags[first..=last.min(flags.len() - 1)];
        if pages.iter().any(|f| f.load(Ordering::Relaxed) != 0) {
            self.note_write(offset, len);
        }
    }

    /// Records a store of `len` bytes at `offset` that has already been made: marks every dirty reader's log
    /// and raises the code version, page by page and only where the page's flags ask for it.
    pub fn note_write(&self, offset: u64, len: u64) {
        if len == 0 {
            return;
        }
        let flags = self.page_flags();
        let first = offset >> PAGE_SHIFT;
        let last = offset.saturating_add(len - 1) >> PAGE_SHIFT;
        for page in first..=last.min(self.pages() - 1) {
            let Some(flag) = flags.get(page as usize) else { return };
            let set = flag.load(Ordering::Relaxed);
            if set & PAGE_DIRTY_WANTED != 0 {
                self.mark_dirty(page, flag);
            }
            if set & PAGE_HAS_CODE != 0 {
                self.code_versions()[page as usize].fetch_add(1, Ordering::SeqCst);
            }
        }
    }

    /// Clears the flag first and sets the bits after: the module's documentation says why.
    fn mark_dirty(&self, page: u64, flag: &AtomicU8) {
        flag.fetch_and(!PAGE_DIRTY_WANTED, Ordering::SeqCst);
        fence(Ordering::SeqCst);
        #[cfg(test)]
        tests::stumble();
        for reader in self.readers.load().iter() {
            reader.set(page);
        }
    }

    /// Announces that instructions will be decoded from `page`, and returns the page's code version.
    ///
    /// The order that makes decoded code safe to keep: `protect_code`, then read the version (or take the one
    /// returned), then read the bytes. What was decoded is valid while the page's code version stays the same.
    /// Where [`RamBlock::unprotect_code`] is in use by other threads, only the returned version will do.
    ///
    /// The first call for a page costs a process barrier (some 30 us on a virtual host), later ones two loads.
    pub fn protect_code(&self, page: u64) -> u32 {
        let (Some(flag), Some(version)) =
            (self.page_flags().get(page as usize), self.code_versions().get(page as usize))
        else {
            return 0;
        };
        loop {
            if flag.load(Ordering::SeqCst) & PAGE_HAS_CODE == 0 {
                flag.fetch_or(PAGE_HAS_CODE, Ordering::SeqCst);
                process_barrier();
            }
            let seen = version.load(Ordering::SeqCst);
            // `unprotect_code` clears the flag before it raises the version: a flag that is still set here
            // means that every later unprotect will raise the version beyond `seen`.
            if flag.load(Ordering::SeqCst) & PAGE_HAS_CODE != 0 {
                return seen;
            }
        }
    }

    /// Ends the interest in stores to `page`, and makes everything decoded from it invalid.
    pub fn unprotect_code(&self, page: u64) {
        let (Some(flag), Some(version)) =
            (self.page_flags().get(page as usize), self.code_versions().get(page as usize))
        else {
            return;
        };
        flag.fetch_and(!PAGE_HAS_CODE, Ordering::SeqCst);
        version.fetch_add(1, Ordering::SeqCst);
    }

    /// A new, independent reader of the pages that are stored to from now on.
    pub fn dirty_log(self: &Arc<Self>) -> DirtyReader {
        let bits = Arc::new(LogBits::new(self.pages()));
        self.sources.reader_comes(self, || {
            self.readers.rcu(|old| {
                let mut new = (**old).clone();
                new.push(bits.clone());
                new
            });
        });
        fence(Ordering::SeqCst);
        for flag in self.page_flags() {
            flag.fetch_or(PAGE_DIRTY_WANTED, Ordering::SeqCst);
        }
        process_barrier();
        DirtyReader { block: self.clone(), bits }
    }

    /// Has `source` find out the stores of a guest that notes none itself, as long as the source lives.
    pub fn add_dirty_source(self: &Arc<Self>, source: &Arc<dyn DirtySource>) {
        self.sources.add(self, source);
    }

    /// Marks `pages` in every reader's log: the report of a [`DirtySource`]. Page numbers outside the block are
    /// ignored.
    pub fn mark_stored(&self, pages: impl IntoIterator<Item = u64>) {
        fence(Ordering::SeqCst);
        let readers = self.readers.load();
        for page in pages {
            readers.iter().for_each(|reader| reader.set(page));
        }
    }
}

impl fmt::Debug for RamBlock {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "RamBlock({:?}, {:#x})", self.name, self.size)
    }
}

/// One reader's bitmap.
struct LogBits {
    words: Box<[AtomicU64]>,
}

impl LogBits {
    fn new(pages: u64) -> Self {
        Self { words: (0..pages.div_ceil(64)).map(|_| AtomicU64::new(0)).collect() }
    }

    fn set(&self, page: u64) {
        if let Some(word) = self.words.get((page / 64) as usize) {
            word.fetch_or(1 << (page % 64), Ordering::SeqCst);
        }
    }
}

/// An independent log of the pages of one [`RamBlock`] that were stored to. Dropping it ends the log.
pub struct DirtyReader {
    block: Arc<RamBlock>,
    bits: Arc<LogBits>,
}

impl DirtyReader {
    /// The pages stored to since the last `take` (or since the log began), and starts over.
    ///
    /// Read the pages' contents after this returns. A page that is being stored to meanwhile is in this result
    /// or in the next one; see the module's documentation.
    pub fn take(&mut self) -> DirtyPages {
        self.block.sources.collect(&self.block);
        let words: Vec<u64> = self
            .bits
            .words
            .iter()
            // A plain load first: most words of most logs are zero, and a swap would take the cache line.
            .map(|w| if w.load(Ordering::Relaxed) == 0 { 0 } else { w.swap(0, Ordering::SeqCst) })
            .collect();
        let dirty = DirtyPages { words };
        if !dirty.is_empty() {
            let flags = self.block.page_flags();
            for page in dirty.iter() {
                flags[page as usize].fetch_or(PAGE_DIRTY_WANTED, Ordering::SeqCst);
            }
            process_barrier();
        }
        dirty
    }

    /// The block that is read.
    pub fn block(&self) -> &Arc<RamBlock> {
        &self.block
    }
}

impl Drop for DirtyReader {
    fn drop(&mut self) {
        self.block.readers.rcu(|old| {
            let keep = old.iter().filter(|r| !Arc::ptr_eq(r, &self.bits));
            keep.cloned().collect::<Vec<_>>()
        });
        self.block.sources.reader_goes(&self.block);
    }
}

/// A set of pages of one block.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DirtyPages {
    words: Vec<u64>,
}

impl DirtyPages {
    /// Page numbers, ascending.
    pub fn iter(&self) -> impl Iterator<Item = u64> + '_ {
        self.words.iter().enumerate().flat_map(|(i, &word)| {
            let mut rest = word;
            std::iter::from_fn(move || {
                let bit = rest.trailing_zeros();
                if rest == 0 {
                    return None;
                }
                rest &= rest - 1;
                Some(i as u64 * 64 + u64::from(bit))
            })
        })
    }

    /// Number of pages.
    pub fn count(&self) -> u64 {
        self.words.iter().map(|w| u64::from(w.count_ones())).sum()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.words.iter().all(|&w| w == 0)
    }

    /// Whether `page` is in the set.
    pub fn contains(&self, page: u64) -> bool {
        self.words.get((page / 64) as usize).is_some_and(|w| w >> (page % 64) & 1 != 0)
    }
}

/// vm-memory's view of the page flags: marking a range dirty is [`RamBlock::after_store`].
#[derive(Clone)]
pub struct PageNotes {
    block: Arc<RamBlock>,
    offset: u64,
}

impl PageNotes {
    pub(super) fn new(block: &Arc<RamBlock>, offset: u64) -> Self {
        Self { block: block.clone(), offset }
    }
}

impl fmt::Debug for PageNotes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PageNotes({:?}+{:#x})", self.block, self.offset)
    }
}

impl WithBitmapSlice<'_> for PageNotes {
    type S = Self;
}

impl BitmapSlice for PageNotes {}

impl Bitmap for PageNotes {
    fn mark_dirty(&self, offset: usize, len: usize) {
        self.block.after_store(self.offset.saturating_add(offset as u64), len as u64);
    }

    /// Whether every dirty reader already knows that the page changed.
    fn dirty_at(&self, offset: usize) -> bool {
        let page = (self.offset.saturating_add(offset as u64) >> PAGE_SHIFT) as usize;
        let flag = self.block.page_flags().get(page);
        flag.is_some_and(|f| f.load(Ordering::SeqCst) & PAGE_DIRTY_WANTED == 0)
    }

    fn slice_at(&self, offset: usize) -> Self {
        Self { block: self.block.clone(), offset: self.offset.saturating_add(offset as u64) }
    }
}

#[cfg(test)]
#[path = "ram_tests.rs"]
mod tests;
