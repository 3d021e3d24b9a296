//! The most frequent vector instructions in plain Rust: whole-register and scalar moves, and 128-bit logic.
//!
//! What they do needs no host arithmetic, and without a thunk they take a fraction of the time.

use atoll_machine::backend::CpuIo;
use iced_x86::{Code, Instruction, OpKind};

use super::{operand, require_sse, require_vex};
use crate::cpu::Cpu;
use crate::exception::Outcome;

/// Legacy encoding: upper halves stay.
const SSE: bool = false;
/// VEX encoding: upper halves become zero.
const VEX: bool = true;

/// Executes the instruction if it is one of this file's.
#[inline]
pub(super) fn execute(cpu: &mut Cpu, io: &dyn CpuIo, insn: &Instruction) -> Option<Outcome> {
    use Code as C;
    let memory_source = insn.op1_kind() == OpKind::Memory;
    Some(match insn.code() {
        C::Movups_xmm_xmmm128 | C::Movupd_xmm_xmmm128 | C::Movdqu_xmm_xmmm128 | C::Lddqu_xmm_m128 => {
            load::<SSE>(cpu, io, insn, 1)
        }
        C::Movaps_xmm_xmmm128 | C::Movapd_xmm_xmmm128 | C::Movdqa_xmm_xmmm128 => {
            load::<SSE>(cpu, io, insn, 16)
        }
        C::VEX_Vmovups_xmm_xmmm128 | C::VEX_Vmovupd_xmm_xmmm128 | C::VEX_Vmovdqu_xmm_xmmm128 => {
            load::<VEX>(cpu, io, insn, 1)
        }
        C::VEX_Vmovaps_xmm_xmmm128 | C::VEX_Vmovapd_xmm_xmmm128 | C::VEX_Vmovdqa_xmm_xmmm128 => {
            load::<VEX>(cpu, io, insn, 16)
        }
        C::VEX_Vmovups_ymm_ymmm256 | C::VEX_Vmovupd_ymm_ymmm256 | C::VEX_Vmovdqu_ymm_ymmm256 => {
            load_wide(cpu, io, insn, 1)
        }
        C::VEX_Vmovaps_ymm_ymmm256 | C::VEX_Vmovapd_ymm_ymmm256 | C::VEX_Vmovdqa_ymm_ymmm256 => {
            load_wide(cpu, io, insn, 32)
        }
        C::Movups_xmmm128_xmm | C::Movupd_xmmm128_xmm | C::Movdqu_xmmm128_xmm => {
            store::<SSE>(cpu, io, insn, 1)
        }
        C::Movaps_xmmm128_xmm | C::Movapd_xmmm128_xmm | C::Movdqa_xmmm128_xmm => {
            store::<SSE>(cpu, io, insn, 16)
        }
        C::Movntps_m128_xmm | C::Movntpd_m128_xmm | C::Movntdq_m128_xmm => store::<SSE>(cpu, io, insn, 16),
        C::VEX_Vmovups_xmmm128_xmm | C::VEX_Vmovupd_xmmm128_xmm | C::VEX_Vmovdqu_xmmm128_xmm => {
            store::<VEX>(cpu, io, insn, 1)
        }
        C::VEX_Vmovaps_xmmm128_xmm | C::VEX_Vmovapd_xmmm128_xmm | C::VEX_Vmovdqa_xmmm128_xmm => {
            store::<VEX>(cpu, io, insn, 16)
        }
        C::VEX_Vmovups_ymmm256_ymm | C::VEX_Vmovupd_ymmm256_ymm | C::VEX_Vmovdqu_ymmm256_ymm => {
            store_wide(cpu, io, insn, 1)
        }
        C::VEX_Vmovaps_ymmm256_ymm | C::VEX_Vmovapd_ymmm256_ymm | C::VEX_Vmovdqa_ymmm256_ymm => {
            store_wide(cpu, io, insn, 32)
        }
        C::Movss_xmm_xmmm32 if memory_source => load_scalar::<SSE, 4>(cpu, io, insn),
        C::Movsd_xmm_xmmm64 if memory_source => load_scalar::<SSE, 8>(cpu, io, insn),
        C::Movq_xmm_xmmm64 if memory_source => load_scalar::<SSE, 8>(cpu, io, insn),
        C::VEX_Vmovss_xmm_m32 => load_scalar::<VEX, 4>(cpu, io, insn),
        C::VEX_Vmovsd_xmm_m64 => load_scalar::<VEX, 8>(cpu, io, insn),
        C::VEX_Vmovq_xmm_xmmm64 if memory_source => load_scalar::<VEX, 8>(cpu, io, insn),
        C::Movss_xmmm32_xmm if insn.op0_kind() == OpKind::Memory => store_scalar::<SSE, 4>(cpu, io, insn),
        C::Movsd_xmmm64_xmm if insn.op0_kind() == OpKind::Memory => store_scalar::<SSE, 8>(cpu, io, insn),
        C::Movq_xmmm64_xmm if insn.op0_kind() == OpKind::Memory => store_scalar::<SSE, 8>(cpu, io, insn),
        C::Movlps_m64_xmm | C::Movlpd_m64_xmm => store_scalar::<SSE, 8>(cpu, io, insn),
        C::VEX_Vmovss_m32_xmm => store_scalar::<VEX, 4>(cpu, io, insn),
        C::VEX_Vmovsd_m64_xmm => store_scalar::<VEX, 8>(cpu, io, insn),
        C::VEX_Vmovq_xmmm64_xmm if insn.op0_kind() == OpKind::Memory => store_scalar::<VEX, 8>(cpu, io, insn),
        C::Movd_xmm_rm32 => from_gpr::<SSE, 4>(cpu, io, insn),
        C::Movq_xmm_rm64 => from_gpr::<SSE, 8>(cpu, io, insn),
        C::VEX_Vmovd_xmm_rm32 => from_gpr::<VEX, 4>(cpu, io, insn),
        C::VEX_Vmovq_xmm_rm64 => from_gpr::<VEX, 8>(cpu, io, insn),
        C::Movd_rm32_xmm => to_gpr::<SSE, 4>(cpu, io, insn),
        C::Movq_rm64_xmm => to_gpr::<SSE, 8>(cpu, io, insn),
        C::VEX_Vmovd_rm32_xmm => to_gpr::<VEX, 4>(cpu, io, insn),
        C::VEX_Vmovq_rm64_xmm => to_gpr::<VEX, 8>(cpu, io, insn),
        C::Pxor_xmm_xmmm128 | C::Xorps_xmm_xmmm128 | C::Xorpd_xmm_xmmm128 => {
            logic(cpu, io, insn, |a, b| a ^ b)
        }
        C::Por_xmm_xmmm128 | C::Orps_xmm_xmmm128 | C::Orpd_xmm_xmmm128 => logic(cpu, io, insn, |a, b| a | b),
        C::Pand_xmm_xmmm128 | C::Andps_xmm_xmmm128 | C::Andpd_xmm_xmmm128 => {
            logic(cpu, io, insn, |a, b| a & b)
        }
        C::VEX_Vpxor_xmm_xmm_xmmm128 | C::VEX_Vxorps_xmm_xmm_xmmm128 => logic3(cpu, io, insn, |a, b| a ^ b),
        C::VEX_Vpor_xmm_xmm_xmmm128 | C::VEX_Vorps_xmm_xmm_xmmm128 => logic3(cpu, io, insn, |a, b| a | b),
        C::VEX_Vpand_xmm_xmm_xmmm128 | C::VEX_Vandps_xmm_xmm_xmmm128 => logic3(cpu, io, insn, |a, b| a & b),
        _ => return None,
    })
}

