//! Agreeing with a server on an export, before the first request.
//!
//! ```text
//!   server: magics, its flags ----> client: its flags
//!   STRUCTURED_REPLY  -- acknowledged, or refused: simple replies then
//!   GO export         -- information (size, flags, block sizes), acknowledged: requests may follow
//!                     -- unknown option: EXPORT_NAME export, answered with size and flags or by closing
//!                     -- refused: the reason
//! ```
//!
//! Every length is checked before anything is allocated for it, and the number of replies is limited.
//! Specification: "Handshake phase", "Fixed newstyle negotiation" and "Block size constraints" in the protocol.

use std::io::{self, Read, Write};

use super::socket::explain;
use super::wire::*;

/// Replies that one option may get before its acknowledgement.
const MAX_REPLIES: usize = 32;

/// The most payload of an answer that is looked at: a fixed part and two strings.
const MAX_ANSWER_BYTES: u32 = 2 * MAX_TEXT_BYTES + 64;

/// Limits of what a server may require as its smallest block, in bytes (the protocol's).
const MAX_MINIMUM_BLOCK: u32 = 64 << 10;

/// The most payload of a request where the server states nothing, in bytes (the protocol's).
const DEFAULT_MAX_PAYLOAD: u32 = 32 << 20;

/// What a server says of an export.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Export {
    /// In bytes.
    pub(super) size: u64,
    /// Transmission flags.
    pub(super) flags: u16,
    /// Offsets and lengths are multiples of this many bytes; a power of two up to 64 KiB.
    pub(super) minimum_block: u32,
    /// Requests should be multiples of this many bytes; a power of two.
    pub(super) preferred_block: u32,
    /// The most data of one request, in bytes; a multiple of the minimum, at most 32 MiB.
    pub(super) max_payload: u32,
    /// Replies to reads come in chunks.
    pub(super) structured: bool,
}

impl Export {
    /// Whether it has the capability of a transmission flag.
    pub(super) fn can(&self, flag: u16) -> bool {
        self.flags & HAS_FLAGS != 0 && self.flags & flag != 0
    }
}

/// Why there is no export to use. The text goes on after "disk image '...' ".
#[derive(Debug, thiserror::Error)]
pub(super) enum Setback {
    /// The server cannot be reached or goes away.
    #[error("cannot be reached: {}; start the server or correct the address", explain(.0))]
    Unreachable(io::Error),
    /// It went away in the middle of negotiating.
    #[error("cannot be used: {} while negotiating; see the server's log", explain(.0))]
    Interrupted(io::Error),
    /// It does not keep to the protocol.
    #[error("cannot be used: the server {0}; give the address of an NBD server")]
    Protocol(String),
    /// It keeps to the protocol, and this export cannot be had or used.
    #[error("{0}")]
    Refused(String),
}

impl From<io::Error> for Setback {
    fn from(error: io::Error) -> Self {
        Self::Interrupted(error)
    }
}

fn broken(what: impl Into<String>) -> Setback {
    Setback::Protocol(what.into())
}

/// Agrees on an export.
pub(super) fn negotiate(stream: &mut (impl Read + Write), export: &str) -> Result<Export, Setback> {
    if read_u64(stream)? != MAGIC {
        return Err(broken("does not speak NBD"));
    }
    match read_u64(stream)? {
        OPTION_MAGIC => {}
        OLDSTYLE_MAGIC => return Err(broken("speaks the old style of NBD, which negotiates nothing")),
        _ => return Err(broken("does not speak NBD")),
    }
    let server = read_u16(stream)?;
    if server & FIXED_NEWSTYLE == 0 {
        return Err(broken("does not offer the fixed newstyle negotiation"));
    }
    let flags = FIXED_NEWSTYLE | server & NO_ZEROES;
    stream.write_all(&u32::from(flags).to_be_bytes())?;
    let structured = request_structured_replies(stream)?;
    match go(stream, export)? {
        Some(found) => finish(Export { structured, ..found }),
        None => finish(Export { structured, ..export_name(stream, export, flags & NO_ZEROES != 0)? }),
    }
}

