//! Guest memory access by instruction handlers: segmentation, then paging, then RAM or a device.
//!
//! Two doors lead to the same places:
//!
//! * the hot one, for the integer handlers: `load`, `store`, `place` + `place_load` / `place_store`, at the
//!   current privilege, one TLB probe inline;
//! * the general one: [`Cpu::read_bytes`], [`Cpu::write_bytes`], [`Cpu::read_u32`] and so on, with an explicit
//!   [`Access`], for system and vector instructions and event delivery.
//!
//! Either way an access that misses the TLB, crosses pages, hits a watched address or meets a device ends up in
//! the functions at the end of this file, which check everything before the first byte is touched.

use std::sync::{Mutex, MutexGuard};

use atoll_machine::backend::CpuIo;
use atoll_machine::cpu::state::{Segment, seg};

use crate::cpu::Cpu;
use crate::exception::{Exception, Outcome, vector};
use crate::mmu::raw::{self, HostAddress, Word};

/// Who accesses memory, and how.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Data read at the current privilege.
    Read,
    /// Data write at the current privilege.
    Write,
    /// Implicit supervisor read (descriptor tables, TSS, IDT): U/S of the processor counts as supervisor.
    SystemRead,
    /// Implicit supervisor write.
    SystemWrite,
    /// Instruction fetch.
    Fetch,
}

impl Access {
    fn is_write(self) -> bool {
        matches!(self, Self::Write | Self::SystemWrite)
    }
    /// The same access as a write.
    fn to_write(self) -> Self {
        match self {
            Self::SystemRead | Self::SystemWrite => Self::SystemWrite,
            _ => Self::Write,
        }
    }
}

/// Taken by locked accesses that no host atomic can make: across pages, or to devices. Plain accesses of other
/// vCPUs to the same bytes may still fall between the load and the store of such an access.
static SPLIT_LOCK: Mutex<()> = Mutex::new(());

fn split_lock() -> MutexGuard<'static, ()> {
    SPLIT_LOCK.lock().unwrap_or_else(|e| e.into_inner())
}

/// An operand that is read and then written: permission to write was checked.
#[derive(Clone, Copy)]
pub(crate) struct Place {
    /// Where it is in the host, address 0 if it takes the slow path.
    host: HostAddress,
    flags: HostAddress,
    linear: u64,
}

/// Whether an address is canonical for 48-bit linear addresses.
#[inline(always)]
pub fn is_canonical(linear: u64) -> bool {
    ((linear as i64) << 16 >> 16) as u64 == linear
}

/// #SS(0) for the stack segment, else #GP(0).
#[inline]
pub(crate) fn segment_fault(segment: usize) -> Exception {
    if segment == seg::SS { Exception::SS0 } else { Exception::GP0 }
}

impl Cpu {
    /// Linear address of `segment:offset` for an access of `size` bytes: limit, type and canonical checks.
    /// #SS for the stack segment, else #GP. In 64-bit mode only FS and GS have a base.
    pub fn linear(&self, segment: usize, offset: u64, size: u64, access: Access) -> Outcome<u64> {
        if self.mode.bits == 64 {
            let linear = if segment >= seg::FS {
                self.segments[segment % 6].base.wrapping_add(offset)
            } else {
                offset
            };
            let last = linear.wrapping_add(size.wrapping_sub(1));
            return if is_canonical(linear) && is_canonical(last) {
                Ok(linear)
            } else {
                Err(segment_fault(segment))
            };
        }
        let s = &self.segments[segment % 6];
        if self.segment_allows(s, offset, size, access) {
            Ok(s.base.wrapping_add(offset) & 0xffff_ffff)
        } else {
            Err(segment_fault(segment))
        }
    }

    fn segment_allows(&self, s: &Segment, offset: u64, size: u64, access: Access) -> bool {
        let kind = s.kind();
        let code = kind & 8 != 0;
        if self.mode.protected {
            let wrong = if access.is_write() { code || kind & 2 == 0 } else { code && kind & 2 == 0 };
            if s.unusable() || wrong {
                return false;
            }
        }
        let last = offset.wrapping_add(size.wrapping_sub(1));
        let expand_down = kind & 0xc == 4;
        if expand_down {
            let top = if s.attributes & Segment::DEFAULT_BIG != 0 { 0xffff_ffff } else { 0xffff };
            offset > u64::from(s.limit) && last <= top && last >= offset
        } else {
            last <= u64::from(s.limit) && last >= offset
        }
    }

