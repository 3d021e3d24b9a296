//! The network device (VIRTIO 1.2, section 5.1).
//!
//! ```text
//! guest --transmit queue--> header and offloads checked --> throttle --> Port::send, straight from its buffers
//!            vCPU within its budget, or the device's thread
//!
//! guest <--receive queue--- throttle <-- filter, offloads, MTU <-- Port::receive
//!            event loop of the port, or the device's thread; never a vCPU
//! ```
//!
//! # Queues
//!
//! Receive and transmit queues alternate from 0; the control queue follows the last of `max_virtqueue_pairs` pairs
//! if the driver accepts VIRTIO_NET_F_MQ, and the first pair otherwise (5.1.2). A transmit queue belongs to the
//! port's pair of the same number. The port's pairs are dealt out to the receive queues that the driver uses,
//! which may be fewer: of `n` queues, queue `q` serves the pairs `q`, `q + n`, `q + 2n`...
//!
//! # Waiting
//!
//! A frame that cannot move stays where it is, in the transmit queue or in the port, and its queue is looked at
//! again when that may have changed:
//!
//! ```text
//! port full          --> PortEvent::Writable            no buffers --> notification of the driver
//! nothing to receive --> PortEvent::Readable            throttled  --> DeviceHandle::kick_after
//! ```
//!
//! While a queue waits for something else than the driver, notifications of the driver are switched off. Several
//! frames are announced with one interrupt and one [`Port::flush`]: the transport interrupts once a turn.
//!
//! # What stops the device
//!
//! A chain that no driver may build: without room for a header, or of the wrong direction. A frame or header that
//! cannot be meant is dropped and counted, as a switch does: Linux lets programs with a packet socket write both.
//!
//! Lock order: a queue's lock (the transport's), one pair's turn at the port, [`Net`]'s state. The state is never
//! held while the port or the transport is called.

use std::sync::atomic::{AtomicBool, AtomicU16, Ordering::SeqCst};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use atoll_foundation::log_limited;
use atoll_foundation::throttle::{RateLimits, Throttle};
use atoll_machine::inputs::InputKind;
use atoll_network::port::PortListener;
use atoll_network::{MacAddress, Offloads, Port, PortError, PortEvent};
use prost::Message;

use crate::device::{DeviceHandle, DeviceKind, RestoreError, VirtioDevice, read_bytes_at};
use crate::lock;
use crate::queue::{Progress, QueueError, QueueRun};

mod control;
mod features;
mod filter;
mod frame;
pub mod metrics;
mod receive;
pub mod saved_state;
#[cfg(test)]
mod tests;
mod transmit;

use filter::{Addresses, Filter};
use metrics::NetMetrics;
use saved_state::NetStateV1;

/// Entries of each receive and transmit queue.
pub const QUEUE_SIZE: u16 = 256;
/// Entries of the control queue.
pub const CONTROL_QUEUE_SIZE: u16 = 64;
/// Most pairs of queues: as many as Linux can use with 64 vCPUs, far below what the notification page holds.
pub const MAX_QUEUE_PAIRS: u16 = 64;
/// Smallest MTU that a device may name (5.1.4.1).
pub const MIN_MTU: u16 = 68;

/// `status` in the configuration: the link is up.
const STATUS_LINK_UP: u16 = 1 << 0;
/// `status` in the configuration: the driver should announce the guest's addresses.
const STATUS_ANNOUNCE: u16 = 1 << 1;

/// Limits of one network device.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct NetLimits {
    /// On what the guest sends: frames as operations, and their bytes.
    pub send: RateLimits,
    /// On what the guest receives.
    pub receive: RateLimits,
}

