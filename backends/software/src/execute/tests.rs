//! Tests of the integer instructions, the run loop and the memory path on small programs.

use atoll_machine::cpu::state::{gpr::*, seg};
use iced_x86::IcedError;
use iced_x86::code_asm::*;

use crate::cpu::{control, flag};
use crate::exception::{Exception, vector};
use crate::execute::{Leave, run, step};
use crate::test_support::{CODE, DATA, DEVICE, DeviceAccess, Machine, PAGE_TABLES, STACK};

fn assemble(bits: u32, at: u64, f: impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError>) -> Vec<u8> {
    let mut a = CodeAssembler::new(bits).unwrap();
    f(&mut a).unwrap();
    a.assemble(at).unwrap()
}

/// Runs 64-bit code at CPL 0 with RBX = [`DATA`].
fn long(f: impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError>) -> Machine {
    let mut m = Machine::long(8);
    m.cpu.gpr[RBX] = DATA;
    m.run_code(&assemble(64, CODE, f));
    m
}

fn arithmetic(m: &Machine) -> u64 {
    m.cpu.rflags & flag::ARITHMETIC
}

#[test]
fn operand_sizes_write_registers_as_the_architecture_says() {
    let m = long(|a| {
        a.mov(rax, -1i64)?;
        a.mov(rcx, rax)?;
        a.mov(rdx, rax)?;
        a.mov(rsi, rax)?;
        a.add(eax, 1)?;
        a.add(cx, 1)?;
        a.add(dl, 1)?;
        a.mov(rdi, 0x1122_3344_5566_7788u64)?;
        a.mov(r8, rdi)?;
        a.mov(rax, rdi)?;
        a.mov(ah, 0x99)?;
        a.xchg(al, ah)
    });
    assert_eq!(m.cpu.gpr[RAX], 0x1122_3344_5566_8899);
    assert_eq!(m.cpu.gpr[RCX], 0xffff_ffff_ffff_0000);
    assert_eq!(m.cpu.gpr[RDX], 0xffff_ffff_ffff_ff00);
}

#[test]
fn flags_of_addition_and_subtraction() {
    let m = long(|a| {
        a.mov(eax, 0x7fff_ffff)?;
        a.add(eax, 1)
    });
    assert_eq!(arithmetic(&m), flag::OF | flag::SF | flag::AF | flag::PF);
    let m = long(|a| {
        a.xor(eax, eax)?;
        a.sub(al, 1)
    });
    assert_eq!(arithmetic(&m), flag::CF | flag::SF | flag::AF | flag::PF);
    let m = long(|a| {
        a.stc()?;
        a.mov(eax, -1)?;
        a.inc(eax)
    });
    assert_eq!(arithmetic(&m), flag::CF | flag::ZF | flag::AF | flag::PF, "INC keeps CF");
    let m = long(|a| {
        a.stc()?;
        a.mov(eax, 5)?;
        a.sbb(eax, 5)?;
        a.adc(rax, 0)
    });
    assert_eq!(m.cpu.gpr[RAX], 0x1_0000_0000);
}

#[test]
fn shifts_mask_their_count_and_keep_flags_on_zero() {
    let m = long(|a| {
        a.mov(ecx, 32)?;
        a.mov(eax, 0x8000_0001u32)?;
        a.stc()?;
        a.shl(eax, cl)?;
        a.mov(rdx, 1u64)?;
        a.mov(ecx, 65)?;
        a.shl(rdx, cl)
    });
    assert_eq!(m.cpu.gpr[RAX], 0x8000_0001);
    assert_eq!(m.cpu.gpr[RDX], 2);
    let m = long(|a| {
        a.stc()?;
        a.mov(eax, 0x8000_0000u32)?;
        a.rcr(eax, 1)?;
        a.mov(dx, 0x1234)?;
        a.mov(si, 0xabcd)?;
        a.shld(dx, si, 8)
    });
    assert_eq!(m.cpu.gpr[RAX], 0xc000_0000);
    assert_eq!(m.cpu.gpr[RDX] & 0xffff, 0x34ab);
}

#[test]
fn multiplication_and_division() {
    let m = long(|a| {
        a.mov(rax, -3i64)?;
        a.mov(rcx, 5u64)?;
        a.imul(rcx)?;
        a.mov(rsi, rdx)?;
        a.mov(rdi, rax)?;
        a.mov(rax, -7i64)?;
        a.cqo()?;
        a.mov(rcx, 2u64)?;
        a.idiv(rcx)?;
        a.mov(r8, rdx)?;
        a.mov(r9, rax)?;
        a.mov(ax, 1000)?;
        a.mov(cl, 7)?;
        a.div(cl)
    });
    assert_eq!((m.cpu.gpr[RDI] as i64, m.cpu.gpr[RSI] as i64), (-15, -1));
    assert_eq!((m.cpu.gpr[R9] as i64, m.cpu.gpr[R8] as i64), (-3, -1));
    assert_eq!(m.cpu.gpr[RAX] & 0xffff, 142 | 6 << 8);
}

