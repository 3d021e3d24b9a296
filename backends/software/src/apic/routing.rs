//! Which vCPUs an interrupt's destination means, and posting it there (Intel SDM vol. 3, 11.6.2 and 11.11).

use atoll_machine::interrupt::Msi;

use crate::apic::mailbox::{Mailbox, Reachability};
use crate::partition::Shared;

/// Delivery modes of ICR and MSI data, bits 10..8.
pub mod delivery {
    /// To every addressed APIC.
    pub const FIXED: u8 = 0;
    /// To one of the addressed APICs.
    pub const LOWEST_PRIORITY: u8 = 1;
    /// System management interrupt (ignored: no SMM).
    pub const SMI: u8 = 2;
    /// Non-maskable interrupt.
    pub const NMI: u8 = 4;
    /// Initialise.
    pub const INIT: u8 = 5;
    /// Start-up IPI (ICR only).
    pub const STARTUP: u8 = 6;
    /// Legacy ExtINT (MSI only).
    pub const EXTINT: u8 = 7;
}

/// Whom an interrupt is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Destination {
    /// One APIC id.
    Physical(u32),
    /// A logical id or mask, compared with each APIC's LDR.
    Logical(u32),
    /// Everybody.
    All,
    /// Everybody but the APIC with this id.
    AllBut(u32),
}

/// An interrupt on its way to local APICs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Message {
    /// Whom for.
    pub destination: Destination,
    /// Delivery mode, see [`delivery`].
    pub mode: u8,
    /// Vector.
    pub vector: u8,
    /// Level triggered (else edge).
    pub level: bool,
    /// Sent by an APIC in x2APIC mode: the destination is 32 bits wide.
    pub wide: bool,
}

impl Message {
    /// Decodes a message-signalled interrupt.
    pub fn from_msi(msi: Msi) -> Self {
        let id = (msi.address >> 12 & 0xff) as u32;
        let destination = if msi.address & 4 != 0 { Destination::Logical(id) } else { physical8(id) };
        let mode = (msi.data >> 8 & 7) as u8;
        Self { destination, mode, vector: msi.data as u8, level: msi.data & 1 << 15 != 0, wide: false }
    }
}

/// A physical destination of 8 bits, 0xff meaning everybody.
pub fn physical8(id: u32) -> Destination {
    if id == 0xff { Destination::All } else { Destination::Physical(id) }
}

fn logical_match(reach: Reachability, apic_id: u32, dest: u32, wide: bool) -> bool {
    if reach.x2apic {
        if wide {
            if dest == u32::MAX {
                return true;
            }
            let ldr = (apic_id >> 4) << 16 | 1 << (apic_id & 15);
            return ldr >> 16 == dest >> 16 && ldr & dest & 0xffff != 0;
        }
        // An 8-bit destination (IOAPIC, MSI) reaches cluster 0 of x2APIC mode only.
        return apic_id >> 4 == 0 && (dest & 0xff) & 1 << (apic_id & 15) != 0;
    }
    let (ldr, dest) = (reach.ldr >> 24, dest & 0xff);
    if reach.flat {
        ldr & dest != 0
    } else {
        (dest >> 4 == 0xf || ldr >> 4 == dest >> 4) && ldr & dest & 0xf != 0
    }
}

fn addressed(mailbox: &Mailbox, message: &Message) -> bool {
    let reach = mailbox.reach();
    match message.destination {
        Destination::Physical(id) => {
            let wide_broadcast = message.wide && id == u32::MAX;
            wide_broadcast || mailbox.apic_id == id
        }
        Destination::Logical(dest) => {
            reach.enabled && logical_match(reach, mailbox.apic_id, dest, message.wide)
        }
        Destination::All => true,
        Destination::AllBut(id) => mailbox.apic_id != id,
    }
}

/// Posts `message` to every APIC it addresses. Returns whether there was one.
pub fn send(shared: &Shared, message: &Message) -> bool {
    if message.mode == delivery::LOWEST_PRIORITY {
        return send_lowest_priority(shared, message);
    }
    let mut any = false;
    for mailbox in shared.mailboxes.iter().filter(|m| addressed(m, message)) {
        post(mailbox, message);
        any = true;
    }
    any
}

/// Lowest priority: one of the enabled addressed APICs, chosen by the vector, so that one vector stays on one
/// processor (its cache is warm) and the choice is repeatable. Arbitration by TPR is model specific.
fn send_lowest_priority(shared: &Shared, message: &Message) -> bool {
    let candidate = |m: &Mailbox| addressed(m, message) && m.reach().software_enabled;
    let count = shared.mailboxes.iter().filter(|m| candidate(m)).count();
    if count == 0 {
        return false;
    }
    let chosen = usize::from(message.vector) % count;
    if let Some(mailbox) = shared.mailboxes.iter().filter(|m| candidate(m)).nth(chosen) {
        mailbox.post(message.vector, message.level);
    }
    true
}

fn post(mailbox: &Mailbox, message: &Message) {
    match message.mode {
        delivery::FIXED => mailbox.post(message.vector, message.level),
        delivery::NMI => mailbox.post_nmi(),
        delivery::INIT => mailbox.post_init(),
        delivery::STARTUP => mailbox.post_sipi(message.vector),
        // SMI: no SMM is offered. ExtINT by message: no chipset of ours sends it.
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn xapic(ldr: u8, flat: bool) -> Reachability {
        Reachability { ldr: u32::from(ldr) << 24, enabled: true, flat, ..Reachability::default() }
    }

    #[test]
    fn flat_and_cluster_destinations_match_as_the_manual_says() {
        assert!(logical_match(xapic(0b0100, true), 2, 0b0110, false));
        assert!(!logical_match(xapic(0b1000, true), 3, 0b0110, false));
        assert!(logical_match(xapic(0x21, false), 4, 0x23, false));
        assert!(!logical_match(xapic(0x21, false), 4, 0x31, false));
        assert!(logical_match(xapic(0x21, false), 4, 0xf1, false));
    }

    #[test]
    fn x2apic_logical_ids_are_derived_from_the_apic_id() {
        let x2 = Reachability { enabled: true, x2apic: true, ..Reachability::default() };
        assert!(logical_match(x2, 0x13, 0x0001_0008, true));
        assert!(!logical_match(x2, 0x13, 0x0001_0004, true));
        assert!(!logical_match(x2, 0x13, 0x0000_0008, true));
        assert!(logical_match(x2, 0x13, u32::MAX, true));
        assert!(logical_match(x2, 0x3, 0x08, false));
    }

    #[test]
    fn msi_fields_are_decoded() {
        let m = Message::from_msi(Msi { address: 0xfee0_3004, data: 0xc141 });
        assert_eq!(m.destination, Destination::Logical(3));
        assert_eq!((m.mode, m.vector, m.level), (delivery::LOWEST_PRIORITY, 0x41, true));
        assert_eq!(Message::from_msi(Msi { address: 0xfeef_f000, data: 0x30 }).destination, Destination::All);
    }
}
