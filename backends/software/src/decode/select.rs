//! From iced instructions to ops: which handler executes what.

use atoll_machine::cpu::model::CpuModel;
use iced_x86::{CpuidFeature, Instruction};

use super::Op;
use crate::cpu::Cpu;
use crate::execute::rare;

/// Whether the CPU model has every feature that the instruction needs.
pub(super) fn model_allows(_model: &CpuModel, _instruction: &Instruction) -> bool {
    true
}

/// Options of iced's decoder that follow from the model.
pub(super) fn decoder_options(_model: &CpuModel) -> u32 {
    0
}

/// The op of a valid instruction, and whether it ends a block.
pub(super) fn select(_cpu: &Cpu, instruction: &Instruction, kept: &mut Vec<Instruction>) -> (Op, bool) {
    let vector = instruction.cpuid_features().iter().any(|f| is_vector(*f));
    let mut op = Op::new(if vector { rare::vector } else { rare::system });
    op.imm = kept.len() as u64;
    kept.push(*instruction);
    (op, !vector)
}

/// Features whose instructions the vector engine executes.
fn is_vector(feature: CpuidFeature) -> bool {
    !matches!(
        feature,
        CpuidFeature::INTEL8086
            | CpuidFeature::INTEL186
            | CpuidFeature::INTEL286
            | CpuidFeature::INTEL386
            | CpuidFeature::INTEL486
    )
}
