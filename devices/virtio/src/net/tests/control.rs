use super::*;

const OTHER: [u8; 6] = [0x52, 0x54, 0, 0, 0, 9];
const GROUP: [u8; 6] = [0x33, 0x33, 0, 0, 0, 1];

fn table(unicast: &[[u8; 6]], multicast: &[[u8; 6]]) -> Vec<u8> {
    let mut bytes = (unicast.len() as u32).to_le_bytes().to_vec();
    bytes.extend(unicast.concat());
    bytes.extend((multicast.len() as u32).to_le_bytes());
    bytes.extend(multicast.concat());
    bytes
}

#[test]
fn configuration_describes_the_device() {
    let options = NetOptions { mtu: Some(9000), queue_pairs: 3, ..NetOptions::new(OWN) };
    let b = Plan { pairs: 4, options, ..Plan::default() }.build();
    assert_eq!(b.driver.pci_read(0), 0x1041_1af4);
    assert_eq!(b.driver.pci_read(8) >> 8, 0x02_0000);
    assert_eq!(b.driver.config::<6>(0), OWN.0);
    assert_eq!(b.driver.config::<2>(6), [1, 0]);
    assert_eq!(b.driver.config::<2>(8), [3, 0]);
    assert_eq!(b.driver.config::<2>(10), 9000u16.to_le_bytes());
    assert_eq!(b.driver.config::<4>(12), [0; 4]);
    assert_ne!(b.driver.offered() & features::MQ, 0);
    assert_eq!(b.driver.read16(0x12), 7);
    b.driver.config_write(0, &[0; 8]);
    assert_eq!(b.driver.config::<6>(0), OWN.0, "the address is set by a command");
    let small = NetOptions { mtu: Some(1), ..NetOptions::new(OWN) };
    assert_eq!(Plan { options: small, ..Plan::default() }.build().net.mtu(), Some(MIN_MTU));
}

#[test]
fn commands_that_cannot_be_meant_are_refused_and_change_nothing() {
    let mut b = Plan::pairs(2).build();
    let before = b.net.save();
    let long = vec![0; 70_000];
    let mut short_table = table(&[OTHER], &[GROUP]);
    short_table.pop();
    let mut long_table = table(&[OTHER], &[GROUP]);
    long_table.push(0);
    let huge_table = u32::MAX.to_le_bytes();
    let bad: Vec<(u8, u8, &[u8])> = vec![
        (0, 0, &[]),
        (0, 0, &[0, 0]),
        (0, 6, &[1]),
        (1, 0, &[]),
        (1, 0, &short_table),
        (1, 0, &long_table),
        (1, 0, &huge_table),
        (1, 0, &long),
        (1, 1, &[0x52, 0x54, 0, 0, 0]),
        (1, 1, &GROUP),
        (1, 1, &[0; 6]),
        (1, 2, &OTHER),
        (2, 0, &[1]),
        (2, 0, &[0, 0x10]),
        (2, 2, &[1, 0]),
        (3, 0, &[0]),
        (3, 1, &[]),
        (4, 0, &[0, 0]),
        (4, 0, &[3, 0]),
        (4, 0, &[1]),
        (4, 1, &[1, 0]),
        (5, 0, &[0; 4]),
        (5, 0, &[0xff; 8]),
        (5, 0, &[1, 0, 0, 0, 0, 0, 0, 0]),
        (5, 1, &[0; 8]),
        (6, 0, &[0; 8]),
        (255, 255, &[]),
    ];
    for (class, command, data) in &bad {
        let answer = b.command(*class, *command, data);
        assert_eq!(answer, 1, "class {class} command {command} with {} bytes", data.len());
        assert_eq!(b.net.save(), before);
    }
    assert_eq!(b.metrics().controls_refused, bad.len() as u64);
    assert!(!b.driver.needs_reset());
}

