//! Decoded code: blocks of pre-digested operations, found by the host address of their first byte.
//!
//! ```text
//! linear ──jump table (linear, context)──────────────► block ──version compare──► run
//!            │ miss                                      ▲            │ differs
//!            ▼                                           │            ▼
//!         fetch TLB ──host address──► buckets ──found────┤   bytes equal? new version : decode again
//!                                        └─not found─► build.rs (iced-x86) ──► select/ (handlers)
//! ```
//!
//! A block is a straight run of instructions up to an unconditional transfer, a system instruction, the end of
//! the page, or [`MAX_OPS`]; it is left early where a conditional branch is taken. An instruction that straddles pages is a block of its own, checked against both pages.
//! Because blocks are keyed by the identity of physical memory, they survive changes of address space; the
//! jump table in front depends on [`Mmu::fetch_contexts`](crate::mmu::Mmu) and is relearned.
//!
//! Writers of code are noticed by the page's code version (see `RamBlock`): a block whose page has another
//! version is compared byte by byte with what it was decoded from, so data next to code costs a compare, not
//! a decode. The cache is bounded: at [`MAX_BYTES`] it is emptied and starts over.

use std::sync::Arc;

use atoll_machine::memory::RamBlock;
use iced_x86::Instruction;

use crate::cpu::Cpu;
use crate::execute::Handler;
use crate::mmu::raw::HostAddress;

mod build;
mod model;
#[doc(hidden)]
pub mod probe;
mod select;
mod select_control;
mod select_data;

/// Operations per block.
pub(crate) const MAX_OPS: usize = 64;
/// Bytes per block.
pub(crate) const MAX_BLOCK_BYTES: usize = 480;
/// Bound of the whole cache of one vCPU.
const MAX_BYTES: usize = 16 << 20;
/// Entries of the jump table.
const JUMPS: usize = 4096;
/// Buckets of the block index.
const BUCKETS: usize = 16384;
/// "No block."
const NONE: u32 = u32::MAX;

/// No register.
pub(crate) const REG_NONE: u8 = 16;
/// RIP as a base.
pub(crate) const REG_RIP: u8 = 17;

/// One instruction, digested. What the fields mean beyond their usual sense is the handler's business.
#[derive(Clone, Copy)]
#[repr(C)]
pub(crate) struct Op {
    /// Executes it.
    pub(crate) handler: Handler,
    /// Immediate, sign-extended to 64 bits; a branch's displacement from the instruction's start; an index
    /// into the block cache's instructions for rare ones.
    pub(crate) imm: u64,
    /// Displacement of the memory operand.
    pub(crate) disp: i32,
    /// Bytes between the start of the block and that of the instruction.
    pub(crate) offset: u16,
    /// Length in bytes.
    pub(crate) len: u8,
    /// Destination register; bit 4: its second byte (AH and so on).
    pub(crate) dst: u8,
    /// Source register, likewise.
    pub(crate) src: u8,
    /// Base register, [`REG_NONE`] or [`REG_RIP`].
    pub(crate) base: u8,
    /// Index register or [`REG_NONE`].
    pub(crate) index: u8,
    /// log2 of the scale.
    pub(crate) shift: u8,
    /// Segment of the memory operand.
    pub(crate) segment: u8,
    /// Address size in bytes (2, 4, 8) in bits 3..0; the handler's own flags above.
    pub(crate) flags: u8,
}

const _: () = assert!(size_of::<Op>() == 32);

impl Op {
    pub(crate) fn new(handler: Handler) -> Self {
        Self {
            handler,
            imm: 0,
            disp: 0,
            offset: 0,
            len: 0,
            dst: 0,
            src: 0,
            base: REG_NONE,
            index: REG_NONE,
            shift: 0,
            segment: 3,
            flags: 8,
        }
    }
}

/// The page of a block's bytes: where its version is, and which version was decoded.
#[derive(Clone, Copy)]
struct PageVersion {
    version: HostAddress,
    seen: u32,
    /// First byte of the page in the host.
    page: HostAddress,
    ram: u32,
    frame_in_ram: u32,
}

impl PageVersion {
    /// Whether nobody stored to the page since.
    #[inline(always)]
    fn current(&self) -> bool {
        self.version.counter() == self.seen
    }
}

/// A decoded run.
#[derive(Clone, Copy)]
pub(crate) struct Block {
    page: PageVersion,
    /// Index into `seconds` for an instruction that straddles pages.
    second: u32,
    /// First op.
    start: u32,
    /// Number of ops.
    count: u16,
    /// Length of the code.
    bytes: u16,
    /// Where its bytes are kept.
    bytes_at: u32,
    /// Host address of the first byte.
    host: HostAddress,
    /// See [`key`].
    key: u32,
    /// Next block of the bucket.
    next: u32,
}

impl Block {
    /// Length of the code.
    #[inline(always)]
    pub(crate) fn len(&self) -> u64 {
        u64::from(self.bytes)
    }
}

#[derive(Clone, Copy)]
struct Jump {
    linear: u64,
    context: u64,
    block: u32,
}

const NO_JUMP: Jump = Jump { linear: u64::MAX, context: u64::MAX, block: NONE };