/// How a network device appears to the guest.
#[derive(Clone, Debug)]
pub struct NetOptions {
    /// The guest's address.
    pub mac: MacAddress,
    /// Largest IP packet, in bytes. `None`: what the port says, if anything. The smaller of the two counts.
    pub mtu: Option<u16>,
    /// Pairs of queues, from 1 to [`MAX_QUEUE_PAIRS`] and to what the port has: usually one a vCPU.
    pub queue_pairs: u16,
    /// Limits from the start.
    pub limits: NetLimits,
}

impl NetOptions {
    /// One pair of queues, the port's MTU, no limits.
    pub fn new(mac: MacAddress) -> Self {
        Self { mac, mtu: None, queue_pairs: 1, limits: NetLimits::default() }
    }
}

/// What decides about a frame, as of one moment.
#[derive(Clone)]
struct Rules {
    /// Accepted by the driver, as far as they make sense together.
    features: u64,
    /// Guest offloads that the driver chose; all negotiated ones if it did not.
    offloads: Option<u64>,
    /// Pairs that the driver asked for.
    pairs: u16,
    link_up: bool,
    filter: Filter,
}

impl Rules {
    fn has(&self, feature: u64) -> bool {
        self.features & feature != 0
    }

    /// Receive queues in use.
    fn active_pairs(&self) -> u16 {
        if self.has(features::MQ) { self.pairs.max(1) } else { 1 }
    }

    /// Unfinished frames that the guest takes now.
    fn receive_offloads(&self) -> Offloads {
        let on = self.features & features::GUEST_OFFLOADS & self.offloads.unwrap_or(!0);
        features::receive_offloads(features::usable(on))
    }
}

struct State {
    /// Replaced as a whole; a turn works with the rules that it began a frame with.
    rules: Arc<Rules>,
    /// Set while the driver is there.
    handle: DeviceHandle,
    /// [`Net::set_link`].
    wanted_up: bool,
    /// The port's other side is there.
    port_up: bool,
    announce: bool,
}

/// One receive queue of the guest.
#[derive(Default)]
struct Receiver {
    /// There may be frames in the port.
    waiting: AtomicBool,
    /// Counts turns, so that each begins with another of the port's pairs.
    turn: AtomicU16,
    /// Since when a frame waits although there are some buffers.
    stalled: Mutex<Option<Instant>>,
}

/// One transmit queue of the guest.
#[derive(Default)]
struct Sender {
    /// The throttle let the first frame of the queue pass already, but the port was full.
    paid: AtomicBool,
}

/// A network device over a [`Port`].
pub struct Net {
    port: Arc<dyn Port>,
    mac: MacAddress,
    mtu: Option<u16>,
    offered: u64,
    queue_sizes: Vec<u16>,
    receivers: Vec<Receiver>,
    senders: Vec<Sender>,
    /// Whose turn it is at each of the port's pairs: one receives at a time.
    turns: Vec<Mutex<()>>,
    send_throttle: Throttle,
    receive_throttle: Throttle,
    state: Mutex<State>,
    metrics: NetMetrics,
}

