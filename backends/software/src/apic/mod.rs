//! The local APIC of the software CPU (Intel SDM vol. 3, chapter 11).
//!
//! ```text
//!  other vCPUs, IOAPIC, devices ──post──► mailbox ──drain (owner thread)──► lapic (IRR, ISR, TMR, LVT, timer)
//!  guest MMIO / MSR access ───────────────────────────────────────────────► registers ──ICR──► routing ──post
//! ```
//!
//! | file | contents |
//! |---|---|
//! | [`mailbox`] | what other threads may do to a vCPU: lock-free posting, waking |
//! | [`routing`] | which vCPUs a destination means (physical, logical, shorthand, lowest priority) |
//! | [`lapic`] | registers and priorities of one APIC |
//! | [`timer`] | its timer |
//! | this file | accesses by the processor: register page, x2APIC registers, IA32_APIC_BASE, timer deadlines |
//!
//! Only the vCPU's own thread touches its APIC registers; everybody else posts to its [`mailbox::Mailbox`].
//! There is no lock anywhere in this module.

pub mod lapic;
pub mod mailbox;
pub mod routing;
pub mod timer;

use std::sync::atomic::Ordering;

use self::lapic::{BASE_BSP, BASE_ENABLE, BASE_X2APIC, Effect, offset};
use self::mailbox::Reachability;
use self::routing::{Destination, Message, delivery, physical8};
use self::timer::Mode;
use crate::cpu::Cpu;
use crate::exception::{Exception, Outcome};
use crate::system::{self, time};

/// Whether physical `address` is in this processor's APIC register page.
#[inline]
pub fn owns(cpu: &Cpu, address: u64) -> bool {
    cpu.system.lapic.page() == Some(address & !0xfff)
}

/// A load from the register page. `at` is the offset in the page.
pub fn mmio_read(cpu: &mut Cpu, at: u64, data: &mut [u8]) {
    data.fill(0);
    // One 32-bit register per 16 bytes; accesses beyond it read zero.
    let (register, skip) = (at as u32 & 0xff0, at as usize & 0xf);
    let value = read(cpu, register).unwrap_or_else(|| {
        cpu.system.lapic.report(lapic::ERROR_REGISTER);
        0
    });
    for (byte, source) in data.iter_mut().zip(value.to_le_bytes().into_iter().skip(skip)) {
        *byte = source;
    }
}

/// A store to the register page: aligned 32-bit stores count, others are ignored.
pub fn mmio_write(cpu: &mut Cpu, at: u64, data: &[u8]) {
    let Some(word) = data.first_chunk::<4>() else { return };
    if at & 0xf != 0 {
        return;
    }
    let register = at as u32 & 0xff0;
    match cpu.system.lapic.write(register, u32::from_le_bytes(*word)) {
        Some(effect) => carry_out(cpu, effect),
        None => cpu.system.lapic.report(lapic::ERROR_REGISTER),
    }
    system::recheck_events(cpu);
}

/// The timer's current count.
pub(crate) fn current_count(cpu: &Cpu) -> u32 {
    cpu.system.lapic.timer.current(cpu.shared.clock.now())
}

fn read(cpu: &Cpu, register: u32) -> Option<u32> {
    let apic = &cpu.system.lapic;
    match register {
        offset::CURRENT_COUNT => Some(current_count(cpu)),
        // Write only.
        offset::EOI => Some(0),
        _ => apic.read(register),
    }
}

fn carry_out(cpu: &mut Cpu, effect: Effect) {
    match effect {
        Effect::None => {}
        Effect::SendIcr => send_icr(cpu),
        Effect::BroadcastEoi(vector) => {
            if let Some(eoi) = &cpu.shared.eoi {
                eoi.end_of_interrupt(vector);
            }
        }
        Effect::Publish => publish(cpu),
        Effect::SelfIpi(vector) => send_fixed_to_self(cpu, vector),
        Effect::TimerMode => {
            let mode = cpu.system.lapic.timer_mode();
            cpu.system.lapic.timer.set_mode(mode);
        }
        Effect::TimerCount(count) => {
            let (mode, now) = (cpu.system.lapic.timer_mode(), cpu.shared.clock.now());
            cpu.system.lapic.timer.set_count(mode, count, now);
        }
        Effect::TimerDivide(divide) => {
            let now = cpu.shared.clock.now();
            cpu.system.lapic.timer.set_divide(divide, now);
        }
    }
}

