//! The guest's time-stamp counter and the paravirtual clock.
//!
//! ```text
//! what the guest reads = host TSC (scaled) + offset + the vCPU's TSC_ADJUST      while it runs: the processor
//!                      = clock.tsc() + origin       + the vCPU's TSC_ADJUST      while it stands: this module
//! ```
//!
//! The offset is one for the whole partition, so the counters of all vCPUs are equal and the kernel's paravirtual
//! clock can work without a lock ("master clock"). It is set anew only while no vCPU runs, by the first one that
//! enters, if it is off by more than [`TOLERANCE_NANOS`]: after a pause, or because a long run let the host's TSC
//! and its disciplined clock drift apart. The counter never goes back by that: what guests have read is a floor.
//!
//! TSC_ADJUST and the TSC itself are written by guests without an exit; [`TimeBase::leave`] learns the result.
//!
//! `kvm_pvm`, KVM without hardware virtualization, cannot move its guests' counter: it is the host's, whatever is set.
//! There the origin is made to fit, so that states tell what guests read; TSC_ADJUST stays zero, and the counter
//! does not stand still with the clock.
//!
//! Lock: one mutex, innermost; ioctls on the entering vCPU and the VM are made while it is held.

use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use atoll_machine::backend::BackendError;
use atoll_machine::cpu::msr::index as msr;
use atoll_machine::time::{Clock, nanos_to_tsc, tsc_to_nanos};
use kvm_bindings::kvm_clock_data;
use kvm_ioctls::{VcpuFd, VmFd};

use crate::host::KvmHost;
use crate::msrs;
use crate::state::ioctls;

/// Frequencies as near as this count as equal, in parts per million: what a guest's own clock discipline absorbs,
/// and the kernel's own limit.
const TOLERATED_PPM: u64 = 250;
/// An offset that is off by more than this is set anew when nothing runs.
const TOLERANCE_NANOS: u64 = 20_000;
/// A saved counter that continues within this of the machine's own belongs to the same origin.
const SAME_ORIGIN_NANOS: u64 = 1_000_000_000;
/// Readings of the counter of which the quickest is taken.
const READINGS: u32 = 3;

/// How a guest can have the TSC frequency that it was made with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Decision {
    /// The host's is the same.
    Exact,
    /// The host's is near enough; the counter runs at the host's.
    Tolerated,
    /// The processor scales.
    Scale,
    /// Not at all here.
    Refuse,
}

/// How a guest with a TSC of `wanted_khz` runs on a host with one of `host_khz`. Scaling has not been proven on
/// real hardware.
pub(crate) fn decide(host_khz: u32, wanted_khz: u32, can_scale: bool) -> Decision {
    let difference = u64::from(host_khz.abs_diff(wanted_khz)) * 1_000_000;
    if difference == 0 {
        Decision::Exact
    } else if difference <= u64::from(host_khz) * TOLERATED_PPM {
        Decision::Tolerated
    } else if can_scale {
        Decision::Scale
    } else {
        Decision::Refuse
    }
}

/// A partition's time.
pub(crate) struct TimeBase {
    clock: Arc<dyn Clock>,
    /// Frequency for KVM_SET_TSC_KHZ.
    scale_to: Option<u32>,
    base: Mutex<Base>,
}

#[derive(Default)]
struct Base {
    /// Guest TSC minus the clock's, TSC_ADJUST apart (wrapping).
    origin: u64,
    /// Highest TSC that a guest may have read, TSC_ADJUST apart; 0 where there is none.
    floor: u64,
    /// Highest paravirtual clock that a guest may have read, ns.
    clock_floor: u64,
    /// What the kernel is to add to the host's TSC, TSC_ADJUST apart.
    offset: Option<u64>,
    /// Counts the changes of `offset`.
    generation: u64,
    /// The host takes no offset: guests read its own TSC.
    fixed: bool,
    /// vCPUs between [`TimeBase::enter`] and [`TimeBase::leave`].
    running: u32,
}

/// One vCPU's part.
#[derive(Debug, Default)]
pub(crate) struct VcpuTime {
    /// IA32_TSC_ADJUST.
    pub adjust: u64,
    /// The generation of the offset that the kernel has, and the TSC_ADJUST in it; `None` before the first.
    set: Option<(u64, u64)>,
    running: bool,
}

