//! Reading ELF executables for x86 (System V ABI, chapters 4 and 5): the loadable segments, the entry and the
//! PVH note. Nothing here trusts a number: every offset is looked up with a check, counts are bounded.

use crate::bytes::{align_up, slice, u16_at, u32_at, u64_at};
use crate::error::LoadError;
use crate::image::{Placement, Segment};
use std::borrow::Cow;

/// Most program headers that are read. Kernels have under ten.
const MAX_PROGRAM_HEADERS: u64 = 64;
/// Most notes that are read in one note segment. Kernels have under fifty.
const MAX_NOTES: usize = 256;
const PT_LOAD: u32 = 1;
const PT_INTERP: u32 = 3;
const PT_NOTE: u32 = 4;
const MACHINE_386: u16 = 3;
const MACHINE_X86_64: u16 = 62;
/// Note type of the PVH entry address in notes named `Xen`.
const NOTE_PHYS32_ENTRY: u32 = 18;

/// One program header.
#[derive(Debug, Clone, Copy)]
struct ProgramHeader {
    kind: u32,
    offset: u64,
    virtual_address: u64,
    physical_address: u64,
    file_size: u64,
    memory_size: u64,
    alignment: u64,
}

/// An ELF executable for a 32-bit or 64-bit x86 processor.
pub(crate) struct Elf<'a> {
    data: &'a [u8],
    /// ELF64 for x86-64, otherwise ELF32 (for either machine).
    pub(crate) is_64: bool,
    entry: u64,
    headers: Vec<ProgramHeader>,
}

