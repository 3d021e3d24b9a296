use super::*;
use crate::testing::{Wires, garbage_ports, inb, outb};

struct Bench {
    pic: Arc<Pic>,
    cpu: Arc<Wires>,
    m: Arc<dyn PortDevice>,
    s: Arc<dyn PortDevice>,
}

/// A pair initialized as PC firmware does: vectors 0x20 and 0x28, nothing masked.
fn bench_with(icw4: u8) -> Bench {
    let (pic, cpu) = (Pic::new(), Wires::new());
    pic.connect_cpu(cpu.clone());
    let b = Bench { m: pic.master_ports(), s: pic.slave_ports(), pic, cpu };
    for (chip, base, icw3) in [(&b.m, 0x20, 4), (&b.s, 0x28, 2)] {
        outb(&**chip, 0, 0x11);
        for v in [base, icw3, icw4, 0] {
            outb(&**chip, 1, v);
        }
    }
    b
}

fn bench() -> Bench {
    bench_with(1)
}

impl Bench {
    fn edge(&self, irq: u32) {
        self.pic.set_irq(irq, true);
        self.pic.set_irq(irq, false);
    }
    fn int(&self) -> bool {
        self.cpu.high(0)
    }
    fn ack(&self) -> u8 {
        self.pic.acknowledge()
    }
    fn isr(&self, chip: &Arc<dyn PortDevice>) -> u8 {
        outb(&**chip, 0, 0x0b);
        inb(&**chip, 0)
    }
}

#[test]
fn an_edge_interrupts_once_and_waits_for_the_end_of_higher_ones() {
    let b = bench();
    b.edge(3);
    assert!(b.int());
    assert_eq!(b.ack(), 0x23);
    assert!(!b.int());
    b.edge(4);
    assert!(!b.int(), "lower priority waits");
    b.edge(1);
    assert!(b.int(), "higher priority does not");
    assert_eq!(b.ack(), 0x21);
    assert_eq!(b.isr(&b.m), 0b1010);
    outb(&*b.m, 0, 0x20);
    assert_eq!(b.isr(&b.m), 0b1000);
    assert!(!b.int());
    outb(&*b.m, 0, 0x63);
    assert_eq!(b.ack(), 0x24);
}

#[test]
fn slave_interrupts_come_through_the_cascade() {
    let b = bench();
    b.edge(8);
    b.edge(12);
    assert_eq!(b.ack(), 0x28);
    assert_eq!((b.isr(&b.m), b.isr(&b.s)), (4, 1));
    assert!(!b.int());
    outb(&*b.s, 0, 0x20);
    outb(&*b.m, 0, 0x20);
    assert_eq!(b.ack(), 0x2c);
}

#[test]
fn auto_eoi_on_both_chips_delivers_everything_in_turn() {
    let b = bench_with(3);
    b.edge(8);
    b.edge(9);
    b.edge(1);
    assert_eq!((b.ack(), b.ack(), b.ack()), (0x21, 0x28, 0x29));
    assert_eq!((b.isr(&b.m), b.isr(&b.s), b.int()), (0, 0, false));
}

#[test]
fn level_inputs_interrupt_again_until_the_wire_is_low() {
    let b = bench();
    let elcr = b.pic.elcr_ports();
    outb(&*elcr, 0, 0xff);
    outb(&*elcr, 1, 0xff);
    assert_eq!((inb(&*elcr, 0), inb(&*elcr, 1)), (0xf8, 0xde));
    b.pic.set_irq(5, true);
    assert_eq!(b.ack(), 0x25);
    outb(&*b.m, 0, 0x20);
    assert!(b.int());
    assert_eq!(b.ack(), 0x25);
    b.pic.set_irq(5, false);
    outb(&*b.m, 0, 0x20);
    assert!(!b.int());
}

