//! Saved states of the chipset: the first byte chooses a section, the rest is its payload up to a length in the
//! next two bytes, and what follows is a script that runs on the restored board.
#![no_main]

use atoll_chipset::board::Board;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let &[which, low, high, ref rest @ ..] = data else { return };
    let board = Board::new();
    let (payload, script) = rest.split_at(rest.len().min(usize::from(u16::from_le_bytes([low, high]))));
    let (_, section) = &board.sections[usize::from(which) % board.sections.len()];
    if section.restore_section(payload).is_ok() {
        board.play(script);
        let _ = board.save();
    }
});
