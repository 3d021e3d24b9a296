//! Servers that do what none should: one clear error, no wrong data taken for right, nobody left waiting.

use std::io::Write;
use std::net::TcpListener;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::super::wire::*;
use super::server::{Offer, Peer, Server};
use super::*;

/// What opening says when the server's first bytes are these, after which it closes.
fn refusal(bytes: &'static [u8]) -> String {
    let server = Server::start(move |mut peer, _| {
        peer.send(bytes);
        let _ = peer.stream.shutdown(std::net::Shutdown::Write);
        // So that what the client sends is no error to it.
        let mut rest = Vec::new();
        let _ = std::io::Read::read_to_end(&mut peer.stream, &mut rest);
        Some(())
    });
    let error = open_disk(&server.address, WRITE, None).err().expect("it is refused").to_string();
    assert_eq!(error.lines().count(), 1, "{error}");
    assert!(error.contains("nbd+unix:///export"), "{error}");
    error
}

/// Negotiates well, then does `script` with the first request.
fn misbehaving(offer: Offer, script: impl Fn(&mut Peer, u64) + Send + 'static) -> Server<()> {
    Server::start(move |mut peer, _| {
        peer.negotiate(&offer)?;
        if let Some(request) = peer.request() {
            script(&mut peer, request.cookie);
        }
        Some(())
    })
}

/// What a read of 4096 bytes says when this is how it is answered.
fn read_error(structured: bool, script: impl Fn(&mut Peer, u64) + Send + 'static) -> String {
    let server = misbehaving(Offer { structured, ..Offer::default() }, script);
    let disk = open_disk(&server.address, WRITE, None).unwrap();
    let error = read_bytes(&*disk, 4096, &mut [0; 4096]).expect_err("the answer is nonsense");
    assert_eq!(error.kind(), DiskErrorKind::Io);
    error.to_string()
}

#[test]
fn nonsense_while_negotiating_is_refused() {
    assert!(refusal(b"HTTP/1.1 400 Bad Request\r\n\r\n").contains("does not speak NBD"));
    assert!(refusal(b"").contains("closed the connection while negotiating"));
    assert!(refusal(b"NBDMAG").contains("closed the connection"));
    assert!(refusal(b"NBDMAGIC\x00\x00\x42\x02\x81\x86\x12\x53").contains("old style"));
    assert!(refusal(b"NBDMAGICIHAVEOPT\x00\x02").contains("fixed newstyle"));
    assert!(refusal(b"NBDMAGICIHAVEOPT\x00\x03garbage instead of").contains("something else than an answer"));
    let answers = b"NBDMAGICIHAVEOPT\x00\x03\x00\x03\xe8\x89\x04\x55\x65\xa9\x00\x00\x00\x08\x00\x00\x00\x01\xff\xff\xff\xff";
    assert!(refusal(answers).contains("4294967295 bytes"));
    let other_option = b"NBDMAGICIHAVEOPT\x00\x03\x00\x03\xe8\x89\x04\x55\x65\xa9\x00\x00\x00\x07\x00\x00\x00\x01\x00\x00\x00\x00";
    assert!(refusal(other_option).contains("not asked for"));
    let tls = b"NBDMAGICIHAVEOPT\x00\x03\x00\x03\xe8\x89\x04\x55\x65\xa9\x00\x00\x00\x08\x80\x00\x00\x05\x00\x00\x00\x00";
    assert!(refusal(tls).contains("needs TLS"));
}

#[test]
fn impossible_exports_are_refused() {
    let refused = |offer: Offer| {
        let server = misbehaving(offer, |_, _| {});
        open_disk(&server.address, WRITE, None).err().expect("it is refused").to_string()
    };
    for blocks in
        [[0, 1, 512], [3, 4096, 1 << 20], [1 << 17, 1 << 17, 1 << 20], [512, 4096, 700], [4096, 512, 8192]]
    {
        let text = refused(Offer { blocks: Some(blocks), ..Offer::default() });
        assert!(text.contains("impossible block sizes"), "{blocks:?}: {text}");
    }
    assert!(refused(Offer { size: u64::MAX, ..Offer::default() }).contains("impossible size"));
    assert!(refused(Offer { size: 0, ..Offer::default() }).contains("has 0 bytes"));
    assert!(refused(Offer { size: 1000, ..Offer::default() }).contains("has 1000 bytes"));
    let flags = HAS_FLAGS | READ_ONLY | SEND_FLUSH;
    assert!(refused(Offer { flags, ..Offer::default() }).contains("read-only at its server"));
    assert!(refused(Offer { flags: HAS_FLAGS, ..Offer::default() }).contains("cannot make writes durable"));
    assert!(refused(Offer { flags: 0, ..Offer::default() }).contains("cannot make writes durable"));
}

