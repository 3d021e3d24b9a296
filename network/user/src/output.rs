//! What the protocols of the NAT give to the guest: whole packets of a flow, in pieces.
//!
//! [`Output`] is implemented by the engine over the shared ring and by a list in tests. It builds the headers
//! below TCP, fills in or leaves out checksums and cuts large segments, whichever the guest's driver takes.
//!
//! [`TcpHeader`] is the private form of a TCP header (RFC 9293, section 3.1; options of RFC 7323 and RFC 2018),
//! without ports (they are in the [`Flow4Tuple`]) and without checksum.

use std::net::SocketAddr;

/// The two ends of a flow as the guest sees them, both IPv4 or both IPv6.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Flow4Tuple {
    /// The guest's end.
    pub guest: SocketAddr,
    /// The other end, as the guest addresses it: not always where the host's socket is connected to.
    pub remote: SocketAddr,
}

impl Flow4Tuple {
    /// Whether the flow is IPv6.
    pub fn is_v6(&self) -> bool {
        self.guest.is_ipv6()
    }
}

/// Flags of a TCP header.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TcpFlags(pub u8);

impl TcpFlags {
    /// No more data from the sender.
    pub const FIN: Self = Self(0x01);
    /// Synchronise sequence numbers.
    pub const SYN: Self = Self(0x02);
    /// Reset.
    pub const RST: Self = Self(0x04);
    /// Push.
    pub const PSH: Self = Self(0x08);
    /// The acknowledgement number counts.
    pub const ACK: Self = Self(0x10);
    /// The urgent pointer counts (which nobody here looks at).
    pub const URG: Self = Self(0x20);
    /// ECN echo.
    pub const ECE: Self = Self(0x40);
    /// Congestion window reduced.
    pub const CWR: Self = Self(0x80);

    /// Whether all flags of `other` are set.
    pub const fn has(self, other: Self) -> bool {
        self.0 & other.0 == other.0
    }
    /// The flags of both.
    pub const fn with(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }
    /// These flags without those of `other`.
    pub const fn without(self, other: Self) -> Self {
        Self(self.0 & !other.0)
    }
}

/// The options of a TCP header that mean something here. Others are ignored when read and never written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TcpOptions {
    /// Maximum segment size, bytes of payload.
    pub mss: Option<u16>,
    /// Window scale, as sent: up to 255; RFC 7323 section 2.3 has more than 14 be used as 14.
    pub window_scale: Option<u8>,
    /// Selective acknowledgements may be sent.
    pub sack_permitted: bool,
    /// Timestamps: value and echo.
    pub timestamps: Option<(u32, u32)>,
    /// Selective acknowledgements: first sequence number and the one after the last. Gaps at the end only.
    pub sack: [Option<(u32, u32)>; 3],
}

/// A TCP header without ports and checksum.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TcpHeader {
    /// Sequence number of the first byte (or of SYN).
    pub seq: u32,
    /// Acknowledgement number; counts when the flag ACK is set.
    pub ack: u32,
    /// Flags.
    pub flags: TcpFlags,
    /// Window, unscaled as on the wire.
    pub window: u16,
    /// Options.
    pub options: TcpOptions,
}

/// Bytes of a TCP header without options.
pub const TCP_HEADER_MIN: usize = 20;
/// Bytes of a TCP header with the most options.
pub const TCP_HEADER_MAX: usize = 60;

const OPTION_END: u8 = 0;
const OPTION_NOP: u8 = 1;
const OPTION_MSS: u8 = 2;
const OPTION_WINDOW_SCALE: u8 = 3;
const OPTION_SACK_PERMITTED: u8 = 4;
const OPTION_SACK: u8 = 5;
const OPTION_TIMESTAMPS: u8 = 8;

fn be16(bytes: &[u8], at: usize) -> Option<u16> {
    bytes.get(at..at.checked_add(2)?)?.try_into().ok().map(u16::from_be_bytes)
}

fn be32(bytes: &[u8], at: usize) -> Option<u32> {
    bytes.get(at..at.checked_add(4)?)?.try_into().ok().map(u32::from_be_bytes)
}

