//! Segments from the guest: RFC 9293, section 3.10.7, for a flow that exists.
//!
//! Nothing a guest sends is believed beyond what its own connection is worth: numbers are compared by distance,
//! and whatever does not fit is answered with an acknowledgement of what was expected, or not at all.

use super::flow::{Fate, Flow, MANY_ACKS, State};
use super::wheel::NEVER;
use super::{Context, Metrics};
use crate::output::{TcpFlags, TcpHeader, TcpOptions};

/// Duplicate acknowledgements after which something counts as lost (RFC 5681, section 3.2).
const DUPLICATES: u8 = 3;

/// Shortest silence after which a probe of the guest counts as keep-alive, in milliseconds.
const KEEP_ALIVE_MS: u64 = 1000;

/// `a - b` of sequence numbers.
fn distance(a: u32, b: u32) -> i32 {
    a.wrapping_sub(b) as i32
}

impl Flow {
    /// Takes one segment.
    pub(super) fn segment(
        &mut self,
        header: &TcpHeader,
        payload: &[u8],
        now: u64,
        cx: &mut Context<'_>,
        metrics: &mut Metrics,
    ) -> Fate {
        match self.state {
            State::Connecting => self.segment_while_connecting(header, cx),
            State::SynSent => self.answer_to_syn(header, now, cx),
            State::SynReceived => self.answer_to_syn_ack(header, payload, now, cx, metrics),
            State::Open => self.segment_while_open(header, payload, now, cx, metrics),
        }
    }

    fn segment_while_connecting(&mut self, header: &TcpHeader, cx: &mut Context<'_>) -> Fate {
        if header.flags.has(TcpFlags::RST) {
            // A guest that gives up: its RST has the number after its SYN, or the SYN's.
            let ours = matches!(distance(header.seq, self.expected), -1 | 0);
            return if ours { Fate::ResetByGuest } else { Fate::Keep };
        }
        // The guest asks again, or begins anew with the same ports: what it says now counts.
        if header.flags.has(TcpFlags::SYN) && !header.flags.has(TcpFlags::ACK) {
            self.take_syn(header, cx.output.mtu());
        }
        Fate::Keep
    }

    fn answer_to_syn(&mut self, header: &TcpHeader, now: u64, cx: &mut Context<'_>) -> Fate {
        let flags = header.flags;
        let acknowledged = flags.has(TcpFlags::ACK) && header.ack == self.nxt;
        if flags.has(TcpFlags::RST) {
            return if acknowledged { Fate::ResetByGuest } else { Fate::Keep };
        }
        if flags.has(TcpFlags::ACK) && !acknowledged {
            refuse(cx, self, header);
            return Fate::Keep;
        }
        if !acknowledged || !flags.has(TcpFlags::SYN) {
            return Fate::Keep;
        }
        self.take_syn(header, cx.output.mtu());
        self.open(header, now);
        self.acks_due = 1;
        Fate::Keep
    }

    fn answer_to_syn_ack(
        &mut self,
        header: &TcpHeader,
        payload: &[u8],
        now: u64,
        cx: &mut Context<'_>,
        metrics: &mut Metrics,
    ) -> Fate {
        let flags = header.flags;
        if flags.has(TcpFlags::RST) {
            return if header.seq == self.expected { Fate::ResetByGuest } else { Fate::Keep };
        }
        if flags.has(TcpFlags::SYN) {
            // Our answer was lost, or the guest begins anew.
            if !flags.has(TcpFlags::ACK) {
                self.take_syn(header, cx.output.mtu());
                self.emit_syn(cx, now);
            }
            return Fate::Keep;
        }
        if !flags.has(TcpFlags::ACK) {
            return Fate::Keep;
        }
        if header.ack != self.nxt {
            refuse(cx, self, header);
            return Fate::Keep;
        }
        self.guest_window = u32::from(header.window) << self.guest_scale;
        self.largest_window = self.guest_window;
        self.open(header, now);
        self.segment_while_open(header, payload, now, cx, metrics)
    }

    /// Both sides are connected: `header` acknowledges our SYN.
    fn open(&mut self, header: &TcpHeader, now: u64) {
        self.state = State::Open;
        self.una = self.nxt;
        self.window_seq = header.seq;
        self.window_ack = header.ack;
        self.rtt.acknowledged(self.una, now);
        self.resend_at = NEVER;
        self.backoff = 0;
        self.unanswered = 0;
        self.active_at = now;
        // The host's peer may have sent something already, about which no edge will come.
        self.readable = true;
        self.stale_window = true;
    }

    fn segment_while_open(
        &mut self,
        header: &TcpHeader,
        payload: &[u8],
        now: u64,
        cx: &mut Context<'_>,
        metrics: &mut Metrics,
    ) -> Fate {
        let ahead = distance(header.seq, self.expected);
        if header.flags.has(TcpFlags::RST) {
            // RFC 5961, section 3.2: exactly the next number, or the sender has to prove itself.
            if ahead == 0 {
                return Fate::ResetByGuest;
            }
            if ahead > 0 && ahead.cast_unsigned() < self.window.max(1) {
                self.ack_once();
            }
            return Fate::Keep;
        }
        if header.flags.has(TcpFlags::SYN) {
            // RFC 5961, section 4.2: a guest that has begun anew answers the acknowledgement with a RST.
            self.ack_once();
            return Fate::Keep;
        }
        if !header.flags.has(TcpFlags::ACK) {
            return Fate::Keep;
        }
        self.unanswered = 0;
        if ahead == -1 && payload.len() <= 1 && !header.flags.has(TcpFlags::FIN) {
            self.keep_alive(now);
        }
        self.active_at = now;
        if !self.acknowledge(header, payload, now) {
            self.ack_once();
            return Fate::Keep;
        }
        self.take_payload(header, payload, ahead, cx, metrics)
    }

