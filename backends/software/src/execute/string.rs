//! String instructions with and without REP, and string port I/O.
//!
//! ```text
//! REP ──► run of elements inside one page of RAM each ──► one host `rep movs` / `rep stos`
//!   │         otherwise one element through access.rs (faults, devices, page crossings)
//!   ├── counter and pointers are exact after every run, so a fault or an interrupt resumes where it stopped
//!   └── requests are looked at between runs: Flow::Again leaves RIP at the instruction
//! ```

use std::sync::atomic::Ordering;

use atoll_machine::cpu::state::{gpr, seg};

use crate::access::Access;
use crate::cpu::{Cpu, flag};
use crate::decode::Op;
use crate::exception::Outcome;
use crate::execute::alu::{CMP, binary};
use crate::execute::operand::{FLAG_LOCK, FLAG_REP, Operand};
use crate::execute::{Env, Flow};
use crate::host::arith::Arith;
use crate::mmu::raw::{self, HostAddress};

/// [`Op::flags`] of string instructions: REPNE prefix.
pub(crate) const FLAG_REPNE: u8 = FLAG_LOCK;

/// Elements between two looks at requests.
const ELEMENTS_PER_LOOK: u64 = 4096;
/// Elements until the run loop gets control, which looks at timers.
const ELEMENTS_PER_TURN: u64 = 1 << 17;

/// Registers and address size of a string instruction.
#[derive(Clone, Copy)]
struct Shape {
    mask: u64,
    /// Bytes from one element to the next, signed.
    step: u64,
    source: usize,
    repeated: bool,
}

impl Shape {
    fn of<T: Operand>(cpu: &Cpu, op: &Op) -> Self {
        let mask = match op.flags & 15 {
            2 => 0xffff,
            4 => 0xffff_ffff,
            _ => u64::MAX,
        };
        let down = cpu.rflags & flag::DF != 0;
        let step = if down { T::BYTES.wrapping_neg() } else { T::BYTES };
        let repeated = op.flags & (FLAG_REP | FLAG_REPNE) != 0;
        Self { mask, step, source: op.segment as usize, repeated }
    }

    fn down(&self) -> bool {
        self.step >> 63 != 0
    }

    fn get(&self, cpu: &Cpu, register: usize) -> u64 {
        cpu.gpr[register] & self.mask
    }

    /// Adds to a pointer or counter as its width has it.
    fn add(&self, cpu: &mut Cpu, register: usize, amount: u64) {
        let new = cpu.gpr[register].wrapping_add(amount) & self.mask;
        cpu.gpr[register] = if self.mask == 0xffff { cpu.gpr[register] & !0xffff | new } else { new };
    }

    fn advance(&self, cpu: &mut Cpu, register: usize, elements: u64) {
        self.add(cpu, register, self.step.wrapping_mul(elements));
    }
}

/// Repeats `run` (which executes 1 to `limit` elements and says how many, and whether to stop) as the prefixes
/// ask.
#[inline(always)]
fn repeat(cpu: &mut Cpu, shape: Shape, mut run: impl FnMut(&mut Cpu, u64) -> Outcome<(u64, bool)>) -> Flow {
    if !shape.repeated {
        let outcome = run(cpu, 1).map(|_| ());
        return cpu.flow(outcome, Flow::Next);
    }
    let single = cpu.rflags & flag::TF != 0 || cpu.mmu.watching();
    let mut total = 0;
    loop {
        let left = shape.get(cpu, gpr::RCX);
        if left == 0 {
            return Flow::Next;
        }
        let (done, stop) = match run(cpu, if single { 1 } else { left.min(ELEMENTS_PER_LOOK) }) {
            Ok(result) => result,
            Err(exception) => return cpu.fault(exception),
        };
        shape.add(cpu, gpr::RCX, done.wrapping_neg());
        if stop || left == done {
            return Flow::Next;
        }
        let looks = total / ELEMENTS_PER_LOOK;
        total += done;
        let asked = total / ELEMENTS_PER_LOOK != looks && cpu.requests.load(Ordering::Relaxed) != 0;
        if single || asked || total >= ELEMENTS_PER_TURN {
            return Flow::Again;
        }
    }
}

/// How many of `count` elements from `offset` onwards lie in the same page, and their lowest offset.
fn run_in_page<T: Operand>(shape: Shape, linear: u64, count: u64) -> u64 {
    let inside = linear & 0xfff;
    let fit = if shape.down() { inside / T::BYTES + 1 } else { (0x1000 - inside) / T::BYTES };
    count.min(fit)
}

