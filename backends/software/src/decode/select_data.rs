//! Handlers of arithmetic, data movement and bit instructions.

use iced_x86::{Code, ConditionCode, Mnemonic, OpKind};

use super::Op;
use super::select::{Source, conditional, formed, sized, wide};
use crate::cpu::flag;
use crate::execute::operand::{ANY, BASE, FLAG_REP, LONG};
use crate::execute::{Handler, alu, bits, branch, data, legacy, shift};

/// Two-operand arithmetic.
fn binary<const OP: u8>(s: &Source<'_>) -> Op {
    let size = s.size(0);
    let locked = s.insn.has_lock_prefix();
    match (s.in_memory(0), s.kind(1)) {
        (false, OpKind::Register) => s.op(sized!(size, alu::rr, OP)),
        (false, OpKind::Memory) => s.op(formed!(size, s.form(), alu::rm, OP)),
        (false, _) => s.op_immediate(sized!(size, alu::ri, OP), 1),
        (true, OpKind::Register) if locked => s.op(sized!(size, alu::locked_mr, OP)),
        (true, OpKind::Register) => s.op(formed!(size, s.form(), alu::mr, OP)),
        (true, _) if locked => s.op_immediate(sized!(size, alu::locked_mi, OP), 1),
        (true, _) => s.op_immediate(formed!(size, s.form(), alu::mi, OP), 1),
    }
}

fn unary<const OP: u8>(s: &Source<'_>) -> Op {
    let size = s.size(0);
    s.op(match (s.in_memory(0), s.insn.has_lock_prefix()) {
        (false, _) => sized!(size, alu::unary_r, OP),
        (true, false) => sized!(size, alu::unary_m, OP),
        (true, true) => sized!(size, alu::unary_locked, OP),
    })
}

fn shifted<const OP: u8>(s: &Source<'_>) -> Op {
    let size = s.size(0);
    if s.kind(1) == OpKind::Register {
        let mut op = s.op(sized!(size, shift::any, OP));
        op.flags |= FLAG_REP;
        return op;
    }
    let immediate = u64::from(s.insn.immediate8());
    let mut op =
        s.op(if s.in_memory(0) { sized!(size, shift::any, OP) } else { sized!(size, shift::ri, OP) });
    op.imm = immediate;
    op
}

fn double_shift<const LEFT: bool>(s: &Source<'_>) -> Op {
    let mut op = s.op(wide!(s.size(0), shift::double, LEFT));
    if s.kind(2) == OpKind::Register {
        op.flags |= FLAG_REP;
    } else {
        op.imm = u64::from(s.insn.immediate8());
    }
    op
}

/// ADD to TEST, INC to NOT, shifts, multiplication, division, decimal adjustments.
pub(super) fn arithmetic(s: &Source<'_>) -> Option<Op> {
    Some(match s.insn.mnemonic() {
        Mnemonic::Add => binary::<{ alu::ADD }>(s),
        Mnemonic::Or => binary::<{ alu::OR }>(s),
        Mnemonic::Adc => binary::<{ alu::ADC }>(s),
        Mnemonic::Sbb => binary::<{ alu::SBB }>(s),
        Mnemonic::And => binary::<{ alu::AND }>(s),
        Mnemonic::Sub => binary::<{ alu::SUB }>(s),
        Mnemonic::Xor => binary::<{ alu::XOR }>(s),
        Mnemonic::Cmp => binary::<{ alu::CMP }>(s),
        Mnemonic::Test => binary::<{ alu::TEST }>(s),
        Mnemonic::Inc => unary::<{ alu::INC }>(s),
        Mnemonic::Dec => unary::<{ alu::DEC }>(s),
        Mnemonic::Neg => unary::<{ alu::NEG }>(s),
        Mnemonic::Not => unary::<{ alu::NOT }>(s),
        Mnemonic::Rol => shifted::<{ shift::ROL }>(s),
        Mnemonic::Ror => shifted::<{ shift::ROR }>(s),
        Mnemonic::Rcl => shifted::<{ shift::RCL }>(s),
        Mnemonic::Rcr => shifted::<{ shift::RCR }>(s),
        Mnemonic::Shl | Mnemonic::Sal => shifted::<{ shift::SHL }>(s),
        Mnemonic::Shr => shifted::<{ shift::SHR }>(s),
        Mnemonic::Sar => shifted::<{ shift::SAR }>(s),
        Mnemonic::Shld => double_shift::<true>(s),
        Mnemonic::Shrd => double_shift::<false>(s),
        Mnemonic::Mul => s.op_reading(sized!(s.size(0), shift::multiply, false), 0),
        Mnemonic::Imul => match s.insn.op_count() {
            1 => s.op_reading(sized!(s.size(0), shift::multiply, true), 0),
            2 => s.op_reading(wide!(s.size(0), shift::imul2), 1),
            _ => s.op_immediate(wide!(s.size(0), shift::imul3), 2),
        },
        Mnemonic::Div => s.op_reading(sized!(s.size(0), shift::divide, false), 0),
        Mnemonic::Idiv => s.op_reading(sized!(s.size(0), shift::divide, true), 0),
        Mnemonic::Aaa => Op::new(legacy::ascii_adjust::<false>),
        Mnemonic::Aas => Op::new(legacy::ascii_adjust::<true>),
        Mnemonic::Aam => s.op_immediate(legacy::aam, 0),
        Mnemonic::Aad => s.op_immediate(legacy::aad, 0),
        Mnemonic::Daa => Op::new(legacy::decimal_adjust::<false>),
        Mnemonic::Das => Op::new(legacy::decimal_adjust::<true>),
        _ => return None,
    })
}

