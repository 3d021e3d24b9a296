//! Addresses of exports: `nbd://HOST[:PORT]/EXPORT` and `nbd+unix:///EXPORT?socket=PATH`.
//!
//! Specification: "The NBD Uniform Resource Indicator (URI) format" of the NBD project.

use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

/// The port that an address without one stands for (IANA).
pub const DEFAULT_PORT: u16 = 10809;

/// Longest name of an export in bytes; the protocol's limit for strings.
const MAX_EXPORT_BYTES: usize = 4096;

/// Longest path of a socket in bytes: what an address of the host can hold, with its final zero.
const MAX_SOCKET_BYTES: usize = 107;

/// Where a server listens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum NbdServer {
    /// A host name or address, without brackets, and a port.
    Tcp(String, u16),
    /// The path of a Unix socket.
    Unix(PathBuf),
}

/// A server and one of its exports.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NbdUri {
    /// Where the server listens.
    pub server: NbdServer,
    /// Name of the export; empty for the server's default.
    pub export: String,
}

/// What is wrong with an address; goes on after "disk image '...' ".
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "is no address that can be used: {0}; expected nbd://HOST[:PORT]/EXPORT or nbd+unix:///EXPORT?socket=PATH"
)]
pub struct NbdUriError(String);

/// The text of a path that is an address of an export. A file of such a name is reached as `./nbd:...`.
pub(crate) fn text_of(path: &Path) -> Option<String> {
    let text = path.to_string_lossy();
    let scheme = text.split_once(':')?.0.to_ascii_lowercase();
    matches!(scheme.as_str(), "nbd" | "nbds" | "nbd+unix" | "nbds+unix").then(|| text.into_owned())
}

impl FromStr for NbdUri {
    type Err = NbdUriError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let wrong = |what: &str| NbdUriError(what.to_owned());
        let Some((scheme, rest)) = text.split_once("://") else {
            return Err(wrong("'://' is missing after the scheme"));
        };
        if rest.contains('#') {
            return Err(wrong("it has a fragment ('#'); write %23 for that character"));
        }
        let (rest, query) = rest.split_once('?').map_or((rest, None), |(rest, query)| (rest, Some(query)));
        let (authority, export) = rest.split_once('/').unwrap_or((rest, ""));
        let export = decoded(export)?;
        if export.len() > MAX_EXPORT_BYTES {
            return Err(wrong("the export's name is longer than 4096 bytes"));
        }
        let server = match scheme.to_ascii_lowercase().as_str() {
            "nbd" if query.is_some() => return Err(wrong("an address of a host has no '?'")),
            "nbd" => host_and_port(authority)?,
            "nbd+unix" if !authority.is_empty() => {
                return Err(wrong("a socket has no host; write three slashes"));
            }
            "nbd+unix" => socket(query)?,
            "nbds" | "nbds+unix" => return Err(wrong("TLS is not supported")),
            _ => return Err(wrong("the scheme is none of nbd and nbd+unix")),
        };
        Ok(Self { server, export })
    }
}

fn host_and_port(authority: &str) -> Result<NbdServer, NbdUriError> {
    let wrong = |what: &str| NbdUriError(what.to_owned());
    if authority.contains('@') {
        return Err(wrong("user names are not supported"));
    }
    let (host, port) = if let Some(rest) = authority.strip_prefix('[') {
        let (host, after) = rest.split_once(']').ok_or_else(|| wrong("']' is missing"))?;
        match after {
            "" => (host, None),
            after => (host, Some(after.strip_prefix(':').ok_or_else(|| wrong("':' is missing after ']'"))?)),
        }
    } else {
        authority.split_once(':').map_or((authority, None), |(host, port)| (host, Some(port)))
    };
    let port = match port {
        None => DEFAULT_PORT,
        Some(port) => match port.parse() {
            Ok(port) if port != 0 => port,
            _ => return Err(wrong("the port is no number from 1 to 65535")),
        },
    };
    let host = decoded(host)?;
    let host = if host.is_empty() { "localhost".to_owned() } else { host };
    if host.contains(|c: char| c.is_whitespace() || c.is_control()) {
        return Err(wrong("the host's name has characters that none has"));
    }
    Ok(NbdServer::Tcp(host, port))
}

