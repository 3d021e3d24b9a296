//! Data movement: MOV, MOVZX, MOVSX, LEA, XCHG, CMPXCHG, XADD, CMOVcc, SETcc, BSWAP, MOVBE, XLAT, sign
//! extension of the accumulator, LAHF, SAHF and single flags.

use atoll_machine::cpu::state::gpr;

use crate::access::{Access, segment_fault};
use crate::cpu::{Cpu, flag};
use crate::decode::Op;
use crate::exception::{Exception, Outcome};
use crate::execute::operand::{
    FLAG_MEMORY, Operand, condition, modify_rm, op_linear, op_linear_dyn, op_offset, read_rm, write_rm,
};
use crate::execute::{Env, Flow};
use crate::host::arith::Arith;

pub(crate) fn mov_rr<T: Operand>(cpu: &mut Cpu, _: &Env<'_>, op: &Op) -> Flow {
    let value = T::get(cpu, op.src);
    T::set(cpu, op.dst, value);
    Flow::Next
}

pub(crate) fn mov_ri<T: Operand>(cpu: &mut Cpu, _: &Env<'_>, op: &Op) -> Flow {
    T::set(cpu, op.dst, T::from_u64(op.imm));
    Flow::Next
}

pub(crate) fn mov_rm<T: Operand, const A: u8>(cpu: &mut Cpu, env: &Env<'_>, op: &Op) -> Flow {
    #[inline(always)]
    fn body<T: Operand, const A: u8>(cpu: &mut Cpu, env: &Env<'_>, op: &Op) -> Outcome {
        let linear = op_linear::<A>(cpu, op, T::BYTES, Access::Read)?;
        let value = cpu.load::<T>(env.io, op.segment as usize, linear)?;
        T::set(cpu, op.dst, value);
        Ok(())
    }
    let outcome = body::<T, A>(cpu, env, op);
    cpu.flow(outcome, Flow::Next)
}

#[inline(always)]
fn store<T: Operand, const A: u8>(cpu: &mut Cpu, env: &Env<'_>, op: &Op, value: T) -> Flow {
    let outcome = op_linear::<A>(cpu, op, T::BYTES, Access::Write)
        .and_then(|linear| cpu.store::<T>(env.io, op.segment as usize, linear, value));
    cpu.flow(outcome, Flow::Next)
}

pub(crate) fn mov_mr<T: Operand, const A: u8>(cpu: &mut Cpu, env: &Env<'_>, op: &Op) -> Flow {
    let value = T::get(cpu, op.src);
    store::<T, A>(cpu, env, op, value)
}

pub(crate) fn mov_mi<T: Operand, const A: u8>(cpu: &mut Cpu, env: &Env<'_>, op: &Op) -> Flow {
    store::<T, A>(cpu, env, op, T::from_u64(op.imm))
}

/// Linear address of a MOV with a full-size absolute offset, which is in `imm`.
fn absolute(cpu: &Cpu, op: &Op, size: u64, access: Access) -> Outcome<u64> {
    cpu.linear(op.segment as usize, op.imm, size, access)
}

/// MOV accumulator, moffs.
pub(crate) fn mov_absolute_load<T: Operand>(cpu: &mut Cpu, env: &Env<'_>, op: &Op) -> Flow {
    let outcome = absolute(cpu, op, T::BYTES, Access::Read)
        .and_then(|linear| cpu.load::<T>(env.io, op.segment as usize, linear))
        .map(|value| T::set(cpu, 0, value));
    cpu.flow(outcome, Flow::Next)
}

/// MOV moffs, accumulator.
pub(crate) fn mov_absolute_store<T: Operand>(cpu: &mut Cpu, env: &Env<'_>, op: &Op) -> Flow {
    let value = T::get(cpu, 0);
    let outcome = absolute(cpu, op, T::BYTES, Access::Write)
        .and_then(|linear| cpu.store::<T>(env.io, op.segment as usize, linear, value));
    cpu.flow(outcome, Flow::Next)
}