fn finish(export: Export) -> Result<Export, Setback> {
    let Export { minimum_block: minimum, preferred_block: preferred, max_payload, .. } = export;
    let possible = minimum.is_power_of_two()
        && minimum <= MAX_MINIMUM_BLOCK
        && preferred.is_power_of_two()
        && preferred >= minimum
        && max_payload >= minimum
        && max_payload.is_multiple_of(minimum);
    if !possible {
        return Err(broken(format!("states impossible block sizes ({minimum}, {preferred}, {max_payload})")));
    }
    // Offsets up to the end are computed with and must not overflow; no server has more than this.
    if export.size > 1 << 62 {
        return Err(broken(format!("states an impossible size of {} bytes", export.size)));
    }
    let max_payload = max_payload.min(DEFAULT_MAX_PAYLOAD);
    Ok(Export { max_payload: max_payload - max_payload % minimum, ..export })
}

fn send_option(stream: &mut impl Write, option: u32, data: &[u8]) -> io::Result<()> {
    let mut bytes = Vec::with_capacity(16 + data.len());
    bytes.extend_from_slice(&OPTION_MAGIC.to_be_bytes());
    bytes.extend_from_slice(&option.to_be_bytes());
    bytes.extend_from_slice(&(data.len() as u32).to_be_bytes());
    bytes.extend_from_slice(data);
    stream.write_all(&bytes)
}

/// The type and the payload of a reply to an option.
fn read_answer(stream: &mut impl Read, option: u32) -> Result<(u32, Vec<u8>), Setback> {
    if read_u64(stream)? != OPTION_REPLY_MAGIC {
        return Err(broken("sent something else than an answer to an option"));
    }
    if read_u32(stream)? != option {
        return Err(broken("answered an option that was not asked for"));
    }
    let (kind, len) = (read_u32(stream)?, read_u32(stream)?);
    if len > MAX_ANSWER_BYTES {
        return Err(broken(format!("sent an answer of {len} bytes, longer than any is")));
    }
    let mut data = vec![0; len as usize];
    stream.read_exact(&mut data)?;
    Ok((kind, data))
}

fn request_structured_replies(stream: &mut (impl Read + Write)) -> Result<bool, Setback> {
    send_option(stream, OPT_STRUCTURED_REPLY, &[])?;
    match read_answer(stream, OPT_STRUCTURED_REPLY)? {
        (REP_ACK, data) if data.is_empty() => Ok(true),
        (ERR_TLS_REQD, _) => Err(needs_tls()),
        (kind, _) if kind & REP_ERROR != 0 => Ok(false),
        (kind, _) => Err(broken(format!("answered STRUCTURED_REPLY with {kind}"))),
    }
}

fn needs_tls() -> Setback {
    Setback::Refused("needs TLS, which is not supported; use a socket or a tunnel instead".to_owned())
}

/// Asks for an export with all that is to be known about it; `None` if the server does not know the option.
fn go(stream: &mut (impl Read + Write), export: &str) -> Result<Option<Export>, Setback> {
    let mut data = (export.len() as u32).to_be_bytes().to_vec();
    data.extend_from_slice(export.as_bytes());
    data.extend_from_slice(&1u16.to_be_bytes());
    data.extend_from_slice(&INFO_BLOCK_SIZE.to_be_bytes());
    send_option(stream, OPT_GO, &data)?;
    let mut size_and_flags = None;
    let mut blocks = None;
    for _ in 0..MAX_REPLIES {
        let (kind, data) = read_answer(stream, OPT_GO)?;
        let wrong_length = || broken("sent information about the export of a wrong length");
        match kind {
            REP_INFO => {
                match data.split_first_chunk::<2>().map(|(kind, rest)| (u16::from_be_bytes(*kind), rest)) {
                    Some((INFO_EXPORT, rest)) => {
                        let [size @ .., a, b]: [u8; 10] = rest.try_into().map_err(|_| wrong_length())?;
                        size_and_flags = Some((u64::from_be_bytes(size), u16::from_be_bytes([a, b])));
                    }
                    Some((INFO_BLOCK_SIZE, rest)) => {
                        let [a, b, c, d, e, f, g, h, max @ ..]: [u8; 12] =
                            rest.try_into().map_err(|_| wrong_length())?;
                        let (minimum, preferred) = ([a, b, c, d], [e, f, g, h]);
                        blocks = Some([minimum, preferred, max].map(u32::from_be_bytes));
                    }
                    // Whatever else it says need not be known.
                    Some(_) => {}
                    None => return Err(wrong_length()),
                }
            }
            REP_ACK => {
                let Some((size, flags)) = size_and_flags else {
                    return Err(broken("did not say how large the export is"));
                };
                let [minimum_block, preferred_block, max_payload] = blocks.map_or_else(
                    || [1, 4096, DEFAULT_MAX_PAYLOAD],
                    // "No limit" is all ones, which is no multiple of anything.
                    |[minimum, preferred, max]: [u32; 3]| [minimum, preferred, unlimited(max)],
                );
                let structured = false;
                return Ok(Some(Export {
                    size,
                    flags,
                    minimum_block,
                    preferred_block,
                    max_payload,
                    structured,
                }));
            }
            ERR_UNSUP => return Ok(None),
            kind if kind & REP_ERROR != 0 => return Err(refusal(kind, export, &data)),
            kind => return Err(broken(format!("answered GO with {kind}"))),
        }
    }
    Err(broken("answers without end"))
}

