//! Every instruction of the extensions that CPU models offer has a handler, in register and memory form.

use iced_x86::{
    Code, CpuidFeature as F, Encoder, EncodingKind, Instruction, Mnemonic, OpCodeOperandKind as K, OpKind,
    Register,
};

use super::Fixture;
use super::fixture::{DATA, decode};
use crate::exception::Exception;

/// Extensions of `atoll-2026` that belong to this folder.
const OFFERED: [F; 19] = [
    F::FPU,
    F::FPU287,
    F::FPU387,
    F::MMX,
    F::FXSR,
    F::SSE,
    F::SSE2,
    F::SSE3,
    F::SSSE3,
    F::SSE4_1,
    F::AES,
    F::PCLMULQDQ,
    F::SHA,
    F::AVX,
    F::AVX2,
    F::FMA,
    F::F16C,
    F::XSAVE,
    F::XSAVEOPT,
];

/// The operand's register form and whether it can be memory; `None` for kinds that these extensions do not use.
fn operand(kind: K, index: u32) -> Option<(Option<Register>, bool)> {
    let xmm = Register::XMM0 + index + 1;
    let ymm = Register::YMM0 + index + 1;
    Some(match kind {
        K::xmm_reg | K::xmm_rm | K::xmm_vvvv | K::xmm_is4 | K::xmm_is5 => (Some(xmm), false),
        K::ymm_reg | K::ymm_rm | K::ymm_vvvv | K::ymm_is4 | K::ymm_is5 => (Some(ymm), false),
        K::xmm_or_mem => (Some(xmm), true),
        K::ymm_or_mem => (Some(ymm), true),
        K::mm_reg | K::mm_rm => (Some(Register::MM1 + index), false),
        K::mm_or_mem => (Some(Register::MM1 + index), true),
        K::r32_reg | K::r32_rm => (Some(Register::EAX + index), false),
        K::r64_reg | K::r64_rm => (Some(Register::RAX + index), false),
        K::r32_or_mem => (Some(Register::EAX + index), true),
        K::r64_or_mem => (Some(Register::RAX + index), true),
        K::r32_reg_mem => (Some(Register::EAX + index), false),
        K::r64_reg_mem => (Some(Register::RAX + index), false),
        K::st0 => (Some(Register::ST0), false),
        K::sti_opcode => (Some(Register::ST1), false),
        K::ax => (Some(Register::AX), false),
        K::mem => (None, true),
        _ => return None,
    })
}

/// Bytes of the instruction with registers, and with its memory operand at [RDI].
fn forms(code: Code) -> Vec<Vec<u8>> {
    let info = code.op_code();
    let kinds = info.op_kinds();
    let mut out = Vec::new();
    for memory in [false, true] {
        let mut instruction = Instruction::default();
        instruction.set_code(code);
        let mut used_memory = false;
        let mut complete = true;
        for (index, kind) in kinds.iter().enumerate() {
            let op = index as u32;
            if matches!(kind, K::imm8 | K::imm4_m2z) {
                instruction.set_op_kind(op, OpKind::Immediate8);
                instruction.set_immediate8(1);
                continue;
            }
            match operand(*kind, op) {
                Some((_, true)) if memory => {
                    instruction.set_op_kind(op, OpKind::Memory);
                    instruction.set_memory_base(Register::RDI);
                    used_memory = true;
                }
                Some((Some(register), _)) => instruction.set_op_register(op, register),
                _ => complete = false,
            }
        }
        let mut encoder = Encoder::new(64);
        if complete && used_memory == memory && encoder.encode(&instruction, 0).is_ok() {
            out.push(encoder.take_buffer());
        }
    }
    out
}

#[test]
fn every_offered_instruction_executes() {
    if !std::arch::is_x86_feature_detected!("avx2") || !std::arch::is_x86_feature_detected!("sha") {
        return;
    }
    let mut missing = Vec::new();
    let mut tried = 0;
    let mut f = Fixture::new();
    for code in Code::values() {
        let info = code.op_code();
        let features = code.cpuid_features();
        let ours = features.iter().any(|feature| OFFERED.contains(feature) || *feature == F::SSE4_2);
        let all = features.iter().all(|x| OFFERED.contains(x) || matches!(x, F::SSE4_2 | F::X64 | F::CMOV));
        let encodable = matches!(info.encoding(), EncodingKind::Legacy | EncodingKind::VEX);
        // These belong to `system/` and `execute/`.
        let elsewhere = matches!(code.mnemonic(), Mnemonic::Xgetbv | Mnemonic::Xsetbv | Mnemonic::Crc32);
        if elsewhere || !ours || !all || !encodable || !info.mode64() || !info.is_instruction() {
            continue;
        }
        for bytes in forms(code) {
            let instruction = decode(&bytes, 64);
            f.cpu.xsave.x87_init();
            f.cpu.xsave.0[576..832].fill(0);
            f.cpu.gpr = [0; 16];
            f.cpu.gpr[7] = DATA;
            f.store(DATA, &[0; 1024]);
            tried += 1;
            if f.run_decoded(&instruction) == Err(Exception::UD) {
                missing.push(format!("{:?} {bytes:02x?}", instruction.code()));
            }
        }
    }
    assert!(tried > 1000, "only {tried} instructions were tried");
    assert!(missing.is_empty(), "of {tried}, without a handler: {missing:#?}");
}
