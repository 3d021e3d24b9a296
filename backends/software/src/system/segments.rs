//! Loading segment registers, LDTR and TR, and the instructions that look at descriptors
//! (Intel SDM vol. 3, 3.4 and 5; vol. 2 under MOV, LLDT, LTR, LAR, LSL, VERR, ARPL).
//!
//! Real mode changes base and selector only, so limits and attributes survive from protected mode ("unreal
//! mode"). Virtual-8086 mode forces 64 KiB and DPL 3. In protected mode the descriptor is checked first; the
//! register changes only when nothing can fault any more.

use atoll_machine::backend::CpuIo;
use atoll_machine::cpu::model::Vendor;
use atoll_machine::cpu::state::{Segment, gpr, seg};
use iced_x86::{Instruction, Mnemonic, OpKind};

use super::descriptor::{
    Descriptor, fetch, fetch_upper, gp, is_null, kind, np, set_type_bits, ss as stack_fault,
};
use super::memory::{is_canonical, store, truncate};
use super::operand;
use crate::access::Access;
use crate::cpu::{Cpu, flag};
use crate::exception::{Exception, Outcome};

/// A data segment register after a load of a null selector.
pub(crate) const fn null_segment(selector: u16) -> Segment {
    Segment { selector, base: 0, limit: 0, attributes: Segment::UNUSABLE }
}

/// SS after a switch to privilege `cpl` in long mode: null, but it still carries the privilege level.
pub(crate) const fn null_stack(selector: u16, cpl: u8) -> Segment {
    Segment { selector, base: 0, limit: 0, attributes: Segment::UNUSABLE | (cpl as u32) << 5 }
}

/// A virtual-8086 segment.
pub(crate) const fn v8086_segment(selector: u16) -> Segment {
    Segment { selector, base: (selector as u64) << 4, limit: 0xffff, attributes: 0xf3 }
}

/// Loads data or stack segment register `register` with `selector` (MOV, POP, LDS … LGS).
pub(crate) fn load_segment(cpu: &mut Cpu, io: &dyn CpuIo, register: usize, selector: u16) -> Outcome {
    if !cpu.mode.protected {
        load_real(cpu, register, selector);
        return Ok(());
    }
    if register == seg::SS {
        let segment = check_stack(cpu, io, selector)?;
        cpu.segments[seg::SS] = segment;
        cpu.refresh_mode();
    } else {
        let segment = check_data(cpu, io, selector)?;
        cpu.segments[register] = segment;
    }
    Ok(())
}

/// Real and virtual-8086 mode.
pub(crate) fn load_real(cpu: &mut Cpu, register: usize, selector: u16) {
    if cpu.mode.v8086 {
        cpu.segments[register] = v8086_segment(selector);
    } else {
        let segment = &mut cpu.segments[register];
        segment.selector = selector;
        segment.base = u64::from(selector) << 4;
        if segment.unusable() {
            (segment.limit, segment.attributes) = (0xffff, 0x93);
        }
    }
}

/// A data segment register's new content in protected mode.
fn check_data(cpu: &mut Cpu, io: &dyn CpuIo, selector: u16) -> Outcome<Segment> {
    if is_null(selector) {
        return Ok(null_segment(selector));
    }
    let mut d = fetch(cpu, io, selector)?.ok_or(gp(selector))?;
    let rpl = selector as u8 & 3;
    if !d.is_readable() || !d.is_conforming() && (rpl > d.dpl() || cpu.mode.cpl > d.dpl()) {
        return Err(gp(selector));
    }
    if !d.present() {
        return Err(np(selector));
    }
    d.mark_accessed(cpu, io)?;
    Ok(d.segment(selector))
}

/// SS's new content in protected mode.
fn check_stack(cpu: &mut Cpu, io: &dyn CpuIo, selector: u16) -> Outcome<Segment> {
    let cpl = cpu.mode.cpl;
    let rpl = selector as u8 & 3;
    if is_null(selector) {
        return if cpu.mode.bits == 64 && cpl < 3 && rpl == cpl {
            Ok(null_stack(selector, cpl))
        } else {
            Err(Exception::GP0)
        };
    }
    let mut d = fetch(cpu, io, selector)?.ok_or(gp(selector))?;
    if rpl != cpl || !d.is_writable() || d.dpl() != cpl {
        return Err(gp(selector));
    }
    if !d.present() {
        return Err(stack_fault(selector));
    }
    d.mark_accessed(cpu, io)?;
    Ok(d.segment(selector))
}

