//! Random cases.
//!
//! A case is made of (a) instructions drawn from the tables of iced-x86, (b) such instructions with bits
//! flipped, or (c) random bytes; then registers, flags, memory and code placement are drawn, with operands
//! mostly steered to where something can happen: mapped pages, their edges, pages that refuse.

use iced_x86::{ConstantOffsets, FlowControl, Instruction, InstructionInfoFactory, Mnemonic, OpKind};
use iced_x86::{Register, UsedMemory};

use crate::case::{Case, Mode, PATTERNS};
use crate::eligible::{self, Eligibility};
use crate::encode::{self, MAX, Template};
use crate::layout::{self, BASE, CODE, CODE_LEN, PAGE};
use crate::rng::Rng;
use crate::values;

/// Which modes cases are drawn from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Modes {
    /// Half 64-bit, the rest 32-bit and 16-bit in equal parts.
    All,
    /// One.
    One(Mode),
}

/// Makes cases.
pub struct Generator {
    eligibility: Eligibility,
    templates: [Vec<Vec<Template>>; 3],
    factory: InstructionInfoFactory,
}

/// How often each of [`eligible::CATEGORIES`] is drawn.
const WEIGHTS: [u64; 9] = [8, 3, 3, 2, 1, 5, 2, 5, 5];

/// A case in the making.
struct Draft {
    case: Case,
    /// Registers whose value an earlier instruction depends on.
    fixed: u16,
}

impl Generator {
    /// For instructions that `eligibility` admits.
    pub fn new(eligibility: Eligibility) -> Self {
        let templates = [Mode::Long, Mode::Protected32, Mode::Protected16].map(|mode| {
            let mut by_category: Vec<Vec<Template>> = (0..WEIGHTS.len()).map(|_| Vec::new()).collect();
            for code in eligibility.codes(mode) {
                let mut instruction = Instruction::default();
                instruction.set_code(code);
                let category = eligible::category(&instruction).min(WEIGHTS.len() - 1);
                by_category[category].push(Template::new(code));
            }
            by_category
        });
        Self { eligibility, templates, factory: InstructionInfoFactory::new() }
    }

    /// What may be compared.
    pub fn eligibility(&self) -> &Eligibility {
        &self.eligibility
    }

