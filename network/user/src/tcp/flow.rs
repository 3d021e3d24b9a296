//! One flow: what is remembered of it, and the packets that it sends by itself.

use atoll_foundation::tcp_socket::SendQueue;

use super::rtt::Rtt;
use super::wheel::NEVER;
use super::{Context, Limits, Metrics};
use crate::output::{Flow4Tuple, TcpFlags, TcpHeader, TcpOptions};
use crate::poller::Owner;
use crate::socket::TcpSocket;

/// The window scale offered to the guest: windows up to 16 MiB, in steps of 256 bytes.
pub(super) const OUR_SCALE: u8 = 8;

/// Below this a window is not worth a segment: it is told as none, and told again when there is more.
const LEAST_WINDOW: u32 = 4096;

/// Kernel memory that a segment in the host's send queue takes besides its payload, in bytes, generously.
const SEGMENT_OVERHEAD: u64 = 2048;

/// Segments of a guest without the option (RFC 9293, section 3.7.1).
const DEFAULT_MSS_V4: u16 = 536;
const DEFAULT_MSS_V6: u16 = 1220;

/// Smallest segments that a guest is believed to want.
const LEAST_MSS: u16 = 64;

/// Most acknowledgements at once: one that tells the new window, and the three duplicates after which a sender
/// sends again (RFC 5681, section 3.2).
pub(super) const MANY_ACKS: u8 = 4;

/// Where a flow is; the diagram is in the head of the module above.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum State {
    /// The guest's SYN has come, the host's socket is connecting.
    Connecting,
    /// Connected; SYN/ACK was sent to the guest.
    SynReceived,
    /// A connection from the host; SYN was sent to the guest.
    SynSent,
    /// Both sides are connected. Which direction has ended is in the flow's fields.
    Open,
}

/// What becomes of a flow after something happened to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Fate {
    /// It goes on.
    Keep,
    /// Both directions have ended in order.
    Done,
    /// It is void: the host's peer gets a RST, and the guest too.
    Abort,
    /// The guest has done away with it: the host's peer gets a RST.
    ResetByGuest,
}

/// One flow. Sequence numbers compare by their distance (RFC 9293, section 3.4).
pub(super) struct Flow {
    pub(super) tuple: Flow4Tuple,
    pub(super) socket: TcpSocket,
    /// What the poller calls this flow.
    pub(super) token: u64,
    pub(super) state: State,

    // Host to guest. Order: consumed <= una <= nxt <= max.
    /// Sequence number of the first byte in the socket's receive queue.
    pub(super) consumed: u32,
    /// First number that the guest has not acknowledged.
    pub(super) una: u32,
    /// Next number to send; goes back to `una` when everything is to be sent again.
    pub(super) nxt: u32,
    /// The number after the last one ever sent.
    pub(super) max: u32,
    /// The number of FIN, once the host's peer has ended.
    pub(super) eof: Option<u32>,
    /// Fast retransmission goes on until this is acknowledged.
    pub(super) recover: Option<u32>,
    /// The guest's window, bytes from `una`, and the largest it had.
    pub(super) guest_window: u32,
    pub(super) largest_window: u32,
    /// Sequence and acknowledgement number of the segment that told the window.
    pub(super) window_seq: u32,
    pub(super) window_ack: u32,
    pub(super) guest_scale: u8,
    /// Whether the guest scales windows; then so do we.
    pub(super) scaling: bool,
    pub(super) duplicates: u8,
    /// Largest payload of one segment to the guest.
    pub(super) mss: u16,
    /// The socket may have more than was peeked at.
    pub(super) readable: bool,
    /// What follows `una` is to be sent once more.
    pub(super) resend: bool,

    // Guest to host.
    /// Next number expected from the guest.
    pub(super) expected: u32,
    /// The window told to the guest, bytes from `expected`.
    pub(super) window: u32,
    /// What the guest's segments are like: the largest of late, in bytes.
    pub(super) typical: u32,
    /// Acknowledgements to send.
    pub(super) acks_due: u8,
    /// The send queue may have changed since the window was measured.
    pub(super) stale_window: bool,
    /// What was given to the kernel waits there for more.
    pub(super) unsent: bool,
    /// The kernel did not take all of a segment; the guest has to send again.
    pub(super) pinched: bool,
    /// The poller was asked to tell when the send queue has room again.
    pub(super) armed: bool,
    /// The guest's FIN was taken.
    pub(super) guest_ended: bool,
    pub(super) keeps_alive: bool,

    // Time, in milliseconds of the table's clock.
    pub(super) rtt: Rtt,
    /// When to send again or probe.
    pub(super) resend_at: u64,
    /// When something last came from either side.
    pub(super) active_at: u64,
    /// Waits in vain since the guest made progress.
    pub(super) backoff: u8,
    /// Waits in vain since the guest sent anything.
    pub(super) unanswered: u8,

    // Membership in the table's lists.
    pub(super) queued: bool,
    pub(super) half_open: bool,
}

