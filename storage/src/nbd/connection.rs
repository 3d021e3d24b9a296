//! One connection in its transmission phase, with as many requests on it as there are callers.
//!
//! There is no thread for replies. Of the callers that wait for one, one reads; a reply of another caller's
//! request is left to that caller together with the turn to read, so data goes from the socket directly into
//! the buffers that it is for:
//!
//! ```text
//!            send                  nobody reads              header has my cookie
//!   caller --------> waiting ------------------> reading ---------------------------> payload into my buffers
//!                      ^  |                         |                                        |
//!                      |  | handed a header         | another's cookie: hand it the          | more chunks: read on
//!                      |  +--> payload ...          v header and the turn                    v
//!                      +----------------------------+                         done: wake somebody who waits
//! ```
//!
//! Whatever does not keep to the protocol (a cookie that nobody waits for, a range that was not asked for, a
//! length that cannot be) ends the connection: from then on the meaning of its bytes is unknown. Everybody who
//! waits gets an error then, and nobody success.
//!
//! Locks: `send` while a request goes out; `state` for moments, never while reading, writing or holding another.
//! Specification: "Transmission phase", "Structured reply types" in the protocol.

use std::collections::{BTreeMap, HashMap};
use std::io;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use vm_memory::VolatileSlice;

use super::socket::{Socket, explain};
use super::wire::*;
use crate::buffers::{copy_in, part_of, zero};

/// How long a server may do nothing while a request waits. A reply may take long when it releases much space.
pub(super) const PATIENCE: Duration = Duration::from_secs(60);

/// Error chunks in one reply: one for each error would do.
const MAX_ERROR_CHUNKS: u32 = 256;

/// Payload up to which header and payload go out as one copy, in bytes: one packet less costs more than that.
const COPIED_PAYLOAD: u64 = 16 << 10;

/// Why a request has no success.
#[derive(Debug)]
pub(super) enum Failure {
    /// The server refuses or fails this request, with this number.
    Server(u32),
    /// There is no connection any more.
    Lost(String),
}

/// A request whose reply is waited for.
#[derive(Default)]
struct Waiting {
    /// The reply that somebody else read the header of; with it comes the turn to read.
    handed: Option<Reply>,
    /// Asleep, rather than still sending.
    asleep: bool,
    wake: Arc<Condvar>,
}

#[derive(Default)]
struct State {
    waiting: HashMap<u64, Waiting>,
    /// Somebody has the turn to read.
    reading: bool,
    next_cookie: u64,
    /// Why the connection is over.
    dead: Option<String>,
}

pub(super) struct Connection {
    socket: Socket,
    structured: bool,
    send: Mutex<()>,
    state: Mutex<State>,
}

/// What a caller wants and has of it.
struct Call<'a, 'b> {
    request: &'a Request,
    buffers: &'a [VolatileSlice<'b>],
    received: Ranges,
    error: Option<u32>,
    error_chunks: u32,
}