    /// All encodings that can be drawn in `mode`.
    pub fn codes(&self, mode: Mode) -> impl Iterator<Item = iced_x86::Code> + '_ {
        self.templates[mode_index(mode)].iter().flatten().map(|t| t.code)
    }

    /// Case `index` under `seed`.
    pub fn case(&mut self, seed: u64, index: u64, modes: Modes) -> Case {
        let mut rng = Rng::for_case(seed, index);
        let mode = match modes {
            Modes::One(mode) => mode,
            Modes::All => rng.pick(&[Mode::Long, Mode::Long, Mode::Protected32, Mode::Protected16]),
        };
        let mut draft = Draft { case: initial(&mut rng, mode), fixed: 0 };
        // Which patterns the pages have changes rarely: pages that a case leaves alone need no restoring.
        let mut slow = Rng::for_case(seed, index >> 8 | 1 << 63);
        draft.case.patterns = [0; 4].map(|_| slow.below(PATTERNS as u64) as u8);
        let kind = rng.below(16);
        let count = match rng.below(8) {
            0..=4 => 1,
            5 | 6 => 2 + rng.below(2),
            _ => 2 + rng.below(7),
        };
        for _ in 0..count {
            let next = match kind {
                0..=12 => self.instruction(&mut rng, &mut draft),
                13 | 14 => self.mutated(&mut rng, &mut draft),
                _ => self.random(&mut rng, &mut draft),
            };
            // Two harmless halves can make something else where they meet.
            let mut longer = draft.case.code.clone();
            longer.extend(next);
            if self.acceptable(&longer, mode, draft.case.start()) {
                draft.case.code = longer;
            }
        }
        self.end_at_the_undefined(&mut draft.case);
        place(&mut draft.case);
        draft.case
    }

    /// Cuts the code after the first instruction that leaves flags undefined or stores the last x87 opcode: what
    /// processors disagree about must not reach another instruction.
    fn end_at_the_undefined(&self, case: &mut Case) {
        let mut at = 0;
        while at < case.code.len() {
            let rip = case.start().wrapping_add(at as u64);
            let options = self.eligibility.decoder_options;
            let (instruction, _) = encode::decode(&case.code[at..], case.mode, rip, options);
            at += instruction.len().max(1);
            if crate::explain::must_be_last(instruction.mnemonic()) {
                case.code.truncate(at);
            }
        }
    }

    /// A case with given code, its state drawn and its operands steered by `seed`.
    pub fn case_with_code(&mut self, seed: u64, mode: Mode, code: &[u8]) -> Case {
        let mut rng = Rng::for_case(seed, 0);
        let mut draft = Draft { case: initial(&mut rng, mode), fixed: 0 };
        draft.case.patterns = [0; 4].map(|_| rng.below(PATTERNS as u64) as u8);
        let start = draft.case.start();
        let mut at = 0;
        while at < code.len() {
            let rip = start.wrapping_add(at as u64);
            let options = self.eligibility.decoder_options;
            let (instruction, offsets) = encode::decode(&code[at..], mode, rip, options);
            if !instruction.is_invalid() {
                // The bytes stay as they are: only registers and memory are steered.
                let mut copy = code[at..at + instruction.len()].to_vec();
                self.steer(&mut rng, &mut draft, &instruction, &offsets, &mut copy);
            }
            at += instruction.len().max(1);
        }
        draft.case.code = code.to_vec();
        place(&mut draft.case);
        draft.case
    }

    fn template(&self, rng: &mut Rng, mode: Mode) -> &Template {
        let all = &self.templates[mode_index(mode)];
        loop {
            let mut ticket = rng.below(WEIGHTS.iter().sum());
            for (templates, weight) in all.iter().zip(WEIGHTS) {
                if ticket < weight && !templates.is_empty() {
                    return &templates[rng.below(templates.len() as u64) as usize];
                }
                ticket = ticket.wrapping_sub(weight);
            }
        }
    }

    /// One well-formed instruction with its operands steered.
    fn instruction(&mut self, rng: &mut Rng, draft: &mut Draft) -> Vec<u8> {
        let mode = draft.case.mode;
        loop {
            let mut bytes = self.template(rng, mode).bytes(rng, mode);
            let rip = draft.case.start().wrapping_add(draft.case.code.len() as u64);
            let options = self.eligibility.decoder_options;
            let (instruction, offsets) = encode::decode(&bytes, mode, rip, options);
            if !self.eligibility.instruction(&instruction) {
                continue;
            }
            if instruction.is_invalid() {
                if rng.once_in(6) && self.acceptable(&bytes[..MAX], mode, rip) {
                    bytes.truncate(MAX);
                    return bytes;
                }
                continue;
            }
            bytes.truncate(instruction.len());
            if !rng.once_in(24) {
                self.steer(rng, draft, &instruction, &offsets, &mut bytes);
            }
            if self.acceptable(&bytes, mode, rip) {
                return bytes;
            }
        }
    }

    /// Whether bytes that may be anything contain nothing that cannot be compared.
    pub(crate) fn acceptable(&self, bytes: &[u8], mode: Mode, rip: u64) -> bool {
        if eligible::dangerous_bytes(bytes) || eligible::reserved_permutation(bytes) {
            return false;
        }
        let mut at = 0;
        while at < bytes.len() {
            let next = rip.wrapping_add(at as u64);
            // What follows the bytes is INT3 or another instruction: pad, so that a cut one decodes.
            let mut window = [0xcc; MAX];
            let len = MAX.min(bytes.len() - at);
            window[..len].copy_from_slice(&bytes[at..at + len]);
            let (instruction, _) = encode::decode(&window, mode, next, self.eligibility.decoder_options);
            if !self.eligibility.instruction(&instruction) {
                return false;
            }
            at += instruction.len().max(1);
        }
        true
    }

    /// An instruction with some of its bits flipped.
    fn mutated(&mut self, rng: &mut Rng, draft: &mut Draft) -> Vec<u8> {
        let rip = draft.case.start().wrapping_add(draft.case.code.len() as u64);
        loop {
            let mut bytes = self.instruction(rng, draft);
            for _ in 0..=rng.below(3) {
                let at = rng.below(bytes.len() as u64) as usize;
                bytes[at] ^= 1 << rng.below(8);
            }
            if self.acceptable(&bytes, draft.case.mode, rip) {
                return bytes;
            }
        }
    }

    /// Random bytes.
    fn random(&mut self, rng: &mut Rng, draft: &mut Draft) -> Vec<u8> {
        let rip = draft.case.start().wrapping_add(draft.case.code.len() as u64);
        loop {
            let mut bytes: Vec<u8> = (0..=rng.below(MAX as u64)).map(|_| rng.byte()).collect();
            if rng.once_in(3) {
                bytes.insert(0, rng.pick(&[0x66, 0x67, 0xf2, 0xf3, 0xf0, 0x0f, 0x48, 0xc5, 0xc4, 0x64]));
            }
            if self.acceptable(&bytes, draft.case.mode, rip) {
                return bytes;
            }
        }
    }

    /// Gives the registers and constants of an instruction values that lead somewhere.
    fn steer(
        &mut self,
        rng: &mut Rng,
        draft: &mut Draft,
        instruction: &Instruction,
        offsets: &ConstantOffsets,
        bytes: &mut [u8],
    ) {
        steer_branch(rng, draft, instruction, offsets, bytes);
        if instruction.is_string_instruction() && !rng.once_in(8) {
            draft.case.gpr[1] = rng.below(90);
        }
        let info = self.factory.info(instruction);
        for memory in info.used_memory() {
            if memory.base() == stack_register(draft.case.mode) && !rng.once_in(3) {
                continue;
            }
            let linear = values::address(rng, draft.case.mode);
            steer_memory(rng, draft, instruction, memory, linear, offsets, bytes);
            plant(rng, &mut draft.case, instruction, linear);
        }
    }
}

