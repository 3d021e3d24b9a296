//! Exceptions and interrupts in long mode.

use atoll_machine::backend::{HaltReason, Partition, Vcpu};
use iced_x86::code_asm::*;

use crate::guest::*;

#[test]
fn exceptions_push_their_error_code_or_none() {
    for (vector, code, kind) in [(6u64, 0u64, 0), (13, 0x50, 1), (0, 0, 2), (3, 0, 3)] {
        let mut m = Machine::new();
        m.run_long(|a| match kind {
            0 => a.ud2(),
            1 => {
                a.mov(eax, 0x53)?; // beyond nothing: a 16-bit data segment with RPL 3
                a.mov(ss, eax)
            }
            2 => {
                a.xor(ecx, ecx)?;
                a.div(ecx)
            }
            _ => a.int3(),
        });
        assert_eq!(m.exit_code(), 0xee);
        assert_eq!(m.vectors(), [(vector, code)], "kind {kind}");
        let e = m.events()[0];
        assert_eq!((e.cs, e.ss), (u64::from(sel::CODE64), u64::from(sel::DATA)));
        // INT3 is a trap: no RF, and the next instruction.
        assert_eq!(e.flags >> 16 & 1, u64::from(kind != 3));
        assert_eq!(e.rsp, STACK - 0x1000);
    }
}

#[test]
fn page_fault_reports_address_and_error_code() {
    let mut m = Machine::new();
    m.run_long(|a| {
        a.mov(rax, 0x4000_1234_5678u64)?;
        a.mov(dword_ptr(rax), 1)
    });
    assert_eq!(m.vectors(), [(14, 2)]);
    assert_eq!(m.events()[0].cr2, 0x4000_1234_5678);
    assert_eq!(m.events()[0].rip, CODE + 10);
}

#[test]
fn non_canonical_access_is_gp_or_ss() {
    let mut m = Machine::new();
    m.run_long(|a| {
        a.mov(rax, 0x8000_0000_0000u64)?;
        a.mov(dword_ptr(rax), 1)
    });
    assert_eq!(m.vectors(), [(13, 0)]);
    let mut m = Machine::new();
    m.long_surroundings();
    m.gate(12, sel::CODE64, 0x8e, 1);
    m.assemble_at(64, CODE, |a| {
        a.mov(rsp, 0x8000_0000_0008u64)?;
        a.push(rax)
    });
    let state = m.long_state();
    m.run_from(&state);
    assert_eq!(m.vectors(), [(12, 0)]);
}

#[test]
fn missing_gates_turn_into_gp_then_double_then_triple_fault() {
    // No gate for #UD: #GP with the vector and the EXT bit.
    let mut m = Machine::new();
    m.long_surroundings();
    m.write64(IDT + 6 * 16, 0);
    m.assemble_at(64, CODE, |a| a.ud2());
    let state = m.long_state();
    m.run_from(&state);
    assert_eq!(m.vectors(), [(13, 6 << 3 | 2 | 1)]);

    // No #GP gate either: contributory twice, #DF.
    let mut m = Machine::new();
    m.long_surroundings();
    m.write64(IDT + 13 * 16, 0);
    m.assemble_at(64, CODE, |a| {
        a.mov(rax, 0x8000_0000_0000u64)?;
        a.mov(dword_ptr(rax), 1)
    });
    let state = m.long_state();
    m.run_from(&state);
    assert_eq!(m.vectors(), [(8, 0)]);

    // And without #DF: shutdown.
    let mut m = Machine::new();
    m.long_surroundings();
    m.write64(IDT + 13 * 16, 0);
    m.write64(IDT + 8 * 16, 0);
    m.assemble_at(64, CODE, |a| {
        a.mov(rax, 0x8000_0000_0000u64)?;
        a.mov(dword_ptr(rax), 1)
    });
    let state = m.long_state();
    assert_eq!(m.run_from(&state), HaltReason::TripleFault);
    assert_eq!(m.vectors(), []);
}

