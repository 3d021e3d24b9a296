use atoll_pci::swizzle;

use super::*;
use crate::testing::Random;

#[test]
fn enumeration_finds_the_functions_and_both_mechanisms_agree() {
    let b = Board::new();
    b.assign();
    let ids: Vec<_> = [(0, 0, 0), (0, 31, 0), (0, 28, 0), (1, 0, 0), (0, 1, 0)]
        .map(|(bus, device, function)| Bdf::new(bus, device, function))
        .iter()
        .map(|&bdf| {
            let mut b4 = [0; 4];
            let at = ECAM + (u64::from(bdf.bus) << 20) + (u64::from(bdf.devfn) << 12);
            b.memory.mmio_read(at, &mut b4);
            assert_eq!(u32::from_le_bytes(b4), b.config_read(bdf, 0));
            u32::from_le_bytes(b4)
        })
        .collect();
    assert_eq!(ids, [0x29c0_8086, 0x2918_8086, 0x000c_1b36, 0x25ab_8086, u32::MAX]);
    let bar = u64::from(b.config_read(Bdf::new(1, 0, 0), 0x10));
    let window = b.config_read(Bdf::new(0, 28, 0), 0x20);
    assert!((u64::from(window & 0xfff0) << 16..=u64::from(window >> 16 | 0xf) << 16).contains(&bar));
    let mut reload = [0xaa; 2];
    b.memory.mmio_read(bar + 0xc, &mut reload);
    assert_eq!(reload, [0, 0], "the watchdog answers where it was placed");
}

#[test]
fn a_key_stroke_on_the_serial_line_reaches_both_controllers() {
    let b = Board::new();
    for (port, value) in [(0x20, 0x11), (0x21, 0x20), (0x21, 4), (0x21, 1), (0x21, 0xef)] {
        b.outb(port, value);
    }
    b.memory.mmio_write(ioapic::BASE, &[0x18]);
    b.memory.mmio_write(ioapic::BASE + 0x10, &0x34u32.to_le_bytes());
    b.outb(0x3fc, 8);
    b.outb(0x3f9, 1);
    assert_eq!(b.uart.receive(b"x"), 1);
    assert_eq!(*b.world.messages.lock().unwrap(), [Msi { address: 0xfee0_0000, data: 0x34 }]);
    assert_eq!(b.pic.acknowledge(), 0x24);
}

#[test]
fn guests_can_end_the_machine_in_every_documented_way() {
    let b = Board::new();
    b.outb(0xcf9, 0x02);
    b.outb(0xcf9, 0x06);
    b.outb(0x64, 0xfe);
    b.ports.write(0x604, &0x2001u16.to_le_bytes());
    b.outb(0x505, 1);
    use MachineRequest::{GuestPanic, PowerOff, Reset};
    assert_eq!(*b.world.requests.lock().unwrap(), [Reset, Reset, PowerOff, GuestPanic]);
}

#[test]
fn the_whole_board_survives_a_round_trip() {
    let b = Board::new();
    b.assign();
    b.outb(0x43, 0x34);
    b.outb(0x40, 0x9c);
    b.outb(0x40, 0x2e);
    b.outb(0x64, 0xd4);
    b.uart.receive(b"typed ahead");
    b.clock.advance(15_000_000);
    b.timers.expire();
    let saved = b.save();
    let c = Board::new();
    c.clock.advance(15_000_000);
    for ((name, section), payload) in c.sections.iter().zip(&saved) {
        section.check_section(payload).unwrap();
        section.restore_section(payload).unwrap_or_else(|e| panic!("{name}: {e}"));
    }
    for (((name, _), now), then) in c.sections.iter().zip(c.save()).zip(&saved) {
        assert_eq!(now, *then, "{name}");
    }
    assert_eq!(c.timers.next_deadline(), b.timers.next_deadline());
    assert_eq!(c.config_read(Bdf::new(1, 0, 0), 0), 0x25ab_8086);
}

#[test]
fn corrupt_saved_states_are_refused_or_harmless() {
    let b = Board::new();
    let saved = b.save();
    let mut seed = 99u64;
    for round in 0..2000 {
        for ((_, section), payload) in b.sections.iter().zip(&saved) {
            let mut payload = payload.clone();
            for _ in 0..=round % 4 {
                seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                if !payload.is_empty() {
                    let at = (seed >> 33) as usize % payload.len();
                    payload[at] = (seed >> 20) as u8;
                }
            }
            let _ = section.restore_section(&payload);
        }
        b.clock.advance(seed >> 36);
        b.timers.expire();
        b.outb(0x43, (seed >> 40) as u8);
        b.outb(0x40, (seed >> 48) as u8);
    }
}

#[test]
fn garbage_on_every_port_and_register_is_survived() {
    let b = Board::new();
    b.assign();
    let mut rng = Random::new(17);
    for _ in 0..1000 {
        let script: Vec<u8> = (0..9 * 1000).map(|_| rng.next() as u8).collect();
        b.play(&script);
    }
    assert_eq!(b.config_read(Bdf::new(0, 0, 0), 0), 0x29c0_8086);
}

#[test]
fn a_dropped_board_leaves_nothing_behind() {
    let b = Board::new();
    b.assign();
    let (root, memory) = (Arc::downgrade(&b.root), Arc::downgrade(&b.memory));
    let (ports, world) = (Arc::downgrade(&b.ports), Arc::downgrade(&b.world));
    drop(b);
    assert_eq!((root.strong_count(), memory.strong_count(), ports.strong_count()), (0, 0, 0));
    assert_eq!(world.strong_count(), 0);
}

#[test]
fn intx_of_devices_behind_ports_lands_on_pci_wires() {
    for device in 0..32 {
        for pin in 0..4 {
            assert!((16..24).contains(&intx_gsi(device, swizzle(0, pin))));
        }
    }
}
