//! ADD, OR, ADC, AND, SBB, SUB, XOR, CMP, TEST, INC, DEC, NEG and NOT in all their forms.
//!
//! Names say where the operands are: `rr` register and register, `ri` register and immediate, `rm` register and
//! memory, `mr` and `mi` a memory destination. The `locked` forms are host atomics.

use crate::access::Access;
use crate::cpu::Cpu;
use crate::decode::Op;
use crate::exception::Outcome;
use crate::execute::operand::{op_linear, op_linear_dyn};
use crate::execute::{Env, Flow};
use crate::host::arith::Arith;

pub(crate) const ADD: u8 = 0;
pub(crate) const OR: u8 = 1;
pub(crate) const ADC: u8 = 2;
pub(crate) const SBB: u8 = 3;
pub(crate) const AND: u8 = 4;
pub(crate) const SUB: u8 = 5;
pub(crate) const XOR: u8 = 6;
pub(crate) const CMP: u8 = 7;
pub(crate) const TEST: u8 = 8;

pub(crate) const INC: u8 = 0;
pub(crate) const DEC: u8 = 1;
pub(crate) const NEG: u8 = 2;
pub(crate) const NOT: u8 = 3;

/// Two-operand arithmetic.
#[inline(always)]
pub(crate) fn binary<T: Arith, const OP: u8>(flags: &mut u64, a: T, b: T) -> T {
    match OP {
        ADD => T::add(flags, a, b),
        OR => T::or(flags, a, b),
        ADC => T::adc(flags, a, b),
        SBB => T::sbb(flags, a, b),
        AND | TEST => T::and(flags, a, b),
        XOR => T::xor(flags, a, b),
        _ => T::sub(flags, a, b),
    }
}

/// One-operand arithmetic.
#[inline(always)]
fn unary<T: Arith, const OP: u8>(flags: &mut u64, a: T) -> T {
    match OP {
        INC => T::inc(flags, a),
        DEC => T::dec(flags, a),
        NEG => T::neg(flags, a),
        _ => T::from_u64(!a.to_u64()),
    }
}

/// Whether the operation has a result.
const fn writes(op: u8) -> bool {
    op != CMP && op != TEST
}

pub(crate) fn rr<T: Arith, const OP: u8>(cpu: &mut Cpu, _: &Env<'_>, op: &Op) -> Flow {
    let (a, b) = (T::get(cpu, op.dst), T::get(cpu, op.src));
    let r = binary::<T, OP>(&mut cpu.rflags, a, b);
    if writes(OP) {
        T::set(cpu, op.dst, r);
    }
    Flow::Next
}

pub(crate) fn ri<T: Arith, const OP: u8>(cpu: &mut Cpu, _: &Env<'_>, op: &Op) -> Flow {
    let a = T::get(cpu, op.dst);
    let r = binary::<T, OP>(&mut cpu.rflags, a, T::from_u64(op.imm));
    if writes(OP) {
        T::set(cpu, op.dst, r);
    }
    Flow::Next
}

pub(crate) fn rm<T: Arith, const OP: u8, const A: u8>(cpu: &mut Cpu, env: &Env<'_>, op: &Op) -> Flow {
    #[inline(always)]
    fn body<T: Arith, const OP: u8, const A: u8>(cpu: &mut Cpu, env: &Env<'_>, op: &Op) -> Outcome {
        let linear = op_linear::<A>(cpu, op, T::BYTES, Access::Read)?;
        let b = cpu.load::<T>(env.io, op.segment as usize, linear)?;
        let a = T::get(cpu, op.dst);
        let r = binary::<T, OP>(&mut cpu.rflags, a, b);
        if writes(OP) {
            T::set(cpu, op.dst, r);
        }
        Ok(())
    }
    let outcome = body::<T, OP, A>(cpu, env, op);
    cpu.flow(outcome, Flow::Next)
}

/// Memory operand with `b`: read and written, or only read by CMP and TEST.
#[inline(always)]
fn memory<T: Arith, const OP: u8, const A: u8>(cpu: &mut Cpu, env: &Env<'_>, op: &Op, b: T) -> Outcome {
    let segment = op.segment as usize;
    if writes(OP) {
        let linear = op_linear::<A>(cpu, op, T::BYTES, Access::Write)?;
        let place = cpu.place::<T>(segment, linear)?;
        let a = cpu.place_load::<T>(env.io, place)?;
        let mut flags = cpu.rflags;
        let r = binary::<T, OP>(&mut flags, a, b);
        cpu.place_store(env.io, place, r)?;
        cpu.rflags = flags;
    } else {
        let linear = op_linear::<A>(cpu, op, T::BYTES, Access::Read)?;
        let a = cpu.load::<T>(env.io, segment, linear)?;
        binary::<T, OP>(&mut cpu.rflags, a, b);
    }
    Ok(())
}

