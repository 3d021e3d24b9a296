//! Where a machine's network frames come from and go to.
//!
//! A network device knows one trait, [`Port`]; behind it are the ways out of the machine. The same header goes
//! with every frame ([`FrameHeader`]): the offloads of virtio-net, which a Linux tap device speaks too.
//!
//! * [`ring`]: to another process, through shared memory, neither side trusting the other;
//! * [`tap`]: to the host's networks, as root or through a device that root has made;
//! * [`passt`]: to the program of that name.
//!
//! The user-mode NAT is a crate and a process of its own (`atoll-network-user`): it parses what guests send and
//! what the internet answers, and a machine's process holds nothing of it but a ring in shared memory.

pub mod header;
pub mod passt;
pub mod port;
mod ready;
pub mod ring;
pub mod tap;
#[cfg(any(test, feature = "test-utils"))]
pub mod test_utils;

pub use header::{FrameHeader, Offloads, Segmentation};
pub use port::{MacAddress, Port, PortError, PortEvent, Received, Sent, Taken};
