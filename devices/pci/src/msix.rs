//! MSI-X: the vector table and the pending bits behind a BAR (PCI 3.0, 6.8.2).
//!
//! ```text
//!            enabled, not masked
//! signal() ----------------------> message
//!     |    masked                         ^
//!     +----------> pending bit -----------+  when the vector or the function is unmasked
//! ```

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use atoll_machine::bus::MmioDevice;
use atoll_machine::interrupt::{Msi, MsiSink};

use crate::lock;
use crate::saved_state::{MsixEntryV1, MsixStateV1, RestoreError};

/// Bytes of one table entry.
const ENTRY_BYTES: u64 = 16;
/// Vector control: masked.
const ENTRY_MASKED: u32 = 1;
/// Most vectors a function can have (11-bit table size).
pub(crate) const MAX_VECTORS: u16 = 2048;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Entry {
    address: u64,
    data: u32,
    control: u32,
}

impl Entry {
    const RESET: Self = Self { address: 0, data: 0, control: ENTRY_MASKED };

    fn to_bytes(self) -> [u8; 16] {
        let mut b = [0; 16];
        b[..8].copy_from_slice(&self.address.to_le_bytes());
        b[8..12].copy_from_slice(&self.data.to_le_bytes());
        b[12..].copy_from_slice(&self.control.to_le_bytes());
        b
    }

    fn from_bytes(b: [u8; 16]) -> Self {
        let word = |i: usize| u32::from_le_bytes([b[i], b[i + 1], b[i + 2], b[i + 3]]);
        Self {
            address: u64::from(word(0) & !3) | u64::from(word(4)) << 32,
            data: word(8),
            control: word(12) & ENTRY_MASKED,
        }
    }
}

struct Inner {
    enabled: bool,
    function_masked: bool,
    entries: Vec<Entry>,
    pending: Vec<u64>,
}

/// The MSI-X table of one function. Also the [`MmioDevice`] behind its BAR: the table at 0, the pending bits at
/// [`Msix::pba_offset`].
pub struct Msix {
    inner: Mutex<Inner>,
    sink: Arc<dyn MsiSink>,
    /// Bus mastering of the function: a message is a memory write and needs it.
    bus_master: Arc<AtomicBool>,
}

impl Msix {
    pub(crate) fn new(vectors: u16, sink: Arc<dyn MsiSink>, bus_master: Arc<AtomicBool>) -> Arc<Self> {
        let count = usize::from(vectors.clamp(1, MAX_VECTORS));
        let inner = Inner {
            enabled: false,
            function_masked: false,
            entries: vec![Entry::RESET; count],
            pending: vec![0; count.div_ceil(64)],
        };
        Arc::new(Self { inner: Mutex::new(inner), sink, bus_master })
    }

    /// Number of vectors.
    pub fn vectors(&self) -> u16 {
        lock(&self.inner).entries.len() as u16
    }

    /// Offset of the pending bits in the BAR.
    pub fn pba_offset(&self) -> u64 {
        pba_offset(self.vectors())
    }

    /// Bytes of the BAR.
    pub fn bar_size(&self) -> u64 {
        self.pba_offset() * 2
    }

    /// Whether the guest switched MSI-X on. While it is off the function uses MSI or INTx.
    pub fn enabled(&self) -> bool {
        lock(&self.inner).enabled
    }

    /// Raises `vector`: sends its message, or notes it as pending while masked. Returns false when MSI-X is off,
    /// so that the caller can use INTx. A vector the function does not have is ignored.
    pub fn signal(&self, vector: u16) -> bool {
        let mut inner = lock(&self.inner);
        if !inner.enabled {
            return false;
        }
        let Some(&entry) = inner.entries.get(usize::from(vector)) else { return true };
        if inner.function_masked || entry.control & ENTRY_MASKED != 0 {
            inner.pending[usize::from(vector / 64)] |= 1 << (vector % 64);
        } else {
            self.send(entry);
        }
        true
    }

    fn send(&self, entry: Entry) {
        if self.bus_master.load(Ordering::Relaxed) {
            self.sink.signal_msi(Msi { address: entry.address, data: entry.data });
        }
    }