impl Net {
    /// A network device over `port`. Its listener ([`Net::listener`]) must be given to [`Port::watch`] before the
    /// guest runs, on an event loop that may spend a few milliseconds at a time on received frames.
    pub fn new(port: Arc<dyn Port>, options: &NetOptions) -> Arc<Self> {
        let port_pairs = port.queue_pairs().max(1);
        let pairs = options.queue_pairs.clamp(1, MAX_QUEUE_PAIRS.min(port_pairs));
        let mtu = [options.mtu, port.mtu()].into_iter().flatten().min().map(|mtu| mtu.max(MIN_MTU));
        let mut queue_sizes = vec![QUEUE_SIZE; usize::from(pairs) * 2];
        queue_sizes.push(CONTROL_QUEUE_SIZE);
        let mut offered = features::of_offloads(port.send_offloads(), port.receive_offloads())
            | features::MAC
            | features::STATUS
            | features::MRG_RXBUF
            | features::CTRL_VQ
            | features::CTRL_RX
            | features::CTRL_RX_EXTRA
            | features::CTRL_VLAN
            | features::CTRL_MAC_ADDR
            | features::GUEST_ANNOUNCE;
        if pairs > 1 {
            offered |= features::MQ;
        }
        if mtu.is_some() {
            offered |= features::MTU;
        }
        let port_up = port.link_up();
        let rules = Rules {
            features: 0,
            offloads: None,
            pairs: 1,
            link_up: port_up,
            filter: Filter::new(options.mac),
        };
        let state = State {
            rules: Arc::new(rules),
            handle: DeviceHandle::default(),
            wanted_up: true,
            port_up,
            announce: false,
        };
        Arc::new(Self {
            mac: options.mac,
            mtu,
            offered,
            queue_sizes,
            receivers: (0..pairs).map(|_| Receiver::default()).collect(),
            senders: (0..pairs).map(|_| Sender::default()).collect(),
            turns: (0..port_pairs).map(|_| Mutex::default()).collect(),
            send_throttle: Throttle::new(options.limits.send),
            receive_throttle: Throttle::new(options.limits.receive),
            state: Mutex::new(state),
            metrics: NetMetrics::default(),
            port,
        })
    }

    /// What to give to [`Port::watch`]. It holds the device weakly.
    pub fn listener(self: &Arc<Self>) -> PortListener {
        let net = Arc::downgrade(self);
        Arc::new(move |event| {
            if let Some(net) = net.upgrade() {
                net.port_event(event);
            }
        })
    }

    /// The guest's address now: the one it was made with, or what the guest set.
    pub fn mac(&self) -> MacAddress {
        self.rules().filter.mac
    }

    /// The MTU that the guest is told, in bytes.
    pub fn mtu(&self) -> Option<u16> {
        self.mtu
    }

    /// Whether the guest sees its link up: wanted so, and the port's other side is there.
    pub fn link_up(&self) -> bool {
        self.rules().link_up
    }

    /// Plugs the cable in or pulls it. While it is out, frames of both directions are dropped. When the link comes
    /// up again, the guest is asked to announce itself.
    pub fn set_link(self: &Arc<Self>, up: bool) {
        let net = self.clone();
        self.handle().input(InputKind::Control, move || net.change_link(|state| state.wanted_up = up));
    }

    /// Asks the guest to announce its addresses (gratuitous ARP and the like), as after a move to another host.
    /// False if its driver cannot.
    pub fn announce(&self) -> bool {
        let mut state = lock(&self.state);
        if !state.rules.has(features::GUEST_ANNOUNCE) || !state.rules.has(features::STATUS) {
            return false;
        }
        state.announce = true;
        let handle = state.handle.clone();
        drop(state);
        let to = handle.clone();
        handle.input(InputKind::Control, move || to.config_changed());
        true
    }

    /// Changes the limits, also while the guest runs.
    pub fn set_limits(&self, limits: NetLimits) {
        self.send_throttle.set(limits.send);
        self.receive_throttle.set(limits.receive);
        // Who waits was told a time that no longer holds.
        let handle = self.handle();
        for index in 0..self.receivers.len() + self.senders.len() {
            handle.kick_after(index as u16, Duration::ZERO);
        }
    }

    /// The present limits.
    pub fn limits(&self) -> NetLimits {
        NetLimits { send: self.send_throttle.limits(), receive: self.receive_throttle.limits() }
    }

    /// Counters.
    pub fn metrics(&self) -> &NetMetrics {
        &self.metrics
    }

    fn rules(&self) -> Arc<Rules> {
        lock(&self.state).rules.clone()
    }

    fn handle(&self) -> DeviceHandle {
        lock(&self.state).handle.clone()
    }

    /// Most pairs of queues.
    fn max_pairs(&self) -> u16 {
        self.receivers.len() as u16
    }

