//! Making an empty image.

use std::fs::File;
use std::io;
use std::path::Path;

use super::commit::write_bytes;
use super::header::{
    COMPRESSION_TYPE, Compression, EXTENDED_L2, EXTENSION_BACKING_FORMAT, Header, LAZY_REFCOUNTS, MAGIC,
    MAX_L1_BYTES,
};
use super::layout::{Layout, refused, set_count_at};
use crate::file::{HostFile, ImageFile};
use crate::format::DiskFormat;

/// What an image is made like. [`Default`] is what QEMU makes by default, of 1 GiB.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CreateOptions {
    /// Size of the disk in bytes; a multiple of 512.
    pub size: u64,
    /// 2 or 3.
    pub version: u32,
    /// Logarithm of the cluster size: 9 to 21.
    pub cluster_bits: u32,
    /// Bits of a reference count: 1, 2, 4, ... 64. Version 2 has 16.
    pub refcount_bits: u32,
    /// Subclusters; needs version 3 and clusters of at least 16 KiB.
    pub extended_l2: bool,
    /// Sets the feature bit that lets others postpone reference counts. Version 3.
    pub lazy_refcounts: bool,
    /// For compressed clusters that others write. Version 3 has a choice.
    pub compression: Compression,
    /// Name of a backing image as it is to be stored, and its format.
    pub backing: Option<(String, DiskFormat)>,
}

impl Default for CreateOptions {
    fn default() -> Self {
        Self {
            size: 1 << 30,
            version: 3,
            cluster_bits: 16,
            refcount_bits: 16,
            extended_l2: false,
            lazy_refcounts: false,
            compression: Compression::Deflate,
            backing: None,
        }
    }
}

impl CreateOptions {
    fn layout(&self) -> io::Result<Layout> {
        let new = self.extended_l2 || self.lazy_refcounts || self.refcount_bits != 16;
        let new = new || self.compression != Compression::Deflate;
        let wrong = match () {
            () if !matches!(self.version, 2 | 3) => "the version must be 2 or 3",
            () if self.version == 2 && new => "version 2 has none of the options asked for; use version 3",
            () if !(9..=21).contains(&self.cluster_bits) => "clusters must have 512 bytes to 2 MiB",
            () if self.extended_l2 && self.cluster_bits < 14 => {
                "subclusters need clusters of at least 16 KiB"
            }
            () if !self.refcount_bits.is_power_of_two() || self.refcount_bits > 64 => {
                "reference counts must have 1, 2, 4, 8, 16, 32 or 64 bits"
            }
            () if self.size == 0 || !self.size.is_multiple_of(512) || self.size > 1 << 60 => {
                "the size must be a multiple of 512 bytes, at least one and at most 1 EiB"
            }
            () => {
                return Ok(Layout {
                    version: self.version,
                    cluster_bits: self.cluster_bits,
                    extended: self.extended_l2,
                    refcount_order: self.refcount_bits.trailing_zeros(),
                });
            }
        };
        Err(refused(wrong))
    }

