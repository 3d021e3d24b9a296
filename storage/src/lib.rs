//! Disks: what a storage device of any kind reads from and writes to.
//!
//! ```text
//!   device (virtio-blk, NVMe, AHCI)      knows requests, rings, guest memory
//!        |  dyn Disk                     positional transfers, flush, discard, zeroes
//!   format (raw; more to come)           where a byte of the disk is in the image
//!        |  ImageFile                    positional transfers, sync, holes
//!   HostFile                             a file or block device of the host
//! ```
//!
//! * [`disk`]: the trait [`Disk`], what it promises about order and durability, and its limits;
//! * [`error`]: [`DiskError`] with a small stable [`DiskErrorKind`] that a device maps to its own status codes;
//! * [`file`](mod@file): [`ImageFile`], the seam below the formats, and [`HostFile`];
//! * [`raw`]: the raw format, its locking and its errors when opening;
//! * [`metrics`]: counters of each disk;
//! * `faulty` (feature `test-utils`): layers for either seam that record a write stream, cut the power at any
//!   point of it, and fail chosen operations.
//!
//! No device, no virtual machine and no guest memory is known here: buffers are `vm_memory` volatile slices.
//! There is no unsafe code. Locks: only the recording layer has one, and nothing is taken under it.

#![forbid(unsafe_code)]

pub mod disk;
pub mod error;
#[cfg(any(test, feature = "test-utils"))]
pub mod faulty;
pub mod file;
pub mod metrics;
pub mod raw;

pub use disk::{Capabilities, DiscardLimits, Disk, WriteZeroesLimits};
pub use error::{DiskError, DiskErrorKind, OpenError};
pub use file::{HostFile, ImageFile};
pub use metrics::{DiskMetrics, DiskMetricsSnapshot};
pub use raw::{OpenOptions, RawDisk};
