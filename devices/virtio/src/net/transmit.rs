//! What the guest sends (VIRTIO 1.2, section 5.1.6.2).

use std::sync::atomic::{AtomicU64, Ordering::SeqCst};
use std::time::Instant;

use atoll_foundation::volatile_io::without_bitmap;
use atoll_network::header::HEADER_BYTES;
use atoll_network::port::MAX_FRAME;
use atoll_network::{FrameHeader, PortError, Sent};
use vm_memory::VolatileSlice;

use super::{Net, NetMetrics, Rules, Sender, features, frame};
use crate::queue::{Chain, Progress, QueueError, QueueRun};

/// Most pieces of memory given to a port at once. Linux sends at most 18; the host takes 1024 in one call, which
/// descriptors that cross the borders of memory blocks could exceed.
const MAX_PIECES: usize = 64;

/// What became of one frame.
enum Outcome {
    /// It is gone, one way or the other.
    Gone,
    /// It waits in the queue for something that is not the driver.
    Waits,
}

impl Net {
    /// Sends what is in transmit queue `queue`, and tells the port's other side once.
    pub(super) fn process_transmit(
        &self,
        queue: u16,
        run: &mut QueueRun<'_>,
    ) -> Result<Progress, QueueError> {
        let Some(sender) = self.senders.get(usize::from(queue)) else { return Ok(Progress::Done) };
        let mut sent = 0;
        let result = self.transmit_all(queue, sender, run, &mut sent);
        if sent != 0 {
            self.port.flush(queue);
        }
        result
    }

    fn transmit_all(
        &self,
        queue: u16,
        sender: &Sender,
        run: &mut QueueRun<'_>,
        sent: &mut u32,
    ) -> Result<Progress, QueueError> {
        let rules = self.rules();
        loop {
            run.disable_notification()?;
            loop {
                if run.exhausted() {
                    return Ok(Progress::More);
                }
                let Some(mut chain) = run.pop()? else { break };
                match self.transmit(queue, sender, &rules, &mut chain, sent)? {
                    Outcome::Gone => run.push_used(chain.head(), 0)?,
                    Outcome::Waits => {
                        run.put_back();
                        return Ok(Progress::Done);
                    }
                }
            }
            if !run.enable_notification()? {
                return Ok(Progress::Done);
            }
        }
    }

    fn transmit(
        &self,
        queue: u16,
        sender: &Sender,
        rules: &Rules,
        chain: &mut Chain<'_>,
        sent: &mut u32,
    ) -> Result<Outcome, QueueError> {
        let mut wire = [0; HEADER_BYTES];
        if chain.writable.remaining() != 0 {
            return Err(QueueError::Request("a frame to send has a device-writable buffer"));
        }
        if chain.readable.read(&mut wire) != HEADER_BYTES {
            return Err(QueueError::Request("a frame to send is shorter than its header"));
        }
        let len = chain.readable.remaining();
        let header = match self.admit_sent(rules, &wire, len) {
            Ok(header) => header,
            Err(counter) => {
                NetMetrics::add(counter, 1);
                sender.paid.store(false, SeqCst);
                return Ok(Outcome::Gone);
            }
        };
        if !sender.paid.load(SeqCst)
            && let Err(delay) = self.send_throttle.take(len, Instant::now())
        {
            NetMetrics::add(&self.metrics.send_throttled, 1);
            self.handle().kick_after(2 * queue + 1, delay);
            return Ok(Outcome::Waits);
        }
        match self.hand_to_port(queue, &header, chain) {
            Ok(Sent::Done) => {
                *sent += 1;
                NetMetrics::add(&self.metrics.sent_frames, 1);
                NetMetrics::add(&self.metrics.sent_bytes, len);
            }
            Ok(Sent::Full) => {
                NetMetrics::add(&self.metrics.send_full, 1);
                sender.paid.store(true, SeqCst);
                return Ok(Outcome::Waits);
            }
            Err(error) => {
                NetMetrics::add(&self.metrics.send_failed, 1);
                self.port_failed(&error);
            }
        }
        sender.paid.store(false, SeqCst);
        Ok(Outcome::Gone)
    }

    /// Sends a frame from the guest's buffers, or from a copy if they are in too many pieces for the host.
    fn hand_to_port(
        &self,
        queue: u16,
        header: &FrameHeader,
        chain: &mut Chain<'_>,
    ) -> Result<Sent, PortError> {
        let pieces = chain.readable.slices();
        if pieces.len() <= MAX_PIECES {
            let pieces: Vec<_> = pieces.iter().map(without_bitmap).collect();
            return self.port.send(queue, header, &pieces);
        }
        // At most a frame's length, which was checked.
        let mut copy = vec![0; chain.readable.remaining() as usize];
        chain.readable.read(&mut copy);
        self.port.send(queue, header, &[VolatileSlice::from(&mut copy[..])])
    }

    /// The header of a frame of `len` bytes that may be sent, or the counter of why not.
    fn admit_sent(
        &self,
        rules: &Rules,
        wire: &[u8; HEADER_BYTES],
        len: u64,
    ) -> Result<FrameHeader, &AtomicU64> {
        let malformed = &self.metrics.send_malformed;
        if !rules.link_up {
            return Err(&self.metrics.send_link_down);
        }
        if len > MAX_FRAME as u64 {
            return Err(malformed);
        }
        let mut header = FrameHeader::decode(wire).map_err(|_| malformed)?;
        // Says something about received frames only (5.1.6.2.1).
        header.data_valid = false;
        frame::check(&header, len as usize, features::send_offloads(rules.features))
            .map_err(|_| malformed)?;
        Ok(header)
    }
}
