//! Which instructions the CPU model has: iced's feature names against the model's.

use atoll_machine::cpu::model::{CpuModel, Feature, Vendor};
use iced_x86::{Code, CpuidFeature, DecoderOptions, Instruction, Mnemonic, OpKind};

/// Whether the model has every feature that the instruction needs; #UD if not.
pub(super) fn allows(model: &CpuModel, insn: &Instruction, bits: u32) -> bool {
    match insn.mnemonic() {
        // Hint encodings are NOPs on every processor.
        // AMD processors have no register form of PREFETCH.
        Mnemonic::Reservednop if insn.op0_kind() == OpKind::Register && is_prefetch(insn.code()) => {
            return model.vendor != Vendor::Amd;
        }
        Mnemonic::Reservednop
        | Mnemonic::Nop
        | Mnemonic::Pause
        | Mnemonic::Prefetch
        | Mnemonic::Prefetchw => return true,
        Mnemonic::Lahf | Mnemonic::Sahf if bits == 64 => return model.has(Feature::LahfLm),
        _ => {}
    }
    insn.cpuid_features().iter().all(|&feature| match needed(feature) {
        Need::Nothing => true,
        Need::Feature(f) => model.has(f),
        Need::Absent => false,
    })
}

/// 0F 0D.
fn is_prefetch(code: Code) -> bool {
    matches!(
        code,
        Code::Reservednop_rm16_r16_0F0D | Code::Reservednop_rm32_r32_0F0D | Code::Reservednop_rm64_r64_0F0D
    )
}

/// Options of iced's decoder that follow from the model.
pub(super) fn decoder_options(model: &CpuModel) -> u32 {
    let mut options = DecoderOptions::NO_WBNOINVD;
    if model.vendor == Vendor::Amd {
        options |= DecoderOptions::AMD;
    }
    if !model.has(Feature::Bmi1) {
        options |= DecoderOptions::NO_MPFX_0FBC;
    }
    if !model.has(Feature::Lzcnt) {
        options |= DecoderOptions::NO_MPFX_0FBD;
    }
    options
}

enum Need {
    Nothing,
    Feature(Feature),
    /// No model has it.
    Absent,
}

fn needed(feature: CpuidFeature) -> Need {
    use CpuidFeature as C;
    Need::Feature(match feature {
        C::INTEL8086
        | C::INTEL186
        | C::INTEL286
        | C::INTEL386
        | C::INTEL486
        | C::X64
        | C::CPUID
        | C::SMM
        | C::MULTIBYTENOP
        | C::PAUSE => return Need::Nothing,
        C::FPU | C::FPU287 | C::FPU387 => Feature::Fpu,
        C::CX8 => Feature::Cx8,
        C::CMPXCHG16B => Feature::Cx16,
        C::CMOV => Feature::Cmov,
        C::CLFSH => Feature::Clflush,
        C::MSR => Feature::Msr,
        C::TSC => Feature::Tsc,
        C::RDTSCP => Feature::Rdtscp,
        C::SEP => Feature::Sep,
        C::SYSCALL => Feature::Syscall,
        C::FSGSBASE => Feature::Fsgsbase,
        C::INVPCID => Feature::Invpcid,
        C::SMAP => Feature::Smap,
        C::RDRAND => Feature::Rdrand,
        C::RDSEED => Feature::Rdseed,
        C::MMX => Feature::Mmx,
        C::FXSR => Feature::Fxsr,
        C::SSE => Feature::Sse,
        C::SSE2 => Feature::Sse2,
        C::SSE3 => Feature::Sse3,
        C::SSSE3 => Feature::Ssse3,
        C::SSE4_1 => Feature::Sse41,
        C::SSE4_2 => Feature::Sse42,
        C::POPCNT => Feature::Popcnt,
        C::LZCNT => Feature::Lzcnt,
        C::MOVBE => Feature::Movbe,
        C::BMI1 => Feature::Bmi1,
        C::BMI2 => Feature::Bmi2,
        C::AES => Feature::Aes,
        C::PCLMULQDQ => Feature::Pclmulqdq,
        C::SHA => Feature::ShaNi,
        C::AVX => Feature::Avx,
        C::AVX2 => Feature::Avx2,
        C::FMA => Feature::Fma,
        C::F16C => Feature::F16c,
        C::XSAVE => Feature::Xsave,
        C::XSAVEC => Feature::Xsavec,
        C::XSAVEOPT => Feature::Xsaveopt,
        _ => return need_unlisted(feature),
    })
}

/// Instructions without a feature bit of their own in the models, sent to `system/`, which knows that they do
/// not exist or what permits them.
fn need_unlisted(feature: CpuidFeature) -> Need {
    match feature {
        CpuidFeature::RDPMC | CpuidFeature::VMX | CpuidFeature::SVM => Need::Nothing,
        _ => Need::Absent,
    }
}

/// Features whose instructions the vector and x87 engine executes.
pub(super) fn is_vector(feature: CpuidFeature) -> bool {
    use CpuidFeature as C;
    matches!(
        feature,
        C::FPU
            | C::FPU287
            | C::FPU387
            | C::MMX
            | C::FXSR
            | C::SSE
            | C::SSE2
            | C::SSE3
            | C::SSSE3
            | C::SSE4_1
            | C::SSE4_2
            | C::AES
            | C::PCLMULQDQ
            | C::SHA
            | C::AVX
            | C::AVX2
            | C::FMA
            | C::F16C
            | C::XSAVE
            | C::XSAVEC
            | C::XSAVEOPT
    )
}
