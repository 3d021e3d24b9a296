//! The Intel 6300ESB watchdog as a PCI function, 8086:25ab (Intel 6300ESB data sheet chapter 16; Linux: i6300esb).
//!
//! ```text
//!  disabled --enable--> stage 1 --preload 1 over--> stage 2 --preload 2 over--> machine reset
//!                          ^                           |
//!                          +------- reload ------------+      (80, 86, then the write: each write is unlocked)
//! ```
//!
//! BAR 0: preload 1 at 0, preload 2 at 4 (20 bits each), interrupt status at 8, reload at c. Configuration: 60
//! (bit 2 fast clock, bit 5 no reset), 68 (bit 0 lock, bit 1 enable, bit 2 free-running). Stage 1 raises no
//! interrupt: drivers turn it off. The timeout flag survives the reset, so that the next boot can tell.

use std::sync::{Arc, Mutex, Weak};

use atoll_machine::bus::MmioDevice;
use atoll_machine::control::{MachineRequest, SharedControl};
use atoll_machine::inputs::{InputGate, InputKind};
use atoll_machine::interrupt::MsiSink;
use atoll_machine::time::{Nanos, Timer, Timers};
use atoll_pci::{
    BarKind, BarMapper, BarSpec, BarTarget, FunctionBuilder, Identity, PciDevice, PciFunction, RestoreError,
};

use crate::lock;
use saved_state::WatchdogStateV1;

pub mod saved_state;
#[cfg(test)]
mod tests;

/// PCI clock in Hz.
const PCI_CLOCK: u128 = 33_000_000;
const CONFIG: u16 = 0x60;
const LOCK: u16 = 0x68;
const CONFIG_FAST: u16 = 1 << 2;
const CONFIG_NO_RESET: u16 = 1 << 5;
const LOCK_LOCKED: u8 = 1 << 0;
const LOCK_ENABLE: u8 = 1 << 1;
const LOCK_FREE_RUN: u8 = 1 << 2;
const RELOAD: u16 = 1 << 8;
const TIMEOUT: u16 = 1 << 9;
const PRELOAD_MAX: u32 = 0xf_ffff;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct State {
    preload: [u32; 2],
    /// Steps of the unlock sequence done: 0, 1 or 2.
    unlocked: u8,
    timed_out: bool,
    enabled: bool,
    free_run: bool,
    fast: bool,
    resets: bool,
    /// Stage that is running: 1 or 2; 0 while disabled.
    stage: u8,
    deadline: Nanos,
}

impl State {
    const POWER_ON: Self = Self {
        preload: [PRELOAD_MAX; 2],
        unlocked: 0,
        timed_out: false,
        enabled: false,
        free_run: false,
        fast: false,
        resets: true,
        stage: 0,
        deadline: 0,
    };

    fn duration(&self, stage: u8) -> Nanos {
        let preload = self.preload[usize::from(stage == 2)];
        let clocks = u128::from(preload.max(1)) << if self.fast { 5 } else { 15 };
        (clocks * 1_000_000_000 / PCI_CLOCK) as u64
    }
}

/// What answers behind the BAR, and the timer.
struct Core {
    state: Mutex<State>,
    timers: Arc<Timers>,
    timer: Timer,
    control: SharedControl,
}

impl Core {
    fn start(&self, state: &mut State, stage: u8) {
        state.stage = stage;
        state.deadline = self.timers.clock().now().saturating_add(state.duration(stage));
        self.timer.arm(state.deadline);
    }

    fn stop(&self, state: &mut State) {
        state.stage = 0;
        self.timer.disarm();
    }

    fn expired(&self) {
        let mut state = lock(&self.state);
        // Reloaded or stopped in the meantime.
        if state.stage == 0 || self.timers.clock().now() < state.deadline {
            return;
        }
        if state.stage == 1 {
            self.start(&mut state, 2);
            return;
        }
        if state.resets {
            state.timed_out = true;
            self.stop(&mut state);
            self.control.request(MachineRequest::Reset);
        } else if state.free_run {
            self.start(&mut state, 1);
        } else {
            self.stop(&mut state);
        }
    }

    /// Takes over what the configuration registers say.
    fn configure(&self, config: u16, lock_register: u8) {
        let mut state = lock(&self.state);
        state.fast = config & CONFIG_FAST != 0;
        state.resets = config & CONFIG_NO_RESET == 0;
        state.free_run = lock_register & LOCK_FREE_RUN != 0;
        let enabled = lock_register & LOCK_ENABLE != 0;
        if enabled && !state.enabled {
            self.start(&mut state, 1);
        } else if !enabled {
            self.stop(&mut state);
        }
        state.enabled = enabled;
    }

    fn write_reload(&self, state: &mut State, value: u16) {
        match (state.unlocked, value) {
            (0, 0x80) => state.unlocked = 1,
            (1, 0x86) => state.unlocked = 2,
            (2, _) => {
                state.unlocked = 0;
                if value & TIMEOUT != 0 {
                    state.timed_out = false;
                }
                if value & RELOAD != 0 && state.enabled {
                    self.start(state, 1);
                }
            }
            _ => state.unlocked = 0,
        }
    }
}

