//! Processor modes, faults and arithmetic units, as guest programs see them.

use atoll_machine::backend::Backend;
use atoll_machine::cpu::state::gpr;
use atoll_machine::memory::RamBlock;
use iced_x86::IcedError;
use iced_x86::code_asm::*;

use crate::fixture::Machine;
use crate::payload::{
    CODE, DATA, GDT, PML4, Payload, REAL_CODE, assemble, fault_of, resume_of, selector, stack_of,
};

const PAGE_DIRECTORY: u64 = DATA + 0x1000;
const PAE_POINTERS: u64 = DATA + 0x2000;
const LONG_PART: u64 = CODE + 0x1000;
const COMPATIBLE_PART: u64 = CODE + 0x2000;
const PROTECTED16_PART: u64 = REAL_CODE + 0x400;
const REAL_PART: u64 = REAL_CODE + 0x480;
const GDT_POINTER: u64 = 0x500;
const LAST_MARK: u64 = 0x510;

/// A far jump with a 32-bit offset in 32-bit code.
fn far_jump32(a: &mut CodeAssembler, offset: u64, selector: u16) -> Result<(), IcedError> {
    let mut bytes = vec![0xea];
    bytes.extend((offset as u32).to_le_bytes());
    bytes.extend(selector.to_le_bytes());
    a.db(&bytes)
}

/// Writes `value` where the case looks.
fn mark(a: &mut CodeAssembler, value: u32) -> Result<(), IcedError> {
    a.mov(dword_ptr(DATA + u64::from(value) * 4), value)
}

/// Turns paging on with `tables` and `features` in CR4.
fn paging_on(a: &mut CodeAssembler, tables: u64, features: u32) -> Result<(), IcedError> {
    a.mov(eax, tables as u32)?;
    a.mov(cr3, eax)?;
    a.mov(eax, features)?;
    a.mov(cr4, eax)?;
    a.mov(eax, cr0)?;
    a.or(eax, 0x8000_0000u32 as i32)?;
    a.mov(cr0, eax)
}

fn paging_off(a: &mut CodeAssembler) -> Result<(), IcedError> {
    a.mov(eax, cr0)?;
    a.and(eax, 0x7fff_ffff)?;
    a.mov(cr0, eax)
}

fn set_long_mode(a: &mut CodeAssembler, on: bool) -> Result<(), IcedError> {
    a.mov(ecx, 0xc000_0080u32)?;
    a.rdmsr()?;
    if on {
        a.or(eax, 0x100)?
    } else {
        a.and(eax, !0x100)?
    };
    a.wrmsr()
}

/// Loads the data segments with AX.
fn data_segments(a: &mut CodeAssembler) -> Result<(), IcedError> {
    a.mov(ds, ax)?;
    a.mov(es, ax)?;
    a.mov(ss, ax)
}

/// Protected mode without paging, with 4 MiB pages, with PAE, and into long mode.
fn protected_part(ram: &RamBlock) {
    let code = assemble(32, CODE, |a| {
        a.mov(eax, u32::from(selector::DATA))?;
        data_segments(a)?;
        a.mov(esp, stack_of(0) as u32)?;
        mark(a, 1)?;
        paging_on(a, PAGE_DIRECTORY, 0x10)?;
        mark(a, 2)?;
        // The second 4 MiB show the first.
        a.mov(ebx, dword_ptr(DATA + 0x40_0000 + 8))?;
        paging_off(a)?;
        paging_on(a, PAE_POINTERS, 0x20)?;
        mark(a, 3)?;
        paging_off(a)?;
        set_long_mode(a, true)?;
        paging_on(a, PML4, 0x20)?;
        mark(a, 4)?;
        far_jump32(a, LONG_PART, selector::CODE64)
    });
    ram.write(CODE, &code).expect("RAM");
}

/// 64-bit mode, compatibility mode, protected mode, 16-bit protected mode, real mode.
fn way_back(ram: &RamBlock) {
    let long = assemble(64, LONG_PART, |a| {
        a.mov(r8, 0x1234_5678_9abc_def0u64)?;
        a.mov(qword_ptr(DATA + 0x40), r8)?;
        mark(a, 5)?;
        a.push(i32::from(selector::CODE32))?;
        a.push(COMPATIBLE_PART as i32)?;
        // RETF with 64-bit operands.
        a.db(&[0x48, 0xcb])
    });
    let compatible = assemble(32, COMPATIBLE_PART, |a| {
        mark(a, 6)?;
        paging_off(a)?;
        set_long_mode(a, false)?;
        a.xor(eax, eax)?;
        a.mov(cr4, eax)?;
        mark(a, 7)?;
        far_jump32(a, PROTECTED16_PART, selector::CODE16)
    });
    let protected16 = assemble(16, PROTECTED16_PART, |a| {
        a.mov(ax, u32::from(selector::DATA16))?;
        data_segments(a)?;
        a.mov(eax, cr0)?;
        a.and(eax, !1)?;
        a.mov(cr0, eax)?;
        let mut bytes = vec![0xea];
        bytes.extend((REAL_PART as u16).to_le_bytes());
        bytes.extend([0, 0]);
        a.db(&bytes)
    });
    let real = assemble(16, REAL_PART, |a| {
        a.xor(ax, ax)?;
        data_segments(a)?;
        a.mov(word_ptr(LAST_MARK), 8u32)?;
        a.out(0xf4, al)?;
        a.hlt()
    });
    let parts = [
        (LONG_PART, long),
        (COMPATIBLE_PART, compatible),
        (PROTECTED16_PART, protected16),
        (REAL_PART, real),
    ];
    for (at, code) in parts {
        ram.write(at, &code).expect("RAM");
    }
}