pub(crate) fn mr<T: Arith, const OP: u8, const A: u8>(cpu: &mut Cpu, env: &Env<'_>, op: &Op) -> Flow {
    let b = T::get(cpu, op.src);
    let outcome = memory::<T, OP, A>(cpu, env, op, b);
    cpu.flow(outcome, Flow::Next)
}

pub(crate) fn mi<T: Arith, const OP: u8, const A: u8>(cpu: &mut Cpu, env: &Env<'_>, op: &Op) -> Flow {
    let outcome = memory::<T, OP, A>(cpu, env, op, T::from_u64(op.imm));
    cpu.flow(outcome, Flow::Next)
}

fn locked<T: Arith, const OP: u8>(cpu: &mut Cpu, env: &Env<'_>, op: &Op, b: T) -> Outcome {
    let linear = op_linear_dyn(cpu, op, 0, T::BYTES, Access::Write)?;
    let place = cpu.place::<T>(op.segment as usize, linear)?;
    let before = cpu.rflags;
    let mut flags = before;
    cpu.place_atomic(env.io, place, Access::Write, |a| {
        flags = before;
        binary::<T, OP>(&mut flags, a, b)
    })?;
    cpu.rflags = flags;
    Ok(())
}

pub(crate) fn locked_mr<T: Arith, const OP: u8>(cpu: &mut Cpu, env: &Env<'_>, op: &Op) -> Flow {
    let b = T::get(cpu, op.src);
    let outcome = locked::<T, OP>(cpu, env, op, b);
    cpu.flow(outcome, Flow::Next)
}

pub(crate) fn locked_mi<T: Arith, const OP: u8>(cpu: &mut Cpu, env: &Env<'_>, op: &Op) -> Flow {
    let outcome = locked::<T, OP>(cpu, env, op, T::from_u64(op.imm));
    cpu.flow(outcome, Flow::Next)
}

/// INC, DEC, NEG, NOT of a register.
pub(crate) fn unary_r<T: Arith, const OP: u8>(cpu: &mut Cpu, _: &Env<'_>, op: &Op) -> Flow {
    let a = T::get(cpu, op.dst);
    let r = unary::<T, OP>(&mut cpu.rflags, a);
    T::set(cpu, op.dst, r);
    Flow::Next
}

/// INC, DEC, NEG, NOT of memory.
pub(crate) fn unary_m<T: Arith, const OP: u8>(cpu: &mut Cpu, env: &Env<'_>, op: &Op) -> Flow {
    fn body<T: Arith, const OP: u8>(cpu: &mut Cpu, env: &Env<'_>, op: &Op) -> Outcome {
        let linear = op_linear_dyn(cpu, op, 0, T::BYTES, Access::Write)?;
        let place = cpu.place::<T>(op.segment as usize, linear)?;
        let a = cpu.place_load::<T>(env.io, place)?;
        let mut flags = cpu.rflags;
        let r = unary::<T, OP>(&mut flags, a);
        cpu.place_store(env.io, place, r)?;
        cpu.rflags = flags;
        Ok(())
    }
    let outcome = body::<T, OP>(cpu, env, op);
    cpu.flow(outcome, Flow::Next)
}

/// LOCK INC, DEC, NEG, NOT.
pub(crate) fn unary_locked<T: Arith, const OP: u8>(cpu: &mut Cpu, env: &Env<'_>, op: &Op) -> Flow {
    fn body<T: Arith, const OP: u8>(cpu: &mut Cpu, env: &Env<'_>, op: &Op) -> Outcome {
        let linear = op_linear_dyn(cpu, op, 0, T::BYTES, Access::Write)?;
        let place = cpu.place::<T>(op.segment as usize, linear)?;
        let before = cpu.rflags;
        let mut flags = before;
        cpu.place_atomic(env.io, place, Access::Write, |a| {
            flags = before;
            unary::<T, OP>(&mut flags, a)
        })?;
        cpu.rflags = flags;
        Ok(())
    }
    let outcome = body::<T, OP>(cpu, env, op);
    cpu.flow(outcome, Flow::Next)
}
