//! Generates the native code of one thunk.
//!
//! Convention: RDI holds the [`ThunkContext`], RSI the [`XsaveArea`]; both survive. The instruction's general
//! registers are mapped to RAX, RCX, RDX, R8 to R11; vector registers keep their numbers. Nothing callee-saved
//! is touched and the stack is not used, so the fault exit can return from anywhere.

use std::mem::offset_of;

use iced_x86::{
    Code, CodeSize, CpuidFeature, Encoder, EncodingKind, FlowControl, Instruction, InstructionInfoFactory,
    InstructionInfoOptions, MemoryOperand, Mnemonic, OpAccess, OpKind, Register,
};

use super::thunk::{Class, GprUse, MemoryUse, Shape, ThunkContext};

/// Offsets in the XSAVE area: ST/MM registers, XMM registers, upper halves of YMM registers.
const ST: usize = 32;
const XMM: usize = 160;
const YMM_HIGH: usize = 576;

const CONTEXT: Register = Register::RDI;
const AREA: Register = Register::RSI;

/// Host registers that stand for the guest's, in order of allocation.
const POOL: [Register; 7] =
    [Register::RAX, Register::RCX, Register::RDX, Register::R8, Register::R9, Register::R10, Register::R11];

/// Encodes thunks.
pub(super) struct Emitter {
    encoder: Encoder,
    info: InstructionInfoFactory,
    host_avx: bool,
}

/// What the instruction uses, collected before code is generated.
#[derive(Default)]
struct Uses {
    shape: Shape,
    /// XMM or YMM registers: bit per register.
    vectors: u32,
    vectors_written: u32,
    mmx: u32,
    mmx_written: u32,
}

impl Emitter {
    pub(super) fn new() -> Self {
        Self {
            encoder: Encoder::new(64),
            info: InstructionInfoFactory::new(),
            host_avx: std::arch::is_x86_feature_detected!("avx"),
        }
    }

    /// Code that leaves a thunk after a host exception; the handler put the signal's number into ECX.
    pub(super) fn fault_exit(&mut self) -> Vec<u8> {
        let fault = context_operand(offset_of!(ThunkContext, fault));
        self.memory_store(Code::Mov_rm32_r32, fault, Register::ECX);
        self.memory_only(Code::Stmxcsr_m32, context_operand(offset_of!(ThunkContext, mxcsr)));
        self.memory_only(Code::Ldmxcsr_m32, context_operand(offset_of!(ThunkContext, host_mxcsr)));
        if self.host_avx {
            self.push(&Instruction::with(Code::VEX_Vzeroupper));
        }
        self.push(&Instruction::with(Code::Emms));
        self.push(&Instruction::with(Code::Retnq));
        self.encoder.take_buffer()
    }

    /// The thunk of an instruction, or `None` when it is not a computation that this engine runs.
    pub(super) fn build(&mut self, original: &Instruction) -> Option<(Vec<u8>, Shape)> {
        let class = classify(original)?;
        if class == Class::Vex && !self.host_avx {
            return None;
        }
        let mut instruction = redirect_memory(original);
        let uses = self.uses(&instruction, class)?;
        map_gprs(&mut instruction, &uses.shape)?;
        self.prologue(&uses);
        let encoded = self.encoder.encode(&instruction, 0);
        self.epilogue(&uses);
        let code = self.encoder.take_buffer();
        encoded.is_ok().then_some((code, uses.shape))
    }