#[test]
fn division_errors_leave_the_registers() {
    for (high, low, divisor) in
        [(0u64, 1u64, 0i64), (1, 0, 1), (u64::MAX >> 1, 0, -1), (u64::MAX, 1 << 63, -1)]
    {
        let mut m = Machine::long(8);
        m.cpu.gpr[RDX] = high;
        m.cpu.gpr[RAX] = low;
        m.cpu.gpr[RCX] = divisor as u64;
        let exception = m.fault_of(&assemble(64, CODE, |a| a.idiv(rcx)));
        assert_eq!(exception, Exception::DE, "{high:x}:{low:x} / {divisor}");
        assert_eq!((m.cpu.gpr[RDX], m.cpu.gpr[RAX], m.cpu.rip), (high, low, CODE));
    }
    let mut m = Machine::long(8);
    m.cpu.gpr[RDX] = u64::MAX;
    m.cpu.gpr[RAX] = 1 << 63;
    m.cpu.gpr[RCX] = 1;
    m.run_code(&assemble(64, CODE, |a| a.idiv(rcx)));
    assert_eq!((m.cpu.gpr[RAX], m.cpu.gpr[RDX]), (1 << 63, 0), "the most negative quotient fits");
}

#[test]
fn memory_operands_of_every_form() {
    let m = long(|a| {
        a.mov(rax, 0x0102_0304_0506_0708u64)?;
        a.mov(qword_ptr(rbx), rax)?;
        a.mov(ecx, 4)?;
        a.mov(edx, dword_ptr(rbx + rcx))?;
        a.add(byte_ptr(rbx + rcx * 2), 5)?;
        a.or(word_ptr(rbx + rcx * 2 - 8), 0xf000)?;
        a.movsx(rsi, byte_ptr(rbx))?;
        a.mov(byte_ptr(rbx + 0x10), -1)?;
        a.movsx(edi, byte_ptr(rbx + 0x10))?;
        a.movzx(r8d, word_ptr(rbx + 0x10))?;
        a.lea(r9, qword_ptr(rbx + rcx * 8 - 1))?;
        a.lea(r10d, dword_ptr(ebx + ecx * 8))?;
        a.mov(r11, qword_ptr(DATA))
    });
    assert_eq!(m.cpu.gpr[RDX], 0x0102_0304);
    assert_eq!(m.read_u64(DATA), 0x0102_0304_0506_f708);
    assert_eq!(m.read::<1>(DATA + 8), [5]);
    assert_eq!(m.cpu.gpr[RSI], 8);
    assert_eq!(m.cpu.gpr[RDI], 0xffff_ffff);
    assert_eq!(m.cpu.gpr[R8], 0xff);
    assert_eq!(m.cpu.gpr[R9], DATA + 31);
    assert_eq!(m.cpu.gpr[R10], DATA + 32);
    assert_eq!(m.cpu.gpr[R11], 0x0102_0304_0506_f708);
}

#[test]
fn rip_relative_operands_and_segment_bases() {
    let mut m = Machine::long(8);
    m.cpu.segments[seg::GS].base = DATA;
    m.write_u64(DATA + 0x18, 77);
    // mov rax, gs:[0x18]; mov rcx, [rip + 1]; hlt; data
    let code = [0x65, 0x48, 0x8b, 0x04, 0x25, 0x18, 0, 0, 0, 0x48, 0x8b, 0x0d, 1, 0, 0, 0];
    m.run_code(&[&code[..], &[0xf4, 0x88, 0x77, 0x66, 0x55, 0x44, 0x33, 0x22, 0x11]].concat());
    assert_eq!(m.cpu.gpr[RAX], 77);
    assert_eq!(m.cpu.gpr[RCX], 0x1122_3344_5566_7788);
}

#[test]
fn stack_instructions() {
    let m = long(|a| {
        a.push(rsp)?;
        a.pop(rax)?;
        a.push(0x1234)?;
        a.push(-2)?;
        a.pop(qword_ptr(rsp))?;
        a.pop(rcx)?;
        a.push(rsp)?;
        a.pop(rsp)?;
        a.mov(rbp, rsp)?;
        a.enter(0x20, 0)?;
        a.mov(rdx, rsp)?;
        a.leave()?;
        a.push(ax)?;
        a.mov(rsi, rsp)
    });
    assert_eq!(m.cpu.gpr[RAX], STACK, "PUSH RSP pushes the old value");
    assert_eq!(m.cpu.gpr[RCX] as i64, -2, "POP [RSP] computes its address after the increment");
    assert_eq!(m.cpu.gpr[RDX], STACK - 8 - 0x20);
    assert_eq!(m.cpu.gpr[RSI], STACK - 2);
}

#[test]
fn calls_returns_and_loops() {
    let m = long(|a| {
        let mut function = a.create_label();
        let mut end = a.create_label();
        let mut again = a.create_label();
        a.call(function)?;
        a.lea(rcx, ptr(function))?;
        a.call(rcx)?;
        a.mov(ecx, 10)?;
        a.set_label(&mut again)?;
        a.add(rdx, 2)?;
        a.loop_(again)?;
        a.jmp(end)?;
        a.set_label(&mut function)?;
        a.inc(rax)?;
        a.ret()?;
        a.set_label(&mut end)?;
        a.nop()
    });
    assert_eq!((m.cpu.gpr[RAX], m.cpu.gpr[RDX], m.cpu.gpr[RCX]), (2, 20, 0));
    assert_eq!(m.cpu.gpr[RSP], STACK);
}

