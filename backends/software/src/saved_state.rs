//! The runtime state as [`CpuState`], and back; RESET, INIT and start-up.
//!
//! [`CpuState`] is the form that moves between backends and into saved files; its encoding is
//! [`atoll_machine::cpu::saved_state`]. [`check`] refuses what no processor could hold, so that nothing later
//! meets a state it cannot work with; [`load`] cannot fail.

use atoll_machine::backend::StateError;
use atoll_machine::cpu::model::MsrKind;
use atoll_machine::cpu::msr::index as msr;
use atoll_machine::cpu::state::{Activity, CpuState, EventKind, LapicState, PendingEvent, Segment, gpr, seg};

use crate::access::is_canonical;
use crate::apic;
use crate::apic::lapic::{BASE_ENABLE, BASE_X2APIC};
use crate::cpu::{Cpu, XsaveArea, control, flag};
use crate::exception::{Exception, vector};
use crate::system::{self, SystemState, debug, msr::MsrFile, paravirt, time};

/// Legacy area and header of an XSAVE area.
const XSAVE_MIN: usize = 576;
/// No XSAVE area of any processor is larger.
const XSAVE_MAX: usize = 16384;
const XCR0_AVX: u64 = 4;

/// Registers with fields of their own in [`CpuState`], and aliases.
fn has_own_field(index: u32) -> bool {
    matches!(index, msr::EFER | msr::TSC | msr::APIC_BASE | msr::TSC_DEADLINE | msr::FS_BASE | msr::GS_BASE)
        || matches!(index, msr::KVM_WALL_CLOCK_OLD | msr::KVM_SYSTEM_TIME_OLD)
}

/// A copy of the whole architectural state.
pub(crate) fn save(cpu: &mut Cpu) -> CpuState {
    let mut msrs = Vec::new();
    let entries: Vec<(u32, bool)> = cpu.shared.model.msrs().iter().map(|e| (e.index, e.readable())).collect();
    for (index, readable) in entries {
        if readable
            && !has_own_field(index)
            && let Some(value) = system::msr::read(cpu, index)
        {
            msrs.push((index, value));
        }
    }
    let mut lapic = LapicState {
        apic_base: cpu.system.lapic.base(),
        timer_expires_at: cpu.system.lapic.timer.expires,
        tsc_deadline: cpu.system.lapic.timer.deadline,
        ..LapicState::default()
    };
    cpu.system.lapic.save(&mut lapic.registers);
    let count = apic::current_count(cpu);
    lapic.registers[0x390..0x394].copy_from_slice(&count.to_le_bytes());
    CpuState {
        gpr: cpu.gpr,
        rip: cpu.rip,
        rflags: cpu.rflags,
        segments: cpu.segments,
        ldtr: cpu.ldtr,
        tr: cpu.tr,
        gdtr: cpu.gdtr,
        idtr: cpu.idtr,
        cr0: cpu.cr0,
        cr2: cpu.cr2,
        cr3: cpu.cr3,
        cr4: cpu.cr4,
        cr8: u64::from(cpu.system.lapic.cr8()),
        dr: cpu.dr,
        dr6: cpu.dr6,
        dr7: cpu.dr7,
        efer: cpu.efer,
        xcr0: cpu.xcr0,
        xsave: cpu.xsave.export(),
        msrs,
        tsc: time::guest_tsc(cpu),
        lapic,
        activity: cpu.activity,
        interrupt_shadow: cpu.interrupt_shadow && cpu.rip == cpu.system.shadow_rip,
        nmi_blocked: cpu.nmi_blocked,
        nmi_pending: cpu.system.nmis != 0,
        sipi_vector: cpu.system.sipi_vector,
        pending_event: pending_event(cpu),
    }
}

