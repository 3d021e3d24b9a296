use super::*;
use crate::testing::Interrupts;
use crate::transport::pci::VirtioPciDevice;

type Plugged = (Arc<VirtioPciDevice>, Arc<Interrupts>);

const NEEDS_ANNOUNCE: u8 = 3;

#[test]
fn the_link_is_pulled_and_plugged_in() {
    let mut b = Bench::new();
    b.post(0, &[2048]);
    b.driver.kick(0);
    b.driver.interrupts.take();
    b.net.set_link(false);
    b.net.set_link(false);
    assert_eq!(b.driver.interrupts.take(), [0], "one change, one interrupt");
    assert_eq!(b.driver.config::<1>(6), [0]);
    b.send(&PLAIN, &frame(60, 0));
    b.arrive(&PLAIN, &frame(60, 0));
    assert_eq!((b.peer.receive_bytes(0), b.received(0)), (None, None));
    let m = b.metrics();
    assert_eq!((m.send_link_down, m.receive_link_down), (1, 1));
    b.driver.interrupts.take();
    b.net.set_link(true);
    assert_eq!(b.driver.interrupts.take(), [0]);
    assert_eq!(b.driver.config::<1>(6), [NEEDS_ANNOUNCE]);
    assert_eq!(b.command(3, 0, &[]), 0);
    assert_eq!(b.driver.config::<1>(6), [1]);
    b.send(&PLAIN, &frame(60, 1));
    b.arrive(&PLAIN, &frame(60, 2));
    assert_eq!(b.peer.receive_bytes(0).unwrap().1, frame(60, 1));
    assert_eq!(b.received(0).unwrap().frame, frame(60, 2));
}

#[test]
fn an_announcement_is_asked_of_a_driver_that_can() {
    let b = Bench::new();
    assert!(b.net.announce());
    assert_eq!(b.driver.interrupts.take(), [0]);
    assert_eq!(b.driver.config::<1>(6), [NEEDS_ANNOUNCE]);
    let b = Plan::without(features::GUEST_ANNOUNCE).build();
    assert!(!b.net.announce());
    b.net.set_link(false);
    b.net.set_link(true);
    assert_eq!(b.driver.config::<1>(6), [1]);
}

#[test]
fn the_link_follows_the_ports_other_side() {
    let mut b = Bench::new();
    b.peer.set_other_link(false);
    b.turn();
    assert!(!b.net.link_up());
    assert_eq!(b.driver.interrupts.take(), [0]);
    b.net.set_link(false);
    b.peer.set_other_link(true);
    b.turn();
    assert!(!b.net.link_up(), "both must be up");
    b.net.set_link(true);
    assert!(b.net.link_up());
    b.driver.reset();
    assert!(b.net.link_up(), "a reset moves no cable");
}

#[test]
fn a_port_that_fails_takes_the_link_down_and_nothing_else() {
    let mut b = Bench::new();
    b.peer.fail_other("its process ended");
    // Found while sending, before the event comes.
    b.send(&PLAIN, &frame(60, 0));
    assert!(!b.net.link_up());
    assert_eq!(b.metrics().send_failed, 1);
    assert_eq!(b.driver.config::<1>(6), [0]);
    b.send(&PLAIN, &frame(60, 1));
    b.turn();
    assert_eq!(b.metrics().send_link_down, 1);
    assert_eq!(b.driver.status(), 15);
    b.driver.start(Setup::default());
    assert_eq!(b.driver.status(), 15);
}

#[test]
fn what_arrives_before_the_driver_is_there_waits_for_it() {
    let mut b = Bench::new();
    b.driver.reset();
    b.arrive(&PLAIN, &frame(60, 1));
    b.driver.start(Setup::default());
    b.post(0, &[2048]);
    b.driver.kick(0);
    assert_eq!(b.wait_received(0).frame, frame(60, 1));
}

