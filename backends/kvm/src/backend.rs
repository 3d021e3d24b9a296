//! KVM as a kind of engine.

use std::sync::Arc;

use atoll_machine::backend::{Backend, BackendError, PartitionConfig};
use atoll_machine::cpu::model::BackendFeatures;

use crate::host::KvmHost;
use crate::partition::KvmPartition;

/// The host's KVM. Partitions keep what they need of it.
pub struct KvmBackend {
    host: Arc<KvmHost>,
}

impl KvmBackend {
    /// Opens `/dev/kvm`.
    ///
    /// # Errors
    ///
    /// As [`KvmHost::open`].
    pub fn open() -> Result<Self, BackendError> {
        Ok(Self::on(KvmHost::open()?))
    }

    /// The backend on a host that is open already.
    pub fn on(host: KvmHost) -> Self {
        Self { host: Arc::new(host) }
    }

    /// The host.
    pub fn host(&self) -> &KvmHost {
        &self.host
    }
}

impl Backend for KvmBackend {
    type Partition = KvmPartition;

    fn name(&self) -> &'static str {
        "kvm"
    }

    fn features(&self) -> BackendFeatures {
        self.host.features()
    }

    fn fixed_tsc_khz(&self) -> Option<u32> {
        // KVM_SET_TSC_KHZ succeeds on some hosts that cannot scale; only the capability tells.
        (!self.host.capabilities().tsc_control).then(|| self.host.tsc_khz())
    }

    fn create_partition(&self, config: PartitionConfig) -> Result<Arc<KvmPartition>, BackendError> {
        KvmPartition::new(&self.host, config)
    }
}
