//! Real mode, virtual-8086 mode, 32-bit gates and hardware task switches.

use atoll_machine::backend::HaltReason;
use atoll_machine::cpu::state::{CpuState, DescriptorTable, Segment, seg};
use iced_x86::IcedError;
use iced_x86::code_asm::*;

use crate::guest::*;

/// A 32-bit GDT descriptor.
fn descriptor(base: u64, limit: u64, access: u64, flags: u64) -> u64 {
    limit & 0xffff
        | (base & 0xff_ffff) << 16
        | access << 40
        | (limit >> 16 & 0xf) << 48
        | flags << 52
        | (base >> 24 & 0xff) << 56
}

/// 32-bit handlers: each logs its vector, then what lies on its stack in `words` words, and exits.
fn handlers32(m: &Machine, words: &[(u64, i32)]) {
    for v in 0..256u64 {
        let shown = words.iter().find(|w| w.0 == v).map_or(0, |w| w.1);
        let at = 0x50000 + v * 0x80;
        m.assemble_at(32, at, |a| {
            a.mov(eax, v as u32 | 0xffff_0000)?;
            a.out(0xe9, eax)?;
            for n in 0..shown {
                a.mov(eax, dword_ptr(esp + n * 4))?;
                a.out(0xe9, eax)?;
            }
            exit(a)
        });
        gate32(m, v, sel::CODE32, at, 0x8e);
    }
}

fn gate32(m: &Machine, v: u64, selector: u16, target: u64, kind: u64) {
    let low = target & 0xffff | u64::from(selector) << 16 | kind << 40 | (target >> 16 & 0xffff) << 48;
    m.write64(IDT + v * 8, low);
}

fn protected(m: &Machine) -> CpuState {
    let mut s = m.protected_state();
    s.idtr = DescriptorTable { base: IDT, limit: 0x7ff };
    s
}

#[test]
fn real_mode_interrupts_use_the_vector_table() {
    let mut m = Machine::new();
    m.write(0x21 * 4, &[0x00, 0x90, 0x00, 0x00]); // 0000:9000
    m.assemble_at(16, 0x9000, |a| {
        a.pushf()?;
        a.pop(ax)?;
        a.out(0xe9, ax)?;
        a.mov(bp, sp)?;
        a.mov(ax, word_ptr(bp))?;
        a.out(0xe9, ax)?;
        a.iret()
    });
    m.assemble_at(16, 0x7c00, |a| {
        a.sti()?;
        a.int(0x21)?;
        a.pushf()?;
        a.pop(ax)?;
        a.out(0xe9, ax)?;
        exit(a)
    });
    let state = m.real_state();
    m.run_from(&state);
    assert_eq!(m.log(), [0x0002, 0x7c03, 0x0202]);
}

#[test]
fn real_mode_division_by_zero_returns_to_the_instruction() {
    let mut m = Machine::new();
    m.write(0, &[0x00, 0x90, 0x00, 0x00]);
    m.assemble_at(16, 0x9000, |a| {
        a.pop(ax)?;
        a.out(0xe9, ax)?;
        exit(a)
    });
    m.assemble_at(16, 0x7c00, |a| {
        a.xor(cx, cx)?;
        a.div(cx)
    });
    let state = m.real_state();
    m.run_from(&state);
    assert_eq!(m.log(), [0x7c02]);
}

#[test]
fn real_mode_far_calls_and_returns_nest() {
    let mut m = Machine::new();
    m.assemble_at(16, 0x7c00, |a| {
        a.db(&[0x9a, 0x10, 0x00, 0x00, 0x09])?; // CALL 0900:0010
        a.mov(ax, cs)?;
        a.out(0xe9, ax)?;
        exit(a)
    });
    m.assemble_at(16, 0x9010, |a| {
        a.mov(ax, cs)?;
        a.out(0xe9, ax)?;
        a.retf()
    });
    let state = m.real_state();
    m.run_from(&state);
    assert_eq!(m.log(), [0x900, 0]);
}

