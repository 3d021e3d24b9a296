//! Offsets and bits of configuration space (PCI 3.0 chapter 6, PCI-to-PCI Bridge 1.2 chapter 3).

/// Vendor id, 16 bits.
pub const VENDOR_ID: u16 = 0x00;
/// Device id, 16 bits.
pub const DEVICE_ID: u16 = 0x02;
/// Command register, 16 bits.
pub const COMMAND: u16 = 0x04;
/// Status register, 16 bits.
pub const STATUS: u16 = 0x06;
/// Revision id, 8 bits; the class code follows in the next three bytes.
pub const REVISION_ID: u16 = 0x08;
/// Programming interface, the lowest byte of the class code.
pub const CLASS_PROG: u16 = 0x09;
/// Cache line size, 8 bits.
pub const CACHE_LINE_SIZE: u16 = 0x0c;
/// Latency timer, 8 bits.
pub const LATENCY_TIMER: u16 = 0x0d;
/// Header type, 8 bits.
pub const HEADER_TYPE: u16 = 0x0e;
/// First base address register.
pub const BAR0: u16 = 0x10;
/// Primary bus number (type 1), 8 bits.
pub const PRIMARY_BUS: u16 = 0x18;
/// Secondary bus number (type 1), 8 bits.
pub const SECONDARY_BUS: u16 = 0x19;
/// Highest bus number behind the bridge (type 1), 8 bits.
pub const SUBORDINATE_BUS: u16 = 0x1a;
/// I/O window base (type 1), 8 bits; the limit follows.
pub const IO_BASE: u16 = 0x1c;
/// Secondary status (type 1), 16 bits.
pub const SECONDARY_STATUS: u16 = 0x1e;
/// Memory window base (type 1), 16 bits; the limit follows.
pub const MEMORY_BASE: u16 = 0x20;
/// Prefetchable window base (type 1), 16 bits; the limit follows.
pub const PREFETCH_BASE: u16 = 0x24;
/// Upper 32 bits of the prefetchable base (type 1); the limit's follow.
pub const PREFETCH_BASE_UPPER: u16 = 0x28;
/// Upper 16 bits of the I/O base (type 1); the limit's follow.
pub const IO_BASE_UPPER: u16 = 0x30;
/// Subsystem vendor id (type 0), 16 bits; the subsystem id follows.
pub const SUBSYSTEM_VENDOR_ID: u16 = 0x2c;
/// Offset of the first capability, 8 bits.
pub const CAPABILITIES: u16 = 0x34;
/// Interrupt line, 8 bits, for software only.
pub const INTERRUPT_LINE: u16 = 0x3c;
/// Interrupt pin, 8 bits: 0 none, 1 INTA .. 4 INTD.
pub const INTERRUPT_PIN: u16 = 0x3d;
/// Bridge control (type 1), 16 bits.
pub const BRIDGE_CONTROL: u16 = 0x3e;

/// Command: the function answers I/O.
pub const COMMAND_IO: u16 = 1 << 0;
/// Command: the function answers memory.
pub const COMMAND_MEMORY: u16 = 1 << 1;
/// Command: the function may write memory, which includes MSI.
pub const COMMAND_BUS_MASTER: u16 = 1 << 2;
/// Command: INTx is off.
pub const COMMAND_INTX_DISABLE: u16 = 1 << 10;
/// Command bits that software may change; the rest read as zero.
pub const COMMAND_WRITABLE: u16 = 0x0547;
/// Status: INTx is asserted (before the disable bit).
pub const STATUS_INTX: u16 = 1 << 3;
/// Status: there is a capability list.
pub const STATUS_CAPABILITIES: u16 = 1 << 4;
/// Status bits cleared by writing ones.
pub const STATUS_W1C: u16 = 0xf900;
/// Bridge control: reset everything behind the bridge.
pub const BRIDGE_CONTROL_RESET: u16 = 1 << 6;
/// Header type: the device has more functions.
pub const HEADER_MULTIFUNCTION: u8 = 0x80;

/// Capability: power management.
pub const CAP_POWER: u8 = 0x01;
/// Capability: message-signalled interrupts.
pub const CAP_MSI: u8 = 0x05;
/// Capability: vendor specific.
pub const CAP_VENDOR: u8 = 0x09;
/// Capability: subsystem ids of a bridge.
pub const CAP_SUBSYSTEM: u8 = 0x0d;
/// Capability: PCI Express.
pub const CAP_EXPRESS: u8 = 0x10;
/// Capability: MSI-X.
pub const CAP_MSIX: u8 = 0x11;
/// Extended capability: advanced error reporting.
pub const EXT_CAP_AER: u16 = 0x0001;
/// Extended capability: device serial number.
pub const EXT_CAP_SERIAL: u16 = 0x0003;
/// Extended capability: access control services.
pub const EXT_CAP_ACS: u16 = 0x000d;