#[inline(always)]
fn extend<S: Operand, D: Operand, const SIGNED: bool>(value: S) -> D {
    D::from_u64(if SIGNED { value.to_i64() as u64 } else { value.to_u64() })
}

/// MOVZX, MOVSX, MOVSXD from a register.
pub(crate) fn extend_r<S: Operand, D: Operand, const SIGNED: bool>(
    cpu: &mut Cpu,
    _: &Env<'_>,
    op: &Op,
) -> Flow {
    let value = extend::<S, D, SIGNED>(S::get(cpu, op.src));
    D::set(cpu, op.dst, value);
    Flow::Next
}

/// MOVZX, MOVSX, MOVSXD from memory.
pub(crate) fn extend_m<S: Operand, D: Operand, const SIGNED: bool, const A: u8>(
    cpu: &mut Cpu,
    env: &Env<'_>,
    op: &Op,
) -> Flow {
    let outcome = op_linear::<A>(cpu, op, S::BYTES, Access::Read)
        .and_then(|linear| cpu.load::<S>(env.io, op.segment as usize, linear))
        .map(|value| D::set(cpu, op.dst, extend::<S, D, SIGNED>(value)));
    cpu.flow(outcome, Flow::Next)
}

pub(crate) fn lea<T: Operand, const A: u8>(cpu: &mut Cpu, _: &Env<'_>, op: &Op) -> Flow {
    let offset = op_offset::<A>(cpu, op);
    T::set(cpu, op.dst, T::from_u64(offset));
    Flow::Next
}

/// XCHG; with memory always locked.
pub(crate) fn xchg<T: Operand>(cpu: &mut Cpu, env: &Env<'_>, op: &Op) -> Flow {
    let new = T::get(cpu, op.src);
    let outcome = modify_rm::<T>(cpu, env, op, 0, |_, _| new).map(|old| T::set(cpu, op.src, old));
    cpu.flow(outcome, Flow::Next)
}

/// CMPXCHG. The destination is written in either case.
pub(crate) fn cmpxchg<T: Arith>(cpu: &mut Cpu, env: &Env<'_>, op: &Op) -> Flow {
    let (accumulator, new) = (T::get(cpu, 0), T::get(cpu, op.src));
    let compare = |flags: &mut u64, old: T| {
        T::sub(flags, accumulator, old);
        if old == accumulator { new } else { old }
    };
    let before = cpu.gpr[(op.dst & 15) as usize];
    let outcome = modify_rm::<T>(cpu, env, op, 0, compare).map(|old| {
        if old != accumulator {
            // A register that is not replaced keeps its upper half, too.
            if op.flags & FLAG_MEMORY == 0 {
                cpu.gpr[(op.dst & 15) as usize] = before;
            }
            T::set(cpu, 0, old);
        }
    });
    cpu.flow(outcome, Flow::Next)
}

/// XADD.
pub(crate) fn xadd<T: Arith>(cpu: &mut Cpu, env: &Env<'_>, op: &Op) -> Flow {
    let addend = T::get(cpu, op.src);
    if op.flags & FLAG_MEMORY == 0 {
        let old = T::get(cpu, op.dst);
        let sum = T::add(&mut cpu.rflags, old, addend);
        T::set(cpu, op.src, old);
        T::set(cpu, op.dst, sum);
        return Flow::Next;
    }
    let outcome = modify_rm::<T>(cpu, env, op, 0, |flags, old| T::add(flags, old, addend))
        .map(|old| T::set(cpu, op.src, old));
    cpu.flow(outcome, Flow::Next)
}

