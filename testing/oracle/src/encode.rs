//! Encoding one random instruction of a wanted kind.
//!
//! Opcode, mandatory prefix and group number come from the tables of iced-x86; everything else (ModR/M, SIB,
//! displacement, immediates, free prefixes, VEX fields) is random, and the decoder then says what it became
//! and how long it is. So the whole encoding space of an opcode is covered, not what an assembler would emit.

use iced_x86::{Code, Decoder, EncodingKind, Instruction, MandatoryPrefix, OpCodeInfo, OpCodeTableKind};

use crate::case::Mode;
use crate::rng::Rng;

/// Longest instruction.
pub const MAX: usize = 15;

/// What is fixed about an encoding.
pub struct Template {
    info: &'static OpCodeInfo,
    /// What it is in the tables.
    pub code: Code,
}

impl Template {
    /// The template of `code`.
    pub fn new(code: Code) -> Self {
        Self { info: code.op_code(), code }
    }

    /// Random bytes that begin with an instruction of this kind, most of the time.
    pub fn bytes(&self, rng: &mut Rng, mode: Mode) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(24);
        if self.info.encoding() == EncodingKind::VEX {
            self.vex(rng, mode, &mut bytes);
        } else {
            self.legacy(rng, mode, &mut bytes);
        }
        let at = bytes.len();
        while bytes.len() < (at + 12).max(MAX) {
            bytes.push(rng.byte());
        }
        self.shape_modrm(rng, &mut bytes[at..]);
        bytes
    }

    /// Group numbers, and a preference for short displacements and plain registers.
    fn shape_modrm(&self, rng: &mut Rng, rest: &mut [u8]) {
        let mut modrm = rest[0];
        if rng.once_in(3) {
            modrm = modrm & 0x3f | (rng.pick(&[0u8, 0x40, 0xc0, 0xc0]));
        }
        if self.info.group_index() >= 0 {
            modrm = modrm & !0x38 | (self.info.group_index() as u8) << 3;
        }
        if self.info.rm_group_index() >= 0 {
            modrm = modrm & !7 | 0xc0 | self.info.rm_group_index() as u8;
        }
        rest[0] = modrm;
        if rng.once_in(2) {
            // A SIB byte with a small scale if it is one; else part of a displacement or immediate.
            rest[1] &= 0x7f;
        }
    }

    fn legacy(&self, rng: &mut Rng, mode: Mode, out: &mut Vec<u8>) {
        let info = self.info;
        let wide = info.operand_size();
        let bits = mode.bits();
        let want66 = (wide == 16 && bits != 16) || (wide == 32 && bits == 16);
        let want67 = info.address_size() != 0 && info.address_size() != bits;
        if want66 || rng.once_in(24) {
            out.push(0x66);
        }
        if want67 || rng.once_in(24) {
            out.push(0x67);
        }
        if rng.once_in(16) {
            out.push(rng.pick(&[0x26, 0x2e, 0x36, 0x3e, 0x64, 0x65]));
        }
        if rng.once_in(if info.can_use_lock_prefix() { 3 } else { 60 }) {
            out.push(0xf0);
        }
        if rng.once_in(if info.can_use_rep_prefix() { 2 } else { 40 }) {
            out.push(0xf3);
        }
        if rng.once_in(if info.can_use_repne_prefix() { 4 } else { 40 }) {
            out.push(0xf2);
        }
        match info.mandatory_prefix() {
            MandatoryPrefix::P66 => out.push(0x66),
            MandatoryPrefix::PF3 => out.push(0xf3),
            MandatoryPrefix::PF2 => out.push(0xf2),
            _ => {}
        }
        if mode == Mode::Long {
            let w = if wide == 64 && !info.default_op_size64() { 8 } else { 0 };
            let random = if rng.once_in(2) { rng.byte() & 7 } else { 0 };
            let extra = if rng.once_in(12) { 8 } else { 0 };
            if w | random | extra != 0 || rng.once_in(8) {
                out.push(0x40 | w | random | extra);
            }
        }
        match info.table() {
            OpCodeTableKind::T0F => out.push(0x0f),
            OpCodeTableKind::T0F38 => out.extend([0x0f, 0x38]),
            OpCodeTableKind::T0F3A => out.extend([0x0f, 0x3a]),
            _ => {}
        }
        self.opcode(out);
    }

    fn opcode(&self, out: &mut Vec<u8>) {
        let opcode = self.info.op_code();
        if self.info.op_code_len() == 2 {
            out.push((opcode >> 8) as u8);
        }
        out.push(opcode as u8);
    }

    fn vex(&self, rng: &mut Rng, mode: Mode, out: &mut Vec<u8>) {
        let info = self.info;
        if rng.once_in(40) {
            out.push(rng.pick(&[0x66, 0xf2, 0xf3, 0xf0, 0x40, 0x48]));
        }
        if rng.once_in(24) {
            out.push(rng.pick(&[0x26, 0x2e, 0x36, 0x3e, 0x64, 0x65, 0x67]));
        }
        let map = match info.table() {
            OpCodeTableKind::T0F38 => 2,
            OpCodeTableKind::T0F3A => 3,
            _ => 1,
        };
        let pp = match info.mandatory_prefix() {
            MandatoryPrefix::P66 => 1,
            MandatoryPrefix::PF3 => 2,
            MandatoryPrefix::PF2 => 3,
            _ => 0,
        };
        let l = if info.is_lig() || rng.once_in(40) { rng.byte() & 1 } else { info.l() as u8 & 1 };
        let w = if info.is_wig() || rng.once_in(40) { rng.byte() & 1 } else { info.w() as u8 & 1 };
        // Inverted R, X, B; outside 64-bit mode R and X must be set or it is another instruction.
        let rxb = if mode == Mode::Long { rng.byte() & 0xe0 } else { 0xc0 | rng.byte() & 0x20 };
        let mut vvvv = if rng.once_in(2) { 0x78 } else { rng.byte() & 0x78 };
        if mode != Mode::Long {
            vvvv |= 0x40;
        }
        if map == 1 && w == 0 && rng.once_in(2) {
            out.extend([0xc5, rxb & 0x80 | vvvv | l << 2 | pp]);
            if mode != Mode::Long {
                let last = out.len() - 1;
                out[last] |= 0xc0;
            }
        } else {
            out.extend([0xc4, rxb | map, w << 7 | vvvv | l << 2 | pp]);
        }
        out.push(info.op_code() as u8);
    }
}

/// Decodes the first instruction of `bytes` at `rip`.
pub fn decode(bytes: &[u8], mode: Mode, rip: u64, options: u32) -> (Instruction, iced_x86::ConstantOffsets) {
    let mut decoder = Decoder::with_ip(mode.bits(), bytes, rip, options);
    let instruction = decoder.decode();
    let offsets = decoder.get_constant_offsets(&instruction);
    (instruction, offsets)
}
