//! The machine's side: starts the network's process, gives the machine its port, and notices when the process is
//! gone.
//!
//! # States
//!
//! ```text
//!   start ──▶ Starting ──Ready──▶ Running ──process ends──▶ Dead: one log line, the port's link is down,
//!                │ Failed, ends      │                            requests fail
//!                ▼                   ▼ drop
//!              error               the process is killed and waited for
//! ```
//!
//! A network that died is not started again: its flows are gone, and who made it die would do it again.
//!
//! # Locks
//!
//! `control` is held for a request and its reply, `child` for looking at the process, also under `control`. The watcher
//! thread takes `child` only.

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::process::{CommandExt as _, ExitStatusExt as _};
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use atoll_foundation::EventFd;
use atoll_foundation::sync::lock;
use atoll_network::ring::{self, DEFAULT_RING_BYTES, RingError, RingLink, RingPort};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, socketpair, sockopt};

use crate::config::{ConfigError, Forward, UserNetConfig};
use crate::control::{Reply, Request, receive, send};
use crate::nat::{GIVEN, TAKEN};
use crate::stats::Stats;

/// The argument that has the program be a network's process.
pub const VERB: &str = "network-user";
/// How long the process may take to start or to answer.
const PATIENCE: Duration = Duration::from_secs(10);

/// What can go wrong with a network's process; each message is one line.
#[derive(Debug, thiserror::Error)]
pub enum UserNetError {
    /// It cannot be.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The process says why it cannot.
    #[error("{0}")]
    Refused(String),
    /// The program cannot be started.
    #[error("network {name}: '{program}' cannot be started: {source}")]
    Spawn {
        /// The network.
        name: String,
        /// The program.
        program: String,
        /// The host's error.
        source: io::Error,
    },
    /// The process is gone.
    #[error("network {name}: its process has ended ({status})")]
    Gone {
        /// The network.
        name: String,
        /// How, as far as it is known.
        status: String,
    },
    /// The process does not answer, or not sensibly.
    #[error("network {name}: its process did not answer: {source}")]
    Control {
        /// The network.
        name: String,
        /// The host's error.
        source: io::Error,
    },
    /// No ring.
    #[error(transparent)]
    Ring(#[from] RingError),
}

struct Shared {
    name: String,
    child: Mutex<Child>,
    /// The owner is about to kill it.
    ending: AtomicBool,
    dead: AtomicBool,
}

/// A running network. Dropping it ends the process.
pub struct UserNet {
    shared: Arc<Shared>,
    control: Mutex<OwnedFd>,
    stop: Arc<EventFd>,
    watcher: Option<JoinHandle<()>>,
}

impl std::fmt::Debug for UserNet {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("UserNet").field("name", &self.shared.name).finish_non_exhaustive()
    }
}

impl UserNet {
    /// Starts `program` with the argument [`VERB`] as the network's process and waits until it is ready: forwards
    /// are bound then. The port is for the machine's device.
    pub fn start(program: &Path, config: UserNetConfig) -> Result<(Self, RingPort), UserNetError> {
        let mut command = Command::new(program);
        command.arg(VERB);
        Self::start_command(command, config)
    }

    /// As [`UserNet::start`], and nobody waits for the process' end until [`UserNet::supervise`]: this process has as
    /// many threads afterwards as before.
    pub fn start_unsupervised(
        program: &Path,
        config: UserNetConfig,
    ) -> Result<(Self, RingPort), UserNetError> {
        let mut command = Command::new(program);
        command.arg(VERB);
        Self::launch(command, config)
    }

    /// As [`UserNet::start`], with a command of the caller's. Its standard input and output are replaced.
    pub fn start_command(command: Command, config: UserNetConfig) -> Result<(Self, RingPort), UserNetError> {
        let (mut network, port) = Self::launch(command, config)?;
        network.supervise(port.link())?;
        Ok((network, port))
    }

    /// Starts the thread that waits for the process' end and then takes the port's link down. Once.
    pub fn supervise(&mut self, link: RingLink) -> Result<(), UserNetError> {
        let watcher = self.watch(link);
        let failed = |source| UserNetError::Control { name: self.shared.name.clone(), source };
        self.watcher = Some(watcher.map_err(failed)?);
        Ok(())
    }

    fn launch(mut command: Command, config: UserNetConfig) -> Result<(Self, RingPort), UserNetError> {
        let addresses = config.check()?;
        let name = config.name.clone();
        let (port, setup) = ring::create(config.queue_pairs, DEFAULT_RING_BYTES)?;
        let port = port
            .with_name(format!("user network {name}"))
            .with_mtu(addresses.mtu)
            .with_offloads(TAKEN, GIVEN);
        let host = |source: io::Error| UserNetError::Control { name: name.clone(), source };
        let (control, theirs) = control_pair().map_err(host)?;
        // Ctrl-C in a terminal is for the machine, which lets go of its network when it ends.
        command.stdin(Stdio::from(theirs)).stdout(Stdio::null()).process_group(0);
        let spawned = command.spawn();
        let program = command.get_program().to_string_lossy().into_owned();
        // The command holds the other end of the control socket, which has to be gone to notice the process' end.
        drop(command);
        let child = spawned.map_err(|source| UserNetError::Spawn { name: name.clone(), program, source })?;
        let shared = Arc::new(Shared {
            name: name.clone(),
            child: Mutex::new(child),
            ending: AtomicBool::new(false),
            dead: AtomicBool::new(false),
        });
        let stop = Arc::new(EventFd::new().map_err(host)?);
        let network = Self { shared, control: Mutex::new(control), stop, watcher: None };
        // Sent, they are the other process': its end is noticed by their being gone.
        let fds = setup.to_fds();
        let reply = network.ask(&Request::Start(Box::new(config)), &fds);
        drop(fds);
        match reply? {
            Reply::Ready => {}
            Reply::Failed(message) => return Err(UserNetError::Refused(message)),
            _ => return Err(host(io::Error::from(io::ErrorKind::InvalidData))),
        }
        Ok((network, port))
    }

