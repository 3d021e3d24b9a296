//! Far JMP, CALL and RET: through code segments, call gates, task gates and TSSs (Intel SDM vol. 2 under
//! CALL, JMP, RET; vol. 3, 5.8).
//!
//! ```text
//! far_jump / far_call ─► real, virtual-8086: load CS
//!                     └► protected: descriptor ─► code segment: same privilege
//!                                              ├► call gate ─► same privilege │ inner privilege (stack switch)
//!                                              └► TSS or task gate ─► task.rs
//! far_return          ─► real │ same privilege │ outer privilege (pops SS:RSP, drops data segments)
//! ```
//!
//! Every path checks and pushes first and commits registers last.

use atoll_machine::backend::CpuIo;
use atoll_machine::cpu::state::{Segment, gpr, seg};
use iced_x86::{Instruction, Mnemonic, OpKind};

use super::descriptor::{Descriptor, fetch, fetch_upper, gp, is_null, kind, np, ss as stack_fault, ts};
use super::memory::{Stack, is_canonical, load, table_address, truncate};
use super::segments::{
    check_code_type, check_target, commit_code, drop_privileged_segments, load_real, null_stack,
};
use super::task::{self, Switch};
use super::{operand, segments};
use crate::access::Access;
use crate::cpu::Cpu;
use crate::exception::{Exception, Outcome};

/// A far pointer and the operand size of the transfer.
#[derive(Clone, Copy, Debug)]
pub(crate) struct FarPointer {
    pub(crate) selector: u16,
    pub(crate) offset: u64,
    /// Bytes per pushed value: 2, 4 or 8.
    pub(crate) size: u32,
}

/// CALL or JMP with a far operand.
pub(crate) fn execute(cpu: &mut Cpu, io: &dyn CpuIo, i: &Instruction) -> Outcome {
    let target = far_operand(cpu, io, i)?;
    let call = i.mnemonic() == Mnemonic::Call;
    if !cpu.mode.protected {
        return transfer_real(cpu, io, target, call);
    }
    if is_null(target.selector) {
        return Err(Exception::GP0);
    }
    let d = fetch(cpu, io, target.selector)?.ok_or(gp(target.selector))?;
    if d.non_system() {
        return to_code(cpu, io, target, d, call);
    }
    match d.kind() {
        kind::CALL_GATE => through_gate(cpu, io, target.selector, d, call),
        kind::CALL_GATE16 if !cpu.mode.long => through_gate(cpu, io, target.selector, d, call),
        kind::TSS | kind::TSS16 | kind::TASK_GATE if !cpu.mode.long => {
            to_task(cpu, io, target.selector, d, call)
        }
        _ => Err(gp(target.selector)),
    }
}

fn far_operand(cpu: &mut Cpu, io: &dyn CpuIo, i: &Instruction) -> Outcome<FarPointer> {
    match i.op_kind(0) {
        OpKind::FarBranch16 => {
            let offset = u64::from(i.far_branch16());
            Ok(FarPointer { selector: i.far_branch_selector(), offset, size: 2 })
        }
        OpKind::FarBranch32 => {
            let offset = u64::from(i.far_branch32());
            Ok(FarPointer { selector: i.far_branch_selector(), offset, size: 4 })
        }
        _ => {
            let size = match i.memory_size() {
                iced_x86::MemorySize::SegPtr16 => 2,
                iced_x86::MemorySize::SegPtr32 => 4,
                _ => 8,
            };
            let offset = operand::read_memory(cpu, io, i, 0, size)?;
            let selector = operand::read_memory(cpu, io, i, u64::from(size), 2)? as u16;
            Ok(FarPointer { selector, offset, size })
        }
    }
}

fn transfer_real(cpu: &mut Cpu, io: &dyn CpuIo, target: FarPointer, call: bool) -> Outcome {
    let offset = truncate(target.offset, target.size * 8);
    if offset > u64::from(cpu.segments[seg::CS].limit) && cpu.mode.bits != 64 {
        return Err(Exception::GP0);
    }
    if call {
        push_return(cpu, io, target.size)?.commit(cpu);
    }
    load_real(cpu, seg::CS, target.selector);
    cpu.next_rip = offset;
    cpu.refresh_mode();
    Ok(())
}

