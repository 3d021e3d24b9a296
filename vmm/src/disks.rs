//! Disks of a machine: opened, with what carries their requests out, and what an error of the host leads to.
//!
//! ```text
//!              no space, host error            every second: retry ──failed──┐
//!  Running ────────────────────────► Held ◄──────────────────────────────────┘
//!     ▲      the request is kept       │
//!     └────────────────────────────────┘ retry succeeded, or `VmHandle::resume`
//! ```
//!
//! Whoever mends the host (makes space, plugs the disk in again) need not tell: a machine that is held tries the
//! requests that were kept about every second, and goes on once none fails.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use atoll_api_types::{DiskImageFormat, DiskIo, DiskSpec, OnDiskError};
use atoll_foundation::throttle::RateLimits;
use atoll_storage::{AsyncDisk, Disk, DiskFormat, Engine, EngineKind, OpenOptions};
use atoll_virtio::blk::{Blk, BlkOptions, OnTrouble};

use crate::error::VmError;
use crate::limits::rate_limits;

/// Time between two attempts at requests that were kept.
pub(crate) const RETRY_TIME: Duration = Duration::from_secs(1);

/// Hears which disk is in trouble, by number, and why.
pub(crate) type TroubleSink = Box<dyn Fn(usize, String) + Send>;

/// One disk, open and locked.
pub(crate) struct DiskConfig {
    engine: Arc<Engine>,
    /// As the user named it.
    pub(crate) name: String,
    /// Serial number that the guest reads, at most 20 bytes.
    serial: String,
    on_error: OnDiskError,
    /// As they were set last.
    limits: Mutex<RateLimits>,
}

impl DiskConfig {
    /// Opens what `spec` names, the disk number `index`.
    pub(crate) fn open((index, spec): (usize, &DiskSpec)) -> Result<Self, VmError> {
        let options = OpenOptions { read_only: spec.readonly };
        let format = spec.format.map(|format| match format {
            DiskImageFormat::Raw => DiskFormat::Raw,
            DiskImageFormat::Qcow2 => DiskFormat::Qcow2,
        });
        let kind = match spec.io {
            DiskIo::Auto => EngineKind::Auto,
            DiskIo::IoUring => EngineKind::IoUring,
            DiskIo::Threads => EngineKind::Threads,
        };
        let disk = atoll_storage::open_disk(&spec.path, options, format)
            .map_err(|e| VmError::Disk(e.to_string()))?;
        let name = spec.path.display().to_string();
        let engine = Engine::new(disk, kind).map_err(|error| {
            VmError::Disk(format!(
                "disk {name}: io_uring cannot be used: {error}; choose io=auto or io=threads"
            ))
        })?;
        let limits = Mutex::new(rate_limits(&spec.limits));
        Ok(Self { engine, name, serial: format!("disk{index}"), on_error: spec.on_error, limits })
    }

    /// A disk that is open already.
    pub(crate) fn ready(index: usize, disk: Arc<dyn Disk>) -> Self {
        Self {
            engine: Engine::auto(disk),
            name: format!("disk {index}"),
            serial: format!("disk{index}"),
            on_error: OnDiskError::default(),
            limits: Mutex::default(),
        }
    }

    /// The device over it, with `queues` queues; `trouble` hears when it keeps requests.
    pub(crate) fn device(&self, queues: u16, trouble: OnTrouble) -> Arc<Blk> {
        let options = BlkOptions {
            serial: self.serial.clone(),
            queues,
            limits: *self.limits.lock().unwrap_or_else(PoisonError::into_inner),
            on_trouble: (self.on_error == OnDiskError::Pause).then_some(trouble),
            ..BlkOptions::default()
        };
        Blk::with_engine(self.engine.clone() as Arc<dyn AsyncDisk>, &options)
    }

    /// Notes limits that were set while the machine ran, for its next incarnation.
    pub(crate) fn set_limits(&self, device: &Blk, limits: RateLimits) {
        *self.limits.lock().unwrap_or_else(PoisonError::into_inner) = limits;
        device.set_limits(limits);
    }
}

/// Whom devices tell of trouble; the driver says so once it is there.
#[derive(Default)]
pub(crate) struct Troubles {
    sink: Mutex<Option<TroubleSink>>,
}

impl Troubles {
    pub(crate) fn connect(&self, sink: TroubleSink) {
        *self.sink.lock().unwrap_or_else(PoisonError::into_inner) = Some(sink);
    }

    /// What the device of disk `index` calls.
    pub(crate) fn of(self: &Arc<Self>, index: usize) -> OnTrouble {
        let troubles = self.clone();
        Arc::new(move |error| {
            let sink = troubles.sink.lock().unwrap_or_else(PoisonError::into_inner);
            if let Some(sink) = &*sink {
                sink(index, error.to_string());
            }
        })
    }
}
