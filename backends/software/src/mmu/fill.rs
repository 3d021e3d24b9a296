//! Walks for this processor, fills of the TLBs, and accesses to physical memory off the fast path.

use std::sync::Arc;

use atoll_machine::backend::CpuIo;
use atoll_machine::memory::{FlatTarget, PAGE_HAS_CODE, RamBlock};

use super::raw::{self, HostAddress, Word};
use super::tlb::{DataFill, FetchEntry, Privilege};
use super::walk::{Page, Paging, Request, Structures, Tables, walk};
use super::{Mmu, ViewCache};
use crate::access::Access;
use crate::apic;
use crate::cpu::{Cpu, control, flag};
use crate::exception::{Exception, Outcome};

const PAGE_SIZE: u64 = 4096;
/// A page of code that is stored to this often without being decoded again is data.
const CODE_STORES_UNTIL_DATA: u32 = 64;

/// Memory at a physical address: `len` bytes from `offset` of `block`, all inside one range of the view.
pub(crate) struct Ram<'a> {
    pub(crate) block: &'a Arc<RamBlock>,
    pub(crate) offset: u64,
    pub(crate) writable: bool,
}

impl Ram<'_> {
    /// Host address of the first byte.
    pub(crate) fn host(&self) -> HostAddress {
        // The view was built from regions that lie inside their blocks; whoever keeps this address keeps the
        // view or the block (see the module documentation of `mmu`).
        HostAddress::promise(self.block.as_ptr() as u64 + self.offset)
    }
    /// The flag byte of the page.
    fn flags(&self) -> HostAddress {
        let flags = self.block.page_flags().get((self.offset / PAGE_SIZE) as usize);
        HostAddress::promise(flags.map_or(0, |f| std::ptr::from_ref(f) as u64))
    }
}

impl ViewCache {
    /// RAM or ROM that holds all `len` bytes at physical `address`.
    pub(crate) fn ram(&self, address: u64, len: u64) -> Option<Ram<'_>> {
        let range = self.view.lookup(address)?;
        let inside = address - range.start;
        if range.len - inside < len {
            return None;
        }
        match &range.target {
            FlatTarget::Ram { block, offset } => Some(Ram { block, offset: offset + inside, writable: true }),
            FlatTarget::Rom { block, offset, .. } => {
                Some(Ram { block, offset: offset + inside, writable: false })
            }
            FlatTarget::Mmio { .. } => None,
        }
    }
}

/// Paging structures in guest memory. Structures outside RAM read as all ones and take no flags.
impl Tables for ViewCache {
    fn read(&mut self, address: u64, wide: bool) -> u64 {
        match self.ram(address, if wide { 8 } else { 4 }) {
            Some(ram) if wide => u64::load(ram.host()),
            Some(ram) => u64::from(u32::load(ram.host())),
            None => u64::MAX,
        }
    }
    fn replace(&mut self, address: u64, wide: bool, old: u64, new: u64) -> bool {
        match self.ram(address, if wide { 8 } else { 4 }) {
            Some(ram) if ram.writable => {
                let done = if wide {
                    u64::compare_exchange(ram.host(), old, new).1
                } else {
                    u32::compare_exchange(ram.host(), old as u32, new as u32).1
                };
                ram.block.after_store(ram.offset, if wide { 8 } else { 4 });
                done
            }
            _ => true,
        }
    }
}

impl Mmu {
    /// Takes the address space's current view if it changed; forgets every translation then.
    pub(crate) fn refresh_view(&mut self, memory: &atoll_machine::memory::AddressSpace) {
        let generation = memory.generation();
        if self.view.generation != Some(generation) {
            self.flush_all();
            self.view.view = memory.view();
            self.view.generation = Some(generation);
        }
    }
}

impl Cpu {
    fn paging(&self) -> Paging {
        let structures = if !self.mode.paging {
            Structures::Off
        } else if self.mode.long {
            Structures::FourLevel
        } else if self.cr4 & control::CR4_PAE != 0 {
            Structures::Pae
        } else {
            Structures::Legacy
        };
        Paging {
            structures,
            cr3: self.cr3,
            pdpte: self.pdpte,
            write_protect: self.cr0 & control::CR0_WP != 0,
            page_size_extensions: self.cr4 & control::CR4_PSE != 0,
            global_pages: self.cr4 & control::CR4_PGE != 0,
            no_execute: self.efer & control::EFER_NXE != 0,
            smep: self.cr4 & control::CR4_SMEP != 0,
            smap: self.cr4 & control::CR4_SMAP != 0,
            physical_bits: self.exec.physical_bits,
        }
    }

    /// Adopts what changed in privilege, control registers and address space since the last call. The run
    /// loop calls it on entry and after every instruction that may have changed one of them.
    pub(crate) fn refresh_translation(&mut self) {
        use control as c;
        self.mmu.refresh_view(&self.shared.memory);
        self.mmu.device_touched = false;
        let alignment = self.mode.cpl == 3 && self.cr0 & c::CR0_AM != 0 && self.rflags & flag::AC != 0;
        let pcid = if self.cr4 & c::CR4_PCIDE != 0 { (self.cr3 & 0xfff) as u16 } else { 0 };
        let cr4 =
            self.cr4 & (c::CR4_PSE | c::CR4_PAE | c::CR4_PGE | c::CR4_PCIDE | c::CR4_SMEP | c::CR4_SMAP);
        let cr0 = self.cr0 & (c::CR0_PG | c::CR0_WP | c::CR0_PE);
        let efer = self.efer & (c::EFER_NXE | c::EFER_LMA);
        self.mmu.adopt(self.privilege(Access::Read), alignment, pcid, [cr0, cr4, efer]);
    }

