//! KVM's paravirtual clock and steal time, in the layout that Linux documents under virt/kvm/x86/msr.
//!
//! ```text
//! wall clock (write once, on demand):  version u32 │ seconds u32 │ nanoseconds u32
//! system time (per vCPU, 32 bytes):    version u32 │ pad │ tsc_timestamp u64 │ system_time u64
//!                                      │ tsc_to_system_mul u32 │ tsc_shift i8 │ flags u8 │ pad
//! steal time (per vCPU, 64 bytes):     steal u64 │ version u32 │ flags u32 │ preempted u8 │ pad
//! ```
//!
//! A version is odd while the record changes, so a reader on another vCPU tries again. The clock's parameters
//! never drift (guest time and TSC come from one [`Clock`](atoll_machine::time::Clock)), so the record is
//! written when the guest enables it and when the TSC's offset or the loaded state changes.

use std::io::{Read, Seek};

use crate::cpu::Cpu;
use crate::exception::{Exception, Outcome};

/// Enable bit of the system-time and steal-time registers.
const ENABLED: u64 = 1;
/// Flag: the clocks of all vCPUs agree.
const TSC_STABLE: u8 = 1;
/// How often steal time is brought up to date, in guest nanoseconds.
const STEAL_INTERVAL: u64 = 10_000_000;

/// The registers, and what they need to remember.
#[derive(Debug, Default)]
pub struct Paravirt {
    /// KVM_WALL_CLOCK.
    pub wall_clock: u64,
    /// KVM_SYSTEM_TIME.
    pub system_time: u64,
    /// KVM_STEAL_TIME.
    pub steal_time: u64,
    /// The records in guest memory are to be written again before the vCPU runs (a state was loaded).
    pub stale: bool,
    /// Nanoseconds stolen so far, as the guest sees them.
    pub stolen: u64,
    /// The host's run delay when `stolen` was last brought up to date.
    last_delay: Option<u64>,
    /// Guest time of the next update.
    next_update: u64,
    /// `/proc/thread-self/schedstat` of the vCPU's thread.
    schedstat: Option<std::fs::File>,
}

/// Factor and shift with `ns = (ticks << shift) * factor >> 32` (a negative shift shifts right).
pub(crate) fn scale(tsc_khz: u32) -> (u32, i8) {
    let mut ticks = u64::from(tsc_khz.max(1)) * 1000;
    let mut shift = 0i8;
    // Bring ticks per second into (1e9, 2e9], so that the factor has 32 significant bits.
    while ticks > 2_000_000_000 {
        ticks >>= 1;
        shift -= 1;
    }
    while ticks <= 1_000_000_000 {
        ticks <<= 1;
        shift += 1;
    }
    // Computed from the exact frequency: the halvings above dropped bits.
    let exact = if shift <= 0 {
        (1_000_000u128 << 32 << u32::from(shift.unsigned_abs())) / u128::from(tsc_khz.max(1))
    } else {
        (1_000_000u128 << 32 >> u32::from(shift.unsigned_abs())) / u128::from(tsc_khz.max(1))
    };
    (u32::try_from(exact).unwrap_or(u32::MAX), shift)
}

fn next_version(cpu: &Cpu, address: u64) -> u32 {
    let mut old = [0; 4];
    let _ = cpu.shared.memory.read(address, &mut old);
    u32::from_le_bytes(old) & !1
}

/// Writes guest memory; a guest that names an address without RAM gets nothing.
fn put(cpu: &Cpu, address: u64, data: &[u8]) {
    let _ = cpu.shared.memory.write(address, data);
}

/// Writes `record` at `address`; the version is the 32-bit word at `version_at` of it.
fn publish(cpu: &Cpu, address: u64, record: &[u8], version_at: usize) {
    let version = next_version(cpu, address.wrapping_add(version_at as u64));
    let at = address.wrapping_add(version_at as u64);
    put(cpu, at, &version.wrapping_add(1).to_le_bytes());
    let after = version_at + 4;
    put(cpu, address, record.get(..version_at).unwrap_or_default());
    put(cpu, address.wrapping_add(after as u64), record.get(after..).unwrap_or_default());
    put(cpu, at, &version.wrapping_add(2).to_le_bytes());
}

/// KVM_WALL_CLOCK: writes the wall-clock time at which guest time was zero.
pub(crate) fn write_wall_clock(cpu: &mut Cpu, value: u64) {
    cpu.system.paravirt.wall_clock = value;
    let clock = &cpu.shared.clock;
    let boot = clock.wall().saturating_sub(clock.now());
    let mut record = [0; 12];
    record[4..8].copy_from_slice(&((boot / 1_000_000_000) as u32).to_le_bytes());
    record[8..12].copy_from_slice(&((boot % 1_000_000_000) as u32).to_le_bytes());
    publish(cpu, value & !3, &record, 0);
}