#[test]
fn conditions_agree_with_comparisons() {
    for (x, y) in [(1i64, 2i64), (2, 1), (-1, 1), (1, -1), (5, 5), (i64::MIN, 1)] {
        let mut m = Machine::long(8);
        m.cpu.gpr[RSI] = x as u64;
        m.cpu.gpr[RDI] = y as u64;
        m.run_code(&assemble(64, CODE, |a| {
            a.cmp(rsi, rdi)?;
            a.setl(al)?;
            a.setbe(cl)?;
            a.mov(r8d, 1)?;
            a.cmovg(rdx, r8)?;
            a.sete(ah)
        }));
        assert_eq!(m.cpu.gpr[RAX] & 1, u64::from(x < y), "{x} {y}");
        assert_eq!(m.cpu.gpr[RCX] & 1, u64::from(x as u64 <= y as u64), "{x} {y}");
        assert_eq!(m.cpu.gpr[RDX] & 1, u64::from(x > y), "{x} {y}");
        assert_eq!(m.cpu.gpr[RAX] >> 8 & 1, u64::from(x == y), "{x} {y}");
    }
}

#[test]
fn bit_strings_in_memory_reach_around_the_operand() {
    let m = long(|a| {
        a.mov(rax, -1i64)?;
        a.bts(qword_ptr(rbx + 0x40), rax)?;
        a.mov(eax, 100)?;
        a.lock().bts(dword_ptr(rbx), eax)?;
        a.bts(dword_ptr(rbx + 0x80), 33)
    });
    assert_eq!(m.read_u64(DATA + 0x38), 1 << 63);
    assert_eq!(m.read_u64(DATA + 8), 1 << 36);
    assert_eq!(m.read_u64(DATA + 0x80), 2, "an immediate is taken modulo the operand size");
}

#[test]
fn exchange_instructions() {
    let m = long(|a| {
        a.mov(qword_ptr(rbx), 7)?;
        a.mov(eax, 7)?;
        a.mov(ecx, 9)?;
        a.lock().cmpxchg(qword_ptr(rbx), rcx)?;
        a.setz(dl)?;
        a.cmpxchg(qword_ptr(rbx), rcx)?;
        a.setz(dh)?;
        a.mov(rsi, rax)?;
        a.mov(edi, 5)?;
        a.lock().xadd(dword_ptr(rbx), edi)?;
        a.mov(r8d, 3)?;
        a.xadd(r8, r8)?;
        a.mov(r9d, 1)?;
        a.xchg(dword_ptr(rbx + 8), r9d)
    });
    assert_eq!(m.cpu.gpr[RDX] & 0xffff, 1);
    assert_eq!((m.cpu.gpr[RSI], m.cpu.gpr[RDI]), (9, 9));
    assert_eq!(m.read_u64(DATA), 14);
    assert_eq!(m.cpu.gpr[R8], 6);
    assert_eq!(m.read_u64(DATA + 8), 1);
}

#[test]
fn cmpxchg16b_needs_alignment_and_swaps_both_halves() {
    let m = long(|a| {
        a.mov(rsi, rbx)?;
        a.mov(rbx, 11u64)?;
        a.mov(rcx, 22u64)?;
        a.xor(eax, eax)?;
        a.xor(edx, edx)?;
        a.lock().cmpxchg16b(xmmword_ptr(rsi))?;
        a.setz(dil)?;
        a.lock().cmpxchg16b(xmmword_ptr(rsi))
    });
    assert_eq!((m.read_u64(DATA), m.read_u64(DATA + 8)), (11, 22));
    assert_eq!((m.cpu.gpr[RAX], m.cpu.gpr[RDX], m.cpu.gpr[RDI] & 1), (11, 22, 1));
    let mut m = Machine::long(8);
    m.cpu.gpr[RSI] = DATA + 8;
    assert_eq!(m.fault_of(&assemble(64, CODE, |a| a.cmpxchg16b(xmmword_ptr(rsi)))), Exception::GP0);
}

#[test]
fn string_instructions_move_and_compare_in_both_directions() {
    let mut m = Machine::long(8);
    let pattern: Vec<u8> = (0..=255).collect();
    m.write(0x10_0f80, &pattern);
    m.cpu.gpr[RSI] = 0x10_0f80;
    m.cpu.gpr[RDI] = 0x11_0f13;
    m.cpu.gpr[RCX] = 256;
    m.run_code(&assemble(64, CODE, |a| a.rep().movsb()));
    assert_eq!(m.read::<256>(0x11_0f13).to_vec(), pattern);
    assert_eq!((m.cpu.gpr[RSI], m.cpu.gpr[RDI], m.cpu.gpr[RCX]), (0x10_1080, 0x11_1013, 0));

    m.cpu.gpr[RSI] = 0x10_107c;
    m.cpu.gpr[RDI] = 0x10_1084;
    m.cpu.gpr[RCX] = 64;
    m.run_code(&assemble(64, CODE, |a| {
        a.std()?;
        a.rep().movsd()?;
        a.cld()
    }));
    assert_eq!(m.read::<256>(0x10_0f88).to_vec(), pattern, "an overlapping copy downwards");

    m.cpu.gpr[RDI] = 0x10_0f88;
    m.cpu.gpr[RCX] = 1000;
    m.cpu.gpr[RAX] = 200;
    m.run_code(&assemble(64, CODE, |a| a.repne().scasb()));
    assert_eq!((m.cpu.gpr[RDI], m.cpu.gpr[RCX]), (0x10_0f88 + 201, 1000 - 201));

    m.cpu.gpr[RDI] = 0x20_0003;
    m.cpu.gpr[RCX] = 0x300;
    m.cpu.gpr[RAX] = 0x1122_3344_5566_7788;
    m.run_code(&assemble(64, CODE, |a| a.rep().stosq()));
    assert_eq!(m.read_u64(0x20_0003 + 0x17f8), 0x1122_3344_5566_7788);
    assert_eq!(m.read_u64(0x20_0003 + 0x1800), 0);
}

