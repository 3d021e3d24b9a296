use atoll_machine::bus::PortBus;
use atoll_machine::memory::AddressSpace;
use atoll_pci::{Bdf, PciBarMapper, PciRoot, devfn};

use super::*;
use crate::testing::{MsiLog, Random, Wires};

#[derive(Default)]
struct Removals(Mutex<Vec<u16>>);
impl SlotListener for Removals {
    fn removed(&self, slot: u16, _device: Arc<dyn PciDevice>) {
        self.0.lock().unwrap().push(slot);
    }
}

struct Card(PciFunction);
impl PciDevice for Card {
    fn function(&self) -> &PciFunction {
        &self.0
    }
    fn reset(&self) {
        self.0.reset();
    }
}

struct Bench {
    root: Arc<PciRoot>,
    port: Arc<RootPort>,
    removals: Arc<Removals>,
    msi: Arc<MsiLog>,
    mapper: Arc<PciBarMapper>,
    wires: Arc<Wires>,
}

fn bench() -> Bench {
    let mapper = PciBarMapper::new(&AddressSpace::new(), &Arc::new(PortBus::new()));
    let (removals, msi) = (Arc::new(Removals::default()), Arc::new(MsiLog::default()));
    let port = RootPort::new(3, removals.clone(), InputGate::live(), mapper.clone(), msi.clone());
    let root = PciRoot::new();
    root.bus().attach(devfn(2, 0), port.clone()).unwrap();
    port.config_write(regs::PRIMARY_BUS, &[0, 1, 1]);
    let wires = Wires::new();
    port.function().connect_intx(wires.line(22));
    Bench { root, port, removals, msi, mapper, wires }
}

impl Bench {
    fn card(&self) -> Arc<dyn PciDevice> {
        let builder =
            FunctionBuilder::new(Identity { vendor: 0x1af4, device: 0x1044, ..Identity::default() });
        Arc::new(Card(builder.build(self.mapper.clone(), self.msi.clone())))
    }
    fn card_answers(&self) -> bool {
        let mut b = [0; 2];
        self.root.config_read(Bdf::new(1, 0, 0), 0, &mut b);
        b == [0xf4, 0x1a]
    }
    fn r(&self, register: u16) -> u16 {
        self.port.register(register)
    }
    fn w(&self, register: u16, value: u16) {
        self.port.config_write(self.port.express + register, &value.to_le_bytes());
    }
    /// Enables every event and MSI, as a hot-plug driver does.
    fn listen(&self) {
        self.port.config_write(regs::COMMAND, &[4]);
        self.port.config_write(0x44, &0xfee0_0000u32.to_le_bytes());
        self.port.config_write(0x4c, &[0x31]);
        self.port.config_write(0x42, &[1]);
        self.w(offset::SLOT_CONTROL, self.r(offset::SLOT_CONTROL) | 0x103b);
        self.clear();
    }
    fn clear(&self) -> u16 {
        let status = self.r(offset::SLOT_STATUS);
        self.w(offset::SLOT_STATUS, status);
        self.msi.take();
        status
    }
    fn power(&self, on: bool) {
        let rest = self.r(offset::SLOT_CONTROL) & !(CONTROL_POWER_OFF | INDICATOR);
        let power = if on { INDICATOR_ON } else { INDICATOR_OFF | CONTROL_POWER_OFF };
        self.w(offset::SLOT_CONTROL, rest | power);
    }
}

#[test]
fn a_device_there_at_start_is_on_the_bus() {
    let b = bench();
    assert!(!b.card_answers());
    b.port.insert(b.card()).unwrap();
    assert!(b.card_answers());
    assert_eq!(b.r(offset::SLOT_STATUS), STATUS_PRESENT);
    assert_eq!(b.r(offset::LINK_STATUS) & LINK_STATUS_ACTIVE, LINK_STATUS_ACTIVE);
    assert_eq!(b.r(offset::SLOT_CONTROL), INDICATOR_ON);
    assert_eq!(b.port.insert(b.card()), Err(PlugError::Occupied(3)));
    b.root.bus().reset();
    assert!(b.port.card().is_some() && b.bus_has_card());
}
impl Bench {
    fn bus_has_card(&self) -> bool {
        self.port.bus().get(0).is_some()
    }
}

