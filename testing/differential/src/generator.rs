//! Random sequences of ordinary instructions.
//!
//! An instruction is drawn as random bytes and kept if it decodes to one that both sides must treat alike. What
//! it would touch is then steered: registers of its address are loaded first, so that memory operands lie in a
//! scratch range whatever the addressing form; flags that it leaves undefined are overwritten by a comparison.
//! Segment limits, which the reference does not check, are never reached.

use std::ops::Range;

use iced_x86::{
    Code, ConstantOffsets, CpuidFeature, Decoder, DecoderOptions, Encoder, EncodingKind, FlowControl,
    Instruction, InstructionInfoFactory, Mnemonic, OpAccess, OpKind, Register,
};

use crate::layout::DONE;
use crate::rng::Rng;

/// Bytes around a memory operand that belong to the scratch range too.
const MARGIN: u64 = 0x100;
/// Attempts at one instruction.
const ATTEMPTS: usize = 1000;

/// Where a sequence runs and what it may touch.
#[derive(Clone)]
pub(crate) struct Place {
    /// Bits of the code.
    pub(crate) bits: u32,
    /// Linear address of the first instruction.
    pub(crate) start: u64,
    /// Bytes of code.
    pub(crate) len: usize,
    /// Linear addresses of memory operands.
    pub(crate) scratch: Range<u64>,
    /// Highest offset of all segments in use.
    pub(crate) limit: u64,
}

/// A sequence in the making.
pub(crate) struct Sequence<'r> {
    pub(crate) rng: &'r mut Rng,
    pub(crate) place: Place,
    code: Vec<u8>,
    tags: Vec<String>,
    /// Linear bases of ES, CS, SS, DS, FS, GS; `None` where memory operands must not go.
    pub(crate) bases: [Option<u64>; 6],
    /// Base of CS, for instruction pointers.
    pub(crate) code_base: u64,
    factory: InstructionInfoFactory,
}

/// Values that registers get before an instruction.
type Prelude = Vec<(Register, u64)>;

impl<'r> Sequence<'r> {
    pub(crate) fn new(rng: &'r mut Rng, place: Place, bases: [Option<u64>; 6], code_base: u64) -> Self {
        let (code, tags) = (Vec::new(), Vec::new());
        Self { rng, place, code, tags, bases, code_base, factory: InstructionInfoFactory::new() }
    }

    /// The code, which an interrupt ends, and what was put into it besides ordinary instructions.
    pub(crate) fn finish(mut self) -> (Vec<u8>, String) {
        self.code.extend([0xcd, DONE]);
        (self.code, self.tags.join(", "))
    }

    /// Notes what the sequence holds.
    pub(crate) fn tag(&mut self, tag: impl Into<String>) {
        self.tags.push(tag.into());
    }

    /// Linear address of the next instruction.
    pub(crate) fn here(&self) -> u64 {
        self.place.start + self.code.len() as u64
    }

    /// Instruction pointer of the next instruction.
    pub(crate) fn ip(&self) -> u64 {
        self.here().wrapping_sub(self.code_base)
    }

    /// Bytes left, without those of the end.
    pub(crate) fn room(&self) -> usize {
        (self.place.len - 2).saturating_sub(self.code.len())
    }

    /// Appends code that belongs together, if it fits.
    pub(crate) fn emit(&mut self, bytes: &[u8]) -> bool {
        let fits = bytes.len() <= self.room();
        if fits {
            self.code.extend_from_slice(bytes);
        }
        fits
    }

    /// Appends a jump with an 8-bit displacement over some ordinary instructions.
    pub(crate) fn branch_over(&mut self, opcode: &[u8], instructions: u64) {
        if self.room() < 100 || !self.emit(opcode) || !self.emit(&[0]) {
            return;
        }
        let from = self.code.len();
        for _ in 0..instructions {
            self.ordinary();
        }
        let distance = self.code.len() - from;
        match i8::try_from(distance) {
            Ok(distance) => self.code[from - 1] = distance as u8,
            Err(_) => self.code.truncate(from),
        }
    }

