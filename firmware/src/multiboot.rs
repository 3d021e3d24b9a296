//! Multiboot 1 (Multiboot Specification 0.6.96): the kind of image that small kernels and kernel tests are.
//!
//! A header with a magic number and a checksum lies in the first 8 KiB. The image is loaded by the addresses in
//! the header if it has them, otherwise as an ELF file; it is entered in 32-bit protected mode with EAX = magic
//! and EBX = address of the information structure. The initial RAM disk becomes the only module.

use crate::bytes::{put, slice, u32_at};
use crate::elf::Elf;
use crate::entry::{EntryMode, EntryState, RAX, RBX};
use crate::error::LoadError;
use crate::image::{Placement, Request, Segment};
use crate::layout::{self, E820Entry, Range};
use crate::{KernelKind, LoadedKernel};
use std::borrow::Cow;

const HEADER_MAGIC: u32 = 0x1BAD_B002;
/// What EAX holds at the entry.
const ENTRY_MAGIC: u32 = 0x2BAD_B002;
/// The header lies wholly in this many first bytes of the file.
const SEARCH: usize = 8192;
/// Flags that the loader must refuse if it does not know them.
const MUST_UNDERSTAND: u32 = 0xFFFF;
/// Modules on page boundaries, memory information, video mode table: known (the last is a wish that a machine
/// without a screen cannot fulfil; kernels look whether they got one).
const UNDERSTOOD: u32 = 0b111;
/// The header has load addresses.
const HAS_ADDRESSES: u32 = 1 << 16;

/// Information structure and its tables, all in the page at `BOOT_INFO` and the one behind it.
const INFO_SIZE: usize = 0x80;
const MODULE_OFFSET: usize = 0x80;
const LOADER_NAME_OFFSET: usize = 0xA0;
const MODULE_NAME_OFFSET: usize = 0xC0;
const MEMORY_MAP_OFFSET: usize = 0x100;
/// Bytes of a memory map entry, its size field included.
const MEMORY_MAP_ENTRY: usize = 24;

/// Load addresses of a header, all physical.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Addresses {
    header: u64,
    load: u64,
    load_end: u64,
    bss_end: u64,
    entry: u64,
}

/// A Multiboot header.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Header {
    /// Where it is in the file.
    offset: u64,
    addresses: Option<Addresses>,
}

impl Header {
    /// The header of `kernel`, or `None` if it has none.
    pub(crate) fn find(kernel: &[u8]) -> Result<Option<Header>, LoadError> {
        let head = &kernel[..kernel.len().min(SEARCH)];
        let found = (0..head.len() as u64).step_by(4).find(|&at| {
            let word = |index: u64| u32_at(head, at + index * 4);
            word(0) == Some(HEADER_MAGIC)
                && matches!((word(1), word(2)), (Some(flags), Some(sum))
                    if HEADER_MAGIC.wrapping_add(flags).wrapping_add(sum) == 0)
        });
        let Some(offset) = found else { return Ok(None) };
        let flags = u32_at(head, offset + 4).unwrap_or(0);
        let unknown = flags & MUST_UNDERSTAND & !UNDERSTOOD;
        if unknown != 0 {
            let what = format!("its Multiboot header requires features {unknown:#x}, which are not known");
            return Err(LoadError::Unsupported { what });
        }
        let address = |index: u64| u32_at(kernel, offset + 12 + index * 4).map(u64::from);
        let addresses = if flags & HAS_ADDRESSES == 0 {
            None
        } else {
            let read = || {
                Some(Addresses {
                    header: address(0)?,
                    load: address(1)?,
                    load_end: address(2)?,
                    bss_end: address(3)?,
                    entry: address(4)?,
                })
            };
            let needed = offset + 32;
            let present = kernel.len() as u64;
            Some(read().ok_or(LoadError::Truncated { what: "the Multiboot header", needed, present })?)
        };
        Ok(Some(Header { offset, addresses }))
    }
}

