//! The two ways to configuration space: ports CF8/CFC (PCI 3.0, 3.2.2.3.2) and ECAM (PCI Express, 7.2.2).

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, OnceLock};

use atoll_machine::bus::{MmioDevice, PortDevice};
use atoll_machine::state::{RestoreError, SaveState};

use crate::saved_state::ConfigPortsStateV1;
use crate::{Bdf, PciRoot};

/// Bytes of ECAM per bus number.
pub const ECAM_BYTES_PER_BUS: u64 = 1 << 20;

const ENABLE: u32 = 1 << 31;

/// Configuration mechanism #1. Register it at port 0xcf8 with a length of [`ConfigPorts::LEN`].
///
/// Only a 4-byte access at CF8 reaches the address register; a PC has other registers under narrower accesses
/// there (reset control at CF9), which [`ConfigPorts::set_narrow`] connects.
pub struct ConfigPorts {
    root: Arc<PciRoot>,
    address: AtomicU32,
    narrow: OnceLock<Arc<dyn PortDevice>>,
}

impl ConfigPorts {
    /// First port.
    pub const FIRST: u16 = 0xcf8;
    /// Number of ports.
    pub const LEN: u16 = 8;

    /// Ports in front of `root`.
    pub fn new(root: Arc<PciRoot>) -> Self {
        Self { root, address: AtomicU32::new(0), narrow: OnceLock::new() }
    }

    /// Gives 1- and 2-byte accesses at CF8-CFB to `device`, at offsets 0-3. The first call counts.
    pub fn set_narrow(&self, device: Arc<dyn PortDevice>) {
        let _ = self.narrow.set(device);
    }

    /// Power-on state.
    pub fn reset(&self) {
        self.address.store(0, Ordering::Relaxed);
    }
    /// The saved form.
    pub fn save(&self) -> ConfigPortsStateV1 {
        ConfigPortsStateV1 { address: Some(self.address.load(Ordering::Relaxed)) }
    }
    /// Takes over a saved state.
    pub fn restore(&self, saved: &ConfigPortsStateV1) {
        self.address.store(saved.address.unwrap_or(0), Ordering::Relaxed);
    }

    /// Target of a data access at `offset` (4-7), when the address register enables one.
    fn target(&self, offset: u16) -> Option<(Bdf, u16)> {
        let address = self.address.load(Ordering::Relaxed);
        let bdf = Bdf { bus: (address >> 16) as u8, devfn: (address >> 8) as u8 };
        (address & ENABLE != 0).then_some((bdf, (address as u16 & 0xfc) + (offset & 3)))
    }
}

impl SaveState for ConfigPorts {
    type Saved = ConfigPortsStateV1;
    fn save(&self) -> ConfigPortsStateV1 {
        Self::save(self)
    }
    fn restore(&self, saved: ConfigPortsStateV1) -> Result<(), RestoreError> {
        Self::restore(self, &saved);
        Ok(())
    }
}

impl PortDevice for ConfigPorts {
    fn port_read(&self, offset: u16, data: &mut [u8]) {
        match (offset, data.len()) {
            (0, 4) => data.copy_from_slice(&self.address.load(Ordering::Relaxed).to_le_bytes()),
            (0..4, _) => match self.narrow.get() {
                Some(device) => device.port_read(offset, data),
                None => data.fill(0xff),
            },
            _ => match self.target(offset) {
                Some((bdf, at)) => self.root.config_read(bdf, at, data),
                None => data.fill(0xff),
            },
        }
    }

    fn port_write(&self, offset: u16, data: &[u8]) {
        match (offset, data) {
            // Reserved bits 30..24 and 1..0 read as zero.
            (0, &[a, b, c, d]) => {
                let address = u32::from_le_bytes([a, b, c, d]) & 0x80ff_fffc;
                self.address.store(address, Ordering::Relaxed);
            }
            (0..4, _) => {
                if let Some(device) = self.narrow.get() {
                    device.port_write(offset, data);
                }
            }
            _ => {
                if let Some((bdf, at)) = self.target(offset) {
                    self.root.config_write(bdf, at, data);
                }
            }
        }
    }
}

/// The enhanced configuration window: 1 MiB a bus, from bus 0.
pub struct Ecam {
    root: Arc<PciRoot>,
}

impl Ecam {
    /// A window in front of `root`.
    pub fn new(root: Arc<PciRoot>) -> Self {
        Self { root }
    }
}

fn ecam_target(offset: u64) -> (Bdf, u16) {
    let bdf = Bdf { bus: (offset >> 20) as u8, devfn: (offset >> 12) as u8 };
    (bdf, offset as u16 & 0xfff)
}