impl TimeBase {
    /// Time by `clock` on `host`. Fails where the machine's frequency cannot be had.
    pub(crate) fn new(clock: Arc<dyn Clock>, host: &KvmHost) -> Result<Self, BackendError> {
        Self::with(clock, host.tsc_khz(), host.capabilities().tsc_control)
    }

    fn with(clock: Arc<dyn Clock>, host_khz: u32, can_scale: bool) -> Result<Self, BackendError> {
        let wanted = clock.tsc_khz();
        let scale_to = match decide(host_khz, wanted, can_scale) {
            Decision::Exact | Decision::Tolerated => None,
            Decision::Scale => Some(wanted),
            Decision::Refuse => {
                return Err(BackendError::Config(format!(
                    "the machine's TSC runs at {wanted} kHz, this host's at {host_khz} kHz, and its processor \
                     cannot scale; use a host with TSC scaling or the software CPU"
                )));
            }
        };
        Ok(Self { clock, scale_to, base: Mutex::default() })
    }

    fn lock(&self) -> MutexGuard<'_, Base> {
        self.base.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Prepares a new vCPU: frequency and offset, so that the kernel finds all counters equal from the start.
    pub(crate) fn prepare(&self, vm: &VmFd, fd: &VcpuFd, vcpu: &mut VcpuTime) -> io::Result<()> {
        if let Some(khz) = self.scale_to {
            fd.set_tsc_khz(khz)?;
        }
        let mut base = self.lock();
        if base.offset.is_none() {
            self.synchronise(&mut base, vm, fd)?;
            let (before, wanted) = (ioctls::tsc_offset(fd)?, base.offset.unwrap_or(0));
            apply(&base, fd, vcpu)?;
            // A host whose own TSC is unstable makes something near `wanted` of it.
            base.fixed = before != wanted && ioctls::tsc_offset(fd)? == before;
            if base.fixed {
                self.synchronise(&mut base, vm, fd)?;
            }
        }
        apply(&base, fd, vcpu)
    }

    /// Guest TSC now, TSC_ADJUST apart.
    pub(crate) fn tsc(&self) -> u64 {
        expected(&self.lock(), self.clock.tsc())
    }

    /// Adopts a saved TSC and TSC_ADJUST. A counter that continues this machine's (within a second) keeps its
    /// origin, so that all vCPUs stay equal although their states are set one after the other.
    pub(crate) fn restore(&self, vcpu: &mut VcpuTime, tsc: u64, adjust: u64) {
        let mut base = self.lock();
        if base.fixed {
            return;
        }
        vcpu.adjust = adjust;
        let counter = tsc.wrapping_sub(adjust);
        let wanted = counter.wrapping_sub(self.clock.tsc());
        let near = nanos_to_tsc(SAME_ORIGIN_NANOS, self.clock.tsc_khz());
        if (wanted.wrapping_sub(base.origin) as i64).unsigned_abs() >= near {
            base.origin = wanted;
        }
        if counter < base.floor {
            // An earlier state of the machine comes back.
            base.clock_floor = 0;
        }
        // Its guest has read this much, though the origin may say less: a counter that ran a little faster than the
        // clock for hours is far ahead.
        base.floor = counter;
    }

    /// To be called before the vCPU runs.
    pub(crate) fn enter(&self, vm: &VmFd, fd: &VcpuFd, vcpu: &mut VcpuTime) -> io::Result<()> {
        let mut base = self.lock();
        if base.running == 0 && self.is_off(&base, fd)? {
            self.synchronise(&mut base, vm, fd)?;
        }
        apply(&base, fd, vcpu)?;
        if !std::mem::replace(&mut vcpu.running, true) {
            base.running += 1;
        }
        Ok(())
    }