#[test]
fn information_without_end_is_refused() {
    let server = Server::start(|mut peer, _| {
        peer.send(b"NBDMAGICIHAVEOPT\x00\x03");
        peer.send(b"\x00\x03\xe8\x89\x04\x55\x65\xa9\x00\x00\x00\x08\x80\x00\x00\x01\x00\x00\x00\x00");
        let info =
            b"\x00\x03\xe8\x89\x04\x55\x65\xa9\x00\x00\x00\x07\x00\x00\x00\x03\x00\x00\x00\x02\x00\x09";
        while peer.stream.write_all(info).is_ok() {}
        Some(())
    });
    let error = open_disk(&server.address, WRITE, None).err().unwrap().to_string();
    assert!(error.contains("answers without end"), "{error}");
}

#[test]
fn what_cannot_be_reached_says_so() {
    let folder = tempfile::tempdir().unwrap();
    let address = format!("nbd+unix:///x?socket={}", folder.path().join("absent").display());
    let error = open_disk(&address, WRITE, None).err().unwrap().to_string();
    assert!(error.contains("cannot be reached"), "{error}");
    // A port that was free a moment ago.
    let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let error = open_disk(format!("nbd://127.0.0.1:{port}/x"), WRITE, None).err().unwrap().to_string();
    assert!(error.contains("cannot be reached: Connection refused"), "{error}");
    for (address, named) in [("nbds://h/x", "TLS"), ("nbd:x", "'://'"), ("nbd://h:0/x", "port")] {
        let error = open_disk(address, WRITE, None).err().unwrap().to_string();
        assert!(error.contains(named) && error.contains(address), "{error}");
    }
    let format = Some(crate::format::DiskFormat::Qcow2);
    assert!(open_disk("nbd://h/x", WRITE, format).err().unwrap().to_string().contains("raw disk"));
}

#[test]
fn simple_replies_that_are_none_end_the_connection() {
    for (script, named) in [
        ((|peer, _| peer.send(b"0123456789abcdef0123")) as fn(&mut Peer, u64), "something else than a reply"),
        (|peer, cookie| peer.simple(cookie + 1, 0, &[0; 4096]), "nobody made"),
        (|peer, cookie| peer.simple(cookie, 0, &[0; 4095]), "closed the connection"),
        (|peer, cookie| peer.simple(cookie, 0, &[]), "closed the connection"),
        (|peer, _| peer.send(b"\x67\x44\x66\x98"), "closed the connection"),
        (|_, _| {}, "closed the connection"),
        // Chunks were not agreed on.
        (|peer, cookie| peer.chunk(cookie, CHUNK_DONE, CHUNK_NONE, &[]), "something else than a reply"),
    ] {
        let error = read_error(false, script);
        assert!(error.contains(named), "{named}: {error}");
    }
}

