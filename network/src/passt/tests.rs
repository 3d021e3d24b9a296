//! A port at one end of a stream, the test or a real passt at the other.

use std::io::{Read, Write};
use std::os::unix::net::UnixListener;
use std::sync::mpsc::{Receiver as Inbox, channel};

use super::*;
use atoll_foundation::EventLoop;
use proptest::prelude::*;

const PATIENCE: Duration = Duration::from_secs(10);

/// A port, the other end of its stream, and its events.
fn connected() -> (PasstPort, UnixStream, EventLoop, Inbox<PortEvent>) {
    let (own, other) = UnixStream::pair().unwrap();
    other.set_read_timeout(Some(PATIENCE)).unwrap();
    let port = PasstPort { inner: Inner::new(own, Arc::default()).unwrap(), process: Mutex::new(None) };
    let (events, inbox) = watched(&port);
    (port, other, events, inbox)
}

fn watched(port: &PasstPort) -> (EventLoop, Inbox<PortEvent>) {
    let events = EventLoop::new().unwrap();
    let (sender, inbox) = channel();
    port.watch(&events.handle(), Arc::new(move |event| sender.send(event).unwrap_or_default())).unwrap();
    (events, inbox)
}

fn send(port: &PasstPort, frame: &[u8]) -> Sent {
    let mut copy = frame.to_vec();
    let (a, b) = copy.split_at_mut(5);
    port.send(0, &FrameHeader::default(), &[VolatileSlice::from(a), VolatileSlice::from(b)]).unwrap()
}

fn receive(port: &PasstPort) -> Option<Vec<u8>> {
    let mut found = None;
    port.receive(0, &mut |_, frame| {
        found = Some(frame.to_vec());
        Taken::Yes
    })
    .unwrap();
    found
}

fn on_the_wire(frame: &[u8]) -> Vec<u8> {
    [&(frame.len() as u32).to_be_bytes()[..], frame].concat()
}

#[test]
fn frames_have_their_length_before_them() {
    let (port, mut other, ..) = connected();
    assert_eq!(send(&port, b"\0\0twenty bytes frame"), Sent::Done);
    port.flush(0);
    let mut wire = [0; 24];
    other.read_exact(&mut wire).unwrap();
    assert_eq!(&wire, b"\0\0\0\x14\0\0twenty bytes frame");
    other.write_all(&wire).unwrap();
    assert_eq!(receive(&port).unwrap(), b"\0\0twenty bytes frame");
    assert_eq!(receive(&port), None);
    assert_eq!((port.queue_pairs(), port.mtu(), port.send_offloads()), (1, Some(65_520), Offloads::NONE));
}

#[test]
fn a_frame_that_comes_byte_by_byte_is_one_frame() {
    let (port, mut other, ..) = connected();
    let frame: Vec<u8> = (0..50).collect();
    for byte in on_the_wire(&frame) {
        assert_eq!(receive(&port), None);
        other.write_all(&[byte]).unwrap();
    }
    assert_eq!(port.receive(0, &mut |_, _| Taken::NotNow).unwrap(), Received::Kept);
    assert_eq!(receive(&port).unwrap(), frame);
}

#[test]
fn a_stream_that_is_full_is_told_of_and_goes_on() {
    let (port, mut other, mut events, inbox) = connected();
    let frame = vec![7; 60_000];
    let mut sent = 0;
    while send(&port, &frame) == Sent::Done {
        port.flush(0);
        sent += 1;
        assert!(sent < 1000);
    }
    let reader = std::thread::spawn(move || {
        let mut wire = vec![0; 60_004 * sent];
        other.read_exact(&mut wire).unwrap();
        assert!(wire.chunks(60_004).all(|frame| frame[..4] == 60_000u32.to_be_bytes() && frame[60_003] == 7));
        other
    });
    let deadline = Instant::now() + PATIENCE;
    while !inbox.try_iter().any(|event| event == PortEvent::Writable(0)) {
        assert!(Instant::now() < deadline, "nobody told of room");
        events.run_once(Some(Duration::from_secs(1))).unwrap();
    }
    // What was in the buffer is written by the event loop alone.
    while port.inner.out.lock().unwrap().left() > 0 {
        assert!(Instant::now() < deadline);
        events.run_once(Some(Duration::from_millis(100))).unwrap();
    }
    drop(reader.join().unwrap());
}

