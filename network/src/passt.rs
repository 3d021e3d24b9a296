//! passt: an unprivileged network of somebody else's making, where it is installed.
//!
//! passt (<https://passt.top>) is a program that turns a machine's frames into sockets. It talks over a unix stream
//! socket: each frame is preceded by its length, 32 bits, big-endian, in both directions (as QEMU's `-netdev stream`
//! does). There are no offloads and one pair.
//!
//! [`PasstPort::start`] starts it with one end of a socket pair as its standard input (`--fd 0`), so that no path
//! in the file system is needed and it ends with the machine's process, however that ends. [`PasstPort::connect`]
//! uses one that runs already.
//!
//! # Streams
//!
//! The socket takes and gives as many bytes as it likes, frames or not. Out: frames are appended to a buffer, which
//! is written as far as possible at the end of a batch; what is left follows when the socket is writable. A frame
//! that the buffer has no room for is [`Sent::Full`]. In: bytes are read into a buffer and looked at when a frame is
//! complete. The buffers have a fixed size; a length that no frame has ends the connection.
//!
//! Lock order: the outgoing and the incoming buffer each have a lock, never held together; the incoming one is held
//! while the caller looks at a frame.

use std::io::{self, BufRead, BufReader, Read};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStderr, Command, Stdio};
use std::sync::{Arc, Mutex, OnceLock};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use atoll_foundation::eventfd::wait_readable;
use atoll_foundation::sync::lock;
use atoll_foundation::{EventLoopHandle, log_limited};
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags};
use vm_memory::VolatileSlice;

use crate::header::{FrameHeader, Offloads};
use crate::port::{MAX_FRAME, Port, PortError, PortEvent, PortListener, Received, Sent, Taken, Watcher};
use crate::ready::{Direction, Ready};

/// Bytes of the length before each frame.
const LENGTH_BYTES: usize = 4;
/// The shortest frame there is: an Ethernet header.
const MIN_FRAME: usize = 14;
/// Size of each of the two buffers: several of the largest frames.
const BUFFER_BYTES: usize = 256 << 10;
/// passt's own limit for IP packets.
const MTU: u16 = 65_520;
/// How long passt may take until it answers. It reads its options and the host's routes, some milliseconds; after
/// this it is taken to be there if it has not ended.
const START_PATIENCE: Duration = Duration::from_secs(2);
/// Longest line of passt's that is passed on, in bytes.
const MAX_LINE: u64 = 1024;

/// Why there is no passt.
#[derive(Debug, thiserror::Error)]
pub enum PasstError {
    /// It is not installed.
    #[error(
        "{program} was not found; install passt (Debian, Ubuntu, Fedora: package 'passt'), or use --net user"
    )]
    NotInstalled {
        /// What was looked for.
        program: String,
    },
    /// It ended at once.
    #[error("passt did not start: {0}")]
    Ended(String),
    /// Nobody listens at the socket.
    #[error("cannot connect to passt at {path}: {source}; start it with: passt --foreground --socket {path}")]
    Connect {
        /// The socket.
        path: String,
        /// The host's error.
        source: io::Error,
    },
    /// The host failed.
    #[error("cannot start passt: {0}")]
    Host(#[from] io::Error),
}

/// How to start passt.
#[derive(Clone, Debug, Default)]
pub struct PasstOptions {
    /// The program; `None`: `passt`, looked for in `PATH`.
    pub program: Option<PathBuf>,
    /// More arguments, such as forwarded ports (`-t 2222:22`).
    pub arguments: Vec<String>,
}

/// A connection to passt as a port. Dropping it ends a passt that it has started.
pub struct PasstPort {
    inner: Arc<Inner>,
    process: Mutex<Option<Process>>,
}

/// A passt of our own.
struct Process {
    child: Child,
    /// What it prints, until somebody reads it.
    unread: Option<ChildStderr>,
    log: Option<JoinHandle<()>>,
}

struct Inner {
    ready: Ready,
    out: Mutex<Outgoing>,
    inward: Mutex<Incoming>,
    ended: OnceLock<String>,
    /// The last line that passt has printed.
    last_line: Arc<Mutex<String>>,
    watcher: Watcher,
}

#[derive(Default)]
struct Outgoing {
    /// Frames with their lengths; the first `sent` bytes are gone.
    bytes: Vec<u8>,
    sent: usize,
    /// The device waits for room.
    full: bool,
}

struct Incoming {
    bytes: Box<[u8]>,
    /// What was read and not yet taken.
    start: usize,
    end: usize,
}

