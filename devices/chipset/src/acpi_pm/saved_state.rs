//! Saved form of the power-management block.

use super::{CONTROL_KEPT, EVENT_BITS, Inner, STATUS_BITS};

/// The power-management block. Every default is 0.
#[derive(Clone, PartialEq, prost::Message)]
pub struct AcpiPmStateV1 {
    /// PM1 status.
    #[prost(uint32, optional, tag = "1")]
    pub status: Option<u32>,
    /// PM1 enable.
    #[prost(uint32, optional, tag = "2")]
    pub enable: Option<u32>,
    /// PM1 control.
    #[prost(uint32, optional, tag = "3")]
    pub control: Option<u32>,
    /// GPE0 status.
    #[prost(uint64, optional, tag = "4")]
    pub gpe_status: Option<u64>,
    /// GPE0 enable.
    #[prost(uint64, optional, tag = "5")]
    pub gpe_enable: Option<u64>,
    /// SMI enable.
    #[prost(uint32, optional, tag = "6")]
    pub smi_enable: Option<u32>,
    /// Port B2 in bits 7..0, B3 in bits 15..8.
    #[prost(uint32, optional, tag = "7")]
    pub smi_command: Option<u32>,
}

impl Inner {
    pub(super) fn save(&self) -> AcpiPmStateV1 {
        AcpiPmStateV1 {
            status: Some(u32::from(self.status)),
            enable: Some(u32::from(self.enable)),
            control: Some(u32::from(self.control)),
            gpe_status: Some(self.gpe_status),
            gpe_enable: Some(self.gpe_enable),
            smi_enable: Some(self.smi_enable),
            smi_command: Some(u32::from(u16::from_le_bytes(self.smi_command))),
        }
    }

    pub(super) fn take_over(&mut self, s: &AcpiPmStateV1) {
        let word = |v: Option<u32>| v.unwrap_or(0) as u16;
        self.status = word(s.status) & STATUS_BITS;
        self.enable = word(s.enable) & EVENT_BITS;
        self.control = word(s.control) & CONTROL_KEPT;
        self.gpe_status = s.gpe_status.unwrap_or(0);
        self.gpe_enable = s.gpe_enable.unwrap_or(0);
        self.smi_enable = s.smi_enable.unwrap_or(0);
        self.smi_command = word(s.smi_command).to_le_bytes();
    }
}
