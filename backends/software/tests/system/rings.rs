//! Privilege: user code, SYSCALL, SYSENTER, call gates, far returns, ports.

use atoll_machine::cpu::model::Vendor;
use atoll_machine::cpu::state::{CpuState, gpr, seg};
use iced_x86::code_asm::*;

use crate::guest::*;

/// 64-bit ring 3 at USER_CODE.
fn user_state(m: &Machine) -> CpuState {
    let mut s = m.long_state();
    s.segments = [segment(sel::USER_DATA, 0xc0f3); 6];
    s.segments[seg::CS] = segment(sel::USER64, 0xa0fb);
    s.rip = USER_CODE;
    s.gpr[gpr::RSP] = USER_STACK;
    s
}

fn msrs(s: &mut CpuState, list: &[(u32, u64)]) {
    s.msrs.extend_from_slice(list);
}

const STAR: u64 = 0x0020 << 48 | (sel::CODE64 as u64) << 32;

#[test]
fn privileged_instructions_fault_in_ring_3() {
    type Build = fn(&mut CodeAssembler) -> Result<(), iced_x86::IcedError>;
    let cases: [(Build, u64); 11] = [
        (|a| a.hlt(), 13),
        (|a| a.cli(), 13),
        (|a| a.mov(rax, cr0), 13),
        (|a| a.mov(rax, dr7), 13),
        (|a| a.rdmsr(), 13),
        (|a| a.invlpg(ptr(rsp)), 13),
        (|a| a.wbinvd(), 13),
        (|a| a.ltr(ax), 13),
        (|a| a.swapgs(), 13),
        (|a| a.in_(al, 0x60), 13),
        (|a| a.clac(), 6),
    ];
    for (n, (build, vector)) in cases.into_iter().enumerate() {
        let mut m = Machine::new();
        m.long_surroundings();
        m.assemble_at(64, USER_CODE, build);
        let state = user_state(&m);
        m.run_from(&state);
        let e = m.events()[0];
        assert_eq!((e.vector, e.error_code, e.rip), (vector, 0, USER_CODE), "case {n}");
        assert_eq!((e.cs, e.ss, e.rsp), (sel::USER64.into(), sel::USER_DATA.into(), USER_STACK));
    }
}

#[test]
fn umip_hides_descriptor_tables_from_ring_3() {
    for umip in [false, true] {
        let mut m = Machine::new();
        m.long_surroundings();
        m.assemble_at(64, USER_CODE, |a| {
            a.smsw(eax)?;
            a.int3()
        });
        m.gate(3, sel::CODE64, 0xee, 0);
        let mut state = user_state(&m);
        state.cr4 |= u64::from(umip) << 11;
        m.run_from(&state);
        assert_eq!(m.events()[0].vector, if umip { 13 } else { 3 });
    }
}

#[test]
fn syscall_and_sysret_switch_rings_and_flags() {
    let mut m = Machine::new();
    m.long_surroundings();
    m.gate(3, sel::CODE64, 0xee, 0);
    m.assemble_at(64, USER_CODE, |a| {
        a.mov(rsi, rsp)?; // 3
        a.syscall()?; // 2
        a.int3()
    });
    m.assemble_at(64, CODE, |a| {
        a.pushfq()?;
        a.pop(rax)?;
        a.out(0xe9, eax)?;
        a.mov(eax, ss)?;
        a.out(0xe9, eax)?;
        a.mov(eax, cs)?;
        a.out(0xe9, eax)?;
        a.sysretq()
    });
    let mut state = user_state(&m);
    state.rflags = 0x246 | 0x400;
    msrs(&mut state, &[(0xc000_0081, STAR), (0xc000_0082, CODE), (0xc000_0084, 0x700)]);
    m.run_from(&state);
    assert_eq!(m.log(), [0x46, 0x10, 0x08]);
    let e = m.events()[0];
    assert_eq!((e.vector, e.rip, e.cs, e.ss), (3, USER_CODE + 6, 0x33, 0x2b));
    assert_eq!(e.flags & 0x700, 0x600, "flags are back");
}

#[test]
fn sysret_to_a_non_canonical_address_follows_the_vendor() {
    for vendor in [Vendor::Intel, Vendor::Amd] {
        let mut m = Machine::with(vendor, 1);
        m.long_surroundings();
        m.assemble_at(64, CODE, |a| {
            a.mov(rcx, 0x8000_0000_0000u64)?;
            a.mov(r11d, 2)?;
            a.sysretq()
        });
        let mut state = m.long_state();
        msrs(&mut state, &[(0xc000_0081, STAR)]);
        m.run_from(&state);
        let e = m.events()[0];
        assert_eq!((e.vector, e.error_code), (13, 0));
        let ring = if vendor == Vendor::Intel { 0 } else { 3 };
        assert_eq!(e.cs & 3, ring, "{vendor:?}");
    }
}

