//! Saved form of a serial port.

use super::{INPUT_CAPACITY, Inner, LSR_ERRORS, MSR_CONNECTED};

/// One serial port. Every default is 0, false or empty unless it says otherwise.
#[derive(Clone, PartialEq, prost::Message)]
pub struct UartStateV1 {
    /// Interrupt enable register.
    #[prost(uint32, optional, tag = "1")]
    pub ier: Option<u32>,
    /// FIFO control register.
    #[prost(uint32, optional, tag = "2")]
    pub fcr: Option<u32>,
    /// Line control register.
    #[prost(uint32, optional, tag = "3")]
    pub lcr: Option<u32>,
    /// Modem control register.
    #[prost(uint32, optional, tag = "4")]
    pub mcr: Option<u32>,
    /// Error bits of the line status register.
    #[prost(uint32, optional, tag = "5")]
    pub lsr_errors: Option<u32>,
    /// Modem status register. Default 0xb0: connected.
    #[prost(uint32, optional, tag = "6")]
    pub msr: Option<u32>,
    /// Scratch register.
    #[prost(uint32, optional, tag = "7")]
    pub scratch: Option<u32>,
    /// Divisor latch. Default 12.
    #[prost(uint32, optional, tag = "8")]
    pub divisor: Option<u32>,
    /// Received bytes that the guest has not read.
    #[prost(bytes = "vec", optional, tag = "9")]
    pub input: Option<Vec<u8>>,
    /// The transmit interrupt is waiting.
    #[prost(bool, optional, tag = "10")]
    pub transmit_pending: Option<bool>,
}

impl Inner {
    pub(super) fn save(&self) -> UartStateV1 {
        let byte = |b: u8| Some(u32::from(b));
        UartStateV1 {
            ier: byte(self.ier),
            fcr: byte(self.fcr),
            lcr: byte(self.lcr),
            mcr: byte(self.mcr),
            lsr_errors: byte(self.lsr),
            msr: byte(self.msr),
            scratch: byte(self.scratch),
            divisor: Some(u32::from(self.divisor)),
            input: Some(self.input.iter().copied().collect()),
            transmit_pending: Some(self.transmit_pending),
        }
    }

    pub(super) fn restored(s: &UartStateV1) -> Self {
        let byte = |v: Option<u32>| v.unwrap_or(0) as u8;
        Self {
            ier: byte(s.ier) & 0x0f,
            fcr: byte(s.fcr) & 0xc9,
            lcr: byte(s.lcr),
            mcr: byte(s.mcr) & 0x1f,
            lsr: byte(s.lsr_errors) & LSR_ERRORS,
            msr: s.msr.map_or(MSR_CONNECTED, |v| v as u8),
            scratch: byte(s.scratch),
            divisor: s.divisor.unwrap_or(12) as u16,
            input: s.input.iter().flatten().copied().take(INPUT_CAPACITY).collect(),
            transmit_pending: s.transmit_pending.unwrap_or(false),
            in_flight: 0,
            refused: true,
        }
    }
}