    /// Whose rights an access has.
    #[inline]
    pub(crate) fn privilege(&self, access: Access) -> Privilege {
        match access {
            Access::SystemRead | Access::SystemWrite => Privilege::Supervisor,
            _ if self.mode.cpl == 3 => Privilege::User,
            _ if self.rflags & flag::AC != 0 => Privilege::SupervisorOverride,
            _ => Privilege::Supervisor,
        }
    }

    fn walk(&mut self, linear: u64, request: Request) -> Outcome<Page> {
        let paging = self.paging();
        walk(&paging, &mut self.mmu.view, linear, request)
            .map_err(|error_code| Exception::PageFault { address: linear, error_code })
    }

    /// Physical address of a data access; fills the TLB where the page is memory.
    pub(crate) fn translate(&mut self, linear: u64, access: Access) -> Outcome<u64> {
        let privilege = self.privilege(access);
        let write = matches!(access, Access::Write | Access::SystemWrite);
        let request = Request {
            write,
            user: privilege == Privilege::User,
            fetch: false,
            smap_override: privilege == Privilege::SupervisorOverride,
        };
        let page = self.walk(linear, request)?;
        let writable = page.writable
            || (privilege != Privilege::User && self.cr0 & control::CR0_WP == 0)
            || !self.mode.paging;
        if let Some(ram) = self.mmu.view.ram(page.frame, PAGE_SIZE) {
            let fill = DataFill {
                host: ram.host(),
                flags: ram.flags(),
                frame: page.frame,
                write: writable && page.dirty && ram.writable,
                global: page.global,
                shift: page.shift,
            };
            self.mmu.fill_data(privilege, linear, fill);
        }
        Ok(page.frame | (linear & 0xfff))
    }

    /// Fetch translation of `linear` at the current privilege; the walk's #PF names `linear` itself.
    pub(crate) fn translate_fetch(&mut self, linear: u64) -> Outcome<FetchEntry> {
        let user = self.mode.cpl == 3;
        self.mmu.note_fetched(linear);
        if let Some(entry) = self.mmu.find_fetch(user, linear) {
            return Ok(entry);
        }
        let request = Request { write: false, user, fetch: true, smap_override: false };
        let page = self.walk(linear, request)?;
        let host = self.mmu.view.ram(page.frame, PAGE_SIZE).map_or(HostAddress::default(), |r| r.host());
        Ok(self.mmu.fill_fetch(user, linear, host, page.frame, page.global, page.shift))
    }

    /// Reads physical memory: RAM, ROM, or the device there. Never crosses a page.
    pub(crate) fn physical_read(&mut self, io: &dyn CpuIo, address: u64, data: &mut [u8]) {
        if let Some(ram) = self.mmu.view.ram(address, data.len() as u64) {
            raw::copy_out(ram.host(), data);
            return;
        }
        self.mmu.device_touched = true;
        self.exec.leave_block();
        if apic::owns(self, address) {
            apic::mmio_read(self, address & 0xfff, data);
            return;
        }
        for (i, part) in data.chunks_mut(64).enumerate() {
            io.mmio_read(address + i as u64 * 64, part);
        }
    }

    /// Writes physical memory: RAM, or the device there. Never crosses a page.
    pub(crate) fn physical_write(&mut self, io: &dyn CpuIo, address: u64, data: &[u8]) {
        let len = data.len() as u64;
        if let Some(ram) = self.mmu.view.ram(address, len)
            && ram.writable
        {
            raw::copy_in(ram.host(), data);
            self.after_store(address, len);
            return;
        }
        self.mmu.device_touched = true;
        self.exec.leave_block();
        if apic::owns(self, address) {
            apic::mmio_write(self, address & 0xfff, data);
            return;
        }
        for (i, part) in data.chunks(64).enumerate() {
            io.mmio_write(address + i as u64 * 64, part);
        }
    }

    /// What follows a store to RAM at physical `address` whose page has a flag set: dirty logs, code versions.
    #[cold]
    pub(crate) fn after_store(&mut self, address: u64, len: u64) {
        let Some(ram) = self.mmu.view.ram(address, len) else { return };
        let page = ram.offset / PAGE_SIZE;
        let Some(flags) = ram.block.page_flags().get(page as usize) else { return };
        let flags = flags.load(std::sync::atomic::Ordering::Relaxed);
        if flags == 0 {
            return;
        }
        ram.block.note_write(ram.offset, len);
        if flags & PAGE_HAS_CODE == 0 {
            return;
        }
        let block = ram.block.clone();
        self.exec.leave_block();
        if self.mmu.counts_as_data(address / PAGE_SIZE) {
            block.unprotect_code(page);
        }
    }
}

impl Mmu {
    /// Counts a store to a page of code; true when the page was stored to so often that it is data by now.
    fn counts_as_data(&mut self, frame: u64) -> bool {
        let slot = &mut self.code_stores[(frame & 3) as usize];
        if slot.0 != frame {
            *slot = (frame, 0);
        }
        slot.1 += 1;
        if slot.1 < CODE_STORES_UNTIL_DATA {
            return false;
        }
        *slot = (u64::MAX, 0);
        true
    }

    /// Code of this page is decoded (again): it is code after all.
    pub(crate) fn note_decoded(&mut self, frame: u64) {
        let slot = &mut self.code_stores[(frame & 3) as usize];
        if slot.0 == frame {
            slot.1 = 0;
        }
    }
}
