use super::*;
use crate::testing::{Time, Wires, garbage_ports, inb, outb};

struct Bench {
    time: Time,
    rtc: Arc<Rtc>,
    wires: Arc<Wires>,
}

fn bench() -> Bench {
    let (time, wires) = (Time::new(), Wires::new());
    let config = RtcConfig { low_memory: 0xc000_0000, high_memory: 5 << 30, cpus: 4 };
    let rtc = Rtc::new(&time.timers, &InputGate::live(), wires.line(8), config);
    Bench { time, rtc, wires }
}

impl Bench {
    fn r(&self, index: u8) -> u8 {
        outb(&*self.rtc, 0, index);
        inb(&*self.rtc, 1)
    }
    fn w(&self, index: u8, value: u8) {
        outb(&*self.rtc, 0, index);
        outb(&*self.rtc, 1, value);
    }
    fn date(&self) -> [u8; 8] {
        [CENTURY, 9, 8, 7, 6, 4, 2, 0].map(|i| self.r(i))
    }
}

#[test]
fn shows_wall_clock_time_in_every_format() {
    let b = bench();
    assert_eq!(b.date(), [0x20, 0x24, 0x02, 0x28, 0x04, 0x23, 0x59, 0x50]);
    b.w(0x0b, 0x06);
    assert_eq!(b.date(), [20, 24, 2, 28, 4, 23, 59, 50]);
    b.w(0x0b, 0x00);
    assert_eq!(b.r(4), 0x91, "11 pm");
    b.w(0x0b, 0x02);
    b.time.run(15 * SECOND);
    assert_eq!(b.date(), [0x20, 0x24, 0x02, 0x29, 0x05, 0x00, 0x00, 0x05], "a leap year");
    b.w(0x0b, 0x00);
    assert_eq!(b.r(4), 0x12, "12 am");
    assert_eq!((b.r(0x0d), inb(&*b.rtc, 0)), (0x80, 0xff));
}

#[test]
fn the_guest_sets_the_time_with_set_or_byte_by_byte() {
    let b = bench();
    b.w(0x0b, 0x82);
    for (i, v) in [(0, 0x30), (2, 0x15), (4, 0x08), (7, 0x01), (8, 0x01), (9, 0x99), (CENTURY, 0x19)] {
        b.w(i, v);
    }
    b.time.run(5 * SECOND);
    assert_eq!(b.r(0), 0x30, "held");
    b.w(0x0b, 0x02);
    b.time.run(2 * SECOND);
    assert_eq!(b.date(), [0x19, 0x99, 0x01, 0x01, 0x06, 0x08, 0x15, 0x32]);
    b.w(2, 0x59);
    b.time.run(28 * SECOND);
    assert_eq!((b.r(4), b.r(2), b.r(0)), (0x09, 0x00, 0x00));
}

#[test]
fn leaving_divider_reset_starts_half_a_second_before_the_update() {
    let b = bench();
    b.w(0x0a, 0x76);
    b.w(0, 0x10);
    b.time.run(3 * SECOND);
    b.w(0x0a, 0x26);
    b.time.run(SECOND / 2 - 1);
    assert_eq!(b.r(0), 0x10);
    b.time.run(1);
    assert_eq!(b.r(0), 0x11);
}

#[test]
fn update_in_progress_precedes_the_second() {
    let b = bench();
    b.time.run(SECOND - UIP_LEAD - 1);
    assert_eq!(b.r(0x0a), 0x26);
    b.time.run(1);
    assert_eq!((b.r(0x0a), b.r(0)), (0xa6, 0x50));
    b.time.run(UIP_LEAD);
    assert_eq!((b.r(0x0a), b.r(0)), (0x26, 0x51));
}

#[test]
fn update_interrupt_comes_each_second_once_it_is_acknowledged() {
    let b = bench();
    b.w(0x0b, 0x12);
    b.time.run(3 * SECOND + 1);
    assert_eq!(b.wires.edges(8), 1);
    assert_eq!(b.r(0x0c) & 0x90, 0x90);
    assert!(!b.wires.high(8));
    b.time.run(SECOND);
    assert_eq!((b.wires.edges(8), b.r(0x0c) & 0x90, b.r(0x0c)), (1, 0x90, 0));
    b.w(0x0b, 0x92);
    assert_eq!(b.r(0x0b), 0x82, "SET takes UIE away");
}