#[test]
fn string_copy_that_overlaps_forwards_repeats_its_pattern() {
    let mut m = Machine::long(8);
    m.write(DATA, b"ab");
    m.cpu.gpr[RSI] = DATA;
    m.cpu.gpr[RDI] = DATA + 2;
    m.cpu.gpr[RCX] = 6;
    m.run_code(&assemble(64, CODE, |a| {
        // The first run fills the TLB, the second takes the bulk path.
        a.movsb()?;
        a.rep().movsb()
    }));
    assert_eq!(&m.read::<10>(DATA), b"ababababa\0");
}

#[test]
fn a_fault_inside_a_repeated_copy_leaves_exact_counters() {
    let mut m = Machine::long(8);
    // The second 2 MiB are absent.
    m.write_u64(PAGE_TABLES + 0x2000 + 8, 0);
    m.cpu.gpr[RSI] = DATA;
    m.cpu.gpr[RDI] = 0x1f_fff0;
    m.cpu.gpr[RCX] = 100;
    let exception = m.fault_of(&assemble(64, CODE, |a| a.rep().movsb()));
    assert_eq!(exception, Exception::PageFault { address: 0x20_0000, error_code: 2 });
    assert_eq!((m.cpu.gpr[RCX], m.cpu.gpr[RDI], m.cpu.gpr[RSI]), (84, 0x20_0000, DATA + 16));
    assert_eq!((m.cpu.rip, m.cpu.retired), (CODE, 0));
}

#[test]
fn port_strings_reach_the_device() {
    let mut m = Machine::long(8);
    m.write(DATA, b"hi");
    m.cpu.gpr[RSI] = DATA;
    m.cpu.gpr[RDX] = 0x3f8;
    m.cpu.gpr[RCX] = 2;
    m.cpu.gpr[RDI] = DATA + 0x10;
    m.run_code(&assemble(64, CODE, |a| {
        a.rep().outsb()?;
        a.insw()
    }));
    let expected = [
        DeviceAccess::PortWrite(0x3f8, b"h".to_vec()),
        DeviceAccess::PortWrite(0x3f8, b"i".to_vec()),
        DeviceAccess::PortRead(0x3f8, 2),
    ];
    assert_eq!(m.io.take(), expected);
    assert_eq!(m.read::<2>(DATA + 0x10), [0xf8, 0xf9]);
}

#[test]
fn page_faults_report_address_and_cause_and_change_nothing() {
    let mut m = Machine::long(8);
    m.cpu.gpr[RBX] = 0x4000_0123;
    m.cpu.gpr[RAX] = 5;
    let exception = m.fault_of(&assemble(64, CODE, |a| a.add(qword_ptr(rbx), rax)));
    assert_eq!(
        exception,
        Exception::PageFault { address: 0x4000_0123, error_code: 2 },
        "a write from the start"
    );
    let exception = m.fault_of(&assemble(64, CODE, |a| {
        a.nop()?;
        a.add(rax, qword_ptr(rbx))
    }));
    assert_eq!(exception, Exception::PageFault { address: 0x4000_0123, error_code: 0 });
    assert_eq!((m.cpu.rip, m.cpu.retired, m.cpu.gpr[RAX]), (CODE + 1, 1, 5));
    // A store that crosses into an absent page writes nothing.
    m.write_u64(PAGE_TABLES + 0x2000 + 8, 0);
    m.cpu.mmu.flush_all();
    m.cpu.gpr[RBX] = 0x1f_fffc;
    m.cpu.gpr[RAX] = u64::MAX;
    let exception = m.fault_of(&assemble(64, CODE, |a| a.mov(qword_ptr(rbx), rax)));
    assert_eq!(exception, Exception::PageFault { address: 0x20_0000, error_code: 2 });
    assert_eq!(m.read::<4>(0x1f_fffc), [0; 4]);
}

#[test]
fn accesses_across_pages_and_unaligned_work() {
    let mut m = Machine::long(8);
    m.cpu.gpr[RBX] = DATA + 0xffd;
    m.run_code(&assemble(64, CODE, |a| {
        a.mov(rax, 0x1122_3344_5566_7788u64)?;
        a.mov(qword_ptr(rbx), rax)?;
        a.add(dword_ptr(rbx + 1), 1)?;
        a.lock().add(qword_ptr(rbx), 1)?;
        a.mov(rcx, qword_ptr(rbx))
    }));
    assert_eq!(m.cpu.gpr[RCX], 0x1122_3344_5566_7889);
    assert_eq!(m.read_u64(DATA + 0xffd), 0x1122_3344_5566_7889);
}

