//! Which frames the guest wants (VIRTIO 1.2, sections 5.1.6.5.1 to 5.1.6.5.3).

use atoll_network::MacAddress;

/// Addresses that each table keeps. With more, all frames of that kind pass, which the specification permits: the
/// filter is a service, the guest looks itself.
pub(super) const MAX_ADDRESSES: usize = 64;

/// Bytes of a bitmap of VLANs.
const VLAN_BYTES: usize = 4096 / 8;

/// Receive modes, as bits; the same in the saved state.
pub(super) mod mode {
    pub(in super::super) const PROMISCUOUS: u8 = 1 << 0;
    pub(in super::super) const ALL_MULTICAST: u8 = 1 << 1;
    pub(in super::super) const ALL_UNICAST: u8 = 1 << 2;
    pub(in super::super) const NO_MULTICAST: u8 = 1 << 3;
    pub(in super::super) const NO_UNICAST: u8 = 1 << 4;
    pub(in super::super) const NO_BROADCAST: u8 = 1 << 5;
    /// All of them.
    pub(in super::super) const ALL: u8 = (1 << 6) - 1;
}

/// A list of addresses.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Addresses {
    list: Vec<[u8; 6]>,
    /// There were more.
    overflow: bool,
}

impl Addresses {
    /// Takes `count` addresses out of the front of `bytes`. `None` if they are not all there.
    pub(super) fn take(bytes: &mut &[u8], count: usize) -> Option<Self> {
        let (all, rest) = bytes.split_at_checked(count.checked_mul(6)?)?;
        *bytes = rest;
        Some(Self::from_bytes(all, false))
    }

    /// From addresses one after the other.
    pub(super) fn from_bytes(bytes: &[u8], overflow: bool) -> Self {
        let (all, _) = bytes.as_chunks::<6>();
        let overflow = overflow || all.len() > MAX_ADDRESSES;
        Self { list: if overflow { Vec::new() } else { all.to_vec() }, overflow }
    }

    /// The addresses one after the other, and whether there were too many.
    pub(super) fn to_bytes(&self) -> (Vec<u8>, bool) {
        (self.list.concat(), self.overflow)
    }

    fn pass(&self, address: &[u8; 6]) -> bool {
        self.overflow || self.list.contains(address)
    }
}

/// What the driver asked for.
#[derive(Clone, Debug)]
pub(super) struct Filter {
    pub(super) mac: MacAddress,
    pub(super) modes: u8,
    pub(super) unicast: Addresses,
    pub(super) multicast: Addresses,
    vlans: Box<[u8; VLAN_BYTES]>,
}

impl Filter {
    /// Before the driver says anything: every address, no VLAN.
    pub(super) fn new(mac: MacAddress) -> Self {
        Self {
            mac,
            modes: mode::PROMISCUOUS,
            unicast: Addresses::default(),
            multicast: Addresses::default(),
            vlans: Box::new([0; VLAN_BYTES]),
        }
    }

    /// Lets a VLAN pass or not. False if there is no such VLAN.
    pub(super) fn set_vlan(&mut self, id: u16, pass: bool) -> bool {
        let Some(byte) = self.vlans.get_mut(usize::from(id / 8)) else { return false };
        let bit = 1 << (id % 8);
        *byte = if pass { *byte | bit } else { *byte & !bit };
        true
    }

    pub(super) fn vlans(&self) -> &[u8] {
        &*self.vlans
    }

    pub(super) fn set_vlans(&mut self, bytes: &[u8]) {
        self.vlans.fill(0);
        for (to, from) in self.vlans.iter_mut().zip(bytes) {
            *to = *from;
        }
    }

    /// Whether a frame passes, as far as the driver asked for filtering by address and by VLAN.
    pub(super) fn pass(&self, frame: &[u8], by_address: bool, by_vlan: bool) -> bool {
        if self.modes & mode::PROMISCUOUS != 0 && by_address {
            return true;
        }
        (!by_vlan || self.vlan_passes(frame)) && (!by_address || self.address_passes(frame))
    }

    fn vlan_passes(&self, frame: &[u8]) -> bool {
        match frame.get(12..16) {
            Some(&[0x81, 0x00, high, low]) => {
                let id = u16::from_be_bytes([high & 0xf, low]);
                self.vlans.get(usize::from(id / 8)).is_some_and(|byte| byte & 1 << (id % 8) != 0)
            }
            _ => true,
        }
    }

    fn address_passes(&self, frame: &[u8]) -> bool {
        let Some(to) = frame.first_chunk::<6>() else { return false };
        let on = |modes: u8| self.modes & modes != 0;
        if *to == [0xff; 6] {
            !on(mode::NO_BROADCAST)
        } else if to[0] & 1 != 0 {
            !on(mode::NO_MULTICAST) && (on(mode::ALL_MULTICAST) || self.multicast.pass(to))
        } else {
            !on(mode::NO_UNICAST) && (on(mode::ALL_UNICAST) || *to == self.mac.0 || self.unicast.pass(to))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const OWN: [u8; 6] = [0x52, 0x54, 0, 0, 0, 1];
    const OTHER: [u8; 6] = [0x52, 0x54, 0, 0, 0, 2];
    const GROUP: [u8; 6] = [0x33, 0x33, 0, 0, 0, 1];

    fn passes(filter: &Filter, to: [u8; 6]) -> bool {
        let mut frame = to.to_vec();
        frame.extend_from_slice(&[0; 54]);
        filter.pass(&frame, true, true)
    }

    #[test]
    fn each_mode_lets_its_kind_pass() {
        let mut f = Filter::new(MacAddress(OWN));
        assert!(passes(&f, OTHER), "everything, before the driver has said otherwise");
        f.modes = 0;
        let seen = |f: &Filter| [OWN, OTHER, GROUP, [0xff; 6]].map(|to| passes(f, to));
        assert_eq!(seen(&f), [true, false, false, true]);
        f.modes = mode::ALL_UNICAST;
        assert_eq!(seen(&f), [true, true, false, true]);
        f.modes = mode::ALL_MULTICAST | mode::NO_BROADCAST;
        assert_eq!(seen(&f), [true, false, true, false]);
        f.modes = mode::NO_UNICAST | mode::NO_MULTICAST | mode::ALL_MULTICAST;
        assert_eq!(seen(&f), [false, false, false, true]);
        f.modes = 0;
        f.unicast = Addresses::from_bytes(&OTHER, false);
        f.multicast = Addresses::from_bytes(&[0; 6 * (MAX_ADDRESSES + 1)], false);
        assert_eq!(seen(&f), [true, true, true, true], "a table that overflowed lets all pass");
    }

    #[test]
    fn a_vlan_passes_once_it_is_added() {
        let mut f = Filter::new(MacAddress(OWN));
        f.modes = 0;
        let mut frame = OWN.to_vec();
        frame.extend_from_slice(&[0, 0, 0, 0, 0, 0, 0x81, 0, 0xe1, 0x23]);
        assert!(f.pass(&frame, true, false), "without the feature VLANs are no matter");
        assert!(!f.pass(&frame, true, true));
        assert!(f.set_vlan(0x123, true));
        assert!(f.pass(&frame, true, true));
        assert!(f.set_vlan(0x123, false) && !f.pass(&frame, true, true));
        assert!(!f.set_vlan(4096, true));
        frame[13] = 1;
        assert!(f.pass(&frame, true, true), "an untagged frame");
    }
}