    /// To be called after the vCPU ran, with what its IA32_TSC and IA32_TSC_ADJUST hold now.
    pub(crate) fn leave(&self, vm: &VmFd, vcpu: &mut VcpuTime, tsc: u64, adjust: u64) {
        vcpu.adjust = adjust;
        // What the guest wrote is in the kernel's offset too.
        if let Some((_, set)) = &mut vcpu.set {
            *set = adjust;
        }
        let mut base = self.lock();
        let counter = tsc.wrapping_sub(adjust);
        // A counter far behind the origin is of a guest that wrote its own; it is no floor for others.
        if (counter.wrapping_sub(base.floor) as i64) > 0 {
            base.floor = counter;
        }
        if std::mem::take(&mut vcpu.running) {
            base.running = base.running.saturating_sub(1);
        }
        if base.running == 0
            && let Ok(clock) = vm.get_clock()
        {
            base.clock_floor = base.clock_floor.max(clock.clock);
        }
    }

    /// Whether what the guest would read differs from what it should.
    fn is_off(&self, base: &Base, fd: &VcpuFd) -> io::Result<bool> {
        let Some(offset) = base.offset else { return Ok(true) };
        let (host, clock) = self.host_and_clock(fd)?;
        let error = expected(base, clock).wrapping_sub(host.wrapping_add(offset)) as i64;
        Ok(error.unsigned_abs() > nanos_to_tsc(TOLERANCE_NANOS, self.clock.tsc_khz()))
    }

    /// Makes a new offset from the clock, and sets the paravirtual clock.
    fn synchronise(&self, base: &mut Base, vm: &VmFd, fd: &VcpuFd) -> io::Result<()> {
        let (host, clock) = self.host_and_clock(fd)?;
        if base.fixed {
            base.origin = host.wrapping_sub(clock);
        }
        base.offset = Some(expected(base, clock).wrapping_sub(host));
        base.generation += 1;
        let lead = tsc_to_nanos(lead(base, clock), self.clock.tsc_khz());
        let clock = self.clock.now().saturating_add(lead).max(base.clock_floor);
        vm.set_clock(&kvm_clock_data { clock, ..kvm_clock_data::default() })?;
        Ok(())
    }

    /// The host's TSC as the guest has it (scaled, without offset) and the clock's TSC, both of one moment.
    fn host_and_clock(&self, fd: &VcpuFd) -> io::Result<(u64, u64)> {
        // What the kernel adds, to be taken from what it reads. Its ratio is finer than kHz, so only it can scale.
        let added = if self.scale_to.is_some() { Some(ioctls::tsc_offset(fd)?) } else { None };
        let mut best: Option<(u64, u64, u64)> = None;
        for _ in 0..READINGS {
            let before = self.clock.tsc();
            let host = match added {
                Some(offset) => msrs::read(fd, [msr::TSC])?[0].wrapping_sub(offset),
                None => ioctls::host_tsc(),
            };
            let took = self.clock.tsc().wrapping_sub(before);
            if best.is_none_or(|(shortest, ..)| took < shortest) {
                best = Some((took, host, before.wrapping_add(took / 2)));
            }
        }
        Ok(best.map_or((0, 0), |(_, host, clock)| (host, clock)))
    }
}

/// Guest TSC at the moment when the clock's is `clock`, TSC_ADJUST apart.
fn expected(base: &Base, clock: u64) -> u64 {
    clock.wrapping_add(base.origin).wrapping_add(lead(base, clock))
}

/// By how much the guest's counters are ahead of the clock, having run faster; its paravirtual clock is, too.
fn lead(base: &Base, clock: u64) -> u64 {
    let lead = base.floor.wrapping_sub(clock.wrapping_add(base.origin));
    if base.floor != 0 && (lead as i64) > 0 { lead } else { 0 }
}