#[test]
fn non_canonical_addresses_fault_by_segment() {
    let mut m = Machine::long(8);
    m.cpu.gpr[RBX] = 0x8000_0000_0000;
    assert_eq!(m.fault_of(&assemble(64, CODE, |a| a.mov(rax, qword_ptr(rbx)))), Exception::GP0);
    m.cpu.gpr[RBP] = 0x8000_0000_0000;
    assert_eq!(m.fault_of(&assemble(64, CODE, |a| a.mov(rax, qword_ptr(rbp)))), Exception::SS0);
    assert_eq!(m.fault_of(&assemble(64, CODE, |a| a.jmp(rbx))), Exception::GP0);
    assert_eq!(m.cpu.rip, CODE, "at the jump, not at its target");
}

#[test]
fn user_code_may_not_touch_supervisor_pages() {
    let mut m = Machine::long(8);
    m.write_u64(PAGE_TABLES + 0x2000 + 8, 0x20_0083);
    m.cpu.gpr[RBX] = 0x20_0000;
    let code = assemble(64, CODE, |a| a.mov(qword_ptr(rbx), rax));
    m.run_code(&code);
    m.enter_user();
    assert_eq!(m.fault_of(&code), Exception::PageFault { address: 0x20_0000, error_code: 7 });
    m.cpu.gpr[RBX] = 0x20_0000;
    let exception = m.fault_of(&assemble(64, CODE, |a| a.jmp(rbx)));
    assert_eq!(exception, Exception::PageFault { address: 0x20_0000, error_code: 0x15 });
    assert_eq!(m.cpu.rip, 0x20_0000);
}

#[test]
fn translations_live_until_they_are_flushed() {
    let mut m = Machine::long(8);
    m.write_u64(0x20_0000, 1);
    m.write_u64(0x40_0000, 2);
    m.cpu.gpr[RBX] = 0x20_0000;
    let code = assemble(64, CODE, |a| a.mov(rax, qword_ptr(rbx)));
    m.run_code(&code);
    m.write_u64(PAGE_TABLES + 0x2000 + 8, 0x40_0087);
    m.cpu.mmu.flush_page(0x20_0000);
    m.run_code(&code);
    assert_eq!(m.cpu.gpr[RAX], 2);
    m.write_u64(PAGE_TABLES + 0x2000 + 8, 0x20_0087);
    m.cpu.mmu.flush_non_global();
    m.run_code(&code);
    assert_eq!(m.cpu.gpr[RAX], 1);
}

#[test]
fn spaces_run_out_and_start_over() {
    let mut m = Machine::long(8);
    m.write_u64(DATA, 42);
    m.cpu.gpr[RBX] = DATA;
    let code = assemble(64, CODE, |a| a.mov(rax, qword_ptr(rbx)));
    for i in 0..9000u64 {
        if i % 3 == 0 {
            m.cpu.mmu.flush_all();
        } else {
            m.cpu.mmu.flush_non_global();
        }
        m.write_u64(DATA, i);
        m.run_code(&code);
        assert_eq!(m.cpu.gpr[RAX], i);
    }
}

#[test]
fn pcids_keep_their_translations_apart() {
    let mut m = Machine::with_model(8, "host");
    m.enter_long();
    m.cpu.cr4 |= control::CR4_PCIDE;
    // A second set of structures maps the second 2 MiB to the third.
    for (from, to) in [(0x0u64, 0x3000u64), (0x1000, 0x4000), (0x2000, 0x5000)] {
        let page: [u8; 4096] = m.read(PAGE_TABLES + from);
        m.write(PAGE_TABLES + to, &page);
    }
    m.write_u64(PAGE_TABLES + 0x3000, (PAGE_TABLES + 0x4000) | 7);
    m.write_u64(PAGE_TABLES + 0x4000, (PAGE_TABLES + 0x5000) | 7);
    m.write_u64(PAGE_TABLES + 0x5000 + 8, 0x40_0087);
    m.write_u64(0x20_0000, 1);
    m.write_u64(0x40_0000, 2);
    m.cpu.gpr[RBX] = 0x20_0000;
    let code = assemble(64, CODE, |a| a.mov(rax, qword_ptr(rbx)));
    for round in 0..4u64 {
        let other = round & 1;
        m.cpu.cr3 = (PAGE_TABLES + 0x3000 * other) | (1 + other);
        m.run_code(&code);
        assert_eq!(m.cpu.gpr[RAX], 1 + other);
    }
    // An entry of PCID 1 survives while PCID 2 runs, until it is flushed.
    m.cpu.cr3 = PAGE_TABLES | 1;
    m.cpu.gpr[RBX] = 0x20_1000;
    m.write_u64(0x20_1000, 1);
    m.write_u64(0x40_1000, 2);
    m.run_code(&code);
    m.write_u64(PAGE_TABLES + 0x2000 + 8, 0x40_0087);
    m.cpu.cr3 = (PAGE_TABLES + 0x3000) | 2;
    m.run_code(&[0x90]);
    m.cpu.cr3 = PAGE_TABLES | 1;
    m.run_code(&code);
    assert_eq!(m.cpu.gpr[RAX], 1);
    m.cpu.mmu.flush_pcid(1);
    m.run_code(&code);
    assert_eq!(m.cpu.gpr[RAX], 2);
}