    fn header(&self, l1: (u64, u64), table: (u64, u64)) -> Vec<u8> {
        let mut bytes = Vec::new();
        let extension = self.backing.as_ref().map_or("", |(_, format)| format.name());
        let length: u32 = if self.version == 2 { 72 } else { 112 };
        let extension_bytes =
            if extension.is_empty() { 0 } else { 8 + (extension.len() as u32).next_multiple_of(8) };
        let name = self.backing.as_ref().map_or("", |(name, _)| name);
        let name_offset = if name.is_empty() { 0 } else { u64::from(length + extension_bytes + 8) };
        bytes.extend_from_slice(&MAGIC);
        bytes.extend_from_slice(&self.version.to_be_bytes());
        bytes.extend_from_slice(&name_offset.to_be_bytes());
        bytes.extend_from_slice(&(name.len() as u32).to_be_bytes());
        bytes.extend_from_slice(&self.cluster_bits.to_be_bytes());
        bytes.extend_from_slice(&self.size.to_be_bytes());
        bytes.extend_from_slice(&[0; 4]);
        bytes.extend_from_slice(&(l1.1 as u32).to_be_bytes());
        bytes.extend_from_slice(&l1.0.to_be_bytes());
        bytes.extend_from_slice(&table.0.to_be_bytes());
        bytes.extend_from_slice(&(table.1 as u32).to_be_bytes());
        bytes.extend_from_slice(&[0; 12]);
        if self.version >= 3 {
            let zstd = self.compression == Compression::Zstd;
            let incompatible =
                if zstd { COMPRESSION_TYPE } else { 0 } | if self.extended_l2 { EXTENDED_L2 } else { 0 };
            bytes.extend_from_slice(&incompatible.to_be_bytes());
            bytes.extend_from_slice(&if self.lazy_refcounts { LAZY_REFCOUNTS } else { 0 }.to_be_bytes());
            bytes.extend_from_slice(&[0; 8]);
            bytes.extend_from_slice(&self.refcount_bits.trailing_zeros().to_be_bytes());
            bytes.extend_from_slice(&length.to_be_bytes());
            bytes.extend_from_slice(&[u8::from(zstd), 0, 0, 0, 0, 0, 0, 0]);
        }
        if !extension.is_empty() {
            bytes.extend_from_slice(&EXTENSION_BACKING_FORMAT.to_be_bytes());
            bytes.extend_from_slice(&(extension.len() as u32).to_be_bytes());
            bytes.extend_from_slice(extension.as_bytes());
            bytes.resize(bytes.len().next_multiple_of(8), 0);
        }
        bytes.extend_from_slice(&[0; 8]);
        bytes.extend_from_slice(name.as_bytes());
        bytes
    }
}

/// Writes an empty image into an empty file; returns its size in bytes. Durable when it returns.
pub fn format_image(file: &impl ImageFile, options: &CreateOptions) -> io::Result<u64> {
    let layout = options.layout()?;
    let cluster = layout.cluster_size();
    let l1_entries = Header::l1_entries_needed(&layout, options.size);
    if l1_entries * 8 > MAX_L1_BYTES {
        return Err(refused("a disk of this size needs larger clusters"));
    }
    let l1_clusters = (l1_entries * 8).div_ceil(cluster);
    // Header, refcount table, refcount blocks, L1 table.
    let (mut tables, mut blocks) = (1, 1);
    let total = loop {
        let total = 1 + tables + blocks + l1_clusters;
        let next = total.div_ceil(layout.counts_per_block());
        let next_tables = (next * 8).div_ceil(cluster);
        if (next, next_tables) == (blocks, tables) {
            break total;
        }
        (blocks, tables) = (next, next_tables);
    };
    let l1_offset = (1 + tables + blocks) * cluster;
    let header = options.header((l1_offset, l1_entries), (cluster, tables));
    if header.len() as u64 > cluster || options.backing.as_ref().is_some_and(|(name, _)| name.len() > 1023) {
        return Err(refused("the backing image's name is too long"));
    }
    let mut table = vec![0u8; (tables * cluster) as usize];
    for index in 0..blocks {
        super::layout::set_word(&mut table, index, (1 + tables + index) * cluster);
        let mut bytes = vec![0u8; cluster as usize];
        let first = index * layout.counts_per_block();
        for slot in 0..layout.counts_per_block().min(total - first) {
            set_count_at(&mut bytes, layout.refcount_order, slot, 1);
        }
        write_bytes(file, (1 + tables + index) * cluster, &bytes)?;
    }
    write_bytes(file, cluster, &table)?;
    // At most 32 MiB and a cluster.
    write_bytes(file, l1_offset, &vec![0u8; (l1_clusters * cluster) as usize])?;
    let mut first = header;
    first.resize(cluster as usize, 0);
    write_bytes(file, 0, &first)?;
    file.sync_data()?;
    Ok(total * cluster)
}

/// Makes an empty image in a new file of the host. An existing file is left as it is.
pub fn create(path: &Path, options: &CreateOptions) -> io::Result<()> {
    options.layout()?;
    let file = HostFile::new(File::options().read(true).write(true).create_new(true).open(path)?);
    format_image(&file, options).map(drop)
}