#[inline]
fn require<const IS_VEX: bool>(cpu: &Cpu) -> Outcome {
    if IS_VEX { require_vex(cpu) } else { require_sse(cpu) }
}

#[inline]
fn set<const IS_VEX: bool>(cpu: &mut Cpu, index: usize, value: u128) {
    cpu.xsave.set_xmm(index, value);
    if IS_VEX {
        cpu.xsave.set_ymm_high(index, 0);
    }
}

fn load<const IS_VEX: bool>(cpu: &mut Cpu, io: &dyn CpuIo, insn: &Instruction, align: u64) -> Outcome {
    require::<IS_VEX>(cpu)?;
    let value = match insn.op1_kind() {
        OpKind::Memory => u128::from_le_bytes(operand::read(cpu, io, insn, align)?),
        _ => cpu.xsave.xmm(insn.op1_register().number()),
    };
    set::<IS_VEX>(cpu, insn.op0_register().number(), value);
    Ok(())
}

fn load_wide(cpu: &mut Cpu, io: &dyn CpuIo, insn: &Instruction, align: u64) -> Outcome {
    require_vex(cpu)?;
    let value = match insn.op1_kind() {
        OpKind::Memory => operand::read::<32>(cpu, io, insn, align)?,
        _ => cpu.xsave.ymm(insn.op1_register().number()),
    };
    cpu.xsave.set_ymm(insn.op0_register().number(), &value);
    Ok(())
}

