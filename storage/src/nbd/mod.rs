//! A client of network block devices: a disk that another process or host serves.
//!
//! ```text
//!   mod          NbdDisk: the trait, limits of the server, whole blocks
//!   link         connecting again; what is known to be durable
//!   connection   requests and replies in flight           negotiate   agreeing on an export
//!   wire         numbers and fixed parts of messages      socket      TCP and Unix, limits on waiting
//!   uri          addresses
//! ```
//!
//! Spoken is the fixed newstyle, without TLS: use a Unix socket or a tunnel where the network is not trusted.
//! Nothing a server says is believed before it was checked, and nothing it says sizes an allocation beyond a
//! fixed limit; what it can do is give wrong data, as every disk can.
//!
//! Durability: a flush is the protocol's. A server that cannot flush gets every change with "forced unit
//! access"; one that has neither is refused for writing, because nothing written to it would ever be known to be
//! durable. About lost connections see `link`.
//!
//! There is no lock on an export: that nobody else writes it is up to its server and its users.
//!
//! Locks: `blocks` outermost (shared by transfers of whole blocks, exclusive while a part of a block is
//! replaced), then the link's and the connection's. Specification: "The NBD protocol" of the NBD project.

mod connection;
mod link;
mod negotiate;
mod socket;
mod uri;
mod wire;

use std::io;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::{PoisonError, RwLock};

use vm_memory::VolatileSlice;

use crate::buffers::{copy_in, copy_out, part_of};
use crate::disk::{
    Capabilities, DiscardLimits, Disk, SECTOR_SIZE, WriteZeroesLimits, check_range, total_len,
};
use crate::error::{DiskError, DiskErrorKind, OpenError, Operation};
use crate::format::DiskFormat;
use crate::metrics::DiskMetrics;
use crate::raw::OpenOptions;

use link::{Lease, Link};
use negotiate::{Export, Setback};
use socket::Socket;
pub(crate) use uri::text_of;
pub use uri::{DEFAULT_PORT, NbdServer, NbdUri, NbdUriError};
use wire::{
    Command, FLAG_FUA, FLAG_NO_HOLE, READ_ONLY, Request, SEND_FLUSH, SEND_FUA, SEND_TRIM, SEND_WRITE_ZEROES,
};

/// The most one discard covers, in bytes.
const MAX_DISCARD_BYTES: u64 = 1 << 30;

/// The most one zeroing covers, in bytes: the server may have to write it.
const MAX_ZEROES_BYTES: u64 = 32 << 20;

/// The most data of one request, in bytes: others on the connection wait for it.
const MAX_TRANSFER_BYTES: u64 = 4 << 20;

/// The most that a transfer of parts of blocks moves at once, in bytes.
const MAX_BOUNCE_BYTES: u64 = 256 << 10;

/// An export of an NBD server.
pub struct NbdDisk {
    link: Link,
    export: Export,
    /// Unit of requests in bytes.
    block: u64,
    read_only: bool,
    /// Every change is durable when it is acknowledged.
    forced: bool,
    blocks: RwLock<()>,
    metrics: DiskMetrics,
}

impl NbdDisk {
    /// Connects to the export that an address names.
    pub fn open(address: &str, options: OpenOptions) -> Result<Self, OpenError> {
        let refused = |reason: String| OpenError::Refused { path: address.into(), reason };
        let uri: NbdUri = address.parse().map_err(|error: NbdUriError| refused(error.to_string()))?;
        let (socket, export) = link::connect(&uri).map_err(|setback| refused(setback.to_string()))?;
        Self::over(Some(uri), socket, export, options).map_err(|setback| refused(setback.to_string()))
    }

    /// Agrees on an export with the server at the other end of a socket. A connection that is lost stays so.
    pub fn over_stream(stream: UnixStream, export: &str, options: OpenOptions) -> Result<Self, OpenError> {
        let socket = Socket::Unix(stream);
        let disk = link::agree(&socket, export).and_then(|found| Self::over(None, socket, found, options));
        disk.map_err(|setback| OpenError::Refused { path: export.into(), reason: setback.to_string() })
    }