    /// Starts the thread that waits for the process' end.
    fn watch(&self, link: RingLink) -> io::Result<JoinHandle<()>> {
        let control = lock(&self.control).try_clone()?;
        let (shared, stop) = (self.shared.clone(), self.stop.clone());
        atoll_foundation::threads::spawn("network-watch", move || {
            loop {
                // No events of the control socket but its end, which is always told.
                let mut fds = [PollFd::new(&control, PollFlags::empty()), PollFd::new(&*stop, PollFlags::IN)];
                match poll(&mut fds, None) {
                    Ok(_) | Err(rustix::io::Errno::INTR) => {}
                    Err(error) => {
                        tracing::error!("network {}: its process cannot be watched: {error}", shared.name);
                        return;
                    }
                }
                let [ended, stopped] = fds.map(|fd| fd.revents());
                if !stopped.is_empty() || shared.ending.load(Ordering::Acquire) {
                    return;
                }
                if !ended.is_empty() {
                    break;
                }
            }
            shared.dead.store(true, Ordering::Release);
            let status = shared.status();
            tracing::error!(
                "network {}: its process has ended ({status}); the link is down from now on",
                shared.name
            );
            link.end(format!("its process has ended ({status})"));
        })
    }

    /// A request and its reply.
    fn ask(&self, request: &Request, fds: &[OwnedFd]) -> Result<Reply, UserNetError> {
        let name = || self.shared.name.clone();
        let gone = || UserNetError::Gone { name: name(), status: self.shared.status() };
        let control = lock(&self.control);
        if self.shared.dead.load(Ordering::Acquire) {
            return Err(gone());
        }
        let failed = |source: io::Error| match source.kind() {
            io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset => gone(),
            io::ErrorKind::WouldBlock => {
                // It hangs. A reply that came later would be taken for that of the next request.
                let _ = lock(&self.shared.child).kill();
                UserNetError::Control { name: name(), source }
            }
            _ => UserNetError::Control { name: name(), source },
        };
        send(&*control, request, fds, SendFlags::empty()).map_err(failed)?;
        match receive::<Reply>(&*control, RecvFlags::empty()).map_err(failed)? {
            Some((reply, _)) => Ok(reply),
            None => Err(gone()),
        }
    }

    fn done(&self, request: &Request) -> Result<(), UserNetError> {
        match self.ask(request, &[])? {
            Reply::Done => Ok(()),
            Reply::Failed(message) => Err(UserNetError::Refused(message)),
            _ => Err(UserNetError::Control {
                name: self.shared.name.clone(),
                source: io::ErrorKind::InvalidData.into(),
            }),
        }
    }

    /// Forwards another port of the host.
    pub fn forward_add(&self, forward: Forward) -> Result<(), UserNetError> {
        self.done(&Request::AddForward(forward))
    }

    /// Forwards a port no longer; found by its protocol and the host's address.
    pub fn forward_remove(&self, forward: Forward) -> Result<(), UserNetError> {
        self.done(&Request::RemoveForward(forward))
    }

    /// The network's counters.
    pub fn stats(&self) -> Result<Stats, UserNetError> {
        match self.ask(&Request::Stats, &[])? {
            Reply::Stats(stats) => Ok(*stats),
            Reply::Failed(message) => Err(UserNetError::Refused(message)),
            _ => Err(UserNetError::Control {
                name: self.shared.name.clone(),
                source: io::ErrorKind::InvalidData.into(),
            }),
        }
    }

    /// Whether the process has not ended.
    pub fn is_alive(&self) -> bool {
        !self.shared.dead.load(Ordering::Acquire)
    }

    /// The process' identifier.
    pub fn pid(&self) -> u32 {
        lock(&self.shared.child).id()
    }
}

impl Shared {
    /// How the process ended, or that it did not yet.
    fn status(&self) -> String {
        // It has let go of its control socket: it is ending, if it has not ended.
        for _ in 0..50 {
            match lock(&self.child).try_wait() {
                Ok(Some(status)) => return describe(status),
                Ok(None) => std::thread::sleep(Duration::from_millis(10)),
                Err(error) => return error.to_string(),
            }
        }
        "still running".to_owned()
    }
}

fn describe(status: ExitStatus) -> String {
    match (status.code(), status.signal()) {
        (Some(code), _) => format!("status {code}"),
        (None, Some(signal)) => format!("signal {signal}"),
        (None, None) => "unknown status".to_owned(),
    }
}

/// A pair of sockets; the first waits no longer than [`PATIENCE`].
fn control_pair() -> io::Result<(OwnedFd, OwnedFd)> {
    let (ours, theirs) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?;
    for timeout in [sockopt::Timeout::Recv, sockopt::Timeout::Send] {
        sockopt::set_socket_timeout(&ours, timeout, Some(PATIENCE))?;
    }
    Ok((ours, theirs))
}

impl Drop for UserNet {
    fn drop(&mut self) {
        self.shared.ending.store(true, Ordering::Release);
        self.stop.signal();
        if let Some(watcher) = self.watcher.take() {
            let _ = watcher.join();
        }
        let mut child = lock(&self.shared.child);
        // Fails only when it has ended already.
        let _ = child.kill();
        let _ = child.wait();
    }
}