impl PasstPort {
    /// Starts passt and waits until it answers. It inherits this process' network namespace, so it has to be
    /// started before the process leaves the host's; no thread is started, which would keep it there. What passt prints
    /// is passed on as warnings from [`Port::watch`] on.
    pub fn start(options: &PasstOptions) -> Result<Self, PasstError> {
        let program = options.program.clone().unwrap_or_else(|| PathBuf::from("passt"));
        let (own, theirs) = UnixStream::pair()?;
        let spawned = Command::new(&program)
            .args(["--foreground", "--quiet", "--fd", "0"])
            .args(&options.arguments)
            .stdin(Stdio::from(OwnedFd::from(theirs)))
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn();
        let mut child = spawned.map_err(|error| match error.kind() {
            io::ErrorKind::NotFound => PasstError::NotInstalled { program: program.display().to_string() },
            _ => PasstError::Host(error),
        })?;
        let last_line: Arc<Mutex<String>> = Arc::default();
        let unread = child.stderr.take();
        let process = Process { child, unread, log: None };
        if let Err(error) = await_answer(&own) {
            return Err(process.why_ended(&last_line, error));
        }
        let inner = Inner::new(own, last_line)?;
        Ok(Self { inner, process: Mutex::new(Some(process)) })
    }

    /// Connects to the passt that listens at `path`.
    pub fn connect(path: &Path) -> Result<Self, PasstError> {
        let stream = UnixStream::connect(path)
            .map_err(|source| PasstError::Connect { path: path.display().to_string(), source })?;
        Ok(Self { inner: Inner::new(stream, Arc::default())?, process: Mutex::new(None) })
    }

    fn check(&self, pair: u16) -> Result<(), PortError> {
        if let Some(reason) = self.inner.ended.get() {
            return Err(PortError::Gone { port: self.name(), reason: reason.clone() });
        }
        if pair == 0 {
            return Ok(());
        }
        let source = io::Error::new(io::ErrorKind::InvalidInput, format!("it has no pair {pair}"));
        Err(PortError::Host { port: self.name(), source })
    }

    fn gone(&self, End(why): End) -> PortError {
        self.inner.end(why);
        let reason = self.inner.ended.get().cloned().unwrap_or_default();
        PortError::Gone { port: self.name(), reason }
    }
}

impl Drop for PasstPort {
    fn drop(&mut self) {
        if let Some(mut process) = lock(&self.process).take() {
            let _ = process.child.kill();
            process.join();
        }
    }
}

impl Process {
    /// Waits for the end of the process and of what it printed.
    fn join(&mut self) -> String {
        let status = self.child.wait().map_or_else(|error| error.to_string(), |status| status.to_string());
        if let Some(log) = self.log.take() {
            let _ = log.join();
        }
        status
    }

    /// Passes on what it prints, on a thread of its own.
    fn read_log(&mut self, last_line: &Arc<Mutex<String>>) {
        if let Some(stderr) = self.unread.take() {
            self.log = log_lines(stderr, Arc::clone(last_line));
        }
    }

    fn why_ended(mut self, last_line: &Arc<Mutex<String>>, error: io::Error) -> PasstError {
        if error.kind() != io::ErrorKind::UnexpectedEof {
            let _ = self.child.kill();
            self.join();
            return PasstError::Host(error);
        }
        self.read_log(last_line);
        let status = self.join();
        let line = lock(last_line).clone();
        PasstError::Ended(if line.is_empty() { status } else { line })
    }
}

/// Passes what passt prints on, line by line, on a thread of its own.
fn log_lines(stderr: ChildStderr, last: Arc<Mutex<String>>) -> Option<JoinHandle<()>> {
    let read = move || {
        let mut reader = BufReader::new(stderr);
        let mut line = Vec::new();
        loop {
            line.clear();
            match reader.by_ref().take(MAX_LINE).read_until(b'\n', &mut line) {
                Ok(0) | Err(_) => return,
                Ok(_) => {}
            }
            let text = String::from_utf8_lossy(&line).trim().to_owned();
            // What passt says about a host without a system logger is not about the network.
            if text.is_empty() || text.contains("to syslog") {
                continue;
            }
            log_limited!(warn, "passt: {}", text.escape_debug());
            *lock(&last) = text;
        }
    };
    std::thread::Builder::new().name("passt-log".to_owned()).spawn(read).ok()
}