#[test]
fn classes_that_were_not_negotiated_are_refused() {
    let good: [(u64, u8, u8, &[u8]); 7] = [
        (features::CTRL_RX, 0, 0, &[0]),
        (features::CTRL_RX_EXTRA, 0, 2, &[1]),
        (features::CTRL_MAC_ADDR, 1, 1, &OTHER),
        (features::CTRL_VLAN, 2, 0, &[5, 0]),
        (features::GUEST_ANNOUNCE, 3, 0, &[]),
        (features::MQ, 4, 0, &[2, 0]),
        (features::CTRL_GUEST_OFFLOADS, 5, 0, &[0; 8]),
    ];
    for (feature, class, command, data) in good {
        assert_eq!(Plan::pairs(2).build().command(class, command, data), 0, "class {class}");
        let setup = Setup { features: !feature, ..Setup::default() };
        let mut b = Plan { setup, ..Plan::pairs(2) }.build();
        assert_eq!(b.command(class, command, data), 1, "class {class}");
    }
}

#[test]
fn a_chain_that_is_no_command_stops_the_device() {
    for pieces in [vec![out(0, 3)], vec![out(0, 1), into(0x1000, 1)], vec![into(0x1000, 1)]] {
        let mut b = Bench::new();
        b.driver.add(b.control, &pieces);
        b.driver.kick(b.control as u16);
        assert!(b.driver.needs_reset(), "{pieces:?}");
    }
}

#[test]
fn the_driver_chooses_what_it_receives() {
    let mut b = Bench::new();
    for _ in 0..8 {
        b.post(0, &[2048]);
    }
    b.driver.kick(0);
    let seen = |b: &mut Bench| {
        [OWN.0, OTHER, GROUP, [0xff; 6]].map(|to| {
            b.arrive(&PLAIN, &frame_to(to, 60, 0));
            b.received(0).is_some()
        })
    };
    assert_eq!(seen(&mut b), [true; 4], "until it says otherwise");
    assert_eq!(b.command(0, 0, &[0]), 0);
    assert_eq!(seen(&mut b), [true, false, false, true]);
    assert_eq!(b.command(0, 1, &[1]), 0);
    assert_eq!(seen(&mut b), [true, false, true, true]);
    assert_eq!(b.command(0, 1, &[0]), 0);
    assert_eq!(b.command(1, 0, &table(&[OTHER], &[GROUP])), 0);
    assert_eq!(seen(&mut b), [true, true, true, true]);
    assert_eq!(b.command(1, 0, &table(&[], &[[1; 6]; 2000])), 0);
    assert_eq!(seen(&mut b), [true, false, true, true], "a table too long to keep lets all of its kind pass");
    assert_eq!(b.command(0, 5, &[1]), 0);
    assert_eq!(b.command(1, 1, &OTHER), 0);
    assert_eq!(seen(&mut b), [false, true, true, false]);
    assert_eq!(b.driver.config::<6>(0), OTHER);
    assert_eq!(b.net.mac(), MacAddress(OTHER));
    b.driver.reset();
    assert_eq!(b.driver.config::<6>(0), OWN.0);
    assert_eq!(b.metrics().receive_filtered, 2 + 1 + 1 + 2);
}

#[test]
fn a_vlan_is_received_once_it_is_added() {
    let mut b = Bench::new();
    b.post(0, &[2048]);
    b.driver.kick(0);
    b.command(0, 0, &[0]);
    let mut tagged = frame(64, 0);
    tagged[12..16].copy_from_slice(&[0x81, 0, 0, 42]);
    b.arrive(&PLAIN, &tagged);
    assert_eq!(b.received(0), None);
    assert_eq!(b.command(2, 0, &[42, 0]), 0);
    b.arrive(&PLAIN, &tagged);
    assert_eq!(b.received(0).unwrap().frame, tagged);
    assert_eq!(b.command(2, 1, &[42, 0]), 0);
    b.arrive(&PLAIN, &tagged);
    assert_eq!(b.received(0), None);
}

