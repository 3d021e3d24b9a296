//! Helpers of this crate's tests.

use std::sync::{Arc, Mutex};

use atoll_machine::bus::{MmioDevice, PortDevice};
use atoll_machine::interrupt::{LineSink, Msi, MsiSink};

use crate::bar::{BarMapper, BarMapping, BarTarget};

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

#[derive(Default)]
pub(crate) struct LineLog(pub(crate) Mutex<Vec<(u32, bool)>>);
impl LineSink for LineLog {
    fn set_line(&self, line: u32, high: bool) {
        self.0.lock().unwrap().push((line, high));
    }
}

/// Records what is mapped at the moment.
#[derive(Default)]
pub(crate) struct MapLog(pub(crate) Arc<Mutex<Vec<(u64, u64)>>>);
struct Mapped(Arc<Mutex<Vec<(u64, u64)>>>, (u64, u64));
impl Drop for Mapped {
    fn drop(&mut self) {
        let mut list = self.0.lock().unwrap();
        let at = list.iter().position(|m| *m == self.1).expect("mapping is in the list");
        list.remove(at);
    }
}
impl MapLog {
    pub(crate) fn now(&self) -> Vec<(u64, u64)> {
        self.0.lock().unwrap().clone()
    }
}
impl BarMapper for MapLog {
    fn map(&self, address: u64, size: u64, _target: &BarTarget) -> Option<BarMapping> {
        self.0.lock().unwrap().push((address, size));
        Some(Box::new(Mapped(self.0.clone(), (address, size))))
    }
}

pub(crate) struct Nothing;
impl MmioDevice for Nothing {
    fn mmio_read(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }
    fn mmio_write(&self, _offset: u64, _data: &[u8]) {}
}
impl PortDevice for Nothing {
    fn port_read(&self, _offset: u16, data: &mut [u8]) {
        data.fill(0);
    }
    fn port_write(&self, _offset: u16, _data: &[u8]) {}
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
    pub(crate) fn fill(&mut self, to: &mut [u8]) {
        for b in to {
            *b = (self.next() >> 32) as u8;
        }
    }
}