#[test]
fn an_event_tells_of_frames_and_of_the_end() {
    let (port, mut other, mut events, inbox) = connected();
    other.write_all(&on_the_wire(&[1; 60])).unwrap();
    events.run_once(Some(PATIENCE)).unwrap();
    assert_eq!(inbox.try_iter().collect::<Vec<_>>(), [PortEvent::Readable(0)]);
    assert_eq!(events.run_once(Some(Duration::ZERO)).unwrap(), 0, "told once");
    assert_eq!(receive(&port).unwrap(), [1; 60]);
    assert_eq!(receive(&port), None);
    drop(other);
    events.run_once(Some(PATIENCE)).unwrap();
    assert_eq!(inbox.try_recv().unwrap(), PortEvent::Readable(0));
    let error = port.receive(0, &mut |_, _| Taken::Yes).unwrap_err();
    assert_eq!(error.to_string(), "passt is gone: it has closed the connection");
    events.run_once(Some(PATIENCE)).unwrap();
    assert_eq!(inbox.try_recv().unwrap(), PortEvent::Link(false));
    assert!(!port.link_up());
}

#[test]
fn a_length_that_no_frame_has_ends_the_connection() {
    for length in [0, 13, MAX_FRAME as u32 + 1, u32::MAX] {
        let (port, mut other, ..) = connected();
        other.write_all(&length.to_be_bytes()).unwrap();
        let error = port.receive(0, &mut |_, _| Taken::Yes).unwrap_err();
        assert!(error.to_string().contains(&format!("a frame of {length} bytes")), "{error}");
        assert!(port.send(0, &FrameHeader::default(), &[]).is_err(), "for good");
    }
}

#[test]
fn nobody_at_the_socket_is_said_with_what_to_do() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("socket");
    let error = PasstPort::connect(&path).err().expect("an error").to_string();
    assert!(error.starts_with(&format!("cannot connect to passt at {}: ", path.display())), "{error}");
    let listener = UnixListener::bind(&path).unwrap();
    let port = PasstPort::connect(&path).unwrap();
    send(&port, &[1; 60]);
    port.flush(0);
    let mut wire = [0; 64];
    listener.accept().unwrap().0.read_exact(&mut wire).unwrap();
    assert_eq!(wire[..5], [0, 0, 0, 60, 1]);
}

#[test]
fn a_program_that_is_missing_or_fails_is_one_clear_line() {
    let missing = PasstOptions { program: Some("/no/such/passt".into()), arguments: Vec::new() };
    let error = PasstPort::start(&missing).err().expect("an error").to_string();
    assert!(error.starts_with("/no/such/passt was not found; install passt"), "{error}");
    let folder = tempfile::tempdir().unwrap();
    let program = |text: &str| {
        let path = folder.path().join(format!("passt{}", text.len()));
        std::fs::write(&path, format!("#!/bin/sh\n{text}\n")).unwrap();
        let mode = std::os::unix::fs::PermissionsExt::from_mode(0o755);
        std::fs::set_permissions(&path, mode).unwrap();
        PasstOptions { program: Some(path), arguments: Vec::new() }
    };
    let error = |options: PasstOptions| loop {
        let error = PasstPort::start(&options).err().expect("an error").to_string();
        // Another test's child may have inherited the file while it was written, for a moment.
        if !error.contains("Text file busy") {
            break error;
        }
    };
    let words = "echo 'Failed to send 7 bytes to syslog' >&2; echo 'no route' >&2; exit 1";
    assert_eq!(error(program(words)), "passt did not start: no route");
    assert_eq!(error(program("exit 3")), "passt did not start: exit status: 3");
}

#[test]
fn what_comes_before_the_answer_is_read_away_whole() {
    let answer = |before: &[u8]| {
        let (own, mut other) = UnixStream::pair().unwrap();
        let mut reply = vec![0u8; 42];
        reply[..6].copy_from_slice(&[2, 0, 0, 0, 0, 1]);
        reply[12..14].copy_from_slice(&[8, 6]);
        other.write_all(&[before, &on_the_wire(&reply), &on_the_wire(&[5; 20])].concat()).unwrap();
        let result = await_answer(&own);
        let mut rest = [0; 24];
        result.map(|()| (&own).read_exact(&mut rest).unwrap()).map(|()| rest.to_vec())
    };
    let next = on_the_wire(&[5; 20]);
    assert_eq!(answer(&[]).unwrap(), next);
    assert_eq!(answer(&on_the_wire(&[9; 1000])).unwrap(), next);
    assert_eq!(answer(&[0xff; 4]).unwrap_err().kind(), io::ErrorKind::InvalidData);
}