fn mode_index(mode: Mode) -> usize {
    match mode {
        Mode::Long => 0,
        Mode::Protected32 => 1,
        Mode::Protected16 => 2,
    }
}

fn stack_register(mode: Mode) -> Register {
    match mode {
        Mode::Long => Register::RSP,
        Mode::Protected32 => Register::ESP,
        Mode::Protected16 => Register::SP,
    }
}

/// Registers, flags and segments.
fn initial(rng: &mut Rng, mode: Mode) -> Case {
    let mut gpr = [0; 16];
    for value in gpr.iter_mut().take(mode.registers()) {
        *value = if rng.once_in(4) { values::address(rng, mode) } else { values::integer(rng) };
        *value &= mode.register_mask();
    }
    let selectors = selectors(rng, mode);
    let stack = match rng.below(16) {
        0 => values::address(rng, mode),
        1 => BASE + (layout::STACK + PAGE) as u64 - rng.below(64),
        2 => BASE + layout::STACK as u64 + rng.below(64),
        3 => BASE + layout::STACK as u64 + rng.below(PAGE as u64),
        _ => BASE + layout::STACK as u64 + 0x400 + 8 * rng.below(256),
    };
    gpr[4] = match mode {
        Mode::Long => stack,
        _ => stack.wrapping_sub(layout::loaded(selectors[2]).base) & 0xffff_ffff,
    };
    if mode == Mode::Protected16 && rng.once_in(4) {
        gpr[4] = gpr[4] & 0xffff | rng.bits() & 0xffff_0000;
    }
    let mut rflags = 0x202 | rng.bits() & 0x8d5;
    if rng.once_in(4) {
        rflags |= 1 << 10;
    }
    if rng.once_in(64) {
        rflags |= 1 << 18;
    }
    let base = |rng: &mut Rng| match rng.below(4) {
        0 => 0,
        1 => BASE,
        2 => values::address(rng, Mode::Protected32),
        // Canonical.
        _ => ((rng.bits() << 16) as i64 >> 16) as u64,
    };
    Case {
        mode,
        code: Vec::with_capacity(32),
        at: code_offset(rng),
        gpr,
        rflags,
        selectors,
        fs_base: base(rng),
        gs_base: base(rng),
        vectors: values::vectors(rng),
        patterns: [0; 4],
        planted: Vec::new(),
    }
}

