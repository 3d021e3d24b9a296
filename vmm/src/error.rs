//! Why a machine could not be prepared or started.

use std::path::PathBuf;

use atoll_machine::backend::BackendError;

/// One clear line each: the thing, what was expected, what to do.
#[derive(Debug, thiserror::Error)]
pub enum VmError {
    /// The name does not fit.
    #[error(
        "machine name '{0}' is not valid; use 1 to 64 letters, digits, '-', '_' or '.', not starting with '.' or '-'"
    )]
    Name(String),
    /// A file could not be read.
    #[error("{what} {}: {why}", path.display())]
    File {
        /// `kernel` or `initrd`.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// What is wrong and what to do.
        why: String,
    },
    /// A kernel that cannot be started.
    #[error("kernel {}: {source}", path.display())]
    Kernel {
        /// The file.
        path: PathBuf,
        /// The loader's words.
        source: atoll_firmware::LoadError,
    },
    /// A disk that cannot be used; the words name the image.
    #[error("{0}")]
    Disk(String),
    /// More memory than can be had, or less than a machine needs.
    #[error("{0}")]
    Memory(String),
    /// Too many or too few processors.
    #[error("{asked} CPUs asked for; a machine has 1 to {max}")]
    Cpus {
        /// What was asked for.
        asked: u64,
        /// The most.
        max: u32,
    },
    /// A CPU model that does not exist or that this host cannot give.
    #[error("{0}")]
    Model(String),
    /// Host processors that do not exist or may not be used.
    #[error("{0}")]
    Pinning(String),
    /// An accelerator that this host or version does not have.
    #[error("{0}")]
    Accelerator(String),
    /// Nothing to start.
    #[error("no kernel given; name one with --kernel FILE")]
    NothingToBoot,
    /// Too many disks.
    #[error("{asked} disks asked for; a machine has at most {max}")]
    Disks {
        /// What was asked for.
        asked: usize,
        /// The most.
        max: usize,
    },
    /// A network interface that cannot be had.
    #[error("{0}")]
    Network(String),
    /// Too many network interfaces.
    #[error("{asked} network interfaces asked for; a machine has at most {max}")]
    Networks {
        /// What was asked for.
        asked: usize,
        /// The most.
        max: usize,
    },
    /// The host refused something.
    #[error("{what}: {source}")]
    Host {
        /// What was attempted.
        what: &'static str,
        /// The host's error.
        source: std::io::Error,
    },
    /// The engine refused something.
    #[error(transparent)]
    Backend(#[from] BackendError),
    /// A contradiction between our own parts: a bug.
    #[error("cannot build the machine: {0}")]
    Build(String),
}

impl VmError {
    /// Whether the user's input is at fault (exit code 2) rather than the host or Atoll.
    pub fn is_input(&self) -> bool {
        match self {
            Self::Host { .. } | Self::Build(_) => false,
            Self::Backend(error) => matches!(error, BackendError::MissingFeatures { .. }),
            _ => true,
        }
    }

    /// For `map_err` on host calls.
    pub(crate) fn host(what: &'static str) -> impl FnOnce(std::io::Error) -> Self {
        move |source| Self::Host { what, source }
    }

    /// For `map_err` on contradictions between our own parts.
    pub(crate) fn build(error: impl std::fmt::Display) -> Self {
        Self::Build(error.to_string())
    }
}