/// Gives the kernel the partition's offset and the vCPU's TSC_ADJUST, where it does not have them.
fn apply(base: &Base, fd: &VcpuFd, vcpu: &mut VcpuTime) -> io::Result<()> {
    let wanted = (base.generation, vcpu.adjust);
    if vcpu.set == Some(wanted) {
        return Ok(());
    }
    let paused = vcpu.set.is_some_and(|(generation, _)| generation != base.generation);
    ioctls::set_tsc_offset(fd, base.offset.unwrap_or(0).wrapping_add(vcpu.adjust))?;
    if paused {
        // Tells the guest's watchdogs that it stood still. Refused while the guest has no paravirtual clock.
        let _ = fd.kvmclock_ctrl();
    }
    vcpu.set = Some(wanted);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use atoll_machine::time::VirtualClock;

    #[test]
    fn frequencies_are_exact_tolerated_scaled_or_refused() {
        use Decision::*;
        for (host, wanted, can_scale, what) in [
            (2_595_124, 2_595_124, false, Exact),
            (2_595_124, 2_595_124, true, Exact),
            (2_595_124, 2_595_000, false, Tolerated),
            (2_595_000, 2_595_124, true, Tolerated),
            // 250 ppm of 4 GHz is 1 MHz exactly.
            (4_000_000, 4_001_000, false, Tolerated),
            (4_000_000, 4_001_001, false, Refuse),
            (4_000_000, 3_998_999, true, Scale),
            (2_000_000, 3_000_000, true, Scale),
            (2_000_000, 3_000_000, false, Refuse),
            (u32::MAX, 1000, false, Refuse),
            (0, 1000, false, Refuse),
        ] {
            assert_eq!(decide(host, wanted, can_scale), what, "{host} {wanted} {can_scale}");
        }
    }

    #[test]
    fn a_refusal_names_both_frequencies() {
        let clock = VirtualClock::new(0, 2_000_000);
        let Err(error) = TimeBase::with(clock.clone(), 3_000_000, false) else { panic!("accepted") };
        let text = error.to_string();
        assert!(text.contains("2000000 kHz") && text.contains("3000000 kHz"), "{text}");
        assert_eq!(TimeBase::with(clock, 3_000_000, true).map(|t| t.scale_to).ok(), Some(Some(2_000_000)));
    }

    #[test]
    fn saved_counters_keep_or_move_the_origin_and_stay_equal() {
        let clock = VirtualClock::new(0, 1_000_000);
        let time = TimeBase::with(clock.clone(), 1_000_000, false).unwrap();
        clock.advance(5_000_000_000);
        assert_eq!(time.tsc(), 5_000_000_000);
        let (mut a, mut b) = (VcpuTime::default(), VcpuTime::default());
        // Another machine's counters, of moments a little apart, one with an adjustment.
        time.restore(&mut a, 70_000_000_000, 0);
        time.restore(&mut b, 70_000_500_007, 7);
        // The later moment counts, so that no counter goes back.
        assert_eq!((time.tsc(), a.adjust, b.adjust), (70_000_500_000, 0, 7));
        clock.advance(500_010);
        assert_eq!(time.tsc(), 70_000_500_010);
        // The same machine's own counter changes nothing.
        time.restore(&mut a, 70_000_500_010, 0);
        assert_eq!(time.tsc(), 70_000_500_010);
    }

    #[test]
    fn a_counter_that_ran_ahead_of_the_clock_goes_on_from_there_in_another_machine() {
        // An hour at 100 ppm more than the clock says: 0.36 s ahead, less than what would be another origin.
        let clock = VirtualClock::new(0, 1_000_000);
        clock.advance(3_600_000_000_000);
        let saved = 3_600_360_000_000;
        let time = TimeBase::with(clock.clone(), 1_000_000, false).unwrap();
        time.restore(&mut VcpuTime::default(), saved, 0);
        assert_eq!(time.tsc(), saved);
        assert_eq!(lead(&time.lock(), clock.tsc()), 360_000_000, "and so is the paravirtual clock");
        clock.advance(360_000_001);
        assert_eq!((time.tsc(), lead(&time.lock(), clock.tsc())), (saved + 1, 0));
    }

    #[test]
    fn the_counter_never_goes_back_unless_an_earlier_state_comes_back() {
        let clock = VirtualClock::new(0, 1_000_000);
        let time = TimeBase::with(clock.clone(), 1_000_000, false).unwrap();
        clock.advance(1_000_000);
        // The guest ran on a TSC that was a little faster than the clock.
        time.lock().floor = 1_000_300;
        assert_eq!(time.tsc(), 1_000_300);
        clock.advance(200);
        assert_eq!(time.tsc(), 1_000_300);
        clock.advance(200);
        assert_eq!(time.tsc(), 1_000_400);
        time.restore(&mut VcpuTime::default(), 900_000, 0);
        assert_eq!(time.tsc(), 1_000_400, "the origin is the machine's");
        time.lock().floor = 2_000_000;
        time.restore(&mut VcpuTime::default(), 900_000, 0);
        assert_eq!(time.tsc(), 1_000_400, "an earlier state's counter may be lower");
    }
}
