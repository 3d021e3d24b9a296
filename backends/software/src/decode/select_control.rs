//! Handlers of control transfers, stack and string instructions.

use iced_x86::{Code, ConditionCode, Mnemonic, OpKind};

use super::Op;
use super::select::{Source, conditional, sized, wide};
use crate::execute::operand::{ANY, BASE, FLAG_REP, LONG};
use crate::execute::string::FLAG_REPNE;
use crate::execute::{Handler, branch, stack, string};

/// Near transfers; all of them end a block.
pub(super) fn transfer(s: &Source<'_>) -> Option<Op> {
    let insn = s.insn;
    let mut op = match insn.mnemonic() {
        Mnemonic::Jmp => {
            if insn.is_jmp_near_indirect() {
                return Some(s.op_reading(indirect(s, false), 0));
            }
            if !insn.is_jmp_short_or_near() {
                return None;
            }
            s.op(match branch_size(s) {
                8 => branch::jmp64,
                size => wide!(size, branch::jmp),
            })
        }
        Mnemonic::Call => {
            if insn.is_call_near_indirect() {
                return Some(s.op_reading(indirect(s, true), 0));
            }
            if !insn.is_call_near() {
                return None;
            }
            s.op(match branch_size(s) {
                8 => branch::call64,
                size => wide!(size, branch::call),
            })
        }
        Mnemonic::Ret => return Some(ret(s)),
        Mnemonic::Loop => s.op(wide!(branch_size(s), branch::counted, { branch::LOOP })),
        Mnemonic::Loope => s.op(wide!(branch_size(s), branch::counted, { branch::LOOPE })),
        Mnemonic::Loopne => s.op(wide!(branch_size(s), branch::counted, { branch::LOOPNE })),
        Mnemonic::Jcxz | Mnemonic::Jecxz | Mnemonic::Jrcxz => {
            s.op(wide!(branch_size(s), branch::counted, { branch::JCXZ }))
        }
        _ if insn.is_jcc_short_or_near() => s.op(jcc(s)),
        _ => return None,
    };
    op.imm = insn.near_branch_target();
    op.flags = counter_size(insn.code());
    Some(op)
}

/// Width of the counter of LOOP and JCXZ.
fn counter_size(code: Code) -> u8 {
    match code.op_code().address_size() {
        16 => 2,
        32 => 4,
        _ => 8,
    }
}

fn branch_size(s: &Source<'_>) -> u32 {
    match s.kind(0) {
        OpKind::NearBranch16 => 2,
        OpKind::NearBranch32 => 4,
        _ => 8,
    }
}

fn jcc(s: &Source<'_>) -> Handler {
    let cc = (s.insn.condition_code() as u8).wrapping_sub(ConditionCode::o as u8);
    match branch_size(s) {
        2 => conditional!(cc, branch::jcc, u16),
        4 => conditional!(cc, branch::jcc, u32),
        _ => conditional!(cc, branch::jcc64),
    }
}

fn indirect(s: &Source<'_>, call: bool) -> Handler {
    match (s.size(0), call) {
        (8, false) => branch::jmp64_rm,
        (8, true) => branch::call64_rm,
        (4, false) => branch::jmp_rm::<u32>,
        (4, true) => branch::call_rm::<u32>,
        (_, false) => branch::jmp_rm::<u16>,
        (_, true) => branch::call_rm::<u16>,
    }
}

fn ret(s: &Source<'_>) -> Op {
    let handler: Handler = match s.insn.code() {
        Code::Retnq | Code::Retnq_imm16 => branch::ret64,
        Code::Retnd | Code::Retnd_imm16 => branch::ret::<u32>,
        _ => branch::ret::<u16>,
    };
    let mut op = Op::new(handler);
    if s.insn.op_count() > 0 {
        op.imm = u64::from(s.insn.immediate16());
    }
    op
}