#[test]
fn code_that_changes_itself_is_seen_by_the_next_instruction() {
    // mov byte [rip + 1], 0x90 ; inc eax's opcode bytes become nop nop … hlt
    let mut m = Machine::long(8);
    let code = assemble(64, CODE, |a| {
        a.mov(word_ptr(CODE + 0x20), 0x9090)?;
        while a.instructions().len() < 30 {
            a.nop()?;
        }
        a.inc(eax)
    });
    // The INC lies somewhere after; aim the store at it.
    let at = CODE + code.len() as u64 - 2;
    let code = assemble(64, CODE, |a| {
        a.mov(word_ptr(at), 0x9090)?;
        while a.instructions().len() < 30 {
            a.nop()?;
        }
        a.inc(eax)
    });
    m.run_code(&code);
    assert_eq!(m.cpu.gpr[RAX], 0);
    // Patched from outside between two runs.
    m.run_code(&[0xff, 0xc0]);
    m.run_code(&[0xff, 0xc8]);
    assert_eq!(m.cpu.gpr[RAX], 0);
}

#[test]
fn data_beside_code_stays_correct_when_the_page_stops_counting_as_code() {
    let mut m = Machine::long(8);
    m.cpu.gpr[RBX] = CODE + 0x800;
    let code = assemble(64, CODE, |a| {
        let mut again = a.create_label();
        a.mov(ecx, 1000)?;
        a.set_label(&mut again)?;
        a.inc(dword_ptr(rbx))?;
        a.dec(ecx)?;
        a.jne(again)
    });
    m.run_code(&code);
    assert_eq!(m.read_u64(CODE + 0x800), 1000);
}

#[test]
fn an_instruction_across_pages_follows_changes_of_both() {
    let mut m = Machine::long(8);
    let at = CODE + 0xffd;
    // mov eax, imm32 ; hlt
    m.write(at, &[0xb8, 1, 0, 0, 0, 0xf4]);
    let go = |m: &mut Machine| {
        m.cpu.rip = at;
        m.cpu.activity = Default::default();
        assert_eq!(m.run(), Leave::Inactive);
        m.cpu.gpr[RAX]
    };
    assert_eq!(go(&mut m), 1);
    m.write(at + 4, &[0x12]);
    assert_eq!(go(&mut m), 0x1200_0001);
    m.write(at + 1, &[7]);
    assert_eq!(go(&mut m), 0x1200_0007);
}

#[test]
fn fetch_across_an_absent_page_names_that_page() {
    let mut m = Machine::long(8);
    m.write_u64(PAGE_TABLES + 0x2000 + 8, 0);
    m.write(0x1f_fffe, &[0xb8, 1]);
    m.cpu.rip = 0x1f_fffe;
    assert_eq!(m.run(), Leave::Exception(Exception::PageFault { address: 0x20_0000, error_code: 0x10 }));
    assert_eq!(m.cpu.rip, 0x1f_fffe);
}

#[test]
fn instructions_longer_than_15_bytes_fault() {
    let mut m = Machine::long(8);
    let mut code = vec![0x66; 13];
    code.extend([0x01, 0xc0]);
    m.run_code(&code);
    let mut code = vec![0x66; 14];
    code.extend([0x01, 0xc0]);
    assert_eq!(m.fault_of(&code), Exception::GP0);
    assert_eq!(m.fault_of(&[0x2e; 20]), Exception::GP0);
    assert_eq!(m.fault_of(&[0x66, 0x66, 0x0f, 0x0b]), Exception::UD);
}

#[test]
fn lock_on_what_cannot_be_locked_is_undefined() {
    let mut m = Machine::long(8);
    assert_eq!(m.fault_of(&[0xf0, 0x01, 0xc0]), Exception::UD, "register destination");
    assert_eq!(m.fault_of(&[0xf0, 0x8b, 0x03]), Exception::UD, "MOV");
    assert_eq!(m.fault_of(&[0xf0, 0x3b, 0x03]), Exception::UD, "CMP");
    assert_eq!(m.fault_of(&[0x0f, 0xc7, 0xc8]), Exception::UD, "CMPXCHG8B of a register");
    for byte in [0x06, 0x27, 0x2f, 0x37, 0x3f, 0x60, 0x61, 0x62, 0xce, 0xd4, 0xd6, 0x9a, 0xea, 0x82] {
        assert_eq!(m.fault_of(&[byte, 0, 0, 0, 0, 0, 0]), Exception::UD, "{byte:#x} in 64-bit mode");
    }
}

#[test]
fn alignment_is_checked_at_cpl_3_with_am_and_ac() {
    let mut m = Machine::long(8);
    m.cpu.cr0 |= control::CR0_AM;
    m.cpu.gpr[RBX] = DATA + 2;
    let code = assemble(64, CODE, |a| a.mov(eax, dword_ptr(rbx)));
    m.cpu.rflags |= flag::AC;
    m.run_code(&code);
    m.enter_user();
    assert_eq!(m.fault_of(&code), Exception::with_code(vector::AC, 0));
    m.cpu.gpr[RBX] = DATA + 4;
    assert_eq!(m.fault_of(&code), Exception::GP0, "only the HLT that follows");
    m.cpu.rflags &= !flag::AC;
    m.cpu.gpr[RBX] = DATA + 2;
    assert_eq!(m.fault_of(&code), Exception::GP0);
}

