//! Writes a container.

use std::io::Write;

use prost::Message;

use super::saved_state::HeaderV1;
use super::{
    ARCH_X86_64, CONTAINER_VERSION, ContainerError, Header, MAGIC, MAX_HEADER, SectionInfo, StateSection,
};

/// Collects sections and writes them as one container.
///
/// Payloads are kept until [`StateWriter::write_to`], because the table with their checksums comes first.
pub struct StateWriter {
    header: Header,
    payloads: Vec<Vec<u8>>,
}

impl StateWriter {
    /// An empty container for a machine of type `machine`.
    pub fn new(machine: &str, product_version: &str) -> Self {
        let header = Header {
            product_version: product_version.to_owned(),
            guest_arch: ARCH_X86_64.to_owned(),
            machine: machine.to_owned(),
            sections: Vec::new(),
        };
        Self { header, payloads: Vec::new() }
    }

    /// Saves `part` as section `name`. `required`: a reader without such a part must refuse the machine.
    pub fn save(&mut self, name: &str, part: &dyn StateSection, required: bool) {
        let (payload, features) = part.save_section();
        self.add(name, part.section_version(), required, &features, payload);
    }

    /// Adds a message that is no device's.
    pub fn add_message(&mut self, name: &str, message: &impl Message) {
        self.add(name, 1, true, &[], message.encode_to_vec());
    }

    /// Adds a section with an encoded payload.
    pub fn add(&mut self, name: &str, version: u32, required: bool, features: &[&str], payload: Vec<u8>) {
        self.header.sections.push(SectionInfo {
            name: name.to_owned(),
            version,
            length: payload.len() as u64,
            crc32: crc32fast::hash(&payload),
            required,
            required_features: features.iter().map(|f| (*f).to_owned()).collect(),
        });
        self.payloads.push(payload);
    }

    /// Writes the container. A section or name beyond its limit, or a name used twice, is refused before
    /// anything is written.
    pub fn write_to(&self, out: &mut impl Write) -> Result<(), ContainerError> {
        self.header.check()?;
        let header = HeaderV1::from(&self.header).encode_to_vec();
        let length = u32::try_from(header.len()).ok().filter(|l| *l <= MAX_HEADER);
        let length = length.ok_or_else(|| ContainerError::TooLarge {
            what: "the header".to_owned(),
            size: header.len() as u64,
            limit: u64::from(MAX_HEADER),
        })?;
        let mut start = Vec::with_capacity(20 + header.len());
        start.extend_from_slice(&MAGIC);
        start.extend_from_slice(&CONTAINER_VERSION.to_le_bytes());
        start.extend_from_slice(&length.to_le_bytes());
        let mut crc = crc32fast::Hasher::new();
        crc.update(&start);
        crc.update(&header);
        start.extend_from_slice(&crc.finalize().to_le_bytes());
        start.extend_from_slice(&header);
        let io = |what: String| move |source| ContainerError::Io { what, source };
        out.write_all(&start).map_err(io("writing the header".to_owned()))?;
        for (info, payload) in self.header.sections.iter().zip(&self.payloads) {
            out.write_all(payload).map_err(io(format!("writing section {}", info.name)))?;
        }
        out.flush().map_err(io("writing".to_owned()))
    }
}