    /// Changes the rules; what is under way finishes with the old ones.
    fn change_rules(&self, change: impl FnOnce(&mut Rules)) {
        change(Arc::make_mut(&mut lock(&self.state).rules));
    }

    fn port_event(self: &Arc<Self>, event: PortEvent) {
        let rules = self.rules();
        match event {
            PortEvent::Readable(pair) => {
                let queue = pair % rules.active_pairs();
                if let Some(receiver) = self.receivers.get(usize::from(queue)) {
                    receiver.waiting.store(true, SeqCst);
                    self.handle().deliver(2 * queue);
                }
            }
            PortEvent::Writable(pair) if pair < self.max_pairs() => self.handle().deliver(2 * pair + 1),
            PortEvent::Writable(_) => {}
            PortEvent::Link(up) => {
                let net = self.clone();
                self.handle().input(InputKind::Control, move || net.change_link(|state| state.port_up = up));
            }
        }
    }

    fn change_link(&self, change: impl FnOnce(&mut State)) {
        let mut state = lock(&self.state);
        change(&mut state);
        let up = state.wanted_up && state.port_up;
        if state.rules.link_up == up {
            return;
        }
        Arc::make_mut(&mut state.rules).link_up = up;
        state.announce = up && state.rules.has(features::GUEST_ANNOUNCE);
        let (tell, handle) = (state.rules.has(features::STATUS), state.handle.clone());
        drop(state);
        if tell {
            handle.config_changed();
        }
    }

    /// The port has failed for good: the cable is out until it says otherwise.
    fn port_failed(&self, error: &PortError) {
        log_limited!(error, "virtio-net: {error}; the guest's link is down");
        self.change_link(|state| state.port_up = false);
    }

    /// Tells the port what it may give, after the driver or its choice changed.
    fn tell_offloads(&self, offloads: Offloads) {
        if let Err(error) = self.port.set_receive_offloads(offloads) {
            self.port_failed(&error);
        }
    }

    /// Number of the control queue (5.1.2).
    fn control_queue(&self, rules: &Rules) -> Option<u16> {
        let pairs = if rules.has(features::MQ) { self.max_pairs() } else { 1 };
        rules.has(features::CTRL_VQ).then_some(2 * pairs)
    }

    /// `struct virtio_net_config` (5.1.4).
    fn config(&self) -> [u8; 12] {
        let state = lock(&self.state);
        let mut status = 0;
        if state.rules.link_up {
            status |= STATUS_LINK_UP;
        }
        if state.announce {
            status |= STATUS_ANNOUNCE;
        }
        let mut config = [0; 12];
        config[..6].copy_from_slice(&state.rules.filter.mac.0);
        config[6..8].copy_from_slice(&status.to_le_bytes());
        config[8..10].copy_from_slice(&self.max_pairs().to_le_bytes());
        config[10..].copy_from_slice(&self.mtu.unwrap_or(0).to_le_bytes());
        config
    }
}

impl VirtioDevice for Net {
    fn kind(&self) -> DeviceKind {
        DeviceKind::Network
    }

    fn queue_sizes(&self) -> &[u16] {
        &self.queue_sizes
    }

    fn features(&self) -> u64 {
        self.offered
    }

    fn config_read(&self, offset: u64, data: &mut [u8]) {
        read_bytes_at(&self.config(), offset, data);
    }

    // The address is read-only in the configuration of the modern interface (5.1.4.1).
    fn config_write(&self, _offset: u64, _data: &[u8]) {}

    fn activate(&self, features: u64, handle: &DeviceHandle) {
        let mut state = lock(&self.state);
        Arc::make_mut(&mut state.rules).features = features::usable(features);
        state.handle = handle.clone();
        let offloads = state.rules.receive_offloads();
        drop(state);
        for receiver in &self.receivers {
            receiver.waiting.store(true, SeqCst);
        }
        self.tell_offloads(offloads);
    }