fn socket(query: Option<&str>) -> Result<NbdServer, NbdUriError> {
    let wrong = |what: &str| NbdUriError(what.to_owned());
    let mut path = None;
    for parameter in query.unwrap_or_default().split('&').filter(|parameter| !parameter.is_empty()) {
        match parameter.split_once('=') {
            Some(("socket", value)) if path.is_none() => path = Some(decoded(value)?),
            _ => return Err(wrong("the only parameter is socket=PATH, once")),
        }
    }
    match path {
        Some(path) if path.len() > MAX_SOCKET_BYTES => {
            Err(wrong("the socket's path is longer than 107 bytes"))
        }
        Some(path) if !path.is_empty() => Ok(NbdServer::Unix(path.into())),
        _ => Err(wrong("socket=PATH is missing")),
    }
}

/// Replaces `%XX`. No zero bytes, and text only.
fn decoded(text: &str) -> Result<String, NbdUriError> {
    let wrong =
        || NbdUriError("a '%' is not followed by two hexadecimal digits that stand for text".to_owned());
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((first, after)) = rest.split_first() {
        rest = after;
        if *first != b'%' {
            bytes.push(*first);
            continue;
        }
        let digits = rest.get(..2).filter(|two| two.iter().all(u8::is_ascii_hexdigit)).ok_or_else(wrong)?;
        let digits = std::str::from_utf8(digits).map_err(|_| wrong())?;
        bytes.push(u8::from_str_radix(digits, 16).map_err(|_| wrong())?);
        rest = &rest[2..];
    }
    if bytes.contains(&0) {
        return Err(wrong());
    }
    String::from_utf8(bytes).map_err(|_| wrong())
}

impl fmt::Display for NbdServer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(host, port) if host.contains(':') => write!(f, "[{}]:{port}", host.escape_debug()),
            Self::Tcp(host, port) => write!(f, "{}:{port}", host.escape_debug()),
            Self::Unix(path) => write!(f, "{}", path.to_string_lossy().escape_debug()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tcp(host: &str, port: u16, export: &str) -> NbdUri {
        NbdUri { server: NbdServer::Tcp(host.to_owned(), port), export: export.to_owned() }
    }

    #[test]
    fn addresses_are_read_as_the_specification_says() {
        for (text, uri) in [
            ("nbd://example.com", tcp("example.com", 10809, "")),
            ("NBD://example.com/", tcp("example.com", 10809, "")),
            ("nbd://localhost:10810/disk", tcp("localhost", 10810, "disk")),
            ("nbd:///disk", tcp("localhost", 10809, "disk")),
            ("nbd://[::1]:7/a/b", tcp("::1", 7, "a/b")),
            ("nbd://[fe80::1]/a", tcp("fe80::1", 10809, "a")),
            ("nbd://h/a%20b%2fc", tcp("h", 10809, "a b/c")),
        ] {
            assert_eq!(text.parse(), Ok(uri), "{text}");
        }
        let unix = NbdUri { server: NbdServer::Unix("/run/a b".into()), export: "x".to_owned() };
        assert_eq!("nbd+unix:///x?socket=/run/a%20b".parse(), Ok(unix));
    }

    #[test]
    fn what_is_no_address_is_refused() {
        for text in [
            "nbd:host",
            "nbd://h:0/x",
            "nbd://h:65536/x",
            "nbd://h:port/x",
            "nbd://[::1/x",
            "nbd://[::1]7/x",
            "nbd://user@h/x",
            "nbd://h/x?socket=/y",
            "nbd://h/x#y",
            "nbd://h/%",
            "nbd://h/%+1",
            "nbd://h/%00",
            "nbd://h/%ff",
            "nbd://a b/x",
            "nbds://h/x",
            "nbd+unix:///x",
            "nbd+unix:///x?socket=",
            "nbd+unix:///x?socket=/a&socket=/b",
            "nbd+unix:///x?path=/a",
            "nbd+unix://h/x?socket=/a",
            "http://h/x",
        ] {
            let result: Result<NbdUri, _> = text.parse();
            assert!(result.is_err(), "{text}: {result:?}");
        }
        assert!(format!("nbd://h/{}", "x".repeat(4097)).parse::<NbdUri>().is_err());
        assert!(format!("nbd+unix:///x?socket=/{}", "x".repeat(107)).parse::<NbdUri>().is_err());
    }

    #[test]
    fn paths_are_told_from_addresses_by_their_scheme() {
        for text in ["nbd://h/x", "nbd:x", "NBD+UNIX:///x?socket=/y", "nbds://h"] {
            assert_eq!(text_of(Path::new(text)).as_deref(), Some(text));
        }
        for text in ["./nbd://h/x", "nbd.img", "/nbd:/x", "snbd://h"] {
            assert_eq!(text_of(Path::new(text)), None);
        }
    }
}