    /// Registers and memory that the instruction uses.
    fn uses(&mut self, instruction: &Instruction, class: Class) -> Option<Uses> {
        let mut uses = Uses::default();
        let shape = &mut uses.shape;
        shape.class = class;
        shape.mxcsr = match class {
            Class::X87 => false,
            // Of the instructions without XMM registers only conversions have to do with floating point.
            Class::Mmx => is_conversion(instruction.mnemonic()),
            Class::Sse | Class::Vex => needs_mxcsr(instruction.mnemonic()),
        };
        shape.reads_flags = instruction.rflags_read() != 0;
        shape.writes_flags = instruction.rflags_modified() != 0;
        memory_use(instruction, shape, self.info.info_options(instruction, InstructionInfoOptions::NONE))?;
        if class == Class::X87 {
            return Some(uses);
        }
        let info = self.info.info_options(instruction, InstructionInfoOptions::NO_MEMORY_USAGE);
        let explicit = explicit_gprs(instruction);
        for used in info.used_registers() {
            let register = used.register();
            let written = matches!(
                used.access(),
                OpAccess::Write | OpAccess::CondWrite | OpAccess::ReadWrite | OpAccess::ReadCondWrite
            );
            let bit = 1u32.checked_shl(register.number() as u32)?;
            if register.is_xmm() || register.is_ymm() || register.is_zmm() {
                if register.number() > 15 {
                    return None;
                }
                uses.vectors |= bit;
                uses.vectors_written |= if written { bit } else { 0 };
            } else if register.is_mm() {
                uses.mmx |= bit;
                uses.mmx_written |= if written { bit } else { 0 };
                uses.shape.mmx = true;
            } else if register.is_gpr() {
                let full = register.full_register();
                let address = full == CONTEXT && uses.shape.memory != MemoryUse::None;
                if !address || explicit.contains(&full) {
                    add_gpr(&mut uses.shape, full, written, explicit.contains(&full))?;
                }
            } else if !register.is_segment_register() {
                return None;
            }
        }
        Some(uses)
    }

    fn prologue(&mut self, uses: &Uses) {
        let shape = &uses.shape;
        if shape.class == Class::X87 {
            let fx = context_operand(offset_of!(ThunkContext, fx));
            self.memory_only(Code::Fxrstor64_m512byte, fx);
        }
        if shape.reads_flags || (shape.class == Class::X87 && shape.writes_flags) {
            let flags = context_operand(offset_of!(ThunkContext, flags));
            self.memory_load(Code::Movzx_r32_rm16, Register::EAX, flags);
            if let Ok(add) = Instruction::with2(Code::Add_AL_imm8, Register::AL, 0x7f_i32) {
                self.push(&add);
            }
            self.push(&Instruction::with(Code::Sahf));
        }
        for index in bits(uses.vectors) {
            let register = xmm(index);
            let low = area_operand(XMM + 16 * index);
            if shape.class != Class::Vex {
                self.memory_load(Code::Movups_xmm_xmmm128, register, low);
                continue;
            }
            self.memory_load(Code::VEX_Vmovups_xmm_xmmm128, register, low);
            let high = area_operand(YMM_HIGH + 16 * index);
            let wide = ymm(index);
            let insert = Code::VEX_Vinsertf128_ymm_ymm_xmmm128_imm8;
            if let Ok(insert) = Instruction::with4(insert, wide, wide, high, 1_i32) {
                self.push(&insert);
            }
        }
        for index in bits(uses.mmx) {
            self.memory_load(
                Code::Movq_mm_mmm64,
                Register::MM0 + index as u32,
                area_operand(ST + 16 * index),
            );
        }
        for (slot, gpr) in shape.gprs.iter().take(shape.gpr_count.into()).enumerate() {
            let operand = context_operand(offset_of!(ThunkContext, gpr) + 8 * slot);
            self.memory_load(Code::Mov_r64_rm64, Register::RAX + u32::from(gpr.host), operand);
        }
        if shape.mxcsr {
            self.memory_only(Code::Ldmxcsr_m32, context_operand(offset_of!(ThunkContext, mxcsr)));
        }
    }