/// Asks passt for an address with ARP, which it answers whatever the address, and takes the answer. An error of the
/// kind `UnexpectedEof` means that it has ended.
fn await_answer(stream: &UnixStream) -> io::Result<()> {
    // A probe (RFC 5227): from no address, with a locally administered Ethernet address, for one that is nobody's
    // (RFC 5737).
    const PROBE: [u8; 42] = [
        0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 2, 0, 0, 0, 0, 1, 8, 6, // Ethernet
        0, 1, 8, 0, 6, 4, 0, 1, // ARP request
        2, 0, 0, 0, 0, 1, 0, 0, 0, 0, // from
        0, 0, 0, 0, 0, 0, 198, 51, 100, 1, // for
    ];
    let ended = || io::Error::from(io::ErrorKind::UnexpectedEof);
    let mut probe = Vec::from((PROBE.len() as u32).to_be_bytes());
    probe.extend(PROBE);
    match rustix::net::send(stream, &probe, SendFlags::NOSIGNAL) {
        Ok(_) => {}
        Err(Errno::PIPE | Errno::CONNRESET) => return Err(ended()),
        Err(error) => return Err(error.into()),
    }
    let deadline = Instant::now() + START_PATIENCE;
    let mut frame = Vec::new();
    loop {
        let mut length = [0; LENGTH_BYTES];
        if !fill(stream, &mut length, deadline)? {
            // Without IPv4 there is no ARP, and no answer. It has not ended.
            return Ok(());
        }
        let len = u32::from_be_bytes(length) as usize;
        if !(MIN_FRAME..=MAX_FRAME).contains(&len) {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "it does not speak passt's protocol"));
        }
        frame.resize(len, 0);
        if !fill(stream, &mut frame, deadline)? {
            return Err(io::ErrorKind::TimedOut.into());
        }
        // Others, such as router advertisements, come before a guest could hear them.
        if frame[..6] == PROBE[6..12] && frame[12..14] == PROBE[12..14] {
            return Ok(());
        }
    }
}

