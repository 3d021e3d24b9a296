//! What the guest receives (VIRTIO 1.2, sections 5.1.6.3 and 5.1.6.4).
//!
//! A vCPU that notifies a receive queue has added buffers: if frames wait for them the device's thread is told,
//! and otherwise there is nothing to do.
//!
//! A frame for which the guest has no buffers waits, so that a slow guest slows its senders down instead of losing
//! what they sent. It is dropped when it could never fit: larger than the one buffer that a driver without
//! VIRTIO_NET_F_MRG_RXBUF gives it, larger than a whole ring, or larger than what a driver that adds no more
//! leaves for [`STALL`].

use std::borrow::Cow;
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};
use std::time::{Duration, Instant};

use atoll_network::header::HEADER_BYTES;
use atoll_network::port::MAX_FRAME;
use atoll_network::{FrameHeader, Taken};

use super::frame::{self, Unfit};
use super::{Net, NetMetrics, Receiver, Rules, features};
use crate::lock;
use crate::queue::{Chain, Progress, QueueError, QueueRun};

/// How long a frame waits for more buffers while there are some, too few for it.
pub(super) const STALL: Duration = Duration::from_millis(100);

/// What became of one frame.
enum Outcome {
    /// The guest has it, or it was dropped.
    Gone,
    /// There was none.
    Empty,
    /// It waits for buffers; looked at again after a time if there are some.
    NoBuffers { again: Option<Duration> },
    /// It waits for the throttle.
    Throttled(Duration),
}

/// Buffers for one frame.
enum Gathered<'a> {
    Enough(Vec<Chain<'a>>),
    /// Too few; the driver will notify when it adds more.
    Few {
        any: bool,
    },
    /// There will never be enough for this frame.
    TooSmall,
}

impl Net {
    /// Gives the guest what the port has for receive queue `queue`.
    pub(super) fn process_receive(&self, queue: u16, run: &mut QueueRun<'_>) -> Result<Progress, QueueError> {
        let Some(receiver) = self.receivers.get(usize::from(queue)) else { return Ok(Progress::Done) };
        if run.inline() {
            if receiver.waiting.load(SeqCst) {
                return Ok(Progress::More);
            }
            run.disable_notification()?;
            return Ok(Progress::Done);
        }
        receiver.waiting.store(false, SeqCst);
        // Buffers that the driver adds are of no interest until a frame lacks them.
        run.disable_notification()?;
        let active = self.rules().active_pairs();
        if queue >= active {
            return Ok(Progress::Done);
        }
        let served = (self.turns.len() as u16 - queue).div_ceil(active);
        let first = receiver.turn.fetch_add(1, SeqCst);
        for step in 0..served {
            let pair = queue + (first.wrapping_add(step) % served) * active;
            loop {
                if run.exhausted() {
                    receiver.waiting.store(true, SeqCst);
                    return Ok(Progress::More);
                }
                match self.receive_one(queue, pair, run)? {
                    Outcome::Gone => {}
                    Outcome::Empty => break,
                    waits => {
                        receiver.waiting.store(true, SeqCst);
                        self.wait(queue, &waits);
                        return Ok(Progress::Done);
                    }
                }
            }
        }
        Ok(Progress::Done)
    }

    /// Sees to it that a frame that waits is looked at again.
    fn wait(&self, queue: u16, outcome: &Outcome) {
        let (counter, delay) = match *outcome {
            Outcome::NoBuffers { again } => (&self.metrics.receive_no_buffers, again),
            Outcome::Throttled(delay) => (&self.metrics.receive_throttled, Some(delay)),
            Outcome::Gone | Outcome::Empty => return,
        };
        NetMetrics::add(counter, 1);
        if let Some(delay) = delay {
            self.handle().kick_after(2 * queue, delay);
        }
    }

    /// Moves one frame from the port's `pair` into receive queue `queue`.
    fn receive_one(&self, queue: u16, pair: u16, run: &mut QueueRun<'_>) -> Result<Outcome, QueueError> {
        let _turn = self.turns.get(usize::from(pair)).map(lock);
        let rules = self.rules();
        // The driver may have changed the number of queues: then another one serves this pair.
        if pair % rules.active_pairs() != queue {
            return Ok(Outcome::Empty);
        }
        let mut outcome = Ok(Outcome::Empty);
        let received = self.port.receive(pair, &mut |header, frame| {
            outcome = self.place(&rules, queue, header, frame, run);
            match outcome {
                // A frame on which the driver's ring broke is lost; nobody waits for it.
                Ok(Outcome::Gone) | Err(_) => Taken::Yes,
                Ok(_) => Taken::NotNow,
            }
        });
        if let Err(error) = received {
            self.port_failed(&error);
        }
        outcome
    }

