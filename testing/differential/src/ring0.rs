//! Seeded instruction sequences at CPL 0 of 32-bit protected mode and of 64-bit mode: system instructions among
//! ordinary ones. Some go on to CPL 3.
//!
//! The steps are in `ring0_steps.rs`; here is what holds them together.

use std::ops::Range;

use iced_x86::Register;
use iced_x86::code_asm::*;

use crate::case::{Suite, Width};
use crate::generator::{Place, Sequence, load};
use crate::layout::*;
use crate::ring0_steps;
use crate::rng::Rng;

/// Bytes of a sequence: behind it lies what gates and far transfers lead to.
const LEN: usize = 0x100;
/// Where pointers and descriptor-table operands go: the end of the data page.
pub(crate) const OPERAND: u64 = DATA + 0xfe0;

/// Paging of a 32-bit sequence; 64-bit ones have four levels.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Paging {
    Off,
    Legacy,
    Pae,
    Long,
}

/// A sequence and what its steps have to know.
pub(crate) struct Ring0<'r> {
    pub(crate) s: Sequence<'r>,
    pub(crate) paging: Paging,
    /// Whether the sequence may go on at CPL 3, where the reference checks no alignment.
    pub(crate) may_leave: bool,
    /// Whether it has.
    pub(crate) left: bool,
    /// Whether it ends in the transfer just made.
    pub(crate) ended: bool,
}

/// The cases with these numbers.
pub(crate) fn suite(width: Width, seed: u64, cases: Range<usize>) -> anyhow::Result<Suite> {
    let mut suite = Suite::new(width);
    suite.memory = true;
    for index in cases {
        let mut rng = Rng::of_case(seed, index);
        let paging = match width {
            Width::Long => Paging::Long,
            _ => rng.pick(&[Paging::Off, Paging::Off, Paging::Legacy, Paging::Pae]),
        };
        let (code, tags) = sequence(&mut rng, paging);
        let name = format!("seed {seed} case {index}: ring0-{} {paging:?} [{tags}]", width.name());
        suite.add_bytes(name, &|a| enter(a, paging), (width.bits(), INNER), &code)?;
    }
    Ok(suite)
}

/// The entry code: paging as wanted, then the sequence.
fn enter(a: &mut CodeAssembler, paging: Paging) -> Result<(), iced_x86::IcedError> {
    let (root, features) = match paging {
        Paging::Off | Paging::Long => return a.jmp(INNER),
        Paging::Legacy => (PD32, 0x10),
        Paging::Pae => (PDPT_PAE, 0x20),
    };
    a.mov(eax, features)?;
    a.mov(cr4, eax)?;
    a.mov(eax, root as i32)?;
    a.mov(cr3, eax)?;
    a.mov(eax, 0x8000_0031_u32 as i32)?;
    a.mov(cr0, eax)?;
    a.jmp(INNER)
}

fn sequence(rng: &mut Rng, paging: Paging) -> (Vec<u8>, String) {
    let long = paging == Paging::Long;
    let may_leave = rng.one_in(2);
    let place = Place {
        bits: if long { 64 } else { 32 },
        start: INNER,
        len: LEN,
        scratch: DATA..OPERAND - 0x20,
        limit: if long { u64::MAX } else { u32::MAX.into() },
    };
    let code = long.then_some(0);
    let bases = [Some(0), code, Some(0), Some(0), Some(0), Some(0)];
    let s = Sequence::new(rng, place, bases, 0);
    let mut ring0 = Ring0 { s, paging, may_leave, left: false, ended: false };
    let steps = 3 + ring0.s.rng.below(20);
    for _ in 0..steps {
        if ring0.ended {
            break;
        }
        if ring0.s.rng.one_in(2) {
            ring0_steps::step(&mut ring0);
        } else {
            ring0.s.ordinary();
        }
    }
    ring0.s.finish()
}

impl Ring0<'_> {
    /// Whether this is 64-bit code.
    pub(crate) fn long(&self) -> bool {
        self.paging == Paging::Long
    }

    /// Appends tagged code, if it fits.
    pub(crate) fn put(&mut self, tag: &str, code: &[u8]) -> bool {
        let done = self.s.emit(code);
        if done {
            self.s.tag(tag);
        }
        done
    }

    /// `MOV register, value`, 32 bits or, in 64-bit code and where needed, 64.
    pub(crate) fn load(&self, register: u8, value: u64) -> Vec<u8> {
        if self.long() && value > u32::MAX.into() {
            let register = Register::RAX + u32::from(register);
            return load(64, register, value).unwrap_or_default();
        }
        let mut code = vec![0xb8 | register];
        code.extend((value as u32).to_le_bytes());
        code
    }

    /// `opcode` with ModRM field `reg` and the absolute address `at`.
    pub(crate) fn absolute(&self, opcode: &[u8], reg: u8, at: u64) -> Vec<u8> {
        let mut code = opcode.to_vec();
        if self.long() {
            code.extend([reg << 3 | 4, 0x25]);
        } else {
            code.push(reg << 3 | 5);
        }
        code.extend((at as u32).to_le_bytes());
        code
    }

    /// `MOV dword [at], value`.
    pub(crate) fn store(&self, at: u64, value: u32) -> Vec<u8> {
        let mut code = self.absolute(&[0xc7], 0, at);
        code.extend(value.to_le_bytes());
        code
    }

    /// `PUSH value`, sign-extended.
    pub(crate) fn push(&self, value: u32) -> Vec<u8> {
        let mut code = vec![0x68];
        code.extend(value.to_le_bytes());
        code
    }

    /// `PUSH value` of up to 64 bits in 64-bit code; clobbers the accumulator.
    pub(crate) fn push_wide(&self, value: u64) -> Vec<u8> {
        if !self.long() || value <= i32::MAX as u64 {
            return self.push(value as u32);
        }
        [self.load(0, value), vec![0x50]].concat()
    }

    /// What is added to an address so that CPL 3 may use it.
    pub(crate) fn user_shift(&self) -> u64 {
        if self.paging == Paging::Off { 0 } else { USER }
    }

    /// From here on the sequence runs at CPL 3.
    pub(crate) fn leave(&mut self) {
        let shift = self.user_shift();
        self.left = true;
        self.s.place.start += shift;
        self.s.place.scratch = self.s.place.scratch.start + shift..self.s.place.scratch.end + shift;
        if !self.long() {
            // The way out left the data segments null.
            let code =
                [self.push(sel::USER_DATA.into()), vec![0x1f], self.push(sel::USER_DATA.into()), vec![0x07]];
            self.s.emit(&code.concat());
            self.s.bases[4] = None;
            self.s.bases[5] = None;
        }
    }
}
