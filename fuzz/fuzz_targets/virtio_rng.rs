//! The entropy device: the input is a script of register, ring and buffer accesses by a guest's driver. The
//! device must survive it and work after a reset.
#![no_main]

use atoll_virtio::rng::Rng;
use atoll_virtio::testing::{TestMachine, play};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let machine = TestMachine::new();
    let rng = Rng::new(machine.inputs.clone());
    play(&machine, rng, data);
});
