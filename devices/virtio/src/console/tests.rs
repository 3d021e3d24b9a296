use super::*;
use crate::testing::{Setup, TestDriver, TestMachine, into, out};

type Output = Arc<Mutex<Vec<u8>>>;

fn console(machine: &TestMachine) -> (Arc<Console>, Output) {
    let output = Output::default();
    let sink = output.clone();
    let sink: OutputSink = Arc::new(move |bytes| lock(&sink).extend_from_slice(bytes));
    (Console::new(sink, (80, 25), machine.inputs.clone()), output)
}

#[test]
fn output_reaches_the_sink_in_order() {
    let machine = TestMachine::new();
    let (console, output) = console(&machine);
    let mut driver = TestDriver::probe(&machine, console, 0);
    driver.start(Setup::default());
    let (a, b) = (driver.alloc_bytes(b"hello, "), driver.alloc_bytes(b"world\n"));
    driver.add(1, &[out(a, 7), out(b, 6)]);
    driver.add_indirect(1, &[out(a, 5)]);
    driver.kick(1);
    assert_eq!(*lock(&output), b"hello, world\nhello");
    assert!(driver.take_used(1).is_some() && driver.take_used(1).is_some());
    // The configuration's interrupt announces the size, once; then the queue's.
    assert_eq!(driver.interrupts.take(), [0, 2]);
}

#[test]
fn input_waits_for_buffers_and_then_for_room() {
    let machine = TestMachine::new();
    let (console, _) = console(&machine);
    let mut driver = TestDriver::probe(&machine, console.clone(), 0);
    let called = Arc::new(AtomicUsize::new(0));
    let count = called.clone();
    console.on_space(Arc::new(move || {
        count.fetch_add(1, Ordering::SeqCst);
    }));
    assert_eq!(console.receive(&[b'x'; 4000]), 4000, "input before the driver is kept");
    driver.start(Setup::default());
    assert_eq!(console.receive(&[b'y'; 200]), 96, "no more than the backlog holds");
    assert_eq!(console.receive(b"z"), 0);
    let a = driver.alloc(8192, 16);
    let head = driver.add(0, &[into(a, 4000)]);
    driver.kick(0);
    assert_eq!(driver.take_used(0), Some((head, 4000)));
    assert_eq!(called.load(Ordering::SeqCst), 1);
    assert_eq!(console.space(), 4000);
    driver.add(0, &[into(a, 8192)]);
    driver.kick(0);
    assert_eq!(driver.take_used(0).unwrap().1, 96);
    assert_eq!(driver.load(a, 96), vec![b'y'; 96]);
    // A buffer that waits is used as soon as something arrives.
    driver.add(0, &[into(a, 3), into(a + 100, 8)]);
    driver.kick(0);
    assert_eq!(driver.take_used(0), None);
    assert_eq!(console.receive(b"abcde"), 5);
    assert_eq!(driver.take_used(0).unwrap().1, 5);
    assert_eq!((driver.load(a, 3), driver.load(a + 100, 2)), (b"abc".to_vec(), b"de".to_vec()));
    assert_eq!(console.metrics().snapshot().input_bytes, 4101);
}

#[test]
fn resizing_raises_a_configuration_interrupt_once() {
    let machine = TestMachine::new();
    let (console, _) = console(&machine);
    let mut driver = TestDriver::probe(&machine, console.clone(), 0);
    assert_ne!(driver.start(Setup::default()) & F_SIZE, 0);
    assert_eq!(driver.config::<4>(0), [80, 0, 25, 0]);
    let generation = driver.read8(0x15);
    console.resize(132, 43);
    console.resize(132, 43);
    assert_eq!(driver.interrupts.take(), [0]);
    assert_eq!(driver.config::<4>(0), [132, 0, 43, 0]);
    assert_ne!(driver.read8(0x15), generation);
}

#[test]
fn the_first_output_announces_the_size_to_a_driver_that_reads_it_only_on_a_change() {
    let machine = TestMachine::new();
    let (console, _) = console(&machine);
    let mut driver = TestDriver::probe(&machine, console, 0);
    driver.start(Setup::default());
    assert!(!driver.interrupts.take().contains(&0));
    for expected in [true, false] {
        driver.add(1, &[out(0, 1)]);
        driver.kick(1);
        assert_eq!(driver.interrupts.take().contains(&0), expected);
    }
}

#[test]
fn emergency_write_prints_before_there_is_a_driver() {
    let machine = TestMachine::new();
    let (console, output) = console(&machine);
    let driver = TestDriver::probe(&machine, console, 0);
    driver.config_write(8, &u32::from(b'!').to_le_bytes());
    assert_eq!(*lock(&output), b"!");
}

#[test]
fn oversized_output_is_cut_and_counted() {
    let machine = TestMachine::new();
    let (console, output) = console(&machine);
    let mut driver = TestDriver::probe(&machine, console.clone(), 0);
    driver.start(Setup::default());
    driver.add(1, &[out(0, 1 << 20), out(0, 1 << 20)]);
    driver.kick(1);
    assert!(driver.wait_used(1).is_some());
    assert_eq!(lock(&output).len(), 1 << 20);
    assert_eq!(console.metrics().snapshot().dropped_output_bytes, 1 << 20);
}

#[test]
fn state_survives_a_round_trip() {
    let machine = TestMachine::new();
    let (a, _) = console(&machine);
    a.receive(b"typed ahead");
    a.resize(100, 30);
    let (b, _) = console(&machine);
    b.receive(b"replaced");
    b.restore(&a.save()).unwrap();
    assert_eq!(b.save(), a.save());
    assert_eq!(b.space(), BACKLOG_BYTES - 11);
    let huge = ConsoleStateV1 { backlog: Some(vec![0; 100_000]), ..Default::default() };
    b.restore(&huge.encode_to_vec()).unwrap();
    assert_eq!(b.space(), 0);
    assert!(b.restore(&[0xff]).is_err());
}
