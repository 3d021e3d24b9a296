//! The header as it is written. Field numbers are for ever.

use super::{ContainerError, Header, MAX_FEATURES, MAX_NAME, MAX_SECTIONS, SectionInfo};

/// [`Header`].
#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct HeaderV1 {
    /// Default: empty.
    #[prost(string, optional, tag = "1")]
    pub product_version: Option<String>,
    /// Must be present.
    #[prost(string, optional, tag = "2")]
    pub guest_arch: Option<String>,
    /// Must be present.
    #[prost(string, optional, tag = "3")]
    pub machine: Option<String>,
    /// In the order of the payloads.
    #[prost(message, repeated, tag = "4")]
    pub sections: Vec<SectionV1>,
}

/// [`SectionInfo`].
#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct SectionV1 {
    /// Must be present.
    #[prost(string, optional, tag = "1")]
    pub name: Option<String>,
    /// Default: 1.
    #[prost(uint32, optional, tag = "2")]
    pub version: Option<u32>,
    /// Default: 0.
    #[prost(uint64, optional, tag = "3")]
    pub length: Option<u64>,
    /// Default: 0, the CRC of nothing.
    #[prost(fixed32, optional, tag = "4")]
    pub crc32: Option<u32>,
    /// Default: true.
    #[prost(bool, optional, tag = "5")]
    pub required: Option<bool>,
    /// Default: none.
    #[prost(string, repeated, tag = "6")]
    pub required_features: Vec<String>,
}

impl From<&Header> for HeaderV1 {
    fn from(header: &Header) -> Self {
        Self {
            product_version: Some(header.product_version.clone()),
            guest_arch: Some(header.guest_arch.clone()),
            machine: Some(header.machine.clone()),
            sections: header.sections.iter().map(SectionV1::from).collect(),
        }
    }
}

impl From<&SectionInfo> for SectionV1 {
    fn from(info: &SectionInfo) -> Self {
        Self {
            name: Some(info.name.clone()),
            version: Some(info.version),
            length: Some(info.length),
            crc32: Some(info.crc32),
            required: Some(info.required),
            required_features: info.required_features.clone(),
        }
    }
}

impl TryFrom<HeaderV1> for Header {
    type Error = ContainerError;

    fn try_from(saved: HeaderV1) -> Result<Self, ContainerError> {
        at_most("the number of sections", saved.sections.len(), MAX_SECTIONS)?;
        let sections = saved.sections.into_iter().map(SectionInfo::try_from).collect::<Result<_, _>>()?;
        let header = Self {
            product_version: saved.product_version.unwrap_or_default(),
            guest_arch: present("guest architecture", saved.guest_arch)?,
            machine: present("machine name", saved.machine)?,
            sections,
        };
        header.check()?;
        Ok(header)
    }
}

impl TryFrom<SectionV1> for SectionInfo {
    type Error = ContainerError;

    fn try_from(saved: SectionV1) -> Result<Self, ContainerError> {
        Ok(Self {
            name: present("section name", saved.name)?,
            version: saved.version.unwrap_or(1),
            length: saved.length.unwrap_or(0),
            crc32: saved.crc32.unwrap_or(0),
            required: saved.required.unwrap_or(true),
            required_features: saved.required_features,
        })
    }
}

fn present(what: &str, value: Option<String>) -> Result<String, ContainerError> {
    value.filter(|v| !v.is_empty()).ok_or_else(|| ContainerError::Header(format!("it has no {what}")))
}

fn at_most(what: &str, size: usize, limit: usize) -> Result<(), ContainerError> {
    if size <= limit {
        return Ok(());
    }
    Err(ContainerError::TooLarge { what: what.to_owned(), size: size as u64, limit: limit as u64 })
}

impl Header {
    /// The limits that reader and writer share.
    pub(super) fn check(&self) -> Result<(), ContainerError> {
        at_most("the number of sections", self.sections.len(), MAX_SECTIONS)?;
        for name in [&self.product_version, &self.guest_arch, &self.machine] {
            at_most("a name in the header", name.len(), MAX_NAME)?;
        }
        let mut names: Vec<&str> = Vec::with_capacity(self.sections.len());
        let mut total = 0u64;
        for section in &self.sections {
            at_most("a section name", section.name.len(), MAX_NAME)?;
            at_most("the number of required features", section.required_features.len(), MAX_FEATURES)?;
            for feature in &section.required_features {
                at_most("a feature name", feature.len(), MAX_NAME)?;
            }
            limit(format!("section {}", section.name), section.length, super::MAX_SECTION)?;
            total = total.saturating_add(section.length);
            names.push(&section.name);
        }
        limit("the sum of all sections".to_owned(), total, super::MAX_TOTAL)?;
        names.sort_unstable();
        match names.windows(2).find(|w| w[0] == w[1]) {
            Some(twice) => Err(ContainerError::Duplicate(twice[0].to_owned())),
            None => Ok(()),
        }
    }
}

fn limit(what: String, size: u64, limit: u64) -> Result<(), ContainerError> {
    if size <= limit { Ok(()) } else { Err(ContainerError::TooLarge { what, size, limit }) }
}