/// Makes data segments unusable that privilege `cpl` may not use any more (outward RET and IRET).
pub(crate) fn drop_privileged_segments(cpu: &mut Cpu, cpl: u8) {
    for register in [seg::ES, seg::DS, seg::FS, seg::GS] {
        let s = cpu.segments[register];
        let conforming = s.kind() & 0xc == 0xc;
        if !s.unusable() && !conforming && s.dpl() < cpl {
            cpu.segments[register] = null_segment(0);
            if cpu.mode.long && register >= seg::FS {
                // The bases of FS and GS are MSRs of their own in long mode.
                cpu.segments[register].base = s.base;
            }
        }
    }
}

/// Commits CS and the instruction pointer: `selector` gets `cpl` as its RPL. The accessed bit must have been
/// set and the target checked already.
pub(crate) fn commit_code(cpu: &mut Cpu, selector: u16, descriptor: &Descriptor, cpl: u8, rip: u64) {
    cpu.segments[seg::CS] = descriptor.segment(selector & !3 | u16::from(cpl));
    cpu.next_rip = if cpu.mode.long && descriptor.long() { rip } else { truncate(rip, 32) };
}

/// LLDT's and the task switch's check: the new LDTR.
pub(crate) fn check_ldt(
    cpu: &mut Cpu,
    io: &dyn CpuIo,
    selector: u16,
    fault: fn(u16) -> Exception,
    absent: fn(u16) -> Exception,
) -> Outcome<Segment> {
    if is_null(selector) {
        return Ok(Segment { selector, base: 0, limit: 0, attributes: Segment::UNUSABLE });
    }
    if selector & 4 != 0 {
        return Err(fault(selector));
    }
    let d = fetch(cpu, io, selector)?.ok_or(fault(selector))?;
    if d.non_system() || d.kind() != kind::LDT {
        return Err(fault(selector));
    }
    if !d.present() {
        return Err(absent(selector));
    }
    let base = system_base(cpu, io, selector, &d)?;
    Ok(Segment { base, ..d.segment(selector) })
}

/// Base of a system descriptor: 16 bytes long in long mode.
fn system_base(cpu: &mut Cpu, io: &dyn CpuIo, selector: u16, d: &Descriptor) -> Outcome<u64> {
    if !cpu.mode.long {
        return Ok(d.base());
    }
    let upper = fetch_upper(cpu, io, selector)?.ok_or(gp(selector))?;
    let base = d.base() | upper << 32;
    if upper >> 40 & 0x1f != 0 || !is_canonical(base) {
        return Err(gp(selector));
    }
    Ok(base)
}

fn load_task_register(cpu: &mut Cpu, io: &dyn CpuIo, selector: u16) -> Outcome {
    if is_null(selector) {
        return Err(Exception::GP0);
    }
    if selector & 4 != 0 {
        return Err(gp(selector));
    }
    let d = fetch(cpu, io, selector)?.ok_or(gp(selector))?;
    let available = d.kind() == kind::TSS || d.kind() == kind::TSS16 && !cpu.mode.long;
    if d.non_system() || !available {
        return Err(gp(selector));
    }
    if !d.present() {
        return Err(np(selector));
    }
    let base = system_base(cpu, io, selector, &d)?;
    set_type_bits(cpu, io, d.address, kind::BUSY as u8, 0)?;
    let mut segment = Segment { base, ..d.segment(selector) };
    segment.attributes |= kind::BUSY;
    cpu.tr = segment;
    Ok(())
}