impl MmioDevice for Core {
    fn mmio_read(&self, offset: u64, data: &mut [u8]) {
        let state = lock(&self.state);
        let reload = if state.timed_out { TIMEOUT } else { 0 };
        let mut registers = [0; 16];
        registers[12..14].copy_from_slice(&reload.to_le_bytes());
        for (i, byte) in data.iter_mut().enumerate() {
            *byte = registers.get(offset as usize + i).copied().unwrap_or(0);
        }
    }

    fn mmio_write(&self, offset: u64, data: &[u8]) {
        let mut value = [0; 4];
        for (to, from) in value.iter_mut().zip(data) {
            *to = *from;
        }
        let value = u32::from_le_bytes(value);
        let mut state = lock(&self.state);
        match offset {
            0 | 4 if state.unlocked == 2 => {
                state.preload[(offset / 4) as usize] = value & PRELOAD_MAX;
                state.unlocked = 0;
            }
            0xc => self.write_reload(&mut state, value as u16),
            _ => {}
        }
    }
}

/// The watchdog.
pub struct Watchdog {
    function: PciFunction,
    core: Arc<Core>,
}

impl Watchdog {
    /// A disabled watchdog that resets through `control`.
    pub fn new(
        timers: &Arc<Timers>,
        gate: &Arc<InputGate>,
        control: SharedControl,
        mapper: Arc<dyn BarMapper>,
        msi: Arc<dyn MsiSink>,
    ) -> Arc<Self> {
        let core = Arc::new_cyclic(|weak: &Weak<Core>| {
            let (weak, gate) = (weak.clone(), gate.clone());
            let timer = timers.timer(move |_| {
                if let Some(core) = weak.upgrade() {
                    gate.deliver(InputKind::Timer, move || core.expired());
                }
            });
            Core { state: Mutex::new(State::POWER_ON), timers: timers.clone(), timer, control }
        });
        let mut builder = FunctionBuilder::new(Identity {
            vendor: 0x8086,
            device: 0x25ab,
            class: 0x08_80_00,
            ..Identity::default()
        });
        let target = Some(BarTarget::Mmio(core.clone()));
        builder.bar(BarSpec { index: 0, kind: BarKind::Memory32, size: 16, target });
        let config = builder.config_mut();
        config.set_writable(CONFIG, &0x0027u16.to_le_bytes());
        config.set_writable(LOCK, &[LOCK_LOCKED | LOCK_ENABLE | LOCK_FREE_RUN]);
        Arc::new(Self { function: builder.build(mapper, msi), core })
    }

    fn configure(&self) {
        let (config, lock_register) = self.function.with_config(|c| (c.u16(CONFIG), c.u8(LOCK)));
        self.core.configure(config, lock_register);
    }

    /// The saved form.
    pub fn save(&self) -> WatchdogStateV1 {
        let state = lock(&self.core.state);
        WatchdogStateV1 {
            function: Some(self.function.save()),
            preload: state.preload.to_vec(),
            unlocked: Some(u32::from(state.unlocked)),
            timed_out: Some(state.timed_out),
            stage: Some(u32::from(state.stage)),
            deadline: Some(state.deadline),
        }
    }

    /// Takes over a saved state. Guest time must be restored before.
    pub fn restore(&self, saved: &WatchdogStateV1) -> Result<(), RestoreError> {
        if let Some(function) = &saved.function {
            self.function.restore(function)?;
        }
        *lock(&self.core.state) = State::POWER_ON;
        self.configure();
        let mut state = lock(&self.core.state);
        for (to, from) in state.preload.iter_mut().zip(&saved.preload) {
            *to = from & PRELOAD_MAX;
        }
        state.unlocked = saved.unlocked.unwrap_or(0).min(2) as u8;
        state.timed_out = saved.timed_out.unwrap_or(false);
        state.stage = saved.stage.unwrap_or(0).min(2) as u8;
        state.deadline = saved.deadline.unwrap_or(0);
        if state.stage != 0 {
            self.core.timer.arm(state.deadline);
        } else {
            self.core.timer.disarm();
        }
        Ok(())
    }
}

impl PciDevice for Watchdog {
    fn function(&self) -> &PciFunction {
        &self.function
    }

    fn reset(&self) {
        self.function.reset();
        let mut state = lock(&self.core.state);
        self.core.stop(&mut state);
        *state = State { timed_out: state.timed_out, ..State::POWER_ON };
    }

    fn config_write(&self, offset: u16, data: &[u8]) {
        let locked = self.function.with_config(|c| c.u8(LOCK)) & LOCK_LOCKED != 0;
        if locked && offset & !3 == LOCK {
            return;
        }
        self.default_config_write(offset, data);
        if matches!(offset & !3, CONFIG | LOCK) {
            self.configure();
        }
    }
}