#[test]
fn unreal_mode_keeps_the_limits_of_protected_mode() {
    let mut m = Machine::new();
    m.write32(0x20_0000, 0x7654_3210);
    m.write(0x7000, &0xfffu16.to_le_bytes());
    m.write32(0x7002, GDT as u32);
    m.assemble_at(16, 0x7c00, |a| {
        a.lgdt(fword_ptr(0x7000))?;
        a.mov(eax, cr0)?;
        a.or(al, 1)?;
        a.mov(cr0, eax)?;
        a.mov(bx, u32::from(sel::DATA))?;
        a.mov(ds, ebx)?;
        a.and(al, 0xfeu32 as i32)?;
        a.mov(cr0, eax)?;
        a.xor(bx, bx)?;
        a.mov(ds, ebx)?;
        a.mov(ebx, 0x20_0000)?;
        a.mov(eax, dword_ptr(ebx))?;
        a.out(0xe9, eax)?;
        exit(a)
    });
    let state = m.real_state();
    m.run_from(&state);
    assert_eq!(m.log(), [0x7654_3210]);
}

/// Enters virtual-8086 mode at 0000:7c00 with `flags`, from a 32-bit ring 0 at CODE.
fn run_v8086(m: &mut Machine, flags: u32, build: impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError>) {
    m.assemble_at(16, 0x7c00, |a| build(a));
    m.assemble_at(32, CODE, |a| {
        for value in [0x44, 0x33, 0x22, 0x11, 0, 0x6ff0u32] {
            // GS, FS, DS, ES, SS, ESP
            a.push(value as i32)?;
        }
        a.push((flags | 0x2_0002) as i32)?;
        a.push(0)?;
        a.push(0x7c00)?;
        a.iretd()
    });
    m.write(TSS + 4, &(STACK as u32).to_le_bytes());
    m.write(TSS + 8, &u32::from(sel::DATA).to_le_bytes());
    m.write(TSS + 0x66, &0x68u16.to_le_bytes());
    let mut state = protected(m);
    state.tr.limit = 0x67;
    m.run_from(&state);
}

#[test]
fn v8086_interrupts_push_the_data_segments_and_enter_ring_0() {
    let mut m = Machine::new();
    handlers32(&m, &[(0x40, 9)]);
    gate32(&m, 0x40, sel::CODE32, 0x50000 + 0x40 * 0x80, 0xee);
    run_v8086(&mut m, 0x3000, |a| {
        a.mov(ax, ds)?;
        a.mov(bx, ax)?;
        a.int(0x40)
    });
    let log = m.log();
    assert_eq!(log[0], 0xffff_0040);
    assert_eq!(log[1..3], [0x7c06, 0]);
    assert_eq!(log[3] & 0x2_3000, 0x2_3000);
    assert_eq!(log[4..], [0x6ff0, 0, 0x11, 0x22, 0x33, 0x44]);
}

#[test]
fn v8086_needs_iopl_3_for_flags_and_software_interrupts() {
    type Build = fn(&mut CodeAssembler) -> Result<(), IcedError>;
    let cases: [Build; 5] = [|a| a.int(0x40), |a| a.pushf(), |a| a.popf(), |a| a.cli(), |a| a.iret()];
    for (n, build) in cases.into_iter().enumerate() {
        let mut m = Machine::new();
        handlers32(&m, &[(13, 2)]);
        run_v8086(&mut m, 0, build);
        assert_eq!(m.log(), [0xffff_000d, 0, 0x7c00], "case {n}");
    }
    // Ports follow the bitmap whatever IOPL says.
    let mut m = Machine::new();
    handlers32(&m, &[(13, 2)]);
    run_v8086(&mut m, 0x3000, |a| a.out(0xe9, al));
    assert_eq!(m.log(), [0xffff_000d, 0, 0x7c00]);
}

