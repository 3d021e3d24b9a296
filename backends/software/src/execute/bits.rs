//! Bit instructions: BT and its kin, scans, counts, BMI1, BMI2, ADX, CRC32.

use atoll_machine::cpu::state::gpr;

use crate::access::Access;
use crate::cpu::{Cpu, flag};
use crate::decode::Op;
use crate::exception::Outcome;
use crate::execute::operand::{FLAG_MEMORY, Operand, modify_rm, op_linear_dyn, read_rm};
use crate::execute::{Env, Flow};
use crate::host::arith::{BmiArith, WideArith, crc32};

pub(crate) const BT: u8 = 0;
pub(crate) const BTS: u8 = 1;
pub(crate) const BTR: u8 = 2;
pub(crate) const BTC: u8 = 3;

pub(crate) const BSF: u8 = 0;
pub(crate) const BSR: u8 = 1;
pub(crate) const LZCNT: u8 = 2;
pub(crate) const TZCNT: u8 = 3;
pub(crate) const POPCNT: u8 = 4;

pub(crate) const ANDN: u8 = 0;
pub(crate) const BEXTR: u8 = 1;
pub(crate) const BZHI: u8 = 2;
pub(crate) const BLSI: u8 = 3;
pub(crate) const BLSR: u8 = 4;
pub(crate) const BLSMSK: u8 = 5;
pub(crate) const PDEP: u8 = 6;
pub(crate) const PEXT: u8 = 7;
pub(crate) const RORX: u8 = 8;
pub(crate) const SARX: u8 = 9;
pub(crate) const SHLX: u8 = 10;
pub(crate) const SHRX: u8 = 11;

#[inline(always)]
fn apply<T: WideArith, const OP: u8>(flags: &mut u64, a: T, bit: T) -> T {
    match OP {
        BT => T::bt(flags, a, bit),
        BTS => T::bts(flags, a, bit),
        BTR => T::btr(flags, a, bit),
        _ => T::btc(flags, a, bit),
    }
}

/// BT, BTS, BTR, BTC with `bit`; `extra` bytes from the operand's own address.
#[inline(always)]
fn test<T: WideArith, const OP: u8>(cpu: &mut Cpu, env: &Env<'_>, op: &Op, bit: T, extra: u64) -> Outcome {
    if OP != BT {
        return modify_rm::<T>(cpu, env, op, extra, |flags, a| apply::<T, OP>(flags, a, bit)).map(|_| ());
    }
    let a = if op.flags & FLAG_MEMORY == 0 {
        T::get(cpu, op.dst)
    } else {
        let linear = op_linear_dyn(cpu, op, extra, T::BYTES, Access::Read)?;
        cpu.load::<T>(env.io, op.segment as usize, linear)?
    };
    T::bt(&mut cpu.rflags, a, bit);
    Ok(())
}

/// With an immediate bit number: modulo the operand size, memory included.
pub(crate) fn test_i<T: WideArith, const OP: u8>(cpu: &mut Cpu, env: &Env<'_>, op: &Op) -> Flow {
    let outcome = test::<T, OP>(cpu, env, op, T::from_u64(op.imm), 0);
    cpu.flow(outcome, Flow::Next)
}

/// With a bit number in a register: in memory it addresses a bit string around the operand.
pub(crate) fn test_r<T: WideArith, const OP: u8>(cpu: &mut Cpu, env: &Env<'_>, op: &Op) -> Flow {
    let bit = T::get(cpu, op.src);
    let extra = if op.flags & FLAG_MEMORY == 0 {
        0
    } else {
        // Whole operands, signed.
        (bit.to_i64() >> T::BITS.trailing_zeros()).wrapping_mul(T::BYTES as i64) as u64
    };
    let outcome = test::<T, OP>(cpu, env, op, bit, extra);
    cpu.flow(outcome, Flow::Next)
}

