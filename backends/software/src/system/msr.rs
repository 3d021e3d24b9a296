//! RDMSR and WRMSR: the model's table, and the registers whose value lives elsewhere (Intel SDM vol. 4).
//!
//! The table of [`atoll_machine::cpu::msr`] says which registers exist and what a write may change; values
//! are kept here in the table's order. Registers that instructions use (STAR and friends) have fields of
//! their own. [`MsrKind::Engine`] registers are handled by [`read_engine`] and [`write_engine`].

use atoll_machine::cpu::model::{CpuModel, MsrKind};
use atoll_machine::cpu::msr::index as msr;
use atoll_machine::cpu::state::{gpr, seg};

use super::control::{self, edx_eax, set_edx_eax};
use super::memory::is_canonical;
use super::{paravirt, time};
use crate::cpu::Cpu;
use crate::exception::{Exception, Outcome};

/// Values of the model-specific registers.
#[derive(Clone, Debug, Default)]
pub struct MsrFile {
    /// In the order of the model's table; entries with a field below are unused.
    values: Vec<u64>,
    /// IA32_STAR.
    pub star: u64,
    /// IA32_LSTAR.
    pub lstar: u64,
    /// IA32_CSTAR.
    pub cstar: u64,
    /// IA32_FMASK.
    pub sfmask: u64,
    /// IA32_KERNEL_GS_BASE.
    pub kernel_gs_base: u64,
    /// IA32_TSC_AUX.
    pub tsc_aux: u64,
    /// IA32_SYSENTER_CS.
    pub sysenter_cs: u64,
    /// IA32_SYSENTER_ESP.
    pub sysenter_esp: u64,
    /// IA32_SYSENTER_EIP.
    pub sysenter_eip: u64,
}

impl MsrFile {
    /// The registers of `model` after RESET.
    pub fn new(model: &CpuModel) -> Self {
        let mut file = Self { values: model.msrs().iter().map(|e| e.reset).collect(), ..Self::default() };
        for entry in model.msrs() {
            if let Some(field) = file.field(entry.index) {
                *field = entry.reset;
            }
        }
        file
    }

    fn field(&mut self, index: u32) -> Option<&mut u64> {
        Some(match index {
            msr::STAR => &mut self.star,
            msr::LSTAR => &mut self.lstar,
            msr::CSTAR => &mut self.cstar,
            msr::SFMASK => &mut self.sfmask,
            msr::KERNEL_GS_BASE => &mut self.kernel_gs_base,
            msr::TSC_AUX => &mut self.tsc_aux,
            msr::SYSENTER_CS => &mut self.sysenter_cs,
            msr::SYSENTER_ESP => &mut self.sysenter_esp,
            msr::SYSENTER_EIP => &mut self.sysenter_eip,
            _ => return None,
        })
    }

    /// Where the register at `position` of the model's table keeps its value.
    fn slot(&mut self, position: usize, index: u32) -> Option<&mut u64> {
        if matches!(index, msr::SYSENTER_CS..=msr::SYSENTER_EIP | msr::STAR..=msr::SFMASK)
            || matches!(index, msr::KERNEL_GS_BASE | msr::TSC_AUX)
        {
            return self.field(index);
        }
        self.values.get_mut(position)
    }
}

fn position(model: &CpuModel, index: u32) -> Option<usize> {
    model.msrs().binary_search_by_key(&index, |e| e.index).ok()
}

/// RDMSR.
pub(crate) fn execute_read(cpu: &mut Cpu) -> Outcome {
    if cpu.mode.cpl != 0 {
        return Err(Exception::GP0);
    }
    let value = read(cpu, cpu.gpr[gpr::RCX] as u32).ok_or(Exception::GP0)?;
    set_edx_eax(cpu, value);
    Ok(())
}

/// WRMSR.
pub(crate) fn execute_write(cpu: &mut Cpu) -> Outcome {
    if cpu.mode.cpl != 0 {
        return Err(Exception::GP0);
    }
    let (index, value) = (cpu.gpr[gpr::RCX] as u32, edx_eax(cpu));
    write(cpu, index, value)?;
    super::recheck_events(cpu);
    Ok(())
}

