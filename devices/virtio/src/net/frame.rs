//! What a frame and its header must be like, whichever side it comes from, and finishing a checksum.

use atoll_network::header::SegmentKind;
use atoll_network::{FrameHeader, Offloads};

/// Bytes of an Ethernet header.
pub(super) const ETHERNET_BYTES: usize = 14;
/// Bytes of a VLAN tag.
pub(super) const VLAN_BYTES: usize = 4;

/// What is wrong with a frame's header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Unfit {
    /// It cannot be meant for a frame of that length.
    Malformed,
    /// The frame stands for several in a way that the receiver does not take.
    Segmented,
    /// It only lacks a checksum that the receiver wants there.
    Checksum,
}

/// Whether a receiver of `offloads` takes a frame of `len` bytes with `header`.
pub(super) fn check(header: &FrameHeader, len: usize, offloads: Offloads) -> Result<(), Unfit> {
    if len < ETHERNET_BYTES {
        return Err(Unfit::Malformed);
    }
    if let Some(checksum) = header.checksum {
        let end = usize::from(checksum.start) + usize::from(checksum.offset) + 2;
        if end > len {
            return Err(Unfit::Malformed);
        }
    }
    if let Some(segmentation) = header.segmentation {
        // Segments have checksums of their own, which start where the large frame's would (5.1.6.2.1).
        if header.checksum.is_none() {
            return Err(Unfit::Malformed);
        }
        let taken = match segmentation.kind {
            SegmentKind::Tcp4 => offloads.tcp4,
            SegmentKind::Tcp6 => offloads.tcp6,
            SegmentKind::UdpL4 => offloads.udp_l4,
            SegmentKind::UdpFragment => false,
        };
        if !taken || (segmentation.ecn && !offloads.ecn) {
            return Err(Unfit::Segmented);
        }
    }
    if header.checksum.is_some() && !offloads.checksum {
        return Err(Unfit::Checksum);
    }
    Ok(())
}

/// Computes the checksum that `header` leaves open, in a copy of `frame`. The header passed [`check`].
pub(super) fn finish_checksum(header: &FrameHeader, frame: &[u8]) -> Option<Vec<u8>> {
    let checksum = header.checksum?;
    let start = usize::from(checksum.start);
    let mut frame = frame.to_vec();
    let (pairs, odd) = frame.get(start..)?.as_chunks::<2>();
    let last = odd.first().map_or(0, |&byte| u64::from(byte) << 8);
    // At most 32,768 terms of 16 bits.
    let mut sum = pairs.iter().fold(last, |sum, pair| sum + u64::from(u16::from_be_bytes(*pair)));
    while sum >> 16 != 0 {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    // Zero would mean "no checksum" in UDP; both forms of zero are equal in a sum (RFC 768).
    let value = match !(sum as u16) {
        0 => 0xffff,
        value => value,
    };
    let at = start + usize::from(checksum.offset);
    frame.get_mut(at..at + 2)?.copy_from_slice(&value.to_be_bytes());
    Some(frame)
}

/// Whether a frame that stands for itself alone is larger than an MTU allows.
pub(super) fn exceeds_mtu(frame: &[u8], mtu: u16) -> bool {
    let tag = if frame.get(12..14) == Some(&[0x81, 0x00]) { VLAN_BYTES } else { 0 };
    frame.len() > usize::from(mtu) + ETHERNET_BYTES + tag
}

#[cfg(test)]
mod tests {
    use atoll_network::Segmentation;
    use atoll_network::header::PartialChecksum;

    use super::*;

    fn open(start: u16, offset: u16) -> FrameHeader {
        FrameHeader { checksum: Some(PartialChecksum { start, offset }), ..FrameHeader::default() }
    }

    #[test]
    fn headers_are_held_against_length_and_offloads() {
        let plain = FrameHeader::default();
        assert_eq!(check(&plain, 14, Offloads::NONE), Ok(()));
        assert_eq!(check(&plain, 13, Offloads::NONE), Err(Unfit::Malformed));
        assert_eq!(check(&open(34, 16), 54, Offloads::TCP), Ok(()));
        assert_eq!(check(&open(34, 16), 52, Offloads::TCP), Ok(()), "it may be the last two bytes");
        assert_eq!(check(&open(34, 16), 51, Offloads::TCP), Err(Unfit::Malformed));
        assert_eq!(check(&open(u16::MAX, u16::MAX), 1000, Offloads::TCP), Err(Unfit::Malformed));
        assert_eq!(check(&open(34, 16), 54, Offloads::NONE), Err(Unfit::Checksum));
        let segments = |kind, ecn| Some(Segmentation { kind, size: 1448, header_len: 54, ecn });
        let large = |kind, ecn| FrameHeader { segmentation: segments(kind, ecn), ..open(34, 16) };
        assert_eq!(check(&large(SegmentKind::Tcp4, false), 9000, Offloads::TCP), Ok(()));
        assert_eq!(check(&large(SegmentKind::Tcp4, true), 9000, Offloads::TCP), Err(Unfit::Segmented));
        assert_eq!(check(&large(SegmentKind::UdpL4, false), 9000, Offloads::TCP), Err(Unfit::Segmented));
        assert_eq!(
            check(&large(SegmentKind::UdpFragment, false), 9000, Offloads::TCP),
            Err(Unfit::Segmented)
        );
        let bare = FrameHeader { segmentation: segments(SegmentKind::Tcp4, false), ..plain };
        assert_eq!(check(&bare, 9000, Offloads::TCP), Err(Unfit::Malformed));
    }

    #[test]
    fn a_finished_checksum_makes_the_sum_all_ones() {
        for len in [60usize, 61] {
            let frame: Vec<u8> = (0..len).map(|i| (i * 37) as u8).collect();
            let done = finish_checksum(&open(20, 6), &frame).unwrap();
            assert_eq!((&done[..26], &done[28..]), (&frame[..26], &frame[28..]));
            // What a receiver does: the sum with the checksum, less what was in the field (the pseudo header's sum).
            let sum = |bytes: &[u8]| {
                let words =
                    bytes.chunks(2).map(|c| u32::from(c[0]) << 8 | u32::from(*c.get(1).unwrap_or(&0)));
                let sum: u32 = words.sum();
                (sum & 0xffff) + (sum >> 16)
            };
            let pseudo = u32::from(u16::from_be_bytes([frame[26], frame[27]]));
            let total = sum(&done[20..]) + pseudo;
            assert_eq!((total & 0xffff) + (total >> 16), 0xffff);
        }
        let zero = finish_checksum(&open(0, 0), &[0xff, 0xff, 0, 0]).unwrap();
        assert_eq!(zero, [0xff, 0xff, 0, 0], "zero is sent as all ones");
    }

    #[test]
    fn a_tag_does_not_count_towards_the_mtu() {
        let mut frame = vec![0; 1514];
        assert!(!exceeds_mtu(&frame, 1500));
        frame.extend_from_slice(&[0; 4]);
        assert!(exceeds_mtu(&frame, 1500));
        frame[12] = 0x81;
        assert!(!exceeds_mtu(&frame, 1500));
    }
}