    fn epilogue(&mut self, uses: &Uses) {
        let shape = &uses.shape;
        for (slot, gpr) in shape.gprs.iter().take(shape.gpr_count.into()).enumerate().filter(|g| g.1.written)
        {
            let operand = context_operand(offset_of!(ThunkContext, gpr) + 8 * slot);
            self.memory_store(Code::Mov_rm64_r64, operand, Register::RAX + u32::from(gpr.host));
        }
        if shape.writes_flags {
            self.push(&Instruction::with(Code::Lahf));
            if let Ok(overflow) = Instruction::with1(Code::Seto_rm8, Register::AL) {
                self.push(&overflow);
            }
            let flags = context_operand(offset_of!(ThunkContext, flags));
            self.memory_store(Code::Mov_rm16_r16, flags, Register::AX);
        }
        if shape.mxcsr {
            self.memory_only(Code::Stmxcsr_m32, context_operand(offset_of!(ThunkContext, mxcsr)));
            self.memory_only(Code::Ldmxcsr_m32, context_operand(offset_of!(ThunkContext, host_mxcsr)));
        }
        for index in bits(uses.vectors_written) {
            let low = area_operand(XMM + 16 * index);
            if shape.class != Class::Vex {
                self.memory_store(Code::Movups_xmmm128_xmm, low, xmm(index));
                continue;
            }
            self.memory_store(Code::VEX_Vmovups_xmmm128_xmm, low, xmm(index));
            let high = area_operand(YMM_HIGH + 16 * index);
            let extract = Code::VEX_Vextractf128_xmmm128_ymm_imm8;
            if let Ok(extract) = Instruction::with3(extract, high, ymm(index), 1_i32) {
                self.push(&extract);
            }
        }
        for index in bits(uses.mmx_written) {
            self.memory_store(
                Code::Movq_mmm64_mm,
                area_operand(ST + 16 * index),
                Register::MM0 + index as u32,
            );
            let exponent = area_operand(ST + 16 * index + 8);
            if let Ok(store) = Instruction::with2(Code::Mov_rm16_imm16, exponent, 0xffff_i32) {
                self.push(&store);
            }
        }
        if shape.class == Class::X87 {
            self.memory_only(Code::Fxsave64_m512byte, context_operand(offset_of!(ThunkContext, fx)));
            self.leave_x87();
        } else if uses.mmx != 0 {
            self.push(&Instruction::with(Code::Emms));
        }
        if shape.class == Class::Vex {
            self.push(&Instruction::with(Code::VEX_Vzeroupper));
        }
        self.push(&Instruction::with(Code::Retnq));
    }

    /// Gives Rust its x87 unit back: empty, with the default control word and nothing pending. With that control
    /// word nothing can be pending and EMMS is enough; otherwise FNINIT, which takes ten times as long.
    fn leave_x87(&mut self) {
        let control = context_operand(offset_of!(ThunkContext, fx));
        if let Ok(compare) = Instruction::with2(Code::Cmp_rm16_imm16, control, 0x37f_i32) {
            self.push(&compare);
        }
        // Every instruction is encoded at address 0: this one jumps over the two bytes of FNINIT.
        if let Ok(jump) = Instruction::with_branch(Code::Je_rel8_64, 4) {
            self.push(&jump);
        }
        self.push(&Instruction::with(Code::Fninit));
        self.push(&Instruction::with(Code::Emms));
    }

    /// Encodes one instruction of the frame; every one is a fixed, valid form.
    fn push(&mut self, instruction: &Instruction) {
        let result = self.encoder.encode(instruction, 0);
        debug_assert!(result.is_ok(), "{:?}: {result:?}", instruction.code());
    }
    fn memory_only(&mut self, code: Code, memory: MemoryOperand) {
        if let Ok(instruction) = Instruction::with1(code, memory) {
            self.push(&instruction);
        }
    }
    fn memory_load(&mut self, code: Code, register: Register, memory: MemoryOperand) {
        if let Ok(instruction) = Instruction::with2(code, register, memory) {
            self.push(&instruction);
        }
    }
    fn memory_store(&mut self, code: Code, memory: MemoryOperand, register: Register) {
        if let Ok(instruction) = Instruction::with2(code, memory, register) {
            self.push(&instruction);
        }
    }
}

fn xmm(index: usize) -> Register {
    Register::XMM0 + index as u32
}
fn ymm(index: usize) -> Register {
    Register::YMM0 + index as u32
}
fn context_operand(offset: usize) -> MemoryOperand {
    MemoryOperand::with_base_displ(CONTEXT, offset as i64)
}
fn area_operand(offset: usize) -> MemoryOperand {
    MemoryOperand::with_base_displ(AREA, offset as i64)
}
fn bits(set: u32) -> impl Iterator<Item = usize> {
    (0..32).filter(move |i| set >> i & 1 != 0)
}