impl MmioDevice for Ecam {
    fn mmio_read(&self, offset: u64, data: &mut [u8]) {
        let (bdf, at) = ecam_target(offset);
        self.root.config_read(bdf, at, data);
    }
    fn mmio_write(&self, offset: u64, data: &[u8]) {
        let (bdf, at) = ecam_target(offset);
        self.root.config_write(bdf, at, data);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;
    use crate::bus::tests::finish;
    use crate::testing::{MapLog, Random};
    use crate::{FunctionBuilder, Identity, devfn};

    fn root() -> Arc<PciRoot> {
        let root = PciRoot::new();
        let b = FunctionBuilder::new(Identity { vendor: 0x8086, device: 0x29c0, ..Identity::default() });
        root.bus().attach(devfn(1, 2), finish(b, &Arc::new(MapLog::default()), None)).unwrap();
        root
    }

    #[test]
    fn both_mechanisms_reach_the_same_function() {
        let root = root();
        let ports = ConfigPorts::new(root.clone());
        let mut b = [0; 4];
        ports.port_read(4, &mut b);
        assert_eq!(b, [0xff; 4], "disabled");
        ports.port_write(0, &0x8000_0a03u32.to_le_bytes());
        ports.port_read(0, &mut b);
        assert_eq!(u32::from_le_bytes(b), 0x8000_0a00);
        ports.port_read(4, &mut b);
        assert_eq!(u32::from_le_bytes(b), 0x29c0_8086);
        ports.port_read(6, &mut b[..2]);
        assert_eq!(b[..2], [0xc0, 0x29]);
        let ecam = Ecam::new(root);
        ecam.mmio_read(0xa000, &mut b);
        assert_eq!(u32::from_le_bytes(b), 0x29c0_8086);
        ecam.mmio_write(0xa004, &[7, 0]);
        ports.port_write(0, &0x8000_0a04u32.to_le_bytes());
        ports.port_read(4, &mut b[..1]);
        assert_eq!(b[0], 7);
        ecam.mmio_read(0x10_a000, &mut b);
        assert_eq!(b, [0xff; 4]);
    }

    #[test]
    fn narrow_accesses_at_cf8_go_elsewhere_and_leave_the_address_alone() {
        #[derive(Default)]
        struct Log(Mutex<Vec<(u16, Vec<u8>)>>);
        impl PortDevice for Log {
            fn port_read(&self, _offset: u16, data: &mut [u8]) {
                data.fill(0x5a);
            }
            fn port_write(&self, offset: u16, data: &[u8]) {
                self.0.lock().unwrap().push((offset, data.to_vec()));
            }
        }
        let ports = ConfigPorts::new(root());
        let mut b = [0];
        ports.port_read(1, &mut b);
        assert_eq!(b, [0xff]);
        let log = Arc::new(Log::default());
        ports.set_narrow(log.clone());
        ports.port_write(1, &[6]);
        ports.port_read(1, &mut b);
        assert_eq!((b, log.0.lock().unwrap().pop()), ([0x5a], Some((1, vec![6]))));
        assert_eq!(ports.save().address, Some(0));
    }

    #[test]
    fn address_survives_a_round_trip() {
        let ports = ConfigPorts::new(root());
        ports.port_write(0, &0x8012_3454u32.to_le_bytes());
        let other = ConfigPorts::new(root());
        other.restore(&ports.save());
        assert_eq!(other.save().address, Some(0x8012_3454));
        other.reset();
        assert_eq!(other.save().address, Some(0));
    }

    #[test]
    fn garbage_accesses_are_survived() {
        let root = root();
        let (ports, ecam) = (ConfigPorts::new(root.clone()), Ecam::new(root));
        let mut rng = Random::new(3);
        let mut buf = [0; 64];
        for _ in 0..100_000 {
            rng.fill(&mut buf);
            let len = 1 << rng.below(3);
            let port = rng.below(9 - len as u64) as u16;
            let (at, wide) = (rng.below((1 << 28) - 64), 1 + rng.below(64) as usize);
            match rng.below(4) {
                0 => ports.port_read(port, &mut buf[..len]),
                1 => ports.port_write(port, &buf[..len]),
                2 => ecam.mmio_read(at, &mut buf[..wide]),
                _ => ecam.mmio_write(at & 0xf_ffff, &buf[..wide]),
            }
        }
        ports.port_write(0, &0x8000_0a00u32.to_le_bytes());
        ports.port_read(4, &mut buf[..4]);
        assert_eq!(buf[..4], [0x86, 0x80, 0xc0, 0x29]);
    }
}