#[test]
fn chunks_that_cannot_be_end_the_connection() {
    fn data(offset: u64, len: usize) -> Vec<u8> {
        let mut bytes = offset.to_be_bytes().to_vec();
        bytes.resize(8 + len, 7);
        bytes
    }
    fn hole(offset: u64, len: u32) -> Vec<u8> {
        let mut bytes = offset.to_be_bytes().to_vec();
        bytes.extend_from_slice(&len.to_be_bytes());
        bytes
    }
    type Script = Box<dyn Fn(&mut Peer, u64) + Send>;
    let one = |kind: u16, bytes: Vec<u8>| -> Script {
        Box::new(move |peer, cookie| peer.chunk(cookie, CHUNK_DONE, kind, &bytes))
    };
    let not_asked = "not asked for";
    let cases: Vec<(Script, &str)> = vec![
        (one(CHUNK_DATA, data(4096, 4095)), "less data"),
        (one(CHUNK_DATA, data(4096, 4097)), not_asked),
        (one(CHUNK_DATA, data(4095, 4096)), not_asked),
        (one(CHUNK_DATA, data(u64::MAX, 4096)), not_asked),
        (one(CHUNK_DATA, data(4096, 0)), "without data"),
        (one(CHUNK_DATA, vec![0; 3]), "without data"),
        (one(CHUNK_HOLE, hole(4096, 0)), not_asked),
        (one(CHUNK_HOLE, hole(4096, u32::MAX)), not_asked),
        (one(CHUNK_HOLE, vec![0; 11]), "no place here"),
        (one(CHUNK_NONE, vec![]), "less data"),
        (one(CHUNK_NONE, vec![0; 4]), "no place here"),
        (one(5, vec![]), "no place here"),
        (one(CHUNK_ERROR + 1, vec![0; 5]), "impossible form"),
        (one(CHUNK_ERROR + 1, vec![0; 6]), "impossible form"),
        (one(CHUNK_ERROR + 1, vec![0, 0, 0, 5, 0, 9]), "impossible form"),
        (one(CHUNK_ERROR + 1, vec![0; 1 << 20]), "impossible form"),
        (Box::new(|peer, cookie| peer.chunk(cookie, 0, CHUNK_NONE, &[])), "no place here"),
        (Box::new(|peer, cookie| peer.simple(cookie, 0, &[0; 4096])), "structure agreed on"),
        (
            Box::new(|peer, cookie| {
                peer.chunk(cookie, 0, CHUNK_DATA, &data(4096, 2048));
                peer.chunk(cookie, CHUNK_DONE, CHUNK_HOLE, &hole(5000, 3000));
            }),
            "twice",
        ),
        (
            Box::new(|peer, cookie| {
                for _ in 0..300 {
                    peer.chunk(cookie, 0, CHUNK_ERROR + 1, &[0, 0, 0, 5, 0, 0]);
                }
            }),
            "impossible form",
        ),
        // A data chunk that claims more than follows.
        (
            Box::new(|peer, cookie| {
                peer.chunk(cookie, 0, CHUNK_HOLE, &hole(4096, 1024));
                let mut bytes = CHUNK_MAGIC.to_be_bytes().to_vec();
                bytes.extend_from_slice(&[0, 1, 0, 1]);
                bytes.extend_from_slice(&cookie.to_be_bytes());
                bytes.extend_from_slice(&u32::MAX.to_be_bytes());
                bytes.extend_from_slice(&5120u64.to_be_bytes());
                peer.send(&bytes);
            }),
            not_asked,
        ),
    ];
    for (number, (script, named)) in cases.into_iter().enumerate() {
        let error = read_error(true, script);
        assert!(error.contains(named), "case {number}, {named}: {error}");
    }
}

#[test]
fn chunks_in_any_order_make_a_whole_and_an_error_in_one_is_one() {
    let offer = Offer { structured: true, ..Offer::default() };
    let server = Server::start(move |mut peer, _| {
        peer.negotiate(&offer)?;
        let cookie = peer.request()?.cookie;
        let data = |offset: u64, byte: u8| [&offset.to_be_bytes()[..], &[byte; 1024]].concat();
        peer.chunk(cookie, 0, CHUNK_DATA, &data(4096 + 3072, 4));
        peer.chunk(cookie, 0, CHUNK_DATA, &data(4096, 1));
        peer.chunk(cookie, 0, CHUNK_HOLE, &[&(4096u64 + 1024).to_be_bytes()[..], &[0, 0, 8, 0]].concat());
        peer.chunk(cookie, CHUNK_DONE, CHUNK_NONE, &[]);
        let cookie = peer.request()?.cookie;
        peer.chunk(cookie, 0, CHUNK_DATA, &data(4096, 1));
        peer.chunk(cookie, 0, CHUNK_ERROR + 2, &[0, 0, 0, 28, 0, 2, b'n', b'o', 0, 0, 0, 0, 0, 0, 16, 0]);
        peer.chunk(cookie, CHUNK_DONE, CHUNK_NONE, &[]);
        // The connection goes on after an error of one request.
        peer.serve(&mut vec![9; 1 << 20], true);
        Some(())
    });
    let disk = open_disk(&server.address, WRITE, None).unwrap();
    let mut bytes = vec![9; 4096];
    read_bytes(&*disk, 4096, &mut bytes).unwrap();
    let expected = [vec![1; 1024], vec![0; 2048], vec![4; 1024]].concat();
    assert!(bytes == expected);
    assert_eq!(read_bytes(&*disk, 4096, &mut bytes).unwrap_err().kind(), DiskErrorKind::NoSpace);
    read_bytes(&*disk, 4096, &mut bytes).unwrap();
    assert!(bytes.iter().all(|byte| *byte == 9));
}

