//! What goes with a frame besides its bytes: unfinished checksums and segmentation.
//!
//! The form is `struct virtio_net_hdr_v1` (VIRTIO 1.2, section 5.1.6), 12 bytes, little-endian, which Linux' tap
//! devices use as well (IFF_VNET_HDR with a header of 12 bytes).

/// Bytes of a header on the wire.
pub const HEADER_BYTES: usize = 12;

const F_NEEDS_CSUM: u8 = 1;
const F_DATA_VALID: u8 = 2;
const GSO_NONE: u8 = 0;
const GSO_TCPV4: u8 = 1;
const GSO_UDP: u8 = 3;
const GSO_TCPV6: u8 = 4;
const GSO_UDP_L4: u8 = 5;
const GSO_ECN: u8 = 0x80;

/// A checksum that the sender of a frame left to the receiver.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PartialChecksum {
    /// First byte of the frame that is summed.
    pub start: u16,
    /// Where the sum goes, counted from `start`; the pseudo header's sum is there already.
    pub offset: u16,
}

/// What kind of segments a large frame stands for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SegmentKind {
    /// TCP over IPv4.
    Tcp4,
    /// TCP over IPv6.
    Tcp6,
    /// UDP datagrams of equal size, either family.
    UdpL4,
    /// One IPv4 datagram to be fragmented (old).
    UdpFragment,
}

/// A frame that stands for several.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segmentation {
    /// Of what.
    pub kind: SegmentKind,
    /// Payload bytes of each segment but the last; not zero.
    pub size: u16,
    /// Bytes of all headers, a hint only.
    pub header_len: u16,
    /// TCP: the first segment has CWR.
    pub ecn: bool,
}

/// What goes with a frame.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FrameHeader {
    /// A checksum still to be computed.
    pub checksum: Option<PartialChecksum>,
    /// The checksums were verified; need not be looked at.
    pub data_valid: bool,
    /// The frame stands for several.
    pub segmentation: Option<Segmentation>,
}

/// A header that does not follow the specification.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a frame's offload header is malformed: {0}")]
pub struct HeaderError(pub &'static str);

impl FrameHeader {
    /// Reads a header; `num_buffers` is not looked at. Unknown flags are ignored (5.1.6.2: reserved).
    pub fn decode(bytes: &[u8; HEADER_BYTES]) -> Result<Self, HeaderError> {
        let [flags, gso, h0, h1, s0, s1, c0, c1, o0, o1, ..] = *bytes;
        let size = u16::from_le_bytes([s0, s1]);
        let kind = match gso & !GSO_ECN {
            GSO_NONE => None,
            GSO_TCPV4 => Some(SegmentKind::Tcp4),
            GSO_TCPV6 => Some(SegmentKind::Tcp6),
            GSO_UDP_L4 => Some(SegmentKind::UdpL4),
            GSO_UDP => Some(SegmentKind::UdpFragment),
            _ => return Err(HeaderError("unknown kind of segmentation")),
        };
        if kind.is_some() && size == 0 {
            return Err(HeaderError("segments of no bytes"));
        }
        let segmentation = kind.map(|kind| Segmentation {
            kind,
            size,
            header_len: u16::from_le_bytes([h0, h1]),
            ecn: gso & GSO_ECN != 0,
        });
        let checksum = (flags & F_NEEDS_CSUM != 0).then(|| PartialChecksum {
            start: u16::from_le_bytes([c0, c1]),
            offset: u16::from_le_bytes([o0, o1]),
        });
        Ok(Self { checksum, data_valid: flags & F_DATA_VALID != 0, segmentation })
    }

    /// The header's bytes, for a frame in `buffers` receive buffers (`num_buffers`).
    pub fn encode(&self, buffers: u16) -> [u8; HEADER_BYTES] {
        let mut bytes = [0; HEADER_BYTES];
        if self.data_valid {
            bytes[0] |= F_DATA_VALID;
        }
        if let Some(checksum) = self.checksum {
            bytes[0] |= F_NEEDS_CSUM;
            bytes[6..8].copy_from_slice(&checksum.start.to_le_bytes());
            bytes[8..10].copy_from_slice(&checksum.offset.to_le_bytes());
        }
        if let Some(segmentation) = self.segmentation {
            bytes[1] = match segmentation.kind {
                SegmentKind::Tcp4 => GSO_TCPV4,
                SegmentKind::Tcp6 => GSO_TCPV6,
                SegmentKind::UdpL4 => GSO_UDP_L4,
                SegmentKind::UdpFragment => GSO_UDP,
            };
            if segmentation.ecn {
                bytes[1] |= GSO_ECN;
            }
            bytes[2..4].copy_from_slice(&segmentation.header_len.to_le_bytes());
            bytes[4..6].copy_from_slice(&segmentation.size.to_le_bytes());
        }
        bytes[10..12].copy_from_slice(&buffers.to_le_bytes());
        bytes
    }
}

/// Offloads of one direction: which unfinished frames a side can take.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Offloads {
    /// Frames with a partial checksum. The others need it.
    pub checksum: bool,
    /// Large TCP over IPv4.
    pub tcp4: bool,
    /// Large TCP over IPv6.
    pub tcp6: bool,
    /// Large TCP with ECN.
    pub ecn: bool,
    /// UDP segmentation.
    pub udp_l4: bool,
}

impl Offloads {
    /// No offload.
    pub const NONE: Self = Self { checksum: false, tcp4: false, tcp6: false, ecn: false, udp_l4: false };
    /// Checksums and large TCP of both families.
    pub const TCP: Self = Self { checksum: true, tcp4: true, tcp6: true, ecn: false, udp_l4: false };

    /// What both have.
    pub fn and(self, other: Self) -> Self {
        Self {
            checksum: self.checksum & other.checksum,
            tcp4: self.tcp4 & other.tcp4,
            tcp6: self.tcp6 & other.tcp6,
            ecn: self.ecn & other.ecn,
            udp_l4: self.udp_l4 & other.udp_l4,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn headers_survive_the_wire() {
        let plain = FrameHeader::default();
        assert_eq!(plain.encode(1), [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0]);
        for kind in [SegmentKind::Tcp4, SegmentKind::Tcp6, SegmentKind::UdpL4, SegmentKind::UdpFragment] {
            let header = FrameHeader {
                checksum: Some(PartialChecksum { start: 34, offset: 16 }),
                data_valid: false,
                segmentation: Some(Segmentation { kind, size: 1448, header_len: 66, ecn: true }),
            };
            assert_eq!(FrameHeader::decode(&header.encode(3)), Ok(header));
        }
    }

    #[test]
    fn what_cannot_be_meant_is_refused() {
        assert!(FrameHeader::decode(&[0, 2, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0]).is_err());
        assert!(FrameHeader::decode(&[0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]).is_err());
    }
}
