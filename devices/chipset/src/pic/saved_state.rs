//! Saved form of the interrupt controller pair.

use super::{Chip, Init};

/// Both chips.
#[derive(Clone, PartialEq, prost::Message)]
pub struct PicStateV1 {
    /// The chip at port 20. Default: power-on state.
    #[prost(message, optional, tag = "1")]
    pub master: Option<PicChipStateV1>,
    /// The chip at port A0. Default: power-on state.
    #[prost(message, optional, tag = "2")]
    pub slave: Option<PicChipStateV1>,
}

/// One 8259A. Every default is 0 or false.
#[derive(Clone, PartialEq, prost::Message)]
pub struct PicChipStateV1 {
    /// Interrupt request register.
    #[prost(uint32, optional, tag = "1")]
    pub irr: Option<u32>,
    /// In-service register.
    #[prost(uint32, optional, tag = "2")]
    pub isr: Option<u32>,
    /// Interrupt mask register.
    #[prost(uint32, optional, tag = "3")]
    pub imr: Option<u32>,
    /// Levels of the input wires.
    #[prost(uint32, optional, tag = "4")]
    pub lines: Option<u32>,
    /// Level-triggered inputs.
    #[prost(uint32, optional, tag = "5")]
    pub elcr: Option<u32>,
    /// Input with the highest priority.
    #[prost(uint32, optional, tag = "6")]
    pub highest: Option<u32>,
    /// ICW2.
    #[prost(uint32, optional, tag = "7")]
    pub vector_base: Option<u32>,
    /// Command word that the data port expects: 2, 3 or 4; 0 when initialized.
    #[prost(uint32, optional, tag = "8")]
    pub expected_icw: Option<u32>,
    /// ICW1 announced ICW4.
    #[prost(bool, optional, tag = "9")]
    pub icw4_follows: Option<bool>,
    /// ICW1: no cascade.
    #[prost(bool, optional, tag = "10")]
    pub single: Option<bool>,
    /// ICW1: all inputs are level-triggered.
    #[prost(bool, optional, tag = "11")]
    pub all_level: Option<bool>,
    /// The command port reads ISR.
    #[prost(bool, optional, tag = "12")]
    pub read_isr: Option<bool>,
    /// The next read is a poll.
    #[prost(bool, optional, tag = "13")]
    pub poll: Option<bool>,
    /// Special mask mode.
    #[prost(bool, optional, tag = "14")]
    pub special_mask: Option<bool>,
    /// Special fully nested mode.
    #[prost(bool, optional, tag = "15")]
    pub special_fully_nested: Option<bool>,
    /// Automatic end of interrupt.
    #[prost(bool, optional, tag = "16")]
    pub auto_eoi: Option<bool>,
    /// Rotate on automatic end of interrupt.
    #[prost(bool, optional, tag = "17")]
    pub rotate_on_auto_eoi: Option<bool>,
}

impl Chip {
    pub(super) fn save(&self) -> PicChipStateV1 {
        let byte = |b: u8| Some(u32::from(b));
        PicChipStateV1 {
            irr: byte(self.irr),
            isr: byte(self.isr),
            imr: byte(self.imr),
            lines: byte(self.lines),
            elcr: byte(self.elcr),
            highest: byte(self.highest),
            vector_base: byte(self.vector_base),
            expected_icw: Some(match self.init {
                Init::Done => 0,
                Init::Icw2 => 2,
                Init::Icw3 => 3,
                Init::Icw4 => 4,
            }),
            icw4_follows: Some(self.icw4_follows),
            single: Some(self.single),
            all_level: Some(self.all_level),
            read_isr: Some(self.read_isr),
            poll: Some(self.poll),
            special_mask: Some(self.special_mask),
            special_fully_nested: Some(self.special_fully_nested),
            auto_eoi: Some(self.auto_eoi),
            rotate_on_auto_eoi: Some(self.rotate_on_auto_eoi),
        }
    }

    pub(super) fn restored(s: &PicChipStateV1, is_master: bool) -> Self {
        let byte = |v: Option<u32>| v.unwrap_or(0) as u8;
        let flag = |v: Option<bool>| v.unwrap_or(false);
        Self {
            irr: byte(s.irr),
            isr: byte(s.isr),
            imr: byte(s.imr),
            lines: byte(s.lines),
            elcr: byte(s.elcr) & if is_master { 0xf8 } else { 0xde },
            highest: byte(s.highest) & 7,
            vector_base: byte(s.vector_base) & 0xf8,
            init: match s.expected_icw {
                Some(2) => Init::Icw2,
                Some(3) => Init::Icw3,
                Some(4) => Init::Icw4,
                _ => Init::Done,
            },
            icw4_follows: flag(s.icw4_follows),
            single: flag(s.single),
            all_level: flag(s.all_level),
            read_isr: flag(s.read_isr),
            poll: flag(s.poll),
            special_mask: flag(s.special_mask),
            special_fully_nested: flag(s.special_fully_nested),
            auto_eoi: flag(s.auto_eoi),
            rotate_on_auto_eoi: flag(s.rotate_on_auto_eoi),
            is_master,
        }
    }
}