#[test]
fn guest_offloads_reach_the_port_and_bind_at_once() {
    let mut b = Bench::new();
    assert_eq!(b.peer.other_receive_offloads(), EVERYTHING);
    b.post(0, &[4096]);
    b.driver.kick(0);
    // A frame of the old kind waits in the port.
    b.peer.send_bytes(0, &large(SegmentKind::Tcp4, false), &frame(2000, 0));
    assert_eq!(b.command(5, 0, &features::GUEST_CSUM.to_le_bytes()), 0);
    b.turn();
    assert_eq!(b.received(0), None);
    assert_eq!(b.peer.other_receive_offloads(), Offloads { checksum: true, ..Offloads::NONE });
    b.arrive(&OPEN, &frame(100, 0));
    assert_eq!(b.received(0).unwrap().header, OPEN);
    // Segments without their checksum make no sense: none are asked for.
    assert_eq!(b.command(5, 0, &features::GUEST_TSO4.to_le_bytes()), 0);
    assert_eq!(b.peer.other_receive_offloads(), Offloads::NONE);
    assert_eq!(b.command(5, 0, &features::GUEST_OFFLOADS.to_le_bytes()), 0);
    assert_eq!(b.peer.other_receive_offloads(), EVERYTHING);
    b.driver.reset();
    assert_eq!(b.peer.other_receive_offloads(), Offloads::NONE);
}

#[test]
fn receive_queues_in_use_share_the_ports_pairs() {
    let mut b = Plan::pairs(4).build();
    for pair in 0..4 {
        for _ in 0..8 {
            b.post(2 * pair, &[2048]);
        }
        b.driver.kick(2 * pair as u16);
    }
    // Which queue got the frame of each of the port's pairs.
    let places = |b: &mut Bench| {
        [0, 1, 2, 3].map(|pair| {
            b.peer.send_bytes(pair, &PLAIN, &frame(60, pair as u8));
            b.turn();
            let end = Instant::now() + Duration::from_secs(10);
            loop {
                for queue in 0..4 {
                    if let Some(arrival) = b.received(2 * queue) {
                        assert_eq!(arrival.frame, frame(60, pair as u8));
                        return queue;
                    }
                }
                assert!(Instant::now() < end, "the frame of pair {pair} is lost");
            }
        })
    };
    assert_eq!(places(&mut b), [0, 0, 0, 0], "one queue until the driver asks for more");
    assert_eq!(b.command(4, 0, &[4, 0]), 0);
    assert_eq!(places(&mut b), [0, 1, 2, 3]);
    assert_eq!(b.command(4, 0, &[3, 0]), 0);
    assert_eq!(places(&mut b), [0, 1, 2, 0]);
    // What waits in a queue that falls out of use moves on.
    for seed in 0..12 {
        b.peer.send_bytes(2, &PLAIN, &frame(60, seed));
    }
    b.turn();
    assert_eq!(b.command(4, 0, &[2, 0]), 0);
    let mut seen = Vec::new();
    for queue in [2, 0] {
        while seen.len() < 12 {
            let arrival = match queue {
                2 => b.received(4),
                _ => Some(b.wait_received(0)),
            };
            let Some(arrival) = arrival else { break };
            seen.push(arrival.frame);
        }
    }
    assert_eq!(seen, (0..12).map(|seed| frame(60, seed)).collect::<Vec<_>>());
    // Each transmit queue has its own pair of the port.
    for pair in 0..4 {
        b.queue_frame(2 * pair + 1, &PLAIN, &frame(60, pair as u8));
        b.driver.kick(2 * pair as u16 + 1);
        assert_eq!(b.peer.receive_bytes(pair as u16).unwrap().1, frame(60, pair as u8));
    }
}

#[test]
fn the_control_queue_follows_the_first_pair_of_a_driver_without_multiqueue() {
    let setup = Setup { features: !features::MQ, ..Setup::default() };
    let mut b = Plan { setup, ..Plan::pairs(4) }.build();
    assert_eq!(b.control, 2);
    assert_eq!(b.command(1, 1, &OTHER), 0);
    let mut b = Plan::pairs(4).build();
    assert_eq!(b.control, 8);
    assert_eq!(b.command(1, 1, &OTHER), 0);
}