impl Flow {
    /// A flow whose first number to the guest is `first`.
    pub(super) fn new(tuple: Flow4Tuple, socket: TcpSocket, state: State, first: u32, now: u64) -> Self {
        Self {
            tuple,
            socket,
            token: 0,
            state,
            consumed: first.wrapping_add(1),
            una: first,
            nxt: first,
            max: first,
            eof: None,
            recover: None,
            guest_window: 0,
            largest_window: 0,
            window_seq: 0,
            window_ack: first,
            guest_scale: 0,
            scaling: false,
            duplicates: 0,
            mss: DEFAULT_MSS_V4,
            readable: false,
            resend: false,
            expected: 0,
            window: 0,
            typical: 1460,
            acks_due: 0,
            stale_window: true,
            unsent: false,
            pinched: false,
            armed: false,
            guest_ended: false,
            keeps_alive: false,
            rtt: Rtt::NEW,
            resend_at: NEVER,
            active_at: now,
            backoff: 0,
            unanswered: 0,
            queued: false,
            half_open: false,
        }
    }

    /// Takes what the guest's SYN says.
    pub(super) fn take_syn(&mut self, header: &TcpHeader, mtu: u16) {
        let default = if self.tuple.is_v6() { DEFAULT_MSS_V6 } else { DEFAULT_MSS_V4 };
        let most = self.own_mss(mtu);
        self.mss = header.options.mss.unwrap_or(default).min(most).max(LEAST_MSS);
        self.scaling = header.options.window_scale.is_some();
        // RFC 7323, section 2.3: more than 14 counts as 14.
        self.guest_scale = header.options.window_scale.unwrap_or(0).min(14);
        self.expected = header.seq.wrapping_add(1);
        self.window_seq = header.seq;
        // The window of a SYN is never scaled.
        self.guest_window = u32::from(header.window);
        self.largest_window = self.guest_window;
    }

    /// What a packet of `mtu` bytes carries.
    fn own_mss(&self, mtu: u16) -> u16 {
        mtu.saturating_sub(if self.tuple.is_v6() { 60 } else { 40 }).max(LEAST_MSS)
    }

    /// Bytes (and FIN) sent and not acknowledged, as far as they are not to be sent again.
    pub(super) fn in_flight(&self) -> u32 {
        self.nxt.wrapping_sub(self.una)
    }

    /// Whether everything up to and with FIN was sent.
    pub(super) fn fin_sent(&self) -> bool {
        self.eof.is_some_and(|eof| self.nxt == eof.wrapping_add(1))
    }

    /// Whether the guest has everything up to and with FIN.
    fn fin_acknowledged(&self) -> bool {
        self.eof.is_some_and(|eof| self.una == eof.wrapping_add(1))
    }

    /// Whether both directions have ended and nothing is left to say.
    pub(super) fn is_done(&self) -> bool {
        self.state == State::Open && self.guest_ended && self.acks_due == 0 && self.fin_acknowledged()
    }

    /// Whether [`Flow::service`] has something to do.
    pub(super) fn wants_service(&self) -> bool {
        self.acks_due > 0
            || self.resend
            || self.is_done()
            || (self.state == State::Open
                && (self.consumed != self.acknowledged_bytes() || (self.readable && !self.fin_sent())))
    }

    /// Up to which number the guest has acknowledged bytes (FIN is none).
    pub(super) fn acknowledged_bytes(&self) -> u32 {
        match self.eof {
            Some(eof) if self.una == eof.wrapping_add(1) => eof,
            _ => self.una,
        }
    }

    /// When the flow wants to hear from the timer.
    pub(super) fn deadline(&self, limits: &Limits) -> u64 {
        let patience = if self.state == State::Connecting { limits.connect } else { limits.idle };
        let patience = u64::try_from(patience.as_millis()).unwrap_or(NEVER);
        self.active_at.saturating_add(patience).min(self.resend_at)
    }

    /// Starts waiting for the guest, if not waiting already.
    pub(super) fn start_timer(&mut self, now: u64) {
        if self.resend_at == NEVER {
            self.resend_at = now.saturating_add(self.rtt.timeout(self.backoff));
        }
    }

    /// Sends a packet to the guest; `false`: there is no room.
    pub(super) fn emit(&self, cx: &mut Context<'_>, flags: TcpFlags, seq: u32, payload: &[u8]) -> bool {
        let window = if self.scaling { self.window >> OUR_SCALE } else { self.window };
        let header = TcpHeader {
            seq,
            ack: self.expected,
            flags: flags.with(TcpFlags::ACK),
            window: u16::try_from(window).unwrap_or(u16::MAX),
            options: TcpOptions::default(),
        };
        let segment = (payload.len() > usize::from(self.mss)).then_some(self.mss);
        let pieces = [payload];
        let pieces = if payload.is_empty() { &[][..] } else { &pieces[..] };
        cx.output.tcp(&self.tuple, &header, pieces, segment)
    }