impl TcpOptions {
    /// Reads options; stops at the first malformed one.
    pub fn parse(mut bytes: &[u8]) -> Self {
        let mut options = Self::default();
        while let Some((&kind, rest)) = bytes.split_first() {
            match kind {
                OPTION_END => break,
                OPTION_NOP => {
                    bytes = rest;
                    continue;
                }
                _ => {}
            }
            let Some(length) = rest.first().map(|length| usize::from(*length)) else { break };
            let Some(value) = bytes.get(2..length) else { break };
            options.take(kind, value);
            bytes = bytes.get(length..).unwrap_or_default();
        }
        options
    }

    fn take(&mut self, kind: u8, value: &[u8]) {
        match (kind, value) {
            (OPTION_MSS, [a, b]) => self.mss = Some(u16::from_be_bytes([*a, *b])),
            (OPTION_WINDOW_SCALE, [shift]) => self.window_scale = Some(*shift),
            (OPTION_SACK_PERMITTED, []) => self.sack_permitted = true,
            (OPTION_TIMESTAMPS, value) if value.len() == 8 => {
                self.timestamps = be32(value, 0).zip(be32(value, 4));
            }
            (OPTION_SACK, value) if value.len().is_multiple_of(8) => {
                for (slot, pair) in self.sack.iter_mut().zip(value.chunks_exact(8)) {
                    *slot = be32(pair, 0).zip(be32(pair, 4));
                }
            }
            _ => {}
        }
    }

    /// Writes the options padded to a multiple of four bytes; returns how many bytes of `into` are used. What
    /// does not fit into 40 bytes is left out.
    fn write(&self, into: &mut [u8; TCP_HEADER_MAX - TCP_HEADER_MIN]) -> usize {
        let mut at = 0;
        let mut put = |bytes: &[u8]| {
            if let Some(place) = into.get_mut(at..at + bytes.len()) {
                place.copy_from_slice(bytes);
                at += bytes.len();
            }
        };
        if let Some(mss) = self.mss {
            let [a, b] = mss.to_be_bytes();
            put(&[OPTION_MSS, 4, a, b]);
        }
        if let Some(shift) = self.window_scale {
            put(&[OPTION_NOP, OPTION_WINDOW_SCALE, 3, shift]);
        }
        if self.sack_permitted {
            put(&[OPTION_NOP, OPTION_NOP, OPTION_SACK_PERMITTED, 2]);
        }
        if let Some((value, echo)) = self.timestamps {
            let mut bytes = [OPTION_NOP, OPTION_NOP, OPTION_TIMESTAMPS, 10, 0, 0, 0, 0, 0, 0, 0, 0];
            bytes[4..8].copy_from_slice(&value.to_be_bytes());
            bytes[8..12].copy_from_slice(&echo.to_be_bytes());
            put(&bytes);
        }
        let blocks = self.sack.iter().flatten().count();
        if blocks > 0 {
            let mut bytes = [0; 4 + 3 * 8];
            bytes[..4].copy_from_slice(&[OPTION_NOP, OPTION_NOP, OPTION_SACK, 2 + 8 * blocks as u8]);
            for (place, (first, end)) in bytes[4..].chunks_exact_mut(8).zip(self.sack.iter().flatten()) {
                place[..4].copy_from_slice(&first.to_be_bytes());
                place[4..].copy_from_slice(&end.to_be_bytes());
            }
            put(&bytes[..4 + 8 * blocks]);
        }
        at
    }
}

impl TcpHeader {
    /// Reads a TCP header: source port, destination port, header and payload. `None`: too short, or its length
    /// makes no sense. The checksum is not looked at.
    pub fn parse(bytes: &[u8]) -> Option<(u16, u16, Self, &[u8])> {
        let length = usize::from(*bytes.get(12)? >> 4) * 4;
        if length < TCP_HEADER_MIN {
            return None;
        }
        let options = bytes.get(TCP_HEADER_MIN..length)?;
        let header = Self {
            seq: be32(bytes, 4)?,
            ack: be32(bytes, 8)?,
            flags: TcpFlags(*bytes.get(13)?),
            window: be16(bytes, 14)?,
            options: TcpOptions::parse(options),
        };
        Some((be16(bytes, 0)?, be16(bytes, 2)?, header, bytes.get(length..)?))
    }

