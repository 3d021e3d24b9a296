//! The Q35 host bridge, 8086:29c0 at 00:00.0 (Intel 3 Series Express Chipset data sheet chapter 5).
//!
//! PCIEXBAR (60) places the PCI configuration window; the PAM registers (90-96) say, for each segment of the BIOS
//! area, whether reads and writes go to RAM or to the ROM behind it. The window is mapped here; segments are
//! handed to a [`PamMapper`], because only whoever laid out memory knows what lies where. SMRAM registers are
//! stored and lock; there is no system management mode behind them.

use std::sync::{Arc, Mutex, Weak};

use atoll_machine::interrupt::MsiSink;
use atoll_machine::memory::{AddressSpace, RegionId};
use atoll_pci::{
    BarMapper, ECAM_BYTES_PER_BUS, Ecam, FunctionBuilder, Identity, PciDevice, PciFunction, PciRoot,
    RestoreError, devfn,
};

use crate::lock;
use saved_state::HostBridgeStateV1;

pub mod saved_state;
#[cfg(test)]
mod tests;

/// Where the bridge sits on bus 0.
pub const DEVFN: u8 = devfn(0, 0);
/// Priority of the configuration window: above BARs, below RAM.
const ECAM_PRIORITY: i32 = -1;

const PCIEXBAR: u16 = 0x60;
const PAM0: u16 = 0x90;
const PAM_REGISTERS: usize = 7;
const SMRAM: u16 = 0x9d;
const ESMRAMC: u16 = 0x9e;
const SMRAM_LOCKED: u8 = 1 << 4;

/// One segment of the BIOS area and where accesses to it go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PamSegment {
    /// First guest-physical address.
    pub start: u64,
    /// Bytes.
    pub len: u64,
    /// Reads come from RAM.
    pub read_ram: bool,
    /// Writes go to RAM.
    pub write_ram: bool,
}

/// Maps the segments of the BIOS area.
pub trait PamMapper: Send + Sync {
    /// Shows the 13 segments from C0000 to FFFFF as told, in address order. Called when any of them changed.
    fn set_segments(&self, segments: &[PamSegment]);
}

/// For machines whose BIOS area is always RAM.
pub struct PamAlwaysRam;
impl PamMapper for PamAlwaysRam {
    fn set_segments(&self, _segments: &[PamSegment]) {}
}

#[derive(Default)]
struct Mapped {
    /// Address and bytes of the window, and its region.
    ecam: Option<(u64, u64, RegionId)>,
    pam: [u8; PAM_REGISTERS],
}

/// The host bridge.
pub struct HostBridge {
    function: PciFunction,
    root: Weak<PciRoot>,
    memory: Weak<AddressSpace>,
    pam: Arc<dyn PamMapper>,
    mapped: Mutex<Mapped>,
}

impl HostBridge {
    /// A bridge in front of `root` with its configuration window switched off.
    pub fn new(
        root: &Arc<PciRoot>,
        memory: &Arc<AddressSpace>,
        pam: Arc<dyn PamMapper>,
        mapper: Arc<dyn BarMapper>,
        msi: Arc<dyn MsiSink>,
    ) -> Arc<Self> {
        let identity = Identity { vendor: 0x8086, device: 0x29c0, class: 0x06_00_00, ..Identity::default() };
        let mut builder = FunctionBuilder::new(identity);
        let config = builder.config_mut();
        config.set_u32(PCIEXBAR, 0xe000_0000);
        config.set_writable(PCIEXBAR, &[0x07, 0x00, 0x00, 0xfc, 0xff, 0, 0, 0]);
        config.set_writable(PAM0, &[0x30, 0x33, 0x33, 0x33, 0x33, 0x33, 0x33]);
        config.set(SMRAM, &[0x02]);
        config.set_writable(SMRAM, &[0x78, 0x87]);
        let function = builder.build(mapper, msi);
        Arc::new(Self {
            function,
            root: Arc::downgrade(root),
            memory: Arc::downgrade(memory),
            pam,
            mapped: Mutex::default(),
        })
    }

    /// Leaves the registers as firmware would: 256 buses of configuration space at `ecam_base` (a multiple of
    /// 256 MiB), the BIOS area all RAM.
    pub fn program_without_firmware(&self, ecam_base: u64) {
        self.config_write(PCIEXBAR, &(ecam_base as u32 | 1).to_le_bytes());
        self.config_write(PCIEXBAR + 4, &((ecam_base >> 32) as u32).to_le_bytes());
        self.config_write(PAM0, &[0x33; 4]);
        self.config_write(PAM0 + 4, &[0x33; 3]);
    }