#[test]
fn state_survives_a_round_trip() {
    let mut a = Plan::pairs(2).build();
    a.net.set_link(false);
    a.net.set_link(true);
    for (class, command, data) in [
        (0, 0, &[0][..]),
        (0, 3, &[1]),
        (1, 0, &[1, 0, 0, 0, 2, 0, 0, 0, 0, 7, 0, 0, 0, 0]),
        (1, 1, &[2, 0, 0, 0, 0, 1]),
        (2, 0, &[9, 1]),
        (4, 0, &[2, 0]),
        (5, 0, &[2, 0, 0, 0, 0, 0, 0, 0]),
    ] {
        assert_eq!(a.command(class, command, data), 0);
    }
    a.net.set_link(false);
    let saved = a.net.save();
    let b = Plan::pairs(2).build();
    b.net.restore(&saved).unwrap();
    assert_eq!(b.net.save(), saved);
    assert_eq!(b.net.mac(), MacAddress([2, 0, 0, 0, 0, 1]));
    assert!(!b.net.link_up());
    let empty = Bench::new();
    empty.net.restore(&[]).unwrap();
    assert_eq!(empty.net.mac(), OWN);
    assert!(empty.net.link_up());
    assert!(b.net.restore(&[0xff]).is_err());
    let refused = Bench::new().net.restore(&saved).unwrap_err();
    assert!(refused.to_string().contains("queue pairs"), "{refused}");
    let options = NetOptions { mtu: Some(1400), queue_pairs: 2, ..NetOptions::new(OWN) };
    let refused = Plan { options, ..Plan::pairs(2) }.build().net.restore(&saved).unwrap_err();
    assert!(refused.to_string().contains("MTU"), "{refused}");
}

#[test]
fn a_device_that_is_saved_mid_traffic_goes_on_elsewhere_without_loss() {
    const FRAMES: u32 = 400;
    // Enough that what waits for the guest never blocks the test.
    let machine = TestMachine::new();
    let (port, peer) = pair(1, FRAMES as usize);
    let port: Arc<dyn Port> = Arc::new(port);
    let mut events = EventLoop::new().unwrap();
    // The port outlives each device; its events go to the present one.
    let listener: Arc<Mutex<Option<PortListener>>> = Arc::default();
    let present = listener.clone();
    let forward = move |event| {
        let listener = lock(&present).clone();
        if let Some(listener) = listener {
            listener(event);
        }
    };
    port.watch(&events.handle(), Arc::new(forward)).unwrap();
    let plug = || {
        let net = Net::new(port.clone(), &NetOptions::new(OWN));
        *lock(&listener) = Some(net.listener());
        machine.plug(net)
    };
    let (pci, interrupts) = plug();
    let mut driver = TestDriver::attach(&machine, pci, interrupts, 0);
    driver.start(Setup::default());
    let buffers: Vec<u64> = (0..16).map(|_| driver.alloc(128, 16)).collect();
    let mut by_head = HashMap::new();
    for gpa in buffers {
        by_head.insert(driver.add(0, &[into(gpa, 128)]), gpa);
    }
    let outgoing = driver.alloc(128, 16);
    let number = |bytes: &[u8]| u32::from_le_bytes(bytes[20..24].try_into().unwrap());
    let numbered = |n: u32| {
        let mut frame = frame(60 + n as usize % 200, 0);
        frame[20..24].copy_from_slice(&n.to_le_bytes());
        frame
    };
    let (mut sent, mut arrived, mut left) = (0u32, Vec::new(), Vec::new());
    let end = Instant::now() + Duration::from_secs(30);
    for round in 0u32.. {
        assert!(Instant::now() < end, "{} of {FRAMES} arrived, {} left", arrived.len(), left.len());
        if arrived.len() as u32 == FRAMES && left.len() as u32 == FRAMES {
            break;
        }
        for _ in 0..7 {
            if sent < FRAMES {
                peer.send_bytes(0, &PLAIN, &numbered(sent));
                sent += 1;
                let mut bytes = vec![0; 12];
                bytes.extend(numbered(sent - 1));
                bytes.truncate(128);
                driver.store(outgoing, &bytes);
                driver.add(1, &[out(outgoing, bytes.len() as u32)]);
                driver.kick(1);
                assert!(driver.wait_used(1).is_some());
            }
        }
        if round % 2 == 0 {
            events.run_once(Some(Duration::ZERO)).unwrap();
        }
        while let Some((head, _)) = driver.take_used(0) {
            let gpa = by_head.remove(&head).expect("each buffer comes back once");
            let wire = driver.load(gpa, 128);
            for _ in 1..u16::from_le_bytes([wire[10], wire[11]]) {
                let (head, _) = driver.take_used(0).expect("all buffers of a frame at once");
                let other = by_head.remove(&head).expect("each buffer comes back once");
                by_head.insert(driver.add(0, &[into(other, 128)]), other);
            }
            arrived.push(number(&wire[12..]));
            by_head.insert(driver.add(0, &[into(gpa, 128)]), gpa);
        }
        driver.kick(0);
        left.extend(std::iter::from_fn(|| peer.receive_bytes(0)).map(|(_, frame)| number(&frame)));
        if round % 5 == 4 {
            driver = moved(&machine, driver, plug);
        }
    }
    assert_eq!(arrived, (0..FRAMES).collect::<Vec<_>>());
    assert_eq!(left, (0..FRAMES).collect::<Vec<_>>());
}

