//! Feature bits of the network device (VIRTIO 1.2, section 5.1.3) and the offloads that they stand for.

use atoll_network::Offloads;

pub(super) const CSUM: u64 = 1 << 0;
pub(super) const GUEST_CSUM: u64 = 1 << 1;
pub(super) const CTRL_GUEST_OFFLOADS: u64 = 1 << 2;
pub(super) const MTU: u64 = 1 << 3;
pub(super) const MAC: u64 = 1 << 5;
pub(super) const GUEST_TSO4: u64 = 1 << 7;
pub(super) const GUEST_TSO6: u64 = 1 << 8;
pub(super) const GUEST_ECN: u64 = 1 << 9;
pub(super) const HOST_TSO4: u64 = 1 << 11;
pub(super) const HOST_TSO6: u64 = 1 << 12;
pub(super) const HOST_ECN: u64 = 1 << 13;
pub(super) const MRG_RXBUF: u64 = 1 << 15;
pub(super) const STATUS: u64 = 1 << 16;
pub(super) const CTRL_VQ: u64 = 1 << 17;
pub(super) const CTRL_RX: u64 = 1 << 18;
pub(super) const CTRL_VLAN: u64 = 1 << 19;
pub(super) const CTRL_RX_EXTRA: u64 = 1 << 20;
pub(super) const GUEST_ANNOUNCE: u64 = 1 << 21;
pub(super) const MQ: u64 = 1 << 22;
pub(super) const CTRL_MAC_ADDR: u64 = 1 << 23;
pub(super) const GUEST_USO4: u64 = 1 << 54;
pub(super) const GUEST_USO6: u64 = 1 << 55;
pub(super) const HOST_USO: u64 = 1 << 56;

/// What the driver can switch with VIRTIO_NET_CTRL_GUEST_OFFLOADS_SET (5.1.6.5.6.1).
pub(super) const GUEST_OFFLOADS: u64 =
    GUEST_CSUM | GUEST_TSO4 | GUEST_TSO6 | GUEST_ECN | GUEST_USO4 | GUEST_USO6;

/// What a feature needs besides itself (5.1.3.1): any one bit of each group.
const NEEDS: [(u64, u64); 16] = [
    (GUEST_TSO4, GUEST_CSUM),
    (GUEST_TSO6, GUEST_CSUM),
    (GUEST_USO4, GUEST_CSUM),
    (GUEST_USO6, GUEST_CSUM),
    (GUEST_ECN, GUEST_TSO4 | GUEST_TSO6),
    (HOST_TSO4, CSUM),
    (HOST_TSO6, CSUM),
    (HOST_USO, CSUM),
    (HOST_ECN, HOST_TSO4 | HOST_TSO6),
    (CTRL_RX, CTRL_VQ),
    (CTRL_VLAN, CTRL_VQ),
    (GUEST_ANNOUNCE, CTRL_VQ),
    (MQ, CTRL_VQ),
    (CTRL_MAC_ADDR, CTRL_VQ),
    (CTRL_GUEST_OFFLOADS, CTRL_VQ),
    (CTRL_RX_EXTRA, CTRL_RX),
];

/// `accepted` without what lacks its requirements. A driver must not accept such a set; one that does gets the
/// part that makes sense.
pub(super) fn usable(mut accepted: u64) -> u64 {
    // In the order of the table nothing needs what comes after it.
    for (feature, needs) in NEEDS {
        if accepted & needs == 0 {
            accepted &= !feature;
        }
    }
    accepted
}

fn bit(condition: bool, feature: u64) -> u64 {
    if condition { feature } else { 0 }
}

/// What to offer for a port that takes `send` and may give `receive`.
pub(super) fn of_offloads(send: Offloads, receive: Offloads) -> u64 {
    let guest = bit(receive.checksum, GUEST_CSUM)
        | bit(receive.tcp4, GUEST_TSO4)
        | bit(receive.tcp6, GUEST_TSO6)
        | bit(receive.ecn, GUEST_ECN)
        | bit(receive.udp_l4, GUEST_USO4 | GUEST_USO6);
    let host = bit(send.checksum, CSUM)
        | bit(send.tcp4, HOST_TSO4)
        | bit(send.tcp6, HOST_TSO6)
        | bit(send.ecn, HOST_ECN)
        | bit(send.udp_l4, HOST_USO);
    let both = usable(guest | host);
    both | bit(both & GUEST_OFFLOADS != 0, CTRL_GUEST_OFFLOADS)
}

/// Unfinished frames that a driver with these features and guest offloads takes.
pub(super) fn receive_offloads(bits: u64) -> Offloads {
    Offloads {
        checksum: bits & GUEST_CSUM != 0,
        tcp4: bits & GUEST_TSO4 != 0,
        tcp6: bits & GUEST_TSO6 != 0,
        ecn: bits & GUEST_ECN != 0,
        // One flag stands for both families.
        udp_l4: bits & GUEST_USO4 != 0 && bits & GUEST_USO6 != 0,
    }
}

/// Unfinished frames that a driver with these features may send.
pub(super) fn send_offloads(bits: u64) -> Offloads {
    Offloads {
        checksum: bits & CSUM != 0,
        tcp4: bits & HOST_TSO4 != 0,
        tcp6: bits & HOST_TSO6 != 0,
        ecn: bits & HOST_ECN != 0,
        udp_l4: bits & HOST_USO != 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn features_without_their_requirements_do_not_count() {
        assert_eq!(usable(GUEST_TSO4 | GUEST_ECN | HOST_TSO4 | HOST_ECN), 0);
        assert_eq!(usable(CTRL_RX | CTRL_RX_EXTRA | MQ | MAC), MAC);
        let good = CSUM | HOST_TSO6 | HOST_ECN | GUEST_CSUM | GUEST_TSO4 | GUEST_ECN | CTRL_VQ | MQ;
        assert_eq!(usable(good), good);
    }

    #[test]
    fn features_follow_what_the_port_can() {
        assert_eq!(of_offloads(Offloads::NONE, Offloads::NONE), 0);
        let send = of_offloads(Offloads::TCP, Offloads::NONE);
        assert_eq!(send, CSUM | HOST_TSO4 | HOST_TSO6);
        let all = Offloads { ecn: true, udp_l4: true, ..Offloads::TCP };
        let both = of_offloads(all, all);
        assert_eq!((send_offloads(both), receive_offloads(both)), (all, all));
        assert_ne!(both & CTRL_GUEST_OFFLOADS, 0);
        assert!(!receive_offloads(both & !GUEST_USO6).udp_l4, "one family alone cannot be asked for");
    }
}
