//! MADT: processors and interrupt controllers (ACPI 6.5, section 5.2.12).

use super::{CpuEntry, sdt};
use crate::layout;

/// Revision 5 is the first with the online-capable flag.
const REVISION: u8 = 5;
/// The machine also has two 8259s.
const PCAT_COMPAT: u32 = 1;
/// The processor can be used.
const ENABLED: u32 = 1;
/// The processor cannot be used yet, it may be enabled at run time.
const ONLINE_CAPABLE: u32 = 2;
/// Level-triggered, active high, in an interrupt override's flags.
const LEVEL_HIGH: u16 = 3 << 2 | 1;
/// "All processors" in an NMI structure.
const ALL_PROCESSORS: u8 = 0xFF;
/// First APIC identifier that needs x2APIC structures.
const X2APIC_FIRST: u32 = 0xFF;

/// Builds the table. Processor n of `cpus` has processor identifier n.
pub(super) fn build(cpus: &[CpuEntry]) -> Vec<u8> {
    let mut body = Vec::new();
    body.extend_from_slice(&(layout::LAPIC_BASE as u32).to_le_bytes());
    body.extend_from_slice(&PCAT_COMPAT.to_le_bytes());
    for (uid, cpu) in cpus.iter().enumerate() {
        processor(&mut body, uid as u32, cpu);
    }
    ioapic(&mut body);
    // The timer of the 8254 is wired to input 2, because input 0 takes the 8259's output.
    interrupt_override(&mut body, 0, 2, 0);
    interrupt_override(&mut body, layout::SCI_GSI, u32::from(layout::SCI_GSI), LEVEL_HIGH);
    // LINT1 of every processor is NMI.
    body.extend_from_slice(&[4, 6, ALL_PROCESSORS, 0, 0, 1]);
    if cpus.iter().any(|cpu| cpu.apic_id >= X2APIC_FIRST) {
        body.extend_from_slice(&[10, 12, 0, 0, 0xFF, 0xFF, 0xFF, 0xFF, 1, 0, 0, 0]);
    }
    sdt::table(b"APIC", REVISION, &body)
}

/// Local APIC (type 0) or, for identifiers that do not fit it, local x2APIC (type 9).
fn processor(body: &mut Vec<u8>, uid: u32, cpu: &CpuEntry) {
    let flags = if cpu.present { ENABLED } else { ONLINE_CAPABLE };
    match (u8::try_from(uid), u8::try_from(cpu.apic_id)) {
        (Ok(uid), Ok(apic_id)) if u32::from(apic_id) < X2APIC_FIRST => {
            body.extend_from_slice(&[0, 8, uid, apic_id]);
            body.extend_from_slice(&flags.to_le_bytes());
        }
        _ => {
            body.extend_from_slice(&[9, 16, 0, 0]);
            body.extend_from_slice(&cpu.apic_id.to_le_bytes());
            body.extend_from_slice(&flags.to_le_bytes());
            body.extend_from_slice(&uid.to_le_bytes());
        }
    }
}

fn ioapic(body: &mut Vec<u8>) {
    body.extend_from_slice(&[1, 12, layout::IOAPIC_ID, 0]);
    body.extend_from_slice(&(layout::IOAPIC_BASE as u32).to_le_bytes());
    body.extend_from_slice(&0u32.to_le_bytes());
}

fn interrupt_override(body: &mut Vec<u8>, irq: u8, gsi: u32, flags: u16) {
    body.extend_from_slice(&[2, 10, 0, irq]);
    body.extend_from_slice(&gsi.to_le_bytes());
    body.extend_from_slice(&flags.to_le_bytes());
}
