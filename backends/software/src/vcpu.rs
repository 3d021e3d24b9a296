//! (being written) The run loop.

use atoll_machine::backend::{CpuIo, HaltReason, RunError, StateError, StopFlag, Vcpu};
use atoll_machine::cpu::state::CpuState;

use crate::cpu::Cpu;

/// One vCPU of the software CPU.
pub struct SoftwareVcpu {
    cpu: Cpu,
}

impl SoftwareVcpu {
    pub(crate) fn new(cpu: Cpu) -> Self {
        Self { cpu }
    }
}

impl Vcpu for SoftwareVcpu {
    fn run<I: CpuIo>(&mut self, stop: &StopFlag, io: &I) -> Result<HaltReason, RunError> {
        let _ = (stop, io, &self.cpu.rip);
        todo!()
    }
    fn state(&mut self) -> CpuState {
        todo!()
    }
    fn set_state(&mut self, state: &CpuState) -> Result<(), StateError> {
        let _ = state;
        todo!()
    }
    fn reset(&mut self) {
        todo!()
    }
}
