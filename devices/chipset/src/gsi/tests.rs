use atoll_machine::bus::MmioDevice;
use atoll_machine::interrupt::ExtIntSource;

use super::*;
use crate::testing::{MsiLog, Random, Wires, outb};

struct Bench {
    gsi: Arc<Gsi>,
    pic: Arc<Pic>,
    cpu: Arc<Wires>,
    msi: Arc<MsiLog>,
}

/// PIC with vectors 0x20 and 0x28, IOAPIC pin n edge-triggered at vector 0x40 + n (level from 16 up).
fn bench() -> Bench {
    let (pic, ioapic) = (Pic::new(), IoApic::new());
    let (cpu, msi) = (Wires::new(), Arc::new(MsiLog::default()));
    pic.connect_cpu(cpu.clone());
    ioapic.connect_cpu(msi.clone());
    for (ports, base) in [(pic.master_ports(), 0x20), (pic.slave_ports(), 0x28)] {
        outb(&*ports, 0, 0x11);
        for v in [base, 4, 3, 0] {
            outb(&*ports, 1, v);
        }
    }
    for pin in 0..PINS as u32 {
        let level = if pin >= 16 { 0x8000 } else { 0 };
        ioapic.mmio_write(0, &(0x10 + pin * 2).to_le_bytes());
        ioapic.mmio_write(0x10, &((0x40 + pin) | level).to_le_bytes());
    }
    Bench { gsi: Gsi::new(pic.clone(), ioapic), pic, cpu, msi }
}

impl Bench {
    fn vectors(&self) -> Vec<u32> {
        self.msi.take().iter().map(|m| m.data & 0xff).collect()
    }
}

#[test]
fn the_timer_is_irq_0_and_pin_2() {
    let b = bench();
    for gsi in [0, 2] {
        b.gsi.input(gsi).pulse();
        assert!(b.cpu.high(0) && b.gsi.request_pending(2));
        assert_eq!((b.pic.acknowledge(), b.vectors()), (0x20, vec![0x42]));
        assert!(!b.gsi.request_pending(2));
    }
}

#[test]
fn isa_interrupts_reach_both_controllers() {
    let b = bench();
    let line = b.gsi.input(12);
    line.set(true);
    assert_eq!((b.pic.acknowledge(), b.vectors()), (0x2c, vec![0x4c]));
    line.set(true);
    assert!(!b.cpu.high(0) && b.vectors().is_empty(), "no second edge");
}

#[test]
fn shared_wires_stay_high_until_the_last_owner_lets_go() {
    let b = bench();
    let (x, y) = (b.gsi.input(20), b.gsi.input(20));
    x.set(true);
    assert_eq!(b.vectors(), [0x54]);
    y.set(true);
    x.set(false);
    assert!(b.vectors().is_empty());
    y.set(false);
    x.set(true);
    assert!(b.vectors().is_empty(), "remote IRR is still set");
}

#[test]
fn pirq_routes_lead_to_the_pic() {
    let b = bench();
    outb(&*b.pic.elcr_ports(), 1, 0x08);
    let line = b.gsi.input(21);
    line.set(true);
    assert!(!b.cpu.high(0));
    b.gsi.route_pirq(5, Some(11));
    assert!(b.cpu.high(0));
    assert_eq!(b.pic.acknowledge(), 0x2b);
    b.gsi.route_pirq(5, None);
    assert!(!b.cpu.high(0));
    b.gsi.route_pirq(5, Some(8));
    b.gsi.route_pirq(99, Some(11));
    assert!(!b.cpu.high(0), "IRQ 8 cannot be a PCI interrupt");
}

#[test]
fn state_survives_a_round_trip() {
    let b = bench();
    let (x, _y) = (b.gsi.input(20), b.gsi.input(4));
    b.gsi.route_pirq(4, Some(10));
    x.set(true);
    let saved = b.gsi.save();
    let c = bench();
    let (x, _y) = (c.gsi.input(20), c.gsi.input(4));
    c.gsi.restore(&saved);
    assert_eq!(c.gsi.save(), saved);
    assert!(c.vectors().is_empty(), "restoring is silent");
    x.set(false);
    x.set(true);
    assert_eq!(c.vectors(), [0x54]);
    assert_eq!(c.pic.acknowledge(), 0x2a);
}

#[test]
fn any_sequence_of_levels_keeps_the_count_right() {
    let b = bench();
    let lines: Vec<_> = (0..30).map(|i| b.gsi.input(i)).chain((0..30).map(|i| b.gsi.input(i))).collect();
    let mut rng = Random::new(5);
    for _ in 0..100_000 {
        lines[rng.below(60) as usize].set(rng.below(2) == 0);
        b.gsi.route_pirq(rng.below(10) as usize, Some(rng.below(20) as u8));
        b.gsi.set_line(rng.below(70) as u32, rng.below(2) == 0);
    }
    for line in &lines {
        line.set(false);
    }
    assert_eq!(lock(&b.gsi.inner).high, [0; PINS]);
}
