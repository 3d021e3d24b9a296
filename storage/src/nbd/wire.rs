//! Numbers of the protocol and the fixed parts of its messages. All numbers are big-endian.
//!
//! Specification: "The NBD protocol" of the NBD project, "Transmission phase" and "Values".

/// "NBDMAGIC", the first word of a server.
pub(super) const MAGIC: u64 = 0x4e42_444d_4147_4943;
/// "IHAVEOPT", before each option.
pub(super) const OPTION_MAGIC: u64 = 0x4948_4156_454f_5054;
/// The second word of a server that negotiates nothing.
pub(super) const OLDSTYLE_MAGIC: u64 = 0x0000_4202_8186_1253;
pub(super) const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
pub(super) const REQUEST_MAGIC: u32 = 0x2560_9513;
pub(super) const SIMPLE_REPLY_MAGIC: u32 = 0x6744_6698;
pub(super) const CHUNK_MAGIC: u32 = 0x668e_33ef;

/// Handshake flags, the same bits in both directions.
pub(super) const FIXED_NEWSTYLE: u16 = 1 << 0;
pub(super) const NO_ZEROES: u16 = 1 << 1;

pub(super) const OPT_EXPORT_NAME: u32 = 1;
pub(super) const OPT_GO: u32 = 7;
pub(super) const OPT_STRUCTURED_REPLY: u32 = 8;

pub(super) const REP_ACK: u32 = 1;
pub(super) const REP_INFO: u32 = 3;
pub(super) const REP_ERROR: u32 = 1 << 31;
pub(super) const ERR_UNSUP: u32 = REP_ERROR + 1;
pub(super) const ERR_POLICY: u32 = REP_ERROR + 2;
pub(super) const ERR_TLS_REQD: u32 = REP_ERROR + 5;
pub(super) const ERR_UNKNOWN: u32 = REP_ERROR + 6;
pub(super) const ERR_SHUTDOWN: u32 = REP_ERROR + 7;

pub(super) const INFO_EXPORT: u16 = 0;
pub(super) const INFO_BLOCK_SIZE: u16 = 3;

/// Transmission flags: what an export can do.
pub(super) const HAS_FLAGS: u16 = 1 << 0;
pub(super) const READ_ONLY: u16 = 1 << 1;
pub(super) const SEND_FLUSH: u16 = 1 << 2;
pub(super) const SEND_FUA: u16 = 1 << 3;
pub(super) const SEND_TRIM: u16 = 1 << 5;
pub(super) const SEND_WRITE_ZEROES: u16 = 1 << 6;

/// Command flags.
pub(super) const FLAG_FUA: u16 = 1 << 0;
pub(super) const FLAG_NO_HOLE: u16 = 1 << 1;

/// Types of chunks; errors have bit 15.
pub(super) const CHUNK_DONE: u16 = 1 << 0;
pub(super) const CHUNK_NONE: u16 = 0;
pub(super) const CHUNK_DATA: u16 = 1;
pub(super) const CHUNK_HOLE: u16 = 2;
pub(super) const CHUNK_ERROR: u16 = 1 << 15;

/// Longest text that a server may send (its strings are limited to this), in bytes.
pub(super) const MAX_TEXT_BYTES: u32 = 4096;

/// What a request asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u16)]
pub(super) enum Command {
    Read = 0,
    Write = 1,
    Disconnect = 2,
    Flush = 3,
    Trim = 4,
    WriteZeroes = 6,
}

/// One request without its payload.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Request {
    pub(super) command: Command,
    pub(super) flags: u16,
    /// In bytes; zero for a flush.
    pub(super) offset: u64,
    /// In bytes; zero for a flush.
    pub(super) len: u32,
}

/// Bytes of a request's header.
pub(super) const REQUEST_BYTES: usize = 28;

impl Request {
    /// The header as it is sent.
    pub(super) fn header(&self, cookie: u64) -> [u8; REQUEST_BYTES] {
        let mut bytes = [0; REQUEST_BYTES];
        bytes[0..4].copy_from_slice(&REQUEST_MAGIC.to_be_bytes());
        bytes[4..6].copy_from_slice(&self.flags.to_be_bytes());
        bytes[6..8].copy_from_slice(&(self.command as u16).to_be_bytes());
        bytes[8..16].copy_from_slice(&cookie.to_be_bytes());
        bytes[16..24].copy_from_slice(&self.offset.to_be_bytes());
        bytes[24..28].copy_from_slice(&self.len.to_be_bytes());
        bytes
    }
}

/// The header of a reply.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Reply {
    /// The whole reply; data follows a successful read.
    Simple {
        /// 0 for success.
        error: u32,
    },
    /// A part of a reply, with `len` bytes behind it.
    Chunk { flags: u16, kind: u16, len: u32 },
}

/// Bytes of a simple reply's header, and of the beginning of a chunk's that has its cookie.
pub(super) const REPLY_BYTES: usize = 16;

/// Takes the first bytes of a reply apart; a chunk's length is in the four bytes that follow. `None`: it is no
/// reply.
pub(super) fn reply(bytes: &[u8; REPLY_BYTES]) -> Option<(u64, Reply)> {
    let [m0, m1, m2, m3, a, b, c, d, cookie @ ..] = *bytes;
    let cookie = u64::from_be_bytes(cookie);
    match u32::from_be_bytes([m0, m1, m2, m3]) {
        SIMPLE_REPLY_MAGIC => Some((cookie, Reply::Simple { error: u32::from_be_bytes([a, b, c, d]) })),
        CHUNK_MAGIC => {
            let (flags, kind) = (u16::from_be_bytes([a, b]), u16::from_be_bytes([c, d]));
            Some((cookie, Reply::Chunk { flags, kind, len: 0 }))
        }
        _ => None,
    }
}