#[test]
fn protected_mode_call_gate_copies_parameters() {
    let mut m = Machine::new();
    handlers32(&m, &[]);
    m.write(TSS + 4, &(STACK as u32).to_le_bytes());
    m.write(TSS + 8, &u32::from(sel::DATA).to_le_bytes());
    // A 32-bit call gate, DPL 3, two parameters, to 0x60000.
    let target = 0x60000u64;
    m.write64(
        GDT + u64::from(sel::FREE),
        target & 0xffff | u64::from(sel::CODE32) << 16 | 2 << 32 | 0xec << 40 | (target >> 16) << 48,
    );
    m.assemble_at(32, target, |a| {
        for n in 0..6 {
            a.mov(eax, dword_ptr(esp + n * 4))?;
            a.out(0xe9, eax)?;
        }
        a.db(&[0xca, 8, 0]) // RETF 8
    });
    m.assemble_at(32, USER_CODE, |a| {
        a.push(0x1111)?;
        a.push(0x2222)?;
        a.db(&[0x9a])?; // CALL ptr16:32
        a.dd(&[0])?;
        a.dw(&[sel::FREE | 3])?;
        a.mov(ebx, esp)?;
        a.mov(eax, ds)?;
        a.ud2()
    });
    m.assemble_at(32, 0x50000 + 6 * 0x80, |a| {
        a.mov(eax, ebx)?;
        a.out(0xe9, eax)?;
        exit(a)
    });
    let mut state = protected(&m);
    state.segments = [segment(sel::USER_DATA, 0xc0f3); 6];
    state.segments[seg::CS] = segment(sel::USER32, 0xc0fb);
    state.rip = USER_CODE;
    state.gpr[4] = USER_STACK;
    m.run_from(&state);
    let back = USER_CODE as u32 + 5 + 5 + 7;
    let top = USER_STACK as u32;
    assert_eq!(m.log(), [back, sel::USER32.into(), 0x2222, 0x1111, top - 8, sel::USER_DATA.into(), top]);
}

const TSS_B: u64 = 0x4000;

/// A 32-bit TSS for a task at `ip` with selectors of ring 0.
fn write_tss(m: &Machine, at: u64, ip: u64, flags: u32) {
    m.write(at, &[0; 0x68]);
    m.write32(at + 0x20, ip as u32);
    m.write32(at + 0x24, flags);
    m.write32(at + 0x28, 0xaaaa);
    m.write32(at + 0x38, (IST_STACK) as u32);
    for (n, selector) in
        [sel::DATA, sel::CODE32, sel::DATA, sel::DATA, sel::DATA, sel::DATA].into_iter().enumerate()
    {
        m.write(at + 0x48 + n as u64 * 4, &selector.to_le_bytes());
    }
    m.write64(GDT + u64::from(sel::FREE), descriptor(at, 0x67, 0x89, 0));
}

fn far(a: &mut CodeAssembler, opcode: u8, selector: u16) -> Result<(), IcedError> {
    a.db(&[opcode])?;
    a.dd(&[0])?;
    a.dw(&[selector])
}

fn busy(m: &Machine, selector: u16) -> bool {
    m.read64(GDT + u64::from(selector)) >> 41 & 1 != 0
}

/// Ring 0 with the task register pointing to the busy TSS at TSS.
fn task_state(m: &Machine) -> CpuState {
    m.write64(GDT + u64::from(sel::TSS), descriptor(TSS, 0x67, 0x8b, 0));
    let mut s = protected(m);
    s.tr = Segment { selector: sel::TSS, base: TSS, limit: 0x67, attributes: 0x8b };
    s
}

#[test]
fn call_switches_tasks_and_iret_returns() {
    let mut m = Machine::new();
    handlers32(&m, &[]);
    write_tss(&m, TSS_B, 0x60000, 2);
    m.assemble_at(32, CODE, |a| {
        a.mov(ebx, 0x77)?;
        far(a, 0x9a, sel::FREE)?;
        a.mov(eax, ebx)?;
        a.out(0xe9, eax)?;
        a.str(eax)?;
        a.out(0xe9, eax)?;
        a.pushfd()?;
        a.pop(eax)?;
        a.out(0xe9, eax)?;
        exit(a)
    });
    m.assemble_at(32, 0x60000, |a| {
        a.out(0xe9, eax)?; // from the TSS
        a.pushfd()?;
        a.pop(eax)?;
        a.out(0xe9, eax)?; // NT
        a.mov(eax, cr0)?;
        a.out(0xe9, eax)?; // TS
        a.str(eax)?;
        a.out(0xe9, eax)?;
        a.mov(ebx, 5)?;
        a.clts()?;
        a.iretd()
    });
    let state = task_state(&m);
    m.run_from(&state);
    assert_eq!(m.log(), [0xaaaa, 0x4002, 0x39, sel::FREE.into(), 0x77, sel::TSS.into(), 2]);
    assert_eq!((busy(&m, sel::TSS), busy(&m, sel::FREE)), (true, false));
    assert_eq!((m.read16(TSS_B), m.read32(TSS + 0x34)), (sel::TSS, 0x77), "link, saved EBX");
    assert_eq!(m.read32(TSS_B + 0x24) & 0x4000, 0, "NT was cleared in the returning task");
}