#[test]
fn devices_get_accesses_of_their_size() {
    let mut m = Machine::protected32(8);
    m.cpu.gpr[RBX] = DEVICE;
    m.run_code(&assemble(32, CODE, |a| {
        a.mov(eax, dword_ptr(ebx + 0x10))?;
        a.mov(byte_ptr(ebx), 7)?;
        a.add(word_ptr(ebx + 2), 1)
    }));
    assert_eq!(m.cpu.gpr[RAX], 0x1312_1110);
    let base = DEVICE;
    let expected = [
        DeviceAccess::Read(base + 0x10, 4),
        DeviceAccess::Write(base, vec![7]),
        DeviceAccess::Read(base + 2, 2),
        DeviceAccess::Write(base + 2, vec![3, 3]),
    ];
    assert_eq!(m.io.take(), expected);
}

#[test]
fn code_can_be_executed_from_a_device() {
    struct Nops;
    impl atoll_machine::backend::CpuIo for Nops {
        fn port_read(&self, _: u16, data: &mut [u8]) {
            data.fill(0xff);
        }
        fn port_write(&self, _: u16, _: &[u8]) {}
        fn mmio_read(&self, address: u64, data: &mut [u8]) {
            for (i, byte) in data.iter_mut().enumerate() {
                *byte = if address + i as u64 >= DEVICE + 0x1003 { 0xf4 } else { 0x90 };
            }
        }
        fn mmio_write(&self, _: u64, _: &[u8]) {}
    }
    let mut m = Machine::protected32(8);
    m.cpu.rip = DEVICE + 0xff8;
    let mut leave = Leave::Events;
    for _ in 0..20 {
        leave = run(&mut m.cpu, &Nops);
        if leave != Leave::Events {
            break;
        }
    }
    assert_eq!((leave, m.cpu.rip, m.cpu.retired), (Leave::Inactive, DEVICE + 0x1004, 12));
}

#[test]
fn segment_limits_and_types_are_checked_in_protected_mode() {
    let mut m = Machine::protected32(8);
    m.cpu.segments[seg::DS].limit = 0xfff;
    m.cpu.gpr[RBX] = 0xffd;
    assert_eq!(m.fault_of(&assemble(32, CODE, |a| a.mov(eax, dword_ptr(ebx)))), Exception::GP0);
    m.cpu.gpr[RBX] = 0xffc;
    m.run_code(&assemble(32, CODE, |a| a.mov(eax, dword_ptr(ebx))));
    // cs: override, a write.
    assert_eq!(m.fault_of(&[0x2e, 0x89, 0x03]), Exception::GP0);
    m.cpu.segments[seg::ES].attributes |= 1 << 16;
    assert_eq!(m.fault_of(&[0x26, 0x8b, 0x03]), Exception::GP0, "a null selector");
    m.cpu.segments[seg::SS].attributes |= 4;
    m.cpu.segments[seg::SS].limit = 0xffff;
    m.cpu.gpr[RSP] = 0x1_0002;
    m.load_code(&[0x50]);
    m.cpu.gpr[RSP] = 0x1_0002;
    assert_eq!(m.run(), Leave::Exception(Exception::SS0), "below an expand-down segment");
}

#[test]
fn jumps_beyond_the_code_segment_fault_at_the_jump() {
    let mut m = Machine::protected32(8);
    m.cpu.segments[seg::CS].limit = 0x1_ffff;
    m.cpu.gpr[RAX] = 0x2_0000;
    assert_eq!(m.fault_of(&[0xff, 0xe0]), Exception::GP0);
    assert_eq!(m.cpu.rip, CODE);
    // Running off the end faults there.
    m.cpu.segments[seg::CS].limit = CODE as u32 + 2;
    m.load_code(&[0x90, 0x90, 0xb8, 1, 2, 3, 4]);
    let before = m.cpu.retired;
    assert_eq!(m.run(), Leave::Exception(Exception::GP0));
    assert_eq!((m.cpu.rip, m.cpu.retired - before), (CODE + 2, 2));
}

#[test]
fn sixteen_bit_addresses_and_stacks_wrap() {
    let mut m = Machine::real(8);
    m.cpu.gpr[RBX] = 0x1_fff0;
    m.cpu.gpr[RSI] = 0x20;
    m.write(0x10, &[0x34, 0x12]);
    m.run_code(&assemble(16, 0x8000, |a| {
        a.mov(ax, word_ptr(bx + si))?;
        a.mov(sp, 2)?;
        a.push(ax)?;
        a.push(ax)?;
        a.pusha()
    }));
    assert_eq!(m.cpu.gpr[RAX] & 0xffff, 0x1234);
    assert_eq!(m.cpu.gpr[RSP] & 0xffff, 0xffee);
    assert_eq!(m.read::<2>(0xfffe), [0x34, 0x12]);
    let mut m = Machine::real(8);
    m.load_code(&[0x50]);
    m.cpu.gpr[RSP] = 1;
    assert_eq!(m.run(), Leave::Exception(Exception::SS0), "a word at offset 0xffff");
}

