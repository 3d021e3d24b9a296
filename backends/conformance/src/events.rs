//! Events that the backend carries between guest and device threads, where it can.

use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::Duration;

use atoll_foundation::EventFd;
use atoll_machine::backend::{Backend, Doorbell, EventRoutes, Partition};
use atoll_machine::interrupt::Msi;
use iced_x86::code_asm::*;

use crate::fixture::{Access, Cells, DEVICE, Machine};
use crate::payload::{APIC, Payload};

/// A machine with a page of cells at [`DEVICE`] and its event routes; `None` where the backend has none.
#[allow(clippy::type_complexity)]
fn with_routes<B: Backend>(
    backend: &B,
) -> Option<(Machine<B::Partition>, Arc<Cells>, Arc<dyn EventRoutes>, EventFd)> {
    let machine = Machine::new(backend, 1);
    let routes = machine.partition.event_routes()?;
    let cells = Cells::new(4096, 0);
    machine.memory.map_mmio(DEVICE, 4096, cells.clone(), 0).expect("mapping a device");
    Some((machine, cells, routes, EventFd::new().expect("an eventfd")))
}

/// Writes a word of 1 and a word of 2 to the device.
fn ring(a: &mut Payload) -> crate::payload::Built {
    a.mov(rbx, DEVICE)?;
    a.mov(eax, 1u32)?;
    a.mov(word_ptr(rbx + 0x10), ax)?;
    a.mov(eax, 2u32)?;
    a.mov(word_ptr(rbx + 0x10), ax)?;
    a.exit()?;
    Ok(vec![])
}

pub(crate) fn doorbell_signals_instead_of_an_access<B: Backend>(backend: &B) {
    for width in [2, 0] {
        let Some((machine, cells, routes, event)) = with_routes(backend) else { return };
        let doorbell = Doorbell { address: DEVICE + 0x10, width, value: None };
        routes.bind_doorbell(doorbell, event.as_fd()).expect("binding");
        let mut guest = machine.long(0, ring);
        machine.finish(&mut guest);
        assert_eq!((event.drain(), cells.take_log().len()), (2, 0), "width {width}");
    }
}

pub(crate) fn doorbell_with_a_value_takes_that_value_only<B: Backend>(backend: &B) {
    let Some((machine, cells, routes, event)) = with_routes(backend) else { return };
    let doorbell = Doorbell { address: DEVICE + 0x10, width: 2, value: Some(2) };
    routes.bind_doorbell(doorbell, event.as_fd()).expect("binding");
    let mut guest = machine.long(0, ring);
    machine.finish(&mut guest);
    assert_eq!(event.drain(), 1);
    assert_eq!(cells.take_log(), [Access::Write(0x10, vec![1, 0])]);
}

pub(crate) fn unbound_doorbell_is_an_access_again<B: Backend>(backend: &B) {
    let Some((machine, cells, routes, event)) = with_routes(backend) else { return };
    let doorbell = Doorbell { address: DEVICE + 0x10, width: 2, value: None };
    routes.bind_doorbell(doorbell, event.as_fd()).expect("binding");
    routes.unbind_doorbell(doorbell, event.as_fd()).expect("unbinding");
    assert!(routes.unbind_doorbell(doorbell, event.as_fd()).is_err(), "it is not bound");
    let mut guest = machine.long(0, ring);
    machine.finish(&mut guest);
    assert_eq!((event.drain(), cells.take_log().len()), (0, 2));
}

pub(crate) fn bound_event_sends_its_message<B: Backend>(backend: &B) {
    let Some((machine, _, routes, event)) = with_routes(backend) else { return };
    let event = Arc::new(event);
    let message = |vector| Some(Msi { address: APIC, data: vector });
    let binding = routes.bind_interrupt(event.as_fd(), Msi { address: APIC, data: 0x41 }).expect("binding");
    let signal = event.clone();
    machine.on_hook(move |_, _, value| match value {
        0 => signal.signal(),
        1 => binding.set_message(message(0x42)).expect("another message"),
        _ => binding.set_message(None).expect("a mask"),
    });
    let mut guest = machine.long(0, |a| {
        a.interrupts(&[0x41, 0x42]);
        a.sti()?;
        a.hook(0xe0, 0)?;
        a.await_interrupt(0x41, 1)?;
        a.hook(0xe0, 1)?;
        a.hook(0xe0, 0)?;
        a.await_interrupt(0x42, 1)?;
        a.hook(0xe0, 2)?;
        a.hook(0xe0, 0)?;
        a.exit()?;
        Ok(vec![])
    });
    machine.finish(&mut guest);
    std::thread::sleep(Duration::from_millis(5));
    assert_eq!(machine.order(0), [0x41, 0x42], "a masked event is lost");
}

pub(crate) fn dropped_binding_sends_nothing<B: Backend>(backend: &B) {
    let Some((machine, _, routes, event)) = with_routes(backend) else { return };
    for _ in 0..50 {
        drop(routes.bind_interrupt(event.as_fd(), Msi { address: APIC, data: 0x41 }).expect("binding"));
    }
    let kept = EventFd::new().expect("an eventfd");
    let binding = routes.bind_interrupt(kept.as_fd(), Msi { address: APIC, data: 0x42 }).expect("binding");
    machine.on_hook(move |_, _, _| {
        event.signal();
        kept.signal();
        let _bound = &binding;
    });
    let mut guest = machine.long(0, |a| {
        a.interrupts(&[0x41, 0x42]);
        a.sti()?;
        a.hook(0xe0, 0)?;
        a.await_interrupt(0x42, 1)?;
        a.exit()?;
        Ok(vec![])
    });
    machine.finish(&mut guest);
    assert_eq!(machine.order(0), [0x42]);
}
