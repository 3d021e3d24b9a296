//! SYSCALL, SYSRET, SYSENTER, SYSEXIT, SWAPGS and the FS/GS base instructions, with the differences between
//! the vendors (Intel SDM vol. 2; AMD APM vol. 3).
//!
//! | | Intel | AMD |
//! |---|---|---|
//! | SYSCALL, SYSRET outside 64-bit mode | #UD | work (CSTAR in compatibility mode, STAR in legacy mode) |
//! | SYSRET to a non-canonical address | #GP in ring 0 | faults at the target, in ring 3 |
//! | SYSENTER, SYSEXIT in long mode | work | #UD |

use atoll_machine::cpu::model::Vendor;
use atoll_machine::cpu::state::{Segment, gpr, seg};
use iced_x86::{Code, Instruction, Mnemonic};

use super::memory::is_canonical;
use super::operand;
use crate::cpu::{Cpu, control, flag};
use crate::exception::{Exception, Outcome};

const CODE64: u32 = 0xa09b;
const CODE32: u32 = 0xc09b;
const DATA: u32 = 0xc093;
const RING3: u32 = 3 << 5;

fn flat(selector: u64, attributes: u32) -> Segment {
    Segment { selector: selector as u16, base: 0, limit: u32::MAX, attributes }
}

fn amd(cpu: &Cpu) -> bool {
    cpu.shared.model.vendor == Vendor::Amd
}

/// SYSCALL.
pub(crate) fn syscall(cpu: &mut Cpu) -> Outcome {
    let usable = cpu.mode.protected && (cpu.mode.bits == 64 || amd(cpu));
    if cpu.efer & control::EFER_SCE == 0 || !usable {
        return Err(Exception::UD);
    }
    let star = cpu.system.msrs.star;
    let selector = star >> 32 & 0xfffc;
    cpu.gpr[gpr::RCX] = cpu.next_rip;
    if cpu.mode.long {
        cpu.gpr[gpr::R11] = cpu.rflags & !flag::RF;
        let target = if cpu.mode.bits == 64 { cpu.system.msrs.lstar } else { cpu.system.msrs.cstar };
        cpu.rflags = cpu.rflags & !(cpu.system.msrs.sfmask | flag::RF) | 2;
        cpu.segments[seg::CS] = flat(selector, CODE64);
        cpu.next_rip = target;
    } else {
        cpu.rflags &= !(flag::VM | flag::IF | flag::RF);
        cpu.segments[seg::CS] = flat(selector, CODE32);
        cpu.next_rip = star & 0xffff_ffff;
    }
    cpu.segments[seg::SS] = flat(selector.wrapping_add(8), DATA);
    finish(cpu);
    Ok(())
}

/// The single-step trap of SYSCALL and SYSRET follows the flags they leave behind, so that a debugger never
/// stops inside the kernel's entry.
fn finish(cpu: &mut Cpu) {
    cpu.system.step_flag = Some(cpu.rflags & flag::TF != 0);
    cpu.refresh_mode();
    super::recheck_events(cpu);
}

/// SYSRET, with a 64-bit or 32-bit target.
pub(crate) fn sysret(cpu: &mut Cpu, wide: bool) -> Outcome {
    let usable = cpu.mode.protected && (cpu.mode.bits == 64 || amd(cpu));
    if cpu.efer & control::EFER_SCE == 0 || !usable {
        return Err(Exception::UD);
    }
    if cpu.mode.cpl != 0 {
        return Err(Exception::GP0);
    }
    let target = cpu.gpr[gpr::RCX];
    if wide && !amd(cpu) && !is_canonical(target) {
        return Err(Exception::GP0);
    }
    let base = cpu.system.msrs.star >> 48;
    if cpu.mode.long {
        const RESTORED: u64 = 0x3c_7fd7;
        cpu.rflags = cpu.gpr[gpr::R11] & RESTORED | 2;
    } else {
        cpu.rflags |= flag::IF;
    }
    if wide {
        cpu.segments[seg::CS] = flat(base.wrapping_add(16) | 3, CODE64 | RING3);
        cpu.next_rip = target;
    } else {
        cpu.segments[seg::CS] = flat(base | 3, CODE32 | RING3);
        cpu.next_rip = target & 0xffff_ffff;
    }
    cpu.segments[seg::SS] = flat(base.wrapping_add(8) | 3, DATA | RING3);
    finish(cpu);
    Ok(())
}