    /// Appends an ordinary instruction, if one fits.
    pub(crate) fn ordinary(&mut self) {
        for _ in 0..ATTEMPTS {
            if let Some(code) = self.attempt() {
                self.emit(&code);
                return;
            }
        }
    }

    fn attempt(&mut self) -> Option<Vec<u8>> {
        let bytes = self.encoding();
        let mut decoder = Decoder::with_ip(self.place.bits, &bytes, 0, DecoderOptions::NONE);
        let instruction = decoder.decode();
        if instruction.is_invalid() || self.has_dead_rex(&bytes) || !self.eligible(&instruction) {
            return None;
        }
        let offsets = decoder.get_constant_offsets(&instruction);
        let mut bytes = bytes[..instruction.len()].to_vec();
        let prelude = self.steer(&instruction, offsets, &mut bytes)?;
        let mut code = Vec::new();
        for (register, value) in prelude {
            code.extend(load(self.place.bits, register, value)?);
        }
        if instruction.memory_base() == Register::RIP {
            let target = self.target(Register::DS, 8)?;
            let next = self.ip() + (code.len() + bytes.len()) as u64;
            let at = offsets.displacement_offset();
            bytes[at..at + 4].copy_from_slice(&(target.wrapping_sub(next) as u32).to_le_bytes());
        }
        code.extend(bytes);
        // A rotation by a multiple of 9 or 17 bits leaves OF undefined too.
        let rotates = matches!(instruction.mnemonic(), Mnemonic::Rcl | Mnemonic::Rcr);
        if rotates || instruction.rflags_undefined() != 0 {
            code.extend([self.rng.pick(&[0x38, 0x39, 0x3a, 0x3b]), 0xc0 | self.rng.below(64) as u8]);
        }
        Some(code)
    }

    /// Prefixes, opcode and random bytes behind.
    fn encoding(&mut self) -> Vec<u8> {
        let rng = &mut *self.rng;
        let mut bytes = Vec::new();
        if rng.one_in(4) {
            bytes.push(0x66);
        }
        if rng.one_in(6) {
            bytes.push(0x67);
        }
        if rng.one_in(5) {
            bytes.push(rng.pick(&[0x26, 0x2e, 0x36, 0x3e, 0x64, 0x65]));
        }
        if rng.one_in(16) {
            bytes.push(rng.pick(&[0xf2, 0xf3, 0xf0, 0xf0]));
        }
        if self.place.bits == 64 && !rng.one_in(3) {
            bytes.push(0x40 | rng.below(16) as u8);
        }
        if rng.one_in(5) {
            bytes.push(0x0f);
        }
        while bytes.len() < 15 {
            bytes.push(rng.next() as u8);
        }
        bytes
    }

    /// Whether a REX prefix stands before another prefix, which makes it mean nothing, but not to the reference.
    fn has_dead_rex(&self, bytes: &[u8]) -> bool {
        let rex = |byte: u8| byte & 0xf0 == 0x40;
        let legacy = |byte: u8| matches!(byte, 0x26 | 0x2e | 0x36 | 0x3e | 0x64..=0x67 | 0xf0 | 0xf2 | 0xf3);
        let prefixes = bytes.iter().take_while(|&&byte| rex(byte) || legacy(byte)).count();
        self.place.bits == 64 && bytes[..prefixes.saturating_sub(1)].iter().any(|&byte| rex(byte))
    }

