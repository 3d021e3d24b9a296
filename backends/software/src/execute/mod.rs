//! The interpreter's loop and the integer instructions.
//!
//! ```text
//!          ┌──────────────────────────── Next ───────────────────────────┐
//!          ▼                                                             │
//! run ─► block at RIP ─► op ─► handler ─┬─ End (branch) ─► next block    │
//!          ▲   ▲                        ├─ System ─► refresh translation, look at recheck / activity
//!          │   └── version changed      ├─ Again (string interrupted) ─► Leave::Events, RIP unchanged
//!          │                            ├─ Fault ─► Leave::Exception, RIP unchanged
//!          └── requests, budget         └─ Next ─────────────────────────┘
//! ```
//!
//! While a block runs, `cpu.rip` is the address of its first instruction; a handler that needs its own address
//! adds its op's offset. RIP and the count of retired instructions are exact whenever `run` returns and
//! whenever an instruction of `system/` or `fpu/` executes.
//!
//! A store that hits a page of code, and any device access, calls [`ExecState::leave_block`]: the block ends
//! after the instruction, and the next one is looked up again, so changed code and a changed address space
//! are seen by the very next instruction.

//! # What the speed comes from
//!
//! `examples/mips.rs` on one virtual EPYC core, millions of guest instructions per second of processor time:
//!
//! | | ALU | memory | calls | branches |
//! |---|---|---|---|---|
//! | as it is | 435 | 333 | 250 | 232 |
//! | a block ends at every Jcc | 432 | 332 | 250 | 200 |
//! | one addressing form for all (`operand::ANY`) | 384 | 217 | 245 | 221 |
//! | no jump table: fetch TLB and buckets per block | 239 | 161 | 95 | 115 |
//!
//! Debian's 6.1 cloud kernel boots to its first look for a root file system in 1.32 G instructions and 4.9 s. Of
//! that a fifth is the dispatch loop below, 7 % walks of paging structures, 2 % decoding.

use std::sync::atomic::Ordering;

use atoll_machine::backend::CpuIo;
use atoll_machine::cpu::state::{Activity, seg};
use iced_x86::Instruction;

use crate::cpu::{Cpu, flag};
use crate::decode::{Block, Blocks, Op};
use crate::exception::{Exception, Outcome};

pub(crate) mod alu;
pub(crate) mod bits;
pub(crate) mod branch;
pub(crate) mod data;
pub(crate) mod legacy;
pub mod operand;
pub(crate) mod rare;
pub(crate) mod shift;
pub(crate) mod stack;
pub(crate) mod string;

/// Why the inner loop returned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Leave {
    /// The instruction at `rip` raised this; nothing of it was committed (see `Exception` for traps).
    Exception(Exception),
    /// Requests are pending, `recheck` was set, or the polling interval is over.
    Events,
    /// The instruction budget is used up.
    Budget,
    /// `cpu.activity` is no longer `Active` (HLT).
    Inactive,
}

/// Blocks between two looks at timers by the caller.
const POLL_BLOCKS: u32 = 2000;

/// How an op ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Flow {
    /// Go on with the next op.
    Next,
    /// `cpu.next_rip` says where to go on.
    End,
    /// Like `End`, after an instruction that may have changed mode, translation or pending events.
    System,
    /// The instruction is to be executed again (a string instruction between two chunks).
    Again,
    /// `cpu.exec.fault` was raised.
    Fault,
}

/// Executes one op.
pub(crate) type Handler = fn(&mut Cpu, &Env<'_>, &Op) -> Flow;

/// What handlers need besides the processor.
pub(crate) struct Env<'a> {
    /// Devices.
    pub(crate) io: &'a dyn CpuIo,
    /// Decoded instructions of rare ops.
    pub(crate) instructions: &'a [Instruction],
}

/// The interpreter's own state in a [`Cpu`]; nothing of it is architectural.
#[derive(Clone, Copy, Debug)]
pub struct ExecState {
    /// Ops of the running block to execute; 0 once the block is to be left.
    end: usize,
    /// What `Flow::Fault` means.
    pub(crate) fault: Exception,
    /// MAXPHYADDR.
    pub(crate) physical_bits: u32,
    /// Linear address of offset 0 of the code segment.
    code_base: u64,
    /// Last valid RIP outside 64-bit mode.
    pub(crate) code_limit: u64,
    /// All ones in 64-bit mode, else 32 ones.
    pub(crate) rip_mask: u64,
    /// See [`crate::decode::key`].
    pub(crate) key: u32,
    /// What the jump table's entries were learned under, for each half of the linear address space.
    contexts: [u64; 2],
}