fn sysenter_selector(cpu: &Cpu) -> Outcome<u64> {
    if cpu.mode.long && amd(cpu) {
        return Err(Exception::UD);
    }
    let selector = cpu.system.msrs.sysenter_cs & 0xfffc;
    if cpu.cr0 & control::CR0_PE == 0 || selector == 0 {
        return Err(Exception::GP0);
    }
    Ok(selector)
}

/// SYSENTER.
pub(crate) fn sysenter(cpu: &mut Cpu) -> Outcome {
    let selector = sysenter_selector(cpu)?;
    let msrs = &cpu.system.msrs;
    let (rip, rsp) = (msrs.sysenter_eip, msrs.sysenter_esp);
    cpu.rflags &= !(flag::VM | flag::IF | flag::RF);
    let (code, mask) = if cpu.mode.long { (CODE64, u64::MAX) } else { (CODE32, 0xffff_ffff) };
    cpu.segments[seg::CS] = flat(selector, code);
    cpu.segments[seg::SS] = flat(selector.wrapping_add(8), DATA);
    cpu.gpr[gpr::RSP] = rsp & mask;
    cpu.next_rip = rip & mask;
    cpu.refresh_mode();
    Ok(())
}

/// SYSEXIT, with a 64-bit or 32-bit target.
pub(crate) fn sysexit(cpu: &mut Cpu, wide: bool) -> Outcome {
    let selector = sysenter_selector(cpu)?;
    if cpu.mode.cpl != 0 || cpu.mode.v8086 {
        return Err(Exception::GP0);
    }
    let (rip, rsp) = (cpu.gpr[gpr::RDX], cpu.gpr[gpr::RCX]);
    if wide {
        if !is_canonical(rip) || !is_canonical(rsp) {
            return Err(Exception::GP0);
        }
        cpu.segments[seg::CS] = flat(selector.wrapping_add(32) | 3, CODE64 | RING3);
        cpu.segments[seg::SS] = flat(selector.wrapping_add(40) | 3, DATA | RING3);
        (cpu.next_rip, cpu.gpr[gpr::RSP]) = (rip, rsp);
    } else {
        cpu.segments[seg::CS] = flat(selector.wrapping_add(16) | 3, CODE32 | RING3);
        cpu.segments[seg::SS] = flat(selector.wrapping_add(24) | 3, DATA | RING3);
        (cpu.next_rip, cpu.gpr[gpr::RSP]) = (rip & 0xffff_ffff, rsp & 0xffff_ffff);
    }
    cpu.refresh_mode();
    Ok(())
}

/// Which of the four this is.
pub(crate) fn execute(cpu: &mut Cpu, i: &Instruction) -> Outcome {
    match i.mnemonic() {
        Mnemonic::Syscall => syscall(cpu),
        Mnemonic::Sysenter => sysenter(cpu),
        Mnemonic::Sysret | Mnemonic::Sysretq => sysret(cpu, i.code() == Code::Sysretq),
        _ => sysexit(cpu, i.code() == Code::Sysexitq),
    }
}

/// SWAPGS.
pub(crate) fn swapgs(cpu: &mut Cpu) -> Outcome {
    if cpu.mode.bits != 64 {
        return Err(Exception::UD);
    }
    if cpu.mode.cpl != 0 {
        return Err(Exception::GP0);
    }
    std::mem::swap(&mut cpu.segments[seg::GS].base, &mut cpu.system.msrs.kernel_gs_base);
    Ok(())
}

/// RDFSBASE, RDGSBASE, WRFSBASE, WRGSBASE.
pub(crate) fn execute_base(cpu: &mut Cpu, i: &Instruction) -> Outcome {
    if cpu.mode.bits != 64 || cpu.cr4 & control::CR4_FSGSBASE == 0 {
        return Err(Exception::UD);
    }
    let register = i.op_register(0);
    let segment = match i.mnemonic() {
        Mnemonic::Rdfsbase | Mnemonic::Wrfsbase => seg::FS,
        _ => seg::GS,
    };
    if matches!(i.mnemonic(), Mnemonic::Rdfsbase | Mnemonic::Rdgsbase) {
        operand::write_register(cpu, register, cpu.segments[segment].base);
        return Ok(());
    }
    let mut value = cpu.gpr[operand::gpr_index(register)];
    if register.size() == 4 {
        value &= 0xffff_ffff;
    }
    if !is_canonical(value) {
        return Err(Exception::GP0);
    }
    cpu.segments[segment].base = value;
    Ok(())
}
