//! Both sides of a ring in one process.

use super::*;
use crate::header::FrameHeader;
use crate::port::{Port, Received, Sent, Taken};
use vm_memory::VolatileSlice;

pub(super) fn ring(pairs: u16) -> (RingPort, Peer) {
    let (port, setup) = create(pairs, MIN_RING_BYTES).unwrap();
    (port, Peer::attach(setup).unwrap())
}

pub(super) fn send(port: &RingPort, pair: u16, frame: &[u8]) -> Sent {
    let mut copy = frame.to_vec();
    port.send(pair, &FrameHeader::default(), &[VolatileSlice::from(&mut copy[..])]).unwrap()
}

pub(super) fn receive(port: &RingPort, pair: u16) -> Option<Vec<u8>> {
    let mut frame = None;
    let mut take = |_: &FrameHeader, bytes: &[u8]| {
        frame = Some(bytes.to_vec());
        Taken::Yes
    };
    let received = port.receive(pair, &mut take).unwrap();
    assert_eq!(received == Received::Frame, frame.is_some());
    frame
}

#[test]
fn a_frame_arrives_on_its_pair_in_each_direction() {
    let (port, mut peer) = ring(2);
    let mut buffer = Vec::new();
    assert_eq!(send(&port, 1, &[7; 60]), Sent::Done);
    assert!(peer.next(0, &mut buffer).unwrap().is_none());
    assert_eq!(peer.next(1, &mut buffer).unwrap(), Some(FrameHeader::default()));
    assert_eq!(buffer, [7; 60]);
    assert!(peer.push(0, &FrameHeader::default(), &[&[1; 14], &[2; 50]]).unwrap());
    assert!(receive(&port, 1).is_none());
    let frame = receive(&port, 0).unwrap();
    assert_eq!((frame.len(), frame[13], frame[14]), (64, 1, 2));
}
