//! Reads a container: the header alone, section by section, or a whole machine.

use std::io::{ErrorKind, Read};

use prost::Message;

use super::saved_state::HeaderV1;
use super::{CONTAINER_VERSION, ContainerError, Header, MAGIC, MAX_HEADER, SectionInfo, StateSection};

/// One section with its payload, whose checksum was right.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Section {
    /// Its entry in the table.
    pub info: SectionInfo,
    /// The encoded state.
    pub payload: Vec<u8>,
}

/// What a restore left alone.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RestoreReport {
    /// Sections of the file that no part of the machine knows, none of them required.
    pub ignored: Vec<String>,
    /// Parts of the machine that the file has no section for; they keep the state they had.
    pub absent: Vec<String>,
}

/// Reads a container from a stream.
pub struct StateReader<R> {
    input: R,
    header: Header,
    next: usize,
}

impl<R: Read> StateReader<R> {
    /// Reads and checks the header, and no payload.
    pub fn new(mut input: R) -> Result<Self, ContainerError> {
        let mut start = [0; 20];
        let what = || "the header".to_owned();
        read_exact(&mut input, &mut start[..8], what)?;
        if start[..8] != MAGIC {
            return Err(ContainerError::Magic);
        }
        read_exact(&mut input, &mut start[8..], what)?;
        let word = |at: usize| u32::from_le_bytes([start[at], start[at + 1], start[at + 2], start[at + 3]]);
        let (version, length, crc) = (word(8), word(12), word(16));
        if version == 0 || version > CONTAINER_VERSION {
            return Err(ContainerError::Version { found: version });
        }
        if length > MAX_HEADER {
            let (size, limit) = (u64::from(length), u64::from(MAX_HEADER));
            return Err(ContainerError::TooLarge { what: what(), size, limit });
        }
        let header = read_up_to(&mut input, u64::from(length), what)?;
        let mut hasher = crc32fast::Hasher::new();
        hasher.update(&start[..16]);
        hasher.update(&header);
        if hasher.finalize() != crc {
            return Err(ContainerError::Damaged(what()));
        }
        let header = HeaderV1::decode(&*header).map_err(|e| ContainerError::Header(e.to_string()))?;
        Ok(Self { input, header: Header::try_from(header)?, next: 0 })
    }

    /// What the container says about itself.
    pub fn header(&self) -> &Header {
        &self.header
    }

    /// The next section, or `None` after the last, when the input must end.
    pub fn next_section(&mut self) -> Result<Option<Section>, ContainerError> {
        let Some(info) = self.header.sections.get(self.next).cloned() else {
            let rest = read_some(&mut self.input, &mut [0], || "the end".to_owned())?;
            return if rest == 0 { Ok(None) } else { Err(ContainerError::Trailing) };
        };
        self.next += 1;
        let name = || format!("section {}", info.name);
        let payload = read_up_to(&mut self.input, info.length, name)?;
        if crc32fast::hash(&payload) != info.crc32 {
            return Err(ContainerError::Damaged(name()));
        }
        Ok(Some(Section { info, payload }))
    }

    /// Restores a machine: hands every section to the part of that name. Nothing is restored before the whole
    /// container has been read, its checksums compared, and every section accepted by name, version and
    /// features and decoded once. The caller has compared machine type and architecture.
    pub fn restore(mut self, parts: &[(&str, &dyn StateSection)]) -> Result<RestoreReport, ContainerError> {
        let find = |name: &str| parts.iter().find(|(n, _)| *n == name).map(|(_, part)| *part);
        let mut report = RestoreReport::default();
        for info in &self.header.sections {
            match find(&info.name) {
                Some(part) => accept(info, part)?,
                None if info.required => return Err(ContainerError::UnknownSection(info.name.clone())),
                None => report.ignored.push(info.name.clone()),
            }
        }
        let known = |name: &str| self.header.sections.iter().any(|s| s.name == name);
        report.absent = parts.iter().map(|(n, _)| *n).filter(|n| !known(n)).map(str::to_owned).collect();
        let mut sections = Vec::new();
        while let Some(section) = self.next_section()? {
            if let Some(part) = find(&section.info.name) {
                part.check_section(&section.payload).map_err(refused(&section.info.name))?;
                sections.push((part, section));
            }
        }
        for (part, section) in sections {
            part.restore_section(&section.payload).map_err(refused(&section.info.name))?;
        }
        Ok(report)
    }
}

fn refused(name: &str) -> impl FnOnce(super::RestoreError) -> ContainerError {
    let name = name.to_owned();
    move |source| ContainerError::Restore { name, source }
}

fn accept(info: &SectionInfo, part: &dyn StateSection) -> Result<(), ContainerError> {
    let name = info.name.clone();
    let known = part.section_version();
    if info.version > known {
        return Err(ContainerError::SectionVersion { name, found: info.version, known });
    }
    let unknown = |f: &&String| !part.known_features().contains(&f.as_str());
    match info.required_features.iter().find(unknown) {
        Some(feature) => Err(ContainerError::UnknownFeature { name, feature: feature.clone() }),
        None => Ok(()),
    }
}

fn read_some(
    input: &mut impl Read,
    buf: &mut [u8],
    what: impl Fn() -> String,
) -> Result<usize, ContainerError> {
    loop {
        match input.read(buf) {
            Err(e) if e.kind() == ErrorKind::Interrupted => {}
            other => return other.map_err(|source| ContainerError::Io { what: what(), source }),
        }
    }
}

fn read_exact(
    input: &mut impl Read,
    buf: &mut [u8],
    what: impl Fn() -> String,
) -> Result<(), ContainerError> {
    input.read_exact(buf).map_err(|source| match source.kind() {
        ErrorKind::UnexpectedEof => ContainerError::Truncated(what()),
        _ => ContainerError::Io { what: what(), source },
    })
}

/// Reads exactly `length` bytes, which the caller has compared with a limit. The buffer grows with what
/// arrives, not with what is claimed.
fn read_up_to(
    input: &mut impl Read,
    length: u64,
    what: impl Fn() -> String,
) -> Result<Vec<u8>, ContainerError> {
    let mut buf = Vec::new();
    let io = |source| ContainerError::Io { what: what(), source };
    input.take(length).read_to_end(&mut buf).map_err(io)?;
    if buf.len() as u64 == length { Ok(buf) } else { Err(ContainerError::Truncated(what())) }
}
