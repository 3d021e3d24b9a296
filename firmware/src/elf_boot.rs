//! Starting ELF kernels: by the PVH protocol when the image has the note, else as an uncompressed Linux kernel.
//!
//! PVH (Xen "x86/HVM direct boot ABI"): 32-bit protected mode, EBX = address of `hvm_start_info` version 1, which
//! names the command line, modules, memory map and ACPI root. Plain ELF64 is entered in 64-bit mode with RSI =
//! `boot_params`, plain ELF32 in protected mode with ESI = `boot_params`, as the Linux boot protocol has it.

use crate::bytes::put;
use crate::elf::Elf;
use crate::entry::{EntryMode, EntryState, RBX};
use crate::error::LoadError;
use crate::image::{Placement, Request, Segment};
use crate::layout::{self, E820Entry, Range};
use crate::linux;
use crate::{KernelKind, LoadedKernel};
use std::borrow::Cow;

/// `hvm_start_info.magic`: "xEn3" with the highest bit of the E set.
const START_INFO_MAGIC: u32 = 0x336E_C578;
/// Offset of the module list behind the start information.
const MODULES_OFFSET: u64 = 0x40;
/// Offset of the memory map behind the start information.
const MEMORY_MAP_OFFSET: u64 = 0x80;
/// Size in bytes of one entry of the memory map.
const MEMORY_MAP_ENTRY: usize = 24;
/// Plain ELF kernels have no field for it; the length that Linux has on x86.
const CMDLINE_MAX: u64 = 2047;

/// Places an ELF kernel with a PVH note whose entry is `entry`.
pub(crate) fn load_pvh<'a>(
    elf: &Elf<'a>,
    entry: u64,
    request: &Request<'a, '_>,
) -> Result<LoadedKernel<'a>, LoadError> {
    let mut placement = Placement::new(request.params);
    placement.keep_boot_area()?;
    elf.place(&mut placement)?;
    check_entry(entry, EntryMode::Protected32)?;
    placement.add_cmdline(request.cmdline, layout::BOOT_CMDLINE_MAX)?;
    let initrd = place_initrd(&mut placement, request)?;
    let info = start_info(placement.e820(), initrd, request.params.rsdp_address);
    placement.add_boot([Segment {
        what: "start information",
        address: layout::BOOT_INFO,
        data: Cow::Owned(info),
        zero_after: 0,
    }]);
    let mut state = EntryState::new(EntryMode::Protected32, entry);
    state.gpr[RBX] = layout::BOOT_INFO;
    placement.add_boot(state.tables());
    Ok(LoadedKernel { kind: KernelKind::Pvh, segments: placement.finish(), entry: state, initrd })
}

/// Places an ELF kernel without a note.
pub(crate) fn load_plain<'a>(
    elf: &Elf<'a>,
    request: &Request<'a, '_>,
) -> Result<LoadedKernel<'a>, LoadError> {
    if elf.is_program() {
        let hint = " (this is a program for an operating system)";
        return Err(LoadError::NotAKernel { hint });
    }
    let mut placement = Placement::new(request.params);
    placement.keep_boot_area()?;
    elf.place(&mut placement)?;
    let (mode, kind) = if elf.is_64 {
        (EntryMode::Long64, KernelKind::Elf64)
    } else {
        (EntryMode::Protected32, KernelKind::Elf32)
    };
    let entry = elf.entry();
    check_entry(entry, mode)?;
    placement.add_cmdline(request.cmdline, CMDLINE_MAX)?;
    let initrd = place_initrd(&mut placement, request)?;
    let mut params = linux::bare_boot_params();
    linux::write_boot_params(&mut params, &placement, initrd, request.params.rsdp_address);
    Ok(linux::finish(placement, params, EntryState::new(mode, entry), kind, initrd))
}

/// The entry tables map the first 4 GiB only, and protected mode reaches no further.
fn check_entry(entry: u64, mode: EntryMode) -> Result<(), LoadError> {
    if entry < 1 << 32 {
        return Ok(());
    }
    let what =
        format!("its entry point {entry:#x} ({mode:?}) is above 4 GiB, expected a physical address below");
    Err(LoadError::Unsupported { what })
}

fn place_initrd<'a>(
    placement: &mut Placement<'a>,
    request: &Request<'a, '_>,
) -> Result<Option<Range>, LoadError> {
    match request.initrd {
        Some(data) if !data.is_empty() => placement.add_initrd_high(data, layout::LOW_RAM_MAX).map(Some),
        _ => Ok(None),
    }
}

fn start_info(e820: &[E820Entry], initrd: Option<Range>, rsdp_address: u64) -> Vec<u8> {
    let base = layout::BOOT_INFO;
    let mut info = vec![0; MEMORY_MAP_OFFSET as usize + e820.len() * MEMORY_MAP_ENTRY];
    put(&mut info, 0, &START_INFO_MAGIC.to_le_bytes());
    put(&mut info, 4, &1u32.to_le_bytes());
    put(&mut info, 24, &layout::BOOT_CMDLINE.to_le_bytes());
    put(&mut info, 32, &rsdp_address.to_le_bytes());
    put(&mut info, 40, &(base + MEMORY_MAP_OFFSET).to_le_bytes());
    put(&mut info, 48, &(e820.len() as u32).to_le_bytes());
    if let Some(initrd) = initrd {
        put(&mut info, 12, &1u32.to_le_bytes());
        put(&mut info, 16, &(base + MODULES_OFFSET).to_le_bytes());
        put(&mut info, MODULES_OFFSET as usize, &initrd.start.to_le_bytes());
        put(&mut info, MODULES_OFFSET as usize + 8, &initrd.size().to_le_bytes());
    }
    for (index, entry) in e820.iter().enumerate() {
        let at = MEMORY_MAP_OFFSET as usize + index * MEMORY_MAP_ENTRY;
        put(&mut info, at, &entry.range.start.to_le_bytes());
        put(&mut info, at + 8, &entry.range.size().to_le_bytes());
        put(&mut info, at + 16, &(entry.kind as u32).to_le_bytes());
    }
    info
}
