//! A port of the host that leads into a guest.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr};
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// A transport protocol.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Protocol {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
}

/// `tcp:2222:22`, or with addresses `tcp:0.0.0.0:2222:10.0.2.15:22`; IPv6 addresses in brackets.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub struct PortForward {
    /// What is forwarded.
    pub protocol: Protocol,
    /// The host's address that is listened on; loopback when absent.
    pub host: Option<IpAddr>,
    /// The host's port.
    pub host_port: u16,
    /// The guest's address; the one that it was given when absent.
    pub guest: Option<IpAddr>,
    /// The guest's port.
    pub guest_port: u16,
}

/// Text that is no forward.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ParseForwardError {
    /// Not of the form.
    #[error(
        "forward={}: expected PROTOCOL:HOST:GUEST such as tcp:2222:22, with addresses tcp:0.0.0.0:2222:10.0.2.15:22; \
         IPv6 addresses stand in brackets", .0.escape_debug()
    )]
    Malformed(String),
    /// Not a port.
    #[error("forward={}: '{}' is not a port; expected 1 to 65535", .0.escape_debug(), .1.escape_debug())]
    Port(String, String),
}

impl PortForward {
    /// The host's address that is listened on.
    pub fn listen_address(&self) -> IpAddr {
        self.host.unwrap_or(IpAddr::V4(Ipv4Addr::LOCALHOST))
    }

    /// Whether both take the same port of the host.
    pub fn collides_with(&self, other: &Self) -> bool {
        let (a, b) = (self.listen_address(), other.listen_address());
        let same_address =
            a == b || (a.is_ipv4() == b.is_ipv4() && (a.is_unspecified() || b.is_unspecified()));
        self.protocol == other.protocol && self.host_port == other.host_port && same_address
    }
}

impl FromStr for PortForward {
    type Err = ParseForwardError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let malformed = || ParseForwardError::Malformed(text.to_owned());
        let (protocol, mut rest) = text.split_once(':').ok_or_else(malformed)?;
        let protocol = match protocol {
            "tcp" => Protocol::Tcp,
            "udp" => Protocol::Udp,
            _ => return Err(malformed()),
        };
        let (host, host_port) = end(text, &mut rest)?;
        let (guest, guest_port) = end(text, &mut rest)?;
        if !rest.is_empty() || text.ends_with(':') {
            return Err(malformed());
        }
        Ok(Self { protocol, host, host_port, guest, guest_port })
    }
}

/// Takes `[ADDRESS:]PORT` off the beginning of `rest`, and the colon after it.
fn end(text: &str, rest: &mut &str) -> Result<(Option<IpAddr>, u16), ParseForwardError> {
    let malformed = || ParseForwardError::Malformed(text.to_owned());
    let address = if let Some(bracketed) = rest.strip_prefix('[') {
        let (address, after) = bracketed.split_once("]:").ok_or_else(malformed)?;
        *rest = after;
        Some(IpAddr::V6(address.parse().map_err(|_| malformed())?))
    } else {
        let (first, after) = rest.split_once(':').unwrap_or((rest, ""));
        if first.contains('.') {
            *rest = after;
            Some(IpAddr::V4(first.parse().map_err(|_| malformed())?))
        } else {
            None
        }
    };
    let (port, after) = rest.split_once(':').unwrap_or((rest, ""));
    *rest = after;
    if port.is_empty() {
        return Err(malformed());
    }
    match port.parse() {
        Ok(number) if number != 0 && !port.starts_with('+') => Ok((address, number)),
        _ => Err(ParseForwardError::Port(text.to_owned(), port.to_owned())),
    }
}

impl fmt::Display for PortForward {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self.protocol {
            Protocol::Tcp => "tcp",
            Protocol::Udp => "udp",
        })?;
        for (address, port) in [(self.host, self.host_port), (self.guest, self.guest_port)] {
            match address {
                Some(IpAddr::V4(address)) => write!(f, ":{address}")?,
                Some(IpAddr::V6(address)) => write!(f, ":[{address}]")?,
                None => {}
            }
            write!(f, ":{port}")?;
        }
        Ok(())
    }
}

impl From<PortForward> for String {
    fn from(forward: PortForward) -> Self {
        forward.to_string()
    }
}

impl TryFrom<String> for PortForward {
    type Error = ParseForwardError;
    fn try_from(text: String) -> Result<Self, Self::Error> {
        text.parse()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn parse(text: &str) -> Result<PortForward, ParseForwardError> {
        text.parse()
    }

    #[test]
    fn ports_alone_listen_on_loopback() {
        let forward = parse("tcp:2222:22").unwrap();
        assert_eq!((forward.host_port, forward.guest_port, forward.guest), (2222, 22, None));
        assert_eq!(forward.listen_address(), IpAddr::V4(Ipv4Addr::LOCALHOST));
    }

    #[test]
    fn addresses_of_both_families_may_be_given() {
        let forward = parse("udp:[::]:53:10.0.2.15:5353").unwrap();
        assert_eq!(forward.protocol, Protocol::Udp);
        assert!(forward.listen_address().is_ipv6() && forward.guest == Some("10.0.2.15".parse().unwrap()));
        assert!(parse("tcp:8080:[fd00::5]:80").unwrap().guest.is_some());
    }

    #[test]
    fn what_is_no_forward_is_refused() {
        for text in
            ["", "tcp", "tcp:1", "tcp:1:", "sctp:1:1", "tcp:1:2:3", "tcp::1:1", "tcp:[::1:1:1", "tcp:1.2:1:1"]
        {
            assert!(matches!(parse(text), Err(ParseForwardError::Malformed(_))), "{text}: {:?}", parse(text));
        }
        for text in ["tcp:0:22", "tcp:65536:22", "tcp:ssh:22", "tcp:1:+2", "tcp:1:-2"] {
            assert!(matches!(parse(text), Err(ParseForwardError::Port(..))), "{text}: {:?}", parse(text));
        }
    }

    #[test]
    fn the_same_port_of_the_host_collides() {
        let collide = |a: &str, b: &str| parse(a).unwrap().collides_with(&parse(b).unwrap());
        assert!(collide("tcp:80:1", "tcp:127.0.0.1:80:2") && collide("tcp:0.0.0.0:80:1", "tcp:80:2"));
        assert!(!collide("tcp:80:1", "udp:80:1") && !collide("tcp:80:1", "tcp:[::1]:80:1"));
        assert!(!collide("tcp:127.0.0.2:80:1", "tcp:80:1"));
    }

    proptest! {
        #[test]
        fn printed_forwards_read_back(
            tcp: bool, host: Option<std::net::IpAddr>, host_port in 1u16.., guest: Option<std::net::IpAddr>,
            guest_port in 1u16..
        ) {
            let protocol = if tcp { Protocol::Tcp } else { Protocol::Udp };
            let forward = PortForward { protocol, host, host_port, guest, guest_port };
            prop_assert_eq!(parse(&forward.to_string()), Ok(forward));
        }
        #[test]
        fn any_text_is_answered_without_a_panic(text in ".*") {
            let _ = parse(&text);
            let _ = parse(&format!("tcp:{text}"));
        }
    }
}
