//! How flows come to be: the guest's SYN, a connection accepted on the host, and what becomes of attempts that
//! fail.

use std::io;
use std::os::fd::{AsFd, OwnedFd};

use rustix::io::Errno;

use super::flow::{Fate, Flow, State};
use super::{Context, Table};
use crate::output::{Flow4Tuple, TcpFlags, TcpHeader, TcpOptions, Unreachable};
use crate::poller::Owner;
use crate::socket::{Connecting, TcpSocket};

/// What the guest is told when the host cannot connect.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Answer {
    /// RST: the peer's host is there and does not want.
    Reset,
    /// ICMP.
    Unreachable(Unreachable),
    /// Nothing: the guest asks again, and gives up by its own clock.
    Nothing,
}

/// What an error of `connect` is to the guest.
fn answer_to(error: &io::Error) -> Answer {
    let Some(errno) = Errno::from_io_error(error) else { return Answer::Reset };
    match errno {
        Errno::NETUNREACH | Errno::NETDOWN | Errno::AFNOSUPPORT => Answer::Unreachable(Unreachable::Network),
        Errno::HOSTUNREACH | Errno::HOSTDOWN => Answer::Unreachable(Unreachable::Host),
        Errno::ACCESS | Errno::PERM => Answer::Unreachable(Unreachable::Prohibited),
        // The peer is silent, so are we. Or the host is short of something, which may pass.
        Errno::TIMEDOUT
        | Errno::MFILE
        | Errno::NFILE
        | Errno::NOBUFS
        | Errno::NOMEM
        | Errno::AGAIN
        | Errno::ADDRNOTAVAIL => Answer::Nothing,
        _ => Answer::Reset,
    }
}

/// The RST that answers `header` of a segment with `length` bytes (SYN and FIN included) for which there is no flow
/// (RFC 9293, section 3.10.7.1).
pub(super) fn reset_for(header: &TcpHeader, length: u32) -> TcpHeader {
    let (seq, ack, flags) = if header.flags.has(TcpFlags::ACK) {
        (header.ack, 0, TcpFlags::RST)
    } else {
        (0, header.seq.wrapping_add(length), TcpFlags::RST.with(TcpFlags::ACK))
    };
    TcpHeader { seq, ack, flags, window: 0, options: TcpOptions::default() }
}

impl Table {
    /// A guest's SYN for which there is no flow.
    pub(super) fn open_for_guest(&mut self, tuple: &Flow4Tuple, header: &TcpHeader, cx: &mut Context<'_>) {
        let Some(to) = cx.policy.connect_to(tuple.remote) else {
            self.metrics.refused = self.metrics.refused.wrapping_add(1);
            cx.output.tcp(tuple, &reset_for(header, 1), &[], None);
            return;
        };
        if !self.make_room(cx) {
            // The guest asks again; there may be room by then.
            self.metrics.turned_away = self.metrics.turned_away.wrapping_add(1);
            return;
        }
        let now = self.milliseconds(cx.now);
        let (socket, progress) = match TcpSocket::connect(to) {
            Ok(socket) => socket,
            Err(error) => {
                self.answer_failure(tuple, header, &error, cx);
                return;
            }
        };
        let mut flow = Flow::new(*tuple, socket, State::Connecting, self.first_number(tuple, cx.now), now);
        flow.take_syn(header, cx.output.mtu());
        let Some(index) = self.insert(flow, cx) else { return };
        self.metrics.opened_by_guest = self.metrics.opened_by_guest.wrapping_add(1);
        if progress == Connecting::Done {
            self.connected(index, cx);
        }
        self.settle(index, Fate::Keep, cx);
    }

    /// A connection that was accepted on the host for a port forward: the guest is asked to take it, under the
    /// addresses of `flow`. `false`: there is no room, or there is such a flow already; the connection was reset.
    pub fn accepted(&mut self, stream: OwnedFd, flow: &Flow4Tuple, cx: &mut Context<'_>) -> bool {
        let Ok(socket) = TcpSocket::accepted(stream) else { return false };
        if self.find(flow).is_some() || !self.make_room(cx) {
            self.metrics.turned_away = self.metrics.turned_away.wrapping_add(1);
            socket.reset();
            return false;
        }
        let now = self.milliseconds(cx.now);
        let new = Flow::new(*flow, socket, State::SynSent, self.first_number(flow, cx.now), now);
        let Some(index) = self.insert(new, cx) else { return false };
        self.metrics.opened_by_host = self.metrics.opened_by_host.wrapping_add(1);
        self.send_syn(index, cx);
        self.settle(index, Fate::Keep, cx);
        true
    }