    /// Linear address `by` bytes after `linear`: addresses outside long mode wrap at 4 GiB.
    fn linear_after(&self, linear: u64, by: u64) -> u64 {
        let next = linear.wrapping_add(by);
        if self.mode.long { next } else { next & 0xffff_ffff }
    }

    /// Reads `buf.len()` (1 to 4096) bytes at a linear address; may cross pages; faults before side effects.
    pub fn read_bytes(&mut self, io: &dyn CpuIo, linear: u64, buf: &mut [u8], access: Access) -> Outcome {
        let len = buf.len() as u64;
        if (linear & 0xfff) + len <= 0x1000
            && let Some(entry) = self.mmu.find(self.privilege(access), linear, false)
        {
            raw::copy_out(entry.host(linear), buf);
            return Ok(());
        }
        self.read_slow(io, linear, buf, access, seg::DS)
    }

    /// Writes bytes at a linear address; both pages are checked before the first byte is written.
    pub fn write_bytes(&mut self, io: &dyn CpuIo, linear: u64, data: &[u8], access: Access) -> Outcome {
        let len = data.len() as u64;
        if (linear & 0xfff) + len <= 0x1000
            && let Some(entry) = self.mmu.find(self.privilege(access), linear, true)
            && u8::load(entry.flags) == 0
        {
            raw::copy_in(entry.host(linear), data);
            // Set meanwhile by another thread: its barrier makes this load see it (see `RamBlock`).
            if u8::load(entry.flags) != 0 {
                let address = self.translate(linear, access)?;
                self.after_store(address, len);
            }
            return Ok(());
        }
        self.write_slow(io, linear, data, access, seg::DS)
    }

    /// Raises the fault that an access of `size` bytes at `linear` would raise, without accessing it.
    pub fn probe(&mut self, io: &dyn CpuIo, linear: u64, size: u64, access: Access) -> Outcome {
        let _ = io;
        self.pieces(linear, size, access).map(|_| ())
    }

    /// Reads a byte.
    pub fn read_u8(&mut self, io: &dyn CpuIo, linear: u64, access: Access) -> Outcome<u8> {
        self.read_word(io, linear, access)
    }
    /// Reads 2 bytes.
    pub fn read_u16(&mut self, io: &dyn CpuIo, linear: u64, access: Access) -> Outcome<u16> {
        self.read_word(io, linear, access)
    }
    /// Reads 4 bytes.
    pub fn read_u32(&mut self, io: &dyn CpuIo, linear: u64, access: Access) -> Outcome<u32> {
        self.read_word(io, linear, access)
    }
    /// Reads 8 bytes.
    pub fn read_u64(&mut self, io: &dyn CpuIo, linear: u64, access: Access) -> Outcome<u64> {
        self.read_word(io, linear, access)
    }
    /// Reads 16 bytes; not atomic.
    pub fn read_u128(&mut self, io: &dyn CpuIo, linear: u64, access: Access) -> Outcome<u128> {
        let mut bytes = [0; 16];
        self.read_bytes(io, linear, &mut bytes, access)?;
        Ok(u128::from_le_bytes(bytes))
    }
    /// Writes a byte.
    pub fn write_u8(&mut self, io: &dyn CpuIo, linear: u64, value: u8, access: Access) -> Outcome {
        self.write_bytes(io, linear, &[value], access)
    }
    /// Writes 2 bytes.
    pub fn write_u16(&mut self, io: &dyn CpuIo, linear: u64, value: u16, access: Access) -> Outcome {
        self.write_bytes(io, linear, &value.to_le_bytes(), access)
    }
    /// Writes 4 bytes.
    pub fn write_u32(&mut self, io: &dyn CpuIo, linear: u64, value: u32, access: Access) -> Outcome {
        self.write_bytes(io, linear, &value.to_le_bytes(), access)
    }
    /// Writes 8 bytes.
    pub fn write_u64(&mut self, io: &dyn CpuIo, linear: u64, value: u64, access: Access) -> Outcome {
        self.write_bytes(io, linear, &value.to_le_bytes(), access)
    }
    /// Writes 16 bytes; not atomic.
    pub fn write_u128(&mut self, io: &dyn CpuIo, linear: u64, value: u128, access: Access) -> Outcome {
        self.write_bytes(io, linear, &value.to_le_bytes(), access)
    }

