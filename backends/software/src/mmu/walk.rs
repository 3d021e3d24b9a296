//! Paging-structure walks (Intel SDM vol. 3, chapter 4): 32-bit with PSE, PAE, and 4-level with 1 GiB pages.
//!
//! ```text
//!            entry present?   reserved bits?      rights over all levels?     A (and D) set
//! linear ──► no: P=0          RSVD                P=1 + W/U/I                 by compare-exchange ──► Page
//! ```
//!
//! [`walk`] knows nothing of TLBs, host memory or vCPUs: entries are read and replaced through [`Tables`].
//! Accessed and dirty bits are set from the top level down only once the access is known to be allowed; an
//! entry that changed under the walk restarts it.

/// Error code bits of #PF.
#[allow(missing_docs)]
pub mod code {
    pub const PRESENT: u32 = 1 << 0;
    pub const WRITE: u32 = 1 << 1;
    pub const USER: u32 = 1 << 2;
    pub const RESERVED: u32 = 1 << 3;
    pub const FETCH: u32 = 1 << 4;
}

/// Which structures CR3 points to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Structures {
    /// CR0.PG = 0: linear addresses are physical.
    Off,
    /// CR4.PAE = 0.
    Legacy,
    /// CR4.PAE = 1 outside long mode.
    Pae,
    /// IA-32e mode, 4 levels.
    FourLevel,
}

/// The registers that decide how a walk goes.
#[derive(Clone, Copy, Debug)]
pub struct Paging {
    /// Kind of structures.
    pub structures: Structures,
    /// CR3.
    pub cr3: u64,
    /// PDPTE registers (PAE only).
    pub pdpte: [u64; 4],
    /// CR0.WP.
    pub write_protect: bool,
    /// CR4.PSE (32-bit structures only).
    pub page_size_extensions: bool,
    /// CR4.PGE.
    pub global_pages: bool,
    /// EFER.NXE.
    pub no_execute: bool,
    /// CR4.SMEP.
    pub smep: bool,
    /// CR4.SMAP.
    pub smap: bool,
    /// MAXPHYADDR.
    pub physical_bits: u32,
}

/// What is to be done at the linear address.
#[derive(Clone, Copy, Debug, Default)]
pub struct Request {
    /// A store.
    pub write: bool,
    /// At CPL 3, and not an implicit supervisor access.
    pub user: bool,
    /// An instruction fetch.
    pub fetch: bool,
    /// EFLAGS.AC = 1 and an explicit access: SMAP does not apply.
    pub smap_override: bool,
}

/// A successful translation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Page {
    /// Physical address of the 4 KiB frame.
    pub frame: u64,
    /// log2 of the page's size: 12, 21, 22 or 30.
    pub shift: u32,
    /// R/W of all levels.
    pub writable: bool,
    /// U/S of all levels.
    pub user: bool,
    /// Global, with CR4.PGE.
    pub global: bool,
    /// The leaf's dirty flag, this access included.
    pub dirty: bool,
}

/// Guest-physical memory that holds paging structures.
pub trait Tables {
    /// Reads an entry of 4 or 8 bytes (`wide`).
    fn read(&mut self, address: u64, wide: bool) -> u64;
    /// Replaces `old` by `new` atomically. False if the entry no longer holds `old`.
    fn replace(&mut self, address: u64, wide: bool, old: u64, new: u64) -> bool;
}

const P: u64 = 1 << 0;
const W: u64 = 1 << 1;
const U: u64 = 1 << 2;
const A: u64 = 1 << 5;
const D: u64 = 1 << 6;
const PS: u64 = 1 << 7;
const G: u64 = 1 << 8;
const NX: u64 = 1 << 63;

/// One level as the walk went through it.
#[derive(Clone, Copy, Default)]
struct Step {
    address: u64,
    entry: u64,
}

/// The walk before anything was written: entries, leaf and accumulated rights.
struct Trail {
    steps: [Step; 4],
    depth: usize,
    shift: u32,
    rights: u64,
    no_execute: bool,
}

impl Paging {
    fn frame_mask(&self) -> u64 {
        ((1u64 << self.physical_bits.clamp(32, 52)) - 1) & !0xfff
    }

    /// Reserved bits of 8-byte entries that hold at every level.
    fn reserved_high(&self) -> u64 {
        let above = match self.structures {
            Structures::Pae => !NX & !((1u64 << self.physical_bits.clamp(32, 52)) - 1),
            _ => 0x000f_ffff_ffff_ffff & !((1u64 << self.physical_bits.clamp(32, 52)) - 1),
        };
        above | if self.no_execute { 0 } else { NX }
    }

    /// The access that a fault reports, without P and RSVD.
    fn access_code(&self, request: Request) -> u32 {
        let reports_fetch = self.smep
            || (self.no_execute && matches!(self.structures, Structures::Pae | Structures::FourLevel));
        let mut code = 0;
        if request.write {
            code |= code::WRITE;
        }
        if request.user {
            code |= code::USER;
        }
        if request.fetch && reports_fetch {
            code |= code::FETCH;
        }
        code
    }
}

/// Translates `linear`, or gives the error code of the page fault. Sets accessed and dirty flags.
///
/// `linear` must be canonical (4-level) or below 4 GiB (otherwise).
pub fn walk(paging: &Paging, tables: &mut dyn Tables, linear: u64, request: Request) -> Result<Page, u32> {
    if paging.structures == Structures::Off {
        let frame = linear & !0xfff;
        return Ok(Page { frame, shift: 12, writable: true, user: true, global: true, dirty: true });
    }
    loop {
        let trail = descend(paging, tables, linear).map_err(|e| e | paging.access_code(request))?;
        check_rights(paging, &trail, request).map_err(|()| code::PRESENT | paging.access_code(request))?;
        if let Some(dirty) = mark(paging, tables, &trail, request.write) {
            return Ok(finish(paging, &trail, linear, dirty));
        }
    }
}

