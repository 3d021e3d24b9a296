//! Delivery of exceptions and interrupts (Intel SDM vol. 3, chapter 7).
//!
//! ```text
//! raise(exception) ─► event ─► deliver_once ─► real mode: interrupt vector table
//!        ▲                        │         ├► protected: task gate ─► task.rs
//!        │  fault while           │         ├► protected, virtual-8086: interrupt or trap gate, inner stack
//!        │  delivering            │         └► long mode: 64-bit gate, IST
//!        └── double fault? ◄──────┘
//!             triple fault ─► Activity::Shutdown
//! ```
//!
//! A delivery checks and pushes first and commits last, so a fault on the way finds the state of the
//! interrupted instruction. The return address is RIP for faults and interrupts, and the next instruction for
//! software interrupts.

use atoll_machine::backend::CpuIo;
use atoll_machine::cpu::state::{Activity, EventKind, PendingEvent, gpr, seg};

use super::debug;
use super::descriptor::{Descriptor, fetch, gp, is_null, kind, np};
use super::far::inner_stack;
use super::memory::{Stack, load, table_address, truncate};
use super::segments::{check_target, commit_code, load_real, null_segment};
use super::task::{self, Switch};
use crate::access::Access;
use crate::cpu::{Cpu, flag};
use crate::exception::{Exception, Outcome, SoftwareInterrupt, vector};

/// Something to deliver through the IDT.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Event {
    /// Vector.
    pub vector: u8,
    /// What kind.
    pub kind: EventKind,
    /// Error code to push.
    pub error_code: Option<u32>,
    /// Gate privilege is checked, and the error code of a nested fault has EXT clear (INT n, INT3, INTO).
    pub software: bool,
    /// The saved flags have RF set (faults).
    pub resume: bool,
    /// Return address.
    pub rip: u64,
}

impl Event {
    /// A maskable interrupt.
    pub fn interrupt(cpu: &Cpu, vector: u8) -> Self {
        Self::plain(cpu, vector, EventKind::ExternalInterrupt)
    }

    /// A non-maskable interrupt.
    pub fn nmi(cpu: &Cpu) -> Self {
        Self::plain(cpu, vector::NMI, EventKind::Nmi)
    }

    fn plain(cpu: &Cpu, vector: u8, kind: EventKind) -> Self {
        Self { vector, kind, error_code: None, software: false, resume: false, rip: cpu.rip }
    }

    /// An event saved by another engine.
    pub fn pending(cpu: &Cpu, saved: PendingEvent) -> Self {
        Self {
            error_code: saved.error_code,
            software: saved.kind == EventKind::SoftwareInterrupt,
            resume: saved.kind == EventKind::Exception && saved.vector != vector::DB,
            ..Self::plain(cpu, saved.vector, saved.kind)
        }
    }
}

/// How a fault during the delivery of another event combines with it (Intel SDM vol. 3, table 7-5).
fn combine(first: &Event, second: u8) -> u8 {
    let contributory = |v: u8| matches!(v, vector::DE | vector::TS..=vector::GP);
    if first.kind != EventKind::Exception {
        return second;
    }
    let double = match first.vector {
        vector::PF => second == vector::PF || contributory(second),
        v if contributory(v) => contributory(second),
        _ => false,
    };
    if double { vector::DF } else { second }
}

/// Delivers what an instruction handler raised. Shuts the processor down on a triple fault.
///
/// RIP must still be that of the instruction (see [`Exception`]); afterwards it is the handler's.
pub fn raise(cpu: &mut Cpu, io: &dyn CpuIo, exception: Exception) {
    let event = event_of(cpu, exception);
    deliver(cpu, io, event);
}