#[test]
fn sysenter_and_sysexit_work_on_intel_and_are_undefined_on_amd() {
    for vendor in [Vendor::Intel, Vendor::Amd] {
        let mut m = Machine::with(vendor, 1);
        m.long_surroundings();
        m.gate(3, sel::CODE64, 0xee, 0);
        // SYSENTER_CS = 8: CS 8, SS 0x10; SYSEXIT to 64 bits: CS 8+32 = 0x28, so the selectors are odd ones,
        // but their descriptors are never looked at.
        m.assemble_at(64, USER_CODE, |a| {
            a.sysenter()?;
            a.int3()
        });
        m.assemble_at(64, CODE, |a| {
            a.mov(rdx, USER_CODE + 2)?;
            a.mov(rcx, USER_STACK)?;
            a.sysexitq()
        });
        let mut state = user_state(&m);
        msrs(&mut state, &[(0x174, 8), (0x175, STACK), (0x176, CODE)]);
        m.run_from(&state);
        let e = m.events()[0];
        if vendor == Vendor::Amd {
            assert_eq!((e.vector, e.rip), (6, USER_CODE));
        } else {
            assert_eq!((e.vector, e.rip, e.cs, e.ss), (3, USER_CODE + 3, 0x2b, 0x33));
        }
    }
}

#[test]
fn swapgs_exchanges_the_bases() {
    let mut m = Machine::new();
    m.long_surroundings();
    m.write64(0x200000, 0x1111);
    m.write64(0x201000, 0x2222);
    m.assemble_at(64, CODE, |a| {
        a.mov(eax, dword_ptr(0x0).gs())?;
        a.out(0xe9, eax)?;
        a.swapgs()?;
        a.mov(eax, dword_ptr(0x0).gs())?;
        a.out(0xe9, eax)?;
        exit(a)
    });
    let mut state = m.long_state();
    state.segments[seg::GS].base = 0x200000;
    msrs(&mut state, &[(0xc000_0102, 0x201000)]);
    m.run_from(&state);
    assert_eq!(m.log(), [0x1111, 0x2222]);
}

#[test]
fn call_gate_switches_to_the_inner_stack_and_far_return_goes_back() {
    let mut m = Machine::new();
    m.long_surroundings();
    m.gate(3, sel::CODE64, 0xee, 0);
    // A 64-bit call gate with DPL 3 to CODE.
    let low = CODE & 0xffff | u64::from(sel::CODE64) << 16 | 0xecu64 << 40 | (CODE & 0xffff_0000) << 32;
    m.write64(GDT + u64::from(sel::FREE), low);
    m.write64(GDT + u64::from(sel::FREE) + 8, 0);
    m.write32(0x200000, 0);
    m.write(0x200004, &(sel::FREE | 3).to_le_bytes());
    m.assemble_at(64, USER_CODE, |a| {
        a.mov(ebx, 0x200000)?; // 5
        a.call(fword_ptr(rbx))?; // 2
        a.int3()
    });
    m.assemble_at(64, CODE, |a| {
        a.mov(rax, rsp)?;
        a.out(0xe9, eax)?;
        a.mov(rax, qword_ptr(rsp + 16))?;
        a.out(0xe9, eax)?;
        a.db(&[0x48, 0xcb]) // RETFQ
    });
    let state = user_state(&m);
    m.run_from(&state);
    assert_eq!(m.log(), [STACK as u32 - 32, USER_STACK as u32]);
    let e = m.events()[0];
    assert_eq!((e.vector, e.rip, e.cs, e.rsp), (3, USER_CODE + 8, sel::USER64.into(), USER_STACK));
}

#[test]
fn call_gate_below_its_privilege_is_refused() {
    let mut m = Machine::new();
    m.long_surroundings();
    let low = CODE & 0xffff | u64::from(sel::CODE64) << 16 | 0x8cu64 << 40 | (CODE & 0xffff_0000) << 32;
    m.write64(GDT + u64::from(sel::FREE), low);
    m.write64(GDT + u64::from(sel::FREE) + 8, 0);
    m.write32(0x200000, 0);
    m.write(0x200004, &(sel::FREE | 3).to_le_bytes());
    m.assemble_at(64, USER_CODE, |a| {
        a.mov(ebx, 0x200000)?;
        a.call(fword_ptr(rbx))
    });
    let state = user_state(&m);
    m.run_from(&state);
    assert_eq!(m.vectors(), [(13, u64::from(sel::FREE))]);
}

#[test]
fn ports_follow_the_bitmap_of_the_tss() {
    let mut m = Machine::new();
    m.long_surroundings();
    m.gate(3, sel::CODE64, 0xee, 0);
    m.write(TSS + 0x66, &0x68u16.to_le_bytes());
    m.write(TSS + 0x68, &[0; 0x100]);
    m.write(TSS + 0x68 + 0xe8 / 8, &[0b0000_0001]); // port 0xe8 denied, 0xe9 allowed
    m.assemble_at(64, USER_CODE, |a| {
        a.mov(eax, 9)?;
        a.out(0xe9, al)?;
        a.out(0xe8, al)
    });
    let mut state = user_state(&m);
    state.tr.limit = 0x68 + 0xff;
    m.run_from(&state);
    assert_eq!((m.log(), m.vectors()), (vec![9], vec![(13, 0)]));
    assert_eq!(m.events()[0].rip, USER_CODE + 7);
    // Beyond the limit everything is denied.
    let mut m = Machine::new();
    m.long_surroundings();
    m.assemble_at(64, USER_CODE, |a| a.out(0xe9, al));
    let state = user_state(&m);
    m.run_from(&state);
    assert_eq!(m.vectors(), [(13, 0)]);
}

