//! State out and in, reset, instruction budgets.

use atoll_machine::backend::{HaltReason, Partition, Vcpu};
use atoll_machine::cpu::saved_state::CpuStateV1;
use atoll_machine::cpu::state::{Activity, CpuState, EventKind, PendingEvent, Segment, seg};
use iced_x86::code_asm::*;
use prost::Message;

use crate::guest::*;

/// A guest that computes for a few hundred instructions, with calls, ports, an exception and MSRs.
fn program(m: &Machine) -> CpuState {
    m.long_surroundings();
    let iret = m.iret64();
    m.continue_at(0x80, iret);
    m.assemble_at(64, CODE, |a| {
        a.mov(ebx, 1)?;
        a.mov(esi, 40)?;
        let mut again = a.create_label();
        a.set_label(&mut again)?;
        a.imul_3(ebx, ebx, 1_103_515_245)?;
        a.add(ebx, 12345)?;
        a.movd(xmm3, ebx)?;
        a.int(0x80)?;
        a.mov(eax, ebx)?;
        a.out(0xe9, eax)?;
        a.dec(esi)?;
        a.jne(again)?;
        a.movd(eax, xmm3)?;
        a.out(0xe9, eax)?;
        exit(a)
    });
    m.long_state()
}

/// Encodes and decodes a state as a saved machine does.
fn through_saved_form(state: &CpuState) -> CpuState {
    let bytes = CpuStateV1::from(state).encode_to_vec();
    CpuState::try_from(&CpuStateV1::decode(&bytes[..]).unwrap()).unwrap()
}

#[test]
fn a_guest_moves_between_machines_every_few_instructions() {
    let mut straight = Machine::new();
    let state = program(&straight);
    straight.run_from(&state);
    assert_eq!(straight.log().len(), 41);

    let mut m = Machine::new();
    let mut state = program(&m);
    let mut log = Vec::new();
    let mut moves = 0;
    loop {
        m.vcpu.set_state(&state).unwrap();
        m.partition.counting().unwrap().set_budget(0, Some(29));
        let reason = m.run();
        log.extend(m.log());
        if reason == HaltReason::Stopped {
            break;
        }
        assert_eq!(reason, HaltReason::BudgetSpent);
        state = through_saved_form(&m.vcpu.state());
        let next = Machine::new();
        let mut ram = vec![0; 16 << 20];
        m.memory.read(0, &mut ram).unwrap();
        next.write(0, &ram);
        m = next;
        moves += 1;
        assert!(moves < 1000);
    }
    assert!(moves > 30);
    assert_eq!(log, straight.log());
    assert_eq!(m.events().len(), 40);
}

#[test]
fn state_round_trips_exactly() {
    let mut m = Machine::new();
    let state = program(&m);
    m.vcpu.set_state(&state).unwrap();
    m.partition.counting().unwrap().set_budget(0, Some(100));
    assert_eq!(m.run(), HaltReason::BudgetSpent);
    let first = m.vcpu.state();
    m.vcpu.set_state(&first).unwrap();
    assert!(m.vcpu.state() == first);
    assert!(through_saved_form(&first) == first);
}

#[test]
fn budget_counts_instructions_exactly() {
    let mut m = Machine::new();
    let state = m.long_state();
    m.long_surroundings();
    m.assemble_at(64, CODE, |a| {
        for _ in 0..100 {
            a.inc(eax)?;
        }
        exit(a)
    });
    m.vcpu.set_state(&state).unwrap();
    let partition = m.partition.clone();
    let counting = partition.counting().unwrap();
    let before = counting.retired(0);
    counting.set_budget(0, Some(33));
    assert_eq!(m.run(), HaltReason::BudgetSpent);
    assert_eq!((counting.retired(0) - before, m.vcpu.state().rip), (33, CODE + 66));
    assert_eq!(m.run(), HaltReason::BudgetSpent, "nothing is left");
    counting.set_budget(0, None);
    assert_eq!(m.run(), HaltReason::Stopped);
    assert_eq!(m.vcpu.state().gpr[0] & 0xff, 0x11);
}

