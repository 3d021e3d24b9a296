//! The header, its extensions and its feature bits.
//!
//! Every number in it is checked here, once, so that the rest may compute with them without overflow.
//! Specification: "Header", "Header extensions" in QEMU's qcow2 specification.

use std::io;

use vm_memory::VolatileSlice;

use super::bitmaps::Bitmaps;
use super::layout::{Layout, corrupt, refused};
use crate::file::ImageFile;

/// The first four bytes of every image.
pub(crate) const MAGIC: [u8; 4] = *b"QFI\xfb";

/// Incompatible feature bits.
pub(super) const DIRTY: u64 = 1 << 0;
pub(super) const CORRUPT: u64 = 1 << 1;
const EXTERNAL_DATA: u64 = 1 << 2;
pub(super) const COMPRESSION_TYPE: u64 = 1 << 3;
pub(super) const EXTENDED_L2: u64 = 1 << 4;
/// Compatible feature bit: reference counts may be late while the dirty bit is set.
pub(super) const LAZY_REFCOUNTS: u64 = 1 << 0;
/// Autoclear feature bit: the bitmaps extension is consistent.
pub(super) const BITMAPS: u64 = 1 << 0;

pub(super) const EXTENSION_BACKING_FORMAT: u32 = 0xe279_2aca;
const EXTENSION_FEATURE_NAMES: u32 = 0x6803_f857;
const EXTENSION_BITMAPS: u32 = 0x2385_2875;

/// Limits of what is opened, those of QEMU: bytes of the first-level table and of the table of refcount blocks.
pub(super) const MAX_L1_BYTES: u64 = 32 << 20;
pub(super) const MAX_REFCOUNT_TABLE_BYTES: u64 = 8 << 20;
const MAX_SNAPSHOTS: u32 = 65_536;
const MAX_BACKING_NAME: u32 = 1023;

/// How compressed clusters are compressed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Compression {
    /// Raw deflate streams (the format calls this zlib).
    #[default]
    Deflate,
    /// Zstandard frames.
    Zstd,
}

/// A checked header.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Header {
    pub(super) layout: Layout,
    /// Size of the disk in bytes, as stored.
    pub(super) size: u64,
    pub(super) l1_entries: u32,
    pub(super) l1_offset: u64,
    pub(super) refcount_table_offset: u64,
    pub(super) refcount_table_clusters: u32,
    pub(super) snapshots: u32,
    pub(super) snapshots_offset: u64,
    pub(super) incompatible: u64,
    pub(super) compatible: u64,
    pub(super) autoclear: u64,
    pub(super) compression: Compression,
    pub(super) backing_file: Option<String>,
    pub(super) backing_format: Option<String>,
    /// Persistent bitmaps, consistent or not.
    pub(super) bitmaps: Option<Bitmaps>,
}

fn be32(bytes: &[u8], at: usize) -> u32 {
    bytes.get(at..at + 4).and_then(|b| <[u8; 4]>::try_from(b).ok()).map_or(0, u32::from_be_bytes)
}

fn be64(bytes: &[u8], at: usize) -> u64 {
    u64::from(be32(bytes, at)) << 32 | u64::from(be32(bytes, at + 4))
}

impl Header {
    /// Reads and checks the header of an image of `file_size` bytes.
    pub(super) fn read(file: &impl ImageFile, file_size: u64) -> io::Result<Self> {
        let mut start = [0u8; 112];
        let count = file.read_at(0, &[VolatileSlice::from(&mut start[..])])?;
        if count < 72 || start[..4] != MAGIC {
            return Err(corrupt("it does not begin with a qcow2 header"));
        }
        let cluster_bits = be32(&start, 20);
        if !(9..=21).contains(&cluster_bits) {
            return Err(corrupt(format_args!(
                "its clusters have 2^{cluster_bits} bytes; 9 to 21 are possible"
            )));
        }
        // At most 2 MiB.
        let mut first = vec![0u8; 1 << cluster_bits];
        let count = file.read_at(0, &[VolatileSlice::from(&mut first[..])])?;
        first.truncate(count);
        let header = Self::parse(&first, cluster_bits)?;
        header.check_tables(file_size)?;
        Ok(header)
    }