#[test]
fn iret_to_a_null_stack_selector_is_for_inner_rings_of_64_bit_code_only() {
    // Ring 0 to ring 0 with SS = 0 works in 64-bit mode; ring 3 with SS = 3 does not.
    for (code, stack, ok) in [(sel::CODE64, 0u16, true), (sel::USER64, 3, false)] {
        let mut m = Machine::new();
        m.run_long(|a| {
            a.push(i32::from(stack))?;
            a.push(USER_STACK as i32)?;
            a.push(2)?;
            a.push(i32::from(code))?;
            let mut next = a.create_label();
            a.lea(rax, ptr(next))?;
            a.push(rax)?;
            a.iretq()?;
            a.set_label(&mut next)
        });
        assert_eq!(m.exit_code(), if ok { DONE } else { 0xee });
        assert_eq!(m.vectors(), if ok { vec![] } else { vec![(13, 0)] });
    }
}

#[test]
fn loading_segments_checks_privilege_and_presence() {
    // (descriptor, selector, expected vector and code)
    let user_code = 0x00af_fb00_0000_ffffu64;
    let cases = [
        (user_code & !(1 << 47), 0, Some((11, 0x58))),
        (0x00cf_9300_0000_ffff, 3, Some((13, 0x58))), // DPL 0, RPL 3
        (0x00cf_9900_0000_ffff, 0, Some((13, 0x58))), // execute only
        (0x00cf_9300_0000_ffff, 0, None),
        (0x0000_8900_0000_ffff, 0, Some((13, 0x58))), // a TSS
    ];
    for (n, (raw, rpl, expected)) in cases.into_iter().enumerate() {
        let mut m = Machine::new();
        m.write64(GDT + u64::from(sel::FREE), raw & !(1 << 40) | raw & (0xf << 40) & !(1 << 40));
        m.run_long(|a| {
            a.mov(eax, u32::from(sel::FREE) | rpl)?;
            a.mov(ds, eax)
        });
        assert_eq!(m.vectors(), expected.into_iter().collect::<Vec<_>>(), "case {n}");
        if expected.is_none() {
            assert_eq!(m.read64(GDT + u64::from(sel::FREE)) >> 40 & 1, 1, "accessed");
        }
    }
}

#[test]
fn lar_lsl_verr_and_verw_answer_through_zf() {
    let mut m = Machine::new();
    m.run_long(|a| {
        for selector in [sel::CODE32, sel::DATA, 0, 0xff0] {
            a.mov(ecx, u32::from(selector))?;
            a.mov(eax, 0xffff_ffffu32)?;
            a.lar(eax, ecx)?;
            a.out(0xe9, eax)?;
            a.mov(eax, 0xffff_ffffu32)?;
            a.lsl(eax, ecx)?;
            a.out(0xe9, eax)?;
            a.verr(cx)?;
            a.sete(al)?;
            a.verw(cx)?;
            a.sete(ah)?;
            a.out(0xe9, ax)?;
        }
        Ok(())
    });
    let none = u32::MAX;
    let expected =
        [[0x00cf_9b00, none, 0x0001], [0x00cf_9300, none, 0x0101], [none, none, 0], [none, none, 0]].concat();
    assert_eq!(m.log(), expected);
}

#[test]
fn lar_and_lsl_want_both_halves_of_a_system_descriptor_in_long_mode() {
    // Type, upper half, whether LAR and LSL accept it. AMD APM vol. 2, 4.8.3.
    let cases = [
        (0x82, 0, true, true),
        (0x89, 0, true, true),
        (0x8c, 0, true, false),
        (0x82, 0x100, false, false),
        (0x89, 0x1000, false, false),
        (0x8c, 0x200, false, false),
        (0x81, 0, false, false),
    ];
    for (kind, upper, lar, lsl) in cases {
        let mut m = Machine::new();
        m.long_surroundings();
        m.write64(GDT + u64::from(sel::FREE), kind << 40 | 0x67);
        m.write64(GDT + u64::from(sel::FREE) + 8, upper << 32);
        m.run_long(|a| {
            a.mov(ecx, i32::from(sel::FREE))?;
            a.lar(eax, ecx)?;
            a.sete(bl)?;
            a.lsl(edx, ecx)?;
            a.sete(bh)?;
            a.mov(ax, bx)?;
            a.out(0xe9, ax)
        });
        let expected = u32::from(lar) | u32::from(lsl) << 8;
        assert_eq!(m.log(), [expected], "type {kind:x}, upper half {upper:x}");
    }
}