#[test]
fn a_pending_event_of_another_engine_is_delivered_first() {
    let mut m = Machine::new();
    m.long_surroundings();
    m.assemble_at(64, CODE, |a| a.ud2());
    let mut state = m.long_state();
    state.pending_event = Some(PendingEvent { vector: 14, kind: EventKind::Exception, error_code: Some(6) });
    m.run_from(&state);
    assert_eq!(m.vectors(), [(14, 6)]);
    assert_eq!(m.events()[0].rip, CODE);
}

#[test]
fn reset_returns_to_power_on() {
    let mut m = Machine::new();
    let state = program(&m);
    m.run_from(&state);
    m.partition.inject_nmi(0);
    m.vcpu.reset();
    let s = m.vcpu.state();
    assert_eq!((s.rip, s.segments[seg::CS].base, s.cr0), (0xfff0, 0xffff_0000, 0x6000_0010));
    assert_eq!((s.activity, s.nmi_pending, s.lapic.apic_base), (Activity::Active, false, 0xfee0_0900));
    assert_eq!(s.gpr[2], u64::from(model(atoll_machine::cpu::model::Vendor::Intel).signature()));
    assert!(s.msrs.contains(&(0x277, 0x0007_0406_0007_0406)));
}

#[test]
fn impossible_states_are_refused_by_name() {
    let m = Machine::new();
    let mut vcpu = m.partition.create_vcpu(0).unwrap();
    type Change = fn(&mut CpuState);
    let cases: [(Change, &str); 14] = [
        (|s| s.cr0 = 0x8000_0000, "cr0"),
        (|s| s.cr4 |= 1 << 13, "cr4"),
        (|s| s.efer |= 1 << 14, "efer"),
        (|s| s.efer &= !(1 << 10), "efer"),
        (|s| s.cr3 = 1 << 45, "cr3"),
        (|s| s.cr8 = 16, "cr8"),
        (|s| s.rflags = 0, "rflags"),
        (|s| s.segments[seg::FS].base = 1 << 50, "segments"),
        (|s| s.segments[seg::CS].attributes |= Segment::DEFAULT_BIG, "segments"),
        (|s| s.xcr0 = 2, "xcr0"),
        (|s| s.xsave.truncate(100), "xsave"),
        (|s| s.lapic.apic_base = 0x400, "lapic"),
        (|s| s.msrs.push((0xdead, 1)), "msrs"),
        (|s| s.msrs.push((0xc000_0082, 1 << 60)), "msrs"),
    ];
    for (n, (change, field)) in cases.into_iter().enumerate() {
        let mut state = m.long_state();
        change(&mut state);
        let error = vcpu.set_state(&state).unwrap_err().to_string();
        assert!(error.contains(field), "case {n}: {error}");
    }
    vcpu.set_state(&m.long_state()).unwrap();
}

#[test]
fn tsc_continues_across_save_and_restore() {
    let mut m = Machine::new();
    m.clock.advance(3_000_000_000);
    let mut state = m.vcpu.state();
    assert_eq!(state.tsc, 3_000_000_000);
    state.tsc += 500;
    state.msrs.retain(|r| r.0 != 0x3b);
    state.msrs.push((0x3b, 500));
    m.vcpu.set_state(&state).unwrap();
    assert_eq!(m.vcpu.state().tsc, 3_000_000_500);
    // A machine whose clock starts at zero takes the counter over.
    let mut other = Machine::new();
    other.vcpu.set_state(&state).unwrap();
    assert_eq!(other.vcpu.state().tsc, 3_000_000_500);
    other.clock.advance(10);
    assert_eq!(other.vcpu.state().tsc, 3_000_000_510);
    assert!(other.vcpu.state().msrs.contains(&(0x3b, 500)));
}
