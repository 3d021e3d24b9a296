use std::sync::atomic::AtomicBool;

use super::*;
use crate::testing::{Time, Wires, garbage_ports, inb, outb};

struct Bench {
    time: Time,
    pit: Arc<Pit>,
    wires: Arc<Wires>,
    busy: Arc<AtomicBool>,
}

fn bench() -> Bench {
    let (time, wires) = (Time::new(), Wires::new());
    let busy = Arc::new(AtomicBool::new(false));
    let probe = busy.clone();
    let probe: BusyProbe = Arc::new(move || probe.load(Ordering::Relaxed));
    let pit = Pit::new(&time.timers, &InputGate::live(), wires.line(0), probe);
    Bench { time, pit, wires, busy }
}

impl Bench {
    fn program(&self, channel: u8, mode: u8, count: u16) {
        outb(&*self.pit, 3, channel << 6 | 0x30 | mode << 1);
        outb(&*self.pit, u16::from(channel), count as u8);
        outb(&*self.pit, u16::from(channel), (count >> 8) as u8);
    }
    fn count(&self, channel: u8) -> u16 {
        outb(&*self.pit, 3, channel << 6);
        let low = inb(&*self.pit, u16::from(channel));
        u16::from(low) | u16::from(inb(&*self.pit, u16::from(channel))) << 8
    }
    fn status(&self, channel: u8) -> u8 {
        outb(&*self.pit, 3, 0xe0 | 2 << channel);
        inb(&*self.pit, u16::from(channel))
    }
    /// Moves time to `ticks` input clocks after zero.
    fn at(&self, ticks: u64) {
        self.time.run(nanos(ticks).saturating_sub(self.time.clock_now()));
    }
}
impl Time {
    fn clock_now(&self) -> u64 {
        use atoll_machine::time::Clock;
        self.clock.now()
    }
}

#[test]
fn rate_generator_ticks_exactly_as_often_as_the_crystal_says() {
    let b = bench();
    b.program(0, 2, 11932);
    b.time.run(10_000_000_000);
    assert_eq!(u64::from(b.wires.edges(0)), FREQUENCY * 10 / 11932);
    assert_eq!(b.pit.metrics().made_up, 0);
}

#[test]
fn square_wave_ticks_once_a_period() {
    let b = bench();
    b.program(0, 3, 0);
    b.time.run(1_000_000_000);
    assert_eq!(u64::from(b.wires.edges(0)), FREQUENCY / 65536);
    assert_eq!(b.status(0) & 0x3f, 0x36);
}

#[test]
fn a_late_host_makes_up_for_every_tick() {
    let b = bench();
    b.program(0, 2, 1193);
    b.time.jump(100_000_000);
    assert_eq!(b.wires.edges(0), 1, "one at a time");
    b.time.run(900_000_000);
    let due = FREQUENCY / 1193;
    assert_eq!(u64::from(b.wires.edges(0)) + 1, due);
    assert!(b.pit.metrics().made_up > 50);
}

#[test]
fn a_backlog_waits_while_the_last_tick_is_unacknowledged() {
    let b = bench();
    b.program(0, 2, 11932);
    b.busy.store(true, Ordering::Relaxed);
    b.time.jump(50_000_000);
    b.time.run(5_000_000);
    assert_eq!(b.wires.edges(0), 0);
    b.busy.store(false, Ordering::Relaxed);
    b.time.run(10_000_000);
    assert_eq!(b.wires.edges(0), 6);
}

#[test]
fn terminal_count_raises_once() {
    let b = bench();
    b.program(0, 0, 1000);
    b.at(999);
    assert_eq!((b.wires.edges(0), b.status(0) >> 7, b.count(0)), (0, 0, 1));
    b.at(1000);
    assert_eq!((b.wires.edges(0), b.status(0) >> 7, b.count(0)), (1, 1, 0));
    b.at(500_000);
    assert_eq!(b.wires.edges(0), 0);
    b.program(0, 4, 100);
    b.time.run(1_000_000);
    assert_eq!(b.wires.edges(0), 1);
}

#[test]
fn counts_follow_the_clock_exactly() {
    let b = bench();
    b.program(2, 2, 1000);
    outb(&*b.pit.system_control(), 0, 1);
    for (at, value) in [(0, 1000), (1, 999), (999, 1), (1000, 1000), (2500, 500)] {
        b.at(at);
        assert_eq!(b.count(2), value, "at {at}");
    }
    b.at(3000);
    b.program(2, 3, 1000);
    for (after, value, out) in
        [(0, 1000, 1), (1, 998, 1), (499, 2, 1), (500, 1000, 0), (999, 2, 0), (1000, 1000, 1)]
    {
        b.at(3000 + after);
        assert_eq!((b.count(2), b.status(2) >> 7), (value, out), "after {after}");
    }
}