/// Host address of the lowest of `count` elements at `segment:offset`, if one page of cached RAM holds them all
/// and neither the segment nor the address size ends inside.
fn run_address<T: Operand>(
    cpu: &mut Cpu,
    shape: Shape,
    segment: usize,
    offset: u64,
    count: u64,
    write: bool,
) -> Option<(HostAddress, u64)> {
    let low = if shape.down() { offset.checked_sub((count - 1) * T::BYTES)? } else { offset };
    let bytes = count * T::BYTES;
    if low.checked_add(bytes - 1)? > shape.mask {
        return None;
    }
    let access = if write { Access::Write } else { Access::Read };
    let linear = cpu.linear(segment, low, bytes, access).ok()?;
    Some((cpu.run_of_bytes(linear, bytes, write)?, linear))
}

fn linear_of<T: Operand>(cpu: &Cpu, segment: usize, offset: u64, access: Access) -> Outcome<u64> {
    cpu.linear(segment, offset, T::BYTES, access)
}

fn load_element<T: Operand>(cpu: &mut Cpu, env: &Env<'_>, segment: usize, offset: u64) -> Outcome<T> {
    let linear = linear_of::<T>(cpu, segment, offset, Access::Read)?;
    cpu.load::<T>(env.io, segment, linear)
}

fn store_element<T: Operand>(cpu: &mut Cpu, env: &Env<'_>, offset: u64, value: T) -> Outcome {
    let linear = linear_of::<T>(cpu, seg::ES, offset, Access::Write)?;
    cpu.store::<T>(env.io, seg::ES, linear, value)
}

/// MOVS.
pub(crate) fn movs<T: Operand>(cpu: &mut Cpu, env: &Env<'_>, op: &Op) -> Flow {
    let shape = Shape::of::<T>(cpu, op);
    repeat(cpu, shape, |cpu, limit| {
        let (from, to) = (shape.get(cpu, gpr::RSI), shape.get(cpu, gpr::RDI));
        let done = match movs_run::<T>(cpu, shape, from, to, limit) {
            Some(done) => done,
            None => {
                let value = load_element::<T>(cpu, env, shape.source, from)?;
                store_element::<T>(cpu, env, to, value)?;
                1
            }
        };
        shape.advance(cpu, gpr::RSI, done);
        shape.advance(cpu, gpr::RDI, done);
        Ok((done, false))
    })
}

/// Moves as many of `limit` elements as one host instruction can.
fn movs_run<T: Operand>(cpu: &mut Cpu, shape: Shape, from: u64, to: u64, limit: u64) -> Option<u64> {
    if limit < 2 {
        return None;
    }
    let source = linear_of::<T>(cpu, shape.source, from, Access::Read).ok()?;
    let target = linear_of::<T>(cpu, seg::ES, to, Access::Write).ok()?;
    let count = run_in_page::<T>(shape, source, limit).min(run_in_page::<T>(shape, target, limit));
    if count < 2 {
        return None;
    }
    let (source, _) = run_address::<T>(cpu, shape, shape.source, from, count, false)?;
    let (target, linear) = run_address::<T>(cpu, shape, seg::ES, to, count, true)?;
    let last = if shape.down() { (count - 1) * T::BYTES } else { 0 };
    raw::rep_movs::<T>(source.plus(last), target.plus(last), count, shape.down());
    cpu.stored_run(linear, count * T::BYTES);
    Some(count)
}

/// STOS.
pub(crate) fn stos<T: Operand>(cpu: &mut Cpu, env: &Env<'_>, op: &Op) -> Flow {
    let shape = Shape::of::<T>(cpu, op);
    repeat(cpu, shape, |cpu, limit| {
        let to = shape.get(cpu, gpr::RDI);
        let value = T::get(cpu, 0);
        let done = match stos_run::<T>(cpu, shape, to, value, limit) {
            Some(done) => done,
            None => {
                store_element::<T>(cpu, env, to, value)?;
                1
            }
        };
        shape.advance(cpu, gpr::RDI, done);
        Ok((done, false))
    })
}

fn stos_run<T: Operand>(cpu: &mut Cpu, shape: Shape, to: u64, value: T, limit: u64) -> Option<u64> {
    if limit < 2 {
        return None;
    }
    let target = linear_of::<T>(cpu, seg::ES, to, Access::Write).ok()?;
    let count = run_in_page::<T>(shape, target, limit);
    if count < 2 {
        return None;
    }
    let (target, linear) = run_address::<T>(cpu, shape, seg::ES, to, count, true)?;
    raw::rep_stos::<T>(target, value, count);
    cpu.stored_run(linear, count * T::BYTES);
    Some(count)
}

