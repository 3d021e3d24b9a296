//! Near control transfers: Jcc, JMP, CALL, RET, LOOP and JCXZ.
//!
//! A target is checked before anything changes: canonical in 64-bit mode, inside the code segment's limit
//! elsewhere. A Jcc that is not taken goes on in its block, so that a block ends where control really leaves. The `64` forms are for 64-bit operands in 64-bit mode; the others mask by operand size.

use atoll_machine::cpu::state::{gpr, seg};

use crate::access::{Access, is_canonical};
use crate::cpu::{Cpu, flag};
use crate::decode::Op;
use crate::exception::{Exception, Outcome};
use crate::execute::operand::{Operand, condition, op_linear_dyn, read_rm};
use crate::execute::stack::push64;
use crate::execute::{Env, Flow};

/// Goes to a canonical 64-bit target.
#[inline(always)]
fn go64(cpu: &mut Cpu, target: u64) -> Flow {
    if !is_canonical(target) {
        return cpu.fault(Exception::GP0);
    }
    cpu.next_rip = target;
    Flow::End
}

/// Target of a relative branch (`imm` counts from the instruction's start).
#[inline(always)]
fn relative64(cpu: &Cpu, op: &Op) -> u64 {
    cpu.rip.wrapping_add(u64::from(op.offset)).wrapping_add(op.imm)
}

/// `target` cut to the operand size, if the code segment has it.
#[inline(always)]
fn checked<T: Operand>(cpu: &Cpu, target: u64) -> Outcome<u64> {
    let target = T::from_u64(target).to_u64();
    if cpu.mode.bits == 64 {
        return if is_canonical(target) { Ok(target) } else { Err(Exception::GP0) };
    }
    if target > cpu.exec.code_limit { Err(Exception::GP0) } else { Ok(target) }
}

#[inline(always)]
fn go<T: Operand>(cpu: &mut Cpu, target: u64) -> Outcome {
    cpu.next_rip = checked::<T>(cpu, target)?;
    Ok(())
}

pub(crate) fn jcc64<const CC: u8>(cpu: &mut Cpu, _: &Env<'_>, op: &Op) -> Flow {
    if condition::<CC>(cpu.rflags) {
        let target = relative64(cpu, op);
        go64(cpu, target)
    } else {
        Flow::Next
    }
}

pub(crate) fn jmp64(cpu: &mut Cpu, _: &Env<'_>, op: &Op) -> Flow {
    let target = relative64(cpu, op);
    go64(cpu, target)
}

pub(crate) fn call64(cpu: &mut Cpu, env: &Env<'_>, op: &Op) -> Flow {
    let target = relative64(cpu, op);
    let back = cpu.op_next_rip(op);
    if !is_canonical(target) {
        return cpu.fault(Exception::GP0);
    }
    let outcome = push64(cpu, env, back);
    cpu.next_rip = target;
    cpu.flow(outcome, Flow::End)
}

pub(crate) fn jmp64_rm(cpu: &mut Cpu, env: &Env<'_>, op: &Op) -> Flow {
    match read_rm::<u64>(cpu, env, op) {
        Ok(target) => go64(cpu, target),
        Err(exception) => cpu.fault(exception),
    }
}

pub(crate) fn call64_rm(cpu: &mut Cpu, env: &Env<'_>, op: &Op) -> Flow {
    fn body(cpu: &mut Cpu, env: &Env<'_>, op: &Op) -> Outcome {
        let target = read_rm::<u64>(cpu, env, op)?;
        if !is_canonical(target) {
            // What is wrong with the stack comes first.
            let sp = cpu.gpr[gpr::RSP].wrapping_sub(8);
            let linear = cpu.linear(seg::SS, sp, 8, Access::Write)?;
            cpu.probe_push(env, linear, 8)?;
            return Err(Exception::GP0);
        }
        let back = cpu.op_next_rip(op);
        push64(cpu, env, back)?;
        cpu.next_rip = target;
        Ok(())
    }
    let outcome = body(cpu, env, op);
    cpu.flow(outcome, Flow::End)
}

/// RET and RET imm16.
pub(crate) fn ret64(cpu: &mut Cpu, env: &Env<'_>, op: &Op) -> Flow {
    let sp = cpu.gpr[gpr::RSP];
    match cpu.load::<u64>(env.io, seg::SS, sp) {
        Ok(target) if is_canonical(target) => {
            cpu.gpr[gpr::RSP] = sp.wrapping_add(8).wrapping_add(op.imm);
            cpu.next_rip = target;
            Flow::End
        }
        Ok(_) => cpu.fault(Exception::GP0),
        Err(exception) => cpu.fault(exception),
    }
}

pub(crate) fn jcc<T: Operand, const CC: u8>(cpu: &mut Cpu, _: &Env<'_>, op: &Op) -> Flow {
    if !condition::<CC>(cpu.rflags) {
        return Flow::Next;
    }
    let target = relative64(cpu, op);
    let outcome = go::<T>(cpu, target);
    cpu.flow(outcome, Flow::End)
}

