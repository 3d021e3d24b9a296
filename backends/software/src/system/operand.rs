//! Operands of the rare instructions: general registers, effective addresses, memory.

use atoll_machine::backend::CpuIo;
use atoll_machine::cpu::state::seg;
use iced_x86::{Instruction, OpKind, Register};

use super::memory::{load, store};
use crate::access::Access;
use crate::cpu::Cpu;
use crate::exception::Outcome;

/// Index of a segment register in encoding order.
pub(crate) fn segment_index(register: Register) -> usize {
    match register {
        Register::ES => seg::ES,
        Register::CS => seg::CS,
        Register::SS => seg::SS,
        Register::FS => seg::FS,
        Register::GS => seg::GS,
        _ => seg::DS,
    }
}

/// Index of a general register (not AH to BH).
pub(crate) fn gpr_index(register: Register) -> usize {
    register.number() & 15
}

/// The offset of the memory operand: sum of its parts, cut to the address size.
pub(crate) fn effective_offset(cpu: &Cpu, instruction: &Instruction) -> u64 {
    let displacement = instruction.memory_displacement64();
    match instruction.memory_base() {
        // Decoded at address zero: the displacement already counts from the start of the instruction.
        Register::RIP => return cpu.rip.wrapping_add(displacement),
        Register::EIP => return cpu.rip.wrapping_add(displacement) & 0xffff_ffff,
        _ => {}
    }
    let part = |register: Register| {
        if register == Register::None { 0 } else { cpu.gpr[gpr_index(register)] }
    };
    let sum = part(instruction.memory_base())
        .wrapping_add(
            part(instruction.memory_index()).wrapping_mul(u64::from(instruction.memory_index_scale())),
        )
        .wrapping_add(displacement);
    match address_bytes(instruction) {
        2 => sum & 0xffff,
        4 => sum & 0xffff_ffff,
        _ => sum,
    }
}

fn address_bytes(instruction: &Instruction) -> u32 {
    let of = |r: Register| if r == Register::None { None } else { Some(r.size() as u32) };
    of(instruction.memory_base())
        .or(of(instruction.memory_index()))
        .unwrap_or_else(|| instruction.memory_displ_size())
}

/// Linear address of the memory operand for an access of `size` bytes, `beyond` bytes into it.
pub(crate) fn memory_linear(
    cpu: &Cpu,
    instruction: &Instruction,
    beyond: u64,
    size: u64,
    access: Access,
) -> Outcome<u64> {
    let mut offset = effective_offset(cpu, instruction).wrapping_add(beyond);
    match address_bytes(instruction) {
        2 => offset &= 0xffff,
        4 => offset &= 0xffff_ffff,
        _ => {}
    }
    let segment = crate::execute::operand::data_segment(instruction, cpu.mode.bits);
    cpu.linear(segment_index(segment), offset, size, access)
}

/// Reads `size` bytes of memory `beyond` bytes into the operand.
pub(crate) fn read_memory(
    cpu: &mut Cpu,
    io: &dyn CpuIo,
    instruction: &Instruction,
    beyond: u64,
    size: u32,
) -> Outcome<u64> {
    let linear = memory_linear(cpu, instruction, beyond, u64::from(size), Access::Read)?;
    load(cpu, io, linear, size, Access::Read)
}

/// Reads operand `index`: a general register or `size` bytes of memory, zero extended.
pub(crate) fn read(
    cpu: &mut Cpu,
    io: &dyn CpuIo,
    instruction: &Instruction,
    index: u32,
    size: u32,
) -> Outcome<u64> {
    if instruction.op_kind(index) == OpKind::Register {
        let value = cpu.gpr[gpr_index(instruction.op_register(index))];
        return Ok(if size == 8 { value } else { value & ((1 << (size * 8)) - 1) });
    }
    read_memory(cpu, io, instruction, 0, size)
}

/// Writes a general register at its own width: 16 bits merge, 32 bits zero-extend.
pub(crate) fn write_register(cpu: &mut Cpu, register: Register, value: u64) {
    let slot = &mut cpu.gpr[gpr_index(register)];
    *slot = match register.size() {
        1 => *slot & !0xff | value & 0xff,
        2 => *slot & !0xffff | value & 0xffff,
        4 => value & 0xffff_ffff,
        _ => value,
    };
}

/// Writes operand `index`: a register at its own width, or `size` bytes of memory.
pub(crate) fn write(
    cpu: &mut Cpu,
    io: &dyn CpuIo,
    instruction: &Instruction,
    index: u32,
    size: u32,
    value: u64,
) -> Outcome {
    if instruction.op_kind(index) == OpKind::Register {
        write_register(cpu, instruction.op_register(index), value);
        return Ok(());
    }
    let linear = memory_linear(cpu, instruction, 0, u64::from(size), Access::Write)?;
    store(cpu, io, linear, size, value, Access::Write)
}

/// The immediate operand `index`, zero extended.
pub(crate) fn immediate(instruction: &Instruction, index: u32) -> u64 {
    match instruction.op_kind(index) {
        OpKind::Immediate8 | OpKind::Immediate8_2nd => instruction.immediate(index) & 0xff,
        OpKind::Immediate16 => instruction.immediate(index) & 0xffff,
        _ => instruction.immediate(index),
    }
}