impl Default for ExecState {
    fn default() -> Self {
        Self {
            end: 0,
            fault: Exception::UD,
            physical_bits: 40,
            code_base: 0,
            code_limit: 0,
            rip_mask: 0,
            key: 0,
            contexts: [0; 2],
        }
    }
}

impl ExecState {
    /// Ends the running block after the current instruction.
    #[inline]
    pub(crate) fn leave_block(&mut self) {
        self.end = 0;
    }
}

impl Cpu {
    /// Turns what an instruction's body returned into a flow.
    #[inline(always)]
    pub(crate) fn flow(&mut self, outcome: Outcome, success: Flow) -> Flow {
        match outcome {
            Ok(()) => success,
            Err(exception) => self.fault(exception),
        }
    }

    /// Raises `exception`.
    #[cold]
    #[inline(never)]
    pub(crate) fn fault(&mut self, exception: Exception) -> Flow {
        self.exec.fault = exception;
        Flow::Fault
    }

    /// Address of the instruction of `op`, while its block runs.
    #[inline(always)]
    pub(crate) fn op_rip(&self, op: &Op) -> u64 {
        self.rip.wrapping_add(u64::from(op.offset)) & self.exec.rip_mask
    }

    /// Address of the instruction after that of `op`.
    #[inline(always)]
    pub(crate) fn op_next_rip(&self, op: &Op) -> u64 {
        self.rip.wrapping_add(u64::from(op.offset) + u64::from(op.len)) & self.exec.rip_mask
    }

    /// Linear address of the code at RIP.
    #[inline(always)]
    pub(crate) fn fetch_linear(&self) -> u64 {
        self.rip.wrapping_add(self.exec.code_base) & self.exec.rip_mask
    }

    /// What the jump table's entry for `linear` must have been learned under.
    #[inline(always)]
    pub(crate) fn fetch_context(&self, linear: u64) -> u64 {
        self.exec.contexts[(linear >> 63) as usize]
    }

    /// First byte of the page after that of `linear`.
    pub(crate) fn linear_page_after(&self, linear: u64) -> u64 {
        ((linear | 0xfff).wrapping_add(1)) & self.exec.rip_mask
    }

    /// Brings everything derived from the mode up to date: translation, decode key, code segment.
    pub(crate) fn refresh_execution(&mut self) {
        self.refresh_translation();
        let long = self.mode.bits == 64;
        let cs = &self.segments[seg::CS];
        self.exec.code_base = if long { 0 } else { cs.base };
        self.exec.code_limit = if long { u64::MAX } else { u64::from(cs.limit) };
        self.exec.rip_mask = if long { u64::MAX } else { 0xffff_ffff };
        self.exec.key = crate::decode::key(self);
        let key = u64::from(self.exec.key) << 58;
        self.exec.contexts = self.mmu.fetch_contexts().map(|context| context ^ key);
        self.exec.physical_bits = u32::from(self.shared.model.physical_bits());
    }
}

/// Executes instructions until there is a reason to look up (whole blocks from the decode cache).
pub fn run(cpu: &mut Cpu, io: &dyn CpuIo) -> Leave {
    run_limited(cpu, io, u64::MAX)
}

/// Executes exactly one instruction (single step, breakpoints, interrupt shadow).
pub fn step(cpu: &mut Cpu, io: &dyn CpuIo) -> Leave {
    run_limited(cpu, io, 1)
}

fn run_limited(cpu: &mut Cpu, io: &dyn CpuIo, limit: u64) -> Leave {
    cpu.refresh_execution();
    cpu.recheck = false;
    // RF lasts for one instruction; what a fault of that instruction pushes has it set whatever it is here.
    cpu.rflags &= !flag::RF;
    let mut blocks = cpu.code.take();
    let leave = run_blocks(cpu, io, &mut blocks, limit);
    cpu.code.restore(blocks);
    leave
}

