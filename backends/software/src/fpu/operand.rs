//! Operands of vector and x87 instructions: effective addresses, alignment, reads and writes.

use atoll_machine::backend::CpuIo;
use atoll_machine::cpu::state::{gpr, seg};
use iced_x86::{Instruction, Register};

use crate::access::Access;
use crate::cpu::{Cpu, control, flag};
use crate::exception::{Exception, Outcome, vector};
use crate::execute::operand::address_size;
pub(super) use crate::execute::operand::read_register as gpr_value;

/// Segment and offset of the instruction's memory operand, truncated to the address size.
#[inline]
pub(super) fn effective_address(cpu: &Cpu, instruction: &Instruction) -> (usize, u64) {
    let (base, index) = (instruction.memory_base(), instruction.memory_index());
    if base.is_gpr64() && index == Register::None && instruction.segment_prefix() == Register::None {
        let number = base.number() & 15;
        let segment = if matches!(number, gpr::RSP | gpr::RBP) { seg::SS } else { seg::DS };
        return (segment, cpu.gpr[number].wrapping_add(instruction.memory_displacement64()));
    }
    // Operand 0 names the implicit destination of the byte-masked moves; for all others the index is not used.
    crate::execute::operand::effective_address(cpu, instruction, 0)
}

/// Cuts an offset to the instruction's address size.
pub(super) fn truncate(cpu: &Cpu, instruction: &Instruction, offset: u64) -> u64 {
    match address_size(cpu, instruction) {
        2 => offset & 0xffff,
        4 => offset & 0xffff_ffff,
        _ => offset,
    }
}

/// Linear address of the memory operand of `size` bytes; `align` above 1 raises #GP on a misaligned one.
pub(super) fn linear(
    cpu: &Cpu,
    instruction: &Instruction,
    size: u64,
    align: u64,
    access: Access,
) -> Outcome<u64> {
    let (segment, offset) = effective_address(cpu, instruction);
    // Misalignment comes before everything else about the address (#GP, not #SS).
    if align > 1 && base(cpu, segment).wrapping_add(offset) & (align - 1) != 0 {
        return Err(Exception::GP0);
    }
    let linear = cpu.linear(segment, offset, size, access)?;
    if cpu.cr0 & control::CR0_AM != 0 && cpu.rflags & flag::AC != 0 && cpu.mode.cpl == 3 {
        let natural = if size == 10 { 8 } else { size.min(16) };
        if (size == 10 || size.is_power_of_two()) && linear & (natural - 1) != 0 {
            return Err(Exception::with_code(vector::AC, 0));
        }
    }
    Ok(linear)
}

/// What the mode adds to an offset.
fn base(cpu: &Cpu, segment: usize) -> u64 {
    if cpu.mode.bits == 64 && segment < seg::FS { 0 } else { cpu.segments[segment % 6].base }
}

/// Reads the memory operand.
pub(super) fn read<const N: usize>(
    cpu: &mut Cpu,
    io: &dyn CpuIo,
    instruction: &Instruction,
    align: u64,
) -> Outcome<[u8; N]> {
    let address = linear(cpu, instruction, N as u64, align, Access::Read)?;
    let mut data = [0; N];
    cpu.read_bytes(io, address, &mut data, Access::Read)?;
    Ok(data)
}

/// Writes the memory operand.
pub(super) fn write(
    cpu: &mut Cpu,
    io: &dyn CpuIo,
    instruction: &Instruction,
    align: u64,
    data: &[u8],
) -> Outcome {
    let address = linear(cpu, instruction, data.len() as u64, align, Access::Write)?;
    cpu.write_bytes(io, address, data, Access::Write)
}