pub(crate) fn real_to_protected_to_pae_to_long_and_back<B: Backend>(backend: &B) {
    let machine = Machine::new(backend, 1);
    let mut pointer = 0x5fu16.to_le_bytes().to_vec();
    pointer.extend((GDT as u32).to_le_bytes());
    machine.write(GDT_POINTER, &pointer);
    machine.write(PAGE_DIRECTORY, &[0xe7, 0, 0, 0, 0xe7, 0, 0, 0]);
    machine.write(PAE_POINTERS, &0x3001u64.to_le_bytes());
    protected_part(&machine.ram);
    way_back(&machine.ram);
    let mut guest = machine.real(0, |a| {
        a.lgdt(fword_ptr(GDT_POINTER))?;
        a.mov(eax, cr0)?;
        a.or(eax, 1)?;
        a.mov(cr0, eax)?;
        let mut bytes = vec![0x66, 0xea];
        bytes.extend((CODE as u32).to_le_bytes());
        bytes.extend(selector::CODE32.to_le_bytes());
        a.db(&bytes)?;
        Ok(vec![])
    });
    let state = machine.finish(&mut guest);
    let marks: Vec<u64> = (1..8).map(|i| machine.u64_at(DATA + i * 4) & 0xffff_ffff).collect();
    assert_eq!(marks, [1, 2, 3, 4, 5, 6, 7]);
    assert_eq!(machine.u64_at(LAST_MARK) & 0xffff, 8);
    assert_eq!(machine.u64_at(DATA + 0x40), 0x1234_5678_9abc_def0);
    assert_eq!(state.gpr[gpr::RBX] & 0xffff_ffff, 2, "4 MiB pages translate");
    assert_eq!((state.cr0 & 0x8000_0001, state.efer & 0x500, state.cr4), (0, 0, 0));
}

/// Runs `instruction`, which faults, and copies what the handler noted to `slot` of [`DATA`].
fn faulting(
    a: &mut Payload,
    slot: u64,
    instruction: impl FnOnce(&mut Payload) -> Result<(), IcedError>,
) -> Result<(), IcedError> {
    let mut after = a.create_label();
    a.resume_at(after)?;
    instruction(a)?;
    a.set_label(&mut after)?;
    for i in 0..4 {
        a.mov(rax, qword_ptr(fault_of(0) + i * 8))?;
        a.mov(qword_ptr(DATA + slot * 32 + i * 8), rax)?;
    }
    Ok(())
}

/// What slot `slot` noted: vector, error code, RIP, CR2.
fn noted<P: atoll_machine::backend::Partition>(machine: &Machine<P>, slot: u64) -> [u64; 4] {
    std::array::from_fn(|i| machine.u64_at(DATA + slot * 32 + i as u64 * 8))
}

/// Replaces the large page `index` of the first GiB.
fn map_large<P: atoll_machine::backend::Partition>(machine: &Machine<P>, index: u64, entry: u64) {
    machine.write(0x3000 + index * 8, &entry.to_le_bytes());
}

pub(crate) fn page_faults_carry_address_and_error_code<B: Backend>(backend: &B) {
    let machine = Machine::new(backend, 1);
    map_large(&machine, 4, 0);
    map_large(&machine, 5, DATA | 0xe5);
    map_large(&machine, 6, DATA | 0xe7 | 1 << 63);
    let mut guest = machine.long(0, |a| {
        a.faults(&[14]);
        faulting(a, 0, |a| a.mov(rbx, qword_ptr(0x80_0010)))?;
        faulting(a, 1, |a| a.mov(dword_ptr(0x80_0ffc), 1u32))?;
        faulting(a, 2, |a| a.inc(byte_ptr(0xa0_0008)))?;
        faulting(a, 3, |a| {
            a.mov(rbx, 0xc0_0100u64)?;
            a.jmp(rbx)
        })?;
        // The first byte of what the second page lacks.
        faulting(a, 4, |a| a.mov(rbx, qword_ptr(0x7f_fffc)))?;
        a.exit()?;
        Ok(vec![])
    });
    machine.finish(&mut guest);
    let expected = [(0, 0x80_0010), (2, 0x80_0ffc), (3, 0xa0_0008), (0x11, 0xc0_0100), (0, 0x80_0000)];
    for (slot, (code, address)) in expected.into_iter().enumerate() {
        let [vector, error, _, address_of_fault] = noted(&machine, slot as u64);
        assert_eq!((vector, error, address_of_fault), (14, code, address), "fault {slot}");
    }
    assert_eq!(noted(&machine, 3)[2], 0xc0_0100, "a fetch faults at its own address");
}

