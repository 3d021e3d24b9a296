//! The assembled chipset: the input is a script of port, configuration and memory-mapped accesses, interrupt
//! acknowledgements and passing time. It must survive it and still be found afterwards.
#![no_main]

use atoll_chipset::board::Board;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let board = Board::new();
    board.assign();
    board.play(data);
    assert_eq!(board.config_read(atoll_pci::Bdf::new(0, 0, 0), 0), 0x29c0_8086);
});
