use atoll_machine::inputs::InputGate;
use atoll_machine::interrupt::ExtIntSource;
use atoll_machine::memory::AddressSpace;
use atoll_pci::PciBarMapper;

use super::*;
use crate::ioapic::IoApic;
use crate::pic::Pic;
use crate::testing::{MsiLog, Random, Requests, Time, outb};

struct Bench {
    lpc: Arc<LpcBridge>,
    ports: Arc<PortBus>,
    gsi: Arc<Gsi>,
    pic: Arc<Pic>,
}

fn bench() -> Bench {
    let (time, pic, ports) = (Time::new(), Pic::new(), Arc::new(PortBus::new()));
    let gsi = Gsi::new(pic.clone(), IoApic::new());
    let pm = AcpiPm::new(&time.timers, &InputGate::live(), gsi.input(9), Requests::new(), true);
    let mapper = PciBarMapper::new(&AddressSpace::new(), &ports);
    let lpc = LpcBridge::new(&ports, pm, gsi.clone(), mapper, Arc::new(MsiLog::default()));
    Bench { lpc, ports, gsi, pic }
}

impl Bench {
    fn control(&self, base: u16) -> u16 {
        let mut b = [0; 2];
        self.ports.read(base + 4, &mut b);
        u16::from_le_bytes(b)
    }
}

#[test]
fn identifies_itself() {
    let b = bench();
    let mut header = [0; 16];
    b.lpc.config_read(0, &mut header);
    assert_eq!(header[..4], [0x86, 0x80, 0x18, 0x29]);
    assert_eq!((header[8], &header[9..12], header[14]), (2, &[0x00, 0x01, 0x06][..], 0x80));
}

#[test]
fn the_power_block_follows_pmbase_and_its_enable_bit() {
    let b = bench();
    assert_eq!((b.control(0x600), b.lpc.pm_base()), (0xffff, None));
    b.lpc.program_without_firmware(0x600);
    assert_eq!((b.control(0x600), b.lpc.pm_base()), (1, Some(0x600)));
    b.lpc.config_write(PMBASE, &0xb001u32.to_le_bytes());
    assert_eq!((b.control(0x600), b.control(0xb000)), (0xffff, 1));
    b.lpc.config_write(ACPI_CONTROL, &[0]);
    assert_eq!(b.control(0xb000), 0xffff);
    b.lpc.reset();
    assert_eq!(b.lpc.pm_base(), None);
}

#[test]
fn pirq_registers_route_pci_interrupts_to_the_pic() {
    let b = bench();
    for (ports, base) in [(b.pic.master_ports(), 0x20), (b.pic.slave_ports(), 0x28)] {
        outb(&*ports, 0, 0x11);
        for v in [base, 4, 1, 0] {
            outb(&*ports, 1, v);
        }
    }
    b.gsi.input(16).set(true);
    b.lpc.config_write(PIRQ_A_D, &[0x8b]);
    assert_eq!(b.pic.acknowledge(), 0x27, "disabled");
    b.lpc.config_write(PIRQ_A_D, &[0x0b]);
    assert_eq!(b.pic.acknowledge(), 0x2b);
}

#[test]
fn state_survives_a_round_trip() {
    let b = bench();
    b.lpc.program_without_firmware(0x600);
    b.lpc.config_write(PIRQ_E_H, &[10, 11, 10, 11]);
    let saved = b.lpc.save();
    let c = bench();
    c.lpc.restore(&saved).unwrap();
    assert_eq!((c.lpc.save(), c.lpc.pm_base(), c.gsi.save()), (saved, Some(0x600), b.gsi.save()));
}

#[test]
fn garbage_is_survived() {
    let b = bench();
    let mut rng = Random::new(14);
    for _ in 0..100_000 {
        let at = rng.below(256) as u16 & !3;
        b.lpc.config_write(at, &(rng.next() as u32).to_le_bytes());
        b.ports.write(rng.next() as u16, &[rng.next() as u8]);
    }
    b.lpc.reset();
    b.lpc.program_without_firmware(0x600);
    assert_eq!(b.lpc.pm_base(), Some(0x600));
}