/// What waits for the next boundary: an event of another engine, a fault of a task switch, a debug trap.
fn pending_event(cpu: &mut Cpu) -> Option<PendingEvent> {
    if cpu.system.pending_event.is_some() {
        return cpu.system.pending_event;
    }
    let exception = |vector, error_code| PendingEvent { vector, kind: EventKind::Exception, error_code };
    match cpu.system.pending_fault {
        Some(Exception::Fault { vector, error_code }) => return Some(exception(vector, error_code)),
        Some(Exception::PageFault { address, error_code }) => {
            cpu.cr2 = address;
            return Some(exception(vector::PF, Some(error_code)));
        }
        _ => {}
    }
    if cpu.system.pending_debug == 0 {
        return None;
    }
    cpu.dr6 |= cpu.system.pending_debug;
    Some(exception(vector::DB, None))
}

fn invalid(field: &'static str, why: impl Into<String>) -> Result<(), StateError> {
    Err(StateError::Invalid { field, why: why.into() })
}

/// Refuses what no processor of the model could hold.
pub(crate) fn check(cpu: &Cpu, s: &CpuState) -> Result<(), StateError> {
    s.check(&cpu.shared.model)?;
    check_control(cpu, s)?;
    check_segments(s)?;
    check_xsave(cpu, s)?;
    check_lapic(s)?;
    for &(index, value) in &s.msrs {
        check_msr(cpu, index, value)?;
    }
    if let Some(event) = s.pending_event
        && event.error_code.is_some_and(|code| code >> 16 != 0)
    {
        return invalid("pending_event", "the error code has more than 16 bits");
    }
    Ok(())
}

fn check_control(cpu: &Cpu, s: &CpuState) -> Result<(), StateError> {
    use control::*;
    let model = &cpu.shared.model;
    if s.cr0 >> 32 != 0 || s.cr0 & (CR0_PG | CR0_PE) == CR0_PG {
        return invalid("cr0", format!("{:#x} has reserved bits or paging without protection", s.cr0));
    }
    if s.cr4 & !model.cr4_mask() != 0 {
        return invalid("cr4", format!("{:#x} has bits that model {} lacks", s.cr4, model.name));
    }
    if s.efer & !model.efer_mask() != 0 {
        return invalid("efer", format!("{:#x} has bits that model {} lacks", s.efer, model.name));
    }
    let long = s.efer & EFER_LME != 0 && s.cr0 & CR0_PG != 0;
    if long != (s.efer & EFER_LMA != 0) || long && s.cr4 & CR4_PAE == 0 {
        return invalid("efer", format!("{:#x} does not fit CR0 {:#x} and CR4 {:#x}", s.efer, s.cr0, s.cr4));
    }
    if s.cr3 >> model.physical_bits() != 0 {
        return invalid("cr3", format!("{:#x} is wider than a physical address", s.cr3));
    }
    if s.cr8 > 15 {
        return invalid("cr8", format!("{} is above 15", s.cr8));
    }
    if s.dr6 >> 32 != 0 || s.dr7 >> 32 != 0 {
        return invalid("dr7", "bits 63..32 are set");
    }
    if s.rflags & 2 == 0 || s.rflags >> 22 != 0 || s.efer & EFER_LMA != 0 && s.rflags & flag::VM != 0 {
        return invalid("rflags", format!("{:#x} is impossible", s.rflags));
    }
    Ok(())
}

fn check_segments(s: &CpuState) -> Result<(), StateError> {
    const KNOWN: u32 = 0x1_f0ff;
    let all = s.segments.iter().chain([&s.ldtr, &s.tr]);
    let long = s.efer & control::EFER_LMA != 0;
    for segment in all {
        if segment.attributes & !KNOWN != 0 {
            return invalid("segments", format!("attributes {:#x} have reserved bits", segment.attributes));
        }
        if long && !is_canonical(segment.base) {
            return invalid("segments", format!("base {:#x} is not canonical", segment.base));
        }
    }
    let cs = s.segments[seg::CS].attributes;
    if long && cs & Segment::LONG != 0 && cs & Segment::DEFAULT_BIG != 0 {
        return invalid("segments", "CS has both L and D set");
    }
    if long && !(is_canonical(s.gdtr.base) && is_canonical(s.idtr.base)) {
        return invalid("gdtr", "a descriptor table's base is not canonical");
    }
    Ok(())
}

