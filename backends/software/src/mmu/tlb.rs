//! The soft TLBs: direct-mapped arrays whose tags carry an address-space number.
//!
//! A tag is the linear page number in bits 63..12 and, in bits 11..0, a *space*: a number that stands for "these
//! translations, not flushed since". There are two current spaces, one for each half of the linear address
//! space (bit 63): the upper half usually holds global pages only and then survives changes of CR3, the lower
//! half has one space per PCID. Flushing takes a new number; memory is cleared only when the 12 bits run out.
//!
//! Data entries are kept per privilege (user, supervisor, supervisor with EFLAGS.AC), so that a hit needs no
//! check of rights: an entry exists only if that privilege may make that access.

use super::ViewCache;
use super::raw::{HostAddress, Word};

/// Entries per privilege.
pub(super) const DATA_ENTRIES: usize = 1024;
/// Fetch entries per privilege.
pub(super) const FETCH_ENTRIES: usize = 256;
/// A space that no entry is ever filled with: every access takes the slow path.
const SPACE_NONE: u64 = 0xfff;
/// Page number part of a tag.
pub(super) const PAGE: u64 = !0xfff;

/// Whose rights an access has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Privilege {
    /// CPL 3.
    User = 0,
    /// CPL 0 to 2, SMAP applies (or is off).
    Supervisor = 1,
    /// CPL 0 to 2 with EFLAGS.AC set: SMAP does not apply.
    SupervisorOverride = 2,
}

/// A data translation.
#[derive(Clone, Copy, Default)]
pub(crate) struct Entry {
    /// Tag for loads, 0 if none.
    pub(crate) read: u64,
    /// Tag for stores, 0 if none.
    pub(crate) write: u64,
    /// Host address minus linear address.
    pub(crate) addend: u64,
    /// The page's flag byte.
    pub(crate) flags: HostAddress,
}

impl Entry {
    /// Host address of `linear`, which must be inside the entry's page.
    #[inline(always)]
    pub(crate) fn host(&self, linear: u64) -> HostAddress {
        HostAddress::promise(linear.wrapping_add(self.addend))
    }
}

/// An instruction-fetch translation.
#[derive(Clone, Copy, Default)]
pub(crate) struct FetchEntry {
    pub(crate) tag: u64,
    /// First byte of the page, or address 0 if the page is not RAM or ROM.
    pub(crate) host: HostAddress,
    /// Guest-physical address of the page.
    pub(crate) frame: u64,
}

/// One vCPU's translations.
pub struct Mmu {
    pub(super) data: Box<[Entry; 4 * DATA_ENTRIES]>,
    /// Guest-physical page of each data entry, off the fast path's cache lines.
    frames: Box<[u64; 4 * DATA_ENTRIES]>,
    pub(super) fetch: Box<[FetchEntry; 2 * FETCH_ENTRIES]>,
    /// Spaces as the fast path uses them (both [`SPACE_NONE`] while every access must be looked at).
    tags: [u64; 2],
    /// Index base of the current privilege.
    base: usize,
    /// Current spaces of the lower and upper half.
    spaces: [u64; 2],
    next_space: u64,
    /// Spaces of PCIDs, 0 = none.
    pcid_spaces: Box<[u16]>,
    pcid: u16,
    /// A non-global page of the upper half was cached since its space began.
    upper_has_local: bool,
    /// Regions (hashed by 2 MiB and by 1 GiB) that hold entries cut from larger pages.
    pub(super) large: Box<[u64; 16]>,
    /// Pages (hashed) that instructions were fetched from since `fetch_serial` was last raised.
    fetched: Box<[u64; 16]>,
    /// Raised when a fetch translation may have gone without a change of space.
    fetch_serial: u32,
    pub(super) view: ViewCache,
    /// Every access takes the slow path: data breakpoints.
    watch: bool,
    /// Every access takes the slow path: alignment checks.
    alignment: bool,
    /// DR6 bits of data breakpoints that the current instruction hit; cleared by whoever reports them.
    pub watch_hits: u64,
    /// Control-register bits that the entries depend on.
    signature: [u64; 3],
    /// A device was accessed since the last look at the address space's generation.
    pub(crate) device_touched: bool,
    /// Pages whose code was stored to lately, with a count: decides when a page stops counting as code.
    pub(super) code_stores: [(u64, u32); 4],
}

