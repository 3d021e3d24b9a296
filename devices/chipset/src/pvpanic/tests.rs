use super::*;
use crate::testing::{Requests, garbage_ports, inb, outb};

#[test]
fn events_become_requests() {
    let requests = Requests::new();
    let dev = PvPanic::new(requests.clone());
    assert_eq!(inb(&*dev, 0), 7);
    outb(&*dev, 0, CRASH_LOADED);
    outb(&*dev, 0, 0x80);
    assert_eq!((requests.take(), dev.crash_kernels()), (vec![], 1));
    outb(&*dev, 0, PANICKED);
    outb(&*dev, 0, SHUTDOWN);
    assert_eq!(requests.take(), [MachineRequest::GuestPanic, MachineRequest::PowerOff]);
}

#[test]
fn garbage_is_survived() {
    let requests = Requests::new();
    let dev = PvPanic::new(requests.clone());
    garbage_ports(&*dev, 1, 10, |_| {
        requests.take();
    });
    assert_eq!(inb(&*dev, 0), 7);
}