fn check_xsave(cpu: &Cpu, s: &CpuState) -> Result<(), StateError> {
    if !system::control::xcr0_valid(s.xcr0, cpu.shared.model.xcr0_mask()) {
        return invalid(
            "xcr0",
            format!("{:#x} is not what model {} can hold", s.xcr0, cpu.shared.model.name),
        );
    }
    let needed = if s.xcr0 & XCR0_AVX != 0 { XsaveArea::SIZE } else { XSAVE_MIN };
    if s.xsave.len() < needed || s.xsave.len() > XSAVE_MAX {
        return invalid("xsave", format!("{} bytes where XCR0 needs {needed}", s.xsave.len()));
    }
    Ok(())
}

fn check_lapic(s: &CpuState) -> Result<(), StateError> {
    let mode = s.lapic.apic_base & (BASE_ENABLE | BASE_X2APIC);
    if mode == BASE_X2APIC || s.lapic.apic_base & 0x2ff != 0 || s.lapic.apic_base >> 40 != 0 {
        return invalid("lapic", format!("IA32_APIC_BASE {:#x} is impossible", s.lapic.apic_base));
    }
    Ok(())
}

fn check_msr(cpu: &Cpu, index: u32, value: u64) -> Result<(), StateError> {
    let model = &cpu.shared.model;
    let Some(entry) = model.msr(index) else {
        return invalid("msrs", format!("model {} has no register {index:#x}", model.name));
    };
    let ok = match entry.kind {
        MsrKind::Engine | MsrKind::ReadOnly | MsrKind::WriteIgnored => true,
        MsrKind::Command { .. } => false,
        _ => entry.write(entry.reset, value, model.linear_bits()).is_ok(),
    };
    if ok { Ok(()) } else { invalid("msrs", format!("register {index:#x} cannot hold {value:#x}")) }
}

/// Replaces the whole state by one that [`check`] accepted.
pub(crate) fn load(cpu: &mut Cpu, s: &CpuState) {
    cpu.gpr = s.gpr;
    (cpu.rip, cpu.next_rip, cpu.rflags) = (s.rip, s.rip, s.rflags);
    (cpu.segments, cpu.ldtr, cpu.tr) = (s.segments, s.ldtr, s.tr);
    (cpu.gdtr, cpu.idtr) = (s.gdtr, s.idtr);
    (cpu.cr0, cpu.cr2, cpu.cr3, cpu.cr4) = (s.cr0, s.cr2, s.cr3, s.cr4);
    (cpu.dr, cpu.efer, cpu.xcr0) = (s.dr, s.efer, s.xcr0);
    cpu.dr6 = s.dr6 & 0xe00f | debug::DR6_FIXED;
    cpu.dr7 = s.dr7 & debug::DR7_WRITABLE | debug::DR7_FIXED;
    *cpu.xsave = XsaveArea::import(&s.xsave);
    cpu.activity = s.activity;
    cpu.interrupt_shadow = s.interrupt_shadow;
    cpu.nmi_blocked = s.nmi_blocked;
    load_system(cpu, s);
    adopt(cpu);
    if cpu.mode.paging && !cpu.mode.long && cpu.cr4 & control::CR4_PAE != 0 {
        cpu.pdpte = system::control::read_pdptes(cpu, cpu.cr3).unwrap_or_default();
    }
}