/// Turns an exception into an event; sets CR2 and DR6.
fn event_of(cpu: &mut Cpu, exception: Exception) -> Event {
    let rip = cpu.rip;
    let fault = |vector, error_code| Event {
        vector,
        kind: EventKind::Exception,
        error_code,
        software: false,
        resume: true,
        rip,
    };
    match exception {
        Exception::Fault { vector: vector::DB, .. } => {
            debug::enter_handler(cpu, 0);
            // A code breakpoint's own fault leaves RF to the handler (SDM vol. 3, 18.3.1.1).
            Event { resume: false, ..fault(vector::DB, None) }
        }
        Exception::Fault { vector, error_code } => fault(vector, error_code),
        Exception::PageFault { address, error_code } => {
            cpu.cr2 = address;
            fault(vector::PF, Some(error_code))
        }
        Exception::Software { vector, source } => {
            let kind = match source {
                SoftwareInterrupt::Int1 => EventKind::Exception,
                _ => EventKind::SoftwareInterrupt,
            };
            let software = source != SoftwareInterrupt::Int1;
            if !software {
                // A #DB itself: takes along what a load of SS before it held off.
                let held = std::mem::take(&mut cpu.system.pending_debug);
                debug::enter_handler(cpu, held);
            }
            Event { vector, kind, error_code: None, software, resume: false, rip: cpu.next_rip }
        }
        Exception::DebugTrap { dr6 } => {
            debug::enter_handler(cpu, dr6);
            Event { resume: false, ..fault(vector::DB, None) }
        }
    }
}

/// Delivers `event`, and whatever faults on the way.
pub fn deliver(cpu: &mut Cpu, io: &dyn CpuIo, mut event: Event) {
    // The interpreter may not have run since the address space or the state changed.
    cpu.refresh_translation();
    cpu.activity = Activity::Active;
    cpu.interrupt_shadow = false;
    cpu.system.debug_shadow = false;
    if event.kind == EventKind::Nmi {
        cpu.nmi_blocked = true;
    }
    loop {
        let fault = match (deliver_once(cpu, io, &event), cpu.system.pending_fault.take()) {
            (Err(fault), _) | (Ok(()), Some(fault)) => fault,
            (Ok(()), None) => {
                cpu.rip = cpu.next_rip;
                return;
            }
        };
        if event.vector == vector::DF && event.kind == EventKind::Exception {
            cpu.activity = Activity::Shutdown;
            return;
        }
        event = nested(cpu, &event, fault);
    }
}

/// The event that follows when delivering `first` raised `fault`.
fn nested(cpu: &mut Cpu, first: &Event, fault: Exception) -> Event {
    let mut second = event_of(cpu, fault);
    if !first.software && matches!(second.vector, vector::TS..=vector::GP) {
        // EXT: the event was not caused by the program itself.
        second.error_code = second.error_code.map(|code| code | 1);
    }
    if combine(first, second.vector) == vector::DF {
        second.vector = vector::DF;
        second.error_code = Some(0);
    }
    second
}

fn deliver_once(cpu: &mut Cpu, io: &dyn CpuIo, event: &Event) -> Outcome {
    if cpu.mode.long {
        return deliver_long(cpu, io, event);
    }
    if cpu.mode.protected || cpu.mode.v8086 {
        return deliver_protected(cpu, io, event);
    }
    deliver_real(cpu, io, event)
}

fn idt_code(event: &Event) -> u32 {
    u32::from(event.vector) << 3 | 2
}
fn idt_fault(event: &Event) -> Exception {
    Exception::with_code(vector::GP, idt_code(event))
}

fn deliver_real(cpu: &mut Cpu, io: &dyn CpuIo, event: &Event) -> Outcome {
    let offset = u64::from(event.vector) * 4;
    if offset + 3 > u64::from(cpu.idtr.limit) {
        return Err(idt_fault(event));
    }
    let entry = table_address(cpu, cpu.idtr.base, offset);
    let target = load(cpu, io, entry, 4, Access::SystemRead)?;
    let mut stack = Stack::current(cpu);
    stack.check_room(6)?;
    stack.push(cpu, io, 2, cpu.rflags)?;
    stack.push(cpu, io, 2, u64::from(cpu.segments[seg::CS].selector))?;
    stack.push(cpu, io, 2, event.rip)?;
    stack.commit(cpu);
    cpu.rflags &= !(flag::IF | flag::TF | flag::AC | flag::RF);
    load_real(cpu, seg::CS, (target >> 16) as u16);
    cpu.next_rip = target & 0xffff;
    cpu.refresh_mode();
    Ok(())
}

