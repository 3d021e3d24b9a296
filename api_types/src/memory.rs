//! How much RAM a machine has, and how the host provides it.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::{ByteSize, ParseSizeError};

/// Which pages of the host hold guest memory. Larger pages mean fewer page-table walks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub enum HugePages {
    /// Transparent huge pages if the host happens to give them.
    #[default]
    Auto,
    /// Pages of 4 KiB, whatever the host would give.
    Off,
    /// Transparent huge pages, or refuse.
    Transparent,
    /// From the host's pool of 2 MiB pages, or refuse.
    Size2M,
    /// From the host's pool of 1 GiB pages, or refuse.
    Size1G,
}

const HUGE_PAGES: [(HugePages, &str); 5] = [
    (HugePages::Auto, "auto"),
    (HugePages::Off, "off"),
    (HugePages::Transparent, "transparent"),
    (HugePages::Size2M, "2M"),
    (HugePages::Size1G, "1G"),
];

impl HugePages {
    /// Size in bytes of the pool's pages, for those that come from a pool.
    pub fn pool(self) -> Option<u64> {
        match self {
            Self::Size2M => Some(2 << 20),
            Self::Size1G => Some(1 << 30),
            Self::Auto | Self::Off | Self::Transparent => None,
        }
    }
}

impl fmt::Display for HugePages {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(HUGE_PAGES.iter().find(|(kind, _)| kind == self).map_or("auto", |(_, name)| name))
    }
}

impl FromStr for HugePages {
    type Err = ParseMemoryError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let found = HUGE_PAGES.iter().find(|(_, name)| name.eq_ignore_ascii_case(text));
        found.map(|(kind, _)| *kind).ok_or_else(|| ParseMemoryError::HugePages(text.to_owned()))
    }
}

impl From<HugePages> for String {
    fn from(kind: HugePages) -> Self {
        kind.to_string()
    }
}

impl TryFrom<String> for HugePages {
    type Error = ParseMemoryError;
    fn try_from(text: String) -> Result<Self, Self::Error> {
        text.parse()
    }
}

/// How the host provides guest memory. Nothing of it shows in the guest.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MemoryOptions {
    /// Which pages hold it.
    #[serde(default)]
    pub hugepages: HugePages,
    /// It is never written to swap (`mlock2`): every page is locked once it is touched.
    #[serde(default)]
    pub lock: bool,
    /// All of it is obtained before the machine starts, instead of page by page as the guest touches it.
    #[serde(default)]
    pub prefault: bool,
    /// It comes from this NUMA node of the host only.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub numa: Option<u32>,
}

/// A machine's memory as the command line writes it: `SIZE[,hugepages=KIND][,lock][,prefault][,numa=NODE]`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemorySpec {
    /// Size of the RAM.
    pub size: ByteSize,
    /// How the host provides it.
    pub options: MemoryOptions,
}

/// Text that does not describe a machine's memory.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ParseMemoryError {
    /// The size is none.
    #[error(transparent)]
    Size(#[from] ParseSizeError),
    /// Pages that do not exist.
    #[error("'{0}' is no kind of huge pages; the kinds are: auto, off, transparent, 2M, 1G")]
    HugePages(String),
    /// Not the number of a node.
    #[error("'{0}' is not the number of a NUMA node; write numa=0, for example")]
    Node(String),
    /// An option nobody knows.
    #[error("unknown memory option '{0}'; the options are: hugepages=KIND, lock, prefault, numa=NODE")]
    Unknown(String),
    /// An option given twice.
    #[error("memory option '{0}' is given twice")]
    Twice(String),
}