#[test]
fn alarm_matches_with_wildcards() {
    let b = bench();
    for (i, v) in [(5, 0x00), (3, 0x00), (1, 0x05)] {
        b.w(i, v);
    }
    b.w(0x0b, 0x22);
    b.time.run(15 * SECOND - 1);
    assert_eq!(b.wires.edges(8), 0);
    b.time.run(1);
    assert_eq!((b.wires.edges(8), b.r(0x0c) & 0xa0), (1, 0xa0));
    for (i, v) in [(5, 0xff), (3, 0xff), (1, 0x07)] {
        b.w(i, v);
    }
    for _ in 0..3 {
        b.time.run(60 * SECOND);
        assert_eq!((b.wires.edges(8), b.r(0x0c) & 0xa0), (1, 0xa0));
    }
    b.w(1, 0x99);
    b.time.run(SECOND * 86_400);
    assert_eq!(b.wires.edges(8), 0, "never matches");
}

#[test]
fn periodic_interrupt_has_the_rate_of_register_a() {
    let b = bench();
    b.w(0x0a, 0x26);
    b.w(0x0b, 0x42);
    let mut count = 0;
    let mut left = SECOND;
    while left > 0 {
        let step = left.min(100_000);
        b.time.run(step);
        left -= step;
        if b.wires.high(8) {
            count += 1;
            b.r(0x0c);
        }
    }
    assert_eq!(count, 1024);
    b.w(0x0a, 0x20);
    b.r(0x0c);
    b.time.run(SECOND);
    assert_eq!(b.r(0x0c) & 0x40, 0);
}

#[test]
fn memory_tells_firmware_the_sizes() {
    let b = bench();
    let word = |i: u8| u32::from(b.r(i)) | u32::from(b.r(i + 1)) << 8;
    assert_eq!((word(0x15), word(0x17), word(0x30)), (640, 0xffff, 0xffff));
    assert_eq!(word(0x34), 0xbf00);
    assert_eq!(word(0x5b), (5u32 << 30 >> 16) & 0xffff);
    assert_eq!((b.r(0x5d), b.r(0x5f)), ((5u64 << 14 >> 16) as u8, 3));
    b.w(0x0f, 0x0a);
    b.rtc.reset();
    assert_eq!(b.r(0x0f), 0x0a, "shutdown status survives a reset");
    outb(&*b.rtc, 2, 5);
    outb(&*b.rtc, 3, 77);
    outb(&*b.rtc, 6, 0x85);
    assert_eq!((inb(&*b.rtc, 3), b.r(5)), (77, 0));
    assert!(!b.rtc.nmi_masked());
    outb(&*b.rtc, 0, 0x8f);
    assert!(b.rtc.nmi_masked());
}

#[test]
fn state_survives_a_round_trip() {
    let b = bench();
    b.w(4, 0x11);
    b.w(0x0b, 0x12);
    b.w(0x40, 0x99);
    b.time.run(SECOND);
    let saved = b.rtc.save();
    let c = bench();
    c.time.run(SECOND);
    c.rtc.restore(&saved);
    assert_eq!(c.rtc.save(), saved);
    assert!(c.wires.high(8));
    assert_eq!(c.date(), b.date());
    c.r(0x0c);
    c.wires.edges(8);
    c.time.run(SECOND);
    assert_eq!(c.wires.edges(8), 1);
}

#[test]
fn garbage_is_survived() {
    let b = bench();
    garbage_ports(&*b.rtc, 8, 4, |rng| {
        b.w(rng.below(14) as u8, rng.next() as u8);
        b.time.jump(rng.below(1_500_000_000));
    });
    b.w(0x0a, 0x26);
    b.w(0x0b, 0x02);
    assert!(b.r(0) & 0x0f < 10);
}