    fn read_word<T: Word>(&mut self, io: &dyn CpuIo, linear: u64, access: Access) -> Outcome<T> {
        if (linear & 0xfff) + T::BYTES <= 0x1000
            && let Some(entry) = self.mmu.find(self.privilege(access), linear, false)
        {
            return Ok(T::load(entry.host(linear)));
        }
        let mut bytes = [0; 8];
        let part = &mut bytes[..T::BYTES as usize];
        self.read_slow(io, linear, part, access, seg::DS)?;
        Ok(T::from_u64(u64::from_le_bytes(bytes)))
    }

    /// A locked read-modify-write of `T` at `linear`: `change` gets what memory holds and gives what it shall
    /// hold; it may be called several times. Returns what memory held. For descriptor busy and accessed bits
    /// pass [`Access::SystemWrite`].
    pub fn atomic<T: Word>(
        &mut self,
        io: &dyn CpuIo,
        linear: u64,
        access: Access,
        change: impl FnMut(T) -> T,
    ) -> Outcome<T> {
        let place = self.place_at::<T>(linear, access.to_write(), seg::DS)?;
        self.place_atomic(io, place, access.to_write(), change)
    }

    // ---- the hot door ----

    /// Loads `T` at the current privilege. `segment` only decides between #GP and #SS.
    #[inline(always)]
    pub(crate) fn load<T: Word>(&mut self, io: &dyn CpuIo, segment: usize, linear: u64) -> Outcome<T> {
        let entry = self.mmu.entry(linear);
        if entry.read == self.mmu.tag::<T>(linear) {
            return Ok(T::load(entry.host(linear)));
        }
        self.load_slow(io, segment, linear, T::BYTES as usize).map(T::from_u64)
    }

    /// Stores `T` at the current privilege.
    #[inline(always)]
    pub(crate) fn store<T: Word>(
        &mut self,
        io: &dyn CpuIo,
        segment: usize,
        linear: u64,
        value: T,
    ) -> Outcome {
        let entry = self.mmu.entry(linear);
        if entry.write == self.mmu.tag::<T>(linear) {
            T::store(entry.host(linear), value);
            if u8::load(entry.flags) != 0 {
                self.stored_to_noted_page(linear, T::BYTES);
            }
            return Ok(());
        }
        self.store_slow(io, segment, linear, value.to_u64(), T::BYTES as usize)
    }

    /// Where an operand of the current privilege is that will be read and written.
    #[inline(always)]
    pub(crate) fn place<T: Word>(&mut self, segment: usize, linear: u64) -> Outcome<Place> {
        let entry = self.mmu.entry(linear);
        if entry.write == self.mmu.tag::<T>(linear) {
            return Ok(Place { host: entry.host(linear), flags: entry.flags, linear });
        }
        self.place_at::<T>(linear, Access::Write, segment)
    }

    /// Reads the operand.
    #[inline(always)]
    pub(crate) fn place_load<T: Word>(&mut self, io: &dyn CpuIo, place: Place) -> Outcome<T> {
        if place.host.get() != 0 {
            return Ok(T::load(place.host));
        }
        self.place_load_slow(io, place.linear, T::BYTES as usize).map(T::from_u64)
    }

    /// Writes the operand.
    #[inline(always)]
    pub(crate) fn place_store<T: Word>(&mut self, io: &dyn CpuIo, place: Place, value: T) -> Outcome {
        if place.host.get() != 0 {
            T::store(place.host, value);
            if u8::load(place.flags) != 0 {
                self.stored_to_noted_page(place.linear, T::BYTES);
            }
            return Ok(());
        }
        self.store_slow(io, seg::DS, place.linear, value.to_u64(), T::BYTES as usize)
    }

    /// A locked read-modify-write of the operand; returns what it held.
    #[inline]
    pub(crate) fn place_atomic<T: Word>(
        &mut self,
        io: &dyn CpuIo,
        place: Place,
        access: Access,
        mut change: impl FnMut(T) -> T,
    ) -> Outcome<T> {
        if place.host.get() != 0 {
            let mut old = T::load(place.host);
            loop {
                let new = change(old);
                let (held, done) = T::compare_exchange(place.host, old, new);
                if done {
                    break;
                }
                old = held;
            }
            if u8::load(place.flags) != 0 {
                self.stored_to_noted_page_as(place.linear, T::BYTES, access);
            }
            return Ok(old);
        }
        let _guard = split_lock();
        let mut bytes = [0; 8];
        let part = &mut bytes[..T::BYTES as usize];
        self.read_slow(io, place.linear, part, access, seg::DS)?;
        let old = T::from_u64(u64::from_le_bytes(bytes));
        let new = change(old).to_u64().to_le_bytes();
        self.write_slow(io, place.linear, &new[..T::BYTES as usize], access, seg::DS)?;
        Ok(old)
    }

