//! A disk as a document and as the command line writes it.

use std::path::PathBuf;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::{Limits, ParseLimitError};

/// A disk.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DiskSpec {
    /// Image file, block device, or address of a disk on a server.
    pub path: PathBuf,
    /// The guest may not write.
    #[serde(default)]
    pub readonly: bool,
    /// Format of the image; without it, the name decides: `.qcow2`, else raw.
    #[serde(default)]
    pub format: Option<DiskImageFormat>,
    /// What the guest's reads and writes may use.
    #[serde(default, skip_serializing_if = "Limits::is_none")]
    pub limits: Limits,
    /// What an error of the host leads to.
    #[serde(default)]
    pub on_error: OnDiskError,
    /// How the host carries requests out.
    #[serde(default)]
    pub io: DiskIo,
}

/// A format of disk images.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum DiskImageFormat {
    /// Byte N of the disk is byte N of the image.
    Raw,
    /// QEMU's copy-on-write format, versions 2 and 3.
    Qcow2,
}

/// What it leads to when the host has no space for a disk's data or fails to read or write it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum OnDiskError {
    /// The machine pauses and the request is kept; it goes on by itself when the host is mended.
    #[default]
    Pause,
    /// The guest is told that the request failed.
    Report,
}

/// How the host carries out a disk's requests.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum DiskIo {
    /// io_uring where the host allows it and the image is a file, threads otherwise.
    #[default]
    Auto,
    /// io_uring, or refuse.
    IoUring,
    /// Threads.
    Threads,
}

/// Text that does not describe a disk.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ParseDiskError {
    /// No path.
    #[error("'{0}' names no image; write PATH, or PATH with options such as PATH,readonly")]
    NoPath(String),
    /// An option nobody knows.
    #[error(
        "unknown disk option '{option}' in '{text}'; the options are: readonly, format=raw|qcow2, on-error=pause|report, io=auto|io-uring|threads, {}",
        Limits::OPTIONS
    )]
    UnknownOption {
        /// The option.
        option: String,
        /// The whole text.
        text: String,
    },
    /// A limit that is none.
    #[error("disk '{text}': {error}")]
    Limit {
        /// What is wrong with it.
        error: ParseLimitError,
        /// The whole text.
        text: String,
    },
}

impl FromStr for DiskSpec {
    type Err = ParseDiskError;

    /// `PATH[,readonly][,format=raw|qcow2][,on-error=pause|report][,io=auto|io-uring|threads]` and the options of
    /// [`Limits`]. A comma in a path is written twice.
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let protected = text.replace(",,", "\0");
        let mut parts = protected.split(',');
        let path = parts.next().unwrap_or_default().replace('\0', ",");
        if path.is_empty() {
            return Err(ParseDiskError::NoPath(text.to_owned()));
        }
        let mut disk = Self { path: path.into(), ..Self::default() };
        let limit = |error| ParseDiskError::Limit { error, text: text.to_owned() };
        for option in parts {
            let (key, value) = option.split_once('=').unwrap_or((option, ""));
            if !disk.set(option) && !disk.limits.option(key, value).map_err(limit)? {
                let option = option.replace('\0', ",");
                return Err(ParseDiskError::UnknownOption { option, text: text.to_owned() });
            }
        }
        disk.limits.check().map_err(limit)?;
        Ok(disk)
    }
}

impl DiskSpec {
    /// Takes an option with one of a few values. `false`: it is none.
    fn set(&mut self, option: &str) -> bool {
        match option {
            "readonly" => self.readonly = true,
            "format=raw" => self.format = Some(DiskImageFormat::Raw),
            "format=qcow2" => self.format = Some(DiskImageFormat::Qcow2),
            "on-error=pause" => self.on_error = OnDiskError::Pause,
            "on-error=report" => self.on_error = OnDiskError::Report,
            "io=auto" => self.io = DiskIo::Auto,
            "io=io-uring" => self.io = DiskIo::IoUring,
            "io=threads" => self.io = DiskIo::Threads,
            _ => return false,
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ByteSize;

    fn at(path: &str) -> DiskSpec {
        DiskSpec { path: path.into(), ..DiskSpec::default() }
    }

    #[test]
    fn disks_are_read_as_the_command_line_writes_them() {
        let disk: DiskSpec = "a.img".parse().unwrap();
        assert_eq!(disk, at("a.img"));
        let disk: DiskSpec = "odd,,name.img,readonly".parse().unwrap();
        assert_eq!(disk, DiskSpec { readonly: true, ..at("odd,name.img") });
        let disk: DiskSpec = "a.img,format=qcow2,on-error=report,io=threads".parse().unwrap();
        assert_eq!(
            disk,
            DiskSpec {
                format: Some(DiskImageFormat::Qcow2),
                on_error: OnDiskError::Report,
                io: DiskIo::Threads,
                ..at("a.img")
            }
        );
        assert!("a,format=vmdk".parse::<DiskSpec>().is_err());
        assert!(matches!("".parse::<DiskSpec>(), Err(ParseDiskError::NoPath(_))));
        assert!(matches!("a,fast".parse::<DiskSpec>(), Err(ParseDiskError::UnknownOption { .. })));
    }

    #[test]
    fn limits_are_options_like_others_and_checked_together() {
        let disk: DiskSpec =
            "a,bytes-per-second=10M,operations-per-second=500,operations-burst=50".parse().unwrap();
        let limits = Limits {
            bytes_per_second: Some(ByteSize(10 << 20)),
            operations_per_second: Some(500),
            operations_burst: Some(50),
            ..Limits::default()
        };
        assert_eq!(disk.limits, limits);
        let error = "a,bytes-burst=1M".parse::<DiskSpec>().unwrap_err();
        assert!(matches!(error, ParseDiskError::Limit { .. }));
        assert!(error.to_string().contains("bytes-per-second"), "{error}");
    }

    #[test]
    fn a_document_with_only_a_path_has_every_default_and_reads_back() {
        let disk: DiskSpec = serde_json::from_str(r#"{"path": "a"}"#).unwrap();
        assert_eq!(disk, at("a"));
        let full: DiskSpec = "a,operations-per-second=9,io=io-uring,on-error=report".parse().unwrap();
        let text = serde_json::to_string(&full).unwrap();
        assert_eq!(serde_json::from_str::<DiskSpec>(&text).unwrap(), full);
    }
}