#[test]
fn errors_of_the_server_keep_their_meaning() {
    let numbers = [1, 5, 12, 22, 28, 75, 95, 108, 4711];
    let server = Server::start(move |mut peer, _| {
        peer.negotiate(&Offer::default())?;
        for number in numbers {
            let cookie = peer.request()?.cookie;
            peer.simple(cookie, number, &[]);
        }
        Some(())
    });
    let disk = open_disk(&server.address, WRITE, None).unwrap();
    for number in numbers {
        let kind = match number {
            1 => DiskErrorKind::ReadOnly,
            28 => DiskErrorKind::NoSpace,
            95 => DiskErrorKind::Unsupported,
            _ => DiskErrorKind::Io,
        };
        let error = write_bytes(&*disk, 0, &[1; 512]).unwrap_err();
        assert_eq!(error.kind(), kind, "{error}");
    }
}

#[test]
fn many_requests_are_in_flight_and_answered_in_any_order() {
    const CALLERS: usize = 16;
    for structured in [false, true] {
        let offer = Offer { structured, ..Offer::default() };
        let server = Server::start(move |mut peer, _| {
            peer.negotiate(&offer)?;
            let mut random = Random::new(7);
            let mut most = 0;
            for _ in 0..20 {
                // All of them have to be there at once, or this waits for ever.
                let mut requests: Vec<_> = (0..CALLERS).map(|_| peer.request()).collect::<Option<_>>()?;
                most = most.max(requests.len());
                while !requests.is_empty() {
                    let request = requests.swap_remove(random.below(requests.len() as u64) as usize);
                    let data = vec![(request.offset / 4096) as u8; request.len as usize];
                    if structured {
                        let (first, second) = data.split_at(1000);
                        let at = |offset: u64, data: &[u8]| [&offset.to_be_bytes()[..], data].concat();
                        peer.chunk(request.cookie, 0, CHUNK_DATA, &at(request.offset + 1000, second));
                        peer.chunk(request.cookie, CHUNK_DONE, CHUNK_DATA, &at(request.offset, first));
                    } else {
                        peer.simple(request.cookie, 0, &data);
                    }
                }
            }
            Some(most)
        });
        let disk = open_disk(&server.address, WRITE, None).unwrap();
        let barrier = std::sync::Barrier::new(CALLERS);
        std::thread::scope(|scope| {
            for caller in 0..CALLERS {
                let (disk, barrier) = (&disk, &barrier);
                scope.spawn(move || {
                    for _ in 0..20 {
                        let mut bytes = [0xff; 4096];
                        read_bytes(&**disk, caller as u64 * 4096, &mut bytes).unwrap();
                        assert!(bytes.iter().all(|byte| *byte == caller as u8), "caller {caller}");
                        barrier.wait();
                    }
                });
            }
        });
        assert_eq!(server.result(), CALLERS);
    }
}

#[test]
fn everybody_who_waits_fails_when_the_connection_is_lost() {
    let server = Server::start(|mut peer, _| {
        peer.negotiate(&Offer::default())?;
        for _ in 0..8 {
            peer.request()?;
        }
        None::<()>
    });
    let disk = open_disk(&server.address, WRITE, None).unwrap();
    std::thread::scope(|scope| {
        for caller in 0..8u64 {
            let disk = &disk;
            scope.spawn(move || {
                let error = write_bytes(&**disk, caller * 4096, &[1; 4096]).unwrap_err();
                assert_eq!(error.kind(), DiskErrorKind::Io);
                assert!(error.to_string().contains("connection to the NBD server was lost"), "{error}");
            });
        }
    });
}

