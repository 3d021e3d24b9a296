//! The one error type. Every text names the thing, what was expected and what to do.

use std::path::{Path, PathBuf};

/// What can go wrong while a guest is being obtained or built.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The host is not Debian or Ubuntu: there is no package manager this crate can drive.
    #[error(
        "no kernel given, and only Debian and Ubuntu hosts can obtain one by themselves ({missing} is not here).\n\
         Name two files of your own: atoll run --kernel vmlinuz --initrd initramfs"
    )]
    NoPackageManager {
        /// The program that was looked for.
        missing: &'static str,
    },
    /// Neither `XDG_CACHE_HOME` nor `HOME` names an absolute directory.
    #[error("no cache directory: set HOME or XDG_CACHE_HOME to an absolute path")]
    NoCacheDirectory,
    /// A file operation failed.
    #[error("cannot {action} {}: {source}", path.display())]
    Io {
        /// What was attempted, as a verb phrase.
        action: &'static str,
        /// The file or directory.
        path: PathBuf,
        /// The operating system's answer.
        source: std::io::Error,
    },
    /// A program could not be started because it is not installed.
    #[error("{program} is missing: install the package {package}")]
    MissingProgram {
        /// The program.
        program: String,
        /// The Debian package that has it.
        package: String,
    },
    /// A program ran and failed.
    #[error("{program} failed ({status}): {message}")]
    Command {
        /// The program, with its verb.
        program: String,
        /// How it ended.
        status: String,
        /// The last lines of its standard error.
        message: String,
    },
    /// The package lists know none of these packages.
    #[error("the package manager knows none of: {names}; check the host's package sources and its network")]
    NoPackage {
        /// Names tried, separated by commas.
        names: String,
    },
    /// A package lacks a file that it should have.
    #[error("package {package} has no {file}; remove {} and try again", tree.display())]
    Incomplete {
        /// The package.
        package: String,
        /// What was looked for in it.
        file: String,
        /// Where the package was unpacked.
        tree: PathBuf,
    },
    /// A kernel module could not be read.
    #[error("kernel module {}: {reason}", path.display())]
    Module {
        /// The module.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
}

impl Error {
    /// For `map_err`: wraps an I/O error with what was attempted on which path.
    pub(crate) fn io(action: &'static str, path: &Path) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.to_path_buf();
        move |source| Self::Io { action, path, source }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_host_without_a_package_manager_is_told_which_two_files_to_bring() {
        let text = Error::NoPackageManager { missing: "apt-get" }.to_string();
        assert!(text.contains("--kernel vmlinuz --initrd initramfs") && text.lines().count() <= 2, "{text}");
    }
}