#[test]
fn bcd_counts_in_decimal() {
    let b = bench();
    outb(&*b.pit, 3, 0x31);
    outb(&*b.pit, 0, 0x00);
    outb(&*b.pit, 0, 0x10);
    b.at(1);
    assert_eq!(b.count(0), 0x0999);
    b.at(1000);
    assert_eq!((b.count(0), b.wires.edges(0)), (0, 1));
    b.at(1001);
    assert_eq!(b.count(0), 0x9999);
}

#[test]
fn the_gate_stops_and_starts_channel_2() {
    let b = bench();
    let control = b.pit.system_control();
    b.program(2, 0, 1000);
    b.at(10);
    assert_eq!(b.count(2), 1000, "gate closed at reset");
    outb(&*control, 0, 1);
    b.at(110);
    outb(&*control, 0, 0);
    b.at(1000);
    assert_eq!((b.count(2), inb(&*control, 0) & 0x20), (900, 0));
    outb(&*control, 0, 3);
    b.at(1900);
    assert_eq!(inb(&*control, 0) & 0x2f, 0x23);
    b.program(2, 1, 50);
    outb(&*control, 0, 0);
    assert_eq!(inb(&*control, 0) & 0x20, 0x20);
    outb(&*control, 0, 1);
    assert_eq!(inb(&*control, 0) & 0x20, 0, "one-shot: triggered by the rising gate");
    b.at(1951);
    assert_eq!(inb(&*control, 0) & 0x20, 0x20);
}

#[test]
fn refresh_bit_toggles_every_15_us() {
    let b = bench();
    let control = b.pit.system_control();
    let mut toggles = 0;
    let mut last = inb(&*control, 0);
    for _ in 0..1000 {
        b.time.run(1_000);
        let now = inb(&*control, 0);
        toggles += u32::from((now ^ last) & 0x10 != 0);
        last = now;
    }
    assert_eq!(toggles, 66);
}

#[test]
fn read_back_latches_status_then_count_until_read() {
    let b = bench();
    b.program(0, 2, 500);
    b.at(100);
    outb(&*b.pit, 3, 0xc2);
    b.at(200);
    outb(&*b.pit, 3, 0xc2);
    assert_eq!(inb(&*b.pit, 0), 0xb4);
    assert_eq!([inb(&*b.pit, 0), inb(&*b.pit, 0)], 400u16.to_le_bytes());
    outb(&*b.pit, 3, 0x34);
    assert_eq!(b.status(0) & 0x40, 0x40, "null count");
    assert_eq!(inb(&*b.pit, 3), 0xff);
}

#[test]
fn a_new_count_for_a_running_generator_waits_for_the_period() {
    let b = bench();
    b.program(0, 2, 1000);
    b.at(500);
    outb(&*b.pit, 0, 100);
    outb(&*b.pit, 0, 0);
    assert_eq!(b.count(0), 500);
    b.at(1050);
    assert_eq!(b.count(0), 50);
    b.at(2000);
    assert_eq!(b.wires.edges(0), 11);
}

#[test]
fn state_survives_a_round_trip() {
    let b = bench();
    b.program(0, 2, 11932);
    b.program(2, 3, 777);
    outb(&*b.pit.system_control(), 0, 1);
    b.time.run(55_000_000);
    outb(&*b.pit, 3, 0xce);
    outb(&*b.pit, 1, 9);
    let saved = b.pit.save();
    let c = bench();
    c.time.run(55_000_000);
    c.pit.restore(&saved);
    assert_eq!(c.pit.save(), saved);
    assert_eq!(c.time.timers.next_deadline(), b.time.timers.next_deadline());
    b.wires.edges(0);
    b.time.run(100_000_000);
    c.time.run(100_000_000);
    assert_eq!(c.wires.edges(0), b.wires.edges(0));
}

#[test]
fn garbage_is_survived() {
    let b = bench();
    let control = b.pit.system_control();
    garbage_ports(&*b.pit, 4, 3, |rng| {
        outb(&*control, 0, rng.next() as u8);
        inb(&*control, 0);
        b.time.jump(rng.below(3_000_000));
    });
    b.pit.reset();
    b.wires.edges(0);
    b.time.run(1_000_000_000);
    assert_eq!(b.wires.edges(0), 0);
}
