//! MSI: up to 32 messages from one address and data pair in configuration space (PCI 3.0, 6.8.1).
//!
//! The capability is always of the 64-bit form with per-vector masking:
//! control at +2, address at +4 and +8, data at +12, mask bits at +16, pending bits at +20.

use atoll_machine::interrupt::Msi;

use crate::config::ConfigSpace;

/// An MSI capability as a device declares it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MsiSpec {
    /// Messages: 1, 2, 4, 8, 16 or 32; rounded up.
    pub vectors: u8,
}

const CONTROL: u16 = 2;
const ADDRESS: u16 = 4;
const ADDRESS_HIGH: u16 = 8;
const DATA: u16 = 12;
const MASK: u16 = 16;
const PENDING: u16 = 20;
const CONTROL_ENABLE: u16 = 1;

/// Where the capability is; all state lives in the configuration space.
#[derive(Clone, Copy)]
pub(crate) struct MsiCap {
    pub(crate) at: u16,
}

impl MsiCap {
    /// Body after the id and next bytes, and its writable bits.
    pub(crate) fn body(spec: MsiSpec) -> ([u8; 22], [u8; 22]) {
        let count = spec.vectors.clamp(1, 32).next_power_of_two();
        let log2 = count.trailing_zeros() as u16;
        let (mut body, mut mask) = ([0; 22], [0; 22]);
        // Multiple message capable in bits 3..1, 64-bit in bit 7, per-vector masking in bit 8.
        body[..2].copy_from_slice(&(log2 << 1 | 1 << 7 | 1 << 8).to_le_bytes());
        mask[..2].copy_from_slice(&0x0071u16.to_le_bytes());
        mask[2..6].copy_from_slice(&0xffff_fffcu32.to_le_bytes());
        mask[6..10].fill(0xff);
        mask[10..12].fill(0xff);
        let vectors = if count == 32 { u32::MAX } else { (1u32 << count) - 1 };
        mask[14..18].copy_from_slice(&vectors.to_le_bytes());
        (body, mask)
    }

    pub(crate) fn enabled(self, config: &ConfigSpace) -> bool {
        config.u16(self.at + CONTROL) & CONTROL_ENABLE != 0
    }

    /// The message of `vector`, or `None` after noting it as pending because it is masked.
    pub(crate) fn raise(self, config: &mut ConfigSpace, vector: u8) -> Option<Msi> {
        let bit = 1u32.checked_shl(u32::from(vector))?;
        if config.u32(self.at + MASK) & bit != 0 {
            let pending = config.u32(self.at + PENDING) | bit;
            config.set_u32(self.at + PENDING, pending);
            return None;
        }
        Some(self.message(config, vector))
    }

    /// A pending message that is no longer masked, taken off the pending bits.
    pub(crate) fn take_unmasked(self, config: &mut ConfigSpace) -> Option<Msi> {
        if !self.enabled(config) {
            return None;
        }
        let ready = config.u32(self.at + PENDING) & !config.u32(self.at + MASK);
        if ready == 0 {
            return None;
        }
        let vector = ready.trailing_zeros() as u8;
        let pending = config.u32(self.at + PENDING) & !(1 << vector);
        config.set_u32(self.at + PENDING, pending);
        Some(self.message(config, vector))
    }

    pub(crate) fn pending(self, config: &ConfigSpace) -> u32 {
        config.u32(self.at + PENDING)
    }
    pub(crate) fn set_pending(self, config: &mut ConfigSpace, pending: u32) {
        config.set_u32(self.at + PENDING, pending);
    }

    fn message(self, config: &ConfigSpace, vector: u8) -> Msi {
        let control = config.u16(self.at + CONTROL);
        let capable = control >> 1 & 7;
        // Software that enables more messages than there are gets what there is.
        let enabled = (control >> 4 & 7).min(capable).min(5);
        let low = (1u16 << enabled) - 1;
        let data = config.u16(self.at + DATA);
        let address =
            u64::from(config.u32(self.at + ADDRESS_HIGH)) << 32 | u64::from(config.u32(self.at + ADDRESS));
        Msi { address, data: u32::from(data & !low | u16::from(vector) & low) }
    }
}
