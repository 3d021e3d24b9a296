//! DNS forwarding: what the guest asks the network's DNS server goes to the host's resolvers (RFC 1035, RFC 5452).
//!
//! ```text
//!   guest ──id 7──▶ 10.0.2.3:53 ──id random, socket of its own──▶ resolver 1 ──no answer in 2 s, refused,──┐
//!                                                                              SERVFAIL, REFUSED           │
//!         ◀─id 7── answer, if id and question are those asked ◀── resolver 2 ◀─────────────────────────────┘
//! ```
//!
//! Each query has a socket of its own, so a port that nobody can guess, connected, so that only the resolver is
//! heard, and lives for at most [`GIVE_UP`]. Which resolver answered last is asked first. Nothing is cached: the
//! host's resolver does.
//!
//! The resolvers are those of the host's `/etc/resolv.conf` when the network starts, or those it is given. This is
//! the one place where an address of the host's loopback (systemd-resolved's 127.0.0.53) is talked to for a
//! guest, and by UDP only with what is a DNS query. DNS over TCP is an ordinary TCP flow to the resolver.

use std::net::{IpAddr, Ipv6Addr, SocketAddr, SocketAddrV6};
use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use rustix::net::{RecvFlags, SendFlags};

use crate::config::{MAX_RESOLVERS, MAX_SEARCH};
use crate::host::Host;
use crate::lru::{Handle, LruTable};
use crate::policy::DNS_PORT;
use crate::poller::{Owner, Poller};
use crate::sender::{FrameIo, Sender};
use crate::wire::be16;

/// How long one resolver has.
pub const TRY_NEXT: Duration = Duration::from_secs(2);
/// How long a query lives.
pub const GIVE_UP: Duration = Duration::from_secs(10);
/// Queries at once; the oldest makes room.
pub const MAX_QUERIES: usize = 256;
/// Longest query, bytes: one packet, and with the rest of its entry less than 2 KiB.
const MAX_QUERY: usize = 1400;

const HEADER: usize = 12;
const FORMAT_ERROR: u8 = 1;
const SERVER_FAILURE: u8 = 2;
const REFUSED: u8 = 5;

/// Resolvers and search domains of the host.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Resolvers {
    /// Whom to ask.
    pub servers: Vec<SocketAddr>,
    /// Domains to search.
    pub search: Vec<String>,
}

impl Resolvers {
    /// What `/etc/resolv.conf` says; nothing when it cannot be read. glibc's default is this host.
    pub fn of_host() -> Self {
        let text = std::fs::read_to_string("/etc/resolv.conf").unwrap_or_default();
        let mut resolvers = Self::parse(&text);
        if resolvers.servers.is_empty() {
            resolvers.servers.push(SocketAddr::from(([127, 0, 0, 1], DNS_PORT)));
        }
        resolvers
    }

    /// Reads the form of resolv.conf(5): up to three servers, the last list of domains.
    pub fn parse(text: &str) -> Self {
        let mut resolvers = Self::default();
        for line in text.lines() {
            let mut words = line.split_whitespace();
            match words.next() {
                Some("nameserver") if resolvers.servers.len() < MAX_RESOLVERS => {
                    resolvers.servers.extend(words.next().and_then(server));
                }
                Some("search" | "domain") => {
                    resolvers.search = words.take(MAX_SEARCH).map(str::to_owned).collect();
                }
                _ => {}
            }
        }
        resolvers
    }

    /// These servers instead.
    pub fn with_servers(mut self, servers: &[IpAddr]) -> Self {
        self.servers = servers.iter().map(|server| SocketAddr::new(*server, DNS_PORT)).collect();
        self
    }
}

/// A server's address, with a scope (`fe80::1%eth0`) where it has one.
fn server(text: &str) -> Option<SocketAddr> {
    let Some((address, scope)) = text.split_once('%') else {
        return Some(SocketAddr::new(text.parse().ok()?, DNS_PORT));
    };
    let address: Ipv6Addr = address.parse().ok()?;
    let known = |name: &str| name.chars().all(|c| c.is_ascii_alphanumeric() || ".-_".contains(c));
    let index = scope.parse().ok().or_else(|| {
        let path = known(scope).then(|| format!("/sys/class/net/{scope}/ifindex"))?;
        std::fs::read_to_string(path).ok()?.trim().parse().ok()
    })?;
    Some(SocketAddrV6::new(address, DNS_PORT, 0, index).into())
}

