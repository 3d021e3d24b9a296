//! The connection to a server for as long as the disk is open: made anew when it was lost, and what is known
//! about durability over such a loss.
//!
//! ```text
//!              lost; its requests fail                 next request
//!   connected ------------------------> disconnected --------------------> connecting
//!       ^                                    ^                                |    |
//!       |                                    |  fails, or is another export   |    |
//!       |                                    +--- wait 0.1 s, 0.2 s ... 10 s -+    |
//!       |                                         (requests fail at once)         |
//!       +---------------------- the same export is there again ---------------------+
//! ```
//!
//! A server that was lost may have lost writes that it acknowledged and that no flush made durable. So if there
//! were such writes, every flush on the next connection fails for good: success would be a lie. Where nothing
//! was unflushed, nothing can be missing, and the disk goes on as before.
//!
//! Lock: one for the state, held while connecting: who wants to use the connection has to wait for it anyway.
//! The connection's own locks are taken under it.

use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::connection::{Connection, Failure};
use super::negotiate::{Export, Setback, negotiate};
use super::socket::{Deadline, Socket};
use super::uri::NbdUri;

/// How long connecting and, again, negotiating may take.
const CONNECT_LIMIT: Duration = Duration::from_secs(10);

/// The first wait between attempts to connect again, and the longest.
const FIRST_WAIT: Duration = Duration::from_millis(100);
const LONGEST_WAIT: Duration = Duration::from_secs(10);

pub(super) struct Link {
    /// `None`: there is nothing to connect to again.
    uri: Option<NbdUri>,
    export: Export,
    state: Mutex<State>,
}

struct State {
    connection: Option<Arc<Connection>>,
    /// Why there is none.
    lost: String,
    /// Number of the connection, or of the last one.
    generation: u64,
    wait: Duration,
    retry_at: Option<Instant>,
    /// Changes that the server acknowledged on this connection, and how many of them a flush covers.
    acknowledged: u64,
    flushed: u64,
    /// Acknowledged changes may be gone.
    unsafe_since: Option<String>,
}

/// A connection to use for one request.
pub(super) struct Lease {
    pub(super) connection: Arc<Connection>,
    generation: u64,
    acknowledged: u64,
}

/// Connects and agrees on an export.
pub(super) fn connect(uri: &NbdUri) -> Result<(Socket, Export), Setback> {
    let socket = Socket::connect(&uri.server, CONNECT_LIMIT).map_err(Setback::Unreachable)?;
    let export = agree(&socket, &uri.export)?;
    Ok((socket, export))
}

/// Agrees on an export over a new connection.
pub(super) fn agree(socket: &Socket, export: &str) -> Result<Export, Setback> {
    negotiate(&mut Deadline::new(socket, CONNECT_LIMIT), export)
}

fn lost_before_flush() -> String {
    "the connection was lost before they were flushed".to_owned()
}