/// CMPXCHG8B: always a host atomic, LOCK or not.
pub(crate) fn cmpxchg8b(cpu: &mut Cpu, env: &Env<'_>, op: &Op) -> Flow {
    fn body(cpu: &mut Cpu, env: &Env<'_>, op: &Op) -> Outcome {
        let half = |cpu: &Cpu, r: usize| cpu.gpr[r] & 0xffff_ffff;
        let expected = half(cpu, gpr::RDX) << 32 | half(cpu, gpr::RAX);
        let new = half(cpu, gpr::RCX) << 32 | half(cpu, gpr::RBX);
        let linear = op_linear_dyn(cpu, op, 0, 8, Access::Write)?;
        let place = cpu.place::<u64>(op.segment as usize, linear)?;
        let old = cpu.place_atomic(
            env.io,
            place,
            Access::Write,
            |old: u64| {
                if old == expected { new } else { old }
            },
        )?;
        set_zero(cpu, old == expected);
        if old != expected {
            cpu.gpr[gpr::RAX] = old & 0xffff_ffff;
            cpu.gpr[gpr::RDX] = old >> 32;
        }
        Ok(())
    }
    let outcome = body(cpu, env, op);
    cpu.flow(outcome, Flow::Next)
}

/// CMPXCHG16B: #GP(0) unless aligned; always a host atomic.
pub(crate) fn cmpxchg16b(cpu: &mut Cpu, env: &Env<'_>, op: &Op) -> Flow {
    fn body(cpu: &mut Cpu, env: &Env<'_>, op: &Op) -> Outcome {
        let pair =
            |cpu: &Cpu, low: usize, high: usize| u128::from(cpu.gpr[low]) | u128::from(cpu.gpr[high]) << 64;
        let segment = op.segment as usize;
        let linear = op_linear_dyn(cpu, op, 0, 16, Access::Write)?;
        if linear & 15 != 0 {
            return Err(Exception::GP0);
        }
        if !crate::access::is_canonical(linear) {
            return Err(segment_fault(segment));
        }
        let expected = pair(cpu, gpr::RAX, gpr::RDX);
        let new = pair(cpu, gpr::RBX, gpr::RCX);
        let (old, equal) = cpu.compare_exchange_16(env.io, segment, linear, expected, new)?;
        set_zero(cpu, equal);
        if !equal {
            cpu.gpr[gpr::RAX] = old as u64;
            cpu.gpr[gpr::RDX] = (old >> 64) as u64;
        }
        Ok(())
    }
    let outcome = body(cpu, env, op);
    cpu.flow(outcome, Flow::Next)
}

fn set_zero(cpu: &mut Cpu, zero: bool) {
    cpu.rflags = cpu.rflags & !flag::ZF | if zero { flag::ZF } else { 0 };
}

/// CMOVcc. The source is read whether or not it is moved, and a 32-bit destination is always zero-extended.
pub(crate) fn cmov<T: Operand, const CC: u8>(cpu: &mut Cpu, env: &Env<'_>, op: &Op) -> Flow {
    let outcome = read_rm::<T>(cpu, env, op).map(|value| {
        let old = T::get(cpu, op.dst);
        let value = if condition::<CC>(cpu.rflags) { value } else { old };
        T::set(cpu, op.dst, value);
    });
    cpu.flow(outcome, Flow::Next)
}

/// SETcc.
pub(crate) fn setcc<const CC: u8>(cpu: &mut Cpu, env: &Env<'_>, op: &Op) -> Flow {
    let value = u8::from(condition::<CC>(cpu.rflags));
    let outcome = write_rm::<u8>(cpu, env, op, value);
    cpu.flow(outcome, Flow::Next)
}

/// BSWAP; of a 16-bit register it stores zero, as processors do.
pub(crate) fn bswap<T: Operand>(cpu: &mut Cpu, _: &Env<'_>, op: &Op) -> Flow {
    let value = T::get(cpu, op.dst).to_u64();
    let swapped = match T::BITS {
        64 => value.swap_bytes(),
        32 => u64::from((value as u32).swap_bytes()),
        _ => 0,
    };
    T::set(cpu, op.dst, T::from_u64(swapped));
    Flow::Next
}

fn reversed<T: Operand>(value: T) -> T {
    T::from_u64(value.to_u64().swap_bytes() >> (64 - T::BITS))
}

/// MOVBE register, memory.
pub(crate) fn movbe_load<T: Operand>(cpu: &mut Cpu, env: &Env<'_>, op: &Op) -> Flow {
    let outcome = read_rm::<T>(cpu, env, op).map(|value| T::set(cpu, op.dst, reversed(value)));
    cpu.flow(outcome, Flow::Next)
}