    /// Takes over the enable and function-mask bits of the capability's control register.
    pub(crate) fn set_control(&self, enabled: bool, function_masked: bool) {
        let mut inner = lock(&self.inner);
        inner.enabled = enabled;
        inner.function_masked = function_masked;
        self.flush(&mut inner);
    }

    /// Sends what is pending and no longer masked.
    fn flush(&self, inner: &mut Inner) {
        if !inner.enabled || inner.function_masked {
            return;
        }
        for word in 0..inner.pending.len() {
            let mut bits = inner.pending[word];
            while bits != 0 {
                let bit = bits.trailing_zeros();
                bits &= bits - 1;
                let entry = inner.entries[word * 64 + bit as usize];
                if entry.control & ENTRY_MASKED == 0 {
                    inner.pending[word] &= !(1 << bit);
                    self.send(entry);
                }
            }
        }
    }

    /// Masks everything and forgets what is pending.
    pub(crate) fn reset(&self) {
        let mut inner = lock(&self.inner);
        inner.enabled = false;
        inner.function_masked = false;
        inner.entries.fill(Entry::RESET);
        inner.pending.fill(0);
    }

    pub(crate) fn save(&self) -> MsixStateV1 {
        let inner = lock(&self.inner);
        let entry = |e: &Entry| MsixEntryV1 {
            address: Some(e.address),
            data: Some(e.data),
            control: Some(e.control),
        };
        MsixStateV1 { entries: inner.entries.iter().map(entry).collect(), pending: inner.pending.clone() }
    }

    /// Takes over table and pending bits; the control bits follow from the configuration space.
    pub(crate) fn restore(&self, saved: &MsixStateV1) -> Result<(), RestoreError> {
        let mut inner = lock(&self.inner);
        if saved.entries.len() > inner.entries.len() {
            let (saved, have) = (saved.entries.len(), inner.entries.len());
            return Err(RestoreError::MsixVectors { saved, have });
        }
        inner.enabled = false;
        inner.entries.fill(Entry::RESET);
        inner.pending.fill(0);
        for (to, from) in inner.entries.iter_mut().zip(&saved.entries) {
            *to = Entry {
                address: from.address.unwrap_or(0) & !3,
                data: from.data.unwrap_or(0),
                control: from.control.unwrap_or(ENTRY_MASKED) & ENTRY_MASKED,
            };
        }
        let count = inner.entries.len();
        for (i, (to, &from)) in inner.pending.iter_mut().zip(&saved.pending).enumerate() {
            let valid = (count - i * 64).min(64);
            *to = if valid == 64 { from } else { from & ((1 << valid) - 1) };
        }
        Ok(())
    }
}

/// Table and pending bits each get one half of the BAR, a page together at least.
fn pba_offset(vectors: u16) -> u64 {
    (u64::from(vectors) * ENTRY_BYTES).next_power_of_two().max(0x800)
}

impl MmioDevice for Msix {
    fn mmio_read(&self, offset: u64, data: &mut [u8]) {
        let inner = lock(&self.inner);
        let pba = pba_offset(inner.entries.len() as u16);
        for (i, byte) in data.iter_mut().enumerate() {
            let at = offset.wrapping_add(i as u64);
            *byte = if at < pba {
                let entry = inner.entries.get((at / ENTRY_BYTES) as usize);
                entry.map_or(0, |e| e.to_bytes()[(at % ENTRY_BYTES) as usize])
            } else {
                let at = at - pba;
                let word = inner.pending.get((at / 8) as usize);
                word.map_or(0, |w| w.to_le_bytes()[(at % 8) as usize])
            };
        }
    }