impl Link {
    pub(super) fn new(uri: Option<NbdUri>, socket: Socket, export: Export) -> io::Result<Self> {
        let state = State {
            connection: Some(Arc::new(Connection::new(socket, export.structured)?)),
            lost: String::new(),
            generation: 1,
            wait: FIRST_WAIT,
            retry_at: None,
            acknowledged: 0,
            flushed: 0,
            unsafe_since: None,
        };
        Ok(Self { uri, export, state: Mutex::new(state) })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The connection, made anew if need be.
    pub(super) fn lease(&self) -> io::Result<Lease> {
        let mut state = self.lock();
        if let Some(why) = state.connection.as_ref().and_then(|connection| connection.dead()) {
            state.connection = None;
            state.lost = why;
        }
        let connection = match state.connection.clone() {
            Some(connection) => connection,
            None => self.reconnect(&mut state)?,
        };
        Ok(Lease { connection, generation: state.generation, acknowledged: state.acknowledged })
    }

    fn reconnect(&self, state: &mut State) -> io::Result<Arc<Connection>> {
        let gone = |state: &State, more: &str| {
            let text = format!("the connection to the NBD server was lost ({}){more}", state.lost);
            io::Error::new(io::ErrorKind::NotConnected, text)
        };
        let Some(uri) = &self.uri else { return Err(gone(state, "")) };
        if state.retry_at.is_some_and(|at| Instant::now() < at) {
            return Err(gone(state, " and is not back yet"));
        }
        let result = connect(uri).and_then(|(socket, export)| {
            if export != self.export {
                let text = "has another size or other abilities than before";
                return Err(Setback::Refused(text.to_owned()));
            }
            Connection::new(socket, export.structured).map_err(Setback::from)
        });
        match result {
            Ok(connection) => {
                let connection = Arc::new(connection);
                state.connection = Some(connection.clone());
                state.generation += 1;
                if state.acknowledged != state.flushed {
                    state.unsafe_since.get_or_insert_with(lost_before_flush);
                }
                (state.acknowledged, state.flushed) = (0, 0);
                (state.wait, state.retry_at) = (FIRST_WAIT, None);
                Ok(connection)
            }
            Err(setback) => {
                state.retry_at = Some(Instant::now() + state.wait);
                state.wait = (state.wait * 2).min(LONGEST_WAIT);
                Err(gone(state, &format!(", and it {setback}")))
            }
        }
    }

    /// Notes that a change was acknowledged which is not durable yet.
    pub(super) fn acknowledged(&self, lease: &Lease) {
        let mut state = self.lock();
        if state.generation == lease.generation {
            state.acknowledged += 1;
        } else {
            state.unsafe_since.get_or_insert_with(lost_before_flush);
        }
    }

    /// Has a flush sent by `send`, and says whether its success is true.
    pub(super) fn flush(&self, send: impl FnOnce(&Connection) -> Result<(), Failure>) -> io::Result<()> {
        let lease = self.lease()?;
        self.check_safe()?;
        match send(&lease.connection) {
            Ok(()) => {
                let mut state = self.lock();
                if state.generation == lease.generation {
                    state.flushed = state.flushed.max(lease.acknowledged);
                }
                drop(state);
                self.check_safe()
            }
            Err(failure) => {
                if let Failure::Server(_) = failure {
                    // As a host that drops what it could not write: the next success would say nothing.
                    self.lock().unsafe_since.get_or_insert_with(|| "an earlier flush failed".to_owned());
                }
                Err(failure.into())
            }
        }
    }

    fn check_safe(&self) -> io::Result<()> {
        match &self.lock().unsafe_since {
            None => Ok(()),
            Some(why) => Err(io::Error::other(format!("writes to the NBD server may be gone: {why}"))),
        }
    }

    /// Says good-bye to the server.
    pub(super) fn close(&self) {
        if let Some(connection) = self.lock().connection.take() {
            connection.close();
        }
    }
}

impl From<Failure> for io::Error {
    /// The server's numbers are those of the protocol, not of this host.
    fn from(failure: Failure) -> Self {
        let (kind, text) = match failure {
            Failure::Lost(why) => {
                return Self::new(
                    io::ErrorKind::ConnectionAborted,
                    format!("the connection to the NBD server was lost: {why}"),
                );
            }
            Failure::Server(1) => (io::ErrorKind::ReadOnlyFilesystem, "it is not permitted"),
            Failure::Server(5) => (io::ErrorKind::Other, "input or output failed"),
            Failure::Server(12) => (io::ErrorKind::Other, "it has no memory left"),
            Failure::Server(22) => (io::ErrorKind::Other, "the request is invalid"),
            Failure::Server(28) => (io::ErrorKind::StorageFull, "it has no space left"),
            Failure::Server(75) => (io::ErrorKind::Other, "the request is too large"),
            Failure::Server(95) => (io::ErrorKind::Unsupported, "it is not supported"),
            Failure::Server(108) => (io::ErrorKind::Other, "it is shutting down"),
            Failure::Server(other) => {
                return Self::other(format!("the NBD server says: error {other}"));
            }
        };
        Self::new(kind, format!("the NBD server says: {text}"))
    }
}