    /// Writes the header with a checksum field of zero; returns its length.
    pub fn write(&self, source: u16, destination: u16, into: &mut [u8; TCP_HEADER_MAX]) -> usize {
        let mut options = [0; TCP_HEADER_MAX - TCP_HEADER_MIN];
        let length = TCP_HEADER_MIN + self.options.write(&mut options);
        into[0..2].copy_from_slice(&source.to_be_bytes());
        into[2..4].copy_from_slice(&destination.to_be_bytes());
        into[4..8].copy_from_slice(&self.seq.to_be_bytes());
        into[8..12].copy_from_slice(&self.ack.to_be_bytes());
        into[12] = (length as u8 / 4) << 4;
        into[13] = self.flags.0;
        into[14..16].copy_from_slice(&self.window.to_be_bytes());
        into[16..20].fill(0);
        into[TCP_HEADER_MIN..].copy_from_slice(&options);
        length
    }
}

/// Why a destination cannot be reached (RFC 792, RFC 4443 section 3.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unreachable {
    /// No route to its network.
    Network,
    /// Its network is reached, it is not.
    Host,
    /// The host forbids it.
    Prohibited,
}

/// What takes packets to the guest.
pub trait Output {
    /// One TCP packet to the guest: the header, and the payload in pieces. With `segment` = `Some(mss)` a payload
    /// beyond `mss` goes as one large frame where the guest takes such, and is cut here where it does not.
    ///
    /// `false`: there is no room, nothing was sent; the table's `room` is called when there is room again. A
    /// packet for a guest whose Ethernet address is not known is dropped, which counts as sent.
    fn tcp(&mut self, flow: &Flow4Tuple, header: &TcpHeader, payload: &[&[u8]], segment: Option<u16>)
    -> bool;

    /// Most bytes of TCP payload that one call takes now, whatever the options: 64 KiB less headers where the
    /// guest takes large frames, else what one packet carries.
    fn max_payload(&self, v6: bool) -> usize;

    /// Largest IP packet that the guest's interface carries, bytes.
    fn mtu(&self) -> u16;

    /// Answers the guest's SYN, of which `header` has the sequence number, with an ICMP or ICMPv6 message that
    /// quotes it. An output without ICMP lets the guest find out by itself.
    fn unreachable(&mut self, flow: &Flow4Tuple, header: &TcpHeader, why: Unreachable) {
        let _ = (flow, header, why);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn headers_survive_the_wire() {
        let header = TcpHeader {
            seq: 0x0102_0304,
            ack: 0xfffe_fdfc,
            flags: TcpFlags::SYN.with(TcpFlags::ACK),
            window: 65_535,
            options: TcpOptions {
                mss: Some(1460),
                window_scale: Some(7),
                sack_permitted: true,
                timestamps: Some((1, 2)),
                sack: [None; 3],
            },
        };
        let sacks = TcpHeader {
            options: TcpOptions { sack: [Some((1, 2)), Some((9, 12)), None], ..TcpOptions::default() },
            ..header
        };
        for header in [header, sacks] {
            let mut bytes = [0; TCP_HEADER_MAX];
            let length = header.write(80, 1024, &mut bytes);
            let mut packet = bytes[..length].to_vec();
            packet.extend_from_slice(b"data");
            assert_eq!(TcpHeader::parse(&packet), Some((80, 1024, header, &b"data"[..])));
        }
    }

    #[test]
    fn malformed_options_end_the_list_and_lengths_are_checked() {
        let mut bytes = [0; TCP_HEADER_MAX];
        let length = TcpHeader::default().write(1, 2, &mut bytes);
        assert_eq!(length, TCP_HEADER_MIN);
        assert!(TcpHeader::parse(&bytes[..19]).is_none());
        bytes[12] = 0x40;
        assert!(TcpHeader::parse(&bytes).is_none(), "header shorter than a header");
        bytes[12] = 0xf0;
        assert!(TcpHeader::parse(&bytes[..59]).is_none(), "header longer than the packet");
        assert_eq!(TcpOptions::parse(&[OPTION_MSS, 0, 1, 2, OPTION_MSS, 4, 5, 6]), TcpOptions::default());
        assert_eq!(TcpOptions::parse(&[OPTION_NOP, OPTION_MSS, 4, 5, 180, 0]).mss, Some(1460));
    }
}
