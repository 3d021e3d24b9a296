//! Saved states of a processor: the first byte chooses a good state, the next two a length, then fields in their
//! saved encoding that replace those of the good state, and what follows is code.
//!
//! Asserted: whatever decodes can be encoded and decoded again to the same state; loading it is refused or
//! works; then a thousand instructions run, as in the target `executor`, and the state can be saved and loaded.
#![no_main]

use atoll_fuzz::layout::{self, CODE, Mode};
use atoll_fuzz::machine::Machine;
use atoll_fuzz::script::Script;
use atoll_machine::backend::Vcpu;
use atoll_machine::cpu::saved_state::{CpuStateV1, MsrV1, PendingEventV1, SegmentV1};
use atoll_machine::cpu::state::CpuState;
use libfuzzer_sys::fuzz_target;
use prost::Message;

fuzz_target!(init: atoll_fuzz::seeds::plant(seeds()), |data: &[u8]| run(data));

fn run(data: &[u8]) {
    let mut script = Script::new(data);
    let (choice, length) = (script.u8(), script.u16());
    let mut machine = Machine::new(choice & 0x10 != 0);
    let good = layout::start(&machine, Mode::ALL[usize::from(choice & 7)], choice & 8 != 0);
    let Some(saved) = overlay(CpuStateV1::from(&good), script.bytes(length.into())) else { return };
    let Ok(state) = CpuState::try_from(&saved) else { return };
    let again = CpuStateV1::decode(&*CpuStateV1::from(&state).encode_to_vec()).expect("an own encoding");
    assert_eq!(CpuState::try_from(&again).expect("an own state"), state);
    machine.write(CODE, script.rest());
    if machine.vcpu().set_state(&state).is_err() {
        return;
    }
    let loaded = machine.checked_state();
    assert_eq!((loaded.gpr, loaded.rip, loaded.segments), (state.gpr, state.rip, state.segments));
    machine.run(1000);
    machine.checked_state();
}

/// `good` with the fields that `bytes` has.
fn overlay(mut good: CpuStateV1, bytes: &[u8]) -> Option<CpuStateV1> {
    let fields = CpuStateV1::decode(bytes).ok()?;
    // Merging appends to lists.
    let lists = [!fields.gpr.is_empty(), !fields.segments.is_empty(), !fields.dr.is_empty()];
    if lists[0] {
        good.gpr.clear();
    }
    if lists[1] {
        good.segments.clear();
    }
    if lists[2] {
        good.dr.clear();
    }
    good.merge(bytes).ok()?;
    Some(good)
}

/// One field each, and a whole state for every mode.
fn seeds() -> Vec<Vec<u8>> {
    let machine = Machine::new(false);
    let with = |choice: u8, saved: &CpuStateV1, code: &[u8]| {
        let bytes = saved.encode_to_vec();
        [&[choice][..], &(bytes.len() as u16).to_le_bytes(), &bytes, code].concat()
    };
    let mut seeds = Vec::new();
    for choice in 0..16u8 {
        let state = layout::start(&machine, Mode::ALL[usize::from(choice & 7)], choice & 8 != 0);
        seeds.push(with(choice, &CpuStateV1::from(&state), &[0x90, 0xf4]));
        let segment =
            SegmentV1 { selector: Some(0x10), base: Some(0), limit: Some(0xffff), attributes: None };
        let event = PendingEventV1 { vector: Some(14), kind: Some(2), error_code: Some(0) };
        let few = CpuStateV1 {
            rflags: Some(0x302),
            segments: vec![segment; 6],
            ldtr: Some(segment),
            tr: Some(segment),
            cr4: Some(0x20),
            dr7: Some(0x401),
            msrs: vec![MsrV1 { index: Some(0xc000_0082), value: Some(0x1_0000) }],
            activity: Some(1),
            nmi_pending: Some(true),
            pending_event: Some(event),
            ..CpuStateV1::default()
        };
        seeds.push(with(choice, &few, &[0xfb, 0xf4]));
        let one = CpuStateV1 { sipi_vector: Some(1), activity: Some(choice.into()), ..CpuStateV1::default() };
        seeds.push(with(choice, &one, &[0xcc]));
        let time = CpuStateV1 { tsc: Some(u64::MAX - 5), lapic: few.lapic.clone(), ..CpuStateV1::default() };
        seeds.push(with(choice, &time, &[0x0f, 0x31]));
    }
    seeds
}