    /// The socket of a flow that was connecting is writable or has an error.
    pub(super) fn connect_ended(&mut self, index: u32, cx: &mut Context<'_>) {
        let Some(flow) = self.flow(index) else { return };
        match flow.socket.take_error() {
            None => self.connected(index, cx),
            Some(error) => {
                let tuple = flow.tuple;
                let options = TcpOptions { mss: Some(flow.mss), ..TcpOptions::default() };
                let syn = TcpHeader {
                    seq: flow.expected.wrapping_sub(1),
                    ack: 0,
                    flags: TcpFlags::SYN,
                    window: 0,
                    options,
                };
                self.answer_failure(&tuple, &syn, &error, cx);
                self.remove(index);
            }
        }
    }

    fn connected(&mut self, index: u32, cx: &mut Context<'_>) {
        if let Some(flow) = self.flow(index) {
            flow.state = State::SynReceived;
        }
        self.send_syn(index, cx);
    }

    /// Sends SYN or SYN/ACK, now or when there is room.
    fn send_syn(&mut self, index: u32, cx: &mut Context<'_>) {
        let now = self.milliseconds(cx.now);
        if let Some(flow) = self.flow(index) {
            flow.active_at = now;
            flow.resend = !flow.emit_syn(cx, now);
        }
    }

    fn answer_failure(
        &mut self,
        tuple: &Flow4Tuple,
        syn: &TcpHeader,
        error: &io::Error,
        cx: &mut Context<'_>,
    ) {
        self.metrics.failed = self.metrics.failed.wrapping_add(1);
        tracing::debug!(remote = %tuple.remote, %error, "a connection of the guest failed");
        match answer_to(error) {
            Answer::Reset => {
                cx.output.tcp(tuple, &reset_for(syn, 1), &[], None);
            }
            Answer::Unreachable(why) => cx.output.unreachable(tuple, syn, why),
            Answer::Nothing => {}
        }
    }

    /// Sees to it that one more flow fits: an attempt that is not answered gives way, the oldest first. A flood of
    /// attempts so displaces itself and no connection.
    fn make_room(&mut self, cx: &mut Context<'_>) -> bool {
        if self.metrics.half_open >= self.limits.half_open || self.metrics.flows >= self.limits.flows {
            let Some(oldest) = self.oldest_half_open() else { return false };
            self.metrics.evicted = self.metrics.evicted.wrapping_add(1);
            self.abort(oldest, false, cx);
        }
        true
    }

    /// Puts a flow into the table and has its socket watched.
    fn insert(&mut self, mut flow: Flow, cx: &mut Context<'_>) -> Option<u32> {
        let (index, token) = self.reserve()?;
        flow.token = token;
        // Watched for both directions at every change, once for its whole life.
        let watched = cx.poller.watch(flow.socket.as_fd(), Owner::Tcp.token(token), true, true, true);
        if watched.is_err() {
            self.release(index);
            flow.socket.reset();
            return None;
        }
        self.place(index, flow);
        Some(index)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_of_the_host_become_what_a_router_would_say() {
        let cases = [
            (Errno::CONNREFUSED, Answer::Reset),
            (Errno::CONNRESET, Answer::Reset),
            (Errno::NETUNREACH, Answer::Unreachable(Unreachable::Network)),
            (Errno::AFNOSUPPORT, Answer::Unreachable(Unreachable::Network)),
            (Errno::HOSTUNREACH, Answer::Unreachable(Unreachable::Host)),
            (Errno::ACCESS, Answer::Unreachable(Unreachable::Prohibited)),
            (Errno::PERM, Answer::Unreachable(Unreachable::Prohibited)),
            (Errno::TIMEDOUT, Answer::Nothing),
            (Errno::MFILE, Answer::Nothing),
        ];
        for (errno, answer) in cases {
            assert_eq!(answer_to(&errno.into()), answer, "{errno}");
        }
    }

    #[test]
    fn a_segment_of_no_flow_gets_the_reset_that_its_sender_takes() {
        let flags = TcpFlags::ACK;
        let data = TcpHeader { seq: 100, ack: 7, flags, ..TcpHeader::default() };
        let reset = reset_for(&data, 20);
        assert_eq!((reset.seq, reset.ack, reset.flags), (7, 0, TcpFlags::RST));
        let syn = TcpHeader { seq: u32::MAX, flags: TcpFlags::SYN, ..TcpHeader::default() };
        let reset = reset_for(&syn, 1);
        assert_eq!((reset.seq, reset.ack, reset.flags), (0, 0, TcpFlags::RST.with(TcpFlags::ACK)));
    }
}
