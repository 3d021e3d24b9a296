//! The types that describe a virtual machine to Atoll from outside: the same for the command line, a file,
//! the API and a stored row. They hold no logic beyond parsing and printing themselves; whether a machine
//! described by them can be built is for `vmm/` to say.

#![forbid(unsafe_code)]

mod cpu_pinning;
mod disk;
mod host_report;
mod limits;
mod memory;
mod net;
mod net_address;
mod port_forward;
mod size;
mod topology;
mod vm_spec;

pub use cpu_pinning::{CpuPinning, MAX_HOST_CPU, ParsePinningError};
pub use disk::{DiskImageFormat, DiskIo, DiskSpec, OnDiskError, ParseDiskError};
pub use host_report::{CheckState, HOST_REPORT_VERSION, HostCheck, HostReport};
pub use limits::{Limits, ParseLimitError};
pub use memory::{HugePages, MemoryOptions, MemorySpec, ParseMemoryError};
pub use net::{
    HostDevice, MAX_MTU, MAX_QUEUES, MIN_MTU, MIN_MTU_IPV6, NetArgument, NetKind, NetSpec, ParseNetError,
    Passt, UserNet,
};
pub use net_address::{Ipv4Network, Ipv6Prefix, MacAddress, ParseAddressError};
pub use port_forward::{ParseForwardError, PortForward, Protocol};
pub use size::{ByteSize, ParseSizeError};
pub use topology::{CpuTopology, ParseTopologyError};
pub use vm_spec::{Accelerator, BootSpec, DEFAULT_CPU, DEFAULT_MEMORY, OnCrash, VmSpec};
