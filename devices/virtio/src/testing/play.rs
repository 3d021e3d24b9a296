//! Turns arbitrary bytes into a driver's actions, for fuzz targets.

use std::sync::Arc;

use super::{RAM_BYTES, Setup, TestDriver, TestMachine, into, out};
use crate::device::VirtioDevice;

/// Most actions of one input, so that every input ends soon.
const MAX_ACTIONS: usize = 256;

/// Bytes that run out into zeros.
struct Script<'a>(&'a [u8]);

impl Script<'_> {
    fn array<const N: usize>(&mut self) -> [u8; N] {
        let mut bytes = [0; N];
        let n = N.min(self.0.len());
        bytes[..n].copy_from_slice(&self.0[..n]);
        self.0 = &self.0[n..];
        bytes
    }
    fn u8(&mut self) -> u8 {
        self.array::<1>()[0]
    }
    fn u16(&mut self) -> u16 {
        u16::from_le_bytes(self.array())
    }
    fn u32(&mut self) -> u32 {
        u32::from_le_bytes(self.array())
    }
    /// An address, in RAM unless the script insists.
    fn address(&mut self) -> u64 {
        match self.u8() {
            0 => u64::from_le_bytes(self.array()),
            1 => RAM_BYTES - u64::from(self.u8()),
            _ => u64::from(self.u32()) % RAM_BYTES,
        }
    }
}

/// Drives `device` with `data` as a script of register, ring and buffer accesses. The device must then work after
/// a reset.
pub fn play(machine: &TestMachine, device: Arc<dyn VirtioDevice>, data: &[u8]) {
    let mut script = Script(data);
    let mut driver = TestDriver::probe(machine, device, 0);
    let mark = driver.next_free;
    for _ in 0..MAX_ACTIONS {
        if script.0.is_empty() {
            break;
        }
        if driver.next_free > mark + (256 << 10) {
            driver.next_free = mark;
        }
        act(&mut driver, &mut script, mark);
    }
    driver.next_free = mark;
    driver.start(Setup::default());
    assert_eq!(driver.status(), 15, "the device works after a reset");
}

fn act(d: &mut TestDriver, s: &mut Script<'_>, mark: u64) {
    let action = s.u8();
    if action & 0xf == 0 {
        d.next_free = mark;
        let setup = Setup { features: !(u64::from(s.u32()) << 8), queue_size: 16, msix: action & 0x10 == 0 };
        // The script may have moved the MSI-X capability's enable bit or the access window, not the BARs.
        d.start(setup);
        return;
    }
    let queue = usize::from(s.u8());
    match action & 0xf {
        1 => register_write(d, s),
        2 => {
            let region = d.regions()[queue % 5];
            d.mmio_read::<8>(region + u64::from(s.u16() & 0xff8));
        }
        3 => {
            let offset = 0x40 + u16::from(s.u8()) % 0x30 * 4;
            d.pci_write(offset, s.u32());
            d.pci_read(offset);
        }
        4 => {
            let at = s.address().min(RAM_BYTES - 16);
            d.store(at, &s.array::<16>());
        }
        _ if d.queues.is_empty() => {}
        5 => {
            let q = d.queues[queue % d.queues.len()];
            let (gpa, len, flags, next) = (s.address(), s.u32(), s.u16(), s.u16());
            d.descriptor(q.desc, u16::from(s.u8()) % q.size, gpa, len, flags & 0xf, next & 0x1f);
        }
        6 => {
            let queue = queue % d.queues.len();
            let head = u16::from(s.u8());
            d.publish(queue, head);
            d.kick(queue as u16);
        }
        7 => {
            let q = d.queues[queue % d.queues.len()];
            let at = q.avail + u64::from(s.u8()) % (6 + 2 * u64::from(q.size) - 1);
            d.store16(at, s.u16());
        }
        8 => d.kick(queue as u16),
        _ => request(d, s, queue % d.queues.len()),
    }
}

fn register_write(d: &mut TestDriver, s: &mut Script<'_>) {
    let region = d.regions()[usize::from(s.u8()) % 5];
    let offset = u64::from(s.u16() & 0xfff).min(0xff8);
    let bytes = s.array::<8>();
    let len = [1, 2, 4, 8][usize::from(s.u8() & 3)];
    d.mmio_write(region + offset, &bytes[..len]);
}

/// A request of a plausible form: a header, some pieces, a status; the first and the last may be left out, as in
/// a buffer to be filled and a frame to be sent.
fn request(d: &mut TestDriver, s: &mut Script<'_>, queue: usize) {
    let form = s.u8();
    let mut pieces = Vec::new();
    if form & 1 == 0 {
        let header = d.alloc_bytes(&s.array::<16>());
        pieces.push(out(header, u32::from(s.u8() & 31)));
    }
    for _ in 0..s.u8() & 7 {
        let shape = s.u8();
        let len = u32::from(s.u16()) << (shape & 3);
        let gpa = s.address();
        pieces.push(if shape & 4 == 0 { out(gpa, len) } else { into(gpa, len) });
    }
    if form & 2 == 0 || pieces.is_empty() {
        let status = d.alloc(16, 16);
        pieces.push(into(status, u32::from(s.u8() & 3)));
    }
    if form & 4 == 0 {
        d.add(queue, &pieces);
    } else {
        d.add_indirect(queue, &pieces);
    }
    d.kick(queue as u16);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rng::Rng;
    use crate::testing::Random;

    #[test]
    fn random_scripts_end_with_a_working_device() {
        for seed in 0..50 {
            let mut random = Random::new(seed);
            let bytes: Vec<u8> = (0..2000).map(|_| random.bits() as u8).collect();
            let machine = TestMachine::new();
            play(&machine, Rng::new(machine.inputs.clone()), &bytes);
        }
    }
}