/// Pushes CS and the return address on the current stack, without committing the pointer.
fn push_return(cpu: &mut Cpu, io: &dyn CpuIo, size: u32) -> Outcome<Stack> {
    let mut stack = Stack::current(cpu);
    stack.check_room(u64::from(size) * 2)?;
    stack.push(cpu, io, size, u64::from(cpu.segments[seg::CS].selector))?;
    stack.push(cpu, io, size, cpu.next_rip)?;
    Ok(stack)
}

/// Direct transfer to a code segment.
fn to_code(cpu: &mut Cpu, io: &dyn CpuIo, target: FarPointer, mut d: Descriptor, call: bool) -> Outcome {
    let selector = target.selector;
    check_code_type(cpu, selector, &d, gp)?;
    let cpl = cpu.mode.cpl;
    let allowed =
        if d.is_conforming() { d.dpl() <= cpl } else { selector as u8 & 3 <= cpl && d.dpl() == cpl };
    if !allowed {
        return Err(gp(selector));
    }
    if !d.present() {
        return Err(np(selector));
    }
    let offset = truncate(target.offset, target.size * 8);
    if call {
        let stack = push_return(cpu, io, target.size)?;
        check_target(cpu, &d, offset)?;
        d.mark_accessed(cpu, io)?;
        stack.commit(cpu);
    } else {
        check_target(cpu, &d, offset)?;
        d.mark_accessed(cpu, io)?;
    }
    commit_code(cpu, selector, &d, cpl, offset);
    cpu.refresh_mode();
    Ok(())
}

fn to_task(cpu: &mut Cpu, io: &dyn CpuIo, selector: u16, d: Descriptor, call: bool) -> Outcome {
    let rpl = selector as u8 & 3;
    if d.dpl() < cpu.mode.cpl || d.dpl() < rpl {
        return Err(gp(selector));
    }
    let how = if call { Switch::Call } else { Switch::Jump };
    if d.kind() == kind::TASK_GATE {
        if !d.present() {
            return Err(np(selector));
        }
        return task::switch(cpu, io, d.gate_selector(), how, None, gp);
    }
    task::switch(cpu, io, selector, how, None, gp)
}

/// The code segment and offset behind a call gate.
struct GateTarget {
    selector: u16,
    offset: u64,
    code: Descriptor,
    /// Bytes per pushed value.
    size: u32,
    /// Parameters to copy to an inner stack.
    parameters: u32,
}

fn read_gate(cpu: &mut Cpu, io: &dyn CpuIo, gate_selector: u16, d: Descriptor) -> Outcome<GateTarget> {
    let rpl = gate_selector as u8 & 3;
    if d.dpl() < cpu.mode.cpl || d.dpl() < rpl {
        return Err(gp(gate_selector));
    }
    let mut offset = d.gate_offset();
    let mut size = 4;
    if cpu.mode.long {
        let upper = fetch_upper(cpu, io, gate_selector)?.ok_or(gp(gate_selector))?;
        if upper >> 40 & 0x1f != 0 {
            return Err(gp(gate_selector));
        }
        offset |= upper << 32;
        size = 8;
    } else if d.kind() == kind::CALL_GATE16 {
        offset &= 0xffff;
        size = 2;
    }
    if !d.present() {
        return Err(np(gate_selector));
    }
    let selector = d.gate_selector();
    if is_null(selector) {
        return Err(Exception::GP0);
    }
    let code = fetch(cpu, io, selector)?.ok_or(gp(selector))?;
    let long_ok = !cpu.mode.long || code.long() && !code.big();
    if !code.is_code() || code.dpl() > cpu.mode.cpl || !long_ok {
        return Err(gp(selector));
    }
    let parameters = (d.raw >> 32 & 0x1f) as u32;
    Ok(GateTarget { selector, offset, code, size, parameters })
}

fn through_gate(cpu: &mut Cpu, io: &dyn CpuIo, gate: u16, d: Descriptor, call: bool) -> Outcome {
    let mut target = read_gate(cpu, io, gate, d)?;
    let cpl = cpu.mode.cpl;
    let inner = !target.code.is_conforming() && target.code.dpl() < cpl;
    if inner && !call {
        return Err(gp(target.selector));
    }
    if !target.code.present() {
        return Err(np(target.selector));
    }
    if inner {
        return call_inner(cpu, io, target);
    }
    let stack = if call { Some(push_return(cpu, io, target.size)?) } else { None };
    check_target(cpu, &target.code, target.offset)?;
    target.code.mark_accessed(cpu, io)?;
    if let Some(stack) = stack {
        stack.commit(cpu);
    }
    commit_code(cpu, target.selector, &target.code, cpl, target.offset);
    cpu.refresh_mode();
    Ok(())
}

