use super::*;
use crate::testing::{Wires, garbage_ports, inb, outb};

#[derive(Default)]
struct Line {
    out: Mutex<Vec<u8>>,
    ready: AtomicU64,
}
impl SerialBackend for Line {
    fn write(&self, bytes: &[u8]) {
        self.out.lock().unwrap().extend(bytes);
    }
    fn input_ready(&self) {
        self.ready.fetch_add(1, Ordering::Relaxed);
    }
}

struct Bench {
    uart: Arc<Uart>,
    line: Arc<Line>,
    wires: Arc<Wires>,
}

fn bench() -> Bench {
    let (line, wires) = (Arc::new(Line::default()), Wires::new());
    Bench { uart: Uart::new(line.clone(), InputGate::live(), wires.line(4)), line, wires }
}

impl Bench {
    fn r(&self, register: u16) -> u8 {
        inb(&*self.uart, register)
    }
    fn w(&self, register: u16, value: u8) {
        outb(&*self.uart, register, value);
    }
    fn irq(&self) -> bool {
        self.wires.high(4)
    }
}

#[test]
fn what_the_guest_sends_arrives_in_order() {
    let b = bench();
    for byte in b"hello\n" {
        assert_eq!(b.r(5) & LSR_EMPTY, LSR_EMPTY);
        b.w(0, *byte);
    }
    assert_eq!(*b.line.out.lock().unwrap(), b"hello\n");
    assert_eq!(b.uart.metrics(), UartMetrics { sent: 6, received: 0 });
}

#[test]
fn a_driver_finds_a_16550a() {
    let b = bench();
    b.w(7, 0x5a);
    assert_eq!(b.r(7), 0x5a);
    b.w(1, 0xff);
    assert_eq!(b.r(1), 0x0f);
    b.w(1, 0);
    assert_eq!(b.r(2), 0x01);
    b.w(2, 1);
    assert_eq!(b.r(2), 0xc1);
    b.w(3, 0x83);
    b.w(0, 1);
    b.w(1, 2);
    assert_eq!((b.r(0), b.r(1)), (1, 2));
    b.w(3, 3);
    assert_eq!((b.r(1), b.r(6)), (0, 0xb0));
}

#[test]
fn transmit_interrupt_comes_when_enabled_and_after_each_byte() {
    let b = bench();
    b.w(4, MCR_OUT2);
    b.w(1, IER_TRANSMIT);
    assert!(b.irq());
    assert_eq!(b.r(2) & 15, 2);
    assert!(!b.irq() && b.r(2) & 15 == 1);
    b.w(0, b'x');
    assert!(b.irq());
    b.w(4, 0);
    assert!(!b.irq(), "OUT2 disconnects the wire");
}

#[test]
fn input_interrupts_by_trigger_level_or_timeout() {
    let b = bench();
    b.w(2, 0x81);
    b.w(4, MCR_OUT2);
    b.w(1, IER_RECEIVED);
    assert_eq!(b.uart.receive(b"1234567"), 7);
    assert!(b.irq());
    assert_eq!(b.r(2), 0xcc);
    b.uart.receive(b"8");
    assert_eq!(b.r(2), 0xc4);
    let read: Vec<u8> = (0..8).map(|_| b.r(0)).collect();
    assert_eq!(read, b"12345678");
    assert!(!b.irq());
    assert_eq!(b.r(5), LSR_EMPTY);
}

#[test]
fn a_full_port_refuses_and_asks_again() {
    let b = bench();
    assert_eq!(b.uart.receive(&[7; 3000]), INPUT_CAPACITY);
    assert_eq!(b.uart.receive(&[7]), 0);
    for _ in 0..INPUT_CAPACITY / 2 - 1 {
        b.r(0);
    }
    assert_eq!(b.line.ready.load(Ordering::Relaxed), 0);
    b.r(0);
    b.r(0);
    assert_eq!(b.line.ready.load(Ordering::Relaxed), 1);
    assert_eq!(b.uart.receive(&[7; 3000]), INPUT_CAPACITY / 2 + 1);
}

#[test]
fn loopback_connects_outputs_to_inputs() {
    let b = bench();
    b.w(4, MCR_LOOP | 0x0a);
    assert_eq!(b.r(6), 0x90 | 0x02, "DSR fell");
    b.w(4, MCR_LOOP | 0x05);
    assert_eq!(b.r(6) & 0xf0, 0x60);
    b.w(0, b'a');
    assert_eq!((b.r(5) & 1, b.r(0)), (1, b'a'));
    b.w(0, b'b');
    b.w(0, b'c');
    assert_eq!((b.r(5) & LSR_OVERRUN, b.r(5) & LSR_OVERRUN), (LSR_OVERRUN, 0));
    assert!(b.line.out.lock().unwrap().is_empty());
}

#[test]
fn clearing_the_fifo_drops_what_is_in_it() {
    let b = bench();
    b.w(2, 1);
    b.uart.receive(b"0123456789abcdefXY");
    b.w(2, 3);
    assert_eq!((b.r(0), b.r(0), b.r(5) & 1), (b'X', b'Y', 0));
}

#[test]
fn state_survives_a_round_trip() {
    let b = bench();
    b.w(2, 0x81);
    b.w(3, 3);
    b.w(4, MCR_OUT2 | 3);
    b.w(1, 5);
    b.w(7, 9);
    b.uart.receive(b"abc");
    let saved = b.uart.save();
    let c = bench();
    c.uart.restore(&saved);
    assert_eq!(c.uart.save(), saved);
    assert!(c.irq());
    assert_eq!((c.r(0), c.r(7)), (b'a', 9));
    c.uart.reset();
    assert_eq!((c.irq(), c.r(5)), (false, LSR_EMPTY));
}

#[test]
fn garbage_is_survived() {
    let b = bench();
    garbage_ports(&*b.uart, 8, 6, |rng| {
        b.uart.receive(&vec![rng.next() as u8; rng.below(2000) as usize]);
        b.line.out.lock().unwrap().clear();
    });
    b.uart.reset();
    b.w(0, b'!');
    assert_eq!(b.line.out.lock().unwrap().last(), Some(&b'!'));
}