fn mov(s: &Source<'_>) -> Option<Op> {
    let size = s.size(0);
    let general = |i: u32| s.kind(i) != OpKind::Register || s.insn.op_register(i).is_gpr();
    if !general(0) || !general(1) {
        return None;
    }
    let absolute = matches!(
        s.insn.code(),
        Code::Mov_AL_moffs8
            | Code::Mov_AX_moffs16
            | Code::Mov_EAX_moffs32
            | Code::Mov_RAX_moffs64
            | Code::Mov_moffs8_AL
            | Code::Mov_moffs16_AX
            | Code::Mov_moffs32_EAX
            | Code::Mov_moffs64_RAX
    );
    if absolute {
        let load = !s.in_memory(0);
        let mut op = s.op(if load {
            sized!(size, data::mov_absolute_load)
        } else {
            sized!(size, data::mov_absolute_store)
        });
        op.imm = s.insn.memory_displacement64();
        return Some(op);
    }
    Some(match (s.in_memory(0), s.kind(1)) {
        (false, OpKind::Register) => s.op(sized!(size, data::mov_rr)),
        (false, OpKind::Memory) => s.op(formed!(size, s.form(), data::mov_rm)),
        (false, _) => s.op_immediate(sized!(size, data::mov_ri), 1),
        (true, OpKind::Register) => s.op(formed!(size, s.form(), data::mov_mr)),
        (true, _) => s.op_immediate(formed!(size, s.form(), data::mov_mi), 1),
    })
}

/// Handler of a widening move from 1, 2 or 4 bytes.
macro_rules! widening {
    ($s:expr, $signed:literal) => {{
        let s: &Source<'_> = $s;
        let handler: Handler = match (s.in_memory(1), s.size(1)) {
            (false, 1) => wide!(s.size(0), extend_from_byte::r, $signed),
            (false, 2) => wide!(s.size(0), extend_from_word::r, $signed),
            (false, _) => wide!(s.size(0), extend_from_dword::r, $signed),
            (true, 1) => extend_from_byte::m::<$signed>(s),
            (true, 2) => extend_from_word::m::<$signed>(s),
            (true, _) => extend_from_dword::m::<$signed>(s),
        };
        s.op(handler)
    }};
}

/// The widening moves with a fixed source size, so that the macros above can choose the destination's.
macro_rules! extend_from {
    ($module:ident, $source:ty) => {
        mod $module {
            use super::*;
            use crate::cpu::Cpu;
            use crate::execute::operand::Operand;
            use crate::execute::{Env, Flow};

            pub(super) fn r<D: Operand, const SIGNED: bool>(cpu: &mut Cpu, env: &Env<'_>, op: &Op) -> Flow {
                data::extend_r::<$source, D, SIGNED>(cpu, env, op)
            }
            fn load<D: Operand, const SIGNED: bool, const A: u8>(
                cpu: &mut Cpu,
                env: &Env<'_>,
                op: &Op,
            ) -> Flow {
                data::extend_m::<$source, D, SIGNED, A>(cpu, env, op)
            }
            fn of<D: Operand, const SIGNED: bool>(form: u8) -> Handler {
                match form {
                    BASE => load::<D, SIGNED, BASE>,
                    LONG => load::<D, SIGNED, LONG>,
                    _ => load::<D, SIGNED, ANY>,
                }
            }
            pub(super) fn m<const SIGNED: bool>(s: &Source<'_>) -> Handler {
                match s.size(0) {
                    2 => of::<u16, SIGNED>(s.form()),
                    4 => of::<u32, SIGNED>(s.form()),
                    _ => of::<u64, SIGNED>(s.form()),
                }
            }
        }
    };
}

