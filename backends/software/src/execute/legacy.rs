//! Decimal adjustments, which exist outside 64-bit mode only (Intel SDM vol. 2): AAA, AAS, AAM, AAD, DAA, DAS.
//!
//! The host cannot run them in 64-bit mode. Flags that the manual leaves undefined are computed from the result
//! as processors do.

use crate::cpu::{Cpu, flag};
use crate::decode::Op;
use crate::exception::Exception;
use crate::execute::operand::Operand;
use crate::execute::{Env, Flow};

/// SF, ZF and PF of `value`.
fn result_flags(value: u8) -> u64 {
    let mut flags = 0;
    if value & 0x80 != 0 {
        flags |= flag::SF;
    }
    if value == 0 {
        flags |= flag::ZF;
    }
    if value.count_ones() & 1 == 0 {
        flags |= flag::PF;
    }
    flags
}

fn set_flags(cpu: &mut Cpu, flags: u64) {
    cpu.rflags = cpu.rflags & !flag::ARITHMETIC | flags;
}

/// AAA and AAS (`SUBTRACT`).
pub(crate) fn ascii_adjust<const SUBTRACT: bool>(cpu: &mut Cpu, _: &Env<'_>, _: &Op) -> Flow {
    let ax = u16::get(cpu, 0);
    let adjust = ax & 0xf > 9 || cpu.rflags & flag::AF != 0;
    let ax = match (adjust, SUBTRACT) {
        (false, _) => ax,
        (true, false) => ax.wrapping_add(0x106),
        (true, true) => ax.wrapping_sub(0x106),
    };
    u16::set(cpu, 0, ax & 0xff0f);
    let carry = if adjust { flag::AF | flag::CF } else { 0 };
    set_flags(cpu, result_flags(ax as u8 & 0xf) | carry);
    Flow::Next
}

/// AAM; #DE for a base of zero.
pub(crate) fn aam(cpu: &mut Cpu, _: &Env<'_>, op: &Op) -> Flow {
    let base = op.imm as u8;
    let al = u8::get(cpu, 0);
    let (Some(high), Some(low)) = (al.checked_div(base), al.checked_rem(base)) else {
        return cpu.fault(Exception::DE);
    };
    u16::set(cpu, 0, u16::from(high) << 8 | u16::from(low));
    set_flags(cpu, result_flags(low));
    Flow::Next
}

/// AAD.
pub(crate) fn aad(cpu: &mut Cpu, _: &Env<'_>, op: &Op) -> Flow {
    let ax = u16::get(cpu, 0);
    let al = (ax as u8).wrapping_add(((ax >> 8) as u8).wrapping_mul(op.imm as u8));
    u16::set(cpu, 0, u16::from(al));
    set_flags(cpu, result_flags(al));
    Flow::Next
}

/// DAA and DAS (`SUBTRACT`).
pub(crate) fn decimal_adjust<const SUBTRACT: bool>(cpu: &mut Cpu, _: &Env<'_>, _: &Op) -> Flow {
    let old = u8::get(cpu, 0);
    let carry_in = cpu.rflags & flag::CF != 0;
    let by = |value: u8, amount: u8| {
        if SUBTRACT { value.overflowing_sub(amount) } else { value.overflowing_add(amount) }
    };
    let mut al = old;
    let mut flags = 0;
    if old & 0xf > 9 || cpu.rflags & flag::AF != 0 {
        let (adjusted, carry) = by(al, 6);
        al = adjusted;
        flags |= flag::AF;
        if carry_in || carry {
            flags |= flag::CF;
        }
    }
    if old > 0x99 || carry_in {
        al = by(al, 0x60).0;
        flags |= flag::CF;
    } else if !SUBTRACT {
        flags &= !flag::CF;
    }
    u8::set(cpu, 0, al);
    set_flags(cpu, result_flags(al) | flags);
    Flow::Next
}
