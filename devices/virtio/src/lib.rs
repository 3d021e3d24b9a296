//! Virtio 1.2 devices over PCI: block, network, console and entropy.
//!
//! ```text
//! vCPU --MMIO--> transport::pci (registers, notify, ISR) --process_queue--> blk | net | console | rng
//!                     |  ^                                        |
//!                     |  +--- Interrupt (MSI-X or INTx) <---------+  used buffers, config changes
//!                     +--> queue (split rings in guest memory)
//! ```
//!
//! * [`device::VirtioDevice`] is all that a kind of device implements.
//! * [`queue`] owns the rings: what a driver may put there, notification suppression, and how a malformed ring
//!   stops the device and nothing else.
//! * [`transport::pci::VirtioPciDevice`] is the PCI function that a machine plugs in.
//! * [`blk`], [`net`], [`console`] and [`rng`] are the devices.
//!
//! Specification: Virtual I/O Device (VIRTIO) 1.2; the modern interface only, split rings only.
//!
//! Lock order: the transport's register lock, a queue's lock, the device's own lock, the ISR lock, the PCI
//! function's locks. No lock but the queue's own is held while a request is carried out.

#![forbid(unsafe_code)]

use atoll_foundation::sync::lock;

pub mod blk;
pub mod console;
pub mod device;
pub mod net;
pub mod queue;
pub mod rng;
#[cfg(any(test, feature = "test-utils"))]
pub mod testing;
pub mod transport;

#[cfg(test)]
mod garbage_tests;

pub use device::{DeviceHandle, RestoreError, VirtioDevice};
pub use transport::pci::{VirtioPciDevice, VirtioPciParts};