extend_from!(extend_from_byte, u8);
extend_from!(extend_from_word, u16);
extend_from!(extend_from_dword, u32);

fn lea(s: &Source<'_>) -> Op {
    let form = s.form();
    let handler: Handler = match form {
        BASE => wide!(s.size(0), data::lea, BASE),
        LONG => wide!(s.size(0), data::lea, LONG),
        _ => wide!(s.size(0), data::lea, ANY),
    };
    s.op(handler)
}

fn conditional_data(s: &Source<'_>) -> Option<Op> {
    let cc = s.insn.condition_code();
    if cc == ConditionCode::None {
        return None;
    }
    let cc = (cc as u8).wrapping_sub(ConditionCode::o as u8);
    match s.insn.op_count() {
        1 => Some(s.op(conditional!(cc, data::setcc))),
        2 => Some(s.op_reading(
            match s.size(0) {
                2 => conditional!(cc, data::cmov, u16),
                4 => conditional!(cc, data::cmov, u32),
                _ => conditional!(cc, data::cmov, u64),
            },
            1,
        )),
        _ => None,
    }
}

fn flag_bits(clear: u64, toggle: u64) -> Op {
    let mut op = Op::new(data::flag_bits);
    op.disp = clear as i32;
    op.imm = toggle;
    op
}

/// Moves, exchanges, flags, hints.
pub(super) fn data(s: &Source<'_>) -> Option<Op> {
    Some(match s.insn.mnemonic() {
        Mnemonic::Mov => return mov(s),
        Mnemonic::Movnti => s.op(formed!(s.size(1), s.form(), data::mov_mr)),
        Mnemonic::Movzx => widening!(s, false),
        Mnemonic::Movsx | Mnemonic::Movsxd => widening!(s, true),
        Mnemonic::Lea => lea(s),
        Mnemonic::Xchg => exchange(s),
        Mnemonic::Cmpxchg => s.op(sized!(s.size(0), data::cmpxchg)),
        Mnemonic::Xadd => s.op(sized!(s.size(0), data::xadd)),
        Mnemonic::Cmpxchg8b => s.op(data::cmpxchg8b),
        Mnemonic::Cmpxchg16b => s.op(data::cmpxchg16b),
        Mnemonic::Bswap => s.op(wide!(s.size(0), data::bswap)),
        Mnemonic::Movbe if s.in_memory(0) => s.op(wide!(s.size(1), data::movbe_store)),
        Mnemonic::Movbe => s.op_reading(wide!(s.size(0), data::movbe_load), 1),
        Mnemonic::Xlatb => s.op(data::xlat),
        Mnemonic::Cbw => Op::new(data::extend_accumulator::<u8, u16>),
        Mnemonic::Cwde => Op::new(data::extend_accumulator::<u16, u32>),
        Mnemonic::Cdqe => Op::new(data::extend_accumulator::<u32, u64>),
        Mnemonic::Cwd => Op::new(data::sign_to_rdx::<u16>),
        Mnemonic::Cdq => Op::new(data::sign_to_rdx::<u32>),
        Mnemonic::Cqo => Op::new(data::sign_to_rdx::<u64>),
        Mnemonic::Lahf => Op::new(data::lahf),
        Mnemonic::Sahf => Op::new(data::sahf),
        Mnemonic::Clc => flag_bits(flag::CF, 0),
        Mnemonic::Stc => flag_bits(flag::CF, flag::CF),
        Mnemonic::Cmc => flag_bits(0, flag::CF),
        Mnemonic::Cld => flag_bits(flag::DF, 0),
        Mnemonic::Std => flag_bits(flag::DF, flag::DF),
        Mnemonic::Salc => Op::new(data::salc),
        Mnemonic::Nop | Mnemonic::Reservednop | Mnemonic::Pause => Op::new(data::nop),
        Mnemonic::Clflush => s.op(data::touch),
        Mnemonic::Lfence | Mnemonic::Mfence | Mnemonic::Sfence => Op::new(data::fence),
        Mnemonic::Bound => s.op(wide!(s.size(0), branch::bound)),
        _ => return conditional_data(s),
    })
}

