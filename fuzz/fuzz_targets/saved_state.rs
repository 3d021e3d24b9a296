//! The saved-state container and what is in it. The first byte chooses: raw bytes as a file; a file with a good
//! header whose sections have payloads from the input, restored onto the chipset; or the state of a virtio
//! device, restored and then driven by the rest of the input.
//!
//! Asserted: no panic; what was written is read back; a restore that is refused has changed nothing; whatever was
//! accepted can be saved, and restoring that saves the same again; a virtio device works after a reset.
#![no_main]

use std::sync::Arc;

use atoll_chipset::board::Board;
use atoll_fuzz::script::Script;
use atoll_machine::state::{StateReader, StateSection, StateWriter};
use atoll_network::MacAddress;
use atoll_network::test_utils::pair;
use atoll_virtio::blk::{Blk, BlkOptions};
use atoll_virtio::console::Console;
use atoll_virtio::device::VirtioDevice;
use atoll_virtio::net::{Net, NetOptions};
use atoll_virtio::rng::Rng;
use atoll_virtio::testing::{MemoryDisk, Setup, TestDriver, TestMachine};
use atoll_virtio::transport::pci::saved_state::VirtioPciStateV1;
use libfuzzer_sys::fuzz_target;
use prost::Message;

fuzz_target!(init: atoll_fuzz::seeds::plant(seeds()), |data: &[u8]| {
    let Some((choice, rest)) = data.split_first() else { return };
    match choice % 6 {
        0 => raw(rest),
        1 => file(rest),
        which => virtio(which - 2, rest),
    }
});

/// A file that anybody may have written.
fn raw(bytes: &[u8]) {
    if let Ok(mut reader) = StateReader::new(bytes) {
        while let Ok(Some(_)) = reader.next_section() {}
    }
    let board = Board::new();
    let before = board.save();
    if StateReader::new(bytes).and_then(|reader| reader.restore(&parts(&board))).is_err() {
        assert_eq!(board.save(), before, "a refused file has changed something");
    }
}

fn parts(board: &Board) -> Vec<(&str, &dyn StateSection)> {
    board.sections.iter().map(|(name, part)| (*name, &**part)).collect()
}

/// A file with a right header and sections of the input's.
fn file(bytes: &[u8]) {
    let (board, mut script) = (Board::new(), Script::new(bytes));
    let mut writer = StateWriter::new("atoll-1", "0");
    let mut payloads = Vec::new();
    while !script.is_empty() && payloads.len() < 32 {
        let (which, length) = (usize::from(script.u8()), script.u8());
        let name = board.sections.get(which & 31).map_or("unknown", |(name, _)| name);
        let payload = script.bytes(length.into());
        writer.add(name, u32::from(which >= 0xf0) + 1, which & 0x20 != 0, &[], payload.to_vec());
        payloads.push(payload);
    }
    let mut written = Vec::new();
    if writer.write_to(&mut written).is_err() {
        return;
    }
    let mut reader = StateReader::new(&*written).expect("an own header");
    for payload in payloads {
        let section = reader.next_section().expect("an own section").expect("a section");
        assert_eq!(section.payload, payload);
    }
    assert!(matches!(reader.next_section(), Ok(None)));
    board.assign();
    if StateReader::new(&*written).expect("an own header").restore(&parts(&board)).is_ok() {
        stable(board.sections.iter().map(|(name, part)| (*name, &**part)));
    }
}

/// What was accepted is saved, restored and saved again without a change.
fn stable<'a>(parts: impl Iterator<Item = (&'a str, &'a dyn StateSection)>) {
    for (name, part) in parts {
        let (first, _) = part.save_section();
        if let Err(error) = part.restore_section(&first) {
            panic!("{name} refuses what it saved: {error}");
        }
        assert_eq!(part.save_section().0, first, "{name} saves something else after a restore");
    }
}

fn device(which: u8, machine: &TestMachine) -> Arc<dyn VirtioDevice> {
    match which {
        0 => Blk::new(MemoryDisk::new(64, false), &BlkOptions { queues: 2, ..BlkOptions::default() }),
        1 => Console::new(Arc::new(|_| {}), (80, 25), machine.inputs.clone()),
        2 => Rng::new(machine.inputs.clone()),
        _ => {
            let options = NetOptions { queue_pairs: 2, ..NetOptions::new(MacAddress([2, 0, 0, 0, 0, 1])) };
            Net::new(Arc::new(pair(2, 4).0), &options)
        }
    }
}

fn virtio(which: u8, bytes: &[u8]) {
    let (machine, mut script) = (TestMachine::new(), Script::new(bytes));
    let (pci, interrupts) = machine.plug(device(which, &machine));
    let payload_length = script.u16();
    let saved = VirtioPciStateV1::decode(script.bytes(payload_length.into()));
    if saved.is_ok_and(|saved| pci.restore(&saved).is_ok()) {
        let first = pci.save();
        if let Err(error) = pci.restore(&first) {
            panic!("virtio refuses what it saved: {error}");
        }
        assert_eq!(pci.save(), first, "virtio saves something else after a restore");
        pci.resume();
    }
    let mut driver = TestDriver::attach(&machine, pci, interrupts, 0);
    while !script.is_empty() {
        let (what, at) = (script.u8(), script.u16());
        match what & 3 {
            0 => drop(
                driver.mmio_read::<4>(driver.regions()[usize::from(what >> 2) % 5] + u64::from(at & 0xffc)),
            ),
            1 => driver.mmio_write(
                driver.regions()[usize::from(what >> 2) % 5] + u64::from(at & 0xffc),
                &script.array::<4>(),
            ),
            2 => driver.kick(at & 3),
            _ => driver.memory.write(u64::from(at) << 6, &script.array::<16>()).unwrap_or(()),
        }
    }
    driver.start(Setup::default());
    assert_eq!(driver.status(), 15, "the device works after a reset");
}

/// Good files and good sections.
fn seeds() -> Vec<Vec<u8>> {
    let board = Board::new();
    board.assign();
    let mut seeds = Vec::new();
    let mut writer = StateWriter::new("atoll-1", "0");
    for (index, (name, part)) in board.sections.iter().enumerate() {
        writer.save(name, &**part, true);
        let payload = part.save_section().0;
        if let Ok(length) = u8::try_from(payload.len()) {
            seeds.push([&[1, index as u8, length][..], &payload].concat());
        }
    }
    let mut file = vec![0];
    writer.write_to(&mut file).expect("memory takes everything");
    seeds.push(file);
    for which in 0..4 {
        let machine = TestMachine::new();
        let (pci, interrupts) = machine.plug(device(which, &machine));
        let mut driver = TestDriver::attach(&machine, pci.clone(), interrupts, 0);
        driver.start(Setup::default());
        let payload = pci.save().encode_to_vec();
        seeds.push([&[which + 2][..], &(payload.len() as u16).to_le_bytes(), &payload, &[2, 0, 0]].concat());
    }
    seeds
}