impl Default for Mmu {
    fn default() -> Self {
        Self {
            data: boxed(Entry::default()),
            frames: boxed(0),
            fetch: boxed(FetchEntry::default()),
            tags: [1, 2],
            base: DATA_ENTRIES,
            spaces: [1, 2],
            next_space: 3,
            pcid_spaces: vec![0; 4096].into_boxed_slice(),
            pcid: 0,
            upper_has_local: false,
            large: boxed(0),
            fetched: boxed(0),
            fetch_serial: 0,
            view: ViewCache::default(),
            watch: false,
            alignment: false,
            watch_hits: 0,
            signature: [0; 3],
            device_touched: false,
            code_stores: [(u64::MAX, 0); 4],
        }
    }
}

/// An array on the heap, without a copy on the stack first.
fn boxed<T: Copy, const N: usize>(value: T) -> Box<[T; N]> {
    match vec![value; N].into_boxed_slice().try_into() {
        Ok(array) => array,
        Err(_) => unreachable!("the vector has N elements"),
    }
}

#[inline(always)]
fn half(linear: u64) -> usize {
    (linear >> 63) as usize
}

/// Index of a privilege's first data entry.
#[inline(always)]
fn base_of(privilege: Privilege) -> usize {
    privilege as usize * DATA_ENTRIES
}

impl Mmu {
    /// The entry that would translate `linear` at the current privilege. Compare its tag with [`Mmu::tag`].
    #[inline(always)]
    pub(crate) fn entry(&self, linear: u64) -> &Entry {
        &self.data[(self.base + ((linear >> 12) as usize & (DATA_ENTRIES - 1))) & (4 * DATA_ENTRIES - 1)]
    }

    /// The tag that an access of `T` at `linear` needs: that of the page of its last byte, so that an access
    /// that crosses pages finds the wrong page and misses.
    #[inline(always)]
    pub(crate) fn tag<T: Word>(&self, linear: u64) -> u64 {
        let last = linear.wrapping_add(T::BYTES - 1);
        (last & PAGE) | self.tags[half(last)]
    }

    /// Like [`Mmu::tag`] for one byte at a privilege that may not be the current one.
    fn page_tag(&self, linear: u64) -> u64 {
        (linear & PAGE) | self.spaces[half(linear)]
    }

    /// The entry of an access by `privilege` if there is one that allows it; for uses off the fast path.
    pub(crate) fn find(&self, privilege: Privilege, linear: u64, write: bool) -> Option<Entry> {
        if self.watch || self.alignment {
            return None;
        }
        let entry = self.data[base_of(privilege) + ((linear >> 12) as usize & (DATA_ENTRIES - 1))];
        let tag = if write { entry.write } else { entry.read };
        (tag == self.page_tag(linear)).then_some(entry)
    }

    /// Guest-physical address of the page at `linear`, if its translation is cached.
    pub(crate) fn frame(&self, privilege: Privilege, linear: u64) -> Option<u64> {
        let index = base_of(privilege) + ((linear >> 12) as usize & (DATA_ENTRIES - 1));
        (self.data[index].read == self.page_tag(linear)).then_some(self.frames[index])
    }