/// Saves the driver's device and goes on with another one in the same machine.
fn moved(machine: &TestMachine, driver: TestDriver, plug: impl Fn() -> Plugged) -> TestDriver {
    driver.pci.pause();
    let saved = driver.pci.save();
    let rings = driver.queues.clone();
    drop(driver);
    let (pci, interrupts) = plug();
    pci.restore(&saved).unwrap();
    assert_eq!(pci.save(), saved, "everything is in the saved state");
    let mut next = TestDriver::attach(machine, pci, interrupts, 0);
    next.queues = rings;
    next.pci.resume();
    next
}

#[test]
fn traffic_on_many_threads_loses_and_repeats_nothing() {
    const FRAMES: u32 = 3000;
    let b = Plan { room: 32, ..Plan::pairs(4) }.build();
    let Bench { mut driver, peer, mut events, net, control, .. } = b;
    let stop = Arc::new(AtomicBool::new(false));
    let stopped = stop.clone();
    let loop_thread = std::thread::spawn(move || {
        while !stopped.load(SeqCst) {
            events.run_once(Some(Duration::from_millis(1))).unwrap();
        }
    });
    let peer = Arc::new(peer);
    let sender = peer.clone();
    let sender = std::thread::spawn(move || {
        for n in 0..FRAMES {
            let mut bytes = frame(60 + n as usize % 900, 0);
            bytes[20..24].copy_from_slice(&n.to_le_bytes());
            let pair = (n % 4) as u16;
            while sender.send_bytes(pair, &PLAIN, &bytes) != atoll_network::Sent::Done {
                std::thread::yield_now();
            }
        }
    });
    let mut by_head = HashMap::new();
    for queue in 0..4 {
        for _ in 0..16 {
            let gpa = driver.alloc(256, 16);
            by_head.insert((queue, driver.add(2 * queue, &[into(gpa, 256)])), gpa);
        }
        driver.kick(2 * queue as u16);
    }
    let command = driver.alloc(16, 16);
    let mut arrived = vec![Vec::new(); 4];
    let (mut count, mut rounds) = (0, 0u16);
    let end = Instant::now() + Duration::from_secs(60);
    while count < FRAMES {
        assert!(Instant::now() < end, "{count} of {FRAMES} arrived: {:?}", net.metrics().snapshot());
        rounds = rounds.wrapping_add(1);
        if rounds % 16 == 0 {
            driver.store(command, &[4, 0, 1 + (rounds / 16 % 4) as u8, 0]);
            driver.add(control, &[out(command, 4), into(command + 8, 1)]);
            driver.kick(control as u16);
            assert!(driver.wait_used(control).is_some());
            assert_eq!(driver.load(command + 8, 1), [0]);
        }
        for queue in 0..4usize {
            while let Some((head, _)) = driver.take_used(2 * queue) {
                let mut gpas = vec![by_head.remove(&(queue, head)).expect("each buffer comes back once")];
                let wire = driver.load(gpas[0], 64);
                for _ in 1..u16::from_le_bytes([wire[10], wire[11]]) {
                    let (head, _) = driver.take_used(2 * queue).expect("all buffers of a frame at once");
                    gpas.push(by_head.remove(&(queue, head)).unwrap());
                }
                let n = u32::from_le_bytes(wire[32..36].try_into().unwrap());
                arrived[n as usize % 4].push(n);
                count += 1;
                for gpa in gpas {
                    by_head.insert((queue, driver.add(2 * queue, &[into(gpa, 256)])), gpa);
                }
            }
            driver.kick(2 * queue as u16);
        }
    }
    sender.join().unwrap();
    stop.store(true, SeqCst);
    loop_thread.join().unwrap();
    let mut all: Vec<u32> = arrived.concat();
    all.sort_unstable();
    assert_eq!(all, (0..FRAMES).collect::<Vec<_>>());
    assert!(!driver.needs_reset());
}
