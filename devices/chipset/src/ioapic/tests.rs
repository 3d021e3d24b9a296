use super::*;
use crate::testing::{MsiLog, garbage_mmio};

fn bench() -> (Arc<IoApic>, Arc<MsiLog>) {
    let (ioapic, log) = (IoApic::new(), Arc::new(MsiLog::default()));
    ioapic.connect_cpu(log.clone());
    (ioapic, log)
}

fn read(ioapic: &IoApic, index: u8) -> u32 {
    ioapic.mmio_write(0, &u32::from(index).to_le_bytes());
    let mut b = [0; 4];
    ioapic.mmio_read(0x10, &mut b);
    u32::from_le_bytes(b)
}

fn write(ioapic: &IoApic, index: u8, value: u32) {
    ioapic.mmio_write(0, &u32::from(index).to_le_bytes());
    ioapic.mmio_write(0x10, &value.to_le_bytes());
}

fn program(ioapic: &IoApic, pin: u8, entry: u64) {
    write(ioapic, 0x11 + pin * 2, (entry >> 32) as u32);
    write(ioapic, 0x10 + pin * 2, entry as u32);
}

#[test]
fn identifies_itself() {
    let (io, _) = bench();
    assert_eq!(read(&io, 1), 0x0017_0020);
    write(&io, 0, u32::MAX);
    assert_eq!((read(&io, 0), read(&io, 2)), (0x0f00_0000, 0x0f00_0000));
    assert_eq!(read(&io, 0x10), 0x1_0000, "masked at reset");
    assert_eq!(read(&io, 0x40), 0, "no such entry");
}

#[test]
fn edges_send_one_message_each_and_masked_ones_are_lost() {
    let (io, log) = bench();
    program(&io, 4, 0x0300_0000_0000_0934);
    io.set_line(4, true);
    assert_eq!(log.take(), vec![Msi { address: 0xfee0_300c, data: 0x134 }]);
    io.set_line(4, true);
    assert!(log.take().is_empty());
    write(&io, 0x18, 0x1_0934);
    io.set_line(4, false);
    io.set_line(4, true);
    write(&io, 0x18, 0x0934);
    assert!(log.take().is_empty());
    io.set_line(4, false);
    io.set_line(4, true);
    assert_eq!(log.take().len(), 1);
}

#[test]
fn level_is_sent_again_after_eoi_while_high() {
    let (io, log) = bench();
    program(&io, 20, 0x8055);
    io.set_line(20, true);
    assert_eq!(log.take(), vec![Msi { address: 0xfee0_0000, data: 0xc055 }]);
    assert_eq!(read(&io, 0x10 + 40), 0xc055, "remote IRR");
    io.set_line(20, false);
    io.set_line(20, true);
    assert!(log.take().is_empty());
    io.end_of_interrupt(0x54);
    assert!(log.take().is_empty());
    io.end_of_interrupt(0x55);
    assert_eq!(log.take().len(), 1);
    io.set_line(20, false);
    io.mmio_write(0x40, &0x55u32.to_le_bytes());
    assert!(log.take().is_empty());
    assert_eq!(read(&io, 0x10 + 40), 0x8055);
}

#[test]
fn unmasking_a_high_level_pin_sends_it() {
    let (io, log) = bench();
    program(&io, 17, 0x1_8060);
    io.set_line(17, true);
    assert!(log.take().is_empty());
    write(&io, 0x10 + 34, 0x8060);
    assert_eq!(log.take().len(), 1);
    write(&io, 0x10 + 34, 0x1_0060);
    write(&io, 0x10 + 34, 0x8060);
    assert_eq!(log.take().len(), 1, "a detour through edge mode clears remote IRR");
}

#[test]
fn one_vector_on_two_pins_ends_both() {
    let (io, log) = bench();
    program(&io, 16, 0x8070);
    program(&io, 18, 0x8070);
    io.set_line(16, true);
    io.set_line(18, true);
    assert_eq!(log.take().len(), 2);
    io.end_of_interrupt(0x70);
    assert_eq!(log.take().len(), 2);
}

#[test]
fn state_survives_a_round_trip() {
    let (io, _) = bench();
    program(&io, 20, 0x0700_0000_0000_8055);
    io.set_line(20, true);
    io.set_line(3, true);
    let saved = io.save();
    let (other, log) = bench();
    other.restore(&saved);
    assert_eq!(other.save(), saved);
    assert!(log.take().is_empty());
    other.end_of_interrupt(0x55);
    assert_eq!(log.take().len(), 1);
    other.reset();
    assert_eq!(read(&other, 0x10 + 40), 0x1_0000);
}

#[derive(Default)]
struct RouteLog(Mutex<Vec<(u32, Option<Msi>)>>);

impl IoApicRoutes for RouteLog {
    fn set_route(&self, pin: u32, msi: Option<Msi>) {
        lock(&self.0).push((pin, msi));
    }
}

#[test]
fn level_entries_are_announced_once_and_masks_change_nothing() {
    let (io, _) = bench();
    program(&io, 9, 0x0100_0000_0000_8061);
    let routes = Arc::new(RouteLog::default());
    io.connect_routes(routes.clone());
    let take = || std::mem::take(&mut *lock(&routes.0));
    assert_eq!(take(), [(9, Some(Msi { address: 0xfee0_1000, data: 0xc061 }))], "what was there before");
    write(&io, 0x10 + 18, 0x1_8061);
    program(&io, 4, 0x0031);
    assert_eq!(take(), [], "a mask and an edge-triggered pin");
    write(&io, 0x10 + 18, 0x8062);
    assert_eq!(take(), [(9, Some(Msi { address: 0xfee0_1000, data: 0xc062 }))]);
    write(&io, 0x10 + 18, 0x62);
    assert_eq!(take(), [(9, None)]);
    program(&io, 23, 0x8070);
    let saved = io.save();
    take();
    io.reset();
    assert_eq!(take(), [(23, None)]);
    io.restore(&saved);
    assert_eq!(take(), [(23, Some(Msi { address: 0xfee0_0000, data: 0xc070 }))]);
}

#[test]
fn garbage_is_survived() {
    let (io, log) = bench();
    garbage_mmio(&*io, SIZE, 2, |rng| {
        io.mmio_write(0, &[rng.next() as u8]);
        io.mmio_write(0x10, &(rng.next() as u32).to_le_bytes());
        io.set_line(rng.below(64) as u32, rng.below(2) == 0);
        io.end_of_interrupt(rng.next() as u8);
        log.take();
    });
    assert_eq!(read(&io, 1), VERSION);
}
