//! Taking rights away from this process, for good.
//!
//! A helper process that parses what strangers send needs a few descriptors that it holds already, and nothing
//! else of the host. [`enter`] leaves it that. Each layer stands for itself, so that a hole in one is not a way
//! out, and a host that lacks one still gives the others:
//!
//! | layer | what an attacker inside loses |
//! |---|---|
//! | [`Layer::User`] | root's files, where the process was started by root |
//! | [`Layer::UserNamespace`] | rights over anything outside, whatever it may still gain |
//! | [`Layer::EmptyRoot`] | every file and every named socket: the root folder is empty and read-only |
//! | [`Layer::Namespaces`] | shared memory and message queues of System V, the host's name |
//! | [`Layer::Capabilities`] | root's privileges, also of programs that it might execute |
//! | [`Layer::NoNewPrivileges`] | what set-user-id programs would give |
//! | [`Layer::Unreadable`] | core dumps; being traced by other processes of the same user |
//! | [`Layer::Limits`] | more descriptors, memory or processes than it needs |
//! | [`Layer::Landlock`] | files, signals to others and abstract sockets, by a second mechanism |
//! | [`Layer::SystemCalls`] | every system call that is not on its list ([`calls`]): it gets EPERM |
//!
//! The network namespace stays: [`enter`] is for the process that talks to the network. A process that does not
//! calls [`leave_network`] instead or as well.
//!
//! Both have to be called while the process has one thread only, because Linux keeps namespaces, capabilities and
//! filters per thread. Neither module holds a lock.
//!
//! Neighbours: `host::rights` only asks what would be possible. Documentation of the host: `user_namespaces(7)`,
//! `capabilities(7)`, `landlock(7)`, `seccomp(2)`.

mod calls;
mod capabilities;
mod filter;
mod landlock;
mod namespaces;
mod process;

use std::fmt;

pub use calls::Process;
pub use namespaces::{Network, leave_network};

/// What the process that is locked in needs.
#[derive(Clone, Copy, Debug)]
pub struct JailOptions {
    /// What kind of process it is: decides which system calls it may make.
    pub process: Process,
    /// Most descriptors it may have open; `None` leaves the limit as it is. More than the hard limit is cut to it.
    pub open_files: Option<u64>,
    /// Most bytes of address space; `None` leaves the limit as it is.
    pub address_space: Option<u64>,
    /// A layer that the host lacks is an error.
    pub strict: bool,
}

impl JailOptions {
    /// For `process`, with the limits left as they are, taking what the host has.
    pub fn new(process: Process) -> Self {
        Self { process, open_files: None, address_space: None, strict: false }
    }
}

/// One layer of a jail; the module's documentation says what each is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Layer {
    /// Not root.
    User,
    /// A user namespace of its own.
    UserNamespace,
    /// Nothing in the file system.
    EmptyRoot,
    /// IPC and host name of its own.
    Namespaces,
    /// No capability.
    Capabilities,
    /// No privileges from executing.
    NoNewPrivileges,
    /// No core dump, no tracer.
    Unreadable,
    /// Resource limits.
    Limits,
    /// Landlock.
    Landlock,
    /// The list of system calls.
    SystemCalls,
}

impl fmt::Display for Layer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::User => "unprivileged user",
            Self::UserNamespace => "user namespace",
            Self::EmptyRoot => "empty root",
            Self::Namespaces => "IPC and UTS namespaces",
            Self::Capabilities => "no capabilities",
            Self::NoNewPrivileges => "no new privileges",
            Self::Unreadable => "no core dumps and tracers",
            Self::Limits => "resource limits",
            Self::Landlock => "landlock",
            Self::SystemCalls => "system calls",
        })
    }
}

/// A layer that was asked for strictly and is not to be had.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the jail's layer '{layer}' is not to be had on this host: {why}")]
pub struct JailError {
    /// The layer.
    pub layer: Layer,
    /// The host's words.
    pub why: String,
}

/// Which layers hold.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct JailReport {
    holding: Vec<Layer>,
    missing: Vec<(Layer, String)>,
}

impl JailReport {
    /// Those that hold.
    pub fn holding(&self) -> &[Layer] {
        &self.holding
    }

    /// Those that the host lacks, with its words.
    pub fn missing(&self) -> &[(Layer, String)] {
        &self.missing
    }

    /// Whether `layer` holds.
    pub fn holds(&self, layer: Layer) -> bool {
        self.holding.contains(&layer)
    }

    fn add(&mut self, layer: Layer, result: Result<(), String>, strict: bool) -> Result<(), JailError> {
        match result {
            Ok(()) => self.holding.push(layer),
            Err(why) if strict => return Err(JailError { layer, why }),
            Err(why) => self.missing.push((layer, why)),
        }
        Ok(())
    }
}

impl fmt::Display for JailReport {
    /// One line.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let list: Vec<String> = self.holding.iter().map(Layer::to_string).collect();
        write!(f, "holding: {}", list.join(", "))?;
        if self.missing.is_empty() {
            return Ok(());
        }
        let list: Vec<String> = self.missing.iter().map(|(layer, why)| format!("{layer} ({why})")).collect();
        write!(f, "; missing: {}", list.join(", "))
    }
}

/// Locks this process in. Everything that it needs from the host must be open; it has one thread. There is no way
/// back.
///
/// # Errors
/// Only with [`JailOptions::strict`]: the first layer that the host lacks. What was done until then stays, so
/// the process should end.
pub fn enter(options: &JailOptions) -> Result<JailReport, JailError> {
    let mut report = JailReport::default();
    let mut add = |layer, result: Result<(), String>| report.add(layer, result, options.strict);
    let was_root = process::is_root();
    let threads = process::single_thread();
    add(Layer::Unreadable, process::make_unreadable())?;
    // Root makes the empty root folder with its own rights and only then becomes somebody else; everybody else needs
    // the rights inside a user namespace for it.
    let own = threads.clone().and_then(|()| namespaces::unshare_as_root());
    let as_root = own.is_ok();
    let mut root = Err("needs namespaces".to_owned());
    if as_root {
        root = namespaces::empty_root();
    }
    add(Layer::User, if was_root { process::become_nobody() } else { Ok(()) })?;
    let user = threads.clone().and_then(|()| namespaces::unshare_user(!as_root));
    if !as_root && user.is_ok() {
        root = namespaces::empty_root();
    }
    let namespaces = if as_root { own } else { user.clone() };
    add(Layer::UserNamespace, user)?;
    add(Layer::Namespaces, namespaces)?;
    add(Layer::EmptyRoot, root)?;
    add(Layer::Capabilities, capabilities::drop_all())?;
    add(Layer::NoNewPrivileges, process::no_new_privileges())?;
    add(Layer::Limits, process::limit(options.open_files, options.address_space))?;
    add(Layer::Landlock, landlock::refuse_everything())?;
    add(Layer::SystemCalls, filter::install(options.process))?;
    Ok(report)
}