fn run_blocks(cpu: &mut Cpu, io: &dyn CpuIo, blocks: &mut Blocks, limit: u64) -> Leave {
    let stop_at = cpu.retired.saturating_add(limit);
    for _ in 0..POLL_BLOCKS {
        if cpu.activity != Activity::Active {
            return Leave::Inactive;
        }
        let budget = cpu.budget_end.min(stop_at).saturating_sub(cpu.retired);
        if budget == 0 {
            return if cpu.retired >= cpu.budget_end { Leave::Budget } else { Leave::Events };
        }
        let linear = cpu.fetch_linear();
        let at = match blocks.known(linear, cpu.fetch_context(linear)) {
            Some(at) => at,
            None => match blocks.find(cpu, io) {
                Ok(at) => at,
                Err(exception) => {
                    cpu.next_rip = cpu.rip;
                    return Leave::Exception(exception);
                }
            },
        };
        let Some(block) = blocks.blocks.get(at as usize) else { return Leave::Events };
        if let Some(leave) = run_block(cpu, io, blocks, block, budget) {
            return leave;
        }
        if cpu.requests.load(Ordering::Relaxed) != 0 {
            return Leave::Events;
        }
    }
    Leave::Events
}

/// Executes a block, or the part of it that `budget` and the code segment's limit allow.
#[inline(always)]
fn run_block(cpu: &mut Cpu, io: &dyn CpuIo, blocks: &Blocks, block: &Block, budget: u64) -> Option<Leave> {
    let ops = blocks.ops_of(block);
    let env = Env { io, instructions: &blocks.instructions };
    cpu.exec.end = ops.len().min(usize::try_from(budget).unwrap_or(usize::MAX));
    if cpu.rip.wrapping_add(block.len() - 1) > cpu.exec.code_limit {
        let inside = ops_inside_limit(cpu, ops);
        if inside == 0 {
            return Some(Leave::Exception(Exception::GP0));
        }
        cpu.exec.end = cpu.exec.end.min(inside);
    }
    let mut i = 0;
    let (flow, op) = loop {
        let op = &ops[i];
        let flow = (op.handler)(cpu, &env, op);
        i += 1;
        if flow != Flow::Next || i >= cpu.exec.end {
            break (flow, op);
        }
    };
    match flow {
        Flow::Next => {
            cpu.retired += i as u64;
            cpu.rip = cpu.op_next_rip(op);
        }
        Flow::End => {
            cpu.retired += i as u64;
            cpu.rip = cpu.next_rip;
        }
        _ => return leave_block_otherwise(cpu, flow, op, i as u64),
    }
    if cpu.exec.end == 0 { after_early_leave(cpu) } else { None }
}

/// Ops that lie wholly inside the code segment's limit.
#[cold]
fn ops_inside_limit(cpu: &Cpu, ops: &[Op]) -> usize {
    let end = |op: &Op| cpu.rip.wrapping_add(u64::from(op.offset) + u64::from(op.len) - 1);
    ops.iter().take_while(|op| end(op) <= cpu.exec.code_limit).count()
}

/// After a store to code or a device access.
#[cold]
#[inline(never)]
fn after_early_leave(cpu: &mut Cpu) -> Option<Leave> {
    if cpu.mmu.device_touched {
        cpu.refresh_execution();
    }
    (cpu.recheck || cpu.mmu.watch_hits != 0).then_some(Leave::Events)
}

#[cold]
#[inline(never)]
fn leave_block_otherwise(cpu: &mut Cpu, flow: Flow, op: &Op, executed: u64) -> Option<Leave> {
    match flow {
        Flow::System => {
            cpu.retired += executed;
            cpu.rip = cpu.next_rip;
            cpu.refresh_execution();
            if cpu.activity != Activity::Active {
                return Some(Leave::Inactive);
            }
            (cpu.recheck || cpu.mmu.watch_hits != 0).then_some(Leave::Events)
        }
        Flow::Again => {
            cpu.retired += executed - 1;
            cpu.rip = cpu.op_rip(op);
            cpu.next_rip = cpu.rip;
            if cpu.mmu.device_touched {
                cpu.refresh_execution();
            }
            Some(Leave::Events)
        }
        _ => {
            cpu.retired += executed - 1;
            let next = cpu.op_next_rip(op);
            cpu.rip = cpu.op_rip(op);
            cpu.next_rip = next;
            Some(Leave::Exception(cpu.exec.fault))
        }
    }
}

#[cfg(test)]
mod tests;