    fn over(
        uri: Option<NbdUri>,
        socket: Socket,
        export: Export,
        options: OpenOptions,
    ) -> Result<Self, Setback> {
        let refused = |text: String| Err(Setback::Refused(text));
        let unit = u64::from(export.minimum_block).max(SECTOR_SIZE);
        if export.size == 0 || !export.size.is_multiple_of(unit) {
            return refused(format!(
                "has {} bytes; a disk has a multiple of {unit} bytes, at least one",
                export.size
            ));
        }
        if !options.read_only {
            if export.can(READ_ONLY) {
                return refused("is read-only at its server; open it read-only".to_owned());
            }
            if !export.can(SEND_FLUSH) && !export.can(SEND_FUA) {
                return refused(
                    "cannot make writes durable (its server offers neither flush nor FUA); open it read-only"
                        .to_owned(),
                );
            }
        }
        Ok(Self {
            link: Link::new(uri, socket, export)?,
            export,
            block: u64::from(export.minimum_block),
            read_only: options.read_only,
            forced: !export.can(SEND_FLUSH),
            blocks: RwLock::default(),
            metrics: DiskMetrics::default(),
        })
    }

    /// One request on a connection of now.
    fn execute(&self, request: &Request, buffers: &[VolatileSlice<'_>]) -> io::Result<Lease> {
        let lease = self.link.lease()?;
        lease.connection.execute(request, buffers)?;
        Ok(lease)
    }

    /// A request that changes something.
    fn change(
        &self,
        command: Command,
        flags: u16,
        range: (u64, u64),
        data: &[VolatileSlice<'_>],
    ) -> io::Result<()> {
        let flags = flags | if self.forced { FLAG_FUA } else { 0 };
        let lease = self.execute(&request(command, flags, range)?, data)?;
        if !self.forced {
            self.link.acknowledged(&lease);
        }
        Ok(())
    }

    /// Bytes that one request may transfer; whole blocks.
    fn largest(&self) -> u64 {
        u64::from(self.export.max_payload).min(MAX_TRANSFER_BYTES)
    }

    fn is_aligned(&self, offset: u64, len: u64) -> bool {
        (offset | len) & (self.block - 1) == 0
    }

    /// The pieces of a range of whole blocks: `limit` at most, from the beginning.
    fn pieces(offset: u64, len: u64, limit: u64) -> impl Iterator<Item = (u64, u64)> {
        let count = len.div_ceil(limit);
        (0..count).map(move |number| (offset + number * limit, limit.min(len - number * limit)))
    }

    /// Windows of whole blocks over any range, each with the part of the range in it.
    fn windows(&self, offset: u64, len: u64) -> impl Iterator<Item = Window> + use<> {
        let mask = self.block - 1;
        let (start, end) = (offset & !mask, (offset + len + mask) & !mask);
        let limit = self.largest().min(MAX_BOUNCE_BYTES.max(self.block));
        Self::pieces(start, end - start, limit).map(move |(at, size)| Window {
            at,
            size,
            from: offset.max(at),
            to: (offset + len).min(at + size),
        })
    }

    fn read(&self, offset: u64, len: u64, buffers: &[VolatileSlice<'_>]) -> io::Result<()> {
        if self.is_aligned(offset, len) {
            for (at, size) in Self::pieces(offset, len, self.largest()) {
                let request = request(Command::Read, 0, (at, size))?;
                self.execute(&request, &part_of(buffers, at - offset, size)?)?;
            }
            return Ok(());
        }
        for window in self.windows(offset, len) {
            let bytes = self.read_window(&window)?;
            let inside = &bytes[(window.from - window.at) as usize..(window.to - window.at) as usize];
            copy_out(inside, &part_of(buffers, window.from - offset, window.to - window.from)?);
        }
        Ok(())
    }

    fn read_window(&self, window: &Window) -> io::Result<Vec<u8>> {
        let mut bytes = vec![0; window.size as usize];
        let request = request(Command::Read, 0, (window.at, window.size))?;
        self.execute(&request, &[VolatileSlice::from(&mut bytes[..])])?;
        Ok(bytes)
    }

    fn write(&self, offset: u64, len: u64, buffers: &[VolatileSlice<'_>]) -> io::Result<()> {
        if self.is_aligned(offset, len) {
            let _shared = self.blocks.read().unwrap_or_else(PoisonError::into_inner);
            for (at, size) in Self::pieces(offset, len, self.largest()) {
                self.change(Command::Write, 0, (at, size), &part_of(buffers, at - offset, size)?)?;
            }
            return Ok(());
        }
        let _exclusive = self.blocks.write().unwrap_or_else(PoisonError::into_inner);
        for window in self.windows(offset, len) {
            let mut bytes = self.read_window(&window)?;
            let inside = &mut bytes[(window.from - window.at) as usize..(window.to - window.at) as usize];
            copy_in(&part_of(buffers, window.from - offset, window.to - window.from)?, inside);
            self.change(Command::Write, 0, (window.at, window.size), &[VolatileSlice::from(&mut bytes[..])])?;
        }
        Ok(())
    }

    /// The whole blocks in a range; empty if there are none.
    fn whole_blocks(&self, offset: u64, len: u64) -> (u64, u64) {
        let mask = self.block - 1;
        let (start, end) = ((offset + mask) & !mask, (offset + len) & !mask);
        (start, end.saturating_sub(start))
    }

    fn release(&self, offset: u64, len: u64) -> io::Result<()> {
        let (start, len) = self.whole_blocks(offset, len);
        let _shared = self.blocks.read().unwrap_or_else(PoisonError::into_inner);
        for range in Self::pieces(start, len, MAX_DISCARD_BYTES) {
            self.change(Command::Trim, 0, range, &[])?;
        }
        Ok(())
    }

    fn zero(&self, offset: u64, len: u64, unmap: bool) -> io::Result<()> {
        let (start, whole) = self.whole_blocks(offset, len);
        if whole == 0 {
            return self.write_zeros(offset, len);
        }
        self.write_zeros(offset, start - offset)?;
        self.write_zeros(start + whole, offset + len - start - whole)?;
        let _shared = self.blocks.read().unwrap_or_else(PoisonError::into_inner);
        let flags = if unmap { 0 } else { FLAG_NO_HOLE };
        for range in Self::pieces(start, whole, self.largest_zeroing()) {
            self.change(Command::WriteZeroes, flags, range, &[])?;
        }
        Ok(())
    }

    /// Less than two blocks.
    fn write_zeros(&self, offset: u64, len: u64) -> io::Result<()> {
        let mut zeros = vec![0; len as usize];
        if len == 0 { Ok(()) } else { self.write(offset, len, &[VolatileSlice::from(&mut zeros[..])]) }
    }

    /// Some servers hold zeroing to the limit of data.
    fn largest_zeroing(&self) -> u64 {
        u64::from(self.export.max_payload).min(MAX_ZEROES_BYTES)
    }

    /// An operation that changes something, checked, counted, and with its error described.
    fn changing(
        &self,
        operation: Operation,
        (offset, len): (u64, u64),
        possible: bool,
        action: impl FnOnce() -> io::Result<()>,
    ) -> Result<(), DiskError> {
        let result = if self.read_only {
            Err(DiskError::new(DiskErrorKind::ReadOnly, operation, offset, len))
        } else if !possible {
            Err(DiskError::new(DiskErrorKind::Unsupported, operation, offset, len))
        } else {
            check_range(self.export.size, operation, offset, len)
                .and_then(|()| action().map_err(|error| DiskError::host(error, operation, offset, len)))
        };
        self.metrics.count(operation, len, result)
    }

    fn flush_server(&self) -> io::Result<()> {
        if self.read_only || self.forced {
            return Ok(());
        }
        let flush = Request { command: Command::Flush, flags: 0, offset: 0, len: 0 };
        self.link.flush(|connection| connection.execute(&flush, &[]))
    }
}

/// Blocks that are moved as a whole for a part of them.
struct Window {
    at: u64,
    size: u64,
    /// The part, as offsets on the disk.
    from: u64,
    to: u64,
}

fn request(command: Command, flags: u16, (offset, len): (u64, u64)) -> io::Result<Request> {
    let len = u32::try_from(len).map_err(|_| io::ErrorKind::InvalidInput)?;
    Ok(Request { command, flags, offset, len })
}

impl Disk for NbdDisk {
    fn capacity_bytes(&self) -> u64 {
        self.export.size
    }

    fn logical_block_size(&self) -> u32 {
        self.export.minimum_block.max(SECTOR_SIZE as u32)
    }

    fn capabilities(&self) -> Capabilities {
        let can = |flag| !self.read_only && self.export.can(flag);
        let discard = DiscardLimits {
            granularity: self.export.preferred_block.max(self.logical_block_size()),
            max_bytes: MAX_DISCARD_BYTES,
        };
        let write_zeroes = WriteZeroesLimits { max_bytes: MAX_ZEROES_BYTES, unmap: true };
        Capabilities {
            read_only: self.read_only,
            discard: can(SEND_TRIM).then_some(discard),
            write_zeroes: can(SEND_WRITE_ZEROES).then_some(write_zeroes),
            ..Capabilities::default()
        }
    }

    fn read_at(&self, offset: u64, buffers: &[VolatileSlice<'_>]) -> Result<(), DiskError> {
        let len = total_len(buffers);
        let result = check_range(self.export.size, Operation::Read, offset, len).and_then(|()| {
            self.read(offset, len, buffers)
                .map_err(|error| DiskError::host(error, Operation::Read, offset, len))
        });
        self.metrics.count(Operation::Read, len, result)
    }

    fn write_at(&self, offset: u64, buffers: &[VolatileSlice<'_>]) -> Result<(), DiskError> {
        let len = total_len(buffers);
        self.changing(Operation::Write, (offset, len), true, || self.write(offset, len, buffers))
    }

    fn flush(&self) -> Result<(), DiskError> {
        let result = self.flush_server().map_err(|error| DiskError::host(error, Operation::Flush, 0, 0));
        self.metrics.count(Operation::Flush, 0, result)
    }

    fn discard(&self, offset: u64, len: u64) -> Result<(), DiskError> {
        let possible = self.export.can(SEND_TRIM);
        self.changing(Operation::Discard, (offset, len), possible, || self.release(offset, len))
    }

    fn write_zeroes(&self, offset: u64, len: u64, unmap: bool) -> Result<(), DiskError> {
        let possible = self.export.can(SEND_WRITE_ZEROES);
        self.changing(Operation::WriteZeroes, (offset, len), possible, || self.zero(offset, len, unmap))
    }

    fn metrics(&self) -> &DiskMetrics {
        &self.metrics
    }
}

impl Drop for NbdDisk {
    fn drop(&mut self) {
        self.link.close();
    }
}

/// Opens an address in the format that the user states. The bytes of an export are the disk, whatever they are.
pub(crate) fn open_export(
    address: &str,
    options: OpenOptions,
    format: Option<DiskFormat>,
) -> Result<NbdDisk, OpenError> {
    if format == Some(DiskFormat::Qcow2) {
        return Err(OpenError::Refused {
            path: Path::new(address).to_owned(),
            reason: "cannot be qcow2: an export is a raw disk; have its server open the qcow2 image"
                .to_owned(),
        });
    }
    NbdDisk::open(address, options)
}

#[cfg(test)]
mod tests;