fn descend(paging: &Paging, tables: &mut dyn Tables, linear: u64) -> Result<Trail, u32> {
    match paging.structures {
        Structures::Legacy => descend_legacy(paging, tables, linear),
        Structures::Pae => {
            let pdpte = paging.pdpte[(linear >> 30 & 3) as usize];
            if pdpte & P == 0 {
                return Err(0);
            }
            descend_wide(paging, tables, linear, pdpte & paging.frame_mask(), 1)
        }
        _ => descend_wide(paging, tables, linear, paging.cr3 & paging.frame_mask(), 3),
    }
}

fn descend_legacy(paging: &Paging, tables: &mut dyn Tables, linear: u64) -> Result<Trail, u32> {
    let mut trail =
        Trail { steps: Default::default(), depth: 1, shift: 22, rights: W | U, no_execute: false };
    let address = (paging.cr3 & 0xffff_f000) | (linear >> 22 & 0x3ff) << 2;
    let entry = tables.read(address, false);
    trail.steps[0] = Step { address, entry };
    if entry & P == 0 {
        return Err(0);
    }
    trail.rights &= entry;
    if entry & PS != 0 && paging.page_size_extensions {
        // PSE-36: bits 20..13 are physical bits 39..32 as far as the processor has them; bit 21 is reserved.
        let extra_bits = paging.physical_bits.clamp(32, 40) - 32;
        let reserved = 1 << 21 | (0xff & !((1u64 << extra_bits) - 1)) << 13;
        return if entry & reserved != 0 { Err(code::PRESENT | code::RESERVED) } else { Ok(trail) };
    }
    let address = (entry & 0xffff_f000) | (linear >> 12 & 0x3ff) << 2;
    let entry = tables.read(address, false);
    trail.steps[1] = Step { address, entry };
    if entry & P == 0 {
        return Err(0);
    }
    trail.rights &= entry;
    trail.depth = 2;
    trail.shift = 12;
    Ok(trail)
}

fn descend_wide(
    paging: &Paging,
    tables: &mut dyn Tables,
    linear: u64,
    root: u64,
    top: u32,
) -> Result<Trail, u32> {
    let mut trail =
        Trail { steps: Default::default(), depth: 0, shift: 12, rights: W | U, no_execute: false };
    let mut table = root;
    for level in (0..=top).rev() {
        let shift = 12 + 9 * level;
        let address = table | (linear >> shift & 0x1ff) << 3;
        let entry = tables.read(address, true);
        if let Some(step) = trail.steps.get_mut(trail.depth) {
            *step = Step { address, entry };
        }
        trail.depth += 1;
        if entry & P == 0 {
            return Err(0);
        }
        let large = entry & PS != 0 && level != 0;
        let mut reserved = paging.reserved_high();
        if large {
            // Bit 12 is PAT; a PML4 entry has no page size bit at all.
            reserved |= if level == 3 { PS } else { ((1 << shift) - 1) & !0x1fff };
        }
        if entry & reserved != 0 {
            return Err(code::PRESENT | code::RESERVED);
        }
        trail.rights &= entry;
        trail.no_execute |= entry & NX != 0;
        if large || level == 0 {
            trail.shift = shift;
            break;
        }
        table = entry & paging.frame_mask();
    }
    Ok(trail)
}

fn check_rights(paging: &Paging, trail: &Trail, request: Request) -> Result<(), ()> {
    let user_page = trail.rights & U != 0;
    let writable = trail.rights & W != 0;
    let allowed = if request.user {
        user_page && (writable || !request.write)
    } else {
        let smep = request.fetch && paging.smep && user_page;
        let smap = !request.fetch && paging.smap && user_page && !request.smap_override;
        !smep && !smap && (writable || !request.write || !paging.write_protect)
    };
    if allowed && !(request.fetch && trail.no_execute) { Ok(()) } else { Err(()) }
}

/// Sets the missing A and D flags. `None` if an entry changed meanwhile; else the leaf's dirty flag.
fn mark(paging: &Paging, tables: &mut dyn Tables, trail: &Trail, write: bool) -> Option<bool> {
    let wide = paging.structures != Structures::Legacy;
    let mut dirty = false;
    for (i, step) in trail.steps.iter().take(trail.depth).enumerate() {
        let leaf = i + 1 == trail.depth;
        let wanted = step.entry | A | if leaf && write { D } else { 0 };
        if wanted != step.entry && !tables.replace(step.address, wide, step.entry, wanted) {
            return None;
        }
        dirty = wanted & D != 0;
    }
    Some(dirty)
}

fn finish(paging: &Paging, trail: &Trail, linear: u64, dirty: bool) -> Page {
    let leaf = trail.steps.get(trail.depth.wrapping_sub(1)).map_or(0, |s| s.entry);
    let inside = (1u64 << trail.shift) - 1;
    let base = if paging.structures == Structures::Legacy && trail.shift == 22 {
        (leaf & 0xffc0_0000) | (leaf >> 13 & 0xff) << 32
    } else if paging.structures == Structures::Legacy {
        leaf & 0xffff_f000
    } else {
        leaf & paging.frame_mask() & !inside
    };
    Page {
        frame: (base | (linear & inside)) & !0xfff,
        shift: trail.shift,
        writable: trail.rights & W != 0,
        user: trail.rights & U != 0,
        global: leaf & G != 0 && paging.global_pages,
        dirty,
    }
}
