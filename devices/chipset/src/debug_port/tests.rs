use std::sync::Mutex;

use super::*;
use crate::testing::{garbage_ports, inb, outb};

#[derive(Default)]
struct Log(Mutex<Vec<u8>>);
impl DebugSink for Log {
    fn write(&self, bytes: &[u8]) {
        self.0.lock().unwrap().extend(bytes);
    }
}

#[test]
fn prints_what_is_written_and_identifies_itself() {
    let log = Arc::new(Log::default());
    let port = DebugPort::new(log.clone());
    outb(&*port, 0, b'h');
    port.port_write(0, b"i!");
    assert_eq!((inb(&*port, 0), &**log.0.lock().unwrap()), (0xe9, &b"hi!"[..]));
}

#[test]
fn post_codes_survive_a_round_trip() {
    let (a, b) = (PostPort::new(), PostPort::new());
    outb(&*a, 0, 0x55);
    outb(&*a, 15, 0x66);
    b.restore(&a.save());
    assert_eq!((b.code(), inb(&*b, 15), b.save()), (0x55, 0x66, a.save()));
    b.reset();
    assert_eq!(b.code(), 0);
}

#[test]
fn garbage_is_survived() {
    let post = PostPort::new();
    garbage_ports(&*post, POST_PORTS, 12, |_| ());
    post.port_write(14, &[1, 2, 3, 4]);
    let mut b = [0; 4];
    post.port_read(14, &mut b);
    assert_eq!(b, [1, 2, 0xff, 0xff]);
}