#[test]
fn page_fault_on_a_bad_stack_becomes_double_fault_on_its_ist() {
    let mut m = Machine::new();
    m.long_surroundings();
    m.gate(8, sel::CODE64, 0x8e, 1);
    m.assemble_at(64, CODE, |a| {
        a.mov(rsp, 0x4000_0000_0000u64)?;
        a.push(rax)
    });
    let state = m.long_state();
    m.run_from(&state);
    let e = m.events()[0];
    assert_eq!((e.vector, e.error_code, e.rsp), (8, 0, 0x4000_0000_0000));
    assert_eq!(e.cr2, 0x4000_0000_0000 - 8);
}

#[test]
fn software_interrupt_checks_the_gate_and_returns() {
    let mut m = Machine::new();
    m.long_surroundings();
    let iret = m.iret64();
    m.continue_at(0x80, iret);
    m.run_from_code(|a| {
        a.int(0x80)?;
        a.mov(eax, 7)?;
        a.out(0xe9, eax)
    });
    assert_eq!((m.exit_code(), m.log()), (DONE, vec![7]));
    assert_eq!(m.events()[0].rip, CODE + 2);
}

#[test]
fn interrupt_gates_mask_interrupts_and_trap_gates_do_not() {
    for (kind, masked) in [(0x8eu8, true), (0x8f, false)] {
        let mut m = Machine::new();
        m.long_surroundings();
        m.gate(0x80, sel::CODE64, kind, 0);
        let at = STUBS + 0x4000;
        m.assemble_at(64, at, |a| {
            a.pushfq()?;
            a.pop(rax)?;
            a.out(0xe9, eax)?;
            exit(a)
        });
        m.continue_at(0x80, at);
        m.run_from_code(|a| {
            a.sti()?;
            a.int(0x80)
        });
        assert_eq!(m.log()[0] >> 9 & 1, u32::from(!masked));
    }
}

#[test]
fn nmi_is_blocked_until_iret_and_one_is_kept() {
    let mut m = Machine::new();
    m.long_surroundings();
    let at = STUBS + 0x4000;
    // The first NMI's handler logs, lets the host inject two more (port 0xe8), logs again and returns.
    m.assemble_at(64, at, |a| {
        a.mov(eax, 1)?;
        a.out(0xe9, eax)?;
        a.mov(eax, 2)?;
        a.out(0xe9, eax)?;
        a.iretq()
    });
    m.continue_at(2, at);
    m.assemble_at(64, CODE, |a| {
        a.nop()?;
        exit(a)
    });
    let mut state = m.long_state();
    state.nmi_blocked = true;
    m.partition.inject_nmi(0);
    m.vcpu.set_state(&state).unwrap();
    m.partition.inject_nmi(0);
    m.partition.inject_nmi(0);
    m.run();
    assert_eq!(m.events().len(), 0, "blocked from the start");
    let mut state = m.vcpu.state();
    assert!(state.nmi_pending && state.nmi_blocked);
    state.nmi_blocked = false;
    state.rip = CODE;
    m.run_from(&state);
    assert_eq!((m.vectors(), m.log()), (vec![(2, 0)], vec![1, 2]));
    assert!(!m.vcpu.state().nmi_blocked && !m.vcpu.state().nmi_pending);
}

#[test]
fn interrupt_shadow_lets_one_instruction_pass() {
    let mut m = Machine::new();
    m.long_surroundings();
    let state = m.long_state();
    m.assemble_at(64, CODE, |a| {
        a.sti()?;
        a.nop()?;
        a.nop()?;
        exit(a)
    });
    m.vcpu.set_state(&enable_apic(state)).unwrap();
    m.partition.msi_sink().signal_msi(msi(0, 0x41));
    m.run();
    assert_eq!(m.events()[0].rip, CODE + 2, "after the instruction that follows STI");
    // MOV SS holds NMIs off as well.
    let mut m = Machine::new();
    m.long_surroundings();
    m.assemble_at(64, CODE, |a| {
        a.mov(eax, u32::from(sel::DATA))?;
        a.mov(ss, eax)?;
        a.out(0xe9, eax)?;
        exit(a)
    });
    let state = m.long_state();
    m.run_from(&state);
    assert_eq!(m.exit_code(), DONE);
}