    /// Sends SYN, or SYN/ACK in answer to the guest's, and waits for the answer.
    pub(super) fn emit_syn(&mut self, cx: &mut Context<'_>, now: u64) -> bool {
        self.measure_window(cx);
        let answer = self.state == State::SynReceived;
        let header = TcpHeader {
            seq: self.una,
            ack: if answer { self.expected } else { 0 },
            flags: if answer { TcpFlags::SYN.with(TcpFlags::ACK) } else { TcpFlags::SYN },
            window: u16::try_from(self.window).unwrap_or(u16::MAX),
            options: TcpOptions {
                mss: Some(self.own_mss(cx.output.mtu())),
                window_scale: (self.scaling || !answer).then_some(OUR_SCALE),
                ..TcpOptions::default()
            },
        };
        let sent = cx.output.tcp(&self.tuple, &header, &[], None);
        self.nxt = self.una.wrapping_add(1);
        self.max = self.nxt;
        if self.backoff == 0 {
            self.rtt.sent(self.nxt, now);
        } else {
            self.rtt.sent_again();
        }
        self.start_timer(now);
        sent
    }

    /// Sends a RST that the guest surely takes, if there is room for it.
    pub(super) fn emit_reset(&self, cx: &mut Context<'_>) {
        let flags = TcpFlags::RST.with(TcpFlags::ACK);
        // Before its SYN is answered a guest takes a RST for its acknowledgement number, later for its sequence
        // number, which is the next that the guest expects as far as is known.
        let seq = match self.state {
            State::Connecting => 0,
            State::SynSent => self.nxt,
            State::SynReceived | State::Open => self.max,
        };
        let ack = if self.state == State::SynSent { 0 } else { self.expected };
        let header = TcpHeader { seq, ack, flags, window: 0, options: TcpOptions::default() };
        cx.output.tcp(&self.tuple, &header, &[], None);
    }

    /// Looks how much the host's kernel would take, and makes that the window. Asks to be told when there is room
    /// if there is little.
    pub(super) fn measure_window(&mut self, cx: &mut Context<'_>) {
        self.stale_window = false;
        let Ok(queue) = self.socket.send_queue() else { return };
        self.window = usable(queue, self.typical);
        if is_short(queue) && !self.armed {
            self.arm(cx);
        }
    }

    /// Asks the poller to tell when the send queue has room.
    ///
    /// The socket is watched for both directions all the time, but the kernel tells about room only to who asked
    /// while there was little, which is also what makes it raise the limit. Watching anew asks.
    pub(super) fn arm(&mut self, cx: &mut Context<'_>) {
        let token = Owner::Tcp.token(self.token);
        self.armed = cx.poller.watch(rustix::fd::AsFd::as_fd(&self.socket), token, true, true, true).is_ok();
    }

    /// Hands `data` to the host's kernel; `None` if the connection is broken. With `more` the guest has more to
    /// send at once: the kernel need not make packets of it before the flow is next served.
    pub(super) fn give(&mut self, data: &[u8], more: bool, metrics: &mut Metrics) -> Option<usize> {
        let length = u32::try_from(data.len()).unwrap_or(u32::MAX);
        self.typical = length.max(self.typical - self.typical / 8).max(1);
        let mut done = 0;
        while let Some(rest) = data.get(done..).filter(|rest| !rest.is_empty()) {
            match self.socket.send(rest, more) {
                Ok(0) => break,
                Ok(count) => done += count,
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => break,
                Err(_) => return None,
            }
        }
        self.unsent = more || (self.unsent && done == 0);
        metrics.bytes_to_host = metrics.bytes_to_host.wrapping_add(done as u64);
        Some(done)
    }
}

/// How many bytes in segments of `typical` bytes the queue surely takes.
fn usable(queue: SendQueue, typical: u32) -> u32 {
    let typical = u64::from(typical.max(256));
    let bytes = u64::from(queue.free()) * typical / (typical + SEGMENT_OVERHEAD);
    let bytes = u32::try_from(bytes).unwrap_or(u32::MAX).min(u32::from(u16::MAX) << OUR_SCALE);
    match is_short(queue) {
        true if bytes < LEAST_WINDOW => 0,
        true => bytes,
        // Nothing will tell of more room, so there must be some in the guest's eyes.
        false => bytes.max(1024),
    }
}

/// Whether the kernel tells when the queue has more room: what epoll calls not writable.
fn is_short(queue: SendQueue) -> bool {
    queue.free() < queue.limit / 3
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_window_is_closed_only_if_its_opening_will_be_told() {
        for limit in [4608, 16_384, 87_040, 2_626_560, 16 << 20] {
            for percent in 0..=100 {
                for typical in [1, 536, 1460, 65_160] {
                    let queue = SendQueue { limit, used: limit / 100 * percent };
                    let window = usable(queue, typical);
                    assert!(window > 0 || is_short(queue), "{queue:?} {typical}");
                    assert!(window <= queue.free().max(1024), "{queue:?} {typical}");
                }
            }
        }
        assert_eq!(usable(SendQueue { limit: 65_536, used: 65_000 }, 1460), 0);
        assert_eq!(usable(SendQueue { limit: 65_536, used: 70_000 }, 1460), 0);
    }
}
