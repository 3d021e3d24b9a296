use super::*;
use crate::testing::{Setup, TestDriver, TestMachine, into};

#[test]
fn buffers_are_filled_across_descriptors() {
    let machine = TestMachine::new();
    let rng = Rng::new(machine.inputs.clone());
    let mut driver = TestDriver::probe(&machine, rng.clone(), 0);
    driver.start(Setup::default());
    let (a, b) = (driver.alloc(40, 16), driver.alloc(24, 16));
    let head = driver.add(0, &[into(a, 40), into(b, 24)]);
    driver.kick(0);
    assert_eq!(driver.take_used(0), Some((head, 64)));
    assert_ne!(driver.load(a, 40), vec![0; 40]);
    assert_ne!(driver.load(b, 24), vec![0; 24]);
    assert_eq!(driver.interrupts.take(), [1]);
    assert_eq!((rng.metrics().snapshot().requests, rng.metrics().snapshot().bytes), (1, 64));
}

#[test]
fn a_huge_request_is_answered_in_part() {
    let machine = TestMachine::new();
    let mut driver = TestDriver::probe(&machine, Rng::new(machine.inputs.clone()), 0);
    driver.start(Setup::default());
    // All of these name the same memory.
    let head = driver.add_indirect(0, &[into(0, 1 << 20); 64]);
    driver.kick(0);
    assert_eq!(driver.take_used(0), Some((head, 64 << 10)));
    assert_eq!(driver.load(64 << 10, 16), vec![0; 16], "the rest is untouched");
}

#[test]
fn state_survives_a_round_trip() {
    let rng = Rng::new(InputGate::live());
    rng.restore(&rng.save()).unwrap();
    assert_eq!(RngStateV1::decode(&rng.save()[..]).unwrap(), RngStateV1 {});
    assert!(rng.restore(&[0xff, 0xff]).is_err());
}