    /// LOCK CMPXCHG16B's memory part: `linear` is 16-byte aligned. Returns what memory held, and whether `new`
    /// was stored (what it held is written back otherwise).
    pub(crate) fn compare_exchange_16(
        &mut self,
        io: &dyn CpuIo,
        segment: usize,
        linear: u64,
        expected: u128,
        new: u128,
    ) -> Outcome<(u128, bool)> {
        self.check_canonical(segment, linear, 16)?;
        let place = self.place_at::<u64>(linear, Access::Write, segment)?;
        if place.host.get() != 0 {
            let result = raw::compare_exchange_16(place.host, expected, new);
            if u8::load(place.flags) != 0 {
                self.stored_to_noted_page(linear, 16);
            }
            return Ok(result);
        }
        let _guard = split_lock();
        let mut bytes = [0; 16];
        self.read_slow(io, linear, &mut bytes, Access::Write, segment)?;
        let held = u128::from_le_bytes(bytes);
        let value = if held == expected { new } else { held };
        self.write_slow(io, linear, &value.to_le_bytes(), Access::Write, segment)?;
        Ok((held, held == expected))
    }

    /// Translates the byte at `linear` for reading and checks it, without an access.
    pub(crate) fn probe_segment(&mut self, io: &dyn CpuIo, segment: usize, linear: u64) -> Outcome {
        self.check_canonical(segment, linear, 1)?;
        self.probe(io, linear, 1, Access::Read)
    }

    /// Host address of the `count` bytes from `linear` upwards that the current privilege may read (or write),
    /// if they lie in one page of RAM whose translation is cached. A writer calls
    /// [`Cpu::stored_run`] afterwards.
    pub(crate) fn run_of_bytes(&mut self, linear: u64, count: u64, write: bool) -> Option<HostAddress> {
        if (linear & 0xfff) + count > 0x1000 {
            return None;
        }
        let entry = self.mmu.find(self.privilege(Access::Read), linear, write)?;
        Some(entry.host(linear))
    }

    /// Notes a run of stores made through [`Cpu::run_of_bytes`].
    pub(crate) fn stored_run(&mut self, linear: u64, count: u64) {
        if u8::load(self.mmu.entry(linear).flags) != 0 {
            self.stored_to_noted_page(linear, count);
        }
    }

    // ---- the slow paths ----

    #[cold]
    #[inline(never)]
    fn load_slow(&mut self, io: &dyn CpuIo, segment: usize, linear: u64, size: usize) -> Outcome<u64> {
        let mut bytes = [0; 8];
        self.check_canonical(segment, linear, size as u64)?;
        self.read_slow(io, linear, &mut bytes[..size.min(8)], Access::Read, segment)?;
        Ok(u64::from_le_bytes(bytes))
    }

    #[cold]
    #[inline(never)]
    fn store_slow(
        &mut self,
        io: &dyn CpuIo,
        segment: usize,
        linear: u64,
        value: u64,
        size: usize,
    ) -> Outcome {
        self.check_canonical(segment, linear, size as u64)?;
        self.write_slow(io, linear, &value.to_le_bytes()[..size.min(8)], Access::Write, segment)
    }

    #[cold]
    #[inline(never)]
    fn place_load_slow(&mut self, io: &dyn CpuIo, linear: u64, size: usize) -> Outcome<u64> {
        let mut bytes = [0; 8];
        self.read_slow(io, linear, &mut bytes[..size.min(8)], Access::Write, seg::DS)?;
        Ok(u64::from_le_bytes(bytes))
    }