    fn parse(first: &[u8], cluster_bits: u32) -> io::Result<Self> {
        let version = be32(first, 4);
        let header_length = match version {
            2 => 72,
            3 => be32(first, 100) as usize,
            _ => return Err(refused(format_args!("qcow2 version {version} is not supported; 2 and 3 are"))),
        };
        if version == 3 && (header_length < 104 || header_length % 8 != 0) || header_length > first.len() {
            return Err(corrupt(format_args!("its header claims {header_length} bytes")));
        }
        let field64 = |at: usize| if at + 8 <= header_length { be64(first, at) } else { 0 };
        let mut header = Self {
            layout: Layout {
                version,
                cluster_bits,
                extended: field64(72) & EXTENDED_L2 != 0,
                refcount_order: if version == 3 { be32(first, 96) } else { 4 },
            },
            size: be64(first, 24),
            l1_entries: be32(first, 36),
            l1_offset: be64(first, 40),
            refcount_table_offset: be64(first, 48),
            refcount_table_clusters: be32(first, 56),
            snapshots: be32(first, 60),
            snapshots_offset: be64(first, 64),
            incompatible: field64(72),
            compatible: field64(80),
            autoclear: field64(88),
            compression: Compression::Deflate,
            backing_file: None,
            backing_format: None,
            bitmaps: None,
        };
        let names = header.read_extensions(first, header_length)?;
        header.check_features(&names)?;
        let compression = if header_length > 104 { first.get(104).copied().unwrap_or(0) } else { 0 };
        header.compression = match (header.incompatible & COMPRESSION_TYPE != 0, compression) {
            (false, 0) => Compression::Deflate,
            (true, 1) => Compression::Zstd,
            (true, 0) | (false, _) => {
                return Err(corrupt("its compression type contradicts its feature bits"));
            }
            (true, other) => return Err(refused(format_args!("compression type {other} is not supported"))),
        };
        match be32(first, 32) {
            0 => {}
            1 => return Err(refused("it is encrypted (AES), which is not supported; convert it first")),
            2 => return Err(refused("it is encrypted (LUKS), which is not supported; convert it first")),
            other => return Err(corrupt(format_args!("its encryption method is {other}"))),
        }
        header.read_backing(first)?;
        Ok(header)
    }

    /// Walks the extensions; returns the names that the image gives to incompatible features.
    fn read_extensions(&mut self, first: &[u8], start: usize) -> io::Result<Vec<(u8, String)>> {
        let backing_offset = be64(first, 8);
        let end = if backing_offset == 0 { first.len() } else { first.len().min(backing_offset as usize) };
        let mut at = start;
        let mut names = Vec::new();
        while at + 8 <= end {
            let (kind, len) = (be32(first, at), be32(first, at + 4) as usize);
            if kind == 0 {
                break;
            }
            let Some(data) = first[at + 8..end].get(..len) else {
                return Err(corrupt("a header extension is longer than the header's cluster"));
            };
            match kind {
                EXTENSION_BACKING_FORMAT => {
                    self.backing_format = Some(String::from_utf8_lossy(data).into_owned());
                }
                EXTENSION_FEATURE_NAMES => {
                    names.extend(data.chunks_exact(48).filter(|entry| entry[0] == 0).map(|entry| {
                        (entry[1], String::from_utf8_lossy(&entry[2..]).trim_end_matches('\0').to_owned())
                    }))
                }
                EXTENSION_BITMAPS => {
                    let data =
                        data.try_into().map_err(|_| corrupt("its bitmaps extension has a wrong length"))?;
                    self.bitmaps = Some(Bitmaps::parse(data));
                }
                _ => {}
            }
            at += 8 + len.next_multiple_of(8);
        }
        Ok(names)
    }

    fn check_features(&self, names: &[(u8, String)]) -> io::Result<()> {
        if self.incompatible & EXTERNAL_DATA != 0 {
            return Err(refused(
                "its data is in an external data file, which is not supported; convert it first",
            ));
        }
        let known = DIRTY | CORRUPT | COMPRESSION_TYPE | EXTENDED_L2;
        let unknown = self.incompatible & !known;
        if unknown != 0 {
            let bit = unknown.trailing_zeros();
            let name = names.iter().find(|(number, _)| u32::from(*number) == bit);
            let name = name.map_or(String::new(), |(_, name)| format!(" ('{}')", name.escape_debug()));
            return Err(refused(format_args!(
                "it needs incompatible feature {bit}{name}, which is not supported"
            )));
        }
        if self.layout.refcount_order > 6 {
            return Err(corrupt(format_args!(
                "its refcount order is {}; at most 6",
                self.layout.refcount_order
            )));
        }
        if self.layout.extended && self.layout.cluster_bits < 14 {
            return Err(corrupt("it has extended L2 entries with clusters below 16 KiB"));
        }
        Ok(())
    }