/// MOV Sreg, POP Sreg, LDS … LGS, PUSH Sreg, MOV r/m from Sreg.
pub(crate) fn execute_moves(cpu: &mut Cpu, io: &dyn CpuIo, i: &Instruction) -> Outcome {
    match i.mnemonic() {
        Mnemonic::Mov if i.op_kind(0) == OpKind::Register && i.op_register(0).is_segment_register() => {
            let register = operand::segment_index(i.op_register(0));
            if register == seg::CS {
                return Err(Exception::UD);
            }
            let selector = operand::read(cpu, io, i, 1, 2)? as u16;
            load_segment(cpu, io, register, selector)?;
            shadow_after(cpu, register);
            Ok(())
        }
        Mnemonic::Mov => {
            let value = u64::from(cpu.segments[operand::segment_index(i.op_register(1))].selector);
            operand::write(cpu, io, i, 0, 2, value)
        }
        Mnemonic::Pop => pop_segment(cpu, io, i),
        Mnemonic::Push => push_segment(cpu, io, i),
        _ => load_far_pointer(cpu, io, i),
    }
}

/// Interrupts and debug traps are held off for one instruction after a load of SS.
fn shadow_after(cpu: &mut Cpu, register: usize) {
    if register == seg::SS {
        super::begin_shadow(cpu);
        cpu.system.debug_shadow = true;
        cpu.recheck = true;
    }
}

/// Operand size of a stack instruction from its stack-pointer change.
fn stack_operand_size(i: &Instruction) -> u32 {
    i.stack_pointer_increment().unsigned_abs()
}

fn pop_segment(cpu: &mut Cpu, io: &dyn CpuIo, i: &Instruction) -> Outcome {
    let register = operand::segment_index(i.op_register(0));
    let size = stack_operand_size(i);
    let mut stack = super::memory::Stack::current(cpu);
    // Only two bytes are used, but the whole slot is read: as wide as the limit check needs.
    let selector = stack.pop(cpu, io, size)? as u16;
    let pointer = stack.pointer(cpu.gpr[gpr::RSP]);
    load_segment(cpu, io, register, selector)?;
    cpu.gpr[gpr::RSP] = pointer;
    shadow_after(cpu, register);
    Ok(())
}

fn push_segment(cpu: &mut Cpu, io: &dyn CpuIo, i: &Instruction) -> Outcome {
    let selector = cpu.segments[operand::segment_index(i.op_register(0))].selector;
    let mut stack = super::memory::Stack::current(cpu);
    let size = stack_operand_size(i);
    if cpu.shared.model.vendor == Vendor::Amd {
        stack.push(cpu, io, size, u64::from(selector))?;
        stack.commit(cpu);
        return Ok(());
    }
    // Intel's processors write two bytes and leave the rest of a wider slot alone; AMD's write all of it.
    stack.check_room(u64::from(size))?;
    stack.sp = stack.sp.wrapping_sub(u64::from(size) - 2);
    stack.push(cpu, io, 2, u64::from(selector))?;
    stack.commit(cpu);
    Ok(())
}

fn load_far_pointer(cpu: &mut Cpu, io: &dyn CpuIo, i: &Instruction) -> Outcome {
    if i.op_kind(1) == OpKind::Register {
        return Err(Exception::UD);
    }
    let register = match i.mnemonic() {
        Mnemonic::Lds => seg::DS,
        Mnemonic::Les => seg::ES,
        Mnemonic::Lfs => seg::FS,
        Mnemonic::Lgs => seg::GS,
        _ => seg::SS,
    };
    let size = i.op_register(0).size() as u32;
    // Two accesses: the selector may lie beyond the point where 16-bit addresses wrap.
    let offset = operand::read_memory(cpu, io, i, 0, size)?;
    let selector = operand::read_memory(cpu, io, i, u64::from(size), 2)? as u16;
    load_segment(cpu, io, register, selector)?;
    operand::write_register(cpu, i.op_register(0), offset);
    Ok(())
}

fn require_umip(cpu: &Cpu) -> Outcome {
    if cpu.mode.cpl > 0 && cpu.cr4 & crate::cpu::control::CR4_UMIP != 0 {
        return Err(Exception::GP0);
    }
    Ok(())
}

fn require_cpl0(cpu: &Cpu) -> Outcome {
    if cpu.mode.cpl == 0 { Ok(()) } else { Err(Exception::GP0) }
}