    /// Memory at a physical address.
    pub(crate) fn ram(&self, address: u64, len: u64) -> Option<super::fill::Ram<'_>> {
        self.view.ram(address, len)
    }

    /// Whether misaligned operands raise #AC at the current privilege.
    pub(crate) fn checks_alignment(&self) -> bool {
        self.alignment
    }

    /// Stores a data translation.
    pub(super) fn fill_data(&mut self, privilege: Privilege, linear: u64, fill: DataFill) {
        let tag = self.page_tag(linear);
        self.note_fill(linear, fill.shift, fill.global);
        let index = base_of(privilege) + ((linear >> 12) as usize & (DATA_ENTRIES - 1));
        self.frames[index] = fill.frame;
        let entry = &mut self.data[index];
        *entry = Entry {
            read: tag,
            write: if fill.write { tag } else { 0 },
            addend: fill.host.get().wrapping_sub(linear & PAGE),
            flags: fill.flags,
        };
    }

    /// The fetch translation of `linear`, if present.
    #[inline(always)]
    pub(crate) fn find_fetch(&self, user: bool, linear: u64) -> Option<FetchEntry> {
        let entry = self.fetch[fetch_index(user, linear)];
        (entry.tag == self.page_tag(linear)).then_some(entry)
    }

    /// Stores a fetch translation and returns it.
    pub(super) fn fill_fetch(
        &mut self,
        user: bool,
        linear: u64,
        host: HostAddress,
        frame: u64,
        global: bool,
        shift: u32,
    ) -> FetchEntry {
        let entry = FetchEntry { tag: self.page_tag(linear), host, frame };
        self.note_fill(linear, shift, global);
        self.fetch[fetch_index(user, linear)] = entry;
        entry
    }

    fn note_fill(&mut self, linear: u64, shift: u32, global: bool) {
        if linear >> 63 != 0 && !global {
            self.upper_has_local = true;
        }
        if shift > 12 {
            let size = if shift == 30 { 30u32 } else { 21 };
            bloom_set(&mut self.large, (linear >> size) ^ u64::from(size) << 40);
        }
    }

    /// Stands for everything that instruction fetches from a half of the linear address space depend on: equal
    /// values mean that linear addresses lead to the same code. 32 bits of serial, then the space.
    pub(crate) fn fetch_contexts(&self) -> [u64; 2] {
        self.spaces.map(|space| u64::from(self.fetch_serial) << 32 | space)
    }

    /// Notes that code at `linear` may be remembered under the current contexts.
    pub(crate) fn note_fetched(&mut self, linear: u64) {
        bloom_set(&mut self.fetched, linear >> 12);
    }

    /// A number that no entry carries. When they run out, everything is forgotten and numbering starts over.
    fn new_space(&mut self) -> u64 {
        self.next_space += 1;
        self.next_space - 1
    }

    /// Makes sure that two new spaces are left. False if that took forgetting everything.
    fn reserve(&mut self) -> bool {
        if self.next_space + 2 <= SPACE_NONE {
            return true;
        }
        self.data.fill(Entry::default());
        self.fetch.fill(FetchEntry::default());
        self.pcid_spaces.fill(0);
        self.large.fill(0);
        self.fetched.fill(0);
        self.fetch_serial = self.fetch_serial.wrapping_add(1);
        self.upper_has_local = false;
        self.spaces = [1, 2];
        self.next_space = 3;
        self.update_tags();
        false
    }

    fn update_tags(&mut self) {
        self.tags = if self.watch || self.alignment { [SPACE_NONE; 2] } else { self.spaces };
    }

    /// Forgets everything: MOV to CR0.PG/WP, CR4.PGE and the like, INVPCID types 2 and 3 of all.
    pub fn flush_all(&mut self) {
        if !self.reserve() {
            return;
        }
        self.pcid_spaces.fill(0);
        self.spaces = [self.new_space(), self.new_space()];
        self.upper_has_local = false;
        self.large.fill(0);
        self.fetched.fill(0);
        self.update_tags();
    }

    /// Forgets the non-global entries of the current PCID: MOV to CR3 without the no-flush bit.
    pub fn flush_non_global(&mut self) {
        if !self.reserve() {
            return;
        }
        let lower = self.new_space();
        self.spaces[0] = lower;
        if let Some(space) = self.pcid_spaces.get_mut(self.pcid as usize) {
            *space = lower as u16;
        }
        self.flush_upper_local();
        self.update_tags();
    }

    fn flush_upper_local(&mut self) {
        if self.upper_has_local {
            self.spaces[1] = self.new_space();
            self.upper_has_local = false;
        }
    }

    /// Forgets `linear` in every PCID, global or not: INVLPG.
    pub fn flush_page(&mut self, linear: u64) {
        let large = bloom_has(&self.large, (linear >> 21) ^ 21 << 40)
            || bloom_has(&self.large, (linear >> 30) ^ 30 << 40);
        if large {
            self.flush_all();
            return;
        }
        for base in [0, DATA_ENTRIES, 2 * DATA_ENTRIES] {
            let entry = &mut self.data[base + ((linear >> 12) as usize & (DATA_ENTRIES - 1))];
            if (entry.read ^ linear) & PAGE == 0 {
                *entry = Entry::default();
            }
        }
        for user in [false, true] {
            let entry = &mut self.fetch[fetch_index(user, linear)];
            if (entry.tag ^ linear) & PAGE == 0 {
                *entry = FetchEntry::default();
            }
        }
        if bloom_has(&self.fetched, linear >> 12) {
            self.fetch_serial = self.fetch_serial.wrapping_add(1);
            self.fetched.fill(0);
        }
    }

    /// Forgets the non-global entries of `pcid`: INVPCID type 1, MOV to CR3 of another PCID.
    pub fn flush_pcid(&mut self, pcid: u16) {
        if pcid == self.pcid {
            self.flush_non_global();
        } else if let Some(space) = self.pcid_spaces.get_mut(pcid as usize) {
            *space = 0;
        }
    }

    /// Forgets `linear` of `pcid`: INVPCID type 0.
    pub fn flush_pcid_page(&mut self, pcid: u16, linear: u64) {
        if pcid == self.pcid {
            self.flush_page(linear);
        } else {
            self.flush_pcid(pcid);
        }
    }

    /// Makes every access take the slow path, which compares it with DR0 to DR3 (or stops doing so).
    pub fn set_watch(&mut self, watch: bool) {
        self.watch = watch;
        self.update_tags();
    }

    /// Whether accesses are compared with the debug registers.
    pub fn watching(&self) -> bool {
        self.watch
    }

    /// Adopts the current privilege, PCID and control registers. `signature` is whatever the entries depend
    /// on; a change of it forgets everything.
    pub(super) fn adopt(&mut self, privilege: Privilege, alignment: bool, pcid: u16, signature: [u64; 3]) {
        self.base = base_of(privilege);
        if self.signature != signature {
            self.signature = signature;
            self.pcid = pcid;
            self.flush_all();
        }
        if self.pcid != pcid {
            self.switch_pcid(pcid);
        }
        if self.alignment != alignment {
            self.alignment = alignment;
            self.update_tags();
        }
    }

    fn switch_pcid(&mut self, pcid: u16) {
        if !self.reserve() {
            self.pcid = pcid;
            return;
        }
        if let Some(space) = self.pcid_spaces.get_mut(self.pcid as usize) {
            *space = self.spaces[0] as u16;
        }
        self.pcid = pcid;
        self.flush_upper_local();
        let known = self.pcid_spaces.get(pcid as usize).copied().unwrap_or(0);
        self.spaces[0] = if known != 0 { u64::from(known) } else { self.new_space() };
        self.update_tags();
    }
}

/// What goes into a data entry.
pub(super) struct DataFill {
    pub(super) host: HostAddress,
    pub(super) flags: HostAddress,
    pub(super) frame: u64,
    pub(super) write: bool,
    pub(super) global: bool,
    pub(super) shift: u32,
}

fn fetch_index(user: bool, linear: u64) -> usize {
    usize::from(user) * FETCH_ENTRIES + ((linear >> 12) as usize & (FETCH_ENTRIES - 1))
}

fn bloom_slot(key: u64) -> (usize, u64) {
    let hash = key.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 54;
    ((hash >> 6) as usize & 15, 1 << (hash & 63))
}

fn bloom_set(bits: &mut [u64; 16], key: u64) {
    let (word, bit) = bloom_slot(key);
    bits[word] |= bit;
}

fn bloom_has(bits: &[u64; 16], key: u64) -> bool {
    let (word, bit) = bloom_slot(key);
    bits[word] & bit != 0
}