    /// Takes the acknowledgement and the window. `false`: it acknowledges what was never sent.
    fn acknowledge(&mut self, header: &TcpHeader, payload: &[u8], now: u64) -> bool {
        if distance(header.ack, self.max) > 0 {
            return false;
        }
        let advance = distance(header.ack, self.una);
        if advance < 0 {
            // Older than what is known. Only its payload may be new.
            return true;
        }
        let window = u32::from(header.window) << self.guest_scale;
        let newer = distance(header.seq, self.window_seq);
        let told_before = window == self.guest_window;
        if newer > 0 || (newer == 0 && distance(header.ack, self.window_ack) >= 0) {
            if self.guest_window == 0 && window > 0 && self.in_flight() == 0 {
                self.backoff = 0;
                self.resend_at = NEVER;
            }
            self.guest_window = window;
            self.largest_window = window.max(self.largest_window);
            self.window_seq = header.seq;
            self.window_ack = header.ack;
        }
        if advance > 0 {
            self.progress(header.ack, now);
        } else if told_before
            && payload.is_empty()
            && !header.flags.has(TcpFlags::FIN)
            && self.max != self.una
        {
            self.duplicate();
        }
        true
    }

    /// The guest has everything before `ack`.
    fn progress(&mut self, ack: u32, now: u64) {
        self.una = ack;
        if distance(self.nxt, ack) < 0 {
            self.nxt = ack;
        }
        self.duplicates = 0;
        self.backoff = 0;
        self.rtt.acknowledged(ack, now);
        self.resend_at = NEVER;
        self.resend = false;
        if self.in_flight() > 0 {
            self.start_timer(now);
        }
        match self.recover {
            // RFC 6582, section 3.2: part of it came; what follows was lost as well.
            Some(recover) if distance(recover, ack) > 0 => self.resend = true,
            _ => self.recover = None,
        }
    }

    /// The guest has got something other than what it waits for.
    fn duplicate(&mut self) {
        self.duplicates = self.duplicates.saturating_add(1);
        if self.duplicates == DUPLICATES && self.recover.is_none() && self.in_flight() > 0 {
            self.recover = Some(self.max);
            self.resend = true;
        }
    }

    /// Gives the payload, as far as it is the next, to the host's kernel, and acknowledges what that took.
    ///
    /// What comes too early is dropped and asked for: between the guest and here nothing changes the order, so
    /// there is nothing to gain from keeping it.
    fn take_payload(
        &mut self,
        header: &TcpHeader,
        payload: &[u8],
        ahead: i32,
        cx: &mut Context<'_>,
        metrics: &mut Metrics,
    ) -> Fate {
        let fin = header.flags.has(TcpFlags::FIN);
        let length = payload.len() + usize::from(fin);
        let known = ahead.min(0).unsigned_abs() as usize;
        if ahead > 0 && length > 0 {
            metrics.out_of_order = metrics.out_of_order.wrapping_add(1);
            self.acks_due = (self.acks_due + 1).min(MANY_ACKS);
            return Fate::Keep;
        }
        if known > 0 && known >= length {
            // Sent again, a keep-alive or a probe of the window: the guest wants to hear where we are.
            self.stale_window = true;
            self.acks_due = (self.acks_due + 1).min(MANY_ACKS);
            return Fate::Keep;
        }
        if length == 0 || self.guest_ended {
            return Fate::Keep;
        }
        let payload = payload.get(known..).unwrap_or_default();
        let more = !fin && !header.flags.has(TcpFlags::PSH);
        let Some(taken) = self.give(payload, more, metrics) else { return Fate::Abort };
        self.expected = self.expected.wrapping_add(taken as u32);
        self.stale_window = true;
        self.ack_once();
        if taken < payload.len() {
            metrics.pinched = metrics.pinched.wrapping_add(1);
            self.pinched = true;
            self.arm(cx);
        } else if fin {
            self.expected = self.expected.wrapping_add(1);
            self.guest_ended = true;
            if self.socket.end().is_err() {
                return Fate::Abort;
            }
        }
        Fate::Keep
    }

    fn ack_once(&mut self) {
        self.acks_due = self.acks_due.max(1);
    }

    /// The guest's program wants to know whether its peer is there. We answer for ourselves; that the peer is
    /// asked as well, and as often, is left to the host's kernel, which ends the connection if it is gone.
    fn keep_alive(&mut self, now: u64) {
        let silence = now.saturating_sub(self.active_at);
        if !self.keeps_alive && self.window > 0 && silence >= KEEP_ALIVE_MS {
            self.keeps_alive = true;
            self.socket.keep_alive(std::time::Duration::from_millis(silence));
        }
    }
}

/// Answers a segment that belongs to another connection than the one being opened.
fn refuse(cx: &mut Context<'_>, flow: &Flow, header: &TcpHeader) {
    let reset = TcpHeader {
        seq: header.ack,
        ack: 0,
        flags: TcpFlags::RST,
        window: 0,
        options: TcpOptions::default(),
    };
    cx.output.tcp(&flow.tuple, &reset, &[], None);
}