    /// Whether the instruction is one whose outcome is defined, or steered to be. Left out: CMPXCHG8B and 16B, for
    /// which the reference sometimes takes flags of an earlier instruction.
    fn eligible(&mut self, i: &Instruction) -> bool {
        const FEATURES: [CpuidFeature; 8] = [
            CpuidFeature::INTEL8086,
            CpuidFeature::INTEL8086_ONLY,
            CpuidFeature::INTEL186,
            CpuidFeature::INTEL386,
            CpuidFeature::INTEL486,
            CpuidFeature::X64,
            CpuidFeature::CMOV,
            CpuidFeature::PAUSE,
        ];
        if i.encoding() != EncodingKind::Legacy
            || i.flow_control() != FlowControl::Next
            || i.is_privileged()
            || i.cpuid_features().iter().any(|f| !FEATURES.contains(f))
        {
            return false;
        }
        // Opcode F6 and F7 /1, which the reference does not know.
        if matches!(
            i.code(),
            Code::Test_rm8_imm8_F6r1
                | Code::Test_rm16_imm16_F7r1
                | Code::Test_rm32_imm32_F7r1
                | Code::Test_rm64_imm32_F7r1
        ) {
            return false;
        }
        let odds = match i.mnemonic() {
            Mnemonic::In | Mnemonic::Out | Mnemonic::Enter | Mnemonic::Leave => return false,
            Mnemonic::Insb | Mnemonic::Insw | Mnemonic::Insd => return false,
            Mnemonic::Outsb | Mnemonic::Outsw | Mnemonic::Outsd => return false,
            Mnemonic::Lds | Mnemonic::Les | Mnemonic::Lss | Mnemonic::Lfs | Mnemonic::Lgs => return false,
            Mnemonic::Popf | Mnemonic::Popfd | Mnemonic::Popfq | Mnemonic::Cli | Mnemonic::Sti => {
                return false;
            }
            // Results that are undefined for a word, or for zero.
            Mnemonic::Bswap if i.op0_register().size() == 2 => return false,
            Mnemonic::Bsf | Mnemonic::Bsr => return false,
            // Undefined for counts above the operand's size; CL is anything. The reference forgets the immediate
            // behind an address relative to RIP.
            Mnemonic::Shld | Mnemonic::Shrd => {
                let counted = i.op2_kind() == OpKind::Immediate8 && i.immediate8() & 31 <= 15;
                if !counted || i.memory_base() == Register::RIP {
                    return false;
                }
                1
            }
            // These usually end a sequence.
            Mnemonic::Div | Mnemonic::Idiv | Mnemonic::Bound => 6,
            _ => 1,
        };
        self.leaves_stack_and_segments_alone(i) && self.rng.one_in(odds)
    }

    fn leaves_stack_and_segments_alone(&mut self, i: &Instruction) -> bool {
        let stack = i.is_stack_instruction();
        if stack && i.op_count() > 0 && i.op0_kind() == OpKind::Register && i.mnemonic() == Mnemonic::Pop {
            let register = i.op0_register();
            if register.is_segment_register() || register.full_register() == Register::RSP {
                return false;
            }
        }
        let info = self.factory.info(i);
        info.used_registers().iter().all(|used| {
            let register = used.register();
            let protected = register.is_segment_register() || register.full_register() == Register::RSP;
            let read = matches!(used.access(), OpAccess::Read | OpAccess::CondRead | OpAccess::NoMemAccess);
            !protected || read || stack && !register.is_segment_register()
        })
    }

    /// An offset in `segment` at which `size` bytes and a margin lie in the scratch range.
    pub(crate) fn target(&mut self, segment: Register, size: u64) -> Option<u64> {
        let base = self.bases[segment.number()]?;
        let scratch = self.place.scratch.clone();
        let first = scratch.start + MARGIN;
        let linear = first + self.rng.below(scratch.end - MARGIN - size - first);
        let offset = linear.wrapping_sub(base);
        (MARGIN..=self.place.limit - MARGIN - size).contains(&offset).then_some(offset)
    }

