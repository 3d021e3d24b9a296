//! Message-signalled interrupts through `KVM_SIGNAL_MSI`.

use std::sync::Arc;

use atoll_foundation::log_limited;
use atoll_machine::interrupt::{Msi, MsiSink};
use kvm_bindings::kvm_msi;
use kvm_ioctls::VmFd;

/// Delivery modes that a message can have here: fixed, lowest priority, NMI and INIT. SMI: no SMM is offered. ExtINT:
/// KVM takes it from LINT0 alone. Start-up and the reserved mode are for ICRs, or for nobody, and the kernel would
/// write a line to the host's log for each.
const DELIVERY_MODES: u32 = 1 << 0 | 1 << 1 | 1 << 4 | 1 << 5;

/// Sends messages to the local APICs of one VM.
pub(crate) struct Messages(pub(crate) Arc<VmFd>);

impl MsiSink for Messages {
    fn signal_msi(&self, msi: Msi) {
        let Some(message) = message(msi) else { return };
        // Zero or an error: nobody is addressed, or KVM refuses it. Both mean that the message is lost, as on a bus.
        if let Err(error) = self.0.signal_msi(message) {
            log_limited!(debug, "message {msi:x?} was dropped: {error}");
        }
    }
}

/// The message for KVM; `None` if it means nothing to a local APIC. Destinations have 8 bits: the CPU models do not
/// offer more (KVM_FEATURE_MSI_EXT_DEST_ID), and an address beyond 4 GiB is no local APIC's.
fn message(msi: Msi) -> Option<kvm_msi> {
    let mode = msi.data >> 8 & 7;
    let addressed = msi.address >> 20 == 0xfee;
    (addressed && DELIVERY_MODES >> mode & 1 != 0).then(|| kvm_msi {
        address_lo: msi.address as u32,
        data: msi.data & 0xffff,
        ..Default::default()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_messages_to_local_apics_are_sent() {
        let sent =
            |address, data| message(Msi { address, data }).map(|m| (m.address_lo, m.address_hi, m.data));
        assert_eq!(sent(0xfee0_3004, 0xc041), Some((0xfee0_3004, 0, 0xc041)));
        assert_eq!(
            sent(0xfee0_0000, 0xdead_0441),
            Some((0xfee0_0000, 0, 0x441)),
            "reserved bits are ignored"
        );
        for (address, data) in [(0, 0x41), (0x1_fee0_0000, 0x41), (u64::MAX, 0x41), (0xfed0_0000, 0x41)] {
            assert_eq!(sent(address, data), None, "{address:#x}");
        }
        for mode in [2, 3, 6, 7] {
            assert_eq!(sent(0xfee0_0000, mode << 8), None, "delivery mode {mode}");
        }
    }
}