impl<'a> Elf<'a> {
    /// Reads `data`; `None` if it is no ELF file.
    pub(crate) fn parse(data: &'a [u8]) -> Result<Option<Elf<'a>>, LoadError> {
        if !data.starts_with(b"\x7fELF") {
            return Ok(None);
        }
        let present = data.len() as u64;
        let truncated = |what, needed| LoadError::Truncated { what, needed, present };
        let is_64 = data.get(4) == Some(&2);
        let header_size = if is_64 { 64 } else { 52 };
        if present < header_size {
            return Err(truncated("the ELF header", header_size));
        }
        if !matches!(data[4], 1 | 2) || data[5] != 1 {
            let what = "its ELF file is not 32-bit or 64-bit little-endian".to_owned();
            return Err(LoadError::Unsupported { what });
        }
        let machine = u16_at(data, 18).unwrap_or(0);
        if machine != MACHINE_X86_64 && (machine != MACHINE_386 || is_64) {
            let what = format!("its ELF machine number is {machine}, expected 62 (x86-64) or 3 (i386)");
            return Err(LoadError::Unsupported { what });
        }
        let short = |at| u64::from(u16_at(data, at).unwrap_or(0));
        let word = |at| u64::from(u32_at(data, at).unwrap_or(0));
        let (entry, table, entry_size, count) = if is_64 {
            (u64_at(data, 24).unwrap_or(0), u64_at(data, 32).unwrap_or(0), short(54), short(56))
        } else {
            (word(24), word(28), short(42), short(44))
        };
        if count > MAX_PROGRAM_HEADERS {
            let what =
                format!("it has {count} ELF program headers, at most {MAX_PROGRAM_HEADERS} are accepted");
            return Err(LoadError::Unsupported { what });
        }
        if count > 0 && entry_size < if is_64 { 56 } else { 32 } {
            return Err(LoadError::Invalid { what: "the size of an ELF program header" });
        }
        let size = count * entry_size;
        let Some(table) = slice(data, table, size) else {
            return Err(truncated("the ELF program header table", table.saturating_add(size)));
        };
        let headers = table.chunks_exact(entry_size.max(1) as usize).filter_map(|h| program_header(h, is_64));
        Ok(Some(Elf { data, is_64, entry, headers: headers.collect() }))
    }

    /// Whether this is a program that asks an operating system for a dynamic linker, not a kernel.
    pub(crate) fn is_program(&self) -> bool {
        self.headers.iter().any(|header| header.kind == PT_INTERP)
    }

    /// The physical entry address that a PVH note gives (Xen "PVH direct boot ABI"), if there is one.
    pub(crate) fn pvh_entry(&self) -> Result<Option<u64>, LoadError> {
        for header in self.headers.iter().filter(|header| header.kind == PT_NOTE) {
            let notes = self.file_bytes("an ELF note segment", header)?;
            if let Some(entry) = find_pvh_note(notes, header.alignment) {
                return Ok(Some(entry));
            }
        }
        Ok(None)
    }

    /// The entry point as a physical address. Kernels that are linked high give it as a virtual address of one
    /// of their segments.
    pub(crate) fn entry(&self) -> u64 {
        let loads = || self.headers.iter().filter(|header| header.kind == PT_LOAD);
        let inside = |start: u64, header: &ProgramHeader| {
            self.entry.checked_sub(start).is_some_and(|offset| offset < header.memory_size)
        };
        if loads().any(|header| inside(header.physical_address, header)) {
            return self.entry;
        }
        loads().find(|header| inside(header.virtual_address, header)).map_or(self.entry, |header| {
            header.physical_address.wrapping_add(self.entry.wrapping_sub(header.virtual_address))
        })
    }

    /// Adds the loadable segments at their physical addresses.
    pub(crate) fn place(&self, placement: &mut Placement<'a>) -> Result<(), LoadError> {
        let mut any = false;
        for header in self.headers.iter().filter(|header| header.kind == PT_LOAD && header.memory_size > 0) {
            if header.file_size > header.memory_size {
                return Err(LoadError::Invalid {
                    what: "an ELF segment is larger in the file than in memory",
                });
            }
            if header.physical_address.checked_add(header.memory_size).is_none() {
                return Err(LoadError::Invalid { what: "the address of an ELF segment" });
            }
            placement.add(Segment {
                what: "an ELF segment",
                address: header.physical_address,
                data: Cow::Borrowed(self.file_bytes("an ELF segment", header)?),
                zero_after: header.memory_size - header.file_size,
            })?;
            any = true;
        }
        if any { Ok(()) } else { Err(LoadError::Invalid { what: "it has no loadable ELF segment" }) }
    }

    fn file_bytes(&self, what: &'static str, header: &ProgramHeader) -> Result<&'a [u8], LoadError> {
        slice(self.data, header.offset, header.file_size).ok_or_else(|| LoadError::Truncated {
            what,
            needed: header.offset.saturating_add(header.file_size),
            present: self.data.len() as u64,
        })
    }
}

fn program_header(bytes: &[u8], is_64: bool) -> Option<ProgramHeader> {
    let word = |at| u32_at(bytes, at).map(u64::from);
    Some(if is_64 {
        ProgramHeader {
            kind: u32_at(bytes, 0)?,
            offset: u64_at(bytes, 8)?,
            virtual_address: u64_at(bytes, 16)?,
            physical_address: u64_at(bytes, 24)?,
            file_size: u64_at(bytes, 32)?,
            memory_size: u64_at(bytes, 40)?,
            alignment: u64_at(bytes, 48)?,
        }
    } else {
        ProgramHeader {
            kind: u32_at(bytes, 0)?,
            offset: word(4)?,
            virtual_address: word(8)?,
            physical_address: word(12)?,
            file_size: word(16)?,
            memory_size: word(20)?,
            alignment: word(28)?,
        }
    })
}

/// Walks the notes of one segment. Name and description are padded to 4 bytes, or to 8 in segments aligned so.
fn find_pvh_note(notes: &[u8], alignment: u64) -> Option<u64> {
    let padding = if alignment == 8 { 8 } else { 4 };
    let mut at = 0u64;
    for _ in 0..MAX_NOTES {
        let name_size = u64::from(u32_at(notes, at)?);
        let value_size = u64::from(u32_at(notes, at + 4)?);
        let kind = u32_at(notes, at + 8)?;
        let name = at + 12;
        let value = align_up(name + name_size, padding)?;
        if kind == NOTE_PHYS32_ENTRY && slice(notes, name, name_size) == Some(b"Xen\0") {
            return match value_size {
                4 => u32_at(notes, value).map(u64::from),
                8 => u64_at(notes, value),
                _ => None,
            };
        }
        at = align_up(value + value_size, padding)?;
    }
    None
}