/// Extensions whose instructions may run here. State management inside them is excluded by mnemonic.
fn classify(instruction: &Instruction) -> Option<Class> {
    use CpuidFeature as F;
    let code = instruction.code();
    let state = matches!(
        instruction.mnemonic(),
        Mnemonic::Emms
            | Mnemonic::Ldmxcsr
            | Mnemonic::Stmxcsr
            | Mnemonic::Vldmxcsr
            | Mnemonic::Vstmxcsr
            | Mnemonic::Vzeroall
            | Mnemonic::Vzeroupper
            | Mnemonic::Maskmovq
            | Mnemonic::Maskmovdqu
            | Mnemonic::Vmaskmovdqu
            | Mnemonic::Wait
            | Mnemonic::Fninit
            | Mnemonic::Fnclex
            | Mnemonic::Fnstcw
            | Mnemonic::Fldcw
            | Mnemonic::Fnstsw
            | Mnemonic::Fnstenv
            | Mnemonic::Fldenv
            | Mnemonic::Fnsave
            | Mnemonic::Frstor
    );
    if state || instruction.flow_control() != FlowControl::Next || code.is_privileged() {
        return None;
    }
    let computes = |feature: &F| {
        matches!(
            feature,
            F::FPU | F::FPU287 | F::FPU387 | F::MMX | F::SSE | F::SSE2 | F::SSE3 | F::SSSE3 | F::SSE4_1
        ) || matches!(
            feature,
            F::SSE4_2 | F::AES | F::PCLMULQDQ | F::SHA | F::AVX | F::AVX2 | F::FMA | F::F16C
        ) || matches!(feature, F::CMOV | F::X64 | F::VAES | F::VPCLMULQDQ)
    };
    let features = instruction.cpuid_features();
    if features.is_empty() || !features.iter().all(computes) {
        return None;
    }
    let x87 = features.iter().any(|f| matches!(f, F::FPU | F::FPU287 | F::FPU387));
    let registers = (0..instruction.op_count()).map(|i| instruction.op_register(i));
    match instruction.encoding() {
        EncodingKind::VEX => Some(Class::Vex),
        EncodingKind::Legacy if x87 || is_x87_sse3(instruction.mnemonic()) => Some(Class::X87),
        EncodingKind::Legacy if registers.clone().any(Register::is_xmm) => Some(Class::Sse),
        EncodingKind::Legacy if registers.clone().any(Register::is_mm) => Some(Class::Mmx),
        // Conversions from memory to a general register.
        EncodingKind::Legacy if features.iter().any(|f| matches!(f, F::SSE | F::SSE2)) => Some(Class::Sse),
        _ => None,
    }
}

/// FISTTP belongs to SSE3 but is an x87 instruction.
fn is_x87_sse3(mnemonic: Mnemonic) -> bool {
    mnemonic == Mnemonic::Fisttp
}

/// CVT(T)PS2PI and CVT(T)PD2PI, whose source may be in memory.
fn is_conversion(mnemonic: Mnemonic) -> bool {
    use Mnemonic as M;
    matches!(mnemonic, M::Cvtps2pi | M::Cvttps2pi | M::Cvtpd2pi | M::Cvttpd2pi)
}

/// Finds the one memory operand, if any; `None` when memory is used in a way that the bounce buffer cannot serve.
fn memory_use(instruction: &Instruction, shape: &mut Shape, info: &iced_x86::InstructionInfo) -> Option<()> {
    let mut explicit = 0;
    for op in 0..instruction.op_count() {
        match instruction.op_kind(op) {
            OpKind::Register | OpKind::Immediate8 => {}
            OpKind::Memory => {
                explicit += 1;
                shape.memory = match info.op_access(op) {
                    OpAccess::Read | OpAccess::CondRead => MemoryUse::Read,
                    OpAccess::Write => MemoryUse::Write,
                    _ => return None,
                };
            }
            _ => return None,
        }
    }
    if explicit > 1 || info.used_memory().len() != explicit || instruction.is_vsib() {
        return None;
    }
    shape.align = 1;
    if explicit == 1 {
        let size = instruction.memory_size().size();
        if size == 0 || size > 64 {
            return None;
        }
        shape.size = size as u8;
        shape.align = alignment(instruction, size) as u8;
    }
    Some(())
}