struct Query {
    guest: SocketAddr,
    /// The network's address that was asked.
    server: SocketAddr,
    /// What was asked, with our identifier.
    message: Vec<u8>,
    guest_id: u16,
    id: u16,
    socket: Option<OwnedFd>,
    started: Instant,
    /// Resolvers asked so far.
    tries: usize,
    resolver: usize,
}

/// What a call works with.
pub struct DnsContext<'a, F> {
    /// To the guest.
    pub sender: &'a mut Sender<F>,
    /// Watches sockets.
    pub poller: &'a mut dyn Poller,
    /// Makes sockets.
    pub host: &'a mut dyn Host,
    /// The time.
    pub now: Instant,
    /// For one datagram.
    pub buffer: &'a mut Vec<u8>,
}

/// The forwarder.
pub struct Dns {
    servers: Vec<SocketAddr>,
    /// Who answered last.
    preferred: usize,
    queries: LruTable<(SocketAddr, u16), Query>,
}

/// Where the question section of a message ends, when it has one question.
fn question_end(message: &[u8]) -> Option<usize> {
    if be16(message, 4)? != 1 {
        return None;
    }
    let mut at = HEADER;
    loop {
        let length = usize::from(*message.get(at)?);
        match length {
            0 => break,
            // A question is the first name: there is nothing to point to.
            1..=63 => at += 1 + length,
            _ => return None,
        }
        if at - HEADER > 255 {
            return None;
        }
    }
    let end = at + 5;
    (end <= message.len()).then_some(end)
}

/// Whether an answer is to this query: identifier, and the question but for letter case.
fn answers(query: &[u8], answer: &[u8]) -> bool {
    let same_id = answer.len() >= HEADER && answer.get(..2) == query.get(..2);
    let is_answer = answer.get(2).is_some_and(|flags| flags & 0x80 != 0);
    let Some(end) = question_end(query) else { return false };
    let same_question = match (query.get(HEADER..end), answer.get(HEADER..end)) {
        (Some(asked), Some(answered)) => {
            question_end(answer) == Some(end) && asked.eq_ignore_ascii_case(answered)
        }
        // Some servers leave the question out when they refuse.
        _ => answer.len() == HEADER && be16(answer, 4) == Some(0),
    };
    same_id && is_answer && same_question
}

/// A number that nobody can guess.
fn random_id() -> Option<u16> {
    let mut bytes = [0; 2];
    let got = rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty()).ok()?;
    (got == bytes.len()).then(|| u16::from_ne_bytes(bytes))
}

impl Dns {
    /// Asks `servers`.
    pub fn new(servers: Vec<SocketAddr>) -> Self {
        Self { servers, preferred: 0, queries: LruTable::new(MAX_QUERIES) }
    }

    /// Who is asked first.
    pub fn resolver(&self) -> Option<SocketAddr> {
        self.servers.get(self.preferred).or(self.servers.first()).copied()
    }

    /// Takes a query of the guest.
    pub fn query<F: FrameIo>(
        &mut self,
        guest: SocketAddr,
        server: SocketAddr,
        message: &[u8],
        cx: &mut DnsContext<'_, F>,
    ) {
        cx.sender.stats.dns_queries += 1;
        let (Some(guest_id), Some(flags)) = (be16(message, 0), message.get(2)) else { return };
        if message.len() < HEADER || flags & 0x80 != 0 {
            return;
        }
        if message.len() > MAX_QUERY || question_end(message).is_none() {
            return fail(guest, server, message, guest_id, FORMAT_ERROR, cx.sender);
        }
        let key = (guest, guest_id);
        if let Some(handle) = self.queries.find(&key) {
            let same = self.queries.get(handle).is_some_and(|q| q.message.get(2..) == message.get(2..));
            if same {
                // Sent again: the resolver that is being asked has not answered.
                return self.next_resolver(handle, cx);
            }
        }
        let query = Query {
            guest,
            server,
            message: message.to_vec(),
            guest_id,
            id: 0,
            socket: None,
            started: cx.now,
            tries: 0,
            resolver: self.preferred,
        };
        let (handle, out) = self.queries.insert(key, query, cx.now);
        if let Some((_, old)) = out {
            close(old, cx.poller);
        }
        self.send(handle, cx);
    }