/// Reads exactly as many bytes as `buffer` has. False: not one came until `deadline`. `TimedOut`: some did.
fn fill(stream: &UnixStream, buffer: &mut [u8], deadline: Instant) -> io::Result<bool> {
    let mut have = 0;
    while have < buffer.len() {
        let patience = deadline.saturating_duration_since(Instant::now());
        if !wait_readable(std::os::fd::AsFd::as_fd(stream), Some(patience))? {
            return if have == 0 { Ok(false) } else { Err(io::ErrorKind::TimedOut.into()) };
        }
        match rustix::net::recv(stream, &mut buffer[have..], RecvFlags::DONTWAIT) {
            Ok((0, _)) | Err(Errno::CONNRESET) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok((count, _)) => have += count,
            Err(Errno::INTR | Errno::AGAIN) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(true)
}

/// The connection ends: why.
struct End(String);

impl From<Errno> for End {
    fn from(errno: Errno) -> Self {
        match errno {
            Errno::PIPE | Errno::CONNRESET => Self("it has closed the connection".to_owned()),
            other => Self(io::Error::from(other).to_string()),
        }
    }
}

impl Inner {
    fn new(stream: UnixStream, last_line: Arc<Mutex<String>>) -> io::Result<Arc<Self>> {
        stream.set_nonblocking(true)?;
        let inward = Incoming { bytes: vec![0; BUFFER_BYTES].into_boxed_slice(), start: 0, end: 0 };
        Ok(Arc::new(Self {
            ready: Ready::new(stream.into()),
            out: Mutex::default(),
            inward: Mutex::new(inward),
            ended: OnceLock::new(),
            last_line,
            watcher: Watcher::default(),
        }))
    }

    /// Remembers the end and tells of it; the first reason stays.
    fn end(&self, why: String) {
        let line = lock(&self.last_line).clone();
        let reason = if line.is_empty() { why } else { format!("{why}; its last words: {line}") };
        if self.ended.set(reason).is_err() {
            return;
        }
        self.watcher.post(PortEvent::Link(false));
    }

    /// Writes what the socket takes, and asks to be told when it takes more.
    fn write(&self, out: &mut Outgoing) -> Result<(), End> {
        while out.sent < out.bytes.len() {
            match rustix::net::send(self.ready.fd(), &out.bytes[out.sent..], SendFlags::NOSIGNAL) {
                Ok(count) => out.sent += count,
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => {
                    self.ready.want(Direction::Write);
                    return Ok(());
                }
                Err(error) => return Err(error.into()),
            }
        }
        out.bytes.clear();
        out.sent = 0;
        Ok(())
    }

    /// The socket takes more, on the event loop's thread. Returns whether the device has to hear of it.
    fn writable(&self) -> bool {
        let mut out = lock(&self.out);
        if let Err(End(why)) = self.write(&mut out) {
            self.end(why);
            return true;
        }
        out.left() <= BUFFER_BYTES / 2 && std::mem::take(&mut out.full)
    }

    /// Reads until there is a whole frame: where it is. `None`: there is none yet.
    fn read(&self, inward: &mut Incoming) -> Result<Option<(usize, usize)>, End> {
        loop {
            if let Some(place) = inward.frame()? {
                return Ok(Some(place));
            }
            inward.make_room();
            match rustix::net::recv(self.ready.fd(), &mut inward.bytes[inward.end..], RecvFlags::empty()) {
                Ok((0, _)) => return Err(End("it has closed the connection".to_owned())),
                Ok((count, _)) => inward.end = (inward.end + count).min(inward.bytes.len()),
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => {
                    self.ready.want(Direction::Read);
                    return Ok(None);
                }
                Err(error) => return Err(error.into()),
            }
        }
    }
}

impl Outgoing {
    /// Bytes that are still to be written.
    fn left(&self) -> usize {
        self.bytes.len() - self.sent
    }

    fn has_room(&self, len: usize) -> bool {
        self.left() + LENGTH_BYTES + len <= BUFFER_BYTES
    }

    fn append(&mut self, frame: &[VolatileSlice<'_>], len: usize) {
        if self.bytes.len() + LENGTH_BYTES + len > BUFFER_BYTES {
            self.bytes.drain(..self.sent);
            self.sent = 0;
        }
        self.bytes.extend((len as u32).to_be_bytes());
        for piece in frame {
            let start = self.bytes.len();
            self.bytes.resize(start + piece.len(), 0);
            piece.copy_to(&mut self.bytes[start..]);
        }
    }
}

impl Incoming {
    /// Where the first frame is, if all of it is there.
    fn frame(&self) -> Result<Option<(usize, usize)>, End> {
        let Some((length, rest)) = self.bytes[self.start..self.end].split_first_chunk::<LENGTH_BYTES>()
        else {
            return Ok(None);
        };
        let len = u32::from_be_bytes(*length) as usize;
        if !(MIN_FRAME..=MAX_FRAME).contains(&len) {
            return Err(End(format!("it sent a frame of {len} bytes, which none can have")));
        }
        let start = self.start + LENGTH_BYTES;
        Ok((rest.len() >= len).then_some((start, start + len)))
    }

    /// Makes sure that there is room behind what was read for the rest of any frame.
    fn make_room(&mut self) {
        if self.start == self.end {
            (self.start, self.end) = (0, 0);
        } else if self.bytes.len() - self.start < LENGTH_BYTES + MAX_FRAME {
            self.bytes.copy_within(self.start..self.end, 0);
            (self.start, self.end) = (0, self.end - self.start);
        }
    }
}

impl Port for PasstPort {
    fn name(&self) -> String {
        "passt".to_owned()
    }

    fn queue_pairs(&self) -> u16 {
        1
    }

    fn mtu(&self) -> Option<u16> {
        Some(MTU)
    }

    fn send_offloads(&self) -> Offloads {
        Offloads::NONE
    }

    fn receive_offloads(&self) -> Offloads {
        Offloads::NONE
    }

    fn set_receive_offloads(&self, _offloads: Offloads) -> Result<(), PortError> {
        self.check(0)
    }

    fn watch(&self, events: &EventLoopHandle, listener: PortListener) -> io::Result<()> {
        self.inner.watcher.set(events, listener.clone())?;
        if let Some(process) = lock(&self.process).as_mut() {
            process.read_log(&self.inner.last_line);
        }
        let weak = Arc::downgrade(&self.inner);
        self.inner.ready.watch(events, move |direction| match direction {
            Direction::Read => listener(PortEvent::Readable(0)),
            Direction::Write => {
                if weak.upgrade().is_some_and(|inner| inner.writable()) {
                    listener(PortEvent::Writable(0));
                }
            }
        })
    }

    fn send(&self, pair: u16, _header: &FrameHeader, frame: &[VolatileSlice<'_>]) -> Result<Sent, PortError> {
        self.check(pair)?;
        let len = frame.iter().fold(0usize, |sum, piece| sum.saturating_add(piece.len()));
        if !(MIN_FRAME..=MAX_FRAME).contains(&len) {
            return Ok(Sent::Done);
        }
        let mut out = lock(&self.inner.out);
        if !out.has_room(len) {
            self.inner.write(&mut out).map_err(|end| self.gone(end))?;
            if !out.has_room(len) {
                out.full = true;
                return Ok(Sent::Full);
            }
        }
        out.append(frame, len);
        Ok(Sent::Done)
    }

    fn flush(&self, _pair: u16) {
        let result = self.inner.write(&mut lock(&self.inner.out));
        if let Err(End(why)) = result {
            self.inner.end(why);
        }
    }

    fn receive(
        &self,
        pair: u16,
        take: &mut dyn FnMut(&FrameHeader, &[u8]) -> Taken,
    ) -> Result<Received, PortError> {
        self.check(pair)?;
        let mut inward = lock(&self.inner.inward);
        let found = self.inner.read(&mut inward).map_err(|end| self.gone(end))?;
        let Some((start, end)) = found else { return Ok(Received::Empty) };
        if take(&FrameHeader::default(), &inward.bytes[start..end]) == Taken::NotNow {
            return Ok(Received::Kept);
        }
        inward.start = end;
        Ok(Received::Frame)
    }

    fn link_up(&self) -> bool {
        self.inner.ended.get().is_none()
    }
}

#[cfg(test)]
mod tests;
