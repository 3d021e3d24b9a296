//! News of a running machine that do not end it.

use std::fmt;
use std::sync::Arc;

/// Something that whoever runs the machine should know. Each is one clear line as text.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum VmEvent {
    /// A network interface lost what carried its frames: the guest sees its link go down. The machine runs on.
    NetworkLost {
        /// Which interface, counted from 0.
        interface: usize,
        /// Why.
        why: String,
    },
    /// The machine is held: the host has no space for the data of a disk, or failed to read or write it. It tries
    /// again about every second.
    DiskTrouble {
        /// The disk, as the user named it.
        disk: String,
        /// Why.
        why: String,
    },
    /// The machine goes on: the requests that its disks kept have succeeded.
    DisksMended,
}

impl fmt::Display for VmEvent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NetworkLost { interface, why } => {
                write!(f, "network interface {interface} has lost its connection: {why}")
            }
            Self::DiskTrouble { disk, why } => {
                write!(f, "the machine is paused: disk {disk}: {why}; it goes on once that is mended")
            }
            Self::DisksMended => write!(f, "the machine goes on: its disks work again"),
        }
    }
}

/// Where events go. It is called on threads of the machine and must not wait for the machine.
pub(crate) type EventSink = Arc<dyn Fn(VmEvent) + Send + Sync>;
