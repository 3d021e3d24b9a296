//! A case, and the suites that cases come in.

use anyhow::Context;
use iced_x86::code_asm::CodeAssembler;
use iced_x86::{Decoder, DecoderOptions, Formatter, IcedError, IntelFormatter};

use crate::layout::{CASE_LEN, CASES, INNER, INNER_LEN, USER};

/// Which monitor runs the cases.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Width {
    /// Real mode, entered from 32-bit protected mode for each case.
    Real,
    /// 32-bit protected mode, no paging until a case enables it.
    Protected,
    /// 64-bit mode.
    Long,
}

impl Width {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Real, Self::Protected, Self::Long];

    /// The name used in file names and output.
    pub fn name(self) -> &'static str {
        match self {
            Self::Real => "real",
            Self::Protected => "protected",
            Self::Long => "long",
        }
    }

    /// Bits of the code that a case's entry is made of; in real mode there is only inner code.
    pub(crate) fn bits(self) -> u32 {
        match self {
            Self::Real | Self::Protected => 32,
            Self::Long => 64,
        }
    }

    /// Linear address at which user code finds physical 0.
    pub(crate) fn user(self) -> u64 {
        match self {
            Self::Real | Self::Protected => 0,
            Self::Long => USER,
        }
    }
}

/// One case.
pub(crate) struct Case {
    pub(crate) name: String,
    pub(crate) entry: Vec<u8>,
    pub(crate) inner: Vec<u8>,
    /// Bits and address of the inner code.
    inner_at: (u32, u64),
}

/// Cases that one kernel runs.
pub struct Suite {
    /// Which monitor.
    pub width: Width,
    /// Whether the lines of its records hold checksums of the memory that changed.
    pub memory: bool,
    pub(crate) cases: Vec<Case>,
}

/// Writes code.
pub(crate) type Emit<'a> = &'a dyn Fn(&mut CodeAssembler) -> Result<(), IcedError>;

/// Assembles `emit` for address `at`.
pub(crate) fn assemble(bits: u32, at: u64, emit: Emit<'_>) -> anyhow::Result<Vec<u8>> {
    let mut asm = CodeAssembler::new(bits)?;
    emit(&mut asm)?;
    Ok(asm.assemble(at)?)
}

impl Suite {
    pub(crate) fn new(width: Width) -> Self {
        Self { width, memory: false, cases: Vec::new() }
    }

    /// Names of the cases, in order.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.cases.iter().map(|c| c.name.as_str())
    }

    /// Adds a case of entry code alone.
    pub(crate) fn add(&mut self, name: impl Into<String>, entry: Emit<'_>) -> anyhow::Result<()> {
        self.add_inner(name, entry, (self.width.bits(), 0), &|_| Ok(()))
    }

    /// Adds a case with inner code of so many bits, which runs at offset `inner_at`.
    pub(crate) fn add_inner(
        &mut self,
        name: impl Into<String>,
        entry: Emit<'_>,
        (bits, inner_at): (u32, u64),
        inner: Emit<'_>,
    ) -> anyhow::Result<()> {
        let name = name.into();
        let at = CASES + CASE_LEN * self.cases.len() as u64;
        let entry = assemble(self.width.bits(), at, entry).with_context(|| name.clone())?;
        let inner = assemble(bits, inner_at, inner).with_context(|| name.clone())?;
        anyhow::ensure!(entry.len() as u64 <= CASE_LEN - INNER_LEN, "{name}: entry code is too long");
        anyhow::ensure!(inner.len() as u64 <= INNER_LEN, "{name}: inner code is too long");
        self.cases.push(Case { name, entry, inner, inner_at: (bits, inner_at) });
        Ok(())
    }

    /// Adds a case whose inner code is already encoded.
    pub(crate) fn add_bytes(
        &mut self,
        name: String,
        entry: Emit<'_>,
        inner_at: (u32, u64),
        inner: &[u8],
    ) -> anyhow::Result<()> {
        self.add_inner(name, entry, inner_at, &|a| inner.chunks(16).try_for_each(|part| a.db(part)))
    }

    /// The code of case `index`, one instruction a line; data between instructions shows as instructions.
    pub fn listing(&self, index: usize) -> Vec<String> {
        let Some(case) = self.cases.get(index) else { return Vec::new() };
        let entry_at = CASES + CASE_LEN * index as u64;
        let mut lines = disassemble(self.width.bits(), entry_at, &case.entry);
        lines.extend(disassemble(case.inner_at.0, case.inner_at.1, &case.inner));
        lines
    }

    /// Where flat user code of this suite starts.
    pub(crate) fn user_inner(&self) -> u64 {
        self.width.user() + INNER
    }
}

fn disassemble(bits: u32, at: u64, code: &[u8]) -> Vec<String> {
    let mut formatter = IntelFormatter::new();
    Decoder::with_ip(bits, code, at, DecoderOptions::NONE)
        .iter()
        .map(|instruction| {
            let mut text = String::new();
            formatter.format(&instruction, &mut text);
            format!("{:x} {text}", instruction.ip())
        })
        .collect()
}