fn selectors(rng: &mut Rng, mode: Mode) -> [u16; 6] {
    let data = |rng: &mut Rng, usual: u16| {
        if rng.once_in(6) { rng.pick(&layout::DATA_SELECTORS) } else { usual }
    };
    let stack = |rng: &mut Rng, usual: u16| {
        if rng.once_in(8) { rng.pick(&layout::STACK_SELECTORS) } else { usual }
    };
    match mode {
        Mode::Long => [0, layout::USER_CODE64, layout::USER_DATA, 0, 0, 0],
        Mode::Protected32 => {
            let usual = layout::USER_DATA;
            let code = if rng.once_in(8) { layout::CODE32_BASED } else { layout::USER_CODE32 };
            let [es, ds, fs, gs] = [0; 4].map(|_| data(rng, usual));
            [es, code, stack(rng, usual), ds, fs, gs]
        }
        Mode::Protected16 => {
            let usual = layout::DATA16;
            let [es, ds, fs, gs] = [0; 4].map(|_| data(rng, usual));
            [es, layout::CODE16, stack(rng, usual), ds, fs, gs]
        }
    }
}

/// Mostly somewhere in the first code page; sometimes just before the end of either.
fn code_offset(rng: &mut Rng) -> usize {
    match rng.below(32) {
        0 => CODE + PAGE - 1 - rng.below(20) as usize,
        1 => CODE + CODE_LEN - 1 - rng.below(20) as usize,
        _ => CODE + 0x100 + rng.below(0x800) as usize,
    }
}

/// Cuts code that does not fit.
fn place(case: &mut Case) {
    case.code.truncate(CODE + CODE_LEN - case.at);
}

/// Near branches mostly stay in the code pages, and mostly go forward.
fn steer_branch(
    rng: &mut Rng,
    draft: &mut Draft,
    instruction: &Instruction,
    offsets: &ConstantOffsets,
    bytes: &mut [u8],
) {
    let near =
        matches!(instruction.op0_kind(), OpKind::NearBranch16 | OpKind::NearBranch32 | OpKind::NearBranch64);
    if near && offsets.has_immediate() && !rng.once_in(6) {
        let forward = if rng.once_in(16) { rng.below(40).wrapping_sub(24) } else { rng.below(24) };
        patch(bytes, offsets.immediate_offset(), offsets.immediate_size(), forward);
    }
    if instruction.op0_kind() == OpKind::FarBranch16 || instruction.op0_kind() == OpKind::FarBranch32 {
        let selector = rng.pick(&[0x23u16, 0x2b, 0x33, 0x07, 0x37, 0x3f, 0x10, 0]);
        patch(bytes, offsets.immediate_offset2(), offsets.immediate_size2(), selector.into());
        let target = draft.case.start() + rng.below(64);
        patch(bytes, offsets.immediate_offset(), offsets.immediate_size(), target);
    }
    let indirect =
        matches!(instruction.flow_control(), FlowControl::IndirectBranch | FlowControl::IndirectCall);
    if indirect && instruction.op0_kind() == OpKind::Register && !rng.once_in(6) {
        let register = instruction.op0_register().full_register().number();
        draft.case.gpr[register & 15] = draft.case.start().wrapping_add(rng.below(64));
        draft.fixed |= 1 << (register & 15);
    }
}

fn patch(bytes: &mut [u8], at: usize, size: usize, value: u64) {
    if let Some(place) = bytes.get_mut(at..at + size) {
        place.copy_from_slice(&value.to_le_bytes()[..size]);
    }
}