    #[cold]
    #[inline(never)]
    fn place_at<T: Word>(&mut self, linear: u64, access: Access, segment: usize) -> Outcome<Place> {
        self.check_canonical(segment, linear, T::BYTES)?;
        self.check_alignment(linear, T::BYTES, access)?;
        self.pieces(linear, T::BYTES, access)?;
        self.watch(linear, T::BYTES, access);
        let crosses = (linear & 0xfff) + T::BYTES > 0x1000;
        Ok(match self.mmu.find(self.privilege(access), linear, true) {
            Some(entry) if !crosses => Place { host: entry.host(linear), flags: entry.flags, linear },
            _ => Place { host: HostAddress::default(), flags: HostAddress::default(), linear },
        })
    }

    #[cold]
    #[inline(never)]
    fn stored_to_noted_page(&mut self, linear: u64, size: u64) {
        self.stored_to_noted_page_as(linear, size, Access::Write);
    }

    fn stored_to_noted_page_as(&mut self, linear: u64, size: u64, access: Access) {
        let privilege = self.privilege(access);
        if let Some(frame) = self.mmu.frame(privilege, linear) {
            self.after_store(frame | (linear & 0xfff), size);
        }
    }

    fn check_canonical(&self, segment: usize, linear: u64, size: u64) -> Outcome {
        if !self.mode.long
            || (is_canonical(linear) && is_canonical(linear.wrapping_add(size.wrapping_sub(1))))
        {
            Ok(())
        } else {
            Err(segment_fault(segment))
        }
    }

    /// #AC(0) for a misaligned operand of 2, 4 or 8 bytes at CPL 3 with CR0.AM and EFLAGS.AC.
    fn check_alignment(&self, linear: u64, size: u64, access: Access) -> Outcome {
        let checked = self.mmu.checks_alignment() && matches!(access, Access::Read | Access::Write);
        if checked && matches!(size, 2 | 4 | 8) && linear & (size - 1) != 0 {
            return Err(Exception::with_code(vector::AC, 0));
        }
        Ok(())
    }

    /// Physical addresses of the (at most two) pages of an access; faults like the access.
    fn pieces(&mut self, linear: u64, size: u64, access: Access) -> Outcome<[(u64, u64); 2]> {
        let first = size.min(0x1000 - (linear & 0xfff));
        let low = self.translate(linear, access)?;
        let mut pieces = [(low, first), (0, 0)];
        if first < size {
            let next = self.linear_after(linear, first);
            pieces[1] = (self.translate(next, access)?, size - first);
        }
        Ok(pieces)
    }

    fn read_slow(
        &mut self,
        io: &dyn CpuIo,
        linear: u64,
        buf: &mut [u8],
        access: Access,
        segment: usize,
    ) -> Outcome {
        let size = buf.len() as u64;
        self.check_canonical(segment, linear, size)?;
        self.check_alignment(linear, size, access)?;
        let [(low, first), (high, rest)] = self.pieces(linear, size, access)?;
        self.watch(linear, size, access);
        let (a, b) = buf.split_at_mut(first as usize);
        self.physical_read(io, low, a);
        if rest != 0 {
            self.physical_read(io, high, b);
        }
        Ok(())
    }

    fn write_slow(
        &mut self,
        io: &dyn CpuIo,
        linear: u64,
        data: &[u8],
        access: Access,
        segment: usize,
    ) -> Outcome {
        let size = data.len() as u64;
        self.check_canonical(segment, linear, size)?;
        self.check_alignment(linear, size, access)?;
        let [(low, first), (high, rest)] = self.pieces(linear, size, access)?;
        self.watch(linear, size, access);
        let (a, b) = data.split_at(first as usize);
        self.physical_write(io, low, a);
        if rest != 0 {
            self.physical_write(io, high, b);
        }
        Ok(())
    }

    /// Records the data breakpoints of DR0 to DR3 that this access hits (Intel SDM vol. 3, 18.2.5).
    fn watch(&mut self, linear: u64, size: u64, access: Access) {
        if !self.mmu.watching() {
            return;
        }
        for i in 0..4 {
            let enabled = self.dr7 >> (2 * i) & 3 != 0;
            let kind = self.dr7 >> (16 + 4 * i) & 3;
            let wanted = kind == 3 || (kind == 1 && access.is_write());
            let len = [1, 2, 8, 4][(self.dr7 >> (18 + 4 * i) & 3) as usize];
            let start = self.dr[i as usize] & !(len - 1);
            let overlaps = linear < start.wrapping_add(len) && start < linear.wrapping_add(size);
            if enabled && wanted && overlaps {
                self.mmu.watch_hits |= 1 << i;
            }
        }
    }
}
