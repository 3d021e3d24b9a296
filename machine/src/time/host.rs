//! The clock of a machine that runs in real time.
//!
//! ```text
//!            resume
//!   Paused ─────────► Running       guest time = CLOCK_MONOTONIC + offset while running,
//!      ▲                 │          a constant while paused
//!      └─────────────────┘
//!            pause
//! ```
//!
//! Guest time follows the host's CLOCK_MONOTONIC, and the TSC is guest time scaled by the machine's TSC
//! frequency. So TSC, PM timer, HPET and kvmclock cannot drift apart by a tick, the guest gets the host's NTP
//! discipline for nothing, and the machine can move to a host with another TSC. The price is one
//! `clock_gettime` per RDTSC, 20 to 30 ns through the vDSO. CLOCK_MONOTONIC does not count time for which the
//! host was suspended, so a guest does not see that gap as a jump.

use std::io::Read;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering, fence};
use std::sync::{Mutex, MutexGuard};
use std::time::Duration;

use rustix::time::{ClockId, clock_gettime};

use super::{Clock, Nanos, nanos_to_tsc};
use crate::cpu::host::HostCpu;

/// Guest time from the host's clock, with pause and resume.
///
/// Readers take no lock: they read the fields between two looks at `sequence` and retry if it changed.
pub struct HostClock {
    tsc_khz: u32,
    /// Odd while a change is being made.
    sequence: AtomicU32,
    paused: AtomicBool,
    /// Guest time while paused; while running, guest time minus host time (wrapping).
    base: AtomicU64,
    changes: Mutex<()>,
}

impl HostClock {
    /// A paused clock at guest time `start`: zero for a new machine, the saved time for a restored one.
    pub fn paused_at(start: Nanos, tsc_khz: u32) -> Arc<Self> {
        Arc::new(Self {
            tsc_khz: tsc_khz.max(1),
            sequence: AtomicU32::new(0),
            paused: AtomicBool::new(true),
            base: AtomicU64::new(start),
            changes: Mutex::new(()),
        })
    }

    /// A running clock that starts at zero.
    pub fn started(tsc_khz: u32) -> Arc<Self> {
        let clock = Self::paused_at(0, tsc_khz);
        clock.resume();
        clock
    }

    /// The TSC frequency for a new machine on `host`: the host's own to the nearest MHz, or below 2 GHz to the nearest
    /// 100 kHz, so that it is never off by the 250 ppm beyond which a counter has to be scaled.
    ///
    /// Where CPUID does not tell it, the host's kernel does. Any figure would be correct, because the TSC is made
    /// from guest time; the host's own lets the machine move to hardware virtualization unscaled.
    pub fn nominal_tsc_khz(host: &HostCpu) -> u32 {
        let khz = host.tsc_khz.unwrap_or_else(kernels_tsc_khz);
        let step = if khz < 2_000_000 { 100 } else { 1000 };
        (khz.saturating_add(step / 2) / step * step).clamp(100_000, 100_000_000)
    }

    /// Runs `change` on (paused, base) while readers wait; what it returns is stored. The host's clock must be
    /// read inside: a reading from before readers wait would be older than what they have been told.
    fn change(&self, change: impl FnOnce(bool, u64) -> (bool, u64)) {
        let _one: MutexGuard<'_, ()> = self.changes.lock().unwrap_or_else(|e| e.into_inner());
        self.sequence.fetch_add(1, Ordering::SeqCst);
        fence(Ordering::SeqCst);
        let (paused, base) = change(self.paused.load(Ordering::Relaxed), self.base.load(Ordering::Relaxed));
        self.paused.store(paused, Ordering::Relaxed);
        self.base.store(base, Ordering::Relaxed);
        self.sequence.fetch_add(1, Ordering::Release);
    }

    /// Lets time stand still. Harmless when it already does.
    pub fn pause(&self) {
        // A processor may look at `sequence` a moment before it reads the clock, although the program says the
        // opposite; one microsecond covers that, and time never goes back.
        const SLACK: u64 = 1_000;
        self.change(|paused, base| {
            (true, if paused { base } else { base.wrapping_add(monotonic()).wrapping_add(SLACK) })
        });
    }

    /// Lets time go on from where it stood. Harmless when it runs.
    pub fn resume(&self) {
        self.change(|paused, base| (false, if paused { base.wrapping_sub(monotonic()) } else { base }));
    }

    /// Whether time stands still.
    pub fn is_paused(&self) -> bool {
        self.paused.load(Ordering::SeqCst)
    }

    /// Sets guest time of a paused clock: for restoring a saved machine in place. Returns false, and changes
    /// nothing, while the clock runs.
    pub fn set(&self, now: Nanos) -> bool {
        let mut done = false;
        self.change(|paused, base| {
            done = paused;
            (paused, if paused { now } else { base })
        });
        done
    }
}