/// CALL through a gate to a more privileged, nonconforming segment: switches stacks.
fn call_inner(cpu: &mut Cpu, io: &dyn CpuIo, mut target: GateTarget) -> Outcome {
    let cpl = target.code.dpl();
    let (mut stack, segment) = inner_stack(cpu, io, cpl, 0)?;
    let size = target.size;
    let parameters = if size == 8 { 0 } else { target.parameters };
    stack.check_room(u64::from(size) * u64::from(4 + parameters))?;
    let mut copied = [0u64; 31];
    let mut old = Stack::current(cpu);
    for slot in copied.iter_mut().take(parameters as usize) {
        *slot = old.pop(cpu, io, size)?;
    }
    let (old_ss, old_sp) = (cpu.segments[seg::SS].selector, cpu.gpr[gpr::RSP]);
    stack.push(cpu, io, size, u64::from(old_ss))?;
    stack.push(cpu, io, size, old_sp)?;
    for value in copied.iter().take(parameters as usize).rev() {
        stack.push(cpu, io, size, *value)?;
    }
    stack.push(cpu, io, size, u64::from(cpu.segments[seg::CS].selector))?;
    stack.push(cpu, io, size, cpu.next_rip)?;
    check_target(cpu, &target.code, target.offset)?;
    target.code.mark_accessed(cpu, io)?;
    cpu.segments[seg::SS] = segment;
    cpu.gpr[gpr::RSP] = stack.pointer(cpu.gpr[gpr::RSP]);
    commit_code(cpu, target.selector, &target.code, cpl, target.offset);
    cpu.refresh_mode();
    Ok(())
}

/// The stack that the TSS holds for privilege level `cpl`, and the segment that SS will be. `ist` selects an
/// interrupt stack in long mode (0: none).
pub(crate) fn inner_stack(cpu: &mut Cpu, io: &dyn CpuIo, cpl: u8, ist: u8) -> Outcome<(Stack, Segment)> {
    if cpu.mode.long {
        let offset = if ist != 0 { 0x1c + u64::from(ist) * 8 } else { 4 + u64::from(cpl) * 8 };
        let pointer = read_tss(cpu, io, offset, 8)?;
        if !is_canonical(pointer) {
            return Err(Exception::SS0);
        }
        let segment = null_stack(u16::from(cpl), cpl);
        return Ok((Stack::switched(segment, pointer, true, cpl, Exception::SS0), segment));
    }
    let (selector, pointer) = if cpu.tr.kind() == kind::TSS_BUSY {
        let at = 4 + u64::from(cpl) * 8;
        (read_tss_pair(cpu, io, at, 4)?, read_tss(cpu, io, at, 4)?)
    } else {
        let at = 2 + u64::from(cpl) * 4;
        (read_tss_pair(cpu, io, at, 2)?, read_tss(cpu, io, at, 2)?)
    };
    let segment = check_inner_stack(cpu, io, selector, cpl)?;
    Ok((Stack::switched(segment, pointer, false, cpl, stack_fault(selector)), segment))
}

fn read_tss(cpu: &mut Cpu, io: &dyn CpuIo, offset: u64, size: u32) -> Outcome<u64> {
    if offset + u64::from(size) - 1 > u64::from(cpu.tr.limit) {
        return Err(ts(cpu.tr.selector));
    }
    let linear = table_address(cpu, cpu.tr.base, offset);
    load(cpu, io, linear, size, Access::SystemRead)
}

fn read_tss_pair(cpu: &mut Cpu, io: &dyn CpuIo, offset: u64, size: u32) -> Outcome<u16> {
    read_tss(cpu, io, offset + u64::from(size), 2).map(|v| v as u16)
}

/// Checks the stack segment that a TSS names for privilege level `cpl`.
fn check_inner_stack(cpu: &mut Cpu, io: &dyn CpuIo, selector: u16, cpl: u8) -> Outcome<Segment> {
    if is_null(selector) {
        return Err(ts(0));
    }
    let mut d = fetch(cpu, io, selector)?.ok_or(ts(selector))?;
    if selector as u8 & 3 != cpl || d.dpl() != cpl || !d.is_writable() {
        return Err(ts(selector));
    }
    if !d.present() {
        return Err(stack_fault(selector));
    }
    d.mark_accessed(cpu, io)?;
    Ok(d.segment(selector))
}