/// Places a Multiboot image; `elf` is the same file read as ELF, if it is one.
pub(crate) fn load<'a>(
    kernel: &'a [u8],
    elf: Option<&Elf<'a>>,
    header: &Header,
    request: &Request<'a, '_>,
) -> Result<LoadedKernel<'a>, LoadError> {
    let mut placement = Placement::new(request.params);
    placement.keep_small_boot_area()?;
    let entry = match (header.addresses, elf) {
        (Some(addresses), _) => {
            placement.add(flat_segment(kernel, header.offset, addresses)?)?;
            addresses.entry
        }
        (None, Some(elf)) => {
            elf.place(&mut placement)?;
            elf.entry()
        }
        (None, None) => {
            return Err(LoadError::Invalid {
                what: "its Multiboot header has no load addresses and it is not an ELF file",
            });
        }
    };
    if entry >= 1 << 32 {
        let what = format!("its entry point {entry:#x} is above 4 GiB, expected a 32-bit physical address");
        return Err(LoadError::Unsupported { what });
    }
    let name = request.params.kernel_name;
    let cmdline = match (name.is_empty() || name.contains('\0'), request.cmdline.is_empty()) {
        (true, _) => request.cmdline.to_owned(),
        (false, true) => name.to_owned(),
        (false, false) => format!("{name} {}", request.cmdline),
    };
    placement.add_cmdline(&cmdline, layout::BOOT_CMDLINE_MAX)?;
    let initrd = match request.initrd {
        Some(data) if !data.is_empty() => Some(placement.add_initrd_low(data)?),
        _ => None,
    };
    let info = information(placement.e820(), initrd, request);
    placement.add_boot([Segment {
        what: "Multiboot information",
        address: layout::BOOT_INFO,
        data: Cow::Owned(info),
        zero_after: 0,
    }]);
    let mut state = EntryState::new(EntryMode::Protected32, entry);
    state.gpr[RAX] = u64::from(ENTRY_MAGIC);
    state.gpr[RBX] = layout::BOOT_INFO;
    placement.add_boot(state.tables());
    Ok(LoadedKernel { kind: KernelKind::Multiboot, segments: placement.finish(), entry: state, initrd })
}

/// The image as the header's addresses describe it (specification, section 3.1.3).
fn flat_segment<'a>(kernel: &'a [u8], offset: u64, a: Addresses) -> Result<Segment<'a>, LoadError> {
    let before = a
        .header
        .checked_sub(a.load)
        .ok_or(LoadError::Invalid { what: "its Multiboot header lies before the load address" })?;
    let start = offset
        .checked_sub(before)
        .ok_or(LoadError::Invalid { what: "its Multiboot load address is before the start of the file" })?;
    let present = kernel.len() as u64;
    let size = match a.load_end {
        0 => present.saturating_sub(start),
        end => end
            .checked_sub(a.load)
            .ok_or(LoadError::Invalid { what: "its Multiboot image ends before the load address" })?,
    };
    let data = slice(kernel, start, size).ok_or(LoadError::Truncated {
        what: "the Multiboot image",
        needed: start.saturating_add(size),
        present,
    })?;
    let bss_end = if a.bss_end == 0 { a.load + size } else { a.bss_end };
    let zero_after = bss_end
        .checked_sub(a.load + size)
        .ok_or(LoadError::Invalid { what: "its Multiboot zeroed area ends before the image" })?;
    Ok(Segment { what: "the Multiboot image", address: a.load, data: Cow::Borrowed(data), zero_after })
}

/// The information structure with everything that it points to.
fn information(e820: &[E820Entry], initrd: Option<Range>, request: &Request<'_, '_>) -> Vec<u8> {
    /// Memory sizes, command line, modules, memory map, loader name.
    const FLAGS: u32 = 1 | 1 << 2 | 1 << 3 | 1 << 6 | 1 << 9;
    let at = |offset: usize| (layout::BOOT_INFO as usize + offset) as u32;
    let map_size = e820.len() * MEMORY_MAP_ENTRY;
    let mut info = vec![0; MEMORY_MAP_OFFSET + map_size];
    let usable = request.params.map.usable_ram(request.params.reserved);
    let above = usable.iter().find(|ram| ram.start == layout::HIGH_MEMORY_START).map_or(0, Range::size);
    let words = [
        (0, FLAGS),
        (4, (layout::EBDA.start >> 10) as u32),
        (8, (above >> 10) as u32),
        (16, layout::BOOT_CMDLINE as u32),
        (20, u32::from(initrd.is_some())),
        (24, at(MODULE_OFFSET)),
        (44, map_size as u32),
        (48, at(MEMORY_MAP_OFFSET)),
        (64, at(LOADER_NAME_OFFSET)),
    ];
    debug_assert!(words.iter().all(|(offset, _)| offset + 4 <= INFO_SIZE));
    for (offset, word) in words {
        put(&mut info, offset, &word.to_le_bytes());
    }
    if let Some(initrd) = initrd {
        put(&mut info, MODULE_OFFSET, &(initrd.start as u32).to_le_bytes());
        put(&mut info, MODULE_OFFSET + 4, &(initrd.end as u32).to_le_bytes());
        put(&mut info, MODULE_OFFSET + 8, &at(MODULE_NAME_OFFSET).to_le_bytes());
    }
    put(&mut info, LOADER_NAME_OFFSET, b"atoll\0");
    put(&mut info, MODULE_NAME_OFFSET, b"initrd\0");
    for (index, entry) in e820.iter().enumerate() {
        let offset = MEMORY_MAP_OFFSET + index * MEMORY_MAP_ENTRY;
        put(&mut info, offset, &(MEMORY_MAP_ENTRY as u32 - 4).to_le_bytes());
        put(&mut info, offset + 4, &entry.range.start.to_le_bytes());
        put(&mut info, offset + 12, &entry.range.size().to_le_bytes());
        put(&mut info, offset + 20, &(entry.kind as u32).to_le_bytes());
    }
    info
}