/// Reads register `index`; `None` where RDMSR faults.
pub(crate) fn read(cpu: &mut Cpu, index: u32) -> Option<u64> {
    if matches!(index, msr::X2APIC_FIRST..=msr::X2APIC_LAST) {
        return crate::apic::msr_read(cpu, index);
    }
    let at = position(&cpu.shared.model, index)?;
    let entry = *cpu.shared.model.msrs().get(at)?;
    if entry.kind == MsrKind::Engine {
        return Some(read_engine(cpu, index));
    }
    if !entry.readable() {
        return None;
    }
    cpu.system.msrs.slot(at, index).map(|v| *v)
}

/// Writes register `index` as WRMSR does.
pub(crate) fn write(cpu: &mut Cpu, index: u32, value: u64) -> Outcome {
    if matches!(index, msr::X2APIC_FIRST..=msr::X2APIC_LAST) {
        return crate::apic::msr_write(cpu, index, value);
    }
    let at = position(&cpu.shared.model, index).ok_or(Exception::GP0)?;
    let entry = *cpu.shared.model.msrs().get(at).ok_or(Exception::GP0)?;
    if entry.kind == MsrKind::Engine {
        return write_engine(cpu, index, value);
    }
    let bits = cpu.shared.model.linear_bits();
    let slot = cpu.system.msrs.slot(at, index).ok_or(Exception::GP0)?;
    *slot = entry.write(*slot, value, bits).map_err(|_| Exception::GP0)?;
    Ok(())
}

/// Sets register `index` from saved state, without WRMSR's rules; unknown registers are the caller's error.
/// Returns whether the register exists and is kept in the table.
pub(crate) fn restore(cpu: &mut Cpu, index: u32, value: u64) -> bool {
    let Some(at) = position(&cpu.shared.model, index) else { return false };
    match cpu.system.msrs.slot(at, index) {
        Some(slot) => {
            *slot = value;
            true
        }
        None => false,
    }
}

/// A register whose value lives elsewhere.
fn read_engine(cpu: &mut Cpu, index: u32) -> u64 {
    match index {
        msr::TSC => time::guest_tsc(cpu),
        msr::TSC_ADJUST => cpu.system.tsc_adjust,
        msr::TSC_DEADLINE => crate::apic::deadline(cpu),
        msr::APIC_BASE => cpu.system.lapic.base(),
        msr::EFER => cpu.efer,
        msr::FS_BASE => cpu.segments[seg::FS].base,
        msr::GS_BASE => cpu.segments[seg::GS].base,
        msr::KVM_WALL_CLOCK | msr::KVM_WALL_CLOCK_OLD => cpu.system.paravirt.wall_clock,
        msr::KVM_SYSTEM_TIME | msr::KVM_SYSTEM_TIME_OLD => cpu.system.paravirt.system_time,
        msr::KVM_STEAL_TIME => cpu.system.paravirt.steal_time,
        _ => 0,
    }
}

fn write_engine(cpu: &mut Cpu, index: u32, value: u64) -> Outcome {
    match index {
        msr::TSC => time::write_tsc(cpu, value),
        msr::TSC_ADJUST => time::write_adjust(cpu, value),
        msr::TSC_DEADLINE => crate::apic::set_deadline(cpu, value),
        msr::APIC_BASE => return crate::apic::write_base(cpu, value),
        msr::EFER => return control::write_efer(cpu, value),
        msr::FS_BASE | msr::GS_BASE => {
            if !is_canonical(value) {
                return Err(Exception::GP0);
            }
            let register = if index == msr::FS_BASE { seg::FS } else { seg::GS };
            cpu.segments[register].base = value;
        }
        msr::KVM_WALL_CLOCK | msr::KVM_WALL_CLOCK_OLD => paravirt::write_wall_clock(cpu, value),
        msr::KVM_SYSTEM_TIME | msr::KVM_SYSTEM_TIME_OLD => paravirt::write_system_time(cpu, value),
        msr::KVM_STEAL_TIME => return paravirt::write_steal_time(cpu, value),
        _ => return Err(Exception::GP0),
    }
    Ok(())
}