pub(crate) fn jmp<T: Operand>(cpu: &mut Cpu, _: &Env<'_>, op: &Op) -> Flow {
    let target = relative64(cpu, op);
    let outcome = go::<T>(cpu, target);
    cpu.flow(outcome, Flow::End)
}

fn call_to<T: Operand>(cpu: &mut Cpu, env: &Env<'_>, op: &Op, target: u64) -> Outcome {
    let target = match checked::<T>(cpu, target) {
        Ok(target) => target,
        Err(exception) => {
            // What is wrong with the stack comes first.
            let sp = cpu.stack_pointer().wrapping_sub(T::BYTES);
            let sp = if cpu.mode.stack_bits == 16 { sp & 0xffff } else { sp & 0xffff_ffff };
            let linear = cpu.linear(seg::SS, sp, T::BYTES, Access::Write)?;
            cpu.probe_push(env, linear, T::BYTES)?;
            return Err(exception);
        }
    };
    let back = cpu.op_next_rip(op);
    cpu.push(env, T::from_u64(back))?;
    cpu.next_rip = target;
    Ok(())
}

pub(crate) fn call<T: Operand>(cpu: &mut Cpu, env: &Env<'_>, op: &Op) -> Flow {
    let target = relative64(cpu, op);
    let outcome = call_to::<T>(cpu, env, op, target);
    cpu.flow(outcome, Flow::End)
}

pub(crate) fn jmp_rm<T: Operand>(cpu: &mut Cpu, env: &Env<'_>, op: &Op) -> Flow {
    let outcome = read_rm::<T>(cpu, env, op).and_then(|target| go::<T>(cpu, target.to_u64()));
    cpu.flow(outcome, Flow::End)
}

pub(crate) fn call_rm<T: Operand>(cpu: &mut Cpu, env: &Env<'_>, op: &Op) -> Flow {
    let outcome = read_rm::<T>(cpu, env, op).and_then(|target| call_to::<T>(cpu, env, op, target.to_u64()));
    cpu.flow(outcome, Flow::End)
}

pub(crate) fn ret<T: Operand>(cpu: &mut Cpu, env: &Env<'_>, op: &Op) -> Flow {
    fn body<T: Operand>(cpu: &mut Cpu, env: &Env<'_>, op: &Op) -> Outcome {
        let (target, sp) = cpu.pop_at::<T>(env, cpu.stack_pointer())?;
        go::<T>(cpu, target.to_u64())?;
        cpu.set_stack_pointer(sp.wrapping_add(op.imm));
        Ok(())
    }
    let outcome = body::<T>(cpu, env, op);
    cpu.flow(outcome, Flow::End)
}

/// The counter of LOOP and JCXZ: as wide as addresses (`flags` bits 3..0).
fn counter_mask(op: &Op) -> u64 {
    match op.flags & 15 {
        2 => 0xffff,
        4 => 0xffff_ffff,
        _ => u64::MAX,
    }
}

pub(crate) const LOOPNE: u8 = 0;
pub(crate) const LOOPE: u8 = 1;
pub(crate) const LOOP: u8 = 2;
pub(crate) const JCXZ: u8 = 3;

/// LOOP, LOOPE, LOOPNE, JCXZ; `T` is the operand size of the branch.
pub(crate) fn counted<T: Operand, const KIND: u8>(cpu: &mut Cpu, _: &Env<'_>, op: &Op) -> Flow {
    let mask = counter_mask(op);
    let old = cpu.gpr[gpr::RCX];
    let count = if KIND == JCXZ { old & mask } else { old.wrapping_sub(1) & mask };
    let zero = cpu.rflags & flag::ZF != 0;
    let taken = match KIND {
        JCXZ => count == 0,
        LOOP => count != 0,
        LOOPE => count != 0 && zero,
        _ => count != 0 && !zero,
    };
    let target = if taken { checked::<T>(cpu, relative64(cpu, op)) } else { Ok(cpu.op_next_rip(op)) };
    match target {
        Ok(target) => {
            cpu.next_rip = target;
            if KIND != JCXZ {
                // A 32-bit counter is written as a 32-bit register.
                cpu.gpr[gpr::RCX] = if mask == 0xffff { old & !mask | count } else { count };
            }
            Flow::End
        }
        Err(exception) => cpu.fault(exception),
    }
}

/// BOUND: #BR unless the register lies within the pair of signed limits in memory.
pub(crate) fn bound<T: Operand>(cpu: &mut Cpu, env: &Env<'_>, op: &Op) -> Flow {
    fn body<T: Operand>(cpu: &mut Cpu, env: &Env<'_>, op: &Op) -> Outcome {
        let linear = op_linear_dyn(cpu, op, 0, 2 * T::BYTES, Access::Read)?;
        let segment = op.segment as usize;
        let lower = cpu.load::<T>(env.io, segment, linear)?.to_i64();
        let upper = cpu.load::<T>(env.io, segment, linear.wrapping_add(T::BYTES) & 0xffff_ffff)?.to_i64();
        let index = T::get(cpu, op.dst).to_i64();
        if index < lower || index > upper {
            return Err(Exception::fault(crate::exception::vector::BR));
        }
        Ok(())
    }
    let outcome = body::<T>(cpu, env, op);
    cpu.flow(outcome, Flow::Next)
}
