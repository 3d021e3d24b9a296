//! Which instructions can be compared.
//!
//! An instruction is eligible when model and host both have it, and when executing it in this process at
//! privilege level 3 shows what the processor does rather than what the kernel, the hypervisor below or the
//! hour of day makes of it.

use atoll_machine::cpu::model::{CpuModel, Feature, Vendor};
use iced_x86::{Code, CodeSize, CpuidFeature, DecoderOptions, EncodingKind, Instruction, Mnemonic, OpKind};

use crate::case::Mode;

/// What of an instruction set is compared.
pub struct Eligibility {
    features: [bool; 256],
    /// Options with which the host's instructions are decoded.
    pub decoder_options: u32,
}

impl Eligibility {
    /// Everything that `model` has.
    pub fn of(model: &CpuModel) -> Self {
        let mut features = [false; 256];
        for feature in CpuidFeature::values() {
            features[feature as usize] = has(model, feature);
        }
        let vendor = if model.vendor == Vendor::Amd { DecoderOptions::AMD } else { 0 };
        Self { features, decoder_options: DecoderOptions::FORCE_RESERVED_NOP | vendor }
    }

    /// Whether code `code` may run on both sides.
    pub fn code(&self, code: Code) -> bool {
        let encoding = code.encoding();
        !matches!(encoding, EncodingKind::EVEX | EncodingKind::XOP | EncodingKind::D3NOW | EncodingKind::MVEX)
            && code.cpuid_features().iter().all(|f| self.features[*f as usize])
            && comparable(code.mnemonic())
    }

    /// Whether a decoded instruction may run on both sides. Undecodable bytes may: they raise #UD or #GP.
    pub fn instruction(&self, instruction: &Instruction) -> bool {
        instruction.is_invalid()
            || self.code(instruction.code()) && !enters_kernel(instruction) && !vendor_specific(instruction)
    }

    /// The encodings that can be generated for `mode`.
    pub fn codes(&self, mode: Mode) -> Vec<Code> {
        let usable = |code: &Code| {
            let info = code.op_code();
            info.is_instruction()
                && info.is_available_in_mode(mode.bits())
                && self.code(*code)
                && !matches!(code.mnemonic(), Mnemonic::INVALID)
                && !info.fwait()
        };
        Code::values().filter(usable).collect()
    }
}

/// INT 0x80 is Linux's 32-bit system call; other gates refuse or are plain exceptions.
fn enters_kernel(instruction: &Instruction) -> bool {
    instruction.mnemonic() == Mnemonic::Int && instruction.immediate8() == 0x80
}

/// A repeat prefix on LOOPE or LOOPNE is reserved; some processors let it change the condition. MOVSXD to a
/// 16-bit register reads two bytes on Intel's processors and four on AMD's.
fn vendor_specific(instruction: &Instruction) -> bool {
    let repeated = instruction.has_rep_prefix() || instruction.has_repne_prefix();
    let loops = matches!(instruction.mnemonic(), Mnemonic::Loope | Mnemonic::Loopne);
    let narrow = instruction.code() == Code::Movsxd_r16_rm16 && instruction.op1_kind() == OpKind::Memory;
    loops && repeated || narrow || far_call_to_long(instruction)
}

/// A far call from 16- or 32-bit code that enters 64-bit code pushes with a stack pointer of one mode and the
/// bases of the other; where the stack pointer wraps, hosts have been seen not to get past it.
fn far_call_to_long(instruction: &Instruction) -> bool {
    let legacy = instruction.code_size() != CodeSize::Code64;
    let direct = instruction.code().is_call_far() && instruction.far_branch_selector() & !3 == 0x30;
    legacy && (direct || instruction.code().is_call_far_indirect())
}

/// VPERMQ and VPERMPD with VEX.W = 0 do not exist; some processors execute them.
pub fn reserved_permutation(bytes: &[u8]) -> bool {
    bytes.windows(4).any(|w| matches!(w, [0xc4, map, wide, 0 | 1] if map & 0x1f == 3 && wide & 0x80 == 0))
}