/// Chooses registers or the displacement so that a memory operand lies at `linear`.
fn steer_memory(
    rng: &mut Rng,
    draft: &mut Draft,
    instruction: &Instruction,
    memory: &UsedMemory,
    linear: u64,
    offsets: &ConstantOffsets,
    bytes: &mut [u8],
) {
    let case = &mut draft.case;
    let mask = match memory.address_size() {
        iced_x86::CodeSize::Code16 => 0xffff,
        iced_x86::CodeSize::Code32 => 0xffff_ffff,
        _ => u64::MAX,
    };
    let offset = linear.wrapping_sub(segment_base(case, memory.segment()));
    if memory.index().is_xmm() || memory.index().is_ymm() {
        small_elements(rng, case, memory.index());
    }
    let index = if memory.index().is_gpr() && memory.index() != memory.base() {
        read(case, memory.index()).wrapping_mul(u64::from(memory.scale()))
    } else {
        0
    };
    let rest = offset.wrapping_sub(index).wrapping_sub(memory.displacement());
    if memory.base().is_gpr() {
        let number = memory.base().full_register().number() & 15;
        if draft.fixed >> number & 1 == 0 && memory.index() != memory.base() {
            let keep = case.gpr[number] & !mask & case.mode.register_mask();
            case.gpr[number] = rest & mask & case.mode.register_mask() | keep;
            draft.fixed |= 1 << number;
            if memory.index().is_gpr() {
                draft.fixed |= 1 << (memory.index().full_register().number() & 15);
            }
        }
    } else if offsets.has_displacement() && offsets.displacement_size() >= 2 {
        let displacement = if instruction.is_ip_rel_memory_operand() {
            offset.wrapping_sub(instruction.next_ip())
        } else {
            offset.wrapping_sub(index)
        };
        patch(bytes, offsets.displacement_offset(), offsets.displacement_size(), displacement);
    }
}

fn segment_base(case: &Case, segment: Register) -> u64 {
    let index = match segment {
        Register::ES => 0,
        Register::CS => 1,
        Register::SS => 2,
        Register::FS => 4,
        Register::GS => 5,
        _ => 3,
    };
    match (case.mode, index) {
        (Mode::Long, 4) => case.fs_base,
        (Mode::Long, 5) => case.gs_base,
        (Mode::Long, _) => 0,
        _ => layout::loaded(case.selectors[index]).base,
    }
}

fn read(case: &Case, register: Register) -> u64 {
    let value = case.gpr[register.full_register().number() & 15];
    match register.size() {
        1 => value & 0xff,
        2 => value & 0xffff,
        4 => value & 0xffff_ffff,
        _ => value,
    }
}

/// Makes the elements of an index vector small, so that a gather stays near its base.
fn small_elements(rng: &mut Rng, case: &mut Case, register: Register) {
    let number = register.number() & 15;
    let wide = rng.once_in(2);
    for half in [160 + 16 * number, crate::case::YMM_HIGH + 16 * number] {
        let size = if wide { 8 } else { 4 };
        for element in case.vectors.0[half..half + 16].chunks_exact_mut(size) {
            let value = rng.below(96).wrapping_sub(32);
            element.copy_from_slice(&value.to_le_bytes()[..size]);
        }
    }
}

/// Puts an operand of the right kind at `linear`, sometimes.
fn plant(rng: &mut Rng, case: &mut Case, instruction: &Instruction, linear: u64) {
    let Some(offset) = linear.checked_sub(BASE).filter(|o| *o < layout::WINDOW as u64) else { return };
    let offset = offset as usize;
    if !layout::WRITABLE.contains(&(offset & !(PAGE - 1))) || !rng.once_in(2) {
        return;
    }
    let source = values::vectors(rng);
    let bytes = match instruction.mnemonic() {
        Mnemonic::Fxrstor | Mnemonic::Fxrstor64 => source.0[..512].to_vec(),
        Mnemonic::Ldmxcsr | Mnemonic::Vldmxcsr => source.0[24..28].to_vec(),
        Mnemonic::Frstor | Mnemonic::Fldenv => {
            let mut image = vec![0; 108];
            image[..2].copy_from_slice(&source.0[..2]);
            image[4..6].copy_from_slice(&source.0[2..4]);
            image[8..10].copy_from_slice(&(rng.bits() as u16).to_le_bytes());
            for (i, st) in image[28..].chunks_exact_mut(10).enumerate() {
                st.copy_from_slice(&source.0[32 + 16 * i..][..10]);
            }
            image
        }
        _ => match eligible::category(instruction) {
            5 if instruction.memory_size().size() >= 10 => source.0[32..42].to_vec(),
            5 if instruction.memory_size().size() == 4 => (values::single(rng) as u32).to_le_bytes().to_vec(),
            5 => values::double(rng).to_le_bytes().to_vec(),
            6..=8 => source.0[160..192].to_vec(),
            _ => values::integer(rng).to_le_bytes().to_vec(),
        },
    };
    let room = PAGE - offset % PAGE;
    case.planted.push((offset, bytes[..bytes.len().min(room)].to_vec()));
}
