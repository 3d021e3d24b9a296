//! The console device: the input is a script of register, ring and buffer accesses by a guest's driver. The
//! device must survive it and work after a reset.
#![no_main]

use atoll_virtio::console::Console;
use atoll_virtio::testing::{TestMachine, play};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let machine = TestMachine::new();
    let console = Console::new(std::sync::Arc::new(|_| {}), (80, 25), machine.inputs.clone());
    console.receive(&data[..data.len() / 2]);
    play(&machine, console, data);
});
