//! XMM, YMM and MMX instructions that run as thunks, and the few on MXCSR and whole registers.

use atoll_machine::backend::CpuIo;
use atoll_machine::cpu::model::Vendor;
use iced_x86::{Instruction, Mnemonic, OpKind};

use super::state::{MXCSR_MASK, status};
use super::{check_pending, operand, register_count, require_mmx, require_sse, require_vex};
use crate::access::Access;
use crate::cpu::{Cpu, control, flag};
use crate::exception::{Exception, Outcome, vector};
use crate::host::thunk::{Class, Completion, MemoryUse, Shape, Thunk};

/// Runs a vector instruction on the host.
pub(super) fn compute(cpu: &mut Cpu, io: &dyn CpuIo, instruction: &Instruction, thunk: &Thunk) -> Outcome {
    let shape = &thunk.shape;
    match shape.class {
        Class::Sse => require_sse(cpu)?,
        Class::Vex => require_vex(cpu)?,
        Class::Mmx | Class::X87 => require_mmx(cpu)?,
    }
    let size = usize::from(shape.size).min(64);
    let mut address = 0;
    match shape.memory {
        MemoryUse::None => {}
        MemoryUse::Read => {
            let align = if any_alignment(cpu, instruction) { 1 } else { u64::from(shape.align) };
            address = operand::linear(cpu, instruction, size as u64, align, Access::Read)?;
            let mut data = [0; 64];
            cpu.read_bytes(io, address, &mut data[..size], Access::Read)?;
            cpu.fpu.engine.context().bounce = data;
        }
        MemoryUse::Write => {
            let align = u64::from(shape.align);
            address = operand::linear(cpu, instruction, size as u64, align, Access::Write)?;
        }
    }
    if shape.mmx {
        return compute_mmx(cpu, io, thunk, address, size);
    }
    run(cpu, io, thunk, address, size)
}

/// AMD's processors take SHA operands at any address, Intel's do not.
fn any_alignment(cpu: &Cpu, instruction: &Instruction) -> bool {
    use Mnemonic as M;
    cpu.shared.model.vendor == Vendor::Amd
        && matches!(
            instruction.mnemonic(),
            M::Sha1rnds4
                | M::Sha1nexte
                | M::Sha1msg1
                | M::Sha1msg2
                | M::Sha256rnds2
                | M::Sha256msg1
                | M::Sha256msg2
        )
}

/// With MMX registers: the x87 unit enters MMX mode, which a fault undoes.
fn compute_mmx(cpu: &mut Cpu, io: &dyn CpuIo, thunk: &Thunk, address: u64, size: usize) -> Outcome {
    check_pending(cpu)?;
    let mut before = [0; 160];
    before.copy_from_slice(&cpu.xsave.0[..160]);
    cpu.xsave.enter_mmx();
    let outcome = run(cpu, io, thunk, address, size);
    // An unmasked numeric exception comes after the transition.
    if outcome.is_err_and(|e| e != Exception::fault(vector::XM)) {
        let mxcsr = cpu.xsave.mxcsr();
        cpu.xsave.0[..160].copy_from_slice(&before);
        cpu.xsave.set_mxcsr(mxcsr);
    }
    outcome
}

/// Runs the thunk, stores to memory, then commits MXCSR, general registers and flags. Vector registers are
/// stored by the thunk itself: an instruction that writes memory writes none.
#[inline]
fn run(cpu: &mut Cpu, io: &dyn CpuIo, thunk: &Thunk, address: u64, size: usize) -> Outcome {
    let shape = &thunk.shape;
    let fpu = &mut *cpu.fpu;
    let context = fpu.engine.context();
    context.mxcsr = cpu.xsave.mxcsr();
    for (slot, gpr) in shape.gprs.iter().take(shape.gpr_count.into()).enumerate() {
        context.gpr[slot] = cpu.gpr[usize::from(gpr.index) & 15];
    }
    match fpu.engine.run(thunk, &mut cpu.xsave) {
        Completion::Done => {}
        Completion::Illegal => return Err(Exception::UD),
        Completion::Numeric => return numeric(cpu, io, shape, address, size),
    }
    if shape.memory == MemoryUse::Write {
        let data = cpu.fpu.engine.context().bounce;
        cpu.write_bytes(io, address, &data[..size], Access::Write)?;
    }
    let context = cpu.fpu.engine.context();
    if shape.mxcsr {
        cpu.xsave.set_mxcsr(context.mxcsr);
    }
    for (slot, gpr) in shape.gprs.iter().take(shape.gpr_count.into()).enumerate() {
        if gpr.written {
            cpu.gpr[usize::from(gpr.index) & 15] = context.gpr[slot];
        }
    }
    if shape.writes_flags {
        let flags = arithmetic_flags(context.flags);
        cpu.rflags = cpu.rflags & !flag::ARITHMETIC | flags;
    }
    Ok(())
}