#[test]
fn hot_plug_goes_by_events_and_power() {
    let b = bench();
    b.listen();
    b.port.plug(b.card()).unwrap();
    assert_eq!(b.msi.take().len(), 1);
    assert_eq!(b.clear(), STATUS_PRESENT | STATUS_PRESENCE_CHANGED);
    assert!(!b.card_answers(), "power is off");
    b.power(true);
    assert!(b.card_answers());
    assert_eq!(b.clear(), STATUS_PRESENT | STATUS_COMMAND_COMPLETED | STATUS_LINK_CHANGED);
    b.port.request_unplug().unwrap();
    assert_eq!((b.msi.take().len(), b.clear()), (1, STATUS_PRESENT | STATUS_BUTTON));
    assert!(b.card_answers());
    b.power(false);
    assert!(!b.card_answers() && b.port.card().is_none());
    assert_eq!(*b.removals.0.lock().unwrap(), [3]);
    let events = STATUS_PRESENCE_CHANGED | STATUS_COMMAND_COMPLETED | STATUS_LINK_CHANGED;
    assert_eq!(b.clear(), events);
    assert_eq!(b.port.request_unplug(), Err(PlugError::Empty(3)));
    assert!(b.port.plug(b.card()).is_ok());
}

#[test]
fn power_without_a_request_only_hides_the_device() {
    let b = bench();
    b.port.insert(b.card()).unwrap();
    b.power(false);
    assert!(!b.card_answers() && b.port.card().is_some());
    b.power(true);
    assert!(b.card_answers());
    assert!(b.removals.0.lock().unwrap().is_empty());
}

#[test]
fn events_use_intx_while_msi_is_off() {
    let b = bench();
    b.w(offset::SLOT_CONTROL, b.r(offset::SLOT_CONTROL) | 0x0029);
    assert!(!b.wires.high(22));
    b.port.plug(b.card()).unwrap();
    assert!(b.wires.high(22));
    b.clear();
    assert!(!b.wires.high(22));
}

#[test]
fn a_restart_completes_an_unplug() {
    let b = bench();
    b.port.insert(b.card()).unwrap();
    b.port.request_unplug().unwrap();
    b.root.bus().reset();
    assert_eq!((b.port.card().is_none(), &b.removals.0.lock().unwrap()[..]), (true, &[3][..]));
    assert_eq!(b.r(offset::SLOT_STATUS), 0);
}

#[test]
fn secondary_bus_reset_resets_the_card() {
    let b = bench();
    b.port.insert(b.card()).unwrap();
    b.root.config_write(Bdf::new(1, 0, 0), regs::COMMAND, &[6]);
    b.port.config_write(regs::BRIDGE_CONTROL, &[0x40]);
    let command = b.port.card().unwrap().function().with_config(|c| c.u16(regs::COMMAND));
    assert_eq!(command, 0);
}

#[test]
fn state_survives_a_round_trip() {
    let b = bench();
    b.listen();
    b.port.plug(b.card()).unwrap();
    b.power(true);
    b.port.request_unplug().unwrap();
    let saved = b.port.save();
    let c = bench();
    c.port.insert(c.card()).unwrap();
    c.port.restore(&saved).unwrap();
    assert_eq!(c.port.save(), saved);
    assert!(c.card_answers() && c.msi.take().is_empty());
    c.power(false);
    assert_eq!(*c.removals.0.lock().unwrap(), [3]);
}

#[test]
fn garbage_is_survived() {
    let b = bench();
    let mut rng = Random::new(16);
    for _ in 0..100_000 {
        let at = (rng.below(256) as u16) & !3;
        b.port.config_write(at, &(rng.next() as u32).to_le_bytes());
        if rng.below(4) == 0 {
            let slot_control = b.port.express + offset::SLOT_CONTROL;
            b.port.config_write(slot_control, &(rng.next() as u16).to_le_bytes());
        }
        match rng.below(32) {
            0 => drop(b.port.plug(b.card())),
            1 => drop(b.port.request_unplug()),
            2 => b.root.bus().reset(),
            _ => {}
        }
        b.msi.take();
    }
    b.root.bus().reset();
    assert_eq!(b.port.bus().get(0).is_some(), b.port.card().is_some());
}