/// XCHG with memory is locked without a prefix.
fn exchange(s: &Source<'_>) -> Op {
    let mut op = s.op(sized!(s.size(1), data::xchg));
    if s.in_memory(1) {
        op.src = s.register(0) & 0x1f;
    }
    if s.in_memory(0) || s.in_memory(1) {
        op.flags |= crate::execute::operand::FLAG_LOCK;
    }
    op
}

fn bit_test<const OP: u8>(s: &Source<'_>) -> Op {
    if s.kind(1) == OpKind::Register {
        return s.op(wide!(s.size(0), bits::test_r, OP));
    }
    let mut op = s.op(wide!(s.size(0), bits::test_i, OP));
    op.imm = u64::from(s.insn.immediate8());
    op
}

/// A BMI instruction of the r/m operand `rm` with another register operand `other` (if any).
fn bmi<const OP: u8>(s: &Source<'_>, rm: u32, other: Option<u32>) -> Op {
    let handler: Handler = if s.size(0) == 8 { bits::bmi::<u64, OP> } else { bits::bmi::<u32, OP> };
    let mut op = s.op_reading(handler, rm);
    op.imm = other.map_or(0, |i| u64::from(s.register(i)));
    op
}

/// Bit tests, scans, counts, BMI, ADX, CRC32.
pub(super) fn bits(s: &Source<'_>) -> Option<Op> {
    let size = if s.insn.op_count() > 0 { s.size(0) } else { 0 };
    Some(match s.insn.mnemonic() {
        Mnemonic::Bt => bit_test::<{ bits::BT }>(s),
        Mnemonic::Bts => bit_test::<{ bits::BTS }>(s),
        Mnemonic::Btr => bit_test::<{ bits::BTR }>(s),
        Mnemonic::Btc => bit_test::<{ bits::BTC }>(s),
        Mnemonic::Bsf => s.op_reading(wide!(size, bits::scan, { bits::BSF }), 1),
        Mnemonic::Bsr => s.op_reading(wide!(size, bits::scan, { bits::BSR }), 1),
        Mnemonic::Lzcnt => s.op_reading(wide!(size, bits::scan, { bits::LZCNT }), 1),
        Mnemonic::Tzcnt => s.op_reading(wide!(size, bits::scan, { bits::TZCNT }), 1),
        Mnemonic::Popcnt => s.op_reading(wide!(size, bits::scan, { bits::POPCNT }), 1),
        Mnemonic::Andn => bmi::<{ bits::ANDN }>(s, 2, Some(1)),
        Mnemonic::Bextr if s.kind(2) == OpKind::Register => bmi::<{ bits::BEXTR }>(s, 1, Some(2)),
        Mnemonic::Bzhi => bmi::<{ bits::BZHI }>(s, 1, Some(2)),
        Mnemonic::Blsi => bmi::<{ bits::BLSI }>(s, 1, None),
        Mnemonic::Blsr => bmi::<{ bits::BLSR }>(s, 1, None),
        Mnemonic::Blsmsk => bmi::<{ bits::BLSMSK }>(s, 1, None),
        Mnemonic::Pdep => bmi::<{ bits::PDEP }>(s, 2, Some(1)),
        Mnemonic::Pext => bmi::<{ bits::PEXT }>(s, 2, Some(1)),
        Mnemonic::Sarx => bmi::<{ bits::SARX }>(s, 1, Some(2)),
        Mnemonic::Shlx => bmi::<{ bits::SHLX }>(s, 1, Some(2)),
        Mnemonic::Shrx => bmi::<{ bits::SHRX }>(s, 1, Some(2)),
        Mnemonic::Rorx => {
            let mut op = bmi::<{ bits::RORX }>(s, 1, None);
            op.imm = u64::from(s.insn.immediate8());
            op
        }
        Mnemonic::Mulx => {
            let handler: Handler = if size == 8 { bits::mulx::<u64> } else { bits::mulx::<u32> };
            let mut op = s.op_reading(handler, 2);
            op.imm = u64::from(s.register(1));
            op
        }
        Mnemonic::Adcx if size == 8 => s.op_reading(bits::add_with::<u64, false>, 1),
        Mnemonic::Adcx => s.op_reading(bits::add_with::<u32, false>, 1),
        Mnemonic::Adox if size == 8 => s.op_reading(bits::add_with::<u64, true>, 1),
        Mnemonic::Adox => s.op_reading(bits::add_with::<u32, true>, 1),
        Mnemonic::Crc32 => s.op_reading(sized!(s.size(1), bits::checksum), 1),
        _ => return None,
    })
}