impl Connection {
    /// Over a socket on which an export was agreed on.
    pub(super) fn new(socket: Socket, structured: bool) -> io::Result<Self> {
        socket.set_patience(PATIENCE)?;
        Ok(Self { socket, structured, send: Mutex::default(), state: Mutex::default() })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Why it is over, if it is. A connection that is idle and has something to read is over too: nothing was
    /// asked for, so that is its end or nonsense.
    pub(super) fn dead(&self) -> Option<String> {
        let state = self.lock();
        if state.dead.is_none() && state.waiting.is_empty() && self.socket.has_input() {
            drop(state);
            self.kill("the server closed the connection");
            return self.lock().dead.clone();
        }
        state.dead.clone()
    }

    /// Ends it: everybody who waits fails. The first reason stays.
    fn kill(&self, why: &str) {
        let mut state = self.lock();
        if state.dead.is_none() {
            state.dead = Some(why.to_owned());
        }
        self.socket.shut_down();
        state.waiting.values().for_each(|waiting| waiting.wake.notify_one());
    }

    /// Sends a request and waits for its reply. The buffers hold a write's data or take a read's, and have
    /// together the request's length; they are empty for all others. May be called from several threads.
    pub(super) fn execute(&self, request: &Request, buffers: &[VolatileSlice<'_>]) -> Result<(), Failure> {
        let cookie = self.enter()?;
        let mut call = Call { request, buffers, received: Ranges::default(), error: None, error_chunks: 0 };
        if let Err(error) = self.send(cookie, request, buffers) {
            self.kill(&explain(&error));
        }
        let result = self.wait(cookie, &mut call);
        let mut state = self.lock();
        state.waiting.remove(&cookie);
        result.map_err(|lost| Failure::Lost(state.dead.clone().unwrap_or(lost)))?
    }

    fn enter(&self) -> Result<u64, Failure> {
        let mut state = self.lock();
        if let Some(why) = &state.dead {
            return Err(Failure::Lost(why.clone()));
        }
        state.next_cookie += 1;
        let cookie = state.next_cookie;
        state.waiting.insert(cookie, Waiting::default());
        Ok(cookie)
    }

    fn send(&self, cookie: u64, request: &Request, buffers: &[VolatileSlice<'_>]) -> io::Result<()> {
        let header = request.header(cookie);
        let payload = if request.command == Command::Write { buffers } else { &[] };
        let _turn = self.send.lock().unwrap_or_else(PoisonError::into_inner);
        if u64::from(request.len) > COPIED_PAYLOAD || payload.is_empty() {
            return self.socket.write_all(&header).and_then(|()| self.socket.write_buffers(payload));
        }
        let mut bytes = header.to_vec();
        bytes.resize(REQUEST_BYTES + request.len as usize, 0);
        copy_in(payload, &mut bytes[REQUEST_BYTES..]);
        self.socket.write_all(&bytes)
    }

    /// Waits for the whole reply; the outer error is the connection's.
    fn wait(&self, cookie: u64, call: &mut Call<'_, '_>) -> Result<Result<(), Failure>, String> {
        loop {
            let mut reply = self.turn(cookie)?;
            let result = loop {
                let taken = match reply.take() {
                    Some(reply) => self.take(reply, call),
                    None => match self.read_header() {
                        Ok((read, header)) if read == cookie => self.take(header, call),
                        Ok((read, header)) => match self.hand_over(read, header) {
                            Ok(()) => break None,
                            Err(why) => Err(why),
                        },
                        Err(why) => Err(why),
                    },
                };
                match taken {
                    Ok(None) => {}
                    Ok(Some(result)) => break Some(Ok(result)),
                    Err(why) => break Some(Err(why)),
                }
            };
            match result {
                None => continue,
                Some(Ok(result)) => {
                    self.pass_turn(cookie);
                    return Ok(result);
                }
                Some(Err(why)) => {
                    self.kill(&why);
                    return Err(why);
                }
            }
        }
    }

    /// Waits for the turn to read; says which reply's header was read already, if one was.
    fn turn(&self, cookie: u64) -> Result<Option<Reply>, String> {
        let mut state = self.lock();
        loop {
            if let Some(why) = &state.dead {
                return Err(why.clone());
            }
            let free = !state.reading;
            let Some(mine) = state.waiting.get_mut(&cookie) else {
                return Err("a request was forgotten".to_owned());
            };
            if let Some(reply) = mine.handed.take() {
                mine.asleep = false;
                return Ok(Some(reply));
            }
            if free {
                mine.asleep = false;
                state.reading = true;
                return Ok(None);
            }
            mine.asleep = true;
            let wake = mine.wake.clone();
            state = wake.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Gives a reply and the turn to read to the caller whom it is for.
    fn hand_over(&self, cookie: u64, reply: Reply) -> Result<(), String> {
        let mut state = self.lock();
        match state.waiting.get_mut(&cookie) {
            Some(other) => {
                other.handed = Some(reply);
                other.wake.notify_one();
                Ok(())
            }
            None => Err("the server answered a request that nobody made".to_owned()),
        }
    }

    /// Leaves the turn to somebody who waits for it. Those who still send take it when they are there.
    fn pass_turn(&self, cookie: u64) {
        let mut state = self.lock();
        state.waiting.remove(&cookie);
        state.reading = false;
        if let Some(next) = state.waiting.values().find(|waiting| waiting.asleep) {
            next.wake.notify_one();
        }
    }

    fn read_header(&self) -> Result<(u64, Reply), String> {
        let mut bytes = [0; REPLY_BYTES];
        self.read_exact(&mut bytes)?;
        match reply(&bytes) {
            Some((cookie, Reply::Chunk { flags, kind, .. })) if self.structured => {
                let mut len = [0; 4];
                self.read_exact(&mut len)?;
                Ok((cookie, Reply::Chunk { flags, kind, len: u32::from_be_bytes(len) }))
            }
            Some((cookie, simple @ Reply::Simple { .. })) => Ok((cookie, simple)),
            _ => Err("the server sent something else than a reply".to_owned()),
        }
    }

    fn read_exact(&self, bytes: &mut [u8]) -> Result<(), String> {
        self.socket.read_exact(bytes).map_err(|error| explain(&error))
    }

    /// Takes a reply's payload. `None`: more of the reply is to come.
    fn take(&self, reply: Reply, call: &mut Call<'_, '_>) -> Result<Option<Result<(), Failure>>, String> {
        let is_read = call.request.command == Command::Read;
        match reply {
            Reply::Simple { error } if error != 0 => Ok(Some(Err(Failure::Server(error)))),
            Reply::Simple { .. } if !is_read => Ok(Some(Ok(()))),
            Reply::Simple { .. } if self.structured => {
                Err("the server sent data without the structure agreed on".to_owned())
            }
            Reply::Simple { .. } => {
                self.socket.read_buffers(call.buffers).map_err(|error| explain(&error))?;
                Ok(Some(Ok(())))
            }
            Reply::Chunk { flags, kind, len } => {
                match kind {
                    CHUNK_NONE if len == 0 && flags & CHUNK_DONE != 0 => {}
                    CHUNK_DATA if is_read => self.take_data(len, call)?,
                    CHUNK_HOLE if is_read && len == 12 => self.take_hole(call)?,
                    kind if kind & CHUNK_ERROR != 0 => self.take_error(len, call)?,
                    _ => return Err(format!("the server sent a part of type {kind} that has no place here")),
                }
                if flags & CHUNK_DONE == 0 { Ok(None) } else { call.finish().map(Some) }
            }
        }
    }

    fn take_data(&self, len: u32, call: &mut Call<'_, '_>) -> Result<(), String> {
        let mut offset = [0; 8];
        let Some(len) = len.checked_sub(8).filter(|len| *len != 0) else {
            return Err("the server sent a part without data".to_owned());
        };
        self.read_exact(&mut offset)?;
        let part = call.part(u64::from_be_bytes(offset), u64::from(len))?;
        self.socket.read_buffers(&part).map_err(|error| explain(&error))
    }

    fn take_hole(&self, call: &mut Call<'_, '_>) -> Result<(), String> {
        let mut bytes = [0; 12];
        self.read_exact(&mut bytes)?;
        let [offset @ .., a, b, c, d] = bytes;
        zero(&call.part(u64::from_be_bytes(offset), u64::from(u32::from_be_bytes([a, b, c, d])))?);
        Ok(())
    }

    fn take_error(&self, len: u32, call: &mut Call<'_, '_>) -> Result<(), String> {
        call.error_chunks += 1;
        if !(6..=6 + 8 + MAX_TEXT_BYTES).contains(&len) || call.error_chunks > MAX_ERROR_CHUNKS {
            return Err("the server sent an error of an impossible form".to_owned());
        }
        let mut bytes = vec![0; len as usize];
        self.read_exact(&mut bytes)?;
        let number = u32::from_be_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
        let text = usize::from(u16::from_be_bytes([bytes[4], bytes[5]]));
        if number == 0 || text > bytes.len() - 6 {
            return Err("the server sent an error of an impossible form".to_owned());
        }
        call.error.get_or_insert(number);
        Ok(())
    }

    /// Says good-bye. Nothing may be waiting.
    pub(super) fn close(&self) {
        let request = Request { command: Command::Disconnect, flags: 0, offset: 0, len: 0 };
        if self.lock().dead.is_none() {
            let _ = self.socket.set_patience(Duration::from_millis(200));
            let _ = self.send(0, &request, &[]);
        }
        self.kill("it was closed");
    }
}

impl<'b> Call<'_, 'b> {
    /// The buffers for a range that the server sends, which has to be within the request and new.
    fn part(&mut self, offset: u64, len: u64) -> Result<Vec<VolatileSlice<'b>>, String> {
        let whole = u64::from(self.request.len);
        let start = offset.checked_sub(self.request.offset);
        let Some(start) = start.filter(|start| len != 0 && *start < whole && len <= whole - start) else {
            return Err("the server sent data that was not asked for".to_owned());
        };
        if !self.received.add(start, len) {
            return Err("the server sent the same data twice".to_owned());
        }
        part_of(self.buffers, start, len).map_err(|error| error.to_string())
    }

    /// The result of a reply that is whole.
    fn finish(&self) -> Result<Result<(), Failure>, String> {
        match self.error {
            Some(number) => Ok(Err(Failure::Server(number))),
            None if self.request.command == Command::Read
                && self.received.total != u64::from(self.request.len) =>
            {
                Err("the server sent less data than was asked for".to_owned())
            }
            None => Ok(Ok(())),
        }
    }
}

/// Ranges that do not overlap, kept joined where they touch: data in order takes one entry.
#[derive(Default)]
struct Ranges {
    /// From start to end.
    list: BTreeMap<u64, u64>,
    total: u64,
}

impl Ranges {
    /// `false` if a part of it is there already.
    fn add(&mut self, start: u64, len: u64) -> bool {
        let mut end = start + len;
        let before = self.list.range(..end).next_back().map(|(start, end)| (*start, *end));
        if before.is_some_and(|(_, before)| before > start) {
            return false;
        }
        self.total += len;
        if let Some(after) = self.list.remove(&end) {
            end = after;
        }
        match before {
            Some((first, before)) if before == start => self.list.insert(first, end),
            _ => self.list.insert(start, end),
        };
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_join_and_overlaps_are_noticed() {
        let mut ranges = Ranges::default();
        for (start, len) in [(10, 10), (30, 10), (20, 10), (0, 5)] {
            assert!(ranges.add(start, len));
        }
        assert_eq!(ranges.list, BTreeMap::from([(0, 5), (10, 40)]));
        for (start, len) in [(10, 1), (39, 1), (5, 6), (0, 1), (4, 100), (15, 3)] {
            assert!(!ranges.add(start, len), "{start} {len}");
        }
        assert_eq!(ranges.total, 35);
    }
}