fn send_fixed_to_self(cpu: &mut Cpu, vector: u8) {
    if vector < 16 {
        cpu.system.lapic.report(lapic::ERROR_SEND_ILLEGAL);
    } else {
        cpu.system.lapic.accept(vector, false);
    }
}

/// Tells the other processors how this one is addressed.
pub fn publish(cpu: &Cpu) {
    let apic = &cpu.system.lapic;
    let reach = Reachability {
        ldr: apic.logical_id(),
        enabled: apic.globally_enabled(),
        x2apic: apic.x2apic(),
        flat: apic.flat(),
        software_enabled: apic.software_enabled(),
        takes_extint: apic.takes_extint() || apic.lint0().is_some(),
    };
    if let Some(mailbox) = cpu.shared.mailboxes.get(cpu.system.index as usize) {
        mailbox.publish(reach);
    }
}

/// Sends the interrupt that ICR describes.
fn send_icr(cpu: &mut Cpu) {
    let apic = &mut cpu.system.lapic;
    let (low, high) = (apic.icr_low, apic.icr_high);
    let (mode, vector) = ((low >> 8 & 7) as u8, low as u8);
    if mode <= delivery::LOWEST_PRIORITY && vector < 16 {
        apic.report(lapic::ERROR_SEND_ILLEGAL);
        return;
    }
    // INIT with level de-assert only synchronises arbitration ids: nothing on processors since the P4.
    if mode == delivery::INIT && low & 1 << 15 != 0 && low & 1 << 14 == 0 {
        return;
    }
    let wide = apic.x2apic();
    let destination = match low >> 18 & 3 {
        0 if low & 1 << 11 != 0 => Destination::Logical(if wide { high } else { high >> 24 }),
        0 if wide => Destination::Physical(high),
        0 => physical8(high >> 24),
        1 => {
            if mode == delivery::FIXED {
                send_fixed_to_self(cpu, vector);
            }
            return;
        }
        2 => Destination::All,
        _ => Destination::AllBut(apic.id()),
    };
    // Interrupts between processors are edge triggered whatever the trigger bit says.
    routing::send(&cpu.shared, &Message { destination, mode, vector, level: false, wide });
}

/// RDMSR of an x2APIC register.
pub(crate) fn msr_read(cpu: &mut Cpu, index: u32) -> Option<u64> {
    if !cpu.system.lapic.x2apic() {
        return None;
    }
    let register = (index & 0x3f) << 4;
    match register {
        offset::ICR_LOW => {
            let apic = &cpu.system.lapic;
            Some(u64::from(apic.icr_high) << 32 | u64::from(apic.icr_low))
        }
        offset::APR | offset::EOI | offset::DFR | offset::ICR_HIGH | offset::SELF_IPI => None,
        _ => read(cpu, register).map(u64::from),
    }
}

/// Bits that WRMSR may set in an x2APIC register; `None` for registers that cannot be written.
fn x2apic_writable(register: u32) -> Option<u64> {
    Some(match register {
        offset::TPR => 0xff,
        offset::EOI | offset::ESR => 0,
        offset::SVR => 0x1ff,
        offset::ICR_LOW => 0xffff_ffff_000c_cfff,
        offset::LVT_TIMER => 0x7_10ff,
        offset::LVT_THERMAL | offset::LVT_PERFORMANCE => 0x1_17ff,
        offset::LVT_LINT0 | offset::LVT_LINT1 => 0x1_f7ff,
        offset::LVT_ERROR => 0x1_10ff,
        offset::INITIAL_COUNT => 0xffff_ffff,
        offset::DIVIDE => 0xb,
        offset::SELF_IPI => 0xff,
        _ => return None,
    })
}

/// WRMSR of an x2APIC register.
pub(crate) fn msr_write(cpu: &mut Cpu, index: u32, value: u64) -> Outcome {
    let register = (index & 0x3f) << 4;
    let writable = x2apic_writable(register).filter(|_| cpu.system.lapic.x2apic()).ok_or(Exception::GP0)?;
    if value & !writable != 0 {
        return Err(Exception::GP0);
    }
    let effect = match register {
        offset::SELF_IPI => Effect::SelfIpi(value as u8),
        _ => {
            if register == offset::ICR_LOW {
                cpu.system.lapic.icr_high = (value >> 32) as u32;
            }
            cpu.system.lapic.write(register, value as u32).unwrap_or(Effect::None)
        }
    };
    carry_out(cpu, effect);
    Ok(())
}

