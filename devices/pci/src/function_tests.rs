use super::*;
use crate::testing::{LineLog, MapLog, MsiLog, Nothing, Random};

struct Bench {
    f: PciFunction,
    maps: Arc<MapLog>,
    msis: Arc<MsiLog>,
}

const ID: Identity = Identity {
    vendor: 0x1af4,
    device: 0x1042,
    class: 0x01_80_00,
    revision: 1,
    subsystem_vendor: 0x1af4,
    subsystem: 0x1100,
};

fn bench() -> Bench {
    let mut b = FunctionBuilder::new(ID);
    let mmio = || Some(BarTarget::Mmio(Arc::new(Nothing)));
    b.interrupt_pin(0)
        .bar(BarSpec {
            index: 0,
            kind: BarKind::Io,
            size: 0x40,
            target: Some(BarTarget::Ports(Arc::new(Nothing))),
        })
        .bar(BarSpec {
            index: 4,
            kind: BarKind::Memory64 { prefetchable: true },
            size: 0x4000,
            target: mmio(),
        })
        .power_management()
        .msi(MsiSpec { vectors: 4 })
        .msix(1, 3);
    b.express(ExpressSpec::ENDPOINT);
    b.extended_capability(regs::EXT_CAP_SERIAL, 1, &[1, 2, 3, 4, 5, 6, 7, 8], &[]);
    b.extended_capability(regs::EXT_CAP_AER, 2, &[0; 0x44], &[]);
    let (maps, msis) = (Arc::new(MapLog::default()), Arc::new(MsiLog::default()));
    Bench { f: b.build(maps.clone(), msis.clone()), maps, msis }
}

impl Bench {
    fn r32(&self, at: u16) -> u32 {
        let mut b = [0; 4];
        self.f.config_read(at, &mut b);
        u32::from_le_bytes(b)
    }
    fn w32(&self, at: u16, v: u32) {
        self.f.config_write(at, &v.to_le_bytes());
    }
    fn w16(&self, at: u16, v: u16) {
        self.f.config_write(at, &v.to_le_bytes());
    }
    fn capability(&self, id: u8) -> u16 {
        let mut at = self.r32(regs::CAPABILITIES) as u8;
        for _ in 0..48 {
            let header = self.r32(u16::from(at));
            if header as u8 == id {
                return u16::from(at);
            }
            at = (header >> 8) as u8;
        }
        panic!("no capability {id:#x}");
    }
}

#[test]
fn identity_and_class_are_read_only() {
    let b = bench();
    b.w32(0, 0);
    b.w32(8, 0);
    assert_eq!(b.r32(0), 0x1042_1af4);
    assert_eq!(b.r32(8), 0x0180_0001);
    assert_eq!(b.r32(0x2c), 0x1100_1af4);
}

#[test]
fn sizing_a_bar_shows_size_and_type_and_never_maps() {
    let b = bench();
    b.w16(COMMAND, 3);
    b.w32(0x10, u32::MAX);
    assert_eq!(b.r32(0x10), 0xffff_ffc1);
    b.w32(0x20, u32::MAX);
    b.w32(0x24, u32::MAX);
    assert_eq!((b.r32(0x20), b.r32(0x24)), (0xffff_c00c, 0xffff_ffff));
    assert_eq!(b.r32(0x18), 0, "no BAR there");
    assert!(b.maps.now().is_empty());
}

#[test]
fn bars_map_when_decoding_is_on_and_follow_their_register() {
    let b = bench();
    b.w32(0x20, 0x4000_000c);
    b.w32(0x24, 1);
    b.w32(0x10, 0xc000);
    assert!(b.maps.now().is_empty());
    b.w16(COMMAND, 1);
    assert_eq!(b.maps.now(), vec![(0xc000, 0x40)]);
    b.w16(COMMAND, 3);
    assert_eq!(b.maps.now(), vec![(0xc000, 0x40), (0x1_4000_0000, 0x4000)]);
    b.w32(0x24, 2);
    assert_eq!(b.maps.now(), vec![(0xc000, 0x40), (0x2_4000_0000, 0x4000)]);
    b.w16(COMMAND, 0);
    assert!(b.maps.now().is_empty());
    b.w16(COMMAND, 2);
    b.f.reset();
    assert!(b.maps.now().is_empty());
    assert_eq!(b.r32(0x24), 0);
}

#[test]
fn capability_chains_hold_every_capability_once() {
    let b = bench();
    for id in [regs::CAP_POWER, regs::CAP_MSI, regs::CAP_MSIX, regs::CAP_EXPRESS] {
        assert_eq!(b.capability(id) % 4, 0);
    }
    assert_eq!(b.r32(0x100), 0x10c1_0003);
    assert_eq!(b.r32(0x10c), 0x0002_0001);
    let x = b.capability(regs::CAP_MSIX);
    assert_eq!((b.r32(x) >> 16, b.r32(x + 4), b.r32(x + 8)), (2, 1, 0x801));
}