#[test]
fn decimal_adjustments() {
    let mut m = Machine::protected32(8);
    m.run_code(&assemble(32, CODE, |a| {
        a.mov(al, 0x79)?;
        a.add(al, 0x35)?;
        a.daa()?;
        a.mov(bl, al)?;
        a.mov(ax, 0x0109)?;
        a.add(al, 5)?;
        a.aaa()?;
        a.mov(cx, ax)?;
        a.mov(al, 77)?;
        a.aam(10)
    }));
    assert_eq!(m.cpu.gpr[RBX] & 0xff, 0x14);
    assert_eq!(m.cpu.gpr[RCX] & 0xffff, 0x0204);
    assert_eq!(m.cpu.gpr[RAX] & 0xffff, 0x0707);
    assert_eq!(m.fault_of(&[0xd4, 0]), Exception::DE);
}

#[test]
fn bound_raises_its_exception() {
    let mut m = Machine::protected32(8);
    m.write(DATA, &[0xff, 0xff, 0xff, 0xff, 5, 0, 0, 0]);
    m.cpu.gpr[RBX] = DATA;
    m.cpu.gpr[RAX] = 5;
    m.run_code(&[0x62, 0x03]);
    m.cpu.gpr[RAX] = 6;
    assert_eq!(m.fault_of(&[0x62, 0x03]), Exception::fault(vector::BR));
}

#[test]
fn counted_budgets_and_steps_are_exact() {
    let mut m = Machine::long(8);
    let mut code = vec![0x90; 200];
    code.extend([0xeb, 0xfe]);
    m.load_code(&code);
    m.cpu.budget_end = 77;
    assert_eq!(m.run(), Leave::Budget);
    assert_eq!((m.cpu.retired, m.cpu.rip), (77, CODE + 77));
    assert_eq!(step(&mut m.cpu, &m.io), Leave::Budget);
    m.cpu.budget_end = u64::MAX;
    assert_eq!(step(&mut m.cpu, &m.io), Leave::Events);
    assert_eq!((m.cpu.retired, m.cpu.rip), (78, CODE + 78));
    m.cpu.budget_end = 10_000;
    assert_eq!(m.run(), Leave::Budget);
    assert_eq!((m.cpu.retired, m.cpu.rip), (10_000, CODE + 200));
}

#[test]
fn requests_interrupt_a_long_copy_with_exact_counters() {
    let mut m = Machine::long(8);
    m.cpu.requests.store(1, std::sync::atomic::Ordering::SeqCst);
    let code = assemble(64, CODE, |a| a.rep().movsb());
    m.load_code(&code);
    m.cpu.gpr[RSI] = 0x20_0000;
    m.cpu.gpr[RDI] = 0x30_0000;
    m.cpu.gpr[RCX] = 0x10_0000;
    assert_eq!(run(&mut m.cpu, &m.io), Leave::Events);
    let done = 0x10_0000 - m.cpu.gpr[RCX];
    assert!(done > 0 && done <= 0x2000, "{done}");
    assert_eq!((m.cpu.gpr[RSI], m.cpu.gpr[RDI], m.cpu.rip), (0x20_0000 + done, 0x30_0000 + done, CODE));
    assert_eq!(m.cpu.retired, 0);
}

#[test]
fn a_very_long_copy_gives_the_run_loop_a_turn() {
    let mut m = Machine::long(8);
    m.load_code(&assemble(64, CODE, |a| a.rep().stosb()));
    m.cpu.gpr[RDI] = 0x20_0000;
    m.cpu.gpr[RCX] = 0x40_0000;
    assert_eq!(run(&mut m.cpu, &m.io), Leave::Events);
    let left = m.cpu.gpr[RCX];
    assert!(left > 0 && left < 0x40_0000 && m.cpu.rip == CODE && m.cpu.retired == 0, "{left:#x}");
    assert_eq!(m.cpu.gpr[RDI], 0x60_0000 - left);
}

#[test]
fn dirty_logs_see_stores_of_the_interpreter() {
    let mut m = Machine::long(8);
    m.cpu.gpr[RBX] = DATA;
    let code = assemble(64, CODE, |a| a.mov(qword_ptr(rbx), rax));
    m.run_code(&code);
    let mut log = m.ram.dirty_log();
    log.take();
    m.load_code(&code);
    log.take();
    assert_eq!(step(&mut m.cpu, &m.io), Leave::Events);
    assert_eq!(log.take().iter().collect::<Vec<_>>(), [DATA / 4096]);
    m.cpu.rip = CODE;
    assert_eq!(step(&mut m.cpu, &m.io), Leave::Events);
    assert_eq!(log.take().iter().collect::<Vec<_>>(), [DATA / 4096]);
}

#[test]
fn missing_features_are_undefined_instructions() {
    let mut m = Machine::long(8);
    // ADCX, RDSEED, SHA1NEXTE, XBEGIN, CLWB, RDPID
    for code in [
        &[0x66, 0x0f, 0x38, 0xf6, 0xc1][..],
        &[0x0f, 0xc7, 0xf8],
        &[0x0f, 0x38, 0xc8, 0xc1],
        &[0xc7, 0xf8, 0, 0, 0, 0],
        &[0xf3, 0x0f, 0xc7, 0xf8],
    ] {
        assert_eq!(m.fault_of(code), Exception::UD, "{code:02x?}");
    }
    // Hints are NOPs: ENDBR64, PREFETCHW, a long NOP, RDSSPQ.
    m.run_code(&[
        0xf3, 0x0f, 0x1e, 0xfa, 0x0f, 0x0d, 0x0b, 0x0f, 0x1f, 0x44, 0, 0, 0xf3, 0x48, 0x0f, 0x1e, 0xc8,
    ]);
}