    fn reset(&self) {
        let mut state = lock(&self.state);
        state.handle = DeviceHandle::default();
        state.announce = false;
        let rules = Arc::make_mut(&mut state.rules);
        (rules.features, rules.offloads, rules.pairs) = (0, None, 1);
        rules.filter = Filter::new(self.mac);
        drop(state);
        for receiver in &self.receivers {
            receiver.waiting.store(false, SeqCst);
            *lock(&receiver.stalled) = None;
        }
        for sender in &self.senders {
            sender.paid.store(false, SeqCst);
        }
        self.tell_offloads(Offloads::NONE);
    }

    fn process_queue(&self, index: u16, run: &mut QueueRun<'_>) -> Result<Progress, QueueError> {
        if self.control_queue(&self.rules()) == Some(index) {
            return self.process_control(run);
        }
        match (index % 2, index / 2) {
            (0, queue) => self.process_receive(queue, run),
            (_, queue) => self.process_transmit(queue, run),
        }
    }

    fn save(&self) -> Vec<u8> {
        let state = lock(&self.state);
        let rules = &state.rules;
        let (unicast, unicast_overflow) = rules.filter.unicast.to_bytes();
        let (multicast, multicast_overflow) = rules.filter.multicast.to_bytes();
        let saved = NetStateV1 {
            mac: Some(rules.filter.mac.0.to_vec()),
            max_pairs: Some(u32::from(self.max_pairs())),
            active_pairs: Some(u32::from(rules.pairs)),
            mtu: Some(u32::from(self.mtu.unwrap_or(0))),
            offloads: rules.offloads,
            link_up: Some(state.wanted_up),
            announce: Some(state.announce),
            receive_modes: Some(u32::from(rules.filter.modes)),
            unicast: Some(unicast),
            unicast_overflow: Some(unicast_overflow),
            multicast: Some(multicast),
            multicast_overflow: Some(multicast_overflow),
            vlans: Some(rules.filter.vlans().to_vec()),
        };
        saved.encode_to_vec()
    }

    fn restore(&self, state: &[u8]) -> Result<(), RestoreError> {
        let saved = NetStateV1::decode(state)
            .map_err(|source| RestoreError::Decode { device: "virtio-net", source })?;
        let check = |what, saved: Option<u32>, have: u16| match saved {
            Some(saved) if saved != u32::from(have) => {
                Err(RestoreError::Mismatch { what, saved: u64::from(saved), have: u64::from(have) })
            }
            _ => Ok(()),
        };
        check("number of queue pairs of a network device", saved.max_pairs, self.max_pairs())?;
        check("MTU of a network device", saved.mtu, self.mtu.unwrap_or(0))?;
        let mac = saved.mac.and_then(|mac| mac.try_into().ok()).map_or(self.mac, MacAddress);
        let mut filter = Filter::new(mac);
        let modes = saved.receive_modes.unwrap_or(u32::from(filter::mode::PROMISCUOUS));
        filter.modes = modes as u8 & filter::mode::ALL;
        let addresses = |bytes: Option<Vec<u8>>, overflow: Option<bool>| {
            Addresses::from_bytes(&bytes.unwrap_or_default(), overflow.unwrap_or(false))
        };
        filter.unicast = addresses(saved.unicast, saved.unicast_overflow);
        filter.multicast = addresses(saved.multicast, saved.multicast_overflow);
        filter.set_vlans(&saved.vlans.unwrap_or_default());
        let mut state = lock(&self.state);
        state.wanted_up = saved.link_up.unwrap_or(true);
        state.announce = saved.announce.unwrap_or(false);
        let link_up = state.wanted_up && state.port_up;
        let rules = Arc::make_mut(&mut state.rules);
        rules.offloads = saved.offloads;
        rules.pairs = saved.active_pairs.unwrap_or(1).clamp(1, u32::from(self.max_pairs())) as u16;
        rules.link_up = link_up;
        rules.filter = filter;
        Ok(())
    }
}
