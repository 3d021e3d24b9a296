//! How a driver reaches a device. Only PCI so far.

pub mod pci;