/// Alignment that the memory operand must have or #GP (Intel SDM vol. 2, 2.4).
fn alignment(instruction: &Instruction, size: usize) -> usize {
    use Mnemonic as M;
    match instruction.encoding() {
        EncodingKind::Legacy if size == 16 => match instruction.mnemonic() {
            M::Movups | M::Movupd | M::Movdqu | M::Lddqu => 1,
            M::Pcmpestri | M::Pcmpestrm | M::Pcmpistri | M::Pcmpistrm => 1,
            M::Pcmpestri64 | M::Pcmpestrm64 => 1,
            _ => 16,
        },
        EncodingKind::VEX => match instruction.mnemonic() {
            M::Vmovaps | M::Vmovapd | M::Vmovdqa => size,
            M::Vmovntps | M::Vmovntpd | M::Vmovntdq | M::Vmovntdqa => size,
            _ => 1,
        },
        _ => 1,
    }
}

/// Full registers of the explicit general-register operands.
fn explicit_gprs(instruction: &Instruction) -> Vec<Register> {
    (0..instruction.op_count())
        .filter(|op| instruction.op_kind(*op) == OpKind::Register)
        .map(|op| instruction.op_register(op))
        .filter(|register| register.is_gpr())
        .map(Register::full_register)
        .collect()
}

/// Adds a general register: implicit ones keep their number, explicit ones take the next of the pool.
fn add_gpr(shape: &mut Shape, full: Register, written: bool, explicit: bool) -> Option<()> {
    let index = full.number() as u8;
    let count = usize::from(shape.gpr_count);
    if let Some(known) = shape.gprs.iter_mut().take(count).find(|g| g.index == index) {
        known.written |= written;
        return Some(());
    }
    let host = if explicit { POOL.get(count)?.number() as u8 } else { index };
    let taken = shape.gprs.iter().take(count).any(|g| g.host == host);
    if taken || (!explicit && host > 2) {
        return None;
    }
    *shape.gprs.get_mut(count)? = GprUse { index, written, host };
    shape.gpr_count += 1;
    Some(())
}

/// The instruction with its memory operand, if any, at the bounce buffer, and without idle prefixes.
fn redirect_memory(original: &Instruction) -> Instruction {
    let mut instruction = *original;
    instruction.set_code_size(CodeSize::Code64);
    instruction.set_segment_prefix(Register::None);
    instruction.set_has_lock_prefix(false);
    instruction.set_has_repe_prefix(false);
    instruction.set_has_repne_prefix(false);
    if (0..original.op_count()).any(|op| original.op_kind(op) == OpKind::Memory) {
        instruction.set_memory_base(CONTEXT);
        instruction.set_memory_index(Register::None);
        instruction.set_memory_index_scale(1);
        instruction.set_memory_displacement64(0);
        instruction.set_memory_displ_size(0);
    }
    instruction
}

/// Replaces the explicit general registers by those that stand for them.
fn map_gprs(instruction: &mut Instruction, shape: &Shape) -> Option<()> {
    for op in 0..instruction.op_count() {
        let register = instruction.op_register(op);
        if instruction.op_kind(op) != OpKind::Register || !register.is_gpr() {
            continue;
        }
        let mut gprs = shape.gprs.iter().take(shape.gpr_count.into());
        let host = gprs.find(|g| usize::from(g.index) == register.full_register().number())?.host;
        let base = match register.size() {
            4 => Register::EAX,
            8 => Register::RAX,
            _ => return None,
        };
        instruction.set_op_register(op, base + u32::from(host));
    }
    Some(())
}

/// Whether the instruction can read or change MXCSR. Moves, logic and integer operations cannot.
fn needs_mxcsr(mnemonic: Mnemonic) -> bool {
    const QUIET: [&str; 17] = [
        "p",
        "mov",
        "and",
        "or",
        "xor",
        "unpck",
        "shuf",
        "blend",
        "insert",
        "extract",
        "broadcast",
        "aes",
        "sha",
        "lddqu",
        "mpsadbw",
        "test",
        "maskmov",
    ];
    let name = format!("{mnemonic:?}").to_ascii_lowercase();
    let name = name.strip_prefix('v').unwrap_or(&name);
    !QUIET.iter().any(|quiet| name.starts_with(quiet))
}