    /// Guest-physical address and bytes of the configuration window while it is on.
    pub fn ecam(&self) -> Option<(u64, u64)> {
        lock(&self.mapped).ecam.map(|(at, len, _)| (at, len))
    }

    /// Brings the window and the BIOS area in line with the registers.
    fn apply(&self) {
        let (low, high, pam) = self.function.with_config(|c| {
            let mut pam = [0; PAM_REGISTERS];
            c.read(PAM0, &mut pam);
            (c.u32(PCIEXBAR), c.u32(PCIEXBAR + 4), pam)
        });
        let mut mapped = lock(&self.mapped);
        self.map_ecam(&mut mapped, ecam_window(low, high));
        if mapped.pam != pam {
            mapped.pam = pam;
            self.pam.set_segments(&segments(&pam));
        }
    }

    fn map_ecam(&self, mapped: &mut Mapped, wanted: Option<(u64, u64)>) {
        if mapped.ecam.map(|(at, len, _)| (at, len)) == wanted {
            return;
        }
        let (Some(memory), Some(root)) = (self.memory.upgrade(), self.root.upgrade()) else { return };
        if let Some((_, _, id)) = mapped.ecam.take() {
            memory.unmap(id);
        }
        if let Some((at, len)) = wanted {
            let region = memory.map_mmio(at, len, Arc::new(Ecam::new(root)), ECAM_PRIORITY);
            mapped.ecam = region.ok().map(|id| (at, len, id));
        }
    }

    /// The saved form.
    pub fn save(&self) -> HostBridgeStateV1 {
        HostBridgeStateV1 { function: Some(self.function.save()) }
    }

    /// Takes over a saved state.
    pub fn restore(&self, saved: &HostBridgeStateV1) -> Result<(), RestoreError> {
        match &saved.function {
            Some(function) => self.function.restore(function)?,
            None => self.function.reset(),
        }
        self.apply();
        Ok(())
    }
}

/// What PCIEXBAR says: bit 0 on, bits 2..1 length, base aligned to the length.
fn ecam_window(low: u32, high: u32) -> Option<(u64, u64)> {
    let len = match low >> 1 & 3 {
        0 => 256 * ECAM_BYTES_PER_BUS,
        1 => 128 * ECAM_BYTES_PER_BUS,
        2 => 64 * ECAM_BYTES_PER_BUS,
        _ => return None,
    };
    let base = (u64::from(high) << 32 | u64::from(low & 0xfc00_0000)) & !(len - 1);
    (low & 1 != 0).then_some((base, len))
}

/// The segments in address order: two a register from C0000, then the F segment of PAM0.
fn segments(pam: &[u8; PAM_REGISTERS]) -> Vec<PamSegment> {
    let segment =
        |start, len, bits: u8| PamSegment { start, len, read_ram: bits & 1 != 0, write_ram: bits & 2 != 0 };
    let mut list = Vec::with_capacity(13);
    for (i, &bits) in pam[1..].iter().enumerate() {
        let start = 0xc_0000 + i as u64 * 0x8000;
        list.push(segment(start, 0x4000, bits));
        list.push(segment(start + 0x4000, 0x4000, bits >> 4));
    }
    list.push(segment(0xf_0000, 0x1_0000, pam[0] >> 4));
    list
}

impl PciDevice for HostBridge {
    fn function(&self) -> &PciFunction {
        &self.function
    }

    fn reset(&self) {
        self.function.reset();
        self.apply();
    }

    fn config_write(&self, offset: u16, data: &[u8]) {
        let locked = self.function.with_config(|c| c.u8(SMRAM)) & SMRAM_LOCKED != 0;
        for (i, &byte) in data.iter().enumerate() {
            let at = offset.wrapping_add(i as u16);
            if locked && matches!(at, SMRAM | ESMRAMC) {
                continue;
            }
            self.default_config_write(at, &[byte]);
        }
        if (PCIEXBAR..PCIEXBAR + 8).contains(&offset) || (PAM0..PAM0 + 8).contains(&offset) {
            self.apply();
        }
    }
}