/// The flags that are pushed: RF as the kind of event wants it.
fn flags_image(cpu: &Cpu, event: &Event) -> u64 {
    if event.resume { cpu.rflags | flag::RF } else { cpu.rflags }
}

fn deliver_protected(cpu: &mut Cpu, io: &dyn CpuIo, event: &Event) -> Outcome {
    let offset = u64::from(event.vector) * 8;
    if offset + 7 > u64::from(cpu.idtr.limit) {
        return Err(idt_fault(event));
    }
    let address = table_address(cpu, cpu.idtr.base, offset);
    let gate = Descriptor { raw: load(cpu, io, address, 8, Access::SystemRead)?, address };
    let known = matches!(
        gate.kind(),
        kind::TASK_GATE | kind::INTERRUPT_GATE16 | kind::TRAP_GATE16 | kind::INTERRUPT_GATE | kind::TRAP_GATE
    );
    if gate.non_system() || !known || event.software && gate.dpl() < cpu.mode.cpl {
        return Err(idt_fault(event));
    }
    if !gate.present() {
        return Err(Exception::with_code(vector::NP, idt_code(event)));
    }
    if gate.kind() == kind::TASK_GATE {
        cpu.next_rip = event.rip;
        if event.resume {
            cpu.rflags |= flag::RF;
        }
        return task::switch(cpu, io, gate.gate_selector(), Switch::Gate, event.error_code, gp);
    }
    let size = if gate.kind() >= kind::INTERRUPT_GATE { 4 } else { 2 };
    let mut code = target_code(cpu, io, gate.gate_selector())?;
    let cpl = cpu.mode.cpl;
    let new_cpl = if code.is_conforming() { cpl } else { code.dpl() };
    if cpu.mode.v8086 && new_cpl != 0 {
        return Err(gp(gate.gate_selector()));
    }
    let switched = new_cpl < cpl;
    let mut stack = Stack::current(cpu);
    let mut segment = cpu.segments[seg::SS];
    if switched {
        (stack, segment) = inner_stack(cpu, io, new_cpl, 0)?;
    }
    push_legacy_frame(cpu, io, event, &mut stack, size, switched)?;
    let rip = truncate(gate.gate_offset(), size * 8);
    check_target(cpu, &code, rip)?;
    code.mark_accessed(cpu, io)?;
    if switched {
        cpu.segments[seg::SS] = segment;
        if cpu.mode.v8086 {
            for register in [seg::ES, seg::DS, seg::FS, seg::GS] {
                cpu.segments[register] = null_segment(0);
            }
        }
    }
    stack.commit(cpu);
    commit_code(cpu, gate.gate_selector(), &code, new_cpl, rip);
    clear_flags(cpu, gate.kind());
    cpu.refresh_mode();
    Ok(())
}

fn push_legacy_frame(
    cpu: &mut Cpu,
    io: &dyn CpuIo,
    event: &Event,
    stack: &mut Stack,
    size: u32,
    switched: bool,
) -> Outcome {
    let v8086 = cpu.mode.v8086;
    let words =
        3 + if switched { 2 } else { 0 } + if v8086 { 4 } else { 0 } + u64::from(event.error_code.is_some());
    stack.check_room(words * u64::from(size))?;
    if v8086 {
        for register in [seg::GS, seg::FS, seg::DS, seg::ES] {
            stack.push(cpu, io, size, u64::from(cpu.segments[register].selector))?;
        }
    }
    if switched {
        stack.push(cpu, io, size, u64::from(cpu.segments[seg::SS].selector))?;
        stack.push(cpu, io, size, cpu.gpr[gpr::RSP])?;
    }
    stack.push(cpu, io, size, flags_image(cpu, event))?;
    stack.push(cpu, io, size, u64::from(cpu.segments[seg::CS].selector))?;
    stack.push(cpu, io, size, event.rip)?;
    if let Some(code) = event.error_code {
        stack.push(cpu, io, size, u64::from(code))?;
    }
    Ok(())
}