/// Instructions whose outcome is not the processor's alone.
fn comparable(mnemonic: Mnemonic) -> bool {
    use Mnemonic as M;
    let kernel = matches!(
        mnemonic,
        M::Syscall | M::Sysenter | M::Sysret | M::Sysretq | M::Sysexit | M::Sysexitq | M::Vmcall | M::Vmmcall
    );
    // Differ from moment to moment, or tell which machine this is.
    let identity = matches!(
        mnemonic,
        M::Rdtsc
            | M::Rdtscp
            | M::Rdpmc
            | M::Rdpid
            | M::Cpuid
            | M::Rdrand
            | M::Rdseed
            | M::Xgetbv
            | M::Xsetbv
            | M::Rdpru
    );
    // The kernel emulates them for programs when the processor refuses (UMIP).
    let emulated = matches!(mnemonic, M::Sgdt | M::Sidt | M::Sldt | M::Str | M::Smsw);
    // The kernel's frame is not the guest's: IRET pops a flags image with TF as often as not.
    let transfer = matches!(mnemonic, M::Iret | M::Iretd | M::Iretq);
    // The host's components are not the model's.
    let components = matches!(
        mnemonic,
        M::Xsave
            | M::Xsave64
            | M::Xsaveopt
            | M::Xsaveopt64
            | M::Xsavec
            | M::Xsavec64
            | M::Xsaves
            | M::Xsaves64
            | M::Xrstor
            | M::Xrstor64
            | M::Xrstors
            | M::Xrstors64
    );
    // The kernel numbers processors in a descriptor of its own.
    let descriptor = matches!(mnemonic, M::Lsl);
    // Hypervisors that intercept #DB report it with the address of the instruction itself.
    let intercepted = matches!(mnemonic, M::Int1);
    !(kernel || identity || emulated || transfer || components || descriptor || intercepted)
}

/// Byte sequences that enter the kernel wherever execution may stumble over them.
pub fn dangerous_bytes(code: &[u8]) -> bool {
    code.windows(2).any(|w| matches!(w, [0x0f, 0x05 | 0x34 | 0x07 | 0x35] | [0xcd, 0x80] | [0x0f, 0x01]))
}

fn has(model: &CpuModel, feature: CpuidFeature) -> bool {
    use CpuidFeature as C;
    let named = match feature {
        C::INTEL8086 | C::INTEL186 | C::INTEL286 | C::INTEL386 | C::INTEL486 => return true,
        C::X64 | C::MULTIBYTENOP | C::PAUSE | C::CPUID | C::FPU | C::FPU287 | C::FPU387 => return true,
        C::PREFETCHW | C::CET_IBT => return true,
        C::CX8 => Feature::Cx8,
        C::CMOV => Feature::Cmov,
        C::MMX => Feature::Mmx,
        C::FXSR => Feature::Fxsr,
        C::SSE => Feature::Sse,
        C::SSE2 => Feature::Sse2,
        C::SSE3 => Feature::Sse3,
        C::SSSE3 => Feature::Ssse3,
        C::SSE4_1 => Feature::Sse41,
        C::SSE4_2 => Feature::Sse42,
        C::AES => Feature::Aes,
        C::PCLMULQDQ => Feature::Pclmulqdq,
        C::AVX => Feature::Avx,
        C::AVX2 => Feature::Avx2,
        C::FMA => Feature::Fma,
        C::F16C => Feature::F16c,
        C::BMI1 => Feature::Bmi1,
        C::BMI2 => Feature::Bmi2,
        C::LZCNT => Feature::Lzcnt,
        C::POPCNT => Feature::Popcnt,
        C::MOVBE => Feature::Movbe,
        C::CMPXCHG16B => Feature::Cx16,
        C::CLFSH => Feature::Clflush,
        C::FSGSBASE => Feature::Fsgsbase,
        C::SHA => Feature::ShaNi,
        C::XSAVE => Feature::Xsave,
        C::XSAVEOPT => Feature::Xsaveopt,
        C::XSAVEC => Feature::Xsavec,
        C::MSR => Feature::Msr,
        C::TSC => Feature::Tsc,
        C::SMAP => Feature::Smap,
        C::INVPCID => Feature::Invpcid,
        _ => return false,
    };
    model.has(named)
}

/// A word for the kind of an instruction, for statistics.
pub const CATEGORIES: [&str; 10] =
    ["integer", "bits", "string", "branch", "system", "x87", "mmx", "sse", "vex", "undecodable"];

/// Index into [`CATEGORIES`].
pub fn category(instruction: &Instruction) -> usize {
    use CpuidFeature as C;
    if instruction.is_invalid() {
        return 9;
    }
    let features = instruction.cpuid_features();
    let any = |list: &[C]| features.iter().any(|f| list.contains(f));
    if any(&[C::BMI1, C::BMI2, C::LZCNT, C::POPCNT]) {
        return 1;
    }
    if instruction.encoding() == EncodingKind::VEX {
        return 8;
    }
    if any(&[C::FPU, C::FPU287, C::FPU387]) {
        return 5;
    }
    if any(&[C::SSE, C::SSE2, C::SSE3, C::SSSE3, C::SSE4_1, C::SSE4_2, C::AES, C::PCLMULQDQ, C::SHA]) {
        return 7;
    }
    if any(&[C::MMX]) {
        return 6;
    }
    if instruction.is_string_instruction() {
        return 2;
    }
    if instruction.flow_control() != iced_x86::FlowControl::Next {
        return 3;
    }
    let segment = (0..instruction.op_count()).any(|op| instruction.op_register(op).is_segment_register());
    if segment || instruction.is_privileged() {
        return 4;
    }
    0
}