/// KVM_SYSTEM_TIME: enables or disables this vCPU's clock record.
pub(crate) fn write_system_time(cpu: &mut Cpu, value: u64) {
    cpu.system.paravirt.system_time = value;
    refresh(cpu);
}

/// Writes the clock record again, if it is enabled.
pub(crate) fn refresh(cpu: &mut Cpu) {
    let register = cpu.system.paravirt.system_time;
    if register & ENABLED == 0 {
        return;
    }
    let clock = &cpu.shared.clock;
    let ticks = clock.tsc();
    let now = clock.tsc_to_nanos(ticks);
    let guest_ticks = ticks.wrapping_add(super::time::offset(cpu));
    let (factor, shift) = scale(clock.tsc_khz());
    let mut record = [0; 32];
    record[8..16].copy_from_slice(&guest_ticks.to_le_bytes());
    record[16..24].copy_from_slice(&now.to_le_bytes());
    record[24..28].copy_from_slice(&factor.to_le_bytes());
    record[28] = shift as u8;
    record[29] = TSC_STABLE;
    publish(cpu, register & !ENABLED, &record, 0);
}

/// KVM_STEAL_TIME: #GP for the reserved bits 5..1.
pub(crate) fn write_steal_time(cpu: &mut Cpu, value: u64) -> Outcome {
    if value & 0x3e != 0 {
        return Err(Exception::GP0);
    }
    cpu.system.paravirt.steal_time = value;
    cpu.system.paravirt.last_delay = None;
    cpu.system.paravirt.next_update = 0;
    update_steal(cpu, cpu.shared.clock.now());
    Ok(())
}

/// Brings steal time up to date, at most every [`STEAL_INTERVAL`]. Called from the run loop on the vCPU's own
/// thread. On a clock that does not advance by itself nothing is ever stolen, so such runs are repeatable.
pub(crate) fn update_steal(cpu: &mut Cpu, now: u64) {
    let register = cpu.system.paravirt.steal_time;
    if register & ENABLED == 0 || now < cpu.system.paravirt.next_update {
        return;
    }
    cpu.system.paravirt.next_update = now.saturating_add(STEAL_INTERVAL);
    if cpu.shared.clock.host_delay(now).is_some() {
        let p = &mut cpu.system.paravirt;
        if let Some(delay) = run_delay(&mut p.schedstat) {
            let before = p.last_delay.replace(delay).unwrap_or(delay);
            p.stolen = p.stolen.wrapping_add(delay.saturating_sub(before));
        }
    }
    if cpu.system.paravirt.stolen == 0 {
        // A machine that moved here brings what the guest has seen so far.
        let mut old = [0; 8];
        let _ = cpu.shared.memory.read(register & !0x3f, &mut old);
        cpu.system.paravirt.stolen = u64::from_le_bytes(old);
    }
    let mut record = [0; 64];
    record[..8].copy_from_slice(&cpu.system.paravirt.stolen.to_le_bytes());
    publish(cpu, register & !0x3f, &record, 8);
}

/// Forgets what belongs to the host thread: a vCPU may continue on another one.
pub(crate) fn thread_changed(paravirt: &mut Paravirt) {
    paravirt.schedstat = None;
    paravirt.last_delay = None;
}

/// Nanoseconds that this thread was runnable but not running; `None` where the kernel does not say.
fn run_delay(file: &mut Option<std::fs::File>) -> Option<u64> {
    if file.is_none() {
        *file = std::fs::File::open("/proc/thread-self/schedstat").ok();
    }
    let file = file.as_mut()?;
    let mut text = [0; 64];
    file.rewind().ok()?;
    let length = file.read(&mut text).ok()?;
    let text = std::str::from_utf8(text.get(..length)?).ok()?;
    text.split_whitespace().nth(1)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scale_turns_ticks_into_nanoseconds() {
        for khz in [1000u32, 999_999, 1_000_000, 2_599_998, 2_600_000, 4_000_000, 4_200_000] {
            let (factor, shift) = scale(khz);
            let ticks = u64::from(khz) * 1000 * 3600; // one hour
            let shifted = if shift < 0 { ticks >> -shift } else { ticks << shift };
            let ns = ((u128::from(shifted) * u128::from(factor)) >> 32) as u64;
            let error = ns.abs_diff(3_600_000_000_000);
            assert!(error < 2000, "{khz} kHz: off by {error} ns per hour");
            assert!(factor >= 1 << 31, "{khz} kHz: factor {factor:#x}");
        }
    }

    #[test]
    fn run_delay_is_read_or_absent() {
        let mut file = None;
        if let Some(first) = run_delay(&mut file) {
            assert!(run_delay(&mut file).unwrap() >= first);
        }
    }
}
