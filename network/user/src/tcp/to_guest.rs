//! What goes to the guest: bytes peeked from the socket, sent again if need be, and acknowledgements.

use std::io::ErrorKind;

use super::flow::{Fate, Flow, State};
use super::wheel::NEVER;
use super::{Context, Limits, Metrics};
use crate::output::TcpFlags;

/// Bytes that one flow may send before others get their turn.
const TURN_BYTES: usize = 512 << 10;

/// Waits in vain after which a guest counts as gone: about a quarter of an hour, so that a machine may be stopped
/// for a while (RFC 9293, section 3.8.3, R2 asks for 100 seconds at least).
const MAX_UNANSWERED: u8 = 20;
/// The same for a guest that has not answered SYN or SYN/ACK: two minutes.
const MAX_UNANSWERED_OPENING: u8 = 7;

/// What came of serving a flow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Served {
    /// Nothing more to do now.
    All,
    /// Its turn is over, it has more.
    More,
    /// There was no room in the output.
    Full,
    /// The flow ended.
    Ended(Fate),
}

impl Flow {
    /// Does what is due: forgets acknowledged bytes, sends again, sends more, acknowledges.
    pub(super) fn service(
        &mut self,
        buffer: &mut [u8],
        now: u64,
        cx: &mut Context<'_>,
        metrics: &mut Metrics,
    ) -> Served {
        if self.state != State::Open {
            return self.service_opening(now, cx);
        }
        let acknowledged = self.acknowledged_bytes();
        if acknowledged != self.consumed {
            if self.socket.discard(acknowledged.wrapping_sub(self.consumed)).is_err() {
                return Served::Ended(Fate::Abort);
            }
            self.consumed = acknowledged;
        }
        if self.unsent {
            self.unsent = false;
            self.socket.push();
        }
        if self.acks_due > 0 && self.stale_window {
            self.measure_window(cx);
        }
        if self.resend {
            match self.send_again(buffer, now, cx, metrics) {
                Served::All => {}
                other => return other,
            }
        }
        let served = self.send(buffer, now, cx, metrics);
        if let Served::Full | Served::Ended(_) = served {
            return served;
        }
        while self.acks_due > 0 {
            if !self.emit(cx, TcpFlags::ACK, self.max, &[]) {
                return Served::Full;
            }
            self.acks_due -= 1;
        }
        if self.is_done() { Served::Ended(Fate::Done) } else { served }
    }

    /// A SYN or SYN/ACK is to be sent again.
    fn service_opening(&mut self, now: u64, cx: &mut Context<'_>) -> Served {
        self.acks_due = 0;
        if !self.resend {
            return Served::All;
        }
        self.resend = false;
        if self.emit_syn(cx, now) {
            Served::All
        } else {
            self.resend = true;
            Served::Full
        }
    }

