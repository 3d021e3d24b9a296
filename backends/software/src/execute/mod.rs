//! (being written) The interpreter's loop and the integer instructions.

use atoll_machine::backend::CpuIo;

use crate::cpu::Cpu;
use crate::exception::Exception;

/// Why the inner loop returned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Leave {
    /// The instruction at `rip` raised this; nothing of it was committed (see `Exception` for traps).
    Exception(Exception),
    /// Requests are pending, `recheck` was set, or the polling interval is over.
    Events,
    /// The instruction budget is used up.
    Budget,
    /// `cpu.activity` is no longer `Active` (HLT).
    Inactive,
}

/// Executes instructions until there is a reason to look up (whole blocks from the decode cache).
pub fn run(cpu: &mut Cpu, io: &dyn CpuIo) -> Leave {
    let _ = (cpu, io);
    todo!()
}

/// Executes exactly one instruction (single step, breakpoints, interrupt shadow).
pub fn step(cpu: &mut Cpu, io: &dyn CpuIo) -> Leave {
    let _ = (cpu, io);
    todo!()
}
