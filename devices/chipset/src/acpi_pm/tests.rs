use super::*;
use crate::testing::{Requests, Time, Wires, garbage_ports, inb, inl, outb};

struct Bench {
    time: Time,
    pm: Arc<AcpiPm>,
    wires: Arc<Wires>,
    requests: Arc<Requests>,
}

fn bench() -> Bench {
    let (time, wires, requests) = (Time::new(), Wires::new(), Requests::new());
    let pm = AcpiPm::new(&time.timers, &InputGate::live(), wires.line(9), requests.clone(), true);
    Bench { time, pm, wires, requests }
}

impl Bench {
    fn w16(&self, offset: u16, value: u16) {
        self.pm.port_write(offset, &value.to_le_bytes());
    }
    fn r16(&self, offset: u16) -> u16 {
        let mut b = [0; 2];
        self.pm.port_read(offset, &mut b);
        u16::from_le_bytes(b)
    }
}

#[test]
fn the_timer_counts_guest_time() {
    let b = bench();
    b.time.run(1_000_000_000);
    assert_eq!(inl(&*b.pm, 8), TIMER_FREQUENCY as u32);
    b.time.run(1_200_000_000_000);
    assert_eq!(inl(&*b.pm, 8), (TIMER_FREQUENCY * 1201) as u32);
}

#[test]
fn timer_carry_raises_the_sci_when_enabled() {
    let b = bench();
    b.time.run(600_000_000_000);
    assert_eq!((b.r16(0) & 1, b.wires.high(9)), (1, false));
    b.w16(0, 1);
    b.w16(2, 1);
    b.time.run(599_000_000_000);
    assert!(!b.wires.high(9));
    b.time.run(2_000_000_000);
    assert!(b.wires.high(9));
    b.w16(0, 1);
    assert_eq!((b.wires.high(9), b.r16(0)), (false, 0));
}

#[test]
fn power_button_and_events_obey_enable_and_sci_en() {
    let b = bench();
    b.pm.press_power_button();
    assert_eq!((b.r16(0), b.wires.high(9)), (0x100, false));
    b.w16(2, 0x120);
    assert!(b.wires.high(9));
    outb(&*b.pm.smi_ports(), 0, ACPI_DISABLE);
    assert_eq!((b.wires.high(9), b.r16(4)), (false, 0));
    outb(&*b.pm.smi_ports(), 0, ACPI_ENABLE);
    assert_eq!((b.wires.high(9), inb(&*b.pm.smi_ports(), 0)), (true, ACPI_ENABLE));
    b.w16(0, 0xffff);
    assert!(!b.wires.high(9));
    b.pm.raise_gpe(9);
    b.pm.raise_gpe(64);
    assert_eq!(b.r16(0x20), 0x200);
    b.pm.port_write(0x29, &[2]);
    assert!(b.wires.high(9));
    b.pm.port_write(0x21, &[2]);
    assert!(!b.wires.high(9));
}

#[test]
fn soft_off_powers_off_and_other_sleeps_do_not() {
    let b = bench();
    b.w16(4, 0x0001);
    b.w16(4, 5 << 10 | 1);
    b.w16(4, 1 << 10 | 1 << 13 | 1);
    assert!(b.requests.take().is_empty());
    b.w16(4, S5_SLEEP_TYPE << 10 | 1 << 13 | 1);
    assert_eq!(b.requests.take(), [MachineRequest::PowerOff]);
    assert_eq!(b.r16(4), 1, "SLP_EN reads as zero");
    b.w16(4, 7 << 10 | 1 << 13);
    assert_eq!(b.requests.take(), [MachineRequest::PowerOff]);
    b.pm.reset();
    assert_eq!(b.r16(4), 1);
}

#[test]
fn state_survives_a_round_trip() {
    let b = bench();
    b.time.run(700_000_000_000);
    b.w16(2, 0x101);
    b.pm.raise_gpe(33);
    b.pm.port_write(0x2c, &[2]);
    outb(&*b.pm.smi_ports(), 1, 7);
    let saved = b.pm.save();
    let c = bench();
    c.time.run(700_000_000_000);
    c.pm.restore(&saved);
    assert_eq!(c.pm.save(), saved);
    assert!(c.wires.high(9));
    assert_eq!(c.time.timers.next_deadline(), b.time.timers.next_deadline());
}

#[test]
fn garbage_is_survived() {
    let b = bench();
    let smi = b.pm.smi_ports();
    garbage_ports(&*b.pm, SIZE, 8, |rng| {
        outb(&*smi, rng.below(2) as u16, rng.next() as u8);
        b.pm.raise_gpe(rng.next() as u32);
        b.time.jump(rng.below(100_000_000_000));
        b.requests.take();
    });
    b.pm.reset();
    assert!(!b.wires.high(9));
}