/// LODS.
pub(crate) fn lods<T: Operand>(cpu: &mut Cpu, env: &Env<'_>, op: &Op) -> Flow {
    let shape = Shape::of::<T>(cpu, op);
    repeat(cpu, shape, |cpu, _| {
        let value = load_element::<T>(cpu, env, shape.source, shape.get(cpu, gpr::RSI))?;
        T::set(cpu, 0, value);
        shape.advance(cpu, gpr::RSI, 1);
        Ok((1, false))
    })
}

/// Whether REPE or REPNE ends after a comparison.
fn ends(cpu: &Cpu, op: &Op) -> bool {
    let equal = cpu.rflags & flag::ZF != 0;
    if op.flags & FLAG_REPNE != 0 { equal } else { !equal }
}

/// CMPS.
pub(crate) fn cmps<T: Arith>(cpu: &mut Cpu, env: &Env<'_>, op: &Op) -> Flow {
    let shape = Shape::of::<T>(cpu, op);
    repeat(cpu, shape, |cpu, _| {
        let a = load_element::<T>(cpu, env, shape.source, shape.get(cpu, gpr::RSI))?;
        let b = load_element::<T>(cpu, env, seg::ES, shape.get(cpu, gpr::RDI))?;
        binary::<T, CMP>(&mut cpu.rflags, a, b);
        shape.advance(cpu, gpr::RSI, 1);
        shape.advance(cpu, gpr::RDI, 1);
        Ok((1, ends(cpu, op)))
    })
}

/// SCAS.
pub(crate) fn scas<T: Arith>(cpu: &mut Cpu, env: &Env<'_>, op: &Op) -> Flow {
    let shape = Shape::of::<T>(cpu, op);
    repeat(cpu, shape, |cpu, _| {
        let b = load_element::<T>(cpu, env, seg::ES, shape.get(cpu, gpr::RDI))?;
        let a = T::get(cpu, 0);
        binary::<T, CMP>(&mut cpu.rflags, a, b);
        shape.advance(cpu, gpr::RDI, 1);
        Ok((1, ends(cpu, op)))
    })
}

/// The port's permission counts even when a repeated instruction has nothing to do.
fn permit_port<T: Operand>(cpu: &mut Cpu, env: &Env<'_>) -> Outcome {
    let port = cpu.gpr[gpr::RDX] as u16;
    crate::system::check_io_permission(cpu, env.io, port, T::BYTES as u32)
}

/// INS: permission for the port, then for the memory, then the device.
pub(crate) fn ins<T: Operand>(cpu: &mut Cpu, env: &Env<'_>, op: &Op) -> Flow {
    let shape = Shape::of::<T>(cpu, op);
    if let Err(exception) = permit_port::<T>(cpu, env) {
        return cpu.fault(exception);
    }
    repeat(cpu, shape, |cpu, _| {
        let port = cpu.gpr[gpr::RDX] as u16;
        crate::system::check_io_permission(cpu, env.io, port, T::BYTES as u32)?;
        let to = shape.get(cpu, gpr::RDI);
        let linear = linear_of::<T>(cpu, seg::ES, to, Access::Write)?;
        cpu.probe(env.io, linear, T::BYTES, Access::Write)?;
        let mut bytes = [0; 8];
        env.io.port_read(port, &mut bytes[..T::BYTES as usize]);
        after_port(cpu);
        cpu.store::<T>(env.io, seg::ES, linear, T::from_u64(u64::from_le_bytes(bytes)))?;
        shape.advance(cpu, gpr::RDI, 1);
        Ok((1, false))
    })
}

/// OUTS: permission for the port, then the memory, then the device.
pub(crate) fn outs<T: Operand>(cpu: &mut Cpu, env: &Env<'_>, op: &Op) -> Flow {
    let shape = Shape::of::<T>(cpu, op);
    if let Err(exception) = permit_port::<T>(cpu, env) {
        return cpu.fault(exception);
    }
    repeat(cpu, shape, |cpu, _| {
        let port = cpu.gpr[gpr::RDX] as u16;
        crate::system::check_io_permission(cpu, env.io, port, T::BYTES as u32)?;
        let value = load_element::<T>(cpu, env, shape.source, shape.get(cpu, gpr::RSI))?;
        env.io.port_write(port, &value.to_u64().to_le_bytes()[..T::BYTES as usize]);
        after_port(cpu);
        shape.advance(cpu, gpr::RSI, 1);
        Ok((1, false))
    })
}

/// A device may have changed the address space or raised an interrupt.
fn after_port(cpu: &mut Cpu) {
    cpu.mmu.device_touched = true;
    cpu.exec.leave_block();
}
