//! IRET in every mode (Intel SDM vol. 2 under IRET).
//!
//! ```text
//! real, virtual-8086 with IOPL 3 ─► pop IP, CS, FLAGS
//! protected, NT set              ─► back link of the TSS (task.rs)        (#GP in long mode)
//! protected, VM set in the image ─► virtual-8086 mode                     (CPL 0, outside long mode)
//! protected                      ─► same privilege │ outer privilege
//! 64-bit mode                    ─► always pops SS:RSP
//! ```

use atoll_machine::backend::CpuIo;
use atoll_machine::cpu::state::{gpr, seg};

use super::far::{OuterFrame, check_return_code, return_outward};
use super::memory::{Stack, load, table_address};
use super::segments::{check_target, commit_code, load_real, v8086_segment};
use super::task::{self, Switch};
use crate::access::Access;
use crate::cpu::{Cpu, flag};
use crate::exception::{Exception, Outcome};

/// Flags that any privilege level may change.
const USER_FLAGS: u64 = flag::ARITHMETIC | flag::TF | flag::DF | flag::NT;

/// IRET with operands of `size` bytes. NMIs are unblocked even when it faults.
pub(crate) fn execute(cpu: &mut Cpu, io: &dyn CpuIo, size: u32) -> Outcome {
    cpu.nmi_blocked = false;
    if cpu.mode.protected {
        protected(cpu, io, size)?;
    } else if cpu.mode.v8086 && cpu.rflags & flag::IOPL != flag::IOPL {
        return Err(Exception::GP0);
    } else {
        real(cpu, io, size)?;
    }
    super::recheck_events(cpu);
    Ok(())
}

fn real(cpu: &mut Cpu, io: &dyn CpuIo, size: u32) -> Outcome {
    let mut stack = Stack::current(cpu);
    let rip = stack.pop(cpu, io, size)?;
    let selector = stack.pop(cpu, io, size)? as u16;
    let image = stack.pop(cpu, io, size)?;
    if rip > u64::from(cpu.segments[seg::CS].limit) {
        return Err(Exception::GP0);
    }
    stack.commit(cpu);
    let mut writable = USER_FLAGS | flag::IF;
    if !cpu.mode.v8086 {
        writable |= flag::IOPL;
    }
    if size == 4 {
        writable |= flag::RF | flag::AC | flag::ID;
    }
    load_real(cpu, seg::CS, selector);
    set_flags(cpu, image, writable);
    cpu.next_rip = rip;
    cpu.refresh_mode();
    Ok(())
}

/// Replaces the `writable` bits of RFLAGS.
fn set_flags(cpu: &mut Cpu, image: u64, writable: u64) {
    cpu.rflags = cpu.rflags & !writable | image & writable | 2;
}

/// What IRET may change in RFLAGS at privilege `cpl`, with operands of `size` bytes.
fn writable_flags(cpu: &Cpu, size: u32) -> u64 {
    let cpl = u64::from(cpu.mode.cpl);
    let iopl = (cpu.rflags & flag::IOPL) >> 12;
    let mut writable = USER_FLAGS;
    if size > 2 {
        writable |= flag::RF | flag::AC | flag::ID;
    }
    if cpl <= iopl {
        writable |= flag::IF;
    }
    if cpl == 0 {
        writable |= flag::IOPL;
        if size > 2 {
            writable |= flag::VIF | flag::VIP;
        }
    }
    writable
}

fn protected(cpu: &mut Cpu, io: &dyn CpuIo, size: u32) -> Outcome {
    if cpu.rflags & flag::NT != 0 {
        return return_from_task(cpu, io);
    }
    let mut stack = Stack::current(cpu);
    let rip = stack.pop(cpu, io, size)?;
    let selector = stack.pop(cpu, io, size)? as u16;
    let image = stack.pop(cpu, io, size)?;
    if size == 4 && image & flag::VM != 0 && cpu.mode.cpl == 0 && !cpu.mode.long {
        return to_v8086(cpu, io, stack, rip, selector, image);
    }
    let mut code = check_return_code(cpu, io, selector)?;
    let rpl = selector as u8 & 3;
    let writable = writable_flags(cpu, size);
    if cpu.mode.bits == 64 || rpl > cpu.mode.cpl {
        let pointer = stack.pop(cpu, io, size)?;
        let stack_selector = stack.pop(cpu, io, size)? as u16;
        let frame = OuterFrame { rip, selector, pointer, stack_selector };
        return_outward(cpu, io, frame, &mut code, 0)?;
    } else {
        check_target(cpu, &code, rip)?;
        code.mark_accessed(cpu, io)?;
        stack.commit(cpu);
        commit_code(cpu, selector, &code, rpl, rip);
    }
    set_flags(cpu, image, writable);
    cpu.refresh_mode();
    Ok(())
}

fn return_from_task(cpu: &mut Cpu, io: &dyn CpuIo) -> Outcome {
    if cpu.mode.long {
        return Err(Exception::GP0);
    }
    let linear = table_address(cpu, cpu.tr.base, 0);
    let link = load(cpu, io, linear, 2, Access::SystemRead)? as u16;
    task::switch(cpu, io, link, Switch::Return, None, super::descriptor::ts)
}

/// Enters virtual-8086 mode.
fn to_v8086(cpu: &mut Cpu, io: &dyn CpuIo, mut stack: Stack, rip: u64, code: u16, image: u64) -> Outcome {
    let pointer = stack.pop(cpu, io, 4)?;
    let mut selectors = [0u16; 5];
    for selector in &mut selectors {
        *selector = stack.pop(cpu, io, 4)? as u16;
    }
    if rip > 0xffff {
        return Err(Exception::GP0);
    }
    let [ss, es, ds, fs, gs] = selectors;
    let writable = USER_FLAGS
        | flag::RF
        | flag::AC
        | flag::ID
        | flag::IF
        | flag::IOPL
        | flag::VIF
        | flag::VIP
        | flag::VM;
    set_flags(cpu, image, writable);
    cpu.segments = [es, code, ss, ds, fs, gs].map(v8086_segment);
    cpu.gpr[gpr::RSP] = pointer;
    cpu.next_rip = rip;
    cpu.refresh_mode();
    Ok(())
}
