//! Helpers of this crate's tests: recording sinks, a machine's time by hand, deterministic garbage.

use std::sync::{Arc, Mutex};

use atoll_machine::bus::{MmioDevice, PortDevice};
use atoll_machine::control::{MachineControl, MachineRequest};
use atoll_machine::interrupt::{ExtIntSink, IrqLine, LineSink, Msi, MsiSink};
use atoll_machine::time::{Clock, Nanos, Timers, VirtualClock};

#[derive(Default)]
pub(crate) struct MsiLog(Mutex<Vec<Msi>>);
impl MsiLog {
    pub(crate) fn take(&self) -> Vec<Msi> {
        std::mem::take(&mut self.0.lock().unwrap())
    }
}
impl MsiSink for MsiLog {
    fn signal_msi(&self, msi: Msi) {
        self.0.lock().unwrap().push(msi);
    }
}

/// Levels and rising edges of up to 32 wires, and the INTR pin.
#[derive(Default)]
pub(crate) struct Wires(Mutex<([bool; 32], [u32; 32])>);
impl Wires {
    pub(crate) fn new() -> Arc<Self> {
        Arc::new(Self::default())
    }
    pub(crate) fn line(self: &Arc<Self>, number: u32) -> IrqLine {
        IrqLine::new(self.clone(), number)
    }
    pub(crate) fn high(&self, line: u32) -> bool {
        self.0.lock().unwrap().0[line as usize]
    }
    /// Rising edges since the last call.
    pub(crate) fn edges(&self, line: u32) -> u32 {
        std::mem::take(&mut self.0.lock().unwrap().1[line as usize])
    }
}
impl LineSink for Wires {
    fn set_line(&self, line: u32, high: bool) {
        let mut state = self.0.lock().unwrap();
        if high && !state.0[line as usize] {
            state.1[line as usize] += 1;
        }
        state.0[line as usize] = high;
    }
}
impl ExtIntSink for Wires {
    fn set_extint(&self, high: bool) {
        self.set_line(0, high);
    }
}

#[derive(Default)]
pub(crate) struct Requests(Mutex<Vec<MachineRequest>>);
impl Requests {
    pub(crate) fn new() -> Arc<Self> {
        Arc::new(Self::default())
    }
    pub(crate) fn take(&self) -> Vec<MachineRequest> {
        std::mem::take(&mut self.0.lock().unwrap())
    }
}
impl MachineControl for Requests {
    fn request(&self, request: MachineRequest) {
        self.0.lock().unwrap().push(request);
    }
}

/// 2024-02-28 23:59:50 UTC in nanoseconds.
pub(crate) const EPOCH: u64 = 1_709_164_790 * 1_000_000_000;

/// A clock and its timers, moved by hand.
pub(crate) struct Time {
    pub(crate) clock: Arc<VirtualClock>,
    pub(crate) timers: Arc<Timers>,
}
impl Time {
    pub(crate) fn new() -> Self {
        let clock = VirtualClock::new(EPOCH, 1_000_000);
        let timers = Timers::new(clock.clone());
        Self { clock, timers }
    }
    /// Moves time forward, stopping at every deadline on the way: a host that is never late.
    pub(crate) fn run(&self, by: Nanos) {
        let end = self.clock.now() + by;
        loop {
            match self.timers.expire() {
                Some(at) if at <= end => self.clock.advance(at - self.clock.now()),
                _ => break,
            }
        }
        self.clock.advance(end - self.clock.now());
        self.timers.expire();
    }
    /// Moves time forward in one step, then runs what is due: a host that was late.
    pub(crate) fn jump(&self, by: Nanos) {
        self.clock.advance(by);
        self.timers.expire();
    }
}

/// xorshift64*: deterministic garbage.
pub(crate) struct Random(u64);
impl Random {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }
    pub(crate) fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }
    pub(crate) fn below(&mut self, n: u64) -> u64 {
        (self.next() >> 11) % n
    }
}

pub(crate) fn inb(device: &dyn PortDevice, offset: u16) -> u8 {
    let mut b = [0xaa];
    device.port_read(offset, &mut b);
    b[0]
}
pub(crate) fn outb(device: &dyn PortDevice, offset: u16, value: u8) {
    device.port_write(offset, &[value]);
}
pub(crate) fn inl(device: &dyn PortDevice, offset: u16) -> u32 {
    let mut b = [0xaa; 4];
    device.port_read(offset, &mut b);
    u32::from_le_bytes(b)
}

/// 100 000 random accesses of every width at ports 0..`ports` of `device`, with `between` called now and then.
pub(crate) fn garbage_ports(
    device: &dyn PortDevice,
    ports: u16,
    seed: u64,
    mut between: impl FnMut(&mut Random),
) {
    let mut rng = Random::new(seed);
    for _ in 0..100_000 {
        let len = (1u16 << rng.below(3)).min(ports);
        let len = if len == 3 { 2 } else { len };
        let at = rng.below(u64::from(ports - len) + 1) as u16;
        let mut data = (rng.next() as u32).to_le_bytes();
        let data = &mut data[..usize::from(len)];
        if rng.below(2) == 0 {
            device.port_read(at, data);
        } else {
            device.port_write(at, data);
        }
        if rng.below(8) == 0 {
            between(&mut rng);
        }
    }
}

/// 100 000 random accesses of 1 to 64 bytes at 0..`len` of `device`, with `between` called now and then.
pub(crate) fn garbage_mmio(
    device: &dyn MmioDevice,
    len: u64,
    seed: u64,
    mut between: impl FnMut(&mut Random),
) {
    let mut rng = Random::new(seed);
    let mut buf = [0u8; 64];
    for _ in 0..100_000 {
        let wide = (1 + rng.below(64)).min(len);
        let at = rng.below(len - wide + 1);
        for b in &mut buf {
            *b = rng.next() as u8;
        }
        let data = &mut buf[..wide as usize];
        if rng.below(2) == 0 {
            device.mmio_read(at, data);
        } else {
            device.mmio_write(at, data);
        }
        if rng.below(8) == 0 {
            between(&mut rng);
        }
    }
}