    /// Sends a query to its resolver, or to the next ones where that fails at once.
    fn send<F: FrameIo>(&mut self, handle: Handle, cx: &mut DnsContext<'_, F>) {
        loop {
            self.queries.touch(handle, cx.now);
            let servers = self.servers.len();
            let Some(query) = self.queries.get_mut(handle) else { return };
            let too_old = cx.now.saturating_duration_since(query.started) >= GIVE_UP;
            // Twice around at most.
            if query.tries >= servers * 2 || too_old {
                return self.give_up(handle, cx);
            }
            query.tries += 1;
            let Some(resolver) = self.servers.get(query.resolver % servers) else { return };
            if query.ask(*resolver, handle, cx).is_some() {
                return;
            }
            query.resolver = (query.resolver + 1) % servers;
        }
    }

    fn next_resolver<F: FrameIo>(&mut self, handle: Handle, cx: &mut DnsContext<'_, F>) {
        let servers = self.servers.len().max(1);
        if let Some(query) = self.queries.get_mut(handle) {
            if query.resolver == self.preferred {
                self.preferred = (self.preferred + 1) % servers;
            }
            query.resolver = (query.resolver + 1) % servers;
        }
        self.send(handle, cx);
    }

    fn give_up<F: FrameIo>(&mut self, handle: Handle, cx: &mut DnsContext<'_, F>) {
        let Some((_, query)) = self.queries.remove(handle) else { return };
        cx.sender.stats.dns_failures += 1;
        fail(query.guest, query.server, &query.message, query.guest_id, SERVER_FAILURE, cx.sender);
        close(query, cx.poller);
    }

    /// A query's socket is ready.
    pub fn ready<F: FrameIo>(&mut self, value: u64, cx: &mut DnsContext<'_, F>) {
        let handle = Handle(value);
        let Some(query) = self.queries.get(handle) else { return };
        let Some(socket) = &query.socket else { return };
        cx.buffer.clear();
        let spare = rustix::buffer::spare_capacity(cx.buffer);
        match rustix::net::recv(socket, spare, RecvFlags::DONTWAIT) {
            Ok(_) => {}
            Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => return,
            Err(_) => return self.next_resolver(handle, cx),
        }
        if !answers(&query.message, cx.buffer) {
            return;
        }
        let code = cx.buffer.get(3).map_or(0, |flags| flags & 0xf);
        if matches!(code, SERVER_FAILURE | REFUSED) && query.tries < self.servers.len() {
            return self.next_resolver(handle, cx);
        }
        let Some((_, query)) = self.queries.remove(handle) else { return };
        self.preferred = query.resolver;
        if let Some(id) = cx.buffer.get_mut(..2) {
            id.copy_from_slice(&query.guest_id.to_be_bytes());
        }
        cx.sender.stats.dns_answers += 1;
        if cx.sender.udp(query.server, query.guest, cx.buffer) == crate::sender::Sending::Full {
            cx.sender.stats.dropped_full += 1;
        }
        close(query, cx.poller);
    }

    /// Asks others where there was no answer; says when to be called again.
    pub fn expire<F: FrameIo>(&mut self, cx: &mut DnsContext<'_, F>) -> Option<Instant> {
        while self.queries.next_expiry(TRY_NEXT).is_some_and(|due| due <= cx.now) {
            let Some(handle) = self.queries.oldest() else { break };
            self.next_resolver(handle, cx);
        }
        self.queries.next_expiry(TRY_NEXT)
    }
}

