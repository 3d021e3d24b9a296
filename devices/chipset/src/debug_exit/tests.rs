use super::*;
use crate::testing::{Requests, garbage_ports, inb};

#[test]
fn the_value_arrives_whatever_its_width() {
    let requests = Requests::new();
    let dev = DebugExit::new(requests.clone());
    dev.port_write(0, &[0x10]);
    dev.port_write(0, &[0x34, 0x12]);
    dev.port_write(0, &[1, 2, 3, 4]);
    let values: Vec<_> = requests.take();
    let exit = |value| MachineRequest::DebugExit { value };
    assert_eq!(values, [exit(0x10), exit(0x1234), exit(0x0403_0201)]);
    assert_eq!(inb(&*dev, 0), 0);
}

#[test]
fn garbage_is_survived() {
    let requests = Requests::new();
    let dev = DebugExit::new(requests.clone());
    garbage_ports(&*dev, PORTS, 11, |_| {
        requests.take();
    });
    assert_eq!(inb(&*dev, 0), 0);
}
