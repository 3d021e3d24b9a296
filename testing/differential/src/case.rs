//! A case, and the suites that cases come in.

use anyhow::Context;
use iced_x86::IcedError;
use iced_x86::code_asm::CodeAssembler;

use crate::layout::{CASE_LEN, CASES, INNER, INNER_LEN, USER};

/// Which monitor runs the cases.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Width {
    /// 32-bit protected mode, no paging until a case enables it.
    Protected,
    /// 64-bit mode.
    Long,
}

impl Width {
    /// The name used in file names and output.
    pub fn name(self) -> &'static str {
        match self {
            Self::Protected => "protected",
            Self::Long => "long",
        }
    }

    /// Bits of the monitor's code.
    pub(crate) fn bits(self) -> u32 {
        match self {
            Self::Protected => 32,
            Self::Long => 64,
        }
    }

    /// Linear address at which user code finds physical 0.
    pub(crate) fn user(self) -> u64 {
        match self {
            Self::Protected => 0,
            Self::Long => USER,
        }
    }
}

/// One case.
pub(crate) struct Case {
    pub(crate) name: String,
    pub(crate) entry: Vec<u8>,
    pub(crate) inner: Vec<u8>,
}

/// Cases that one kernel runs.
pub struct Suite {
    /// Which monitor.
    pub width: Width,
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
        Self { width, cases: Vec::new() }
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
        self.cases.push(Case { name, entry, inner });
        Ok(())
    }

    /// Where flat user code of this suite starts.
    pub(crate) fn user_inner(&self) -> u64 {
        self.width.user() + INNER
    }
}