/// MOVBE memory, register.
pub(crate) fn movbe_store<T: Operand>(cpu: &mut Cpu, env: &Env<'_>, op: &Op) -> Flow {
    let value = reversed(T::get(cpu, op.src));
    let outcome = write_rm::<T>(cpu, env, op, value);
    cpu.flow(outcome, Flow::Next)
}

/// XLAT. `flags` bits 3..0 hold the address size.
pub(crate) fn xlat(cpu: &mut Cpu, env: &Env<'_>, op: &Op) -> Flow {
    let mask = match op.flags & 15 {
        2 => 0xffff,
        4 => 0xffff_ffff,
        _ => u64::MAX,
    };
    let offset = cpu.gpr[gpr::RBX].wrapping_add(cpu.gpr[gpr::RAX] & 0xff) & mask;
    let segment = op.segment as usize;
    let outcome = cpu
        .linear(segment, offset, 1, Access::Read)
        .and_then(|linear| cpu.load::<u8>(env.io, segment, linear))
        .map(|value| u8::set(cpu, 0, value));
    cpu.flow(outcome, Flow::Next)
}

/// CBW, CWDE, CDQE: the accumulator from `S` to `D`.
pub(crate) fn extend_accumulator<S: Operand, D: Operand>(cpu: &mut Cpu, _: &Env<'_>, _: &Op) -> Flow {
    let value = S::get(cpu, 0).to_i64() as u64;
    D::set(cpu, 0, D::from_u64(value));
    Flow::Next
}

/// CWD, CDQ, CQO: the accumulator's sign fills RDX.
pub(crate) fn sign_to_rdx<T: Operand>(cpu: &mut Cpu, _: &Env<'_>, _: &Op) -> Flow {
    let sign = T::get(cpu, 0).to_i64() >> 63;
    T::set(cpu, gpr::RDX as u8, T::from_u64(sign as u64));
    Flow::Next
}

pub(crate) fn lahf(cpu: &mut Cpu, _: &Env<'_>, _: &Op) -> Flow {
    let value = (cpu.rflags & 0xd5 | 2) as u8;
    u8::set(cpu, 0x10, value);
    Flow::Next
}

pub(crate) fn sahf(cpu: &mut Cpu, _: &Env<'_>, _: &Op) -> Flow {
    cpu.rflags = cpu.rflags & !0xd5 | u64::from(u8::get(cpu, 0x10)) & 0xd5;
    Flow::Next
}

/// CLC, STC, CMC, CLD, STD: RFLAGS = RFLAGS and not `disp`'s bits, exclusive-or `imm`.
pub(crate) fn flag_bits(cpu: &mut Cpu, _: &Env<'_>, op: &Op) -> Flow {
    cpu.rflags = cpu.rflags & !(i64::from(op.disp) as u64) ^ op.imm;
    Flow::Next
}

/// SALC: AL = CF ? 0xff : 0.
pub(crate) fn salc(cpu: &mut Cpu, _: &Env<'_>, _: &Op) -> Flow {
    let value = if cpu.rflags & flag::CF != 0 { 0xff } else { 0 };
    u8::set(cpu, 0, value);
    Flow::Next
}

pub(crate) fn nop(_: &mut Cpu, _: &Env<'_>, _: &Op) -> Flow {
    Flow::Next
}

/// CLFLUSH and its kin: reads the byte's translation, as a load does.
pub(crate) fn touch(cpu: &mut Cpu, env: &Env<'_>, op: &Op) -> Flow {
    let outcome = op_linear_dyn(cpu, op, 0, 1, Access::Read)
        .and_then(|linear| cpu.probe_segment(env.io, op.segment as usize, linear));
    cpu.flow(outcome, Flow::Next)
}

/// A fence: the host's own orders this thread's accesses.
pub(crate) fn fence(_: &mut Cpu, _: &Env<'_>, _: &Op) -> Flow {
    std::sync::atomic::fence(std::sync::atomic::Ordering::SeqCst);
    Flow::Next
}
