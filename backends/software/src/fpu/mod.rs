//! The vector and x87 units: availability checks, operands and exceptions in Rust, arithmetic on the host.
//!
//! ```text
//! execute ─┬─ moves   loads, stores, logic in plain Rust (what kernels and string functions use most)
//!          ├─ vector  everything else on XMM, YMM and MMX registers ──► host::thunk
//!          ├─ element gathers and masked moves, element by element
//!          ├─ x87     stack arithmetic ──► host::thunk;  x87_env  control, environment, FNSAVE and FRSTOR
//!          └─ xsave   FXSAVE, FXRSTOR and the XSAVE family
//! ```
//!
//! Numeric exceptions. SIMD instructions run with the guest's MXCSR, masks included: an unmasked exception is
//! the host's own #XM, which arrives as SIGFPE, leaves the thunk with nothing stored but MXCSR's flags, and
//! becomes the guest's #XM (#UD while CR4.OSXMMEXCPT is 0). x87 exceptions never signal: FXSAVE picks up the
//! pending state, and the next waiting instruction raises #MF here (CR0.NE = 1) or sets [`Fpu::ferr`].
//!
//! Results that the architecture leaves to the processor (RCPPS, RSQRTPS, the last bits of x87 transcendental
//! functions, undefined flags) are the host's.
//!
//! Every handler reads memory before it changes registers, and writes memory before it commits results.
//! Decoding checks what the CPU model offers; this folder checks CR0, CR4 and XCR0.
//! Spec: Intel SDM vol. 1 chapters 8 to 14, vol. 2; AMD APM vol. 2 11.4 for the error pointers.

mod element;
mod moves;
mod operand;
pub mod state;
mod vector;
mod x87;
mod x87_env;
mod xsave;

#[cfg(test)]
mod tests;

use atoll_machine::backend::CpuIo;
use atoll_machine::cpu::model::{CpuModel, Feature, Vendor};
use iced_x86::{Instruction, Mnemonic};

use crate::cpu::{Cpu, control};
use crate::exception::{Exception, Outcome, vector as vectors};
use crate::host::thunk::{Class, ThunkEngine, ThunkError};

/// What differs between processors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FpuConfig {
    /// XSAVEC and the compacted format exist.
    pub compaction: bool,
    /// FXSAVE and XSAVE store FIP, FDP and FOP only while an unmasked x87 exception is pending, zero otherwise
    /// (AMD); Intel always stores them.
    pub pointers_only_when_pending: bool,
}

/// One vCPU's vector and x87 engine. The registers are in [`Cpu::xsave`].
pub struct Fpu {
    engine: ThunkEngine,
    config: FpuConfig,
    /// Selectors that go with FIP and FDP.
    fcs: u16,
    fds: u16,
    /// An x87 exception is pending while CR0.NE is 0: the machine raises IRQ 13 (FERR#) and clears this.
    pub ferr: bool,
}

impl Fpu {
    /// The units of a processor of this model.
    pub fn for_model(model: &CpuModel) -> Result<Self, ThunkError> {
        Self::new(FpuConfig {
            compaction: model.has(Feature::Xsavec),
            pointers_only_when_pending: model.vendor == Vendor::Amd,
        })
    }

    /// An engine without cached code. Fails when the host refuses executable memory.
    pub fn new(config: FpuConfig) -> Result<Self, ThunkError> {
        Ok(Self { engine: ThunkEngine::new()?, config, fcs: 0, fds: 0, ferr: false })
    }

    /// Sets the selectors of the instruction and data pointers to 0, as loading an image in 64-bit format does.
    pub fn forget_selectors(&mut self) {
        (self.fcs, self.fds) = (0, 0);
    }
}

/// XGETBV with ECX = 1: the components of XCR0 that are not in their init configuration.
pub fn xinuse(cpu: &Cpu) -> u64 {
    cpu.xsave.in_use() & cpu.xcr0
}

