//! The 8254 interval timer and system control port 61 (Intel 8254 data sheet; ICH9 data sheet 13.3, 13.7).
//!
//! Nothing ticks here: a counter's value and output follow from the guest time at which it was loaded, so that a
//! read is exact whatever the host did. Only channel 0 has a timer, for its interrupt.
//!
//! ```text
//!  channel 0: timer at the next rising edge of OUT --> due = edges since load
//!             delivered < due: pulse IRQ 0, delivered += 1
//!                 still behind  --> again after a pause (a quarter period, 50 us to 1 ms)
//!                 PIC still holds the last edge --> nothing delivered, again after the pause
//!                 caught up     --> timer at the next edge
//! ```
//!
//! So a guest that counts periodic ticks loses none when the host was late: they come one at a time, spaced.
//! Through the IOAPIC the acceptance of an edge is not visible; the spacing alone then paces them. A backlog
//! beyond [`MAX_BACKLOG`] ticks is dropped. Writing the channel forgets the backlog.
//!
//! Ports: 40-43 ([`Pit`] itself), 61 ([`Pit::system_control`]).

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, Weak};

use atoll_machine::bus::PortDevice;
use atoll_machine::inputs::{InputGate, InputKind};
use atoll_machine::interrupt::IrqLine;
use atoll_machine::time::{Nanos, Timer, Timers};

use crate::lock;
use channel::Channel;
use saved_state::PitStateV1;

mod channel;
pub mod metrics;
pub mod saved_state;
#[cfg(test)]
mod tests;

pub use metrics::PitMetrics;

/// Input clock of the counters in Hz.
pub const FREQUENCY: u64 = 1_193_182;
/// Ticks that are made up for at most.
pub const MAX_BACKLOG: u64 = 100_000;
/// Pause between two ticks of a backlog, in nanoseconds.
const MIN_PAUSE: Nanos = 50_000;
const MAX_PAUSE: Nanos = 1_000_000;
/// Bit 4 of port 61 toggles with each memory refresh of an AT: every 15.085 us.
const REFRESH_TOGGLE: Nanos = 15_085;

/// Ticks of the input clock in `nanos`, rounded down.
fn ticks(nanos: Nanos) -> u64 {
    (u128::from(nanos) * u128::from(FREQUENCY) / 1_000_000_000) as u64
}

/// The first nanosecond at which `ticks` ticks have passed.
fn nanos(ticks: u64) -> Nanos {
    (u128::from(ticks) * 1_000_000_000).div_ceil(u128::from(FREQUENCY)) as u64
}

struct Inner {
    channels: [Channel; 3],
    /// Ticks of channel 0 raised since it was loaded.
    delivered: u64,
    /// Port 61, bits 3..0.
    control: u8,
}

/// Tells whether another edge on IRQ 0 would be lost now.
pub type BusyProbe = Arc<dyn Fn() -> bool + Send + Sync>;

/// The timer. See the module's documentation.
pub struct Pit {
    inner: Mutex<Inner>,
    timers: Arc<Timers>,
    timer: Timer,
    irq: IrqLine,
    busy: BusyProbe,
    /// Ticks raised, ticks made up for, ticks dropped.
    counts: [AtomicU64; 3],
}

impl Pit {
    /// A timer whose channel 0 drives `irq`; `busy` paces ticks that are made up for
    /// (`gsi.request_pending(0)`).
    pub fn new(timers: &Arc<Timers>, gate: &Arc<InputGate>, irq: IrqLine, busy: BusyProbe) -> Arc<Self> {
        Arc::new_cyclic(|weak: &Weak<Self>| {
            let (weak, gate) = (weak.clone(), gate.clone());
            let timer = timers.timer(move |_| {
                if let Some(pit) = weak.upgrade() {
                    gate.deliver(InputKind::Timer, move || pit.expired());
                }
            });
            Self {
                inner: Mutex::new(Inner { channels: Channel::power_on(), delivered: 0, control: 0 }),
                timers: timers.clone(),
                timer,
                irq,
                busy,
                counts: Default::default(),
            }
        })
    }

    fn now(&self) -> Nanos {
        self.timers.clock().now()
    }

    /// Device for port 61.
    pub fn system_control(self: &Arc<Self>) -> Arc<dyn PortDevice> {
        Arc::new(SystemControl(self.clone()))
    }

    /// Counters since the machine started.
    pub fn metrics(&self) -> PitMetrics {
        let [ticks, made_up, dropped] = &self.counts;
        PitMetrics {
            ticks: ticks.load(Ordering::Relaxed),
            made_up: made_up.load(Ordering::Relaxed),
            dropped: dropped.load(Ordering::Relaxed),
        }
    }

