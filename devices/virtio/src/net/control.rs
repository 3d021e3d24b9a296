//! The control queue (VIRTIO 1.2, section 5.1.6.5).
//!
//! Every command is answered: with an error if its class was not negotiated, is unknown, or has the wrong length.
//! Only a chain that cannot be a command at all stops the device.

use std::sync::atomic::Ordering::SeqCst;

use atoll_foundation::log_limited;
use atoll_network::MacAddress;

use super::filter::{Addresses, mode};
use super::{Net, NetMetrics, Rules, features};
use crate::lock;
use crate::queue::{Chain, Progress, QueueError, QueueRun, Step};

/// Most bytes of a command that are looked at: a table of addresses as large as Linux ever sends, and more.
const MAX_COMMAND_BYTES: usize = 64 << 10;

const ACK_OK: u8 = 0;
const ACK_ERR: u8 = 1;

/// Classes of commands and their commands.
mod class {
    pub(super) const RX: u8 = 0;
    pub(super) const MAC: u8 = 1;
    pub(super) const VLAN: u8 = 2;
    pub(super) const ANNOUNCE: u8 = 3;
    pub(super) const MQ: u8 = 4;
    pub(super) const GUEST_OFFLOADS: u8 = 5;

    pub(super) const RX_PROMISC: u8 = 0;
    pub(super) const RX_NOBCAST: u8 = 5;
    pub(super) const MAC_TABLE_SET: u8 = 0;
    pub(super) const MAC_ADDR_SET: u8 = 1;
    pub(super) const VLAN_ADD: u8 = 0;
    pub(super) const VLAN_DEL: u8 = 1;
    pub(super) const ANNOUNCE_ACK: u8 = 0;
    pub(super) const MQ_VQ_PAIRS_SET: u8 = 0;
    pub(super) const GUEST_OFFLOADS_SET: u8 = 0;
}

/// Receive modes in the order of their commands, with what they need: the later ones are an extra.
const RX_MODES: [(u8, u64); 6] = [
    (mode::PROMISCUOUS, features::CTRL_RX),
    (mode::ALL_MULTICAST, features::CTRL_RX),
    (mode::ALL_UNICAST, features::CTRL_RX_EXTRA),
    (mode::NO_MULTICAST, features::CTRL_RX_EXTRA),
    (mode::NO_UNICAST, features::CTRL_RX_EXTRA),
    (mode::NO_BROADCAST, features::CTRL_RX_EXTRA),
];

impl Net {
    /// Carries out commands.
    pub(super) fn process_control(&self, run: &mut QueueRun<'_>) -> Result<Progress, QueueError> {
        run.pump(|chain, _inline| self.control(chain))
    }

    fn control(&self, chain: &mut Chain<'_>) -> Result<Step, QueueError> {
        if chain.writable.remaining() == 0 {
            return Err(QueueError::Request("a control command has no place for its answer"));
        }
        let mut head = [0; 2];
        if chain.readable.read(&mut head) != head.len() {
            return Err(QueueError::Request("a control command is shorter than its header"));
        }
        let len = chain.readable.remaining().min(MAX_COMMAND_BYTES as u64) as usize;
        let mut data = vec![0; len];
        chain.readable.read(&mut data);
        let complete = chain.readable.remaining() == 0;
        let [class, command] = head;
        let ack = if complete && self.command(class, command, &data).is_some() {
            NetMetrics::add(&self.metrics.controls, 1);
            ACK_OK
        } else {
            NetMetrics::add(&self.metrics.controls_refused, 1);
            log_limited!(debug, class, command, len, "virtio-net: control command refused");
            ACK_ERR
        };
        chain.writable.write(&[ack]);
        Ok(Step::Done(1))
    }