/// Executes one x87, MMX, SSE, AVX or state-management instruction.
pub fn execute(cpu: &mut Cpu, io: &dyn CpuIo, instruction: &Instruction) -> Outcome {
    if let Some(outcome) = moves::execute(cpu, io, instruction) {
        return outcome;
    }
    use Mnemonic as M;
    match instruction.mnemonic() {
        M::Fxsave | M::Fxsave64 | M::Fxrstor | M::Fxrstor64 => xsave::fx(cpu, io, instruction),
        M::Xsave | M::Xsave64 | M::Xsaveopt | M::Xsaveopt64 | M::Xsavec | M::Xsavec64 => {
            xsave::save(cpu, io, instruction)
        }
        M::Xrstor | M::Xrstor64 => xsave::restore(cpu, io, instruction),
        M::Xsaves | M::Xsaves64 | M::Xrstors | M::Xrstors64 => Err(Exception::UD),
        M::Ldmxcsr | M::Vldmxcsr | M::Stmxcsr | M::Vstmxcsr => vector::mxcsr(cpu, io, instruction),
        M::Emms => vector::emms(cpu),
        M::Vzeroupper | M::Vzeroall => vector::zero(cpu, instruction),
        M::Movnti => vector::movnti(cpu, io, instruction),
        // Hints that never fault.
        M::Prefetchnta | M::Prefetcht0 | M::Prefetcht1 | M::Prefetcht2 | M::Prefetchw => Ok(()),
        M::Lfence | M::Mfence | M::Sfence => {
            std::sync::atomic::fence(std::sync::atomic::Ordering::SeqCst);
            Ok(())
        }
        M::Maskmovq | M::Maskmovdqu | M::Vmaskmovdqu => element::byte_mask_move(cpu, io, instruction),
        M::Vmaskmovps | M::Vmaskmovpd | M::Vpmaskmovd | M::Vpmaskmovq => {
            element::mask_move(cpu, io, instruction)
        }
        M::Vgatherdps | M::Vgatherdpd | M::Vgatherqps | M::Vgatherqpd => {
            element::gather(cpu, io, instruction)
        }
        M::Vpgatherdd | M::Vpgatherdq | M::Vpgatherqd | M::Vpgatherqq => {
            element::gather(cpu, io, instruction)
        }
        M::Wait | M::Fninit | M::Fnclex | M::Fnstcw | M::Fldcw | M::Fnstsw => {
            x87_env::control(cpu, io, instruction)
        }
        // Of the 8087 and 287 only; later units ignore them.
        M::Fneni | M::Fndisi | M::Fnsetpm => require_x87(cpu),
        M::Fnstenv | M::Fldenv | M::Fnsave | M::Frstor => x87_env::environment(cpu, io, instruction),
        _ => compute(cpu, io, instruction),
    }
}

/// Everything that the host computes.
fn compute(cpu: &mut Cpu, io: &dyn CpuIo, instruction: &Instruction) -> Outcome {
    let Ok(thunk) = cpu.fpu.engine.prepare(instruction) else { return Err(Exception::UD) };
    match thunk.shape.class {
        Class::X87 => x87::compute(cpu, io, instruction, &thunk),
        _ => vector::compute(cpu, io, instruction, &thunk),
    }
}

/// Legacy SSE: #UD, then #NM (Intel SDM vol. 3, 2.5).
#[inline]
fn require_sse(cpu: &Cpu) -> Outcome {
    if cpu.cr0 & control::CR0_EM != 0 || cpu.cr4 & control::CR4_OSFXSR == 0 {
        return Err(Exception::UD);
    }
    require_switched(cpu)
}

/// VEX-encoded: protected mode, OSXSAVE and both vector components enabled.
#[inline]
fn require_vex(cpu: &Cpu) -> Outcome {
    let components = state::component::SSE | state::component::AVX;
    let enabled = cpu.cr4 & control::CR4_OSXSAVE != 0 && cpu.xcr0 & components == components;
    if !enabled || !cpu.mode.protected {
        return Err(Exception::UD);
    }
    require_switched(cpu)
}

/// MMX: #UD, #NM, then a pending x87 exception.
fn require_mmx(cpu: &mut Cpu) -> Outcome {
    if cpu.cr0 & control::CR0_EM != 0 {
        return Err(Exception::UD);
    }
    require_switched(cpu)?;
    check_pending(cpu)
}

/// x87: #NM for both emulation and task switch.
fn require_x87(cpu: &Cpu) -> Outcome {
    if cpu.cr0 & (control::CR0_EM | control::CR0_TS) != 0 {
        return Err(Exception::NM);
    }
    Ok(())
}

#[inline]
fn require_switched(cpu: &Cpu) -> Outcome {
    if cpu.cr0 & control::CR0_TS != 0 {
        return Err(Exception::NM);
    }
    Ok(())
}

/// What a waiting instruction does about a pending unmasked x87 exception. With CR0.NE clear the processor
/// asserts FERR# and, IGNNE# being asserted by the machine, goes on.
fn check_pending(cpu: &mut Cpu) -> Outcome {
    if !cpu.xsave.x87_pending() {
        return Ok(());
    }
    if cpu.cr0 & control::CR0_NE != 0 {
        return Err(Exception::fault(vectors::MF));
    }
    cpu.fpu.ferr = true;
    Ok(())
}

/// Vector registers that the current mode can name.
fn register_count(cpu: &Cpu) -> usize {
    if cpu.mode.bits == 64 { 16 } else { 8 }
}