/// PUSH, POP and their kin.
pub(super) fn stack(s: &Source<'_>) -> Option<Op> {
    let insn = s.insn;
    let size = insn.stack_pointer_increment().unsigned_abs();
    Some(match insn.mnemonic() {
        Mnemonic::Push if s.in_memory(0) => s.op(if size == 8 && s.bits == 64 {
            match s.form() {
                BASE => stack::push64_m::<BASE>,
                LONG => stack::push64_m::<LONG>,
                _ => stack::push64_m::<ANY>,
            }
        } else {
            wide!(size, stack::push_m)
        }),
        Mnemonic::Push if s.kind(0) != OpKind::Register => {
            s.op_immediate(if size == 8 { stack::push64_i } else { wide!(size, stack::push_i) }, 0)
        }
        Mnemonic::Push if insn.op0_register().is_gpr() => {
            s.op_reading(if size == 8 { stack::push64_r } else { wide!(size, stack::push_r) }, 0)
        }
        Mnemonic::Pop if s.in_memory(0) => s.op(wide!(size, stack::pop_m)),
        Mnemonic::Pop if insn.op0_register().is_gpr() => {
            s.op(if size == 8 { stack::pop64_r } else { wide!(size, stack::pop_r) })
        }
        Mnemonic::Pusha => Op::new(stack::push_all::<u16>),
        Mnemonic::Pushad => Op::new(stack::push_all::<u32>),
        Mnemonic::Popa => Op::new(stack::pop_all::<u16>),
        Mnemonic::Popad => Op::new(stack::pop_all::<u32>),
        Mnemonic::Enter => {
            let size = match insn.code() {
                Code::Enterw_imm16_imm8 => 2,
                Code::Enterd_imm16_imm8 => 4,
                _ => 8,
            };
            let mut op = Op::new(wide!(size, stack::enter));
            op.imm = u64::from(insn.immediate16());
            op.disp = i32::from(insn.immediate8_2nd());
            op
        }
        Mnemonic::Leave => Op::new(match insn.code() {
            Code::Leavew => stack::leave::<u16>,
            Code::Leaved => stack::leave::<u32>,
            _ => stack::leave::<u64>,
        }),
        _ => return None,
    })
}

/// String instructions, port I/O included.
pub(super) fn string(s: &Source<'_>) -> Option<Op> {
    let insn = s.insn;
    if !insn.is_string_instruction() {
        return None;
    }
    let size = insn.memory_size().size();
    let handler = match insn.code() {
        Code::Movsb_m8_m8 | Code::Movsw_m16_m16 | Code::Movsd_m32_m32 | Code::Movsq_m64_m64 => {
            sized!(size, string::movs)
        }
        Code::Cmpsb_m8_m8 | Code::Cmpsw_m16_m16 | Code::Cmpsd_m32_m32 | Code::Cmpsq_m64_m64 => {
            sized!(size, string::cmps)
        }
        Code::Stosb_m8_AL | Code::Stosw_m16_AX | Code::Stosd_m32_EAX | Code::Stosq_m64_RAX => {
            sized!(size, string::stos)
        }
        Code::Lodsb_AL_m8 | Code::Lodsw_AX_m16 | Code::Lodsd_EAX_m32 | Code::Lodsq_RAX_m64 => {
            sized!(size, string::lods)
        }
        Code::Scasb_AL_m8 | Code::Scasw_AX_m16 | Code::Scasd_EAX_m32 | Code::Scasq_RAX_m64 => {
            sized!(size, string::scas)
        }
        Code::Insb_m8_DX | Code::Insw_m16_DX | Code::Insd_m32_DX => sized!(size, string::ins),
        Code::Outsb_DX_m8 | Code::Outsw_DX_m16 | Code::Outsd_DX_m32 => sized!(size, string::outs),
        _ => return None,
    };
    let mut op = s.op(handler);
    op.flags &= 15;
    if insn.has_repne_prefix() {
        op.flags |= FLAG_REPNE;
    } else if insn.has_rep_prefix() {
        op.flags |= FLAG_REP;
    }
    Some(op)
}
