//! The system half of the software CPU: segments, far transfers, tasks, event delivery, control registers,
//! MSRs. Every rare instruction arrives at [`execute`].

pub mod delivery;
pub mod mode;

use atoll_machine::backend::CpuIo;
use iced_x86::Instruction;

use crate::cpu::Cpu;
use crate::exception::Outcome;

/// System-wide registers that only this module and `apic/` touch.
#[derive(Default)]
pub struct SystemState {}

/// Executes a rare (system, segment, far-transfer, I/O) instruction.
pub fn execute(cpu: &mut Cpu, io: &dyn CpuIo, instruction: &Instruction) -> Outcome {
    let _ = (cpu, io, instruction);
    todo!()
}

/// Whether the current privilege may access `size` bytes at I/O `port`: IOPL, then the TSS's bitmap. #GP(0)
/// if not. Also records hits of I/O breakpoints. For INS and OUTS.
pub fn check_io_permission(cpu: &mut Cpu, io: &dyn CpuIo, port: u16, size: u32) -> Outcome {
    let _ = (cpu, io, port, size);
    todo!()
}