    /// Puts `frame` into buffers of the guest.
    fn place(
        &self,
        rules: &Rules,
        queue: u16,
        header: &FrameHeader,
        frame: &[u8],
        run: &mut QueueRun<'_>,
    ) -> Result<Outcome, QueueError> {
        let (header, frame) = match self.admit_received(rules, header, frame) {
            Ok(admitted) => admitted,
            Err(counter) => {
                NetMetrics::add(counter, 1);
                return Ok(Outcome::Gone);
            }
        };
        let mergeable = rules.has(features::MRG_RXBUF);
        let chains = match gather(run, (HEADER_BYTES + frame.len()) as u64, mergeable)? {
            Gathered::Enough(chains) => chains,
            Gathered::Few { any } => return Ok(self.few_buffers(queue, any)),
            Gathered::TooSmall => {
                NetMetrics::add(&self.metrics.receive_too_large, 1);
                return Ok(Outcome::Gone);
            }
        };
        if let Some(receiver) = self.receivers.get(usize::from(queue)) {
            receiver.progress();
        }
        if let Err(delay) = self.receive_throttle.take(frame.len() as u64, Instant::now()) {
            put_back(run, chains.len());
            return Ok(Outcome::Throttled(delay));
        }
        NetMetrics::add(&self.metrics.received_frames, 1);
        NetMetrics::add(&self.metrics.received_bytes, frame.len() as u64);
        NetMetrics::add(&self.metrics.received_buffers, chains.len() as u64);
        fill(run, chains, &header, &frame)?;
        Ok(Outcome::Gone)
    }

    /// The form in which the guest gets a frame, or the counter of why it does not.
    fn admit_received<'f>(
        &self,
        rules: &Rules,
        header: &FrameHeader,
        frame: &'f [u8],
    ) -> Result<(FrameHeader, Cow<'f, [u8]>), &AtomicU64> {
        let m = &self.metrics;
        if !rules.link_up {
            return Err(&m.receive_link_down);
        }
        let offloads = rules.receive_offloads();
        let fit = frame::check(header, frame.len(), offloads);
        if fit == Err(Unfit::Malformed) || frame.len() > MAX_FRAME {
            return Err(&m.receive_malformed);
        }
        if !rules.filter.pass(frame, rules.has(features::CTRL_RX), rules.has(features::CTRL_VLAN)) {
            return Err(&m.receive_filtered);
        }
        // 5.1.4.1: a guest that knows the MTU gets no frame beyond it.
        let mtu = self.mtu.filter(|_| rules.has(features::MTU) && header.segmentation.is_none());
        if mtu.is_some_and(|mtu| frame::exceeds_mtu(frame, mtu)) {
            return Err(&m.receive_too_large);
        }
        match fit {
            Ok(()) => {
                let data_valid = header.data_valid && offloads.checksum;
                Ok((FrameHeader { data_valid, ..*header }, Cow::Borrowed(frame)))
            }
            Err(Unfit::Checksum) => {
                let frame = frame::finish_checksum(header, frame).ok_or(&m.receive_malformed)?;
                NetMetrics::add(&m.checksums_finished, 1);
                Ok((FrameHeader::default(), Cow::Owned(frame)))
            }
            Err(_) => Err(&m.receive_unfinished),
        }
    }

    /// A frame does not fit into what the driver left.
    fn few_buffers(&self, queue: u16, any: bool) -> Outcome {
        let Some(receiver) = self.receivers.get(usize::from(queue)).filter(|_| any) else {
            return Outcome::NoBuffers { again: None };
        };
        let now = Instant::now();
        let mut stalled = lock(&receiver.stalled);
        let waited = now.saturating_duration_since(*stalled.get_or_insert(now));
        if waited < STALL {
            return Outcome::NoBuffers { again: Some(STALL - waited) };
        }
        *stalled = None;
        NetMetrics::add(&self.metrics.receive_too_large, 1);
        Outcome::Gone
    }
}

impl Receiver {
    /// A frame found its buffers.
    fn progress(&self) {
        *lock(&self.stalled) = None;
    }
}

/// Takes buffers with room for `need` bytes out of the ring: several if they are `mergeable`. If there are too few
/// they are all left.
fn gather<'a>(run: &mut QueueRun<'a>, need: u64, mergeable: bool) -> Result<Gathered<'a>, QueueError> {
    let (mut chains, mut room) = (Vec::new(), 0u64);
    loop {
        let Some(chain) = run.pop()? else {
            // With all of the buffers taken out, so that only new ones count as new.
            if run.enable_notification()? {
                continue;
            }
            put_back(run, chains.len());
            return Ok(Gathered::Few { any: !chains.is_empty() });
        };
        if chain.readable.remaining() != 0 {
            return Err(QueueError::Request("a receive buffer is device-readable"));
        }
        if chain.writable.remaining() < HEADER_BYTES as u64 {
            return Err(QueueError::Request("a receive buffer is shorter than a header"));
        }
        room += chain.writable.remaining();
        chains.push(chain);
        if room >= need {
            return Ok(Gathered::Enough(chains));
        }
        if !mergeable || chains.len() >= usize::from(run.size()) {
            put_back(run, chains.len());
            return Ok(Gathered::TooSmall);
        }
    }
}

fn put_back(run: &mut QueueRun<'_>, count: usize) {
    for _ in 0..count {
        run.put_back();
    }
}

/// Writes header and frame into `chains`, which have room for them, and hands all of them over at once: the driver
/// looks for the other buffers as soon as it sees the first.
fn fill(
    run: &mut QueueRun<'_>,
    mut chains: Vec<Chain<'_>>,
    header: &FrameHeader,
    frame: &[u8],
) -> Result<(), QueueError> {
    let wire = header.encode(chains.len() as u16);
    let mut rest = frame;
    let mut finished = Vec::with_capacity(chains.len());
    for (index, chain) in chains.iter_mut().enumerate() {
        let start = if index == 0 { chain.writable.write(&wire) } else { 0 };
        let written = chain.writable.write(rest);
        rest = rest.get(written..).unwrap_or_default();
        finished.push((chain.head(), (start + written) as u32));
    }
    run.push_used_together(&finished)
}
