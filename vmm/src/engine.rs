//! What executes a machine's instructions: the backends, behind one value.
//!
//! The machine is generic over its backend, so that port and memory accesses are dispatched statically; the driver
//! is not, because a machine moves from one backend to another while the driver keeps it.

use std::sync::Arc;

use atoll_cpu_software::partition::SoftwareBackend;
use atoll_kvm::KvmBackend;
use atoll_machine::backend::Backend;
use atoll_machine::control::SharedControl;
use atoll_machine::cpu::host::HostCpu;
use atoll_machine::cpu::model::{BackendFeatures, CpuModel};
use atoll_machine::time::HostClock;

use crate::accelerator::BackendKind;
use crate::config::Config;
use crate::error::VmError;
use crate::machine::{AnyMachine, Machine, Sink};

/// A backend that is ready to make machines.
#[derive(Clone)]
pub(crate) enum Engine {
    Software,
    Kvm(Arc<KvmBackend>),
}

impl Engine {
    /// The backend of that kind, opened.
    pub(crate) fn open(kind: BackendKind) -> Result<Self, VmError> {
        Ok(match kind {
            BackendKind::Software => Self::Software,
            BackendKind::Kvm => Self::Kvm(Arc::new(KvmBackend::open()?)),
        })
    }

    /// Which one it is.
    pub(crate) fn kind(&self) -> BackendKind {
        match self {
            Self::Software => BackendKind::Software,
            Self::Kvm(_) => BackendKind::Kvm,
        }
    }

    /// What it can give a guest here.
    pub(crate) fn features(&self) -> BackendFeatures {
        match self {
            Self::Software => SoftwareBackend.features(),
            Self::Kvm(kvm) => kvm.features(),
        }
    }

    /// The TSC frequency in kHz of a new machine.
    pub(crate) fn tsc_khz(&self, host: &HostCpu) -> u32 {
        let fixed = match self {
            Self::Software => SoftwareBackend.fixed_tsc_khz(),
            Self::Kvm(kvm) => kvm.fixed_tsc_khz(),
        };
        fixed.unwrap_or_else(|| HostClock::nominal_tsc_khz(host))
    }

    /// Whether a machine with `model` can run here: the features that are missing are named. A guest that was told
    /// that its processor leaks nothing by speculation is not moved to one that does.
    pub(crate) fn check(&self, model: &CpuModel) -> Result<(), VmError> {
        let features = self.features();
        let missing = model.missing_on(&HostCpu::detect(), &features);
        if missing.is_empty() && model.assurances_hold_on(&features) {
            return Ok(());
        }
        if missing.is_empty() {
            return Err(VmError::Model(format!(
                "the machine's guest relies on promises about speculative execution that {} cannot keep here; a \
                 machine that was started on it can come back to it",
                self.kind().name()
            )));
        }
        Err(VmError::Model(format!(
            "CPU model {} needs {missing}, which {} does not have here; choose another with --cpu",
            model.name,
            self.kind().name()
        )))
    }

    /// Builds the machine that `config` describes, in its power-on state.
    pub(crate) fn build(
        &self,
        config: &Config,
        control: SharedControl,
        serial: Sink,
        virtio: Sink,
    ) -> Result<Box<dyn AnyMachine>, VmError> {
        Ok(match self {
            Self::Software => Box::new(Machine::build(config, &SoftwareBackend, control, serial, virtio)?),
            Self::Kvm(kvm) => Box::new(Machine::build(config, kvm.as_ref(), control, serial, virtio)?),
        })
    }
}
