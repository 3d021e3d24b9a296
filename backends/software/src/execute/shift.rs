//! Shifts, rotates, double shifts, multiplication and division.

use atoll_machine::cpu::state::gpr;

use crate::cpu::Cpu;
use crate::decode::Op;
use crate::exception::{Exception, Outcome};
use crate::execute::operand::{FLAG_REP, Operand, modify_rm, read_rm};
use crate::execute::{Env, Flow};
use crate::host::arith::{Arith, WideArith};

pub(crate) const ROL: u8 = 0;
pub(crate) const ROR: u8 = 1;
pub(crate) const RCL: u8 = 2;
pub(crate) const RCR: u8 = 3;
pub(crate) const SHL: u8 = 4;
pub(crate) const SHR: u8 = 5;
pub(crate) const SAR: u8 = 7;

#[inline(always)]
fn apply<T: Arith, const OP: u8>(flags: &mut u64, a: T, count: u8) -> T {
    match OP {
        ROL => T::rol(flags, a, count),
        ROR => T::ror(flags, a, count),
        RCL => T::rcl(flags, a, count),
        RCR => T::rcr(flags, a, count),
        SHR => T::shr(flags, a, count),
        SAR => T::sar(flags, a, count),
        _ => T::shl(flags, a, count),
    }
}

/// A register shifted by an immediate.
pub(crate) fn ri<T: Arith, const OP: u8>(cpu: &mut Cpu, _: &Env<'_>, op: &Op) -> Flow {
    let a = T::get(cpu, op.dst);
    let r = apply::<T, OP>(&mut cpu.rflags, a, op.imm as u8);
    T::set(cpu, op.dst, r);
    Flow::Next
}

/// The count of a shift: CL if the op's flag says so, else the immediate.
#[inline(always)]
fn count(cpu: &Cpu, op: &Op) -> u8 {
    if op.flags & FLAG_REP != 0 { cpu.gpr[gpr::RCX] as u8 } else { op.imm as u8 }
}

/// Any operand shifted by CL or an immediate.
pub(crate) fn any<T: Arith, const OP: u8>(cpu: &mut Cpu, env: &Env<'_>, op: &Op) -> Flow {
    let count = count(cpu, op);
    let outcome = modify_rm::<T>(cpu, env, op, 0, |flags, a| apply::<T, OP>(flags, a, count)).map(|_| ());
    cpu.flow(outcome, Flow::Next)
}

/// SHLD (`LEFT`) and SHRD.
pub(crate) fn double<T: WideArith, const LEFT: bool>(cpu: &mut Cpu, env: &Env<'_>, op: &Op) -> Flow {
    let (b, count) = (T::get(cpu, op.src), count(cpu, op));
    let change =
        |flags: &mut u64, a| if LEFT { T::shld(flags, a, b, count) } else { T::shrd(flags, a, b, count) };
    let outcome = modify_rm::<T>(cpu, env, op, 0, change).map(|_| ());
    cpu.flow(outcome, Flow::Next)
}

/// Writes `high:low` to RDX:RAX, or to AX for bytes.
#[inline(always)]
fn set_pair<T: Operand>(cpu: &mut Cpu, low: T, high: T) {
    if T::BITS == 8 {
        u16::set(cpu, 0, (low.to_u64() | high.to_u64() << 8) as u16);
    } else {
        T::set(cpu, gpr::RAX as u8, low);
        T::set(cpu, gpr::RDX as u8, high);
    }
}

/// MUL and one-operand IMUL.
pub(crate) fn multiply<T: Arith, const SIGNED: bool>(cpu: &mut Cpu, env: &Env<'_>, op: &Op) -> Flow {
    let outcome = read_rm::<T>(cpu, env, op).map(|b| {
        let a = T::get(cpu, 0);
        let (low, high) = if SIGNED { T::imul(&mut cpu.rflags, a, b) } else { T::mul(&mut cpu.rflags, a, b) };
        set_pair(cpu, low, high);
    });
    cpu.flow(outcome, Flow::Next)
}

/// DIV and IDIV: #DE on a zero divisor or a quotient that does not fit.
pub(crate) fn divide<T: Arith, const SIGNED: bool>(cpu: &mut Cpu, env: &Env<'_>, op: &Op) -> Flow {
    fn body<T: Arith, const SIGNED: bool>(cpu: &mut Cpu, env: &Env<'_>, op: &Op) -> Outcome {
        let divisor = read_rm::<T>(cpu, env, op)?;
        let low = T::get(cpu, 0);
        let high = T::get(cpu, if T::BITS == 8 { 0x10 } else { gpr::RDX as u8 });
        let flags = &mut cpu.rflags;
        let result =
            if SIGNED { T::idiv(flags, low, high, divisor) } else { T::div(flags, low, high, divisor) };
        let (quotient, remainder) = result.ok_or(Exception::DE)?;
        set_pair(cpu, quotient, remainder);
        Ok(())
    }
    let outcome = body::<T, SIGNED>(cpu, env, op);
    cpu.flow(outcome, Flow::Next)
}

/// IMUL register, operand.
pub(crate) fn imul2<T: WideArith>(cpu: &mut Cpu, env: &Env<'_>, op: &Op) -> Flow {
    let outcome = read_rm::<T>(cpu, env, op).map(|b| {
        let a = T::get(cpu, op.dst);
        let r = T::imul2(&mut cpu.rflags, a, b);
        T::set(cpu, op.dst, r);
    });
    cpu.flow(outcome, Flow::Next)
}

/// IMUL register, operand, immediate.
pub(crate) fn imul3<T: WideArith>(cpu: &mut Cpu, env: &Env<'_>, op: &Op) -> Flow {
    let outcome = read_rm::<T>(cpu, env, op).map(|a| {
        let r = T::imul2(&mut cpu.rflags, a, T::from_u64(op.imm));
        T::set(cpu, op.dst, r);
    });
    cpu.flow(outcome, Flow::Next)
}