/// An unmasked SIMD exception: memory faults come first, then the flags stay and #XM (or #UD) is raised.
#[cold]
fn numeric(cpu: &mut Cpu, io: &dyn CpuIo, shape: &Shape, address: u64, size: usize) -> Outcome {
    if shape.memory == MemoryUse::Write {
        cpu.probe(io, address, size as u64, Access::Write)?;
    }
    let mxcsr = cpu.fpu.engine.context().mxcsr;
    cpu.xsave.set_mxcsr(mxcsr);
    if cpu.cr4 & control::CR4_OSXMMEXCPT == 0 {
        return Err(Exception::UD);
    }
    Err(Exception::fault(vector::XM))
}

/// EFLAGS bits from the context's LAHF and SETO bytes.
pub(super) fn arithmetic_flags(captured: u16) -> u64 {
    let low = u64::from(captured >> 8) & (flag::CF | flag::PF | flag::AF | flag::ZF | flag::SF);
    low | if captured & 1 != 0 { flag::OF } else { 0 }
}

/// The context's form of the guest's flags.
pub(super) fn captured_flags(rflags: u64) -> u16 {
    let low = (rflags & (flag::CF | flag::PF | flag::AF | flag::ZF | flag::SF)) as u16 | 2;
    low << 8 | u16::from(rflags & flag::OF != 0)
}

/// LDMXCSR and STMXCSR.
pub(super) fn mxcsr(cpu: &mut Cpu, io: &dyn CpuIo, instruction: &Instruction) -> Outcome {
    let mnemonic = instruction.mnemonic();
    if matches!(mnemonic, Mnemonic::Vldmxcsr | Mnemonic::Vstmxcsr) {
        require_vex(cpu)?;
    } else {
        require_sse(cpu)?;
    }
    if matches!(mnemonic, Mnemonic::Stmxcsr | Mnemonic::Vstmxcsr) {
        let value = cpu.xsave.mxcsr().to_le_bytes();
        return operand::write(cpu, io, instruction, 1, &value);
    }
    let value = u32::from_le_bytes(operand::read(cpu, io, instruction, 1)?);
    if value & !MXCSR_MASK != 0 {
        return Err(Exception::GP0);
    }
    cpu.xsave.set_mxcsr(value);
    Ok(())
}

/// EMMS: all x87 registers become empty.
pub(super) fn emms(cpu: &mut Cpu) -> Outcome {
    require_mmx(cpu)?;
    cpu.xsave.enter_mmx();
    cpu.xsave.set_ftw(0);
    debug_assert_eq!(cpu.xsave.fsw() & status::TOP, 0);
    Ok(())
}

/// VZEROUPPER and VZEROALL on the registers that the mode can name.
pub(super) fn zero(cpu: &mut Cpu, instruction: &Instruction) -> Outcome {
    require_vex(cpu)?;
    let all = instruction.mnemonic() == Mnemonic::Vzeroall;
    for index in 0..register_count(cpu) {
        cpu.xsave.set_ymm_high(index, 0);
        if all {
            cpu.xsave.set_xmm(index, 0);
        }
    }
    Ok(())
}

/// MOVNTI: a store of a general register.
pub(super) fn movnti(cpu: &mut Cpu, io: &dyn CpuIo, instruction: &Instruction) -> Outcome {
    if instruction.op0_kind() != OpKind::Memory {
        return Err(Exception::UD);
    }
    let register = instruction.op1_register();
    let value = operand::gpr_value(cpu, register).to_le_bytes();
    operand::write(cpu, io, instruction, 1, &value[..register.size().min(8)])
}