fn load_system(cpu: &mut Cpu, s: &CpuState) {
    let model = cpu.shared.model.clone();
    let mut system = SystemState::new(&model, cpu.system.index, cpu.system.lapic.id());
    system.pending_event = s.pending_event;
    system.shadow_rip = s.rip;
    system.nmis = u8::from(s.nmi_pending);
    system.sipi_vector = s.sipi_vector;
    system.lapic.restore(s.lapic.apic_base, &s.lapic.registers);
    system.lapic.set_cr8_if_changed(s.cr8 as u8);
    system.lapic.timer.expires = s.lapic.timer_expires_at;
    system.lapic.timer.deadline = s.lapic.tsc_deadline;
    *cpu.system = system;
    let mut adjust = 0;
    for &(index, value) in &s.msrs {
        match index {
            msr::TSC_ADJUST => adjust = value,
            msr::KVM_WALL_CLOCK => cpu.system.paravirt.wall_clock = value,
            msr::KVM_SYSTEM_TIME => cpu.system.paravirt.system_time = value,
            msr::KVM_STEAL_TIME => cpu.system.paravirt.steal_time = value & !0x3e,
            _ if has_own_field(index) => {}
            _ if model.msr(index).is_some_and(|e| keeps_reset(e.kind)) => {}
            _ => {
                system::msr::restore(cpu, index, value);
            }
        }
    }
    time::restore(cpu, s.tsc, adjust);
    // Guest memory may not be there yet: the record is written when the vCPU runs next.
    cpu.system.paravirt.stale = true;
}

/// Registers that keep the model's value whatever was saved.
fn keeps_reset(kind: MsrKind) -> bool {
    matches!(kind, MsrKind::ReadOnly | MsrKind::WriteIgnored)
}

/// What follows any wholesale change of state.
fn adopt(cpu: &mut Cpu) {
    cpu.refresh_mode();
    cpu.mmu.flush_all();
    debug::update_watch(cpu);
    cpu.recheck = true;
}

/// RESET: the power-on state. Time goes on: the TSC keeps counting, TSC_ADJUST is zero.
pub(crate) fn reset(cpu: &mut Cpu) {
    let index = cpu.system.index;
    let mut state = CpuState::power_on(cpu.system.lapic.id(), index == 0, cpu.shared.model.signature());
    state.tsc = cpu.shared.clock.tsc().wrapping_add(cpu.system.tsc_base);
    load(cpu, &state);
    paravirt::thread_changed(&mut cpu.system.paravirt);
}

/// INIT: as RESET, but FPU, MSRs, TSC, CR0.CD and CR0.NW and the APIC's id and mode survive (Intel SDM
/// vol. 3, table 10-1). The boot processor starts over, the others wait for a start-up IPI.
pub(crate) fn init(cpu: &mut Cpu) {
    let bsp = cpu.system.lapic.base() & crate::apic::lapic::BASE_BSP != 0;
    let state = CpuState::power_on(cpu.system.lapic.id(), bsp, cpu.shared.model.signature());
    let cache = cpu.cr0 & (control::CR0_CD | control::CR0_NW);
    let msrs: MsrFile = std::mem::take(&mut cpu.system.msrs);
    let pv = std::mem::take(&mut cpu.system.paravirt);
    let (adjust, base) = (cpu.system.tsc_adjust, cpu.system.tsc_base);
    let (xsave, xcr0) = (cpu.xsave.clone(), cpu.xcr0);
    let mut lapic = cpu.system.lapic.clone();
    lapic.reset_registers();
    load(cpu, &state);
    cpu.cr0 = state.cr0 & !(control::CR0_CD | control::CR0_NW) | cache;
    (cpu.xsave, cpu.xcr0) = (xsave, xcr0);
    (cpu.system.msrs, cpu.system.paravirt, cpu.system.lapic) = (msrs, pv, lapic);
    (cpu.system.tsc_adjust, cpu.system.tsc_base) = (adjust, base);
    adopt(cpu);
    apic::publish(cpu);
}

/// A start-up IPI: real mode at `vector` × 4 KiB.
pub(crate) fn start_up(cpu: &mut Cpu, vector: u8) {
    let cs = &mut cpu.segments[seg::CS];
    cs.selector = u16::from(vector) << 8;
    cs.base = u64::from(vector) << 12;
    (cpu.rip, cpu.next_rip) = (0, 0);
    cpu.gpr[gpr::RAX] = 0;
    cpu.activity = Activity::Active;
    adopt(cpu);
}