/// LGDT, LIDT, SGDT, SIDT.
pub(crate) fn execute_tables(cpu: &mut Cpu, io: &dyn CpuIo, i: &Instruction) -> Outcome {
    let wide = cpu.mode.bits == 64;
    let base_size: u32 = if wide { 8 } else { 4 };
    match i.mnemonic() {
        Mnemonic::Lgdt | Mnemonic::Lidt => {
            require_cpl0(cpu)?;
            let limit = operand::read_memory(cpu, io, i, 0, 2)? as u16;
            let mut base = operand::read_memory(cpu, io, i, 2, base_size)?;
            if wide && !is_canonical(base) {
                return Err(Exception::GP0);
            }
            let code = i.code();
            if matches!(code, iced_x86::Code::Lgdt_m1632_16 | iced_x86::Code::Lidt_m1632_16) {
                base &= 0xff_ffff;
            }
            let table = if i.mnemonic() == Mnemonic::Lgdt { &mut cpu.gdtr } else { &mut cpu.idtr };
            (table.base, table.limit) = (base, limit);
            Ok(())
        }
        _ => {
            require_umip(cpu)?;
            let table = if i.mnemonic() == Mnemonic::Sgdt { cpu.gdtr } else { cpu.idtr };
            let size = u64::from(base_size) + 2;
            let linear = operand::memory_linear(cpu, i, 0, size, Access::Write)?;
            cpu.probe(io, linear, size, Access::Write)?;
            store(cpu, io, linear, 2, u64::from(table.limit), Access::Write)?;
            let base = operand::memory_linear(cpu, i, 2, u64::from(base_size), Access::Write)?;
            store(cpu, io, base, base_size, table.base, Access::Write)
        }
    }
}

/// LLDT, SLDT, LTR, STR.
pub(crate) fn execute_system_segments(cpu: &mut Cpu, io: &dyn CpuIo, i: &Instruction) -> Outcome {
    if !cpu.mode.protected {
        return Err(Exception::UD);
    }
    match i.mnemonic() {
        Mnemonic::Lldt => {
            require_cpl0(cpu)?;
            let selector = operand::read(cpu, io, i, 0, 2)? as u16;
            cpu.ldtr = check_ldt(cpu, io, selector, gp, np)?;
            Ok(())
        }
        Mnemonic::Ltr => {
            require_cpl0(cpu)?;
            let selector = operand::read(cpu, io, i, 0, 2)? as u16;
            load_task_register(cpu, io, selector)
        }
        mnemonic => {
            require_umip(cpu)?;
            let selector = if mnemonic == Mnemonic::Sldt { cpu.ldtr.selector } else { cpu.tr.selector };
            operand::write(cpu, io, i, 0, 2, u64::from(selector))
        }
    }
}

/// The descriptor that LAR, LSL, VERR and VERW may look at; `None` clears ZF.
fn visible_descriptor(cpu: &mut Cpu, io: &dyn CpuIo, selector: u16) -> Outcome<Option<Descriptor>> {
    if is_null(selector) {
        return Ok(None);
    }
    let Some(d) = fetch(cpu, io, selector)? else { return Ok(None) };
    let rpl = selector as u8 & 3;
    let privileged = d.dpl() < cpu.mode.cpl || d.dpl() < rpl;
    Ok(if privileged && !d.is_conforming() { None } else { Some(d) })
}