impl Clock for HostClock {
    fn now(&self) -> Nanos {
        loop {
            let before = self.sequence.load(Ordering::Acquire);
            let paused = self.paused.load(Ordering::Relaxed);
            let base = self.base.load(Ordering::Relaxed);
            let now = if paused { base } else { base.wrapping_add(monotonic()) };
            fence(Ordering::Acquire);
            if before & 1 == 0 && self.sequence.load(Ordering::Relaxed) == before {
                return now;
            }
            std::hint::spin_loop();
        }
    }

    fn wall(&self) -> u64 {
        nanos(ClockId::Realtime)
    }

    fn tsc_khz(&self) -> u32 {
        self.tsc_khz
    }

    fn tsc(&self) -> u64 {
        nanos_to_tsc(self.now(), self.tsc_khz)
    }

    fn host_delay(&self, at: Nanos) -> Option<Duration> {
        let now = self.now();
        (!self.is_paused()).then(|| Duration::from_nanos(at.saturating_sub(now)))
    }
}

fn nanos(clock: ClockId) -> u64 {
    let now = clock_gettime(clock);
    (now.tv_sec as u64).wrapping_mul(1_000_000_000).wrapping_add(now.tv_nsec as u64)
}

fn monotonic() -> u64 {
    nanos(ClockId::Monotonic)
}

/// The TSC frequency that the host's kernel found, from the delay-loop figure of /proc/cpuinfo: with a TSC the
/// kernel counts two loops per tick. Any round figure where there is none.
fn kernels_tsc_khz() -> u32 {
    // The first processor is within the first page; a whole file of many processors takes milliseconds.
    let mut text = [0; 4096];
    let read = std::fs::File::open("/proc/cpuinfo").and_then(|mut f| f.read(&mut text)).unwrap_or(0);
    bogomips(&String::from_utf8_lossy(&text[..read])).map_or(2_000_000, |mips| (mips * 500.0) as u32)
}

fn bogomips(cpuinfo: &str) -> Option<f64> {
    let line = cpuinfo.lines().find(|line| line.starts_with("bogomips"))?;
    line.split(':').nth(1)?.trim().parse().ok().filter(|mips: &f64| mips.is_finite() && *mips > 0.0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::feature::FeatureSet;
    use crate::cpu::host::Vendor;

    #[test]
    fn time_runs_stands_still_and_goes_on_from_where_it_stood() {
        let clock = HostClock::paused_at(5_000_000_000, 2_000_000);
        assert_eq!(clock.now(), 5_000_000_000);
        assert_eq!(clock.tsc(), 10_000_000_000);
        assert_eq!(clock.host_delay(6_000_000_000), None);
        clock.resume();
        std::thread::sleep(Duration::from_millis(5));
        let a = clock.now();
        assert!((5_005_000_000..6_000_000_000).contains(&a), "{a}");
        assert!(clock.host_delay(a + 50_000_000).unwrap() <= Duration::from_millis(50));
        assert!(!clock.set(1), "a running clock is not set");
        clock.pause();
        let b = clock.now();
        std::thread::sleep(Duration::from_millis(5));
        assert_eq!(clock.now(), b);
        clock.pause();
        assert_eq!(clock.now(), b);
        clock.resume();
        clock.resume();
        assert!(clock.now() >= b && clock.now() < b + 5_000_000_000);
        clock.pause();
        assert!(clock.set(7));
        assert_eq!(clock.now(), 7);
    }

    #[test]
    fn time_never_goes_back_while_another_thread_pauses_and_resumes() {
        let clock = HostClock::started(1_000_000);
        let stop = Arc::new(AtomicBool::new(false));
        let toggler = {
            let (clock, stop) = (clock.clone(), stop.clone());
            std::thread::spawn(move || {
                while !stop.load(Ordering::Relaxed) {
                    clock.pause();
                    clock.resume();
                }
            })
        };
        let mut last = 0;
        for _ in 0..200_000 {
            let now = clock.now();
            assert!(now >= last, "{now} after {last}");
            last = now;
        }
        stop.store(true, Ordering::Relaxed);
        toggler.join().unwrap();
    }

    #[test]
    fn wall_clock_is_the_hosts() {
        let host = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap();
        let wall = Duration::from_nanos(HostClock::paused_at(0, 1).wall());
        assert!(wall >= host && wall - host < Duration::from_secs(5));
    }

    #[test]
    fn nominal_frequency_is_round_and_the_hosts() {
        let mut host = HostCpu { vendor: Vendor::Amd, features: FeatureSet::EMPTY, tsc_khz: Some(2_595_124) };
        assert_eq!(HostClock::nominal_tsc_khz(&host), 2_595_000);
        host.tsc_khz = None;
        let found = HostClock::nominal_tsc_khz(&host);
        assert_eq!(found % 100, 0);
        assert!((100_000..20_000_000).contains(&found), "{found}");
        assert_eq!(bogomips("processor\t: 0\nbogomips\t: 5192.19\n"), Some(5192.19));
        assert_eq!(bogomips("bogomips: -"), None);
        host.tsc_khz = Some(u32::MAX);
        assert_eq!(HostClock::nominal_tsc_khz(&host), 100_000_000);
        host.tsc_khz = Some(1_100_449);
        assert_eq!(HostClock::nominal_tsc_khz(&host), 1_100_400);
    }
}