    /// Sends as much as the guest's window and the turn allow.
    fn send(&mut self, buffer: &mut [u8], now: u64, cx: &mut Context<'_>, metrics: &mut Metrics) -> Served {
        let mut turn = TURN_BYTES;
        while self.readable && !self.fin_sent() {
            let Some(want) = self.may_send(buffer.len()) else { break };
            if turn == 0 {
                return Served::More;
            }
            turn = turn.saturating_sub(want);
            let Some(place) = buffer.get_mut(..want) else { break };
            match self.socket.peek(self.nxt.wrapping_sub(self.consumed), place) {
                Ok(0) => {
                    self.eof = Some(self.nxt);
                    if !self.send_fin(now, cx) {
                        return Served::Full;
                    }
                }
                Ok(count) => {
                    let all = buffer.get(..count).unwrap_or_default();
                    if !self.send_pieces(all, count < want, now, cx, metrics) {
                        return Served::Full;
                    }
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => self.readable = false,
                Err(_) => return Served::Ended(Fate::Abort),
            }
        }
        if self.readable && self.in_flight() == 0 && !self.fin_sent() && self.state == State::Open {
            // The window is closed. Should the segment that opens it be lost, a probe finds out.
            self.start_timer(now);
        }
        Served::All
    }

    /// How many bytes may be peeked and sent now. `None`: the guest's window has no room, or so little that it is
    /// better to wait for the guest (RFC 9293, section 3.8.6.2.1).
    fn may_send(&self, buffer: usize) -> Option<usize> {
        let in_flight = self.in_flight();
        let room = self.guest_window.checked_sub(in_flight)?;
        let position = self.nxt.wrapping_sub(self.consumed);
        let room = room.min(self.socket.peek_limit().saturating_sub(position));
        let mss = u32::from(self.mss);
        let little = mss.min(self.largest_window / 2);
        if room == 0 || (in_flight > 0 && room < little) {
            return None;
        }
        let want = (room as usize).min(buffer);
        let mss = mss as usize;
        Some(if want > mss { want - want % mss } else { want })
    }

    /// Sends `data`, which follows `nxt`, in as few packets as the output takes.
    fn send_pieces(
        &mut self,
        data: &[u8],
        last: bool,
        now: u64,
        cx: &mut Context<'_>,
        metrics: &mut Metrics,
    ) -> bool {
        let mut rest = data;
        while !rest.is_empty() {
            let (piece, others) = rest.split_at(self.piece(cx).min(rest.len()));
            let push = if last && others.is_empty() { TcpFlags::PSH } else { TcpFlags::ACK };
            if !self.emit(cx, push, self.nxt, piece) {
                return false;
            }
            rest = others;
            self.acks_due = self.acks_due.saturating_sub(1);
            let again = self.nxt != self.max;
            self.nxt = self.nxt.wrapping_add(piece.len() as u32);
            self.was_sent(again, now, metrics);
            metrics.bytes_to_guest = metrics.bytes_to_guest.wrapping_add(piece.len() as u64);
        }
        self.active_at = now;
        true
    }

    /// Payload of one packet: whole segments where it is several.
    fn piece(&self, cx: &Context<'_>) -> usize {
        let mss = usize::from(self.mss);
        let most = cx.output.max_payload(self.tuple.is_v6());
        if most <= mss { most.max(1) } else { most - most % mss }
    }

    fn send_fin(&mut self, now: u64, cx: &mut Context<'_>) -> bool {
        if !self.emit(cx, TcpFlags::FIN, self.nxt, &[]) {
            return false;
        }
        self.acks_due = self.acks_due.saturating_sub(1);
        self.nxt = self.nxt.wrapping_add(1);
        if self.nxt.wrapping_sub(self.max) as i32 > 0 {
            self.max = self.nxt;
        }
        self.start_timer(now);
        true
    }

    /// Notes that everything before `nxt` was sent.
    fn was_sent(&mut self, again: bool, now: u64, metrics: &mut Metrics) {
        if again {
            metrics.retransmissions = metrics.retransmissions.wrapping_add(1);
            self.rtt.sent_again();
        } else {
            self.rtt.sent(self.nxt, now);
        }
        if self.nxt.wrapping_sub(self.max) as i32 > 0 {
            self.max = self.nxt;
        }
        self.start_timer(now);
    }

    /// Sends one packet of what follows `una` again. As much as one packet carries: what was lost was one packet.
    fn send_again(
        &mut self,
        buffer: &mut [u8],
        now: u64,
        cx: &mut Context<'_>,
        metrics: &mut Metrics,
    ) -> Served {
        let end = match self.eof {
            Some(eof) if self.fin_sent() => eof,
            _ => self.nxt,
        };
        let bytes = end.wrapping_sub(self.una).min(self.guest_window);
        let most = (bytes as usize).min(self.piece(cx)).min(buffer.len());
        if most == 0 {
            if self.fin_sent() && self.una == end && !self.emit(cx, TcpFlags::FIN, self.una, &[]) {
                return Served::Full;
            }
            self.resend = false;
            return Served::All;
        }
        let Some(place) = buffer.get_mut(..most) else { return Served::All };
        // The bytes were peeked before and not discarded since: they are there.
        match self.socket.peek(self.una.wrapping_sub(self.consumed), place) {
            Ok(count) if count > 0 => {
                let piece = place.get(..count).unwrap_or_default();
                if !self.emit(cx, TcpFlags::PSH, self.una, piece) {
                    return Served::Full;
                }
                self.resend = false;
                self.was_sent(true, now, metrics);
                Served::All
            }
            _ => Served::Ended(Fate::Abort),
        }
    }

    /// The time that the flow waited for has come.
    pub(super) fn timer(
        &mut self,
        now: u64,
        limits: &Limits,
        cx: &mut Context<'_>,
        metrics: &mut Metrics,
    ) -> Fate {
        if self.resend_at > now {
            if self.deadline(limits) > now {
                return Fate::Keep;
            }
            metrics.expired = metrics.expired.wrapping_add(1);
            return Fate::Abort;
        }
        self.resend_at = NEVER;
        let most = if self.state == State::Open { MAX_UNANSWERED } else { MAX_UNANSWERED_OPENING };
        if self.unanswered >= most {
            metrics.expired = metrics.expired.wrapping_add(1);
            return Fate::Abort;
        }
        self.unanswered += 1;
        self.backoff = self.backoff.saturating_add(1);
        match self.state {
            State::Connecting => {}
            State::SynReceived | State::SynSent => self.resend = true,
            State::Open if self.una != self.max && self.guest_window > 0 => self.go_back(),
            State::Open => self.probe(now, cx),
        }
        Fate::Keep
    }

    /// Sends everything after `una` again.
    fn go_back(&mut self) {
        self.nxt = self.una;
        self.recover = None;
        self.duplicates = 0;
        self.resend = false;
        self.readable = true;
        self.rtt.sent_again();
    }

    /// Asks the guest for its window with a segment that it has to answer: one before the numbers it expects.
    fn probe(&mut self, now: u64, cx: &mut Context<'_>) {
        self.go_back();
        self.emit(cx, TcpFlags::ACK, self.una.wrapping_sub(1), &[]);
        self.start_timer(now);
    }
}
