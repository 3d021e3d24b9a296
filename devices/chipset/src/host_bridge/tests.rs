use atoll_machine::bus::PortBus;
use atoll_pci::PciBarMapper;

use super::*;
use crate::testing::{MsiLog, Random};

#[derive(Default)]
struct PamLog(Mutex<Vec<PamSegment>>);
impl PamMapper for PamLog {
    fn set_segments(&self, segments: &[PamSegment]) {
        *self.0.lock().unwrap() = segments.to_vec();
    }
}

struct Bench {
    bridge: Arc<HostBridge>,
    /// Held: the bridge refers to it weakly.
    _root: Arc<PciRoot>,
    memory: Arc<AddressSpace>,
    pam: Arc<PamLog>,
}

fn bench() -> Bench {
    let (root, memory, pam) = (PciRoot::new(), AddressSpace::new(), Arc::new(PamLog::default()));
    let mapper = PciBarMapper::new(&memory, &Arc::new(PortBus::new()));
    let bridge = HostBridge::new(&root, &memory, pam.clone(), mapper, Arc::new(MsiLog::default()));
    root.bus().attach(DEVFN, bridge.clone()).unwrap();
    Bench { bridge, _root: root, memory, pam }
}

impl Bench {
    fn id_at(&self, gpa: u64) -> u32 {
        let mut b = [0; 4];
        self.memory.mmio_read(gpa, &mut b);
        u32::from_le_bytes(b)
    }
}

#[test]
fn the_configuration_window_follows_pciexbar() {
    let b = bench();
    assert_eq!(b.id_at(0xe000_0000), u32::MAX, "off at reset");
    b.bridge.program_without_firmware(0xe000_0000);
    assert_eq!(b.id_at(0xe000_0000), 0x29c0_8086);
    assert_eq!(b.id_at(0xe010_0000), u32::MAX, "no bus 1");
    assert_eq!(b.bridge.ecam(), Some((0xe000_0000, 256 << 20)));
    // The guest moves the window through the window itself.
    b.memory.mmio_write(0xe000_0060, &0xb400_0005u32.to_le_bytes());
    assert_eq!((b.id_at(0xe000_0000), b.id_at(0xb400_0000)), (u32::MAX, 0x29c0_8086));
    assert_eq!(b.bridge.ecam(), Some((0xb400_0000, 64 << 20)));
    b.bridge.config_write(PCIEXBAR, &[0x07]);
    assert_eq!(b.bridge.ecam(), None, "reserved length");
    b.bridge.reset();
    assert_eq!(b.id_at(0xb400_0000), u32::MAX);
}

#[test]
fn pam_registers_become_segments() {
    let b = bench();
    b.bridge.config_write(PAM0, &[0x10]);
    b.bridge.config_write(PAM0 + 2, &[0x23]);
    let list = b.pam.0.lock().unwrap().clone();
    assert_eq!(list.len(), 13);
    assert_eq!(list[2], PamSegment { start: 0xc_8000, len: 0x4000, read_ram: true, write_ram: true });
    assert_eq!(list[3], PamSegment { start: 0xc_c000, len: 0x4000, read_ram: false, write_ram: true });
    assert_eq!(list[12], PamSegment { start: 0xf_0000, len: 0x1_0000, read_ram: true, write_ram: false });
    assert_eq!(list.iter().map(|s| s.len).sum::<u64>(), 0x4_0000);
    b.bridge.reset();
    assert!(b.pam.0.lock().unwrap().iter().all(|s| !s.read_ram && !s.write_ram));
}

#[test]
fn smram_locks_until_reset() {
    let b = bench();
    let smram = || b.bridge.function().with_config(|c| c.u8(SMRAM));
    b.bridge.config_write(0x9c, &[0, 0x5a, 0, 0]);
    assert_eq!(smram(), 0x5a);
    b.bridge.config_write(0x9c, &[0, 0x0a, 0x80, 0]);
    assert_eq!(smram(), 0x5a);
    b.bridge.reset();
    assert_eq!(smram(), 0x02);
}

#[test]
fn state_survives_a_round_trip() {
    let b = bench();
    b.bridge.program_without_firmware(0xe000_0000);
    let saved = b.bridge.save();
    let c = bench();
    c.bridge.restore(&saved).unwrap();
    assert_eq!((c.bridge.save(), c.bridge.ecam()), (saved, b.bridge.ecam()));
    assert_eq!(*c.pam.0.lock().unwrap(), *b.pam.0.lock().unwrap());
    assert_eq!(c.id_at(0xe000_0000), 0x29c0_8086);
}

#[test]
fn garbage_is_survived() {
    let b = bench();
    let mut rng = Random::new(15);
    for _ in 0..100_000 {
        let at = rng.below(256) as u16 & !3;
        b.bridge.config_write(at, &(rng.next() as u32).to_le_bytes());
    }
    b.bridge.reset();
    b.bridge.program_without_firmware(0xe000_0000);
    assert_eq!(b.id_at(0xe000_0000), 0x29c0_8086);
}