    fn read_backing(&mut self, first: &[u8]) -> io::Result<()> {
        let (offset, len) = (be64(first, 8), be32(first, 16));
        if offset == 0 {
            return Ok(());
        }
        let name = usize::try_from(offset).ok().filter(|_| len <= MAX_BACKING_NAME && len > 0);
        let name = name.and_then(|start| first.get(start..start.checked_add(len as usize)?));
        let name = name.and_then(|bytes| std::str::from_utf8(bytes).ok()).filter(|name| !name.contains('\0'));
        let Some(name) = name else {
            return Err(corrupt(
                "the name of its backing file is not within the header's cluster, or no text",
            ));
        };
        self.backing_file = Some(name.to_owned());
        Ok(())
    }

    /// The bitmaps, if they describe what the disk holds.
    pub(super) fn consistent_bitmaps(&self) -> Option<Bitmaps> {
        self.bitmaps.filter(|_| self.autoclear & BITMAPS != 0)
    }

    /// First-level entries that the disk's size needs.
    pub(super) fn l1_entries_needed(layout: &Layout, size: u64) -> u64 {
        size.div_ceil(layout.cluster_size()).div_ceil(layout.l2_entries())
    }

    fn check_tables(&self, file_size: u64) -> io::Result<()> {
        let cluster = self.layout.cluster_size();
        let inside = |what: &str, offset: u64, len: u64| match offset.checked_add(len) {
            Some(end) if offset.is_multiple_of(cluster) && offset != 0 && end <= file_size => Ok(()),
            _ => {
                Err(corrupt(format_args!("its {what} ({len} bytes at {offset:#x}) is not within the image")))
            }
        };
        // The tables can address no more; this also keeps every sum of sizes far from overflow.
        if self.size > 1 << 60 {
            return Err(corrupt(format_args!("its disk of {} bytes is larger than possible", self.size)));
        }
        let l1_bytes = u64::from(self.l1_entries) * 8;
        let needed = Self::l1_entries_needed(&self.layout, self.size);
        if l1_bytes > MAX_L1_BYTES || needed > u64::from(self.l1_entries) {
            return Err(corrupt(format_args!(
                "its L1 table has {} entries; the disk needs {needed}, and {} are possible",
                self.l1_entries,
                MAX_L1_BYTES / 8
            )));
        }
        if self.l1_entries != 0 {
            inside("L1 table", self.l1_offset, l1_bytes)?;
        }
        let table_bytes = u64::from(self.refcount_table_clusters) * cluster;
        if self.refcount_table_clusters == 0 || table_bytes > MAX_REFCOUNT_TABLE_BYTES.max(cluster) {
            return Err(corrupt(format_args!("its refcount table has {table_bytes} bytes")));
        }
        inside("refcount table", self.refcount_table_offset, table_bytes)?;
        if self.snapshots > MAX_SNAPSHOTS {
            return Err(corrupt(format_args!("it claims {} snapshots", self.snapshots)));
        }
        if self.snapshots != 0 {
            inside("snapshot table", self.snapshots_offset, u64::from(self.snapshots) * 40)?;
        }
        Ok(())
    }

    /// Writes what may change: place and size of the refcount table, and the feature bits. All of it is within
    /// one sector, so a power cut leaves the old or the new.
    pub(super) fn write_changes(&self, file: &impl ImageFile) -> io::Result<()> {
        let mut sector = [0u8; 512];
        let count = file.read_at(0, &[VolatileSlice::from(&mut sector[..])])?;
        if count < sector.len() {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        sector[24..32].copy_from_slice(&self.size.to_be_bytes());
        sector[36..40].copy_from_slice(&self.l1_entries.to_be_bytes());
        sector[40..48].copy_from_slice(&self.l1_offset.to_be_bytes());
        sector[48..56].copy_from_slice(&self.refcount_table_offset.to_be_bytes());
        sector[56..60].copy_from_slice(&self.refcount_table_clusters.to_be_bytes());
        if self.layout.version >= 3 {
            sector[72..80].copy_from_slice(&self.incompatible.to_be_bytes());
            sector[80..88].copy_from_slice(&self.compatible.to_be_bytes());
            sector[88..96].copy_from_slice(&self.autoclear.to_be_bytes());
        }
        file.write_at(0, &[VolatileSlice::from(&mut sector[..])])
    }
}