/// RETF, with `size` bytes per popped value and `extra` bytes to drop.
pub(crate) fn far_return(cpu: &mut Cpu, io: &dyn CpuIo, size: u32, extra: u64) -> Outcome {
    let mut stack = Stack::current(cpu);
    let rip = stack.pop(cpu, io, size)?;
    let selector = stack.pop(cpu, io, size)? as u16;
    if !cpu.mode.protected {
        if rip > u64::from(cpu.segments[seg::CS].limit) {
            return Err(Exception::GP0);
        }
        stack.skip(extra);
        stack.commit(cpu);
        load_real(cpu, seg::CS, selector);
        cpu.next_rip = rip;
        cpu.refresh_mode();
        return Ok(());
    }
    let mut code = check_return_code(cpu, io, selector)?;
    let rpl = selector as u8 & 3;
    stack.skip(extra);
    if rpl == cpu.mode.cpl {
        check_target(cpu, &code, rip)?;
        code.mark_accessed(cpu, io)?;
        stack.commit(cpu);
        commit_code(cpu, selector, &code, rpl, rip);
        cpu.refresh_mode();
        return Ok(());
    }
    let pointer = stack.pop(cpu, io, size)?;
    let stack_selector = stack.pop(cpu, io, size)? as u16;
    let frame = OuterFrame { rip, selector, pointer, stack_selector };
    return_outward(cpu, io, frame, &mut code, extra)
}

/// The code segment that a RET or IRET returns to.
pub(crate) fn check_return_code(cpu: &mut Cpu, io: &dyn CpuIo, selector: u16) -> Outcome<Descriptor> {
    if is_null(selector) {
        return Err(Exception::GP0);
    }
    let d = fetch(cpu, io, selector)?.ok_or(gp(selector))?;
    let rpl = selector as u8 & 3;
    let dpl_ok = if d.is_conforming() { d.dpl() <= rpl } else { d.dpl() == rpl };
    if !d.is_code() || rpl < cpu.mode.cpl || !dpl_ok {
        return Err(gp(selector));
    }
    check_code_type(cpu, selector, &d, gp)?;
    if !d.present() {
        return Err(np(selector));
    }
    Ok(d)
}

/// What a return to an outer level (or any IRET of 64-bit mode) popped.
#[derive(Clone, Copy, Debug)]
pub(crate) struct OuterFrame {
    pub(crate) rip: u64,
    pub(crate) selector: u16,
    pub(crate) pointer: u64,
    pub(crate) stack_selector: u16,
}

/// Commits a return that loads SS:RSP. `extra` bytes are dropped from the new stack.
pub(crate) fn return_outward(
    cpu: &mut Cpu,
    io: &dyn CpuIo,
    frame: OuterFrame,
    code: &mut Descriptor,
    extra: u64,
) -> Outcome {
    let cpl = frame.selector as u8 & 3;
    let to64 = cpu.mode.long && code.long();
    let segment = check_return_stack(cpu, io, frame.stack_selector, cpl, to64)?;
    check_target(cpu, code, frame.rip)?;
    code.mark_accessed(cpu, io)?;
    let outward = cpl > cpu.mode.cpl;
    let mut stack = Stack::switched(segment, frame.pointer, to64, cpl, Exception::SS0);
    stack.skip(extra);
    cpu.gpr[gpr::RSP] = stack.pointer(cpu.gpr[gpr::RSP]);
    cpu.segments[seg::SS] = segment;
    commit_code(cpu, frame.selector, code, cpl, frame.rip);
    cpu.refresh_mode();
    if outward {
        drop_privileged_segments(cpu, cpl);
    }
    Ok(())
}

/// The stack segment that a return to level `cpl` loads.
fn check_return_stack(cpu: &mut Cpu, io: &dyn CpuIo, selector: u16, cpl: u8, to64: bool) -> Outcome<Segment> {
    if is_null(selector) {
        return if to64 && cpl < 3 && selector as u8 & 3 == cpl {
            Ok(segments::null_stack(selector, cpl))
        } else {
            Err(Exception::GP0)
        };
    }
    let mut d = fetch(cpu, io, selector)?.ok_or(gp(selector))?;
    if selector as u8 & 3 != cpl || !d.is_writable() || d.dpl() != cpl {
        return Err(gp(selector));
    }
    if !d.present() {
        return Err(stack_fault(selector));
    }
    d.mark_accessed(cpu, io)?;
    Ok(d.segment(selector))
}
