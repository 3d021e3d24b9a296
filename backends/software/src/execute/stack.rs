//! PUSH, POP, PUSHA, POPA, ENTER, LEAVE.
//!
//! The `64` forms are for 64-bit operands in 64-bit mode; the others take operand size from their type and the
//! stack pointer's width from the mode. RSP changes only once every access has succeeded.

use atoll_machine::cpu::state::{gpr, seg};

use crate::access::Access;
use crate::cpu::Cpu;
use crate::decode::Op;
use crate::exception::{Exception, Outcome, vector};
use crate::execute::operand::{Operand, op_linear, op_linear_dyn};
use crate::execute::{Env, Flow};

/// Pushes 64 bits in 64-bit mode.
#[inline(always)]
pub(crate) fn push64(cpu: &mut Cpu, env: &Env<'_>, value: u64) -> Outcome {
    let sp = cpu.gpr[gpr::RSP].wrapping_sub(8);
    cpu.store::<u64>(env.io, seg::SS, sp, value)?;
    cpu.gpr[gpr::RSP] = sp;
    Ok(())
}

impl Cpu {
    fn stack_mask(&self) -> u64 {
        match self.mode.stack_bits {
            16 => 0xffff,
            32 => 0xffff_ffff,
            _ => u64::MAX,
        }
    }

    /// The stack pointer as the stack segment's size has it.
    pub(crate) fn stack_pointer(&self) -> u64 {
        self.gpr[gpr::RSP] & self.stack_mask()
    }

    /// Sets as much of RSP as the stack segment's size says.
    pub(crate) fn set_stack_pointer(&mut self, value: u64) {
        let mask = self.stack_mask();
        self.gpr[gpr::RSP] = match self.mode.stack_bits {
            16 => self.gpr[gpr::RSP] & !mask | value & mask,
            _ => value & mask,
        };
    }

    /// Writes `value` below the stack pointer `sp` and gives the new one.
    pub(crate) fn push_at<T: Operand>(&mut self, env: &Env<'_>, sp: u64, value: T) -> Outcome<u64> {
        let sp = sp.wrapping_sub(T::BYTES) & self.stack_mask();
        let linear = self.linear(seg::SS, sp, T::BYTES, Access::Write)?;
        self.store::<T>(env.io, seg::SS, linear, value)?;
        Ok(sp)
    }

    /// Reads at the stack pointer `sp` and gives the next one.
    pub(crate) fn pop_at<T: Operand>(&mut self, env: &Env<'_>, sp: u64) -> Outcome<(T, u64)> {
        let linear = self.linear(seg::SS, sp & self.stack_mask(), T::BYTES, Access::Read)?;
        let value = self.load::<T>(env.io, seg::SS, linear)?;
        Ok((value, sp.wrapping_add(T::BYTES) & self.stack_mask()))
    }

    /// What a push of `size` bytes at `linear` would fault with.
    pub(crate) fn probe_push(&mut self, env: &Env<'_>, linear: u64, size: u64) -> Outcome {
        if self.mmu.checks_alignment() && linear & (size - 1) != 0 {
            return Err(Exception::with_code(vector::AC, 0));
        }
        self.probe(env.io, linear, size, Access::Write)
    }

    /// PUSH.
    pub(crate) fn push<T: Operand>(&mut self, env: &Env<'_>, value: T) -> Outcome {
        let sp = self.push_at(env, self.stack_pointer(), value)?;
        self.set_stack_pointer(sp);
        Ok(())
    }
}

pub(crate) fn push64_r(cpu: &mut Cpu, env: &Env<'_>, op: &Op) -> Flow {
    let value = cpu.gpr[(op.src & 15) as usize];
    let outcome = push64(cpu, env, value);
    cpu.flow(outcome, Flow::Next)
}

pub(crate) fn push64_i(cpu: &mut Cpu, env: &Env<'_>, op: &Op) -> Flow {
    let outcome = push64(cpu, env, op.imm);
    cpu.flow(outcome, Flow::Next)
}

pub(crate) fn pop64_r(cpu: &mut Cpu, env: &Env<'_>, op: &Op) -> Flow {
    let sp = cpu.gpr[gpr::RSP];
    let outcome = cpu.load::<u64>(env.io, seg::SS, sp).map(|value| {
        cpu.gpr[gpr::RSP] = sp.wrapping_add(8);
        cpu.gpr[(op.dst & 15) as usize] = value;
    });
    cpu.flow(outcome, Flow::Next)
}

pub(crate) fn push_r<T: Operand>(cpu: &mut Cpu, env: &Env<'_>, op: &Op) -> Flow {
    let value = T::get(cpu, op.src);
    let outcome = cpu.push(env, value);
    cpu.flow(outcome, Flow::Next)
}

pub(crate) fn push_i<T: Operand>(cpu: &mut Cpu, env: &Env<'_>, op: &Op) -> Flow {
    let outcome = cpu.push(env, T::from_u64(op.imm));
    cpu.flow(outcome, Flow::Next)
}

pub(crate) fn push_m<T: Operand>(cpu: &mut Cpu, env: &Env<'_>, op: &Op) -> Flow {
    let outcome = op_linear_dyn(cpu, op, 0, T::BYTES, Access::Read)
        .and_then(|linear| cpu.load::<T>(env.io, op.segment as usize, linear))
        .and_then(|value| cpu.push(env, value));
    cpu.flow(outcome, Flow::Next)
}

