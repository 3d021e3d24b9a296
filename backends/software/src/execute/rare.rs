//! Ops that hand over to `system/` and `fpu/` with their iced instruction, and those that only fault.

use crate::cpu::Cpu;
use crate::decode::Op;
use crate::exception::Exception;
use crate::execute::{Env, Flow};

/// `cpu.rip` and `cpu.next_rip` as the contract with `system/` and `fpu/` has them: the instruction's own. Gives
/// the block's start back, to be restored by whoever goes on in the block.
#[inline(always)]
fn expose_rip(cpu: &mut Cpu, op: &Op) -> u64 {
    let start = cpu.rip;
    cpu.next_rip = cpu.op_next_rip(op);
    cpu.rip = cpu.op_rip(op);
    start
}

/// Through `system::execute`: ends the block.
pub(crate) fn system(cpu: &mut Cpu, env: &Env<'_>, op: &Op) -> Flow {
    let Some(instruction) = env.instructions.get(op.imm as usize) else { return Flow::Again };
    let start = expose_rip(cpu, op);
    match crate::system::execute(cpu, env.io, instruction) {
        Ok(()) => Flow::System,
        Err(exception) => {
            cpu.rip = start;
            cpu.fault(exception)
        }
    }
}

/// Through `fpu::execute`.
pub(crate) fn vector(cpu: &mut Cpu, env: &Env<'_>, op: &Op) -> Flow {
    let Some(instruction) = env.instructions.get(op.imm as usize) else { return Flow::Again };
    let start = expose_rip(cpu, op);
    let outcome = crate::fpu::execute(cpu, env.io, instruction);
    cpu.rip = start;
    cpu.flow(outcome, Flow::Next)
}

/// #UD.
pub(crate) fn undefined(cpu: &mut Cpu, _: &Env<'_>, _: &Op) -> Flow {
    cpu.fault(Exception::UD)
}

/// #GP(0): longer than 15 bytes.
pub(crate) fn too_long(cpu: &mut Cpu, _: &Env<'_>, _: &Op) -> Flow {
    cpu.fault(Exception::GP0)
}