    /// Raises the tick that is due and arms the timer for the next.
    fn expired(&self) {
        let mut inner = lock(&self.inner);
        let now = self.now();
        let channel = &mut inner.channels[0];
        channel.advance(now);
        let due = channel.edges(now);
        let period = channel.period();
        let mut behind = due.saturating_sub(inner.delivered);
        if behind > MAX_BACKLOG {
            self.counts[2].fetch_add(behind - MAX_BACKLOG, Ordering::Relaxed);
            inner.delivered = due - MAX_BACKLOG;
            behind = MAX_BACKLOG;
        }
        let pause = (period / 4).clamp(MIN_PAUSE, MAX_PAUSE);
        if behind > 0 {
            // A lone tick is never held back: where it cannot be seen, hardware would lose it too.
            if behind > 1 && (self.busy)() {
                self.timer.arm(now + pause);
                return;
            }
            inner.delivered += 1;
            self.counts[0].fetch_add(1, Ordering::Relaxed);
            self.irq.pulse();
            if behind > 1 {
                self.counts[1].fetch_add(1, Ordering::Relaxed);
                self.timer.arm(now + pause);
                return;
            }
        }
        self.arm_next(&inner);
    }

    fn arm_next(&self, inner: &Inner) {
        match inner.channels[0].edge_time(inner.delivered) {
            Some(at) => self.timer.arm(at),
            None => self.timer.disarm(),
        }
    }

    /// Channel 0 was programmed: its edges start anew.
    fn rearm(&self, inner: &mut Inner) {
        inner.delivered = 0;
        self.arm_next(inner);
    }

    /// Power-on state.
    pub fn reset(&self) {
        let mut inner = lock(&self.inner);
        inner.channels = Channel::power_on();
        inner.control = 0;
        self.rearm(&mut inner);
    }

    /// The saved form.
    pub fn save(&self) -> PitStateV1 {
        let inner = lock(&self.inner);
        PitStateV1 {
            channels: inner.channels.iter().map(Channel::save).collect(),
            delivered: Some(inner.delivered),
            control: Some(u32::from(inner.control)),
        }
    }

    /// Takes over a saved state. Guest time must be restored before.
    pub fn restore(&self, saved: &PitStateV1) {
        let mut inner = lock(&self.inner);
        inner.channels = Channel::power_on();
        for (to, from) in inner.channels.iter_mut().zip(&saved.channels) {
            *to = Channel::restored(from);
        }
        inner.delivered = saved.delivered.unwrap_or(0);
        inner.control = saved.control.unwrap_or(0) as u8 & 0x0f;
        self.arm_next(&inner);
    }

    fn write_control_word(&self, inner: &mut Inner, value: u8, now: Nanos) {
        let select = value >> 6;
        if select == 3 {
            for (i, channel) in inner.channels.iter_mut().enumerate() {
                if value & 2 << i != 0 {
                    channel.read_back(value & 0x20 == 0, value & 0x10 == 0, now);
                }
            }
        } else if value & 0x30 == 0 {
            inner.channels[usize::from(select)].read_back(true, false, now);
        } else {
            inner.channels[usize::from(select)].set_mode(value, now);
            if select == 0 {
                self.rearm(inner);
            }
        }
    }

    fn write_byte(&self, offset: u16, value: u8) {
        let mut inner = lock(&self.inner);
        let now = self.now();
        match offset & 3 {
            3 => self.write_control_word(&mut inner, value, now),
            n => {
                let channel = &mut inner.channels[usize::from(n)];
                channel.advance(now);
                let loaded = channel.write_count(value, now);
                if loaded && n == 0 {
                    self.rearm(&mut inner);
                }
            }
        }
    }

    fn read_byte(&self, offset: u16) -> u8 {
        let mut inner = lock(&self.inner);
        let now = self.now();
        match offset & 3 {
            // The control word cannot be read.
            3 => 0xff,
            n => {
                let channel = &mut inner.channels[usize::from(n)];
                channel.advance(now);
                channel.read(now)
            }
        }
    }
}

impl PortDevice for Pit {
    fn port_read(&self, offset: u16, data: &mut [u8]) {
        for (i, byte) in data.iter_mut().enumerate() {
            *byte = self.read_byte(offset.wrapping_add(i as u16));
        }
    }
    fn port_write(&self, offset: u16, data: &[u8]) {
        for (i, &byte) in data.iter().enumerate() {
            self.write_byte(offset.wrapping_add(i as u16), byte);
        }
    }
}

/// Port 61: bit 0 gate of channel 2, bit 1 speaker, bits 2 and 3 error checks off, bit 4 refresh, bit 5 OUT 2.
struct SystemControl(Arc<Pit>);

impl PortDevice for SystemControl {
    fn port_read(&self, _offset: u16, data: &mut [u8]) {
        let mut inner = lock(&self.0.inner);
        let now = self.0.now();
        inner.channels[2].advance(now);
        let refresh = ((now / REFRESH_TOGGLE) & 1) as u8;
        let out = u8::from(inner.channels[2].output(now));
        data.fill(0xff);
        if let Some(byte) = data.first_mut() {
            *byte = inner.control | refresh << 4 | out << 5;
        }
    }
    fn port_write(&self, _offset: u16, data: &[u8]) {
        let Some(&value) = data.first() else { return };
        let mut inner = lock(&self.0.inner);
        let now = self.0.now();
        inner.control = value & 0x0f;
        inner.channels[2].advance(now);
        inner.channels[2].set_gate(value & 1 != 0, now);
    }
}
