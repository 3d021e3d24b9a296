//! (being written) Delivery of exceptions and interrupts.

use atoll_machine::backend::CpuIo;

use crate::cpu::Cpu;
use crate::exception::Exception;

/// Delivers what an instruction handler raised. Shuts the processor down on a triple fault.
pub fn raise(cpu: &mut Cpu, io: &dyn CpuIo, exception: Exception) {
    let _ = (cpu, io, exception);
    todo!()
}