/// WRMSR to IA32_APIC_BASE.
///
/// ```text
///              EN               EXTD
/// disabled ─────────► xAPIC ─────────► x2APIC        anything else that changes EN or EXTD: #GP(0),
///     ▲                 │                 │          except back to disabled
///     └─────────────────┴─────────────────┘
/// ```
pub(crate) fn write_base(cpu: &mut Cpu, value: u64) -> Outcome {
    let physical = (1u64 << cpu.shared.model.physical_bits()) - 1;
    let allowed = physical & !0xfff | BASE_BSP | BASE_X2APIC | BASE_ENABLE;
    const MODE: u64 = BASE_ENABLE | BASE_X2APIC;
    let old = cpu.system.lapic.base();
    let valid = !matches!((old & MODE, value & MODE), (_, BASE_X2APIC) | (MODE, BASE_ENABLE) | (0, MODE));
    if value & !allowed != 0 || !valid {
        return Err(Exception::GP0);
    }
    let apic = &mut cpu.system.lapic;
    apic.base = value;
    match (old & MODE, value & MODE) {
        (a, b) if a == b => {}
        // Disabled: everything is as after RESET when it is enabled again.
        (_, 0) => apic.reset_registers(),
        (_, MODE) => (apic.icr_high, apic.icr_low) = (0, 0),
        _ => {}
    }
    publish(cpu);
    Ok(())
}

/// IA32_TSC_DEADLINE.
pub(crate) fn deadline(cpu: &Cpu) -> u64 {
    cpu.system.lapic.timer.deadline
}

/// WRMSR to IA32_TSC_DEADLINE: ignored in the count modes.
pub(crate) fn set_deadline(cpu: &mut Cpu, value: u64) {
    if cpu.system.lapic.timer_mode() == Mode::Deadline {
        cpu.system.lapic.timer.deadline = value;
        if value != 0 && time::guest_tsc(cpu) >= value {
            cpu.recheck = true;
        }
    }
}

/// Requests the timer's interrupt if it is due.
#[inline]
pub(crate) fn check_timer(cpu: &mut Cpu) {
    let timer = &cpu.system.lapic.timer;
    if timer.deadline == 0 && timer.expires.is_none() {
        return;
    }
    let mode = cpu.system.lapic.timer_mode();
    let due = if mode == Mode::Deadline {
        let tsc = time::guest_tsc(cpu);
        cpu.system.lapic.timer.expire_deadline(tsc)
    } else {
        let now = cpu.shared.clock.now();
        cpu.system.lapic.timer.expire_count(mode, now)
    };
    if due {
        cpu.system.lapic.timer_expired();
    }
}

/// Guest time at which the timer is due next.
pub(crate) fn next_timer(cpu: &Cpu) -> Option<u64> {
    let timer = &cpu.system.lapic.timer;
    if cpu.system.lapic.timer_mode() != Mode::Deadline {
        return timer.expires;
    }
    // What "due" means must be what `check_timer` means, or a halted vCPU spins until the deadline.
    let left = timer.deadline_in(time::guest_tsc(cpu))?;
    let clock = &cpu.shared.clock;
    // A deadline behind the last tick of the clock never comes.
    let at = clock.tsc().checked_add(left)?;
    Some(clock.tsc_to_nanos(at).saturating_add(1))
}

/// Moves what other threads posted into the APIC.
pub(crate) fn drain_posted(cpu: &mut Cpu) {
    let Some(mailbox) = cpu.shared.mailboxes.get(cpu.system.index as usize) else { return };
    for word in 0..4 {
        let (mut vectors, level) = mailbox.take_posted(word);
        while vectors != 0 {
            let bit = vectors.trailing_zeros();
            vectors &= vectors - 1;
            cpu.system.lapic.accept((word as u32 * 64 + bit) as u8, level >> bit & 1 != 0);
        }
    }
}

/// The level of the legacy INTR pin, if it reaches this processor.
pub(crate) fn extint_pending(cpu: &Cpu) -> bool {
    cpu.shared.extint_high.load(Ordering::SeqCst) && cpu.system.lapic.takes_extint()
}

/// The legacy INTR pin rose: LINT0 in a mode other than ExtINT takes the edge.
pub(crate) fn lint0_edge(cpu: &mut Cpu) {
    if !cpu.system.lapic.globally_enabled() {
        return;
    }
    match cpu.system.lapic.lint0() {
        Some((delivery::FIXED, vector)) => cpu.system.lapic.accept(vector, false),
        Some((delivery::NMI, _)) => cpu.system.latch_nmis(1, cpu.nmi_blocked),
        _ => {}
    }
}