    /// What to load into which registers so that the instruction's operands are in the scratch range.
    fn steer(&mut self, i: &Instruction, offsets: ConstantOffsets, bytes: &mut [u8]) -> Option<Prelude> {
        let mut prelude = Prelude::new();
        let kinds = i.op_kinds();
        let mut counter = None;
        for kind in kinds {
            let (segment, register) = match kind {
                OpKind::Memory => {
                    self.steer_address(i, offsets, bytes, &mut prelude)?;
                    continue;
                }
                OpKind::MemorySegSI => (i.memory_segment(), Register::SI),
                OpKind::MemorySegESI => (i.memory_segment(), Register::ESI),
                OpKind::MemorySegRSI => (i.memory_segment(), Register::RSI),
                OpKind::MemoryESDI => (Register::ES, Register::DI),
                OpKind::MemoryESEDI => (Register::ES, Register::EDI),
                OpKind::MemoryESRDI => (Register::ES, Register::RDI),
                OpKind::MemorySegDI | OpKind::MemorySegEDI | OpKind::MemorySegRDI => return None,
                _ => continue,
            };
            let offset = self.target(segment, 8)?;
            if register.size() == 2 && offset > 0xffff - MARGIN {
                return None;
            }
            prelude.push((register, offset));
            counter = Some(match register.size() {
                2 => Register::CX,
                4 => Register::ECX,
                _ => Register::RCX,
            });
        }
        if let Some(counter) = counter.filter(|_| i.has_rep_prefix() || i.has_repne_prefix()) {
            prelude.push((counter, self.rng.below(20)));
        }
        Some(prelude)
    }

    fn steer_address(
        &mut self,
        i: &Instruction,
        offsets: ConstantOffsets,
        bytes: &mut [u8],
        prelude: &mut Prelude,
    ) -> Option<()> {
        let (base, index) = (i.memory_base(), i.memory_index());
        if [base, index].iter().any(|r| r.full_register() == Register::RSP) || base == Register::EIP {
            return None;
        }
        if base != Register::None && base.full_register() == index.full_register() {
            return None;
        }
        let offset = self.target(i.memory_segment(), 64)?;
        if [base, index].iter().any(|r| r.size() == 2) && offset > 0xffff - MARGIN {
            return None;
        }
        let mut rest = offset;
        // XLAT adds AL, whatever it is: the margin is as large.
        if index != Register::None && index != Register::AL {
            let value = self.rng.below(0x80);
            prelude.push((index, value));
            rest = rest.wrapping_sub(value * u64::from(i.memory_index_scale()));
        }
        if base == Register::RIP {
            // The displacement is known once the prelude is.
        } else if base != Register::None {
            prelude.push((base, rest.wrapping_sub(i.memory_displacement64())));
        } else {
            let (at, size) = (offsets.displacement_offset(), offsets.displacement_size());
            let highest = match (size, self.place.bits) {
                (2, _) => 0xffff,
                // Extended by its sign.
                (4, 64) => 0x7fff_ffff,
                (4, _) => 0xffff_ffff,
                (8, _) => u64::MAX,
                _ => return None,
            };
            if rest > highest {
                return None;
            }
            bytes[at..at + size].copy_from_slice(&rest.to_le_bytes()[..size]);
        }
        // A bit string is addressed by the bit's number too.
        if matches!(i.mnemonic(), Mnemonic::Bt | Mnemonic::Bts | Mnemonic::Btr | Mnemonic::Btc)
            && i.op1_kind() == OpKind::Register
        {
            let register = i.op1_register();
            let taken = [base, index, Register::RSP].map(Register::full_register);
            if taken.contains(&register.full_register()) {
                return None;
            }
            prelude.push((register, self.rng.below(0x300)));
        }
        Some(())
    }
}

/// `MOV register, value`.
pub(crate) fn load(bits: u32, register: Register, value: u64) -> Option<Vec<u8>> {
    let code = match register.size() {
        2 => Code::Mov_r16_imm16,
        4 => Code::Mov_r32_imm32,
        8 => Code::Mov_r64_imm64,
        _ => return None,
    };
    let value = match register.size() {
        2 => value & 0xffff,
        4 => value & 0xffff_ffff,
        _ => value,
    };
    let instruction = match register.size() {
        8 => Instruction::with2(code, register, value),
        _ => Instruction::with2(code, register, value as u32),
    };
    let mut encoder = Encoder::new(bits);
    encoder.encode(&instruction.ok()?, 0).ok()?;
    Some(encoder.take_buffer())
}
