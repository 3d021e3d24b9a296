//! Single step and breakpoints.

use atoll_machine::backend::Vcpu;
use iced_x86::code_asm::*;

use crate::guest::*;

/// Runs `build` with TF set after the POPFQ that comes first; #DB returns.
fn traced(build: impl FnOnce(&mut CodeAssembler) -> Result<(), iced_x86::IcedError>) -> Machine {
    let mut m = Machine::new();
    m.long_surroundings();
    let iret = m.iret64();
    m.continue_at(1, iret);
    m.run_from_code(|a| {
        a.pushfq()?;
        a.or(dword_ptr(rsp), 0x100)?;
        a.popfq()?;
        build(a)?;
        a.pushfq()?;
        a.and(dword_ptr(rsp), !0x100)?;
        a.popfq()
    });
    m
}

const START: u64 = CODE + 1 + 7 + 1;

#[test]
fn single_step_traps_after_each_instruction() {
    let mut m = traced(|a| {
        a.nop()?;
        a.mov(eax, 5)
    });
    let rips: Vec<u64> = m.events().iter().map(|e| e.rip).collect();
    // After NOP, MOV, PUSHFQ, AND, POPFQ (TF was still set when it started).
    assert_eq!(rips, [START + 1, START + 6, START + 7, START + 14, START + 15]);
    assert!(m.events().iter().all(|e| e.vector == 1 && e.flags >> 8 & 1 == 1 || e.rip == START + 15));
    assert_eq!(m.vcpu.state().dr6 & 0x4000, 0x4000);
}

#[test]
fn mov_ss_delays_the_single_step_trap() {
    let m = traced(|a| {
        a.mov(ecx, u32::from(sel::DATA))?;
        a.mov(ss, ecx)?;
        a.nop()?;
        a.nop()
    });
    let rips: Vec<u64> = m.events().iter().map(|e| e.rip).take(3).collect();
    assert_eq!(rips, [START + 5, START + 8, START + 9], "none between MOV SS and NOP");
}

#[test]
fn int_n_does_not_trap_inside_the_handler() {
    let mut m = Machine::new();
    m.long_surroundings();
    let iret = m.iret64();
    m.continue_at(1, iret);
    m.continue_at(0x80, iret);
    m.run_from_code(|a| {
        a.pushfq()?;
        a.or(dword_ptr(rsp), 0x100)?;
        a.popfq()?;
        a.int(0x80)?;
        a.nop()?;
        a.pushfq()?;
        a.and(dword_ptr(rsp), !0x100)?;
        a.popfq()
    });
    let got: Vec<(u64, u64)> = m.events().iter().take(2).map(|e| (e.vector, e.rip)).collect();
    assert_eq!(got, [(0x80, START + 2), (1, START + 3)]);
}

#[test]
fn code_breakpoint_is_a_fault_and_rf_passes_it_once() {
    let mut m = Machine::new();
    m.long_surroundings();
    // The handler sets RF in the frame and returns.
    let at = STUBS + 0x4000;
    m.assemble_at(64, at, |a| {
        a.or(dword_ptr(rsp + 16), 0x1_0000)?;
        a.iretq()
    });
    m.continue_at(1, at);
    m.assemble_at(64, CODE, |a| {
        a.mov(ecx, 3)?;
        let mut top = a.create_label();
        a.set_label(&mut top)?;
        a.nop()?; // breakpoint here
        a.dec(ecx)?;
        a.jne(top)?;
        exit(a)
    });
    let mut state = m.long_state();
    state.dr[2] = CODE + 5;
    state.dr7 = 0x400 | 1 << 4;
    m.run_from(&state);
    let events = m.events();
    assert_eq!(events.len(), 3, "once per pass");
    assert!(events.iter().all(|e| (e.vector, e.rip) == (1, CODE + 5) && e.flags >> 16 & 1 == 0));
    assert_eq!(m.vcpu.state().dr6 & 0xf, 4);
}

#[test]
fn data_breakpoint_traps_after_the_access() {
    let mut m = Machine::new();
    m.long_surroundings();
    let iret = m.iret64();
    m.continue_at(1, iret);
    m.assemble_at(64, CODE, |a| {
        a.mov(rbx, 0x200000u64)?; // 10
        a.mov(eax, dword_ptr(rbx))?; // 2: a read does not hit a write breakpoint
        a.mov(byte_ptr(rbx + 3), 1)?; // 4
        a.mov(byte_ptr(rbx + 4), 1)?; // 4: beyond
        exit(a)
    });
    let mut state = m.long_state();
    state.dr[0] = 0x200000;
    state.dr7 = 0x400 | 2 | 0xd << 16; // G0, write, 4 bytes
    m.run_from(&state);
    assert_eq!(m.events().iter().map(|e| e.rip).collect::<Vec<_>>(), [CODE + 16]);
    assert_eq!(m.vcpu.state().dr6 & 0xf, 1);
}

#[test]
fn port_breakpoint_needs_cr4_de() {
    for de in [false, true] {
        let mut m = Machine::new();
        m.long_surroundings();
        let iret = m.iret64();
        m.continue_at(1, iret);
        m.assemble_at(64, CODE, |a| {
            a.out(0xe8, eax)?; // touches 0xe9 as well
            exit(a)
        });
        let mut state = m.long_state();
        state.cr4 |= u64::from(de) << 3;
        state.dr[1] = 0xe9;
        state.dr7 = 0x400 | 1 << 2 | 2 << 20;
        m.run_from(&state);
        assert_eq!(m.events().len(), usize::from(de));
    }
}

#[test]
fn general_detect_faults_on_mov_dr_and_clears_itself() {
    let mut m = Machine::new();
    m.long_surroundings();
    let iret = m.iret64();
    m.continue_at(1, iret);
    m.assemble_at(64, CODE, |a| {
        a.mov(rax, dr0)?;
        exit(a)
    });
    let mut state = m.long_state();
    state.dr7 |= 1 << 13;
    m.run_from(&state);
    assert_eq!(m.events().iter().map(|e| e.rip).collect::<Vec<_>>(), [CODE]);
    let s = m.vcpu.state();
    assert_eq!((s.dr6 & 0x2000, s.dr7 & 0x2000, m.exit_code()), (0x2000, 0, DONE));
}
