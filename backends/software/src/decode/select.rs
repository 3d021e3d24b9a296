//! From iced instructions to ops: which handler executes what.
//!
//! ```text
//! select ─► strings ─► branches ─► stack ─► arithmetic, data, shifts, bits ─► rest
//!                                                                          ├─► fpu::execute     (vector, x87)
//!                                                                          └─► system::execute  (everything else)
//! ```
//!
//! Choosing a handler fixes operand size and addressing form, so that a handler has no decision left that the
//! instruction's bytes already made.

use iced_x86::{EncodingKind, Instruction, Mnemonic, OpKind, Register};

use super::model::{self, is_vector};
use super::{Op, REG_NONE, REG_RIP, select_control, select_data};
use crate::cpu::Cpu;
use crate::execute::operand::{
    ANY, BASE, FLAG_ANY, FLAG_LOCK, FLAG_MEMORY, LONG, address_size, data_segment, is_memory, register_code,
    segment_code,
};
use crate::execute::{Handler, rare};

/// `$m::$f` for an operand of `$size` bytes: 1, 2, 4 or 8.
macro_rules! sized {
    ($size:expr, $m:ident::$f:ident $(, $g:tt)*) => {
        match $size {
            1 => $m::$f::<u8 $(, $g)*> as Handler,
            2 => $m::$f::<u16 $(, $g)*> as Handler,
            4 => $m::$f::<u32 $(, $g)*> as Handler,
            _ => $m::$f::<u64 $(, $g)*> as Handler,
        }
    };
}

/// `$m::$f` for an operand of 2, 4 or 8 bytes.
macro_rules! wide {
    ($size:expr, $m:ident::$f:ident $(, $g:tt)*) => {
        match $size {
            2 => $m::$f::<u16 $(, $g)*> as Handler,
            4 => $m::$f::<u32 $(, $g)*> as Handler,
            _ => $m::$f::<u64 $(, $g)*> as Handler,
        }
    };
}

/// `$m::$f` for an operand of `$size` bytes and an addressing form as the last generic argument.
macro_rules! formed {
    ($size:expr, $form:expr, $m:ident::$f:ident $(, $g:tt)*) => {
        match $form {
            BASE => sized!($size, $m::$f $(, $g)*, BASE),
            LONG => sized!($size, $m::$f $(, $g)*, LONG),
            _ => sized!($size, $m::$f $(, $g)*, ANY),
        }
    };
}

/// `$f` with a condition code as its last generic argument.
macro_rules! conditional {
    ($cc:expr, $m:ident::$f:ident $(, $g:ident)*) => {
        match $cc {
            0 => $m::$f::<$($g,)* 0> as Handler,
            1 => $m::$f::<$($g,)* 1> as Handler,
            2 => $m::$f::<$($g,)* 2> as Handler,
            3 => $m::$f::<$($g,)* 3> as Handler,
            4 => $m::$f::<$($g,)* 4> as Handler,
            5 => $m::$f::<$($g,)* 5> as Handler,
            6 => $m::$f::<$($g,)* 6> as Handler,
            7 => $m::$f::<$($g,)* 7> as Handler,
            8 => $m::$f::<$($g,)* 8> as Handler,
            9 => $m::$f::<$($g,)* 9> as Handler,
            10 => $m::$f::<$($g,)* 10> as Handler,
            11 => $m::$f::<$($g,)* 11> as Handler,
            12 => $m::$f::<$($g,)* 12> as Handler,
            13 => $m::$f::<$($g,)* 13> as Handler,
            14 => $m::$f::<$($g,)* 14> as Handler,
            _ => $m::$f::<$($g,)* 15> as Handler,
        }
    };
}

pub(super) use {conditional, formed, sized, wide};

/// An instruction on its way to becoming an op.
pub(super) struct Source<'a> {
    pub(super) insn: &'a Instruction,
    /// Code size: 16, 32 or 64.
    pub(super) bits: u32,
    address_size: u32,
}