/// BSF, BSR, LZCNT, TZCNT, POPCNT.
pub(crate) fn scan<T: WideArith, const OP: u8>(cpu: &mut Cpu, env: &Env<'_>, op: &Op) -> Flow {
    let outcome = read_rm::<T>(cpu, env, op).map(|source| {
        let old = cpu.gpr[(op.dst & 15) as usize];
        let flags = &mut cpu.rflags;
        let new = match OP {
            BSF => T::bsf(flags, old, source),
            BSR => T::bsr(flags, old, source),
            LZCNT => T::lzcnt(flags, old, source),
            TZCNT => T::tzcnt(flags, old, source),
            _ => T::popcnt(flags, old, source),
        };
        cpu.gpr[(op.dst & 15) as usize] = new;
    });
    cpu.flow(outcome, Flow::Next)
}

/// BMI instructions: `dst`, the r/m operand (`src`), and for three-operand forms a register whose number is in
/// `imm` (a shift count for RORX).
pub(crate) fn bmi<T: BmiArith, const OP: u8>(cpu: &mut Cpu, env: &Env<'_>, op: &Op) -> Flow {
    let outcome = read_rm::<T>(cpu, env, op).map(|a| {
        let other = T::get(cpu, op.imm as u8 & 15);
        let shift = (other.to_u64() % u64::from(T::BITS)) as u32;
        let flags = &mut cpu.rflags;
        let r = match OP {
            ANDN => T::andn(flags, other, a),
            BEXTR => T::bextr(flags, a, other),
            BZHI => T::bzhi(flags, a, other),
            BLSI => T::blsi(flags, a),
            BLSR => T::blsr(flags, a),
            BLSMSK => T::blsmsk(flags, a),
            // The mask is the r/m operand.
            PDEP => T::pdep(other, a),
            PEXT => T::pext(other, a),
            RORX => rotate_right(a, op.imm as u32),
            SARX => T::from_u64((a.to_i64() >> shift) as u64),
            SHLX => T::from_u64(a.to_u64() << shift),
            _ => T::from_u64(a.to_u64() >> shift),
        };
        T::set(cpu, op.dst, r);
    });
    cpu.flow(outcome, Flow::Next)
}

fn rotate_right<T: Operand>(a: T, count: u32) -> T {
    let count = count & (T::BITS - 1);
    let value = a.to_u64();
    if count == 0 { a } else { T::from_u64(value >> count | value << (T::BITS - count)) }
}

/// MULX: `dst` high half, register `imm` low half (written first), times RDX.
pub(crate) fn mulx<T: BmiArith>(cpu: &mut Cpu, env: &Env<'_>, op: &Op) -> Flow {
    let outcome = read_rm::<T>(cpu, env, op).map(|a| {
        let b = T::get(cpu, gpr::RDX as u8);
        let product = u128::from(a.to_u64()) * u128::from(b.to_u64());
        T::set(cpu, op.imm as u8 & 15, T::from_u64(product as u64));
        T::set(cpu, op.dst, T::from_u64((product >> T::BITS) as u64));
    });
    cpu.flow(outcome, Flow::Next)
}

/// ADCX (`FLAG` = CF) and ADOX (`FLAG` = OF).
pub(crate) fn add_with<T: BmiArith, const OVERFLOW: bool>(cpu: &mut Cpu, env: &Env<'_>, op: &Op) -> Flow {
    let bit = if OVERFLOW { flag::OF } else { flag::CF };
    let outcome = read_rm::<T>(cpu, env, op).map(|a| {
        let carry = u128::from(cpu.rflags & bit != 0);
        let sum = u128::from(T::get(cpu, op.dst).to_u64()) + u128::from(a.to_u64()) + carry;
        let out = sum >> T::BITS != 0;
        cpu.rflags = cpu.rflags & !bit | if out { bit } else { 0 };
        T::set(cpu, op.dst, T::from_u64(sum as u64));
    });
    cpu.flow(outcome, Flow::Next)
}

/// CRC32.
pub(crate) fn checksum<T: Operand>(cpu: &mut Cpu, env: &Env<'_>, op: &Op) -> Flow {
    let outcome = read_rm::<T>(cpu, env, op).map(|value| {
        let crc = crc32::<T>(cpu.gpr[(op.dst & 15) as usize] as u32, value);
        cpu.gpr[(op.dst & 15) as usize] = u64::from(crc);
    });
    cpu.flow(outcome, Flow::Next)
}
