use super::*;
use crate::testing::{Requests, Wires, garbage_ports, inb, outb};

struct Bench {
    dev: Arc<I8042>,
    data: Arc<dyn PortDevice>,
    command: Arc<dyn PortDevice>,
    wires: Arc<Wires>,
    requests: Arc<Requests>,
}

fn bench() -> Bench {
    let (wires, requests) = (Wires::new(), Requests::new());
    let dev = I8042::new(wires.line(1), wires.line(12), requests.clone(), InputGate::live());
    Bench { data: dev.data_port(), command: dev.command_port(), dev, wires, requests }
}

impl Bench {
    fn cmd(&self, value: u8) {
        outb(&*self.command, 0, value);
    }
    fn w(&self, value: u8) {
        outb(&*self.data, 0, value);
    }
    fn status(&self) -> u8 {
        inb(&*self.command, 0)
    }
    /// Everything that waits in the output buffer.
    fn drain(&self) -> Vec<u8> {
        let mut bytes = Vec::new();
        while self.status() & STATUS_FULL != 0 {
            bytes.push(inb(&*self.data, 0));
        }
        bytes
    }
    fn keyboard(&self, value: u8) -> Vec<u8> {
        self.w(value);
        self.drain()
    }
    fn mouse(&self, value: u8) -> Vec<u8> {
        self.cmd(0xd4);
        self.w(value);
        self.drain()
    }
    fn mode(&self, mode: u8) {
        self.cmd(0x60);
        self.w(mode);
    }
}

#[test]
fn controller_passes_its_tests_and_keeps_its_mode() {
    let b = bench();
    for (command, reply) in [(0xaa, 0x55), (0xab, 0), (0xa9, 0), (0x20, 0x45), (0xd0, 0x03), (0xc0, 0x80)] {
        b.cmd(command);
        assert_eq!(b.drain(), [reply], "command {command:#x}");
    }
    b.mode(0x03);
    b.cmd(0x20);
    assert_eq!(b.drain(), [0x03]);
    b.cmd(0xa7);
    b.cmd(0xad);
    b.cmd(0x20);
    assert_eq!(b.drain(), [0x33]);
    assert_eq!(inb(&*b.data, 0), 0, "nothing there");
}

#[test]
fn keyboard_answers_commands() {
    let b = bench();
    b.mode(0x01);
    assert_eq!(b.keyboard(0xff), [0xfa, 0xaa]);
    assert_eq!(b.keyboard(0xf2), [0xfa, 0xab, 0x83]);
    assert_eq!(b.keyboard(0xee), [0xee]);
    assert_eq!((b.keyboard(0xed), b.keyboard(7)), (vec![0xfa], vec![0xfa]));
    assert_eq!((b.keyboard(0xf0), b.keyboard(0)), (vec![0xfa], vec![0xfa, 2]));
    assert_eq!(b.keyboard(0x01), [0xfe]);
    b.mode(0x41);
    assert_eq!(b.keyboard(0xf2), [0xfa, 0xab, 0x41]);
}

#[test]
fn keys_are_translated_and_each_byte_is_an_edge() {
    let b = bench();
    b.dev.key(&[0xe0, 0x75]);
    b.dev.key(&[0xe0, 0xf0, 0x75]);
    b.dev.key(&[0x1c, 0xf0, 0x1c]);
    assert_eq!(b.wires.edges(1), 1);
    assert_eq!(b.drain(), [0xe0, 0x48, 0xe0, 0xc8, 0x1e, 0x9e]);
    assert_eq!(b.wires.edges(1), 5);
    assert!(!b.wires.high(1));
    b.mode(0x00);
    b.dev.key(&[0x1c]);
    assert_eq!((b.wires.edges(1), b.drain()), (0, vec![0x1c]));
    b.keyboard(0xf5);
    b.dev.key(&[0x1c]);
    assert!(b.drain().is_empty());
}

#[test]
fn the_mouse_loop_test_raises_irq_12() {
    let b = bench();
    b.mode(0x47);
    b.cmd(0xd3);
    b.w(0x5a);
    assert_eq!(b.status() & 0x21, 0x21);
    assert_eq!((b.wires.edges(12), b.drain()), (1, vec![0x5a]));
    b.cmd(0xd2);
    b.w(0xa5);
    assert_eq!((b.status() & 0x21, b.drain()), (0x01, vec![0xa5]));
}

#[test]
fn the_mouse_answers_commands_and_the_wheel_knock() {
    let b = bench();
    assert_eq!(b.mouse(0xff), [0xfa, 0xaa, 0x00]);
    assert_eq!(b.mouse(0xf2), [0xfa, 0x00]);
    for rate in [200, 100, 80] {
        assert_eq!((b.mouse(0xf3), b.mouse(rate)), (vec![0xfa], vec![0xfa]));
    }
    assert_eq!(b.mouse(0xf2), [0xfa, 0x03]);
    assert_eq!(b.mouse(0xe9), [0xfa, 0x00, 2, 80]);
    assert_eq!(b.mouse(0x77), [0xfc]);
    b.dev.pointer(1, 1, 0, 0);
    assert!(b.drain().is_empty(), "not reporting yet");
    b.mouse(0xf4);
    b.dev.pointer(5, -3, 1, 1);
    assert_eq!(b.drain(), [0x29, 5, 0xfd, 1]);
    b.dev.pointer(300, 0, 0, 0);
    assert_eq!(b.drain(), [0x08, 255, 0, 0, 0x08, 45, 0, 0]);
}

#[test]
fn reset_lines_reset_the_machine() {
    let b = bench();
    b.cmd(0xff);
    assert!(b.requests.take().is_empty());
    b.cmd(0xfe);
    assert_eq!(b.requests.take(), [MachineRequest::Reset]);
    b.cmd(0xd1);
    b.w(0xdf);
    assert!(b.requests.take().is_empty(), "A20 alone");
    b.cmd(0xd1);
    b.w(0xde);
    assert_eq!(b.requests.take(), [MachineRequest::Reset]);
}

#[test]
fn state_survives_a_round_trip() {
    let b = bench();
    b.mode(0x47);
    b.mouse(0xf4);
    b.dev.key(&[0x1c, 0xf0, 0x1c]);
    b.dev.pointer(9, 9, 0, 2);
    b.cmd(0xd4);
    let saved = b.dev.save();
    let c = bench();
    c.dev.restore(&saved);
    assert_eq!(c.dev.save(), saved);
    assert!(c.wires.high(1));
    c.w(0xf2);
    assert_eq!(c.drain(), [0x1e, 0x9e, 0x0a, 9, 9, 0xfa, 0x00]);
    c.dev.reset();
    assert_eq!((c.status(), c.wires.high(12)), (0x14, false));
}

#[test]
fn garbage_is_survived() {
    let b = bench();
    garbage_ports(&*b.data, 1, 7, |rng| {
        b.cmd(rng.next() as u8);
        b.status();
        b.dev.key(&[rng.next() as u8; 3]);
        b.dev.pointer(rng.next() as i32, rng.next() as i32, rng.next() as i32, rng.next() as u8);
        b.requests.take();
    });
    b.dev.reset();
    b.cmd(0xaa);
    assert_eq!(b.drain(), [0x55]);
}