/// The decoded code of one vCPU.
#[derive(Default)]
pub struct CodeCache {
    inner: Option<Box<Blocks>>,
}

impl CodeCache {
    /// The blocks, out of the [`Cpu`] while they run.
    pub(crate) fn take(&mut self) -> Box<Blocks> {
        self.inner.take().unwrap_or_default()
    }
    /// Puts them back.
    pub(crate) fn restore(&mut self, blocks: Box<Blocks>) {
        self.inner = Some(blocks);
    }
    /// Forgets all decoded code (a state was loaded, the machine was reset).
    pub fn clear(&mut self) {
        self.inner = None;
    }
}

/// The tables behind [`CodeCache`].
pub(crate) struct Blocks {
    jumps: Box<[Jump]>,
    buckets: Box<[u32]>,
    pub(crate) blocks: Vec<Block>,
    pub(crate) ops: Vec<Op>,
    bytes: Vec<u8>,
    seconds: Vec<PageVersion>,
    pub(crate) instructions: Vec<Instruction>,
    /// Keeps alive the memory that blocks point into.
    rams: Vec<Arc<RamBlock>>,
}

impl Default for Blocks {
    fn default() -> Self {
        Self {
            jumps: vec![NO_JUMP; JUMPS].into_boxed_slice(),
            buckets: vec![NONE; BUCKETS].into_boxed_slice(),
            blocks: Vec::new(),
            ops: Vec::new(),
            bytes: Vec::new(),
            seconds: Vec::new(),
            instructions: Vec::new(),
            rams: Vec::new(),
        }
    }
}

#[inline(always)]
fn jump_slot(linear: u64) -> usize {
    (linear ^ linear >> 12) as usize & (JUMPS - 1)
}

fn bucket_of(host: HostAddress) -> usize {
    (host.get().wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 50) as usize & (BUCKETS - 1)
}

/// What besides the bytes decides how code is decoded: code size, stack size, whether CPL is 3 (so that a
/// jump table entry learned at CPL 0 does not lead user code into a supervisor page), and protected mode (VEX).
pub(crate) fn key(cpu: &Cpu) -> u32 {
    let size = |bits: u32| bits >> 5;
    size(cpu.mode.bits)
        | size(cpu.mode.stack_bits) << 2
        | u32::from(cpu.mode.cpl == 3) << 4
        | u32::from(cpu.mode.protected) << 5
}

impl Blocks {
    /// The block at `linear` if the jump table knows it and its page is unchanged.
    #[inline(always)]
    pub(crate) fn known(&self, linear: u64, context: u64) -> Option<u32> {
        let jump = &self.jumps[jump_slot(linear)];
        if jump.linear != linear || jump.context != context {
            return None;
        }
        let block = self.blocks.get(jump.block as usize)?;
        // The second page's translation is that of when the jump was learned, as its context says.
        let second = block.second == NONE || self.seconds.get(block.second as usize)?.current();
        (block.page.current() && second).then_some(jump.block)
    }

    /// A block's ops.
    #[inline(always)]
    pub(crate) fn ops_of(&self, block: &Block) -> &[Op] {
        &self.ops[block.start as usize..block.start as usize + block.count as usize]
    }

    /// Remembers where `linear` leads.
    fn learn(&mut self, linear: u64, context: u64, block: u32) {
        self.jumps[jump_slot(linear)] = Jump { linear, context, block };
    }

    /// Memory that is in use, in bytes.
    pub(crate) fn footprint(&self) -> usize {
        self.ops.len() * size_of::<Op>()
            + self.bytes.len()
            + self.blocks.len() * size_of::<Block>()
            + self.instructions.len() * size_of::<Instruction>()
    }

    fn clear(&mut self) {
        self.jumps.fill(NO_JUMP);
        self.buckets.fill(NONE);
        self.blocks.clear();
        self.ops.clear();
        self.bytes.clear();
        self.seconds.clear();
        self.instructions.clear();
        self.rams.clear();
    }

    fn in_bucket(&self, host: HostAddress, key: u32) -> Option<u32> {
        let mut at = self.buckets[bucket_of(host)];
        while let Some(block) = self.blocks.get(at as usize) {
            if block.host == host && block.key == key {
                return Some(at);
            }
            at = block.next;
        }
        None
    }

    /// Takes block `at` out of its bucket.
    fn unlink(&mut self, at: u32) {
        let Some(gone) = self.blocks.get(at as usize).copied() else { return };
        let bucket = bucket_of(gone.host);
        if self.buckets[bucket] == at {
            self.buckets[bucket] = gone.next;
            return;
        }
        let mut previous = self.buckets[bucket];
        while let Some(block) = self.blocks.get_mut(previous as usize) {
            if block.next == at {
                block.next = gone.next;
                return;
            }
            previous = block.next;
        }
    }

    fn ram_index(&mut self, ram: &Arc<RamBlock>) -> u32 {
        match self.rams.iter().position(|r| Arc::ptr_eq(r, ram)) {
            Some(i) => i as u32,
            None => {
                self.rams.push(ram.clone());
                self.rams.len() as u32 - 1
            }
        }
    }
}