fn unlimited(max: u32) -> u32 {
    if max == u32::MAX { DEFAULT_MAX_PAYLOAD } else { max }
}

/// The way of servers that do not know GO: size and flags without asking back, or a closed connection.
fn export_name(stream: &mut (impl Read + Write), export: &str, no_zeroes: bool) -> Result<Export, Setback> {
    send_option(stream, OPT_EXPORT_NAME, export.as_bytes())?;
    let mut bytes = [0; 10];
    stream.read_exact(&mut bytes).map_err(|error| match error.kind() {
        io::ErrorKind::UnexpectedEof => refusal(ERR_UNKNOWN, export, &[]),
        _ => error.into(),
    })?;
    if !no_zeroes {
        stream.read_exact(&mut [0; 124])?;
    }
    let [size @ .., a, b] = bytes;
    Ok(Export {
        size: u64::from_be_bytes(size),
        flags: u16::from_be_bytes([a, b]),
        // A server that cannot state a minimum is to be addressed in sectors.
        minimum_block: 512,
        preferred_block: 4096,
        max_payload: DEFAULT_MAX_PAYLOAD,
        structured: false,
    })
}

fn refusal(kind: u32, export: &str, text: &[u8]) -> Setback {
    let name = export.escape_debug();
    let what = match kind {
        ERR_TLS_REQD => return needs_tls(),
        ERR_UNKNOWN if export.is_empty() => {
            "has no default export; add the name of an export to the address".to_owned()
        }
        ERR_UNKNOWN => format!("is not there: the server has no export '{name}'; correct the name"),
        ERR_POLICY => "is refused by the server's policy; see the server's configuration".to_owned(),
        ERR_SHUTDOWN => "cannot be used: the server is shutting down; try again later".to_owned(),
        other => {
            format!("is refused by the server with error {:#x}; see the server's log", other & !REP_ERROR)
        }
    };
    // The server's own words, kept short and on one line.
    let said: String = String::from_utf8_lossy(text).chars().take(200).collect();
    let said = said.trim();
    if said.is_empty() {
        return Setback::Refused(what);
    }
    Setback::Refused(format!("{what} (it says: '{}')", said.escape_debug()))
}

fn read_u16(stream: &mut impl Read) -> io::Result<u16> {
    let mut bytes = [0; 2];
    stream.read_exact(&mut bytes).map(|()| u16::from_be_bytes(bytes))
}

fn read_u32(stream: &mut impl Read) -> io::Result<u32> {
    let mut bytes = [0; 4];
    stream.read_exact(&mut bytes).map(|()| u32::from_be_bytes(bytes))
}

fn read_u64(stream: &mut impl Read) -> io::Result<u64> {
    let mut bytes = [0; 8];
    stream.read_exact(&mut bytes).map(|()| u64::from_be_bytes(bytes))
}
