//! Layers that fail on purpose, for tests. Feature `test-utils`.
//!
//! Each exists for both seams: around a [`Disk`](crate::Disk) (between a device and a format) and around an
//! [`ImageFile`](crate::ImageFile) (under a format, where a format's own mistakes show).
//!
//! * [`RecordingDisk`], [`RecordingFile`]: pass everything on and write a [`WriteLog`]. From the log,
//!   [`WriteLog::cut`] makes the content that a disk could have after the power was cut at any point.
//! * [`MemoryFile`]: an image file in memory, for tests that need many.
//! * [`FaultyDisk`], [`FaultyFile`]: fail the n-th operation of a kind, by a [`FaultPlan`].

mod inject;
mod log;
mod memory;
mod record;

pub use inject::{Fault, FaultPlan, FaultyDisk, FaultyFile};
pub use log::{CutImage, Random, WriteLog};
pub use memory::MemoryFile;
pub use record::{RecordingDisk, RecordingFile};

#[cfg(test)]
mod tests;
