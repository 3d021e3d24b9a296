//! Why a verb could not do its work, and the exit code that says so.

use std::fmt;

/// Ends the process with one line on standard error.
#[derive(Debug)]
pub(crate) enum Failure {
    /// The user's input is at fault: exit code 2, nothing was started or written.
    Input(String),
    /// Something of ours or of the host's failed: exit code 1.
    Internal(anyhow::Error),
}

impl Failure {
    /// Wrong usage or input.
    pub(crate) fn input(why: impl fmt::Display) -> Self {
        Self::Input(why.to_string())
    }

    /// The process's exit code.
    pub(crate) fn exit_code(&self) -> u8 {
        match self {
            Self::Input(_) => 2,
            Self::Internal(_) => 1,
        }
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Input(why) => f.write_str(why),
            // The whole chain of causes on one line.
            Self::Internal(error) => write!(f, "{error:#}"),
        }
    }
}

impl From<anyhow::Error> for Failure {
    fn from(error: anyhow::Error) -> Self {
        Self::Internal(error)
    }
}

impl From<std::io::Error> for Failure {
    fn from(error: std::io::Error) -> Self {
        Self::Internal(error.into())
    }
}

impl From<atoll_vmm::VmError> for Failure {
    fn from(error: atoll_vmm::VmError) -> Self {
        if error.is_input() { Self::input(error) } else { Self::Internal(error.into()) }
    }
}
