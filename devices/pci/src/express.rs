//! The PCI Express capability, version 2 (PCI Express Base 4.0, 7.5.3).

/// Device and port type in the capability.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PortType {
    /// An endpoint behind a port.
    Endpoint,
    /// A root port.
    RootPort,
    /// An endpoint inside the root complex; it has no link.
    IntegratedEndpoint,
}

/// A PCI Express capability as a device declares it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ExpressSpec {
    /// What the function is.
    pub port_type: PortType,
    /// Whether software may reset the function alone.
    pub function_level_reset: bool,
    /// Root ports: slot capabilities register; `Some` makes the slot-implemented bit one.
    pub slot_capabilities: Option<u32>,
    /// Root ports: port number in the link capabilities.
    pub port_number: u8,
}

impl ExpressSpec {
    /// An ordinary endpoint behind a port.
    pub const ENDPOINT: Self = Self {
        port_type: PortType::Endpoint,
        function_level_reset: true,
        slot_capabilities: None,
        port_number: 0,
    };
}

/// Register offsets from the start of the capability.
pub mod offset {
    /// PCI Express capabilities, 16 bits.
    pub const CAPABILITIES: u16 = 0x02;
    /// Device control, 16 bits.
    pub const DEVICE_CONTROL: u16 = 0x08;
    /// Link control, 16 bits.
    pub const LINK_CONTROL: u16 = 0x10;
    /// Link status, 16 bits.
    pub const LINK_STATUS: u16 = 0x12;
    /// Slot capabilities, 32 bits.
    pub const SLOT_CAPABILITIES: u16 = 0x14;
    /// Slot control, 16 bits.
    pub const SLOT_CONTROL: u16 = 0x18;
    /// Slot status, 16 bits.
    pub const SLOT_STATUS: u16 = 0x1a;
    /// Root status, 32 bits.
    pub const ROOT_STATUS: u16 = 0x20;
}

/// Device control: initiate function-level reset.
pub(crate) const DEVICE_CONTROL_FLR: u16 = 1 << 15;
/// Link status: data link layer is up.
pub const LINK_STATUS_ACTIVE: u16 = 1 << 13;

/// Bytes of the capability after the id and next bytes.
const BODY: usize = 58;

/// Values and rules of the capability's body (without id and next).
pub(crate) struct Body {
    pub(crate) values: [u8; BODY],
    pub(crate) writable: [u8; BODY],
    pub(crate) clear_by_one: [u8; BODY],
}

fn put16(to: &mut [u8; BODY], offset: u16, value: u16) {
    let at = usize::from(offset) - 2;
    to[at..at + 2].copy_from_slice(&value.to_le_bytes());
}
fn put32(to: &mut [u8; BODY], offset: u16, value: u32) {
    let at = usize::from(offset) - 2;
    to[at..at + 4].copy_from_slice(&value.to_le_bytes());
}

/// Builds the capability. A link is 16 GT/s and 16 lanes wide: nothing is slower for it, and no driver warns
/// about a starved device.
pub(crate) fn body(spec: ExpressSpec) -> Body {
    let mut b = Body { values: [0; BODY], writable: [0; BODY], clear_by_one: [0; BODY] };
    let (kind, link) = match spec.port_type {
        PortType::Endpoint => (0u16, true),
        PortType::RootPort => (4, true),
        PortType::IntegratedEndpoint => (9, false),
    };
    let slot = u16::from(spec.slot_capabilities.is_some());
    put16(&mut b.values, offset::CAPABILITIES, 2 | kind << 4 | slot << 8);
    // Device capabilities: 128-byte payload, role-based error reporting, function-level reset.
    put32(&mut b.values, 0x04, 1 << 15 | u32::from(spec.function_level_reset) << 28);
    // Device control: relaxed ordering, no snoop, 512-byte reads; every enable bit is kept.
    put16(&mut b.values, offset::DEVICE_CONTROL, 0x2810);
    put16(&mut b.writable, offset::DEVICE_CONTROL, 0x7fff);
    put16(&mut b.clear_by_one, 0x0a, 0x000f);
    if link {
        let active_reporting = u32::from(spec.port_type == PortType::RootPort) << 20;
        put32(&mut b.values, 0x0c, 4 | 16 << 4 | active_reporting | u32::from(spec.port_number) << 24);
        put16(&mut b.values, offset::LINK_STATUS, 4 | 16 << 4);
        put16(&mut b.writable, offset::LINK_CONTROL, 0x0fdb);
        // Supported speeds 2.5 to 16 GT/s; target speed 16 GT/s.
        put32(&mut b.values, 0x2c, 0x1e);
        put16(&mut b.values, 0x30, 4);
        put16(&mut b.writable, 0x30, 0x000f);
    }
    if let Some(capabilities) = spec.slot_capabilities {
        put32(&mut b.values, offset::SLOT_CAPABILITIES, capabilities);
        put16(&mut b.writable, offset::SLOT_CONTROL, 0x1fff);
        put16(&mut b.clear_by_one, offset::SLOT_STATUS, 0x011f);
    }
    if spec.port_type == PortType::RootPort {
        put16(&mut b.writable, 0x1c, 0x001f);
        put32(&mut b.clear_by_one, offset::ROOT_STATUS, 1 << 16);
    }
    // Device control 2: completion timeout value and disable.
    put32(&mut b.values, 0x24, 1 << 4);
    put16(&mut b.writable, 0x28, 0x001f);
    b
}
