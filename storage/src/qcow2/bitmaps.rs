//! Persistent bitmaps: where they are, so that checking can count their clusters. They are not read or written.
//!
//! An autoclear feature bit says that they describe what the disk holds. It is cleared before the first change of
//! the disk, which makes them inconsistent for everybody; their clusters are lost space from then on. Mending
//! counts changes nothing that a bitmap describes, so the bit stays then.
//!
//! Specification: "Bitmaps extension", "Bitmaps" in QEMU's qcow2 specification.

use std::io;

use super::header::Header;
use super::image::read_table;
use super::layout::{OFFSET_MASK, corrupt, word};
use crate::file::ImageFile;

/// The limits of QEMU: bitmaps in an image, bytes of their directory, entries in one's table.
const MAX_BITMAPS: u32 = 65_535;
const MAX_DIRECTORY_BYTES: u64 = 64 << 20;
const MAX_TABLE_ENTRIES: u64 = 0x800_0000;

/// Bytes of a directory entry before its extra data and name.
const FIXED_BYTES: u64 = 24;

/// Bytes of a table that are looked at at once.
const PIECE_BYTES: u64 = 64 << 10;

/// Bytes of the extension's data.
pub(super) const EXTENSION_BYTES: usize = 24;

/// The header extension.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Bitmaps {
    count: u32,
    directory_bytes: u64,
    directory_offset: u64,
}

impl Bitmaps {
    /// How many there are.
    pub(super) fn count(&self) -> u32 {
        self.count
    }

    /// Takes the extension's data apart.
    pub(super) fn parse(data: &[u8; EXTENSION_BYTES]) -> Self {
        let [a, b, c, d, _, _, _, _, rest @ ..] = *data;
        Self {
            count: u32::from_be_bytes([a, b, c, d]),
            directory_bytes: word(&rest, 0),
            directory_offset: word(&rest, 1),
        }
    }
}

/// Calls with every range that belongs to bitmaps: directory, tables, data. Nothing if the image has none that
/// are consistent.
pub(super) fn for_ranges(
    file: &impl ImageFile,
    header: &Header,
    file_end: u64,
    mut each: impl FnMut(u64, u64),
) -> io::Result<()> {
    let Some(bitmaps) = header.consistent_bitmaps() else { return Ok(()) };
    let cluster = header.layout.cluster_size();
    let inside = |offset: u64, len: u64| {
        offset.is_multiple_of(cluster)
            && offset != 0
            && offset.checked_add(len).is_some_and(|end| end <= file_end)
    };
    let Bitmaps { count, directory_bytes: bytes, directory_offset: start } = bitmaps;
    if count > MAX_BITMAPS || bytes > MAX_DIRECTORY_BYTES || !inside(start, bytes) {
        return Err(corrupt("its bitmap directory is not within the image"));
    }
    each(start, bytes);
    let directory = read_table(file, start, bytes)?;
    let mut at = 0;
    for number in 0..count {
        let wrong = |what: &str| corrupt(format_args!("its bitmap {number} {what}"));
        if at + FIXED_BYTES > bytes {
            return Err(wrong("is not within the bitmap directory"));
        }
        let fields = [word(&directory, at / 8), word(&directory, at / 8 + 1), word(&directory, at / 8 + 2)];
        let (table, entries) = (fields[0], fields[1] >> 32);
        let (name_bytes, extra_bytes) = (fields[2] >> 32 & 0xffff, fields[2] & 0xffff_ffff);
        if entries > MAX_TABLE_ENTRIES || !inside(table, entries * 8) {
            return Err(wrong("has a table that is not within the image"));
        }
        each(table, entries * 8);
        let mut done = 0;
        while done < entries * 8 {
            let len = (entries * 8 - done).min(PIECE_BYTES);
            let piece = read_table(file, table + done, len)?;
            for index in 0..len / 8 {
                let data = word(&piece, index) & OFFSET_MASK;
                if data != 0 && !inside(data, 1) {
                    return Err(wrong("has data that is not within the image"));
                }
                if data != 0 {
                    each(data, cluster);
                }
            }
            done += len;
        }
        at += (FIXED_BYTES + extra_bytes + name_bytes).next_multiple_of(8);
    }
    Ok(())
}
