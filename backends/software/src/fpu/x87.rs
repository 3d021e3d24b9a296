//! x87 arithmetic: the whole x87 state goes through FXRSTOR, the guest's instruction, FXSAVE on the host.

use atoll_machine::backend::CpuIo;
use iced_x86::Instruction;

use super::state::status;
use super::vector::{arithmetic_flags, captured_flags};
use super::{check_pending, operand, require_x87};
use crate::access::Access;
use crate::cpu::{Cpu, flag};
use crate::exception::{Exception, Outcome};
use crate::host::thunk::{Completion, HOST_MXCSR, MemoryUse, Thunk};

/// Bytes of the image that belong to the x87 unit: control and pointers, then (after MXCSR) the registers.
const POINTERS_END: usize = 24;
const REGISTERS: std::ops::Range<usize> = 32..160;

/// Runs an x87 instruction on the host.
pub(super) fn compute(cpu: &mut Cpu, io: &dyn CpuIo, instruction: &Instruction, thunk: &Thunk) -> Outcome {
    require_x87(cpu)?;
    check_pending(cpu)?;
    let shape = &thunk.shape;
    let size = usize::from(shape.size).min(64);
    let mut address = 0;
    if shape.memory != MemoryUse::None {
        let access = if shape.memory == MemoryUse::Read { Access::Read } else { Access::Write };
        address = operand::linear(cpu, instruction, size as u64, 1, access)?;
        if access == Access::Read {
            let mut data = [0; 64];
            cpu.read_bytes(io, address, &mut data[..size], access)?;
            cpu.fpu.engine.context().bounce = data;
        } else {
            // A store that an unmasked exception suppresses still needs its page.
            cpu.probe(io, address, size as u64, access)?;
        }
    }
    // Only with CR0.NE clear can an exception still be pending here: the unit then ignores it.
    let ignored = cpu.xsave.x87_pending();
    load_image(cpu, ignored);
    match cpu.fpu.engine.run(thunk, &mut cpu.xsave) {
        Completion::Done => {}
        Completion::Numeric | Completion::Illegal => return Err(Exception::UD),
    }
    let (control, before) = (cpu.xsave.fcw(), cpu.xsave.fsw());
    let context = cpu.fpu.engine.context();
    let after = u16::from_le_bytes([context.fx[2], context.fx[3]]);
    let unmasked = after & !control & status::EXCEPTIONS;
    if shape.memory == MemoryUse::Write && (unmasked & !status::PRECISION == 0 || ignored) {
        let data = context.bounce;
        cpu.write_bytes(io, address, &data[..size], Access::Write)?;
    }
    let context = cpu.fpu.engine.context();
    cpu.xsave.0[2..5].copy_from_slice(&context.fx[2..5]);
    cpu.xsave.0[REGISTERS].copy_from_slice(&context.fx[REGISTERS]);
    if shape.writes_flags {
        cpu.rflags = cpu.rflags & !flag::ARITHMETIC | arithmetic_flags(context.flags);
    }
    if ignored {
        cpu.xsave.update_summary();
    }
    let raised = unmasked != 0 && before & status::SUMMARY == 0;
    record_pointers(cpu, io, instruction, shape.memory != MemoryUse::None, raised);
    Ok(())
}

/// Copies the x87 state into the thunk's FXSAVE image; `masked` hides pending exceptions from the host.
fn load_image(cpu: &mut Cpu, masked: bool) {
    let area = &cpu.xsave;
    let context = cpu.fpu.engine.context();
    context.fx[..6].copy_from_slice(&area.0[..6]);
    context.fx[6..POINTERS_END].fill(0);
    context.fx[POINTERS_END..POINTERS_END + 4].copy_from_slice(&HOST_MXCSR.to_le_bytes());
    context.fx[REGISTERS].copy_from_slice(&area.0[REGISTERS]);
    if masked {
        context.fx[0] |= status::EXCEPTIONS as u8;
    }
    context.flags = captured_flags(cpu.rflags);
}

/// Notes where the last x87 instruction and its operand were. The opcode is only kept for an instruction that
/// raised an unmasked exception, as processors do by default.
fn record_pointers(cpu: &mut Cpu, io: &dyn CpuIo, instruction: &Instruction, memory: bool, raised: bool) {
    let wide = cpu.mode.bits == 64;
    let cut = |offset: u64| if wide { offset } else { offset & 0xffff_ffff };
    cpu.xsave.set_fip(cut(cpu.rip));
    cpu.fpu.fcs = cpu.segments[1].selector;
    if memory {
        let (segment, offset) = operand::effective_address(cpu, instruction);
        cpu.xsave.set_fdp(cut(offset));
        cpu.fpu.fds = cpu.segments[segment].selector;
    }
    if raised {
        let opcode = opcode(cpu, io, instruction).unwrap_or(0);
        cpu.xsave.set_fop(opcode);
    }
}

/// The low three bits of the escape byte and the ModRM byte, as FOP holds them. `None` when the code cannot be
/// read any more.
fn opcode(cpu: &mut Cpu, io: &dyn CpuIo, instruction: &Instruction) -> Option<u16> {
    let mut code = [0; 15];
    let length = instruction.len().min(15);
    let linear = cpu.linear(1, cpu.rip, length as u64, Access::Fetch).ok()?;
    cpu.read_bytes(io, linear, &mut code[..length], Access::Fetch).ok()?;
    let at = code[..length].iter().position(|b| (0xd8..=0xdf).contains(b))?;
    Some(u16::from(code[at] & 7) << 8 | u16::from(*code.get(at + 1)?))
}
