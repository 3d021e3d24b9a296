//! The directory of internal snapshots. They are listed and kept intact, never made or taken away.

use std::io;

use vm_memory::VolatileSlice;

use super::header::{Header, MAX_L1_BYTES};
use super::layout::corrupt;
use crate::file::ImageFile;

/// The most that the directory may take, in bytes (QEMU's limit).
const MAX_DIRECTORY_BYTES: u64 = 64 << 20;
const FIXED_BYTES: usize = 40;
const MAX_EXTRA_BYTES: u64 = 1024;

/// An internal snapshot as its directory entry describes it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Snapshot {
    /// Unique within the image.
    pub id: String,
    /// Chosen by the user; need not be unique.
    pub name: String,
    /// When it was taken, in seconds since 1970.
    pub taken_seconds: u32,
    /// Bytes of saved machine state with it; 0 for none.
    pub state_bytes: u64,
    /// Size of the disk then, in bytes; `None` in images that do not say.
    pub disk_bytes: Option<u64>,
    pub(super) l1_offset: u64,
    pub(super) l1_entries: u32,
}

/// Reads the directory; also says how many bytes it takes.
pub(super) fn read(
    file: &impl ImageFile,
    header: &Header,
    file_size: u64,
) -> io::Result<(Vec<Snapshot>, u64)> {
    let mut list = Vec::new();
    let mut at = header.snapshots_offset;
    for number in 0..header.snapshots {
        let wrong = |what: &str| corrupt(format_args!("its snapshot {number} {what}"));
        let fixed = read_exactly(file, at, FIXED_BYTES)?;
        let half = |at: usize| u64::from(u16::from_be_bytes([fixed[at], fixed[at + 1]]));
        let full = |at: usize| u32::from_be_bytes([fixed[at], fixed[at + 1], fixed[at + 2], fixed[at + 3]]);
        let (id_len, name_len, extra_len) = (half(12), half(14), u64::from(full(36)));
        if extra_len > MAX_EXTRA_BYTES {
            return Err(wrong("has too much extra data"));
        }
        // At most 130 KiB and a bit.
        let rest = read_exactly(file, at + FIXED_BYTES as u64, (extra_len + id_len + name_len) as usize)?;
        let extra = |at: usize| {
            let bytes = rest.get(at..at + 8).filter(|_| at as u64 + 8 <= extra_len)?;
            <[u8; 8]>::try_from(bytes).ok().map(u64::from_be_bytes)
        };
        let text = |from: u64, len: u64| {
            String::from_utf8_lossy(&rest[from as usize..(from + len) as usize]).into_owned()
        };
        let snapshot = Snapshot {
            id: text(extra_len, id_len),
            name: text(extra_len + id_len, name_len),
            taken_seconds: full(16),
            state_bytes: extra(0).unwrap_or(u64::from(full(32))),
            disk_bytes: extra(8),
            l1_offset: u64::from(full(0)) << 32 | u64::from(full(4)),
            l1_entries: full(8),
        };
        let l1_bytes = u64::from(snapshot.l1_entries) * 8;
        let inside = snapshot.l1_offset.checked_add(l1_bytes).is_some_and(|end| end <= file_size);
        if !inside || snapshot.l1_offset & (header.layout.cluster_size() - 1) != 0 || l1_bytes > MAX_L1_BYTES
        {
            return Err(wrong("has an L1 table that is not within the image"));
        }
        list.push(snapshot);
        at += (FIXED_BYTES as u64 + extra_len + id_len + name_len).next_multiple_of(8);
        if at - header.snapshots_offset > MAX_DIRECTORY_BYTES {
            return Err(corrupt("its snapshot directory is longer than possible"));
        }
    }
    Ok((list, at - header.snapshots_offset))
}

fn read_exactly(file: &impl ImageFile, offset: u64, len: usize) -> io::Result<Vec<u8>> {
    let mut bytes = vec![0u8; len];
    if len == 0 {
        return Ok(bytes);
    }
    let count = file.read_at(offset, &[VolatileSlice::from(&mut bytes[..])])?;
    if count < len {
        return Err(corrupt("its snapshot directory is not within the image"));
    }
    Ok(bytes)
}