pub(crate) fn reserved_bits_in_tables_fault_with_their_code<B: Backend>(backend: &B) {
    let machine = Machine::new(backend, 1);
    map_large(&machine, 7, DATA | 0xe7 | 1 << 14);
    let mut guest = machine.long(0, |a| {
        a.faults(&[14]);
        faulting(a, 0, |a| a.mov(bl, byte_ptr(0xe0_0000)))?;
        faulting(a, 1, |a| a.mov(byte_ptr(0xe0_0001), bl))?;
        a.exit()?;
        Ok(vec![])
    });
    machine.finish(&mut guest);
    for (slot, want) in [(0, (14, 9, 0xe0_0000)), (1, (14, 11, 0xe0_0001))] {
        let [vector, error, _, address] = noted(&machine, slot);
        assert_eq!((vector, error, address), want);
    }
}

pub(crate) fn stack_references_fault_as_such<B: Backend>(backend: &B) {
    let machine = Machine::new(backend, 1);
    let mut guest = machine.long(0, |a| {
        a.faults(&[12, 13]);
        faulting(a, 0, |a| {
            a.mov(rbp, 0x8000_0000_0000_0000u64)?;
            a.mov(rbx, qword_ptr(rbp))
        })?;
        a.exit()?;
        Ok(vec![])
    });
    machine.finish(&mut guest);
    assert_eq!(noted(&machine, 0)[..2], [12, 0]);
}

pub(crate) fn exceptions_reach_their_handlers<B: Backend>(backend: &B) {
    const NONE: u64 = u64::MAX;
    let machine = Machine::new(backend, 1);
    let mut guest = machine.long(0, |a| {
        a.faults(&[0, 3, 6, 7, 13]);
        faulting(a, 0, |a| a.ud2())?;
        faulting(a, 1, |a| {
            a.xor(ecx, ecx)?;
            a.div(ecx)
        })?;
        faulting(a, 2, |a| {
            a.mov(rbx, 0x8000_0000_0000_0000u64)?;
            a.mov(rbx, qword_ptr(rbx))
        })?;
        faulting(a, 3, |a| {
            a.mov(eax, 0x98u32)?;
            a.mov(ds, ax)
        })?;
        faulting(a, 4, |a| a.int3())?;
        faulting(a, 5, |a| {
            a.mov(rax, cr0)?;
            a.or(rax, 8)?;
            a.mov(cr0, rax)?;
            a.paddd(xmm0, xmm1)
        })?;
        a.clts()?;
        faulting(a, 6, |a| {
            a.mov(ecx, 0x1234_5678u32)?;
            a.rdmsr()
        })?;
        a.exit()?;
        Ok(vec![])
    });
    machine.finish(&mut guest);
    let expected = [(6, NONE), (0, NONE), (13, 0), (13, 0x98), (3, NONE), (7, NONE), (13, 0)];
    for (slot, want) in expected.into_iter().enumerate() {
        let [vector, error, _, _] = noted(&machine, slot as u64);
        assert_eq!((vector, error), want, "exception {slot}");
    }
}

