//! The time-stamp counter (Intel SDM vol. 3, 18.17).
//!
//! guest TSC = clock's TSC + the machine's base (zero unless a state with another origin was loaded)
//!             + this processor's TSC_ADJUST

use std::sync::atomic::Ordering;

use atoll_machine::cpu::state::gpr;

use super::control::set_edx_eax;
use crate::cpu::{Cpu, control};
use crate::exception::{Exception, Outcome};

/// The TSC that the guest reads now.
pub(crate) fn guest_tsc(cpu: &Cpu) -> u64 {
    cpu.shared.clock.tsc().wrapping_add(offset(cpu))
}

/// Guest TSC minus the clock's.
pub(crate) fn offset(cpu: &Cpu) -> u64 {
    cpu.system.tsc_base.wrapping_add(cpu.system.tsc_adjust)
}

/// WRMSR to IA32_TIME_STAMP_COUNTER: the difference goes into TSC_ADJUST too.
pub(crate) fn write_tsc(cpu: &mut Cpu, value: u64) {
    let difference = value.wrapping_sub(guest_tsc(cpu));
    write_adjust(cpu, cpu.system.tsc_adjust.wrapping_add(difference));
}

/// WRMSR to IA32_TSC_ADJUST: moves the TSC by as much as the register changes.
pub(crate) fn write_adjust(cpu: &mut Cpu, value: u64) {
    cpu.system.tsc_adjust = value;
    // The deadline timer may be due by this.
    cpu.recheck = true;
    super::paravirt::refresh(cpu);
}

/// Adopts a saved TSC and TSC_ADJUST. A counter that continues this machine's clock (within a second) keeps
/// the machine's base, so that all vCPUs stay equal although their states are loaded one after the other;
/// another one moves the base.
pub(crate) fn restore(cpu: &mut Cpu, tsc: u64, adjust: u64) {
    cpu.system.tsc_adjust = adjust;
    let wanted = tsc.wrapping_sub(adjust).wrapping_sub(cpu.shared.clock.tsc()) as i64;
    let base = cpu.shared.tsc_base.load(Ordering::SeqCst);
    let second = i64::from(cpu.shared.clock.tsc_khz()).saturating_mul(1000);
    let base = if wanted.wrapping_sub(base).unsigned_abs() < second.unsigned_abs() {
        base
    } else {
        cpu.shared.tsc_base.store(wanted, Ordering::SeqCst);
        wanted
    };
    cpu.system.tsc_base = base as u64;
}

/// RDTSC and RDTSCP.
pub(crate) fn execute(cpu: &mut Cpu, with_aux: bool) -> Outcome {
    if cpu.cr4 & control::CR4_TSD != 0 && cpu.mode.cpl > 0 {
        return Err(Exception::GP0);
    }
    set_edx_eax(cpu, guest_tsc(cpu));
    if with_aux {
        cpu.gpr[gpr::RCX] = cpu.system.msrs.tsc_aux & 0xffff_ffff;
    }
    Ok(())
}