pub(crate) fn pop_r<T: Operand>(cpu: &mut Cpu, env: &Env<'_>, op: &Op) -> Flow {
    let outcome = cpu.pop_at::<T>(env, cpu.stack_pointer()).map(|(value, sp)| {
        cpu.set_stack_pointer(sp);
        T::set(cpu, op.dst, value);
    });
    cpu.flow(outcome, Flow::Next)
}

/// POP memory: the address is computed with RSP already incremented.
pub(crate) fn pop_m<T: Operand>(cpu: &mut Cpu, env: &Env<'_>, op: &Op) -> Flow {
    fn body<T: Operand>(cpu: &mut Cpu, env: &Env<'_>, op: &Op) -> Outcome {
        let (value, sp) = cpu.pop_at::<T>(env, cpu.stack_pointer())?;
        let before = cpu.gpr[gpr::RSP];
        cpu.set_stack_pointer(sp);
        let outcome = op_linear_dyn(cpu, op, 0, T::BYTES, Access::Write)
            .and_then(|linear| cpu.store::<T>(env.io, op.segment as usize, linear, value));
        if outcome.is_err() {
            cpu.gpr[gpr::RSP] = before;
        }
        outcome
    }
    let outcome = body::<T>(cpu, env, op);
    cpu.flow(outcome, Flow::Next)
}

/// PUSHA, PUSHAD.
pub(crate) fn push_all<T: Operand>(cpu: &mut Cpu, env: &Env<'_>, _: &Op) -> Flow {
    fn body<T: Operand>(cpu: &mut Cpu, env: &Env<'_>) -> Outcome {
        // As processors do: one by one, so that a fault leaves what was written before it, RSP unchanged.
        let mut sp = cpu.stack_pointer();
        for register in 0..8u8 {
            let value = T::get(cpu, register);
            sp = cpu.push_at(env, sp, value)?;
        }
        cpu.set_stack_pointer(sp);
        Ok(())
    }
    let outcome = body::<T>(cpu, env);
    cpu.flow(outcome, Flow::Next)
}

/// POPA, POPAD: the image of rSP is skipped.
pub(crate) fn pop_all<T: Operand>(cpu: &mut Cpu, env: &Env<'_>, _: &Op) -> Flow {
    fn body<T: Operand>(cpu: &mut Cpu, env: &Env<'_>) -> Outcome {
        let mut sp = cpu.stack_pointer();
        // As processors do: one by one, so that a fault leaves what was read before it, RSP unchanged.
        for register in (0..8u8).rev() {
            let (value, next) = cpu.pop_at::<T>(env, sp)?;
            if usize::from(register) != gpr::RSP {
                T::set(cpu, register, value);
            }
            sp = next;
        }
        cpu.set_stack_pointer(sp);
        Ok(())
    }
    let outcome = body::<T>(cpu, env);
    cpu.flow(outcome, Flow::Next)
}

/// ENTER: `imm` is the frame size, `disp` the nesting level.
pub(crate) fn enter<T: Operand>(cpu: &mut Cpu, env: &Env<'_>, op: &Op) -> Flow {
    fn body<T: Operand>(cpu: &mut Cpu, env: &Env<'_>, op: &Op) -> Outcome {
        let level = op.disp & 31;
        let frame_pointer = cpu.gpr[gpr::RBP];
        let mut sp = cpu.push_at(env, cpu.stack_pointer(), T::from_u64(frame_pointer))?;
        // All of ESP, even on a 16-bit stack.
        let frame = cpu.gpr[gpr::RSP] & !cpu.stack_mask() | sp;
        if level > 0 {
            let mut outer = frame_pointer;
            for _ in 1..level {
                outer = outer.wrapping_sub(T::BYTES) & cpu.stack_mask();
                let (value, _) = cpu.pop_at::<T>(env, outer)?;
                sp = cpu.push_at(env, sp, value)?;
            }
            sp = cpu.push_at(env, sp, T::from_u64(frame))?;
        }
        let sp = sp.wrapping_sub(op.imm & 0xffff) & cpu.stack_mask();
        // The new top of stack must be writable (Intel SDM vol. 2, ENTER).
        let linear = cpu.linear(seg::SS, sp, T::BYTES, Access::Write)?;
        cpu.probe_push(env, linear, T::BYTES)?;
        cpu.set_stack_pointer(sp);
        T::set(cpu, gpr::RBP as u8, T::from_u64(frame));
        Ok(())
    }
    let outcome = body::<T>(cpu, env, op);
    cpu.flow(outcome, Flow::Next)
}

pub(crate) fn leave<T: Operand>(cpu: &mut Cpu, env: &Env<'_>, _: &Op) -> Flow {
    let frame = cpu.gpr[gpr::RBP] & cpu.stack_mask();
    let outcome = cpu.pop_at::<T>(env, frame).map(|(value, sp)| {
        cpu.set_stack_pointer(sp);
        T::set(cpu, gpr::RBP as u8, value);
    });
    cpu.flow(outcome, Flow::Next)
}

/// PUSH of 64-bit memory in 64-bit mode.
pub(crate) fn push64_m<const A: u8>(cpu: &mut Cpu, env: &Env<'_>, op: &Op) -> Flow {
    let outcome = op_linear::<A>(cpu, op, 8, Access::Read)
        .and_then(|linear| cpu.load::<u64>(env.io, op.segment as usize, linear))
        .and_then(|value| push64(cpu, env, value));
    cpu.flow(outcome, Flow::Next)
}