#[test]
fn a_request_that_vanished_is_spurious_and_leaves_no_trace() {
    let b = bench();
    outb(&*b.pic.elcr_ports(), 0, 0xff);
    b.pic.set_irq(5, true);
    b.pic.set_irq(5, false);
    assert!(!b.int());
    assert_eq!((b.ack(), b.isr(&b.m)), (0x27, 0));
    b.edge(10);
    outb(&*b.s, 1, 0xff);
    assert!(!b.int(), "the slave took its request back");
    assert_eq!((b.ack(), b.isr(&b.m), b.isr(&b.s)), (0x27, 0, 0));
}

#[test]
fn masks_hold_requests_back() {
    let b = bench();
    outb(&*b.m, 1, 0x08);
    b.edge(3);
    assert!(!b.int());
    assert!(!b.pic.request_pending(3));
    outb(&*b.m, 1, 0);
    assert!(b.int() && b.pic.request_pending(3));
    assert_eq!(inb(&*b.m, 1), 0);
}

#[test]
fn special_mask_mode_lets_lower_priorities_through() {
    let b = bench();
    b.edge(1);
    assert_eq!(b.ack(), 0x21);
    outb(&*b.m, 0, 0x68);
    outb(&*b.m, 1, 0x02);
    b.edge(6);
    assert_eq!(b.ack(), 0x26);
    outb(&*b.m, 0, 0x48);
    b.edge(7);
    assert!(!b.int());
}

#[test]
fn rotation_moves_priorities() {
    let b = bench();
    outb(&*b.m, 0, 0xc4);
    b.edge(0);
    b.edge(5);
    assert_eq!(b.ack(), 0x25, "input 5 is on top after 'set priority 4'");
    outb(&*b.m, 0, 0xa0);
    b.edge(5);
    assert_eq!(b.ack(), 0x20, "rotated to the bottom by its EOI");
    let b = bench_with(3);
    outb(&*b.m, 0, 0x80);
    b.edge(3);
    assert_eq!(b.ack(), 0x23);
    b.edge(3);
    b.edge(4);
    assert_eq!(b.ack(), 0x24);
}

#[test]
fn polling_acknowledges() {
    let b = bench();
    b.edge(6);
    outb(&*b.m, 0, 0x0c);
    assert_eq!(inb(&*b.m, 0), 0x86);
    assert_eq!(b.isr(&b.m), 0x40);
    outb(&*b.m, 0, 0x0c);
    assert_eq!(inb(&*b.m, 1), 0, "nothing more");
}

#[test]
fn special_fully_nested_master_takes_a_second_slave_interrupt() {
    let b = bench_with(0x11);
    b.edge(12);
    assert_eq!(b.ack(), 0x2c);
    b.edge(9);
    assert!(b.int());
    assert_eq!(b.ack(), 0x29);
}

#[test]
fn state_survives_a_round_trip() {
    let b = bench();
    b.edge(3);
    b.ack();
    b.edge(9);
    b.edge(1);
    outb(&*b.m, 0, 0x11);
    outb(&*b.m, 1, 0x40);
    let saved = b.pic.save();
    let other = Pic::new();
    let cpu = Wires::new();
    other.connect_cpu(cpu.clone());
    other.restore(&saved);
    assert_eq!(other.save(), saved);
    outb(&*other.master_ports(), 1, 4);
    outb(&*other.master_ports(), 1, 1);
    other.set_irq(1, true);
    assert_eq!((cpu.high(0), other.acknowledge()), (true, 0x41));
    other.restore(&PicStateV1::default());
    assert!(!cpu.high(0));
}

#[test]
fn garbage_is_survived() {
    let b = bench();
    let elcr = b.pic.elcr_ports();
    garbage_ports(&*b.m, 2, 1, |rng| {
        b.pic.set_irq(rng.below(40) as u32, rng.below(2) == 0);
        outb(&*b.s, rng.below(2) as u16, rng.next() as u8);
        outb(&*elcr, rng.below(2) as u16, rng.next() as u8);
        b.ack();
    });
    b.pic.reset();
    for irq in 0..16 {
        b.pic.set_irq(irq, false);
    }
    assert_eq!(inb(&*b.m, 1), 0);
}