fn store<const IS_VEX: bool>(cpu: &mut Cpu, io: &dyn CpuIo, insn: &Instruction, align: u64) -> Outcome {
    require::<IS_VEX>(cpu)?;
    let value = cpu.xsave.xmm(insn.op1_register().number());
    if insn.op0_kind() == OpKind::Memory {
        return operand::write(cpu, io, insn, align, &value.to_le_bytes());
    }
    set::<IS_VEX>(cpu, insn.op0_register().number(), value);
    Ok(())
}

fn store_wide(cpu: &mut Cpu, io: &dyn CpuIo, insn: &Instruction, align: u64) -> Outcome {
    require_vex(cpu)?;
    let value = cpu.xsave.ymm(insn.op1_register().number());
    if insn.op0_kind() == OpKind::Memory {
        return operand::write(cpu, io, insn, align, &value);
    }
    cpu.xsave.set_ymm(insn.op0_register().number(), &value);
    Ok(())
}

/// A scalar load zeroes the rest of the low half.
fn load_scalar<const IS_VEX: bool, const N: usize>(
    cpu: &mut Cpu,
    io: &dyn CpuIo,
    insn: &Instruction,
) -> Outcome {
    require::<IS_VEX>(cpu)?;
    let value = operand::read::<N>(cpu, io, insn, 1)?;
    let mut wide = [0; 16];
    wide[..N].copy_from_slice(&value);
    set::<IS_VEX>(cpu, insn.op0_register().number(), u128::from_le_bytes(wide));
    Ok(())
}

fn store_scalar<const IS_VEX: bool, const N: usize>(
    cpu: &mut Cpu,
    io: &dyn CpuIo,
    insn: &Instruction,
) -> Outcome {
    require::<IS_VEX>(cpu)?;
    let value = cpu.xsave.xmm(insn.op1_register().number()).to_le_bytes();
    operand::write(cpu, io, insn, 1, &value[..N])
}

fn from_gpr<const IS_VEX: bool, const N: usize>(
    cpu: &mut Cpu,
    io: &dyn CpuIo,
    insn: &Instruction,
) -> Outcome {
    if insn.op1_kind() == OpKind::Memory {
        return load_scalar::<IS_VEX, N>(cpu, io, insn);
    }
    require::<IS_VEX>(cpu)?;
    let value = operand::gpr_value(cpu, insn.op1_register());
    set::<IS_VEX>(cpu, insn.op0_register().number(), value.into());
    Ok(())
}

fn to_gpr<const IS_VEX: bool, const N: usize>(cpu: &mut Cpu, io: &dyn CpuIo, insn: &Instruction) -> Outcome {
    if insn.op0_kind() == OpKind::Memory {
        return store_scalar::<IS_VEX, N>(cpu, io, insn);
    }
    require::<IS_VEX>(cpu)?;
    let value = cpu.xsave.xmm(insn.op1_register().number()) as u64;
    let kept = if N == 4 { value & 0xffff_ffff } else { value };
    cpu.gpr[insn.op0_register().number() & 15] = kept;
    Ok(())
}

#[inline]
fn logic(cpu: &mut Cpu, io: &dyn CpuIo, insn: &Instruction, f: fn(u128, u128) -> u128) -> Outcome {
    require_sse(cpu)?;
    let b = match insn.op1_kind() {
        OpKind::Memory => u128::from_le_bytes(operand::read(cpu, io, insn, 16)?),
        _ => cpu.xsave.xmm(insn.op1_register().number()),
    };
    let index = insn.op0_register().number();
    let a = cpu.xsave.xmm(index);
    cpu.xsave.set_xmm(index, f(a, b));
    Ok(())
}

#[inline]
fn logic3(cpu: &mut Cpu, io: &dyn CpuIo, insn: &Instruction, f: fn(u128, u128) -> u128) -> Outcome {
    require_vex(cpu)?;
    let b = match insn.op2_kind() {
        OpKind::Memory => u128::from_le_bytes(operand::read(cpu, io, insn, 1)?),
        _ => cpu.xsave.xmm(insn.op2_register().number()),
    };
    let a = cpu.xsave.xmm(insn.op1_register().number());
    set::<VEX>(cpu, insn.op0_register().number(), f(a, b));
    Ok(())
}
