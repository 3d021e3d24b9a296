//! Disks: what a storage device of any kind reads from and writes to.
//!
//! ```text
//!   device (virtio-blk, NVMe, AHCI)      knows requests, rings, guest memory
//!        |  AsyncDisk                    the same requests, many under way
//!   engine (io_uring, threads)           who waits for the host
//!        |  dyn Disk                     positional transfers, flush, discard, zeroes
//!   format (raw, qcow2)                  where a byte of the disk is in the image
//!        |  ImageFile                    positional transfers, sync, holes
//!   HostFile                             a file or block device of the host
//! ```
//!
//! * [`disk`]: the trait [`Disk`], what it promises about order and durability, and its limits;
//! * [`engine`]: [`AsyncDisk`], which completes later, over any disk;
//! * [`error`]: [`DiskError`] with a small stable [`DiskErrorKind`] that a device maps to its own status codes;
//! * [`file`](mod@file): [`ImageFile`], the seam below the formats, and [`HostFile`];
//! * [`raw`]: the raw format, its locking and its errors when opening;
//! * [`qcow2`]: the qcow2 format with backing images, checking and mending;
//! * [`nbd`]: a disk that a server for network block devices has;
//! * [`mod@format`]: which of them an image has;
//! * [`images`]: making, inspecting, checking and converting images that are not in use;
//! * [`metrics`]: counters of each disk;
//! * `faulty` (feature `test-utils`): layers for either seam that record a write stream, cut the power at any
//!   point of it, and fail chosen operations.
//!
//! No device, no virtual machine and no guest memory is known here: buffers are `vm_memory` volatile slices.
//! There is no unsafe code. Locks: the recording layer has one, under which nothing is
//! taken, and each qcow2 disk has one, under which its file's and its backing disk's are.

#![forbid(unsafe_code)]

mod buffers;
pub mod disk;
pub mod engine;
pub mod error;
#[cfg(any(test, feature = "test-utils"))]
pub mod faulty;
pub mod file;
pub mod format;
pub mod images;
pub mod metrics;
pub mod nbd;
pub mod qcow2;
pub mod raw;

pub use disk::{Capabilities, DiscardLimits, Disk, WriteZeroesLimits};
pub use engine::{AsyncDisk, Engine, EngineKind};
pub use error::{DiskError, DiskErrorKind, OpenError};
pub use file::{HostFile, ImageFile};
pub use format::{DiskFormat, open_disk};
pub use metrics::{DiskMetrics, DiskMetricsSnapshot};
pub use nbd::NbdDisk;
pub use qcow2::Qcow2Disk;
pub use raw::{OpenOptions, RawDisk};
