//! The host-arithmetic engine: runs one guest vector or x87 instruction as the host's own instruction on the
//! guest's operands, which makes results, flags and numeric exceptions exact by construction.
//!
//! [`ThunkEngine::prepare`] turns an instruction into native code once per normalised encoding (opcode,
//! registers, immediate; the memory operand always becomes the bounce buffer) and keeps it in a bounded cache
//! that is emptied as a whole when full. [`ThunkEngine::run`] executes it:
//!
//! ```text
//! load guest registers from the XSAVE area, general registers and flags from the context
//! load guest MXCSR ──► the instruction ──► store results, capture flags and MXCSR, restore the host's MXCSR
//!                          │ SIGFPE (unmasked SIMD exception), SIGILL
//!                          └────► fault exit: nothing stored but MXCSR
//! ```
//!
//! Only instructions that compute are accepted (see [`super::thunk_build`]): no control flow, no implicit
//! memory, no state management, so whatever the guest decodes, running it is safe for the process.
//!
//! x87 instructions work on the FXSAVE image in [`ThunkContext::fx`]; vector instructions work on the area.

// UNSAFETY: calls generated machine code.
#![allow(unsafe_code)]

use iced_x86::Instruction;

use super::thunk_arena::Arena;
use super::thunk_build;
use crate::cpu::XsaveArea;

/// MXCSR of Rust code: all exceptions masked, round to nearest.
pub const HOST_MXCSR: u32 = 0x1f80;
/// Slots of the cache (a power of two).
const SLOTS: usize = 4096;
/// Cached thunks at which the cache is emptied: keeps probe sequences short.
const MAX_THUNKS: usize = SLOTS * 3 / 4;

/// Why a thunk cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum ThunkError {
    /// No executable memory.
    #[error("executable memory for the vector unit: {0}; the host must allow executable memfd mappings")]
    Memory(#[from] std::io::Error),
    /// The instruction is not one that this engine runs.
    #[error("instruction {0:?} is not a vector or x87 computation")]
    Unsupported(iced_x86::Code),
}

/// Operands and results around one run.
#[repr(C, align(64))]
pub struct ThunkContext {
    /// The memory operand, source or destination.
    pub bounce: [u8; 64],
    /// FXSAVE image for x87 instructions. Bytes 24..28 must hold [`HOST_MXCSR`].
    pub fx: [u8; 512],
    /// General-register operands in the order of [`Shape::gprs`].
    pub gpr: [u64; 4],
    /// The guest's MXCSR, in and out.
    pub mxcsr: u32,
    pub(super) host_mxcsr: u32,
    /// Arithmetic flags: bit 0 OF, bits 8.. as LAHF gives them (CF 8, PF 10, AF 12, ZF 14, SF 15).
    pub flags: u16,
    pub(super) pad: u16,
    /// Signal number of a fault, or 0.
    pub(super) fault: u32,
}

/// Which unit an instruction belongs to: it decides the availability checks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Class {
    /// x87 floating point.
    #[default]
    X87,
    /// Only MMX registers.
    Mmx,
    /// Legacy-encoded with XMM registers (and perhaps MMX).
    Sse,
    /// VEX-encoded.
    Vex,
}

/// What the memory operand is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum MemoryUse {
    /// There is none.
    #[default]
    None,
    /// Source.
    Read,
    /// Destination.
    Write,
}

/// A general register operand.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct GprUse {
    /// Guest register in encoding order.
    pub index: u8,
    /// The instruction writes it (32-bit writes zero-extended).
    pub written: bool,
    /// Host register number that stands for it.
    pub(super) host: u8,
}

/// What the caller must provide and collect for one instruction.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Shape {
    /// Unit.
    pub class: Class,
    /// Memory operand.
    pub memory: MemoryUse,
    /// Bytes of the memory operand.
    pub size: u8,
    /// Required alignment of the memory operand (1: none).
    pub align: u8,
    /// Has an MMX register operand: the x87 unit enters MMX mode.
    pub mmx: bool,
    /// Uses or changes MXCSR.
    pub mxcsr: bool,
    /// Reads arithmetic flags.
    pub reads_flags: bool,
    /// Writes arithmetic flags.
    pub writes_flags: bool,
    /// Number of general-register operands.
    pub gpr_count: u8,
    /// General-register operands.
    pub gprs: [GprUse; 4],
}

/// Prepared native code; valid until the next [`ThunkEngine::prepare`].
#[derive(Clone, Copy, Debug, Default)]
pub struct Thunk {
    offset: u32,
    generation: u32,
    /// Operands.
    pub shape: Shape,
}

/// How a run ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Completion {
    /// Results are stored.
    Done,
    /// An unmasked SIMD exception: nothing changed but [`ThunkContext::mxcsr`].
    Numeric,
    /// The host does not have the instruction: nothing changed.
    Illegal,
}

