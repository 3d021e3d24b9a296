//! Debug registers, breakpoints and MOV DR (Intel SDM vol. 3, chapter 18).
//!
//! ```text
//! before an instruction: code breakpoint (RF clear) ─► #DB fault
//! after an instruction:  single step, data and I/O breakpoints, task-switch T flag ─► pending_debug
//! boundary:              pending_debug, no MOV SS shadow ─► #DB trap
//! ```

use atoll_machine::cpu::state::seg;
use iced_x86::Instruction;

use super::operand;
use crate::cpu::{Cpu, control, flag};
use crate::exception::{Exception, Outcome, vector};

/// DR6: a MOV DR met DR7.GD.
pub(crate) const DR6_BD: u64 = 1 << 13;
/// DR6: single step.
pub(crate) const DR6_BS: u64 = 1 << 14;
/// DR6: the new task's T flag.
pub(crate) const DR6_BT: u64 = 1 << 15;
/// DR6 bits that read as one.
pub(crate) const DR6_FIXED: u64 = 0xffff_0ff0;
/// DR7 bits L0 to L3.
pub(crate) const DR7_LOCAL: u64 = 0x55;
/// DR7: general detect.
pub(crate) const DR7_GD: u64 = 1 << 13;
/// DR7 bit that reads as one.
pub(crate) const DR7_FIXED: u64 = 1 << 10;
/// DR7 bits that may be set.
pub(crate) const DR7_WRITABLE: u64 = 0xffff_23ff;
const ENABLES: u64 = 0xff;

/// Kinds of breakpoint, the R/W field of DR7.
const EXECUTE: u64 = 0;
const WRITE: u64 = 1;
const PORT: u64 = 2;

fn enabled(cpu: &Cpu, n: usize) -> bool {
    cpu.dr7 >> (2 * n) & 3 != 0
}
fn condition(cpu: &Cpu, n: usize) -> u64 {
    cpu.dr7 >> (16 + 4 * n) & 3
}
fn length(cpu: &Cpu, n: usize) -> u64 {
    match cpu.dr7 >> (18 + 4 * n) & 3 {
        0 => 1,
        1 => 2,
        2 => 8,
        _ => 4,
    }
}

/// Whether any breakpoint is enabled: then instructions are executed one by one.
pub(crate) fn armed(cpu: &Cpu) -> bool {
    cpu.dr7 & ENABLES != 0
}

/// Tells the MMU whether data accesses have to be compared with breakpoints.
pub(crate) fn update_watch(cpu: &mut Cpu) {
    let data = (0..4).any(|n| enabled(cpu, n) && matches!(condition(cpu, n), WRITE | 3));
    cpu.mmu.set_watch(data);
}

/// DR6 bits of the code breakpoints that match the next instruction; 0 if none.
pub(crate) fn code_breakpoints(cpu: &Cpu) -> u64 {
    let linear = match cpu.mode.bits {
        64 => cpu.rip,
        _ => cpu.segments[seg::CS].base.wrapping_add(cpu.rip) & 0xffff_ffff,
    };
    (0..4)
        .filter(|&n| enabled(cpu, n) && condition(cpu, n) == EXECUTE && cpu.dr[n] == linear)
        .fold(0, |bits, n| bits | 1 << n)
}

/// Records the I/O breakpoints that an access of `size` bytes at `port` hits.
pub(crate) fn note_port(cpu: &mut Cpu, port: u16, size: u32) {
    if cpu.dr7 & ENABLES == 0 || cpu.cr4 & control::CR4_DE == 0 {
        return;
    }
    let (first, last) = (u64::from(port), u64::from(port) + u64::from(size) - 1);
    for n in 0..4 {
        if enabled(cpu, n) && condition(cpu, n) == PORT {
            let start = cpu.dr[n] & !(length(cpu, n) - 1);
            if first < start + length(cpu, n) && last >= start {
                cpu.system.debug_hits |= 1 << n;
            }
        }
    }
}

/// What the processor does to the debug registers on the way into the #DB handler.
pub(crate) fn enter_handler(cpu: &mut Cpu, dr6: u64) {
    let bits = dr6 | std::mem::take(&mut cpu.system.debug_fault);
    cpu.dr6 = cpu.dr6 & !0xf | bits;
    cpu.dr7 &= !DR7_GD;
}

/// A #DB fault that will set `dr6` bits.
pub(crate) fn fault(cpu: &mut Cpu, dr6: u64) -> Exception {
    cpu.system.debug_fault = dr6;
    Exception::fault(vector::DB)
}

/// MOV to and from DR.
pub(crate) fn execute_move(cpu: &mut Cpu, i: &Instruction) -> Outcome {
    let to = i.op_register(0).is_dr();
    let (debug, general) = if to { (0, 1) } else { (1, 0) };
    let mut number = i.op_register(debug).number();
    let general = operand::gpr_index(i.op_register(general));
    if matches!(number, 4 | 5) {
        if cpu.cr4 & control::CR4_DE != 0 {
            return Err(Exception::UD);
        }
        number += 2;
    }
    if number > 7 {
        return Err(Exception::UD);
    }
    if cpu.mode.cpl != 0 {
        return Err(Exception::GP0);
    }
    if cpu.dr7 & DR7_GD != 0 {
        return Err(fault(cpu, DR6_BD));
    }
    if to {
        return write(cpu, number, cpu.gpr[general]);
    }
    cpu.gpr[general] = match number {
        6 => cpu.dr6,
        7 => cpu.dr7,
        n => cpu.dr[n & 3],
    };
    if i.op_register(0).size() == 4 {
        cpu.gpr[general] &= 0xffff_ffff;
    }
    Ok(())
}

fn write(cpu: &mut Cpu, number: usize, value: u64) -> Outcome {
    let value = if cpu.mode.bits == 64 { value } else { value & 0xffff_ffff };
    if number >= 6 && value >> 32 != 0 {
        return Err(Exception::GP0);
    }
    match number {
        6 => cpu.dr6 = value & 0xe00f | DR6_FIXED,
        7 => cpu.dr7 = value & DR7_WRITABLE | DR7_FIXED,
        n => cpu.dr[n & 3] = value,
    }
    update_watch(cpu);
    cpu.recheck = true;
    Ok(())
}

/// Whether the boundary before the next instruction needs single-instruction execution: TF, RF, breakpoints
/// or an interrupt shadow.
pub(crate) fn needs_step(cpu: &Cpu) -> bool {
    cpu.rflags & (flag::TF | flag::RF) != 0 || cpu.interrupt_shadow || armed(cpu)
}