/// passt, unless it is not installed or cannot work here.
fn real(arguments: &[&str]) -> Option<PasstPort> {
    let arguments = arguments.iter().map(|argument| (*argument).to_owned()).collect();
    match PasstPort::start(&PasstOptions { program: None, arguments }) {
        Ok(port) => Some(port),
        Err(error) => {
            println!("skipped: {error}");
            None
        }
    }
}

#[test]
fn a_real_passt_answers_and_its_end_is_seen() {
    let Some(port) = real(&["--address", "10.0.2.15", "--netmask", "24", "--gateway", "10.0.2.2"]) else {
        return;
    };
    let (mut events, inbox) = watched(&port);
    // DHCPDISCOVER, as a guest begins (RFC 2131).
    let mut dhcp = vec![1, 1, 6, 0, 0x12, 0x34, 0x56, 0x78];
    dhcp.resize(28, 0);
    dhcp.extend([0x52, 0x54, 0, 0, 0, 2]);
    dhcp.resize(236, 0);
    dhcp.extend([99, 130, 83, 99, 53, 1, 1, 255]);
    dhcp.resize(300, 0);
    let mut frame = vec![0xff; 6];
    frame.extend([0x52, 0x54, 0, 0, 0, 2, 8, 0]);
    let mut ip = vec![0x45, 0, 1, 72, 0, 1, 0, 0, 64, 17, 0, 0, 0, 0, 0, 0, 255, 255, 255, 255];
    let sum: u32 = ip.chunks(2).map(|pair| u32::from(pair[0]) << 8 | u32::from(pair[1])).sum();
    let check = !((sum & 0xffff) + (sum >> 16)) as u16;
    ip[10..12].copy_from_slice(&check.to_be_bytes());
    frame.extend(ip);
    frame.extend([0, 68, 0, 67, 1, 52, 0, 0]);
    frame.extend(dhcp);
    assert_eq!(send(&port, &frame), Sent::Done);
    port.flush(0);
    let deadline = Instant::now() + PATIENCE;
    let offer = loop {
        match receive(&port) {
            Some(frame) if frame.len() > 280 && frame[23] == 17 && frame[34..38] == [0, 67, 0, 68] => {
                break frame;
            }
            Some(_) => {}
            None => drop(events.run_once(Some(Duration::from_secs(1))).unwrap()),
        }
        assert!(Instant::now() < deadline, "passt offers no address");
    };
    assert_eq!(offer[58..62], [10, 0, 2, 15], "the address on offer");
    drop(inbox);
    let pid = port.process.lock().unwrap().as_ref().unwrap().child.id();
    drop(port);
    assert!(!Path::new(&format!("/proc/{pid}")).exists(), "it ends with the port");
}

#[test]
fn an_option_that_passt_refuses_is_said_in_its_words() {
    if real(&[]).is_none() {
        return;
    }
    let arguments = vec!["--address".to_owned(), "nonsense".to_owned()];
    let error = PasstPort::start(&PasstOptions { program: None, arguments }).err().expect("an error");
    assert!(error.to_string().starts_with("passt did not start: "), "{error}");
    assert!(error.to_string().contains("nonsense"), "{error}");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn frames_in_any_pieces_arrive_as_they_were(
        lens in proptest::collection::vec(prop_oneof![14usize..100, 14usize..=MAX_FRAME], 1..20),
        pieces in proptest::collection::vec(1usize..100_000, 1..20),
    ) {
        let (port, mut other, ..) = connected();
        let frames: Vec<Vec<u8>> =
            lens.iter().enumerate().map(|(n, len)| vec![n as u8; *len]).collect();
        let wire: Vec<u8> = frames.iter().flat_map(|frame| on_the_wire(frame)).collect();
        let writer = std::thread::spawn(move || {
            let (mut rest, mut pieces) = (&wire[..], pieces.iter().cycle());
            while !rest.is_empty() {
                let (now, later) = rest.split_at(rest.len().min(*pieces.next().unwrap()));
                other.write_all(now).unwrap();
                rest = later;
            }
            other
        });
        let deadline = Instant::now() + PATIENCE;
        for frame in frames {
            loop {
                if let Some(got) = receive(&port) {
                    prop_assert!(got == frame);
                    break;
                }
                prop_assert!(Instant::now() < deadline);
                std::thread::yield_now();
            }
        }
        drop(writer.join().unwrap());
        prop_assert!(port.link_up());
    }
}