impl FromStr for MemorySpec {
    type Err = ParseMemoryError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let mut parts = text.split(',');
        let size = parts.next().unwrap_or_default().parse()?;
        let (mut options, mut seen) = (MemoryOptions::default(), Vec::new());
        for part in parts {
            let (key, value) = part.split_once('=').map_or((part, None), |(key, value)| (key, Some(value)));
            match (key, value) {
                ("hugepages", Some(kind)) => options.hugepages = kind.parse()?,
                ("numa", Some(node)) => {
                    let node = node.parse().map_err(|_| ParseMemoryError::Node(node.to_owned()))?;
                    options.numa = Some(node);
                }
                ("lock", None) => options.lock = true,
                ("prefault", None) => options.prefault = true,
                _ => return Err(ParseMemoryError::Unknown(part.to_owned())),
            }
            if seen.contains(&key) {
                return Err(ParseMemoryError::Twice(key.to_owned()));
            }
            seen.push(key);
        }
        Ok(Self { size, options })
    }
}

impl fmt::Display for MemorySpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let MemoryOptions { hugepages, lock, prefault, numa } = self.options;
        write!(f, "{}", self.size)?;
        if hugepages != HugePages::Auto {
            write!(f, ",hugepages={hugepages}")?;
        }
        if lock {
            f.write_str(",lock")?;
        }
        if prefault {
            f.write_str(",prefault")?;
        }
        numa.map_or(Ok(()), |node| write!(f, ",numa={node}"))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn parse(text: &str) -> Result<MemorySpec, ParseMemoryError> {
        text.parse()
    }

    #[test]
    fn a_plain_size_has_every_default() {
        let memory = parse("512M").unwrap();
        assert_eq!(memory, MemorySpec { size: ByteSize(512 << 20), options: MemoryOptions::default() });
        assert_eq!(memory.to_string(), "512M");
    }

    #[test]
    fn options_are_read_in_any_order() {
        let memory = parse("4G,numa=1,prefault,hugepages=1g,lock").unwrap();
        let options =
            MemoryOptions { hugepages: HugePages::Size1G, lock: true, prefault: true, numa: Some(1) };
        assert_eq!(memory, MemorySpec { size: ByteSize(4 << 30), options });
        assert_eq!(memory.to_string(), "4G,hugepages=1G,lock,prefault,numa=1");
    }

    #[test]
    fn what_cannot_be_is_named() {
        assert!(matches!(parse("lots"), Err(ParseMemoryError::Size(_))));
        assert!(matches!(parse("1G,hugepages=4M"), Err(ParseMemoryError::HugePages(_))));
        assert!(matches!(parse("1G,numa=-1"), Err(ParseMemoryError::Node(_))));
        assert!(matches!(parse("1G,lock,lock"), Err(ParseMemoryError::Twice(_))));
        for text in ["1G,", "1G,lock=yes", "1G,fast", "1G,hugepages"] {
            assert!(matches!(parse(text), Err(ParseMemoryError::Unknown(_))), "{text}");
        }
    }

    #[test]
    fn a_document_spells_the_kinds_as_the_command_line_does() {
        let options: MemoryOptions = serde_json::from_str(r#"{"hugepages": "2M", "lock": true}"#).unwrap();
        assert_eq!((options.hugepages, options.lock), (HugePages::Size2M, true));
        assert_eq!(serde_json::to_value(HugePages::Transparent).unwrap(), "transparent");
        assert!(serde_json::from_str::<MemoryOptions>(r#"{"hugepages": "3M"}"#).is_err());
    }

    proptest! {
        #[test]
        fn printed_memory_reads_back(
            size: u64, kind in 0..HUGE_PAGES.len(), lock: bool, prefault: bool, numa: Option<u32>
        ) {
            let options = MemoryOptions { hugepages: HUGE_PAGES[kind].0, lock, prefault, numa };
            let memory = MemorySpec { size: ByteSize(size), options };
            prop_assert_eq!(parse(&memory.to_string()), Ok(memory));
            let json = serde_json::to_string(&options).unwrap();
            prop_assert_eq!(serde_json::from_str::<MemoryOptions>(&json).unwrap(), options);
        }
    }
}