    fn mmio_write(&self, offset: u64, data: &[u8]) {
        let mut inner = lock(&self.inner);
        for (i, &byte) in data.iter().enumerate() {
            let at = offset.wrapping_add(i as u64);
            if let Some(entry) = inner.entries.get_mut((at / ENTRY_BYTES) as usize) {
                let mut bytes = entry.to_bytes();
                bytes[(at % ENTRY_BYTES) as usize] = byte;
                *entry = Entry::from_bytes(bytes);
            }
        }
        self.flush(&mut inner);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{MsiLog, Random};

    fn msix(vectors: u16) -> (Arc<Msix>, Arc<MsiLog>) {
        let log = Arc::new(MsiLog::default());
        (Msix::new(vectors, log.clone(), Arc::new(AtomicBool::new(true))), log)
    }

    fn program(m: &Msix, vector: u64, address: u64, data: u32, control: u32) {
        m.mmio_write(vector * 16, &address.to_le_bytes());
        m.mmio_write(vector * 16 + 8, &data.to_le_bytes());
        m.mmio_write(vector * 16 + 12, &control.to_le_bytes());
    }

    fn pending(m: &Msix) -> u64 {
        let mut b = [0; 8];
        m.mmio_read(m.pba_offset(), &mut b);
        u64::from_le_bytes(b)
    }

    #[test]
    fn disabled_table_declines_so_that_intx_is_used() {
        let (m, log) = msix(2);
        assert!(!m.signal(0));
        assert!(log.take().is_empty());
    }

    #[test]
    fn masked_vector_pends_and_fires_once_when_unmasked() {
        let (m, log) = msix(3);
        program(&m, 1, 0xfee0_1000, 0x41, 1);
        m.set_control(true, false);
        assert!(m.signal(1) && m.signal(1));
        assert_eq!((log.take(), pending(&m)), (vec![], 2));
        m.mmio_write(16 + 12, &0u32.to_le_bytes());
        assert_eq!(log.take(), vec![Msi { address: 0xfee0_1000, data: 0x41 }]);
        assert_eq!(pending(&m), 0);
        assert!(m.signal(1));
        assert_eq!(log.take().len(), 1);
        assert!(m.signal(77), "a vector that does not exist is swallowed");
        assert!(log.take().is_empty());
    }

    #[test]
    fn function_mask_holds_everything_back() {
        let (m, log) = msix(70);
        program(&m, 69, 0xfee0_0000, 5, 0);
        m.set_control(true, true);
        m.signal(69);
        assert!(log.take().is_empty());
        m.set_control(true, false);
        assert_eq!(log.take().len(), 1);
    }

    #[test]
    fn no_message_without_bus_mastering() {
        let log = Arc::new(MsiLog::default());
        let master = Arc::new(AtomicBool::new(false));
        let m = Msix::new(1, log.clone(), master.clone());
        program(&m, 0, 0xfee0_0000, 5, 0);
        m.set_control(true, false);
        assert!(m.signal(0));
        assert!(log.take().is_empty());
        master.store(true, Ordering::Relaxed);
        m.signal(0);
        assert_eq!(log.take().len(), 1);
    }

    #[test]
    fn state_survives_a_round_trip() {
        let (m, _) = msix(5);
        program(&m, 4, 0x12_fee0_2000, 7, 1);
        m.set_control(true, false);
        m.signal(4);
        let saved = m.save();
        let (n, log) = msix(5);
        n.restore(&saved).unwrap();
        assert_eq!(n.save(), saved);
        n.set_control(true, false);
        n.mmio_write(4 * 16 + 12, &[0]);
        assert_eq!(log.take(), vec![Msi { address: 0x12_fee0_2000, data: 7 }]);
        let (small, _) = msix(2);
        assert!(matches!(small.restore(&saved), Err(RestoreError::MsixVectors { saved: 5, have: 2 })));
    }

    #[test]
    fn garbage_accesses_are_survived() {
        let (m, _) = msix(33);
        let mut rng = Random::new(7);
        let mut buf = [0u8; 64];
        for _ in 0..100_000 {
            let offset = rng.below(m.bar_size() - 64);
            let len = 1 + rng.below(64) as usize;
            if rng.below(2) == 0 {
                m.mmio_read(offset, &mut buf[..len]);
            } else {
                rng.fill(&mut buf);
                m.mmio_write(offset, &buf[..len]);
            }
            if rng.below(8) == 0 {
                m.set_control(rng.below(2) == 0, rng.below(2) == 0);
                m.signal(rng.below(40) as u16);
            }
        }
        let mut tail = [1; 8];
        m.mmio_read(m.pba_offset() + 8, &mut tail);
        assert_eq!(tail, [0; 8], "pending bits of vectors that do not exist stay zero");
    }
}