/// The code segment behind a gate of the IDT.
fn target_code(cpu: &mut Cpu, io: &dyn CpuIo, selector: u16) -> Outcome<Descriptor> {
    if is_null(selector) {
        return Err(Exception::GP0);
    }
    let d = fetch(cpu, io, selector)?.ok_or(gp(selector))?;
    let long_ok = !cpu.mode.long || d.long() && !d.big();
    if !d.is_code() || d.dpl() > cpu.mode.cpl || !long_ok {
        return Err(gp(selector));
    }
    if !d.present() {
        return Err(np(selector));
    }
    Ok(d)
}

fn clear_flags(cpu: &mut Cpu, gate: u32) {
    cpu.rflags &= !(flag::TF | flag::NT | flag::RF | flag::VM);
    if gate & 1 == 0 {
        cpu.rflags &= !flag::IF;
    }
}

fn deliver_long(cpu: &mut Cpu, io: &dyn CpuIo, event: &Event) -> Outcome {
    let offset = u64::from(event.vector) * 16;
    if offset + 15 > u64::from(cpu.idtr.limit) {
        return Err(idt_fault(event));
    }
    let address = cpu.idtr.base.wrapping_add(offset);
    let mut raw = [0; 16];
    cpu.read_bytes(io, address, &mut raw, Access::SystemRead)?;
    let [low, high] = split(raw);
    let gate = Descriptor { raw: low, address };
    let known = matches!(gate.kind(), kind::INTERRUPT_GATE | kind::TRAP_GATE);
    if gate.non_system() || !known || high >> 40 & 0x1f != 0 || event.software && gate.dpl() < cpu.mode.cpl {
        return Err(idt_fault(event));
    }
    if !gate.present() {
        return Err(Exception::with_code(vector::NP, idt_code(event)));
    }
    let mut code = target_code(cpu, io, gate.gate_selector())?;
    let cpl = cpu.mode.cpl;
    let new_cpl = if code.is_conforming() { cpl } else { code.dpl() };
    let ist = (low >> 32 & 7) as u8;
    let switched = new_cpl < cpl;
    let mut segment = cpu.segments[seg::SS];
    let mut stack = if switched || ist != 0 {
        let (stack, inner) = inner_stack(cpu, io, new_cpl, ist)?;
        if switched {
            segment = inner;
        }
        stack
    } else {
        let fault = Exception::SS0;
        Stack::switched(segment, cpu.gpr[gpr::RSP], true, new_cpl, fault)
    };
    stack.sp &= !15;
    let (old_ss, old_sp) = (u64::from(cpu.segments[seg::SS].selector), cpu.gpr[gpr::RSP]);
    let old_cs = u64::from(cpu.segments[seg::CS].selector);
    let frame = [old_ss, old_sp, flags_image(cpu, event), old_cs, event.rip];
    for value in frame {
        stack.push(cpu, io, 8, value)?;
    }
    if let Some(error_code) = event.error_code {
        stack.push(cpu, io, 8, u64::from(error_code))?;
    }
    let rip = gate.gate_offset() | high << 32;
    check_target(cpu, &code, rip)?;
    code.mark_accessed(cpu, io)?;
    cpu.segments[seg::SS] = segment;
    cpu.gpr[gpr::RSP] = stack.sp;
    commit_code(cpu, gate.gate_selector(), &code, new_cpl, rip);
    clear_flags(cpu, gate.kind());
    cpu.refresh_mode();
    Ok(())
}

fn split(raw: [u8; 16]) -> [u64; 2] {
    let value = u128::from_le_bytes(raw);
    [value as u64, (value >> 64) as u64]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn exception(vector: u8) -> Event {
        Event { vector, kind: EventKind::Exception, error_code: None, software: false, resume: true, rip: 0 }
    }

    #[test]
    fn double_faults_follow_the_table() {
        assert_eq!(combine(&exception(vector::GP), vector::NP), vector::DF);
        assert_eq!(combine(&exception(vector::GP), vector::PF), vector::PF);
        assert_eq!(combine(&exception(vector::PF), vector::PF), vector::DF);
        assert_eq!(combine(&exception(vector::PF), vector::GP), vector::DF);
        assert_eq!(combine(&exception(vector::UD), vector::GP), vector::GP);
        let interrupt = Event { kind: EventKind::ExternalInterrupt, ..exception(0x20) };
        assert_eq!(combine(&interrupt, vector::GP), vector::GP);
    }
}