#[derive(Clone, Copy, Default)]
struct Slot {
    /// 0 is free (code 0 is INVALID).
    key: u64,
    thunk: Thunk,
}

/// Cache of thunks and the context they run on. One per vCPU.
pub struct ThunkEngine {
    arena: Arena,
    slots: Box<[Slot]>,
    count: usize,
    generation: u32,
    context: Box<ThunkContext>,
    emitter: thunk_build::Emitter,
}

impl ThunkEngine {
    /// An empty engine. Fails when the host refuses executable memory.
    pub fn new() -> Result<Self, ThunkError> {
        let mut context = Box::new(ThunkContext {
            bounce: [0; 64],
            fx: [0; 512],
            gpr: [0; 4],
            mxcsr: HOST_MXCSR,
            host_mxcsr: HOST_MXCSR,
            flags: 0,
            pad: 0,
            fault: 0,
        });
        context.fx[24..28].copy_from_slice(&HOST_MXCSR.to_le_bytes());
        let mut emitter = thunk_build::Emitter::new();
        let arena = Arena::new(&emitter.fault_exit())?;
        let slots = vec![Slot::default(); SLOTS].into_boxed_slice();
        Ok(Self { arena, slots, count: 0, generation: 1, context, emitter })
    }

    /// Operands and results of the next or last run.
    pub fn context(&mut self) -> &mut ThunkContext {
        &mut self.context
    }

    /// Finds or builds the thunk of an instruction.
    #[inline]
    pub fn prepare(&mut self, instruction: &Instruction) -> Result<Thunk, ThunkError> {
        let key = key(instruction);
        let mut index = hash(key);
        loop {
            let slot = &self.slots[index & (SLOTS - 1)];
            if slot.key == key {
                return Ok(slot.thunk);
            }
            if slot.key == 0 {
                return self.build(instruction, key);
            }
            index = index.wrapping_add(1);
        }
    }

    #[cold]
    fn build(&mut self, instruction: &Instruction, key: u64) -> Result<Thunk, ThunkError> {
        let unsupported = ThunkError::Unsupported(instruction.code());
        let Some((code, shape)) = self.emitter.build(instruction) else { return Err(unsupported) };
        if self.count >= MAX_THUNKS {
            self.flush();
        }
        let offset = match self.arena.append(&code) {
            Some(offset) => offset,
            None => {
                self.flush();
                self.arena.append(&code).ok_or(unsupported)?
            }
        };
        let thunk = Thunk { offset, generation: self.generation, shape };
        let mut index = hash(key);
        while self.slots[index & (SLOTS - 1)].key != 0 {
            index = index.wrapping_add(1);
        }
        self.slots[index & (SLOTS - 1)] = Slot { key, thunk };
        self.count += 1;
        Ok(thunk)
    }

    fn flush(&mut self) {
        self.slots.fill(Slot::default());
        self.arena.clear();
        self.count = 0;
        self.generation = self.generation.wrapping_add(1).max(1);
    }

    /// Runs a thunk on the registers in `area` and the operands in [`Self::context`]. A thunk that a later
    /// `prepare` has evicted, or that another engine made, is reported as illegal.
    #[inline]
    pub fn run(&mut self, thunk: &Thunk, area: &mut XsaveArea) -> Completion {
        if thunk.generation != self.generation {
            return Completion::Illegal;
        }
        self.context.fault = 0;
        // SAFETY: `offset` was returned by `append` in this generation, so complete code of `Emitter::build` is
        // there: it follows the System V convention, touches only `context` and `area`, which are exclusively
        // borrowed, and changes no callee-saved register.
        unsafe {
            type Entry = unsafe extern "sysv64" fn(*mut ThunkContext, *mut XsaveArea);
            let entry: Entry = std::mem::transmute(self.arena.address(thunk.offset));
            entry(&raw mut *self.context, area);
        }
        // SAFETY: plain read of a field that the generated code may have changed.
        match unsafe { (&raw const self.context.fault).read_volatile() } {
            0 => Completion::Done,
            fault if fault == libc::SIGFPE as u32 => Completion::Numeric,
            _ => Completion::Illegal,
        }
    }
}

/// Everything of an instruction that decides its thunk: code, register operands, immediate.
#[inline]
fn key(instruction: &Instruction) -> u64 {
    let register = |op: u32| match op {
        0 => instruction.op0_register(),
        1 => instruction.op1_register(),
        2 => instruction.op2_register(),
        _ => instruction.op3_register(),
    } as u64;
    instruction.code() as u64
        | register(0) << 16
        | register(1) << 24
        | register(2) << 32
        | register(3) << 40
        | u64::from(instruction.immediate8()) << 48
        | 1 << 63
}

#[inline]
fn hash(key: u64) -> usize {
    (key.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 40) as usize
}