    /// Carries out one command. `None` if it is refused; then nothing has changed.
    fn command(&self, class: u8, command: u8, data: &[u8]) -> Option<()> {
        let rules = self.rules();
        match (class, command) {
            (class::RX, class::RX_PROMISC..=class::RX_NOBCAST) => self.set_mode(&rules, command, data),
            (class::MAC, class::MAC_TABLE_SET) if rules.has(features::CTRL_RX) => self.set_table(data),
            (class::MAC, class::MAC_ADDR_SET) if rules.has(features::CTRL_MAC_ADDR) => {
                let mac: [u8; 6] = data.try_into().ok()?;
                if mac[0] & 1 != 0 || mac == [0; 6] {
                    return None;
                }
                self.change_rules(|rules| rules.filter.mac = MacAddress(mac));
                Some(())
            }
            (class::VLAN, class::VLAN_ADD | class::VLAN_DEL) if rules.has(features::CTRL_VLAN) => {
                let id = u16::from_le_bytes(data.try_into().ok()?);
                let mut known = false;
                self.change_rules(|rules| known = rules.filter.set_vlan(id, command == class::VLAN_ADD));
                known.then_some(())
            }
            (class::ANNOUNCE, class::ANNOUNCE_ACK)
                if rules.has(features::GUEST_ANNOUNCE) && data.is_empty() =>
            {
                lock(&self.state).announce = false;
                Some(())
            }
            (class::MQ, class::MQ_VQ_PAIRS_SET) if rules.has(features::MQ) => self.set_pairs(data),
            (class::GUEST_OFFLOADS, class::GUEST_OFFLOADS_SET)
                if rules.has(features::CTRL_GUEST_OFFLOADS) =>
            {
                self.set_offloads(&rules, data)
            }
            _ => None,
        }
    }

    fn set_mode(&self, rules: &Rules, command: u8, data: &[u8]) -> Option<()> {
        let &(mode, feature) = RX_MODES.get(usize::from(command))?;
        let &[on] = data else { return None };
        if !rules.has(feature) {
            return None;
        }
        self.change_rules(|rules| {
            let modes = &mut rules.filter.modes;
            *modes = if on != 0 { *modes | mode } else { *modes & !mode };
        });
        Some(())
    }

    /// Two tables: unicast, then multicast (`struct virtio_net_ctrl_mac`).
    fn set_table(&self, mut data: &[u8]) -> Option<()> {
        let mut table = || {
            let (count, rest) = data.split_first_chunk::<4>()?;
            data = rest;
            Addresses::take(&mut data, usize::try_from(u32::from_le_bytes(*count)).ok()?)
        };
        let (unicast, multicast) = (table()?, table()?);
        if !data.is_empty() {
            return None;
        }
        self.change_rules(|rules| (rules.filter.unicast, rules.filter.multicast) = (unicast, multicast));
        Some(())
    }

    /// Uses the first so many receive queues. Nothing arrives in the others once this has been answered.
    fn set_pairs(&self, data: &[u8]) -> Option<()> {
        let pairs = u16::from_le_bytes(data.try_into().ok()?);
        if pairs == 0 || pairs > self.max_pairs() {
            return None;
        }
        self.change_rules(|rules| rules.pairs = pairs);
        // Whoever took a frame under the old number finishes with it.
        for turn in &self.turns {
            drop(lock(turn));
        }
        let handle = self.handle();
        for (receiver, queue) in self.receivers.iter().zip(0..pairs) {
            receiver.waiting.store(true, SeqCst);
            handle.kick(2 * queue);
        }
        Some(())
    }

    fn set_offloads(&self, rules: &Rules, data: &[u8]) -> Option<()> {
        let wanted = u64::from_le_bytes(data.try_into().ok()?);
        if wanted & !(rules.features & features::GUEST_OFFLOADS) != 0 {
            return None;
        }
        self.change_rules(|rules| rules.offloads = Some(wanted));
        self.tell_offloads(self.rules().receive_offloads());
        // Frames that came under the old choice are looked at under the new one.
        for turn in &self.turns {
            drop(lock(turn));
        }
        Some(())
    }
}