impl Query {
    /// Asks a resolver, with a new socket and identifier.
    fn ask<F: FrameIo>(
        &mut self,
        resolver: SocketAddr,
        handle: Handle,
        cx: &mut DnsContext<'_, F>,
    ) -> Option<()> {
        if let Some(socket) = self.socket.take() {
            cx.poller.unwatch(socket.as_fd());
        }
        self.id = random_id()?;
        self.message.get_mut(..2)?.copy_from_slice(&self.id.to_be_bytes());
        let (socket, _) = cx.host.udp(resolver, None, true).ok()?;
        rustix::net::send(&socket, &self.message, SendFlags::DONTWAIT).ok()?;
        cx.poller.watch(socket.as_fd(), Owner::Dns.token(handle.0), true, false, false).ok()?;
        self.socket = Some(socket);
        Some(())
    }
}

fn close(query: Query, poller: &mut dyn Poller) {
    if let Some(socket) = query.socket {
        poller.unwatch(socket.as_fd());
    }
}

/// Answers a query with an error.
fn fail<F: FrameIo>(
    guest: SocketAddr,
    server: SocketAddr,
    query: &[u8],
    guest_id: u16,
    code: u8,
    sender: &mut Sender<F>,
) {
    let end = question_end(query);
    let mut answer = query.get(..end.unwrap_or(HEADER)).unwrap_or_default().to_vec();
    let Some(head) = answer.get_mut(..HEADER) else { return };
    head[..2].copy_from_slice(&guest_id.to_be_bytes());
    // An answer; opcode and "recursion desired" as asked; recursion available.
    head[2] = 0x80 | head[2] & 0x79;
    head[3] = 0x80 | code;
    head[4..].fill(0);
    head[5] = u8::from(end.is_some());
    if sender.udp(server, guest, &answer) == crate::sender::Sending::Full {
        sender.stats.dropped_full += 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn query(name: &str) -> Vec<u8> {
        let mut message = vec![0x12, 0x34, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0];
        for label in name.split('.') {
            message.push(label.len() as u8);
            message.extend_from_slice(label.as_bytes());
        }
        message.extend_from_slice(&[0, 0, 1, 0, 1]);
        message
    }

    #[test]
    fn resolv_conf_is_read() {
        let text = "# comment\nnameserver 127.0.0.53\nsearch a.example b.example\n options edns0\n\
                    nameserver ::1\nnameserver nonsense\nnameserver fe80::1%7\nnameserver 1.1.1.1\n";
        let resolvers = Resolvers::parse(text);
        let servers: Vec<String> = resolvers.servers.iter().map(SocketAddr::to_string).collect();
        assert_eq!(servers, ["127.0.0.53:53", "[::1]:53", "[fe80::1%7]:53"]);
        assert_eq!(resolvers.search, ["a.example", "b.example"]);
        assert!(Resolvers::parse("nameserver fe80::1%../../x").servers.is_empty());
    }

    #[test]
    fn an_answer_must_be_to_what_was_asked() {
        let asked = query("example.org");
        let mut answer = query("eXample.ORG");
        assert!(!answers(&asked, &answer), "a query is no answer");
        answer[2] |= 0x80;
        answer.extend_from_slice(b"anything");
        assert!(answers(&asked, &answer));
        answer[1] ^= 1;
        assert!(!answers(&asked, &answer), "another identifier");
        let mut other = query("example.com");
        other[2] |= 0x80;
        assert!(!answers(&asked, &other), "another question");
        assert!(!answers(&asked, &answer[..9]));
    }

    #[test]
    fn questions_are_walked_within_bounds() {
        assert!(question_end(&query("example.org")).is_some());
        for cut in 0..query("example.org").len() {
            assert!(question_end(&query("example.org")[..cut]).is_none());
        }
        let mut pointer = query("example.org");
        pointer[HEADER] = 0xc0;
        assert!(question_end(&pointer).is_none());
        let mut endless = vec![0, 0, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0];
        endless.extend_from_slice(&[1; 600]);
        assert!(question_end(&endless).is_none());
    }
}
