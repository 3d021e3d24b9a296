//! The machine's consoles as the outside sees them.

/// One of the machine's consoles.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ConsoleId {
    /// The first serial port, `ttyS0` in Linux.
    Serial,
    /// The virtio console, `hvc0` in Linux.
    Virtio,
}

/// What a console prints goes here, on a thread of the machine.
pub type ConsoleOutput = Box<dyn Fn(&[u8]) + Send + Sync>;