/// LAR, LSL, VERR, VERW, ARPL.
pub(crate) fn execute_queries(cpu: &mut Cpu, io: &dyn CpuIo, i: &Instruction) -> Outcome {
    if !cpu.mode.protected {
        return Err(Exception::UD);
    }
    if i.mnemonic() == Mnemonic::Arpl {
        return adjust_rpl(cpu, io, i);
    }
    let source = if i.op_count() > 1 { 1 } else { 0 };
    let selector = operand::read(cpu, io, i, source, 2)? as u16;
    let visible = visible_descriptor(cpu, io, selector)?;
    let result = match (visible, i.mnemonic()) {
        (None, _) => None,
        (Some(d), Mnemonic::Verr) => d.is_readable().then_some(0),
        (Some(d), Mnemonic::Verw) => d.is_writable().then_some(0),
        (Some(d), Mnemonic::Lar) => {
            let valid = lar_allows(cpu, &d) && is_whole(cpu, io, selector, &d)?;
            valid.then_some(d.raw >> 32 & 0x00ff_ff00)
        }
        (Some(d), _) => {
            let valid = lsl_allows(cpu, &d) && is_whole(cpu, io, selector, &d)?;
            valid.then_some(u64::from(d.limit()))
        }
    };
    cpu.rflags &= !flag::ZF;
    if let Some(value) = result {
        cpu.rflags |= flag::ZF;
        if i.op_count() > 1 {
            operand::write_register(cpu, i.op_register(0), value);
        }
    }
    Ok(())
}

/// Types that LAR knows (Intel SDM vol. 2, LAR; AMD APM vol. 3, LAR). The two disagree on an LDT in long mode,
/// which the SDM's table rejects and the APM's accepts, as do processors of both.
fn lar_allows(cpu: &Cpu, d: &Descriptor) -> bool {
    match d.kind() {
        _ if d.non_system() => true,
        kind::LDT | kind::TSS | kind::TSS_BUSY | kind::CALL_GATE => true,
        kind::TSS16 | kind::TSS16_BUSY | kind::CALL_GATE16 | kind::TASK_GATE => !cpu.mode.long,
        _ => false,
    }
}

/// Types that LSL knows: those with a limit.
fn lsl_allows(cpu: &Cpu, d: &Descriptor) -> bool {
    match d.kind() {
        _ if d.non_system() => true,
        kind::LDT | kind::TSS | kind::TSS_BUSY => true,
        kind::TSS16 | kind::TSS16_BUSY => !cpu.mode.long,
        _ => false,
    }
}

/// Whether all of a descriptor is there. In long mode system descriptors take 16 bytes: the table must hold them,
/// and the type field of the upper half must be zero, which keeps the half from being used as a descriptor of
/// its own (AMD APM vol. 2, 4.8.3). LAR and LSL look at it alike.
fn is_whole(cpu: &mut Cpu, io: &dyn CpuIo, selector: u16, d: &Descriptor) -> Outcome<bool> {
    if d.non_system() || !cpu.mode.long {
        return Ok(true);
    }
    Ok(fetch_upper(cpu, io, selector)?.is_some_and(|upper| upper >> 40 & 0x1f == 0))
}

fn adjust_rpl(cpu: &mut Cpu, io: &dyn CpuIo, i: &Instruction) -> Outcome {
    let destination = operand::read(cpu, io, i, 0, 2)?;
    let source = operand::read(cpu, io, i, 1, 2)?;
    if destination & 3 < source & 3 {
        if i.op_kind(0) == OpKind::Register {
            let register = operand::gpr_index(i.op_register(0));
            cpu.gpr[register] = cpu.gpr[register] & !3 | source & 3;
        } else {
            operand::write(cpu, io, i, 0, 2, destination & !3 | source & 3)?;
        }
        cpu.rflags |= flag::ZF;
    } else {
        cpu.rflags &= !flag::ZF;
    }
    Ok(())
}

/// Whether `rip` may be the next instruction pointer of the code segment `descriptor`: #GP(0) if not.
pub(crate) fn check_target(cpu: &Cpu, descriptor: &Descriptor, rip: u64) -> Outcome {
    let ok = if cpu.mode.long && descriptor.long() {
        is_canonical(rip)
    } else {
        // All 64 bits that a RETF with REX.W pops count.
        rip <= u64::from(descriptor.limit())
    };
    if ok { Ok(()) } else { Err(Exception::GP0) }
}

/// Checks a code descriptor that a transfer goes to: type and the L and D bits. `fault` makes the exception.
pub(crate) fn check_code_type(
    cpu: &Cpu,
    selector: u16,
    d: &Descriptor,
    fault: fn(u16) -> Exception,
) -> Outcome {
    if !d.is_code() || cpu.mode.long && d.long() && d.big() {
        return Err(fault(selector));
    }
    Ok(())
}