#[test]
fn msix_follows_its_control_register_and_maps_its_bar() {
    let b = bench();
    let x = b.capability(regs::CAP_MSIX);
    b.w32(0x14, 0xfe00_0000);
    b.w16(COMMAND, 6);
    assert_eq!(b.maps.now(), vec![(0xfe00_0000, 0x1000)]);
    let msix = b.f.msix().unwrap().clone();
    assert!(!msix.signal(0));
    b.w16(x + 2, 0x8000);
    assert!(msix.enabled() && msix.signal(0), "masked at reset, so pending");
    assert!(b.msis.take().is_empty());
    b.f.reset();
    assert!(!msix.enabled());
}

#[test]
fn msi_composes_address_and_data_and_pends_while_masked() {
    let b = bench();
    let m = b.capability(regs::CAP_MSI);
    assert!(!b.f.signal_msi(0));
    b.w32(m + 4, 0xfee0_1003);
    b.w32(m + 8, 0x5);
    b.w16(m + 12, 0x40);
    b.w16(COMMAND, regs::COMMAND_BUS_MASTER);
    b.w16(m + 2, 0x0021);
    assert!(b.f.signal_msi(3));
    let message = |data| atoll_machine::interrupt::Msi { address: 0x5_fee0_1000, data };
    assert_eq!(b.msis.take(), vec![message(0x43)]);
    b.w32(m + 16, 0xf);
    b.f.signal_msi(2);
    assert_eq!((b.msis.take(), b.r32(m + 20)), (vec![], 4));
    b.w32(m + 16, 0);
    assert_eq!((b.msis.take(), b.r32(m + 20)), (vec![message(0x42)], 0));
}

#[test]
fn intx_shows_in_status_and_obeys_the_disable_bit() {
    let b = bench();
    let lines = Arc::new(LineLog::default());
    b.f.connect_intx(IrqLine::new(lines.clone(), 17));
    b.f.set_intx(true);
    assert_eq!(lines.0.lock().unwrap().pop(), Some((17, true)));
    assert_ne!(b.r32(4) >> 16 & 8, 0);
    b.w16(COMMAND, regs::COMMAND_INTX_DISABLE);
    assert_eq!(lines.0.lock().unwrap().pop(), Some((17, false)));
    assert_ne!(b.r32(4) >> 16 & 8, 0);
    b.w16(COMMAND, 0);
    assert_eq!(lines.0.lock().unwrap().pop(), Some((17, true)));
    b.f.reset();
    assert_eq!(lines.0.lock().unwrap().pop(), Some((17, false)));
}

#[test]
fn function_level_reset_is_reported_once_and_does_not_stick() {
    let b = bench();
    let e = b.capability(regs::CAP_EXPRESS);
    let effect = b.f.config_write(e + 8, &0x8000u16.to_le_bytes());
    assert!(effect.function_reset);
    assert_eq!(b.r32(e + 8) & 0x8000, 0);
    assert!(!b.f.config_write(e + 8, &[0xff]).function_reset);
}

#[test]
fn state_survives_a_round_trip_with_bars_mapped_again() {
    let b = bench();
    b.w32(0x20, 0x4000_000c);
    b.w32(0x10, 0xc000);
    b.w16(COMMAND, 7);
    b.w16(b.capability(regs::CAP_MSIX) + 2, 0x8000);
    b.f.msix().unwrap().signal(2);
    b.f.set_intx(true);
    let saved = b.f.save();
    let c = bench();
    c.f.restore(&saved).unwrap();
    assert_eq!(c.f.save(), saved);
    assert_eq!(c.maps.now(), b.maps.now());
    assert!(c.f.bus_master() && c.f.msix().unwrap().enabled());
    let other = FunctionBuilder::new(Identity { device: 1, ..ID })
        .build(Arc::new(MapLog::default()), Arc::new(MsiLog::default()));
    assert!(matches!(other.restore(&saved), Err(RestoreError::Identity { .. })));
    c.f.restore(&PciFunctionStateV1 { config: Some(vec![0xf4, 0x1a, 0x42, 0x10]), ..Default::default() })
        .unwrap();
    assert!(c.maps.now().is_empty());
}

#[test]
fn garbage_writes_are_survived() {
    let b = bench();
    let mut rng = Random::new(11);
    let mut buf = [0; 4];
    for _ in 0..100_000 {
        let len = 1 << rng.below(3);
        let space = if rng.below(4) == 0 { 4096 } else { 256 };
        let at = (rng.below(space) as u16) & !(len as u16 - 1);
        rng.fill(&mut buf);
        b.f.config_write(at, &buf[..len]);
        b.f.config_read(at, &mut buf[..len]);
        if rng.below(16) == 0 {
            b.f.signal_msi(rng.below(256) as u8);
            b.f.msix().unwrap().signal(rng.below(5) as u16);
        }
    }
    assert_eq!(b.r32(0), 0x1042_1af4);
    assert!(b.maps.now().len() <= 3);
}