pub(crate) fn sse_avx_and_x87_compute<B: Backend>(backend: &B) {
    let machine = Machine::new(backend, 1);
    let numbers: Vec<u8> = (1..=8).flat_map(|i: u32| (i as f32).to_le_bytes()).collect();
    machine.write(DATA, &numbers);
    machine.write(DATA + 0x40, &2f64.to_le_bytes());
    let mut guest = machine.long(0, |a| {
        a.vmovups(ymm0, ymmword_ptr(DATA))?;
        a.vmulps(ymm1, ymm0, ymm0)?;
        a.vmovups(ymmword_ptr(DATA + 0x80), ymm1)?;
        a.vfmadd231ps(ymm1, ymm0, ymm0)?;
        a.vmovups(ymmword_ptr(DATA + 0xa0), ymm1)?;
        a.vzeroupper()?;
        a.sqrtsd(xmm2, qword_ptr(DATA + 0x40))?;
        a.mulsd(xmm2, xmm2)?;
        a.movsd_2(qword_ptr(DATA + 0x48), xmm2)?;
        a.fld(qword_ptr(DATA + 0x40))?;
        a.fsqrt()?;
        a.fmul_2(st0, st0)?;
        a.fstp(qword_ptr(DATA + 0x50))?;
        a.fldpi()?;
        a.fstp(qword_ptr(DATA + 0x58))?;
        a.mov(eax, 0x0102_0304u32)?;
        a.movd(xmm3, eax)?;
        a.pshufd(xmm3, xmm3, 0)?;
        a.paddb(xmm3, xmm3)?;
        a.movq(qword_ptr(DATA + 0x60), xmm3)?;
        a.exit()?;
        Ok(vec![])
    });
    machine.finish(&mut guest);
    for i in 0..8u64 {
        let mut bytes = [0; 4];
        let value = (i + 1) as f32;
        machine.ram.read(DATA + 0x80 + i * 4, &mut bytes).expect("RAM");
        assert_eq!(f32::from_le_bytes(bytes), value * value);
        machine.ram.read(DATA + 0xa0 + i * 4, &mut bytes).expect("RAM");
        assert_eq!(f32::from_le_bytes(bytes), 2.0 * value * value);
    }
    assert_eq!(f64::from_bits(machine.u64_at(DATA + 0x48)), 2f64.sqrt() * 2f64.sqrt());
    assert_eq!(f64::from_bits(machine.u64_at(DATA + 0x50)), 2.0, "x87 keeps 64 bits of precision");
    assert_eq!(f64::from_bits(machine.u64_at(DATA + 0x58)), std::f64::consts::PI);
    assert_eq!(machine.u64_at(DATA + 0x60), 0x0204_0608_0204_0608);
}

pub(crate) fn system_calls_enter_and_leave_the_kernel<B: Backend>(backend: &B) {
    let machine = Machine::new(backend, 1);
    map_large(&machine, 4, DATA | 0xe3);
    let mut guest = machine.long(0, |a| {
        let (mut user, mut call, mut end) = (a.create_label(), a.create_label(), a.create_label());
        let (mut first, mut second) = (a.create_label(), a.create_label());
        a.faults(&[13, 14]);
        let star = u64::from(selector::CODE32) << 32 | u64::from(selector::USER_CODE32 | 3) << 48;
        a.msr_write(0xc000_0081, star)?;
        a.msr_write(0xc000_0084, 0x200)?;
        a.lea(rax, ptr(call))?;
        a.mov(rdx, rax)?;
        a.shr(rdx, 32)?;
        a.mov(ecx, 0xc000_0082u32)?;
        a.wrmsr()?;
        a.resume_at(first)?;
        a.push(i32::from(selector::USER_DATA | 3))?;
        a.push((DATA + 0x8000) as i32)?;
        a.push(0x202)?;
        a.push(i32::from(selector::USER_CODE64 | 3))?;
        a.lea(rax, ptr(user))?;
        a.push(rax)?;
        a.iretq()?;
        a.set_label(&mut user)?;
        a.mov(edi, 21u32)?;
        a.syscall()?;
        a.mov(rbx, rax)?;
        a.mov(r8d, cs)?;
        a.pushfq()?;
        a.pop(r10)?;
        a.mov(rax, qword_ptr(0x80_0000))?;
        a.ud2()?;
        a.set_label(&mut first)?;
        a.mov(rax, qword_ptr(fault_of(0) + 8))?;
        a.mov(r12, rax)?;
        a.lea(rax, ptr(second))?;
        a.mov(qword_ptr(resume_of(0)), rax)?;
        a.hlt()?;
        a.set_label(&mut second)?;
        a.mov(r13, qword_ptr(fault_of(0)))?;
        a.int(0x40)?;
        a.ud2()?;
        a.set_label(&mut call)?;
        a.lea(rax, ptr(rdi + rdi))?;
        a.mov(r9d, cs)?;
        a.pushfq()?;
        a.pop(r14)?;
        a.sysretq()?;
        a.set_label(&mut end)?;
        a.own_handler(0x40, end);
        a.mov(r15, rsp)?;
        a.exit()?;
        Ok(vec![])
    });
    let s = machine.finish(&mut guest);
    assert_eq!(s.gpr[gpr::RBX], 42, "the call returned");
    assert_eq!((s.gpr[gpr::R8], s.gpr[gpr::R9]), (0x43, 8), "CS in ring 3 and in the call");
    assert_eq!((s.gpr[gpr::R10] & 0x200, s.gpr[gpr::R14] & 0x200), (0x200, 0), "SFMASK clears IF");
    assert_eq!(s.gpr[gpr::R12], 5, "ring 3 may not read a page of ring 0");
    assert_eq!(s.gpr[gpr::R13], 13, "ring 3 may not halt");
    assert_eq!(s.gpr[gpr::R15], stack_of(0) - 0x1000 - 40, "the gate switched to the stack of ring 0");
}