#[test]
fn jump_moves_the_busy_bit_and_refuses_a_busy_task() {
    let mut m = Machine::new();
    handlers32(&m, &[(13, 2)]);
    write_tss(&m, TSS_B, 0x60000, 2);
    m.assemble_at(32, CODE, |a| far(a, 0xea, sel::FREE));
    m.assemble_at(32, 0x60000, |a| far(a, 0xea, sel::FREE));
    let state = task_state(&m);
    m.run_from(&state);
    assert_eq!(m.log(), [0xffff_000d, sel::FREE.into(), 0x60000]);
    assert_eq!((busy(&m, sel::TSS), busy(&m, sel::FREE)), (false, true));
}

#[test]
fn task_gate_in_the_idt_switches_and_pushes_the_error_code() {
    let mut m = Machine::new();
    handlers32(&m, &[]);
    write_tss(&m, TSS_B, 0x60000, 2);
    gate32(&m, 13, sel::FREE, 0, 0x85);
    m.assemble_at(32, CODE, |a| {
        a.mov(eax, u32::from(sel::FREE))?; // a TSS is no data segment
        a.mov(ds, eax)
    });
    m.assemble_at(32, 0x60000, |a| {
        a.pop(eax)?;
        a.out(0xe9, eax)?;
        a.mov(eax, esp)?;
        a.out(0xe9, eax)?;
        exit(a)
    });
    let state = task_state(&m);
    m.run_from(&state);
    assert_eq!(m.log(), [sel::FREE.into(), IST_STACK as u32]);
    assert_eq!(m.read32(TSS + 0x20), CODE as u32 + 5, "the faulting instruction");
}

#[test]
fn faults_in_the_new_task_happen_there() {
    let mut m = Machine::new();
    handlers32(&m, &[(10, 2)]);
    write_tss(&m, TSS_B, 0x60000, 2);
    m.write(TSS_B + 0x54, &(sel::TSS).to_le_bytes()); // DS: not a data segment
    m.assemble_at(32, CODE, |a| far(a, 0xea, sel::FREE));
    let state = task_state(&m);
    m.run_from(&state);
    assert_eq!(m.log(), [0xffff_000a, sel::TSS.into(), 0x60000]);
}

#[test]
fn trap_flag_of_the_tss_raises_debug_exception_before_the_first_instruction() {
    use atoll_machine::backend::Vcpu;
    let mut m = Machine::new();
    handlers32(&m, &[(1, 1)]);
    write_tss(&m, TSS_B, 0x60000, 2);
    m.write(TSS_B + 0x64, &[1]);
    m.assemble_at(32, CODE, |a| far(a, 0xea, sel::FREE));
    m.assemble_at(32, 0x60000, |a| a.ud2());
    let state = task_state(&m);
    m.run_from(&state);
    assert_eq!(m.log(), [0xffff_0001, 0x60000]);
    assert_eq!(m.vcpu.state().dr6 & 0x8000, 0x8000);
}

#[test]
fn protected_mode_triple_fault_shuts_down() {
    let mut m = Machine::new();
    m.assemble_at(32, CODE, |a| a.ud2());
    let mut state = protected(&m);
    state.idtr.limit = 0;
    assert_eq!(m.run_from(&state), HaltReason::TripleFault);
    assert_eq!(m.run(), HaltReason::TripleFault, "and stays so");
}
