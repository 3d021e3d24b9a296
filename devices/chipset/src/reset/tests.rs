use super::*;
use crate::testing::{Requests, garbage_ports, inb, outb};

#[test]
fn cf9_resets_on_the_rising_reset_bit() {
    let requests = Requests::new();
    let ports = ResetControl::new(requests.clone()).cf8_ports();
    outb(&*ports, 1, 0x02);
    outb(&*ports, 0, 0x06);
    assert!(requests.take().is_empty());
    outb(&*ports, 1, 0x06);
    assert_eq!(requests.take(), [MachineRequest::Reset]);
    outb(&*ports, 1, 0x06);
    assert!(requests.take().is_empty(), "no edge");
    assert_eq!((inb(&*ports, 1), inb(&*ports, 0)), (0x06, 0xff));
}

#[test]
fn port_92_keeps_a20_and_resets_on_fast_init() {
    let requests = Requests::new();
    let port = ResetControl::new(requests.clone()).port92();
    assert_eq!(inb(&*port, 0), 2);
    outb(&*port, 0, 0);
    assert!(requests.take().is_empty());
    outb(&*port, 0, 3);
    assert_eq!(requests.take(), [MachineRequest::Reset]);
}

#[test]
fn state_survives_a_round_trip() {
    let (a, b) = (ResetControl::new(Requests::new()), ResetControl::new(Requests::new()));
    outb(&*a.cf8_ports(), 1, 0x0a);
    outb(&*a.port92(), 0, 0);
    b.restore(&a.save());
    assert_eq!((b.save(), inb(&*b.cf8_ports(), 1)), (a.save(), 0x0a));
    b.reset();
    assert_eq!(inb(&*b.port92(), 0), 2);
}

#[test]
fn garbage_is_survived() {
    let requests = Requests::new();
    let reset = ResetControl::new(requests.clone());
    let port92 = reset.port92();
    garbage_ports(&*reset.cf8_ports(), 4, 9, |rng| {
        outb(&*port92, 0, rng.next() as u8);
        requests.take();
    });
    reset.reset();
    requests.take();
    outb(&*reset.cf8_ports(), 1, FULL_RESET);
    assert_eq!(requests.take(), [MachineRequest::Reset]);
}