impl Source<'_> {
    /// Addressing form of the memory operand.
    pub(super) fn form(&self) -> u8 {
        let segment = data_segment(self.insn, self.bits);
        if self.bits != 64 || self.address_size != 8 {
            return ANY;
        }
        let based = self.insn.memory_base().is_gpr() && self.insn.memory_index() == Register::None;
        if based && !matches!(segment, Register::FS | Register::GS) { BASE } else { LONG }
    }

    /// Kind of operand `i`.
    pub(super) fn kind(&self, i: u32) -> OpKind {
        self.insn.op_kind(i)
    }

    /// Whether operand `i` is in memory.
    pub(super) fn in_memory(&self, i: u32) -> bool {
        is_memory(self.insn.op_kind(i))
    }

    /// Size of operand `i` in bytes.
    pub(super) fn size(&self, i: u32) -> u32 {
        match self.insn.op_kind(i) {
            OpKind::Register => self.insn.op_register(i).size() as u32,
            _ => self.insn.memory_size().size() as u32,
        }
    }

    /// Code of register operand `i`, [`REG_NONE`] if it is none.
    pub(super) fn register(&self, i: u32) -> u8 {
        match self.insn.op_kind(i) {
            OpKind::Register => register_code(self.insn.op_register(i)),
            _ => REG_NONE,
        }
    }

    /// An op with the memory operand, the lock flag, and operands 0 and 1 as destination and source registers.
    /// If operand 0 is in memory, so is what the op modifies.
    pub(super) fn op(&self, handler: Handler) -> Op {
        let mut op = Op::new(handler);
        let insn = self.insn;
        op.flags = self.address_size as u8;
        if insn.op_count() > 0 {
            op.dst = self.register(0) & 0x1f;
        }
        if insn.op_count() > 1 {
            op.src = self.register(1) & 0x1f;
        }
        if (0..insn.op_count()).any(|i| self.in_memory(i)) {
            self.memory(&mut op);
        }
        if insn.has_lock_prefix() {
            op.flags |= FLAG_LOCK;
        }
        op
    }

    /// The memory operand.
    fn memory(&self, op: &mut Op) {
        let insn = self.insn;
        op.flags |= FLAG_MEMORY;
        if self.form() == ANY {
            op.flags |= FLAG_ANY;
        }
        op.segment = segment_code(data_segment(insn, self.bits)) as u8;
        if insn.op0_kind() != OpKind::Memory && !(0..insn.op_count()).any(|i| self.kind(i) == OpKind::Memory)
        {
            return;
        }
        let mut displacement = insn.memory_displacement64();
        op.base = match insn.memory_base() {
            Register::RIP | Register::EIP => {
                // Decoded at IP 0, the displacement counts from the instruction's start.
                displacement = displacement.wrapping_sub(insn.len() as u64);
                REG_RIP
            }
            base => register_code(base),
        };
        op.disp = displacement as i32;
        op.index = register_code(insn.memory_index());
        op.shift = insn.memory_index_scale().trailing_zeros() as u8;
    }

    /// An op whose r/m operand is `rm`, only read: register number in `src`, whatever operand it is.
    pub(super) fn op_reading(&self, handler: Handler, rm: u32) -> Op {
        let mut op = self.op(handler);
        op.src = self.register(rm) & 0x1f;
        op
    }

    /// An op with an immediate operand `i`.
    pub(super) fn op_immediate(&self, handler: Handler, i: u32) -> Op {
        let mut op = self.op(handler);
        op.imm = self.insn.immediate(i);
        op
    }
}

/// The op of a valid instruction, and whether it ends a block.
pub(super) fn select(cpu: &Cpu, insn: &Instruction, kept: &mut Vec<Instruction>) -> (Op, bool) {
    let vex = insn.code().op_code().encoding() != EncodingKind::Legacy;
    if !model::allows(&cpu.shared.model, insn, cpu.mode.bits) || (vex && !cpu.mode.protected) {
        return (Op::new(rare::undefined), true);
    }
    let source = Source { insn, bits: cpu.mode.bits, address_size: address_size_of(cpu, insn) };
    if let Some(op) = select_control::transfer(&source) {
        return (op, !insn.is_jcc_short_or_near());
    }
    let found = select_control::string(&source)
        .or_else(|| select_control::stack(&source))
        .or_else(|| select_data::arithmetic(&source))
        .or_else(|| select_data::data(&source))
        .or_else(|| select_data::bits(&source));
    if let Some(op) = found {
        return (op, false);
    }
    let vector =
        vex || insn.mnemonic() == Mnemonic::Wait || insn.cpuid_features().iter().any(|&f| is_vector(f));
    let vector = vector && !matches!(insn.mnemonic(), Mnemonic::Xgetbv | Mnemonic::Xsetbv);
    let mut op = Op::new(if vector { rare::vector } else { rare::system });
    op.imm = kept.len() as u64;
    kept.push(*insn);
    (op, !vector)
}

/// Address size, also of string instructions.
fn address_size_of(cpu: &Cpu, insn: &Instruction) -> u32 {
    for i in 0..insn.op_count() {
        match insn.op_kind(i) {
            OpKind::MemorySegSI | OpKind::MemorySegDI | OpKind::MemoryESDI => return 2,
            OpKind::MemorySegESI | OpKind::MemorySegEDI | OpKind::MemoryESEDI => return 4,
            OpKind::MemorySegRSI | OpKind::MemorySegRDI | OpKind::MemoryESRDI => return 8,
            _ => {}
        }
    }
    address_size(cpu, insn)
}