/// Repeats until it works, as long as a reconnection may take.
fn eventually(mut action: impl FnMut() -> Result<(), crate::DiskError>) {
    let end = Instant::now() + Duration::from_secs(20);
    while let Err(error) = action() {
        assert!(Instant::now() < end, "{error}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn a_server_that_comes_back_with_nothing_lost_is_used_again() {
    let disk = Arc::new(std::sync::Mutex::new(vec![0; 1 << 20]));
    let server = Server::start(move |mut peer, number| {
        peer.negotiate(&Offer::default())?;
        // The first two connections end after two requests each.
        if number < 2 {
            for _ in 0..2 {
                let request = peer.request()?;
                if request.command == 1 {
                    let start = request.offset as usize;
                    disk.lock().unwrap()[start..start + request.data.len()].copy_from_slice(&request.data);
                }
                peer.simple(request.cookie, 0, &[]);
            }
        } else {
            peer.serve(&mut disk.lock().unwrap(), false);
        }
        Some(())
    });
    let disk = open_disk(&server.address, WRITE, None).unwrap();
    for place in 0..2u64 {
        eventually(|| write_bytes(&*disk, place * 512, &[place as u8 + 1; 512]));
        disk.flush().unwrap();
        server.result();
    }
    let mut bytes = [0; 1024];
    eventually(|| read_bytes(&*disk, 0, &mut bytes));
    assert!(bytes[..512].iter().all(|b| *b == 1) && bytes[512..].iter().all(|b| *b == 2));
    disk.flush().unwrap();
}

#[test]
fn a_flush_does_not_vouch_for_writes_of_a_lost_connection() {
    let server = Server::start(|mut peer, number| {
        peer.negotiate(&Offer::default())?;
        if number == 0 {
            let request = peer.request()?;
            peer.simple(request.cookie, 0, &[]);
        } else {
            peer.serve(&mut vec![0; 1 << 20], false);
        }
        Some(())
    });
    let disk = open_disk(&server.address, WRITE, None).unwrap();
    write_bytes(&*disk, 0, &[1; 512]).unwrap();
    server.result();
    // The connection works again, but that write may be gone.
    eventually(|| read_bytes(&*disk, 0, &mut [0; 512]));
    for _ in 0..3 {
        let error = disk.flush().unwrap_err();
        assert_eq!(error.kind(), DiskErrorKind::Io);
        assert!(error.to_string().contains("may be gone"), "{error}");
    }
}

#[test]
fn a_failed_flush_is_followed_by_failed_ones() {
    let server = Server::start(|mut peer, _| {
        peer.negotiate(&Offer::default())?;
        let request = peer.request()?;
        peer.simple(request.cookie, 5, &[]);
        peer.serve(&mut vec![0; 1 << 20], false);
        Some(())
    });
    let disk = open_disk(&server.address, WRITE, None).unwrap();
    assert!(disk.flush().is_err());
    write_bytes(&*disk, 0, &[1; 512]).unwrap();
    assert!(disk.flush().is_err());
}

#[test]
fn an_export_that_changed_is_not_taken_for_the_same() {
    let server = Server::start(|mut peer, number| {
        let size = if number == 0 { 1 << 20 } else { 2 << 20 };
        peer.negotiate(&Offer { size, ..Offer::default() })?;
        Some(())
    });
    let disk = open_disk(&server.address, WRITE, None).unwrap();
    server.result();
    let error = read_bytes(&*disk, 0, &mut [0; 512]).unwrap_err();
    assert_eq!(error.kind(), DiskErrorKind::Io);
    assert!(error.to_string().contains("another size"), "{error}");
}

#[test]
fn while_the_server_is_away_requests_fail_at_once() {
    let server = Server::start(|mut peer, _| {
        peer.negotiate(&Offer::default())?;
        Some(())
    });
    let disk = open_disk(&server.address, WRITE, None).unwrap();
    server.result();
    std::fs::remove_file(&server.socket).unwrap();
    let start = Instant::now();
    let mut texts = Vec::new();
    for _ in 0..100 {
        texts.push(read_bytes(&*disk, 0, &mut [0; 512]).unwrap_err().to_string());
    }
    assert!(start.elapsed() < Duration::from_secs(5));
    assert!(texts[0].contains("cannot be reached"), "{}", texts[0]);
    assert!(texts[99].contains("is not back yet"), "{}", texts[99]);
}

#[test]
fn without_flush_every_change_is_forced() {
    let flags = HAS_FLAGS | SEND_FUA | SEND_TRIM | SEND_WRITE_ZEROES;
    let server = Server::start(move |mut peer, _| {
        peer.negotiate(&Offer { flags, ..Offer::default() })?;
        Some(peer.serve(&mut vec![0; 1 << 20], false))
    });
    let disk = open_disk(&server.address, WRITE, None).unwrap();
    write_bytes(&*disk, 0, &[1; 512]).unwrap();
    disk.write_zeroes(0, 512, false).unwrap();
    disk.write_zeroes(0, 512, true).unwrap();
    disk.discard(0, 512).unwrap();
    disk.flush().unwrap();
    drop(disk);
    let list: Vec<_> = server.result().iter().map(|request| (request.command, request.flags)).collect();
    assert_eq!(list, [(1, FLAG_FUA), (6, FLAG_FUA | FLAG_NO_HOLE), (6, FLAG_FUA), (4, FLAG_FUA)]);
}

#[test]
fn abilities_are_those_of_the_export() {
    let open = |flags: u16, options: OpenOptions| {
        let server = misbehaving(Offer { flags, ..Offer::default() }, |_, _| {});
        open_disk(&server.address, options, None).unwrap().capabilities()
    };
    let all = open(Offer::default().flags, WRITE);
    assert!(!all.read_only && all.discard.is_some() && all.write_zeroes.is_some());
    let none = open(HAS_FLAGS | SEND_FLUSH, WRITE);
    assert!(!none.read_only && none.discard.is_none() && none.write_zeroes.is_none());
    let reading = open(Offer::default().flags, READ);
    assert!(reading.read_only && reading.discard.is_none() && reading.write_zeroes.is_none());
    assert!(open(HAS_FLAGS | READ_ONLY, READ).read_only);
}

#[test]
fn blocks_and_limits_of_the_server_are_kept_to() {
    for (go, blocks) in [(true, Some([4096, 8192, 12288])), (true, None), (false, None)] {
        let offer = Offer { blocks, go, ..Offer::default() };
        let server = Server::start(move |mut peer, _| {
            peer.negotiate(&offer)?;
            let mut disk = random_bytes(&mut Random::new(5), 1 << 20);
            Some((peer.serve(&mut disk, false), disk))
        });
        let disk = open_disk(&server.address, WRITE, None).unwrap();
        let mut model = random_bytes(&mut Random::new(5), 1 << 20);
        let mut random = Random::new(3);
        for _ in 0..300 {
            let offset = random.below(1 << 20);
            let len = (1 + random.below(50_000)).min((1 << 20) - offset);
            let range = offset as usize..(offset + len) as usize;
            match random.below(3) {
                0 => {
                    let bytes = random_bytes(&mut random, len);
                    write_bytes(&*disk, offset, &bytes).unwrap();
                    model[range].copy_from_slice(&bytes);
                }
                1 => {
                    disk.write_zeroes(offset, len, true).unwrap();
                    model[range].fill(0);
                }
                _ => {
                    let mut bytes = vec![0; len as usize];
                    read_bytes(&*disk, offset, &mut bytes).unwrap();
                    assert!(bytes == model[range]);
                }
            }
        }
        drop(disk);
        let (requests, found) = server.result();
        assert!(found == model);
        let unit = if !go { 512 } else { blocks.map_or(1, |blocks| blocks[0]) };
        let most = blocks.map_or(u32::MAX, |blocks| blocks[2]);
        for request in requests {
            assert!(request.offset.is_multiple_of(u64::from(unit)) && request.len.is_multiple_of(unit));
            assert!(request.len <= most && request.len != 0, "{request:?}");
        }
    }
}
